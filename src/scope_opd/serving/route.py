"""What every client of servers does before it trusts one: settings, patience, and meeting a server (development routes,
key, model name, context), shared by teachers and samplers.

Not covered: what proves that a server holds the right weights (``teacher.servers``, ``rollout.samplers``).
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TypeVar

from scope_opd.addresses import BaseUrl
from scope_opd.errors import ConfigError, RunFailed, ScopeError
from scope_opd.serving.faults import BadAnswer, Fault, Refused, RowRefused
from scope_opd.serving.http import monotonic
from scope_opd.serving.pool import Endpoint, Names, Pool
from scope_opd.serving.secrets import Secret, redact
from scope_opd.serving.vllm import parse_models, parse_sample, sample_body
from scope_opd.types import SamplingParams

Answer = TypeVar("Answer")
_MODE = SamplingParams(n=1, temperature=1.0, max_tokens=4, stop_token_ids=(), seed=0)
_CERTAIN = 1e-3


@dataclass(frozen=True, slots=True)
class RouteSettings:
    """Servers of one model: where it is served, under which name, with which key.

    Attributes:
        urls: its servers, at least one.
        model: the name that they serve it under.
        key: None where none is needed.
        names: what the user calls these settings.
    """

    urls: tuple[BaseUrl, ...]
    model: str
    key: Secret | None = None
    names: Names = field(default_factory=Names)

    def endpoints(self) -> list[Endpoint]:
        return [Endpoint(url, self.model, self.key, self.names) for url in self.urls]


@dataclass(frozen=True, slots=True)
class ClientSettings:
    """Of an HTTP client, see ``serving.http.HttpClient``; ``start_s``: how long servers may take to answer at the
    start; ``allow_unprotected``: accept servers that are not on this machine and answer development routes (put to
    sleep, load other weights ...) to anybody."""

    connect_timeout_s: float = 10.0
    read_timeout_s: float = 300.0
    ca_bundle: str | None = None
    start_s: float = 30.0
    allow_unprotected: bool = False


async def patiently(attempt: Callable[[], Awaitable[Answer]], patience_s: float) -> Answer:
    """Try again for a while; a server that answers nonsense gets fewer chances than one that is busy."""
    end, nonsense, wait_s = monotonic() + patience_s, 0, 0.1
    while True:
        try:
            return await attempt()
        except Fault as fault:
            nonsense += isinstance(fault, BadAnswer)
            if monotonic() + wait_s >= end or nonsense > 5:
                raise
        await asyncio.sleep(wait_s)
        wait_s = min(2.0, 2 * wait_s)


async def meet_all(pool: Pool, meet: Callable[[Endpoint], Awaitable[None]], patience_s: float, shown: str) -> list[str]:
    """Meet every server of a pool, one after another; one that does not answer is down until a probe finds it.

    Args:
        pool: of servers of one model.
        meet: what is to be found out of each.
        patience_s: how long each may take.
        shown: the pool in a sentence ("the teacher").

    Returns:
        What is wrong with servers that are down, a line each.

    Raises:
        ConfigError: a setting is wrong, or no server answers.
    """
    down = []
    for endpoint in pool.endpoints:
        try:
            await patiently(partial(meet, endpoint), patience_s)
        except Fault as fault:
            pool.take_down(endpoint)
            down.append(f"{endpoint.url}: {fault.message}")
    if len(down) == len(pool.endpoints):
        raise ConfigError(
            f"no server of {shown} answers: {'; '.join(down)}", "at least one",
            f"start it, or check {pool.endpoints[0].names.url}",
        )  # fmt: skip
    return down


async def served_context(pool: Pool, endpoint: Endpoint) -> int | None:
    """Tokens that a server takes at most, prompt and response together; None where it does not tell.

    Raises:
        Fault: no answer.
        Refused: the key or the model's name is wrong.
    """
    models = (await pool.exchange(endpoint, "/models", parse_models)).value
    if endpoint.model not in models:
        names = endpoint.names
        served = redact(", ".join(map(repr, models)), [endpoint.key]) or "none"
        raise Refused(
            f"{names.model} = {endpoint.model!r}: {endpoint.url} serves {served}",
            "a name that it serves", f"change {names.model}",
        )  # fmt: skip
    return models[endpoint.model]


async def refuse_unprotected(pool: Pool, endpoint: Endpoint) -> None:
    """Ask a development route that changes nothing, without a key. Servers on this machine are not asked.

    Raises:
        Fault: no answer.
        Refused: anybody who reaches the server can stop it or load other weights.
    """
    if endpoint.url.loopback:
        return
    status, _, body, _ = await pool.client.ask("GET", f"{endpoint.url.root}/is_sleeping", key=None, max_bytes=1 << 16)
    if status == 200 and b"is_sleeping" in body:
        raise Refused(
            f"{endpoint.url} answers development routes without a key: whoever reaches it can stop it or load "
            "other weights",
            "a server started without VLLM_SERVER_DEV_MODE, or one that only this machine reaches",
            f"restart it so, put it behind a tunnel, or set {endpoint.names.unprotected}",
        )


async def reports_sampled_logprobs(pool: Pool, endpoint: Endpoint, prompt: Sequence[int]) -> bool:
    """Whether a server's log-probs are those of the distribution that sampled.

    Allows one token alone: it is certain then, so that its log-prob is 0 in the distribution that samples. In the
    model's own it is anything.

    Args:
        pool, endpoint: whom to ask.
        prompt: token ids that the model knows.

    Raises:
        Fault: no answer.
        Refused: the server takes no such request.
    """
    try:
        reply = await pool.exchange(
            endpoint, "/completions", lambda body: parse_sample(body, prompt, _MODE),
            body={**sample_body(prompt, _MODE, endpoint.model, 0), "allowed_token_ids": [prompt[0]]},
        )  # fmt: skip
    except RowRefused as error:
        raise Refused(str(error), "a sample", f"check {endpoint.names.url}") from None
    return min(reply.value.logprobs) > -_CERTAIN


def sample_seed(seed: int, step: int, sample: int, prompt_id: str) -> int:
    """The seed that a server is given for one sample: a function of what it is for, in [0, 2^63)."""
    text = f"{seed}/{step}/{sample}/{prompt_id}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def raw_logprobs(endpoint: Endpoint) -> RunFailed:
    """The error for a server whose log-probs are not those of the distribution that sampled."""
    return RunFailed(
        f"{endpoint.url} reports the model's own log-probs, without temperature and the like",
        "those of the distribution that sampled",
        "start it with --logprobs-mode processed_logprobs",
    )


def fatal_in_a_run(error: ScopeError) -> RunFailed:
    """A wrong setting that shows only once a run goes on is the run's failure: exit code 1, a checkpoint is kept."""
    return error if isinstance(error, RunFailed) else RunFailed(error.found, error.expected, error.remedy)
