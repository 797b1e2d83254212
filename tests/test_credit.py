"""Routing and credit: verdicts, masks and their reasons, and the numbers written into rollouts."""

from __future__ import annotations

import dataclasses
import math
import random
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scope_opd.credit import assign_credit, student_nll, teacher_nll, trained_tokens, verdict_of
from scope_opd.errors import DataError
from scope_opd.objective import methods
from scope_opd.objective.methods import Credit, Group, build_method, register
from scope_opd.types import Rollout

LAW = settings(max_examples=40, deadline=None, derandomize=True)
LN2, LN3, LN6 = math.log(2), math.log(3), math.log(6)
NAN, INF = math.nan, math.inf


def rollout(
    name: str, correct: bool | None, logprobs: list[float], teacher: list[float] | None = None, **more: Any
) -> Rollout:
    return Rollout(
        id=name, group=more.pop("group", "g"), prompt_token_ids=[1], token_ids=[7] * len(logprobs), logprobs=logprobs,
        correct=correct, teacher_logprobs=teacher, **more,
    )  # fmt: skip


def credit(
    rollouts: list[Rollout], method: str = "scope", truncated: str = "ignore", threshold: float = 0.5, **own: Any
) -> list[bool | None]:
    return assign_credit(
        rollouts, build_method(method, own), truncated=truncated, reward_threshold=threshold  # type: ignore[arg-type]
    )  # fmt: skip


def written(rollouts: list[Rollout]) -> dict[str, tuple[Any, ...]]:
    return {r.id: (r.reinforce, r.distill, r.masked, r.mask_reason) for r in rollouts}


def test_verdict_is_correct_then_reward_against_the_threshold_then_none() -> None:
    rule = {"truncated": "ignore", "reward_threshold": 0.5}
    assert verdict_of(rollout("a", True, [-1.0], reward=0.0), **rule) is True  # type: ignore[arg-type]
    assert verdict_of(rollout("a", False, [-1.0], reward=1.0), **rule) is False  # type: ignore[arg-type]
    assert verdict_of(rollout("a", None, [-1.0]), **rule) is None  # type: ignore[arg-type]
    for reward, expected in ((0.5, True), (0.4999, False), (-1.0, False), (7.0, True)):
        assert verdict_of(rollout("a", None, [-1.0], reward=reward), **rule) is expected  # type: ignore[arg-type]
    assert verdict_of(rollout("a", None, [-1.0], reward=-0.5), truncated="ignore", reward_threshold=-0.5) is True


@pytest.mark.parametrize("correct", [True, False, None])
def test_a_truncated_rollout_is_ignored_or_incorrect_whatever_its_verdict(correct: bool | None) -> None:
    cut = rollout("a", correct, [-1.0], finish_reason="length", reward=1.0)
    assert verdict_of(cut, truncated="ignore", reward_threshold=0.5) is None
    assert verdict_of(cut, truncated="incorrect", reward_threshold=0.5) is False


def test_nll_is_the_mean_over_the_tokens_that_enter_the_loss() -> None:
    r = rollout("a", False, [-1.0, -2.0, -6.0], [-3.0, -5.0, -100.0])
    assert student_nll(r) == 3.0
    assert teacher_nll(r) == 36.0
    r.loss_mask = [1, 1, 0]
    assert (student_nll(r), teacher_nll(r), trained_tokens(r)) == (1.5, 4.0, 2)
    r.loss_mask = [0, 0, 0]
    assert math.isnan(student_nll(r))
    assert trained_tokens(r) == 0
    assert teacher_nll(rollout("b", True, [-1.0])) is None


def test_groups_that_are_not_contiguous_are_weighted_each_by_itself() -> None:
    # Group g: correct PPL 2 and 6 -> 2/8, 6/8; wrong 2 -> 1.  Group h: correct 3 -> 1; wrong 3 and 6 -> 2/3, 1/3.
    rows = [
        rollout("g1", True, [-LN2, -LN2]),
        rollout("h1", False, [-1.0], [-LN3], group="h"),
        rollout("g2", False, [-1.0], [-LN2]),
        rollout("h2", True, [-LN3], group="h"),
        rollout("g3", True, [-LN6]),
        rollout("h3", False, [-1.0], [-LN6], group="h"),
    ]
    assert credit(rows) == [True, False, False, True, True, False]
    got = written(rows)
    assert {name: values[:2] for name, values in got.items()} == {
        "g1": (pytest.approx(2 / 8), 0.0), "g2": (0.0, 1.0), "g3": (pytest.approx(6 / 8), 0.0),
        "h1": (0.0, pytest.approx(2 / 3)), "h2": (1.0, 0.0), "h3": (0.0, pytest.approx(1 / 3)),
    }  # fmt: skip
    assert all(values[2:] == (False, None) for values in got.values())


def test_every_mask_has_its_reason_and_the_rest_is_renormalised() -> None:
    rows = [
        rollout("keeps", False, [-1.0], [-LN2]),
        rollout("unscored", False, [-1.0], None),
        rollout("truncated", True, [-1.0], [-0.01], finish_reason="length"),
        rollout("no_verdict", None, [-1.0], [-0.01]),
        rollout("empty", False, [-1.0], [-0.01], loss_mask=[0]),
        rollout("also_keeps", False, [-1.0], [-LN6]),
    ]
    credit(rows)
    assert written(rows) == {
        "keeps": (0.0, pytest.approx(3 / 4), False, None),
        "unscored": (0.0, 0.0, True, "unscored"),
        "truncated": (0.0, 0.0, True, "truncated"),
        "no_verdict": (0.0, 0.0, True, "no_verdict"),
        "empty": (0.0, 0.0, True, "empty"),
        "also_keeps": (0.0, pytest.approx(1 / 4), False, None),
    }


def test_a_truncated_rollout_that_counts_as_incorrect_competes_by_its_teacher_perplexity() -> None:
    rows = [
        rollout("wrong", False, [-1.0], [-LN2]),
        rollout("cut", True, [-1.0], [-LN6], finish_reason="length"),
        rollout("cut_unscored", True, [-1.0], None, finish_reason="length"),
    ]
    assert credit(rows, truncated="incorrect") == [False, False, False]
    assert written(rows) == {
        "wrong": (0.0, pytest.approx(3 / 4), False, None),
        "cut": (0.0, pytest.approx(1 / 4), False, None),
        "cut_unscored": (0.0, 0.0, True, "unscored"),
    }


def test_one_token_responses_are_weighted_like_any_other() -> None:
    rows = [rollout("a", True, [-LN2]), rollout("b", True, [-LN6]), rollout("c", False, [-9.0], [-4.0])]
    credit(rows)
    assert [r.reinforce for r in rows] == pytest.approx([1 / 4, 3 / 4, 0])
    assert rows[2].distill == 1.0


def test_rewards_that_are_not_zero_or_one_are_routed_by_the_threshold_and_normalised_as_they_are() -> None:
    rows = [rollout(f"r{reward}", None, [-LN2], reward=reward) for reward in (0.9, 0.2, 0.4)]
    assert credit(rows, method="grpo", threshold=0.4) == [True, False, True]
    # mean 1/2, squares 0.16 + 0.09 + 0.01 = 0.26, std sqrt(0.13)
    deviation = math.sqrt(0.13) + 1e-6
    assert [r.reinforce for r in rows] == pytest.approx([0.4 / deviation, -0.3 / deviation, -0.1 / deviation])


def test_a_reward_of_minus_one_is_a_wrong_rollout_on_the_teacher_path() -> None:
    rows = [rollout("right", None, [-LN2], reward=1.0), rollout("wrong", None, [-LN2], [-LN3], reward=-1.0)]
    credit(rows)
    assert written(rows) == {"right": (1.0, 0.0, False, None), "wrong": (0.0, 1.0, False, None)}


@pytest.mark.parametrize(
    ("reward", "counts_as"), [(-1.0, -1.0), (0.0, 0.0), (0.3, 0.3), (1.0, 0.0), (None, 0.0)]
)  # fmt: skip
def test_a_truncated_rollout_never_gains_from_being_cut(reward: float | None, counts_as: float) -> None:
    # With rewards of -1 and 1, a cut response must not stand above a wrong one: [1, -1, counts_as].
    rows = [
        rollout("right", True, [-1.0], reward=1.0),
        rollout("wrong", False, [-1.0], reward=-1.0),
        rollout("cut", None, [-1.0], reward=reward, finish_reason="length"),
    ]
    credit(rows, method="grpo", truncated="incorrect")
    rewards = [1.0, -1.0, counts_as]
    mean = sum(rewards) / 3
    deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / 2) + 1e-6
    assert [r.reinforce for r in rows] == pytest.approx([(r - mean) / deviation for r in rewards])


def test_a_verdict_without_a_reward_is_a_reward_of_zero_or_one() -> None:
    rows = [rollout("right", True, [-1.0]), rollout("wrong", False, [-1.0])]
    credit(rows, method="grpo")
    expected = 0.5 / (math.sqrt(0.5) + 1e-6)
    assert [r.reinforce for r in rows] == pytest.approx([expected, -expected])


def test_credit_written_before_is_overwritten() -> None:
    row = rollout("a", True, [-1.0], reinforce=9.0, distill=9.0, masked=True, mask_reason="unscored")
    credit([row])
    assert written([row]) == {"a": (1.0, 0.0, False, None)}


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("field", ["logprobs", "teacher_logprobs", "reward"])
@pytest.mark.parametrize("finish", ["stop", "length"])
def test_a_number_that_is_not_finite_is_an_error_naming_the_rollout_masked_or_not(
    bad: float, field: str, finish: str
) -> None:
    rows = [rollout("fine", True, [-1.0]), rollout("p3/7/1", False, [-1.0, -2.0], [-1.0, -2.0], finish_reason=finish)]
    setattr(rows[1], field, bad if field == "reward" else [-1.0, bad])
    with pytest.raises(DataError, match=f"rollout 'p3/7/1': {field} = {bad}"):
        credit(rows)


def test_no_rollouts_are_no_credit() -> None:
    assert credit([]) == []


@LAW
@given(st.integers(0, 2**32), st.sampled_from(["scope", "dual_path", "opd", "grpo", "positive", "kd", "reward_opd"]))
def test_credit_does_not_depend_on_the_order_of_the_rows(seed: int, method: str) -> None:
    draw = random.Random(seed)
    rows = []
    for index in range(draw.randint(1, 12)):
        tokens = draw.randint(1, 4)
        values = [-3 * draw.random() for _ in range(tokens)]
        rows.append(
            rollout(
                f"r{index}", draw.choice([True, False, False, None]), values,
                draw.choice([None, [-3 * draw.random() for _ in range(tokens)]]), group=draw.choice("gh"),
                finish_reason=draw.choice(["stop", "stop", "length"]), reward=draw.choice([None, 0.0, 1.0]),
            )
        )  # fmt: skip
    shuffled = [dataclasses.replace(row) for row in rows]
    draw.shuffle(shuffled)
    credit(rows, method=method)
    credit(shuffled, method=method)
    other = written(shuffled)
    for name, (reinforce, distill, masked, reason) in written(rows).items():
        assert other[name] == (
            pytest.approx(reinforce, rel=1e-12, abs=1e-12), pytest.approx(distill, rel=1e-12), masked, reason
        )  # fmt: skip


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(methods, "_METHODS", dict(methods._METHODS))


@pytest.mark.usefixtures("registry")
def test_a_users_method_gets_groups_and_its_numbers_are_written() -> None:
    seen: list[Group] = []

    @register("by_length")
    @dataclass(frozen=True)
    class ByLength(methods.MethodDefaults):
        """Reinforces correct rollouts by power / length and masks the rest."""

        power: float = 1.0

        def credit(self, group: Group) -> Credit:
            seen.append(group)
            live = group.correct  # forgets group.masked: a masked rollout must stay masked all the same
            return Credit(torch.where(live, self.power / group.lengths.double(), 0.0), torch.zeros(len(live)), ~live)

    rows = [
        rollout("short", True, [-1.0, -1.0]),
        rollout("wrong", False, [-1.0] * 4),
        rollout("long", True, [-2.0] * 8),
        rollout("no_tokens", True, [-1.0], loss_mask=[0]),
    ]
    assign_credit(rows, build_method("by_length", {}, power=4.0), truncated="ignore", reward_threshold=0.5)
    assert written(rows) == {
        "short": (2.0, 0.0, False, None),
        "wrong": (0.0, 0.0, True, "method"),
        "long": (0.5, 0.0, False, None),
        "no_tokens": (0.0, 0.0, True, "empty"),
    }
    assert seen[0].nll_student[:3].tolist() == [1.0, 1.0, 2.0]
    assert seen[0].scored.tolist() == [False] * 4


@pytest.mark.usefixtures("registry")
def test_a_users_method_that_gives_nan_is_an_error_naming_the_rollout() -> None:
    @register("broken")
    @dataclass(frozen=True)
    class Broken(methods.Positive):
        def credit(self, group: Group) -> Credit:
            return Credit(group.rewards * NAN, torch.zeros_like(group.rewards), group.masked)

    with pytest.raises(DataError, match="rollout 'first': reinforce = nan"):
        assign_credit(
            [rollout("first", True, [-1.0])], build_method("broken"), truncated="ignore", reward_threshold=0.5
        )
