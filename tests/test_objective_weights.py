"""Laws of the group weights (paper Eq. 4 and 5) and of the effective sample size; expected values by hand."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scope_opd.objective.weights import Direction, Scale, effective_sample_size, softmax_weights

LAW = settings(max_examples=80, deadline=None, derandomize=True)
DIRECTIONS: tuple[Direction, ...] = ("ppl", "uniform", "inverse_ppl")
SCALES: tuple[Scale, ...] = ("sum", "mean")
nlls = st.lists(st.floats(0.0, 20.0), min_size=1, max_size=12)
taus = st.floats(0.05, 50.0)


def f64(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Perplexities 2, 3, 6 are NLLs ln 2, ln 3, ln 6: PPL^(sign/tau) is then rational, or a root, by hand.
#   tau 1    +: 2 : 3 : 6 over 11        -: 1/2 : 1/3 : 1/6 = 3 : 2 : 1 over 6
#   tau 1/2  +: 4 : 9 : 36 over 49       -: 1/4 : 1/9 : 1/36 = 9 : 4 : 1 over 14
#   tau 2    +: sqrt 2 : sqrt 3 : sqrt 6
ROOTS = math.sqrt(2) + math.sqrt(3) + math.sqrt(6)
INVERSE_ROOTS = 1 / math.sqrt(2) + 1 / math.sqrt(3) + 1 / math.sqrt(6)
BY_HAND: list[tuple[float, Direction, list[float]]] = [
    (1.0, "ppl", [2 / 11, 3 / 11, 6 / 11]),
    (1.0, "inverse_ppl", [3 / 6, 2 / 6, 1 / 6]),
    (0.5, "ppl", [4 / 49, 9 / 49, 36 / 49]),
    (0.5, "inverse_ppl", [9 / 14, 4 / 14, 1 / 14]),
    (2.0, "ppl", [math.sqrt(2) / ROOTS, math.sqrt(3) / ROOTS, math.sqrt(6) / ROOTS]),
    (2.0, "inverse_ppl", [1 / math.sqrt(2) / INVERSE_ROOTS, 1 / math.sqrt(3) / INVERSE_ROOTS,
                          1 / math.sqrt(6) / INVERSE_ROOTS]),
    (1.0, "uniform", [1 / 3, 1 / 3, 1 / 3]),
]  # fmt: skip


@pytest.mark.parametrize(("tau", "direction", "expected"), BY_HAND)
def test_weights_of_perplexities_2_3_6_are_those_worked_out_by_hand(
    tau: float, direction: Direction, expected: list[float]
) -> None:
    nll = f64([math.log(2), math.log(3), math.log(6)])
    assert softmax_weights(nll, tau, direction, "sum").tolist() == pytest.approx(expected, rel=1e-13)
    assert softmax_weights(nll, tau, direction, "mean").tolist() == pytest.approx([3 * w for w in expected], rel=1e-13)


@LAW
@given(nlls, taus, st.sampled_from(DIRECTIONS), st.sampled_from(SCALES))
def test_weights_are_positive_and_add_to_one_or_to_their_number(
    nll: list[float], tau: float, direction: Direction, scale: Scale
) -> None:
    weights = softmax_weights(f64(nll), tau, direction, scale)
    assert weights.dtype == torch.float64
    assert bool((weights > 0).all())
    assert float(weights.sum()) == pytest.approx(1.0 if scale == "sum" else len(nll), rel=1e-12)


@LAW
@given(nlls, taus, st.sampled_from(DIRECTIONS), st.randoms(use_true_random=False))
def test_weights_are_permutation_equivariant(nll: list[float], tau: float, direction: Direction, random) -> None:
    order = list(range(len(nll)))
    random.shuffle(order)
    weights = softmax_weights(f64(nll), tau, direction)
    permuted = softmax_weights(f64([nll[i] for i in order]), tau, direction)
    assert permuted.tolist() == pytest.approx(weights[order].tolist(), rel=1e-12)


@LAW
@given(nlls, taus)
def test_ppl_prefers_the_larger_perplexity_and_inverse_ppl_the_smaller(nll: list[float], tau: float) -> None:
    up = softmax_weights(f64(nll), tau, "ppl").tolist()
    down = softmax_weights(f64(nll), tau, "inverse_ppl").tolist()
    for i, j in itertools.combinations(range(len(nll)), 2):
        if nll[i] < nll[j]:
            assert up[i] <= up[j]
            assert down[i] >= down[j]
        if nll[i] + 1e-6 * tau < nll[j] and nll[j] - nll[i] < 500 * tau:  # apart, and not yet at the smallest float
            assert up[i] < up[j]
            assert down[i] > down[j]


@LAW
@given(nlls, taus, st.floats(-50.0, 50.0), st.sampled_from(DIRECTIONS))
def test_weights_do_not_change_when_every_nll_is_shifted(
    nll: list[float], tau: float, shift: float, direction: Direction
) -> None:
    weights = softmax_weights(f64(nll), tau, direction)
    shifted = softmax_weights(f64([value + shift for value in nll]), tau, direction)
    # A shift rounds each NLL by about 1e-14; the softmax multiplies that by 1 / tau <= 20.
    assert shifted.tolist() == pytest.approx(weights.tolist(), rel=1e-11, abs=1e-300)


@LAW
@given(nlls, st.sampled_from(DIRECTIONS), st.sampled_from(SCALES))
def test_weights_become_uniform_as_tau_grows(nll: list[float], direction: Direction, scale: Scale) -> None:
    uniform = softmax_weights(f64(nll), 1.0, "uniform", scale)
    assert softmax_weights(f64(nll), 1e12, direction, scale).tolist() == pytest.approx(uniform.tolist(), rel=1e-10)
    assert softmax_weights(f64(nll), math.inf, direction, scale).tolist() == pytest.approx(uniform.tolist(), rel=1e-15)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_identical_perplexities_give_equal_weights_however_large(direction: Direction) -> None:
    weights = softmax_weights(f64([1e4] * 5), 0.5, direction)
    assert weights.tolist() == [0.2] * 5


def test_huge_nll_is_stable_and_no_weight_is_zero() -> None:
    # exp(1e4) overflows a float64, yet the difference 1e4 - 9999 = 1 gives e : 1.
    weights = softmax_weights(f64([1e4, 1e4 - 1]), 1.0, "ppl").tolist()
    assert weights == pytest.approx([math.e / (1 + math.e), 1 / (1 + math.e)], rel=1e-12)
    extreme = softmax_weights(f64([0.0, 1e4]), 1.0, "inverse_ppl").tolist()
    assert extreme[0] == 1.0
    assert 0 < extreme[1] < 1e-300  # too small for a float, but 0 would mean "not on this path"


@pytest.mark.parametrize("tau", [1e-3, 1e-300, 5e-324])
def test_smallest_tau_gives_everything_to_the_largest_perplexity(tau: float) -> None:
    weights = softmax_weights(f64([1.0, 2.0, 1.5]), tau, "ppl").tolist()
    assert weights[1] == 1.0
    assert all(0 < w < 1e-200 for w in (weights[0], weights[2]))


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("scale", SCALES)
def test_a_path_of_one_has_weight_one_and_an_empty_path_has_none(direction: Direction, scale: Scale) -> None:
    assert softmax_weights(f64([3.7]), 0.3, direction, scale).tolist() == [1.0]
    assert softmax_weights(f64([]), 0.3, direction, scale).shape == (0,)


@pytest.mark.parametrize("tau", [0.0, -1.0, math.nan])
def test_tau_that_is_not_positive_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match="tau"):
        softmax_weights(f64([1.0]), tau, "ppl")


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nll_that_is_not_finite_is_refused_with_its_row(bad: float) -> None:
    with pytest.raises(ValueError, match="row 1"):
        softmax_weights(f64([1.0, bad]), 1.0, "ppl")


def test_unknown_direction_and_scale_are_refused() -> None:
    with pytest.raises(ValueError, match="direction = 'up'"):
        softmax_weights(f64([1.0]), 1.0, "up")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="scale = 'max'"):
        softmax_weights(f64([1.0]), 1.0, "ppl", "max")  # type: ignore[arg-type]


def test_float32_nll_is_weighted_in_float64() -> None:
    assert softmax_weights(torch.tensor([0.5, 1.0]), 1.0, "ppl").dtype == torch.float64


def test_effective_sample_size_is_that_worked_out_by_hand() -> None:
    # (1+2+3)^2 / (3 (1+4+9)) = 36/42
    assert effective_sample_size(f64([1.0, 2.0, 3.0])) == pytest.approx(float(Fraction(36, 42)), rel=1e-15)
    assert effective_sample_size(f64([0.25] * 4)) == 1.0
    assert effective_sample_size(f64([0.0, 5.0, 0.0, 0.0])) == 0.25


@LAW
@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=10), st.floats(1e-3, 1e3))
def test_effective_sample_size_is_a_share_and_knows_no_scale(weights: list[float], factor: float) -> None:
    size = effective_sample_size(f64(weights))
    assert 1 / len(weights) * (1 - 1e-12) <= size <= 1 + 1e-12
    assert effective_sample_size(f64([factor * w for w in weights])) == pytest.approx(size, rel=1e-9)


@pytest.mark.parametrize("weights", [[], [0.0, 0.0]])
def test_effective_sample_size_of_nothing_is_refused(weights: list[float]) -> None:
    with pytest.raises(ValueError, match="no weight"):
        effective_sample_size(f64(weights))
