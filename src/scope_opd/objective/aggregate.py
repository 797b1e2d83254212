"""Aggregation: fold the denominators of the whole optimiser step into each rollout's two numbers.

After this the loss of a step is a plain sum over tokens, so that no split into micro-batches or ranks can change it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from scope_opd.objective.methods import Aggregation

ONE_DENOMINATOR: tuple[Aggregation, ...] = ("prompt", "token", "sequence")
"""Aggregations that divide everything by one number of the step, so that it can be divided by at the end."""


def coefficients(
    reinforce: Tensor, distill: Tensor, lengths: Tensor, masked: Tensor, groups: Tensor, aggregation: Aggregation
) -> tuple[Tensor, Tensor]:
    """Per-rollout coefficients (a_i, b_i) such that step loss = - sum_i sum_t sg(c_t) rho_t (a_i + b_i logratio_t).

    With L = all live (unmasked) rollouts of the step, and |y| tokens that enter the loss:

        prompt    both / number of prompts with a live rollout (Eq. 6)
        token     both / sum_L |y|
        sequence  both / (|L| * |y_i|)
        released  reinforce / sum of |y| over live rollouts with reinforce != 0;  distill / sum_L |y|

    Args:
        reinforce, distill: [N] float64, the method's numbers.
        lengths: [N] int64.
        masked: [N] bool; masked rollouts get 0 and count in no denominator.
        groups: [N] int64, the prompt each rollout belongs to.
        aggregation: one of the four above.

    Returns:
        Two [N] float64 tensors; all zero if nothing is live.
    """
    live = ~masked
    tokens = lengths.double() * live
    total = tokens.sum()
    prompts = torch.tensor(float(groups[live].unique().numel()), dtype=torch.float64)
    per_rollout = live.sum() * lengths.double()
    denominators: dict[str, tuple[Tensor, Tensor]] = {
        "prompt": (prompts, prompts),
        "token": (total, total),
        "sequence": (per_rollout, per_rollout),
        "released": ((tokens * (reinforce != 0)).sum(), total),
    }
    if aggregation not in denominators:
        raise ValueError(f"aggregation = {aggregation!r}; expected one of {', '.join(denominators)}")

    def divide(numbers: Tensor, by: Tensor) -> Tensor:
        by = by.expand_as(numbers)
        return torch.where(live & (by > 0), numbers.double() / by.clamp_min(1.0), 0.0)

    by_reinforce, by_distill = denominators[aggregation]
    return divide(reinforce, by_reinforce), divide(distill, by_distill)


def undivided(
    reinforce: Tensor, distill: Tensor, lengths: Tensor, masked: Tensor, aggregation: Aggregation
) -> tuple[Tensor, Tensor]:
    """``coefficients`` times ``denominator``: known from a part of the step's rollouts alone.

    Args:
        reinforce, distill, lengths, masked: of any rollouts of the step, as for ``coefficients``.
        aggregation: one of ``ONE_DENOMINATOR``.
    """
    if aggregation not in ONE_DENOMINATOR:
        raise ValueError(f"aggregation = {aggregation!r}; expected one of {', '.join(ONE_DENOMINATOR)}")
    by = lengths.double() if aggregation == "sequence" else torch.ones_like(reinforce, dtype=torch.float64)
    kept = ~masked & (by > 0)
    return tuple(torch.where(kept, part.double() / by.clamp_min(1.0), 0.0) for part in (reinforce, distill))  # type: ignore[return-value]


def denominator(lengths: Tensor, masked: Tensor, groups: Tensor, aggregation: Aggregation) -> float:
    """What the ``undivided`` numbers of a whole step are divided by; 1 if nothing is live.

    Args:
        lengths, masked, groups: of all rollouts of the step, as for ``coefficients``.
        aggregation: one of ``ONE_DENOMINATOR``.
    """
    live = ~masked
    numbers = {"prompt": groups[live].unique().numel(), "token": lengths[live].sum(), "sequence": live.sum()}
    return max(1.0, float(numbers[aggregation]))
