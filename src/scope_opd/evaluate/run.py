"""Evaluation of a sampler on held-out prompts: draw n samples a prompt, judge them, count.

The sampler and the verifier are the ones of training, behind the same Protocols, so that one verifier judges both.
Verdicts overlap with sampling. The result is a function of the samples and their verdicts, not of the order in which
they arrive (sums are exact, counts are counts).

Randomness: ``params.seed`` must come from a stream that training does not use, or a model would be evaluated on draws
correlated with those it was trained on; ``evaluation_seed`` derives one. Methods evaluated with the same seed then meet
the same uniforms (common random numbers), which only helps a paired comparison.

Not covered: benchmarks by name, stored responses and resuming (``session``, built on ``judge_stream``).
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scope_opd.errors import DataError, RunFailed
from scope_opd.evaluate.metrics import summarise
from scope_opd.types import Prompt, Rollout, Sampler, SamplingParams, Verdict, Verifier

MAX_VERDICTS_IN_FLIGHT = 256


@dataclass(frozen=True, slots=True)
class EvalResult:
    """What one evaluation found. Shares are in [0, 1]; a mean over nothing is None.

    Attributes:
        step, policy_version: the training step and the optimiser steps behind the weights.
        params: how the samples were drawn.
        problem_ids, correct_counts: problems in the order given, and how many of their n samples were correct.
        truncated: share of samples that hit ``max_tokens``.
        no_verdict: share of samples that the verifier could not judge; they count as not correct.
        mean_length: response tokens a sample, the end token included.
        distinct_solutions: mean over problems of the number of different correct solutions among its n samples.
        nll: mean over response tokens of -log-prob of the sampling distribution: an estimate of its entropy per token.
    """

    step: int
    policy_version: int
    params: SamplingParams
    problem_ids: tuple[str, ...]
    correct_counts: tuple[int, ...]
    truncated: float
    no_verdict: float
    mean_length: float
    distinct_solutions: float | None
    nll: float | None

    def to_json(self) -> dict[str, Any]:
        """The object of ``eval.jsonl``: figures with intervals, and the counts from which all can be recomputed."""
        return {
            "step": self.step,
            "policy_version": self.policy_version,
            "temperature": self.params.temperature,
            **summarise(self.correct_counts, self.params.n),
            "truncated": self.truncated,
            "no_verdict": self.no_verdict,
            "mean_length": self.mean_length,
            "distinct_solutions": self.distinct_solutions,
            "nll": self.nll,
            "sampling": {
                "top_p": self.params.top_p,
                "top_k": self.params.top_k,
                "repetition_penalty": self.params.repetition_penalty,
                "max_tokens": self.params.max_tokens,
                "seed": self.params.seed,
            },
            "problem_ids": list(self.problem_ids),
        }


def evaluation_seed(seed: int) -> int:
    """The seed of a run's evaluations: another stream than its training rollouts', a function of the run's seed."""
    digest = hashlib.sha256(f"scope/evaluation/{seed}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


@dataclass(slots=True)
class _Tally:
    """What is kept of a sample: enough for every figure, none of its text."""

    correct: int = 0
    samples: int = 0
    unjudged: int = 0
    truncated: int = 0
    tokens: int = 0
    solutions: set[str] | None = None


async def evaluate(
    sampler: Sampler,
    verifier: Verifier,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    *,
    step: int,
    policy_version: int,
    distinct_key: Callable[[str], str] | None = None,
) -> EvalResult:
    """Draw ``params.n`` samples for each prompt, judge each, and count.

    Args:
        sampler, verifier: the engines.
        prompts: P held-out prompts with unique ids.
        params: ``params.seed`` must not be training's: see ``evaluation_seed``.
        step: recorded, and part of the sampler's randomness.
        policy_version: optimiser steps behind the weights.
        distinct_key: maps a correct response's text to what makes a solution "the same"; None: no such count.

    Raises:
        DataError: no prompts, or two with the same id.
        RunFailed: the sampler gave a rollout of another prompt, or too few or too many for one.
    """
    tallies = {prompt.id: _Tally(solutions=set() if distinct_key else None) for prompt in prompts}
    if not prompts:
        raise DataError("no prompts to evaluate", "at least one held-out problem", "check data.eval and eval.problems")
    if len(tallies) != len(prompts):
        ids = [prompt.id for prompt in prompts]
        twice = next(name for name in ids if ids.count(name) > 1)
        raise DataError(f"problem id {twice!r} occurs twice", "unique ids", "rename or drop one of the rows")
    negative_logprobs: list[float] = []

    def count(rollout: Rollout, verdict: Verdict) -> None:
        tally = tallies[rollout.group]
        tally.samples += 1
        tally.tokens += len(rollout.token_ids)
        tally.truncated += rollout.finish_reason == "length"
        tally.unjudged += verdict.correct is None
        if verdict.correct:
            tally.correct += 1
            if tally.solutions is not None and distinct_key is not None:
                tally.solutions.add(distinct_key(rollout.text))
        # fsum is exact, so one partial sum a rollout keeps memory flat and the total the same in any order of arrival
        negative_logprobs.append(-math.fsum(rollout.logprobs))

    await judge_stream(sampler, verifier, prompts, params, count, step=step, policy_version=policy_version)
    for name, tally in tallies.items():
        if tally.samples != params.n:
            raise RunFailed(f"problem {name!r} has {tally.samples} samples", f"{params.n}", "the sampler lost some")
    return _result(tallies, negative_logprobs, params, step=step, policy_version=policy_version)


async def judge_stream(
    sampler: Sampler,
    verifier: Verifier,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    take: Callable[[Rollout, Verdict], None],
    *,
    step: int = 0,
    policy_version: int = 0,
) -> None:
    """Hand every rollout of the prompts to ``take`` with its verdict, as verdicts come; verdicts overlap sampling.

    Raises:
        RunFailed: the sampler gave a rollout of another prompt.
        Exception: whatever sampler, verifier or ``take`` raised first; nothing of theirs goes on behind it.
    """
    by_id = {prompt.id: prompt for prompt in prompts}

    async def judge(rollout: Rollout) -> None:
        take(rollout, await verifier.verify(rollout, by_id[rollout.group]))

    pending: set[asyncio.Task[None]] = set()
    source = sampler.sample(prompts, params, step=step, policy_version=policy_version)
    try:
        async for rollout in source:
            if rollout.group not in by_id:
                raise RunFailed(f"the sampler returned a rollout of {rollout.group!r}", "one of the prompts given")
            pending.add(asyncio.create_task(judge(rollout)))
            if len(pending) >= MAX_VERDICTS_IN_FLIGHT:
                pending = await _settle(pending, asyncio.FIRST_COMPLETED)
        while pending:
            pending = await _settle(pending, asyncio.FIRST_EXCEPTION)
    finally:
        for task in pending:
            task.cancel()
        await asyncio.gather(*pending, return_exceptions=True)
        if isinstance(source, AsyncGenerator):  # left in mid-stream it would clean up only as garbage
            await source.aclose()


async def _settle(pending: set[asyncio.Task[None]], until: str) -> set[asyncio.Task[None]]:
    """Wait, raise what a verdict raised (the caller then ends every task of ``pending``), return the rest."""
    done, rest = await asyncio.wait(pending, return_when=until)
    for task in done:
        task.result()
    return rest


def _result(
    tallies: dict[str, _Tally], nlls: list[float], params: SamplingParams, *, step: int, policy_version: int
) -> EvalResult:
    samples = sum(tally.samples for tally in tallies.values())
    tokens = sum(tally.tokens for tally in tallies.values())
    solutions = [len(tally.solutions) for tally in tallies.values() if tally.solutions is not None]
    return EvalResult(
        step=step,
        policy_version=policy_version,
        params=params,
        problem_ids=tuple(tallies),
        correct_counts=tuple(tally.correct for tally in tallies.values()),
        truncated=sum(tally.truncated for tally in tallies.values()) / samples,
        no_verdict=sum(tally.unjudged for tally in tallies.values()) / samples,
        mean_length=tokens / samples,
        distinct_solutions=sum(solutions) / len(solutions) if solutions else None,
        nll=math.fsum(nlls) / tokens if tokens else None,
    )
