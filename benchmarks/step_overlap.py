"""What a step costs when the teacher scores while rollouts are still generated, and when it scores after all of them.

    python benchmarks/step_overlap.py [--scale 0.02] [--prompts 32] [--steps 2] [--seeds 3] [--keep DIR]

The real trainer (``scope_opd.train.train``: session, pipeline, credit, learner) with engines whose speeds are in the
ratio of the paper's step: generation 248 s, scoring of *all* rollouts 200 s, update 154 s. One such second takes
``--scale`` seconds. What is simulated, and nothing else:

- The sampler yields rollouts at the times at which servers that decode at one rate would: a rollout's length is its
  time, the longest takes 248. Lengths are log-normal, wrong rollouts longer; 10 % of all rollouts are wrong and end
  together at the limit. Which rollouts are wrong is independent of the group: the fewest groups are then free of those.
- The teacher is one queue for all requests that works through tokens in order at a finite rate, without a pause while
  there are any: a request ends when all tokens before its last and its own are done.
- The update is the learner's own forward and backward on a tiny model; each micro-batch takes as long as its tokens in
  the loss cost (154 for an average step's), of which computing is a part. All methods train on all rollouts.

Arms: ``grpo`` (no teacher); ``scope`` (streamed: wrong rollouts are sent the moment they end; complete groups are
trained on while the teacher finishes); ``release`` (the order of the authors' release: generation, then scoring of all
rollouts, then update). Each share of wrong rollouts has its own lengths, the same for all arms, whose steps are
compared one by one; medians over steps and seeds. ``ratio_to_ideal`` compares with 248 s and the step's update alone,
without our own work (making batches, credit, logging), which a small ``--scale`` magnifies.

Prints one JSON line; times are in seconds of the paper's step. Exit code 1 if SCOPE costs more than 1.10 GRPO steps at
a share that the goal names, or if the teacher received other tokens than those of the wrong rollouts.

Not covered: sampling that slows down with many requests, weight sync, real servers.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import scope_opd.train.loop as loop
from scope_opd.cli.engines import paths_weighted_by_perplexity, surrogate_settings
from scope_opd.cli.inputs import build_configured_method
from scope_opd.config import Config, validate_config
from scope_opd.credit import assign_credit
from scope_opd.pipeline import BackgroundPipeline, Pipeline
from scope_opd.train import Engines
from scope_opd.train.step import Learner
from scope_opd.types import Prompt, Rollout, SamplingParams, TeacherScore, Verdict

GENERATION, SCORING, UPDATE = 248.0, 200.0, 154.0
"""Seconds of the paper's step: until the longest rollout has ended; scoring all rollouts; updating on all."""

ARMS = ("grpo", "scope", "release")
GOAL = 1.10
GOAL_SHARES = (0.3, 0.6)
AT_LIMIT = 0.10
N = 8
LIMIT = 256
"""Tokens of a rollout that ends at the limit."""

VOCABULARY = 32


class Draws:
    """The lengths and verdicts of every step of a seed, drawn beforehand: a function of (seed, share, step)."""

    def __init__(self, seed: int, share: float, prompts: int, steps: int) -> None:
        self.wrong, self.lengths = [], []
        for step in range(steps):
            rng = np.random.default_rng([seed, round(100 * share), step])
            count = prompts * N
            order = rng.permutation(count)
            wrong = np.zeros(count, dtype=bool)
            wrong[order[: round(share * count)]] = True
            lengths = np.where(wrong, _lognormal(rng, 0.42, count), _lognormal(rng, 0.30, count))
            lengths[order[: round(AT_LIMIT * count)]] = LIMIT
            self.wrong.append(wrong)
            self.lengths.append(lengths)

    @property
    def mean_tokens(self) -> float:
        """Tokens of all rollouts of a step, in the mean."""
        return float(np.mean([lengths.sum() for lengths in self.lengths]))

    @property
    def ideal_s(self) -> list[float]:
        """Each step's generation and update, by the pace alone: a GRPO step in which our own work takes no time."""
        return [GENERATION + UPDATE * float(lengths.sum()) / self.mean_tokens for lengths in self.lengths]

    @property
    def wrong_tokens(self) -> int:
        """Tokens of the wrong rollouts of all steps."""
        return int(sum(lengths[wrong].sum() for lengths, wrong in zip(self.lengths, self.wrong, strict=True)))


def _lognormal(rng: np.random.Generator, median: float, count: int) -> np.ndarray:
    """Lengths below the limit, log-normal with this median (a share of the limit); longer ones are drawn again."""
    lengths = np.full(count, LIMIT)
    while (again := lengths >= LIMIT).any():
        drawn = LIMIT * median * np.exp(0.5 * rng.standard_normal(int(again.sum())))
        lengths[again] = np.maximum(4, drawn.round()).astype(int)
    return lengths


class TimedSampler:
    """Yields each rollout when its last token would have been decoded."""

    def __init__(self, draws: Draws, scale: float) -> None:
        self.draws, self.scale = draws, scale

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, step: int, policy_version: int
    ) -> AsyncIterator[Rollout]:
        began = time.monotonic()
        lengths = self.draws.lengths[step]
        rng = np.random.default_rng(step)
        for index in np.lexsort((rng.permutation(lengths.size), lengths)).tolist():  # those that end together: mixed
            size = int(lengths[index])
            prompt, sample = prompts[index // N], index % N
            await _until(began + self.scale * GENERATION * size / LIMIT)
            yield Rollout(
                id=f"{prompt.id}/{step}/{sample}", group=prompt.id, prompt_token_ids=list(prompt.token_ids),
                token_ids=rng.integers(1, VOCABULARY, size).tolist(), logprobs=rng.uniform(-4, -3, size).tolist(),
                finish_reason="length" if size == LIMIT else "stop", policy_version=policy_version, sample=sample,
                step=step,
            )  # fmt: skip


class DrawnVerdicts:
    """The verdict that was drawn with the length."""

    def __init__(self, draws: Draws, prompts: Sequence[Prompt]) -> None:
        self.draws, self.place = draws, {prompt.id: index for index, prompt in enumerate(prompts)}

    async def verify(self, rollout: Rollout, prompt: Prompt) -> Verdict:
        assert rollout.step is not None
        correct = not self.draws.wrong[rollout.step][self.place[prompt.id] * N + rollout.sample]
        return Verdict(correct, float(correct))


class QueueTeacher:
    """One queue of tokens, worked through in order at a finite rate.

    Attributes:
        tokens: response tokens received so far.
    """

    def __init__(self, tokens_per_s: float, *, streams: bool) -> None:
        self.tokens_per_s, self.streams, self.tokens, self._free_at = tokens_per_s, streams, 0, 0.0

    async def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScore]:
        return list(await asyncio.gather(*(self._score(rollout) for rollout in rollouts)))

    async def _score(self, rollout: Rollout) -> TeacherScore:
        size = len(rollout.token_ids)
        self.tokens += size
        self._free_at = max(self._free_at, time.monotonic()) + size / self.tokens_per_s
        await _until(self._free_at)
        return TeacherScore([-3.0] * size, tries=1)


class PacedLearner(Learner):
    """The learner; each micro-batch's forward and backward take as long as its tokens in the loss cost.

    Where a busy machine computes longer than that, the micro-batches after it make up for it.

    Attributes:
        tokens_per_s: what an update works through (a class attribute, since ``train`` makes the learner).
        late_s: seconds that were not made up for within their step, in all.
    """

    tokens_per_s = 1.0
    late_s = 0.0
    _behind_s = 0.0

    def _backward(self, micro: Any, *rest: Any, **more: Any) -> Any:
        due = time.monotonic() + micro.rollout.numel() / PacedLearner.tokens_per_s
        result = super()._backward(micro, *rest, **more)
        spare = due - time.monotonic() - self._behind_s
        self._behind_s = max(0.0, -spare)
        time.sleep(max(0.0, spare))
        return result

    def update(self, *args: Any, **settings: Any) -> Any:
        result = super().update(*args, **settings)
        PacedLearner.late_s, self._behind_s = PacedLearner.late_s + self._behind_s, 0.0
        return result


class SamePrompts:
    """The same prompts at every step."""

    def __init__(self, prompts: list[Prompt]) -> None:
        self.prompts = prompts

    def batch(self, step: int) -> list[Prompt]:
        return self.prompts


async def _until(due: float) -> None:
    await asyncio.sleep(max(0.0, due - time.monotonic()))


def tiny_student() -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = Qwen3Config(vocab_size=VOCABULARY, num_key_value_heads=1, head_dim=16, **size)
    return Qwen3ForCausalLM(config).eval()


def make_engines(config: Config, arm: str, draws: Draws, teacher: QueueTeacher, scale: float) -> Engines:
    prompts = [
        Prompt(id=f"p{index}", problem="", answer=None, token_ids=(1, 2))
        for index in range(config.train.prompts_per_step)
    ]
    method = build_configured_method(config)
    objective = config.objective
    pipeline = (Pipeline if arm == "release" else BackgroundPipeline)(
        TimedSampler(draws, scale),
        DrawnVerdicts(draws, prompts),
        None if arm == "grpo" else teacher,
        (lambda correct: True) if arm == "release" else method.needs_teacher,
        truncated=objective.truncated,
        reward_threshold=objective.reward_threshold,
    )
    sampling = SamplingParams(n=N, temperature=1.0, max_tokens=LIMIT, stop_token_ids=(0,), seed=0)
    return Engines(
        model=tiny_student(),
        tokenizer=None,
        pipeline=pipeline,
        credit=partial(
            assign_credit, method=method, truncated=objective.truncated, reward_threshold=objective.reward_threshold
        ),
        schedule=SamePrompts(prompts),
        sampling=sampling,
        surrogate=surrogate_settings(config, method, sampling, None),
        weights_use_tau=paths_weighted_by_perplexity(method),
    )


def measure(arm: str, draws: Draws, folder: Path, *, prompts: int, scale: float) -> dict[str, Any]:
    """One training of an arm: its rows, in paper seconds, and what its teacher received."""
    config = validate_config({
        "rollout": {"n": N, "temperature": 1.0, "max_tokens": LIMIT},
        "objective": {"method": "grpo" if arm == "grpo" else "scope", "truncated": "incorrect"},
        "train": {
            "steps": len(draws.lengths), "prompts_per_step": prompts, "threads": 1, "lr": 1e-4,
            "max_tokens_per_microbatch": 4 * (LIMIT + 2),
        },
        "run": {"dir": str(folder), "checkpoint_every": 0, "rollouts_logged": 0, "export": False},
    })  # fmt: skip
    teacher = QueueTeacher(draws.mean_tokens / (scale * SCORING), streams=arm == "scope")
    PacedLearner.tokens_per_s = draws.mean_tokens / (scale * UPDATE)
    PacedLearner.late_s = 0.0
    with redirect_stdout(sys.stderr):
        loop.train(config, make_engines(config, arm, draws, teacher, scale), progress=False)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    exposed = [row.get("time/teacher_exposed_s") for row in rows]
    return {
        "step_s": [row["time/step_s"] / scale for row in rows],
        "teacher_tokens": teacher.tokens,
        "scored_tokens": sum(row["teacher/scored_tokens"] for row in rows),
        "trained_tokens": sum(row["tokens/trained"] for row in rows),
        "exposed_s": [value / scale for value in exposed if value is not None],
        "hidden_share": [value for row in rows if (value := row.get("perf/teacher_hidden_share")) is not None],
        "late_s": PacedLearner.late_s / scale / len(rows),
    }


def summary(share: float, runs: dict[str, list[dict[str, Any]]], drawn: list[Draws]) -> dict[str, Any]:
    """Medians over the steps of all seeds; ratios are of the same step's lengths."""
    steps = {arm: [value for run in found for value in run["step_s"]] for arm, found in runs.items()}
    ideal = [value for draws in drawn for value in draws.ideal_s]
    wrong, tokens = sum(draws.wrong_tokens for draws in drawn), sum(int(np.sum(draws.lengths)) for draws in drawn)
    expected = {"grpo": 0, "scope": wrong, "release": tokens}
    entry: dict[str, Any] = {"wrong": share, "wrong_tokens": wrong, "tokens": tokens}
    for arm, found in runs.items():
        ratios = [ours / grpo for ours, grpo in zip(steps[arm], steps["grpo"], strict=True)]
        entry[arm] = {
            "step_s": round(statistics.median(steps[arm]), 1),
            "ratio_to_grpo": round(statistics.median(ratios), 3),
            "ratios": [round(min(ratios), 3), round(max(ratios), 3)],
            "ratio_to_ideal": round(statistics.median(a / b for a, b in zip(steps[arm], ideal, strict=True)), 3),
            "teacher_tokens": sum(run["teacher_tokens"] for run in found),
            "exposed_s": _median([value for run in found for value in run["exposed_s"]], 1),
            "hidden_share": _median([value for run in found for value in run["hidden_share"]], 3),
            "update_late_s": round(statistics.mean(run["late_s"] for run in found), 2),
        }
        right = {run["trained_tokens"] for run in found} == {int(np.sum(draws.lengths)) for draws in drawn}
        entry[arm]["tokens_exact"] = right and all(
            sum(run[key] for run in found) == expected[arm] for key in ("teacher_tokens", "scored_tokens")
        )
    return entry


def _median(values: list[float], digits: int) -> float | None:
    return round(statistics.median(values), digits) if values else None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=float, default=0.02, help="seconds that a second of the paper's step takes")
    parser.add_argument("--prompts", type=int, default=32, help=f"prompts a step, {N} rollouts each")
    parser.add_argument("--steps", type=int, default=2, help="steps of a training")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each arm and share")
    parser.add_argument("--wrong", type=float, nargs="+", default=[0.3, 0.6, 0.9], help="shares of wrong rollouts")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), help="grpo is always measured")
    parser.add_argument("--keep", type=Path, help="keep the run folders here (scope report draws a step in time)")
    options = parser.parse_args()
    if min(options.wrong) < AT_LIMIT or max(options.wrong) > 1:
        parser.error(f"--wrong {options.wrong}: expected shares from {AT_LIMIT} (those that end at the limit) to 1")

    loop.Learner = PacedLearner  # type: ignore[misc]
    arms = [arm for arm in ARMS if arm == "grpo" or arm in options.arms]
    shares: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        measure("scope", Draws(0, 0.5, 4, 2), Path(scratch) / "warm-up", prompts=4, scale=0.002)
        for share in options.wrong:
            drawn = [Draws(seed, share, options.prompts, options.steps) for seed in range(options.seeds)]
            runs: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arms}
            for seed, draws in enumerate(drawn):
                for arm in arms:
                    place = folder / f"{arm}-{round(100 * share)}-s{seed}"
                    runs[arm].append(measure(arm, draws, place, prompts=options.prompts, scale=options.scale))
            shares.append(summary(share, runs, drawn))
            print(json.dumps(shares[-1]), file=sys.stderr)
    named = [entry for entry in shares if entry["wrong"] in GOAL_SHARES and "scope" in entry]
    holds = {f"{entry['wrong']:g}": entry["scope"]["ratio_to_grpo"] <= GOAL for entry in named}
    exact = all(entry[arm]["tokens_exact"] for entry in shares for arm in arms)
    settings = {key: getattr(options, key) for key in ("scale", "prompts", "steps", "seeds")}
    worst = max((entry["scope"]["ratio_to_grpo"] for entry in named), default=None)
    print(
        json.dumps({
            "benchmark": "step_overlap", **settings, "ratio": worst, "goal": GOAL, "goal_holds": holds,
            "teacher_tokens_exact": exact, "shares": shares,
        })
    )  # fmt: skip
    return 0 if exact and all(holds.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
