"""The stream of a step with small engines that follow the Protocols: who is scored, in what order, and how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import random
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from scope_opd.credit import assign_credit
from scope_opd.errors import DataError, RunFailed, ScopeError
from scope_opd.objective.methods import build_method
from scope_opd.pipeline import Collected, Pipeline, StageStats
from scope_opd.records import rollout_to_json
from scope_opd.types import Prompt, Rollout, Sampler, SamplingParams, Teacher, TeacherScore, Verdict, Verifier

PROMPTS = [Prompt(id=name, problem=name, answer="4", token_ids=(1, 2)) for name in ("p2", "p0", "p1")]
PARAMS = SamplingParams(n=4, temperature=1.0, max_tokens=8, stop_token_ids=(0,), seed=0)
NAMES = [f"{prompt.id}/0/{sample}" for prompt in PROMPTS for sample in range(PARAMS.n)]
# Sample 1 of every prompt and all of p1 are right; sample 3 of p0 is cut short, with the right answer in it.
RIGHT = {name for name in NAMES if name.endswith("/1") or name.startswith("p1/")} | {"p0/0/3"}
CUT = {"p0/0/3"}
WRONG = [name for name in NAMES if name not in RIGHT]


def make_rollout(prompt: Prompt, sample: int) -> Rollout:
    name = f"{prompt.id}/0/{sample}"
    length = 1 + (sample + len(name) * 7) % 4 + sample
    return Rollout(
        id=name, group=prompt.id, prompt_token_ids=list(prompt.token_ids), token_ids=[5 + sample] * length,
        logprobs=[-0.25 * (sample + 1)] * length, text="4" if name in RIGHT else "5",
        finish_reason="length" if name in CUT else "stop", sample=sample, step=0,
    )  # fmt: skip


LENGTH = {f"{p.id}/0/{s}": len(make_rollout(p, s).token_ids) for p in PROMPTS for s in range(PARAMS.n)}


async def pause(turns: int) -> None:
    """Give way to other tasks a number of times: a delay without a clock."""
    for _ in range(turns):
        await asyncio.sleep(0)


@dataclass
class ScriptedSampler:
    """Yields every rollout in an order of its own, pausing before each."""

    order: random.Random | None = None
    error_after: tuple[int, BaseException] | None = None
    drop: int = 0
    given: int = 0
    closed: bool = False

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, step: int, policy_version: int
    ) -> AsyncIterator[Rollout]:
        rollouts = [make_rollout(prompt, sample) for prompt in prompts for sample in range(params.n)]
        if self.order:
            self.order.shuffle(rollouts)
        try:
            for rollout in rollouts[: len(rollouts) - self.drop]:
                await pause(self.order.randint(0, 3) if self.order else 1)
                if self.error_after and self.given == self.error_after[0]:
                    raise self.error_after[1]
                self.given += 1
                yield rollout
        finally:
            await pause(2)  # as an engine that has to wait for its server
            self.closed = True


@dataclass
class Busy:
    """Counts the rollouts that are being judged or scored."""

    now: int = 0
    peak: int = 0

    @contextlib.contextmanager
    def one(self) -> Any:
        self.now += 1
        self.peak = max(self.peak, self.now)
        try:
            yield
        finally:
            self.now -= 1


@dataclass
class AnswerVerifier:
    """Exact match of the text, after a delay."""

    delay: Callable[[], int] = lambda: 1
    busy: Busy = field(default_factory=Busy)
    errors: dict[str, BaseException] = field(default_factory=dict)
    undecided: frozenset[str] = frozenset()
    judged: list[str] = field(default_factory=list)

    async def verify(self, rollout: Rollout, prompt: Prompt) -> Verdict:
        assert prompt.id == rollout.group
        with self.busy.one():
            await pause(self.delay())
            if rollout.id in self.errors:
                raise self.errors[rollout.id]
            self.judged.append(rollout.id)
            if rollout.id in self.undecided:
                return Verdict(None, None)
            correct = rollout.text == prompt.answer
            return Verdict(correct, float(correct), extracted=rollout.text)


@dataclass
class TableTeacher:
    """Gives a log-prob of -(sample + 1) / 2 a token; some rollouts it cannot score."""

    streams: bool = False
    delay: Callable[[], int] = lambda: 1
    busy: Busy = field(default_factory=Busy)
    unable: frozenset[str] = frozenset()
    error: BaseException | None = None
    short: bool = False
    floored: int = 0
    calls: list[list[str]] = field(default_factory=list)

    async def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScore]:
        self.calls.append([rollout.id for rollout in rollouts])
        with self.busy.one():
            await pause(self.delay())
        if self.error:
            raise self.error
        return [
            TeacherScore(None)
            if rollout.id in self.unable
            else TeacherScore([-(rollout.sample + 1) / 2] * (len(rollout.token_ids) - self.short), self.floored)
            for rollout in rollouts
        ]

    @property
    def asked(self) -> list[str]:
        return [name for call in self.calls for name in call]


def pipeline(
    sampler: Sampler | None = None,
    verifier: Verifier | None = None,
    teacher: Teacher | None = None,
    method: str = "scope",
    **settings: Any,
) -> Pipeline:
    rule = build_method(method).needs_teacher
    return Pipeline(sampler or ScriptedSampler(), verifier or AnswerVerifier(), teacher, rule, **settings)


def collect(line: Pipeline, prompts: Sequence[Prompt] = PROMPTS, **hooks: Any) -> Collected:
    return line.collect(prompts, PARAMS, step=0, policy_version=0, **hooks)


def test_the_engines_here_follow_the_protocols() -> None:
    assert isinstance(ScriptedSampler(), Sampler)
    assert isinstance(AnswerVerifier(), Verifier)
    assert isinstance(TableTeacher(), Teacher)


@pytest.mark.parametrize("streams", [True, False])
def test_scope_sends_the_wrong_rollouts_alone_to_the_teacher(streams: bool) -> None:
    teacher = TableTeacher(streams)
    found = collect(pipeline(teacher=teacher))
    assert sorted(teacher.asked) == sorted(WRONG)
    for rollout in found.rollouts:
        assert (rollout.teacher_logprobs is not None) == (rollout.id in WRONG)
        assert rollout.correct is (rollout.id in RIGHT)
        assert (rollout.reward, rollout.extracted) == (float(rollout.id in RIGHT), rollout.text)
    assert found.stats.scored_rollouts == len(WRONG)
    assert found.stats.scored_tokens == sum(LENGTH[name] for name in WRONG)


def test_opd_sends_every_rollout_that_takes_part_and_grpo_none() -> None:
    teacher = TableTeacher()
    collect(pipeline(teacher=teacher, method="opd"))
    assert sorted(teacher.asked) == sorted(set(NAMES) - CUT)
    found = collect(pipeline(teacher=None, method="grpo"))
    assert all(rollout.teacher_logprobs is None for rollout in found.rollouts)
    assert found.stats.scored_tokens == 0


def test_a_truncated_rollout_is_never_scored_when_ignored_and_scored_as_wrong_when_incorrect() -> None:
    ignoring, counting = TableTeacher(), TableTeacher()
    found = collect(pipeline(teacher=ignoring, truncated="ignore"))
    assert CUT.isdisjoint(ignoring.asked)
    assert next(r for r in found.rollouts if r.id in CUT).correct is True  # judged all the same, for the record
    collect(pipeline(teacher=counting, truncated="incorrect"))
    assert set(counting.asked) == {*WRONG, *CUT}


def test_a_rollout_without_a_verdict_is_not_scored() -> None:
    teacher = TableTeacher()
    found = collect(pipeline(verifier=AnswerVerifier(undecided=frozenset(WRONG[:1])), teacher=teacher))
    assert sorted(teacher.asked) == sorted(WRONG[1:])
    assert next(r for r in found.rollouts if r.id == WRONG[0]).correct is None


def test_the_reward_threshold_routes_rewards_without_a_verdict() -> None:
    @dataclass
    class Graded:
        async def verify(self, rollout: Rollout, prompt: Prompt) -> Verdict:
            return Verdict(None, rollout.sample / 4)

    teacher = TableTeacher()
    collect(pipeline(verifier=Graded(), teacher=teacher, reward_threshold=0.5))
    assert {name.rsplit("/", 1)[1] for name in teacher.asked} == {"0", "1"}


def test_a_streaming_teacher_gets_one_rollout_at_a_time_before_generation_ends() -> None:
    sampler, teacher = ScriptedSampler(), TableTeacher(streams=True)
    given_at_first_call: list[int] = []
    score = teacher.score

    async def watched(rollouts: Sequence[Rollout]) -> list[TeacherScore]:
        given_at_first_call.append(sampler.given)
        return await score(rollouts)

    teacher.score = watched  # type: ignore[method-assign]
    phases: list[str] = []
    collect(pipeline(sampler=sampler, teacher=teacher), on_phase=phases.append)
    assert [len(call) for call in teacher.calls] == [1] * len(WRONG)
    assert given_at_first_call[0] < len(NAMES)
    assert phases == ["generation"]


def test_an_in_process_teacher_gets_all_at_once_in_prompt_and_sample_order_after_generation() -> None:
    for seed in range(5):
        sampler, teacher = ScriptedSampler(order=random.Random(seed)), TableTeacher()
        phases: list[str] = []
        collect(pipeline(sampler=sampler, teacher=teacher), on_phase=phases.append)
        assert teacher.calls == [WRONG]
        assert phases == ["generation", "scoring"]


def test_without_a_wrong_rollout_the_teacher_is_not_called() -> None:
    teacher, phases = TableTeacher(), []
    only = [PROMPTS[2]]
    collect(pipeline(teacher=teacher), only, on_phase=phases.append)
    assert teacher.calls == []
    assert phases == ["generation"]


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("in_flight", [1, 3, 4096])
def test_arrival_and_delays_do_not_change_what_collect_returns(streams: bool, in_flight: int) -> None:
    expected = [rollout_to_json(rollout) for rollout in collect(pipeline(teacher=TableTeacher())).rollouts]
    for seed in range(8):
        draw = random.Random(seed)
        slow = AnswerVerifier(delay=lambda draw=draw: draw.randint(0, 12))
        teacher = TableTeacher(streams, delay=lambda draw=draw: draw.randint(0, 12))
        found = collect(pipeline(ScriptedSampler(order=draw), slow, teacher, max_in_flight=in_flight))
        assert [rollout_to_json(rollout) for rollout in found.rollouts] == expected


def test_groups_come_in_the_prompts_order_and_rollouts_by_sample() -> None:
    found = collect(pipeline(ScriptedSampler(order=random.Random(3)), teacher=TableTeacher()))
    assert [rollout.id for rollout in found.rollouts] == NAMES
    assert [[rollout.sample for rollout in group] for group in found.groups] == [[0, 1, 2, 3]] * 3


def test_stats_count_what_was_generated_scored_floored_and_left_unscored() -> None:
    unable = frozenset(WRONG[:2])
    found = collect(pipeline(teacher=TableTeacher(unable=unable, floored=3)))
    rest = [name for name in WRONG if name not in unable]
    stats = found.stats
    assert stats.generated_tokens == sum(LENGTH.values())
    assert (stats.unscored, stats.scored_rollouts) == (2, len(rest))
    assert stats.scored_tokens == sum(LENGTH[name] for name in rest)
    assert stats.floored_tokens == 3 * len(rest)
    assert min(stats.generation_s, stats.verify_s, stats.teacher_s) > 0


def test_an_unscored_rollout_is_masked_by_credit_and_the_others_share_its_weight() -> None:
    # p2 has samples 0, 2, 3 wrong, with NLL_T 1/2, 3/2, 2; without sample 0 the weights are softmax(-3/2, -2).
    found = collect(pipeline(teacher=TableTeacher(unable=frozenset(["p2/0/0"]))))
    assign_credit(found.rollouts, build_method("scope"), truncated="ignore", reward_threshold=0.5)
    group = found.groups[0]
    larger = 1 / (1 + 2.718281828459045**-0.5)
    assert [r.distill for r in group] == pytest.approx([0, 0, larger, 1 - larger], rel=1e-12)
    assert [(r.masked, r.mask_reason) for r in group] == [
        (True, "unscored"),
        (False, None),
        (False, None),
        (False, None),
    ]


@pytest.mark.parametrize("streams", [True, False])
@pytest.mark.parametrize("bound", [1, 2])
def test_no_more_than_max_in_flight_are_judged_or_scored_at_once_and_the_sampler_waits(
    streams: bool, bound: int
) -> None:
    busy = Busy()
    sampler = ScriptedSampler()
    ahead: list[int] = []
    verifier = AnswerVerifier(busy=busy)

    def delay() -> int:
        ahead.append(sampler.given - len(verifier.judged))
        return 7

    verifier.delay = delay
    teacher = TableTeacher(streams, busy=busy, delay=lambda: 7)
    collect(pipeline(sampler, verifier, teacher, max_in_flight=bound))
    assert busy.peak == bound
    assert busy.now == 0
    if not streams:
        assert max(ahead) <= bound + 1  # those in hand, and the one that waits for a place


def test_a_group_is_yielded_as_soon_as_its_last_member_is_done() -> None:
    sampler = ScriptedSampler()

    async def first() -> tuple[str, int]:
        stream = pipeline(sampler, teacher=TableTeacher(streams=True)).stream(PROMPTS, PARAMS, step=0, policy_version=0)
        async with contextlib.aclosing(stream):
            async for group in stream:
                return group[0].group, sampler.given
        raise AssertionError("no group")

    name, given = asyncio.run(first())
    assert name == "p2"
    assert given < len(NAMES)


def others() -> set[asyncio.Task[Any]]:
    return asyncio.all_tasks() - {asyncio.current_task()}  # type: ignore[arg-type]


async def drain(line: Pipeline) -> tuple[BaseException | None, set[asyncio.Task[Any]]]:
    """Read a stream to its end; what it raised and the tasks that it left running."""
    try:
        async for _ in line.stream(PROMPTS, PARAMS, step=0, policy_version=0):
            pass
    except Exception as error:
        return error, others()
    return None, others()


def failing(stage: str, error: BaseException) -> tuple[Pipeline, ScriptedSampler, Busy]:
    sampler, busy = ScriptedSampler(), Busy()
    verifier = AnswerVerifier(busy=busy, delay=lambda: 5)
    teacher = TableTeacher(streams=stage == "streaming teacher", busy=busy)
    if stage == "sampler":
        sampler.error_after = (5, error)
    elif stage == "verifier":
        verifier.errors[WRONG[1]] = error
    else:
        teacher.error = error
    return pipeline(sampler, verifier, teacher), sampler, busy


@pytest.mark.parametrize("stage", ["sampler", "verifier", "streaming teacher", "teacher"])
@pytest.mark.parametrize("kind", [DataError, RuntimeError, AssertionError])
def test_the_first_error_of_any_stage_is_raised_as_itself_and_leaves_nothing_running(
    stage: str, kind: type[Exception]
) -> None:
    error = kind("stage broke")
    cause = OSError("the real reason")
    error.__cause__ = cause
    line, sampler, busy = failing(stage, error)
    raised, left = asyncio.run(drain(line))
    assert raised is error
    assert raised.__cause__ is cause
    assert left == set()
    assert sampler.closed
    assert busy.now == 0


@pytest.mark.parametrize("stage", ["sampler", "verifier", "streaming teacher", "teacher"])
def test_collect_raises_the_error_itself(stage: str) -> None:
    error = ScopeError("stage broke", "one that holds", "mend it")
    line, sampler, _ = failing(stage, error)
    with pytest.raises(ScopeError) as caught:
        collect(line)
    assert caught.value is error
    assert sampler.closed


@pytest.mark.parametrize("stage", ["sampler", "verifier", "streaming teacher", "teacher"])
@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit])
def test_an_interrupt_passes_through_collect_as_itself_and_leaves_nothing_running(
    stage: str, kind: type[BaseException], caplog: pytest.LogCaptureFixture
) -> None:
    error = kind("now")
    line, sampler, busy = failing(stage, error)
    with pytest.raises(kind) as caught:
        collect(line)
    assert caught.value is error
    assert sampler.closed
    assert busy.now == 0
    gc.collect()  # a task that was left pending complains when it is destroyed
    assert caplog.records == []


def test_a_pipeline_serves_again_after_an_error() -> None:
    line, _, _ = failing("verifier", DataError("once"))
    with pytest.raises(DataError):
        collect(line)
    line.verifier.errors.clear()  # type: ignore[attr-defined]
    assert [rollout.id for rollout in collect(line).rollouts] == NAMES


@pytest.mark.parametrize("streams", [True, False])
def test_a_consumer_that_stops_early_leaves_nothing_running(streams: bool) -> None:
    sampler, busy = ScriptedSampler(), Busy()
    line = pipeline(sampler, AnswerVerifier(busy=busy), TableTeacher(streams, busy=busy))

    async def stop() -> tuple[int, set[asyncio.Task[Any]]]:
        stream = line.stream(PROMPTS, PARAMS, step=0, policy_version=0)
        async with contextlib.aclosing(stream):
            async for _ in stream:
                break
            given = sampler.given
        return given, others()

    given, left = asyncio.run(stop())
    assert left == set()
    assert sampler.closed
    assert sampler.given == given  # stopped, not waited for
    assert busy.now == 0


def test_a_sampler_that_waits_for_a_place_is_closed_when_the_consumer_stops() -> None:
    # The sampler is suspended at its yield, so that no cancellation reaches it: somebody has to close it.
    sampler = ScriptedSampler()
    line = pipeline(sampler, AnswerVerifier(delay=lambda: 20), TableTeacher(streams=True), max_in_flight=1)

    async def stop() -> tuple[bool, set[asyncio.Task[Any]], bool]:
        stream = line.stream(PROMPTS, PARAMS, step=0, policy_version=0)
        async with contextlib.aclosing(stream):
            await anext(stream)
            await pause(5)
            open_still = not sampler.closed
        return open_still, others(), sampler.closed

    assert asyncio.run(stop()) == (True, set(), True)
    assert sampler.given < len(NAMES)


@pytest.mark.parametrize("after", [0, 1, 5, 20, 40])
def test_a_consumer_that_is_cancelled_leaves_nothing_running(after: int) -> None:
    sampler, busy = ScriptedSampler(), Busy()
    line = pipeline(sampler, AnswerVerifier(busy=busy, delay=lambda: 9), TableTeacher(busy=busy, delay=lambda: 50))

    async def cancelled() -> set[asyncio.Task[Any]]:
        task = asyncio.create_task(drain(line))
        await pause(after)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return others()

    assert asyncio.run(cancelled()) == set()
    assert busy.now == 0
    assert sampler.closed or sampler.given == 0


def test_progress_counts_every_rollout_once() -> None:
    seen: list[tuple[int, int]] = []
    collect(pipeline(teacher=TableTeacher()), on_progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, len(NAMES)) for i in range(len(NAMES))]


def test_no_prompts_give_no_groups() -> None:
    found = collect(pipeline(teacher=TableTeacher()), [])
    assert (found.groups, found.rollouts, found.stats.generated_tokens) == ([], [], 0)


def test_two_steps_share_nothing() -> None:
    line = pipeline(teacher=TableTeacher())
    first = copy.deepcopy(collect(line))
    second = collect(line)
    assert [rollout_to_json(r) for r in first.rollouts] == [rollout_to_json(r) for r in second.rollouts]
    assert second.stats.generated_tokens == first.stats.generated_tokens
    assert isinstance(second.stats, StageStats)


@pytest.mark.parametrize("streams", [True, False])
def test_a_teacher_that_scores_other_tokens_is_an_error_naming_the_rollout(streams: bool) -> None:
    with pytest.raises(ScopeError, match=rf"rollout '{WRONG[0]}': the teacher gave \d log-probs; expected \d, one a"):
        collect(pipeline(teacher=TableTeacher(streams, short=True)))


def test_a_sampler_that_gives_too_few_rollouts_ends_the_run_in_one_line() -> None:
    with pytest.raises(RunFailed, match=r"prompt .p1. has . rollouts; expected"):
        collect(pipeline(ScriptedSampler(drop=1), teacher=TableTeacher()))


def test_what_cannot_work_is_refused_at_once() -> None:
    with pytest.raises(ScopeError, match=r"no teacher; .*set teacher\.path"):
        pipeline(teacher=None, method="scope")
    with pytest.raises(ValueError, match="max_in_flight = 0"):
        pipeline(teacher=TableTeacher(), max_in_flight=0)
    with pytest.raises(ScopeError, match="two prompts of a step share an id"):
        collect(pipeline(teacher=TableTeacher()), [PROMPTS[0], PROMPTS[0]])
