"""Laws of an update that begins before the last score: it is the update of the whole batch. Runs that stream."""

from __future__ import annotations

import asyncio
import copy
import json
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from scope_opd.cli.pipelines import build_pipeline, steps_ahead
from scope_opd.config import Config
from scope_opd.errors import ConfigError, RunFailed
from scope_opd.objective.aggregate import ONE_DENOMINATOR, coefficients, denominator, undivided
from scope_opd.objective.methods import method_names
from scope_opd.pipeline import BackgroundPipeline
from scope_opd.rollout.local import LocalSampler
from scope_opd.teacher.local import LocalTeacher
from scope_opd.train import Engines, train
from scope_opd.train.batch import make_batch
from scope_opd.train.early import Gathering, exact_in_parts
from scope_opd.train.engines import SurrogateSettings
from scope_opd.train.outcome import Outcome
from scope_opd.train.signals import RunInterrupted
from scope_opd.train.step import Learner
from scope_opd.types import Prompt, Rollout, SamplingParams, TeacherScore
from test_train import rows
from test_train_batch import distance
from test_train_step import naive_logits, prepare, recorded
from tiny import tiny_model
from train_kit import TEMPERATURE, EvenSum, lasting, make_config, make_engines, same_weights, weights_of

# --- parts equal the whole -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ONE_DENOMINATOR)
def test_undivided_numbers_over_the_denominator_are_the_coefficients(aggregation: Any) -> None:
    draw = torch.Generator().manual_seed(3)
    for _ in range(50):
        reinforce, distill = torch.randn(2, 12, generator=draw, dtype=torch.float64)
        lengths, masked = torch.randint(0, 9, (12,), generator=draw), torch.rand(12, generator=draw) < 0.3
        masked |= lengths == 0
        groups = torch.randint(0, 4, (12,), generator=draw)
        whole = coefficients(reinforce, distill, lengths, masked, groups, aggregation)
        by = denominator(lengths, masked, groups, aggregation)
        for ours, theirs in zip(undivided(reinforce, distill, lengths, masked, aggregation), whole, strict=True):
            torch.testing.assert_close(ours / by, theirs, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="released"):
        undivided(reinforce, distill, lengths, masked, "released")


def test_only_one_denominator_for_all_can_wait_for_the_end() -> None:
    plain, twice = make_config(Path("x")).train, make_config(Path("x"), train={"updates_per_batch": 2}).train
    for aggregation, kl, expected in (
        ("prompt", 0.0, True), ("token", 0.0, True), ("sequence", 0.0, True), ("released", 0.0, False),
        ("token", 0.1, True), ("prompt", 0.1, False), ("sequence", 0.1, False),
    ):  # fmt: skip
        settings = SurrogateSettings(aggregation=aggregation, reference_kl=kl)  # type: ignore[arg-type]
        assert exact_in_parts(settings, plain) is expected
        assert not exact_in_parts(settings, twice)


def updated(
    engines: Engines, config: Config, rollouts: list[Rollout], parts: Sequence[Sequence[int]]
) -> tuple[Outcome, list[torch.Tensor], list[bool | None], float]:
    """The gradient right before the optimiser, with the groups ``parts`` begun early, in that order."""
    prompts, groups = engines.schedule.batch(0), {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    learner = Learner(engines, config.train)
    gathering = Gathering(engines, learner, config.train, prompts)
    for part in parts:
        gathering.begin([groups[prompts[index].id] for index in part])
    verdicts, batch = gathering.complete(rollouts)
    seen: list[torch.Tensor] = []

    def look() -> None:
        seen.extend(parameter.grad.clone() for parameter in learner.optimizer.parameters)

    outcome = learner.update(batch, 0.0, begun=gathering.begun, before_change=look)
    assert outcome.tokens.rollout.numel() == batch.tokens
    return outcome, seen, verdicts, batch.padding


CASES = [(method, "token", {}) for method in method_names()] + [
    ("scope", "prompt", {}), ("scope", "sequence", {}), ("grpo", "sequence", {}), ("reward_opd", "prompt", {}),
    ("dual_path", "token", {"reference_kl": 0.3}), ("opd", "prompt", {"distill": "full_kl"}),
    ("scope", "prompt", {"distill": "topk_reverse_kl", "topk": 9}),
]  # fmt: skip


@pytest.mark.parametrize(("method", "aggregation", "more"), CASES, ids=lambda value: str(value))
def test_an_update_begun_early_is_that_of_the_whole_batch(method: str, aggregation: str, more: dict[str, Any]) -> None:
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        config = make_config(
            Path("unused"), objective={"method": method, "aggregation": aggregation, **more},
            rollout={"max_tokens": 9}, train={"grad_clip": "off", "max_tokens_per_microbatch": 64},
        )  # fmt: skip
        engines = make_engines(config, dtype=dtype)
        if dtype == torch.float64:
            # The kit's Qwen3 computes its norms in float32 whatever its dtype, so that there a gradient that is divided
            # later is rounded elsewhere (1e-7). GPT-NeoX is float64 throughout.
            engines.model = engines.pipeline.sampler.model = tiny_model("gpt_neox", seed=1, dtype=dtype)  # type: ignore[attr-defined]
        rollouts = engines.pipeline.collect(
            engines.schedule.batch(0), engines.sampling, step=0, policy_version=0
        ).rollouts
        rollouts[5].loss_mask = [0] * len(rollouts[5].token_ids)
        whole, expected, verdicts, _ = updated(engines, config, copy.deepcopy(rollouts), [])
        assert any(bool(part.any()) for part in expected)
        for parts in ([[1]], [[2], [0]], [[0, 1, 2]], [[1, 2], [0]]):
            own = copy.deepcopy(rollouts)
            outcome, gradient, same, padding = updated(engines, config, own, parts)
            assert distance(gradient, expected) <= limit
            assert same == verdicts
            assert outcome.loss == pytest.approx(whole.loss, rel=limit, abs=limit)
            assert (outcome.kl_reference or 0.0) == pytest.approx(whole.kl_reference or 0.0, rel=1e-5)
            assert 0 <= padding < 1
            for name in ("advantage", "entropy", "mismatch"):
                assert by_token(outcome, name) == pytest.approx(by_token(whole, name), rel=1e-4, abs=1e-5)


def by_token(outcome: Outcome, name: str) -> list[float]:
    tokens = outcome.tokens
    order = sorted(range(tokens.rollout.numel()), key=lambda i: (int(tokens.rollout[i]), int(tokens.place[i])))
    return [float(getattr(tokens, name)[i]) for i in order]


def test_an_early_part_without_a_live_token_and_one_that_is_all_there_is() -> None:
    config = make_config(Path("unused"), objective={"method": "scope"}, train={"grad_clip": "off"})
    engines = make_engines(config, dtype=torch.float64)
    engines.model = engines.pipeline.sampler.model = tiny_model("gpt_neox", seed=1, dtype=torch.float64)  # type: ignore[attr-defined]
    rollouts = engines.pipeline.collect(engines.schedule.batch(0), engines.sampling, step=0, policy_version=0).rollouts
    for rollout in rollouts[:4]:
        rollout.loss_mask = [0] * len(rollout.token_ids)  # the first group has nothing to learn from
    _, expected, _, _ = updated(engines, config, copy.deepcopy(rollouts), [])
    for parts in ([[0]], [[0], [1, 2]]):
        assert distance(updated(engines, config, copy.deepcopy(rollouts), parts)[1], expected) < 1e-10
    for rollout in rollouts:
        rollout.loss_mask = [0] * len(rollout.token_ids)
    outcome, gradient, _, _ = updated(engines, config, rollouts, [[0], [1]])
    assert (outcome.updates, outcome.loss, gradient) == (0, 0.0, [])


def test_a_group_that_comes_twice_is_found() -> None:
    config = make_config(Path("unused"))
    engines = make_engines(config)
    found = engines.pipeline.collect(engines.schedule.batch(0), engines.sampling, step=0, policy_version=0)
    gathering = Gathering(engines, Learner(engines, config.train), config.train, engines.schedule.batch(0))
    gathering.begin(found.groups[:1])
    with pytest.raises(AssertionError, match="twice"):
        gathering.begin(found.groups[:1])


# --- rollouts of two versions ----------------------------------------------------------------------------------------


def test_c_corrects_staleness_token_by_token_and_distillation_uses_todays_log_probs() -> None:
    """The first two tokens of each rollout come from an older policy than the rest; the student is a third one."""
    engines, learner, rollouts, _ = prepare(
        "reward_opd", rollout={"max_tokens": 9}, objective={"sampler_correction_cap": 5.0}
    )
    policies = {version: tiny_model("qwen3", seed=seed, dtype=torch.float64) for version, seed in ((0, 31), (1, 1))}
    with torch.no_grad():
        for index, parameter in enumerate(policies[1].parameters()):  # version 1: the student's weights, moved a little
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
    for rollout in rollouts:
        tokens, cut = len(rollout.token_ids), min(2, len(rollout.token_ids))
        spans = [[0, cut, 0], [cut, tokens, 1]] if cut < tokens else [[0, tokens, 0]]
        rollout.policy_version, rollout.policy_versions = 0, spans
        for first, last, version in spans:
            with torch.no_grad():
                logs = (naive_logits(policies[version], rollout) / TEMPERATURE).log_softmax(-1)
            chosen = logs.gather(-1, torch.tensor(rollout.token_ids)[:, None]).squeeze(-1)
            rollout.logprobs[first:last] = chosen[first:last].tolist()
    engines.credit(rollouts)
    batch = make_batch(rollouts, aggregation="token", max_tokens=256)
    loss = torch.zeros((), dtype=torch.float64)
    gaps: dict[int, list[float]] = {0: [], 1: []}
    for rollout in rollouts:
        student = (naive_logits(engines.model, rollout) / TEMPERATURE).log_softmax(-1)
        student = student.gather(-1, torch.tensor(rollout.token_ids)[:, None]).squeeze(-1)
        ratio = student.detach() - recorded(rollout.logprobs)  # each token against the version that sampled it
        for first, last, version in rollout.policy_versions or []:
            gaps[version] += ratio[first:last].abs().tolist()
        signal_now = recorded(rollout.teacher_logprobs) - student.detach()
        advantage = (rollout.reinforce or 0.0) + (rollout.distill or 0.0) * signal_now
        loss = loss - (ratio.exp().clamp(max=5.0) * advantage * student).sum() / batch.tokens
    engines.model.zero_grad()
    loss.backward()
    expected = [parameter.grad.clone() for parameter in engines.model.parameters()]  # type: ignore[union-attr]
    assert distance(learner.gradient(batch)[1], expected) < 1e-10
    assert sum(gaps[0]) / len(gaps[0]) > 3 * sum(gaps[1]) / len(gaps[1]) > 0


# --- whole runs ------------------------------------------------------------------------------------------------------


class Streaming:
    """The in-process teacher, asked for one rollout at a time after a delay, as a server would be."""

    streams = True

    def __init__(self, teacher: LocalTeacher, delay_s: Callable[[], float] = lambda: 0.0) -> None:
        self.teacher, self.delay_s = teacher, delay_s
        self.asked: list[str] = []

    async def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScore]:
        self.asked += [rollout.id for rollout in rollouts]
        await asyncio.sleep(self.delay_s())
        return await self.teacher.score(rollouts)


class Copy:
    """A sampler with weights of its own, as a server has; and the publisher that renews them."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.student, self.sampler = model, LocalSampler(copy.deepcopy(model), tokenizer)
        self.calls: list[Any] = []
        self.versions: list[tuple[int, int]] = []
        self.error_at: int | None = None

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, step: int, policy_version: int
    ) -> AsyncIterator[Rollout]:
        self.versions.append((step, policy_version))
        async for rollout in self.sampler.sample(prompts, params, step=step, policy_version=policy_version):
            yield rollout

    def publish(self, version: int) -> dict[str, float]:
        self.calls.append(version)
        if version == self.error_at:
            raise RunFailed("no sampler could be brought to the new weights")
        self.sampler.model.load_state_dict(self.student.state_dict())
        return {"load": 0.0}

    def release(self) -> None:
        self.calls.append("release")

    def close(self) -> None:
        self.calls.append("close")


def streaming(
    config: Config, *, ahead: int = 0, delay_s: Callable[[], float] = lambda: 0.0, **changes: Any
) -> tuple[Engines, Streaming, Copy]:
    engines = make_engines(config, **changes)
    line = engines.pipeline
    teacher, sampler = Streaming(line.teacher, delay_s), Copy(engines.model, engines.tokenizer)  # type: ignore[attr-defined]
    engines.pipeline = BackgroundPipeline(
        sampler, EvenSum(), teacher, line.needs_teacher, truncated=line.truncated,  # type: ignore[attr-defined]
        schedule=engines.schedule.batch, steps=config.train.steps, ahead=ahead,
    )  # fmt: skip
    engines.publisher = sampler
    return engines, teacher, sampler


def close_to(found: list[dict[str, Any]], expected: list[dict[str, Any]], rel: float = 1e-3) -> None:
    for one, other in zip(lasting(found), lasting(expected), strict=True):
        for key, value in other.items():
            if key != "padding/share":
                assert one[key] == (value if value is None else pytest.approx(value, rel=rel, abs=1e-4)), key


def test_a_run_that_streams_is_the_run_that_does_not(tmp_path: Path) -> None:
    draw = random.Random(0)
    plain = make_config(tmp_path / "plain", train={"lr": 1e-4})
    expected = rows(train(plain, make_engines(plain), progress=False).folder, "metrics")
    config = make_config(tmp_path / "run", train={"lr": 1e-4})
    engines, teacher, sampler = streaming(config, delay_s=lambda: draw.random() * 0.05)
    begun: list[int] = []
    learner_begin = Learner.begin

    def counted(self: Learner, *parts: Any) -> Any:
        begun.append(len(parts[0]))
        return learner_begin(self, *parts)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Learner, "begin", counted)
        metrics = rows(train(config, engines, progress=False).folder, "metrics")
    close_to(metrics, expected)
    assert begun
    wrong = {r["id"] for r in rows(tmp_path / "run", "rollouts") if r["correct"] is False}
    right = {r["id"] for r in rows(tmp_path / "run", "rollouts") if r["correct"] and r["finish_reason"] == "stop"}
    assert wrong
    assert right
    assert wrong <= set(teacher.asked)
    assert right.isdisjoint(teacher.asked)
    assert len(teacher.asked) == len(set(teacher.asked)) == sum(row["teacher/scored_rollouts"] for row in metrics)
    assert sampler.versions == [(0, 0), (1, 1), (2, 2), (3, 3)]
    assert sampler.calls == [0, "release", 1, "release", 2, "release", 3, "release"]
    assert [row["rollout/staleness_max"] for row in metrics] == [0, 0, 0, 0]
    assert all(row["time/sync_s"] > 0 for row in metrics)
    assert not [thread for thread in threading.enumerate() if thread.name == "scope-pipeline"]


def test_the_timeline_of_a_run_says_when_which_stage_was_at_work(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    engines, *_ = streaming(config, delay_s=lambda: 0.05)
    train(config, engines, progress=False)
    lines, metrics = rows(tmp_path / "run", "timeline"), rows(tmp_path / "run", "metrics")
    assert [line["step"] for line in lines] == [0, 1, 2, 3]
    for line, row in zip(lines, metrics, strict=True):
        spans = line["spans"]
        assert list(spans) == ["generation", "verify", "teacher", "sync", "update"]
        assert all(0 <= a <= b <= line["seconds"] for found in spans.values() for a, b in found)
        assert line["seconds"] == pytest.approx(row["time/step_s"], abs=1e-4)
        assert spans["sync"][0][0] < spans["generation"][0][0] < spans["teacher"][0][0] < spans["update"][-1][1]
        busy = sum(b - a for a, b in spans["teacher"])
        assert 0 <= row["time/teacher_exposed_s"] <= busy + 1e-4
        assert row["perf/teacher_hidden_share"] == pytest.approx(1 - row["time/teacher_exposed_s"] / busy, abs=1e-3)
    in_process = make_config(tmp_path / "plain", objective={"method": "grpo"}, train={"steps": 1})
    train(in_process, make_engines(in_process), progress=False)
    (row,) = rows(tmp_path / "plain", "metrics")
    assert row["time/teacher_exposed_s"] == 0.0
    assert row["perf/teacher_hidden_share"] is None
    assert row["time/sync_s"] is None


def test_a_run_that_samples_ahead_trains_on_tokens_of_versions_before(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", train={"steps": 6, "lr": 1e-4})
    draw = random.Random(1)
    engines, _, sampler = streaming(config, ahead=2, delay_s=lambda: draw.random() * 0.02)
    metrics = rows(train(config, engines, progress=False).folder, "metrics")
    assert sorted(step for step, _ in sampler.versions) == list(range(6))
    assert all(step - version <= 2 for step, version in sampler.versions)
    assert [row["policy_version"] for row in metrics] == list(range(6))
    assert 0 < max(row["rollout/staleness_max"] for row in metrics) <= 2
    assert all(math.isfinite(row["loss"]) for row in metrics)
    stale = max(metrics, key=lambda row: row["rollout/staleness_mean"])
    assert abs(stale["mismatch/kl"]) > 1e-7
    spans = [line["spans"]["generation"][0][0] for line in rows(tmp_path / "run", "timeline")]
    assert min(spans) < 0


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_run_that_streams_resumes_where_it_was(tmp_path: Path, ahead: int) -> None:
    """What was in flight is done again, the rows of the steps before stay, and each step has one row in each file."""
    config = make_config(tmp_path / "run", train={"steps": 5, "lr": 1e-4}, run={"checkpoint_every": 2})
    engines, teacher, _ = streaming(config, ahead=ahead)
    score = teacher.score

    async def broken(rollouts: Sequence[Rollout]) -> list[TeacherScore]:
        if rollouts[0].step == 3:
            raise RunFailed("the teacher is gone")
        return await score(rollouts)

    teacher.score = broken  # type: ignore[method-assign]
    with pytest.raises(RunFailed, match="the teacher is gone"):
        train(config, engines, progress=False)
    assert not [thread for thread in threading.enumerate() if thread.name == "scope-pipeline"]
    before = rows(tmp_path / "run", "metrics")
    assert [row["step"] for row in before] == [0, 1, 2]
    again, _, sampler = streaming(config, ahead=ahead)
    assert train(config, again, resume=True, progress=False).steps == 5
    assert [row["step"] for row in rows(tmp_path / "run", "metrics")] == list(range(5))
    assert [row["step"] for row in rows(tmp_path / "run", "timeline")] == list(range(5))
    assert rows(tmp_path / "run", "metrics")[:3] == before
    assert sorted(sampler.versions)[0] == (3, 3)
    assert sampler.calls[0] == 3
    if not ahead:
        whole = make_config(tmp_path / "whole", train={"steps": 5, "lr": 1e-4})
        expected, *_ = streaming(whole)
        train(whole, expected, progress=False)
        close_to(rows(tmp_path / "run", "metrics"), rows(tmp_path / "whole", "metrics"))


def test_steps_without_an_update_do_not_hold_up_generation_ahead(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", train={"steps": 5}, run={"alarms": {"nan": "warn"}})
    engines, _, sampler = streaming(config, ahead=1)
    credit = engines.credit

    def poison(rollouts: Sequence[Rollout]) -> Sequence[bool | None]:
        verdicts = credit(rollouts)
        if rollouts and (rollouts[0].step or 0) >= 1:
            rollouts[0].reinforce = math.inf
        return verdicts

    engines.credit = poison
    metrics = rows(train(config, engines, progress=False).folder, "metrics")
    assert [row["update/not_finite"] for row in metrics] == [0, 1, 1, 1, 1]
    assert [row["policy_version"] for row in metrics] == [0, 1, 1, 1, 1]
    assert sampler.versions[-1] == (4, 1)


def test_weights_are_published_before_an_evaluation_and_a_failure_to_saves_the_run(tmp_path: Path) -> None:
    evaluation = {"every": 2, "at_start": True, "at_end": True}
    config = make_config(tmp_path / "run", eval=evaluation, run={"checkpoint_every": 0})
    order: list[Any] = []

    def evaluator(step: int, policy_version: int) -> list[dict[str, Any]]:
        order.append((step, list(sampler.calls)))
        return [{"temperature": 0.6, "n": 1, "problems": 1, "avg@k": 0.0, "pass@k": {"1": 0.5}}]

    engines, _, sampler = streaming(config, evaluator=evaluator)
    sampler.error_at = 3
    phases: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        from scope_opd.train.runfolder import RunFolder

        tell = RunFolder.phase

        def told(self: RunFolder, step: int, phase: str) -> None:
            phases.append(phase)
            tell(self, step, phase)

        patch.setattr(RunFolder, "phase", told)
        with pytest.raises(RunFailed, match="no sampler could be brought"):
            train(config, engines, progress=False)
    assert order == [(0, [0]), (2, [0, 0, "release", 1, "release", 2])]
    assert phases[:3] == ["sync", "evaluation", "sync"]
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000003"]
    assert not [thread for thread in threading.enumerate() if thread.name == "scope-pipeline"]


def test_a_signal_saves_a_run_that_streams_and_leaves_no_thread(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", train={"steps": 50}, run={"checkpoint_every": 0})
    engines, teacher, _ = streaming(config, ahead=1)
    score = teacher.score

    async def hang(rollouts: Sequence[Rollout]) -> list[TeacherScore]:
        if rollouts[0].step == 2:
            threading.Timer(0.2, signal.raise_signal, [signal.SIGINT]).start() if not stopped else None
            stopped.append(1)
            await asyncio.sleep(1000)
        return await score(rollouts)

    stopped: list[int] = []
    teacher.score = hang  # type: ignore[method-assign]
    with pytest.raises(RunInterrupted) as caught:
        train(config, engines, progress=False)
    assert caught.value.exit_code == 130
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000002"]
    assert [thread.name for thread in threading.enumerate() if thread.name == "scope-pipeline"] == []
    assert json.loads((tmp_path / "run/events.jsonl").read_text().splitlines()[-1])["kind"] == "checkpoint"


def test_an_in_process_run_is_untouched_by_all_this(tmp_path: Path) -> None:
    """No thread but that of checkpoints, nothing early, the same weights whether or not a timeline is kept."""
    original = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        assert thread.name == "scope-checkpoint"
        original(thread)

    weights = []
    for name in ("a", "b"):
        config = make_config(tmp_path / name, train={"steps": 2})
        engines = make_engines(config)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Learner, "begin", lambda *_: pytest.fail("early"))
            patch.setattr(threading.Thread, "start", start)
            train(config, engines, progress=False)
        weights.append(weights_of(engines.model))
    assert same_weights(*weights)


# --- which pipeline --------------------------------------------------------------------------------------------------


def test_servers_make_the_pipeline_a_background_one_and_updates_count_for_staleness(tmp_path: Path) -> None:
    def configured(staleness: int, updates: int) -> Config:
        rollout = {"base_urls": ["http://h/v1"], "model": "m", "max_staleness": staleness}
        return make_config(tmp_path / "x", rollout=rollout, train={"updates_per_batch": updates})

    allowed = {(0, 1): 0, (1, 1): 1, (3, 1): 3, (3, 2): 1, (4, 2): 2, (0, 4): 0}
    assert {pair: steps_ahead(configured(*pair)) for pair in allowed} == allowed
    with pytest.raises(ConfigError, match=r"max_staleness = 1 with train\.updates_per_batch = 2 and .*already 2 optim"):
        steps_ahead(configured(1, 2))
    plain = make_config(tmp_path / "x")
    engines = make_engines(plain)
    line: Any = engines.pipeline
    from scope_opd.cli.inputs import build_configured_method

    def built(config: Config) -> Any:
        method = build_configured_method(config)
        return build_pipeline(config, method, line.sampler, line.verifier, line.teacher, engines.schedule)  # type: ignore[arg-type]

    assert type(built(plain)).__name__ == "Pipeline"
    found = built(configured(3, 1))
    assert (type(found), found.ahead, found.steps) == (BackgroundPipeline, 3, plain.train.steps)


STUBBORN = """
import sys, threading
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_train_early import streaming
from train_kit import make_config
from scope_opd.train import train

engines, teacher, _ = streaming(make_config(Path({folder!r})))

async def blocked(rollouts):
    print("blocked", flush=True)
    threading.Event().wait()  # blocks the background's loop: nothing can cancel it

teacher.score = blocked
train(make_config(Path({folder!r})), engines, progress=False)
"""


def test_a_second_signal_ends_the_process_though_the_background_hangs(tmp_path: Path) -> None:

    program = STUBBORN.format(tests=str(Path(__file__).parent), folder=str(tmp_path / "run"))
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    ) as process:  # fmt: skip
        assert process.stdout is not None
        assert process.stdout.readline() == "blocked\n"
        process.send_signal(signal.SIGTERM)
        time.sleep(0.5)
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(5) == 128 + signal.SIGTERM
        assert time.monotonic() - began < 3
