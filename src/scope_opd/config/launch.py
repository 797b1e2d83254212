"""The table of ``scope launch``: which devices of one machine the ranks and the servers of a run get."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from scope_opd.config.base import NonNegativeInt, PositiveFloat, PositiveInt, Table
from scope_opd.config.ray import RayConfig

Devices = list[NonNegativeInt]
"""GPUs by number, counted among those that are visible."""


class LaunchConfig(Table):
    """What ``scope launch`` starts on this machine, and where (docs/serving.md). ``scope train`` reads ``ray`` alone.

    ``trainer``, ``samplers``, ``teachers``: how many GPUs each of them gets, or which ([0, 1]). A rank of the trainer
    has one, a server ``serving.student`` or ``serving.teacher.tensor_parallel_size``. Where there is no GPU to be had
    (``train.device = "cpu"``, a vLLM for CPUs) the same number counts ranks and servers. None: ``samplers`` and
    ``teachers`` have a server for each of their ``base_urls`` on the loopback interface, none if there are none; the
    trainer has every GPU that is left, or one rank on a CPU. 0: none is started, ``base_urls`` stand as they are.
    With ``rollout.colocated`` samplers are on GPUs of the trainer (None: on all of them).

    ``ports``: of servers that ``base_urls`` name no address for, "auto" (free ones) or the first of consecutive ones.
    ``threads``: OMP_NUM_THREADS of a rank, and of a server on the CPU; None: the cores shared out evenly, unless the
    shell says otherwise. ``restarts``: how often a server that died is started again. ``stop_timeout_s``: what the
    trainer has to save and end after a first Ctrl-C, before it is killed.
    """

    trainer: PositiveInt | Devices | None = None
    samplers: NonNegativeInt | Devices | None = None
    teachers: NonNegativeInt | Devices | None = None
    ports: Annotated[int, Field(ge=1024, le=65535)] | Literal["auto"] = "auto"
    threads: Annotated[int, Field(gt=0, le=4096)] | None = None
    restarts: NonNegativeInt = 2
    stop_timeout_s: PositiveFloat = 600.0
    ray: RayConfig = Field(default_factory=RayConfig)
