"""The walk over tiles of (tokens x vocabulary) that ``objective.chunked`` consists of: forward figures and gradients.

``Tiles`` computes a tile's z into a buffer that all tiles share, ``Online`` folds it into running figures a token,
``Gradient`` turns it into the gradient with respect to z in place. Blocks of the matrix are the outer loop, so that a
block is cast once and its gradient stays in the cache while the tokens pass by. An id of -1 is none: it is in no
block. Not covered: what the figures mean (see ``objective.chunked``).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Tail:
    """What follows the head's matrix: y -> scale y, then cap tanh(y / cap) where there is a cap."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        if self.scale != 1.0:
            logits = logits * self.scale
        return logits if self.cap is None else torch.tanh(logits / self.cap) * self.cap


@dataclass(frozen=True, slots=True)
class Plan:
    """What is asked of a walk.

    ``formed``: sum_v p_v W_v in the forward pass, for the matrix needs no gradient. ``dry``: tensors have no data, and
    the walk shows what it allocates.
    """

    tail: Tail
    temperature: float
    extra_temperature: float | None
    entropy: bool
    rest: bool
    formed: bool
    tokens: int
    vocabulary: int
    compute: torch.dtype
    wide: torch.dtype
    dry: bool = False

    @property
    def factor(self) -> float:
        """What the product is multiplied by: scale / temperature, or scale / cap under a soft-cap."""
        return self.tail.scale / (self.temperature if self.tail.cap is None else self.tail.cap)

    @property
    def after_tanh(self) -> float:
        assert self.tail.cap is not None
        return self.tail.cap / self.temperature


class Tiles:
    """The tiles of one call: blocks of the matrix (outer), chunks of tokens (inner), two buffers for all of them."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        plan: Plan,
        buffers: int,
        excluded: Tensor | None = None,
    ) -> None:
        self.hidden, self.weight, self.bias, self.plan = hidden.to(plan.compute), weight, bias, plan
        self.total, self.rows = hidden.shape[0], weight.shape[0]
        self._excluded, self._bounds = excluded, dict[int, int]()
        if excluded is not None:
            edges = [*range(0, self.rows, plan.vocabulary), self.rows]
            bounds = torch.searchsorted(excluded, torch.tensor(edges, device=excluded.device))
            self._bounds = dict(zip(edges, bounds.tolist(), strict=True))
        size = min(plan.tokens, self.total) * min(plan.vocabulary, self.rows)
        self._buffers = [torch.empty(size, dtype=plan.wide, device=hidden.device) for _ in range(buffers)]

    def blocks(self) -> list[slice]:
        return self._cut(self.rows, self.plan.vocabulary)

    def chunks(self) -> list[slice]:
        return self._cut(self.total, self.plan.tokens)

    def _cut(self, total: int, step: int) -> list[slice]:
        parts = [slice(start, min(start + step, total)) for start in range(0, total, step)]
        # The second follows one of its own kind, the last may be smaller: those between allocate what the second does.
        return [*parts[:2], *parts[2:][-1:]] if self.plan.dry else parts

    def block(self, block: slice) -> tuple[Tensor, Tensor | None]:
        """Rows of the matrix in the dtype of the products, and their bias times ``factor``."""
        bias = None if self.bias is None else self.bias[block].to(self.plan.wide) * self.plan.factor
        return self.weight[block].to(self.plan.compute), bias

    @property
    def excludes(self) -> bool:
        return self._excluded is not None

    def excluded(self, block: slice) -> Tensor | None:
        """The columns of a block whose ids are excluded; None where there is none."""
        if self._excluded is None or self._bounds[block.start] == self._bounds[block.stop]:
            return None
        return self._excluded[self._bounds[block.start] : self._bounds[block.stop]] - block.start

    def buffer(self, number: int, chunk: slice, block: slice) -> Tensor:
        tokens, rows = chunk.stop - chunk.start, block.stop - block.start
        return self._buffers[number][: tokens * rows].view(tokens, rows)

    def product(self, chunk: slice, block: slice, rows: Tensor, bias: Tensor | None) -> Tensor:
        """factor (h W^T + b) in the first buffer: z without a soft-cap, the argument of tanh with one."""
        out = self.buffer(0, chunk, block)
        if self.plan.compute == self.plan.wide:
            torch.addmm(out, self.hidden[chunk], rows.t(), beta=0, alpha=self.plan.factor, out=out)
        elif not self.plan.dry and multiplies_wide(out.device, self.plan.compute):
            _addmm_wide(out, self.hidden[chunk], rows.t(), beta=0, alpha=self.plan.factor)
        else:
            torch.mul(torch.mm(self.hidden[chunk], rows.t()), self.plan.factor, out=out)
        return out if bias is None else out.add_(bias)

    def above_underflow(self, z: Tensor) -> Tensor:
        """z raised, in place, to where exp(z) is a normal number: a CPU takes ten times as long for subnormal ones.

        What is added is below 1e-37 of the largest term. Left alone under a bias, for an id that it rules out has 0.
        """
        if z.is_cpu and self.bias is None:
            z.clamp_(min=math.log(torch.finfo(z.dtype).tiny) + 1.0)
        return z


class Online:
    """Running figures a token, while the tiles go by."""

    def __init__(self, tiles: Tiles, ids: Tensor, formed: bool) -> None:
        plan, device = tiles.plan, tiles.hidden.device
        self.tiles, self.plan, self.ids = tiles, plan, ids

        def fill(value: float) -> Tensor:
            return torch.full((tiles.total,), value, dtype=plan.wide, device=device)

        self.peak, self.total, self.weighted, self.extra = fill(-torch.inf), fill(0.0), fill(0.0), fill(0.0)
        self.outside = fill(0.0)
        self.picked = torch.where(ids < 0, -torch.inf, torch.zeros(ids.shape, dtype=plan.wide, device=device))
        self.mean_row: Tensor | None = None
        if formed:
            self.mean_row = torch.zeros((tiles.total, tiles.hidden.shape[1]), dtype=plan.wide, device=device)

    def take(self, z: Tensor, chunk: slice, block: slice, rows: Tensor) -> None:
        """A tile as ``Tiles.product`` made it: what is asked of it at the ids, then ``reduce``."""
        plan = self.plan
        slope: Tensor | None = None
        if plan.tail.cap is not None:
            z.tanh_()
            if self.mean_row is not None:
                slope = 1.0 - z.square()
            z.mul_(plan.after_tanh)
        inside, local = _local(self.ids[chunk], block)
        self.picked[chunk] = torch.where(inside, z.gather(-1, local), self.picked[chunk])
        self.reduce(z, chunk, block, rows, slope)

    def reduce(self, z: Tensor, chunk: slice, block: slice, rows: Tensor, slope: Tensor | None) -> None:
        """Fold a tile's z into peak and sums; z is used up."""
        plan = self.plan
        before = self.peak[chunk]
        peak = torch.maximum(before, z.amax(dim=-1))
        # A block whose ids are all ruled out leaves the peak at -inf, and inf - inf would be NaN.
        anchor = torch.where(peak == -torch.inf, 0.0, peak)
        self.tiles.above_underflow(z.sub_(anchor[:, None]))
        shift = before - anchor
        e = torch.exp(z, out=self.tiles.buffer(1, chunk, block))
        shrink = shift.exp()
        total = self.total[chunk]
        if plan.entropy:
            moved = torch.where(total > 0, self.weighted[chunk] + shift * total, 0.0)
            self.weighted[chunk] = moved * shrink
        self.total[chunk] = total * shrink + e.sum(dim=-1)
        if plan.rest:
            inside, local = _local(self.ids[chunk, 1:], block)
            chosen = _take_out(e, inside, local)
            columns = self.tiles.excluded(block)
            apart = None if columns is None else e[:, columns]
            if columns is not None:
                e[:, columns] = 0.0
            self.outside[chunk] = self.outside[chunk] * shrink + e.sum(dim=-1)
            if columns is not None and apart is not None:
                e[:, columns] = apart
            e.scatter_add_(-1, local, chosen)
        if self.mean_row is not None:
            weights = e if slope is None else e * slope
            mean = self.mean_row[chunk].mul_(shrink[:, None])
            _add_product(mean, weights, rows, 1.0)
        if plan.entropy:
            if self.tiles.bias is not None:
                z.clamp_(min=-1e4)  # exp() is 0 there in any dtype, and 0 * -inf would be NaN
            self.weighted[chunk] += e.mul_(z).sum(dim=-1)
        if plan.extra_temperature is not None:
            ratio = plan.temperature / plan.extra_temperature
            self.extra[chunk] = self.extra[chunk] * (shift * ratio).exp() + z.mul_(ratio).exp_().sum(dim=-1)
        self.peak[chunk] = peak

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """[T, 1 + K] log p; then [T] each: log sum exp z, log p(rest), entropy, log p of the first id at T2."""
        plan = self.plan
        log_total = self.total.log()
        over = self.picked - self.peak[:, None]
        chosen = over[:, 1:].exp().sum(dim=-1)
        rest = self.outside.clamp(min=torch.finfo(plan.wide).tiny).log() - log_total
        if not self.tiles.excludes:
            # Near 1 the log of a share is best taken from what is missing.
            rest = torch.where(chosen < 0.5 * self.total, torch.log1p(-chosen / self.total), rest)
        entropy = log_total - self.weighted / self.total if plan.entropy else log_total
        extra = log_total
        if plan.extra_temperature is not None:
            extra = over[:, 0] * (plan.temperature / plan.extra_temperature) - self.extra.log()
        if self.mean_row is not None:
            self.mean_row /= self.total[:, None]
        return over - log_total[:, None], self.peak + log_total, rest, entropy.clone(), extra.clone()


@dataclass(frozen=True, slots=True)
class Gradient:
    """What turns a tile of z into the gradient of sum(upstream log p) with respect to it."""

    upstream: Tensor  # F[T, 1 + K]
    found: Tensor  # F[T, 1 + K], log p
    to_rest: tuple[Tensor, Tensor] | None  # upstream and value of log p(rest), F[T] each
    log_z: Tensor  # F[T]
    ids: Tensor  # I[T, 1 + K]
    plan: Plan

    def fill(self, tiles: Tiles, z: Tensor, chunk: slice, block: slice) -> Tensor:
        """In place."""
        upstream, log_z = self.upstream[chunk], self.log_z[chunk, None]
        inside, local = _local(self.ids[chunk], block)
        together = upstream.sum(dim=-1, keepdim=True)
        if self.to_rest is None:
            g = tiles.above_underflow(z.sub_(log_z)).exp_().mul_(-together)
            return g.scatter_add_(-1, local, torch.where(inside, upstream, 0.0))
        rest, log_rest = (part[chunk, None] for part in self.to_rest)
        together = together + rest
        columns = tiles.excluded(block)
        apart = None if columns is None else z[:, columns]
        # p_v / p(rest), at most 1 for the ids of the rest; what the others come to is taken out at once.
        g = tiles.above_underflow(z.sub_(log_z + log_rest).clamp_(max=0.0)).exp_()
        _take_out(g, inside[:, 1:], local[:, 1:])
        g.mul_(rest - log_rest.exp() * together)
        if columns is not None and apart is not None:
            g[:, columns] = (apart - log_z).exp_().mul_(-together)
        pull = upstream.clone()
        pull[:, 1:] -= self.found[chunk, 1:].exp() * together
        return g.scatter_add_(-1, local, torch.where(inside, pull, 0.0))


def recompute(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gradient: Gradient,
    plan: Plan,
    needs: tuple[bool, ...],
    excluded: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of hidden, weight and bias, as far as needed, by a second walk over the tiles."""
    tiles = Tiles(hidden, weight, bias, plan, 1 if plan.tail.cap is None else 2, excluded)
    to_hidden = torch.zeros_like(hidden, dtype=plan.wide) if needs[0] else None
    to_weight = torch.empty_like(weight) if needs[1] else None
    to_bias = torch.zeros_like(bias, dtype=plan.wide) if bias is not None and needs[2] else None
    # d z / d (h W^T + b): scale / temperature, under a soft-cap times the slope of tanh.
    alpha = plan.tail.scale / plan.temperature
    for block in tiles.blocks():
        rows, added = tiles.block(block)
        share: Tensor | None = None
        if to_weight is not None:
            whole = to_weight[block]
            share = (whole if whole.dtype == plan.wide else torch.empty_like(whole, dtype=plan.wide)).zero_()
        for chunk in tiles.chunks():
            g = tiles.product(chunk, block, rows, added)
            slope: Tensor | None = None
            if plan.tail.cap is not None:
                slope = torch.square(g.tanh_(), out=tiles.buffer(1, chunk, block)).neg_().add_(1.0)
                g.mul_(plan.after_tanh)
            gradient.fill(tiles, g, chunk, block)
            if slope is not None:
                g.mul_(slope)
            if to_bias is not None:
                to_bias[block] += g.sum(dim=0)
            if to_hidden is not None:
                _add_product(to_hidden[chunk], g, rows, alpha)
            if share is not None:
                _add_product(share, g.t(), tiles.hidden[chunk], alpha)
        if share is not None and to_weight is not None and share.dtype != to_weight.dtype:
            to_weight[block] = share
    return (
        None if to_hidden is None else to_hidden.to(hidden.dtype),
        to_weight,
        None if to_bias is None or bias is None else (to_bias * alpha).to(bias.dtype),
    )


def from_mean_row(
    hidden: Tensor, weight: Tensor, ids: Tensor, upstream: Tensor, picked: Tensor, mean_row: Tensor, plan: Plan
) -> Tensor:
    """Gradient of the hidden states from sum_v p_v W_v: sum_k g_k (W[id_k] - sum_v p_v W_v) scale / temperature."""
    if plan.tail.cap is not None:
        pull = upstream * (1.0 - (picked / plan.after_tanh).square())
    else:
        pull = upstream
    gradient = mean_row * -upstream.sum(dim=-1, keepdim=True)
    for column in range(ids.shape[1]):
        for chunk in range(0, ids.shape[0], plan.tokens):
            part = slice(chunk, chunk + plan.tokens)
            gradient[part].addcmul_(weight[ids[part, column]].to(plan.wide), pull[part, column, None])
    return gradient.mul_(plan.tail.scale / plan.temperature).to(hidden.dtype)


def _local(ids: Tensor, block: slice) -> tuple[Tensor, Tensor]:
    """Which ids lie in a block, and where; ids outside point at a column that ``inside`` keeps from counting."""
    inside = (ids >= block.start) & (ids < block.stop)
    return inside, (ids - block.start).clamp(0, block.stop - block.start - 1)


def _take_out(values: Tensor, inside: Tensor, local: Tensor) -> Tensor:
    """Make the values at ``local`` 0 where ``inside``, in place, and return them; the ids of a row are distinct."""
    chosen = torch.where(inside, values.gather(-1, local), 0.0)
    values.scatter_add_(-1, local, -chosen)  # x - x, so exactly 0
    return chosen


def _add_product(to: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """to += alpha left right, the product in the dtype of ``right``."""
    if right.dtype == to.dtype:
        to.addmm_(left, right, alpha=alpha)
    elif multiplies_wide(to.device, right.dtype):
        _addmm_wide(to, left.to(right.dtype), right, alpha=alpha)
    else:
        to.add_(torch.mm(left.to(right.dtype), right), alpha=alpha)


def _addmm_wide(to: Tensor, left: Tensor, right: Tensor, *, alpha: float, beta: float = 1.0) -> None:
    """to = beta to + alpha left right in place: factors in half precision, a float32 sum that is never rounded."""
    torch.addmm(to, left, right, out_dtype=to.dtype, beta=beta, alpha=alpha, out=to)


@functools.cache
def multiplies_wide(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this torch has ``_addmm_wide`` for a device, and gets a small product right; GPUs of late versions do."""
    if device.type != "cuda":
        return False
    left = torch.eye(16, dtype=dtype, device=device) * 3.0
    right = torch.arange(256, device=device).reshape(16, 16).to(dtype) + 1.0
    to = torch.full((16, 16), torch.nan, device=device)
    try:
        _addmm_wide(to, left, right, beta=0.0, alpha=0.5)
        _addmm_wide(to, left, right, alpha=0.5)
    except (NotImplementedError, RuntimeError, TypeError):
        return False
    return bool(torch.equal(to, 3.0 * right.float()))
