"""The Tracker Protocol and the opening of trackers by name."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from scope_opd.errors import ConfigError

# name -> (module here, class, the library that the extra brings)
_KNOWN = {
    "tensorboard": ("scope_opd.tracking.tensorboard", "TensorBoardTracker", "tensorboard"),
    "wandb": ("scope_opd.tracking.weights_and_biases", "WandbTracker", "wandb"),
    "trackio": ("scope_opd.tracking.trackio", "TrackioTracker", "trackio"),
}


@dataclass(frozen=True, slots=True)
class RunDescription:
    """What a tracker is told of the run.

    Attributes:
        folder: the run folder; local files go under it.
        project: ``run.project``.
        name: the run's name, its folder's.
        run_id: the same across resumes.
        config: the resolved config as plain values (it holds no secrets).
        step: the first step that will be logged; rows of it and later from an earlier sitting are superseded.
    """

    folder: Path
    project: str
    name: str
    run_id: str
    config: Mapping[str, Any]
    step: int = 0


class Tracker(Protocol):
    """Receives one row of metrics a step."""

    name: str

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Log numbers under their own keys."""
        ...

    def close(self) -> None:
        """Flush and let go. Called once, also after an error."""
        ...


def open_trackers(names: Sequence[str], run: RunDescription) -> list[Tracker]:
    """Open trackers by name.

    Raises:
        ConfigError: an unknown name, or one whose library is not installed (naming the extra).
    """
    opened: list[Tracker] = []
    try:
        for name in names:
            opened.append(_open(name, run))  # noqa: PERF401 - what is open is closed if the next one fails
    except BaseException:
        for tracker in opened:
            with suppress(Exception):  # the error at hand is the one to tell
                tracker.close()
        raise
    return opened


def _open(name: str, run: RunDescription) -> Tracker:
    if name not in _KNOWN:
        raise ConfigError(f"run.trackers has {name!r}", f"some of {', '.join(_KNOWN)}", "change run.trackers")
    module, cls, library = _KNOWN[name]
    try:
        importlib.import_module(library)
        tracker: Tracker = getattr(importlib.import_module(module), cls)(run)
    except ImportError as error:
        raise ConfigError(
            f"run.trackers has {name!r} but {error.name or library} is not installed",
            f"the extra [{name}]",
            f"pip install 'scope-opd[{name}]', or take it out of run.trackers",
        ) from None
    return tracker


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The numeric entries of a row under their own keys; one level of nesting becomes ``key/subkey``."""
    flat: dict[str, float] = {}
    for key, value in row.items():
        entries = value.items() if isinstance(value, Mapping) else [("", value)]
        for subkey, number in entries:
            if isinstance(number, (int, float)) and not isinstance(number, bool):
                flat[f"{key}/{subkey}" if subkey else key] = number
    return flat
