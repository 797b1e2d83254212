"""Log-probs and entropy of given tokens from logits. Not covered: heads (see ``models.head``) and chunking."""

from __future__ import annotations

import torch
from torch import Tensor


def tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits of the distribution sampled at ``temperature``, in at least float32.

    Args:
        logits: [..., V], any float dtype.
        temperature: > 0; the policy in training is softmax(logits / temperature).
    """
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}; expected a number > 0")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide if temperature == 1.0 else wide / temperature


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0, *, log_z: Tensor | None = None) -> Tensor:
    """log softmax(logits / temperature) at the given ids, without a second tensor of the logits' size.

    Args:
        logits: [T, V].
        ids: [T] int64, in 0..V-1.
        temperature: > 0.
        log_z: [T], logsumexp of the tempered logits where it is known already.

    Returns:
        [T], float32 (float64 for float64 logits), <= 0.
    """
    scaled = tempered(logits, temperature)
    chosen = scaled.gather(-1, ids.unsqueeze(-1)).squeeze(-1)
    return chosen - (scaled.logsumexp(-1) if log_z is None else log_z)


def token_entropy(logits: Tensor, temperature: float = 1.0, *, log_z: Tensor | None = None) -> Tensor:
    """Entropy in nats of softmax(logits / temperature), a number a row: [T, V] -> [T]. ``log_z`` as above."""
    scaled = tempered(logits, temperature)
    log_p = scaled - (scaled.logsumexp(-1) if log_z is None else log_z).unsqueeze(-1)
    # 0 * -inf is NaN in floating point but 0 in the limit: an id that cannot be drawn carries no entropy.
    return -torch.where(log_p == -torch.inf, 0.0, log_p.exp() * log_p).sum(dim=-1)
