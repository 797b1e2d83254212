"""Log-probs and entropy straight from hidden states and a head's matrix; full logits never exist.

With logits y = scale (h W^T + b), soft-capped to cap tanh(y / cap) where there is a cap, and z = y / temperature:

    log p(a) = z_a - m - log sum_v exp(z_v - m),   m = max_v z_v
    H        = log sum_v exp(z_v - m) - sum_v p_v (z_v - m)
    d log p(a) / d z_v = [v = a] - p_v
    d log p(rest) / d z_v = [v in rest] p_v / p(rest) - p_v,   p(rest) = sum of p over all ids but the K asked for

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
from torch.autograd.function import once_differentiable

from scope_opd.objective.tiles import Gradient, Online, Plan, Tail, Tiles, from_mean_row, recompute

__all__ = ["ChunkedScores", "Tail", "chunked_logprobs", "chunked_topk"]

# Tokens and vocabulary rows of a tile: 32 MiB a buffer in float32 (see benchmarks/logprobs.py for the choice).
TILE_TOKENS = 1024
TILE_VOCABULARY = 8192


@dataclass(frozen=True, slots=True)
class ChunkedScores:
    """T tokens, K ids a token; float32 (float64 where the head computes in float64).

    Attributes:
        logprobs: F[T], log p of each target; carries the gradient.
        id_logprobs: F[T, K], log p at the ids asked for; carries the gradient. None when not asked for.
        rest_logprobs: F[T], log of the mass of all ids but those K and the excluded; carries the gradient. None when
            not asked for.
        entropy: F[T], nats; no gradient. None when not asked for.
        extra_logprobs: F[T], log p of each target at the second temperature; no gradient. None when not asked for.
    """

    logprobs: Tensor
    id_logprobs: Tensor | None
    rest_logprobs: Tensor | None
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
    rest: bool = False,
    excluded: Tensor | None = None,
    extra_temperature: float | None = None,
    entropy: bool = True,
    tile_tokens: int | None = None,
    tile_vocabulary: int | None = None,
    dry: bool = False,
) -> ChunkedScores:
    """Scores of given tokens under softmax(tail(hidden weight^T + bias) / temperature).

    The products are computed in the autocast dtype of the device where autocast is on, else in the dtype of
    ``weight``; everything after them, and every sum over tiles, in float32 (float64 for float64). The result depends on
    the tiles by rounding only.

    Args:
        hidden: F[T, H].
        weight: F[V, H]; a tied embedding will do.
        targets: I[T], in 0..V-1.
        temperature: > 0.
        bias: F[V] or None. An entry of -inf rules an id out.
        tail: scale and soft-cap of the head.
        ids: I[T, K], further ids whose log-probs are wanted; may repeat the target. -1 is none: log-prob -inf.
        rest: whether the log-mass of all other ids is wanted too; the K ids of a token must then be distinct. Summed up
            directly, so that it is as exact where it is 1e-20 as where it is 0.5.
        excluded: I[X], ascending, ids that the rest leaves out (they are still part of the whole); none of ``ids``.
        extra_temperature: > 0, a second temperature for the targets.
        entropy: False leaves the entropy out, and one pass over every tile with it.
        tile_tokens, tile_vocabulary: sides of a tile, >= 1; None: ``TILE_TOKENS``, ``TILE_VOCABULARY``.
        dry: tensors have no data, and only what is allocated matters: targets and ids are not checked, and of a row of
            like tiles three are walked.

    Returns:
        ``ChunkedScores``; exact gradients for hidden, weight and bias, whatever is done with the log-probs.

    Raises:
        ValueError: a temperature or a side of a tile out of range, or a target or id that the head has no row for
            (CPU; on a GPU the check would wait for the device).
    """
    wanted = torch.cat((targets.unsqueeze(-1), targets.new_empty(len(targets), 0) if ids is None else ids), dim=-1)
    if not dry and wanted.device.type == "cpu" and wanted.numel():
        outside = ((wanted < -1) | (wanted >= weight.shape[0]) | (wanted[:, :1] < 0)).any(dim=-1).nonzero()
        if outside.numel():
            row = int(outside[0])
            raise ValueError(f"row {row} asks for ids {wanted[row].tolist()}; expected 0..{weight.shape[0] - 1}")
    shared = weight.requires_grad or (bias is not None and bias.requires_grad)
    formed = torch.is_grad_enabled() and hidden.requires_grad and not shared and not rest
    plan = _plan(
        hidden, weight, temperature, extra_temperature, entropy, rest, formed, tail, tile_tokens, tile_vocabulary, dry
    )
    logprobs, id_logprobs, others, surprise, extra = _Chunked.apply(hidden, weight, bias, wanted, excluded, plan)
    return ChunkedScores(
        logprobs=logprobs,
        id_logprobs=None if ids is None else id_logprobs,
        rest_logprobs=others if rest else None,
        entropy=surprise if entropy else None,
        extra_logprobs=extra if extra_temperature is not None else None,
    )


def _plan(
    hidden: Tensor, weight: Tensor, temperature: float, extra_temperature: float | None, entropy: bool,
    rest: bool, formed: bool, tail: Tail | None, tile_tokens: int | None, tile_vocabulary: int | None,
    dry: bool = False,
) -> Plan:  # fmt: skip
    for name, value in (("temperature", temperature), ("extra_temperature", extra_temperature)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} = {value}; expected a number > 0")
    tokens = TILE_TOKENS if tile_tokens is None else tile_tokens
    vocabulary = TILE_VOCABULARY if tile_vocabulary is None else tile_vocabulary
    if tokens < 1 or vocabulary < 1:
        raise ValueError(f"tiles of {tokens} tokens x {vocabulary} ids; expected at least 1 x 1")
    device = hidden.device.type
    compute = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    wide = torch.float64 if compute == torch.float64 else torch.float32
    return Plan(
        tail or Tail(), temperature, extra_temperature, entropy, rest, formed, tokens, vocabulary, compute, wide, dry
    )


class _Chunked(torch.autograd.Function):
    """(hidden, weight, bias, ids [T, 1 + K], excluded, plan) -> log p of the first id [T], of the others [T, K], of all
    ids but those others and the excluded [T], entropy [T], log p of the first id at the second temperature [T]."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        excluded: Tensor | None,
        plan: Plan,
    ) -> tuple[Tensor, ...]:
        with torch.autocast(hidden.device.type, enabled=False):
            tiles = Tiles(hidden, weight, bias, plan, 2, excluded)
            state = Online(tiles, ids, plan.formed)
            for block in tiles.blocks():
                rows, added = tiles.block(block)
                for chunk in tiles.chunks():
                    state.take(tiles.product(chunk, block, rows, added), chunk, block, rows)
            found, log_z, rest, entropy, extra = state.results()
        ctx.plan = plan
        ctx.save_for_backward(hidden, weight, bias, ids, excluded, log_z, state.mean_row, found, rest)
        ctx.mark_non_differentiable(entropy, extra)
        # Copies, for a view of an output may not be handed out by a module that FSDP gathers.
        return found[:, 0].clone(), found[:, 1:].clone(), rest.clone(), entropy, extra

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, first: Tensor, others: Tensor, rest: Tensor, *unused: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, ids, excluded, log_z, mean_row, found, log_rest = ctx.saved_tensors
        plan: Plan = ctx.plan
        upstream = torch.cat((first.unsqueeze(-1), others), dim=-1).to(plan.wide).masked_fill_(ids < 0, 0.0)
        with torch.autocast(hidden.device.type, enabled=False):
            if plan.formed:
                picked = (found + log_z[:, None]).masked_fill_(ids < 0, 0.0)
                return from_mean_row(hidden, weight, ids, upstream, picked, mean_row, plan), *[None] * 5
            to_rest = (rest.to(plan.wide), log_rest) if plan.rest else None
            gradient = Gradient(upstream, found, to_rest, log_z, ids, plan)
            grads = recompute(hidden, weight, bias, gradient, plan, ctx.needs_input_grad[:3], excluded)
            return *grads, None, None, None


@torch.no_grad()
def chunked_topk(
    hidden: Tensor,
    weight: Tensor,
    k: int,
    temperature: float = 1.0,
    *,
    bias: Tensor | None = None,
    tail: Tail | None = None,
    excluded: Tensor | None = None,
    tile_tokens: int | None = None,
    tile_vocabulary: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The k likeliest ids of every token, their log-probs and that of all others, tile by tile, without gradient.

    Args:
        hidden, weight, temperature, bias, tail, tile_tokens, tile_vocabulary: as for ``chunked_logprobs``.
        k: 1..V.
        excluded: I[X], ascending, ids that do not take part: the softmax is over all others.

    Returns:
        ids I64[T, k], likeliest first, log-probs F[T, k] and the log-mass of the rest F[T], summed up directly; in
        float32 (float64 where the head computes in float64). Where fewer than k ids have mass, id -1 and -inf.

    Raises:
        ValueError: k, a temperature or a side of a tile out of range.
    """
    if not 1 <= k <= weight.shape[0]:
        raise ValueError(f"k = {k}; expected 1..{weight.shape[0]}")
    plan = _plan(hidden, weight, temperature, None, False, True, False, tail, tile_tokens, tile_vocabulary)
    with torch.autocast(hidden.device.type, enabled=False):
        tiles = Tiles(hidden, weight, bias, plan, 2, excluded)
        # Of each tile the state is told the k likeliest, so that its rest is the mass of the others.
        none = torch.full((tiles.total, 1 + k), -1, dtype=torch.long, device=hidden.device)
        state = Online(tiles, none, formed=False)
        best = torch.full((tiles.total, k), -torch.inf, dtype=plan.wide, device=hidden.device)
        ids = none[:, 1:].clone()
        for block in tiles.blocks():
            rows, added = tiles.block(block)
            columns = tiles.excluded(block)
            for chunk in tiles.chunks():
                z = tiles.product(chunk, block, rows, added)
                if plan.tail.cap is not None:
                    z.tanh_().mul_(plan.after_tanh)
                if columns is not None:
                    z[:, columns] = -torch.inf
                values, places = z.topk(min(k, z.shape[1]), dim=-1)
                places += block.start
                state.ids[chunk, 1 : 1 + places.shape[1]] = places
                state.ids[chunk, 1 + places.shape[1] :] = -1
                joined, order = torch.cat((best[chunk], values), dim=-1).sort(dim=-1, descending=True)
                ids[chunk] = torch.cat((ids[chunk], places), dim=-1).gather(-1, order[:, :k])
                best[chunk] = joined[:, :k]
                state.reduce(z, chunk, block, rows, None)
                pushed_out = joined[:, k:]
                pushed_out = torch.where(pushed_out > -torch.inf, pushed_out - state.peak[chunk, None], -torch.inf)
                state.outside[chunk] += pushed_out.exp_().sum(dim=-1)
        log_total = state.total.log()
        logprobs = best - state.peak[:, None] - log_total[:, None]
        rest = state.outside.clamp(min=torch.finfo(plan.wide).tiny).log() - log_total
        return ids.masked_fill_(best == -torch.inf, -1), logprobs, rest
