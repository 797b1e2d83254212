"""One sandbox from outside: starting it, frames with a deadline, the watch over its memory, and its certain end.

Reads and writes never block past their deadline, whatever the program inside does with its ends of the pipes. Ending a
sandbox kills its first process, whose end takes the whole process namespace with it, and waits for that.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from scope_opd.verify.sandbox import driver
from scope_opd.verify.sandbox.guard import GUARD
from scope_opd.verify.sandbox.plain import MAX_MESSAGE, NotPlainError, encode, read_json

if TYPE_CHECKING:
    from scope_opd.verify.sandbox.bubblewrap import Launcher

START_TIMEOUT_S = 30.0
"""For a sandbox to come up, before it counts as failed: no part of a solution's time."""
WATCH_S = 0.025
"""Between two looks at the memory of a sandbox's processes."""
SMALL_FRAME = 1 << 16
"""Bytes of a frame that carries a report rather than values."""
LONGEST_REPORT = MAX_MESSAGE + 100
"""Characters of a report at most: a message, its type, its line."""
_LARGE = (driver.VALUE, driver.OUTPUT, driver.CALL)


class SandboxFailure(Exception):
    """The sandbox itself failed: nothing is known about the program."""


class Stopped(Exception):
    """The program broke a limit or ended; the message says which way."""


class Ended(Stopped):
    """The sandbox's first process ended."""


class Sandbox:
    """A running sandbox; a context manager that ends it. Use it from one thread; ``kill`` may come from another.

    Args:
        imports: modules of the standard library that the driver imports before it is ready.
    """

    def __init__(self, launcher: Launcher, imports: Sequence[str] = ()) -> None:
        self.imports = imports
        self.launcher, self.limits = launcher, launcher.limits
        self.slot = launcher.slots.get()
        self.folder: tempfile.TemporaryDirectory[str] | None = None
        self.pidfd: int | None = None
        self.info: int | None = None
        self.first_process: int | None = None
        self.lock = threading.Lock()
        self.doomed = self.closed = False
        self.buffer = bytearray()
        self.next_look = 0.0
        try:
            self._start()
        except OSError as error:
            launcher.slots.put(self.slot)
            if self.info is not None:
                os.close(self.info)
            raise SandboxFailure(f"{error.filename or 'bwrap'}: {error.strerror}") from None

    def _start(self) -> None:
        launcher = self.launcher
        passed: list[int] = []
        extra: dict[str, Any] = {}
        try:
            if launcher.sandboxed:
                assert launcher.filter is not None
                seccomp, seccomp_write = os.pipe()
                passed.append(seccomp)
                os.write(seccomp_write, launcher.filter)  # smaller than a pipe
                os.close(seccomp_write)
                self.info, info_write = os.pipe()
                passed.append(info_write)
                if (user := launcher.user_outside(self.slot)) is not None:
                    extra = {"user": user, "group": user, "extra_groups": []}
                command = launcher.command(seccomp, info_write)
            else:
                self.folder = tempfile.TemporaryDirectory(prefix="scope-code-")
                extra = {"cwd": self.folder.name, "env": _environment(), "start_new_session": True}
                command = launcher.command(None, None)
            self.process = subprocess.Popen(
                command, bufsize=0, stdin=-1, stdout=-1, stderr=-1, pass_fds=passed, **extra
            )
        finally:
            for descriptor in passed:
                os.close(descriptor)
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.to, self.back = self.process.stdin.fileno(), self.process.stdout.fileno()
        os.set_blocking(self.to, False)
        os.set_blocking(self.back, False)
        settings = {
            "limits": self.limits.rlimits(processes=launcher.processes()),
            "uid": launcher.user_inside(self.slot),
            "imports": list(self.imports),
            "sandboxed": launcher.sandboxed,
        }
        # Boot code and first order go at once, so that several sandboxes come up side by side.
        self.unsent = memoryview(launcher.boot_blob + _frame(driver.ENTER, encode(settings).encode("ascii")))
        with contextlib.suppress(BrokenPipeError, BlockingIOError):
            self.unsent = self.unsent[os.write(self.to, self.unsent) :]

    def enter(self) -> None:
        """Wait until the sandbox is up; for one that has done a check, until nothing of the check is left.

        Raises:
            SandboxFailure: it did not come up.
        """
        deadline = time.monotonic() + START_TIMEOUT_S
        try:
            if self.first_process is None:
                self._find_first_process(deadline)
                self._write(self.unsent, deadline)
            kind, payload = self.receive(deadline)
        except Stopped as stopped:
            raise SandboxFailure(self._complaint() or str(stopped)) from None
        if kind != driver.READY:
            raise SandboxFailure(payload.decode("ascii", "replace"))

    def _find_first_process(self, deadline: float) -> None:
        """The first process inside, from bubblewrap's report; held by a pidfd, which cannot come to mean another."""
        if self.info is None:
            self.first_process = self.process.pid
            self._hold()
            return
        report = b""
        while not report.rstrip().endswith(b"}"):
            if not select.select([self.info], [], [], max(0.0, deadline - time.monotonic()))[0]:
                raise Stopped("did not start in time")
            part = os.read(self.info, 4096)
            if not part:
                raise Stopped("did not start")
            report += part
        with self.lock:
            os.close(self.info)
            self.info = None
            with contextlib.suppress(AttributeError, OSError):  # before Linux 5.3; or it has ended, as the reader sees
                self.pidfd = os.pidfd_open(json.loads(report)["child-pid"])
            self.first_process = json.loads(report)["child-pid"]
        self._hold()
        if self.doomed:
            self.kill()

    def _hold(self) -> None:
        assert self.first_process is not None
        try:
            GUARD.hold(self.first_process, _interpreter())
        except OSError as error:
            raise SandboxFailure(f"{error.filename or 'python'}: {error.strerror}") from None

    def send(self, kind: bytes, value: Any, deadline: float) -> None:
        """Send an order whose content is plain data."""
        self.forward(kind, encode(value).encode("ascii"), deadline)

    def forward(self, kind: bytes, payload: bytes, deadline: float) -> None:
        """Send a payload as it is.

        Raises:
            Stopped: the program ended, or did not read before the deadline.
        """
        self._write(memoryview(_frame(kind, payload)), deadline)

    def _write(self, rest: memoryview, deadline: float) -> None:
        poll = select.poll()
        poll.register(self.to, select.POLLOUT)
        while rest:
            left = deadline - time.monotonic()
            if left <= 0:
                raise Stopped("time limit")
            self._look()
            poll.poll(min(left, WATCH_S) * 1000)
            try:
                rest = rest[os.write(self.to, rest) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise Ended(self._end()) from None

    def receive(self, deadline: float, watched: Iterable[Sandbox] = ()) -> tuple[bytes, bytes]:
        """The next frame as (kind, payload).

        Args:
            deadline: by ``time.monotonic()``.
            watched: other sandboxes whose memory is watched while this one is waited for.

        Raises:
            Stopped: no frame before the deadline, too large a one, too much memory, or the end of the process.
        """
        poll = select.poll()
        poll.register(self.back, select.POLLIN)
        needed = 5
        while True:
            if len(self.buffer) >= 5:
                size, kind = int.from_bytes(self.buffer[:4], "big"), bytes(self.buffer[4:5])
                if size > (self.limits.output_mb << 20 if kind in _LARGE else SMALL_FRAME):
                    raise Stopped("output limit")
                needed = 5 + size
            if len(self.buffer) >= needed > 5 or (needed == 5 and len(self.buffer) >= 5):
                payload = bytes(self.buffer[5:needed])
                del self.buffer[:needed]
                return kind, payload
            left = deadline - time.monotonic()
            if left <= 0:
                raise Stopped("time limit")
            self._look(watched)
            if not poll.poll(min(left, WATCH_S) * 1000):
                continue
            try:
                part = os.read(self.back, min(max(needed - len(self.buffer), 5), 1 << 20))
            except BlockingIOError:
                continue
            if not part:
                raise Ended(self._end())
            self.buffer += part

    def _look(self, watched: Iterable[Sandbox] = ()) -> None:
        """Every ``WATCH_S``, however busy its pipes are, see how much memory it holds."""
        if (now := time.monotonic()) < self.next_look:
            return
        self.next_look = now + WATCH_S
        for sandbox in (self, *watched):
            if sandbox.resident_bytes() > self.limits.memory_mb << 20:
                raise Stopped("memory limit")

    def resident_bytes(self) -> int:
        """Private memory of every process inside, as far as the kernel lists them."""
        total, page = 0, os.sysconf("SC_PAGE_SIZE")
        for pid in self.processes():
            with contextlib.suppress(OSError, ValueError), open(f"/proc/{pid}/statm") as file:  # it may have ended
                _, resident, shared, *_ = file.read().split()
                total += (int(resident) - int(shared)) * page
        return total

    def processes(self) -> list[int]:
        """The first process inside and its descendants, as far as the kernel lists them."""
        found = [] if self.first_process is None else [self.first_process]
        for pid in found:
            if len(found) > 4 * self.limits.processes:
                break
            with contextlib.suppress(OSError, ValueError):  # it may have ended
                for task in os.listdir(f"/proc/{pid}/task"):
                    with open(f"/proc/{pid}/task/{task}/children") as file:
                        found += [int(child) for child in file.read().split()]
        return found

    def kill(self) -> None:
        """End every process inside; may be called twice, and from any thread. One that is still starting ends then."""
        with self.lock, contextlib.suppress(ProcessLookupError, PermissionError):
            self.doomed = True
            if self.closed or self.first_process is None:
                return
            if not self.launcher.sandboxed:
                self._kill_tree()
            elif self.pidfd is not None:
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)
            elif self.process.poll() is None:
                os.kill(self.first_process, signal.SIGKILL)

    def _kill_tree(self) -> None:
        """Without a namespace: stop the driver, so that it starts nothing more, then end it and what it started."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGSTOP)
            for pid in reversed(self.processes()):
                with contextlib.suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)

    def close(self) -> None:
        """End it, wait until every process inside is gone, and free what it held."""
        if self.first_process is None:  # bubblewrap killed halfway would leave a child behind that waits for it
            with contextlib.suppress(Stopped, SandboxFailure):
                self._find_first_process(time.monotonic() + START_TIMEOUT_S)
        self.kill()
        if self.pidfd is not None:
            select.select([self.pidfd], [], [], START_TIMEOUT_S)
        try:
            self.process.wait(START_TIMEOUT_S)
        except subprocess.TimeoutExpired:  # pragma: no cover - bubblewrap stopped from outside
            self.process.kill()
            self.process.wait()
        if self.first_process is not None:
            GUARD.release(self.first_process)
        with self.lock:
            self.closed = True
            for stream in (self.process.stdin, self.process.stdout, self.process.stderr):
                if stream is not None:
                    stream.close()
            for descriptor in (self.pidfd, self.info):
                if descriptor is not None:
                    os.close(descriptor)
            self.pidfd = self.info = None
            if self.folder is not None:
                self.folder.cleanup()
        self.launcher.slots.put(self.slot)

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _complaint(self) -> str:
        """The last line on its error output before the driver took over."""
        assert self.process.stderr is not None
        os.set_blocking(self.process.stderr.fileno(), False)
        lines = (self.process.stderr.read(SMALL_FRAME) or b"").decode("utf-8", "replace").strip().splitlines()
        return lines[-1] if lines else ""

    def _end(self) -> str:
        """How the process ended, once its pipe has closed.

        Raises:
            SandboxFailure: bubblewrap itself was killed, which nothing inside can do.
        """
        try:
            status = self.process.wait(1.0)
        except subprocess.TimeoutExpired:
            return "the program closed the pipe"
        if status < 0 and self.launcher.sandboxed:
            raise SandboxFailure(f"bubblewrap was ended by signal {-status}")
        number = -status if status < 0 else status - 128
        if 0 < number < signal.NSIG:
            return f"the program was ended by signal {number} ({_signal_name(number)})"
        return f"the program ended itself (exit status {status})"


def error_of(payload: bytes) -> str:
    """What an ERROR, REFUSED, FAILED or TROUBLE frame says, as one short line of printable characters.

    Raises:
        Stopped: the frame is not one that our driver would write.
    """
    try:
        if len(payload) > SMALL_FRAME:
            raise NotPlainError("too long for a report")
        said = read_json(payload)
    except NotPlainError:
        raise Stopped("the program wrote over its pipe") from None
    parts = said if isinstance(said, list) else [said]
    return printable(": ".join(str(part) for part in parts if part)[:LONGEST_REPORT])


def printable(text: str) -> str:
    """Text of a program made fit for a terminal and a log: no escape sequences, no halves of characters."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _frame(kind: bytes, payload: bytes) -> bytes:
    return len(payload).to_bytes(4, "big") + kind + payload


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return "unknown"


def _environment() -> dict[str, str]:
    from scope_opd.verify.sandbox.bubblewrap import ENVIRONMENT

    return dict(ENVIRONMENT)


def _interpreter() -> list[str]:
    from scope_opd.verify.sandbox.bubblewrap import PYTHON_FLAGS, interpreter

    return [interpreter(), *PYTHON_FLAGS]
