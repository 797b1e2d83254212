"""New weights to every server that samples, and the proof that each serves them.

For each server: pause (responses under way stay and go on with the new weights), load, forget all keys and values, say
the version's tag, tell the samplers from which token on responses are of the new version, go on; then its tag is read
back and its log-probs of a fixed text are compared with the trainer's. Servers are served side by side. One that fails
is taken down: its responses are asked for elsewhere, and it is given the weights again before it is used.

Servers on the trainer's own GPU sleep while it steps (``release``): their weights are gone then, and come with the
next ``publish``.

Not covered: how weights travel (``files``, ``native``).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

from scope_opd.errors import RunFailed, ScopeError
from scope_opd.rollout.samplers import Samplers, Target
from scope_opd.rollout.weight_sync.carrier import Carrier, Load
from scope_opd.serving.control import Control
from scope_opd.serving.faults import Fault, Refused, RowRefused
from scope_opd.serving.http import monotonic
from scope_opd.serving.pool import Endpoint
from scope_opd.serving.route import fatal_in_a_run
from scope_opd.serving.vllm import ScoreRequest, parse_score, score_body

PROBE_TOKENS = 64
ASLEEP = "asleep"
"""The tag of a server that sleeps: it holds nothing."""


class Publisher:
    """Brings the student's weights to the samplers' servers; implements ``types.WeightPublisher``.

    Args:
        samplers: open. Not closed here.
        carrier: how weights travel. Closed with the publisher.
        probe: token ids of a fixed text, at least two; the first ``PROBE_TOKENS`` are used.
        logprobs: the trainer's log-probs of tokens 1, 2, ... of those ids, each given the ones before, at temperature
            1, in the precision it trains in. Called in the trainer's thread.
        tolerance: mean absolute difference of the server's from them at most, nats a token.
        colocated: servers are on the trainer's GPU.
        patience_s: while no server can be brought up to date, they are tried again for so long.
        load_s: time limit of one load.
    """

    def __init__(
        self,
        samplers: Samplers,
        carrier: Carrier,
        probe: Sequence[int],
        logprobs: Callable[[Sequence[int]], list[float]],
        *,
        tolerance: float,
        colocated: bool = False,
        patience_s: float = 600.0,
        load_s: float = 600.0,
    ) -> None:
        assert len(probe) >= 2, "a probe needs two tokens"
        self.samplers, self.carrier, self.tolerance, self.colocated = samplers, carrier, tolerance, colocated
        self.gaps: dict[str, float] = {}
        self._probe = ScoreRequest(tuple(probe[:PROBE_TOKENS]), 1)
        self._logprobs, self._patience_s, self._load_s = logprobs, patience_s, load_s
        self._life = secrets.token_hex(4)
        self._published: int | None = None

    def publish(self, version: int) -> dict[str, float]:
        """See ``types.WeightPublisher``. Seconds: "export" (the copy or file), "load", "probe" (of the slowest).

        ``gaps`` then has what the probes found: address -> nats a token.
        """
        if version == self._published:
            return {}
        began = time.perf_counter()
        tag = f"{self._life}/{version}"
        expected = self._logprobs(self._probe.token_ids)
        load = self.carrier.prepare(version, tag)
        exported = time.perf_counter()
        target = Target(
            version, tag,
            load=lambda endpoint: self._bring(endpoint, tag, load, version=None),
            probe=lambda endpoint: self._gap(endpoint, expected),
            tolerance=self.tolerance,
        )  # fmt: skip
        self.gaps.clear()
        try:
            loaded_s, probed_s = self.samplers.thread.run(self._everywhere(target, load))
        except ScopeError as error:
            raise fatal_in_a_run(error) from None
        self._published = version
        return {"export": exported - began, "load": loaded_s, "probe": probed_s}

    def release(self) -> None:
        """See ``types.WeightPublisher``."""
        if not self.colocated or self._published is None:
            return
        self._published = None
        try:
            self.samplers.thread.run(self._all_sleep())
        except ScopeError as error:
            raise fatal_in_a_run(error) from None
        except Fault as fault:
            raise RunFailed(
                f"a server on the trainer's GPU could not be put to sleep: {fault.message}",
                "its memory for the update", "start it with --enable-sleep-mode (scope serve student does)",
            ) from None  # fmt: skip

    def close(self) -> None:
        self.carrier.close()

    # --- in the samplers' loop ---------------------------------------------------------------------------------------

    async def _everywhere(self, target: Target, load: Load) -> tuple[float, float]:
        """Every server that is up; while none can be had, those that are down too."""
        samplers, end, wait_s = self.samplers, monotonic() + self._patience_s, 0.2
        samplers.target = target
        endpoints = [each for each in samplers.endpoints if each.state == "up"]
        while True:
            found = await _all_or_first_error([self._one(each, target, load) for each in endpoints])
            times = [each for each in found if each is not None]
            if times:
                return max(each[0] for each in times), max(each[1] for each in times)
            if monotonic() + wait_s >= end:
                said = "; ".join(f"{each.url}: {each.last_error}" for each in samplers.endpoints)
                raise RunFailed(
                    f"no server of {samplers.shown} could be given the weights of version {target.version}: {said}",
                    "at least one", "see to the servers, then continue with --resume",
                )  # fmt: skip
            await asyncio.sleep(wait_s)
            wait_s, endpoints = min(5.0, 2 * wait_s), samplers.endpoints

    async def _one(self, endpoint: Endpoint, target: Target, load: Load) -> tuple[float, float] | None:
        """One server; None where it failed and was taken down."""
        began = monotonic()
        try:
            async with self.samplers.lock(endpoint):
                await self._bring(endpoint, target.tag, load, version=target.version)
                loaded = monotonic()
                await self.samplers.prove(endpoint, target)
        except Fault as fault:
            endpoint.last_error = fault.message
            self.samplers.pool.take_down(endpoint)
            await self._abandon(endpoint)
            return None
        if endpoint.state == "down":
            endpoint.retry_at = monotonic()  # its pool finds it at once
        return loaded - began, monotonic() - loaded

    async def _bring(self, endpoint: Endpoint, tag: str, load: Load, *, version: int | None) -> None:
        """Give one server the weights. Its lock is held.

        Args:
            version: responses under way go on and are of it from here on; None: they end, nobody counts on them.
        """
        try:
            await self._bring_in_order(endpoint, tag, load, version)
        except BaseException:
            self.samplers.forget(endpoint)  # its tag may be right already, and it still paused
            raise

    async def _bring_in_order(self, endpoint: Endpoint, tag: str, load: Load, version: int | None) -> None:
        control = self._control(endpoint)
        asleep = self.colocated and await control.weight_version() == ASLEEP
        if asleep:
            await control.wake_up("weights")
        elif version is None:
            await control.pause("abort")
        else:
            await control.pause("keep" if self.samplers.in_flight(endpoint) else "wait")
        await load(control)
        if not asleep:
            await control.reset_prefix_cache()
        await control.set_weight_version(tag)
        if version is not None:
            await self.samplers.mark(endpoint, version)
        if asleep:
            await control.wake_up("kv_cache")  # its cache was emptied when it went to sleep; sampling goes on by itself
        await control.resume()

    async def _abandon(self, endpoint: Endpoint) -> None:
        """End what is under way at a server that may hold anything: it is asked for elsewhere."""
        with contextlib.suppress(Fault, ScopeError):  # it is down already; nothing worse can be said of it
            await Control(self.samplers.http, endpoint, load_s=min(5.0, self._load_s)).pause("abort")

    async def _gap(self, endpoint: Endpoint, expected: list[float]) -> float:
        """Mean absolute difference of a server's log-probs of the probe; infinite where it has no finite ones."""
        pool = self.samplers.pool
        try:
            reply = await pool.exchange(
                endpoint, "/completions", lambda body: parse_score(body, self._probe),
                body=score_body(self._probe, endpoint.model),
            )  # fmt: skip
        except RowRefused as error:
            if "float" in str(error):  # vLLM cannot write NaN as JSON and says so with a 400
                return math.inf
            raise Refused(
                f"{error} (asked for the log-probs of {len(expected) + 1} tokens)", "a server of the student",
                f"check that {endpoint.names.url} serves the student",
            ) from None  # fmt: skip
        found = reply.value.logprobs
        gap = sum(abs(a - b) for a, b in zip(found, expected, strict=True)) / len(expected)
        gap = gap if math.isfinite(gap) else math.inf
        self.gaps[str(endpoint.url)] = gap
        return gap

    async def _all_sleep(self) -> None:
        await _all_or_first_error([self._sleep(each) for each in self.samplers.endpoints if each.state == "up"])

    async def _sleep(self, endpoint: Endpoint) -> None:
        control = self._control(endpoint)
        async with self.samplers.lock(endpoint):
            await control.set_weight_version(ASLEEP)
            await control.sleep()

    def _control(self, endpoint: Endpoint) -> Control:
        return Control(self.samplers.http, endpoint, load_s=self._load_s)


async def _all_or_first_error(work: list[Any]) -> list[Any]:
    """Wait for all of it, also where some fails; then raise the first error."""
    found = await asyncio.gather(*work, return_exceptions=True)
    for each in found:
        if isinstance(each, BaseException):
            raise each
    return found
