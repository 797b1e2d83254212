"""Group weights from perplexities (paper Eq. 4 and 5), and the effective sample size that says if they do anything."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Direction = Literal["ppl", "uniform", "inverse_ppl"]
Scale = Literal["sum", "mean"]

# Sign of NLL / tau in the softmax: PPL^(1/tau) prefers the unlikely, PPL^(-1/tau) the likely, 0 nobody.
_SIGN: dict[str, float] = {"ppl": 1.0, "uniform": 0.0, "inverse_ppl": -1.0}


def softmax_weights(nll: Tensor, tau: float, direction: Direction, scale: Scale = "sum") -> Tensor:
    """Weights of one path of one group.

    w_i = softmax(sign * NLL_i / tau), that is PPL_i^(sign/tau) normalised; times the number of rollouts if
    ``scale = "mean"``. sign = +1 for "ppl" (Eq. 4, the student path), -1 for "inverse_ppl" (Eq. 5, the teacher path),
    0 for "uniform".

    Args:
        nll: [n] mean negative log-prob a response token, nats; finite. Ignored (but for its length) by "uniform".
        tau: temperature of the weighting, > 0; large tau approaches "uniform".
        direction: which perplexities get the larger weight.
        scale: "sum": weights add to 1; "mean": they average 1.

    Returns:
        [n] float64, positive; empty for an empty path.

    Raises:
        ValueError: tau not > 0, an unknown direction or scale, or an NLL that is not finite (with its row).

    Source: arXiv 2604.10688, Eq. 4-5; ``scale = "mean"`` is the release's.
    """
    if not tau > 0:
        raise ValueError(f"tau = {tau}; expected a number > 0")
    if direction not in _SIGN:
        raise ValueError(f"direction = {direction!r}; expected one of {', '.join(_SIGN)}")
    if scale not in ("sum", "mean"):
        raise ValueError(f"scale = {scale!r}; expected 'sum' or 'mean'")
    count = nll.numel()
    sign = _SIGN[direction]
    if sign == 0.0:
        weights = torch.full((count,), 1.0 / max(count, 1), dtype=torch.float64, device=nll.device)
    else:
        bad = (~torch.isfinite(nll)).nonzero()
        if bad.numel():
            raise ValueError(f"row {int(bad[0])}: NLL = {float(nll[bad[0]])}; expected a finite number")
        score = sign * nll.double()
        # The maximum goes before the division, so that no tau overflows; the clamp keeps a weight that underflows from
        # becoming 0, which elsewhere means "not on this path".
        score = (score - score.max()) / tau if count else score
        weights = torch.softmax(score, dim=0).clamp_min(torch.finfo(torch.float64).tiny)
    return weights * count if scale == "mean" else weights


def effective_sample_size(weights: Tensor) -> float:
    """(sum w)^2 / (n sum w^2): 1 for uniform weights, 1/n when one rollout has it all.

    Args:
        weights: [n] non-negative, n >= 1, not all zero.

    Source: Kish (1965), *Survey Sampling*, divided by n.
    """
    w = weights.double()
    total, squares = float(w.sum()), float((w * w).sum())
    if w.numel() == 0 or squares == 0.0:
        raise ValueError("effective sample size of no weight at all; expected at least one weight > 0")
    return total * total / (w.numel() * squares)
