"""Denominators of the whole step: by hand, and the same gradient for every cut into micro-batches."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scope_opd.objective.aggregate import coefficients
from scope_opd.objective.logprobs import token_logprobs
from scope_opd.objective.methods import Aggregation
from scope_opd.objective.surrogate import surrogate

LAW = settings(max_examples=60, deadline=None, derandomize=True)
AGGREGATIONS: tuple[Aggregation, ...] = ("prompt", "token", "sequence", "released")
F = Fraction


def fold(
    reinforce: list[float],
    distill: list[float],
    lengths: list[int],
    masked: list[bool],
    groups: list[int],
    aggregation: Aggregation,
) -> tuple[list[float], list[float]]:
    a, b = coefficients(
        torch.tensor(reinforce, dtype=torch.float64),
        torch.tensor(distill, dtype=torch.float64),
        torch.tensor(lengths, dtype=torch.int64),
        torch.tensor(masked, dtype=torch.bool),
        torch.tensor(groups, dtype=torch.int64),
        aggregation,
    )
    assert a.dtype == b.dtype == torch.float64
    return a.tolist(), b.tolist()


# Three prompts. Prompt 7 has two live rollouts (one of each path) and a masked one, prompt 3 has one wrong one, and
# prompt 9 is masked altogether. Groups are interleaved and their numbers are not 0..2.
REINFORCE = [0.5, 0.0, 9.0, 0.0, 9.0]
DISTILL = [0.0, 2.0, 9.0, 3.0, 9.0]
LENGTHS = [4, 6, 100, 10, 1000]
MASKED = [False, False, True, False, True]
GROUPS = [7, 3, 7, 7, 9]
# Live: rollouts 0 (4 tokens), 1 (6), 3 (10): 20 tokens, 3 rollouts, 2 prompts; tokens of the reinforced: 4.
BY_HAND: dict[Aggregation, tuple[list[Fraction], list[Fraction]]] = {
    "prompt": ([F(1, 2) / 2, F(0), F(0), F(0), F(0)], [F(0), F(2) / 2, F(0), F(3) / 2, F(0)]),
    "token": ([F(1, 2) / 20, F(0), F(0), F(0), F(0)], [F(0), F(2) / 20, F(0), F(3) / 20, F(0)]),
    "sequence": ([F(1, 2) / (3 * 4), F(0), F(0), F(0), F(0)], [F(0), F(2) / (3 * 6), F(0), F(3) / (3 * 10), F(0)]),
    "released": ([F(1, 2) / 4, F(0), F(0), F(0), F(0)], [F(0), F(2) / 20, F(0), F(3) / 20, F(0)]),
}


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_denominators_are_those_counted_by_hand_and_masked_prompts_leave_them(aggregation: Aggregation) -> None:
    a, b = fold(REINFORCE, DISTILL, LENGTHS, MASKED, GROUPS, aggregation)
    assert a == pytest.approx([float(v) for v in BY_HAND[aggregation][0]], rel=1e-15)
    assert b == pytest.approx([float(v) for v in BY_HAND[aggregation][1]], rel=1e-15)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_nothing_live_gives_zeros(aggregation: Aggregation) -> None:
    assert fold([1, 2], [3, 4], [5, 6], [True, True], [0, 1], aggregation) == ([0, 0], [0, 0])
    assert fold([], [], [], [], [], aggregation) == ([], [])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_masked_numbers_never_enter_not_even_as_nan(aggregation: Aggregation) -> None:
    nan = float("nan")
    a, b = fold([1, nan], [1, nan], [2, 3], [False, True], [0, 0], aggregation)
    assert a[1] == b[1] == 0.0
    assert a[0] > 0
    assert b[0] > 0


def test_released_without_reinforced_rollouts_has_no_first_term() -> None:
    assert fold([0, 0], [1, 2], [3, 7], [False, False], [0, 1], "released") == ([0, 0], [0.1, 0.2])


def test_released_counts_negative_advantages_among_the_reinforced() -> None:
    # Tokens of rollouts with a reinforce number: 3 + 7; the third has none.
    a, _ = fold([1.0, -1.0, 0.0], [0, 0, 0], [3, 7, 90], [False] * 3, [0, 0, 0], "released")
    assert a == pytest.approx([0.1, -0.1, 0.0])


def test_one_token_responses_weigh_alike_under_sequence_and_token() -> None:
    assert fold([1, 1], [0, 0], [1, 1], [False] * 2, [0, 1], "sequence") == ([0.5, 0.5], [0, 0])
    assert fold([1, 1], [0, 0], [1, 1], [False] * 2, [0, 1], "token") == ([0.5, 0.5], [0, 0])


def test_unknown_aggregation_is_refused() -> None:
    with pytest.raises(ValueError, match="aggregation = 'mean'; expected one of prompt, token, sequence, released"):
        fold([1], [1], [1], [False], [0], "mean")  # type: ignore[arg-type]


def step_gradient(cut: list[list[int]], aggregation: Aggregation, seed: int) -> torch.Tensor:
    """Gradient of a step's loss in a linear softmax policy, accumulated over the given cut of six rollouts."""
    generator = torch.Generator().manual_seed(seed)
    width, vocabulary = 4, 5
    lengths = torch.tensor([1, 5, 2, 7, 3, 4])
    groups = torch.tensor([0, 0, 1, 1, 2, 2])
    masked = torch.tensor([False, False, False, True, False, False])
    reinforce = torch.tensor([0.7, 0.0, 0.0, 1.0, 0.3, -0.4], dtype=torch.float64)
    distill = torch.tensor([0.0, 1.0, 0.6, 1.0, 0.0, 0.5], dtype=torch.float64)
    total = int(lengths.sum())
    hidden = torch.randn(total, width, generator=generator, dtype=torch.float64)
    ids = torch.randint(vocabulary, (total,), generator=generator)
    teacher = -2 * torch.rand(total, generator=generator, dtype=torch.float64)
    correction = torch.rand(total, generator=generator, dtype=torch.float64) + 0.5
    weights = torch.randn(width, vocabulary, generator=generator, dtype=torch.float64, requires_grad=True)
    a, b = coefficients(reinforce, distill, lengths, masked, groups, aggregation)
    starts = [0, *lengths.cumsum(0).tolist()]
    for chunk in cut:
        rows = torch.cat([torch.arange(starts[i], starts[i + 1]) for i in chunk])
        owner = torch.repeat_interleave(torch.tensor(chunk), lengths[chunk])
        logprobs = token_logprobs(hidden[rows] @ weights, ids[rows], 0.6)
        old = logprobs.detach() - 0.05
        terms = surrogate(logprobs, old, correction[rows], a[owner], b[owner], teacher[rows], clip=0.2, dual_clip=3.0)
        terms.loss.sum().backward()  # type: ignore[no-untyped-call]
    assert weights.grad is not None
    return weights.grad


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@LAW
@given(labels=st.lists(st.integers(0, 5), min_size=6, max_size=6), seed=st.integers(0, 3))
def test_any_cut_into_micro_batches_gives_the_same_gradient(
    aggregation: Aggregation, labels: list[int], seed: int
) -> None:
    cut = [[i for i in range(6) if labels[i] == label] for label in sorted(set(labels))]
    whole = step_gradient([list(range(6))], aggregation, seed)
    parts = step_gradient(cut, aggregation, seed)
    assert float(whole.norm()) > 1e-3
    assert float((parts - whole).norm() / whole.norm()) <= 1e-10
