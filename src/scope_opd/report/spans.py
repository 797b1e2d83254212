"""Stretches of time: joined, subtracted, added up. Pure arithmetic on (begin, end) pairs in seconds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

Stretches = list[tuple[float, float]]

CLAIMS = ("generation", "update", "verify", "sync", "teacher")
"""Who claims a second in which several stages were at work: the first of these. The teacher comes last, so that its
part is what it adds to a step."""


def union(spans: Iterable[tuple[float, float]]) -> Stretches:
    """The same seconds as stretches that neither overlap nor touch, in order."""
    merged: Stretches = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def without(spans: Sequence[tuple[float, float]], others: Sequence[tuple[float, float]]) -> Stretches:
    """What of ``spans`` lies in none of ``others``; both as ``union`` gives them."""
    left: Stretches = []
    place = 0
    for begin, end in spans:
        while place < len(others) and others[place][1] <= begin:
            place += 1
        look = place
        while look < len(others) and others[look][0] < end:
            if others[look][0] > begin:
                left.append((begin, others[look][0]))
            begin = max(begin, others[look][1])
            look += 1
        if begin < end:
            left.append((begin, end))
    return left


def length(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds of disjoint stretches."""
    return math.fsum(end - begin for begin, end in spans)


def claimed(spans: Mapping[str, Iterable[tuple[float, float]]], end: float) -> dict[str, float]:
    """Seconds of a step by stage, each counted once (``CLAIMS``), from 0 to ``end``."""
    taken: Stretches = []
    seconds = {}
    for stage in CLAIMS:
        inside = union((max(a, 0.0), min(b, end)) for a, b in spans.get(stage, ()) if b > 0.0 and a < end)
        seconds[stage] = length(without(inside, taken))
        taken = union([*taken, *inside])
    return seconds
