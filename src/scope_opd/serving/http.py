"""One HTTP client in a thread of its own, with its own event loop.

Each training step runs an event loop of its own, and an HTTP client belongs to one loop: so the client lives in a
background thread, and callers of any loop (or none) hand it coroutines. ``close`` leaves no task, thread or socket;
at interpreter exit it is called for whoever forgot. Not covered: which endpoint to ask (``pool``).
"""

from __future__ import annotations

import asyncio
import atexit
import json
import ssl
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, contextmanager
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import httpx

from scope_opd.errors import ConfigError
from scope_opd.serving.faults import BadAnswer, Fault
from scope_opd.serving.secrets import BearerAuth, Secret

Answer = TypeVar("Answer")
PARSE_APART = 1 << 16
"""Answers of more bytes are parsed in another thread, so that the event loop goes on serving the others meanwhile."""

KEEP_ALIVE_S = 3.0
"""We close idle connections before servers do (5 s is usual): theirs would look like a fault."""


class LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=name, daemon=True)
        self._thread.start()
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def submit(self, coroutine: Coroutine[Any, Any, Answer]) -> Future[Answer]:
        """Start a coroutine in the thread; cancelling the future cancels it."""
        assert not self._closed, "the client is closed"
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def run(self, coroutine: Coroutine[Any, Any, Answer]) -> Answer:
        """The same, and wait for it (not from within the thread)."""
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def tasks(self) -> int:
        """Tasks that are not done."""
        return 0 if self._closed else sum(not task.done() for task in asyncio.all_tasks(self._loop))

    def close(self, last: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        """Cancel what runs, wait for it, run ``last``, end loop and thread. May be called twice."""
        if self._closed:
            return
        self._closed = True

        async def end() -> None:
            others = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            if last is not None:
                await last()
            await self._loop.shutdown_asyncgens()

        try:
            asyncio.run_coroutine_threadsafe(end(), self._loop).result(timeout=30)
        finally:
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(timeout=30)
            self._loop.close()


class HttpClient:
    """Sends single requests and turns what can go wrong into ``Fault``s. All coroutines run in ``thread``.

    Args:
        thread: where it lives.
        connect_timeout_s: for a connection to open.
        read_timeout_s: for a whole answer of ``ask``, from sending to its last byte.
        ca_bundle: PEM file of certificate authorities for https; None: those of the certifi package.
        connections: at most, together.

    Environment variables are not read for proxies, and no redirect is followed: a key goes where the config says.

    Raises:
        ConfigError: the bundle cannot be used.
    """

    def __init__(
        self,
        thread: LoopThread,
        *,
        connect_timeout_s: float,
        read_timeout_s: float,
        ca_bundle: str | None = None,
        connections: int = 256,
    ) -> None:
        self.thread, self.read_timeout_s = thread, read_timeout_s
        verify: ssl.SSLContext | bool = True
        if ca_bundle is not None:
            try:
                verify = ssl.create_default_context(cafile=ca_bundle)
            except (OSError, ssl.SSLError) as error:
                reason = getattr(error, "strerror", None) or "not a PEM file of certificates"
                raise ConfigError(f"ca_bundle {ca_bundle!r}: {reason}", "a PEM file", "check its path") from None
        self._client = httpx.AsyncClient(
            verify=verify,
            trust_env=False,
            follow_redirects=False,
            timeout=httpx.Timeout(read_timeout_s, connect=connect_timeout_s, pool=None),
            limits=httpx.Limits(
                max_connections=connections, max_keepalive_connections=connections, keepalive_expiry=KEEP_ALIVE_S
            ),
        )
        self._opened: WeakKeyDictionary[Any, float] = WeakKeyDictionary()
        self._parsers = ThreadPoolExecutor(max_workers=1, thread_name_prefix="scope-parse")
        atexit.register(self.close)

    async def ask(
        self,
        method: str,
        url: str,
        *,
        key: Secret | None,
        body: dict[str, Any] | None = None,
        max_bytes: int,
        total_s: float | None = None,
    ) -> tuple[int, httpx.Headers, bytes, float]:
        """One request. Returns status, headers, body, and when at the latest its connection was opened.

        Args:
            total_s: for all of it; None: ``read_timeout_s``.

        Raises:
            Fault: no complete answer: connection, timeout, or more than ``max_bytes``.
        """
        total_s = self.read_timeout_s if total_s is None else total_s
        late = f"no whole answer in {total_s:g} s"
        # httpx has a limit for each read; a server that drips bytes is stopped by this one.
        with _as_faults(late, late):
            async with asyncio.timeout(total_s), self._send(method, url, key, body, total_s) as response:
                opened_at = self._opened_at(response)
                return response.status_code, response.headers, await _all_of(response, max_bytes), opened_at

    async def stream(
        self,
        url: str,
        *,
        key: Secret | None,
        body: dict[str, Any],
        take: Callable[[bytes], None],
        max_bytes: int,
        idle_s: float,
        total_s: float,
    ) -> tuple[int, httpx.Headers, bytes, float]:
        """A POST that is answered event by event (server-sent events up to "[DONE]").

        Args:
            take: gets the data of each event but the last, as it comes, in this client's loop.
            max_bytes: of the whole answer.
            idle_s: between two reads.
            total_s: for all of it.

        Returns:
            As ``ask`` does; the body is that of an answer other than 200, and empty where events came.

        Raises:
            Fault: the events ended before "[DONE]", or as for ``ask``, or ``take`` raised it.
        """
        idle, late = f"nothing came for {idle_s:g} s", f"no whole answer in {total_s:g} s"
        with _as_faults(idle, late):
            async with asyncio.timeout(total_s), self._send("POST", url, key, body, idle_s) as response:
                opened_at = self._opened_at(response)
                if response.status_code != 200:
                    return response.status_code, response.headers, await _all_of(response, max_bytes), opened_at
                kind = response.headers.get("Content-Type", "")
                if not kind.startswith("text/event-stream"):
                    raise BadAnswer(f"{kind[:40] or 'no content type'} in place of a stream of events")
                events, ended = Events(), False
                async for part in _bounded(response, max_bytes):
                    for event in events.feed(part):
                        if ended:
                            raise BadAnswer("an event behind the last")
                        if event == b"[DONE]":
                            ended = True
                        else:
                            take(event)
                if not ended:
                    raise Fault("connection", "the stream broke off")
                return response.status_code, response.headers, b"", opened_at

    def _send(
        self, method: str, url: str, key: Secret | None, body: dict[str, Any] | None, read_s: float | None = None
    ) -> AbstractAsyncContextManager[httpx.Response]:
        content = None if body is None else json.dumps(body, separators=(",", ":")).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        auth = None if key is None else BearerAuth(key)
        timeout = self._client.timeout
        if read_s is not None:
            timeout = httpx.Timeout(read_s, connect=timeout.connect, pool=None)
        return self._client.stream(method, url, content=content, headers=headers, auth=auth, timeout=timeout)

    def _opened_at(self, response: httpx.Response) -> float:
        stream, now = response.extensions.get("network_stream"), monotonic()
        return now if stream is None else self._opened.setdefault(stream, now)

    async def parse(self, parser: Callable[[bytes], Answer], body: bytes) -> Answer:
        """Run a parser on a body, apart from the event loop where the body is large."""
        if len(body) < PARSE_APART:
            return parser(body)
        return await asyncio.get_running_loop().run_in_executor(self._parsers, parser, body)

    def close(self) -> None:
        atexit.unregister(self.close)
        self.thread.close(self._client.aclose)
        self._parsers.shutdown(wait=True, cancel_futures=True)


class Events:
    """Cuts a stream of bytes into the data of server-sent events, as the bytes come."""

    def __init__(self) -> None:
        self._rest = b""
        self._data: list[bytes] = []

    def feed(self, part: bytes) -> list[bytes]:
        """The events that end in this part. Comments and other fields are passed over."""
        *lines, self._rest = (self._rest + part).split(b"\n")
        found = []
        for line in lines:
            line = line.removesuffix(b"\r")
            if line.startswith(b"data:"):
                self._data.append(line[5:].removeprefix(b" "))
            elif not line and self._data:
                found.append(b"\n".join(self._data))
                self._data = []
        return found


@contextmanager
def _as_faults(idle: str, late: str) -> Iterator[None]:
    """What goes wrong below is a ``Fault``: ``idle`` where a read took too long, ``late`` where all of it did."""
    try:
        yield
    except TimeoutError:
        raise Fault("timeout", late) from None
    except httpx.ConnectTimeout:
        raise Fault("connection", "no connection in time") from None
    except httpx.TimeoutException:
        raise Fault("timeout", idle) from None
    except httpx.DecodingError:
        raise BadAnswer("its compression is broken") from None
    except (httpx.TransportError, ssl.SSLError, OSError) as error:
        raise Fault("connection", " ".join(str(error).split())[:120] or type(error).__name__) from None


async def _bounded(response: httpx.Response, max_bytes: int) -> AsyncIterator[bytes]:
    size = 0
    async for part in response.aiter_bytes():
        size += len(part)
        if size > max_bytes:
            raise BadAnswer(f"more than {max_bytes} bytes")
        yield part


async def _all_of(response: httpx.Response, max_bytes: int) -> bytes:
    return b"".join([part async for part in _bounded(response, max_bytes)])


def monotonic() -> float:
    """Seconds on a clock that only goes forward."""
    return time.monotonic()
