"""matplotlib figures as inline SVG that follows the page: its font, its light and dark colours.

Figures are drawn with sentinel colours, which are then replaced by ``currentColor`` and CSS variables, so one drawing
serves both colour schemes. Text stays text (``svg.fonttype = none``). matplotlib is imported on first use.
"""

from __future__ import annotations

import io
import re
from html import escape
from typing import Any

INK, MUTED, GRID, SURFACE = "#010203", "#040506", "#070809", "#0a0b0c"
_VARIABLES = {INK: "currentColor", MUTED: "var(--muted)", GRID: "var(--grid)", SURFACE: "var(--surface)"}
DASHES: tuple[Any, ...] = (
    "solid",
    (0, (6, 2)),
    (0, (2.2, 1.4)),
    (0, (7, 1.6, 1.6, 1.6)),
    (0, (4, 1.2)),
    (0, (1.2, 1.2)),
    (0, (9, 2)),
    (0, (5, 1.5, 1, 1.5, 1, 1.5)),
    (0, (3, 3)),
    (0, (8, 1, 2, 1)),
)
"""One dash pattern a slot: methods can be told apart without colour."""

_STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "scope",
    "font.size": 8.5,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.labelsize": 8.5,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "xtick.major.width": 0.6,
    "ytick.major.size": 0,
    "text.color": INK,
    "lines.solid_capstyle": "round",
    "lines.linewidth": 1.8,
    "path.simplify_threshold": 0.3,
}


def slot_colour(slot: int) -> str:
    """The sentinel of a method's colour, ``--s<slot>`` in the style sheet."""
    return f"#0d0e{slot:02x}"


def stage_colour(stage: int) -> str:
    """The sentinel of a stage's colour, ``--t<stage>``."""
    return f"#0f10{stage:02x}"


def new_figure(
    width_in: float = 5.2, height_in: float = 2.5, *, left_in: float = 0.5, **subplots: Any
) -> tuple[Any, Any]:
    """(figure, axes) in the house style, without pyplot's global state.

    Margins are fixed, in inches, so that the axes of neighbouring figures line up (and no layout has to be solved).
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(width_in, height_in))
        figure.subplots_adjust(
            left=left_in / width_in,
            right=1 - 0.08 / width_in,
            bottom=0.36 / height_in,
            top=1 - 0.09 / height_in,
            hspace=0.12,
        )
        axes = figure.subplots(**subplots)
    return figure, axes


def to_svg(figure: Any, name: str, description: str) -> str:
    """The figure as an ``<svg>`` element for inlining.

    Args:
        name: unique on the page; prefixes the ids inside.
        description: what a reader who cannot see it should know.
    """
    import matplotlib as mpl

    buffer = io.StringIO()
    with mpl.rc_context(_STYLE):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r"<style[^>]*>.*?</style>", "", svg, flags=re.S)  # it would style the whole page
    svg = re.sub(r"<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)
    svg = re.sub(r'(id="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(r'font: ([\d.]+)px [^;"]*', r"font-size: \1px", svg)
    svg = re.sub(r"font-family: [^;\"]*;? ?", "", svg)
    svg = re.sub(r'="[^"]*"', lambda m: re.sub(r"(\d+\.\d{2})\d+", r"\1", m[0]), svg)  # attributes, never labels
    for sentinel, value in _VARIABLES.items():
        svg = svg.replace(sentinel, value)
    svg = re.sub(r"#0d0e([0-9a-f]{2})", lambda m: f"var(--s{int(m[1], 16)})", svg)
    svg = re.sub(r"#0f10([0-9a-f]{2})", lambda m: f"var(--t{int(m[1], 16)})", svg)
    svg = re.sub(r"\s*\n\s*", "\n", svg)
    size = re.search(r'viewBox="([^"]*)"', svg)
    assert size is not None
    opening = f'<svg class="plot" viewBox="{size[1]}" role="img" aria-label="{escape(description)}"'
    return opening + ' xmlns:xlink="http://www.w3.org/1999/xlink">' + svg[svg.index(">") + 1 :].strip()
