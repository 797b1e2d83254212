"""In-process sampling on several ranks: prompts dealt to all of them, rollouts yielded as they end, wherever they do.

Randomness is counted by prompt, sample and position, so which rank draws a rollout changes nothing beyond rounding.
Not covered: samplers behind servers, which rank 0 asks alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import TypeVar

from scope_opd.ranks import POLL_S, Ranks
from scope_opd.types import Prompt, Rollout, Sampler, SamplingParams

T = TypeVar("T")


class SharedSampler:
    """A sampler on every rank as one; implements ``types.Sampler`` on rank 0.

    Args:
        own: this rank's, of the same weights and settings on every rank.
        ranks: the processes of the run; the other ranks do the job in ``Ranks.follow``.
        name: of the job; each shared sampler has its own.
    """

    def __init__(self, own: Sampler, ranks: Ranks, name: str = "sample") -> None:
        self.own, self.ranks, self.name = own, ranks, name
        ranks.register(name, self._job)

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, step: int, policy_version: int
    ) -> AsyncIterator[Rollout]:
        """As ``LocalSampler.sample``; a rank that fails is a ``RunFailed`` here."""
        mine, *theirs = deal_in_turn(prompts, [len(prompt.token_ids) for prompt in prompts], self.ranks.world)
        with self.ranks.begin(self.name, [(share, params, step, policy_version) for share in theirs]) as work:
            own = self.own.sample(mine, params, step=step, policy_version=policy_version)
            assert isinstance(own, AsyncGenerator)
            async with aclosing(own):
                async for rollout in own:
                    yield rollout
                    for other in work.take()[0]:
                        yield other
            done = False
            while not done:
                found, done = work.take()
                for other in found:
                    yield other
                if not done:
                    await asyncio.sleep(POLL_S)

    def _job(self, share: tuple[Sequence[Prompt], SamplingParams, int, int]) -> None:
        prompts, params, step, policy_version = share

        async def draw() -> None:
            async for rollout in self.own.sample(prompts, params, step=step, policy_version=policy_version):
                self.ranks.tell(rollout)

        self.ranks.run(draw())


def deal_in_turn(items: Sequence[T], sizes: Sequence[int], ranks: int) -> list[list[T]]:
    """By rank: the largest first, in turn, every other time the other way round; as many for each as can be."""
    order = sorted(range(len(items)), key=lambda index: (-sizes[index], index))
    shares: list[list[T]] = [[] for _ in range(ranks)]
    for place, index in enumerate(order):
        turn, rank = divmod(place, ranks)
        shares[rank if turn % 2 == 0 else ranks - 1 - rank].append(items[index])
    return shares
