"""What a run shows while it goes: a live line on a terminal, plain lines elsewhere. All on stderr."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any, Protocol

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

_PLAIN_INTERVAL_S = 2.0
_NAMES = {"forward_backward": "update", "optimiser": "update"}


class Display(Protocol):
    """How the loop reports. ``begin`` says how many steps are behind; ``close`` may come without it."""

    def begin(self, done: int) -> None: ...
    def phase(self, step: int, phase: str) -> None: ...
    def inside(self, done: int, total: int) -> None: ...
    def step(self, metrics: Mapping[str, Any]) -> None: ...
    def note(self, line: str) -> None: ...
    def close(self) -> None: ...


def open_display(live: bool | None, *, steps: int) -> Display:
    """A ``LiveDisplay`` on a terminal (or if ``live`` is True), else a ``PlainDisplay``."""
    console = Console(stderr=True)
    wanted = console.is_terminal if live is None else live
    return LiveDisplay(console, steps) if wanted else PlainDisplay(console, steps)


def summary(metrics: Mapping[str, Any]) -> str:
    """The figures of a step that fit on a line."""
    parts = []
    for label, key in (("loss", "loss"), ("accuracy", "accuracy"), ("entropy", "entropy"), ("length", "length/mean")):
        if metrics.get(key) is not None:
            parts.append(f"{label} {metrics[key]:.3g}")
    if metrics.get("perf/tokens_per_s") is not None:
        parts.append(f"{metrics['perf/tokens_per_s']:.0f} tok/s")
    return "  ".join(parts)


class LiveDisplay:
    """A bar for the run's steps and one for the phase inside a step."""

    def __init__(self, console: Console, steps: int) -> None:
        self._bars = Progress(
            # On a narrow terminal the figures are cut, not the counts.
            TextColumn("{task.description:<10}", table_column=Column(no_wrap=True, min_width=10)),
            BarColumn(bar_width=None, table_column=Column(min_width=8, max_width=24, ratio=1)),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=2 * len(str(steps)) + 1)),
            TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
            TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
        )
        self._run: TaskID = self._bars.add_task("steps", total=steps, figures="")
        self._inner: TaskID = self._bars.add_task("", total=None, figures="")

    def begin(self, done: int) -> None:
        self._bars.update(self._run, completed=done)
        self._bars.start()

    def phase(self, step: int, phase: str) -> None:
        self._bars.reset(self._inner, description=_NAMES.get(phase, phase), total=None)

    def inside(self, done: int, total: int) -> None:
        self._bars.update(self._inner, completed=done, total=total)

    def step(self, metrics: Mapping[str, Any]) -> None:
        self._bars.update(self._run, completed=metrics["step"] + 1, figures=summary(metrics))

    def note(self, line: str) -> None:
        self._bars.console.print(escape(line), highlight=False)

    def close(self) -> None:
        self._bars.stop()


class PlainDisplay:
    """One line a step, at most one every two seconds (the first and the last always)."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console, self._steps, self._start = console, steps, 0
        self._began = time.monotonic()
        self._last = float("-inf")

    def begin(self, done: int) -> None:
        self._start, self._began = done, time.monotonic()

    def phase(self, step: int, phase: str) -> None:
        pass

    def inside(self, done: int, total: int) -> None:
        pass

    def step(self, metrics: Mapping[str, Any]) -> None:
        done, now = metrics["step"] + 1, time.monotonic()
        if now - self._last < _PLAIN_INTERVAL_S and done != self._steps:
            return
        self._last = now
        left = (now - self._began) / max(done - self._start, 1) * (self._steps - done)
        self.note(f"step {done}/{self._steps}  {summary(metrics)}  {_clock(left)} left")

    def note(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        pass


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
