"""Which pipeline a run has: in the trainer's thread, or in one of its own where servers do part of the work."""

from __future__ import annotations

from scope_opd.config import Config
from scope_opd.data.prompts import PromptSchedule
from scope_opd.errors import ConfigError
from scope_opd.objective.methods import Method
from scope_opd.pipeline import BackgroundPipeline, Pipeline
from scope_opd.types import Sampler, Teacher, Verifier


def steps_ahead(config: Config) -> int:
    """Training steps that generation may run ahead, so that no token lags by more than ``rollout.max_staleness``.

    Raises:
        ConfigError: a staleness that allows not even one.
    """
    staleness, train = config.rollout.max_staleness, config.train
    updates = train.updates_per_batch * train.minibatches
    if staleness and staleness < updates:
        raise ConfigError(
            f"rollout.max_staleness = {staleness} with train.updates_per_batch = {train.updates_per_batch} and "
            f"train.minibatches = {train.minibatches}: one step ahead is already {updates} optimiser steps",
            f"0, or at least {updates}",
            "change one of them",
        )
    return staleness // updates


def build_pipeline(
    config: Config,
    method: Method,
    sampler: Sampler,
    verifier: Verifier,
    teacher: Teacher | None,
    schedule: PromptSchedule,
) -> Pipeline:
    """Join the engines.

    Raises:
        ConfigError: see ``steps_ahead``.
        ScopeError: the method asks for a teacher and there is none.
    """
    parts = (sampler, verifier, teacher, method.needs_teacher)
    truncated, threshold = config.objective.truncated, config.objective.reward_threshold
    ahead = steps_ahead(config)
    if config.rollout.served or (teacher is not None and config.teacher.served):
        return BackgroundPipeline(
            *parts, truncated=truncated, reward_threshold=threshold, schedule=schedule.batch, steps=config.train.steps,
            ahead=ahead,
        )  # fmt: skip
    return Pipeline(*parts, truncated=truncated, reward_threshold=threshold)
