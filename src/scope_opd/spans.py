"""Stretches of time: joined, cut, subtracted, added up. Pure arithmetic on (begin, end) pairs in seconds."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

Span = tuple[float, float]


def union(spans: Iterable[Span]) -> list[Span]:
    """The same seconds as stretches that neither overlap nor touch, in order."""
    merged: list[Span] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((begin, end))
    return merged


def without(spans: Sequence[Span], others: Sequence[Span]) -> list[Span]:
    """What of ``spans`` lies in none of ``others``; both as ``union`` gives them."""
    left: list[Span] = []
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


def length(spans: Iterable[Span]) -> float:
    """Seconds of disjoint stretches."""
    return math.fsum(end - begin for begin, end in spans)


def within(spans: Iterable[Span], begin: float, end: float) -> list[Span]:
    """What of the spans lies between ``begin`` and ``end``."""
    return [(max(a, begin), min(b, end)) for a, b in spans if b > begin and a < end]
