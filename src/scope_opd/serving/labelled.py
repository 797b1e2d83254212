"""The output of several processes on one terminal: a label and a colour each, and a file each.

Not covered: what a line says; hiding keys (whoever reads the process's output does that).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TextIO

from scope_opd.errors import RunFolderError

OWN = "launch"
"""The label of the launcher's own lines."""
_COLOURS = ("cyan", "green", "magenta", "yellow", "blue", "bright_cyan", "bright_green", "bright_magenta")


class Logs:
    """Lines of several processes, each behind its label, from any thread.

    Args:
        folder: gets a file a process (``sampler-0.log``); earlier lines are kept. It is made where it is not there.
        labels: what the processes are called.
        terminal: where all lines go; coloured where it is one.

    Raises:
        RunFolderError: the files cannot be written.
    """

    def __init__(self, folder: Path, labels: Sequence[str], terminal: TextIO) -> None:
        self.folder = folder
        self._terminal: TextIO | None = terminal
        self._lock = threading.Lock()
        self._prefixes = _prefixes([OWN, *labels], terminal)
        self._files: dict[str, TextIO | None] = {}
        began = datetime.now(UTC).isoformat(timespec="seconds")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for label in [OWN, *labels]:
                stream = self.path(label).open("a", encoding="utf-8", errors="replace")
                self._files[label] = stream
                stream.write(f"--- {began}\n")
                stream.flush()
        except OSError as error:
            self.close()
            found = f"log folder {folder}: {error.strerror}"
            raise RunFolderError(found, "a folder that can be written", "choose another run.dir") from None

    def path(self, label: str) -> Path:
        """The file of a process."""
        return self.folder / f"{label.replace(' ', '-')}.log"

    def of(self, label: str) -> Lines:
        """Where a process's lines go."""
        return Lines(self, label)

    def say(self, line: str) -> None:
        """A line of the launcher itself."""
        self.write(OWN, line)

    def write(self, label: str, line: str) -> None:
        """A line of a process. One that cannot be written is lost, and none is written there again: output that is
        not read would block its process."""
        line = line.rstrip("\n") + "\n"
        with self._lock:
            if self._terminal is not None:
                try:
                    self._terminal.write(self._prefixes[label] + line)
                    self._terminal.flush()
                except (OSError, ValueError):
                    self._terminal = None
            stream = self._files.get(label)
            if stream is not None:
                try:
                    stream.write(line)
                    stream.flush()
                except (OSError, ValueError):
                    self._files[label] = None

    def close(self) -> None:
        """Close the files. May be called twice."""
        with self._lock:
            for stream in self._files.values():
                if stream is not None:
                    stream.close()
            self._files.clear()


class Lines:
    """The lines of one process, as a stream."""

    def __init__(self, logs: Logs, label: str) -> None:
        self._logs, self._label = logs, label

    def write(self, line: str) -> None:
        self._logs.write(self._label, line)

    def flush(self) -> None:
        """Every line is flushed as it is written."""


def _prefixes(labels: Sequence[str], terminal: TextIO) -> dict[str, str]:
    from rich.color import ColorSystem
    from rich.console import Console
    from rich.style import Style

    console = Console(file=terminal)
    coloured = console.is_terminal and console.color_system is not None
    width = max(len(label) for label in labels)
    found = {}
    for number, label in enumerate(labels):
        text = f"{label:<{width}} |"
        style = Style(color=_COLOURS[(number - 1) % len(_COLOURS)]) if number else Style(bold=True)
        found[label] = (style.render(text, color_system=ColorSystem.STANDARD) if coloured else text) + " "
    return found
