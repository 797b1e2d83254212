"""Ctrl-C and SIGTERM during a run: leave at once where nothing is half done, else at the end of what is.

The first signal raises ``Interrupted`` in the main thread, or, inside ``shielded()``, at the end of that section. A
second signal ends the process on the spot. Outside the main thread (where Python delivers no signals) nothing is
installed: whoever runs a run there asks it to stop with ``request``, which it heeds at its next ``poll``.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from scope_opd.errors import ScopeError


class Interrupted(KeyboardInterrupt):
    """A first SIGINT or SIGTERM. A KeyboardInterrupt, because asyncio lets only that (and SystemExit) pass through."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class RunInterrupted(ScopeError):
    """The run was interrupted and saved. ``exit_code`` is 128 + the signal's number: 130 (SIGINT) or 143 (SIGTERM)."""

    def __init__(self, number: int, step: int, folder: str) -> None:
        self.exit_code = 128 + number
        super().__init__(f"{signal.Signals(number).name} after {step} steps", "", f"continue {folder} with --resume")


_open: list[Signals] = []


def request(number: int) -> bool:
    """Have the run of this process stop as a signal's arrival would; from any thread.

    Returns:
        False where no run is under way (yet): nothing was asked then.
    """
    for signals in _open:
        signals.ask(number)
    return bool(_open)


class Signals:
    """Turns SIGINT and SIGTERM into ``Interrupted``, never inside a ``shielded()`` section.

    Use as a context manager around the run; the former handlers come back at its end.
    """

    def __init__(self) -> None:
        self._shields = 0
        self._received: int | None = None
        self._raised = False
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._handle)
        _open.append(self)
        return self

    def __exit__(self, *_: object) -> None:
        _open.remove(self)
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None:
            os._exit(128 + number)
        self._received = number
        if not self._shields:
            self._raise()

    def ask(self, number: int) -> None:
        """Note a signal that came to another process; ``poll`` and the end of a shielded section heed it."""
        self._received = number if self._received is None else self._received

    def poll(self) -> None:
        """The place where a run outside the main thread stops for what it was asked.

        Raises:
            Interrupted: a signal was asked for, and no shielded section is open.
        """
        if self._received is not None and not self._shields and not self._raised:
            self._raise()

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """A section that a first signal does not cut: it raises ``Interrupted`` when the section is over."""
        self._shields += 1
        try:
            yield
        finally:
            self._shields -= 1
        self.poll()

    def _raise(self) -> None:
        assert self._received is not None
        self._raised = True  # once: what the interruption leads to (saving) has shielded sections of its own
        raise Interrupted(self._received)
