"""Log-probs and entropy straight from hidden states and a head's matrix; full logits never exist.

With logits y = scale (h W^T + b), soft-capped to cap tanh(y / cap) where there is a cap, and z = y / temperature:

    log p(a) = z_a - m - log sum_v exp(z_v - m),   m = max_v z_v
    H        = log sum_v exp(z_v - m) - sum_v p_v (z_v - m)
    d log p(a) / d z_v = [v = a] - p_v

The forward pass walks over tiles of (tokens x vocabulary) and keeps, a token, the running maximum, the sum of
exponentials and the sum for the entropy (online logsumexp); a tile's logits live in two buffers that every tile uses
again. The backward pass computes each tile's logits once more, turns them into gradients in place, and adds them to
the gradients of hidden states, matrix and bias. That is exact whatever the loss does with the log-probs: one product
more than full logits cost. Where the matrix needs no gradient (adapters), sum_v p_v W_v is formed in the forward pass
instead, rescaled as the maximum moves, and the backward pass needs no product at all; that too is exact for any loss,
for the upstream gradient only multiplies a token's row.

``Head`` says what the head is, ``Wanted`` what is asked for. Not covered: heads split over devices, gradients of the
entropy or at the second temperature, second derivatives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

# Tokens and vocabulary rows of a tile: 32 MiB a buffer in float32 (see benchmarks/logprobs.py for the choice).
TILE_TOKENS = 1024
TILE_VOCABULARY = 8192


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
class ChunkedScores:
    """T tokens, K ids a token; float32 (float64 where the head computes in float64).

    Attributes:
        logprobs: F[T], log p of each target; carries the gradient.
        id_logprobs: F[T, K], log p at the ids asked for; carries the gradient. None when not asked for.
        entropy: F[T], nats; no gradient. None when not asked for.
        extra_logprobs: F[T], log p of each target at the second temperature; no gradient. None when not asked for.
    """

    logprobs: Tensor
    id_logprobs: Tensor | None
    entropy: Tensor | None
    extra_logprobs: Tensor | None


def chunked_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    *,
    bias: Tensor | None = None,
    tail: Tail | None = None,
    ids: Tensor | None = None,
    extra_temperature: float | None = None,
    entropy: bool = True,
    tile_tokens: int | None = None,
    tile_vocabulary: int | None = None,
) -> ChunkedScores:
    """Scores of given tokens under softmax(tail(hidden weight^T + bias) / temperature).

    The products are computed in the autocast dtype of the device where autocast is on, else in the dtype of ``weight``;
    everything after them, and every sum over tiles, in float32 (float64 for float64). The result depends on the tiles by
    rounding only.

    Args:
        hidden: F[T, H].
        weight: F[V, H]; a tied embedding will do.
        targets: I[T], in 0..V-1.
        temperature: > 0.
        bias: F[V] or None. An entry of -inf rules an id out.
        tail: scale and soft-cap of the head.
        ids: I[T, K], further ids whose log-probs are wanted; may repeat the target.
        extra_temperature: > 0, a second temperature for the targets.
        entropy: False leaves the entropy out, and one pass over every tile with it.
        tile_tokens, tile_vocabulary: sides of a tile, >= 1; None: ``TILE_TOKENS``, ``TILE_VOCABULARY``.

    Returns:
        ``ChunkedScores``; exact gradients for hidden, weight and bias, whatever is done with the log-probs.

    Raises:
        ValueError: a temperature or a side of a tile out of range, or a target or id that the head has no row for
            (CPU; on a GPU the check would wait for the device).
    """
    for name, value in (("temperature", temperature), ("extra_temperature", extra_temperature)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} = {value}; expected a number > 0")
    tokens = TILE_TOKENS if tile_tokens is None else tile_tokens
    vocabulary = TILE_VOCABULARY if tile_vocabulary is None else tile_vocabulary
    if tokens < 1 or vocabulary < 1:
        raise ValueError(f"tiles of {tokens} tokens x {vocabulary} ids; expected at least 1 x 1")
    wanted = torch.cat((targets.unsqueeze(-1), targets.new_empty(len(targets), 0) if ids is None else ids), dim=-1)
    if wanted.device.type == "cpu" and wanted.numel():
        outside = ((wanted < 0) | (wanted >= weight.shape[0])).any(dim=-1).nonzero()
        if outside.numel():
            row = int(outside[0])
            raise ValueError(f"row {row} asks for ids {wanted[row].tolist()}; expected 0..{weight.shape[0] - 1}")
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    plan = _Plan(
        tail=tail or Tail(),
        temperature=temperature,
        extra_temperature=extra_temperature,
        entropy=entropy,
        tokens=tokens,
        vocabulary=vocabulary,
        compute=compute,
        wide=torch.float64 if compute == torch.float64 else torch.float32,
    )
    logprobs, id_logprobs, surprise, extra = _Chunked.apply(hidden, weight, bias, wanted, plan)
    return ChunkedScores(
        logprobs=logprobs,
        id_logprobs=None if ids is None else id_logprobs,
        entropy=surprise if entropy else None,
        extra_logprobs=extra if extra_temperature is not None else None,
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    tail: Tail
    temperature: float
    extra_temperature: float | None
    entropy: bool
    tokens: int
    vocabulary: int
    compute: torch.dtype
    wide: torch.dtype

    @property
    def factor(self) -> float:
        """What the product is multiplied by: scale / temperature, or scale / cap under a soft-cap."""
        return self.tail.scale / (self.temperature if self.tail.cap is None else self.tail.cap)

    @property
    def after_tanh(self) -> float:
        assert self.tail.cap is not None
        return self.tail.cap / self.temperature


class _Tiles:
    """The tiles of one call: blocks of the matrix (outer), chunks of tokens (inner), two buffers for all of them."""

    def __init__(self, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: _Plan, buffers: int) -> None:
        self.hidden, self.weight, self.bias, self.plan = hidden.to(plan.compute), weight, bias, plan
        self.total, self.rows = hidden.shape[0], weight.shape[0]
        size = min(plan.tokens, self.total) * min(plan.vocabulary, self.rows)
        self._buffers = [torch.empty(size, dtype=plan.wide, device=hidden.device) for _ in range(buffers)]

    def blocks(self) -> list[slice]:
        step = self.plan.vocabulary
        return [slice(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    def chunks(self) -> list[slice]:
        step = self.plan.tokens
        return [slice(start, min(start + step, self.total)) for start in range(0, self.total, step)]

    def block(self, block: slice) -> tuple[Tensor, Tensor | None]:
        """Rows of the matrix in the dtype of the products, and their bias times ``factor``."""
        bias = None if self.bias is None else self.bias[block].to(self.plan.wide) * self.plan.factor
        return self.weight[block].to(self.plan.compute), bias

    def buffer(self, number: int, chunk: slice, block: slice) -> Tensor:
        tokens, rows = chunk.stop - chunk.start, block.stop - block.start
        return self._buffers[number][: tokens * rows].view(tokens, rows)

    def product(self, chunk: slice, block: slice, rows: Tensor, bias: Tensor | None) -> Tensor:
        """factor (h W^T + b) in the first buffer: z without a soft-cap, the argument of tanh with one."""
        out = self.buffer(0, chunk, block)
        if self.plan.compute == self.plan.wide:
            torch.addmm(out, self.hidden[chunk], rows.t(), beta=0, alpha=self.plan.factor, out=out)
        else:
            torch.mul(torch.mm(self.hidden[chunk], rows.t()), self.plan.factor, out=out)
        return out if bias is None else out.add_(bias)


class _Chunked(torch.autograd.Function):
    """(hidden, weight, bias, ids [T, 1 + K], plan) -> log p of the first id [T], of the others [T, K], entropy [T], log p
    of the first id at the second temperature [T]."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, plan: _Plan
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        formed = hidden.requires_grad and not weight.requires_grad and not (bias is not None and bias.requires_grad)
        with torch.autocast(hidden.device.type, enabled=False):
            tiles = _Tiles(hidden, weight, bias, plan, 2)
            state = _Online(tiles, ids, formed)
            for block in tiles.blocks():
                rows, added = tiles.block(block)
                for chunk in tiles.chunks():
                    state.take(tiles.product(chunk, block, rows, added), chunk, block, rows)
            found, log_z, entropy, extra = state.results()
        ctx.plan, ctx.formed = plan, formed
        ctx.save_for_backward(hidden, weight, bias, ids, log_z, state.mean_row, found)
        ctx.mark_non_differentiable(entropy, extra)
        # Copies, for a view of an output may not be handed out by a module that FSDP gathers.
        return found[:, 0].clone(), found[:, 1:].clone(), entropy, extra

    @staticmethod
    def backward(ctx: Any, first: Tensor, others: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, log_z, mean_row, found = ctx.saved_tensors
        plan: _Plan = ctx.plan
        upstream = torch.cat((first.unsqueeze(-1), others), dim=-1).to(plan.wide)
        with torch.autocast(hidden.device.type, enabled=False):
            if ctx.formed:
                return _from_mean_row(hidden, weight, ids, upstream, found + log_z[:, None], mean_row, plan), *[None] * 4
            needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
            return *_recompute(
                hidden, weight, bias, ids, upstream, log_z, plan, needs_hidden, needs_weight, needs_bias
            ), None, None  # fmt: skip


class _Online:
    """Running figures a token, while the tiles go by."""

    def __init__(self, tiles: _Tiles, ids: Tensor, formed: bool) -> None:
        plan, device = tiles.plan, tiles.hidden.device
        self.tiles, self.plan, self.ids = tiles, plan, ids

        def fill(value: float) -> Tensor:
            return torch.full((tiles.total,), value, dtype=plan.wide, device=device)

        self.peak, self.total, self.weighted, self.extra = fill(-torch.inf), fill(0.0), fill(0.0), fill(0.0)
        self.picked = torch.zeros(ids.shape, dtype=plan.wide, device=device)
        self.mean_row: Tensor | None = None
        if formed:
            self.mean_row = torch.zeros((tiles.total, tiles.hidden.shape[1]), dtype=plan.wide, device=device)

    def take(self, z: Tensor, chunk: slice, block: slice, rows: Tensor) -> None:
        plan = self.plan
        slope: Tensor | None = None
        if plan.tail.cap is not None:
            z.tanh_()
            if self.mean_row is not None:
                slope = 1.0 - z.square()
            z.mul_(plan.after_tanh)
        inside, local = _local(self.ids[chunk], block)
        self.picked[chunk] = torch.where(inside, z.gather(-1, local), self.picked[chunk])
        before = self.peak[chunk]
        peak = torch.maximum(before, z.amax(dim=-1))
        # A block whose ids are all ruled out leaves the peak at -inf, and inf - inf would be NaN.
        anchor = torch.where(peak == -torch.inf, 0.0, peak)
        z.sub_(anchor[:, None])
        shift = before - anchor
        e = torch.exp(z, out=self.tiles.buffer(1, chunk, block))
        shrink = shift.exp()
        total = self.total[chunk]
        if plan.entropy:
            moved = torch.where(total > 0, self.weighted[chunk] + shift * total, 0.0)
            self.weighted[chunk] = moved * shrink
        self.total[chunk] = total * shrink + e.sum(dim=-1)
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

    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probs [T, K], log of the partition function [T], entropy [T], log-prob of the first id at T2 [T]."""
        plan = self.plan
        log_total = self.total.log()
        over = self.picked - self.peak[:, None]
        entropy = log_total - self.weighted / self.total if plan.entropy else log_total
        extra = log_total
        if plan.extra_temperature is not None:
            extra = over[:, 0] * (plan.temperature / plan.extra_temperature) - self.extra.log()
        if self.mean_row is not None:
            self.mean_row /= self.total[:, None]
        return over - log_total[:, None], self.peak + log_total, entropy.clone(), extra.clone()


def _recompute(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, ids: Tensor, upstream: Tensor, log_z: Tensor, plan: _Plan,
    needs_hidden: bool, needs_weight: bool, needs_bias: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Gradients of sum(upstream log p) by a second walk over the tiles."""
    tiles = _Tiles(hidden, weight, bias, plan, 1 if plan.tail.cap is None else 2)
    together = -upstream.sum(dim=-1, keepdim=True)
    to_hidden = torch.zeros_like(hidden, dtype=plan.wide) if needs_hidden else None
    to_weight = torch.empty_like(weight) if needs_weight else None
    to_bias = torch.zeros_like(bias, dtype=plan.wide) if bias is not None and needs_bias else None
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
                slope = g.tanh_().square().neg_().add_(1.0)
                g = torch.mul(g, plan.after_tanh, out=tiles.buffer(1, chunk, block))
            g.sub_(log_z[chunk, None]).exp_().mul_(together[chunk])
            inside, local = _local(ids[chunk], block)
            g.scatter_add_(-1, local, torch.where(inside, upstream[chunk], 0.0))
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


def _from_mean_row(
    hidden: Tensor, weight: Tensor, ids: Tensor, upstream: Tensor, picked: Tensor, mean_row: Tensor, plan: _Plan
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


def _add_product(to: Tensor, left: Tensor, right: Tensor, alpha: float) -> None:
    """to += alpha left right, the product in the dtype of ``right``."""
    if right.dtype == to.dtype:
        to.addmm_(left, right, alpha=alpha)
    else:
        to.add_(torch.mm(left.to(right.dtype), right), alpha=alpha)
