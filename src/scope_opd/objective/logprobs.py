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


def token_logprobs(logits: Tensor, ids: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature) at the given ids.

    Args:
        logits: [T, V].
        ids: [T] int64, in 0..V-1.
        temperature: > 0.

    Returns:
        [T], float32 (float64 for float64 logits), <= 0.
    """
    log_p = torch.log_softmax(tempered(logits, temperature), dim=-1)
    return log_p.gather(-1, ids.unsqueeze(-1)).squeeze(-1)


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy in nats of softmax(logits / temperature), a number a row: [T, V] -> [T]."""
    log_p = torch.log_softmax(tempered(logits, temperature), dim=-1)
    # 0 * -inf is NaN in floating point but 0 in the limit: an id that cannot be drawn carries no entropy.
    return -torch.special.xlogy(log_p.exp(), log_p.exp()).sum(dim=-1)
