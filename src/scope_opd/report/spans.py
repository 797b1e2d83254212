"""Which stage a second of a step counts for, where several were at work."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from scope_opd.spans import Span, length, union, within, without

CLAIMS = ("generation", "update", "verify", "sync", "teacher")
"""Who claims a second in which several stages were at work: the first of these. The teacher comes last, so that its
part is what it adds to a step."""


def claimed(spans: Mapping[str, Iterable[Span]], end: float) -> dict[str, float]:
    """Seconds of a step by stage, each counted once (``CLAIMS``), from 0 to ``end``."""
    taken: list[Span] = []
    seconds = {}
    for stage in CLAIMS:
        inside = union(within(spans.get(stage, ()), 0.0, end))
        seconds[stage] = length(without(inside, taken))
        taken = union([*taken, *inside])
    return seconds
