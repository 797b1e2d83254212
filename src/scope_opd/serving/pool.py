"""Several endpoints that serve the same model: who is asked, how often, and when one is left alone.

A request goes to the endpoint with the fewest outstanding tokens. A try that fails is made again, elsewhere where that
is possible, with exponential backoff and full jitter, until the deadline and at least ``min_tries`` times; it is given
up earlier only if no endpoint lets anything through when the deadline is over.

An endpoint whose connection breaks, or that fails several times in a row, is *down*: nothing is sent there until a
probe (half-open) shows that the same model answers again. And whoever sits at the other end of a new connection may be
somebody else than before, even if nothing broke: an answer counts only once a probe has succeeded that began after its
connection was opened.

Everything here runs in the client's event loop. Not covered: what is asked (``vllm``), what a probe compares.
"""

from __future__ import annotations

import asyncio
import math
import random
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Generic, Literal, TypeVar

from scope_opd.addresses import BaseUrl
from scope_opd.errors import ScopeError
from scope_opd.serving.faults import RETRIED_STATUS, BadAnswer, Fault, Refused, RowRefused, Unanswered, retry_after_s
from scope_opd.serving.http import HttpClient, monotonic
from scope_opd.serving.secrets import Secret, redact
from scope_opd.serving.vllm import error_message

Answer = TypeVar("Answer")
ROW_STATUS = frozenset({400, 413, 422})
"""Statuses that may be about this one request."""


@dataclass(frozen=True, slots=True)
class PoolSettings:
    """How patient a pool is.

    Attributes:
        deadline_s: a request is tried again until so long after it was first let in.
        min_tries: and at least so often.
        max_concurrency: requests under way at one endpoint.
        backoff_s, backoff_max_s: bounds of the waits between tries: uniform in [0, min(max, backoff_s * 2^tries)].
        failures_to_open: failures in a row after which an endpoint is down.
        down_s, down_max_s: the same bounds for the waits between probes.
    """

    deadline_s: float = 600.0
    min_tries: int = 6
    max_concurrency: int = 32
    backoff_s: float = 0.25
    backoff_max_s: float = 15.0
    failures_to_open: int = 5
    down_s: float = 0.5
    down_max_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Names:
    """What the user calls the settings, for errors."""

    url: str = "teacher.base_urls"
    model: str = "teacher.model"
    key: str = "teacher.api_key_env"
    unprotected: str = "teacher.allow_unprotected_routes (--allow-unprotected-routes)"


@dataclass(slots=True, eq=False)
class Endpoint:
    """One server and what is known of it.

    ``renewed_at``: when a probe last had to make the endpoint what it should be (other weights were loaded): what it
    was asked before then does not count.
    """

    url: BaseUrl
    model: str
    key: Secret | None = None
    names: Names = field(default_factory=Names)
    state: Literal["up", "down", "probing"] = "up"
    in_flight: int = 0
    outstanding: int = 0
    failures: int = 0
    opens: int = 0
    retry_at: float = 0.0
    quiet_until: float = 0.0
    broke_at: float = -math.inf
    checking: bool = False
    timed_out: bool = False
    last_error: str = ""
    verified_at: float = -math.inf
    renewed_at: float = -math.inf
    answered: int = 0
    told_down: bool = False


@dataclass(frozen=True, slots=True)
class News:
    """A server went down (a probe or several requests in a row failed), or came back.

    Attributes:
        reason: why it is down.
        alone: no other server is up meanwhile.
    """

    endpoint: Endpoint
    up: bool
    reason: str = ""
    alone: bool = False

    def line(self, kind: str, back: str = "") -> str:
        """A sentence.

        Args:
            kind: of server, such as "teacher".
            back: what to add about one that is back.
        """
        if self.up:
            return f"{kind} server {self.endpoint.url} is back{back}"
        rest = "it is waited for" if self.alone else "the others go on"
        return f"{kind} server {self.endpoint.url} is down ({self.reason}); {rest}"


@dataclass(frozen=True, slots=True)
class Reply(Generic[Answer]):
    """What one endpoint said, and when (at the latest) the connection was opened that it came over."""

    value: Answer
    opened_at: float


@dataclass(frozen=True, slots=True)
class Done(Generic[Answer]):
    """An answer and what it took.

    Attributes:
        latency_s: of the try that succeeded.
        faults: kind -> how often, of the tries that did not.
    """

    value: Answer
    endpoint: Endpoint
    tries: int
    latency_s: float
    faults: Counter[str]


class Pool:
    """Endpoints that serve one model.

    Args:
        client: sends the requests.
        endpoints: at least one.
        settings: patience.
        probe: asks an endpoint for something known. A ``Fault`` keeps the endpoint down; any other error ends the
            pool: every call raises it from then on.

    Attributes:
        fatal: the error that ended the pool, if any.
    """

    def __init__(
        self,
        client: HttpClient,
        endpoints: Sequence[Endpoint],
        settings: PoolSettings,
        probe: Callable[[Endpoint], Awaitable[None]],
    ) -> None:
        assert endpoints, "a pool needs an endpoint"
        self.client, self.endpoints, self.settings, self._probe = client, list(endpoints), settings, probe
        self.fatal: ScopeError | None = None
        self._admission = asyncio.Semaphore(settings.max_concurrency * len(endpoints))
        self._changed = asyncio.Event()
        self._probes: set[asyncio.Task[None]] = set()
        self._news: deque[News] = deque()
        self._random = random.Random()  # waits alone depend on it, never a result

    async def call(self, tokens: int, ask: Callable[[Endpoint], Awaitable[Reply[Answer]]]) -> Done[Answer]:
        """Ask one endpoint after another until one gives an answer that counts.

        Args:
            tokens: what the request weighs, for the choice of the endpoint.
            ask: one try at one endpoint.

        Raises:
            Unanswered: none did before the deadline.
            RowRefused: this request is beyond the server.
            ScopeError: a setting is wrong, or the pool has ended.
        """
        faults: Counter[str] = Counter()
        tries, last, avoid = 0, "no endpoint is up", None
        async with self._admission:
            deadline = monotonic() + self.settings.deadline_s
            while True:
                endpoint = await self._acquire(tokens, deadline, avoid)
                if endpoint is None:
                    raise Unanswered(tries, faults, last)
                began = monotonic()
                tries += 1
                try:
                    reply = await ask(endpoint)
                    latency = monotonic() - began
                except Fault as fault:
                    self._failed(endpoint, fault, began)
                    faults[fault.kind] += 1
                    last = f"{endpoint.url}: {fault.message}"
                    reply = None
                finally:
                    self._release(endpoint, tokens)
                if reply is not None:
                    if await self._counts(endpoint, reply.opened_at) and began > endpoint.renewed_at:
                        return Done(reply.value, endpoint, tries, latency, faults)
                    faults["restart"] += 1
                    last = f"{endpoint.url}: it broke off before it was clear who had answered"
                avoid = endpoint
                now = monotonic()
                if now >= deadline and tries >= self.settings.min_tries:
                    raise Unanswered(tries, faults, last)
                await asyncio.sleep(min(self._wait(tries, self.settings.backoff_s, self.settings.backoff_max_s),
                                        max(deadline - now, self.settings.backoff_s)))  # fmt: skip

    async def exchange(
        self,
        endpoint: Endpoint,
        path: str,
        parser: Callable[[bytes], Answer],
        *,
        body: dict[str, Any] | None = None,
        max_bytes: int = 1 << 24,
    ) -> Reply[Answer]:
        """One request to one endpoint: GET, or POST where there is a body.

        Raises:
            Fault: to be tried again.
            RowRefused: a 400 on a POST.
            Refused: a setting is wrong.
        """
        method = "GET" if body is None else "POST"
        status, headers, content, opened_at = await self.client.ask(
            method, f"{endpoint.url}{path}", key=endpoint.key, body=body, max_bytes=max_bytes
        )
        if status == 200:
            try:
                return Reply(await self.client.parse(parser, content), opened_at)
            except BadAnswer as error:  # it quotes what the server wrote
                raise BadAnswer(redact(error.message, [endpoint.key])) from None
        raise _failure(endpoint, status, headers, content, posted=body is not None)

    async def stream(
        self,
        endpoint: Endpoint,
        path: str,
        take: Callable[[bytes], None],
        *,
        body: dict[str, Any],
        max_bytes: int,
        idle_s: float,
        total_s: float,
    ) -> float:
        """One POST to one endpoint that is answered event by event; see ``HttpClient.stream``.

        Returns:
            When at the latest its connection was opened.

        Raises:
            Fault, RowRefused, Refused: as ``exchange`` does, and whatever ``take`` raised.
        """
        try:
            status, headers, content, opened_at = await self.client.stream(
                f"{endpoint.url}{path}", key=endpoint.key, body=body, take=take, max_bytes=max_bytes,
                idle_s=idle_s, total_s=total_s,
            )  # fmt: skip
        except BadAnswer as error:
            raise BadAnswer(redact(error.message, [endpoint.key])) from None
        if status != 200:
            raise _failure(endpoint, status, headers, content, posted=True)
        return opened_at

    async def probe_all(self, *, wait: bool) -> None:
        """Have every endpoint prove itself anew: no answer counts before a probe that begins now.

        Args:
            wait: until each that is up has passed one, or has failed ``min_tries`` in a row.

        Raises:
            ScopeError: the pool has ended.
        """
        now = monotonic()
        unproven = [endpoint for endpoint in self.endpoints if endpoint.state == "up"]
        for endpoint in self.endpoints:
            endpoint.verified_at = -math.inf
        failed: Counter[int] = Counter()
        while self.fatal is None:
            unproven = [e for e in unproven if e.verified_at < now and failed[id(e)] < self.settings.min_tries]
            # Whoever did not answer in all of a read timeout is not waited for again.
            unproven = [e for e in unproven if not (failed[id(e)] and e.timed_out)]
            for endpoint in unproven:
                if not endpoint.checking:
                    failed[id(endpoint)] += 1
                    self._start_probe(endpoint)
            if not (wait and unproven):
                return
            await self._sleep(None)
        raise self.fatal

    def news(self) -> list[News]:
        """What has not been told yet, in order. May be called from any thread."""
        return [self._news.popleft() for _ in range(len(self._news))]

    # --- who is asked ------------------------------------------------------------------------------------------------

    async def _acquire(self, tokens: int, deadline: float, avoid: Endpoint | None) -> Endpoint | None:
        """The least loaded endpoint that is up, as soon as there is one; None if the deadline is over and none is."""
        while True:
            if self.fatal is not None:
                raise self.fatal
            now = monotonic()
            for endpoint in self.endpoints:
                if endpoint.state == "down" and endpoint.retry_at <= now:
                    self._start_probe(endpoint)
            willing = [e for e in self.endpoints if e.state == "up" and e.quiet_until <= now]
            free = [e for e in willing if e.in_flight < self.settings.max_concurrency]
            if free:
                chosen = min([e for e in free if e is not avoid] or free, key=lambda e: (e.outstanding, e.in_flight))
                chosen.in_flight += 1
                chosen.outstanding += tokens
                return chosen
            if now >= deadline and not willing and not any(e.state == "probing" for e in self.endpoints):
                return None
            times = [e.retry_at for e in self.endpoints if e.state == "down"]
            times += [e.quiet_until for e in self.endpoints if e.state == "up"]
            times += [deadline]
            ahead = [time - now for time in times if time > now]
            await self._sleep(min(ahead, default=None))

    def _release(self, endpoint: Endpoint, tokens: int) -> None:
        endpoint.in_flight -= 1
        endpoint.outstanding -= tokens
        self._notify()

    async def _counts(self, endpoint: Endpoint, opened_at: float) -> bool:
        """Whether an answer may be used: once a probe has succeeded that began after its connection was opened."""
        while endpoint.verified_at <= opened_at:
            if self.fatal is not None:
                raise self.fatal
            if endpoint.state == "down" and endpoint.retry_at > monotonic():
                return False
            self._start_probe(endpoint)
            await self._sleep(None)
        if self.fatal is not None:
            raise self.fatal
        endpoint.failures = 0
        endpoint.answered += 1
        return True

    # --- up and down -------------------------------------------------------------------------------------------------

    def _failed(self, endpoint: Endpoint, fault: Fault, began: float) -> None:
        now = monotonic()
        endpoint.last_error = fault.message
        if fault.retry_after_s is not None:
            endpoint.quiet_until = max(endpoint.quiet_until, now + fault.retry_after_s)
            return
        if fault.broke_connection:
            # One event broke several connections: it is counted once.
            if began <= max(endpoint.broke_at, endpoint.renewed_at):
                return
            endpoint.broke_at = now
            if endpoint.state == "up":
                endpoint.state, endpoint.retry_at = "down", now  # to be probed at once
        else:
            endpoint.failures += 1
            if endpoint.failures >= self.settings.failures_to_open and endpoint.state == "up":
                self.take_down(endpoint)
        self._notify()

    def take_down(self, endpoint: Endpoint) -> None:
        """Send nothing there for a while; then a probe decides."""
        endpoint.state, endpoint.failures = "down", 0
        endpoint.opens += 1
        if not endpoint.told_down:
            endpoint.told_down = True
            alone = not any(each.state == "up" for each in self.endpoints)
            self._news.append(News(endpoint, False, endpoint.last_error, alone))
        endpoint.retry_at = monotonic() + self._wait(endpoint.opens, self.settings.down_s, self.settings.down_max_s)

    def _start_probe(self, endpoint: Endpoint) -> None:
        """Probe an endpoint; one that is down is half-open meanwhile, one that is up goes on being used."""
        if endpoint.checking:
            return
        endpoint.checking = True
        if endpoint.state == "down":
            endpoint.state = "probing"
        task = asyncio.get_running_loop().create_task(self._check(endpoint))
        self._probes.add(task)
        task.add_done_callback(self._probes.discard)

    async def _check(self, endpoint: Endpoint) -> None:
        began, endpoint.timed_out = monotonic(), False
        try:
            await self._probe(endpoint)
        except Fault as fault:
            endpoint.timed_out, endpoint.last_error = fault.kind == "timeout", fault.message
            if endpoint.state == "probing" or fault.broke_connection:
                self.take_down(endpoint)
            else:
                self._failed(endpoint, fault, began)
            if fault.retry_after_s is not None:
                endpoint.retry_at = max(endpoint.retry_at, monotonic() + fault.retry_after_s)
            await asyncio.sleep(self._wait(1, self.settings.backoff_s, self.settings.backoff_max_s))
        except ScopeError as error:
            endpoint.state = "down"
            self.fatal = self.fatal or error
        else:
            if endpoint.broke_at < began or endpoint.state == "probing":
                endpoint.state, endpoint.failures, endpoint.opens = "up", 0, 0
                endpoint.verified_at = began
                if endpoint.told_down:
                    endpoint.told_down = False
                    self._news.append(News(endpoint, True))
        finally:
            if endpoint.state == "probing":  # cancelled
                endpoint.state = "down"
            endpoint.checking = False
            self._notify()

    # --- time --------------------------------------------------------------------------------------------------------

    def _wait(self, tries: int, base_s: float, max_s: float) -> float:
        """Full jitter: uniform between 0 and an exponentially growing bound."""
        return self._random.random() * min(max_s, base_s * 2.0 ** min(tries, 30))

    def _notify(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _sleep(self, seconds: float | None) -> None:
        """Until something changes, at most so long."""
        changed = self._changed
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await changed.wait()


def _failure(endpoint: Endpoint, status: int, headers: Any, content: bytes, *, posted: bool) -> Exception:
    """What an answer other than 200 means."""
    message = redact(error_message(content), [endpoint.key])
    if status in RETRIED_STATUS or status >= 500:
        return Fault(f"status {status}", message, retry_after_s=retry_after_s(headers.get("Retry-After")))
    if status in ROW_STATUS and posted:
        return RowRefused(
            f"{endpoint.url} answers {status}: {message}", foreign_token="out of vocabulary" in message.lower()
        )
    return _refused(endpoint, status, message)


def _refused(endpoint: Endpoint, status: int, message: str) -> Refused:
    names, said = endpoint.names, f" ({message})" if message else ""
    found = f"{endpoint.url} answers {status}{said}"
    if status in (401, 403):
        given = "its key is not accepted there" if endpoint.key is not None else "no key was sent"
        return Refused(f"{found}; {given}", "the server's key", f"set {names.key} to the variable that holds it")
    if status == 404:
        return Refused(
            found, f"the completions API there, with the model {endpoint.model!r} of {names.model}",
            f"check {names.model} and the path in {names.url}",
        )  # fmt: skip
    if 300 <= status < 400:
        return Refused(found, "no redirect", f"give the final address in {names.url}")
    return Refused(found, "an OpenAI-style completions API as vLLM serves it", f"check {names.url} and {names.model}")
