"""Which boundaries of a run are saved and kept, and what their checkpoints say besides tensors.

What may go on from a checkpoint is ``resume``'s to say, how one is written ``checkpoint``'s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from scope_opd.config import Config
from scope_opd.errors import RunFailed, RunFolderError
from scope_opd.train.best import Best
from scope_opd.train.checkpoint import Checkpoint, Checkpoints, checkpoint_name, list_checkpoints
from scope_opd.train.engines import Engines
from scope_opd.train.resume import (
    config_hash,
    refuse_other_config,
    refuse_other_data,
    refuse_other_models,
    refuse_to_start_over,
)
from scope_opd.train.runfolder import RunFolder
from scope_opd.train.shards import Shards


class Saving:
    """The checkpoints of one sitting.

    Attributes:
        step: of the newest checkpoint, there or on its way; -1 without one.
        best: the best evaluation so far.
    """

    def __init__(self, config: Config, engines: Engines, shards: Shards, folder: RunFolder) -> None:
        self.config, self.engines = config, engines
        self.step = -1
        self.best = Best(config.best_figure)
        self._folder = folder
        self._checkpoints = Checkpoints(folder.path / "checkpoints", shards, keep_last=config.run.keep_last)

    def find(self, report: Callable[[str], None], *, allow: bool) -> tuple[Checkpoint | None, list[str]]:
        """The checkpoint that a resumed run goes on from; None where it starts at the beginning again.

        Args:
            report: called with a line for each damaged checkpoint.
            allow: accept another config.

        Returns:
            The checkpoint, and the differences of the config that were accepted.

        Raises:
            RunFolderError: this run may not go on from it, see ``resume``.
        """
        config, damage = self.config, list[str]()
        found = self._checkpoints.newest_sound(damage.append)
        for line in damage:
            report(line)
        if found is None:
            accepted = refuse_to_start_over(self._folder.path, config, damage, allow=allow)
        else:
            accepted = refuse_other_config(config, found.trainer["config"], found.step, allow=allow)
            refuse_other_models(
                found.trainer["models"], self.engines.fingerprints,
                tolerance=config.teacher.fingerprint_tolerance, accepted=accepted,
            )  # fmt: skip
            self.best.restore(found.trainer["best"], {step for step, _ in list_checkpoints(found.path.parent)})
        refuse_other_data(self._folder.path, self.engines.data, accepted=accepted)
        return found, accepted

    def load(self, found: Checkpoint) -> None:
        """Bring weights, optimiser and random states back.

        Raises:
            RunFolderError: they are of another student.
        """
        try:
            self._checkpoints.load(found)
        except ValueError as error:
            raise RunFolderError(
                f"checkpoint {found.path}: {error}", "the weights of this run's student", "check model.path"
            ) from None
        self.step = found.step

    def changes(self, found: Checkpoint) -> list[str]:
        """A line for each circumstance that may change the last bits of what follows a checkpoint."""
        lines = []
        for what, before, now, remedy in (
            ("torch threads", found.trainer["threads"], torch.get_num_threads(), "; set train.threads"),
            ("ranks", found.world, self.engines.ranks.world, ""),
        ):
            if before != now:
                lines.append(
                    f"{now} {what}, {before} before the interruption: the numbers may differ in their last bits{remedy}"
                )
        return lines

    def look(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """An evaluation was made, one row a temperature; where it is the best, its boundary is ``due``."""
        self.best.look(step, rows)

    def due(self, step: int) -> bool:
        """Whether the config wants a checkpoint of this boundary."""
        every = self.config.run.checkpoint_every
        return bool(every and step and step % every == 0) or step in self.best.kept

    def save(self, step: int, facts: Mapping[str, Any], rng: dict[str, Tensor]) -> None:
        """Begin a checkpoint of a boundary; the one before must be settled.

        Args:
            step: of the boundary.
            facts: what ``Session`` goes on from, as JSON.
            rng: this rank's random states at the boundary.

        Raises:
            RunFailed: the folder could not be made.
        """
        about = {
            "step": step,
            "prompts": step * self.config.train.prompts_per_step,
            **facts,
            "best": self.best.found,
            "offsets": self._folder.offsets(),
            "run_id": self._folder.info["run_id"],
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "models": dict(self.engines.fingerprints),
            "config": self.config.model_dump(mode="json"),
            "config_hash": config_hash(self.config),
        }
        self._checkpoints.save(step, about, rng, keep=self.best.kept)
        self.step = step

    def settle(self, *, wait: bool) -> None:
        """Take note of the checkpoint under way, if it is there by now.

        Args:
            wait: until it is.

        Raises:
            RunFailed: it could not be written.
        """
        try:
            path = self._checkpoints.settle(wait=wait)
        except RunFailed:
            self.step = -1
            raise
        if path is not None:
            self.note()

    def note(self) -> None:
        """The checkpoint of ``step`` is whole and in its place: events, and the best in run.json, say so."""
        name, best = checkpoint_name(self.step), self.best.found
        self._folder.event(self.step, "checkpoint", name)
        if best is not None and best["step"] == self.step:
            figure, value = best["figure"], best["value"]
            self._folder.event(self.step, "best", f"{name}: {figure} = {value:.4f}", figure=figure, value=value)
            self._folder.note(best=best)

    def abandon(self) -> None:
        """The sitting ends, however: nothing is written any more."""
        self._checkpoints.abandon()
