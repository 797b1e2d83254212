"""One step's update: forward and backward over the micro-batches, then the optimiser.

Gradients are plain sums over tokens (the step's denominators are in the numbers already, or divided out in the end),
so no cut into micro-batches changes them. Not covered: the loss (``forward``), many ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from scope_opd.config import TrainConfig
from scope_opd.models.checkpointing import set_checkpointing
from scope_opd.train.batch import Batch, MicroBatch
from scope_opd.train.engines import Engines
from scope_opd.train.forward import Forward, Recorded
from scope_opd.train.optim import Optimizer
from scope_opd.train.outcome import Begun, Outcome, Pass, first_broken, join_figures


class Learner:
    """The student's weights, their optimiser, and the one way in which they change.

    Args:
        engines: model, surrogate settings, optional teacher head and reference.
        config: optimiser, updates a batch, clipping, precision.
    """

    def __init__(self, engines: Engines, config: TrainConfig) -> None:
        self.model: nn.Module = engines.model
        self.config = config
        self.forward = Forward(engines, config.packing)
        self.optimizer = Optimizer(engines.model, config)
        self.device = self.forward.device
        set_checkpointing(engines.model, config.activation_checkpointing)

    def begin(self, shares: Sequence[Sequence[MicroBatch]], begun: Begun | None = None) -> Begun:
        """Forward and backward over a part of a step, whose numbers are not divided by the step's denominator.

        Args:
            shares: from ``make_part``.
            begun: what this step's earlier parts left; None for the first. It is added to.
        """
        if begun is None:
            self.optimizer.zero_grad()
            begun = Begun()
        for part in [part for share in shares for part in share]:
            begun.passes.append(self._backward(part, 1, None))
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
            begun: parts of the step that went before; ``batch.micro`` is the rest, ``batch.divide_by`` set, and one
                update taken.
            on_phase: told "forward_backward" and "optimiser".
            on_progress: told (micro-batches done, in all) of a pass.
            before_change: called once, right before the weights change for the first time.
        """
        passes = self.config.updates_per_batch
        several = passes * len(batch.minibatches) > 1
        assert begun is None or not (several or batch.divide_by is None)
        shares = batch.shares
        recorded = [self._record(share) if several else [None] * len(share) for share in shares]
        losses, norms, figures, references, clipped = [], [], [], [], []
        updates, finite, broken = 0, True, None
        for number, mini in ((number, mini) for number in range(passes) for mini in batch.minibatches):
            on_phase("forward_backward")
            if begun is None:
                self.optimizer.zero_grad()
            results, owners = (list(begun.passes), list(begun.owners)) if begun else ([], [])
            tokens = mini.tokens if batch.divide_by is None else 1
            for index in range(mini.start, mini.stop):
                for share, old in zip(shares, recorded, strict=True):
                    results.append(self._backward(share[index], tokens, old[index]))
                    owners.append(share[index].rollout)
                on_progress(index + 1, len(shares[0]))
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
            if not updates:
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
            kl_reference=float(torch.cat(references).mean()) if self.forward.reference and references else None,
            tokens=join_figures(figures),
        )

    def gradient(self, batch: Batch) -> tuple[float, list[Tensor]]:
        """Loss and gradient of a batch without clipping or an optimiser step, for laws and studies."""
        self.optimizer.zero_grad()
        loss = 0.0
        for micro in batch.micro:
            loss += float(self._backward(micro, batch.tokens, None).loss.sum())
        grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.optimizer.parameters]
        self.optimizer.zero_grad()
        return loss, grads

    def _record(self, share: Sequence[MicroBatch]) -> list[Recorded]:
        """What the policy says of every micro-batch before the first of several optimiser steps."""
        return [self.forward.record(micro) for micro in share]

    def _backward(self, micro: MicroBatch, tokens: int, recorded: Recorded | None) -> Pass:
        result = self.forward.run(micro, tokens, recorded)
        result.loss.sum().backward()
        result.loss = result.loss.detach()
        return result

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


def _mean(values: list[float]) -> float | None:
    mean = sum(values) / len(values)
    return mean if math.isfinite(mean) else None
