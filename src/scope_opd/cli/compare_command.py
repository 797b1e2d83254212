"""``scope compare``: evaluations on the same problems, side by side."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from scope_opd.errors import ConfigError, RunFolderError

EXAMPLES = """Examples:
  scope compare runs/eval-before runs/eval-after --out runs/comparison
  scope compare a/results.json b/results.json c/results.json --out runs/abc
"""


def compare(*evaluations: Path, out: Path) -> int:
    """Compare evaluations of the same problems with the first of them.

    Prints, for each benchmark, every evaluation's figures, the differences
    from the first with 95 % intervals over problems and p-values, and the
    problems won and lost. Writes comparison.json, comparison.md, and the
    Pass@k curves as passk.png and passk.svg.

    Parameters
    ----------
    evaluations
        Folders of scope eval, or their results.json; the first is the base.
    out
        Folder for the comparison.
    """
    from scope_opd.cli.show import show_table
    from scope_opd.evaluate.compare import compare as compare_evaluations
    from scope_opd.evaluate.compare import load_evaluations
    from scope_opd.evaluate.plots import plot_curves
    from scope_opd.evaluate.tables import COMPARISON_LABELS, comparison_markdown, comparison_notes, comparison_table

    if len(evaluations) < 2:
        raise ConfigError(f"evaluations named: {len(evaluations)}", "two or more", "name their folders")
    comparison = compare_evaluations(load_evaluations(evaluations))
    folder = out.expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(
            f"{folder}: {error.strerror}", "a folder that can be written", "choose another --out"
        ) from None
    for line in comparison["warnings"]:
        print(f"warning: {line}", file=sys.stderr)
    _write(folder / "comparison.json", json.dumps(comparison, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    _write(folder / "comparison.md", comparison_markdown(comparison))
    curves = plot_curves(comparison, folder)
    show_table(*comparison_table(comparison, few=True), labels=COMPARISON_LABELS)
    print("\n".join(comparison_notes(comparison)))
    print(f"comparison: {folder / 'comparison.json'}; curves: {curves[0]}")
    return 0


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"{path}: {error.strerror}", "a file that can be written", "check the disk") from None
