"""How a sandbox is started: bubblewrap's command line, the user inside, and the checks before the first program.

Inside there are: the C library's folders, the interpreter and its standard library (without site-packages), all
read-only; three devices (null, random, urandom: a shared mapping of zero would be memory that no limit counts); a
temporary folder of bounded size, the only place that can be written; nothing of ``/etc`` but the loader's cache, no
``/proc``, no ``/home``, no ``/root``. No network, an own process namespace in which the driver is the first process
(when it ends the kernel ends every other one, and it ends when we do: ``guard``), an empty environment.

The interpreter may lie in a folder that only its owner may enter (a home folder). That decides who drops privileges
when: run by root, bubblewrap binds the folders as root, keeps nothing but the right to change the user, and the driver
changes to a user id of its own before the first foreign line (``driver.enter``): RLIMIT_NPROC does not bind root, and
one id for every sandbox keeps one from using up another's processes. Where root may not create namespaces (in some
containers) bubblewrap itself is started as such a user. Run by anybody else, it uses a user namespace.

Not covered: errors in the kernel or in bubblewrap; the processor's side channels; CPU time of other programs (a
solution may keep every core busy until its limit); kernel memory of empty files in the temporary folder, which only
the time limit bounds; what ``/usr/lib`` holds can be read. Without bubblewrap (``sandboxed=False``) nothing is
confined: rlimits and a temporary folder, and a process that has lost its parent outlives its test.
"""

from __future__ import annotations

import itertools
import marshal
import os
import queue
import shutil
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from scope_opd.errors import ScopeError
from scope_opd.verify.sandbox import driver, plain, processes
from scope_opd.verify.sandbox.limits import CodeLimits
from scope_opd.verify.sandbox.seccomp import filter_program

INSTALL = "install the package bubblewrap (apt-get install bubblewrap, or dnf install bubblewrap)"
TRUST = "pass --allow-unsandboxed (verify.allow_unsandboxed = true) if all of the code is trusted"
SYSTEM_FOLDERS = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/nix/store", "/gnu/store")
DEVICES = ("/dev/null", "/dev/random", "/dev/urandom")
SLOTS = 512
"""Sandboxes alive at once in one process at most; each has a user id of its own."""
_FREE_SLOTS: queue.SimpleQueue[int] = queue.SimpleQueue()
for _slot in range(SLOTS):
    _FREE_SLOTS.put(_slot)
FIRST_USER = 0x70000000
"""User ids for sandboxes where every id may be used: a range that systemd's table of ids leaves unassigned."""
PYTHON_FLAGS = ("-S", "-s", "-P", "-X", "utf8")  # not -I: it would ignore PYTHONHASHSEED
ENVIRONMENT = {"PYTHONHASHSEED": "0"}  # the order of a set is part of what a program prints
BOOT = (
    "import marshal,os,sys\nn=int(os.read(0,8));b=b''\n"
    "while len(b)<n:b+=os.read(0,n-len(b))\n"
    "for name,code in marshal.loads(b):\n"
    "    module=sys.modules[name]=type(sys)(name);exec(code,module.__dict__)\n"
    "module.main()"
)


class Launcher:
    """Knows how to start sandboxes on this machine.

    Args:
        sandboxed: False runs the same protocol without bubblewrap, only for code that is trusted.

    Raises:
        ScopeError: bubblewrap or the right to create namespaces is missing, with what to do about it.
    """

    def __init__(self, limits: CodeLimits, *, sandboxed: bool = True) -> None:
        self.limits, self.sandboxed = limits, sandboxed
        self.slots = _FREE_SLOTS
        self.boot_blob = boot_blob()
        self.filter = filter_program() if sandboxed else None
        self.bwrap = shutil.which("bwrap") if sandboxed else None
        self.drop = "never"
        if sandboxed:
            self._find_a_way()

    def command(self, seccomp_fd: int | None, info_fd: int | None) -> list[str]:
        """The command line of one sandbox."""
        python = [interpreter(), *PYTHON_FLAGS, "-c", BOOT]
        if not self.sandboxed:
            return python
        assert self.bwrap is not None
        options = [self.bwrap, "--unshare-ipc", "--unshare-net", "--unshare-pid", "--unshare-uts"]
        options += ["--unshare-cgroup-try", "--die-with-parent", "--new-session", "--as-pid-1", "--clearenv"]
        options += ["--seccomp", str(seccomp_fd), "--info-fd", str(info_fd)]
        if self.drop == "inside":
            options += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
        else:
            options += ["--unshare-user", "--uid", "65534", "--gid", "65534", "--cap-drop", "ALL"]
        for name, value in ENVIRONMENT.items():
            options += ["--setenv", name, value]
        options += mounts()
        options += ["--perms", "1777", "--size", str(self.limits.disk_mb << 20), "--tmpfs", "/tmp"]
        return [*options, "--remount-ro", "/", "--chdir", "/tmp", "--", *python]

    def user_inside(self, slot: int) -> int | None:
        """The user id that the driver changes to; None where bubblewrap (or nobody) already has."""
        return sandbox_user(slot) if self.drop == "inside" else None

    def user_outside(self, slot: int) -> int | None:
        """The user id that bubblewrap itself is started as; None for our own."""
        return sandbox_user(slot) if self.drop == "outside" else None

    def processes(self) -> int | None:
        """RLIMIT_NPROC: it counts a user's processes in the whole system, unless a user namespace has its own count."""
        if not self.sandboxed:
            return None
        if self.drop == "never" and not _counts_by_namespace():
            return _own_processes() + self.limits.processes
        return self.limits.processes

    def _find_a_way(self) -> None:
        """Start one sandbox that does nothing, in the ways that this user has; keep the first that works."""
        from scope_opd.verify.sandbox.process import Sandbox, SandboxFailure

        if self.bwrap is None:
            raise ScopeError("no bwrap on this machine", "bubblewrap, to run code in", f"{INSTALL}, or {TRUST}")
        if self.filter is None:
            raise ScopeError(f"a machine of type {os.uname().machine}", "x86_64 or aarch64, to run code in", TRUST)
        reasons = []
        ways = ("inside", "outside") if os.geteuid() == 0 else ("never",)
        if os.geteuid() == 0 and not _is_real_root():
            ways = (*ways, "never")
        for self.drop in ways:
            try:
                with Sandbox(self) as sandbox:
                    sandbox.enter()
                return
            except SandboxFailure as failure:
                reasons.append(str(failure))
        reason = reasons[0]
        if "nknown option" in reason:
            raise ScopeError(f"bubblewrap is too old ({reason})", "version 0.7 or later", f"update it, or {TRUST}")
        raise ScopeError(
            f"bubblewrap cannot build a sandbox here ({reason})",
            "the right to create namespaces",
            "allow user namespaces (sysctl kernel.unprivileged_userns_clone=1 and user.max_user_namespaces, AppArmor's "
            f"kernel.apparmor_restrict_unprivileged_userns=0; in a container --privileged), or {TRUST}",
        )


@cache
def boot_blob() -> bytes:
    """What runs inside, compiled, with its length in front: what ``BOOT`` reads."""
    modules = []
    for module in (plain, processes, driver):
        source = Path(str(module.__file__)).read_text(encoding="utf-8")
        modules.append((module.__name__, compile(source, f"<{module.__name__}>", "exec", optimize=2)))
    code = marshal.dumps(modules)
    return b"%08d" % len(code) + code


@cache
def interpreter() -> str:
    """This interpreter's own file, past every virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", None) or sys.executable)


@cache
def mounts() -> tuple[str, ...]:
    """What a sandbox sees of the system."""
    options: list[str] = []
    there: set[str] = {"/"}
    for *how, path in _mounts():
        for parent in map(str, reversed(Path(path).parents)):
            if parent not in there:  # bubblewrap would make it for its owner alone, who is not the user inside
                options += ["--perms", "0755", "--dir", parent]
                there.add(parent)
        options += [*how, path]
        there.add(path)
    return tuple(options)


def _mounts() -> Iterator[tuple[str, ...]]:
    bound = []
    for folder in SYSTEM_FOLDERS:
        if os.path.islink(folder):
            yield "--symlink", os.readlink(folder), folder
        elif os.path.isdir(folder):
            yield "--ro-bind", folder, folder
            bound.append(folder)
    base = os.path.realpath(sys.base_prefix)
    libraries = [os.path.join(base, name) for name in dict.fromkeys(("lib", sys.platlibdir))]
    for path in (interpreter(), "/etc/ld.so.cache", *libraries):
        real = os.path.realpath(path)
        if os.path.exists(path) and not any(real == folder or real.startswith(folder + "/") for folder in bound):
            yield "--ro-bind", real, path
            bound.append(real)
    for library in libraries:
        packages = os.path.join(library, f"python{sys.version_info.major}.{sys.version_info.minor}", "site-packages")
        if os.path.isdir(packages):
            yield "--tmpfs", packages
            yield "--remount-ro", packages
    for device in DEVICES:
        yield "--dev-bind", device, device


def sandbox_user(slot: int) -> int:
    """A user id that nothing else on the machine uses, another one for every sandbox that is alive.

    Where this process may not use every id (a container with a map of its own) it is one of the last that it may use.
    """
    top = _last_user()
    return FIRST_USER + ((os.getpid() & 0x7FFFF) * SLOTS + slot) if top >= 1 << 31 else top - 2 - slot


@cache
def _user_map() -> tuple[tuple[int, int, int], ...]:
    """Rows (first id here, first id outside, count)."""
    lines = Path("/proc/self/uid_map").read_text(encoding="ascii").splitlines()
    return tuple((int(here), int(outside), int(count)) for here, outside, count in map(str.split, lines))


def _last_user() -> int:
    return max((here + count - 1 for here, _, count in _user_map()), default=0)


def _is_real_root() -> bool:
    """Whether user 0 is root outside too; root of a rootless container is an ordinary user to the kernel."""
    return any(here == outside == 0 for here, outside, _ in _user_map())


@cache
def _counts_by_namespace() -> bool:
    """Since Linux 5.14 RLIMIT_NPROC counts the processes of a user namespace apart from its user's others."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int("".join(itertools.takewhile(str.isdigit, minor)))) >= (5, 14)


def _own_processes() -> int:
    """Threads of all processes of this user."""
    count = 0
    for entry in os.scandir("/proc"):
        try:
            if entry.name.isdigit() and entry.stat().st_uid == os.getuid():
                count += len(os.listdir(f"/proc/{entry.name}/task"))
        except OSError:  # it has ended
            continue
    return count
