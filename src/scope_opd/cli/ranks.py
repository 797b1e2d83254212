"""What the ranks of ``scope train`` have to agree on: how many there are, the device of each, what rank 0 tells."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from scope_opd.config import Config
from scope_opd.errors import ConfigError
from scope_opd.models.loading import resolve_device
from scope_opd.ranks import Ranks
from scope_opd.teacher.ends import EndTokens
from scope_opd.train.engines import SurrogateSettings

TRAIN, EVALUATION = "sample", "sample/evaluation"
"""The jobs of drawing a step's rollouts, and an evaluation's."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What rank 0 tells the others before a run.

    Attributes:
        config: its own, as plain values.
        surrogate: the update's settings.
        ends: how the in-process teacher judges end tokens.
    """

    config: dict[str, Any]
    surrogate: SurrogateSettings
    ends: EndTokens | None


def open_ranks(config: Config) -> Ranks:
    """The ranks that torchrun (or Ray) has started; a world of one without them.

    Raises:
        ConfigError: something that the config asks for cannot be at several ranks.
        ScopeError: the other ranks were not found.
    """
    world = os.environ.get("WORLD_SIZE", "1")
    if world != "1" and config.rollout.served and config.rollout.sync == "ipc":
        raise ConfigError(
            f"rollout.sync = 'ipc' with {world} ranks",
            "'files', since it reaches only a server on the GPU of rank 0",
            "change it, or start one rank",
        )
    cuda = config.train.device != "cpu" and torch.cuda.is_available()
    return Ranks.from_environment(config.train.collective_timeout_s, cuda=cuda)


def rank_device(config: Config, ranks: Ranks) -> torch.device:
    """``train.device``; with several ranks the GPU of this one. A GPU becomes torch's current device.

    Raises:
        ModelError: no such device.
        ConfigError: one GPU is named for all ranks, or there are fewer than ranks.
    """
    name = config.train.device
    if ranks.world == 1 or name == "cpu" or not torch.cuda.is_available():
        device = resolve_device(name)
        if device.type == "cuda":  # what waits for "the" GPU, or saves its random state, means this one
            torch.cuda.set_device(device)
        return device
    if ":" in name:
        raise ConfigError(f"train.device = {name!r} with {ranks.world} ranks", "a GPU for each", "set cuda, or auto")
    count = torch.cuda.device_count()
    if count > 1 and ranks.local_rank >= count:
        raise ConfigError(
            f"LOCAL_RANK = {ranks.local_rank} and {count} GPUs that it sees",
            "as many ranks on a machine as GPUs",
            "lower --nproc-per-node",
        )
    # One GPU alone is what some launchers let each rank see: then it is this rank's own.
    index = ranks.local_rank if count > 1 else 0
    torch.cuda.set_device(index)  # before anything is put on a GPU: it would be the first
    return resolve_device(f"cuda:{index}")
