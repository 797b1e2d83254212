"""Processes that train one student together, and how the first of them has all do something.

Rank 0 leads: it alone reads data, drives rollouts and judging, asks servers, and writes the run folder. Every other
rank ``follow``s: it waits for rank 0 to name a job, does its share, and answers. A job is a function registered under
the same name on every rank; inside it all ranks may use collectives. A world of one calls the function.

Not covered: what the jobs are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

Job = Callable[[Any], Any]


class Ranks:
    """The processes of a run.

    Attributes:
        rank: of this process, 0 <= rank < world.
        world: how many there are.
        local_rank: of this process on its machine: which GPU is its own.
    """

    def __init__(self, rank: int = 0, world: int = 1, local_rank: int = 0) -> None:
        self.rank, self.world, self.local_rank = rank, world, local_rank
        self._jobs: dict[str, Job] = {}

    @property
    def leads(self) -> bool:
        """Whether this is rank 0."""
        return self.rank == 0

    def register(self, name: str, job: Job) -> None:
        """Make ``job`` known under a name; the same name on every rank. A later one replaces an earlier."""
        self._jobs[name] = job

    def everywhere(self, name: str, shares: Sequence[Any]) -> list[Any]:
        """Rank 0 has every rank do a job, each with its share, and gets what each returned, by rank.

        Jobs of different threads wait for one another. Shares and results travel pickled, over the CPU.

        Args:
            name: registered on every rank.
            shares: one a rank.

        Raises:
            Exception: what rank 0's own share raised.
            RunFailed: another rank failed; its line, and which rank it was.
        """
        assert self.leads, f"rank {self.rank} does not lead"
        assert len(shares) == self.world, f"{len(shares)} shares for {self.world} ranks"
        return [self._jobs[name](shares[0])]
