"""TensorBoard event files under ``RUN/tensorboard``."""

from __future__ import annotations

from collections.abc import Mapping

from torch.utils.tensorboard import SummaryWriter

from scope_opd.tracking.base import RunDescription


class TensorBoardTracker:
    """Scalars in one event file a sitting; steps that a resumed run redoes are purged from the former ones."""

    name = "tensorboard"

    def __init__(self, run: RunDescription) -> None:
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.step or None)

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        for key, value in metrics.items():
            self._writer.add_scalar(key, value, step)

    def close(self) -> None:
        self._writer.close()
