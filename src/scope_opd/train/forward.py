"""What a micro-batch goes through: the student's forward pass and the surrogate loss of docs/method.md, token by token.

    loss = sum_t - sg(c_t) rho_t A_t  (+ reference KL)        A_t = reinforce + distill (log pi_T - sg log pi_theta)

with rho_t = pi_theta / pi_old and c_t = min(pi_old / mu, C). pi_old is the detached current policy when a step is one
optimiser step, and a recorded pass over all its rollouts before the first otherwise. c compares trainer and sampler at
the temperature that sampled, whatever temperature the objective uses. Under ``full_kl`` the distillation term is
+ distill sg(c_t) KL_t.

It is one module around the student, so that sharded weights are whole from the embeddings to the head while it runs.
Precision: float32 parameters on a GPU run under bfloat16 autocast (float32 masters, float32 log-probs); everything else
runs in the dtype of the parameters. Not covered: backward, sums over ranks (``step``).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from scope_opd.models.head import HeadView, TokenScores, map_logits, score_hidden
from scope_opd.models.packing import crossover_of, packs_exactly
from scope_opd.objective.logprobs import tempered
from scope_opd.objective.surrogate import full_kl, reference_kl, sampler_correction, surrogate
from scope_opd.train.batch import MicroBatch
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
        self.teacher_head = engines.teacher_head
        self.reference = engines.reference
        if self.settings.distill == "full_kl" and self.teacher_head is None:
            raise ValueError("distill = 'full_kl' without teacher_head; expected an in-process teacher")
        if self.settings.reference_kl > 0 and self.reference is None:
            raise ValueError(f"reference_kl = {self.settings.reference_kl} without a reference; expected its log-probs")
        self.view = HeadView(engines.trained)
        parameter = next(engines.trained.parameters())
        self.device = parameter.device
        self.autocast = parameter.is_cuda and parameter.dtype == torch.float32
        self.dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        with self._precision():
            self.packs = packing and packs_exactly(self.view)
        self.crossover = crossover_of(engines.trained)
        # Sorted and each once: as many ids as the heads are wide are then all of them.
        ids = self.settings.common_vocabulary
        self._common = None if ids is None else torch.tensor(sorted(set(ids)), dtype=torch.long, device=self.device)

    def forward(self, micro: MicroBatch, tokens: int, recorded: Recorded | None, record: bool) -> tuple[Tensor, ...]:
        """See ``run`` and ``record``. A plain tuple of tensors: that is what a sharded module's hooks look into."""
        settings = self.settings
        if record:
            scores = self._scores(micro)
            return scores.logprobs, *self._correction(micro, scores)
        kl: Tensor | None = None
        if settings.distill == "full_kl":
            scores, kl = self._scores_and_kl(micro)
        else:
            scores = self._scores(micro)
        logprobs = scores.logprobs
        old = logprobs.detach()
        if recorded is None:
            correction, capped, mismatch = self._correction(micro, scores)
        else:
            # A response of the teacher's has no pi_old of ours: rho stays 1 in value however often it is used.
            old = old if settings.sampled_by == "teacher" else recorded[0]
            correction, capped, mismatch = recorded[1:]
        terms = surrogate(
            logprobs, old, correction, micro.reinforce, micro.distill if kl is None else torch.zeros_like(logprobs),
            micro.teacher, clip=settings.clip, dual_clip=settings.dual_clip,
        )  # fmt: skip
        loss = terms.loss
        gap = micro.teacher - logprobs.detach()
        distillation = gap
        if kl is not None:
            # kl is 0 where nothing is distilled, so no 0 * inf can arise from a token that the teacher rules out.
            loss = loss + micro.distill * correction * kl
            distillation = -kl.detach()
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
            return self._score(micro, self._hidden(micro))

    def _score(self, micro: MicroBatch, hidden: Tensor) -> TokenScores:
        return score_hidden(
            self.view,
            hidden,
            micro.rows.tokens(micro.positions),
            self.settings.student_temperature,
            extra_temperature=self._extra_temperature(),
        )

    def _scores_and_kl(self, micro: MicroBatch) -> tuple[TokenScores, Tensor]:
        """As ``_scores``, and KL(student || teacher) over the common ids, [T], with gradient.

        The KL is computed where the method distils and is 0 elsewhere; the teacher reads only the rows that need it.
        """
        settings, teacher = self.settings, self.teacher_head
        assert teacher is not None

        def divergence(logits: Tensor, theirs: Tensor) -> tuple[Tensor]:
            own = tempered(logits, settings.student_temperature)
            with torch.no_grad(), self._own_dtype():
                other = teacher.project(theirs).to(own.dtype)
            return (full_kl(*self._over_common_ids(own, other)),)

        with self._precision():
            hidden = self._hidden(micro)
            scores = self._score(micro, hidden)
            kl = torch.zeros_like(scores.logprobs)
            places = (micro.distill != 0).nonzero().squeeze(-1)
            if places.numel():
                (found,) = map_logits(self.view, hidden[places], divergence, self._teacher_hidden(micro, places))
                kl = kl.index_put((places,), found)
        return scores, kl

    def _teacher_hidden(self, micro: MicroBatch, places: Tensor) -> Tensor:
        """The teacher's hidden states at the tokens ``places`` of a micro-batch, [len(places), H]."""
        assert self.teacher_head is not None
        rows, positions = micro.rows.touched(micro.positions[places])
        with torch.no_grad(), self._own_dtype():
            return self.teacher_head.response_hidden(rows, positions)

    def _over_common_ids(self, own: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
        """Both logits at the ids that mean the same to both and that both heads have."""
        width = min(own.shape[-1], other.shape[-1])
        own, other = own[:, :width], other[:, :width]
        if self._common is None:
            return own, other
        ids = self._common[self._common < width]
        if not ids.numel():
            raise ValueError(f"common_vocabulary has no id below {width}; expected ids that both heads have")
        return (own, other) if ids.numel() == width else (own[:, ids], other[:, ids])

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

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self.autocast)

    def _own_dtype(self) -> torch.autocast:
        """Without the student's autocast."""
        return torch.autocast(self.device.type, enabled=False)
