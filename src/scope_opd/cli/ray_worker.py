"""What each worker of Ray runs, and the desk where workers and driver leave messages for one another.

Ray calls ``one_rank`` in a thread of a worker's process: signals do not reach it, and what it prints goes to a file of
Ray's. Both pass over the desk. Not covered: starting the workers (``ray_launcher``).
"""

from __future__ import annotations

import contextlib
import io
import os
import queue
import threading
import traceback
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from scope_opd.errors import RunFailed, RunFolderError, ScopeError

POLL_S = 0.5
"""How often the driver, and each rank, look at the desk."""


@dataclass
class Desk:
    """Where driver and ranks leave messages for one another: a Ray actor on the driver's node.

    Attributes:
        attempts: by rank, how often it has begun.
        ends: (attempt, rank, exit code, lines) of ranks that ended with a line, in the order in which they did.
        said: (rank, line) of what the ranks print, until the driver takes it.
        signal: number of the signal that asks the run to stop.
    """

    attempts: dict[int, int] = field(default_factory=dict)
    ends: list[tuple[int, int, int, list[str]]] = field(default_factory=list)
    said: list[tuple[int, str]] = field(default_factory=list)
    signal: int | None = None

    def begin(self, rank: int) -> tuple[int, bool]:
        """A rank begins: how often it had before, and whether the run is over for all that.

        It is where rank 0 had come to its end, or to an error that would come again: a rank that died after that (one
        that cannot leave a collective ends its process) is no reason to begin anew.
        """
        before = self.attempts.get(rank, 0)
        self.attempts[rank] = before + 1
        return before, any(rank == 0 and code != RunFailed.exit_code for _, rank, code, _ in self.ends)

    def end(self, rank: int, code: int, lines: list[str]) -> None:
        """A rank ends by itself."""
        self.ends.append((self.attempts[rank], rank, code, lines))

    def exchange(self, rank: int, lines: list[str]) -> int | None:
        """What a rank has printed, for the signal that the driver got."""
        self.said += [(rank, line) for line in lines]
        return self.signal

    def stop(self, number: int) -> None:
        """The driver got a signal."""
        self.signal = number

    def news(self) -> tuple[int, list[tuple[int, str]]]:
        """For the driver: how often the group has begun, and what was printed since it last asked."""
        said, self.said = self.said, []
        return max(self.attempts.values(), default=0), said

    def outcome(self) -> tuple[int, list[str]] | None:
        """Exit code and lines of the last attempt that had any: of the first rank that failed, else of rank 0."""
        last = max((attempt for attempt, _, _, _ in self.ends), default=0)
        ends = [end for end in self.ends if end[0] == last]
        chosen = [end for end in ends if end[2]] or [end for end in ends if end[1] == 0]
        return (chosen[0][2], chosen[0][3]) if chosen else None


def one_rank(values: dict[str, Any], options: dict[str, bool], desk: Any, where: str) -> None:
    """What every worker runs, in a thread of its process.

    Args:
        values: the resolved config.
        options: of ``train_rank``, as the driver was told; a group that starts again resumes whatever there is.
        desk: a handle of the ``Desk``.
        where: the driver's working folder.
    """
    import ray

    from scope_opd.cli.train_command import train_rank
    from scope_opd.config import validate_config

    rank = int(os.environ["RANK"])
    before, over = ray.get(desk.begin.remote(rank))
    if over:
        return
    code, lines = 0, list[str]()
    with _in_touch(desk, rank):
        try:
            try:
                os.chdir(where)
            except OSError as error:
                raise RunFolderError(
                    f"rank {rank} has no folder {where}: {error.strerror}",
                    "the driver's folder on every node",
                    "start in a folder on shared storage",
                ) from None
            if before:
                options = {**options, "resume": True}
            lines = train_rank(validate_config(values), **options)
        except ScopeError as error:
            code, lines = error.exit_code, [str(error)]
        except Exception:
            traceback.print_exc()  # by the desk it is seen where the user looks
            raise
    ray.get(desk.end.remote(rank, code, lines))


@contextlib.contextmanager
def _in_touch(desk: Any, rank: int) -> Iterator[None]:
    """Meanwhile what this process prints goes to the driver, and a signal that came to the driver stops the run."""
    import ray

    from scope_opd.train.signals import request

    lines: queue.SimpleQueue[str] = queue.SimpleQueue()
    over = threading.Event()

    def watch() -> None:
        heeded = False
        with contextlib.suppress(ray.exceptions.RayError):  # without a driver Ray ends this process
            while True:
                last = over.wait(POLL_S)
                number = ray.get(desk.exchange.remote(rank, [lines.get() for _ in range(lines.qsize())]))
                heeded = heeded or (number is not None and request(number))
                if last:
                    return

    thread = threading.Thread(target=watch, name="ray-desk", daemon=True)
    thread.start()
    try:
        with contextlib.redirect_stdout(_Told(lines)), contextlib.redirect_stderr(_Told(lines)):
            yield
    finally:
        over.set()
        thread.join(10)


class _Told(io.TextIOBase):
    """A text stream of which whole lines go to a queue."""

    def __init__(self, lines: queue.SimpleQueue[str]) -> None:
        self._lines, self._open, self._lock = lines, "", threading.Lock()

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        with self._lock:
            *whole, self._open = (self._open + text).split("\n")
        for line in whole:
            self._lines.put(line)
        return len(text)
