"""The stream of a step on asyncio: rollouts -> verifier -> (where the method asks) teacher -> complete groups.

A rollout is judged as soon as it ends. A streaming teacher (servers) gets it at once if its method wants a score; an
in-process teacher gets all of a step's together, in (prompt, sample) order, so that its batches are a function of the
step and not of arrival. At most ``max_in_flight`` rollouts are being judged or scored at any time: beyond that the
sampler waits. The first error of any stage cancels the others and is raised as itself.

Not covered: retries and deadlines (the serving rooms), a thread of its own (``background``).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from scope_opd.credit import Truncated, verdict_of
from scope_opd.errors import RunFailed, ScopeError
from scope_opd.pipeline.timeline import Timeline
from scope_opd.types import Prompt, Rollout, Sampler, SamplingParams, StepTeacher, Teacher, TeacherScore, Verifier

PhaseHook = Callable[[str], None]
ProgressHook = Callable[[int, int], None]
GroupsHook = Callable[[Sequence[Sequence[Rollout]]], None]
NoteHook = Callable[[str], None]


@dataclass
class StageStats:
    """What a step's stream cost and met. Seconds are wall time in which the stage was at work.

    ``generation_s`` ends with the last rollout; ``verify_s`` sums the verdicts; ``teacher_s`` sums the scoring calls.
    ``notes``: lines for the user.
    """

    generation_s: float = 0.0
    verify_s: float = 0.0
    teacher_s: float = 0.0
    generated_tokens: int = 0
    scored_tokens: int = 0
    scored_rollouts: int = 0
    floored_tokens: int = 0
    unscored: int = 0
    teacher_retries: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass
class Collected:
    """A step's rollouts: groups in the prompts' order, each sorted by sample; and what they cost."""

    groups: list[list[Rollout]]
    stats: StageStats

    @property
    def rollouts(self) -> list[Rollout]:
        return [rollout for group in self.groups for rollout in group]


@dataclass
class _Step:
    """State of one call: nothing of a step outlives it."""

    number: int
    prompts: dict[str, Prompt]
    n: int
    on_scoring: Callable[[], None] | None = None
    unjudged: int = 0
    at_teacher: int = 0
    all_drawn: bool = False
    stats: StageStats = field(default_factory=StageStats)
    members: dict[str, list[Rollout]] = field(default_factory=dict)
    waiting: list[Rollout] = field(default_factory=list)
    complete: asyncio.Queue[list[Rollout] | None] = field(default_factory=asyncio.Queue)


class Pipeline:
    """Joins a sampler, a verifier and a teacher.

    Args:
        sampler: draws the rollouts.
        verifier: judges each.
        teacher: scores those that ``needs_teacher`` names; None if no rollout needs it.
        needs_teacher: the method's rule, from a verdict.
        truncated, reward_threshold: see ``credit.verdict_of``.
        max_in_flight: bound on rollouts between sampler and group.

    Attributes:
        timeline: when its stages were at work; the trainer adds its own.

    Raises:
        ValueError: ``max_in_flight`` < 1.
    """

    def __init__(
        self,
        sampler: Sampler,
        verifier: Verifier,
        teacher: Teacher | None,
        needs_teacher: Callable[[bool], bool],
        *,
        truncated: Truncated = "ignore",
        reward_threshold: float = 0.5,
        max_in_flight: int = 4096,
    ) -> None:
        if max_in_flight < 1:
            raise ValueError(f"max_in_flight = {max_in_flight}; expected at least 1")
        if teacher is None and (needs_teacher(True) or needs_teacher(False)):
            raise ScopeError("no teacher", "one, since the method asks for its scores", "set teacher.path")
        self.sampler, self.verifier, self.teacher = sampler, verifier, teacher
        self.needs_teacher = needs_teacher
        self.truncated: Truncated = truncated
        self.reward_threshold = reward_threshold
        self.max_in_flight = max_in_flight
        self.timeline = Timeline()

    def close(self) -> None:
        """End what still runs: nothing, since a step ends with its ``collect``. The engines are their owner's."""

    def collect(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        step: int,
        policy_version: int,
        on_phase: PhaseHook | None = None,
        on_progress: ProgressHook | None = None,
        on_groups: GroupsHook | None = None,
        on_note: NoteHook | None = None,
    ) -> Collected:
        """Run the stream to its end and put the groups in order.

        Args:
            prompts: the step's prompts, ids distinct.
            params: how to sample.
            step: the optimiser step, part of the seeds.
            policy_version: optimiser steps behind the sampler's weights.
            on_phase: told "generation" and "scoring" as they begin.
            on_progress: told (rollouts finished, rollouts in all).
            on_groups, on_note: never called here: this thread works for the stream until the step's end.
        """
        stats = StageStats()

        async def run() -> list[list[Rollout]]:
            stream = self.stream(
                prompts, params, step=step, policy_version=policy_version, stats=stats,
                on_phase=on_phase, on_progress=on_progress,
            )  # fmt: skip
            return [group async for group in stream]

        place = {prompt.id: index for index, prompt in enumerate(prompts)}
        groups = sorted(asyncio.run(run()), key=lambda group: place[group[0].group])
        return Collected(groups, stats)

    async def stream(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        step: int,
        policy_version: int,
        stats: StageStats | None = None,
        on_phase: PhaseHook | None = None,
        on_progress: ProgressHook | None = None,
        on_scoring: Callable[[], None] | None = None,
    ) -> AsyncIterator[list[Rollout]]:
        """Yield each group, sorted by sample, as it completes.

        Arguments as for ``collect``; ``stats`` is filled in. ``on_scoring`` is called once, when all rollouts have
        ended and are judged, if a streaming teacher still has some of them.
        """
        by_id = {prompt.id: prompt for prompt in prompts}
        state = _Step(step, by_id, params.n, on_scoring, stats=stats or StageStats())
        if len(state.prompts) != len(prompts):
            raise ScopeError("two prompts of a step share an id", "distinct ids", "mend the data set's id column")
        run = asyncio.create_task(
            _guarded(self._run(state, prompts, params, step, policy_version, on_phase, on_progress))
        )
        # The sentinel is put by the task's end, however it ends, so that the consumer never waits for nothing.
        run.add_done_callback(lambda _: state.complete.put_nowait(None))
        try:
            while (group := await state.complete.get()) is not None:
                yield group
            try:
                await run
            except _Stopped as stopped:
                raise stopped.stop from None
        finally:
            run.cancel()
            await asyncio.gather(run, return_exceptions=True)

    async def _run(
        self,
        state: _Step,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        step: int,
        policy_version: int,
        on_phase: PhaseHook | None,
        on_progress: ProgressHook | None,
    ) -> None:
        places = self._places()
        finished, total = 0, len(prompts) * params.n

        async def handle(rollout: Rollout) -> None:
            try:
                await self._judge(state, rollout)
            except (KeyboardInterrupt, SystemExit) as stop:
                raise _Stopped(stop) from None
            finally:
                places.release()

        if on_phase:
            on_phase("generation")
        start = time.perf_counter()
        error: BaseException | None = None
        if isinstance(self.teacher, StepTeacher):
            await self.teacher.begin_step(prompts, step)
        source = self.sampler.sample(prompts, params, step=step, policy_version=policy_version)
        try:
            async with asyncio.TaskGroup() as tasks:
                with self.timeline.busy("generation", step):
                    async for rollout in source:
                        await places.acquire()
                        finished += 1
                        state.unjudged += 1
                        state.stats.generated_tokens += len(rollout.token_ids)
                        if on_progress:
                            on_progress(finished, total)
                        tasks.create_task(handle(rollout))
                state.stats.generation_s = time.perf_counter() - start
                state.all_drawn = True
                self._tell_if_scoring(state)
        except BaseExceptionGroup as group:
            error = _first(group)
        finally:
            # A sampler that is left in mid-stream would clean up only when it is collected as garbage.
            if isinstance(source, AsyncGenerator):
                await source.aclose()
        if error is not None:
            raise error  # outside the handler, so that it keeps its own cause and context
        if state.waiting:
            if on_phase:
                on_phase("scoring")
            order = {prompt.id: index for index, prompt in enumerate(prompts)}
            state.waiting.sort(key=lambda rollout: (order[rollout.group], rollout.sample))
            await self._score(state, state.waiting)
            for rollout in state.waiting:
                self._join(state, rollout)
        if isinstance(self.teacher, StepTeacher):
            state.stats.notes += await self.teacher.end_step(step)
        state.stats.notes += self.news()
        short = [name for name in state.prompts if len(state.members.get(name, [])) != params.n]
        if short:
            found = f"prompt {short[0]!r} has {len(state.members.get(short[0], []))} rollouts"
            raise RunFailed(found, f"{params.n}", "the sampler lost some or gave too many")

    def news(self) -> list[str]:
        """Lines about servers that went down or came back, of engines that have any."""
        return [line for engine in (self.sampler, self.teacher) for line in getattr(engine, "notes", list)()]

    async def _judge(self, state: _Step, rollout: Rollout) -> None:
        start = time.perf_counter()
        with self.timeline.busy("verify", state.number):
            verdict = await self.verifier.verify(rollout, state.prompts[rollout.group])
        state.stats.verify_s += time.perf_counter() - start
        rollout.correct, rollout.reward, rollout.extracted = verdict.correct, verdict.reward, verdict.extracted
        routed = verdict_of(rollout, truncated=self.truncated, reward_threshold=self.reward_threshold)
        state.unjudged -= 1
        if routed is None or not self.needs_teacher(routed):
            self._join(state, rollout)
            self._tell_if_scoring(state)
        elif self.teacher is not None and self.teacher.streams:
            state.at_teacher += 1
            self._tell_if_scoring(state)
            await self._score(state, [rollout])
            state.at_teacher -= 1
            self._join(state, rollout)
        else:
            state.waiting.append(rollout)

    async def _ask_teacher(self, step: int, rollouts: Sequence[Rollout]) -> tuple[list[TeacherScore], float]:
        """The scores, and the seconds that they took."""
        assert self.teacher is not None
        start = time.perf_counter()
        with self.timeline.busy("teacher", step):
            scores = await self.teacher.score(rollouts)
        return scores, time.perf_counter() - start

    def _places(self) -> asyncio.Semaphore:
        """Room for rollouts that are being judged or scored."""
        return asyncio.Semaphore(self.max_in_flight)

    @staticmethod
    def _tell_if_scoring(state: _Step) -> None:
        if state.all_drawn and not state.unjudged and state.at_teacher and state.on_scoring:
            state.on_scoring()
            state.on_scoring = None

    async def _score(self, state: _Step, rollouts: Sequence[Rollout]) -> None:
        scores, seconds = await self._ask_teacher(state.number, rollouts)
        state.stats.teacher_s += seconds
        for rollout, score in zip(rollouts, scores, strict=True):
            rollout.teacher_logprobs, rollout.teacher_mask = score.logprobs, score.mask
            rollout.teacher_topk = score.topk
            state.stats.floored_tokens += score.floored
            state.stats.teacher_retries += max(0, score.tries - 1)
            if score.logprobs is None:
                state.stats.unscored += 1
            elif len(score.logprobs) != len(rollout.token_ids):
                found = f"rollout {rollout.id!r}: the teacher gave {len(score.logprobs)} log-probs"
                raise ScopeError(found, f"{len(rollout.token_ids)}, one a response token", "compare the tokenizers")
            else:
                state.stats.scored_rollouts += 1
                state.stats.scored_tokens += len(score.logprobs)

    def _join(self, state: _Step, rollout: Rollout) -> None:
        group = state.members.setdefault(rollout.group, [])
        group.append(rollout)
        if len(group) == state.n:
            state.complete.put_nowait(sorted(group, key=lambda member: member.sample))


class _Stopped(Exception):
    """An interrupt in one of a step's tasks. Raised bare it would leave the event loop before the others are ended."""

    def __init__(self, stop: BaseException) -> None:
        self.stop = stop


async def _guarded(work: Awaitable[None]) -> None:
    try:
        await work
    except (KeyboardInterrupt, SystemExit) as stop:
        raise _Stopped(stop) from None


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    """The first real error of a task group, so that callers see the ScopeError itself."""
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error.stop if isinstance(error, _Stopped) else error
