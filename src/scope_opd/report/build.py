"""``build_report``: run folders in, one self-contained HTML file out.

The file needs no network: styles, script, figures (inline SVG) and data are inside, and its content security policy
forbids everything else. It is a function of the run folders alone (no date of making), so the same runs give the same
file. What a killed or incomplete run lacks is said on the page; only a folder that is no run at all is an error.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path

from scope_opd import __version__
from scope_opd.errors import RunFolderError
from scope_opd.report import sections
from scope_opd.report.answer import headline, lede
from scope_opd.report.groups import Group, group_runs
from scope_opd.report.load import Run, find_runs, load_run
from scope_opd.report.results import collect
from scope_opd.report.timeline import one_step
from scope_opd.report.viewer import data_block, viewer_data


def build_report(runs: Sequence[Path], out: Path, *, title: str | None = None) -> Path:
    """Write the report of some runs.

    Args:
        runs: run folders, or folders that hold run folders. A folder whose run.json says ``"kind": "evaluation"`` and
            ``"label": "teacher"`` (or "start") gives that line of the table.
        out: the HTML file to write; its folder is made where missing.
        title: shown above the headline and as the page's title.

    Returns:
        ``out``.

    Raises:
        RunFolderError: a folder that is no run, or ``out`` cannot be written.
    """
    out = Path(out)
    if out.is_dir():
        raise RunFolderError(f"{out} is a folder", "a file name for the report", f"for example {out / 'report.html'}")
    page = render([load_run(path) for path in find_runs([Path(path) for path in runs])], title=title)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(page, encoding="utf-8")
        partial.replace(out)
    except OSError as error:
        partial.unlink(missing_ok=True) if out.parent.is_dir() else None
        raise RunFolderError(f"{out}: {error.strerror}", "a file that can be written", "choose another --out") from None
    return out


def render(runs: Sequence[Run], *, title: str | None = None) -> str:
    """The page of loaded runs as text."""
    groups, condition_notes = group_runs(runs)
    results = collect(groups, runs)
    data, viewer_notes = viewer_data(groups)
    found = [
        sections.result(results),
        sections.learning(groups, results),
        sections.weights(groups),
        sections.timing(groups),
        one_step(groups),
        sections.events(runs),
        sections.rollouts(data, viewer_notes),
        sections.settings(runs),
    ]
    parts = [part for part in found if part is not None]
    notes = [*condition_notes, *results.notes, *(f"{run.name}: {note}" for run in runs for note in run.notes)]
    finding, detail = headline(results, groups)
    more = lede(results)
    script = _asset("report.js")
    return _fill(
        _asset("page.html"),
        {
            "title": escape(f"{title}: {finding}" if title else f"{finding} (SCOPE report)"),
            "eyebrow": escape(_eyebrow(groups, runs, title)),
            "headline": escape(finding),
            "detail": escape(detail),
            "lede": f'<p class="lede">{escape(more)}</p>' if more else "",
            "nav": "".join(f'<a href="#{part.anchor}">{escape(part.title)}</a>' for part in parts),
            "notes": _notes(notes),
            "sections": "\n".join(part.html for part in parts),
            "runs": escape(", ".join(run.name for run in runs)),
            "version": escape(__version__),
            "css": _asset("report.css"),
            "js": script,
            "script_hash": _source_hash(script),
            "data": f'<script type="application/json" id="rollouts-data">{data_block(data)}</script>' if data else "",
        },
    )


def _eyebrow(groups: Sequence[Group], runs: Sequence[Run], title: str | None) -> str:
    trained = sum(len(group.runs) for group in groups)
    models = sorted({str(run.info["model"]) for run in runs if run.info.get("model") and run.kind == "training"})
    teachers = sorted({str(run.info["teacher"]) for run in runs if run.info.get("teacher") and run.kind == "training"})
    pair = f"{', '.join(models)} ← {', '.join(teachers)}" if models and teachers else ", ".join(models)
    dates = sorted({str(run.info["created"])[:10] for run in runs if run.info.get("created")})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}" if dates else ""
    count = f"{trained} run{'s' * (trained != 1)}" if trained else ""
    return "  ·  ".join(part for part in (title or "SCOPE report", pair, count, when) if part)


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    items = "".join(f"<li>{escape(note)}</li>" for note in dict.fromkeys(notes))
    return f'<aside class="notes"><p>Before you read on</p><ul>{items}</ul></aside>'


def _asset(name: str) -> str:
    return resources.files("scope_opd.report").joinpath(name).read_text(encoding="utf-8")


def _source_hash(script: str) -> str:
    """The one script that the page's policy allows."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"


def _fill(template: str, values: Mapping[str, str]) -> str:
    """Replace every ``{{name}}`` in one pass, so that inserted text is never searched for more of them."""
    return re.sub(r"\{\{(\w+)\}\}", lambda match: values[match[1]], template)
