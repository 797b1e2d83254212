"""A real HTTP server that samples from a real tiny model and streams tokens as vLLM does, and injects faults.

What it draws is a function of its weights, the prompt, the parameters and the seed: a request that is sent again gives
the same response. Weights can be replaced while responses are on their way; the server records which weights each
token came from. Not covered: batching, anything a GPU would be needed for.
"""

from __future__ import annotations

import asyncio
import copy
import json
import math
import random
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel

from fault_server import MODEL, FaultServer, Plan, Table
from scope_opd.addresses import parse_base_url
from scope_opd.rollout.samplers import NAMES, Samplers, Target
from scope_opd.rollout.served import ServedSampler
from scope_opd.serving.pool import Endpoint, PoolSettings
from scope_opd.serving.route import ClientSettings, RouteSettings
from scope_opd.serving.secrets import Secret
from scope_opd.serving.vllm import ScoreRequest, parse_score, score_body
from scope_opd.types import Prompt, Rollout, SamplingParams
from teacher_kit import QUICK
from tiny import END_ID, EOS_ID, VOCABULARY_SIZE, tiny_tokenizer

STREAM_FAULTS = (
    "reset_at_once", "reset_mid_stream", "closed_mid_stream", "no_done", "no_end", "wrong_echo", "no_echo",
    "missing_logprob", "no_logprobs", "nan", "positive", "minus_9999", "not_json", "two_choices", "text_ids",
    "too_long", "behind_the_end", "error_event", "not_a_stream", "silent", "abort", "429", "500", "503", "408",
)  # fmt: skip
"""What a client must take for a failure of this try."""
DEFAULT_TAG = "default"


@dataclass
class Weights:
    """A model, what it is called, and its logits by prefix."""

    model: PreTrainedModel
    tag: str = DEFAULT_TAG
    known: dict[tuple[int, ...], torch.Tensor] = field(default_factory=dict)

    def logits(self, token_ids: Sequence[int]) -> torch.Tensor:
        key = tuple(token_ids)
        if key not in self.known:
            with torch.no_grad():
                self.known[key] = self.model(input_ids=torch.tensor([key])).logits[0, -1].float()
        return self.known[key]


class SamplingServer(FaultServer):
    """``FaultServer`` that samples.

    Args:
        weights: what it was started with; ``kill`` and a new server on the same port bring it back to its own.
        honest: reports log-probs of the distribution that sampled.

    Attributes:
        weights: what it serves now.
        versions: seed -> tag of the weights behind each token of the last response drawn with it.
        finished: seed -> how often a whole response was sent.
        gate: cleared, no token is sent.
        token_delay_s: before each token.
    """

    def __init__(
        self, weights: Weights, plan: Plan | None = None, *, honest: bool = True, development: bool = True, **more: Any
    ) -> None:
        super().__init__(Table(weights.model), plan, development=development, **more)
        self.weights, self.honest = weights, honest
        self.versions: dict[int, list[str]] = {}
        self.finished: dict[int, int] = {}
        self.loads: list[str] = []
        self.sent = 0
        self.gate = threading.Event()
        self.gate.set()
        self.token_delay_s = 0.0
        self.eos = EOS_ID

    async def pause(self) -> None:
        """Every token that was drawn has been sent, and none is drawn from now on; to be awaited in any loop."""

        async def stop() -> None:  # a token is drawn and sent without a break in the server's loop
            self.gate.clear()

        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(stop(), self._loop))

    def resume(self) -> None:
        self.gate.set()

    def load(self, weights: Weights) -> None:
        self.weights, self.table = weights, Table(weights.model)
        self.loads.append(weights.tag)

    async def _answer(
        self, method: str, path: str, headers: dict[str, str], body: bytes, writer: asyncio.StreamWriter
    ) -> bool:
        if self.development and path == f"{self.prefix}/weight_info":
            return await self._send(writer, 200, {"weight_version": self.weights.tag})
        if self.development and method == "POST" and not path.startswith(f"{self.prefix}/v1/"):
            self.paths[path] += 1
            return await self._send(writer, 200, self._developed(path.removeprefix(self.prefix), body))
        return await super()._answer(method, path, headers, body, writer)

    def _developed(self, path: str, body: bytes) -> dict[str, Any]:
        """The development routes that a sync by files uses."""
        route, _, _ = path.partition("?")
        if route == "/pause":
            self.gate.clear()
        elif route == "/resume":
            self.gate.set()
        elif route == "/collective_rpc":
            asked = json.loads(body)["kwargs"]
            model = copy.deepcopy(self.weights.model)  # from_pretrained is not for several threads at once
            lost = model.load_state_dict(load_file(f"{asked['folder']}/model.safetensors"), strict=False)
            assert not lost.unexpected_keys
            assert set(lost.missing_keys) <= {"lm_head.weight"}
            self._next = Weights(model, asked["tag"])
            return {"results": [{"tag": asked["tag"]}]}
        elif route == "/update_weight_version":
            assert self._next.tag == json.loads(body)["new_version"]
            self.load(self._next)
        return {"success": True}

    def draw(self, request: dict[str, Any], place: int, ids: Sequence[int]) -> tuple[int, float]:
        """The next token and the log-prob that is reported of it."""
        logits = self.weights.logits(ids)
        shaped = logits / request["temperature"]
        if request["top_k"]:
            shaped = shaped.masked_fill(shaped < shaped.topk(request["top_k"]).values[-1], -math.inf)
        if "allowed_token_ids" in request:
            others = torch.ones_like(shaped, dtype=torch.bool).index_fill_(
                0, torch.tensor(request["allowed_token_ids"]), 0
            )
            shaped = shaped.masked_fill(others, -math.inf)
        chances = shaped.log_softmax(-1)
        uniform = random.Random(f"{request['seed']}/{place}").random()
        token = int(torch.searchsorted(chances.exp().double().cumsum(-1), uniform).clamp(max=len(chances) - 1))
        reported = chances if self.honest else logits.log_softmax(-1)
        return token, float(reported[token])

    def ends(self, request: dict[str, Any]) -> set[int]:
        own = () if request["ignore_eos"] else (self.eos,)
        return {*request["stop_token_ids"], *own}

    def _completion(self, request: dict[str, Any], fault: str | None) -> dict[str, Any]:
        if "prompt_logprobs" in request:
            return super()._completion(request, fault)
        ids, drawn, values, reason = list(request["prompt"]), [], [], "length"
        while len(drawn) < request["max_tokens"] and reason == "length":
            token, value = self.draw(request, len(drawn), [*ids, *drawn])
            drawn.append(token)
            values.append(value)
            reason = "stop" if token in self.ends(request) else "length"
        choice = {"index": 0, "text": "x", "finish_reason": reason, "token_ids": drawn, "prompt_token_ids": ids,
                  "logprobs": {"token_logprobs": values}}  # fmt: skip
        return {"id": "cmpl", "model": self.model, "choices": [choice]}

    async def _stream(self, request: dict[str, Any], fault: str | None, writer: asyncio.StreamWriter) -> bool:
        ids, seed = list(request["prompt"]), request["seed"]
        if fault == "not_a_stream":
            return await self._send(writer, 200, self._completion(request, None))
        head = "HTTP/1.1 200 OK\r\nContent-Type: text/event-stream; charset=utf-8\r\nTransfer-Encoding: chunked\r\n\r\n"
        writer.write(head.encode())
        drawn: list[int] = []
        tags: list[str] = []
        reason: str | None = None
        limit = request["max_tokens"] + 1 if fault == "too_long" else request["max_tokens"]
        while reason is None:
            await self._pace()
            tags.append(self.weights.tag)
            token, value = self.draw(request, len(drawn), [*ids, *drawn])
            drawn.append(token)
            if fault == "too_long" or fault == "clipped":
                reason = "length" if len(drawn) == (limit if fault == "too_long" else 2) else None
            elif token in self.ends(request):
                reason = "stop"
            elif len(drawn) == limit:
                reason = "length"
            last = reason is not None
            if last and fault in ("reset_mid_stream", "closed_mid_stream", "silent", "error_event"):
                if fault == "reset_mid_stream":
                    self._reset(writer)
                elif fault == "silent":
                    await asyncio.sleep(30)
                elif fault == "error_event":
                    self._event(writer, json.dumps({"error": {"message": f"it broke, {self.key}", "code": 500}}))
                    self._end(writer)
                return fault == "error_event"
            choice = self._choice(ids if len(drawn) == 1 else None, token, value, reason, fault, last)
            content = json.dumps({"id": "c", "model": self.model, "choices": [choice] * (1 + (fault == "two_choices"))})
            self.sent += 1
            self._event(writer, content[:-5] if last and fault == "not_json" else content)
            await writer.drain()
        if fault == "behind_the_end":
            self._event(writer, json.dumps({"choices": [self._choice(None, 7, -1.0, None, None, False)]}))
        self.versions[seed] = tags
        if fault is None:
            self.finished[seed] = self.finished.get(seed, 0) + 1
        self._end(writer, done=fault != "no_done")
        await writer.drain()
        return True

    async def _pace(self) -> None:
        await asyncio.sleep(self.token_delay_s)
        while not self.gate.is_set():
            await asyncio.sleep(0.001)

    def _choice(
        self, echo: list[int] | None, token: int, value: float, reason: str | None, fault: str | None, last: bool
    ) -> dict[str, Any]:
        found: list[Any] = [value]
        if last and fault in ("nan", "positive", "minus_9999", "missing_logprob"):
            found = {"nan": [float("nan")], "positive": [0.5], "minus_9999": [-9999.0], "missing_logprob": []}[fault]
        if fault == "wrong_echo" and echo:
            echo = [*echo[:-1], (echo[-1] + 1) % VOCABULARY_SIZE]
        return {
            "index": 0, "text": "x", "prompt_token_ids": None if fault == "no_echo" else echo,
            "finish_reason": None if fault == "no_end" else "abort" if fault == "abort" and last else reason,
            "token_ids": ["7"] if fault == "text_ids" else [VOCABULARY_SIZE + 5] if fault == "foreign" else [token],
            "logprobs": None if fault == "no_logprobs" else {"token_logprobs": found},
        }  # fmt: skip

    def _event(self, writer: asyncio.StreamWriter, data: str) -> None:
        content = f"data: {data}\n\n".encode()
        writer.write(f"{len(content):x}\r\n".encode() + content + b"\r\n")

    def _end(self, writer: asyncio.StreamWriter, *, done: bool = True) -> None:
        if done:
            self._event(writer, "[DONE]")
        writer.write(b"0\r\n\r\n")


def made_prompts(count: int, seed: int = 0) -> list[Prompt]:
    draw = random.Random(seed)
    made = []
    for index in range(count):
        ids = tuple(draw.randrange(3, VOCABULARY_SIZE) for _ in range(draw.randint(1, 12)))
        made.append(Prompt(f"p{index}", "?", 0, ids))
    return made


def sampling(n: int = 2, **more: Any) -> SamplingParams:
    values = {"temperature": 0.7, "max_tokens": 8, "stop_token_ids": (EOS_ID, END_ID, *range(100, 140)), "seed": 11}
    return SamplingParams(n=n, **{**values, **more})


@contextmanager
def samplers_of(
    *urls: str, key: str | None = None, pool: dict[str, Any] | None = None, client: dict[str, Any] | None = None
) -> Iterator[Samplers]:
    """Open samplers; closed at the end, whatever happens."""
    route = RouteSettings(
        tuple(parse_base_url(url) for url in urls), MODEL, None if key is None else Secret(key), NAMES
    )
    samplers = Samplers(
        route,
        client=ClientSettings(**{"connect_timeout_s": 2.0, "read_timeout_s": 2.0, "start_s": 3.0, **(client or {})}),
        pool=PoolSettings(**{**QUICK, **(pool or {})}),
        prompt=(5, 6),
    )
    try:
        samplers.open()
        yield samplers
    finally:
        samplers.close()


def sampler_over(samplers: Samplers, **options: Any) -> ServedSampler:
    return ServedSampler(samplers, tiny_tokenizer(), **{"vocabulary": VOCABULARY_SIZE, **options})


def drawn_by(
    sampler: ServedSampler, prompts: Sequence[Prompt], params: SamplingParams, step: int = 3, version: int = 0
) -> list[Rollout]:
    """All rollouts, in (prompt, sample) order."""

    async def collect() -> list[Rollout]:
        return [each async for each in sampler.sample(prompts, params, step=step, policy_version=version)]

    order = {prompt.id: place for place, prompt in enumerate(prompts)}
    return sorted(asyncio.run(collect()), key=lambda rollout: (order[rollout.group], rollout.sample))


def target(samplers: Samplers, made: Sequence[SamplingServer], weights: Weights, version: int) -> Target:
    """What a weight sync would set: servers are brought to ``weights``, the trainer has ``weights`` itself."""
    by_url = {parse_base_url(server.url).text: server for server in made}
    text = (5, 6, 7, 8, 9, 10)
    expected = Table(weights.model).logprobs(text)

    async def load(endpoint: Endpoint) -> None:
        by_url[endpoint.url.text].load(weights)

    async def probe(endpoint: Endpoint) -> float:
        request = ScoreRequest(text, 1)
        reply = await samplers.pool.exchange(
            endpoint, "/completions", lambda body: parse_score(body, request), body=score_body(request, endpoint.model)
        )
        return sum(abs(a - b) for a, b in zip(reply.value.logprobs, expected, strict=True)) / len(expected)

    return Target(version, weights.tag, load, probe, 0.01)
