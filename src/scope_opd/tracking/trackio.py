"""trackio, Hugging Face's local-first tracker."""

from __future__ import annotations

from collections.abc import Mapping

import trackio

from scope_opd.tracking.base import RunDescription


class TrackioTracker:
    """One trackio run for all sittings: its name carries the run's id."""

    name = "trackio"

    def __init__(self, run: RunDescription) -> None:
        self._run = trackio.init(
            project=run.project, name=f"{run.name}-{run.run_id}", config=dict(run.config), resume="allow"
        )

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        self._run.log(dict(metrics), step=step)

    def close(self) -> None:
        self._run.finish()
