"""The figures of a report. Each function returns an inline SVG, or None when the runs hold nothing to draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scope_opd.report.groups import Group
from scope_opd.report.load import RolloutPoint, Route, Run, number
from scope_opd.report.results import Results
from scope_opd.report.svg import DASHES, GRID, INK, MUTED, SURFACE, new_figure, slot_colour, stage_colour, to_svg

FloatArray = NDArray[np.float64]
STAGES = (
    ("generation", "Generation", 0),
    ("verify", "Verification", 1),
    ("teacher", "Teacher scoring", 2),
    ("update", "Update", 3),
    ("sync", "Weights to samplers", 5),
)
"""Stage, its name, and the number of its colour in report.css."""
OTHER = 4
MAX_POINTS = 350
"""Marks in one scatter (evenly chosen by order of step beyond that), points of one curve."""


def series(run: Run, key: str) -> tuple[FloatArray, FloatArray]:
    """(steps, values) of a metric where it is a finite number."""
    found = [(row["step"], value) for row in run.metrics if (value := number(row.get(key))) is not None]
    steps, values = zip(*found, strict=True) if found else ((), ())
    return np.asarray(steps, dtype=np.float64), np.asarray(values, dtype=np.float64)


def smoothing_window(steps: int) -> int:
    """Steps of the centred moving average of bold lines: none below 20 steps, then about a tenth, odd."""
    return 1 if steps < 20 else max(3, steps // 10 | 1)


def mean_curve(curves: Sequence[tuple[FloatArray, FloatArray]], window: int) -> tuple[FloatArray, FloatArray]:
    """Mean over seeds at the steps that all of them have, then a centred moving average (shorter at the ends)."""
    shared = curves[0][0]
    for steps, _ in curves[1:]:
        shared = np.intersect1d(shared, steps)
    if shared.size == 0:
        return shared, shared
    mean = np.mean([values[np.searchsorted(steps, shared)] for steps, values in curves], axis=0)
    half = window // 2
    smooth = [mean[max(0, i - half) : i + half + 1].mean() for i in range(mean.size)]
    return shared, np.asarray(smooth)


def thinned(steps: FloatArray, values: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Long curves as means of equal stretches, so that the file does not grow with the run."""
    if steps.size <= MAX_POINTS:
        return steps, values
    stretches = np.array_split(np.arange(steps.size), MAX_POINTS)
    return np.array([steps[s].mean() for s in stretches]), np.array([values[s].mean() for s in stretches])


def curves(
    groups: Sequence[Group], key: str, name: str, title: str, *, percent: bool = False, zero: bool = False
) -> str | None:
    """A metric by step: seeds as thin lines, their mean (smoothed) bold."""
    drawn = [(group, [c for c in (series(run, key) for run in group.runs) if c[0].size]) for group in groups]
    drawn = [(group, found) for group, found in drawn if found]
    if not drawn:
        return None
    figure, axes = new_figure()
    scale = 100.0 if percent else 1.0
    for group, found in drawn:
        colour = slot_colour(group.slot)
        for steps, values in found:
            axes.plot(*thinned(steps, scale * values), color=colour, linewidth=0.6, alpha=0.4)
        steps, values = thinned(*mean_curve(found, smoothing_window(max(len(s) for s, _ in found))))
        axes.plot(
            steps, scale * values, color=colour, linestyle=DASHES[group.slot], marker="o" if len(steps) < 3 else ""
        )
    if zero:
        axes.set_ylim(bottom=0)
    _steps_axis(axes)
    if percent:
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    names = ", ".join(group.label for group, _ in drawn)
    return to_svg(figure, name, f"{title} by training step for {names}")


def _steps_axis(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10]))
    axes.margins(x=0.02)


def heldout_curve(groups: Sequence[Group], temperature: float, name: str) -> str | None:
    """Held-out Avg@n by step, where runs were evaluated on the way (at least three evaluations)."""
    figure, axes = new_figure()
    found = False
    for group in groups:
        lines = []
        for run in group.runs:
            rows = [
                row for row in run.evals if row["temperature"] == temperature and number(row.get("avg@k")) is not None
            ]
            if len(rows) >= 3:
                lines.append((np.array([float(r["step"]) for r in rows]), np.array([float(r["avg@k"]) for r in rows])))
        for steps, values in lines:
            axes.plot(steps, 100 * values, color=slot_colour(group.slot), linewidth=0.6, alpha=0.4)
        if lines:
            found = True
            steps, values = mean_curve(lines, 1)
            colour, dash = slot_colour(group.slot), DASHES[group.slot]
            axes.plot(steps, 100 * values, color=colour, linestyle=dash, marker="o", markersize=3.5)
    if not found:
        return None
    _steps_axis(axes)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    return to_svg(figure, name, "Held-out accuracy by training step")


def pass_at_k_curves(results: Results, temperature: float, name: str) -> str | None:
    """Pass@k against k (log scale) for start, methods and teacher."""
    lines = [line for line in results.lines if temperature in line.by_temperature]
    figure, axes = new_figure()
    found = False
    for line in lines:
        evaluated = line.by_temperature[temperature]
        if evaluated.counts is None:
            continue
        found = True
        ks = [k for k in (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128) if k <= evaluated.n]
        values = [100.0 * float(evaluated.values(k).mean()) for k in ks]
        if line.group is not None:
            colour, dash, width = slot_colour(line.group.slot), DASHES[line.group.slot], 1.8
        else:
            colour, dash, width = {"start": (MUTED, (0, (1, 2)), 1.4), "teacher": (INK, "solid", 1.0)}.get(
                line.role, (MUTED, "solid", 1.4)
            )
        axes.plot(ks, values, color=colour, linestyle=dash, linewidth=width)
    if not found:
        return None
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("k")
    axes.set_ylim(0, 102)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")
    return to_svg(figure, name, f"Pass@k against k at temperature {temperature:g}")


def relative_weights(runs: Sequence[Run], *, path: Route) -> list[tuple[RolloutPoint, float]]:
    """Rollouts of a path with their weight over the mean weight of that path in their group (1 = as any other)."""
    found: list[tuple[RolloutPoint, float]] = []
    for run in runs:
        groups: dict[tuple[int, str], list[RolloutPoint]] = {}
        for point in run.rollouts:
            if point.path == path and not point.masked and point.ppl is not None and point.weight is not None:
                groups.setdefault((point.step, point.group), []).append(point)
        for members in groups.values():
            mean = sum(abs(point.weight or 0.0) for point in members) / len(members)
            if mean > 0:
                found += [(point, abs(point.weight or 0.0) / mean) for point in members]
    return found


def perplexity(group: Group, name: str, *, path: Route) -> str | None:
    """Perplexities of one path: their histogram above, the relative weight each rollout got below."""
    found = relative_weights(group.runs, path=path)
    if not found:
        return None
    ppl = np.array([point.ppl for point, _ in found], dtype=np.float64)
    weight = np.array([relative for _, relative in found])
    chosen = np.unique(np.linspace(0, len(found) - 1, min(MAX_POINTS, len(found))).astype(int))
    ends = _ends(ppl)
    figure, (top, bottom) = new_figure(height_in=3.1, nrows=2, sharex=True, height_ratios=[3, 2])
    colour = slot_colour(group.slot)
    top.hist(
        np.clip(ppl, *ends), bins=np.linspace(*ends, 31), color=colour, alpha=0.85, edgecolor=SURFACE, linewidth=0.6
    )
    top.set_ylabel("rollouts")
    bottom.axhline(1.0, color=MUTED, linewidth=0.7)
    # a line of dots is one path with one shared marker: far smaller than a scatter of separate shapes
    bottom.plot(
        np.clip(ppl, *ends)[chosen], weight[chosen], "o", color=colour, markersize=2.6, markeredgewidth=0, alpha=0.55
    )
    bottom.set_ylabel("weight")
    figure.align_ylabels()
    bottom.set_xlim(*ends)
    low, high = min(0.95, float(weight.min())), max(1.05, float(weight.max()))
    bottom.set_ylim(low - 0.08 * (high - low), high + 0.08 * (high - low))
    who = group.perplexity_of(path)
    bottom.set_xlabel(f"{who}’s perplexity")
    described = f"{group.label}: perplexity of {rollouts_of(found)} on the {path} path by the {who}"
    return to_svg(figure, name, f"{described} and the weight each got")


def rollouts_of(found: Sequence[tuple[RolloutPoint, float]]) -> str:
    """What a path's rollouts are, in words: by verdict where all have the same."""
    verdicts = {point.correct for point, _ in found}
    if len(verdicts) != 1:
        return "correct and incorrect rollouts"
    return {True: "correct rollouts", False: "incorrect rollouts", None: "rollouts"}[verdicts.pop()]


def _ends(ppl: FloatArray) -> tuple[float, float]:
    """Plot range: up to the 99th percentile, so that one broken rollout does not flatten the picture."""
    low, high = float(ppl.min()), float(np.quantile(ppl, 0.99))
    return (low, high) if high > low * (1 + 1e-9) else (low - 0.05, high + 0.05)


def stage_means(group: Group) -> tuple[list[float], float] | None:
    """(mean seconds of each stage, mean seconds of a step) over all steps of all seeds.

    From timeline.jsonl, each second counted once (``spans.claimed``); without one as metrics.jsonl has them.
    """
    times = [time for run in group.runs for time in run.timeline]
    if times:
        stages = [float(np.mean([time.claimed[stage] for time in times])) for stage, _, _ in STAGES]
        return stages, float(np.mean([time.seconds for time in times]))
    stages = []
    for stage, _, _ in STAGES:
        values = np.concatenate([series(run, f"time/{stage}_s")[1] for run in group.runs])
        stages.append(float(values.mean()) if values.size else 0.0)
    steps = np.concatenate([series(run, "time/step_s")[1] for run in group.runs])
    whole = float(steps.mean()) if steps.size else sum(stages)
    return (stages, whole) if whole > 0 else None


def time_by_stage(groups: Sequence[Group], name: str) -> str | None:
    """Seconds a step by stage, one stacked bar a method."""
    found = [(group, means) for group in groups if (means := stage_means(group)) is not None]
    if not found:
        return None
    label_in = 0.2 + 0.066 * max(len(group.label) for group, _ in found)
    figure, axes = new_figure(width_in=10.4, height_in=0.5 + 0.34 * len(found), left_in=min(label_in, 4.0))
    for row, (_, (stages, whole)) in enumerate(found):
        left = 0.0
        colours = [colour for _, _, colour in STAGES] + [OTHER]
        for colour, seconds in zip(colours, [*stages, max(0.0, whole - sum(stages))], strict=True):
            bar = {"height": 0.62, "color": stage_colour(colour), "edgecolor": SURFACE, "linewidth": 0.8}
            axes.barh(row, seconds, left=left, **bar)
            left += seconds
        at = {"xytext": (5, 0), "textcoords": "offset points", "va": "center", "ha": "left"}
        axes.annotate(_seconds(whole), (left, row), color=INK, **at)
    # a label may hold settings of the user: "$" in one is text, not the start of mathtext
    axes.set_yticks(range(len(found)), [group.label for group, _ in found], color=INK, parse_math=False)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.grid(visible=True, axis="x", color=GRID)
    axes.spines["left"].set_visible(False)
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds a step")
    return to_svg(figure, name, "Mean seconds a step by stage for each method")


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:.0f} s"
