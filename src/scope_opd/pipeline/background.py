"""The stream in a thread of its own, for engines behind servers.

The trainer's thread follows a step by its events. While only the teacher is at work it is handed the groups that are
complete, so that their backward pass need not wait. Generation may run ahead of the trainer by whole steps: step j
begins once the trainer is at step >= j - ahead, and once half of step j - 1 has ended, so that it fills the places
which the long responses before it leave empty.

What is computed in this process by an in-process teacher is computed on the trainer's thread. At most
``max_in_flight`` rollouts of all steps together are being judged or scored; complete ones of ``ahead`` steps at most
wait for the trainer. Not covered: bringing new weights to the sampler (the trainer's publisher).
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable, Coroutine, Sequence
from contextlib import aclosing
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from scope_opd.errors import RunFailed
from scope_opd.pipeline.stream import Collected, GroupsHook, PhaseHook, Pipeline, ProgressHook, StageStats
from scope_opd.types import Prompt, Rollout, SamplingParams, TeacherScore

END_S = 10.0
"""How long ``close`` waits for what was cancelled."""
ALIVE_S = 1.0
"""How often a thread that waits makes sure that the other still lives."""

Schedule = Callable[[int], Sequence[Prompt]]


@dataclass(eq=False)
class _Work:
    """A step on its way through the thread, and what the trainer is told of it."""

    step: int
    prompts: Sequence[Prompt]
    params: SamplingParams
    stats: StageStats = field(default_factory=StageStats)
    events: queue.SimpleQueue[tuple[str, Any]] = field(default_factory=queue.SimpleQueue)
    half: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, kind: str, value: Any = None) -> None:
        self.events.put((kind, value))

    def on_progress(self, done: int, total: int) -> None:
        if 2 * done >= total:
            self.half.set()
        self.tell("progress", (done, total))


_WORK: ContextVar[_Work] = ContextVar("work")


class BackgroundPipeline(Pipeline):
    """``Pipeline`` with the stream in a background thread.

    Args:
        schedule: the prompts of a step; needed where generation runs ahead.
        steps: of the run: none is begun beyond the last.
        ahead: steps that generation may run ahead of the trainer.

    Other arguments as for ``Pipeline``. The thread starts with the first ``collect`` and ends with ``close``, with an
    error, or with an interrupt of ``collect``.
    """

    def __init__(
        self, *parts: Any, schedule: Schedule | None = None, steps: int = 0, ahead: int = 0, **settings: Any
    ) -> None:
        super().__init__(*parts, **settings)
        if ahead < 0 or (ahead and schedule is None):
            raise ValueError(f"ahead = {ahead}; expected at least 0, and a schedule where it is more")
        self.schedule, self.steps, self.ahead = schedule, steps, ahead
        self._thread: _Thread | None = None
        self._works: dict[int, _Work] = {}
        self._version = 0
        self._shared = asyncio.Semaphore(self.max_in_flight)

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
    ) -> Collected:
        """Wait for a step's groups, in the prompts' order; begin it, and those that may run ahead of it, if need be.

        Args:
            prompts, params, on_phase, on_progress: as for ``Pipeline``; hooks run on the caller's thread.
            step: the trainer's step.
            policy_version: optimiser steps behind the weights that the sampler has by now.
            on_groups: handed groups that are complete while only the teacher is at work, each once at most; the step's
                end waits for it.

        Raises:
            BaseException: the first error of any stage, or of a hook, as itself. Nothing runs on then.
        """
        try:
            work = self._admit(prompts, params, step, policy_version)
            groups = self._follow(work, on_phase, on_progress, on_groups)
        except BaseException:
            self.close()
            raise
        place = {prompt.id: index for index, prompt in enumerate(prompts)}
        return Collected(sorted(groups, key=lambda group: place[group[0].group]), work.stats)

    def close(self) -> None:
        """Cancel whatever runs and end the thread; waits ``END_S`` at most. May be called twice."""
        thread, self._thread = self._thread, None
        self._works = {}
        if thread is not None:
            thread.end(END_S)

    def _admit(self, prompts: Sequence[Prompt], params: SamplingParams, step: int, version: int) -> _Work:
        """The step's work; begun now, like that of the steps which may run ahead, where it has not been before."""
        if self._works and step not in self._works:
            self.close()  # another run with the same engines
        if self._thread is None:
            self._thread, self._shared = _Thread(), asyncio.Semaphore(self.max_in_flight)
        self._version = version
        for number in range(step, max(step + 1, min(step + self.ahead + 1, self.steps))):
            if number not in self._works:
                own = prompts if number == step or self.schedule is None else self.schedule(number)
                self._works[number] = _Work(number, own, params)
                self._thread.start(self._run_work(self._works[number], self._works.get(number - 1)))
        work = self._works.pop(step)
        assert [prompt.id for prompt in work.prompts] == [prompt.id for prompt in prompts], "another schedule"
        return work

    def _follow(
        self,
        work: _Work,
        on_phase: PhaseHook | None,
        on_progress: ProgressHook | None,
        on_groups: GroupsHook | None,
    ) -> list[list[Rollout]]:
        groups: list[list[Rollout]] = []
        handed, scoring = 0, False
        while True:
            if scoring and on_groups and handed < len(groups) and work.events.empty():
                fresh, handed = groups[handed:], len(groups)
                on_groups(fresh)
            kind, value = self._next(work)
            if kind == "group":
                groups.append(value)
            elif kind == "progress":
                if on_progress:
                    on_progress(*value)
            elif kind == "phase":
                if on_phase:
                    on_phase(value)
            elif kind == "scoring":
                scoring = True
                if on_phase:
                    on_phase("scoring")
            elif kind == "score":
                self._score_here(work, *value)
            elif kind == "error":
                raise value
            else:
                return groups

    def _next(self, work: _Work) -> tuple[str, Any]:
        while True:
            try:
                return work.events.get(timeout=ALIVE_S)
            except queue.Empty:
                if self._thread is None or not self._thread.alive:
                    raise RunFailed("the pipeline's thread ended", "one that lives as long as the run") from None

    def _score_here(self, work: _Work, rollouts: Sequence[Rollout], answer: Callable[[Any, Any], None]) -> None:
        """Have the in-process teacher score on this thread."""
        try:
            found = asyncio.run(super()._ask_teacher(work.step, rollouts))
        except Exception as error:
            answer(None, error)
        else:
            answer(found, None)

    # --- in the thread -----------------------------------------------------------------------------------------------

    async def _run_work(self, work: _Work, before: _Work | None) -> None:
        _WORK.set(work)
        try:
            if before is not None:
                await before.half.wait()
            stream = self.stream(
                work.prompts, work.params, step=work.step, policy_version=self._version, stats=work.stats,
                on_phase=lambda name: work.tell("phase", name), on_progress=work.on_progress,
                on_scoring=lambda: work.tell("scoring"),
            )  # fmt: skip
            async with aclosing(stream):  # type: ignore[type-var]
                async for group in stream:
                    work.tell("group", group)
            work.tell("end")
        except BaseException as error:  # an interrupt too: it is the trainer's to handle
            work.tell("error", error)
            if isinstance(error, asyncio.CancelledError):
                raise
        finally:
            work.half.set()

    def _places(self) -> asyncio.Semaphore:
        return self._shared

    async def _ask_teacher(self, step: int, rollouts: Sequence[Rollout]) -> tuple[list[TeacherScore], float]:
        assert self.teacher is not None
        if self.teacher.streams:
            return await super()._ask_teacher(step, rollouts)
        loop = asyncio.get_running_loop()
        future: asyncio.Future[tuple[list[TeacherScore], float]] = loop.create_future()

        def put(found: Any, error: Exception | None) -> None:
            if not future.done():
                future.set_result(found) if error is None else future.set_exception(error)

        _WORK.get().tell("score", (rollouts, lambda found, error: loop.call_soon_threadsafe(put, found, error)))
        return await future


class _Thread:
    """An event loop in a daemon thread, and the tasks that were started in it."""

    def __init__(self) -> None:
        self._tasks: set[asyncio.Task[None]] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._live()), name="scope-pipeline", daemon=True)
        self._thread.start()
        self._ready.wait()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def start(self, coroutine: Coroutine[Any, Any, None]) -> None:
        def begin() -> None:
            task = self._loop.create_task(coroutine)
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

        self._loop.call_soon_threadsafe(begin)

    def end(self, wait_s: float) -> bool:
        """Whether it ended in time."""
        if self.alive:
            self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join(wait_s)
        return not self.alive

    async def _live(self) -> None:
        self._loop, self._over = asyncio.get_running_loop(), asyncio.Event()
        self._ready.set()
        await self._over.wait()
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
