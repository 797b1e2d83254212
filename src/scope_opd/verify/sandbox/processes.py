"""A program as a process inside its sandbox: started with an input, its output collected, its leavings ended.

Runs inside: standard library alone. Not covered: time, which the parent keeps.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

_ALONE = [False]
FORK_ATTEMPTS = 50
"""Tries to start a program, 10 ms apart, before the sandbox itself is called broken."""
PIPE_CHUNK = 1 << 16


def inside_alone(alone: bool) -> None:
    """Say whether this is a process namespace of our own, so that "every process" is ours to end."""
    _ALONE[0] = alone


def fork() -> int | str:
    """``os.fork``, tried for a while; what kept it from starting a process where it cannot."""
    import time

    for _ in range(FORK_ATTEMPTS):
        try:
            return os.fork()
        except OSError as error:
            why = error.strerror
            time.sleep(0.01)
    return f"no process could be started ({why})"


def run_process(body: Callable[[], int], data: bytes, max_output: int) -> tuple[bytes, bytes, int, bool] | str:
    """Run ``body`` in a forked child with ``data`` as its standard input.

    Returns:
        Its output (at most ``max_output`` bytes), the end of its error output, the exit status (negative: the signal)
        and whether it printed too much; or what kept the sandbox from starting it.
    """
    import select

    pipes = [os.pipe() for _ in range(3)]
    (in_read, in_write), (out_read, out_write), (err_read, err_write) = pipes
    child = fork()
    if isinstance(child, str):
        return child
    if child == 0:
        try:
            os.setsid()
            for target, descriptor in ((0, in_read), (1, out_write), (2, err_write)):
                os.dup2(descriptor, target)
            os.closerange(3, 1024)  # the pipes to the parent too: a program's process has no way to speak to it
            status = body()
        except BaseException:
            status = 1
        os._exit(status)
    for descriptor in (in_read, out_write, err_write):
        os.close(descriptor)
    for descriptor in (in_write, out_read, err_read):
        os.set_blocking(descriptor, False)
    try:
        return _converse(select, child, (in_write, out_read, err_read), data, max_output)
    finally:
        for descriptor in (out_read, err_read):
            os.close(descriptor)


def _converse(
    select: Any, child: int, pipes: tuple[int, int, int], data: bytes, max_output: int
) -> tuple[bytes, bytes, int, bool]:
    in_write, out_read, err_read = pipes
    out, err, rest = bytearray(), bytearray(), memoryview(data)
    poll = select.poll()
    for descriptor, event in ((in_write, select.POLLOUT), (out_read, select.POLLIN), (err_read, select.POLLIN)):
        poll.register(descriptor, event)
    try:
        ended = os.pidfd_open(child)
        poll.register(ended, select.POLLIN)
    except (AttributeError, OSError):  # before Linux 5.3
        ended = None
    feeding, status = True, None
    while status is None and len(out) <= max_output:
        for descriptor, _ in poll.poll(None if ended is not None else 5):
            if descriptor == in_write:
                try:
                    rest = rest[os.write(in_write, rest[:PIPE_CHUNK]) :] if rest else rest
                except BlockingIOError:
                    pass
                except OSError:  # the program does not read all of its input
                    rest = rest[:0]
                if not rest:
                    poll.unregister(in_write)
                    os.close(in_write)
                    feeding = False
            elif descriptor in (out_read, err_read) and not _take(descriptor, out if descriptor == out_read else err):
                poll.unregister(descriptor)
            del err[:-2000]
        done, code = os.waitpid(child, os.WNOHANG)
        status = os.waitstatus_to_exitcode(code) if done else None
    if status is None:
        os.kill(child, 9)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    end_the_rest(child)
    while len(out) <= max_output and _take(out_read, out):
        pass
    while len(err) < 4000 and _take(err_read, err):
        pass
    for descriptor in ([in_write] if feeding else []) + ([ended] if ended is not None else []):
        os.close(descriptor)
    return bytes(out[:max_output]), bytes(err[-2000:]), status, len(out) > max_output


def _take(descriptor: int, into: bytearray) -> bool:
    """Read what is there; False at the end of the pipe or when there is nothing."""
    try:
        part = os.read(descriptor, PIPE_CHUNK)
    except BlockingIOError:
        return False
    into += part
    return bool(part)


def end_the_rest(child: int) -> None:
    """End what a process that has ended left behind, in its session at least."""
    import signal

    try:
        if _ALONE[0]:  # everything in the sandbox's own process namespace but us
            os.kill(-1, signal.SIGKILL)
        else:
            os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    while _ALONE[0]:  # the first process of a namespace reaps what lost its parent
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
