"""What an evaluation shows while it runs: a live bar on a terminal, plain lines elsewhere. All on stderr."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column

_PLAIN_INTERVAL_S = 2.0
_SILENCE_S = 15.0
"""Without the end of a sample for so long, a line says that it goes on; then after twice as long, and so on."""
_LONGEST_SILENCE_S = 60.0
_RATE_WINDOW_S = 60.0
"""The rate that is shown, and from which the time left follows, is that of the last minute."""


class Meter:
    """Counts samples and tokens, and says how fast they come."""

    def __init__(self) -> None:
        self.done = self.total = self.tokens = self.new = 0
        self.began = time.monotonic()
        self._marks: list[tuple[float, int, int]] = []

    def begin(self, done: int, total: int) -> None:
        self.done, self.total, self.began = done, total, time.monotonic()
        self._marks = [(self.began, 0, 0)]

    def add(self, tokens: int) -> None:
        now = time.monotonic()
        self.done, self.new, self.tokens = self.done + 1, self.new + 1, self.tokens + tokens
        if now - self._marks[-1][0] >= 1.0:
            self._marks.append((now, self.new, self.tokens))
            while len(self._marks) > 2 and now - self._marks[1][0] > _RATE_WINDOW_S:
                self._marks.pop(0)

    def figures(self) -> str:
        """ "1234 tok/s  0:42 left" """
        since, samples, tokens = self._marks[0]
        seconds = max(time.monotonic() - since, 1e-6)
        rate = (self.new - samples) / seconds
        left = f"{_clock((self.total - self.done) / rate)} left" if rate > 0 else ""
        fresh = self.tokens - tokens
        return "  ".join(part for part in (f"{fresh / seconds:.0f} tok/s" if fresh else "", left) if part)


class Heartbeat:
    """A thread that speaks up when nothing has been heard for a while: a batch's first sample may take many minutes.

    Args:
        say: called with the seconds of silence so far, first after ``_SILENCE_S``.
        longest_s: seconds between two calls at most.
    """

    def __init__(self, say: Callable[[float], None], longest_s: float) -> None:
        self._say, self._longest_s = say, longest_s
        self._closed = threading.Event()
        self._heard = time.monotonic()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        self._heard = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="heartbeat", daemon=True)
        self._thread.start()

    def hear(self) -> None:
        """Something has happened."""
        self._heard = time.monotonic()

    def close(self) -> None:
        self._closed.set()
        if self._thread is not None:
            self._thread.join(1)

    def _run(self) -> None:
        heard, wait = self._heard, _SILENCE_S
        due = heard + wait
        while not self._closed.wait(max(0.0, due - time.monotonic())):
            if self._heard != heard:
                heard, wait = self._heard, _SILENCE_S
                due = heard + wait
                continue
            self._say(time.monotonic() - heard)
            due += min(wait, self._longest_s)
            wait = min(2 * wait, self._longest_s)


class LiveProgress:
    """One bar over all samples."""

    def __init__(self, console: Console, meter: Meter, doing: str) -> None:
        self._meter = meter
        self._doing = doing
        self._heartbeat = Heartbeat(self._silent, 1.0)
        self._bars = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=10)),
            BarColumn(bar_width=None, table_column=Column(min_width=8, max_width=24, ratio=1)),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[figures]}", table_column=Column(no_wrap=True, overflow="ellipsis")),
            console=console,
        )
        self._task = self._bars.add_task("samples", total=None, figures="")

    def begin(self, done: int, total: int) -> None:
        self._meter.begin(done, total)
        self._bars.update(self._task, completed=done, total=total)
        self._bars.start()
        self._heartbeat.start()

    def benchmark(self, name: str) -> None:
        self._bars.update(self._task, description=name)

    def sample(self, tokens: int) -> None:
        self._heartbeat.hear()
        self._meter.add(tokens)
        self._bars.update(self._task, completed=self._meter.done, figures=self._meter.figures())

    def close(self) -> None:
        self._heartbeat.close()
        self._bars.stop()

    def _silent(self, seconds: float) -> None:
        self._bars.update(self._task, figures=f"{self._doing}, {_clock(seconds)}")


class PlainProgress:
    """A line at most every two seconds, and one at the end; in between, where no sample ends, that it goes on."""

    def __init__(self, console: Console, meter: Meter, doing: str) -> None:
        self._console, self._meter, self._doing = console, meter, doing
        self._heartbeat = Heartbeat(self._silent, _LONGEST_SILENCE_S)
        self._name, self._last = "", float("-inf")

    def begin(self, done: int, total: int) -> None:
        self._meter.begin(done, total)
        self._last = time.monotonic()
        if done:
            self._line(f"{done} of {total} samples are there already")
        self._heartbeat.start()

    def benchmark(self, name: str) -> None:
        self._name = name

    def sample(self, tokens: int) -> None:
        self._heartbeat.hear()
        self._meter.add(tokens)
        now = time.monotonic()
        if now - self._last >= _PLAIN_INTERVAL_S or self._meter.done == self._meter.total:
            self._last = now
            meter = self._meter
            self._line(f"{self._name}  {meter.done}/{meter.total} samples  {meter.figures()}".rstrip())

    def close(self) -> None:
        self._heartbeat.close()

    def _silent(self, seconds: float) -> None:
        done = f"{self._meter.done}/{self._meter.total} samples"
        self._line(f"{self._name}  {done}  {self._doing}, {_clock(seconds)}")

    def _line(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)


def open_progress(meter: Meter, doing: str = "decoding") -> LiveProgress | PlainProgress:
    """Live on a terminal.

    Args:
        meter: counts.
        doing: what goes on while no sample ends.
    """
    console = Console(stderr=True)
    return (LiveProgress if console.is_terminal else PlainProgress)(console, meter, doing)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
