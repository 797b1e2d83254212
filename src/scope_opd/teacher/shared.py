"""In-process scoring on several ranks: a step's rollouts dealt to all of them by their tokens.

Which rank scores a rollout changes nothing beyond rounding. Not covered: teachers behind servers, which rank 0 asks
alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from scope_opd.ranks import POLL_S, Ranks
from scope_opd.types import Rollout, Teacher, TeacherScore


class SharedTeacher:
    """A teacher on every rank as one; implements ``types.Teacher`` on rank 0.

    Args:
        own: this rank's, of the same weights and settings on every rank; one that scores a step at once.
        ranks: the processes of the run; the other ranks do the job in ``Ranks.follow``.
    """

    streams: bool = False

    def __init__(self, own: Teacher, ranks: Ranks) -> None:
        assert not own.streams
        self.own, self.ranks = own, ranks
        ranks.register("score", lambda rollouts: ranks.run(own.score(rollouts)))

    async def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScore]:
        """As ``LocalTeacher.score``; a rank that fails is a ``RunFailed`` here."""
        shares = by_tokens(rollouts, self.ranks.world)
        with self.ranks.begin("score", [[rollouts[index] for index in share] for share in shares[1:]]) as work:
            found = {0: await self.own.score([rollouts[index] for index in shares[0]])}
            while not work.take()[1]:
                await asyncio.sleep(POLL_S)
            found |= work.results
        scores = {
            index: score for rank, share in enumerate(shares) for index, score in zip(share, found[rank], strict=True)
        }
        return [scores[index] for index in range(len(rollouts))]


def by_tokens(rollouts: Sequence[Rollout], ranks: int) -> list[list[int]]:
    """Indices by rank: the longest first, each to the rank that has the fewest tokens."""
    sizes = [len(rollout.prompt_token_ids) + len(rollout.token_ids) for rollout in rollouts]
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(sizes)), key=lambda index: (-sizes[index], index)):
        rank = loads.index(min(loads))
        shares[rank].append(index)
        loads[rank] += sizes[index]
    return [sorted(share) for share in shares]
