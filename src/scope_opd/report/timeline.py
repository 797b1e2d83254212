"""One step in time: when each stage was at work (timeline.jsonl), drawn as HTML that scales with the page.

A group of runs is represented by the first of its runs that has a timeline. Stages that this module does not know are
left out. Not covered: which rollout a stretch belongs to.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from scope_opd.report.groups import Group
from scope_opd.report.load import Run, Spans, StepTime, number, read_spans
from scope_opd.report.parts import Section, section, swatch, table
from scope_opd.spans import Span, length, union, without

STAGES = {
    "generation": ("Generation", 0),
    "verify": ("Verification", 1),
    "teacher": ("Teacher", 2),
    "sync": ("Weights to samplers", 5),
    "update": ("Update", 3),
}
"""Stage -> its name and the number of its colour in report.css."""

SHOWN = 3
"""Groups that are drawn at once; the others are folded away."""

UNITS = 1000
"""Units of a lane from the axis's left to its right. What lies closer together than one is drawn as one."""


@dataclass(frozen=True, slots=True)
class Axis:
    """Seconds from the left to the right of a lane."""

    low: float
    high: float

    def at(self, second: float) -> float:
        """The place of a second, 0 to ``UNITS``."""
        return UNITS * (second - self.low) / (self.high - self.low)

    def ticks(self) -> list[float]:
        """Round numbers on the axis, three to seven of them."""
        raw = (self.high - self.low) / 6
        size = 10.0 ** math.floor(math.log10(raw))
        step = size * next(factor for factor in (1, 2, 5, 10) if factor * size >= raw * (1 - 1e-9))
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        return [round(index * step, 9) for index in range(first, last + 1)]


@dataclass(frozen=True, slots=True)
class Drawn:
    """A step as it is drawn.

    Attributes:
        alone: stretches in which the teacher was the only stage at work for this step.
    """

    run: Run
    time: StepTime
    lanes: dict[str, list[Span]]
    alone: list[Span]

    @property
    def row(self) -> dict[str, Any]:
        """The step's metrics, empty where there are none."""
        return next((row for row in self.run.metrics if row["step"] == self.time.step), {})

    @property
    def exposed_s(self) -> float:
        """Seconds of the step in which no stage but the teacher was at work for any step."""
        exposed = number(self.row.get("time/teacher_exposed_s"))
        return length(self.alone) if exposed is None else exposed

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last second that the picture must hold."""
        spans = [span for lane in self.lanes.values() for span in lane]
        return min([0.0, *(begin for begin, _ in spans)]), max([self.time.seconds, *(end for _, end in spans)])


def lanes_of(spans: Spans) -> tuple[dict[str, list[Span]], list[Span]]:
    """Each known stage's stretches, and those in which the teacher alone was at work."""
    lanes = {stage: union(spans.get(stage, ())) for stage in STAGES}
    others = union(span for stage, lane in lanes.items() if stage != "teacher" for span in lane)
    return lanes, without(lanes["teacher"], others)


def hidden_share(run: Run) -> float | None:
    """Mean over steps of the share of the teacher's time that was hidden; None where it never worked."""
    shares = [share for row in run.metrics if (share := number(row.get("perf/teacher_hidden_share"))) is not None]
    return sum(shares) / len(shares) if shares else None


def choices(run: Run) -> dict[str, StepTime]:
    """The steps to choose from: of median duration (the shorter of two), the slowest, the last."""
    by_seconds = sorted(run.timeline, key=lambda time: time.seconds)
    return {"median": by_seconds[(len(by_seconds) - 1) // 2], "slowest": by_seconds[-1], "last": run.timeline[-1]}


def one_step(groups: Sequence[Group]) -> Section | None:
    """The section, None where no run has a timeline."""
    runs = [(group, next((run for run in group.runs if run.timeline), None)) for group in groups]
    found = [(group, run) for group, run in runs if run is not None]
    if not found:
        return None
    chosen = {id(run): choices(run) for _, run in found}
    several = any(len({time.step for time in steps.values()}) > 1 for steps in chosen.values())
    names = ("median", "slowest", "last") if several else ("median",)
    panels = []
    for name in names:
        drawn = [(group, _drawn(run, chosen[id(run)][name])) for group, run in found]
        ends = [step.ends for _, step in drawn]
        axis = Axis(min(begin for begin, _ in ends), max(end for _, end in ends))
        pictures = [_picture(group, step, axis) for group, step in drawn]
        folded = [
            f"<details><summary>The same for {escape(group.label)}</summary>{picture}</details>"
            for (group, _), picture in zip(drawn[SHOWN:], pictures[SHOWN:], strict=True)
        ]
        panels.append(f'<div class="panel {name}">{"".join(pictures[:SHOWN] + folded)}</div>')
    intro = (
        "When each stage of a step was at work, in seconds from the step’s begin; the same scale for all methods. The "
        "teacher’s time is hidden while another stage works too; where it alone was at work for this step, "
        "its bar is higher and framed."
    )
    return section("timeline", "One step in time", intro, _choice(names), *panels, _table(found))


def _choice(names: Sequence[str]) -> str:
    """Radio buttons that the style sheet alone acts on; "" where there is nothing to choose."""
    if len(names) < 2:
        return ""
    return "".join(
        f'<input type="radio" name="timeline" id="timeline-{name}"{" checked" if index == 0 else ""}>'
        f'<label for="timeline-{name}">{name.capitalize()} step</label>'
        for index, name in enumerate(names)
    )


def _drawn(run: Run, time: StepTime) -> Drawn:
    return Drawn(run, time, *lanes_of(next(read_spans(run, [time]))))


def _picture(group: Group, drawn: Drawn, axis: Axis) -> str:
    ticks = axis.ticks()
    grid = "".join(f"M{axis.at(tick):.1f} 0V10" for tick in ticks)
    edges = "".join(f"M{axis.at(second):.1f} 0V10" for second in (0.0, drawn.time.seconds))
    lanes = []
    for stage, (name, colour) in STAGES.items():
        stretches = drawn.lanes[stage]
        bars = f'<path class="work" style="--c:var(--t{colour})" d="{_bars(stretches, axis, 2.5, 5)}"/>'
        if stage == "teacher" and drawn.alone:
            bars += f'<path class="alone" style="--c:var(--t{colour})" d="{_bars(drawn.alone, axis, 0.5, 9)}"/>'
        lanes.append(
            f'<span class="stage">{name}</span><span class="busy">{_s(length(stretches))}</span>'
            f'<svg viewBox="0 0 {UNITS} 10" preserveAspectRatio="none" role="img" '
            f'aria-label="{_told(name, stretches)}"><path class="grid" d="{grid}"/><path class="edge" d="{edges}"/>'
            f"{bars}</svg>"
        )
    marks = "".join(f'<i style="left:{axis.at(tick) / UNITS:.2%}">{tick:g} s</i>' for tick in ticks)
    return (
        f"<figure><h3>{swatch(group)}{escape(group.label)}, step {drawn.time.step} of {escape(drawn.run.name)}</h3>"
        f'<div class="lanes">{"".join(lanes)}<div class="seconds">{marks}</div></div>'
        f"<figcaption>{_caption(drawn)}</figcaption></figure>"
    )


def _bars(stretches: list[Span], axis: Axis, top: float, height: float) -> str:
    """A path of rectangles; stretches less than a unit apart are drawn as one."""
    parts: list[Span] = []
    for begin, end in ((axis.at(begin), axis.at(end)) for begin, end in stretches):
        if parts and begin - parts[-1][1] < 1:
            parts[-1] = (parts[-1][0], end)
        else:
            parts.append((begin, end))
    return "".join(f"M{begin:.1f} {top}h{end - begin:.1f}v{height}h{begin - end:.1f}z" for begin, end in parts)


def _caption(drawn: Drawn) -> str:
    busy, exposed = length(drawn.lanes["teacher"]), drawn.exposed_s
    told = f"The step took {_s(drawn.time.seconds)}. "
    if busy <= 0:
        told += "The teacher was not at work."
    else:
        share = number(drawn.row.get("perf/teacher_hidden_share"))
        hidden = _percent(1 - exposed / busy if share is None else share)
        told += f"The teacher was at work for {_s(busy)}, {hidden} of it hidden: for {_s(exposed)} it worked alone."
    if drawn.ends[0] < 0:
        told += (
            " What lies before 0 ran ahead, beside the step before; likewise work for the step after may have hidden "
            "the teacher’s, which is not drawn but counted."
        )
    return told


def _told(name: str, stretches: list[Span]) -> str:
    if not stretches:
        return f"{name}: not at work"
    count = len(stretches)
    times = f"in {count} stretches between" if count > 1 else "between"
    return f"{name}: at work for {_s(length(stretches))} {times} {_s(stretches[0][0])} and {_s(stretches[-1][1])}"


def _table(found: Sequence[tuple[Group, Run]]) -> str:
    """Seconds at work of each stage in the median step, and the hidden share over all steps."""
    rows = []
    for group, run in found:
        drawn = _drawn(run, choices(run)["median"])
        share = hidden_share(run)
        cells = [_s(drawn.time.seconds), *(_s(length(drawn.lanes[stage])) for stage in STAGES), _s(drawn.exposed_s)]
        cells.append("–" if share is None else _percent(share))
        numbers = "".join(f'<td class="num">{cell}</td>' for cell in cells)
        rows.append(f'<tr><th scope="row">{swatch(group)}{escape(group.label)}</th>{numbers}</tr>')
    heads = ["The step", *(name for name, _ in STAGES.values()), "Teacher alone", "Teacher hidden, all steps"]
    head = "<th></th>" + "".join(f'<th scope="col" class="num">{name}</th>' for name in heads)
    return table("plain", head, rows, caption="The median step: time at work")


def _s(seconds: float) -> str:
    """Seconds to three figures or so, in one piece."""
    digits = 0 if abs(seconds) >= 100 else 1 if abs(seconds) >= 10 else 2
    return f"{seconds:.{digits}f}\N{NO-BREAK SPACE}s".replace("-", "−")


def _percent(share: float) -> str:
    return f"{100 * share:.0f}\N{NO-BREAK SPACE}%"
