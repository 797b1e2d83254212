"""What binds the processes of a run together: how they hear one another, and how all of them end when one does.

On rank 0 a thread listens to each of the others, on each of them one listens to rank 0. Not covered: jobs (``jobs``),
the connections themselves (``wires``).
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

from scope_opd.errors import RunFailed
from scope_opd.wires import Ending, Wire, ending_of, gone

_WAKE = getattr(signal, "SIGRTMIN", signal.SIGUSR2)
"""Sent by rank 0 to its own main thread, so that a blocking call there ends when another rank has failed."""
_OF_COLLECTIVES = ("gloo", "nccl", "connection", "timed out")
"""Words in torch's errors about collectives; they have no class of their own."""
_CAUSE_S = 3.0
"""How long a rank whose collective broke waits to hear whose fault it was."""
_CLOSING_S = 20.0
"""How long rank 0 may take to close its run folder after another rank failed, and all to leave at the end."""


class RankLost(KeyboardInterrupt):
    """Another rank failed. Raised in rank 0's main thread; a KeyboardInterrupt, since asyncio lets that pass through.
    ``Ranks.__exit__`` turns it into the ``RunFailed`` that says why."""


class Work:
    """A job that the other ranks do while rank 0 does something else. Made by ``Ranks.begin``."""

    def __init__(self, ranks: Bond, number: int) -> None:
        self.number = number
        self.results: dict[int, Any] = {}
        self._ranks, self._parts = ranks, list[Any]()

    @property
    def done(self) -> bool:
        """Whether every other rank has given its result."""
        return len(self.results) == self._ranks.world - 1

    def take(self) -> tuple[list[Any], bool]:
        """What the others told since this was last asked, and whether that is all. Does not wait.

        Raises:
            RunFailed: one of them failed.
        """
        with self._ranks.state:
            if self._ranks.failure is not None:
                raise self._ranks.failure
            parts, self._parts = self._parts, []
            return parts, self.done

    def add(self, kind: str, rank: int, value: Any) -> None:
        if kind == "part":
            self._parts.append(value)
        else:
            self.results[rank] = value


class Bond:
    """One of the processes of a run, and its connections to the others; a context manager around all that they do.

    Attributes:
        rank: of this process, 0 <= rank < world.
        world: how many there are.
        local_rank: of this process on its machine: which GPU is its own.
        failure: why another rank ended; None as long as none has.
        state: held by whoever looks at, or changes, what the connections' threads change.
    """

    def __init__(self, rank: int, world: int, local_rank: int, wires: dict[int, Wire] | None) -> None:
        self.rank, self.world, self.local_rank = rank, world, local_rank
        self.failure: RunFailed | None = None
        self.state = threading.Condition()
        self._wires = wires or {}
        self._work: Work | None = None
        self._here: set[int] = set()
        self._closed = False
        self._failing = False
        self._told = False
        self._idle = False
        self._cancelled = -1
        self._inbox: queue.SimpleQueue[tuple[Any, ...]] = queue.SimpleQueue()
        self._former: dict[int, Any] = {}
        self._heeded = False

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def _next(self) -> tuple[Any, ...]:
        """What rank 0 says next. While this rank waits here it can be told of another's end; else that ends it."""
        with self.state:
            self._idle = True
        try:
            message = self._inbox.get()
        finally:
            with self.state:
                self._idle = False
        if message[0] == "end" and message[1] is not None:
            self.failure = message[1].error()
            raise self.failure
        return message

    # --- beginning and end -------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        if self.world > 1:
            self._watch_signals()
            for other, wire in self._wires.items():
                hear = self._hear_follower if self.leads else self._hear_leader
                threading.Thread(target=hear, args=(other, wire), name=f"scope-rank-{other}", daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.world == 1:
            return
        ending = None if error is None else ending_of(error, self.rank)
        if self.failure is None:
            self._close(ending)
            if error is None:
                self._leave()
        failure = self.failure
        self._unwatch_signals()
        for wire in self._wires.values():
            wire.close()
        if failure is not None and error is not failure:
            self._told = True
            raise failure from error

    def _close(self, ending: Ending | None) -> None:
        """This rank is done with the others, or has an error of its own to tell them of."""
        with self.state:
            if self._closed:
                return
            self._closed = True  # what the others say from here on changes nothing
        if self.leads:
            self._send(("end", ending))
        elif ending is not None:
            self._send(("error", 0, ending))

    def _leave(self) -> None:
        """Nobody takes the process group down while another rank may still need it."""
        import torch.distributed as dist

        if self.leads:
            with self.state:
                self.state.wait_for(lambda: len(self._here) == self.world - 1, _CLOSING_S)
        else:
            self._send(("here", 0, None))
        with suppress(Exception):  # all is done: what torch has to say about its sockets changes nothing
            dist.destroy_process_group()

    def _send(self, message: tuple[Any, ...]) -> None:
        for wire in self._wires.values():
            with suppress(OSError):  # who is gone is missed by the thread that hears it
                wire.send(message)

    # --- when a rank fails -------------------------------------------------------------------------------------------

    def _hear_follower(self, other: int, wire: Wire) -> None:
        """On rank 0, a thread for each of the others."""
        while True:
            try:
                kind, number, value = wire.receive()
            except Exception:  # it is gone, or what it says cannot be read: nothing more will be heard of it
                if not self._closed:
                    self._fail(gone(other, wire.who))
                with self.state:
                    self._here.add(other)
                    self.state.notify_all()
                return
            with self.state:
                if kind == "here":
                    self._here.add(other)
                elif kind in ("part", "result") and self._work is not None and self._work.number == number:
                    self._work.add(kind, other, value)
                self.state.notify_all()
            if kind == "error":
                self._fail(value)

    def _fail(self, ending: Ending) -> None:
        """Rank 0 hears that another has failed: it tells the rest, and breaks off whatever it does itself."""
        with self.state:
            if self._failing or self._closed:
                return
            self._failing = True
        self._send(("end", ending))  # before the main thread knows: it may end this process at once
        with self.state:
            self.failure = ending.error()
            self.state.notify_all()
        self._after(_CAUSE_S, self._break_collectives)
        self._after(_CLOSING_S, self._end_here)
        if self._former and not self._told:
            signal.pthread_kill(threading.main_thread().ident or 0, _WAKE)

    def _hear_leader(self, _: int, wire: Wire) -> None:
        """On every other rank, the thread that hears rank 0."""
        while True:
            try:
                message = wire.receive()
            except Exception:  # as for a follower
                message = ("end", gone(0, wire.who))
            if message[0] == "cancel":
                self._cancelled = message[1]
                continue
            over = message[0] == "end"
            with self.state:
                if self._closed:
                    return
                if over and message[1] is not None and not self._idle:
                    self.failure = message[1].error()
                    self._end_here()  # perhaps from within a collective, which nothing else would end
                self._inbox.put(message)
            if over:
                return

    def _cause_of(self, error: BaseException) -> BaseException:
        """A collective that broke is another rank's doing most of the time: wait until that is known, if it ever is."""
        text = " ".join(str(error).split())
        if not isinstance(error, RuntimeError) or not any(word in text.lower() for word in _OF_COLLECTIVES):
            return error
        with self.state:
            self.state.wait_for(lambda: self.failure is not None, _CAUSE_S)
        if "timed out" not in text.lower():
            return error
        return RunFailed(
            f"a rank stood still while others waited for it ({text.rpartition('] ')[2][:200]})",
            "all ranks at work",
            "see what each of them did last; raise train.collective_timeout_s if it was only slow",
        )

    def _telling(self) -> RunFailed:
        assert self.failure is not None
        self._told = True
        return self.failure

    def _break_collectives(self) -> None:
        if self._work is not None:
            import torch.distributed as dist

            with suppress(Exception):
                dist.distributed_c10d._abort_process_group()

    def _end_here(self) -> None:
        """The line of the first error, and the end of this process."""
        assert self.failure is not None
        with suppress(OSError, ValueError):
            print(f"error: {self.failure}", file=sys.stderr, flush=True)
        os._exit(self.failure.exit_code)

    @staticmethod
    def _after(seconds: float, action: Callable[[], None]) -> None:
        def run() -> None:
            time.sleep(seconds)
            action()

        threading.Thread(target=run, name="scope-rank-end", daemon=True).start()

    # --- signals -----------------------------------------------------------------------------------------------------

    def _watch_signals(self) -> None:
        if threading.current_thread() is threading.main_thread():
            handlers: dict[int, Any] = {signal.SIGTERM: self._on_signal}
            if self.leads:
                handlers[_WAKE] = self._on_wake
            else:
                handlers[signal.SIGINT] = self._on_signal
            self._former = {number: signal.signal(number, handler) for number, handler in handlers.items()}

    def _unwatch_signals(self) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        self._former = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self.failure is not None:
            return  # torchrun sends SIGTERM once a rank has ended; this one is about to
        if self.leads:
            raise SystemExit(128 + number)  # before the run folder is open: nothing is to be saved
        if self._heeded:
            os._exit(128 + number)
        self._heeded = True

    def _on_wake(self, number: int, frame: FrameType | None) -> None:
        for other in (signal.SIGTERM, signal.SIGINT):
            signal.signal(other, self._on_signal)  # in the place of a run's own handlers, which would save
        if not self._told:
            self._told = True
            raise RankLost
