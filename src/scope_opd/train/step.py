"""One step's update: forward and backward over the micro-batches, then the optimiser; on one rank or on many.

Gradients are plain sums over tokens (the step's denominators are in the numbers already, or divided out in the end),
so no cut into micro-batches changes them, and no dealing to ranks: ranks add theirs up. What each rank does is a job of
``ranks``; rank 0 hands out the micro-batches and joins what came of them. Not covered: the loss (``forward``), how
weights are dealt to ranks (``models.sharding``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from scope_opd.config import TrainConfig
from scope_opd.errors import ModelError
from scope_opd.models.checkpointing import set_checkpointing
from scope_opd.models.sharding import local, make_mesh, shard, total_norm, whole_weights
from scope_opd.train.batch import Batch, MicroBatch, MiniBatch
from scope_opd.train.engines import LearnerParts
from scope_opd.train.forward import Forward, Recorded
from scope_opd.train.optim import Optimizer
from scope_opd.train.outcome import Begun, Outcome, Pass, TokenFigures, first_broken, join_figures
from scope_opd.train.shards import Shards


@dataclass(frozen=True, slots=True)
class _Share:
    """A rank's part of an update.

    Attributes:
        micro: its micro-batches, as many as every rank has.
        minibatches, divide_by: see ``Batch``.
        lr: of each optimiser step.
        begun: whether parts of the step went before.
    """

    micro: list[MicroBatch]
    minibatches: list[MiniBatch]
    divide_by: float | None
    lr: float
    begun: bool


@dataclass(slots=True)
class _Done:
    """What a rank's part of an update gave: losses and norms of the whole step, the rest its own."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    updates: int = 0
    finite: bool = True
    broken: int | None = None
    clipped: list[Tensor] = field(default_factory=list)
    references: list[Tensor] = field(default_factory=list)
    figures: list[TokenFigures] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Hooks:
    """Whom rank 0 tells of an update, see ``Learner.update``."""

    on_phase: Callable[[str], None] = lambda phase: None
    on_progress: Callable[[int, int], None] = lambda done, total: None
    before_change: Callable[[], None] = lambda: None


class Learner:
    """The student's weights, their optimiser, and the one way in which they change. One on every rank.

    Args:
        engines: the student, surrogate settings, optional teacher head and reference, ranks.
        config: optimiser, updates a batch, clipping, precision, sharding.
    """

    def __init__(self, engines: LearnerParts, config: TrainConfig) -> None:
        self.ranks = engines.ranks
        self.model: nn.Module = engines.trained
        self.config = config
        self.forward = Forward(engines, config.packing)
        self.device = self.forward.device
        set_checkpointing(engines.trained, config.activation_checkpointing)
        self._copy = None if engines.model is engines.trained else engines.model
        if self.ranks.world > 1:
            mesh = make_mesh(self.ranks.world, self.device.type, config.shard, config.collective_timeout_s)
            shard(self.forward, engines.trained, mesh, low_precision=self.forward.autocast)
        self.optimizer = Optimizer(engines.trained, config)
        self.shards = Shards(self.ranks, self.model, self.optimizer)
        self._hooks = _Hooks()
        self._early: list[tuple[Tensor, Pass]] = []
        self._fresh: int | None = None
        self.ranks.register("learner/begin", self._begin)
        self.ranks.register("learner/update", self._update)
        self.ranks.register("learner/refresh", self._refresh)
        self.ranks.register("learner/gather", self._gather)

    # --- rank 0 ------------------------------------------------------------------------------------------------------

    def begin(self, shares: Sequence[Sequence[MicroBatch]], begun: Begun | None = None) -> Begun:
        """Forward and backward over a part of a step, whose numbers are not divided by the step's denominator.

        Args:
            shares: from ``make_part``.
            begun: what this step's earlier parts left; None for the first. It is added to.
        """
        self.ranks.everywhere("learner/begin", [(list(share), begun is None) for share in shares])
        begun = begun or Begun()
        for part in [part for share in shares for part in share]:
            begun.owners.append(part.rollout)
            begun.cells += part.cells
            begun.padded += part.padded
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
        """Forward, backward and an optimiser step for each mini-batch, all of them ``updates_per_batch`` times.

        Args:
            batch: from ``make_batch``. With nothing unmasked no optimiser step is taken.
            lr: the learning rate of this step.
            begun: parts of the step that went before; ``batch`` is the rest, ``batch.divide_by`` set, and one update
                taken.
            on_phase: told "forward_backward" and "optimiser".
            on_progress: told (micro-batches done, in all) of a pass; of rank 0.
            before_change: called once, right before the weights change for the first time.
        """
        shares = [
            _Share(list(micro), batch.minibatches, batch.divide_by, lr, begun is not None) for micro in batch.shares
        ]
        self._hooks = _Hooks(on_phase, on_progress, before_change)
        try:
            done: list[_Done] = self.ranks.everywhere("learner/update", shares)
        finally:
            self._hooks = _Hooks()
        first = done[0]
        if first.updates:
            self._fresh = None
        clipped = [flags for each in done for flags in each.clipped]
        references = [values for each in done for values in each.references]
        return Outcome(
            loss=_mean(first.losses) if first.losses else 0.0,
            grad_norm=_mean(first.norms) if first.norms else 0.0,
            updates=first.updates,
            finite=first.finite,
            broken=next((each.broken for each in done if each.broken is not None), None),
            clipped=float(torch.cat(clipped).double().mean()) if clipped else 0.0,
            kl_reference=float(torch.cat(references).mean()) if self.forward.reference and references else None,
            tokens=join_figures([figures for each in done for figures in each.figures]),
        )

    def refresh(self, version: int) -> None:
        """Bring the trained weights to the plain copies that samplers decode with; nothing to do with one rank.

        Args:
            version: of the weights, or of the state that was loaded since: what is fresh already is left alone.
        """
        if self.ranks.world > 1 and self._fresh != version:
            self.ranks.everywhere("learner/refresh", [None] * self.ranks.world)
            self._fresh = version

    def whole(self) -> dict[str, Tensor] | None:
        """With several ranks: the state dict of what is trained, whole, on the CPU, each tied weight once.

        None with one rank, whose model is whole.
        """
        if self.ranks.world == 1:
            return None
        weights: dict[str, Tensor] = self.ranks.everywhere("learner/gather", [None] * self.ranks.world)[0]
        return weights

    def gradient(self, batch: Batch) -> tuple[float, list[Tensor]]:
        """Loss and gradient of a batch without clipping or an optimiser step, for laws and studies of one rank."""
        assert self.ranks.world == 1
        self.optimizer.zero_grad()
        loss = 0.0
        for micro in batch.micro:
            loss += float(self._backward(micro, batch.tokens, None).loss.sum())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.optimizer.parameters]
        self.optimizer.zero_grad()
        return loss, grads

    # --- jobs --------------------------------------------------------------------------------------------------------

    def _begin(self, share: tuple[list[MicroBatch], bool]) -> None:
        micro, first = share
        if first:
            self.optimizer.zero_grad()
            self._early = []
        for part in micro:
            self._early.append((part.rollout, self._backward(part, 1, None)))

    def _update(self, share: _Share) -> _Done:
        done, hooks = _Done(), self._hooks
        several = self.config.updates_per_batch * len(share.minibatches) > 1
        assert not share.begun or not (several or share.divide_by is None)
        recorded = [self.forward.record(micro) if several else None for micro in share.micro]
        order = [(number, mini) for number in range(self.config.updates_per_batch) for mini in share.minibatches]
        for number, mini in order:
            hooks.on_phase("forward_backward")
            if not share.begun:
                self.optimizer.zero_grad()
            results = list(self._early) if share.begun else []
            tokens = mini.tokens if share.divide_by is None else 1
            for index in range(mini.start, mini.stop):
                micro = share.micro[index]
                results.append((micro.rollout, self._backward(micro, tokens, recorded[index])))
                hooks.on_progress(index + 1, len(share.micro))
            total = torch.zeros((), dtype=torch.float64, device=self.device)
            for _, result in results:
                total += result.loss.sum().double()
                done.clipped.append(result.clipped.cpu())
                if number == 0:
                    done.figures.append(result.figures)
                    done.references.append(result.reference.cpu())
            if share.divide_by is not None:
                total /= share.divide_by
                torch._foreach_div_(self._gradients(), share.divide_by)
            done.losses.append(float(self.ranks.sum(total.cpu())))
            done.norms.append(float(self._clip_gradient()))
            done.finite = math.isfinite(done.losses[-1]) and math.isfinite(done.norms[-1])
            if not done.finite:
                done.broken = first_broken([owner for owner, _ in results], [result.loss for _, result in results])
                break
            if not done.updates:
                hooks.before_change()
            hooks.on_phase("optimiser")
            self.optimizer.step(share.lr)
            done.updates += 1
        self.optimizer.zero_grad()
        self._early = []
        return done

    def _refresh(self, _: None) -> None:
        """Raises ModelError where this rank's copy has other weights than those that are trained."""
        target = {} if self._copy is None else dict(self._copy.named_parameters())
        odd = set(target)
        with torch.no_grad():
            for name, weight in whole_weights(self.model, merged=True):  # to the end: the others gather with this rank
                if name in target and target[name].shape == weight.shape:
                    target[name].copy_(weight)
                    odd.discard(name)
                elif target:
                    odd.add(name)
        if odd:
            raise ModelError(
                f"the student's copy that samples has other weights than the student: {', '.join(sorted(odd)[:4])}",
                "the same names and shapes",
                "train on one rank, which needs no copy",
            )

    def _gather(self, _: None) -> dict[str, Tensor]:
        weights = {}
        for name, weight in whole_weights(self.model, merged=False):
            if self.ranks.leads:
                weights[name] = weight.cpu()
        buffers = {name: tensor for name, tensor in self.model.state_dict().items() if not isinstance(tensor, DTensor)}
        return weights | buffers if self.ranks.leads else {}

    def _backward(self, micro: MicroBatch, tokens: int, recorded: Recorded | None) -> Pass:
        result = self.forward.run(micro, tokens, recorded)
        result.loss.sum().backward()
        result.loss = result.loss.detach()
        return result

    def _gradients(self) -> list[Tensor]:
        """This rank's shards of the gradient; all of it with one rank."""
        return [local(parameter.grad) for parameter in self.optimizer.parameters if parameter.grad is not None]

    def _clip_gradient(self) -> Tensor:
        """Norm of the whole gradient; clipped in place to ``grad_clip`` where it is finite."""
        grads = self._gradients()
        norm = torch.nn.utils.get_total_norm(grads)
        if self.ranks.world > 1:
            norm = total_norm(norm, self.optimizer.parameters, self.ranks)
        limit = self.config.grad_clip
        if isinstance(limit, float) and torch.isfinite(norm):  # else "off"
            if self.ranks.world == 1:
                torch.nn.utils.clip_grads_with_norm_(self.optimizer.parameters, limit, norm)
            elif norm > limit:
                torch._foreach_mul_(grads, float(limit / (norm + 1e-6)))
        return norm


def _mean(values: list[float]) -> float | None:
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else None
