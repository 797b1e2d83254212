"""The one surrogate: clip tables by hand, gradients by autograd in float64, and the k3 estimate."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scope_opd.objective.logprobs import token_logprobs
from scope_opd.objective.surrogate import reference_kl, sampler_correction, surrogate

LAW = settings(max_examples=60, deadline=None, derandomize=True)
LN2 = math.log(2)
INF, NAN = math.inf, math.nan


def f64(values: list[float], grad: bool = False) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def test_loss_and_gradient_of_the_two_paths_are_those_worked_out_by_hand() -> None:
    # Token 0, correct path: rho = 2, c = 1/2, A = 3/4:               loss -1/2 * 2 * 3/4 = -3/4
    # Token 1, wrong path: rho = 1/2, c = 2, A = 1/4 (log 1/8 - log 1/4) = -ln(2)/4: loss  2 * 1/2 * ln(2)/4
    # Token 2, both: rho = 1, c = 1, A = 1 + 2 (log 1/2 - log 1/4) = 1 + 2 ln 2
    # Each loss is linear in rho and d rho / d log pi = rho, so the gradient equals the loss.
    logprobs = f64([-LN2, -2 * LN2, -2 * LN2], grad=True)
    terms = surrogate(
        logprobs, f64([-2 * LN2, -LN2, -2 * LN2]), f64([0.5, 2.0, 1.0]), f64([0.75, 0.0, 1.0]), f64([0.0, 0.25, 2.0]),
        f64([NAN, -3 * LN2, -LN2]),
    )  # fmt: skip
    expected = [-0.75, LN2 / 4, -(1 + 2 * LN2)]
    assert terms.advantage.tolist() == pytest.approx([0.75, -LN2 / 4, 1 + 2 * LN2], rel=1e-14)
    assert terms.loss.tolist() == pytest.approx(expected, rel=1e-14)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), logprobs)
    assert gradient.tolist() == pytest.approx(expected, rel=1e-14)
    assert not terms.advantage.requires_grad
    assert not bool(terms.clipped.any())


# clip 0.2, dual clip 3. gain = what is maximised, slope = d gain / d log pi (= gain where rho is free, 0 where a bound
# holds). PPO: min(rho A, clamp(rho, 0.8, 1.2) A); dual clip: not below 3 A where A < 0.
#    A   rho   gain   slope  clipped
CLIP_TABLE = [
    (+2.0, 1.0, 2.0, 2.0, False),  # inside
    (+2.0, 1.1, 2.2, 2.2, False),
    (+2.0, 1.5, 2.4, 0.0, True),  # above: 1.2 * 2
    (+2.0, 0.5, 1.0, 1.0, False),  # below: the pessimistic bound leaves rho free
    (+2.0, 9.0, 2.4, 0.0, True),
    (-2.0, 1.0, -2.0, -2.0, False),
    (-2.0, 0.9, -1.8, -1.8, False),
    (-2.0, 0.5, -1.6, 0.0, True),  # below: 0.8 * -2
    (-2.0, 1.5, -3.0, -3.0, False),  # above: rho free ...
    (-2.0, 2.9, -5.8, -5.8, False),
    (-2.0, 4.0, -6.0, 0.0, True),  # ... until the dual clip: 3 * -2
    (0.0, 5.0, 0.0, 0.0, False),
]


@pytest.mark.parametrize("correction", [1.0, 0.25])
@pytest.mark.parametrize(("advantage", "ratio", "gain", "slope", "clipped"), CLIP_TABLE)
def test_ppo_clip_and_dual_clip_follow_the_hand_table(
    advantage: float, ratio: float, gain: float, slope: float, clipped: bool, correction: float
) -> None:
    logprobs = f64([-1.0], grad=True)
    terms = surrogate(
        logprobs, f64([-1.0 - math.log(ratio)]), f64([correction]), f64([advantage]), f64([0.0]), f64([NAN]),
        clip=0.2, dual_clip=3.0,
    )  # fmt: skip
    assert float(terms.loss.detach()) == pytest.approx(-correction * gain, abs=1e-12)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), logprobs)
    assert float(gradient) == pytest.approx(-correction * slope, abs=1e-12)
    assert bool(terms.clipped) is clipped


@pytest.mark.parametrize(("advantage", "ratio"), [(a, r) for a, r, *_ in CLIP_TABLE])
def test_without_a_clip_the_ratio_is_free(advantage: float, ratio: float) -> None:
    logprobs = f64([-1.0], grad=True)
    terms = surrogate(
        logprobs, f64([-1.0 - math.log(ratio)]), f64([1.0]), f64([advantage]), f64([0.0]), f64([0.0])
    )  # fmt: skip
    assert float(terms.loss.detach()) == pytest.approx(-ratio * advantage, rel=1e-12)
    (gradient,) = torch.autograd.grad(terms.loss.sum(), logprobs)
    assert float(gradient) == pytest.approx(-ratio * advantage, rel=1e-12)
    assert not bool(terms.clipped)


def test_clip_touches_rho_alone_never_the_sampler_correction() -> None:
    # rho = 1 lies inside the clip although c rho = 5 does not.
    terms = surrogate(f64([-1.0]), f64([-1.0]), f64([5.0]), f64([1.0]), f64([0.0]), f64([NAN]), clip=0.2, dual_clip=3.0)
    assert float(terms.loss.detach()) == -5.0
    assert not bool(terms.clipped)


def softmax_policy(seed: int) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    tokens, width, vocabulary = 9, 3, 5
    weights = torch.randn(width, vocabulary, generator=generator, dtype=torch.float64, requires_grad=True)
    hidden = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    ids = torch.randint(vocabulary, (tokens,), generator=generator)
    teacher = -3 * torch.rand(tokens, generator=generator, dtype=torch.float64)
    reinforce = torch.randn(tokens, generator=generator, dtype=torch.float64)
    distill = torch.rand(tokens, generator=generator, dtype=torch.float64)
    return weights, hidden, ids, teacher, reinforce, distill


@pytest.mark.parametrize("clips", [(None, None), (0.2, 3.0)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_at_theta_old_the_gradient_is_minus_the_sum_of_advantage_times_grad_logprob(
    seed: int, clips: tuple[float | None, float | None]
) -> None:
    weights, hidden, ids, teacher, reinforce, distill = softmax_policy(seed)
    logprobs = token_logprobs(hidden @ weights, ids, 0.6)
    terms = surrogate(
        logprobs, logprobs, torch.ones(9, dtype=torch.float64), reinforce, distill, teacher,
        clip=clips[0], dual_clip=clips[1],
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(terms.loss.sum(), weights)
    # By formula: grad log softmax(h W / T)[a] = h (onehot(a) - p) / T.
    expected = torch.zeros_like(weights)
    with torch.no_grad():
        for t in range(9):
            p = torch.softmax(hidden[t] @ weights / 0.6, dim=0)
            onehot = torch.zeros(5, dtype=torch.float64)
            onehot[ids[t]] = 1.0
            advantage = reinforce[t] + distill[t] * (teacher[t] - torch.log(p[ids[t]]))
            expected -= advantage * torch.outer(hidden[t], onehot - p) / 0.6
    assert float((gradient - expected).norm() / expected.norm()) < 1e-13


def test_neither_the_correction_nor_old_nor_the_advantage_is_differentiated() -> None:
    weights, hidden, ids, teacher, reinforce, distill = softmax_policy(3)
    logprobs = token_logprobs(hidden @ weights, ids)
    correction, _ = sampler_correction(logprobs, logprobs.detach() - 0.3, cap=2.0)
    assert not correction.requires_grad
    leaf = torch.full((9,), 1.3, dtype=torch.float64, requires_grad=True)
    old = (logprobs.detach() - 0.1).requires_grad_()
    terms = surrogate(logprobs, old, leaf, reinforce, distill, teacher)
    grads = torch.autograd.grad(terms.loss.sum(), [logprobs, leaf, old], allow_unused=True)
    assert grads[1] is None
    assert grads[2] is None
    # Linear in rho: were the student's log-prob inside A differentiated, a term -distill * rho * c would join.
    assert torch.allclose(grads[0], terms.loss.detach(), rtol=1e-14)


def test_sampler_correction_is_the_ratio_up_to_its_cap() -> None:
    #       ratio     1     1/2       2 (at the cap)     4 -> 2
    trainer = f64([-1.0, -1.0 - LN2, -1.0, -1.0])
    sampler = f64([-1.0, -1.0, -1.0 - LN2, -1.0 - 2 * LN2])
    correction, capped = sampler_correction(trainer, sampler, cap=2.0 + 1e-9)
    assert correction.tolist() == pytest.approx([1.0, 0.5, 2.0, 2.0], rel=1e-8)
    assert capped.tolist() == [False, False, False, True]
    huge, _ = sampler_correction(f64([0.0]), f64([-1e4]), cap=2.0)
    assert huge.tolist() == [2.0]


def test_a_missing_teacher_score_never_reaches_loss_or_gradient_where_distill_is_zero() -> None:
    logprobs = f64([-1.0, -2.0, -3.0], grad=True)
    terms = surrogate(
        logprobs, logprobs, f64([1.0] * 3), f64([1.0, 0.5, 0.0]), f64([0.0] * 3), f64([NAN, -INF, INF])
    )  # fmt: skip
    (gradient,) = torch.autograd.grad(terms.loss.sum(), logprobs)
    assert gradient.tolist() == [-1.0, -0.5, 0.0]


def test_an_empty_micro_batch_is_a_differentiable_zero() -> None:
    logprobs = f64([], grad=True)
    empty = f64([])
    loss = surrogate(logprobs, empty, empty, empty, empty, empty, clip=0.2, dual_clip=3.0).loss.sum()
    loss.backward()  # type: ignore[no-untyped-call]
    assert float(loss.detach()) == 0.0
    assert logprobs.grad is not None


@LAW
@given(st.lists(st.floats(-8, 0), min_size=1, max_size=6), st.lists(st.floats(-8, 0), min_size=6, max_size=6))
def test_k3_is_its_formula_non_negative_and_zero_only_at_the_reference(current: list[float], ref: list[float]) -> None:
    logprobs, reference = f64(current, grad=True), f64(ref[: len(current)])
    values = reference_kl(logprobs, reference)
    expected = [math.exp(r - c) - (r - c) - 1 for c, r in zip(current, ref, strict=False)]
    assert values.tolist() == pytest.approx(expected, abs=1e-12)
    assert bool((values >= -1e-15).all())
    (gradient,) = torch.autograd.grad(values.sum(), logprobs)
    # d/dx (exp(r - x) - (r - x) - 1) = 1 - exp(r - x)
    assert gradient.tolist() == pytest.approx(
        [1 - math.exp(r - c) for c, r in zip(current, ref, strict=False)], abs=1e-11
    )


def test_k3_is_zero_with_zero_gradient_at_the_reference_and_its_mean_is_the_kl() -> None:
    logprobs = f64([-1.0, -0.2], grad=True)
    values = reference_kl(logprobs, logprobs)
    (gradient,) = torch.autograd.grad(values.sum(), logprobs)
    assert values.tolist() == gradient.tolist() == [0.0, 0.0]
    # p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): E_p[k3] = E_p[q/p] - 1 + KL = KL = 1/2 ln 2 - 1/4 ln 2 = ln(2)/4
    p, q = [0.5, 0.25, 0.25], [0.25, 0.25, 0.5]
    k3 = reference_kl(f64([math.log(v) for v in p]), f64([math.log(v) for v in q])).tolist()
    assert sum(a * b for a, b in zip(p, k3, strict=True)) == pytest.approx(LN2 / 4, rel=1e-13)
