"""The teacher behind HTTP: scores rollouts one by one as they end, and says so where it cannot.

A rollout that no server could score before its deadline has ``logprobs=None``: it is masked and counted, never given a
number. When more than ``max_unscored`` of a step's requests end so, the run stops before the step changes anything.
Each score, with what it took, is a line of teacher.jsonl. Where ``Servers.top_k`` is set a score has the likeliest
tokens of each place besides. Not covered: divergences over the whole vocabulary (they need logits), the student's own
likeliest tokens (vLLM's call for given ids a row needs its second model runner, which CPU builds lack).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from scope_opd.errors import RunFailed, ScopeError
from scope_opd.serving.faults import RowRefused, Unanswered
from scope_opd.serving.route import fatal_in_a_run
from scope_opd.serving.vllm import ScoreRequest, token_hash
from scope_opd.teacher.ends import EndTokens
from scope_opd.teacher.servers import Servers
from scope_opd.types import Prompt, Rollout, TeacherScore, TopK


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one request.

    Attributes:
        logprobs: raw, as the server gave them; None where there are none.
        error: why not.
        foreign: the reason is a token beyond the teacher's vocabulary.
        tries: requests sent.
        row: the ledger's line.
        topk: the likeliest tokens, where they are asked for.
    """

    logprobs: list[float] | None
    error: str | None
    foreign: bool
    tries: int
    row: dict[str, Any]
    topk: TopK | None = None


@dataclass(slots=True)
class _Step:
    """What is known of a step whose rollouts are being scored. Several may be under way (generation that ran ahead)."""

    number: int | None = None
    routes: dict[str, str] = field(default_factory=dict)
    requests: int = 0
    unscored: int = 0
    last_error: str = ""


class PoolTeacher:
    """Scores rollouts with servers; implements ``types.StepTeacher``. Each rollout counts for its own step.

    Args:
        servers: open. ``close`` ends them.
        route_of: the route of a prompt; None where there is one route for all.
        log_prob_floor: log-probs below it are raised to it and counted.
        max_unscored: share of a step's requests that may stay unscored.
        ends: what to do where it ends responses with other tokens than the student; None: score them as any token.

    Attributes:
        streams: True: each rollout is sent as soon as it ends.
    """

    streams: bool = True

    def __init__(
        self,
        servers: Servers,
        *,
        route_of: Callable[[Prompt], str] | None = None,
        log_prob_floor: float = -100.0,
        max_unscored: float = 0.01,
        ends: EndTokens | None = None,
    ) -> None:
        self.ends = ends
        self.servers, self.log_prob_floor, self.max_unscored = servers, log_prob_floor, max_unscored
        self._route_of = route_of
        self._latest = _Step()
        self._steps: dict[int | None, _Step] = {}

    async def begin_step(self, prompts: Sequence[Prompt], step: int) -> None:
        """A step begins: learn its prompts' routes, and have every server prove itself before it is used."""
        self.servers.ledger.open()
        self._latest = self._steps[step] = _Step(step)
        if self._route_of is not None:
            self._latest.routes = {prompt.id: self._route_of(prompt) for prompt in prompts}
        await self._probe(wait=False)

    async def end_step(self, step: int) -> list[str]:
        """A step's rollouts are all scored: have the servers prove themselves again, and count what is missing.

        Returns:
            A line for each server that went down, or came back, since it was last asked.

        Raises:
            RunFailed: a server serves another model than at the start, or too much is unscored.
        """
        await self._probe(wait=True)
        done = self._steps.pop(step)
        if done.unscored > self.max_unscored * done.requests:
            raise RunFailed(
                f"step {step}: {done.unscored} of {done.requests} rollouts could not be scored by the teacher; "
                f"{done.last_error}",
                f"at most {self.max_unscored:.3g} of them (teacher.max_unscored)",
                "the step was not taken: see to the servers, then continue with --resume",
            )
        return self.notes()

    async def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScore]:
        """Log-probs of every response token at temperature 1 of the served model, floored; one score a rollout.

        May be called from any event loop, also from several at once.

        Raises:
            RunFailed: a setting is wrong, or a rollout is beyond the servers; names the rollout.
        """
        futures = [self.servers.thread.submit(self.request(rollout)) for rollout in rollouts]
        try:
            outcomes = await asyncio.gather(*(asyncio.wrap_future(future) for future in futures))
        except ScopeError as error:
            raise fatal_in_a_run(error) from None
        finally:
            for future in futures:
                future.cancel()
        return [self._account(rollout, outcome) for rollout, outcome in zip(rollouts, outcomes, strict=True)]

    async def request(self, rollout: Rollout, *, rows_may_fail: bool = False) -> Outcome:
        """Score one rollout; in the servers' thread.

        Args:
            rollout: with at least one prompt token.
            rows_may_fail: a 400 for this one is its outcome, not an error.

        Raises:
            ScopeError: a setting is wrong, or (without ``rows_may_fail``) the server refuses this rollout.
        """
        if not rollout.token_ids:
            return Outcome([], None, False, 0, {})
        step = self._step_of(rollout)
        name = step.routes.get(rollout.group, "") if self._route_of is not None else ""
        route = self.servers.routes[name]
        response = rollout.token_ids if self.ends is None else self.ends.scored(rollout)
        tokens = (*rollout.prompt_token_ids, *response)
        request = ScoreRequest(tokens, len(rollout.prompt_token_ids), self.servers.top_k)
        row: dict[str, Any] = {
            "time": time.time(), "step": step.number, "id": rollout.id, "route": name, "model": route.settings.model,
            "tokens": len(tokens), "token_hash": token_hash(tokens),
        }  # fmt: skip
        try:
            done = await route.pool.call(len(tokens), lambda endpoint: route.score(endpoint, request))
        except Unanswered as error:
            row.update(scored=False, attempts=error.tries, faults=dict(error.faults), error=str(error))
            return Outcome(None, str(error), False, error.tries, row)
        except RowRefused as error:
            if not (rows_may_fail or error.foreign_token):
                raise RunFailed(
                    f"rollout {rollout.id!r} with {len(tokens)} tokens: {error}", "a sequence that the teacher takes",
                    "lower rollout.max_tokens or data.max_prompt_tokens, or serve it with a larger --max-model-len",
                ) from None  # fmt: skip
            row.update(scored=False, attempts=1, error=str(error))
            return Outcome(None, str(error), error.foreign_token, 1, row)
        row.update(
            scored=True, endpoint=str(done.endpoint.url), attempts=done.tries, latency_s=round(done.latency_s, 6),
            faults=dict(done.faults),
        )  # fmt: skip
        return Outcome(done.value.logprobs, None, False, done.tries, row, done.value.top)

    def notes(self) -> list[str]:
        """A line for each server that went down or came back since this was last asked. From any thread."""
        return [news.line("teacher") for route in self.servers.routes.values() for news in route.pool.news()]

    def close(self) -> None:
        """End the client. Nothing of it is left afterwards; may be called twice."""
        self.servers.close()

    def _account(self, rollout: Rollout, outcome: Outcome) -> TeacherScore:
        if not outcome.row:
            return TeacherScore([])
        self.servers.ledger.add(outcome.row)
        step = self._step_of(rollout)
        step.requests += 1
        if outcome.logprobs is None:
            # A token that the teacher lacks is the rollout's own fault, in process too: no reason to stop the run.
            step.unscored += not outcome.foreign
            step.last_error = outcome.error or ""
            return TeacherScore(None, tries=outcome.tries)
        values, mask = outcome.logprobs, None if self.ends is None else self.ends.mask(rollout)
        used = [value for value, keep in zip(values, mask or [1] * len(values), strict=True) if keep]
        floored = sum(value < self.log_prob_floor for value in used)
        raised = [max(value, self.log_prob_floor) for value in values]
        return TeacherScore(raised, floored, outcome.tries, mask, outcome.topk)

    def _step_of(self, rollout: Rollout) -> _Step:
        return self._steps.get(rollout.step, self._latest)

    async def _probe(self, *, wait: bool) -> None:
        async def probe() -> None:
            await asyncio.gather(*(route.pool.probe_all(wait=wait) for route in self.servers.routes.values()))

        try:
            await asyncio.wrap_future(self.servers.thread.submit(probe()))
        except ScopeError as error:
            raise fatal_in_a_run(error) from None
