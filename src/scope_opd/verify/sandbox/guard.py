"""Ends the sandboxes of a process that was killed: nobody else can.

Bubblewrap asks the kernel to end the first process inside when bubblewrap itself ends. As root that signal is refused
by the kernel: bubblewrap has given up the right to signal other users' processes, and the first process inside is
another user's by then. So one small process is started with the first sandbox, told of each that starts and ends, and
kills those that are left when its pipe closes, which it does however we end.

Not covered: Linux before 5.3 (no pidfd); a process forked from ours keeps the pipe open for as long as it lives;
without a sandbox only the driver is ended, not what a program had started.
"""

from __future__ import annotations

import atexit
import contextlib
import subprocess
import threading

WATCH = """
import os, signal
held, rest, part = {}, b"", b"."
while part:
    part = os.read(0, 4096)
    *lines, rest = (rest + part).split(b"\\n")
    for line in lines:
        pid = int(line[1:])
        if line[:1] == b"+":
            try:
                held[pid] = os.pidfd_open(pid)
            except (AttributeError, OSError):
                pass
        elif pid in held:
            os.close(held.pop(pid))
for pidfd in held.values():
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except OSError:
        pass
"""


class Guard:
    """Tells the watching process which sandboxes are alive; starts it with the first. Safe from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def hold(self, pid: int, command: list[str]) -> None:
        """Watch over a process.

        Args:
            pid: the process to kill if ours ends first.
            command: the interpreter and its flags.

        Raises:
            OSError: the watching process does not start.
        """
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self._start(command)
            self._tell(b"+%d\n" % pid)

    def release(self, pid: int) -> None:
        """Forget a process that has ended."""
        with self._lock:
            self._tell(b"-%d\n" % pid)

    def close(self) -> None:
        """End the watching process, and with it what it still holds."""
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            with contextlib.suppress(OSError):
                process.communicate()

    def _start(self, command: list[str]) -> None:
        if self._process is None:
            atexit.register(self.close)
        elif self._process.stdin is not None:
            self._process.stdin.close()
        nowhere = subprocess.DEVNULL  # or whoever reads our output would wait for its end too
        self._process = subprocess.Popen(
            [*command, "-c", WATCH],
            bufsize=0,
            stdin=subprocess.PIPE,
            stdout=nowhere,
            stderr=nowhere,
            cwd="/",
            env={},
            start_new_session=True,  # Ctrl-C is for us
        )

    def _tell(self, line: bytes) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(OSError):  # it was killed: the next hold starts another
                self._process.stdin.write(line)


GUARD = Guard()
"""The one of this process."""
