"""One optimiser step: the surrogate loss of METHOD.md section 5 over micro-batches of any cut. (Skeleton.)"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class SurrogateSettings:
    """What the update needs to know of the objective; whoever builds the engines takes it from config and method.

    Attributes:
        aggregation: "prompt" | "token" | "sequence" | "released", see ``objective.aggregate``.
        clip: PPO clip of rho (None: none).
        dual_clip: bound of the surrogate where the advantage is negative (None: none).
        correction_cap: C of c = min(pi_old / mu, C).
        sampling_temperature: the temperature that sampled; c compares the trainer with the sampler there.
        student_temperature: the temperature of the student's log-probs in the objective: equal to the sampling
            temperature for the conventions ``matched`` and ``released``, 1 for ``raw``.
        sampled_by: "student", or "teacher" (kd): then c = 1 and rho = 1 in value.
        distill: "sampled", or "full_kl" (needs ``Engines.teacher_logits``).
        reference_kl: coefficient of the k3 estimate of KL(student || reference) (needs ``Engines.reference``).
        common_vocabulary: ids 0 .. common_vocabulary - 1 are those that student and teacher share (full_kl
            renormalises over them); None: the smaller of the two heads.
    """

    aggregation: Literal["prompt", "token", "sequence", "released"] = "prompt"
    clip: float | None = None
    dual_clip: float | None = None
    correction_cap: float = 2.0
    sampling_temperature: float = 1.0
    student_temperature: float = 1.0
    sampled_by: Literal["student", "teacher"] = "student"
    distill: Literal["sampled", "full_kl"] = "sampled"
    reference_kl: float = 0.0
    common_vocabulary: int | None = None
