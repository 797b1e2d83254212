"""Running an evaluation: benchmarks in fixed batches through a sampler and a verifier into a store.

The sampler is any ``types.Sampler``: a model in this process, stored responses, a server. Nothing here knows which. A
batch is a fixed run of problems, drawn and judged as one call; batches are a function of the settings, so that a
resumed evaluation decodes what is left exactly as an uninterrupted one would have.

Not covered: figures (``results``), where samplers and verifiers come from (the command line).
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from scope_opd.errors import RunFailed
from scope_opd.evaluate.run import judge_stream
from scope_opd.evaluate.store import Key, SampleStore
from scope_opd.types import Prompt, Rollout, Sampler, SamplingParams, Verdict, Verifier


@dataclass(frozen=True, slots=True)
class Task:
    """One benchmark of an evaluation.

    Attributes:
        name: the benchmark.
        prompts: its problems. Prompt ids are ``NAME/PROBLEM``, so that two benchmarks draw from different streams.
        counts: samples of each problem, by prompt id.
        params: how to draw them; ``params.n`` is what the sampler is asked for.
        verifier: judges them.
        batch_problems: problems a batch.
    """

    name: str
    prompts: Sequence[Prompt]
    counts: Mapping[str, int]
    params: SamplingParams
    verifier: Verifier
    batch_problems: int

    def batches(self) -> list[Sequence[Prompt]]:
        """The problems cut into batches, the longest prompts first.

        Prompts of one batch are padded to its longest. What will not fit into memory is met at the beginning.
        """
        size = self.batch_problems
        ordered = sorted(self.prompts, key=lambda prompt: -len(prompt.token_ids))
        return [ordered[start : start + size] for start in range(0, len(ordered), size)]

    def keys(self, prompts: Sequence[Prompt]) -> list[Key]:
        """The keys of every sample of some of its problems."""
        return [
            (self.name, self.problem(prompt.id), index) for prompt in prompts for index in range(self.counts[prompt.id])
        ]

    def problem(self, prompt: str) -> str:
        """A problem's id as its data set has it."""
        return prompt.removeprefix(f"{self.name}/")


class Progress(Protocol):
    """What is told of an evaluation while it runs."""

    def begin(self, done: int, total: int) -> None: ...
    def benchmark(self, name: str) -> None: ...
    def sample(self, tokens: int) -> None: ...
    def close(self) -> None: ...


def prompt_id(benchmark: str, problem: str) -> str:
    """The id under which a problem is sampled."""
    return f"{benchmark}/{problem}"


def pending_batches(tasks: Sequence[Task], store: SampleStore) -> list[tuple[Task, Sequence[Prompt]]]:
    """The batches that are still to be drawn, in order; drops from the store what is there of them."""
    batches = [(task, prompts, task.keys(prompts)) for task in tasks for prompts in task.batches()]
    store.keep(keys for _, _, keys in batches)
    return [(task, prompts) for task, prompts, keys in batches if not all(key in store.samples for key in keys)]


def run_batches(
    pending: Sequence[tuple[Task, Sequence[Prompt]]],
    sampler: Sampler,
    store: SampleStore,
    progress: Progress,
    *,
    total: int,
) -> None:
    """Draw, judge and store what is pending.

    Args:
        pending: from ``pending_batches``.
        sampler: draws the samples.
        store: takes them.
        progress: is told of each.
        total: samples of the whole evaluation.

    Raises:
        RunFailed: the sampler lost samples, or the store cannot be written.
        ScopeError: what sampler or verifier refuse.
    """
    progress.begin(len(store.samples), total)
    try:
        for task, prompts in pending:
            progress.benchmark(task.name)
            asyncio.run(_run_batch(task, prompts, sampler, store, progress))
    finally:
        progress.close()


async def _run_batch(
    task: Task, prompts: Sequence[Prompt], sampler: Sampler, store: SampleStore, progress: Progress
) -> None:
    expected = set(task.keys(prompts))

    def take(rollout: Rollout, verdict: Verdict) -> None:
        key = (task.name, task.problem(rollout.group), rollout.sample)
        if key not in expected or key in store.samples:
            raise RunFailed(f"sample {rollout.sample} of {rollout.group!r}", "each of its samples once")
        store.append(key, sample_row(rollout, verdict))
        progress.sample(len(rollout.token_ids))

    await judge_stream(sampler, task.verifier, prompts, task.params, take)
    lost = [key for key in expected if key not in store.samples]
    if lost:
        name, count = lost[0][1], sum(key[1] == lost[0][1] for key in lost)
        raise RunFailed(f"{count} samples of {name!r} are missing", "all of them", "the sampler lost some")


def sample_row(rollout: Rollout, verdict: Verdict) -> dict[str, Any]:
    """What is kept of a sample. ``tokens`` is null where the response came without them."""
    tokens = len(rollout.token_ids) if rollout.token_ids else rollout.sampling.get("tokens")
    return {
        "correct": verdict.correct,
        "extracted": verdict.extracted,
        "reason": verdict.reason,
        "finish_reason": rollout.sampling.get("finish_reason", rollout.finish_reason),
        "tokens": tokens,
        "characters": len(rollout.text),
        "nll": -math.fsum(rollout.logprobs) / len(rollout.logprobs) if rollout.logprobs else None,
        "text": rollout.text,
    }
