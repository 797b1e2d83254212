"""Pass@k against k, a panel a benchmark, a line an evaluation, with 95 % bands. matplotlib, imported when it is drawn.

Not covered: interactive figures; the report of run folders draws its own.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Okabe and Ito's, which colour-blind readers can tell apart; dashes tell a second round of them."""
_STYLES = ("-", "--", ":")
_MARKERS = "osD^vPX"
"""One a colour: lines stay apart in grey, too. Later ones are smaller, so that one on top of another hides nothing."""
PANELS_A_ROW = 3


def plot_curves(comparison: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw ``passk.png`` and ``passk.svg`` from a comparison; returns their paths."""
    import matplotlib

    with matplotlib.rc_context({"svg.hashsalt": "scope", "font.size": 9}):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        names = list(comparison["benchmarks"])
        columns = min(PANELS_A_ROW, len(names))
        rows = math.ceil(len(names) / columns)
        figure = Figure(figsize=(3.6 * columns, 2.9 * rows + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        for axis, name in zip(axes, names, strict=False):
            _panel(axis, name, comparison["benchmarks"][name])
        for axis in axes[len(names) :]:
            axis.axis("off")
        handles, labels = next(iter(figure.axes)).get_legend_handles_labels()
        figure.legend(
            handles,
            labels,
            loc="outside lower center",
            ncols=min(4, len(labels)),
            frameon=False,
            title="unbiased; bands: 95 % intervals over problems",
            title_fontsize="small",
        )
        paths = [folder / "passk.png", folder / "passk.svg"]
        figure.savefig(paths[0], dpi=160)
        figure.savefig(paths[1], metadata={"Date": None})
    return paths


def _panel(axis: Any, name: str, entry: Mapping[str, Any]) -> None:
    found = entry["figures"]
    ks = [1, *(int(figure.removeprefix("pass@")) for figure in found if figure != "avg@k")]
    series = [found["avg@k"], *(found[figure] for figure in found if figure != "avg@k")]
    for index, label in enumerate(found["avg@k"]["values"]):
        points = [each["values"][label] for each in series]
        colour = COLOURS[index % len(COLOURS)]
        style = _STYLES[index // len(COLOURS) % len(_STYLES)]
        axis.plot(
            ks,
            [100 * p["value"] for p in points],
            style,
            color=colour,
            marker=_MARKERS[index % len(_MARKERS)],
            markersize=max(3, 6 - index),
            linewidth=max(0.8, 2 - 0.4 * index),
            label=label,
        )
        low, high = ([100 * p["ci95"][end] for p in points] for end in (0, 1))
        axis.fill_between(ks, low, high, color=colour, alpha=0.12, linewidth=0)
    axis.set_xscale("log", base=2)
    axis.set_xticks(ks, [str(k) for k in ks])
    axis.minorticks_off()
    axis.set_title(name)
    axis.set_xlabel("k")
    axis.set_ylabel("Pass@k, %")
    axis.grid(alpha=0.3)
