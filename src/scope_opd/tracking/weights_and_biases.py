"""Weights & Biases, online or offline as ``WANDB_MODE`` says; its key comes from wandb's own places."""

from __future__ import annotations

from collections.abc import Mapping

import wandb

from scope_opd.tracking.base import RunDescription


class WandbTracker:
    """One wandb run for all sittings of a run: its id is the run's.

    Steps that a resumed run redoes carry the same numbers; wandb keeps those it has.
    """

    name = "wandb"

    def __init__(self, run: RunDescription) -> None:
        self._run = wandb.init(
            project=run.project,
            name=run.name,
            id=run.run_id,
            resume="allow",
            dir=run.folder,
            config=dict(run.config),
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()
