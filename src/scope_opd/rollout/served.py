"""Responses drawn by servers: token ids in and out, one streamed request a sample.

Each sample has a seed of its own, a function of (seed, step, prompt, sample); what a server makes of a seed is its own
affair, so that another server or another batch may draw another response. All sampling parameters are sent, the end
tokens among them: only those end a response, whatever else the server knows of the model. A request that is lost is
sent again, with the same seed, to whoever is up.

Log-probs are those of the distribution that sampled; servers that report others are refused before the first sample.
Weights may change in flight: ``Rollout.policy_versions`` says which tokens are of which.

Not covered: several prompts or samples in one request; stop strings.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from scope_opd.errors import RunFailed, ScopeError
from scope_opd.rollout.samplers import Live, Samplers
from scope_opd.serving.faults import BadAnswer, Clipped, ForeignToken, RowRefused, Unanswered
from scope_opd.serving.pool import Endpoint, Reply
from scope_opd.serving.route import fatal_in_a_run, sample_seed
from scope_opd.serving.vllm import Drawn, SampleStream, sample_body
from scope_opd.types import Prompt, Rollout, SamplingParams

BYTES_A_TOKEN = 4000
"""Room for a token's event; a real one has about 400 bytes."""


class ServedSampler:
    """Draws responses with servers; implements ``types.Sampler``.

    Args:
        samplers: open.
        tokenizer: decodes responses to ``Rollout.text``.
        vocabulary: ids that the student has rows for; a response with another one ends the run. None: any.
        known_ends: ``params.stop_token_ids`` are all the tokens that end a response. Without it the server's own end
            tokens count too.
        need_logprobs: refuse servers whose log-probs are not those of the distribution that sampled. Without it
            rollouts of such servers have no log-probs.
    """

    def __init__(
        self,
        samplers: Samplers,
        tokenizer: Any,
        *,
        vocabulary: int | None = None,
        known_ends: bool = True,
        need_logprobs: bool = True,
    ) -> None:
        self.samplers, self.tokenizer, self.vocabulary = samplers, tokenizer, vocabulary
        self.known_ends, self.need_logprobs = known_ends, need_logprobs
        self._asked = False

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, step: int, policy_version: int
    ) -> AsyncIterator[Rollout]:
        """Yield every rollout as it ends. May be called from any event loop.

        Raises:
            RunFailed: a sample could not be had, or would have been cut short by a server's context.
        """
        self._check(prompts, params)
        loop, ended = asyncio.get_running_loop(), asyncio.Queue[Future[Rollout]]()

        def tell(future: Future[Rollout]) -> None:
            with suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(ended.put_nowait, future)

        futures: list[Future[Rollout]] = []
        try:
            shaped = await self._learn_honesty(params)
            for prompt in prompts:
                for sample in range(params.n):
                    future = self.samplers.thread.submit(
                        self._one(prompt, params, step, sample, policy_version, shaped)
                    )
                    futures.append(future)
                    future.add_done_callback(tell)
            for _ in range(len(futures)):
                yield (await ended.get()).result()
        except ScopeError as error:
            raise fatal_in_a_run(error) from None
        finally:
            for future in futures:
                future.cancel()

    def notes(self) -> list[str]:
        """A line for each server that went down or came back since this was last asked."""
        return self.samplers.changes()

    def close(self) -> None:
        """End client and thread. May be called twice."""
        self.samplers.close()

    # --- one sample --------------------------------------------------------------------------------------------------

    async def _one(
        self, prompt: Prompt, params: SamplingParams, step: int, sample: int, policy_version: int, shaped: bool
    ) -> Rollout:
        name = f"{prompt.id}/{step}/{sample}"
        seed = sample_seed(params.seed, step, sample, prompt.id)

        async def draw(endpoint: Endpoint) -> Reply[tuple[Drawn, Live]]:
            return await self._draw(endpoint, prompt.token_ids, params, seed, policy_version)

        pool, shown = self.samplers.pool, self.samplers.shown
        try:
            done = await pool.call(len(prompt.token_ids) + params.max_tokens, draw)
        except (Unanswered, RowRefused) as error:
            raise RunFailed(
                f"sample {name!r} of {shown} could not be had: {error}", "a sample",
                "see to the servers, then give the same command again (scope train: with --resume)",
            ) from None  # fmt: skip
        except Clipped as error:
            raise RunFailed(
                f"sample {name!r} was cut short by the server at {error.tokens} tokens, with a prompt of "
                f"{len(prompt.token_ids)}", f"up to max_tokens = {params.max_tokens}",
                "serve with a larger --max-model-len, and with --generation-config vllm where the checkpoint sets "
                "max_new_tokens, or lower max_tokens",
            ) from None  # fmt: skip
        except ForeignToken as error:
            raise RunFailed(
                f"sample {name!r}: the server drew id {error.token_id}",
                f"ids below {self.vocabulary}, the student's rows", "serve the student's own weights",
            ) from None  # fmt: skip
        drawn, live = done.value
        spans = live.spans()
        known = not shaped or self.need_logprobs or self.samplers.honest(done.endpoint)
        return Rollout(
            id=name,
            group=prompt.id,
            prompt_token_ids=list(prompt.token_ids),
            token_ids=drawn.token_ids,
            logprobs=drawn.logprobs if known else [],
            text=self.tokenizer.decode(drawn.token_ids, skip_special_tokens=True),
            finish_reason="length" if drawn.finish_reason == "length" else "stop",
            policy_version=spans[0][2],
            sample=sample,
            step=step,
            sampling={
                "temperature": params.temperature,
                "seed": params.seed,
                "top_p": params.top_p,
                "top_k": params.top_k,
                "repetition_penalty": params.repetition_penalty,
                "max_tokens": params.max_tokens,
                "server": str(done.endpoint.url),
                "tries": done.tries,
            },
            policy_versions=spans,
        )

    async def _draw(
        self, endpoint: Endpoint, prompt: Sequence[int], params: SamplingParams, seed: int, policy_version: int
    ) -> Reply[tuple[Drawn, Live]]:
        pool = self.samplers.pool
        stream = SampleStream(prompt, params, self.vocabulary)
        body = sample_body(prompt, params, endpoint.model, seed, stream=True, only_these_stops=self.known_ends)
        with self.samplers.watch(endpoint, stream, policy_version) as live:
            opened_at = await pool.stream(
                endpoint, "/completions", stream.take, body=body,
                max_bytes=(1 << 20) + (len(prompt) + params.max_tokens) * BYTES_A_TOKEN,
                idle_s=self.samplers.client.read_timeout_s, total_s=pool.settings.deadline_s,
            )  # fmt: skip
        drawn = stream.finish()
        if self.known_ends and drawn.finish_reason == "stop" and drawn.token_ids[-1] not in params.stop_token_ids:
            raise BadAnswer(f"it stopped at token {drawn.token_ids[-1]}, which is no end token")
        return Reply((drawn, live), opened_at)

    # --- before the first --------------------------------------------------------------------------------------------

    def _check(self, prompts: Sequence[Prompt], params: SamplingParams) -> None:
        empty = next((prompt.id for prompt in prompts if not prompt.token_ids), None)
        if empty is not None:
            raise ScopeError(f"prompt {empty!r} has no tokens", "at least one", "check the data set and the template")
        context = self.samplers.context
        if context is None or not prompts:
            return
        longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
        length = len(longest.token_ids) + params.max_tokens
        if length > context:
            raise RunFailed(
                f"prompt {longest.id!r} with max_tokens {params.max_tokens} needs {length} tokens",
                f"at most the {context} of the servers: they would cut responses short without a word",
                "lower max_tokens or drop the longest prompts, or serve with a larger --max-model-len",
            )

    async def _learn_honesty(self, params: SamplingParams) -> bool:
        """Whether log-probs must be those of the sampled distribution: they are the model's own where nothing else
        shapes it. Has the servers say which they report, the first time it matters."""
        shaped = (params.temperature, params.top_p, params.top_k, params.repetition_penalty) != (1.0, 1.0, 0, 1.0)
        if shaped and not self._asked:
            question = self.samplers.learn_honesty(demand=self.need_logprobs)
            await asyncio.wrap_future(self.samplers.thread.submit(question))
            self._asked = True
        return shaped
