"""What a micro-batch goes through: the student's forward pass and the surrogate loss of docs/method.md, token by token.

    loss = sum_t - sg(c_t) rho_t A_t  (+ reference KL)        A_t = reinforce + distill (log pi_T - sg log pi_theta)

with rho_t = pi_theta / pi_old and c_t = min(pi_old / mu, C). pi_old is the detached current policy when a step is one
optimiser step, and a recorded pass over all its rollouts before the first otherwise. c compares trainer and sampler at
the temperature that sampled, whatever temperature the objective uses. Unless ``distill`` is "sampled" the distillation
term is + distill sg(c_t) D_t (``distillation``).

It is one module around the student, so that sharded weights are whole from the embeddings to the head while it runs.
Precision: float32 parameters on a GPU run under bfloat16 autocast (float32 masters, float32 log-probs); everything else
runs in the dtype of the parameters. Not covered: backward, sums over ranks (``step``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scope_opd.models.deferred import runnable
from scope_opd.models.head import HeadView, TokenScores, score_hidden
from scope_opd.models.packing import crossover_of, packs_exactly
from scope_opd.objective.surrogate import reference_kl, sampler_correction, surrogate
from scope_opd.train.batch import MicroBatch
from scope_opd.train.distillation import Distillation
from scope_opd.train.engines import LearnerParts, SurrogateSettings
from scope_opd.train.outcome import Pass, TokenFigures

Recorded = tuple[Tensor, Tensor, Tensor, Tensor]
"""log pi_old, c, where it was capped, and log mu - log pi_old of a micro-batch's tokens."""


class Forward(nn.Module):
    """The student and everything that its loss is made of.

    Args:
        engines: model, surrogate settings, optional teacher head and reference.
        packing: whether micro-batches may come packed.

    Attributes:
        packs: whether they may: the model's packed hidden states are those of each sequence alone.
        crossover: see ``packing.deal``.
    """

    def __init__(self, engines: LearnerParts, packing: bool = True) -> None:
        super().__init__()
        self.model = engines.trained
        self.settings: SurrogateSettings = engines.surrogate
        self.reference = engines.reference
        if self.settings.reference_kl > 0 and self.reference is None:
            raise ValueError(f"reference_kl = {self.settings.reference_kl} without a reference; expected its log-probs")
        parameter = next(engines.trained.parameters())
        self.device = parameter.device
        self.autocast = parameter.is_cuda and parameter.dtype == torch.float32
        self.dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        with runnable(engines.trained):
            self.view = HeadView(engines.trained)
            with self._precision(keep=False):
                self.packs = packing and packs_exactly(self.view)
        self.crossover = crossover_of(engines.trained)
        self.distillation: Distillation | None = None
        if self.settings.distill != "sampled":
            self.distillation = Distillation(self.view, self.settings, engines.teacher_head, self.device)

    def forward(self, micro: MicroBatch, tokens: int, recorded: Recorded | None, record: bool) -> tuple[Tensor, ...]:
        """See ``run`` and ``record``. A plain tuple of tensors: that is what a sharded module's hooks look into."""
        settings = self.settings
        if record:
            scores = self._scores(micro)
            return scores.logprobs, *self._correction(micro, scores)
        divergence: Tensor | None = None
        if self.distillation is None:
            scores = self._scores(micro)
        else:
            with self._precision():
                hidden = self._hidden(micro)
                scores, divergence = self.distillation.scores(hidden, micro, self._extra_temperature())
        logprobs = scores.logprobs
        old = logprobs.detach()
        if recorded is None:
            correction, capped, mismatch = self._correction(micro, scores)
        else:
            # A response of the teacher's has no pi_old of ours: rho stays 1 in value however often it is used.
            old = old if settings.sampled_by == "teacher" else recorded[0]
            correction, capped, mismatch = recorded[1:]
        terms = surrogate(
            logprobs, old, correction, micro.reinforce,
            micro.distill if divergence is None else torch.zeros_like(logprobs), micro.teacher,
            clip=settings.clip, dual_clip=settings.dual_clip,
        )  # fmt: skip
        loss = terms.loss
        gap = micro.teacher - logprobs.detach()
        distillation = gap
        if divergence is not None:
            # It is 0 where nothing is distilled, so no 0 * inf can arise from a token that the teacher rules out.
            loss = loss + micro.distill * correction * divergence
            distillation = -divergence.detach()
        penalty = torch.zeros_like(loss)
        if self.reference is not None and settings.reference_kl > 0:
            with torch.no_grad():
                anchor = self.reference(micro.rows, micro.positions).to(logprobs)
            penalty = reference_kl(logprobs, anchor)
            loss = loss + settings.reference_kl / tokens * penalty
        credited = micro.credit_distill != 0
        advantage = micro.credit_reinforce + torch.where(credited, micro.credit_distill * distillation, 0.0)
        assert scores.entropy is not None
        return (
            loss, terms.clipped, penalty.detach(), logprobs.detach(), scores.entropy, advantage, gap, mismatch, capped,
        )  # fmt: skip

    def run(self, micro: MicroBatch, tokens: int, recorded: Recorded | None) -> Pass:
        """The per-token losses of a micro-batch, with gradient; their sum over the whole batch is the step's loss.

        Args:
            micro: on any device.
            tokens: of the whole optimiser step, by which the reference KL is divided.
            recorded: from ``record`` where a step's rollouts get several optimiser steps.
        """
        moved = micro.to(self.device, self.dtype)
        loss, clipped, penalty, *figures = self(moved, tokens, recorded, False)
        rollout, place = micro.rollout.cpu(), micro.place.cpu()
        return Pass(loss, clipped, penalty, TokenFigures(rollout, place, *(tensor.cpu() for tensor in figures)))

    @torch.no_grad()
    def record(self, micro: MicroBatch) -> Recorded:
        """What the policy says before the first of several optimiser steps."""
        logprobs, correction, capped, mismatch = self(micro.to(self.device, self.dtype), 1, None, True)
        return logprobs, correction, capped, mismatch

    def _hidden(self, micro: MicroBatch) -> Tensor:
        """Hidden states that predict the tokens in the loss, [T, H], with gradient."""
        return micro.rows.response_hidden(self.view, micro.positions)

    def _scores(self, micro: MicroBatch) -> TokenScores:
        with self._precision():
            return score_hidden(
                self.view,
                self._hidden(micro),
                micro.rows.tokens(micro.positions),
                self.settings.student_temperature,
                extra_temperature=self._extra_temperature(),
            )

    def _extra_temperature(self) -> float | None:
        """A second temperature of the same hidden states, where c needs one."""
        settings = self.settings
        if settings.sampled_by == "teacher" or settings.student_temperature == settings.sampling_temperature:
            return None
        return settings.sampling_temperature

    def _correction(self, micro: MicroBatch, scores: TokenScores) -> tuple[Tensor, Tensor, Tensor]:
        """c, where it was capped, and log mu - log pi, all [T] and detached."""
        own = scores.logprobs.detach()
        if self.settings.sampled_by == "teacher":
            return torch.ones_like(own), torch.zeros_like(own, dtype=torch.bool), torch.zeros_like(own)
        trainer = own if scores.extra_logprobs is None else scores.extra_logprobs
        correction, capped = sampler_correction(trainer, micro.sampler, self.settings.correction_cap)
        return correction, capped, micro.sampler - trainer

    def _precision(self, keep: bool = True) -> torch.autocast:
        """Args: keep: weights that were cast are kept until its end."""
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast, cache_enabled=keep)

    def _own_dtype(self) -> torch.autocast:
        """Without the student's autocast."""
        return torch.autocast(self.device.type, enabled=False)
