"""A vocabulary small enough to enumerate: expectations over every response, not samples of them.

Two tokens and an end token, three tokens at most, random autoregressive tables for student and teacher. Every law here
is exact (float64, 1e-10).
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from scope_opd.objective.divergences import full_kl
from scope_opd.objective.logprobs import token_logprobs
from scope_opd.objective.surrogate import sampler_correction, surrogate

END, VOCABULARY, LONGEST = 2, 3, 3
TOLERANCE = 1e-10

Prefix = tuple[int, ...]
PREFIXES: list[Prefix] = [p for n in range(LONGEST) for p in itertools.product((0, 1), repeat=n)]
INDEX = {prefix: row for row, prefix in enumerate(PREFIXES)}


def responses() -> list[Prefix]:
    """Every response: up to three tokens, ended by the end token or cut at three."""
    return [
        (*prefix, token)
        for prefix in PREFIXES
        for token in range(VOCABULARY)
        if token == END or len(prefix) == LONGEST - 1
    ]


RESPONSES = responses()


def tables(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits of a student (with gradient), a teacher and another sampler: a row a prefix."""
    generator = torch.Generator().manual_seed(seed)
    shape = (len(PREFIXES), VOCABULARY)
    student, teacher, other = (1.5 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3))
    return student.requires_grad_(), teacher, other


def steps(response: Prefix) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows of the prefixes, ids of the tokens) of a response."""
    rows = [INDEX[response[:t]] for t in range(len(response))]
    return torch.tensor(rows), torch.tensor(response)


def log_probability(logits: torch.Tensor, response: Prefix) -> torch.Tensor:
    rows, ids = steps(response)
    return torch.log_softmax(logits, dim=-1)[rows, ids].sum()


def prefix_probability(logits: torch.Tensor, prefix: Prefix) -> float:
    p = torch.softmax(logits.detach(), dim=-1)
    return math.prod(float(p[INDEX[prefix[:t]], prefix[t]]) for t in range(len(prefix)))


def kl_gradient(student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """d KL(p || q) / d logits of each row, by formula: p_k (log p_k / q_k - KL)."""
    with torch.no_grad():
        p, q = torch.softmax(student, dim=-1), torch.softmax(teacher, dim=-1)
        log_ratio = (p / q).log()
        return p * (log_ratio - (p * log_ratio).sum(dim=-1, keepdim=True))


def per_prefix_kl_gradient(student: torch.Tensor, teacher: torch.Tensor, sampler: torch.Tensor) -> torch.Tensor:
    """sum over prefixes of P_sampler(prefix), held fixed, times grad KL at the prefix."""
    reach = torch.tensor([prefix_probability(sampler, prefix) for prefix in PREFIXES], dtype=torch.float64)
    return reach[:, None] * kl_gradient(student, teacher)


def expected_surrogate_gradient(
    student: torch.Tensor, teacher: torch.Tensor, sampler: torch.Tensor, reinforce: float, distill: float
) -> torch.Tensor:
    """E over responses of the sampler, weights held fixed, of the gradient of the surrogate's summed loss."""
    total = torch.zeros_like(student)
    for response in RESPONSES:
        rows, ids = steps(response)
        logprobs = token_logprobs(student[rows], ids)
        mu = token_logprobs(sampler.detach()[rows], ids)
        correction, _ = sampler_correction(logprobs, mu, cap=math.inf)
        ones = torch.ones(len(ids), dtype=torch.float64)
        terms = surrogate(
            logprobs, logprobs, correction, reinforce * ones, distill * ones, token_logprobs(teacher[rows], ids)
        )
        (gradient,) = torch.autograd.grad(terms.loss.sum(), student)
        total += float(mu.sum().exp()) * gradient
    return total


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_the_enumeration_is_complete() -> None:
    student = tables(0)[0].detach()
    assert len(RESPONSES) == 1 + 2 + 4 * 3
    assert sum(float(log_probability(student, y).exp()) for y in RESPONSES) == pytest.approx(1.0, abs=1e-14)


@pytest.mark.parametrize("seed", range(4))
def test_expected_opd_gradient_is_the_sum_of_per_prefix_kl_gradients_with_prefixes_held_fixed(seed: int) -> None:
    student, teacher, _ = tables(seed)
    opd = expected_surrogate_gradient(student, teacher, student, reinforce=0.0, distill=1.0)
    assert relative(opd, per_prefix_kl_gradient(student, teacher, student)) < TOLERANCE


@pytest.mark.parametrize("seed", range(4))
def test_expected_opd_gradient_is_not_that_of_the_sequence_level_kl(seed: int) -> None:
    student, teacher, _ = tables(seed)
    sequence_kl = sum(
        (log_probability(student, y).exp() * (log_probability(student, y) - log_probability(teacher, y)))
        for y in RESPONSES
    )
    (of_sequences,) = torch.autograd.grad(sequence_kl, student)  # type: ignore[arg-type]
    opd = expected_surrogate_gradient(student, teacher, student, reinforce=0.0, distill=1.0)
    # They agree where nothing follows (prefixes of two tokens) and differ before, where the choice of a token also
    # changes which prefixes come.
    last = [INDEX[p] for p in PREFIXES if len(p) == LONGEST - 1]
    before = [INDEX[p] for p in PREFIXES if len(p) < LONGEST - 1]
    assert relative(opd[last], of_sequences[last]) < TOLERANCE
    assert relative(opd[before], of_sequences[before]) > 1e-2


@pytest.mark.parametrize("seed", range(4))
def test_sampler_correction_gives_the_per_prefix_kl_on_the_samplers_own_prefixes(seed: int) -> None:
    student, teacher, other = tables(seed)
    corrected = expected_surrogate_gradient(student, teacher, other, reinforce=0.0, distill=1.0)
    assert relative(corrected, per_prefix_kl_gradient(student, teacher, other)) < TOLERANCE


@pytest.mark.parametrize("seed", range(4))
def test_a_constant_reinforcement_of_every_response_has_expected_gradient_zero(seed: int) -> None:
    student, teacher, _ = tables(seed)
    gradient = expected_surrogate_gradient(student, teacher, student, reinforce=1.0, distill=0.0)
    assert float(gradient.norm()) < TOLERANCE


@pytest.mark.parametrize("seed", range(4))
def test_exact_kl_on_fixed_prefixes_has_the_expected_gradient_of_the_sampled_estimator(seed: int) -> None:
    student, teacher, _ = tables(seed)
    reach = torch.tensor([prefix_probability(student, prefix) for prefix in PREFIXES], dtype=torch.float64)
    (exact,) = torch.autograd.grad((reach * full_kl(student, teacher)).sum(), student)
    sampled = expected_surrogate_gradient(student, teacher, student, reinforce=0.0, distill=1.0)
    assert relative(exact, sampled) < TOLERANCE
    # Its value is the expected sum of log-ratios, which is the sequence-level KL itself (only gradients differ).
    fixed = student.detach()
    sequence_kl = sum(
        float(log_probability(fixed, y).exp() * (log_probability(fixed, y) - log_probability(teacher, y)))
        for y in RESPONSES
    )
    assert float((reach * full_kl(fixed, teacher)).sum()) == pytest.approx(sequence_kl, rel=1e-12)


@pytest.mark.parametrize("seed", range(2))
def test_opd_is_at_rest_at_the_teacher_and_a_small_step_lowers_every_reached_kl(seed: int) -> None:
    student, teacher, _ = tables(seed)
    at_teacher = teacher.clone().requires_grad_()
    assert float(expected_surrogate_gradient(at_teacher, teacher, at_teacher, 0.0, 1.0).norm()) < TOLERANCE
    gradient = expected_surrogate_gradient(student, teacher, student, 0.0, 1.0)
    moved = student.detach() - 1e-3 * gradient
    assert bool((full_kl(moved, teacher) < full_kl(student.detach(), teacher)).all())
