"""``scope report``: run folders to one HTML file."""

from __future__ import annotations

from pathlib import Path

EXAMPLES = """Examples:
  scope report runs/mine --out mine.html
  scope report runs/demo --out demo.html
"""


def report(*runs: Path, out: Path = Path("report.html")) -> int:
    """Turn run folders into one self-contained HTML file.

    It shows results with intervals, learning curves, weights and rollouts.
    Folders of training runs (scope train) and of evaluations (those that
    scope demo leaves) may be mixed.

    Parameters
    ----------
    runs
        Run folders, one or more.
    out
        The file to write; it is replaced if it exists.
    """
    from scope_opd.errors import DataError
    from scope_opd.report import build_report

    if not runs:
        raise DataError("no run folder named", "at least one", "for example scope report runs/demo")
    build_report([run.expanduser() for run in runs], out.expanduser())
    print(f"report: {out}")
    return 0
