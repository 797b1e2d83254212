"""A child process in a group of its own: started, watched, and stopped as a whole.

Its output passes through, without the keys. A small process beside it, the guard, outlives a parent killed by SIGKILL
and ends the child then: vLLM itself, asked to stop, waits for its clients without end, and they for what it will never
send. Not covered: restarting it; children that leave the group.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Protocol

from scope_opd.errors import ConfigError, RunFailed
from scope_opd.serving.launch import root_cause
from scope_opd.serving.secrets import HIDDEN, Secret

GRACE_S = 20.0
"""What a process has between SIGTERM and SIGKILL."""
SETTLE_S = 3.0
"""What its children have to clean up after it has ended."""
TAIL_LINES = 400
_PR_SET_PDEATHSIG = 1

_GUARD = """
import os, signal, sys, time
leader, grace, settle = int(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
os.read(0, 1)  # returns when the parent is gone, however it went
end = time.monotonic() + grace
try:
    os.kill(leader, signal.SIGTERM)
    while time.monotonic() < end:
        time.sleep(0.2)
        os.killpg(leader, 0)  # fails once nothing of the group is left
        try:
            os.kill(leader, 0)
        except OSError:  # it has ended: its children need not have the whole of the grace
            end, settle = min(end, time.monotonic() + settle), grace
    os.killpg(leader, signal.SIGKILL)
except OSError:
    pass
"""


class Log(Protocol):
    """Where the lines of a process go."""

    def write(self, line: str, /) -> object: ...
    def flush(self) -> object: ...


class GuardedProcess:
    """A child in a process group of its own. ``stop`` must be called however its use ends; it may be called twice.

    On Linux the child gets SIGTERM when the thread that made it ends, so that is to be one that stays.

    Args:
        argv: command line.
        environment: all of it.
        log: where its output goes, line by line.
        hide: what is replaced in it.
        grace_s: what it has between SIGTERM and SIGKILL.
        saves: it saves something at a first signal and ends at once at a second. The guard alone signals it then, since
            the system's own signal may come once for each of this process's threads; and its output does not break off.
    """

    name, expected = "the process", "one that goes on"
    """What errors call it, and say of it."""

    def __init__(
        self,
        argv: Sequence[str],
        environment: Mapping[str, str],
        *,
        log: Log | None = None,
        hide: Sequence[Secret] = (),
        grace_s: float = GRACE_S,
        saves: bool = False,
    ) -> None:
        self._hide, self._log, self._grace_s = tuple(hide), log, grace_s
        self._asked_at: float | None = None
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        # Without the system's signal, it must not run before there is a guard.
        words = ["/bin/sh", "-c", 'read -r go || exit 1; exec "$@" </dev/null', "sh", *argv] if saves else [*argv]
        try:
            self._process = subprocess.Popen(
                words, env=dict(environment), stdin=subprocess.PIPE if saves else subprocess.DEVNULL,
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
                preexec_fn=None if saves else _die_with_parent(),
            )  # fmt: skip
        except OSError as error:
            raise ConfigError(f"{argv[0]}: {error.strerror}", "a program that runs", "check it") from None
        assert self._process.stdout is not None
        kept = (self._process.stdout.fileno(),) if saves else ()
        self._pump = threading.Thread(target=self._read, name="scope-process-log", daemon=True)
        self._pump.start()
        self._guard = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _GUARD, str(self.pid), str(grace_s), str(SETTLE_S)], env={},
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
            pass_fds=kept,
        )  # fmt: skip
        if self._process.stdin is not None:
            with suppress(OSError), self._process.stdin as stream:  # it may have been killed already
                stream.write("go\n")

    @property
    def pid(self) -> int:
        """Of the process, and of its group."""
        return self._process.pid

    def ended(self) -> bool:
        """Whether it is over. It is not reaped yet, so that its group's id stays its own until ``stop``."""
        if self._process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def exit_code(self) -> int:
        """Of one that has ended: its own, or 128 + the signal that ended it."""
        if self._process.returncode is not None:
            code = self._process.returncode
            return code if code >= 0 else 128 - code
        by_itself, status = self._end()
        return status if by_itself else 128 + status

    def signal(self, number: int) -> None:
        """Send a signal to the process itself, not to its group."""
        if not self.ended():
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def ask_to_stop(self) -> None:
        """SIGTERM, once; the grace begins. It ends its own children; what it leaves is killed by ``stop``."""
        if self._asked_at is None:
            self._asked_at = time.monotonic()
            self.signal(signal.SIGTERM)

    def stop(self, asked: Callable[[], int] = lambda: 0) -> None:
        """SIGTERM, and SIGKILL for whatever of its group is still there after the grace.

        Args:
            asked: how often the user asked to stop; once more cuts the grace short.
        """
        before = asked()
        self.ask_to_stop()
        assert self._asked_at is not None
        end = self._asked_at + self._grace_s
        while not self.ended() and time.monotonic() < end and asked() <= before:
            time.sleep(0.05)
        if self.ended():
            self._pump.join(SETTLE_S)  # its output ends with the last process that holds it: none is left to kill
        self.kill()

    def kill(self) -> None:
        """SIGKILL for all of its group, now."""
        if self._process.returncode is None:  # not reaped: the group's id cannot be another's yet
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._guard.kill()  # before the child's id is free for others
            self._guard.communicate()
            self._process.wait()
            self._pump.join(SETTLE_S)

    def failure(self, when: str, remedy: str = "see its log above") -> RunFailed:
        """The error for one that ended by itself."""
        by_itself, status = self._end()
        self._pump.join(SETTLE_S)
        how = f"exit code {status}" if by_itself else f"signal {signal.Signals(status).name}"
        return RunFailed(f"{self.name} ended {when} ({how}): {self.last()}", self.expected, remedy)

    def last(self) -> str:
        """What its output ends with, on one line."""
        return root_cause(list(self.tail)) or "nothing"

    def _end(self) -> tuple[bool, int]:
        """Whether it ended by itself, and its exit code, else the signal that ended it."""
        end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert end is not None
        return end.si_code == os.CLD_EXITED, end.si_status

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                for secret in self._hide:
                    line = line.replace(secret.reveal(), HIDDEN)
                self.tail.append(line.rstrip("\n"))
                if self._log is not None:
                    with suppress(OSError, ValueError):  # a closed terminal must not block the process
                        self._log.write(line)
                        self._log.flush()


def _die_with_parent() -> Callable[[], None] | None:
    """For the child, before it runs: on Linux the kernel then ends it when this process is killed."""
    if not sys.platform.startswith("linux"):
        return None
    libc, parent = ctypes.CDLL(None, use_errno=True), os.getpid()

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:
            os._exit(1)

    return ask
