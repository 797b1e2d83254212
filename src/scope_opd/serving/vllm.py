"""vLLM's completions API with token ids in and out: request bodies, and answers that are checked before they count.

Log-probs are taken by token id, never by token string or by the order of a dict. An answer counts only if it echoes the
very ids that were sent, has one row for each of them, and holds a plausible log-prob for every response token; all
else is a ``BadAnswer``: a failure of that endpoint. Every sampling parameter is sent, since a checkpoint's
generation_config may change the defaults.

Not covered: the per-row call of newer servers (``prompt_logprob_token_ids`` on /inference/v1/generate), which needs a
GPU build; streamed answers with more than one choice.

Source: vLLM 0.32, entrypoints/openai/completion/protocol.py.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scope_opd.serving.faults import BadAnswer, Clipped, ForeignToken
from scope_opd.types import SamplingParams, TopK

SLACK = 1e-3
"""Servers round: a log-prob a hair above 0 stands for 0."""
LOWEST = -1000.0
"""vLLM writes -9999.0 for -inf and NaN; nothing that is a log-prob of a sampled token is near it."""


@dataclass(frozen=True, slots=True)
class ScoreRequest:
    """A sequence whose last tokens shall be scored.

    Attributes:
        token_ids: prompt and response.
        start: index of the first response token, >= 1.
        top_k: how many of the most likely tokens to return besides, for each response token.
    """

    token_ids: tuple[int, ...]
    start: int
    top_k: int = 0

    def __post_init__(self) -> None:
        assert 1 <= self.start <= len(self.token_ids), "a response needs a prompt before it"

    @property
    def response(self) -> tuple[int, ...]:
        return self.token_ids[self.start :]


@dataclass(frozen=True, slots=True)
class Scored:
    """What came back: one log-prob a response token, and, if asked for, the likeliest tokens in its place."""

    logprobs: list[float]
    top: TopK | None = None


@dataclass(frozen=True, slots=True)
class Drawn:
    """One sampled response: ids and their log-probs, the end token included."""

    token_ids: list[int]
    logprobs: list[float]
    text: str
    finish_reason: str


def token_hash(token_ids: Sequence[int]) -> str:
    """A short name for a sequence of token ids, the same on every machine."""
    return hashlib.sha256(b",".join(b"%d" % index for index in token_ids)).hexdigest()[:16]


def score_body(request: ScoreRequest, model: str) -> dict[str, Any]:
    """The body of POST {base}/completions that has a sequence scored.

    Without a seed: a seeded request whose prefill is split ends a vLLM server on a CPU.
    """
    return {**_plain(model, request.token_ids), "max_tokens": 1, "prompt_logprobs": request.top_k}


def sample_body(
    token_ids: Sequence[int],
    params: SamplingParams,
    model: str,
    seed: int,
    *,
    stream: bool = False,
    only_these_stops: bool = False,
) -> dict[str, Any]:
    """The body that draws one response. ``params.n`` is not read: each sample has its own seed, so its own request.

    Args:
        stream: have it answered token by token.
        only_these_stops: the end token that the server knows for the model ends nothing, ``stop_token_ids`` alone do.
    """
    return {
        **_plain(model, token_ids),
        "max_tokens": params.max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "repetition_penalty": params.repetition_penalty,
        "stop_token_ids": list(params.stop_token_ids),
        "seed": seed,
        "logprobs": 0,
        "stream": stream,
        "ignore_eos": only_these_stops,
    }


def parse_score(body: bytes, request: ScoreRequest) -> Scored:
    """Check an answer and take the response's log-probs from it.

    Raises:
        BadAnswer: anything about it is not as it must be.
    """
    choice = _choice(body, request.token_ids)
    rows = choice.get("prompt_logprobs")
    if not isinstance(rows, list) or len(rows) != len(request.token_ids):
        found = f"{len(rows)} rows" if isinstance(rows, list) else f"prompt_logprobs {type(rows).__name__}"
        raise BadAnswer(f"{found} for {len(request.token_ids)} tokens")
    if not all(isinstance(row, dict) for row in rows[1:]):
        raise BadAnswer("a row of prompt_logprobs is no object")
    logprobs, top = [], []
    for place in range(request.start, len(rows)):
        row = rows[place]
        entry = row.get(str(request.token_ids[place]))
        if entry is None:
            raise BadAnswer(f"token {request.token_ids[place]} at {place} is not among those of its row")
        logprobs.append(_logprob(entry, place))
        if request.top_k:
            top.append(_top(row, request.top_k, place))
    return Scored(logprobs, TopK.of(top) if request.top_k else None)


def parse_sample(body: bytes, token_ids: Sequence[int], params: SamplingParams) -> Drawn:
    """Check a sampled response.

    Raises:
        BadAnswer: anything about it is not as it must be.
    """
    choice = _choice(body, token_ids)
    drawn, reason, text = choice.get("token_ids"), choice.get("finish_reason"), choice.get("text")
    if not isinstance(drawn, list) or not drawn or not all(type(index) is int and index >= 0 for index in drawn):
        raise BadAnswer("token_ids is not a list of ids")
    if len(drawn) > params.max_tokens:
        raise BadAnswer(f"{len(drawn)} tokens for max_tokens {params.max_tokens}")
    if reason not in ("stop", "length") or not isinstance(text, str):
        raise BadAnswer(f"finish_reason {reason!r}")
    table = choice.get("logprobs")
    found = table.get("token_logprobs") if isinstance(table, dict) else None
    if not isinstance(found, list) or len(found) != len(drawn):
        raise BadAnswer(f"no log-prob for each of {len(drawn)} sampled tokens")
    logprobs = [_logprob({"logprob": value}, place) for place, value in enumerate(found)]
    return Drawn(drawn, logprobs, text, reason)


class SampleStream:
    """One response, event by event; every event is checked as it comes.

    Args:
        prompt: ids that were sent.
        params: what was asked for.
        vocabulary: ids must be below it; None: any.

    Attributes:
        token_ids, logprobs: what has come so far.
    """

    def __init__(self, prompt: Sequence[int], params: SamplingParams, vocabulary: int | None = None) -> None:
        self.token_ids: list[int] = []
        self.logprobs: list[float] = []
        self._prompt, self._params, self._vocabulary = list(prompt), params, vocabulary
        self._texts: list[str] = []
        self._echoed = False
        self._reason: str | None = None

    def take(self, event: bytes) -> None:
        """The data of one event.

        Raises:
            BadAnswer: anything about it is not as it must be.
            ForeignToken: an id that is not below ``vocabulary``.
        """
        value = _object(event)
        choices = value.get("choices")
        if value.get("error") is not None or not isinstance(choices, list):
            raise BadAnswer(error_message(event))
        if not choices and value.get("usage"):
            return
        if len(choices) != 1 or not isinstance(choices[0], dict):
            raise BadAnswer("not exactly one choice")
        choice: dict[str, Any] = choices[0]
        echoed = choice.get("prompt_token_ids")
        if echoed is not None and echoed != self._prompt:
            raise BadAnswer("the prompt_token_ids are not those that were sent")
        self._echoed |= echoed is not None
        drawn, text = choice.get("token_ids"), choice.get("text")
        if not isinstance(drawn, list) or not all(type(index) is int and index >= 0 for index in drawn):
            raise BadAnswer("token_ids is not a list of ids")
        if not isinstance(text, str):
            raise BadAnswer("no text")
        if drawn and self._reason is not None:
            raise BadAnswer("tokens behind the last")
        if self._vocabulary is not None and drawn and max(drawn) >= self._vocabulary:
            raise ForeignToken(max(drawn))
        table = choice.get("logprobs")
        found = table.get("token_logprobs") if isinstance(table, dict) else None
        if drawn and (not isinstance(found, list) or len(found) != len(drawn)):
            raise BadAnswer(f"no log-prob for each of {len(drawn)} sampled tokens")
        for value in found or ():
            self.logprobs.append(_logprob({"logprob": value}, len(self.logprobs)))
        self.token_ids += drawn
        self._texts.append(text)
        self._reason = choice.get("finish_reason") or self._reason
        if len(self.token_ids) > self._params.max_tokens:
            raise BadAnswer(f"more than max_tokens = {self._params.max_tokens} tokens")

    def finish(self) -> Drawn:
        """The whole response, once the last event has come.

        Raises:
            BadAnswer: it is not whole.
            Clipped: it ended for its length before ``max_tokens``.
        """
        if not self._echoed:
            raise BadAnswer("no prompt_token_ids (the server does not know return_token_ids)")
        if not self.token_ids or len(self.logprobs) != len(self.token_ids):
            raise BadAnswer(f"{len(self.token_ids)} tokens with {len(self.logprobs)} log-probs")
        if self._reason not in ("stop", "length"):
            raise BadAnswer(f"finish_reason {self._reason!r}")
        if self._reason == "length" and len(self.token_ids) < self._params.max_tokens:
            raise Clipped(len(self.token_ids))
        return Drawn(self.token_ids, self.logprobs, "".join(self._texts), self._reason)


def parse_models(body: bytes) -> dict[str, int | None]:
    """Served names -> context length, None where the server does not tell, from GET {base}/models.

    Raises:
        BadAnswer: not such a list.
    """
    data = _object(body).get("data")
    if not isinstance(data, list) or not all(isinstance(row, dict) and isinstance(row.get("id"), str) for row in data):
        raise BadAnswer("GET /models has no list of models")
    lengths = {row["id"]: row.get("max_model_len") for row in data}
    return {name: length if type(length) is int and length > 0 else None for name, length in lengths.items()}


def error_message(body: bytes) -> str:
    """What an error answer says, in whatever form."""
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return body.decode("utf-8", errors="replace")  # uncut: half a key would not be recognised as one
    for key in ("error", "message", "detail"):
        if isinstance(value, dict) and value.get(key):
            value = value[key]
    return value if isinstance(value, str) else json.dumps(value)


def _plain(model: str, token_ids: Sequence[int]) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(token_ids),
        "n": 1,
        "temperature": 1.0,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "stream": False,
        "echo": False,
        "add_special_tokens": False,
        "return_token_ids": True,
    }


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # bad JSON, not UTF-8, NaN, thousands of brackets
        raise BadAnswer(f"not JSON: {str(error)[:80]}") from None
    if not isinstance(value, dict):
        raise BadAnswer(f"a JSON {type(value).__name__}, no object")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _choice(body: bytes, token_ids: Sequence[int]) -> dict[str, Any]:
    choices = _object(body).get("choices")
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise BadAnswer("not exactly one choice")
    choice: dict[str, Any] = choices[0]
    echoed = choice.get("prompt_token_ids")
    if echoed is None:
        raise BadAnswer("no prompt_token_ids (the server does not know return_token_ids)")
    if echoed != list(token_ids):
        raise BadAnswer("the prompt_token_ids are not those that were sent")
    return choice


def _logprob(entry: Any, place: int) -> float:
    value = entry.get("logprob") if isinstance(entry, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadAnswer(f"log-prob {value!r} at {place}"[:120])
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number) or number > SLACK or number <= LOWEST:
        raise BadAnswer(f"log-prob {number!r} at {place}")
    return min(number, 0.0)


def _top(row: dict[str, Any], top_k: int, place: int) -> list[tuple[int, float]]:
    """The likeliest first, without what has no mass."""
    if len(row) < top_k:
        raise BadAnswer(f"{len(row)} entries at {place} where top_k is {top_k}")
    # Ten digits at most, and below 2^31: int() of a long text takes its time, and ids are kept in 32 bits.
    if not all(key.isascii() and key.isdigit() and len(key) <= 10 and int(key) < 2**31 for key in row):
        raise BadAnswer(f"a key at {place} is no token id")
    # The actual token is always there too, so that a row has top_k or top_k + 1 entries; ranks say which are the top.
    found = sorted((-_number(entry, place), int(key)) for key, entry in row.items())[:top_k]
    if sum(math.exp(-value) for value, _ in found) > 1 + SLACK:
        raise BadAnswer(f"the probabilities at {place} add up to more than 1: these are no log-probs")
    return [(index, -value) for value, index in found if -value > LOWEST]


def _number(entry: Any, place: int) -> float:
    """A log-prob of a token that was not sampled: -inf, written as -9999.0, is possible there."""
    value = entry.get("logprob") if isinstance(entry, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value > SLACK:
        raise BadAnswer(f"log-prob {value!r} at {place}"[:120])
    return min(float(value), 0.0)
