"""The table of a run under Ray (``scope train --launcher ray``)."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from scope_opd.config.base import PositiveFloat, PositiveInt, Table


class RayConfig(Table):
    """What Ray sets aside for the ranks, and how often it starts them again (docs/scaling.md).

    ``workers``: ranks. ``cpus_per_worker``, ``gpus_per_worker``: of each (None: one GPU where the cluster has any and
    train.device is not "cpu"); ``resources``: what else it takes, by the cluster's own names (``{ trainer = 1 }``).
    ``placement``: all on few nodes or on one ("pack", "strict_pack"), on many or each on its own ("spread",
    "strict_spread"). ``max_failures``: deaths of workers after each of which all start again from the last checkpoint;
    -1: however many. ``start_timeout_s``: within this time the cluster must have started the workers.
    """

    workers: PositiveInt = 1
    cpus_per_worker: PositiveFloat = 1.0
    gpus_per_worker: Literal[0, 1] | None = None
    resources: dict[str, PositiveFloat] = Field(default_factory=dict)
    placement: Literal["pack", "strict_pack", "spread", "strict_spread"] = "pack"
    max_failures: Annotated[int, Field(ge=-1)] = 3
    start_timeout_s: PositiveFloat = 600.0

    @field_validator("resources")
    @classmethod
    def _own_names(cls, resources: dict[str, float]) -> dict[str, float]:
        for name in resources:
            if name in ("CPU", "GPU"):
                key = f"{name.lower()}s_per_worker"
                raise ValueError(f"launch.ray.resources names {name}; expected other resources; set launch.ray.{key}")
        return resources
