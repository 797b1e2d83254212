"""An evaluation's folder: settings.json, samples.jsonl as samples end, results.json at the end, run.json about the run.

What makes an evaluation that was broken off end as one that was not:

- The settings are written first. The same folder with other settings is refused, naming the first that differs, unless
  it holds no sample yet: a try that ended at a wrong address or key binds nobody.
- A sample is a line of samples.jsonl, with the system as soon as it is judged. A last line that was cut off is dropped.
- Samples are drawn in fixed batches. A batch whose samples are all there is never drawn again; what is there of any
  other is dropped, and the whole batch is drawn as it would have been.
- results.json is a function of settings and samples, in the order of the problems. Times, versions and the machine
  stand in run.json alone.

Not covered: what is in the lines (``session``), files on a machine that loses power (a line is handed to the system,
not forced to the disk).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from io import FileIO
from pathlib import Path
from typing import IO, Any

from scope_opd.errors import RunFailed, RunFolderError
from scope_opd.locks import hold
from scope_opd.records import dumps, iter_jsonl

SAMPLES, SETTINGS, RESULTS, RUN = "samples.jsonl", "settings.json", "results.json", "run.json"
Key = tuple[str, str, int]
"""Benchmark, problem, sample."""


class SampleStore:
    """An open folder. Use ``open``; ``close`` releases it.

    Attributes:
        path: the folder.
        samples: what is there by key, in the order of the file, without the texts (gigabytes, in a long evaluation).
    """

    def __init__(self, path: Path, lock: IO[str]) -> None:
        self.path = path
        self.samples: dict[Key, dict[str, Any]] = {}
        self._lock = lock
        self._stream: FileIO | None = None

    @classmethod
    def open(cls, path: str | Path, settings: Mapping[str, Any]) -> SampleStore:
        """Take hold of a folder: a new or empty one, or one that was begun with the same settings.

        Raises:
            RunFolderError: in use, not writable, holding something else, or begun with other settings.
        """
        folder = Path(path)
        try:
            present = sorted(entry.name for entry in folder.iterdir()) if folder.exists() else []
            present = [name for name in present if not name.startswith(".")]
            if present and SETTINGS not in present:
                raise RunFolderError(
                    f"folder {folder} holds no evaluation ({', '.join(present[:3])} ...)",
                    "a new or empty folder, or one that scope eval began",
                    "choose another --out",
                )
            folder.mkdir(parents=True, exist_ok=True)
            lock = hold(folder / ".lock", f"folder {folder}", "one process a folder")
        except OSError as error:
            raise RunFolderError(
                f"folder {folder}: {error.strerror}", "a folder that can be written", "choose another --out"
            ) from None
        store = cls(folder, lock)
        try:
            store._begin(settings)
        except BaseException:
            store.close()
            raise
        return store

    def keep(self, wanted: Iterable[Collection[Key]]) -> None:
        """Keep the samples of batches that are whole, drop those of all others.

        Args:
            wanted: the keys of each batch.
        """
        whole: set[Key] = set()
        for batch in wanted:
            if all(key in self.samples for key in batch):
                whole.update(batch)
        if len(whole) == len(self.samples):
            return
        self.samples = {key: row for key, row in self.samples.items() if key in whole}
        path, temporary = self.path / SAMPLES, self.path / f".{SAMPLES}.new"
        try:
            with path.open("rb") as lines, temporary.open("wb") as kept:
                kept.writelines(line for line in lines if _key(json.loads(line)) in whole)
            temporary.replace(path)
        except OSError as error:
            raise self._failed(SAMPLES, error) from error

    def append(self, key: Key, row: Mapping[str, Any]) -> None:
        """Add a sample; on return its line is with the system."""
        line = {"benchmark": key[0], "problem": key[1], "sample": key[2], **row}
        try:
            if self._stream is None:
                # Unbuffered: what a full disk refused must not come up again when the file is closed.
                self._stream = (self.path / SAMPLES).open("ab", buffering=0)
            rest = memoryview((dumps(line) + "\n").encode())
            while rest:
                rest = rest[self._stream.write(rest) :]
        except OSError as error:
            raise self._failed(SAMPLES, error) from error
        self.samples[key] = _without_text(line)

    def write(self, name: str, text: str) -> None:
        """Replace a file atomically."""
        target = self.path / name
        temporary = target.with_name(f".{target.name}.new")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(target)
        except OSError as error:
            raise self._failed(name, error) from error

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Strict JSON, indented, keys in the order given."""
        self.write(name, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")

    def close(self) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        self._lock.close()

    def _begin(self, settings: Mapping[str, Any]) -> None:
        wanted = json.loads(dumps(dict(settings)))
        path = self.path / SETTINGS
        if not path.exists():
            self.write_json(SETTINGS, wanted)
            return
        try:
            former = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise RunFolderError(f"{path}: {error}", "the settings of an evaluation", "choose another --out") from None
        self._read()
        if (found := first_difference(former, wanted)) is not None:
            if not self.samples and not (self.path / RESULTS).exists():
                self.write_json(SETTINGS, wanted)
                return
            name, old, new = found
            raise RunFolderError(
                f"{self.path} was begun with {name} = {_shown(old)}, and now {name} = {_shown(new)}",
                "the same settings",
                "give them, or choose another --out",
            )

    def _read(self) -> None:
        path = self.path / SAMPLES
        if not path.exists():
            return
        try:
            with path.open("rb+") as stream:
                stream.seek(0, 2)
                size = stream.tell()
                end = _end_of_last_line(stream, size)
                if end < size:
                    stream.truncate(end)
        except OSError as error:
            raise self._failed(SAMPLES, error) from error
        for number, row in iter_jsonl(path):
            try:
                self.samples[_key(row)] = _without_text(row)
            except (KeyError, TypeError, ValueError):
                raise RunFolderError(
                    f"{path} line {number} is no sample", "benchmark, problem and sample", "choose another --out"
                ) from None

    def _failed(self, name: str, error: OSError) -> RunFailed:
        return RunFailed(
            f"{self.path / name}: {error.strerror}",
            "a file that can be written, and room for it on the disk",
            "free some space, then give the same command again: it goes on where it stopped",
        )


def differences(a: Any, b: Any, name: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Every place at which two JSON values differ, as (dotted name, a's, b's)."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(key for key in b if key not in a)]:
            yield from differences(a.get(key), b.get(key), f"{name}.{key}" if name else key)
    elif a != b or type(a) is not type(b):
        yield name, a, b


def first_difference(a: Any, b: Any, name: str = "") -> tuple[str, Any, Any] | None:
    """The first of ``differences``; None where two values are equal."""
    return next(differences(a, b, name), None)


def _key(row: Mapping[str, Any]) -> Key:
    return str(row["benchmark"]), str(row["problem"]), int(row["sample"])


def _without_text(row: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name != "text"}


def _end_of_last_line(stream: IO[bytes], size: int) -> int:
    """The offset behind the last line end; 0 without one."""
    position, block = size, 1 << 16
    while position > 0:
        start = max(0, position - block)
        stream.seek(start)
        found = stream.read(position - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        position = start
    return 0


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else text[:77] + "..."
