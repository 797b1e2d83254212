"""The code verifier: a response is right when the program in it passes every test of the answer.

Each solution runs in a sandbox of its own (``verify.sandbox``), check code of the data set in another one. A wrong
output, an error, a broken limit, no program: incorrect, with the first test that failed and why. No verdict only where
the sandbox itself failed, twice.

Not covered: what the sandbox does not cover (``verify.sandbox.bubblewrap``); packages beside the standard library;
other languages than Python; problems with a special judge. A program that recognises the public tests of a data set
and answers them from a table passes. Time limits are wall time: on a machine with more to do than cores a slow program
may fail where it would otherwise just pass.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Literal

from scope_opd.errors import DataError
from scope_opd.types import Prompt, Rollout, Verdict
from scope_opd.verify.code.extract import completion_of, defines, last_block
from scope_opd.verify.code.formats import CheckTask, Task, parse_code_answer
from scope_opd.verify.code.judging import TEST_IMPORTS, compilable_prompt, run_tests
from scope_opd.verify.math.extract import opened_by, visible
from scope_opd.verify.sandbox.bubblewrap import SLOTS, Launcher
from scope_opd.verify.sandbox.limits import CodeLimits
from scope_opd.verify.sandbox.process import Sandbox, SandboxFailure

__all__ = ["CodeLimits", "CodeVerifier"]

ATTEMPTS = 2
"""Times that a solution is tried when the sandbox fails, before there is no verdict."""


class CodeVerifier:
    """Judges programs, several at once in threads (the work is done by processes); bound to no event loop.

    Args:
        limits: what a solution may use.
        workers: solutions judged at once; None: one for each core.
        allow_unsandboxed: run without bubblewrap, only where all of the code is trusted.
        scope: what of a response may hold the program, as for maths.

    Raises:
        ScopeError: no bubblewrap, or it may not build a sandbox here; the line says what to do.
    """

    def __init__(
        self,
        limits: CodeLimits | None = None,
        *,
        workers: int | None = None,
        allow_unsandboxed: bool = False,
        scope: Literal["after_think", "all"] = "after_think",
    ) -> None:
        self.limits = limits or CodeLimits()
        self.scope: Literal["after_think", "all"] = scope
        self.launcher = Launcher(self.limits, sandboxed=not allow_unsandboxed)
        count = min(workers or len(os.sched_getaffinity(0)), SLOTS // 2)
        self._threads = ThreadPoolExecutor(count, thread_name_prefix="code-verifier")
        self._rooms = _Rooms(self.launcher)

    async def verify(self, rollout: Rollout, prompt: Prompt) -> Verdict:
        """Judge a rollout's text by its prompt's answer; a thinking block that the prompt opened counts as opened."""
        text = opened_by(prompt.text) + rollout.text
        try:
            return await asyncio.wrap_future(self._submit(text, prompt.answer, "response"))
        except DataError as error:
            raise DataError(f"prompt {prompt.id}: {error}") from None

    def judge(
        self, prediction: str, answer: Mapping[str, Any], *, form: Literal["response", "answer"] = "response"
    ) -> Verdict:
        """Judge a text by an answer.

        Args:
            prediction: a response, or with ``form = "answer"`` the program itself.
            answer: a gold answer for code (``formats``).

        Returns:
            reward 1.0 or 0.0 (None with no verdict), the program, and the first test that failed and why.

        Raises:
            DataError: the answer is of no known format.
        """
        return self._submit(prediction, answer, form).result()

    def close(self) -> None:
        """End what is running; a second call does nothing."""
        self._rooms.kill_all()
        self._threads.shutdown(wait=True, cancel_futures=True)
        self._rooms.end_idle()

    def _submit(self, prediction: str, answer: Mapping[str, Any], form: str) -> Future[Verdict]:
        try:
            task = parse_code_answer(answer)
        except ValueError as error:
            raise DataError(str(error)) from None
        return self._threads.submit(self._judge, prediction, task, form)

    def _judge(self, prediction: str, task: Task, form: str) -> Verdict:
        code, pieces = program(prediction, task, form=form, scope=self.scope)
        if code is None:
            return Verdict(False, 0.0, None, "no code block in the response")
        for _ in range(ATTEMPTS):
            try:
                reason = run_tests(task, pieces, self.limits, self._rooms)
            except SandboxFailure as failure:
                trouble = f"no verdict: the sandbox failed ({failure})"
                self._rooms.end_idle()
                continue
            if self._rooms.closed:
                return Verdict(None, None, code, "no verdict: the verifier was closed")
            passed = f"passed {len(task.tests)} test{'s' if len(task.tests) > 1 else ''}"
            return Verdict(reason is None, float(reason is None), code, passed if reason is None else reason)
        return Verdict(None, None, code, trouble)


class _Rooms:
    """Sandboxes in use, and those for check code that wait for the next check."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.closed = False
        self._lock = threading.Lock()
        self._alive: set[Sandbox] = set()
        self._idle: list[Sandbox] = []

    @contextmanager
    def solution(self) -> Iterator[Sandbox]:
        sandbox = self._start(())
        try:
            yield sandbox
        finally:
            self._end(sandbox)

    @contextmanager
    def tests(self) -> Iterator[Sandbox]:
        with self._lock:
            used = self._idle.pop() if self._idle else None
        sandbox = used or self._start(TEST_IMPORTS)
        try:
            yield sandbox
        except BaseException:
            self._end(sandbox)
            raise
        with self._lock:
            self._idle.append(sandbox)

    def kill_all(self) -> None:
        with self._lock:
            self.closed = True
            for sandbox in self._alive:
                sandbox.kill()

    def end_idle(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for sandbox in idle:
            self._end(sandbox)

    def _start(self, imports: Sequence[str]) -> Sandbox:
        with self._lock:  # so that none starts unseen while all are being ended
            if self.closed:
                raise SandboxFailure("the verifier is closed")
            sandbox = Sandbox(self.launcher, imports)
            self._alive.add(sandbox)
        return sandbox

    def _end(self, sandbox: Sandbox) -> None:
        sandbox.close()
        with self._lock:
            self._alive.discard(sandbox)


def program(
    prediction: str, task: Task, *, form: str = "response", scope: Literal["after_think", "all"] = "after_think"
) -> tuple[str | None, list[str]]:
    """The program that a prediction holds.

    Returns:
        The code that was found (None without any) and the pieces to execute: for a task with a prompt, the prompt first
        where the code is a whole function, or the prompt continued by the code where it is a completion.
    """
    text = prediction if form == "answer" else visible(prediction, scope)
    block = text if form == "answer" else last_block(text)
    prompt = task.prompt if isinstance(task, CheckTask) else ""
    if not prompt:
        return block, [] if block is None else [block]
    assert isinstance(task, CheckTask)
    name = task.entry_point.rpartition(".")[2]
    if block is None:
        if not text.strip():
            return None, []
        block = completion_of(text, "" if defines(text, name) else prompt)
    if defines(block, name) or "." in task.entry_point:
        return block, [compilable_prompt(prompt), block]
    return block, [prompt + block]
