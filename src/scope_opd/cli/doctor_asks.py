"""What ``scope doctor`` asks one server, each question a ``Finding`` with a remedy.

Not covered: speed, what several requests at once do to a server, weights in flight.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from scope_opd.cli.checks import Finding, Level
from scope_opd.cli.ends import read_json
from scope_opd.errors import ModelError, ScopeError
from scope_opd.models.places import resolve_path
from scope_opd.serving.control import Control
from scope_opd.serving.faults import BadAnswer, Fault, Refused, RowRefused
from scope_opd.serving.pool import Endpoint, Pool
from scope_opd.serving.route import patiently, reports_sampled_logprobs
from scope_opd.serving.secrets import redact
from scope_opd.serving.vllm import (
    ScoreRequest,
    error_message,
    parse_models,
    parse_sample,
    parse_score,
    sample_body,
    score_body,
)
from scope_opd.types import SamplingParams

PATIENCE_S = 3.0
"""How long a server that refuses connections or answers 503 is asked again."""
NEUTRAL = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0,
           "presence_penalty": 0.0, "frequency_penalty": 0.0}  # fmt: skip
"""Sampling parameters that change nothing. vLLM's own defaults are these; a checkpoint's may be others."""
_DRAW = SamplingParams(n=1, temperature=1.0, max_tokens=16, stop_token_ids=(), seed=0)


@dataclass(slots=True, eq=False)
class Place:
    """One server and what the run wants of it.

    Attributes:
        role, label: "teacher" or "sampler", and what to call it ("teacher math").
        route: of the teacher; "" for the one of all other prompts.
        endpoint, pool: address, name, key; and its own pool, of which only the exchange of messages is used.
        key: where its key is configured, for errors.
        allow_unprotected: whether the config accepts development routes that anybody reaches.
        tokens: of the longest prompt and response, and the one that a server draws more where it scores them.
        temperature: at which it samples for the run, None where it only scores.
        folder: of the weights that it should serve, None where that is not known.
        scored: its log-probs of the fixed text, once they are known.
        top_k: likeliest tokens that the run asks it for in each place.
    """

    role: Literal["teacher", "sampler"]
    label: str
    route: str
    endpoint: Endpoint
    pool: Pool
    key: str
    allow_unprotected: bool
    tokens: int
    temperature: float | None
    folder: str | None
    scored: list[float] | None = None
    top_k: int = 0

    @property
    def url(self) -> str:
        return str(self.endpoint.url)


async def examine(place: Place, fixed: ScoreRequest) -> list[Finding]:
    """Everything about one server; what needs an answer that did not come is left out."""
    findings = await _reach(place)
    if any(finding.level == "FAIL" and not finding.subject.endswith("context") for finding in findings):
        return findings
    checks: list[tuple[str, Callable[[], Awaitable[Finding | None]]]] = [
        ("routes", partial(_development_routes, place)),
        ("log-probs", partial(_prompt_logprobs, place, fixed)),
    ]
    if place.temperature is not None:
        checks += [
            ("logprobs mode", partial(_mode, place, fixed, place.temperature)),
            ("defaults", partial(_defaults, place, fixed)),
        ]
    for name, check in checks:
        try:
            found = await check()
        except Fault as fault:
            found = finding_of(place, name, "FAIL", f"no usable answer: {fault.message}", "see the server's log")
        except RowRefused as error:
            found = finding_of(place, name, "FAIL", f"refused: {error}", _remedy(place, str(error)))
        except ScopeError as error:
            found = finding_of(place, name, "FAIL", error.found, error.remedy)
        if found is not None:
            findings.append(found)
    return findings


def finding_of(place: Place, check: str, level: Level, found: str, remedy: str = "") -> Finding:
    shown = found if place.endpoint.url.root in found or level == "ok" else f"{place.url}: {found}"
    return Finding(f"{place.label}: {check}", level, shown, remedy)


def _starts(place: Place) -> str:
    return f"scope serve {'student' if place.role == 'sampler' else 'teacher'} CONFIG"


async def _reach(place: Place) -> list[Finding]:
    """Address, key, model name, context: all from GET /models."""
    names, client = place.endpoint.names, place.pool.client

    async def ask() -> tuple[int, bytes]:
        status, _, body, _ = await client.ask("GET", f"{place.url}/models", key=place.endpoint.key, max_bytes=1 << 22)
        if status == 429 or status >= 500:
            raise Fault(f"status {status}", redact(error_message(body), [place.endpoint.key]))
        return status, body

    try:
        status, body = await patiently(ask, PATIENCE_S)
    except Fault as fault:
        remedy = f"start it ({_starts(place)}), or check {names.url}"
        return [finding_of(place, "server", "FAIL", f"no answer ({fault})", remedy)]
    message = redact(error_message(body), [place.endpoint.key]) if status != 200 else ""
    reached = finding_of(place, "server", "ok", f"{place.url} answers")
    if status in (401, 403):
        given = f"it does not accept the key in {place.key}" if place.endpoint.key else "it wants a key, none is set"
        remedy = f"put the server's key there (VLLM_API_KEY, --api-key), or set {names.key} to another variable"
        if not place.endpoint.key:
            remedy = f"set {names.key} to the variable that holds the server's key"
        return [reached, finding_of(place, "key", "FAIL", f"answers {status}: {given}", remedy)]
    if status != 200:
        remedy = f"check the path in {names.url}: it should end in /v1, and be no redirect"
        return [finding_of(place, "server", "FAIL", f"GET /models answers {status} {message}".rstrip(), remedy)]
    try:
        models = parse_models(body)
    except BadAnswer as error:
        remedy = f"check that {names.url} is a vLLM server's"
        return [finding_of(place, "server", "FAIL", redact(error.message, [place.endpoint.key]), remedy)]
    findings = [reached]
    if place.endpoint.key is not None:
        findings.append(finding_of(place, "key", "ok", f"the one in {place.key}"))
    if place.endpoint.model not in models:
        served = redact(", ".join(map(repr, models)), [place.endpoint.key]) or "none"
        found = f"serves {served} and {names.model} = {place.endpoint.model!r}"
        remedy = f"change {names.model}, or start it with --served-model-name {place.endpoint.model}"
        return [*findings, finding_of(place, "model name", "FAIL", found, remedy)]
    findings.append(finding_of(place, "model name", "ok", repr(place.endpoint.model)))
    return [*findings, _context(place, models[place.endpoint.model])]


def _context(place: Place, context: int | None) -> Finding:
    parts = "longest prompt, response and 1" if place.role == "teacher" else "longest prompt and response"
    needed = f"{place.tokens} ({parts})"
    if context is None:
        return finding_of(place, "context", "warn", f"not told; the run needs {needed}", "see its --max-model-len")
    if context < place.tokens:
        remedy = f"start it with --max-model-len {place.tokens}, or lower rollout.max_tokens or data.max_prompt_tokens"
        return finding_of(place, "context", "FAIL", f"{context} tokens, and the run needs {needed}", remedy)
    return finding_of(place, "context", "ok", f"{context} tokens, of which the run needs {needed}")


async def _development_routes(place: Place) -> Finding | None:
    """Weight sync needs them; where others than this machine reach them they are a risk."""
    url, client = place.endpoint.url, place.pool.client
    if place.role == "sampler":
        try:
            await Control(client, place.endpoint).weight_version()
        except Refused as error:
            remedy = f"start it with {_starts(place)}, or with VLLM_SERVER_DEV_MODE=1"
            return finding_of(place, "routes", "FAIL", f"{error.found}: no new weights can reach it", remedy)
    status, _, body, _ = await client.ask("GET", f"{url.root}/is_sleeping", key=None, max_bytes=1 << 16)
    open_to_all = status == 200 and b"is_sleeping" in body
    if open_to_all and not url.loopback:
        found = "development routes answer anybody: whoever reaches it can stop it or load other weights"
        remedy = (
            "let only this machine reach it (a tunnel, a firewall), start a teacher without VLLM_SERVER_DEV_MODE, or "
            f"set {place.endpoint.names.unprotected} where the network is trusted"
        )
        return finding_of(place, "routes", "warn" if place.allow_unprotected else "FAIL", found, remedy)
    if open_to_all:
        return finding_of(place, "routes", "ok", "development routes, which only this machine reaches")
    return finding_of(place, "routes", "ok", "development routes, behind its key") if place.role == "sampler" else None


async def _prompt_logprobs(place: Place, fixed: ScoreRequest) -> Finding:
    """The run's scoring requests, or those of the probe after a sync, on the fixed text."""
    place.scored = await score(place, replace(fixed, top_k=place.top_k))
    likeliest = f", with the {place.top_k} likeliest in each place" if place.top_k else ""
    return finding_of(place, "log-probs", "ok", f"scores a text of {len(fixed.token_ids)} tokens{likeliest}")


async def _mode(place: Place, fixed: ScoreRequest, temperature: float) -> Finding:
    if await reports_sampled_logprobs(place.pool, place.endpoint, fixed.token_ids[:8]):
        return finding_of(place, "logprobs mode", "ok", "log-probs of the distribution that samples")
    found = "reports log-probs of the model at temperature 1, whatever samples"
    if temperature == 1.0:
        return finding_of(place, "logprobs mode", "ok", f"{found}: the same at temperature 1")
    remedy = f"start it with --logprobs-mode processed_logprobs ({_starts(place)} does)"
    return finding_of(place, "logprobs mode", "FAIL", f"{found} (the run samples at {temperature:g})", remedy)


async def _defaults(place: Place, fixed: ScoreRequest) -> Finding:
    """Whether a request that names no sampling parameter draws what one that names neutral ones draws."""
    plain = sample_body(fixed.token_ids[:8], _DRAW, place.endpoint.model, 1)
    bare = {name: value for name, value in plain.items() if name not in NEUTRAL}
    once, again, default = [await _draw(place, fixed.token_ids[:8], body) for body in (plain, plain, bare)]
    declared = declared_defaults(place.folder)
    shown = ", ".join(f"{name} {value}" for name, value in declared.items())
    source = f" (generation_config.json of {place.folder}: {shown})" if shown else ""
    if once != again:
        return finding_of(
            place, "defaults", "ok", f"cannot be told, since it draws differently for the same seed{source}; the run "
            "names every parameter",
        )  # fmt: skip
    if default == once:
        return finding_of(place, "defaults", "ok", f"a request without sampling parameters is neutral{source}")
    return finding_of(
        place, "defaults", "ok", f"not neutral{source}: the run names every parameter, other clients should too"
    )


def declared_defaults(folder: str | None) -> dict[str, Any]:
    """What a folder's generation_config.json sets that is not neutral; empty where nothing can be read."""
    if folder is None:
        return {}
    try:
        declared = read_json(Path(resolve_path(folder)) / "generation_config.json")
    except ModelError:
        return {}
    return {
        name: declared[name]
        for name, neutral in {**NEUTRAL, "max_new_tokens": None}.items()
        if declared.get(name) is not None and declared[name] != neutral
    }


async def _draw(place: Place, prompt: Sequence[int], body: dict[str, Any]) -> list[int]:
    reply = await place.pool.exchange(
        place.endpoint, "/completions", lambda content: parse_sample(content, prompt, _DRAW), body=body
    )
    return reply.value.token_ids


async def score(place: Place, request: ScoreRequest) -> list[float]:
    pool, endpoint = place.pool, place.endpoint

    async def ask() -> list[float]:
        reply = await pool.exchange(
            endpoint, "/completions", lambda content: parse_score(content, request),
            body=score_body(request, endpoint.model),
        )  # fmt: skip
        return reply.value.logprobs

    return await patiently(ask, PATIENCE_S)


def _remedy(place: Place, message: str) -> str:
    """What to do about a refusal, from what the server says."""
    said = message.lower()
    if "logprobs" in said:
        asked = f"--max-logprobs {place.top_k}" if place.top_k else "a larger --max-logprobs"
        lower = ", or lower objective.topk" if place.top_k else ""
        return f"start it with {asked} ({_starts(place)} does){lower}"
    if "context" in said:
        return "start it with a larger --max-model-len"
    if "vocabulary" in said:
        return "serve a model with the student's vocabulary: token ids must mean the same to both"
    return f"check that {place.endpoint.names.url} is a vLLM server of that model"
