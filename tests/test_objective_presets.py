"""Presets from the config table to the gradient of a two-prompt step, every number worked out by hand.

    rollout  verdict  tokens  log pi_S                 log pi_T             PPL
    A0       correct  2       -ln 2, -ln 2                                  S: 2
    A1       correct  1       -ln 6                                         S: 6
    A2       wrong    3       -ln 2, -ln 3, -ln 4      -ln 2 three times    T: 2
    A3       wrong    1       -ln 2                    -ln 6                T: 6
    B0       correct  3       -ln 3 three times                             S: 3
    B1       cut      2       -ln 4, -ln 2             -ln 3 twice          T: 3   incorrect in every preset
    B2       wrong    2       -ln 2, -ln 2             none                        masked, in no denominator

Tokens of correct rollouts: 2 + 1 + 3 = 6. Tokens of all that take part: 6 + 3 + 1 + 2 = 12. Prompts: 2.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from scope_opd.config import PRESETS, validate_config
from scope_opd.credit import assign_credit
from scope_opd.objective.aggregate import coefficients
from scope_opd.objective.methods import build_method
from scope_opd.objective.surrogate import surrogate
from scope_opd.types import Rollout

LN2, LN3, LN4, LN6 = math.log(2), math.log(3), math.log(4), math.log(6)
NAMES = ["A0", "A1", "A2", "A3", "B0", "B1", "B2"]
STUDENT = [[-LN2, -LN2], [-LN6], [-LN2, -LN3, -LN4], [-LN2], [-LN3] * 3, [-LN4, -LN2], [-LN2, -LN2]]
TEACHER = [None, None, [-LN2] * 3, [-LN6], None, [-LN3] * 2, None]
CORRECT = [True, True, False, False, True, True, False]  # B1 ends with the right answer but has no end token

# Log-ratios log pi_T - log pi_S of the distilled tokens.
RATIOS = {"A2": [0.0, math.log(3 / 2), LN2], "A3": [-LN3], "B1": [math.log(4 / 3), -math.log(3 / 2)]}

# Weights of each preset at tau = 1.
#   paper          student +: 2 : 6 over 8, alone 1          teacher -: 1/2 : 1/6 = 3 : 1 over 4, alone 1
#   as_released    n softmax(-NLL_S): 2 * 3/4, 2 * 1/4; 1    n softmax(-NLL_T): 2 * 3/4, 2 * 1/4; 1
#   as_documented  the same                                  n softmax(+NLL_T): 2 * 2/8, 2 * 6/8; 1
WEIGHTS = {
    "paper": {"A0": 2 / 8, "A1": 6 / 8, "A2": 3 / 4, "A3": 1 / 4, "B0": 1.0, "B1": 1.0},
    "as_released": {"A0": 3 / 2, "A1": 1 / 2, "A2": 3 / 2, "A3": 1 / 2, "B0": 1.0, "B1": 1.0},
    "as_documented": {"A0": 3 / 2, "A1": 1 / 2, "A2": 1 / 2, "A3": 3 / 2, "B0": 1.0, "B1": 1.0},
}
# Denominators of (reinforce, distill): prompts, or tokens of correct and of all rollouts.
DENOMINATORS = {"paper": (2, 2), "as_released": (6, 12), "as_documented": (6, 12)}


def rollouts() -> list[Rollout]:
    return [
        Rollout(
            id=name, group=name[0], prompt_token_ids=[1], token_ids=[5] * len(STUDENT[i]), logprobs=list(STUDENT[i]),
            finish_reason="length" if name == "B1" else "stop", correct=CORRECT[i], reward=float(CORRECT[i]),
            teacher_logprobs=TEACHER[i],
        )
        for i, name in enumerate(NAMES)
    ]  # fmt: skip


def step_gradient(objective: dict[str, Any]) -> tuple[dict[str, list[float]], list[Rollout]]:
    """d loss / d log pi of every token, by the project's own path from config to loss, at theta = theta_old."""
    config = validate_config({"objective": objective}).objective
    method = build_method(config.method, config.model_dump())
    rows = rollouts()
    assign_credit(rows, method, truncated=config.truncated, reward_threshold=config.reward_threshold)
    lengths = torch.tensor([len(row.token_ids) for row in rows])
    a, b = coefficients(
        torch.tensor([row.reinforce for row in rows], dtype=torch.float64),
        torch.tensor([row.distill for row in rows], dtype=torch.float64),
        lengths,
        torch.tensor([row.masked for row in rows]),
        torch.tensor([ord(row.group) for row in rows]),
        config.aggregation or method.aggregation,
    )
    logprobs = torch.tensor([v for row in rows for v in row.logprobs], dtype=torch.float64, requires_grad=True)
    teacher = [v for row in rows for v in row.teacher_logprobs or [math.nan] * len(row.token_ids)]
    terms = surrogate(
        logprobs, logprobs, torch.ones_like(logprobs), a.repeat_interleave(lengths), b.repeat_interleave(lengths),
        torch.tensor(teacher, dtype=torch.float64),
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(terms.loss.sum(), logprobs)
    pieces = gradient.split(lengths.tolist())
    return {row.id: piece.tolist() for row, piece in zip(rows, pieces, strict=True)}, rows


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_preset_gives_the_weights_worked_out_by_hand(preset: str) -> None:
    _, rows = step_gradient({"preset": preset})
    for row in rows:
        weight = WEIGHTS[preset].get(row.id, 0.0)
        is_student = row.id in ("A0", "A1", "B0")
        assert (row.reinforce, row.distill) == pytest.approx((weight, 0.0) if is_student else (0.0, weight), rel=1e-13)
        assert (row.masked, row.mask_reason) == ((True, "unscored") if row.id == "B2" else (False, None))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_gradient_of_a_step_is_that_of_the_hand_derived_loss(preset: str) -> None:
    got, _ = step_gradient({"preset": preset})
    by_correct, by_all = DENOMINATORS[preset]
    for name, lengths in zip(NAMES, map(len, STUDENT), strict=True):
        if name == "B2":
            expected = [0.0, 0.0]
        elif name in RATIOS:
            expected = [-WEIGHTS[preset][name] * ratio / by_all for ratio in RATIOS[name]]
        else:
            expected = [-WEIGHTS[preset][name] / by_correct] * lengths
        assert got[name] == pytest.approx(expected, rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("preset", ["as_released", "as_documented"])
def test_released_loss_differentiated_as_it_is_written_gives_the_same_gradient(preset: str) -> None:
    # loss = sum_correct w (-log pi) / 6  -  sum_wrong w rho A / 12, with A detached and rho = pi / sg(pi).
    got, _ = step_gradient({"preset": preset})
    leaves = {n: torch.tensor(s, dtype=torch.float64, requires_grad=True) for n, s in zip(NAMES, STUDENT, strict=True)}
    loss = torch.zeros((), dtype=torch.float64)
    for name, weight in WEIGHTS[preset].items():
        log_pi = leaves[name]
        if name in RATIOS:
            rho = (log_pi - log_pi.detach()).exp()
            loss = loss - weight * (rho * torch.tensor(RATIOS[name], dtype=torch.float64)).sum() / 12
        else:
            loss = loss + weight * (-log_pi).sum() / 6
    loss.backward()  # type: ignore[no-untyped-call]
    for name in WEIGHTS[preset]:
        grad = leaves[name].grad
        assert grad is not None
        assert got[name] == pytest.approx(grad.tolist(), rel=1e-12, abs=1e-15)


def test_weights_off_is_one_for_each_rollout_of_a_path() -> None:
    off = {"preset": "as_released", "student_weight": "uniform", "teacher_weight": "uniform"}
    _, rows = step_gradient(off)
    assert [row.reinforce for row in rows] == pytest.approx([1, 1, 0, 0, 1, 0, 0])
    assert [row.distill for row in rows] == pytest.approx([0, 0, 1, 1, 0, 1, 0])


def test_tau_of_a_preset_squares_the_odds_at_one_half() -> None:
    # as_released, tau 1/2: 1/4 : 1/36 = 9 : 1, times 2.
    _, rows = step_gradient({"preset": "as_released", "tau": 0.5})
    assert [rows[0].reinforce, rows[1].reinforce] == pytest.approx([2 * 9 / 10, 2 * 1 / 10])
    assert [rows[2].distill, rows[3].distill] == pytest.approx([2 * 9 / 10, 2 * 1 / 10])


def test_without_a_preset_the_cut_rollout_takes_no_part_and_its_prompt_stays() -> None:
    got, rows = step_gradient({})
    assert (rows[5].masked, rows[5].mask_reason, rows[5].reinforce, rows[5].distill) == (True, "truncated", 0.0, 0.0)
    assert got["B1"] == [0.0, 0.0]
    assert got["B0"] == pytest.approx([-1 / 2] * 3)  # still two prompts


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        # token mean; live: A0 A1 A2 A3 B0 B2, 12 tokens (B1 is ignored)
        ("positive", {"A0": [-1 / 12] * 2, "A1": [-1 / 12], "A2": [0.0] * 3, "B0": [-1 / 12] * 3, "B2": [0.0] * 2}),
        # opd: only A2 and A3 are scored (4 tokens)
        ("opd", {"A0": [0.0] * 2, "A2": [-0.0, -math.log(3 / 2) / 4, -LN2 / 4], "A3": [LN3 / 4]}),
        # grpo: A has [1, 1, 0, 0]: +-(1/2) / (sqrt(1/3) + 1e-6); B has [1, 0]: +-(1/2) / (sqrt(1/2) + 1e-6)
        ("grpo", {"A0": [-0.5 / (math.sqrt(1 / 3) + 1e-6) / 12] * 2, "A3": [0.5 / (math.sqrt(1 / 3) + 1e-6) / 12],
                  "B0": [-0.5 / (math.sqrt(1 / 2) + 1e-6) / 12] * 3, "B2": [0.5 / (math.sqrt(1 / 2) + 1e-6) / 12] * 2}),
        # dual_path: uniform shares 1/2, 1/2, 1 over two prompts
        ("dual_path", {"A0": [-1 / 4] * 2, "A1": [-1 / 4], "A3": [LN3 / 4], "B0": [-1 / 2] * 3, "B2": [0.0] * 2}),
    ],
)  # fmt: skip
def test_gradient_of_each_rival_on_the_same_step_is_as_by_hand(method: str, expected: dict[str, list[float]]) -> None:
    got, _ = step_gradient({"method": method})
    for name, values in expected.items():
        assert got[name] == pytest.approx(values, rel=1e-12, abs=1e-15)
