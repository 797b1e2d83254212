"""Running one program against its tests. Who knows what:

    solution's sandbox   the program, and the arguments or the input of the test at hand; never an expected output
    tests' sandbox       the data set's check code (HumanEval, LeetCode); calls go through a stand-in for the function
    here                 expected outputs of calls and runs, and the verdict

The two sandboxes share nothing: each has a pipe to this process, which passes calls and answers on as plain data. The
tests' sandbox reports whether the check code ran to its end; the solution's has no way to reach that pipe. Every
solution has a sandbox of its own. One for tests runs one check after another, each in a process that it forks: its
code comes from data sets, and what it is given are plain values.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol

from scope_opd.verify.code.compare import same_value, shown, shown_value, text_difference
from scope_opd.verify.code.extract import compiles
from scope_opd.verify.code.formats import CallTask, CheckTask, StdioTask, Task
from scope_opd.verify.code.preamble import names_for
from scope_opd.verify.sandbox import driver
from scope_opd.verify.sandbox.limits import CodeLimits
from scope_opd.verify.sandbox.plain import MAX_MESSAGE, NotPlainError, decode, encode, read_json
from scope_opd.verify.sandbox.process import Ended, Sandbox, SandboxFailure, Stopped, error_of, printable

TEST_IMPORTS = ("typing", "math", "random", "copy")
"""What most check code and most prompts import: loaded once for all checks of a sandbox."""
MAX_RATIO = 10
"""How many times as long as an expected value a returned one may be written and still be equal (``1``, ``1.0``)."""
SURELY_READ = 1 << 16
"""Bytes of a returned value that are read whatever was expected."""
_AT_LINE = re.compile(r"\(line (\d+)\)$")


class Rooms(Protocol):
    """Where sandboxes come from."""

    def solution(self) -> AbstractContextManager[Sandbox]:
        """A new sandbox, ended with the context."""
        ...

    def tests(self) -> AbstractContextManager[Sandbox]:
        """A sandbox for check code, new or used; kept for the next unless the context ends with an exception."""
        ...


def run_tests(task: Task, pieces: list[str], limits: CodeLimits, rooms: Rooms) -> str | None:
    """Run a program against all tests of a task, in order, up to the first that fails.

    Args:
        task: the tests.
        pieces: the program's parts, executed one after the other in one module.
        limits: times; the rest is the sandbox's.
        rooms: gives sandboxes.

    Returns:
        None when every test passed, else which failed and why.

    Raises:
        SandboxFailure: nothing is known about the program.
    """
    end = time.monotonic() + limits.total_timeout_s
    count = len(task.tests)
    place = 0

    def deadline() -> float:
        return min(time.monotonic() + limits.timeout_s, end)

    try:
        if isinstance(task, CheckTask):
            for place, test in enumerate(task.tests, 1):
                with rooms.solution() as solution, rooms.tests() as tests:
                    reason = _check(task, test, pieces, solution, tests, deadline)
                if reason is not None:
                    return _test(place, count, reason)
            return None
        with rooms.solution() as solution:
            solution.enter()
            _load(solution, pieces, deadline(), contest=True, process=isinstance(task, StdioTask))
            for place in range(1, count + 1):
                if isinstance(task, StdioTask):
                    reason = _run(task, place - 1, solution, deadline())
                else:
                    reason = _call(task, place - 1, solution, deadline())
                if reason is not None:
                    return _test(place, count, reason)
    except Stopped as stopped:
        return _test(max(place, 1), count, _limit(str(stopped), limits, ended=time.monotonic() >= end))
    return None


def _check(
    task: CheckTask, test: str, pieces: list[str], solution: Sandbox, tests: Sandbox, deadline: Callable[[], float]
) -> str | None:
    solution.enter()
    tests.enter()
    until = deadline()
    contest = not task.call_check
    order = {
        "preamble": compilable_prompt(task.prompt),
        "test": test,
        "name": task.entry_point,
        "call_check": task.call_check,
        "names": names_for(test) if contest else [],
    }
    _load(solution, pieces, until, contest=contest, process=False)
    with _not_the_program():
        tests.send(driver.CHECK, order, until)
    while True:
        with _not_the_program():
            kind, payload = tests.receive(until, watched=(solution,))
        if kind == driver.PASSED:
            return None
        if kind == driver.FAILED:
            return _failed(error_of(payload), test)
        if kind == driver.TROUBLE:
            raise SandboxFailure(error_of(payload))
        if kind != driver.CALL:
            raise Stopped("the tests wrote over their pipe")
        solution.forward(driver.CALL, payload, until)
        kind, payload = solution.receive(until, watched=(tests,))
        if kind not in (driver.VALUE, driver.ERROR, driver.REFUSED):
            raise Stopped("the program wrote over its pipe")
        with _not_the_program():
            tests.forward(kind, payload, until)


@contextmanager
def _not_the_program() -> Iterator[None]:
    """The tests' sandbox forks each check: its own end says nothing about the program."""
    try:
        yield
    except Ended as ended:
        raise SandboxFailure(f"for the tests: {ended}") from None


def _load(solution: Sandbox, pieces: list[str], until: float, *, contest: bool, process: bool) -> None:
    names = names_for("\n".join(pieces)) if contest else []
    order = {"pieces": pieces, "names": names, "contest": contest, "process": process}
    solution.send(driver.LOAD, order, until)
    kind, payload = solution.receive(until)
    if kind != driver.LOADED:
        raise Stopped(f"the program does not load: {error_of(payload)}")


def _call(task: CallTask, place: int, solution: Sandbox, until: float) -> str | None:
    test = task.tests[place]
    wrong = "wrong result: expected {}, found {}"
    solution.send(driver.CALL, {"name": test.name, "args": list(test.args), "kwargs": {}}, until)
    kind, payload = solution.receive(until)
    if kind != driver.VALUE:
        return error_of(payload) if kind == driver.ERROR else f"returned {error_of(payload)}"
    # Millions of empty lists take this process seconds to read: not where nothing like it was expected.
    if len(payload) > SURELY_READ and len(payload) > MAX_RATIO * len(encode(list(test.outputs))):
        return wrong.format(shown_value(test.outputs[-1]), f"{len(payload)} bytes")
    try:
        tree = read_json(payload)
    except NotPlainError as error:
        return f"returned {error}"
    if any(same_value(output, tree, task.tolerance) for output in test.outputs):
        return None
    try:
        returned = shown_value(decode(tree)) if len(payload) < 1000 else f"{len(payload)} bytes"
    except NotPlainError:
        returned = "no plain value"
    return wrong.format(shown_value(test.outputs[-1]), returned)


def _run(task: StdioTask, place: int, solution: Sandbox, until: float) -> str | None:
    given, expected = task.tests[place]
    order = {"input": given, "max_output": solution.limits.output_mb << 20}
    solution.send(driver.RUN, order, until)
    kind, printed = solution.receive(until)
    if kind == driver.TROUBLE:
        raise SandboxFailure(error_of(printed))
    kind, payload = solution.receive(until)
    if kind != driver.ENDED:
        raise Stopped("the program wrote over its pipe")
    try:
        status, complaint, too_much = read_json(payload)
    except (NotPlainError, ValueError, TypeError):
        raise Stopped("the program wrote over its pipe") from None
    if too_much:
        raise Stopped("output limit")
    if status:
        how = f"ended by signal {-status}" if status < 0 else f"exit status {status}"
        return printable(complaint[-MAX_MESSAGE:]) if complaint and status > 0 else how
    difference = text_difference(expected, printed.decode("utf-8", "replace"), task.tolerance)
    return None if difference is None else f"wrong output: {difference}"


def compilable_prompt(prompt: str) -> str:
    """The start of a program as a program: its helper functions count, the function it breaks off in does nothing."""
    for ending in ("", "\n    pass\n", "\n        pass\n"):
        if compiles(prompt + ending):
            return prompt + ending
    return ""


def _failed(said: str, test: str) -> str:
    """A failed check with the line of test code that failed."""
    found = _AT_LINE.search(said)
    lines = test.splitlines()
    if found and 0 < int(found[1]) <= len(lines):
        return f"{said[: found.start()].strip().rstrip(':')} in {shown(lines[int(found[1]) - 1].strip())}"
    return said


def _test(place: int, count: int, reason: str) -> str:
    return f"test {place} of {count}: {reason}" if count > 1 else reason


def _limit(reason: str, limits: CodeLimits, *, ended: bool) -> str:
    total = f"time limit of {limits.total_timeout_s:g} s for all tests"
    return {
        "time limit": total if ended else f"time limit of {limits.timeout_s:g} s",
        "memory limit": f"memory limit of {limits.memory_mb} MB",
        "output limit": f"output limit of {limits.output_mb} MB",
    }.get(reason, reason)
