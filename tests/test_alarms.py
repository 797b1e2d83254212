"""When each alarm rings, and that a resumed run rings as an uninterrupted one."""

from __future__ import annotations

import json
from typing import Any

import pytest

from scope_opd.config import AlarmsConfig
from scope_opd.train.alarms import Alarms

PATHS = frozenset({"student", "teacher"})


def ring(rows: list[dict[str, Any]], *, tau: frozenset[str] = PATHS, **config: Any) -> list[list[str]]:
    """Names of the alarms that ring at each row; the state goes through JSON between rows."""
    settings = AlarmsConfig(**config)
    alarms, names = Alarms(settings, weights_use_tau=tau), []
    for row in rows:
        names.append([alarm.name for alarm in alarms.check(row)])
        state = json.loads(json.dumps(alarms.state()))
        alarms = Alarms(settings, weights_use_tau=tau)
        alarms.load_state(state)
    return names


def series(key: str, values: list[float | None]) -> list[dict[str, Any]]:
    return [{key: value} for value in values]


def test_entropy_halved_within_the_window_rings_once_and_again_after_recovery() -> None:
    values = [1.0, 0.9, 0.49, 0.48, 0.9, 0.4]
    assert ring(series("entropy", values)) == [[], [], ["entropy_halved"], [], [], ["entropy_halved"]]


def test_a_slow_fall_of_entropy_does_not_ring() -> None:
    values = [0.99**i for i in range(200)]  # halves in 69 steps, the window is 20
    assert not any(ring(series("entropy", values)))
    assert any(ring(series("entropy", values), entropy_window=80))


def test_truncation_over_its_share_rings() -> None:
    assert ring(series("truncated/share", [0.5, 0.51])) == [[], ["truncation"]]
    assert ring(series("truncated/share", [0.3]), truncation_share=0.2) == [["truncation"]]


def test_length_is_compared_with_the_first_steps() -> None:
    values = [10.0, 12.0, 10.0, 8.0, 10.0, 19.0, 21.0, 15.0]
    assert ring(series("length/mean", values)) == [[], [], [], [], [], [], ["length_growth"], []]


def test_gradient_norm_is_compared_with_the_first_steps() -> None:
    values = [500.0, 600.0, None, 400.0, 500.0, 500.0, 0.0, 4_900.0, 5_100.0, 600.0]
    assert ring(series("grad_norm", values)) == [*[[]] * 8, ["grad_norm"], []]
    assert ring(series("grad_norm", [1.0, 9.0]), grad_norm_ratio=1.5) == [[], ["grad_norm"]]


def test_uniform_weights_ring_once_a_path_and_only_where_tau_is_at_work() -> None:
    rows = [{"ess/student": 0.995, "ess/teacher": 0.9}, {"ess/student": 0.5, "ess/teacher": 0.999},
            {"ess/student": 0.999, "ess/teacher": None}]  # fmt: skip
    assert ring(rows) == [["uniform_weights"], ["uniform_weights"], []]
    assert ring(rows, tau=frozenset()) == [[], [], []]
    # A path whose weights are meant to be uniform has nothing to say.
    assert ring(rows, tau=frozenset({"teacher"})) == [[], ["uniform_weights"], []]
    assert ring(rows, tau=frozenset({"student"})) == [["uniform_weights"], [], []]
    assert ring(rows, uniform_weights="stop")[2] == []


def test_stop_rings_as_long_as_the_condition_lasts_and_off_never() -> None:
    rows = series("truncated/share", [0.9, 0.9, 0.1])
    assert ring(rows, truncation="stop") == [["truncation"], ["truncation"], []]
    assert ring(rows, truncation="off") == [[], [], []]


def test_a_number_that_is_not_finite_rings() -> None:
    alarms = Alarms(AlarmsConfig(), weights_use_tau=PATHS)
    (alarm,) = alarms.check({"update/not_finite": 1}, broken="the loss of rollout 'r' is not finite")
    assert alarm.message == "the loss of rollout 'r' is not finite; the update was left out"
    assert ring([{"update/not_finite": 1}, {"update/not_finite": 0}]) == [["nan"], []]


@pytest.mark.parametrize("cut", [1, 3, 5])
def test_the_state_is_all_that_a_resumed_run_needs(cut: int) -> None:
    rows = [
        {"entropy": e, "length/mean": n, "truncated/share": t, "grad_norm": n**9}
        for e, n, t in zip(
            [1, 0.6, 0.4, 0.4, 0.9, 0.3], [5, 5, 5, 11, 20, 9], [0.6, 0.6, 0.1, 0.6, 0.6, 0], strict=True
        )
    ]
    whole = Alarms(AlarmsConfig(), weights_use_tau=frozenset())
    expected = [whole.check(row) for row in rows]
    first = Alarms(AlarmsConfig(), weights_use_tau=frozenset())
    told = [first.check(row) for row in rows[:cut]]
    second = Alarms(AlarmsConfig(), weights_use_tau=frozenset())
    second.load_state(json.loads(json.dumps(first.state())))
    assert told + [second.check(row) for row in rows[cut:]] == expected
