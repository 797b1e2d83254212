"""Laws of the timeline: exposure is what hand-written spans say, whatever the order; spans stay few."""

from __future__ import annotations

import random
import threading
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scope_opd.pipeline.timeline import MAX_SPANS, STAGES, Timeline, shortened
from scope_opd.train.metrics import staleness, timeline_row
from scope_opd.types import Rollout


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_exposed_is_the_time_in_which_the_stage_alone_was_at_work() -> None:
    line = Timeline(Clock())
    line.add("generation", 0, 0.0, 10.0)
    line.add("verify", 0, 9.0, 11.0)
    line.add("teacher", 0, 4.0, 20.0)
    line.add("update", 0, 13.0, 14.0)
    line.add("generation", 1, 16.0, 18.0)  # the next step's generation hides it too
    assert line.exposed("teacher", 0.0, 20.0) == (13 - 11) + (16 - 14) + (20 - 18)
    assert line.exposed("teacher", 12.0, 15.0) == 1 + 1
    assert line.busy_s("teacher", 0.0, 20.0) == 16.0
    assert line.exposed("generation", 0.0, 20.0) == 4.0
    assert line.exposed("sync", 0.0, 20.0) == 0.0


def test_parts_of_a_stage_that_overlap_are_one_span_and_one_that_runs_ends_now() -> None:
    clock = Clock()
    line = Timeline(clock)
    with line.busy("teacher", 0):
        clock.now = 1.0
        with line.busy("teacher", 0):
            clock.now = 3.0
        clock.now = 4.0
        assert line.spans(0)["teacher"] == [(0.0, 4.0)]
        assert line.exposed("teacher", 0.0, 9.0) == 4.0
        clock.now = 5.0
    clock.now = 7.0
    with line.busy("teacher", 0):
        clock.now = 8.0
    assert line.spans(0)["teacher"] == [(0.0, 5.0), (7.0, 8.0)]
    assert list(line.spans(1)) == list(STAGES)


SPANS = st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), max_size=12)


@given(SPANS, SPANS, st.integers(0, 30), st.integers(0, 30))
@settings(max_examples=150, deadline=None)
def test_exposure_equals_counting_seconds_one_by_one(
    own: list[tuple[int, int]], other: list[tuple[int, int]], begin: int, length: int
) -> None:
    line = Timeline(Clock())
    for index, (start, size) in enumerate(own):
        line.add("teacher", index % 3, start, start + size)
    for index, (start, size) in enumerate(other):
        line.add(("generation", "update")[index % 2], index % 2, start, start + size)
    mine = {second for start, size in own for second in range(start, start + size)}
    theirs = {second for start, size in other for second in range(start, start + size)}
    window = set(range(begin, begin + length))
    assert line.exposed("teacher", begin, begin + length) == len((mine - theirs) & window)
    assert line.busy_s("teacher", begin, begin + length) == len(mine & window)


def test_spans_stay_few_and_cover_all_the_work() -> None:
    line = Timeline(Clock())
    for index in range(3 * MAX_SPANS):
        line.add("verify", 0, index, index + 0.5)
    spans = line.spans(0)["verify"]
    assert len(spans) <= MAX_SPANS
    assert (spans[0][0], spans[-1][1]) == (0.0, 3 * MAX_SPANS - 0.5)
    line.forget(0)
    assert line.spans() == {stage: [] for stage in STAGES}


def test_the_shortest_gaps_are_closed_first() -> None:
    spans = [(0.0, 1.0), (1.1, 2.0), (5.0, 6.0), (6.5, 7.0), (20.0, 21.0)]
    assert shortened(spans, 3) == [(0.0, 2.0), (5.0, 7.0), (20.0, 21.0)]
    assert shortened(spans, 1) == [(0.0, 21.0)]
    assert shortened(spans, 9) == spans


def test_threads_may_work_at_once() -> None:
    line = Timeline()

    def work() -> None:
        for _ in range(200):
            with line.busy("verify", random.randrange(2)):
                pass

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert line._running == {}
    for spans in (line.spans()["verify"], line.spans(0)["verify"]):
        assert all(a[1] < b[0] for a, b in pairwise(spans))


def test_a_row_counts_from_the_steps_begin_and_is_negative_where_generation_ran_ahead() -> None:
    line = Timeline(Clock())
    line.add("generation", 4, 90.0, 103.5)
    line.add("generation", 5, 101.0, 104.0)
    line.add("teacher", 4, 95.0, 107.25)
    row = timeline_row(line, 4, 100.0, 110.0)
    assert row["spans"].pop("generation") == [[-10.0, 3.5]]
    assert row["spans"].pop("teacher") == [[-5.0, 7.25]]
    assert row == {"step": 4, "seconds": 10.0, "spans": {"verify": [], "sync": [], "update": []}}


def test_staleness_counts_tokens_by_the_version_that_sampled_them() -> None:
    def rollout(tokens: int, version: int, spans: list[list[int]] | None) -> Rollout:
        return Rollout("r", "g", [1], [2] * tokens, [0.0] * tokens, policy_version=version, policy_versions=spans)

    rollouts = [rollout(4, 3, None), rollout(6, 2, [[0, 2, 2], [2, 6, 4]])]
    mean, oldest = staleness(rollouts, 5) or (0.0, 0)
    assert mean == pytest.approx((4 * 2 + 2 * 3 + 4 * 1) / 10)
    assert oldest == 3
    assert staleness([rollout(0, 0, None)], 5) is None
