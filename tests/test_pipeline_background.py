"""Laws of the stream in a thread of its own: what arrives, when it may begin, how much it holds, how it ends."""

from __future__ import annotations

import asyncio
import gc
import random
import signal
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pytest

from scope_opd.errors import DataError, RunFailed
from scope_opd.objective.methods import build_method
from scope_opd.pipeline import BackgroundPipeline, Collected, Pipeline
from scope_opd.records import rollout_to_json
from scope_opd.train.metrics import staleness
from scope_opd.types import Prompt, Rollout, SamplingParams, TeacherScore, Verdict
from test_pipeline import (
    NAMES,
    PARAMS,
    PROMPTS,
    WRONG,
    AnswerVerifier,
    Busy,
    ScriptedSampler,
    TableTeacher,
    collect,
    pause,
    pipeline,
)


def background(
    sampler: Any = None, verifier: Any = None, teacher: Any = None, method: str = "scope", **settings: Any
) -> BackgroundPipeline:
    rule = build_method(method).needs_teacher
    return BackgroundPipeline(sampler or ScriptedSampler(), verifier or AnswerVerifier(), teacher, rule, **settings)


def own_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "scope-pipeline"]


@contextmanager
def closing(line: BackgroundPipeline) -> Iterator[BackgroundPipeline]:
    try:
        yield line
    finally:
        line.close()
        assert own_threads() == []


def of(found: Collected) -> list[str]:
    return [rollout_to_json(rollout) for rollout in found.rollouts]


# --- what arrives ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("in_flight", [1, 3, 4096])
def test_it_collects_what_the_trainers_own_thread_would(streams: bool, in_flight: int) -> None:
    expected = of(collect(pipeline(teacher=TableTeacher())))
    for seed in range(6):
        draw = random.Random(seed)
        line = background(
            ScriptedSampler(order=draw), AnswerVerifier(delay=lambda draw=draw: draw.randint(0, 12)),
            TableTeacher(streams, delay=lambda draw=draw: draw.randint(0, 12)), max_in_flight=in_flight,
        )  # fmt: skip
        early: list[str] = []
        with closing(line):
            found = line.collect(
                PROMPTS, PARAMS, step=0, policy_version=0,
                on_groups=lambda groups, early=early: early.extend(r.id for group in groups for r in group),
            )  # fmt: skip
        assert of(found) == expected
        assert len(early) == len(set(early))
        assert set(early) <= set(NAMES)


def test_wrong_rollouts_leave_for_the_teacher_while_others_are_generated_and_right_ones_never_go() -> None:
    sampler, teacher = ScriptedSampler(), TableTeacher(streams=True)
    given: list[int] = []
    score = teacher.score

    async def watched(rollouts: Sequence[Rollout]) -> list[TeacherScore]:
        given.append(sampler.given)
        return await score(rollouts)

    teacher.score = watched  # type: ignore[method-assign]
    with closing(background(sampler, AnswerVerifier(delay=lambda: 0), teacher)) as line:
        line.collect(PROMPTS, PARAMS, step=0, policy_version=0)
    assert sorted(teacher.asked) == sorted(WRONG)
    assert given[0] <= 2  # its own, and at most the next
    assert given[0] < given[len(given) // 2] < len(NAMES)


def test_hooks_and_an_in_process_teacher_run_on_the_trainers_thread() -> None:
    teacher, seen = TableTeacher(streams=False), set()
    score = teacher.score

    async def watched(rollouts: Sequence[Rollout]) -> list[TeacherScore]:
        seen.add(("score", threading.current_thread()))
        return await score(rollouts)

    teacher.score = watched  # type: ignore[method-assign]
    phases: list[str] = []
    progress: list[tuple[int, int]] = []

    def on_phase(name: str) -> None:
        phases.append(name)
        seen.add(("hook", threading.current_thread()))

    with closing(background(teacher=teacher)) as line:
        line.collect(
            PROMPTS, PARAMS, step=0, policy_version=0, on_phase=on_phase,
            on_progress=lambda done, total: progress.append((done, total)),
        )  # fmt: skip
    assert {thread for _, thread in seen} == {threading.main_thread()}
    assert phases == ["generation", "scoring"]
    assert progress == [(index + 1, len(NAMES)) for index in range(len(NAMES))]


def test_complete_groups_are_handed_over_only_while_the_teacher_alone_is_at_work() -> None:
    release = threading.Event()

    @dataclass
    class Slow(TableTeacher):
        """Holds back the scores of the last prompt until it is told."""

        async def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScore]:
            while rollouts[0].group == "p0" and not release.is_set():
                await asyncio.sleep(0.005)
            return await super().score(rollouts)

    sampler, verifier = ScriptedSampler(), AnswerVerifier()
    handed: list[list[str]] = []

    def on_groups(groups: Sequence[Sequence[Rollout]]) -> None:
        assert sampler.given == len(NAMES)
        assert len(verifier.judged) == len(NAMES)
        handed.append([group[0].group for group in groups])
        if {name for names in handed for name in names} == {"p2", "p1"}:
            release.set()

    with closing(background(sampler, verifier, Slow(streams=True))) as line:
        found = line.collect(PROMPTS, PARAMS, step=0, policy_version=0, on_groups=on_groups)
    names = [name for part in handed for name in part]
    assert names[:2] in (["p2", "p1"], ["p1", "p2"])
    assert len(names) == len(set(names))
    assert [group[0].group for group in found.groups] == ["p2", "p0", "p1"]


def test_without_a_teacher_nothing_is_handed_over_early() -> None:
    with closing(background(method="grpo")) as line:
        for step in range(5):
            line.collect(PROMPTS, PARAMS, step=step, policy_version=0, on_groups=lambda groups: pytest.fail("early"))


# --- running ahead ---------------------------------------------------------------------------------------------------


@dataclass
class Server:
    """A sampler whose weights may change in flight: every token notes the version that the trainer published last."""

    draw: random.Random
    version: int = 0
    delay_s: float = 0.002
    began: dict[int, int] = field(default_factory=dict)
    trainer: int = 0
    unfinished: int = 0

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, step: int, policy_version: int
    ) -> AsyncIterator[Rollout]:
        assert policy_version <= self.version  # one less where it was published this very moment
        self.began[step] = self.trainer
        done: asyncio.Queue[Rollout] = asyncio.Queue()

        async def one(prompt: Prompt, sample: int, length: int) -> None:
            versions = []
            for _ in range(length):
                await asyncio.sleep(self.draw.random() * self.delay_s)
                versions.append(self.version)
            spans = [[i, i + 1, version] for i, version in enumerate(versions)]
            await done.put(
                Rollout(
                    f"{prompt.id}/{step}/{sample}", prompt.id, [1], [5] * length, [-0.1] * length, text=str(sample % 2),
                    sample=sample, step=step, policy_version=versions[0], policy_versions=spans,
                )
            )  # fmt: skip

        tasks = [
            asyncio.create_task(one(prompt, sample, self.draw.randint(1, 8)))
            for prompt in prompts
            for sample in range(params.n)
        ]
        try:
            for _ in tasks:
                yield await done.get()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)


@dataclass
class Judge:
    draw: random.Random
    busy: Busy = field(default_factory=Busy)

    async def verify(self, rollout: Rollout, prompt: Prompt) -> Verdict:
        with self.busy.one():
            await asyncio.sleep(self.draw.random() * 0.002)
            return Verdict(rollout.text == "1", float(rollout.text == "1"))


@dataclass
class Scorer:
    draw: random.Random
    busy: Busy = field(default_factory=Busy)
    streams: bool = True
    open: set[int] = field(default_factory=set)
    most_open: int = 0

    async def begin_step(self, prompts: Sequence[Prompt], step: int) -> None:
        self.open.add(step)
        self.most_open = max(self.most_open, len(self.open))

    async def end_step(self, step: int) -> list[str]:
        self.open.remove(step)
        return [f"end of {step}"]

    async def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScore]:
        assert {rollout.step for rollout in rollouts} <= self.open
        with self.busy.one():
            await asyncio.sleep(self.draw.random() * 0.004)
        return [TeacherScore([-0.5] * len(rollout.token_ids)) for rollout in rollouts]


def prompts_of(step: int) -> list[Prompt]:
    return [Prompt(f"s{step}p{index}", "", None, (1,)) for index in range(3)]


def train_for(steps: int, ahead: int, seed: int, *, skip: float = 0.0, in_flight: int = 4096) -> Any:
    """A trainer that publishes and takes a random while to update; now and then an update is left out."""
    draw = random.Random(seed)
    server, busy = Server(random.Random(seed + 1)), Busy()
    scorer = Scorer(random.Random(seed + 2), busy)
    line = background(
        server, Judge(random.Random(seed + 3), busy), scorer, schedule=prompts_of, steps=steps, ahead=ahead,
        max_in_flight=in_flight,
    )  # fmt: skip
    ages, oldest, taken, early = [], [], [], []
    with closing(line):
        for step in range(steps):
            server.version, server.trainer = sum(taken), step
            found = line.collect(
                prompts_of(step), PARAMS, step=step, policy_version=server.version,
                on_groups=lambda groups: early.extend(r.id for group in groups for r in group),
            )  # fmt: skip
            assert [r.id for r in found.rollouts] == [f"{p.id}/{step}/{s}" for p in prompts_of(step) for s in range(4)]
            assert all((r.teacher_logprobs is None) == bool(r.correct) for r in found.rollouts)
            assert found.stats.notes == [f"end of {step}"]
            mean, old = staleness(found.rollouts, server.version) or (0.0, 0)
            ages.append(mean)
            oldest.append(old)
            time.sleep(draw.random() * 0.02)
            taken.append(int(draw.random() >= skip))
    assert len(early) == len(set(early))
    return server, scorer, busy, ages, oldest


@pytest.mark.parametrize("ahead", [0, 1, 2, 3])
def test_no_token_is_older_than_allowed_whatever_the_delays(ahead: int) -> None:
    ran_ahead = 0
    for seed in range(6):
        server, scorer, _, ages, oldest = train_for(7, ahead, 10 * seed, skip=0.2 * (seed % 3))
        assert max(oldest) <= ahead
        assert all(step - began <= ahead for step, began in server.began.items())
        assert scorer.open == set()
        ran_ahead += sum(ages) > 0
    assert ran_ahead == (6 if ahead else 0)


def test_nothing_is_generated_beyond_the_last_step() -> None:
    server, *_ = train_for(4, 3, 5)
    assert sorted(server.began) == [0, 1, 2, 3]


def test_updates_that_are_left_out_hold_up_nothing() -> None:
    _, _, _, ages, oldest = train_for(6, 2, 7, skip=1.0)
    assert (max(ages), max(oldest)) == (0.0, 0)


def test_steps_overlap_in_the_teacher_and_each_is_begun_and_ended_once() -> None:
    most = max(train_for(6, 2, seed)[1].most_open for seed in range(3))
    assert most >= 2


@pytest.mark.parametrize("bound", [1, 3])
def test_all_steps_together_keep_the_bound_on_what_is_judged_or_scored(bound: int) -> None:
    _, _, busy, *_ = train_for(4, 3, 11, in_flight=bound)
    assert busy.peak == bound
    assert busy.now == 0


def test_what_waits_for_the_trainer_is_the_steps_ahead_at_most() -> None:
    drawn: list[int] = []

    class Counted(Server):
        async def sample(self, prompts: Any, params: SamplingParams, **more: Any) -> AsyncIterator[Rollout]:
            async for rollout in super().sample(prompts, params, **more):
                drawn.append(more["step"])
                yield rollout

    line = background(
        Counted(random.Random(0), delay_s=0.0), AnswerVerifier(), None, "grpo", schedule=prompts_of, steps=50, ahead=2
    )
    with closing(line):
        line.collect(prompts_of(0), PARAMS, step=0, policy_version=0)
        time.sleep(0.2)  # long enough for many more steps
        assert set(drawn) == {0, 1, 2}
        assert len(drawn) == 3 * 12


def test_generation_ahead_hides_the_update_and_the_teachers_last_scores() -> None:
    """Generation 60 ms, scoring 30 ms at its end, update 40 ms a step: 130 in turn, 60 where generation never stops."""

    class Fixed(Server):
        async def sample(self, prompts: Any, params: SamplingParams, **more: Any) -> AsyncIterator[Rollout]:
            await asyncio.sleep(0.06)
            for prompt in prompts:
                for sample in range(params.n):
                    yield Rollout(f"{prompt.id}/{sample}", prompt.id, [1], [5], [-0.1], text="0", sample=sample,
                                  step=more["step"])  # fmt: skip

    class Constant(Scorer):
        async def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScore]:
            await asyncio.sleep(0.03)
            return [TeacherScore([-0.5]) for _ in rollouts]

    def seconds(ahead: int) -> tuple[float, float]:
        draw = random.Random(0)
        line = background(Fixed(draw), Judge(draw), Constant(draw), schedule=prompts_of, steps=10, ahead=ahead)
        with closing(line):
            line.collect(prompts_of(0), PARAMS, step=0, policy_version=0)
            began, now = time.perf_counter(), line.timeline.now()
            for step in range(1, 10):
                with line.timeline.busy("update", step):
                    time.sleep(0.04)
                line.collect(prompts_of(step), PARAMS, step=step, policy_version=0)
            exposed = line.timeline.exposed("teacher", now, line.timeline.now())
            return (time.perf_counter() - began) / 9, exposed / 9

    alone, ahead = seconds(0), seconds(1)
    print(f"\nstep {alone[0] * 1e3:.0f} ms, teacher exposed {alone[1] * 1e3:.0f} ms; one step ahead "
          f"{ahead[0] * 1e3:.0f} ms, exposed {ahead[1] * 1e3:.0f} ms")  # fmt: skip
    assert alone[0] >= 0.13
    assert ahead[0] < 0.8 * alone[0]
    assert ahead[1] < 0.5 * alone[1]


# --- how it ends -----------------------------------------------------------------------------------------------------


def failing(stage: str, error: BaseException) -> tuple[BackgroundPipeline, ScriptedSampler, Busy]:
    sampler, busy = ScriptedSampler(), Busy()
    verifier = AnswerVerifier(busy=busy, delay=lambda: 5)
    teacher = TableTeacher(streams=stage == "streaming teacher", busy=busy)
    if stage == "sampler":
        sampler.error_after = (5, error)
    elif stage == "verifier":
        verifier.errors[WRONG[1]] = error
    else:
        teacher.error = error
    return background(sampler, verifier, teacher), sampler, busy


@pytest.mark.parametrize("stage", ["sampler", "verifier", "streaming teacher", "teacher"])
@pytest.mark.parametrize("kind", [DataError, RuntimeError, AssertionError, KeyboardInterrupt, SystemExit])
def test_an_error_of_any_stage_reaches_the_trainer_as_itself_and_leaves_nothing_running(
    stage: str, kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    error = kind("stage broke")
    cause = OSError("the real reason")
    if isinstance(error, Exception):
        error.__cause__ = cause
    line, sampler, busy = failing(stage, error)
    with pytest.raises(kind) as caught:
        line.collect(PROMPTS, PARAMS, step=0, policy_version=0)
    assert caught.value is error
    assert own_threads() == []
    assert sampler.closed
    assert busy.now == 0
    gc.collect()
    assert caplog.records == []


def test_an_error_of_a_hook_ends_it_too() -> None:
    def refuse(name: str) -> None:
        raise RunFailed(f"cannot write {name}")

    sampler = ScriptedSampler()
    with pytest.raises(RunFailed, match="cannot write generation"):
        background(sampler, teacher=TableTeacher(True)).collect(
            PROMPTS, PARAMS, step=0, policy_version=0, on_phase=refuse
        )
    assert own_threads() == []


def test_a_step_ahead_that_fails_lets_the_one_before_it_finish() -> None:
    class Failing(Server):
        async def sample(self, prompts: Any, params: SamplingParams, **more: Any) -> AsyncIterator[Rollout]:
            if more["step"] == 1:
                raise RunFailed("no sampler answers")
            async for rollout in super().sample(prompts, params, **more):
                yield rollout

    draw = random.Random(0)
    line = background(Failing(draw), Judge(draw), Scorer(draw), schedule=prompts_of, steps=9, ahead=2)
    assert len(line.collect(prompts_of(0), PARAMS, step=0, policy_version=0).rollouts) == 12
    with pytest.raises(RunFailed, match="no sampler answers"):
        line.collect(prompts_of(1), PARAMS, step=1, policy_version=0)
    assert own_threads() == []


@pytest.mark.parametrize("stage", ["sampler", "verifier", "teacher"])
def test_a_signal_in_the_trainers_thread_ends_what_hangs_in_the_background(stage: str) -> None:
    ended: list[str] = []

    async def hang(name: str) -> None:
        try:
            await asyncio.sleep(1000)
        finally:
            await pause(3)
            ended.append(name)

    class Hanging(Server):
        async def sample(self, *args: Any, **more: Any) -> AsyncIterator[Rollout]:
            if stage == "sampler":
                await hang("sampler")
            async for rollout in super().sample(*args, **more):
                yield rollout

    class Stuck(Judge):
        async def verify(self, rollout: Rollout, prompt: Prompt) -> Verdict:
            if stage == "verifier":
                await hang("verifier")
            return await super().verify(rollout, prompt)

    class Deaf(Scorer):
        async def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScore]:
            await hang("teacher")
            raise AssertionError

    draw = random.Random(0)
    line = background(Hanging(draw), Stuck(draw), Deaf(draw), schedule=prompts_of, steps=9, ahead=1)
    with interrupted_after(0.3):
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            line.collect(prompts_of(0), PARAMS, step=0, policy_version=0)
    assert time.monotonic() - began < 5
    assert own_threads() == []
    assert set(ended) == {stage}


@contextmanager
def interrupted_after(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    former = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, former)


def test_what_will_not_be_cancelled_is_not_waited_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("scope_opd.pipeline.background.END_S", 0.2)
    over = threading.Event()

    class Stubborn(Judge):
        async def verify(self, rollout: Rollout, prompt: Prompt) -> Verdict:
            over.wait()  # a call that blocks the loop: nothing can cancel it
            return Verdict(True, 1.0)

    draw = random.Random(0)
    line = background(Server(draw), Stubborn(draw), Scorer(draw))
    with interrupted_after(0.2):
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            line.collect(prompts_of(0), PARAMS, step=0, policy_version=0)
        assert time.monotonic() - began < 3
    over.set()
    for thread in own_threads():
        thread.join(5)
    assert own_threads() == []


def test_it_serves_again_after_an_error_and_after_close() -> None:
    line, _, _ = failing("verifier", DataError("once"))
    with pytest.raises(DataError):
        line.collect(PROMPTS, PARAMS, step=0, policy_version=0)
    line.verifier.errors.clear()  # type: ignore[attr-defined]
    with closing(line):
        assert [r.id for r in line.collect(PROMPTS, PARAMS, step=0, policy_version=0).rollouts] == NAMES
        line.close()
        line.close()
        assert [r.id for r in line.collect(PROMPTS, PARAMS, step=0, policy_version=0).rollouts] == NAMES


def test_verifiers_serve_the_background_and_an_evaluation_at_once() -> None:
    """The same maths verifier, from the background's loop and from loops of the trainer's thread."""
    from scope_opd.evaluate.run import evaluate
    from scope_opd.verify.math_verifier import MathVerifier

    prompts = [Prompt(f"q{index}", "What is it?", f"\\frac{{{index + 1}}}{{7}}", (1,)) for index in range(4)]

    class Answers:
        async def sample(
            self, prompts: Sequence[Prompt], params: SamplingParams, *, step: int, policy_version: int
        ) -> AsyncIterator[Rollout]:
            for prompt in prompts:
                for sample in range(params.n):
                    value = int(prompt.id[1:]) + 1 + sample % 2
                    text = f"so it is \\boxed{{{value} \\cdot 7^{{-1}}}}"
                    await asyncio.sleep(0)
                    yield Rollout(f"{prompt.id}/{step}/{sample}", prompt.id, [1], [5], [-0.1], text, sample=sample)

    verifier = MathVerifier(workers=2)
    params = SamplingParams(n=4, temperature=1.0, max_tokens=8, stop_token_ids=(0,), seed=0)
    line = background(Answers(), verifier, None, "grpo", schedule=lambda step: prompts, steps=4, ahead=3)
    try:
        with closing(line):
            for step in range(4):
                found = line.collect(prompts, params, step=step, policy_version=0)
                assert [r.correct for r in found.rollouts] == [True, False] * 8
                result = asyncio.run(evaluate(Answers(), verifier, prompts, params, step=step, policy_version=0))
                assert result.correct_counts == (2, 2, 2, 2)
    finally:
        verifier.close()


def test_running_ahead_needs_a_schedule() -> None:
    with pytest.raises(ValueError, match="ahead = 1; expected at least 0, and a schedule"):
        background(teacher=TableTeacher(), ahead=1)
    assert isinstance(background(teacher=TableTeacher()), Pipeline)
    check: Callable[[], None] = background(teacher=TableTeacher()).close
    check()
