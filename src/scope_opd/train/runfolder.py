"""The run folder: who may use it, what is in it, and how its line files are taken back to a checkpoint.

Only one process at a time writes a run folder (a lock that dies with the process). Every file but the JSONL ones is
replaced atomically. A write that fails (a full disk) ends the run with one line, never with a half-told one: on
``--resume`` the line files are cut to where the checkpoint left them.
"""

from __future__ import annotations

import json
import os
import platform
import secrets
import shutil
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from io import FileIO
from pathlib import Path
from typing import IO, Any

import tomli_w

from scope_opd import __version__
from scope_opd.config import Config
from scope_opd.errors import RunFailed, RunFolderError
from scope_opd.locks import hold
from scope_opd.records import dumps, iter_jsonl

PHASES = ("sync", "generation", "scoring", "forward_backward", "optimiser", "evaluation", "saving", "done")
LINE_FILES = ("metrics", "rollouts", "eval", "events", "timeline")


class RunFolder:
    """An open run folder. Use ``open``; ``close`` releases it.

    Attributes:
        path: the folder.
        info: what run.json holds.
    """

    def __init__(self, path: Path, lock: IO[str]) -> None:
        self.path = path
        self.info: dict[str, Any] = {}
        self._lock = lock
        self._streams: dict[str, FileIO] = {}
        self._status: tuple[int, str] | None = None

    @classmethod
    def open(cls, path: str | Path, *, resume: bool) -> RunFolder:
        """Take hold of a folder: a new or empty one, or, with ``resume``, one that holds a run.

        Raises:
            RunFolderError: occupied, in use by another process, not a run folder, or not writable.
        """
        folder = Path(path)
        try:
            present = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
            present = [name for name in present if name != ".lock"]
            if present and not resume:
                raise RunFolderError(
                    f"run folder {folder} is not empty ({', '.join(present[:3])} ...)",
                    "a new or empty folder",
                    "continue that run with --resume, or choose another run.dir",
                )
            if present and not {"config.toml", "run.json"} & set(present):
                raise RunFolderError(
                    f"{folder} holds no run ({', '.join(present[:3])} ...)",
                    "a folder with config.toml and run.json",
                    "check run.dir",
                )
            folder.mkdir(parents=True, exist_ok=True)
            lock = hold(folder / ".lock", f"run folder {folder}", "one process a run")
        except OSError as error:
            raise RunFolderError(
                f"run folder {folder}: {error.strerror}", "a folder that can be written", "choose another run.dir"
            ) from None
        return cls(folder, lock)

    def begin(self, config: Config, info: Mapping[str, Any], *, run_id: str | None = None) -> None:
        """Write config.toml and run.json. A run that goes on keeps its ``run_id`` and ``created``."""
        former = self._read_info()
        self.info = {
            "run_id": run_id or former.get("run_id") or secrets.token_hex(4),
            "scope_version": __version__,
            "created": former.get("created") or datetime.now(UTC).isoformat(timespec="seconds"),
            "python": platform.python_version(),
            **info,
        }
        self.write("config.toml", tomli_w.dumps(_without_none(config.model_dump(mode="json"))))
        self.write("run.json", json.dumps(self.info, indent=1, ensure_ascii=False))

    def note(self, **entries: Any) -> None:
        """Add to run.json, or replace in it."""
        self.info |= entries
        self.write("run.json", json.dumps(self.info, indent=1, ensure_ascii=False))

    def write(self, name: str, text: str) -> None:
        """Replace a small file atomically."""
        target = self.path / name
        temporary = target.with_name(f".{target.name}.new")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(target)
        except OSError as error:
            raise self._failed(name, error) from error

    def phase(self, step: int, phase: str) -> None:
        """Say in status.json what is going on; ``phase`` is one of ``PHASES``."""
        if self._status != (step, phase):
            self._status = (step, phase)
            self.write("status.json", json.dumps({"step": step, "phase": phase, "pid": os.getpid()}))

    def event(self, step: int, kind: str, message: str, **more: Any) -> None:
        self.append("events", [{"step": step, "kind": kind, "message": message, **more}])

    def append(self, name: str, rows: Iterable[Mapping[str, Any] | str]) -> None:
        """Append rows (objects, or finished JSON lines) to ``<name>.jsonl``; on return they are with the system."""
        lines = [row if isinstance(row, str) else dumps(row) for row in rows]
        if not lines:
            return
        try:
            stream = self._stream(name)
            rest = memoryview("".join(line + "\n" for line in lines).encode())
            while rest:
                rest = rest[stream.write(rest) :]
        except OSError as error:
            raise self._failed(f"{name}.jsonl", error) from error

    def offsets(self) -> dict[str, int]:
        """Bytes of each line file, forced to disk first, so that a checkpoint never points past what is there."""
        sizes = {}
        try:
            for name in LINE_FILES:
                stream = self._stream(name)
                os.fsync(stream.fileno())
                sizes[name] = os.fstat(stream.fileno()).st_size
        except OSError as error:
            raise self._failed("line files", error) from error
        return sizes

    def cut(self, offsets: Mapping[str, int]) -> None:
        """Take the line files back to a checkpoint's offsets (all to nothing for ``{}``).

        Raises:
            RunFolderError: a file is shorter than the checkpoint says.
        """
        for name in LINE_FILES:
            path = self.path / f"{name}.jsonl"
            size, wanted = path.stat().st_size if path.exists() else 0, offsets.get(name, 0)
            if size < wanted:
                raise RunFolderError(
                    f"{path} has {size} bytes", f"at least {wanted}, as the checkpoint says", "restore the file"
                )
            if size > wanted:
                os.truncate(path, wanted)

    def rows(self, name: str) -> list[dict[str, Any]]:
        """All rows of ``<name>.jsonl``."""
        path = self.path / f"{name}.jsonl"
        return [row for _, row in iter_jsonl(path)] if path.exists() else []

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()
        self._streams.clear()
        self._lock.close()

    def _stream(self, name: str) -> FileIO:
        """Unbuffered: what a full disk refused must not come up again when the file is closed."""
        if name not in self._streams:
            self._streams[name] = (self.path / f"{name}.jsonl").open("ab", buffering=0)
        return self._streams[name]

    def _read_info(self) -> dict[str, Any]:
        try:
            info = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}
        return info if isinstance(info, dict) else {}

    def _failed(self, name: str, error: OSError) -> RunFailed:
        return RunFailed(
            f"{self.path / name} could not be written: {error.strerror}",
            "room for it on the disk",
            "free some space and continue with --resume",
        )


def replace_folder(new: Path, target: Path) -> None:
    """Put a finished folder in another's place."""
    if target.exists():
        shutil.rmtree(target)
    new.rename(target)


def _without_none(value: Any) -> Any:
    """TOML has no null, so a key that is None is left out.

    It reads back as None, for None is the default of every key that may hold it (a switch that is on by default is
    turned off by a word, as ``train.grad_clip = "off"``).
    """
    if isinstance(value, dict):
        return {key: _without_none(item) for key, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_none(item) for item in value]
    return value
