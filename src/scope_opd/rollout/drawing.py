"""One token a row from logits and a uniform: cuts, then the inverse of the CDF. Not covered: the uniforms."""

from __future__ import annotations

import torch
from torch import Tensor

from scope_opd.types import SamplingParams

# Ids whose mass is summed together where a distribution is long.
_MASS_BLOCK = 1024


def draw(logits: Tensor, uniform: Tensor, params: SamplingParams, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One token a row, and its log-prob under the distribution that it was drawn from.

    The repetition penalty divides positive and multiplies negative logits of seen tokens; then logits are divided by
    the temperature; then top-k keeps the k highest and top-p the highest whose predecessors hold less than top_p of
    the mass (equal logits at a cut stay together). The token is the first whose cumulative probability, in float64,
    exceeds uniform x total.

    Args:
        logits: F[R, V].
        uniform: F64[R], strictly between 0 and 1.
        params: temperature and cuts.
        seen: bool[R, V], tokens of the prompt and the response so far; needed with a repetition penalty.

    Returns:
        I64[R] tokens, F[R] log-probs (float32; float64 for float64 logits).
    """
    scores = logits if logits.dtype == torch.float64 else logits.float()
    if params.repetition_penalty != 1.0 and seen is not None:
        penalty = params.repetition_penalty
        scores = torch.where(seen, torch.where(scores < 0, scores * penalty, scores / penalty), scores)
    if params.temperature != 1.0:
        scores = scores / params.temperature
    vocabulary = scores.shape[-1]
    count = params.top_k if 0 < params.top_k < vocabulary else vocabulary
    if count < vocabulary or params.top_p < 1:
        best = scores.topk(count).values
        if params.top_p < 1:
            mass = best.softmax(-1, dtype=torch.float64)
            kept = (mass.cumsum(-1) - mass < params.top_p).sum(-1, keepdim=True)
            lowest = best.gather(-1, kept.clamp_min(1) - 1)
        else:
            lowest = best[:, -1:]
        scores = scores.masked_fill(scores < lowest, -torch.inf)
    logprobs = scores.log_softmax(-1)
    token = invert(logprobs.exp(), uniform[:, None])
    return token[:, 0], logprobs.gather(-1, token)[:, 0]


def invert(mass: Tensor, uniform: Tensor) -> Tensor:
    """The first id of each row whose cumulative mass, summed in float64, exceeds uniform x total: I64[R, 1].

    A long row is summed by blocks, and only the block that holds the answer id by id: half the work of a running sum.

    Args:
        mass: F[R, V], >= 0.
        uniform: F64[R, 1], strictly between 0 and 1.
    """
    vocabulary = mass.shape[-1]
    if vocabulary <= 4 * _MASS_BLOCK:
        cumulative = mass.cumsum(-1, dtype=torch.float64)
        # Only NaN can run past the last id; the clamp keeps it valid until the NaN is reported.
        return torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True).clamp_max(vocabulary - 1)
    whole = vocabulary // _MASS_BLOCK * _MASS_BLOCK
    blocks = mass[:, :whole].unflatten(-1, (-1, _MASS_BLOCK)).sum(-1, dtype=torch.float64)
    blocks = torch.cat((blocks, mass[:, whole:].sum(-1, keepdim=True, dtype=torch.float64)), dim=-1)
    before = blocks.cumsum(-1)
    target = uniform * before[:, -1:]
    block = torch.searchsorted(before, target, right=True).clamp_max(blocks.shape[-1] - 1)
    ids = block * _MASS_BLOCK + torch.arange(_MASS_BLOCK, device=mass.device)
    inside = torch.where(ids < vocabulary, mass.gather(-1, ids.clamp_max(vocabulary - 1)), 0.0)
    inside = inside.cumsum(-1, dtype=torch.float64)
    # The two sums of a block differ by rounding: what is left must stay below the block's own, whose last rise then
    # is an id with mass.
    left = target - before.gather(-1, block) + blocks.gather(-1, block)
    left = torch.minimum(left, torch.nextafter(inside[:, -1:], torch.zeros_like(left)))
    return ids.gather(-1, torch.searchsorted(inside, left, right=True).clamp_max(_MASS_BLOCK - 1)).clamp_max(
        vocabulary - 1
    )
