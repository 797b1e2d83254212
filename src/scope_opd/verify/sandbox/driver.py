"""What runs inside a sandbox: executes programs, calls their functions, and speaks plain data over two pipes.

This file, ``plain`` and ``processes`` are compiled by the parent and sent through the pipe, so that nothing of the
project is visible inside; they may import the standard library alone, and as little of it as they can: every import is
paid once a program.

A frame is a length (4 bytes, big-endian), a kind (1 byte) and a payload. A driver plays one of two parts:

    solution    holds the program under judgement: loads it, calls its functions, or runs it as a process with an input
    tests       holds the data set's test code and a stand-in for the function, whose calls go out as frames; it forks a
                process for each check, so that one start serves many solutions

Nothing that a solution could write over its pipe is a verdict: it can answer calls, and a program can answer calls in
any way it likes. Whether an answer is right is decided where the solution does not run.

Not covered here: everything that confines this process comes from outside (``bubblewrap``) or is set up before the
first foreign line runs (``enter``).
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from scope_opd.verify.sandbox.plain import ForeignTypeError, decode, encode, message_of, read_json
from scope_opd.verify.sandbox.processes import end_the_rest, fork, inside_alone, run_process

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

RECURSION_LIMIT = 50_000
"""For programs of contests, as LiveCodeBench's runner sets it; HumanEval's keep the interpreter's own."""

# Kinds of frames. To a driver:
ENTER, LOAD, CALL, RUN, CHECK = b"n", b"l", b"c", b"r", b"k"
# From a driver (VALUE, ERROR and REFUSED also go to the driver of the tests, as answers to its CALL):
READY, LOADED, VALUE, ERROR, REFUSED, OUTPUT, ENDED, PASSED, FAILED, TROUBLE = (
    b"R", b"L", b"V", b"E", b"X", b"O", b"D", b"P", b"F", b"S",
)  # fmt: skip


class Driver:
    """One sandbox's side of the conversation. ``source`` and ``sink`` are the pipe's file descriptors."""

    def __init__(self, source: int, sink: int) -> None:
        self.source, self.sink = source, sink
        self.namespace: dict[str, Any] = {}
        self.program: Any = None

    def read(self, size: int) -> bytes:
        parts = []
        while size:
            part = os.read(self.source, min(size, 1 << 20))
            if not part:
                os._exit(0)  # the parent is gone
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def receive(self) -> tuple[bytes, bytes]:
        head = self.read(5)
        return head[4:], self.read(int.from_bytes(head[:4], "big"))

    def send(self, kind: bytes, payload: bytes = b"") -> None:
        data = memoryview(len(payload).to_bytes(4, "big") + kind + payload)
        while data:
            data = data[os.write(self.sink, data) :]

    def send_value(self, kind: bytes, value: Any) -> None:
        self.send(kind, encode(value).encode("ascii"))

    def serve(self) -> None:
        steps: dict[bytes, Callable[[Any], None]] = {
            LOAD: self.load,
            CALL: self.call,
            RUN: self.run,
            CHECK: self.check_apart,
        }
        while True:
            kind, payload = self.receive()
            steps[kind](decode(read_json(payload)))

    # -- the part of the solution ------------------------------------------------------------------------------------

    def load(self, order: dict[str, Any]) -> None:
        """Compile the program's pieces; unless it is to run as a process, execute them as one module."""
        try:
            if order["contest"]:
                sys.setrecursionlimit(RECURSION_LIMIT)
            pieces = [compile(text, "<solution>", "exec") for text in order["pieces"]]
            if order["process"]:
                self.program = (pieces, order["names"])
            else:
                self.namespace = execute(pieces, "solution", order["names"])
        except BaseException as error:
            self.send_value(ERROR, message_of(error))
        else:
            self.send(LOADED)

    def call(self, order: dict[str, Any]) -> None:
        try:
            value = find(self.namespace, order["name"])(*order["args"], **order["kwargs"])
        except BaseException as error:
            self.send_value(ERROR, message_of(error))
            return
        try:
            payload = encode(value).encode("ascii")
        except BaseException as error:
            self.send_value(REFUSED, message_of(error)[1])
        else:
            self.send(VALUE, payload)

    def run(self, order: dict[str, Any]) -> None:
        """Run the program as a process of its own, whatever it leaves behind ended with it."""
        outcome = run_process(lambda: self._child(), order["input"].encode(), order["max_output"])
        if isinstance(outcome, str):
            self.send_value(TROUBLE, outcome)
            return
        output, errors, status, too_much = outcome
        self.send(OUTPUT, output)
        self.send_value(ENDED, [status, " ".join(errors.decode("utf-8", "replace").split()), too_much])

    def _child(self) -> int:
        """In the forked child: the program as ``__main__``; returns its exit status."""
        pieces, names = self.program
        status = 0
        try:
            execute(pieces, "__main__", names)
        except SystemExit:
            pass  # the usual way to end early; what was printed is judged
        except BaseException as error:
            status = 1
            os.write(2, ": ".join(message_of(error)).encode("utf-8", "replace"))
        try:  # what the interpreter does at its end: threads, atexit (fast-output templates print there), buffers
            if "threading" in sys.modules:
                sys.modules["threading"]._shutdown()
            if "atexit" in sys.modules:
                sys.modules["atexit"]._run_exitfuncs()
            _flush(sys.stdout)
            if "__main__" in sys.modules:  # files that it never closed write what they hold
                vars(sys.modules["__main__"]).clear()
            _flush(sys.__stdout__)
        except BaseException as error:
            status = status or 1
            os.write(2, ": ".join(message_of(error)).encode("utf-8", "replace"))
        return status

    # -- the part of the tests ---------------------------------------------------------------------------------------

    def check_apart(self, order: dict[str, Any]) -> None:
        """``check`` in a forked process that speaks over our pipe while we wait; READY when nothing of it is left."""
        child = fork()
        if isinstance(child, str):
            self.send_value(TROUBLE, child)
            return
        if child == 0:
            os.setsid()
            self.check(order)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        end_the_rest(child)
        if status:
            self.send_value(FAILED, ["", f"the tests ended with status {status}"])
        self.send(READY)

    def check(self, order: dict[str, Any]) -> None:
        """Run test code whose calls of the function under judgement go out over the pipe."""
        try:
            if "random" in order["test"]:
                import random

                random.seed(0)  # tests that draw their inputs draw the same ones every time
            pieces = [compile(order["preamble"], "<prompt>", "exec")] if order["preamble"] else []
            namespace = execute(pieces, "tests", order["names"])
            candidate = self._stand_in(order["name"])
            if "." in order["name"]:
                namespace[order["name"].partition(".")[0]] = self._class_stand_in(order["name"].partition(".")[0])
            else:
                namespace[order["name"]] = candidate
            exec(compile(order["test"], "<tests>", "exec"), namespace)
            if order["call_check"]:
                namespace["check"](candidate)
        except BaseException as error:
            self.send_value(FAILED, message_of(error))
        else:
            self.send(PASSED)

    def _stand_in(self, name: str) -> Callable[..., Any]:
        def candidate(*args: Any, **kwargs: Any) -> Any:
            try:
                self.send_value(CALL, {"name": name, "args": list(args), "kwargs": kwargs})
            except ForeignTypeError as error:  # a linked list, a tree: no fault of the solution
                self.send_value(TROUBLE, f"the tests call the function with {error}")
                os._exit(0)
            kind, payload = self.receive()
            value = decode(read_json(payload))
            if kind == VALUE:
                return value
            raise _raised(value) if kind == ERROR else TypeError(f"the function returned {value}")

        return candidate

    def _class_stand_in(self, name: str) -> type:
        make = self._stand_in

        class StandIn:
            def __getattr__(self, method: str) -> Callable[..., Any]:
                return make(f"{name}.{method}")

        return StandIn


def _raised(described: list[str]) -> Exception:
    """The built-in exception of that name, so that tests which expect one see it; else a RuntimeError.

    Never StopIteration: it would end the tests' own loop over ``map(candidate, ...)`` as if all were done.
    """
    import builtins

    name, message = described
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception) and not issubclass(kind, StopIteration):
        try:
            return kind(message)
        except TypeError:  # UnicodeDecodeError wants five arguments
            pass
    return RuntimeError(f"{name}: {message}")


def execute(pieces: list[Any], module: str, names: list[list[str]]) -> dict[str, Any]:
    """Execute compiled pieces in the namespace of one new module.

    Args:
        pieces: code objects.
        module: the module's name; ``__main__`` runs what stands under ``if __name__ == "__main__"``.
        names: pairs (name, module): names of the standard library that contest programs use without importing them.
    """
    here = type(sys)(module)
    sys.modules[module] = here
    namespace = here.__dict__
    namespace["__builtins__"] = __builtins__
    used = {name for piece in pieces for name in _names(piece)} if names else set()
    for name, home in names:
        if name in used:
            namespace[name] = __import__(home) if name == home else getattr(__import__(home), name)
    for piece in pieces:
        exec(piece, namespace)
    return namespace


def _names(code: Any) -> set[str]:
    found = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, type(code)):
            found |= _names(constant)
    return found


def _flush(stream: Any) -> None:
    if stream is not None and not getattr(stream, "closed", False):
        stream.flush()


def find(namespace: dict[str, Any], name: str) -> Callable[..., Any]:
    """``f`` is a function; ``Solution.f`` a method of a new instance; ``*.f`` whichever of the two there is."""
    owner, _, attribute = name.rpartition(".")
    if owner == "*":
        solution = namespace.get("Solution")
        owner = "Solution" if isinstance(solution, type) and hasattr(solution, attribute) else ""
    if owner:
        return getattr(namespace[owner](), attribute)
    if attribute not in namespace:
        raise NameError(f"name {attribute!r} is not defined")
    return namespace[attribute]


def enter(settings: dict[str, Any]) -> None:
    """Limits first, then the unprivileged user: from here on neither can be undone."""
    import resource

    for name, value in settings["limits"].items():
        which = getattr(resource, f"RLIMIT_{name}", None)
        if which is not None:
            hard = resource.getrlimit(which)[1]
            bound = value if hard == resource.RLIM_INFINITY else min(value, hard)
            resource.setrlimit(which, (bound, bound))
    if settings["uid"] is not None:
        os.setgroups([])
        os.setresgid(settings["uid"], settings["uid"], settings["uid"])
        os.setresuid(settings["uid"], settings["uid"], settings["uid"])
        if 0 in (*os.getresuid(), *os.getresgid()):
            raise PermissionError("still root")
    sys.set_int_max_str_digits(0)
    # Twice sure: outside, where the driver has another process id, "every process" would be the user's.
    inside_alone(settings["sandboxed"] and os.getpid() == 1)
    import builtins

    for name in ("exit", "quit"):  # what the site module would have added, and many programs end with
        setattr(builtins, name, _leave)


def _leave(status: Any = None) -> NoReturn:
    raise SystemExit(status)


def main() -> NoReturn:
    driver = Driver(os.dup(0), os.dup(1))
    _, payload = driver.receive()
    try:
        order = decode(read_json(payload))
        enter(order)
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):  # what a program prints while its functions are called goes nowhere
            os.dup2(nowhere, descriptor)
        os.close(nowhere)
        os.environ.clear()
        for name in order["imports"]:
            __import__(name)
    except OSError as error:
        driver.send_value(TROUBLE, f"{error.strerror or error}")
        os._exit(1)
    driver.send(READY)
    driver.serve()
    os._exit(0)
