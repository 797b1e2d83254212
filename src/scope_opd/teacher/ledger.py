"""teacher.jsonl: what was asked of which server, and what it took. One line a score, one a fingerprint.

Lines are appended as things happen and are never taken back: a step that a resumed run does again is in it twice. No
key and no text is in it. Not covered: the scores themselves (rollouts.jsonl has those of the logged rollouts).
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

from scope_opd.errors import RunFailed
from scope_opd.records import cut_torn_line, dumps, iter_jsonl


class Ledger:
    """Appends to a file that is opened by ``open``: before that, rows wait. Any thread may add.

    A run folder must be empty when its run takes hold of it, and servers are asked before that.

    Args:
        path: the file; None keeps nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._waiting: list[str] = []
        self._stream: FileIO | None = None
        self._lock = threading.Lock()

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row, or keep it until the file is open.

        Raises:
            RunFailed: the disk takes no more.
        """
        if self._path is not None:
            with self._lock:
                self._waiting.append(f"{dumps(row)}\n")
                self._flush()

    def open(self) -> None:
        """From here on rows are written as they come. May be called again.

        Raises:
            RunFailed: the file cannot be written.
        """
        if self._path is None or self._stream is not None:
            return
        with self._lock:
            try:
                cut_torn_line(self._path)
                self._stream = self._path.open("ab", buffering=0)
            except OSError as error:
                raise self._failed(error) from None
            self._flush()

    def close(self) -> None:
        with self._lock:
            if self._stream is not None:
                self._stream.close()
            self._path, self._stream = None, None

    def _flush(self) -> None:
        if self._stream is None or not self._waiting:
            return
        rest = memoryview("".join(self._waiting).encode())
        self._waiting.clear()
        try:
            while rest:
                rest = rest[self._stream.write(rest) :]
        except OSError as error:
            raise self._failed(error) from None

    def _failed(self, error: OSError) -> RunFailed:
        return RunFailed(
            f"{self._path} could not be written: {error.strerror}", "room for it on the disk",
            "free some space and continue with --resume",
        )  # fmt: skip


def first_fingerprints(path: Path) -> dict[tuple[str, str], list[float]]:
    """(route, token hash) -> the first fingerprint of it that the ledger of an earlier sitting holds.

    Raises:
        RunFailed: the file cannot be read.
        DataError: a line of it is no JSON.
    """
    found: dict[tuple[str, str], list[float]] = {}
    if path.exists():
        try:
            cut_torn_line(path)
        except OSError as error:
            raise RunFailed(f"{path}: {error.strerror}", "a file that can be read and written", "mend it") from None
        for _, row in iter_jsonl(path):
            if isinstance(row.get("fingerprint"), list):
                found.setdefault((str(row.get("route")), str(row.get("token_hash"))), row["fingerprint"])
    return found
