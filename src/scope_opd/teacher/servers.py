"""Routes to teachers behind HTTP: each is a pool of servers of one model, and the fingerprint that proves it is still
the same model.

A fingerprint is the log-probs of a fixed sequence. The first one of a route is the reference (that of an earlier
sitting, where the run is resumed); every server must give it again at the start, after a connection broke or the
server was down, and at both ends of each step. Not covered: scoring rollouts (``pool``), sampling (``sampling``).
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from scope_opd.errors import ConfigError, RunFailed
from scope_opd.serving.faults import Refused, RowRefused
from scope_opd.serving.http import HttpClient, LoopThread, monotonic
from scope_opd.serving.pool import Endpoint, Pool, PoolSettings, Reply
from scope_opd.serving.route import ClientSettings, RouteSettings, meet_all, refuse_unprotected, served_context
from scope_opd.serving.vllm import Scored, ScoreRequest, parse_score, score_body, token_hash
from scope_opd.teacher.ledger import Ledger

FINGERPRINT_TOKENS = 64
"""Tokens of the fixed sequence at most."""
BYTES_A_TOKEN = 600
"""Room for a token's entry in an answer; a real one has about 80 bytes."""


class Route:
    """One teacher's servers. Everything but ``describe`` runs in the client's loop.

    Args:
        name: of the route, "" where there is only one.
        settings: where and what.
        fingerprint: token ids of the fixed sequence, at least two; the first is its prompt.
        tolerance: mean absolute difference of two fingerprints of the same model at most, nats a token.
        reference: the fingerprint of an earlier sitting.
        top_k: likeliest tokens that the run asks for in each place; the fingerprint asks for as many.

    Attributes:
        context: tokens that the servers take at most (prompt, response and one more), None where none tells.
        down: what is wrong with servers that did not answer at the start.
    """

    def __init__(
        self,
        name: str,
        settings: RouteSettings,
        client: HttpClient,
        pool: PoolSettings,
        fingerprint: Sequence[int],
        *,
        tolerance: float,
        ledger: Ledger,
        reference: list[float] | None = None,
        top_k: int = 0,
    ) -> None:
        self.name, self.settings, self.tolerance = name, settings, tolerance
        self.request = ScoreRequest(tuple(fingerprint[:FINGERPRINT_TOKENS]), 1, top_k)
        self.hash = token_hash(self.request.token_ids)
        self.context: int | None = None
        self.down: list[str] = []
        self.pool = Pool(client, settings.endpoints(), pool, self.verify)
        self._ledger, self._reference = ledger, reference
        self._allow_unprotected = True

    @property
    def reference(self) -> Sequence[float] | None:
        """The log-probs of the fixed text that every server of this route must give; None before the first did."""
        return self._reference

    @property
    def shown(self) -> str:
        """The route in a sentence."""
        return f"teacher {self.name!r}" if self.name else "the teacher"

    async def score(self, endpoint: Endpoint, request: ScoreRequest) -> Reply[Scored]:
        """Have one sequence scored by one endpoint."""
        room = (1 << 20) + len(request.token_ids) * BYTES_A_TOKEN * (request.top_k + 2)
        return await self.pool.exchange(
            endpoint, "/completions", lambda body: parse_score(body, request),
            body=score_body(request, self.settings.model), max_bytes=room,
        )  # fmt: skip

    async def open(self, patience_s: float, *, allow_unprotected: bool) -> None:
        """Meet every server: key, model name, context, fingerprint.

        Args:
            patience_s: how long each may take; one that does not answer is down until a probe finds it.
            allow_unprotected: accept a server that is not on this machine and answers development routes (put to
                sleep, load other weights ...) to anybody.

        Raises:
            ConfigError: a setting is wrong, no server answers, or they serve different models.
        """
        self._allow_unprotected = allow_unprotected
        # One after another: the first gives the reference.
        self.down = await meet_all(self.pool, self._meet, patience_s, self.shown)

    async def verify(self, endpoint: Endpoint) -> None:
        """Take an endpoint's fingerprint and compare it.

        Raises:
            Fault: it gave none.
            RunFailed: it serves another model than at the start.
            Refused: a setting is wrong.
        """
        if endpoint.state == "probing" and not self._allow_unprotected:  # it was down: perhaps it is met only now
            await refuse_unprotected(self.pool, endpoint)
        began = monotonic()
        values = await self._fingerprint(endpoint)
        gap, new = self._gap(values), False
        if gap is None:
            self._reference, gap, new = values, 0.0, True
        elif gap > self.tolerance:
            values = await self._fingerprint(endpoint)  # once more: a single answer may be a single mistake
            gap = self._gap(values) or 0.0
        row = {
            "time": time.time(), "route": self.name, "endpoint": str(endpoint.url), "model": self.settings.model,
            "latency_s": round(monotonic() - began, 6), "token_hash": self.hash, "gap": gap,
        }  # fmt: skip
        self._ledger.add({**row, "fingerprint": values} if new else row)
        if gap > self.tolerance:
            raise RunFailed(
                f"{endpoint.url} serves another model as {self.settings.model!r} than before: the log-probs of a fixed "
                f"text differ by {gap:.3g} a token in the mean",
                f"at most {self.tolerance:g}",
                "serve the same weights everywhere and throughout a run, then continue with --resume",
            )

    def _gap(self, values: list[float]) -> float | None:
        """Mean absolute difference from the reference; None without one."""
        if self._reference is None:
            return None
        if len(values) != len(self._reference):
            return float("inf")
        return sum(abs(a - b) for a, b in zip(values, self._reference, strict=True)) / len(values)

    async def _fingerprint(self, endpoint: Endpoint) -> list[float]:
        try:
            return (await self.score(endpoint, self.request)).value.logprobs
        except RowRefused as error:
            if self.request.top_k and "logprobs" in str(error).lower():
                raise Refused(
                    f"{error} (asked for the {self.request.top_k} likeliest tokens)", "a server that gives as many",
                    f"start it with --max-logprobs {self.request.top_k} (scope serve teacher does), or lower "
                    "objective.topk",
                ) from None  # fmt: skip
            raise Refused(
                f"{error} (asked to score {len(self.request.token_ids)} tokens)", "a server that scores them",
                f"check that {self.settings.names.url} serves the teacher, with the student's vocabulary",
            ) from None  # fmt: skip

    async def _meet(self, endpoint: Endpoint) -> None:
        if not self._allow_unprotected:
            await refuse_unprotected(self.pool, endpoint)
        context = await served_context(self.pool, endpoint)
        if context is not None:
            self.context = min(context, self.context or context)
        try:
            await self.verify(endpoint)
        except RunFailed as error:
            raise ConfigError(error.found, error.expected, error.remedy) from None


class Servers:
    """All routes, their client and its thread. ``close`` ends them; it may be called twice.

    Args:
        routes: by name; "" is the one for whatever no other is named for.
        fingerprint: token ids that every teacher knows.
        references: (route, token hash) -> fingerprint of an earlier sitting.
        top_k: likeliest tokens to ask for in each place of a response.
    """

    def __init__(
        self,
        routes: Mapping[str, RouteSettings],
        fingerprint: Sequence[int],
        *,
        client: ClientSettings,
        pool: PoolSettings,
        tolerance: float = 0.05,
        ledger: Ledger | None = None,
        references: Mapping[tuple[str, str], list[float]] | None = None,
        top_k: int = 0,
    ) -> None:
        assert len(fingerprint) >= 2, "a fingerprint needs two tokens"
        self.ledger, self._settings, self.top_k = ledger or Ledger(None), client, top_k
        self.thread = LoopThread("scope-teacher")
        try:
            self._client = HttpClient(
                self.thread,
                connect_timeout_s=client.connect_timeout_s,
                read_timeout_s=client.read_timeout_s,
                ca_bundle=client.ca_bundle,
                connections=(pool.max_concurrency + 2) * sum(len(route.urls) for route in routes.values()),
            )
        except BaseException:
            self.thread.close()
            raise
        self.routes = {
            name: Route(
                name, settings, self._client, pool, fingerprint, tolerance=tolerance, ledger=self.ledger,
                reference=(references or {}).get((name, token_hash(fingerprint[:FINGERPRINT_TOKENS]))), top_k=top_k,
            )
            for name, settings in routes.items()
        }  # fmt: skip

    def open(self) -> list[str]:
        """Meet every server of every route; returns a warning for each that is down.

        Raises:
            ConfigError: see ``Route.open``.
        """

        async def meet() -> None:
            for route in self.routes.values():
                await route.open(self._settings.start_s, allow_unprotected=self._settings.allow_unprotected)

        self.thread.run(meet())
        return [
            f"{route.shown}: {line}; it is asked again later" for route in self.routes.values() for line in route.down
        ]

    def fingerprints(self) -> dict[str, dict[str, Any]]:
        """Of each route that has one: ``{"tokens", "logprobs"}``, the fixed text's hash and its first log-probs."""
        return {
            name: {"tokens": route.hash, "logprobs": list(route.reference)}
            for name, route in self.routes.items()
            if route.reference is not None
        }

    def close(self) -> None:
        self._client.close()
        self.ledger.close()
