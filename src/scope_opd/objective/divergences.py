"""Divergences between student and teacher at each position: exact over a vocabulary, or over k ids and a tail bucket.

A divergence over k ids alone is not one: the masses do not sum to 1, and it can be negative. Here the ids that are left
out form one further bucket that holds the rest of the mass, p_tail = 1 - sum_i p_i. A partition loses information, so

    0 <= D(buckets of p, buckets of q) <= D(p, q),     zero where both agree on every bucket, D(p, q) itself at k = V.

Every sum is written in terms that cannot be negative, KL(p || q) = sum_b p_b (e^d_b - 1 - d_b) with d = log q - log p,
which is the usual sum plus sum_b (q_b - p_b) = 0; so no rounding makes a divergence negative. Buckets are summed in
float64. The log-mass of the tail is best given (``objective.chunked`` sums it up, with its own gradient); where it is
not, 1 - sum_i p_i stands in, which is at least the resolution of what it was computed from (2^-23 for float32), so that
nothing overflows where k ids hold all the mass.

Gradients are those with respect to the student, written out; the teacher gets none. An id with log-probs of -inf on
both sides holds no mass and counts for nothing: that is how rows of unequal k are padded, and how ids that mean
different tokens to the two models are left out (``over_common_ids``). Not covered: sums over tokens, heads (see
``objective.chunked``), second derivatives.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

Kind = Literal["reverse", "forward", "jsd"]

BLOCKS = {"cpu": 2**19}
_BLOCK_ELSEWHERE = 2**23
"""Numbers of a tensor of an exact divergence that are worked on at once, by device type. On a CPU a dozen tensors of
one block stay in its cache, where those of all rows would each be memory that the system has to hand out first;
elsewhere they only take less room."""


def topk_reverse_kl(
    student: Tensor, teacher: Tensor, student_rest: Tensor | None = None, teacher_rest: Tensor | None = None
) -> Tensor:
    """KL(student || teacher) over k ids and the bucket of all others, differentiable in the student.

        sum_b p_b log(p_b / q_b),     d / d log p_b = p_b log(p_b / q_b)

    Args:
        student: F[T, K], log p at K distinct ids, with gradient, normalised over the whole vocabulary.
        teacher: F[T, K], log q at the same ids, likewise.
        student_rest, teacher_rest: F[T], log of the mass of all other ids; None: from what the K ids leave.

    Returns:
        F[T], nats, >= 0, in the student's dtype.
    """
    return _Buckets.apply(student, teacher, student_rest, teacher_rest, "reverse")


def topk_forward_kl(
    student: Tensor, teacher: Tensor, student_rest: Tensor | None = None, teacher_rest: Tensor | None = None
) -> Tensor:
    """KL(teacher || student) over k ids and the bucket of all others, differentiable in the student.

        sum_b q_b log(q_b / p_b),     d / d log p_b = p_b - q_b

    Args, Returns: as for ``topk_reverse_kl``.
    """
    return _Buckets.apply(student, teacher, student_rest, teacher_rest, "forward")


def topk_jsd(
    student: Tensor, teacher: Tensor, student_rest: Tensor | None = None, teacher_rest: Tensor | None = None
) -> Tensor:
    """``jsd`` over k ids and the bucket of all others. Args, Returns: as for ``topk_reverse_kl``; at most log 2."""
    return _Buckets.apply(student, teacher, student_rest, teacher_rest, "jsd")


def full_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(student || teacher) over the vocabulary, differentiable in the student.

        sum_v p_v log(p_v / q_v),     d / d z_v = p_v (log(p_v / q_v) - KL)

    Args:
        student_logits, teacher_logits: F[T, V] over the same ids, divided by their temperatures; -inf rules an id out.

    Returns:
        F[T], nats, >= 0; infinite where the student may draw what the teacher rules out.
    """
    return _Exact.apply(student_logits, teacher_logits, "reverse")


def full_forward_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher || student) over the vocabulary, differentiable in the student: d / d z_v = p_v - q_v.

    Args, Returns: as for ``full_kl``; infinite where the teacher may draw what the student rules out.
    """
    return _Exact.apply(student_logits, teacher_logits, "forward")


def jsd(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Jensen-Shannon divergence, KL(p || m) / 2 + KL(q || m) / 2 with m = (p + q) / 2, differentiable in the student.

        d / d z_v = p_v (log(p_v / m_v) - KL(p || m)) / 2

    Args, Returns: as for ``full_kl``; at most log 2.
    """
    return _Exact.apply(student_logits, teacher_logits, "jsd")


def over_common_ids(logprobs: Tensor, common: Tensor) -> Tensor:
    """Top-k log-probs conditional on the ids that mean the same to both models.

    The mass of the ids seen here that are not common is taken out of the whole, so that the rest, tail included, sums
    to 1 again. Exact where ids that are not common hold no mass outside the k.

    Args:
        logprobs: F[T, K].
        common: bool[T, K].

    Returns:
        F[T, K], -inf where not common.
    """
    excluded = torch.where(common, -torch.inf, logprobs.double()).exp().sum(dim=-1, keepdim=True)
    rest = torch.log1p(-excluded.clamp(max=1.0 - torch.finfo(logprobs.dtype).eps))
    return torch.where(common, logprobs.double() - rest, -torch.inf).to(logprobs.dtype)


class _Buckets(torch.autograd.Function):
    """(log p [T, K], log q [T, K], their log-masses of the rest [T] or None, kind) -> divergence [T]."""

    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        teacher: Tensor,
        student_rest: Tensor | None,
        teacher_rest: Tensor | None,
        kind: Kind,
    ) -> Tensor:
        log_p, log_q = _with_rest(student, student_rest), _with_rest(teacher, teacher_rest)
        value, slope = _divergence(log_p, log_q, kind)
        to_ids, to_rest = slope[:, :-1], slope[:, -1]
        if student_rest is None:
            # d log p_tail / d log p_i = - p_i / p_tail
            to_ids = to_ids - to_rest[:, None] * (log_p[:, :-1] - log_p[:, -1:]).exp()
        ctx.save_for_backward(to_ids.to(student.dtype), None if student_rest is None else to_rest.to(student.dtype))
        return value.to(student.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        to_ids, to_rest = ctx.saved_tensors
        return to_ids * upstream[:, None], None, None if to_rest is None else to_rest * upstream, None, None


class _Exact(torch.autograd.Function):
    """(student logits [T, V], teacher logits [T, V], kind) -> divergence [T]."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Tensor, kind: Kind) -> Tensor:
        value, slopes = student.new_empty(student.shape[0]), torch.empty_like(student)
        rows = max(1, BLOCKS.get(student.device.type, _BLOCK_ELSEWHERE) // max(1, student.shape[1]))
        for start in range(0, student.shape[0], rows):
            block = slice(start, start + rows)
            log_p, log_q = student[block].log_softmax(dim=-1), teacher[block].to(student.dtype).log_softmax(dim=-1)
            value[block], slope = _divergence(log_p, log_q, kind)
            torch.sub(slope, log_p.exp_().mul_(slope.sum(dim=-1, keepdim=True)), out=slopes[block])
        ctx.save_for_backward(slopes)
        return value

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope * upstream[:, None], None, None


def _divergence(log_p: Tensor, log_q: Tensor, kind: Kind) -> tuple[Tensor, Tensor]:
    """The divergence [T] of two normalised rows [T, N], and its slope d / d log p of the sum of ``_terms`` [T, N]."""
    if kind == "forward":
        return _terms(log_q, log_p).sum(dim=-1), log_p.exp() - log_q.exp()
    if kind == "reverse":
        return _terms(log_p, log_q).sum(dim=-1), _weighted(log_p, log_q)
    high, low = torch.maximum(log_p, log_q), torch.minimum(log_p, log_q)
    # log((p + q) / 2), which is exactly log p where the two are equal.
    log_m = high + torch.log1p(0.5 * torch.expm1(torch.where(low == -torch.inf, low, low - high)))
    value = 0.5 * (_terms(log_p, log_m) + _terms(log_q, log_m)).sum(dim=-1)
    return value.clamp(max=math.log(2.0)), 0.5 * _weighted(log_p, log_m)


def _terms(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (e^d - 1 - d) with d = log q - log p, elementwise and >= 0: q where p = 0, infinite where only q is 0."""
    p, q = log_p.exp(), log_q.exp()
    none = p == 0.0
    d = (log_q - log_p).masked_fill_(none, 0.0)
    # Two forms of the same: the first does not cancel where d is small, the second not overflow where it is large.
    near = d.clamp(-1.0, 1.0)
    small = torch.expm1(near).sub_(near).mul_(p).clamp_(min=0.0)
    large = q.sub_(p).addcmul_(p, d, value=-1.0)
    return torch.where((d.abs_() < 1.0).logical_and_(none.logical_not_()), small, large)


def _weighted(log_p: Tensor, log_q: Tensor) -> Tensor:
    """p (log p - log q), 0 where p = 0."""
    p = log_p.exp()
    return (log_p - log_q).masked_fill_(p == 0.0, 0.0).mul_(p)


def _with_rest(logprobs: Tensor, rest: Tensor | None) -> Tensor:
    """F64[T, K + 1]: the log-probs and that of everything else."""
    wide = logprobs.detach().double()
    if rest is not None:
        return torch.cat((wide, rest.detach().double().unsqueeze(-1)), dim=-1)
    mass = wide.exp().sum(dim=-1, keepdim=True)
    return torch.cat((wide, (1.0 - mass).clamp(min=torch.finfo(logprobs.dtype).eps).log()), dim=-1)
