"""The wall: what a program inside sees, reaches and uses up. Each attack is really run, and its effect looked for."""

from __future__ import annotations

import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from code_kit import LIMITS, Inside, need_sandbox, processes_of
from scope_opd.errors import ScopeError
from scope_opd.verify.sandbox import bubblewrap, driver
from scope_opd.verify.sandbox.bubblewrap import Launcher
from scope_opd.verify.sandbox.limits import CodeLimits
from scope_opd.verify.sandbox.plain import MAX_MESSAGE, NotPlainError, decode, encode, message_of, read_json
from scope_opd.verify.sandbox.process import Sandbox, SandboxFailure, Stopped, error_of
from scope_opd.verify.sandbox.seccomp import filter_program

SECRET = "the-secret-that-must-stay-outside"


@pytest.fixture(scope="module")
def launcher() -> Launcher:
    need_sandbox()
    return Launcher(LIMITS)


def test_files_outside_cannot_be_read(launcher: Launcher, tmp_path: Path) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text(SECRET)
    secret.chmod(0o644)
    places = [str(secret), "/etc/passwd", "/etc/shadow", "/etc/hostname", str(Path.home()), "/proc/1/environ", __file__]
    code = """
import os
def f(places):
    seen = []
    for place in places:
        for attempt in (place, "/proc/self/root" + place, "/tmp/../" + place, "/oldroot" + place, "/newroot" + place):
            try:
                seen.append(str(os.listdir(attempt)) if os.path.isdir(attempt) else open(attempt).read())
            except OSError:
                pass
    return seen
"""
    with Inside(launcher, code) as call:
        seen = call(places)
    # The interpreter may lie below the home folder; then the way to it is there, and nothing beside it.
    home, python = Path.home(), Path(bubblewrap.interpreter())
    way = [str([python.relative_to(home).parts[0]])] if python.is_relative_to(home) else []
    assert [text for text in seen if text not in way] == []


def test_the_system_holds_nothing_beside_the_interpreter_and_its_libraries(launcher: Launcher) -> None:
    code = """
import os, sys
def f():
    def can(name):
        try:
            __import__(name)
            return True
        except ImportError:
            return False
    installed = [name for name in ("scope_opd", "torch", "numpy", "pytest", "pip", "setuptools") if can(name)]
    return sorted(os.listdir("/")), os.path.exists("/proc"), os.listdir("/etc"), sorted(os.listdir("/dev")), installed
"""
    with Inside(launcher, code) as call:
        root, proc, etc, devices, installed = call()
    assert not {"home", "work", "var", "mnt", "opt", "srv", "sys", "proc", "run"} & set(root)
    assert (proc, etc, installed) == (False, ["ld.so.cache"], [])
    assert devices == ["null", "random", "urandom"]


def test_the_environment_is_empty(launcher: Launcher, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCOPE_TEST_TOKEN", SECRET)
    code = """
import ctypes, os
def f():
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_char_p
    return dict(os.environ), libc.getenv(b"SCOPE_TEST_TOKEN"), libc.getenv(b"PATH")
"""
    with Inside(launcher, code) as call:
        assert call() == ({}, None, None)


def test_no_descriptor_is_inherited(launcher: Launcher, tmp_path: Path) -> None:
    (tmp_path / "open.txt").write_text(SECRET)
    held = os.open(tmp_path / "open.txt", os.O_RDONLY)
    os.set_inheritable(held, True)
    code = """
import os, stat
def f():
    kinds = {}
    for number in range(1024):
        try:
            kinds[number] = stat.S_IFMT(os.fstat(number).st_mode)
        except OSError:
            pass
    return [(number, kind == stat.S_IFIFO, kind == stat.S_IFCHR) for number, kind in kinds.items()]
"""
    try:
        with Inside(launcher, code) as call:
            found = call()
    finally:
        os.close(held)
    # /dev/null three times, and the two pipes that calls and answers travel on
    assert found == [(0, False, True), (1, False, True), (2, False, True), (3, True, False), (4, True, False)]


@pytest.fixture
def listener() -> Iterator[tuple[int, str, list[str]]]:
    """A server on the loopback device and one on an abstract Unix socket; who calls is noted."""
    callers: list[str] = []
    loop, unix = socket.socket(), socket.socket(socket.AF_UNIX)
    loop.bind(("127.0.0.1", 0))
    name = f"scope-test-{os.getpid()}"
    unix.bind("\0" + name)
    for server in (loop, unix):
        server.listen()
        server.settimeout(0.1)
    done = threading.Event()

    def serve() -> None:
        while not done.is_set():
            for server in (loop, unix):
                try:
                    server.accept()[0].close()
                    callers.append(str(server.family))
                except TimeoutError:
                    continue

    thread = threading.Thread(target=serve)
    thread.start()
    yield loop.getsockname()[1], name, callers
    done.set()
    thread.join()
    loop.close()
    unix.close()


def test_no_network_is_reached(launcher: Launcher, listener: tuple[int, str, list[str]]) -> None:
    port, name, callers = listener
    code = """
import socket
def f(port, name):
    tried = []
    def attempt(family, kind, address):
        try:
            with socket.socket(family, kind) as s:
                s.settimeout(0.5)
                s.connect(address)
                s.send(b"x")
            tried.append("reached")
        except OSError as error:
            tried.append(error.errno)
    attempt(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", port))
    attempt(socket.AF_INET6, socket.SOCK_STREAM, ("::1", port))
    attempt(socket.AF_INET, socket.SOCK_STREAM, ("1.1.1.1", 53))
    attempt(socket.AF_INET, socket.SOCK_DGRAM, ("8.8.8.8", 53))
    attempt(socket.AF_UNIX, socket.SOCK_STREAM, chr(0) + name)
    attempt(socket.AF_VSOCK, socket.SOCK_STREAM, (2, 1024))
    attempt(socket.AF_NETLINK, socket.SOCK_RAW, (0, 0))
    attempt(socket.AF_PACKET, socket.SOCK_RAW, ("lo", 0))
    return tried
"""
    with Inside(launcher, code) as call:
        tried = call(port, name)
    time.sleep(0.3)
    assert "reached" not in tried
    assert len(tried) == 8
    assert tried[-3:] == [1, 1, 1]  # EPERM: families that a network namespace does not hold
    assert callers == []


def test_no_process_outside_can_be_signalled(launcher: Launcher) -> None:
    code = """
import os, signal
def f(outside):
    said = [os.getpid(), os.getppid()]
    for pid in (outside, os.getppid() or outside + 1, -1):
        try:
            os.kill(pid, signal.SIGKILL)
            said.append("sent")
        except OSError as error:
            said.append(error.errno)
    return said
"""
    with Inside(launcher, code) as call:
        said = call(os.getpid())
    assert said == [1, 0, 3, 3, 3]  # ESRCH: there is nobody to signal


def test_the_disk_is_bounded_and_nothing_else_can_be_written(launcher: Launcher) -> None:
    code = """
import os
def f():
    written = 0
    try:
        for number in range(100):
            with open(f"/tmp/{number}", "wb", buffering=0) as file:
                while True:
                    written += file.write(bytes(1 << 20))
                    if file.tell() >= 4 << 20:
                        break
    except OSError:
        pass
    elsewhere = []
    for folder, inner, _ in os.walk("/"):
        if folder == "/tmp":
            inner.clear()
            continue
        if folder.count("/") > 3 and "python3" not in folder:
            inner.clear()
        try:
            os.close(os.open(folder + "/x", os.O_CREAT | os.O_WRONLY))
            elsewhere.append(folder)
        except OSError:
            pass
    return written, elsewhere
"""
    with Inside(launcher, code, timeout_s=30) as call:
        written, elsewhere = call()
    assert 4 << 20 <= written <= LIMITS.disk_mb << 20
    assert elsewhere == []


def test_memory_that_rlimits_do_not_count_is_refused(launcher: Launcher) -> None:
    code = """
import ctypes, mmap, os
def f():
    libc = ctypes.CDLL(None, use_errno=True)
    def shared():
        try:
            mmap.mmap(-1, 1 << 20)
        except PermissionError:
            return True
    def refused(name, *args):
        ctypes.set_errno(0)
        return getattr(libc, name)(*args) == -1 and ctypes.get_errno() == 1
    CLONE_NEWUSER, CLONE_NEWNS = 0x10000000, 0x20000
    child = 0
    try:
        ctypes.set_errno(0)
        child = libc.syscall(56 if os.uname().machine == "x86_64" else 220, CLONE_NEWUSER | 17, 0, 0, 0, 0)
        if child == 0:
            os._exit(0)
    finally:
        cloned = (child, ctypes.get_errno())
    return {
        "memfd": refused("memfd_create", b"x", 0),
        "shmget": refused("shmget", 0, 1 << 20, 0o1600),
        "msgget": refused("msgget", 0, 0o1600),
        "shared anonymous memory": shared(),
        "private anonymous memory": mmap.mmap(-1, 1 << 20, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).write(b"x") == 1,
        "unshare": refused("unshare", CLONE_NEWUSER),
        "clone": cloned == (-1, 1),
        "mount": refused("mount", b"x", b"/tmp", b"tmpfs", 0, None),
        "ptrace": refused("ptrace", 0, 0, 0, 0),
        "setns": refused("setns", 0, 0),
    }
"""
    with Inside(launcher, code) as call:
        answers = call()
    assert all(answers.values()), answers


def test_privileges_cannot_come_back(launcher: Launcher) -> None:
    code = """
import os, resource
def f():
    ids = {*os.getresuid(), *os.getresgid(), *os.getgroups()}
    kept = []
    for what, attempt in {
        "setuid": lambda: os.setuid(0),
        "setresuid": lambda: os.setresuid(0, 0, 0),
        "setgroups": lambda: os.setgroups([0]),
        "memory": lambda: resource.setrlimit(resource.RLIMIT_AS, (-1, -1)),
        "processes": lambda: resource.setrlimit(resource.RLIMIT_NPROC, (9999, 9999)),
        "chroot": lambda: os.chroot("/tmp"),
        "mknod": lambda: os.mknod("/tmp/disk", 0o60666, os.makedev(8, 0)),
        "nice": lambda: os.nice(-5),
    }.items():
        try:
            attempt()
        except (OSError, ValueError):
            kept.append(what)
    return ids, kept
"""
    with Inside(launcher, code) as call:
        ids, kept = call()
    assert 0 not in ids
    assert kept == ["setuid", "setresuid", "setgroups", "memory", "processes", "chroot", "mknod", "nice"]


def test_a_fork_bomb_stays_small_and_goes_with_its_sandbox(launcher: Launcher) -> None:
    code = """
import os, time
def f():
    while True:
        try:
            if os.fork() == 0:
                while True:
                    try:
                        os.fork()
                    except OSError:
                        time.sleep(0.01)
        except OSError:
            return os.getpid()
"""
    with Inside(launcher, code) as call:
        call()
        time.sleep(0.2)
        assert 2 <= len(processes_of(call.sandbox)) <= LIMITS.processes


def test_threads_are_bounded_too(launcher: Launcher) -> None:
    code = """
import threading, time
def f():
    count = 0
    threading.stack_size(1 << 16)
    while True:
        try:
            threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
            count += 1
        except RuntimeError:
            return count
"""
    with Inside(launcher, code) as call:
        assert call() < LIMITS.processes


def test_a_daemon_goes_with_its_sandbox(launcher: Launcher) -> None:
    code = """
import os, signal, time
def f():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            for number in range(1, 65):
                try:
                    signal.signal(number, signal.SIG_IGN)
                except (OSError, ValueError):
                    pass
            os.closerange(0, 1024)
            time.sleep(600)
        os._exit(0)
    time.sleep(0.2)
"""
    with Inside(launcher, code) as call:
        call()  # leaving the context checks that no process is left


def test_one_process_is_bounded_in_memory(launcher: Launcher) -> None:
    with Inside(
        launcher, "def f(n):\n    try:\n        return len(bytes(n))\n    except MemoryError:\n        return -1"
    ) as call:
        assert call(1 << 20) == 1 << 20
        assert call(2 << 30) == -1


def test_all_processes_together_are_bounded_in_memory(launcher: Launcher) -> None:
    code = """
import os, time
def f():
    for _ in range(8):
        if os.fork() == 0:
            held = bytearray(b"x") * (120 << 20)
            time.sleep(60)
    time.sleep(60)
"""
    with Inside(launcher, code) as call, pytest.raises(Stopped, match="memory limit"):
        call()


BUSY = """
import os, threading, time
def fill():
    time.sleep(0.3)
    for _ in range(8):
        if os.fork() == 0:
            held = bytearray(b"x") * (120 << 20)
            time.sleep(60)
threading.Thread(target=fill, daemon=True).start()
def f(x):
    os.write(4, (1 << 20).to_bytes(4, "big") + b"V")
    while True:
        os.write(4, b"x")
        time.sleep(0.002)
"""


def test_memory_is_watched_while_a_pipe_is_kept_busy(launcher: Launcher) -> None:
    with Inside(launcher, BUSY) as call, pytest.raises(Stopped, match="memory limit"):
        call(1)


def test_memory_is_watched_while_nothing_is_read(launcher: Launcher) -> None:
    with Inside(launcher, BUSY.replace("def f(x)", "def f()") + "def g(): time.sleep(60)") as call:
        call.sandbox.send(driver.CALL, {"name": "g", "args": [], "kwargs": {}}, call.until)
        with pytest.raises(Stopped, match="memory limit"):
            call("x" * (1 << 20))


@pytest.mark.parametrize("kind", [b"V", b"O", b"E"])
def test_a_forged_report_is_short_or_none(launcher: Launcher, kind: bytes) -> None:
    for size in (60_000, 1 << 20):
        frame = f"({size}).to_bytes(4, 'big') + {kind!r} + b'\"' + b'x' * ({size} - 2) + b'\"'"
        with Inside(launcher, f"import os\ndef f():\n    os.write(4, {frame})\n") as call:
            call.sandbox.send(driver.CALL, {"name": "f", "args": [], "kwargs": {}}, call.until)
            try:
                said = error_of(call.sandbox.receive(call.until)[1])
            except Stopped as stopped:
                said = str(stopped)
        assert len(said) < 500


def test_descriptors_that_run_out_are_a_failure_that_leaks_none(launcher: Launcher) -> None:
    def count() -> int:
        return len(os.listdir("/proc/self/fd"))

    with Inside(launcher, "def f(): pass"):  # the guard too has its descriptors now
        pass
    before, slots = count(), launcher.slots.qsize()
    bounds = resource.getrlimit(resource.RLIMIT_NOFILE)
    failures = 0
    try:
        for more in range(14):
            resource.setrlimit(resource.RLIMIT_NOFILE, (before - 1 + more, bounds[1]))
            try:
                with Sandbox(launcher) as sandbox:
                    sandbox.enter()
            except SandboxFailure:
                failures += 1
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, bounds)
    assert failures >= 5
    assert (count(), launcher.slots.qsize()) == (before, slots)


def test_bubblewrap_killed_from_outside_is_no_fault_of_the_program(launcher: Launcher) -> None:
    with Inside(launcher, "def f():\n    while True: pass") as call:
        call.sandbox.send(driver.CALL, {"name": "f", "args": [], "kwargs": {}}, call.until)
        os.kill(call.sandbox.process.pid, signal.SIGKILL)
        call.sandbox.kill()
        with pytest.raises(SandboxFailure, match="signal 9"):
            call.sandbox.receive(call.until)


def test_too_large_an_answer_ends_the_conversation(launcher: Launcher) -> None:
    with Inside(launcher, "def f(n):\n    return 'x' * n") as call:
        assert len(call(1000)) == 1000
        with pytest.raises(Stopped, match="output limit"):
            call(3 << 20)


def test_a_program_that_does_not_read_or_answer_runs_into_the_deadline(launcher: Launcher) -> None:
    code = "import os, signal\ndef f(x):\n    os.kill(os.getpid(), signal.SIGSTOP)\n    while True:\n        pass\n"
    with Inside(launcher, code, timeout_s=1) as call:
        with pytest.raises(Stopped, match="time limit"):
            call(1)
        with pytest.raises(Stopped, match="time limit"):
            call("x" * (1 << 20))


def test_sandboxes_share_nothing(launcher: Launcher) -> None:
    code = """
import os
def f():
    names = os.listdir("/tmp")
    open("/tmp/left", "w").close()
    return names, os.getuid()
"""
    with Inside(launcher, code) as one, Inside(launcher, code) as two:
        (first, first_user), (second, second_user) = one(), two()
    assert first == second == []
    assert os.geteuid() != 0 or first_user != second_user


def test_a_sandbox_closed_from_another_thread_ends_what_waits_for_it(launcher: Launcher) -> None:
    with Inside(launcher, "import time\ndef f():\n    time.sleep(60)", timeout_s=30) as call:
        timer = threading.Timer(0.2, call.sandbox.kill)
        timer.start()
        start = time.monotonic()
        with pytest.raises(Stopped):
            call()
        assert time.monotonic() - start < 5
        timer.join()


def test_a_sandbox_closed_while_it_starts_leaves_nothing_behind(launcher: Launcher) -> None:
    for from_elsewhere in (False, True) * 5:
        sandbox = Sandbox(launcher)
        if from_elsewhere:
            sandbox.kill()
            with pytest.raises(SandboxFailure):
                sandbox.enter()
        sandbox.close()
        assert sandbox.first_process is not None
        assert not Path(f"/proc/{sandbox.first_process}").exists()


def test_the_boot_code_sees_neither_the_project_nor_a_virtual_environment() -> None:
    command = " ".join(bubblewrap.mounts())
    assert str(Path(bubblewrap.__file__).parents[3]) not in command
    assert os.path.realpath(bubblewrap.interpreter()) == bubblewrap.interpreter()


def test_without_bubblewrap_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ScopeError) as caught:
        Launcher(LIMITS)
    line = str(caught.value)
    assert "\n" not in line
    for part in ("bubblewrap", "apt-get install bubblewrap", "--allow-unsandboxed", "verify.allow_unsandboxed"):
        assert part in line


@pytest.mark.parametrize(
    ("complaint", "expected"),
    [
        ("bwrap: No permissions to create new namespace", "user namespaces"),
        ("bwrap: Unknown option --size", "0.7 or later"),
    ],
)
def test_a_bubblewrap_that_cannot_work_here_is_explained(
    complaint: str, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bwrap").write_text(f"#!/bin/sh\necho '{complaint}' >&2\nexit 1\n")
    (tmp_path / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(ScopeError) as caught:
        Launcher(LIMITS)
    assert complaint in str(caught.value)
    assert expected in str(caught.value)
    assert "--allow-unsandboxed" in str(caught.value)


def test_an_unknown_machine_has_no_filter() -> None:
    assert filter_program("riscv64") is None
    for machine in ("x86_64", "aarch64"):
        program = filter_program(machine)
        assert program is not None
        assert len(program) % 8 == 0


@pytest.mark.parametrize("name", ["timeout_s", "memory_mb", "disk_mb", "processes"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), True])
def test_limits_must_be_positive_numbers(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        CodeLimits(**{name: value})


PLAIN = [
    None, True, 0, -5, 10**30, -(10**5000), 1.5, float("inf"), -0.0, "", "é\ud800\n\0", [], [1, [2]], (), (1, (2,)),
    {}, {"a": 1, 2: (3,)}, {(1, 2): {3}}, set(), {1, "a"}, frozenset({1}), b"\x00\xff", 1 + 2j, {"t": 1},
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_plain_data_cross_unchanged(value: object) -> None:
    back = decode(read_json(encode(value).encode("ascii")))
    assert back == value
    assert type(back) is type(value)


def test_subclasses_cross_as_what_they_subclass() -> None:
    class Liar(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

        def __repr__(self) -> str:
            return '1, "injected"'

    back = decode(read_json(encode([Liar(3), (Liar(4),)]).encode("ascii")))
    assert back == [3, (4,)]
    assert type(back[0]) is int


@pytest.mark.parametrize("value", [object(), (x for x in ()), lambda: 1, type, iter([]), map(str, ())])
def test_other_objects_do_not_cross(value: object) -> None:
    with pytest.raises(NotPlainError, match="type"):
        encode(value)


@pytest.mark.parametrize(
    "payload",
    [
        b"", b"[", b"[1] 2", b"nan", b"NaN", b"Infinity", b"\xff", b'{"q": 1}', b'{"t": 1, "s": 2}', b'{"i": "zz"}',
        b"1" * 5000, b"1e" + b"9" * 50, b"[" * 100000, b"[" * 100 + b"]" * 100, b'{"s": [[1]]}', b'{"d": [[1]]}',
        b'{"f": "1e5"}', b'{"c": [1]}', b'{"b": "0"}', b'{"i": 5}', b"{}",
    ],
    ids=lambda payload: payload[:12].decode("latin-1"),
)  # fmt: skip
def test_hostile_frames_are_refused(payload: bytes) -> None:
    with pytest.raises(NotPlainError):
        decode(read_json(payload))


def test_a_value_nested_too_deeply_is_refused() -> None:
    value: list[object] = []
    value.append(value)
    with pytest.raises(NotPlainError, match="nested"):
        encode(value)


def test_an_error_message_is_short_whatever_the_exception_does() -> None:
    class Bad(Exception):
        def __str__(self) -> str:
            raise RuntimeError

    assert message_of(Bad()) == ["Bad", ""]
    assert len(message_of(ValueError("x" * 10**6))[1]) <= MAX_MESSAGE


def test_without_a_sandbox_the_protocol_is_the_same() -> None:
    unconfined = Launcher(LIMITS, sandboxed=False)
    with Sandbox(unconfined) as sandbox:
        sandbox.enter()
        until = time.monotonic() + 10
        order = {"pieces": ["def f(x):\n    return {x}"], "names": [], "contest": False, "process": False}
        sandbox.send(driver.LOAD, order, until)
        assert sandbox.receive(until)[0] == driver.LOADED
        sandbox.send(driver.CALL, {"name": "f", "args": [(1,)], "kwargs": {}}, until)
        assert decode(read_json(sandbox.receive(until)[1])) == {(1,)}
        folder = Path(sandbox.folder.name) if sandbox.folder else None
        assert folder is not None
        assert folder.is_dir()
    assert not folder.exists()
