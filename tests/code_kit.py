"""What the tests of the sandbox and of the code verifier share."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from scope_opd.errors import ScopeError
from scope_opd.verify.sandbox import driver
from scope_opd.verify.sandbox.bubblewrap import Launcher
from scope_opd.verify.sandbox.limits import CodeLimits
from scope_opd.verify.sandbox.plain import decode, read_json
from scope_opd.verify.sandbox.process import Sandbox

LIMITS = CodeLimits(timeout_s=5, memory_mb=256, disk_mb=8, output_mb=2)


def need_sandbox() -> None:
    """Skip, visibly, where no sandbox can be built."""
    if shutil.which("bwrap") is None:
        pytest.skip("bubblewrap (bwrap) is not installed: the sandbox is not tested")
    try:
        Launcher(LIMITS)
    except ScopeError as error:
        pytest.skip(f"the sandbox is not tested: {error}")


class Inside:
    """A sandbox with one program loaded; calling it calls ``f``, and the value comes back as plain data."""

    def __init__(self, launcher: Launcher, code: str, *, timeout_s: float = 10) -> None:
        self.sandbox = Sandbox(launcher)
        try:
            self.sandbox.enter()
            self.until = time.monotonic() + timeout_s
            order: dict[str, Any] = {"pieces": [code], "names": [], "contest": False, "process": False}
            self.sandbox.send(driver.LOAD, order, self.until)
            kind, payload = self.sandbox.receive(self.until)
            assert kind == driver.LOADED, payload
        except BaseException:
            self.sandbox.close()
            raise

    def __call__(self, *args: Any) -> Any:
        self.sandbox.send(driver.CALL, {"name": "f", "args": list(args), "kwargs": {}}, self.until)
        kind, payload = self.sandbox.receive(self.until)
        value = decode(read_json(payload))
        assert kind == driver.VALUE, value
        return value

    def __enter__(self) -> Inside:
        return self

    def __exit__(self, *_: object) -> None:
        with no_process_left(self.sandbox):
            self.sandbox.close()


@contextmanager
def no_process_left(sandbox: Sandbox) -> Iterator[None]:
    """Checks that what is done inside ends every process of the sandbox."""
    try:  # held open, so that no new sandbox gets the same number
        held = os.open(f"/proc/{sandbox.first_process}/ns/pid", os.O_RDONLY)
    except OSError:  # its first process has ended, and with it every other
        yield
        return
    try:
        namespace = os.fstat(held).st_ino
        # Else the look for those that are left sees nothing; but the program may be ending itself this very moment.
        assert (
            not sandbox.launcher.sandboxed or processes_in(namespace) or ended(Path(f"/proc/{sandbox.first_process}"))
        )
        yield
        assert not processes_in(namespace), "a process outlived its sandbox"
    finally:
        os.close(held)


def processes_of(sandbox: Sandbox) -> list[int]:
    """The processes inside a sandbox that is alive."""
    return processes_in(os.stat(f"/proc/{sandbox.first_process}/ns/pid").st_ino)


def processes_in(namespace: int) -> list[int]:
    """Processes of a pid namespace."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and os.stat(entry / "ns" / "pid").st_ino == namespace and not ended(entry):
                found.append(int(entry.name))
        except OSError:
            continue
    return found


def ended(process: Path) -> bool:
    """Whether a process has ended, and waits to be reaped at most."""
    try:
        return (process / "stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except OSError:
        return True
