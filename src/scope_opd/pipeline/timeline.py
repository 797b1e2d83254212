"""When which stage of which step was at work, and for how long one was the only one.

Safe from several threads. A stage is at work while at least one of its parts is (a verdict, a request, a sync). Not
covered: who waits for whom, work outside the stages (evaluation, saving).
"""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from scope_opd.spans import Span, length, union, within, without

STAGES = ("generation", "verify", "teacher", "sync", "update")
MAX_SPANS = 4096
"""Spans kept for a stage of a step at most; beyond that the shortest gaps are closed."""


class Timeline:
    """Busy spans by stage and step.

    Args:
        clock: seconds on a clock that only goes forward.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.now = clock
        self._lock = threading.Lock()
        self._spans: dict[tuple[str, int], list[Span]] = defaultdict(list)
        self._running: dict[tuple[str, int], list[float]] = {}
        """(stage, step) -> since when, once for each of its parts that is at work."""

    @contextmanager
    def busy(self, stage: str, step: int) -> Iterator[None]:
        """A part of a stage at work for a step. Parts may overlap; together they are one span."""
        key = (stage, step)
        assert stage in STAGES, stage
        with self._lock:
            self._running.setdefault(key, []).append(self.now())
        try:
            yield
        finally:
            with self._lock:
                running = self._running[key]
                since = running[0]
                running.pop()  # how many there are counts, and the first one's beginning
                if not running:
                    del self._running[key]
                    self._add(key, (since, self.now()))

    def add(self, stage: str, step: int, begin: float, end: float) -> None:
        """A span that is over, in the clock's seconds."""
        assert stage in STAGES, stage
        with self._lock:
            self._add((stage, step), (begin, end))

    def spans(self, step: int | None = None) -> dict[str, list[Span]]:
        """The spans of a step (None: of all steps together) by stage: ordered, disjoint, up to now where it still runs.

        All of ``STAGES`` are there, those that did nothing with an empty list.
        """
        with self._lock:
            now = self.now()
            found: dict[str, list[Span]] = {stage: [] for stage in STAGES}
            for (stage, owner), spans in self._spans.items():
                if step is None or owner == step:
                    found[stage] += spans
            for (stage, owner), running in self._running.items():
                if step is None or owner == step:
                    found[stage].append((running[0], now))
        return {stage: union(spans) for stage, spans in found.items()}

    def busy_s(self, stage: str, begin: float, end: float) -> float:
        """Seconds between ``begin`` and ``end`` in which a stage was at work, for whatever step."""
        return length(within(self.spans()[stage], begin, end))

    def exposed(self, stage: str, begin: float, end: float) -> float:
        """Seconds between ``begin`` and ``end`` in which that stage alone was at work, for whatever step."""
        spans = self.spans()
        others = union(span for name, found in spans.items() if name != stage for span in found)
        return length(without(within(spans[stage], begin, end), others))

    def forget(self, step: int) -> None:
        """Drop the spans of this step and those before it."""
        with self._lock:
            for key in [key for key in self._spans if key[1] <= step]:
                del self._spans[key]

    def _add(self, key: tuple[str, int], span: Span) -> None:
        spans = self._spans[key]
        spans.append(span)
        if len(spans) > MAX_SPANS:
            spans[:] = shortened(union(spans), MAX_SPANS // 2)


def shortened(spans: Sequence[Span], limit: int) -> list[Span]:
    """At most ``limit`` spans that cover all of these: the shortest gaps are closed.

    Args:
        spans: ordered, disjoint.
        limit: at least 1.
    """
    if len(spans) <= limit:
        return list(spans)
    gaps = sorted(range(1, len(spans)), key=lambda index: (spans[index - 1][1] - spans[index][0], index))
    first = sorted([0, *gaps[: limit - 1]])  # where a span that is kept begins: after the longest gaps
    return [(spans[a][0], spans[b - 1][1]) for a, b in zip(first, [*first[1:], len(spans)], strict=True)]
