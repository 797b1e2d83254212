"""Responses drawn by teachers behind HTTP, for methods in which the teacher samples (``kd``).

Each sample is a request with a seed of its own, a function of (seed, step, prompt, sample); what a server makes of a
seed is its own affair, so that another server or batch may draw another response. Log-probs must be those of the
distribution that sampled: a server that reports others is found out before the first sample. Not covered: streaming,
the student's samples.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from scope_opd.errors import RunFailed, ScopeError
from scope_opd.serving.faults import Fault, RowRefused, Unanswered
from scope_opd.serving.pool import Endpoint, Reply
from scope_opd.serving.route import (
    fatal_in_a_run,
    patiently,
    raw_logprobs,
    reports_sampled_logprobs,
    sample_seed,
)
from scope_opd.serving.vllm import Drawn, parse_sample, sample_body
from scope_opd.teacher.servers import Route, Servers
from scope_opd.types import Prompt, Rollout, SamplingParams


class ServerSampler:
    """Draws responses with servers; implements ``types.Sampler``.

    Args:
        servers: open.
        tokenizer: decodes responses to ``Rollout.text``.
        route_of: the route of a prompt; None where there is one route for all.
        vocabulary: ids that the student has rows for; a response with another one ends the run.
    """

    def __init__(
        self,
        servers: Servers,
        tokenizer: Any,
        *,
        route_of: Callable[[Prompt], str] | None = None,
        vocabulary: int | None = None,
    ) -> None:
        self.servers, self.tokenizer, self.vocabulary = servers, tokenizer, vocabulary
        self._route_of = route_of
        self._checked: set[str] = set()

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, step: int, policy_version: int
    ) -> AsyncIterator[Rollout]:
        """Yield every rollout as it ends.

        Raises:
            RunFailed: a sample could not be had, or would have been cut short by the server's context.
        """
        await self._check(prompts, params)
        futures = [
            self.servers.thread.submit(self._one(prompt, params, step, sample, policy_version))
            for prompt in prompts
            for sample in range(params.n)
        ]
        try:
            for done in asyncio.as_completed([asyncio.wrap_future(future) for future in futures]):
                yield await done
        except ScopeError as error:
            raise fatal_in_a_run(error) from None
        finally:
            for future in futures:
                future.cancel()

    def _route(self, prompt: Prompt) -> Route:
        return self.servers.routes[self._route_of(prompt) if self._route_of is not None else ""]

    async def _one(
        self, prompt: Prompt, params: SamplingParams, step: int, sample: int, policy_version: int
    ) -> Rollout:
        route = self._route(prompt)
        seed = sample_seed(params.seed, step, sample, prompt.id)
        name = f"{prompt.id}/{step}/{sample}"
        try:
            done = await route.pool.call(
                len(prompt.token_ids) + params.max_tokens,
                lambda endpoint: _draw(route, endpoint, prompt.token_ids, params, seed),
            )
        except (Unanswered, RowRefused) as error:
            raise RunFailed(
                f"sample {name!r} of {route.shown} could not be had: {error}", "a sample",
                "see to the servers, then continue with --resume",
            ) from None  # fmt: skip
        drawn = done.value
        if self.vocabulary is not None and max(drawn.token_ids) >= self.vocabulary:
            raise RunFailed(
                f"sample {name!r}: the teacher drew id {max(drawn.token_ids)}", f"ids below {self.vocabulary}, the "
                "student's rows", "choose a teacher with the student's vocabulary",
            )  # fmt: skip
        return Rollout(
            id=name,
            group=prompt.id,
            prompt_token_ids=list(prompt.token_ids),
            token_ids=drawn.token_ids,
            logprobs=drawn.logprobs,
            text=self.tokenizer.decode(drawn.token_ids, skip_special_tokens=True),
            finish_reason="length" if drawn.finish_reason == "length" else "stop",
            policy_version=policy_version,
            sample=sample,
            step=step,
            sampling={"temperature": params.temperature, "seed": params.seed, "server": str(done.endpoint.url)},
        )

    async def _check(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        longest: dict[str, Prompt] = {}
        for prompt in prompts:
            name = self._route(prompt).name
            longest[name] = max(longest.get(name, prompt), prompt, key=lambda each: len(each.token_ids))
        for name, prompt in longest.items():
            route, length = self.servers.routes[name], len(prompt.token_ids) + params.max_tokens
            if route.context is not None and length > route.context:
                raise RunFailed(
                    f"prompt {prompt.id!r} with max_tokens {params.max_tokens} needs {length} tokens",
                    f"at most the {route.context} of {route.shown}: it would cut responses short without a word",
                    "lower rollout.max_tokens or data.max_prompt_tokens, or serve it with a larger --max-model-len",
                )
            if name not in self._checked and params.temperature != 1.0:
                try:
                    await asyncio.wrap_future(self.servers.thread.submit(_refuse_raw_logprobs(route)))
                except ScopeError as error:
                    raise fatal_in_a_run(error) from None
                self._checked.add(name)


async def _draw(
    route: Route, endpoint: Endpoint, token_ids: Sequence[int], params: SamplingParams, seed: int
) -> Reply[Drawn]:
    return await route.pool.exchange(
        endpoint, "/completions", lambda body: parse_sample(body, token_ids, params),
        body=sample_body(token_ids, params, route.settings.model, seed),
        max_bytes=(1 << 20) + (len(token_ids) + params.max_tokens) * 400,
    )  # fmt: skip


async def _refuse_raw_logprobs(route: Route) -> None:
    for endpoint in route.pool.endpoints:
        attempt = partial(reports_sampled_logprobs, route.pool, endpoint, route.request.token_ids[:1])
        try:
            honest = await patiently(attempt, 10.0)
        except Fault:
            continue  # it is down: its log-probs are checked by nobody, but the same flags start every server
        if not honest:
            raise raw_logprobs(endpoint)
