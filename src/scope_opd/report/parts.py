"""Small pieces of HTML that sections are made of: figures with captions, legends, notes on what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from scope_opd.report.groups import Group
from scope_opd.report.results import Results
from scope_opd.report.svg import DASHES


@dataclass(frozen=True, slots=True)
class Section:
    anchor: str
    title: str
    html: str


def section(anchor: str, title: str, intro: str, *parts: str) -> Section:
    """A section; ``intro`` and ``parts`` are HTML."""
    lead = f"<p>{intro}</p>" if intro else ""
    body = "".join(part for part in parts if part)
    return Section(anchor, title, f'<section id="{anchor}"><h2>{escape(title)}</h2>{lead}{body}</section>')


def figure(title: str, svg: str | None, caption: str, *, wide: bool = False) -> str:
    """A figure with its caption, "" where there is nothing to draw."""
    if svg is None:
        return ""
    kind = ' class="wide"' if wide else ""
    return f"<figure{kind}><h3>{escape(title)}</h3>{svg}<figcaption>{caption}</figcaption></figure>"


def figures(*found: str) -> str:
    """Figures in two columns."""
    shown = [one for one in found if one]
    return f'<div class="figures">{"".join(shown)}</div>' if shown else ""


def missing(text: str) -> str:
    """What a reader would look for here, and why it is not there."""
    return f'<p class="missing">{escape(text)}</p>'


def table(kind: str, head: str, rows: Sequence[str], *, caption: str = "", columns: str = "") -> str:
    """A table that scrolls inside its own box on narrow screens."""
    above = f"<caption>{caption}</caption>" if caption else ""
    return (
        f'<div class="scroll"><table class="{kind}">{above}{columns}<thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def swatch(group: Group | None, role: str = "method") -> str:
    """A short piece of the line that stands for a method in every figure."""
    if group is not None:
        pattern = DASHES[group.slot]
        dash = "" if pattern == "solid" else f' stroke-dasharray="{" ".join(f"{1.8 * d:g}" for d in pattern[1])}"'
    else:
        dash = ' stroke-dasharray="1.6 3"' if role == "start" else ""
    return (
        f'<svg class="swatch" viewBox="0 0 28 10" aria-hidden="true"><path d="M1 5H27" '
        f'style="stroke:{colour_of(group, role)}"{dash}/></svg>'
    )


def colour_of(group: Group | None, role: str) -> str:
    """The CSS colour of a line of the table."""
    if group is not None:
        return f"var(--s{group.slot})"
    return "var(--ink)" if role == "teacher" else "var(--muted)"


def legend(groups: Sequence[Group], results: Results | None = None) -> str:
    """Methods, and with ``results`` the start and the teacher, with their line in figures."""
    items = [f"<li>{swatch(group)}{escape(group.label)}</li>" for group in groups]
    others = [line for line in (results.lines if results else []) if line.group is None and line.by_temperature]
    items += [f"<li>{swatch(None, line.role)}{escape(line.label)}</li>" for line in others]
    return f'<ul class="legend">{"".join(items)}</ul>'
