"""A step's update from its groups: all at once, or begun with those that are complete while the teacher still works.

The denominators of an aggregation belong to the whole step. Where all of them are one number, parts can be accumulated
with undivided numbers and divided in the end, which is the same gradient. Where they are not (``released``, several
optimiser steps a step, a reference KL that is averaged otherwise than the rest), the update waits for the whole step.
Not covered: the arithmetic (``batch``, ``step``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from scope_opd.config import TrainConfig
from scope_opd.objective.aggregate import ONE_DENOMINATOR
from scope_opd.pipeline import GroupsHook
from scope_opd.train.batch import Batch, MicroBatch, MiniBatch, make_batch, make_part, step_denominator
from scope_opd.train.engines import Engines, SurrogateSettings
from scope_opd.train.step import Begun, Learner
from scope_opd.types import Prompt, Rollout


def exact_in_parts(settings: SurrogateSettings, config: TrainConfig) -> bool:
    """Whether an update in parts is the update of the whole batch."""
    return (
        config.updates_per_batch == config.minibatches == 1
        and settings.aggregation in ONE_DENOMINATOR
        and (settings.reference_kl == 0 or settings.aggregation == "token")
    )


class Gathering:
    """Takes a step's groups as they come and makes its batch.

    Args:
        engines: credit and surrogate settings.
        learner: does the backward passes that come early.
        config: the size of micro- and mini-batches.
        prompts: the step's.

    Attributes:
        begun: what has gone through the learner; None as long as nothing has.
    """

    def __init__(self, engines: Engines, learner: Learner, config: TrainConfig, prompts: Sequence[Prompt]) -> None:
        self.engines, self.learner, self.config = engines, learner, config
        self.begun: Begun | None = None
        self._cut: dict[str, Any] = {
            "aggregation": engines.surrogate.aggregation,
            "max_tokens": config.max_tokens_per_microbatch,
            "ranks": engines.ranks.world,
            "packed": learner.forward.packs,
            "crossover": learner.forward.crossover,
        }
        self._first = {prompt.id: index * engines.sampling.n for index, prompt in enumerate(prompts)}
        self._verdicts: dict[int, bool | None] = {}

    @property
    def early(self) -> GroupsHook | None:
        """``begin``, where beginning early changes nothing."""
        return self.begin if exact_in_parts(self.engines.surrogate, self.config) else None

    def begin(self, groups: Sequence[Sequence[Rollout]]) -> None:
        """Credit and backward of complete groups, each at most once a step."""
        rollouts = [rollout for group in groups for rollout in group]
        places = [self._first[group[0].group] + index for group in groups for index in range(len(group))]
        assert self._verdicts.keys().isdisjoint(places), "a group came twice"
        self._verdicts.update(zip(places, self.engines.credit(rollouts), strict=True))
        self.begun = self.learner.begin(self._parts(rollouts, places), self.begun)

    def complete(self, rollouts: Sequence[Rollout]) -> tuple[list[bool | None], Batch]:
        """The step's verdicts, and the batch of what has not been begun.

        Args:
            rollouts: all of the step's, in the prompts' order; those that were begun are credited already.
        """
        settings, config = self.engines.surrogate, self.config
        if self.begun is None:
            verdicts = list(self.engines.credit(rollouts))
            return verdicts, make_batch(rollouts, minibatches=config.minibatches, **self._cut)
        places = [place for place in range(len(rollouts)) if place not in self._verdicts]
        rest = [rollouts[place] for place in places]
        self._verdicts.update(zip(places, self.engines.credit(rest), strict=True))
        parts = self._parts(rest, places)
        micro = [part for share in parts for part in share]
        cells = self.begun.cells + sum(part.cells for part in micro)
        padded = self.begun.padded + sum(part.padded for part in micro)
        tokens = sum(owner.numel() for owner in (*self.begun.owners, *(part.rollout for part in micro)))
        batch = Batch(
            parts,
            tokens,
            padded / cells if cells else 0.0,
            [MiniBatch(0, len(parts[0]), tokens)] if tokens else [],
            step_denominator(rollouts, settings.aggregation),
        )
        return [self._verdicts[place] for place in range(len(rollouts))], batch

    def _parts(self, rollouts: Sequence[Rollout], places: Sequence[int]) -> list[list[MicroBatch]]:
        return make_part(rollouts, places, **self._cut)
