"""The one surrogate loss, token by token; aggregation is elsewhere.

Not covered: divergences of whole distributions (``divergences``), and sampling from cut distributions (no simple ratio
exists; refused by the config).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class SurrogateTerms:
    """Per-token results, all [T]. ``loss`` carries the gradient; ``advantage`` is detached; ``clipped`` is bool."""

    loss: Tensor
    advantage: Tensor
    clipped: Tensor


def sampler_correction(trainer: Tensor, sampler: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    """c_t = min(pi_old / mu, cap), detached, and where the cap was reached.

    Args:
        trainer: [T] log pi_old, the trainer's log-probs at the start of the step, at the sampling temperature.
        sampler: [T] log mu, recorded by the engine that sampled.
        cap: > 0.

    Returns:
        c [T] and a bool [T].
    """
    ratio = (trainer - sampler).detach().exp()
    return ratio.clamp(max=cap), ratio > cap


def surrogate(
    logprobs: Tensor,
    old: Tensor,
    correction: Tensor,
    reinforce: Tensor,
    distill: Tensor,
    teacher: Tensor,
    *,
    clip: float | None = None,
    dual_clip: float | None = None,
) -> SurrogateTerms:
    """- sg(c_t) * rho_t * A_t with A_t = reinforce + distill * (log pi_T - sg log pi_theta).

    rho_t = pi_theta / pi_old. With ``clip`` the pessimistic PPO bound min(rho A, clamp(rho, 1-clip, 1+clip) A) replaces
    rho A; with ``dual_clip`` it is bounded below by dual_clip * A where A < 0. Clips touch rho only, never c. At
    theta = theta_old and c = 1 the gradient is - sum_t A_t grad log pi_theta(a_t).

    Args:
        logprobs: [T] log pi_theta(a_t), with gradient.
        old: [T] log pi_old(a_t); detached here.
        correction: [T] c_t; detached here.
        reinforce, distill: [T] coefficients (each rollout's pair repeated over its tokens).
        teacher: [T] log pi_T(a_t); read only where distill != 0, so a missing score must come with distill = 0.
        clip: > 0 or None.
        dual_clip: > 1 or None.

    Returns:
        SurrogateTerms, each [T].

    Source: arXiv 2604.10688 Eq. 1-3 and 6; PPO arXiv 1707.06347; dual clip arXiv 1912.09729.
    """
    old, correction = old.detach(), correction.detach()
    current = logprobs.detach()
    # where() rather than a product: an unscored token's teacher value is meaningless and must not reach the sum.
    distillation = torch.where(distill != 0, distill * (teacher - current), torch.zeros_like(current))
    advantage = reinforce + distillation
    ratio = (logprobs - old).exp()
    gain = ratio * advantage
    clipped = torch.zeros_like(advantage, dtype=torch.bool)
    if clip is not None:
        bounded = ratio.clamp(1.0 - clip, 1.0 + clip) * advantage
        clipped = bounded < gain
        gain = torch.minimum(gain, bounded)
    if dual_clip is not None:
        floor = dual_clip * advantage
        low = (advantage < 0) & (gain < floor)
        clipped = clipped | low
        gain = torch.where(low, floor, gain)
    return SurrogateTerms(loss=-correction * gain, advantage=advantage, clipped=clipped.detach())


def reference_kl(logprobs: Tensor, reference: Tensor) -> Tensor:
    """The k3 estimate of KL(pi_theta || pi_ref) at the sampled tokens: exp(d) - d - 1 with d = ref - current.

    Args:
        logprobs: [T] log pi_theta, with gradient.
        reference: [T] log pi_ref.

    Returns:
        [T], >= 0, nats. Source: Schulman (2020), "Approximating KL divergence".
    """
    delta = reference.detach() - logprobs
    return delta.exp() - delta - 1.0
