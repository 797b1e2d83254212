"""Checkpoints that are either whole or not there, and the choice of the newest sound one.

A checkpoint is a folder ``step-000050``: ``__R_0.distcp``, what rank R wrote of weights, optimiser and random states
(``shards``); ``.metadata``, where each tensor's shards stand; ``trainer.json``; ``manifest.json`` (sha256 and size of
the others). It is written under another name, forced to disk, and renamed by rank 0 once every rank is done. All ranks
see one file system. A save copies to CPU memory and goes on behind training; one is under way at a time.

Not covered: what is in it and when one is due (``session``), writing a model from it (``export``).
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter, Metadata

from scope_opd.errors import RunFailed
from scope_opd.train.shards import DISK_ERRORS, Part, Shards, check_file, file_facts, force_to_disk, part_file, reason

_NAME = re.compile(r"step-(\d{6,})$")
_TEMPORARY = ".writing-"
_POLL_S = 0.05
TRAINER, MANIFEST, METADATA = "trainer.json", "manifest.json", ".metadata"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A sound checkpoint: ``trainer`` is what ``Checkpoints.save`` was given, ``world`` the ranks that wrote it."""

    path: Path
    step: int
    world: int
    trainer: dict[str, Any]


class DamagedCheckpoint(Exception):
    """Why a checkpoint folder cannot be used; ``newest_sound`` reports it and goes on to the one before."""


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every finished checkpoint under ``root``, oldest first; sound or not."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


class Checkpoints:
    """The checkpoints of a run, on rank 0.

    Args:
        root: their folder.
        shards: this rank's, whose jobs every rank has registered.
        keep_last: how many of the newest are kept.
    """

    def __init__(self, root: Path, shards: Shards, *, keep_last: int) -> None:
        self.root, self.keep_last = root, keep_last
        self.shards, self._ranks = shards, shards.ranks
        self._under_way: _Save | None = None

    def save(self, step: int, trainer: dict[str, Any], rng: dict[str, Tensor], *, keep: Collection[int] = ()) -> None:
        """Copy the run's state and begin to write ``root/step-<step>``; ``settle`` tells how it went.

        Args:
            step: of this boundary.
            trainer: anything that JSON holds.
            rng: this rank's random states at the boundary.
            keep: steps whose checkpoints are kept besides the last.

        Raises:
            RunFailed: the folder could not be made.
        """
        assert self._under_way is None, "one save at a time"
        text = json.dumps(trainer, allow_nan=False, indent=1)
        final = self.root / checkpoint_name(step)
        temporary = self.root / f"{_TEMPORARY}{final.name}"
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            _remove(temporary)
            temporary.mkdir()
        except OSError as error:
            raise _failed(final, reason(error)) from error
        world = self._ranks.world
        plans = self._ranks.everywhere("save/plan", [rng, *[None] * (world - 1)])
        planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        plans, metadata = planner.create_global_plan(plans)
        plans = FileSystemWriter(temporary).prepare_global_plan(plans)
        self._ranks.everywhere("save/copy", [(temporary, plan) for plan in plans])
        self._under_way = _Save(self, step, text, metadata, frozenset(keep))

    def settle(self, *, wait: bool) -> Path | None:
        """The checkpoint that was under way, once it is there; None while it is not, and when none was begun.

        Args:
            wait: until it is there.

        Raises:
            RunFailed: it could not be written (a full disk ...). What was written of it is removed; those before it are
                intact.
        """
        save, world = self._under_way, self._ranks.world
        while save is not None and not save.done:
            if world > 1:
                failures = self._ranks.everywhere("save/failed", [False] * world)
                broken = [f"rank {rank}: {line}" for rank, line in enumerate(failures) if line is not None]
                if broken:
                    self._ranks.everywhere("save/failed", [True] * world)
                    save.give_up(broken[0])
            if not wait:
                break
            save.join(_POLL_S if world > 1 else None)
        if save is None or not save.done:
            return None
        if world > 1:
            self._ranks.everywhere("save/failed", [True] * world)
        self._under_way = None
        return save.result()

    def abandon(self) -> None:
        """Wait for what this rank writes, and for no other: one of them may be gone."""
        if self._under_way is not None:
            self._under_way.give_up("the run has ended")
            self._under_way.join()
            self._under_way = None

    def newest_sound(self, report: Callable[[str], None]) -> Checkpoint | None:
        """As the function ``newest_sound``, every rank reading its share of the files."""

        def check(path: Path, files: dict[str, Any]) -> list[str | None]:
            every = [(path / name, facts) for name, facts in files.items()]
            world = self._ranks.world
            answers = self._ranks.everywhere("check", [every[rank::world] for rank in range(world)])
            return [answer for share in answers for answer in share]

        return newest_sound(self.root, report, check)

    def load(self, found: Checkpoint) -> None:
        """Bring weights, optimiser and random states of every rank back.

        Raises:
            ValueError: it is of another model or optimiser.
        """
        self._ranks.everywhere("load", [found.path] * self._ranks.world)


class _Save:
    """A save under way: a thread of rank 0 writes this rank's part, waits for the others', and makes it count."""

    def __init__(self, store: Checkpoints, step: int, trainer: str, metadata: Metadata, keep: frozenset[int]) -> None:
        self._store, self._step, self._trainer, self._metadata, self._keep = store, step, trainer, metadata, keep
        self._final = store.root / checkpoint_name(step)
        self._temporary = store.root / f"{_TEMPORARY}{self._final.name}"
        self._error: BaseException | None = None
        self._given_up = threading.Event()
        self._why = ""
        self._thread = threading.Thread(target=self._run, name="scope-checkpoint", daemon=True)
        self._thread.start()

    @property
    def done(self) -> bool:
        return not self._thread.is_alive()

    def join(self, seconds: float | None = None) -> None:
        self._thread.join(seconds)

    def give_up(self, why: str) -> None:
        """Wait no longer for the parts of other ranks."""
        self._why = why
        self._given_up.set()

    def result(self) -> Path:
        """Raises what went wrong."""
        if self._error is not None:
            raise self._error
        return self._final

    def _run(self) -> None:
        try:
            self._commit([self._store.shards.write(), *map(self._part, range(1, self._store.shards.ranks.world))])
        except DISK_ERRORS as error:
            self._error = _failed(self._final, reason(error))
        except BaseException as error:
            self._error = error
        if self._error is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _part(self, rank: int) -> Part:
        """Another rank's part, once it is on the disk."""
        file = part_file(self._temporary, rank)
        while not file.exists():
            if self._given_up.wait(_POLL_S):
                raise _failed(self._final, self._why)
        part = pickle.loads(file.read_bytes())
        assert isinstance(part, Part)
        file.unlink()
        return part

    def _commit(self, parts: list[Part]) -> None:
        folder, root = self._temporary, self._store.root
        FileSystemWriter(folder).finish(self._metadata, [part.results for part in parts])
        (folder / TRAINER).write_text(self._trainer, encoding="utf-8")
        files = {name: facts for part in parts for name, facts in part.files.items()}
        files |= {name: file_facts(folder / name) for name in (METADATA, TRAINER)}
        manifest = {"step": self._step, "world": len(parts), "files": files}
        (folder / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        force_to_disk([folder / METADATA, folder / TRAINER, folder / MANIFEST, folder])
        _remove(self._final)
        folder.rename(self._final)
        force_to_disk([root])
        for step, path in list_checkpoints(root)[: -self._store.keep_last]:
            if step not in self._keep:
                _remove(path)


def newest_sound(
    root: Path,
    report: Callable[[str], None],
    check: Callable[[Path, dict[str, Any]], list[str | None]] | None = None,
) -> Checkpoint | None:
    """The newest checkpoint that can be trusted; None when there is none, and then nothing is touched.

    Args:
        root: the folder of checkpoints.
        report: called with one line for every damaged one that is newer. Where an older one is used they are renamed
            ``damaged-step-...``, so that they count neither as the newest nor among those kept.
        check: as for ``read_checkpoint``.
    """
    damaged: list[tuple[Path, DamagedCheckpoint]] = []
    found = None
    for _, path in reversed(list_checkpoints(root)):
        try:
            found = read_checkpoint(path, check)
            break
        except DamagedCheckpoint as damage:
            damaged.append((path, damage))
    for path, why in damaged:
        told = f"checkpoint {path.name} is damaged ({why})"
        if found is not None:
            aside = path.with_name(f"damaged-{path.name}")
            _remove(aside)
            path.rename(aside)
            told += f"; moved to {aside.name}, the one before is used"
        report(told)
    if found is not None or not damaged:
        for leftover in root.glob(f"{_TEMPORARY}*"):
            _remove(leftover)
    return found


def read_checkpoint(path: Path, check: Callable[[Path, dict[str, Any]], list[str | None]] | None = None) -> Checkpoint:
    """Check a checkpoint against its manifest, and read all but its tensors.

    Args:
        path: its folder.
        check: (folder, ``file_facts`` by name) -> what is wrong with each file; None: look here.

    Raises:
        DamagedCheckpoint: a file is missing, truncated, altered or unreadable.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        files = manifest["files"]
        wrong = check(path, files) if check else [check_file(path / name, facts) for name, facts in files.items()]
        if found := [line for line in wrong if line is not None]:
            raise DamagedCheckpoint(found[0])
        missing = {METADATA, TRAINER} - files.keys()
        if missing:
            raise DamagedCheckpoint(f"manifest.json does not list {min(missing)}")
        trainer = json.loads((path / TRAINER).read_text(encoding="utf-8"))
        return Checkpoint(path=path, step=manifest["step"], world=manifest["world"], trainer=trainer)
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DamagedCheckpoint(f"{type(error).__name__}: {reason(error)}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an empty one where there is none to be read."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _failed(final: Path, why: str) -> RunFailed:
    return RunFailed(
        f"checkpoint {final} could not be written: {why}",
        "room for it on the disk",
        "free some space and continue with --resume; the checkpoints before it are intact",
    )


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)
