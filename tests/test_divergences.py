"""Laws of ``objective.divergences``: never negative, zero where equal, bounded by the exact one, exact at k = V."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from scope_opd.models.head import HeadView, map_logits
from scope_opd.objective.chunked import chunked_logprobs, chunked_topk
from scope_opd.objective.divergences import (
    BLOCKS,
    full_forward_kl,
    full_kl,
    jsd,
    over_common_ids,
    topk_forward_kl,
    topk_jsd,
    topk_reverse_kl,
)
from test_chunked import draw, draw_ids
from test_models import ragged
from tiny import tiny_model

Divergence = Callable[..., Tensor]
PAIRS = [(topk_reverse_kl, full_kl), (topk_forward_kl, full_forward_kl), (topk_jsd, jsd)]
LN2 = math.log(2)
pairs = pytest.mark.parametrize(("topk", "full"), PAIRS, ids=["reverse", "forward", "jsd"])


def by_hand(student: Tensor, teacher: Tensor, name: str) -> Tensor:
    """The textbook sums, by autograd, where every probability is positive."""
    p, q = student.log_softmax(-1), teacher.log_softmax(-1)
    m = ((p.exp() + q.exp()) / 2).log()
    sums = {
        "full_kl": p.exp() * (p - q),
        "full_forward_kl": q.exp() * (q - p),
        "jsd": (p.exp() * (p - m) + q.exp() * (q - m)) / 2,
    }
    return sums[name].sum(-1)


logits = st.integers(0, 10_000).flatmap(
    lambda seed: st.tuples(
        st.just(seed),
        st.integers(1, 12),
        st.sampled_from([0.01, 1.0, 5.0, 30.0]),
        st.sampled_from([0.0, 1e-4, 1.0, 9.0]),
    )
)


@pairs
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@settings(max_examples=60, deadline=None)
@given(case=logits, k=st.integers(1, 12))
def test_bucketed_divergences_lie_between_zero_and_the_exact_one(
    topk: Divergence, full: Divergence, dtype: torch.dtype, case: tuple[int, int, float, float], k: int
) -> None:
    seed, width, scale, apart = case
    student = draw(4, width, seed=seed, scale=scale)
    teacher = student + draw(4, width, seed=seed + 1, scale=apart)
    exact = full(student, teacher)
    ids = draw_ids(4, min(k, width), width, seed)
    log_p, log_q = (part.log_softmax(-1).gather(-1, ids).to(dtype) for part in (student, teacher))
    rests = [part.log_softmax(-1).scatter(-1, ids, -torch.inf).logsumexp(-1).to(dtype) for part in (student, teacher)]
    value, cheap = topk(log_p, log_q, *rests), topk(log_p, log_q)
    tolerance = 1e-12 if dtype == torch.float64 else 3e-6
    assert (value >= 0).all()
    assert (cheap >= 0).all()
    assert cheap.isfinite().all()
    seen = (rests[0] > math.log(1e5 * torch.finfo(dtype).eps)) & (rests[1] > math.log(1e5 * torch.finfo(dtype).eps))
    torch.testing.assert_close(cheap[seen], value[seen], rtol=1e-3, atol=1e-4)
    assert (exact >= 0).all()
    assert (value.double() <= exact * (1 + tolerance) + tolerance).all()
    if apart == 0.0:
        assert not value.any()
        assert not cheap.any()
        assert not exact.any()
    if "jsd" in topk.__name__:
        assert (exact <= math.log(2.0)).all()
        assert (value.double() <= float(torch.tensor(math.log(2.0), dtype=dtype))).all()
    if ids.shape[1] == width and dtype == torch.float64:
        torch.testing.assert_close(value, exact, rtol=1e-9, atol=1e-12)


@pairs
@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 8))
def test_finer_buckets_tell_more(topk: Divergence, full: Divergence, seed: int, k: int) -> None:
    """Data processing: k ids and a tail never exceed k + 1 ids and a tail; different distributions differ."""
    student, teacher = draw(3, 9, seed=seed).log_softmax(-1), draw(3, 9, seed=seed + 1).log_softmax(-1)
    ids = draw_ids(3, k + 1, 9, seed)
    coarse, fine = (topk(student.gather(-1, i), teacher.gather(-1, i)) for i in (ids[:, :k], ids))
    assert (coarse <= fine + 1e-14).all()
    assert (full(student, teacher) > 0).all()


@pairs
def test_exact_divergences_are_the_textbook_sums_with_their_gradients(topk: Divergence, full: Divergence) -> None:
    student, teacher = draw(6, 11).requires_grad_(), draw(6, 11, seed=1)
    upstream = draw(6, seed=2)
    expected, found = by_hand(student, teacher, full.__name__), full(student, teacher)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    got, want = (torch.autograd.grad((value * upstream).sum(), student)[0] for value in (found, expected))
    assert (got - want).norm() <= 1e-12 * want.norm()


@pairs
def test_gradients_pass_gradcheck(topk: Divergence, full: Divergence) -> None:
    student, teacher, ids = draw(3, 7).requires_grad_(), draw(3, 7, seed=1), draw_ids(3, 3, 7)
    theirs = teacher.log_softmax(-1).gather(-1, ids)
    assert torch.autograd.gradcheck(lambda z: full(z, teacher), student)
    assert torch.autograd.gradcheck(lambda z: topk(z.log_softmax(-1).gather(-1, ids), theirs), student)

    def with_rest(z: Tensor) -> Tensor:
        log_p = z.log_softmax(-1)
        rest, other = (part.scatter(-1, ids, -torch.inf).logsumexp(-1) for part in (log_p, teacher.log_softmax(-1)))
        return topk(log_p.gather(-1, ids), theirs, rest, other)

    assert torch.autograd.gradcheck(with_rest, student)
    left, right = (f(student) for f in (with_rest, lambda z: topk(z.log_softmax(-1).gather(-1, ids), theirs)))
    torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-14)
    got, want = (torch.autograd.grad(value.sum(), student)[0] for value in (left, right))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pairs
@pytest.mark.parametrize("gap", [12.0, 30.0, 80.0])
def test_a_tiny_tail_stays_finite_and_right_in_float32(topk: Divergence, full: Divergence, gap: float) -> None:
    """Student and teacher with e^-gap outside the k ids: with the tail given, all is as in float64."""
    base = torch.cat((draw(5, 3), draw(5, 40, seed=1) - gap), dim=1)
    other = torch.cat((draw(5, 3, seed=2), draw(5, 40, seed=3) - gap), dim=1)
    ids = torch.arange(3).expand(5, 3)
    values, slopes = [], []
    for dtype in (torch.float32, torch.float64):
        weight = base.t().to(dtype).clone().requires_grad_()  # [V, T]: with unit vectors as hidden states, logits
        eye = torch.eye(5, dtype=dtype)
        own = chunked_logprobs(eye, weight, ids[:, 0], ids=ids, rest=True, tile_vocabulary=16)
        their = chunked_logprobs(eye, other.t().to(dtype), ids[:, 0], ids=ids, rest=True)
        assert own.id_logprobs is not None
        assert their.id_logprobs is not None
        value = topk(own.id_logprobs, their.id_logprobs, own.rest_logprobs, their.rest_logprobs)
        values.append(value.double())
        slopes.append(torch.autograd.grad(value.sum(), weight)[0].double())
        cheap = topk(own.id_logprobs.detach().requires_grad_(), their.id_logprobs)
        assert cheap.isfinite().all()
        assert torch.autograd.grad(cheap.sum(), cheap.grad_fn.next_functions[0][0].variable)[0].isfinite().all()  # type: ignore[union-attr]
    assert (values[0] - values[1]).norm() <= 1e-5 * values[1].norm()
    assert (slopes[0] - slopes[1]).norm() <= 1e-5 * slopes[1].norm()


def test_a_student_that_left_no_tail_where_the_teacher_has_one_gets_a_bounded_gradient() -> None:
    """Forward KL: log(q_tail / p_tail) grows, but no logit is pulled by more than the mass that is missing."""
    weight = torch.tensor([[0.0], [0.1], [-60.0], [-61.0]], requires_grad=True)
    ids = torch.tensor([[0, 1]])
    own = chunked_logprobs(torch.ones(1, 1), weight, ids[:, 0], ids=ids, rest=True)
    assert own.id_logprobs is not None
    theirs = torch.tensor([[0.45, 0.45]]).log()
    value = topk_forward_kl(own.id_logprobs, theirs, own.rest_logprobs, torch.tensor([0.1]).log())
    exact = 0.9 * math.log(0.45) + 0.1 * math.log(0.1)
    z = torch.tensor([0.0, 0.1, -60.0, -61.0], dtype=torch.float64).log_softmax(-1)
    exact -= float(0.45 * (z[0] + z[1]) + 0.1 * z[2:].logsumexp(-1))
    assert float(value.detach()) == pytest.approx(exact, rel=1e-6)
    slope = torch.autograd.grad(value.sum(), weight)[0].flatten()
    within = z[2:].exp() / z[2:].exp().sum()
    torch.testing.assert_close(slope.double()[2:], -0.1 * within, rtol=1e-5, atol=0)
    assert abs(float(slope.sum())) < 1e-6


@pairs
def test_an_id_without_mass_on_either_side_counts_for_nothing(topk: Divergence, full: Divergence) -> None:
    log_p, log_q = draw(3, 6).log_softmax(-1)[:, :4], draw(3, 6, seed=1).log_softmax(-1)[:, :4]
    nothing = torch.full((3, 2), -torch.inf, dtype=torch.float64)
    student = torch.cat((log_p, nothing), dim=1).requires_grad_()
    value = topk(student, torch.cat((log_q, nothing), dim=1))
    assert torch.equal(value, topk(log_p, log_q))
    slope = torch.autograd.grad(value.sum(), student)[0]
    assert slope.isfinite().all()
    assert not slope[:, 4:].any()
    logits = torch.cat((draw(3, 4), nothing), dim=1).requires_grad_()
    exact = full(logits, torch.cat((draw(3, 4, seed=1), nothing), dim=1))
    torch.testing.assert_close(exact, full(draw(3, 4), draw(3, 4, seed=1)))
    assert torch.autograd.grad(exact.sum(), logits)[0].isfinite().all()


def test_what_one_side_rules_out_is_infinite_for_one_kl_and_finite_for_the_others() -> None:
    student, teacher = torch.zeros(1, 3), torch.tensor([[0.0, 0.0, -torch.inf]])
    assert float(full_kl(student, teacher)) == math.inf
    assert float(full_forward_kl(teacher, student)) == math.inf
    assert float(full_forward_kl(student, teacher)) == pytest.approx(math.log(1.5))
    assert float(full_kl(teacher, student)) == pytest.approx(math.log(1.5))
    apart = torch.tensor([[0.0, -torch.inf]]), torch.tensor([[-torch.inf, 0.0]])
    assert float(jsd(*apart)) == pytest.approx(math.log(2.0))
    assert float(jsd(*apart)) <= float(torch.tensor(math.log(2.0)))


def test_renormalised_over_common_ids() -> None:
    """Top-k log-probs where two of the ids mean something else to the student: those of the teacher given the rest."""
    log_q = draw(4, 8).log_softmax(-1)
    ids, strange = torch.arange(5).expand(4, 5), torch.tensor([1, 4])
    common = ~torch.isin(ids, strange)
    found = over_common_ids(log_q.gather(-1, ids), common)
    kept = torch.tensor([0, 2, 3, 5, 6, 7])
    expected = log_q[:, kept].log_softmax(-1)
    torch.testing.assert_close(found[:, [0, 2, 3]], expected[:, :3])
    assert (found[:, [1, 4]] == -torch.inf).all()

    student = draw(4, 8, seed=1).log_softmax(-1)
    bias = torch.zeros(8, dtype=torch.float64).index_fill(0, strange, -torch.inf)
    log_p = (student + bias).log_softmax(-1)
    value = topk_reverse_kl(log_p.gather(-1, ids), found)
    exact = full_kl(student[:, kept], log_q[:, kept])
    assert (value >= 0).all()
    assert (value <= exact).all()
    torch.testing.assert_close(topk_reverse_kl(log_p[:, kept], expected), exact, rtol=1e-9, atol=1e-12)


@pairs
def test_by_chunks_from_a_head_as_from_full_logits(topk: Divergence, full: Divergence) -> None:
    """The student's side tile by tile with gradient, the teacher's as hidden states or as top-k log-probs with ids."""
    student, teacher = (
        HeadView(tiny_model("qwen3", dtype=torch.float64)),
        HeadView(tiny_model("llama", seed=2, dtype=torch.float64)),
    )
    ids, _, positions = ragged()
    hidden = student.response_hidden(ids, None, positions).detach().requires_grad_()
    weight = student.head.weight.detach().clone().requires_grad_()  # type: ignore[union-attr]
    with torch.no_grad():
        theirs = teacher.response_hidden(ids, None, positions)
        wanted, log_q, log_rest = chunked_topk(theirs, teacher.head.weight, 20, 0.6, tile_vocabulary=64)  # type: ignore[union-attr]
    own = chunked_logprobs(hidden, weight, wanted[:, 0], 0.6, ids=wanted, rest=True, tile_tokens=8, tile_vocabulary=64)
    assert own.id_logprobs is not None
    value = topk(own.id_logprobs, log_q, own.rest_logprobs, log_rest)
    log_p = (hidden @ weight.t() / 0.6).log_softmax(-1)
    expected = topk(log_p.gather(-1, wanted), log_q)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-12)
    got, want = (torch.autograd.grad(x.square().sum(), (hidden, weight), retain_graph=True) for x in (value, expected))
    for left, right in zip(got, want, strict=True):
        assert (left - right).norm() <= 1e-9 * right.norm()

    def reduce(z: Tensor, other: Tensor) -> tuple[Tensor]:
        return (full(z / 0.6, teacher.project(other) / 0.6),)

    (chunked,) = map_logits(student, hidden, reduce, theirs, chunk_tokens=6)
    (whole,) = map_logits(student, hidden, reduce, theirs, chunk_tokens=1000)
    torch.testing.assert_close(chunked, whole, rtol=1e-12, atol=1e-14)
    left, right = (torch.autograd.grad(x.sum(), hidden)[0] for x in (chunked, whole))
    assert (left - right).norm() <= 1e-12 * right.norm()
    assert (value <= whole + 1e-7).all()


@pytest.mark.parametrize("divergence", [full_kl, full_forward_kl, jsd])
@pytest.mark.parametrize("block", [1, 3 * 50, 10_000])
def test_no_cut_into_blocks_changes_a_bit(
    divergence: Callable[..., Tensor], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    logits, theirs = torch.randn(2, 10, 50, generator=torch.Generator().manual_seed(0)) * 4
    found = []
    for size in (2**19, block):
        monkeypatch.setitem(BLOCKS, "cpu", size)
        own = logits.clone().requires_grad_()
        value = divergence(own, theirs)
        value.square().sum().backward()
        found.append((value.detach(), own.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])
    assert divergence(logits[:0], theirs[:0]).shape == (0,)


def test_exact_kl_of_a_hand_worked_pair() -> None:
    # p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2): KL(p||q) = 1/2 ln 2 + 0 - 1/4 ln 2 = ln(2)/4. Logits are unnormalised.
    student = torch.tensor([[LN2 + 7, 7.0, 7.0]], dtype=torch.float64)
    teacher = torch.tensor([[-LN2, -LN2, 0.0]], dtype=torch.float64)
    assert full_kl(student, teacher).tolist() == pytest.approx([LN2 / 4], rel=1e-13)
    assert full_kl(student, student + 3).tolist() == pytest.approx([0.0], abs=1e-15)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.floats(-6, 6), min_size=4, max_size=4), st.lists(st.floats(-6, 6), min_size=4, max_size=4))
def test_exact_kl_is_non_negative_and_its_gradient_is_p_times_logratio_minus_kl(s: list[float], t: list[float]) -> None:
    student, teacher = (torch.tensor([row], dtype=torch.float64, requires_grad=True) for row in (s, t))
    kl = full_kl(student, teacher)
    assert float(kl.detach()) >= -1e-14
    gradients = torch.autograd.grad(kl.sum(), [student, teacher], allow_unused=True)
    assert gradients[1] is None
    z_s, z_t = sum(math.exp(v) for v in s), sum(math.exp(v) for v in t)
    p, q = [math.exp(v) / z_s for v in s], [math.exp(v) / z_t for v in t]
    value = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    expected = [a * (math.log(a / b) - value) for a, b in zip(p, q, strict=True)]
    assert float(kl.detach()) == pytest.approx(value, abs=1e-12)
    assert gradients[0][0].tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_id_that_the_student_cannot_draw_adds_nothing_to_the_exact_kl_nor_nan_to_its_gradient(
    dtype: torch.dtype,
) -> None:
    # -inf is how ids outside the common vocabulary are masked; -1e4 underflows in float32. KL over the rest: ln(2)/4.
    for absent in (-math.inf, -1e4):
        student = torch.tensor([[LN2, 0.0, 0.0, absent]], dtype=dtype, requires_grad=True)
        teacher = torch.tensor([[-LN2, -LN2, 0.0, absent]], dtype=dtype)
        kl = full_kl(student, teacher)
        (gradient,) = torch.autograd.grad(kl.sum(), student)
        assert float(kl.detach()) == pytest.approx(LN2 / 4, rel=1e-6)
        # p (log-ratio - KL): 1/2 (1 - 1/4), 1/4 (0 - 1/4), 1/4 (-1 - 1/4), each times ln 2
        assert gradient[0].tolist() == pytest.approx(
            [3 / 8 * LN2, -1 / 16 * LN2, -5 / 16 * LN2, 0.0], rel=1e-5, abs=1e-9
        )
