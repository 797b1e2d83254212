"""A real HTTP server that answers as vLLM does, from a table that a real tiny model filled, and injects faults.

``FaultServer`` speaks HTTP/1.1 over a socket in a thread of its own; a fault is injected below HTTP where it belongs
there (a reset connection, bytes that drip), and every one is counted. Not covered: anything a GPU would be needed for.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import ssl
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from transformers import PreTrainedModel

from scope_opd.types import Rollout

MODEL = "teacher"
VOCABULARY = 320
CONTEXT = 256

# What a client must take for a failure of this try.
FAULTS = (
    "reset_at_once", "reset_mid_body", "closed_mid_body", "slow", "truncated_json", "not_json", "empty", "wrong_length",
    "missing_token", "nan", "infinity", "minus_9999", "positive", "null", "text", "other_request", "no_echo", "no_rows",
    "two_choices", "429", "429_later", "500", "503", "408",
)  # fmt: skip
HARMLESS = ("shuffled", "decoys", "late")
"""What must change nothing."""

Plan = Callable[[], str | None]


class Table:
    """Log-probs of whole sequences by a model, computed once a sequence."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.known: dict[tuple[int, ...], list[float]] = {}

    def logprobs(self, token_ids: Sequence[int]) -> list[float]:
        """Of tokens 1, 2, ... given those before."""
        key = tuple(token_ids)
        if key not in self.known:
            ids = torch.tensor([key])
            with torch.no_grad():
                rows = self.model(input_ids=ids).logits[0].log_softmax(-1)
            self.known[key] = rows[:-1].gather(-1, ids[0, 1:, None])[:, 0].tolist()
        return self.known[key]

    def likeliest(self, token_ids: Sequence[int], k: int) -> list[dict[int, float]]:
        """The k likeliest ids in the places of tokens 1, 2, ..., and the token itself, with their log-probs."""
        with torch.no_grad():
            rows = self.model(input_ids=torch.tensor([tuple(token_ids)])).logits[0, :-1].log_softmax(-1)
        found = []
        for row, token in zip(rows, token_ids[1:], strict=True):
            ids = {*row.topk(k).indices.tolist(), int(token)}
            found.append({index: float(row[index]) for index in ids})
        return found

    def response(self, rollout: Rollout) -> list[float]:
        """What a teacher must say of a rollout."""
        tokens = (*rollout.prompt_token_ids, *rollout.token_ids)
        return self.logprobs(tokens)[len(rollout.prompt_token_ids) - 1 :]


def made_rollouts(count: int, seed: int = 0, longest: int = 30) -> list[Rollout]:
    draw = random.Random(seed)
    rollouts = []
    for index in range(count):
        tokens = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, longest))]
        prompt = [draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 12))]
        rollouts.append(Rollout(f"r{index}", f"p{index}", prompt, tokens, [0.0] * len(tokens)))
    return rollouts


class FaultServer:
    """Use as a context manager; ``url`` is its base address.

    Args:
        table: what the model says; may be replaced while the server runs (other weights under the same name).
        plan: called for each scoring request; the fault to inject, or None.
        key: without it in a request, /v1 answers 401.
        development: /is_sleeping answers anybody.
        port: 0 takes a free one.
    """

    def __init__(
        self,
        table: Table,
        plan: Plan | None = None,
        *,
        key: str | None = None,
        development: bool = False,
        port: int = 0,
        host: str = "127.0.0.1",
        prefix: str = "",
        model: str = MODEL,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self.table, self.plan, self.key, self.development, self.model = table, plan, key, development, model
        self.host, self.port, self.prefix = host, port, prefix
        self.injected: Counter[str] = Counter()
        self.seen: Counter[tuple[int, ...]] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.paths: Counter[str] = Counter()
        self.in_flight = self.most_in_flight = 0
        self.tls = tls
        self.delay_s = 0.0
        self.context, self.max_likeliest = CONTEXT, 64
        self.redirect: str | None = None
        self._loop = asyncio.new_event_loop()
        self._connections: set[asyncio.StreamWriter] = set()
        self._random = random.Random(7)

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'http' if self.tls is None else 'https'}://{host}:{self.port}{self.prefix}/v1"

    def __enter__(self) -> FaultServer:
        ready = threading.Event()

        async def serve() -> None:
            self._server = await asyncio.start_server(self._client, self.host, self.port, ssl=self.tls)
            self.port = self._server.sockets[0].getsockname()[1]
            ready.set()

        self._loop.create_task(serve())
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()
        assert ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def kill(self) -> None:
        """As SIGKILL does: every connection is reset, the port is closed. May be called twice."""
        if self._loop.is_closed():
            return

        async def end() -> None:
            self._server.close()
            for writer in list(self._connections):
                self._reset(writer)
            tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    # --- HTTP --------------------------------------------------------------------------------------------------------

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._connections.add(writer)
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                lines = head.decode("latin-1").split("\r\n")
                method, path, _ = lines[0].split(" ", 2)
                headers = {
                    k.strip().lower(): v.strip() for k, _, v in (line.partition(":") for line in lines[1:] if line)
                }
                body = await reader.readexactly(int(headers.get("content-length", 0)))
                self.in_flight += 1
                self.most_in_flight = max(self.most_in_flight, self.in_flight)
                try:
                    if not await self._answer(method, path, headers, body, writer):
                        return
                finally:
                    self.in_flight -= 1
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(writer)
            with suppress(RuntimeError, OSError):
                writer.close()

    async def _answer(
        self, method: str, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        self.paths[path] += 1
        if self.development and path == f"{self.prefix}/is_sleeping":
            return await self._send(writer, 200, {"is_sleeping": False})
        if not path.startswith(f"{self.prefix}/v1/"):
            return await self._send(writer, 404, {"detail": "Not Found"})
        if self.key is not None and headers.get("authorization") != f"Bearer {self.key}":
            # Some servers repeat what they were given.
            return await self._send(writer, 401, {"error": f"Unauthorized: {headers.get('authorization')}"})
        if self.redirect is not None:
            return await self._send(writer, 302, {}, {"Location": self.redirect})
        if path.endswith("/models"):
            row = {"id": self.model, "object": "model", "max_model_len": self.context}
            return await self._send(writer, 200, {"object": "list", "data": [row]})
        assert method == "POST", "completions are posted"
        request = json.loads(body)
        if request["model"] != self.model:
            return await self._error(writer, 404, f"The model `{request['model']}` does not exist.")
        ids = request["prompt"]
        if len(ids) + 1 > self.context:
            return await self._error(writer, 400, f"This model's maximum context length is {self.context} tokens.")
        if max(ids) >= VOCABULARY:
            return await self._error(writer, 400, f"Token id {max(ids)} is out of vocabulary")
        if request.get("prompt_logprobs", 0) > self.max_likeliest:
            return await self._error(writer, 400, f"Requested prompt logprobs exceed max_logprobs {self.max_likeliest}")
        self.seen[tuple(ids)] += 1
        self.bodies.append(request)
        del self.bodies[:-100]
        fault = self.plan() if self.plan else None
        if fault is not None:
            self.injected[fault] += 1
        if self.delay_s:
            await asyncio.sleep(self.delay_s)
        if fault in ("429", "429_later"):
            return await self._error(writer, 429, "too many", {"Retry-After": "0" if fault == "429" else "1"})
        if fault in ("500", "503", "408"):
            return await self._error(writer, int(fault), f"EngineCore encountered an issue with {self.key}.")
        if fault == "reset_at_once":
            self._reset(writer)
            return False
        if fault == "late":
            await asyncio.sleep(0.05)
        if request.get("stream"):
            return await self._stream(request, fault, writer)
        content = json.dumps(self._completion(request, fault)).encode()
        content = _broken_bytes(content, fault)
        if fault in ("reset_mid_body", "closed_mid_body", "slow"):
            writer.write(_head(200, len(content)) + content[: len(content) // 2])
            await writer.drain()
            if fault == "slow":
                for index in range(len(content) // 2, len(content)):
                    await asyncio.sleep(0.1)
                    writer.write(content[index : index + 1])
                    await writer.drain()
            elif fault == "reset_mid_body":
                self._reset(writer)
            return False
        writer.write(_head(200, len(content)) + content)
        await writer.drain()
        return True

    async def _stream(self, request: dict[str, Any], fault: str | None, writer: asyncio.StreamWriter) -> bool:
        raise NotImplementedError("this server streams nothing")

    async def _error(
        self, writer: asyncio.StreamWriter, status: int, message: str, headers: dict[str, str] | None = None
    ) -> bool:
        return await self._send(writer, status, {"error": {"message": message, "code": status}}, headers)

    async def _send(
        self, writer: asyncio.StreamWriter, status: int, value: Any, headers: dict[str, str] | None = None
    ) -> bool:
        content = json.dumps(value).encode()
        writer.write(_head(status, len(content), headers) + content)
        await writer.drain()
        return True

    def _reset(self, writer: asyncio.StreamWriter) -> None:
        """RST in place of FIN: unsent data is thrown away."""
        handle = writer.get_extra_info("socket")
        if handle is not None:
            with suppress(OSError):
                handle.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    # --- answers -----------------------------------------------------------------------------------------------------

    def _completion(self, request: dict[str, Any], fault: str | None) -> dict[str, Any]:
        ids = request["prompt"]
        if fault == "other_request":
            ids = [*ids[:-1], (ids[-1] + 1) % VOCABULARY]
        rows: list[Any] = [None]
        for index, value in zip(ids[1:], self.table.logprobs(ids), strict=True):
            rows.append({str(index): {"logprob": value, "rank": 5, "decoded_token": "x"}})
        if request.get("prompt_logprobs"):
            for at, row in enumerate(self.table.likeliest(ids, request["prompt_logprobs"]), start=1):
                mine = rows[at][str(ids[at])]
                entries = [(str(index), {"logprob": value, "rank": 9}) for index, value in row.items()]
                self._random.shuffle(entries)
                rows[at] = {**dict(entries), str(ids[at]): mine}
        place = self._random.randrange(1, len(rows)) if fault not in FAULTS else len(rows) - 1
        token = str(ids[place])
        if fault == "wrong_length":
            rows = rows[:-1]
        elif fault == "missing_token":
            rows[place] = {str((ids[place] + 1) % VOCABULARY): rows[place][token]}
        elif fault in ("nan", "infinity", "minus_9999", "positive", "null", "text"):
            values = {"nan": float("nan"), "infinity": float("-inf"), "minus_9999": -9999.0, "positive": 0.5,
                      "null": None, "text": "-1.0"}  # fmt: skip
            rows[place][token]["logprob"] = values[fault]
        elif fault in ("shuffled", "decoys"):
            for at, index in enumerate(ids[1:], start=1):
                others = self._random.sample(range(VOCABULARY), 4)
                entries = [(str(other), {"logprob": -0.5 - other, "rank": 1}) for other in others if other != index]
                entries.append((str(index), rows[at][str(index)]))
                self._random.shuffle(entries)
                rows[at] = dict(entries)
        choice = {
            "index": 0, "text": "x", "finish_reason": "length", "token_ids": [7],
            "prompt_token_ids": ids, "prompt_logprobs": rows,
        }  # fmt: skip
        if fault == "shifted":  # valid, and another model's
            for at, index in enumerate(ids[1:], start=1):
                rows[at][str(index)]["logprob"] -= 1.0
        if fault == "key":  # in a place that errors quote
            rows[place][token]["logprob"] = f"Bearer {self.key}"
        if fault == "no_echo":
            del choice["prompt_token_ids"]
        if fault == "no_rows":
            choice["prompt_logprobs"] = None
        return {"id": "cmpl", "model": self.model, "choices": [choice] * (2 if fault == "two_choices" else 1)}


def _broken_bytes(content: bytes, fault: str | None) -> bytes:
    if fault == "truncated_json":
        return content[: len(content) // 2]
    if fault == "not_json":
        return b"<html>Bad gateway</html>"
    if fault == "endless":
        return content + b" " * (1 << 23)
    return b"" if fault == "empty" else content


def _head(status: int, length: int, headers: dict[str, str] | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status} X", "Content-Type: application/json", f"Content-Length: {length}"]
    lines += [f"{key}: {value}" for key, value in (headers or {}).items()]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def at_random(share: float, kinds: Sequence[str], seed: int = 0) -> Plan:
    """A plan that injects one of ``kinds`` into a share of the requests."""
    draw = random.Random(seed)
    return lambda: draw.choice(kinds) if draw.random() < share else None


@contextmanager
def servers(*made: FaultServer) -> Iterator[tuple[FaultServer, ...]]:
    with suppress_all(made):
        for server in made:
            server.__enter__()
        yield made


@contextmanager
def suppress_all(made: Sequence[FaultServer]) -> Iterator[None]:
    try:
        yield
    finally:
        for server in made:
            if hasattr(server, "_thread"):
                server.kill()
