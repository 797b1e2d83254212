"""Log-probs and entropies of a tempered softmax against plain formulas in Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scope_opd.objective.logprobs import tempered, token_entropy, token_logprobs

LAW = settings(max_examples=60, deadline=None, derandomize=True)
INF = math.inf


def by_formula(row: list[float], temperature: float) -> list[float]:
    """log softmax(row / T) in plain floats."""
    scaled = [value / temperature for value in row]
    top = max(scaled)
    log_z = top + math.log(sum(math.exp(value - top) for value in scaled))
    return [value - log_z for value in scaled]


def test_logprobs_of_logits_ln1_ln2_ln5_are_eighths_and_tempered_ones_powers() -> None:
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]], dtype=torch.float64).expand(3, 3)
    ids = torch.arange(3)
    assert token_logprobs(logits, ids).exp().tolist() == pytest.approx([1 / 8, 2 / 8, 5 / 8], rel=1e-15)
    # T = 1/2 squares the odds: 1 : 4 : 25 over 30; T = 2 takes their roots.
    assert token_logprobs(logits, ids, 0.5).exp().tolist() == pytest.approx([1 / 30, 4 / 30, 25 / 30], rel=1e-14)
    roots = 1 + math.sqrt(2) + math.sqrt(5)
    expected = [1 / roots, math.sqrt(2) / roots, math.sqrt(5) / roots]
    assert token_logprobs(logits, ids, 2.0).exp().tolist() == pytest.approx(expected, rel=1e-14)


rows = st.lists(st.lists(st.floats(-30, 30), min_size=4, max_size=4), min_size=1, max_size=5)


@LAW
@given(rows, st.sampled_from([0.3, 0.6, 1.0, 1.7]))
def test_logprobs_and_entropies_equal_the_plain_formulas(rows: list[list[float]], temperature: float) -> None:
    logits = torch.tensor(rows, dtype=torch.float64)
    ids = torch.arange(len(rows)) % 4
    expected = [by_formula(row, temperature) for row in rows]
    got = token_logprobs(logits, ids, temperature).tolist()
    assert got == pytest.approx([row[i % 4] for i, row in enumerate(expected)], abs=1e-11)
    entropies = [-sum(math.exp(lp) * lp for lp in row) for row in expected]
    assert token_entropy(logits, temperature).tolist() == pytest.approx(entropies, abs=1e-11)


@LAW
@given(rows, st.floats(-1e3, 1e3))
def test_logprobs_do_not_change_when_all_logits_are_shifted(rows: list[list[float]], shift: float) -> None:
    logits = torch.tensor(rows, dtype=torch.float64)
    ids = torch.zeros(len(rows), dtype=torch.int64)
    assert token_logprobs(logits + shift, ids).tolist() == pytest.approx(token_logprobs(logits, ids).tolist(), abs=1e-9)


def test_narrow_logits_are_widened_before_they_are_divided() -> None:
    logits = torch.tensor([[1.0, 3.0, -2.0]], dtype=torch.bfloat16)
    assert tempered(logits, 0.6).dtype == torch.float32
    assert token_logprobs(logits, torch.tensor([1]), 0.6).dtype == torch.float32
    # 1, 3 and -2 are exact in bfloat16, so nothing but float32 rounding of numbers near 5 may separate the two.
    expected = by_formula([1.0, 3.0, -2.0], 0.6)[1]
    assert float(token_logprobs(logits, torch.tensor([1]), 0.6)) == pytest.approx(expected, abs=1e-6)
    assert token_logprobs(logits.double(), torch.tensor([1])).dtype == torch.float64


def test_logprobs_of_huge_logits_are_finite() -> None:
    # exp(1e4) overflows; the odds are e : 1 : 0.
    logits, ids = torch.tensor([[1e4, 1e4 - 1.0, -1e4]]), torch.tensor([1])
    expected = -1.0 - math.log1p(math.exp(-1))
    assert token_logprobs(logits.double(), ids).tolist() == pytest.approx([expected], abs=1e-11)
    assert token_logprobs(logits, ids).tolist() == pytest.approx(
        [expected], abs=1e-3
    )  # float32 near 1e4: steps of 1e-3


def test_an_id_that_cannot_be_drawn_carries_no_entropy() -> None:
    logits = torch.tensor([[0.0, 0.0, -INF], [5.0, -INF, -INF], [0.0, 0.0, 0.0]], dtype=torch.float64)
    assert token_entropy(logits).tolist() == pytest.approx([math.log(2), 0.0, math.log(3)], abs=1e-15)
    assert token_entropy(torch.tensor([[0.0, -1e5]])).tolist() == [0.0]


def test_entropy_of_a_fair_choice_does_not_depend_on_temperature_and_falls_with_it_elsewhere() -> None:
    fair, biased = torch.zeros(1, 8, dtype=torch.float64), torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64)
    assert float(token_entropy(fair, 0.3)) == pytest.approx(math.log(8), rel=1e-14)
    values = [float(token_entropy(biased, temperature)) for temperature in (0.1, 0.6, 1.0, 5.0)]
    assert values == sorted(values)


@pytest.mark.parametrize("temperature", [0.0, -0.6, math.nan])
def test_temperature_that_is_not_positive_is_refused(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs(torch.zeros(1, 3), torch.tensor([0]), temperature)


def test_gradient_of_a_logprob_is_onehot_minus_p_over_temperature() -> None:
    logits = torch.tensor([[0.0, math.log(2), math.log(5)]], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(token_logprobs(logits, torch.tensor([1]), 0.5).sum(), logits)
    # p = (1, 4, 25) / 30 at T = 1/2
    assert gradient[0].tolist() == pytest.approx([2 * (0 - 1 / 30), 2 * (1 - 4 / 30), 2 * (0 - 25 / 30)], rel=1e-13)
