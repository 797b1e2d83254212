"""Weights by files: a folder a version, which servers read from the same path.

A folder appears as a whole, by a rename: no server ever sees half a file. The tag of the version stands in the file's
metadata, and the server's extension refuses a file with another one (a network file system that still shows an older
folder, two runs in one place). The two newest versions are kept, for servers that are brought up to date late.

Not covered: a tokenizer beside the weights (servers read none of it again), several files a version.
"""

from __future__ import annotations

import asyncio
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from scope_opd.errors import ConfigError, RunFailed
from scope_opd.rollout.weight_sync.carrier import Load, checkpoint_tensors
from scope_opd.serving.control import Control
from scope_opd.serving.faults import Fault, Refused
from scope_opd.serving.http import monotonic

KEPT = 2
TAG = "scope_tag"
"""Key of the tag in a file's metadata, see serving/inside/scope_vllm.py."""
SEEN_S = 20.0
"""A network file system may show a new folder so much later on another machine."""
WEIGHTS = "model.safetensors"


class Files:
    """Writes versions into a folder of its own; implements ``carrier.Carrier``.

    Args:
        folder: where; made if it is not there. What an earlier sitting left in it is removed.
        model: the student.
        dtype: of the files: what the servers compute in. None: the student's own.
    """

    def __init__(self, folder: Path, model: Any, *, dtype: torch.dtype | None = None) -> None:
        self.folder, self._model, self._dtype = folder.resolve(), model, dtype
        self._opened = False

    def _open(self) -> None:
        """At the first version, not before: by then the run holds the lock of its folder, in which this one may be."""
        if self._opened:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._remove(self._versions())
            (self.folder / ".writing").write_bytes(b"")
            (self.folder / ".writing").unlink()
        except OSError as error:
            raise ConfigError(
                f"rollout.sync_dir: {self.folder} cannot be written: {error.strerror or error}",
                "a folder for weights, with the same path on the servers' machines", "set rollout.sync_dir",
            ) from None  # fmt: skip
        self._opened = True

    def prepare(self, version: int, tag: str) -> Load:
        """Write ``v{version}`` and forget older ones.

        Raises:
            ConfigError: the folder cannot be written to.
            RunFailed: the weights could not be written; nothing of them is left.
        """
        self._open()
        target = self.folder / f"v{version}"
        if _tag_of(target / WEIGHTS) != tag:
            self._write(target, tag)
        self._remove(self._versions()[:-KEPT])
        return Reading(target, tag)

    def close(self) -> None:
        """Remove all versions, and the folder where nothing else is in it."""
        if not self._opened:
            return
        with suppress(OSError):
            self._remove(self._versions())
            self.folder.rmdir()

    def _write(self, target: Path, tag: str) -> None:
        writing = self.folder / f".writing-{target.name}"
        try:
            shutil.rmtree(writing, ignore_errors=True)
            writing.mkdir()
            tensors = {name: each.contiguous() for name, each in checkpoint_tensors(self._model, self._dtype).items()}
            save_file(tensors, writing / WEIGHTS, metadata={"format": "pt", TAG: tag})
            self._model.config.save_pretrained(writing)
            shutil.rmtree(target, ignore_errors=True)
            writing.rename(target)
        except (OSError, SafetensorError) as error:
            shutil.rmtree(writing, ignore_errors=True)
            raise RunFailed(
                f"the weights for the sampling servers could not be written to {target}: {error}",
                "room for three versions on that disk", "free some space, or set rollout.sync_dir, then use --resume",
            ) from None  # fmt: skip

    def _versions(self) -> list[Path]:
        """Oldest first; what was left half written comes before."""
        found = [path for path in self.folder.iterdir() if path.is_dir()]
        numbered = [path for path in found if path.name[:1] == "v" and path.name[1:].isdigit()]
        unfinished = [path for path in found if path.name.startswith(".writing-v")]
        return unfinished + sorted(numbered, key=lambda path: path.stat().st_mtime_ns)

    @staticmethod
    def _remove(folders: list[Path]) -> None:
        for folder in folders:
            shutil.rmtree(folder)


class Reading:
    """Has a server read one folder; a ``carrier.Load``."""

    def __init__(self, folder: Path, tag: str) -> None:
        self.folder, self.tag = folder, tag

    async def __call__(self, control: Control) -> None:
        if _tag_of(self.folder / WEIGHTS) != self.tag:  # a server that is sent to a bad folder may not survive it
            raise RunFailed(
                f"{self.folder} no longer holds the weights {self.tag!r}", "the folder as it was written",
                "let nothing else write to rollout.sync_dir, then use --resume",
            )  # fmt: skip
        end, wait_s = monotonic() + SEEN_S, 0.1
        while True:
            said = await control.reload(str(self.folder), self.tag)
            if not said:
                return
            if not said["untouched"]:
                raise Fault("weights", said["error"])
            if monotonic() + wait_s >= end:
                raise Refused(
                    f"{control.endpoint.url} cannot read the new weights: {said['error']}",
                    "the same path on its machine",
                    "set rollout.sync_dir to a folder that trainer and servers share, or rollout.sync = 'gloo'",
                )
            await asyncio.sleep(wait_s)
            wait_s = min(2.0, 2 * wait_s)


def _tag_of(file: Path) -> str | None:
    """The tag in a weight file; None where there is no sound file."""
    try:
        with safe_open(file, "pt") as content:
            return (content.metadata() or {}).get(TAG)
    except (OSError, SafetensorError):
        return None
