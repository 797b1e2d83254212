"""What an update did: figures a token, those of a micro-batch, and what parts that went before left. No arithmetic."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenFigures:
    """What the first pass over a batch saw, one entry a token in the loss; on the CPU, [T].

    Attributes:
        rollout, place: the token's rollout (index within the step) and its index within the response.
        logprobs: log pi_theta at the objective's student temperature.
        entropy: nats, at that temperature.
        advantage: A_t with the method's own numbers; unless ``distill`` is "sampled", reinforce - distill D_t.
        teacher_gap: log pi_T - log pi_theta; means something only where the teacher scored.
        mismatch: log mu - log pi_old at the sampling temperature (0 for responses that the teacher sampled).
        capped: where c reached its cap.
    """

    rollout: Tensor
    place: Tensor
    logprobs: Tensor
    entropy: Tensor
    advantage: Tensor
    teacher_gap: Tensor
    mismatch: Tensor
    capped: Tensor


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an update did.

    Attributes:
        loss, grad_norm: means over the passes; None where not finite.
        updates: optimiser steps taken, 0 when nothing was unmasked or a number was not finite.
        finite: whether all losses and gradients were finite.
        broken: the rollout (index within the step) of the first token whose loss is not finite; None where every loss
            is, whatever the gradient.
        clipped: share of the tokens, over all passes, where a PPO clip acted.
        kl_reference: mean k3 estimate a token; None without a reference.
        tokens: per-token figures.
    """

    loss: float | None
    grad_norm: float | None
    updates: int
    finite: bool
    broken: int | None
    clipped: float
    kl_reference: float | None
    tokens: TokenFigures


@dataclass(slots=True)
class Pass:
    """Per-token results of one micro-batch."""

    loss: Tensor
    clipped: Tensor
    reference: Tensor
    figures: TokenFigures


@dataclass(slots=True)
class Begun:
    """Micro-batches of a step, of all ranks, whose undivided gradient is in the parameters already.

    Attributes:
        owners: each one's rollout a token (``MicroBatch.rollout``).
        cells, padded: tokens with and without padding.
    """

    owners: list[Tensor] = field(default_factory=list)
    cells: int = 0
    padded: int = 0


def first_broken(owners: list[Tensor], losses: list[Tensor]) -> int | None:
    """The rollout of the first token whose loss is not finite."""
    for owner, loss in zip(owners, losses, strict=True):
        places = loss.isfinite().logical_not().nonzero()
        if places.numel():
            return int(owner[int(places[0])])
    return None


def join_figures(figures: list[TokenFigures]) -> TokenFigures:
    if not figures:
        whole, real, flag = torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(0, dtype=torch.bool)
        return TokenFigures(whole, whole, real, real, real, real, real, flag)
    return TokenFigures(*(torch.cat([getattr(item, name) for item in figures]) for name in TokenFigures.__slots__))
