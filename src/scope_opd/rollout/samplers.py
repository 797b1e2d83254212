"""Servers that sample the student: one client thread, one pool, and the proof that each holds the current weights.

A server is used only once it has shown that it holds the weights of the ``Target``: its tag is the target's, and its
log-probs of a fixed text are the trainer's. One that restarted serves the weights it was started with: it is brought
to the target first, and what it was asked meanwhile does not count. Servers that nobody syncs (evaluation of a served
model) have no target; then the model's name is all there is to confirm.

Everything but ``open`` and ``close`` belongs into the thread's loop. Not covered: drawing samples
(``served``), how weights get to a server (``weight_sync``).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from scope_opd.errors import RunFailed
from scope_opd.serving.control import Control
from scope_opd.serving.faults import Fault
from scope_opd.serving.http import HttpClient, LoopThread, monotonic
from scope_opd.serving.pool import Endpoint, Names, Pool, PoolSettings
from scope_opd.serving.route import (
    ClientSettings,
    RouteSettings,
    meet_all,
    raw_logprobs,
    refuse_unprotected,
    reports_sampled_logprobs,
    served_context,
)
from scope_opd.serving.vllm import SampleStream

NAMES = Names(
    "rollout.base_urls", "rollout.model", "rollout.api_key_env", "rollout.allow_unprotected_routes"
)  # fmt: skip
QUIET_S = 0.02
"""What a paused server has sent must be here by then; counted from the last token that came."""


@dataclass(frozen=True, slots=True)
class Target:
    """The weights that every server shall hold; set by the weight sync, all of it runs in the samplers' loop.

    Attributes:
        version: optimiser steps behind them.
        tag: unique in this run's life, what GET /weight_info must answer.
        load: brings one endpoint there (paused, loaded, caches reset, tagged, resumed); raises a ``Fault`` where it
            failed. Called with the endpoint's lock held.
        probe: mean absolute difference of an endpoint's log-probs of a fixed text from the trainer's, nats a token.
        tolerance: the most that ``probe`` may find.
    """

    version: int
    tag: str
    load: Callable[[Endpoint], Awaitable[None]]
    probe: Callable[[Endpoint], Awaitable[float]]
    tolerance: float


@dataclass(slots=True, eq=False)
class Live:
    """One response that is on its way from an endpoint, and which weights its tokens come from."""

    stream: SampleStream
    starts: list[tuple[int, int]]

    def mark(self, version: int) -> None:
        """Tokens from here on are of other weights."""
        place = len(self.stream.token_ids)
        if self.starts[-1][0] == place:
            self.starts.pop()
        if not self.starts or self.starts[-1][1] != version:
            self.starts.append((place, version))

    def spans(self) -> list[list[int]]:
        """``[first token, last token exclusive, version]``, covering the response."""
        length = len(self.stream.token_ids)
        starts = [start for start in self.starts if start[0] < length]
        ends = [place for place, _ in starts[1:]] + [length]
        return [[place, end, version] for (place, version), end in zip(starts, ends, strict=True)]


@dataclass(slots=True, eq=False)
class _Known:
    """What is known of an endpoint besides what its pool knows."""

    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    version: int | None = None
    tag: str | None = None
    context: int | None = None
    honest: bool | None = None
    live: set[Live] = field(default_factory=set)
    told_down: bool = False


class Samplers:
    """The servers of ``[rollout]``. ``close`` ends client and thread; it may be called twice.

    Args:
        route: where and what.
        client: of the HTTP client; ``read_timeout_s`` is how long a stream may be silent (a server that is paused for
            new weights is), ``pool.deadline_s`` how long a response may take.
        pool: patience.
        prompt: a few token ids that the model knows, for requests that only find out how a server answers.
        shown: the servers in a sentence.

    Attributes:
        thread, http, pool: client thread, client, pool.
        target: what every server shall hold; None where nobody syncs them.
    """

    def __init__(
        self,
        route: RouteSettings,
        *,
        client: ClientSettings,
        pool: PoolSettings,
        prompt: Sequence[int],
        shown: str = "the student",
    ) -> None:
        assert prompt, "a prompt needs a token"
        self.target: Target | None = None
        self.shown, self.client = shown, client
        self._prompt = tuple(prompt)
        self._ask_honesty = self._demand_honesty = False
        self.thread = LoopThread("scope-samplers")
        try:
            self.http = HttpClient(
                self.thread,
                connect_timeout_s=client.connect_timeout_s,
                read_timeout_s=client.read_timeout_s,
                ca_bundle=client.ca_bundle,
                connections=(pool.max_concurrency + 4) * len(route.urls),
            )
        except BaseException:
            self.thread.close()
            raise
        self.pool = Pool(self.http, route.endpoints(), pool, self.confirm)
        self._known = {endpoint: _Known() for endpoint in self.pool.endpoints}

    @property
    def endpoints(self) -> list[Endpoint]:
        return self.pool.endpoints

    @property
    def context(self) -> int | None:
        """Tokens, prompt and response together, that every server takes; None where none tells."""
        told = [known.context for known in self._known.values() if known.context is not None]
        return min(told, default=None)

    def open(self) -> list[str]:
        """Meet every server; returns a line for each that is down.

        Raises:
            ConfigError: a setting is wrong, or no server answers.
        """

        async def meet(endpoint: Endpoint) -> None:
            if not self.client.allow_unprotected:
                await refuse_unprotected(self.pool, endpoint)
            await self.confirm(endpoint)

        down = self.thread.run(meet_all(self.pool, meet, self.client.start_s, self.shown))
        return [f"{self.shown}: {line}; it is asked again later" for line in down]

    def close(self) -> None:
        self.http.close()

    # --- which weights -----------------------------------------------------------------------------------------------

    async def confirm(self, endpoint: Endpoint) -> None:
        """Have an endpoint show that it is what it should be; bring it to the target where it is not.

        Raises:
            Fault: it could not be asked, or not be brought there this time.
            RunFailed: it holds other weights than it was given, or other log-probs than those that sample.
            Refused: a setting is wrong.
        """
        known = self._known[endpoint]
        async with known.lock:
            known.context = await served_context(self.pool, endpoint)
            if endpoint.state == "probing":
                known.honest = None
            target = self.target
            if target is not None:
                await self._confirm_weights(endpoint, target)
            if self._ask_honesty and known.honest is None:
                await self._learn_honesty(endpoint)

    async def _confirm_weights(self, endpoint: Endpoint, target: Target) -> None:
        known = self._known[endpoint]
        tag = await Control(self.http, endpoint).weight_version()
        if tag == known.tag != target.tag and endpoint.state == "up":
            return  # it holds what it was given; the sync that set the target is about to come here
        if known.version != target.version or tag != target.tag:
            known.honest = None
            await target.load(endpoint)
            known.version, known.tag, endpoint.renewed_at = target.version, target.tag, monotonic()
        await self.prove(endpoint, target)

    async def prove(self, endpoint: Endpoint, target: Target) -> None:
        """Have an endpoint that was given the target's weights show that it serves them. Its lock is held.

        Raises:
            Fault: it could not be asked.
            RunFailed: its tag is another, or its log-probs are.
        """
        if (tag := await Control(self.http, endpoint).weight_version()) != target.tag:
            raise RunFailed(
                f"{endpoint.url} says it holds the weights {tag!r} after it was given {target.tag!r}",
                "the weights it was given", "see that no other run syncs the same server, then use --resume",
            )  # fmt: skip
        gap = await target.probe(endpoint)
        if gap > target.tolerance:
            gap = await target.probe(endpoint)  # once more: a single answer may be a single mistake
        if not gap <= target.tolerance:
            raise RunFailed(
                f"{endpoint.url} does not serve the trainer's weights: after the sync to version {target.version} the "
                f"log-probs of a fixed text differ by {gap:.3g} a token in the mean",
                f"at most {target.tolerance:g} (rollout.sync_tolerance)",
                "see docs/serving.md (weights of the sampler), then continue with --resume",
            )

    def lock(self, endpoint: Endpoint) -> asyncio.Lock:
        """Held by whoever changes an endpoint's weights or asks what they are. The sync sets ``target`` first, then
        takes this for as long as it brings the endpoint there; it must not call ``confirm`` meanwhile."""
        return self._known[endpoint].lock

    def in_flight(self, endpoint: Endpoint) -> int:
        """Responses that are on their way from there."""
        return len(self._known[endpoint].live)

    async def mark(self, endpoint: Endpoint, version: int) -> None:
        """What the endpoint samples from now on is of other weights. Called while it is paused, before it resumes.

        Tokens that it sampled before are waited for: until nothing has come for ``QUIET_S``.
        """
        known = self._known[endpoint]
        count = -1
        while known.live and (now := sum(len(live.stream.token_ids) for live in known.live)) != count:
            count = now
            await asyncio.sleep(QUIET_S)
        for live in known.live:
            live.mark(version)
        known.version, known.tag = version, None if self.target is None else self.target.tag

    def forget(self, endpoint: Endpoint) -> None:
        """What it holds, and whether it is paused, is not known: ``confirm`` will bring it to the target."""
        self._known[endpoint].version = None

    def version(self, endpoint: Endpoint) -> int | None:
        """Optimiser steps behind the weights that it holds, as far as the sync has said."""
        return self._known[endpoint].version

    @contextmanager
    def watch(self, endpoint: Endpoint, stream: SampleStream, version: int) -> Iterator[Live]:
        """Follow a response on its way.

        Args:
            endpoint: where it comes from.
            stream: where it arrives.
            version: of weights that nobody syncs.
        """
        known = self._known[endpoint]
        live = Live(stream, [(0, version if known.version is None else known.version)])
        known.live.add(live)
        try:
            yield live
        finally:
            known.live.discard(live)

    # --- how they answer ---------------------------------------------------------------------------------------------

    async def learn_honesty(self, *, demand: bool) -> None:
        """Find out, of every server that is up now or from now on, whether its log-probs are those that sample.

        Args:
            demand: refuse those whose log-probs are not.

        Raises:
            RunFailed: one was refused.
        """
        self._ask_honesty, self._demand_honesty = True, demand
        for endpoint in self.endpoints:
            if endpoint.state == "up" and self._known[endpoint].honest is not True:
                try:
                    await self._learn_honesty(endpoint)
                except Fault:
                    continue  # it is asked again in ``confirm``, before an answer of its counts

    async def _learn_honesty(self, endpoint: Endpoint) -> None:
        honest = await reports_sampled_logprobs(self.pool, endpoint, self._prompt)
        self._known[endpoint].honest = honest
        if self._demand_honesty and not honest:
            raise raw_logprobs(endpoint)

    def honest(self, endpoint: Endpoint) -> bool:
        """Whether its log-probs are known to be those of the distribution that sampled."""
        return self._known[endpoint].honest is True

    def changes(self) -> list[str]:
        """A line for each server that went down, or came back, since this was last asked."""
        lines = []
        for endpoint, known in self._known.items():
            if endpoint.state == "down" and not known.told_down:
                lines.append(f"sampling server {endpoint.url} is down ({endpoint.last_error}); the others go on")
            elif endpoint.state == "up" and known.told_down:
                lines.append(f"sampling server {endpoint.url} is back, with the current weights")
            else:
                continue
            known.told_down = not known.told_down
        return lines
