"""What ranks do together: jobs that rank 0 has all do or the others begin, and what one tells all.

Not covered: how they hear one another and end (``bond``).
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import TYPE_CHECKING, Any

from scope_opd.errors import RunFailed, ScopeError
from scope_opd.ranks.bond import Bond, Work
from scope_opd.wires import Wire, ending_of, open_wires

if TYPE_CHECKING:
    from torch import Tensor

Job = Callable[[Any], Any]

POLL_S = 0.005
"""How often whoever waits in an event loop looks for what other ranks told."""
_CHECK_S = 0.1
"""How often a job in an event loop looks whether it was called off."""


class Ranks(Bond):
    """The processes of a run; a context manager around all that they do together.

    Its attributes are those of ``Bond`` and one more.

    Attributes:
        shield: entered by rank 0 around every job with collectives, so that no signal of the user's cuts it.
    """

    def __init__(
        self, rank: int = 0, world: int = 1, local_rank: int = 0, wires: dict[int, Wire] | None = None
    ) -> None:
        super().__init__(rank, world, local_rank, wires)
        self.shield: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._group: Any = None
        self._jobs: dict[str, Job] = {}
        self._turn = threading.Lock()
        self._number = 0

    @staticmethod
    def from_environment(timeout_s: float, *, cuda: bool = False) -> Ranks:
        """The ranks that torchrun, or whoever sets the same variables, has started.

        RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT are read; without them it is a world of one. A process
        group that is there already (Ray's) is used as it is.

        Args:
            timeout_s: limit of each collective, and of the ranks' finding one another.
            cuda: whether the ranks compute on GPUs.

        Raises:
            ScopeError: the variables are not whole, or the other ranks were not found.
        """
        world, rank, local = (_integer(name) for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK"))
        if world is None or world == 1:
            return Ranks()
        if rank is None or local is None or not 0 <= rank < world:
            raise ScopeError(
                f"WORLD_SIZE={world}, RANK={rank}, LOCAL_RANK={local} in the environment",
                "a RANK below WORLD_SIZE, and a LOCAL_RANK",
                "start the ranks with torchrun",
            )
        wires, group = open_wires(rank, world, timeout_s, cuda=cuda)
        ranks = Ranks(rank, world, local, wires)
        ranks._group = group
        return ranks

    def register(self, name: str, job: Job) -> None:
        """Make ``job`` known under a name; the same name on every rank. A later one replaces an earlier."""
        self._jobs[name] = job

    # --- rank 0 ------------------------------------------------------------------------------------------------------

    def everywhere(self, name: str, shares: Sequence[Any]) -> list[Any]:
        """Rank 0 has every rank do a job, each with its share, and gets what each returned, by rank.

        Jobs of different threads wait for one another. Shares and results travel pickled, over the CPU.

        Args:
            name: registered on every rank.
            shares: one a rank.

        Raises:
            Exception: what rank 0's own share raised; the others have been told and have ended.
            RunFailed: another rank failed; its line, and which rank it was.
        """
        assert self.leads, f"rank {self.rank} does not lead"
        assert len(shares) == self.world, f"{len(shares)} shares for {self.world} ranks"
        if self.world == 1:
            return [self._jobs[name](shares[0])]
        with self.shield(), self._turn:
            work = self._start(name, shares[1:])
            try:
                own = self._jobs[name](shares[0])
                with self.state:
                    while not work.done and self.failure is None:
                        self.state.wait()
            except BaseException as error:
                cause = self._cause_of(error)
                if self.failure is not None:
                    raise self._telling() from error
                self._close(ending_of(cause, self.rank))
                if cause is error:
                    raise
                raise cause from error
            finally:
                self._end_work()
            if self.failure is not None:
                raise self._telling()
            return [own, *(work.results[rank] for rank in range(1, self.world))]

    @contextmanager
    def begin(self, name: str, shares: Sequence[Any]) -> Iterator[Work]:
        """A job without collectives on the other ranks, while rank 0 does something of its own in the ``with`` block.

        A block that is left early calls the job off: ``cancelled`` is then true in it.

        Args:
            name: registered on every rank.
            shares: one for each of the other ranks.

        Raises:
            RunFailed: a rank has failed before.
        """
        assert self.leads, f"rank {self.rank} does not lead"
        assert len(shares) == self.world - 1, f"{len(shares)} shares for {self.world - 1} other ranks"
        with self._turn:
            work = self._start(name, shares)
            try:
                yield work
            finally:
                self._end_work()
                if not work.done:
                    self._send(("cancel", work.number))

    def _start(self, name: str, shares: Sequence[Any]) -> Work:
        if self.failure is not None:
            raise self._telling()
        if self._closed:
            raise RunFailed("the other ranks have ended", "all of them", "see the first error")
        self._number += 1
        with self.state:
            self._work = work = Work(self, self._number)
        for wire, share in zip(self._wires.values(), shares, strict=True):
            with suppress(OSError):  # who is gone is missed by the thread that hears it
                wire.send(("job", self._number, name, share))
        return work

    def _end_work(self) -> None:
        """From here on nothing is taken in for the job: what comes late is passed over, and ``done`` stays as it is."""
        with self.state:  # a thread that has just seen this job is handing a part over to it
            self._work = None

    # --- the others --------------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Do what rank 0 asks until it has nothing more.

        Raises:
            RunFailed: rank 0, or another rank, failed; the line says which and why.
            Exception: what a job of this rank raised.
        """
        assert not self.leads, "rank 0 leads"
        while (message := self._next())[0] != "end":
            _, self._number, name, share = message
            try:
                result = self._jobs[name](share)
            except BaseException as error:
                cause = self._cause_of(error)
                if cause is error:
                    raise
                raise cause from error
            self._send(("result", self._number, result))

    def tell(self, value: Any) -> None:
        """From inside a job that rank 0 did ``begin``: a part of the result, to be had before the end."""
        self._send(("part", self._number, value))

    @property
    def cancelled(self) -> bool:
        """Whether rank 0 has called off the job at hand: what it gives will not be looked at."""
        return self._cancelled == self._number

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """From inside a job that rank 0 did ``begin``: run a coroutine to its end, or until the job is called off."""

        async def watched() -> Any:
            task = asyncio.ensure_future(work)
            while not task.done():
                await asyncio.wait([task], timeout=_CHECK_S)
                if self.cancelled:
                    task.cancel()
            return None if task.cancelled() else task.result()

        return asyncio.run(watched())

    # --- all ---------------------------------------------------------------------------------------------------------

    def meet(self, value: Any = None) -> Any:
        """Wait, without a time limit, until every rank has come here; returns rank 0's value on all of them.

        Raises:
            RunFailed: a rank has failed.
        """
        if self.world == 1:
            return value
        if not self.leads:
            self._send(("here", 0, None))
            return self._next()[1]
        with self.state:
            while len(self._here) < self.world - 1 and self.failure is None:
                self.state.wait()
            self._here.clear()
        if self.failure is not None:
            raise self._telling()
        self._send(("go", value))
        return value

    def sum(self, values: Tensor) -> Tensor:
        """Inside a job: the sum over all ranks of a small tensor on the CPU, in place; a collective."""
        if self.world > 1:
            import torch.distributed as dist

            dist.all_reduce(values, group=self._group)
        return values


def _integer(name: str) -> int | None:
    try:
        return int(os.environ[name])
    except (KeyError, ValueError):
        return None
