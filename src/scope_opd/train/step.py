"""One step's update: the surrogate loss of docs/method.md over the micro-batches, then the optimiser.

    loss = sum_t - sg(c_t) rho_t A_t  (+ reference KL)        A_t = reinforce + distill (log pi_T - sg log pi_theta)

with rho_t = pi_theta / pi_old and c_t = min(pi_old / mu, C). pi_old is the detached current policy when a batch gets
one update, and a recorded pass before the first update otherwise. c compares trainer and sampler at the temperature
that sampled, whatever temperature the objective uses. Under ``full_kl`` the distillation term is
+ distill sg(c_t) KL_t.

Precision: float32 parameters on a GPU run under bfloat16 autocast (float32 masters, float32 log-probs); everything else
runs in the dtype of the parameters. Not covered: many ranks, chunked teachers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from scope_opd.config import TrainConfig
from scope_opd.models.head import HeadView, TokenScores, map_logits, response_logprobs, score_hidden
from scope_opd.objective.logprobs import tempered
from scope_opd.objective.surrogate import full_kl, reference_kl, sampler_correction, surrogate
from scope_opd.train.batch import Batch, MicroBatch
from scope_opd.train.engines import Engines, SurrogateSettings
from scope_opd.train.optim import Optimizer
from scope_opd.train.outcome import Begun, Outcome, Pass, TokenFigures, first_broken, join_figures


class Learner:
    """The student's weights, their optimiser, and the one way in which they change.

    Args:
        engines: model, surrogate settings, optional teacher head and reference.
        config: optimiser, updates a batch, clipping, precision.
    """

    def __init__(self, engines: Engines, config: TrainConfig) -> None:
        self.model: nn.Module = engines.model
        self.settings: SurrogateSettings = engines.surrogate
        self.config = config
        self.teacher_head = engines.teacher_head
        self.reference = engines.reference
        if self.settings.distill == "full_kl" and self.teacher_head is None:
            raise ValueError("distill = 'full_kl' without teacher_head; expected an in-process teacher")
        if self.settings.reference_kl > 0 and self.reference is None:
            raise ValueError(f"reference_kl = {self.settings.reference_kl} without a reference; expected its log-probs")
        self.view = HeadView(engines.model)
        self.optimizer = Optimizer(engines.model, config)
        parameter = self.optimizer.parameters[0]
        self.device = parameter.device
        self._autocast = parameter.is_cuda and parameter.dtype == torch.float32
        self._dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        # Sorted and each once: as many ids as the heads are wide are then all of them.
        ids = self.settings.common_vocabulary
        self._common = None if ids is None else torch.tensor(sorted(set(ids)), dtype=torch.long, device=self.device)
        if config.gradient_checkpointing:
            model = engines.model
            # The method's name changed within the versions of transformers that are supported.
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})

    def begin(self, micro: Sequence[MicroBatch], begun: Begun | None = None) -> Begun:
        """Forward and backward over a part of a step, whose numbers are not divided by the step's denominator.

        Args:
            micro: from ``make_part``.
            begun: what this step's earlier parts left; None for the first. It is added to.
        """
        if begun is None:
            self.optimizer.zero_grad()
            begun = Begun()
        for part in micro:
            begun.passes.append(self._backward(part.to(self.device, self._dtype), 1, None))
            begun.owners.append(part.rollout)
            begun.cells += part.input_ids.numel()
            begun.padded += part.input_ids.numel() - int(part.attention_mask.sum())
        return begun

    def update(
        self,
        batch: Batch,
        lr: float,
        *,
        begun: Begun | None = None,
        on_phase: Callable[[str], None] = lambda phase: None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
        before_change: Callable[[], None] = lambda: None,
    ) -> Outcome:
        """Forward and backward over all micro-batches and one optimiser step, ``updates_per_batch`` times.

        Args:
            batch: from ``make_batch``. With nothing unmasked no optimiser step is taken.
            lr: the learning rate of this step.
            begun: parts of the step that went before; ``batch.micro`` is the rest, ``batch.divide_by`` set, and one
                update taken.
            on_phase: told "forward_backward" and "optimiser".
            on_progress: told (micro-batches done, in all) of a pass.
            before_change: called once, right before the weights change for the first time.
        """
        assert begun is None or (self.config.updates_per_batch == 1 and batch.divide_by is not None)
        passes = self.config.updates_per_batch if batch.tokens else 0
        recorded = self._record(batch) if passes > 1 else [None] * len(batch.micro)
        tokens = batch.tokens if batch.divide_by is None else 1
        losses, norms, figures, references, clipped = [], [], [], [], []
        updates, finite, broken = 0, True, None
        for number in range(passes):
            on_phase("forward_backward")
            if begun is None:
                self.optimizer.zero_grad()
            results, owners = (list(begun.passes), list(begun.owners)) if begun else ([], [])
            for index, micro in enumerate(batch.micro):
                results.append(self._backward(micro.to(self.device, self._dtype), tokens, recorded[index]))
                owners.append(micro.rollout)
                on_progress(index + 1, len(batch.micro))
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for result in results:
                total += result.loss.sum().double()
                clipped.append(result.clipped)
                if number == 0:
                    figures.append(result.figures)
                    references.append(result.reference)
            if batch.divide_by is not None:
                total /= batch.divide_by
                self._divide_gradient(batch.divide_by)
            norm = self._clip_gradient()
            losses.append(float(total))
            norms.append(float(norm))
            finite = math.isfinite(losses[-1]) and math.isfinite(norms[-1])
            if not finite:
                broken = first_broken(owners, [result.loss for result in results])
                break
            if number == 0:
                before_change()
            on_phase("optimiser")
            self.optimizer.step(lr)
            updates += 1
        self.optimizer.zero_grad()
        return Outcome(
            loss=_mean(losses) if losses else 0.0,
            grad_norm=_mean(norms) if norms else 0.0,
            updates=updates,
            finite=finite,
            broken=broken,
            clipped=float(torch.cat(clipped).double().mean()) if clipped else 0.0,
            kl_reference=float(torch.cat(references).mean()) if self.reference and references else None,
            tokens=join_figures(figures),
        )

    def gradient(self, batch: Batch) -> tuple[float, list[Tensor]]:
        """Loss and gradient of a batch without clipping or an optimiser step, for laws and studies."""
        self.optimizer.zero_grad()
        loss = 0.0
        for micro in batch.micro:
            loss += float(self._backward(micro.to(self.device, self._dtype), batch.tokens, None).loss.sum())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.optimizer.parameters]
        self.optimizer.zero_grad()
        return loss, grads

    @torch.no_grad()
    def _record(self, batch: Batch) -> list[tuple[Tensor, Tensor]]:
        """log pi_old and c of every micro-batch, before the first of several updates."""
        recorded = []
        for micro in batch.micro:
            moved = micro.to(self.device, self._dtype)
            scores = self._scores(moved)
            recorded.append((scores.logprobs, self._correction(moved, scores)[0]))
        return recorded

    def _backward(self, micro: MicroBatch, tokens: int, recorded: tuple[Tensor, Tensor] | None) -> Pass:
        with self._training():
            result = self._loss(micro, tokens, recorded)
            result.loss.sum().backward()
        result.loss = result.loss.detach()
        return result

    def _loss(self, micro: MicroBatch, tokens: int, recorded: tuple[Tensor, Tensor] | None) -> Pass:
        """The per-token losses of a micro-batch; their sum over the whole batch is the step's loss."""
        settings = self.settings
        kl: Tensor | None = None
        if settings.distill == "full_kl":
            scores, kl = self._scores_and_kl(micro)
        else:
            scores = self._scores(micro)
        logprobs = scores.logprobs
        correction, capped, mismatch = self._correction(micro, scores)
        old = logprobs.detach()
        if recorded is not None:
            # A response of the teacher's has no pi_old of ours: rho stays 1 in value however often it is used.
            old, correction = (old if settings.sampled_by == "teacher" else recorded[0]), recorded[1]
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
                anchor = self.reference(micro.input_ids, micro.attention_mask, micro.positions).to(logprobs)
            penalty = reference_kl(logprobs, anchor)
            loss = loss + settings.reference_kl / tokens * penalty
        credited = micro.credit_distill != 0
        assert scores.entropy is not None
        figures = TokenFigures(
            rollout=micro.rollout.cpu(),
            place=micro.place.cpu(),
            logprobs=logprobs.detach().cpu(),
            entropy=scores.entropy.cpu(),
            advantage=(micro.credit_reinforce + torch.where(credited, micro.credit_distill * distillation, 0.0)).cpu(),
            teacher_gap=gap.cpu(),
            mismatch=mismatch.cpu(),
            capped=capped.cpu(),
        )
        return Pass(loss, terms.clipped, penalty.detach(), figures)

    def _scores(self, micro: MicroBatch) -> TokenScores:
        settings = self.settings
        with self._precision():
            return response_logprobs(
                self.view,
                micro.input_ids,
                None,  # padding is on the right, so no token sees it
                micro.positions,
                settings.student_temperature,
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
            hidden = self.view.response_hidden(micro.input_ids, None, micro.positions)
            scores = score_hidden(
                self.view,
                hidden,
                micro.input_ids[micro.positions[:, 0], micro.positions[:, 1]],
                settings.student_temperature,
                extra_temperature=self._extra_temperature(),
            )
            kl = torch.zeros_like(scores.logprobs)
            places = (micro.distill != 0).nonzero().squeeze(-1)
            if places.numel():
                (found,) = map_logits(self.view, hidden[places], divergence, self._teacher_hidden(micro, places))
                kl = kl.index_put((places,), found)
        return scores, kl

    def _teacher_hidden(self, micro: MicroBatch, places: Tensor) -> Tensor:
        """The teacher's hidden states at the tokens ``places`` of a micro-batch, [len(places), H]."""
        assert self.teacher_head is not None
        rows, row_of = micro.positions[places, 0].unique(return_inverse=True)
        positions = torch.stack((row_of, micro.positions[places, 1]), dim=1)
        with torch.no_grad(), self._own_dtype():
            return self.teacher_head.response_hidden(micro.input_ids[rows], micro.attention_mask[rows], positions)

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

    def _divide_gradient(self, by: float) -> None:
        grads = [parameter.grad for parameter in self.optimizer.parameters if parameter.grad is not None]
        torch._foreach_div_(grads, by)

    def _clip_gradient(self) -> Tensor:
        """Norm of the whole gradient; clipped in place to ``grad_clip`` where it is finite."""
        grads = [parameter.grad for parameter in self.optimizer.parameters if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads)
        limit = self.config.grad_clip
        if isinstance(limit, float) and torch.isfinite(norm):  # else "off"
            torch.nn.utils.clip_grads_with_norm_(self.optimizer.parameters, limit, norm)
        return norm

    def _precision(self) -> torch.autocast:
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=self._autocast)

    def _own_dtype(self) -> torch.autocast:
        """Without the student's autocast."""
        return torch.autocast(self.device.type, enabled=False)

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Activation checkpointing acts in training mode only; dropout stays off, for pi_old must be the sampler's."""
        if not self.config.gradient_checkpointing:
            yield
            return
        for module in self.model.modules():
            module.training = bool(getattr(module, "gradient_checkpointing", False))
        try:
            yield
        finally:
            self.model.eval()


def _mean(values: list[float]) -> float | None:
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else None
