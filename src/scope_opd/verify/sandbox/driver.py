"""What runs inside a sandbox: executes programs, calls their functions, and speaks plain data over two pipes.

This one file is compiled by the parent and sent through the pipe, so that nothing of the project is visible inside; it
may import the standard library alone, and as little of it as it can (every import is paid once a program). The parent
imports ``encode``, ``decode`` and ``read_json`` from here, so that both ends share one notion of plain data.

A frame is a length (4 bytes, big-endian), a kind (1 byte) and a payload. A driver plays one of two parts:

    solution    holds the program under judgement: loads it, calls its functions, or runs it as a process with an input
    tests       holds the data set's test code and a stand-in for the function, whose calls go out as frames; it forks a
                process for each check, so that one start serves many solutions

Nothing that a solution could write over its pipe is a verdict: it can answer calls, and a program can answer calls in
any way it likes. Whether an answer is right is decided where the solution does not run.

Not covered here: everything that confines this process comes from outside (``bubblewrap``) or is set up before the
first foreign line runs (``enter``). Objects other than plain data do not cross: a function that returns a generator, a
class instance or a numpy array fails its test.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

try:  # the C halves of json: the module itself costs as much start-up as the whole interpreter
    from _json import encode_basestring_ascii, make_scanner
except ImportError:  # pragma: no cover - not CPython
    from json.encoder import encode_basestring_ascii
    from json.scanner import make_scanner  # type: ignore[no-redef,attr-defined,unused-ignore]

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any, NoReturn

MAX_DEPTH = 60
"""Nesting of a value at most: deeper ones are refused rather than risk the stack of whoever reads them."""
MAX_DIGITS = 40
"""Characters of a number in a frame at most; longer whole numbers travel in hexadecimal, read in linear time."""
MAX_MESSAGE = 300
"""Characters of an error message at most."""
RECURSION_LIMIT = 50_000
"""For programs of contests, as LiveCodeBench's runner sets it; HumanEval's keep the interpreter's own."""
FORK_ATTEMPTS = 50
"""Tries to start a program, 10 ms apart, before the sandbox itself is called broken."""
PIPE_CHUNK = 1 << 16

# Kinds of frames. To a driver:
ENTER, LOAD, CALL, RUN, CHECK = b"n", b"l", b"c", b"r", b"k"
# From a driver (VALUE, ERROR and REFUSED also go to the driver of the tests, as answers to its CALL):
READY, LOADED, VALUE, ERROR, REFUSED, OUTPUT, ENDED, PASSED, FAILED, TROUBLE = (
    b"R", b"L", b"V", b"E", b"X", b"O", b"D", b"P", b"F", b"S",
)  # fmt: skip


class NotPlainError(Exception):
    """A value that may not cross a pipe, or a frame that is not one of ours."""


# -- plain data ------------------------------------------------------------------------------------------------------


def encode(value: Any, depth: int = 0) -> str:
    """Plain data as JSON text. What JSON lacks is an object of one tagged member: ``{"t": [1, 2]}`` is a tuple.

    Subclasses (``defaultdict``, a named tuple, an ``IntEnum``) cross as what they subclass.

    Raises:
        NotPlainError: another type, or nesting beyond ``MAX_DEPTH``.
    """
    if value is None:
        return "null"
    if value is True:
        return "true"
    if value is False:
        return "false"
    if depth > MAX_DEPTH:
        raise NotPlainError(f"a value nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        return encode_basestring_ascii(str.__str__(value))
    if isinstance(value, int):
        number = int.__index__(value)
        return int.__repr__(number) if -(1 << 63) <= number < 1 << 63 else f'{{"i": "{number:x}"}}'
    if isinstance(value, float):
        text = float.__repr__(value)
        return f'{{"f": "{text}"}}' if text in ("nan", "inf", "-inf") else text
    if isinstance(value, list):
        return _sequence(value, depth)
    if isinstance(value, tuple):
        return f'{{"t": {_sequence(value, depth)}}}'
    if isinstance(value, dict):
        pairs = [f"[{encode(key, depth + 1)}, {encode(item, depth + 1)}]" for key, item in dict.items(value)]
        return f'{{"d": [{", ".join(pairs)}]}}'
    if isinstance(value, frozenset):
        return f'{{"z": {_sequence(value, depth)}}}'
    if isinstance(value, set):
        return f'{{"s": {_sequence(value, depth)}}}'
    if isinstance(value, complex):
        return f'{{"c": [{encode(value.real)}, {encode(value.imag)}]}}'
    if isinstance(value, bytes):
        return f'{{"b": "{bytes.hex(value)}"}}'
    raise NotPlainError(f"a value of type {type(value).__name__}")


def _sequence(values: Any, depth: int) -> str:
    return f"[{', '.join([encode(item, depth + 1) for item in values])}]"


def _short_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise NotPlainError("a number of too many digits")
    return int(text)


def _short_float(text: str) -> float:
    if len(text) > MAX_DIGITS:
        raise NotPlainError("a number of too many digits")
    return float(text)


def _no_constant(text: str) -> NoReturn:
    raise NotPlainError(f"{text} in a frame")


class _Scanner:
    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_int = staticmethod(_short_int)
    parse_float = staticmethod(_short_float)
    parse_constant = staticmethod(_no_constant)
    memo: dict[str, str] = {}  # noqa: RUF012 - read by json's pure Python scanner alone


_scan = make_scanner(_Scanner())  # type: ignore[arg-type,unused-ignore]


def read_json(payload: bytes) -> Any:
    """The JSON tree of a payload, tags unread: lists, objects, texts, short numbers.

    Raises:
        NotPlainError: not such a tree.
    """
    try:
        text = payload.decode("ascii")
        tree, end = _scan(text, 0)
    except NotPlainError:
        raise
    except (ValueError, StopIteration, RecursionError):
        raise NotPlainError("a frame that is not JSON") from None
    if end != len(text):
        raise NotPlainError("a frame that is not JSON")
    return tree


def decode(tree: Any, depth: int = 0) -> Any:
    """The value that ``encode`` wrote, from its JSON tree; only built-in types come out.

    Raises:
        NotPlainError: an unknown tag, a key that cannot be hashed, nesting beyond ``MAX_DEPTH``.
    """
    if depth > MAX_DEPTH:
        raise NotPlainError(f"a value nested more than {MAX_DEPTH} deep")
    if isinstance(tree, list):
        return [decode(item, depth + 1) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) != 1:
        raise NotPlainError("an object that is no tagged value")
    ((tag, body),) = tree.items()
    try:
        if tag == "i":
            return int(body, 16)
        if tag == "f":
            return float(body) if body in ("nan", "inf", "-inf") else _no_constant(body)
        if tag == "b":
            return bytes.fromhex(body)
        if tag == "c":
            real, imaginary = (decode(part) for part in body)
            return complex(real, imaginary)
        if tag == "d":
            return {decode(key, depth + 1): decode(item, depth + 1) for key, item in body}
        if tag in ("t", "s", "z"):
            return {"t": tuple, "s": set, "z": frozenset}[tag]([decode(item, depth + 1) for item in body])
    except (ValueError, TypeError):
        raise NotPlainError(f"a broken value with the tag {tag!r}") from None
    raise NotPlainError(f"an unknown tag {tag!r}")


def message_of(error: BaseException) -> list[str]:
    """``[type, message]`` of an exception, short, whatever its ``__str__`` does."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    line = _line_of(error)
    where = f" (line {line})" if line else ""
    return [str(type(error).__name__)[:80], " ".join(text[: MAX_MESSAGE * 2].split())[:MAX_MESSAGE] + where]


def _line_of(error: BaseException) -> int | None:
    """The line of the innermost frame that belongs to foreign code."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in ("<solution>", "<tests>"):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line


# -- the driver ------------------------------------------------------------------------------------------------------


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
            sys.stdout.flush()
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
        _end_the_rest(child)
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
            self.send_value(CALL, {"name": name, "args": list(args), "kwargs": kwargs})
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
    """The built-in exception of that name, so that tests which expect one see it; else a RuntimeError."""
    import builtins

    name, message = described
    kind = getattr(builtins, name, None)
    if isinstance(kind, type) and issubclass(kind, Exception):
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


# -- a program as a process ------------------------------------------------------------------------------------------


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
    _end_the_rest(child)
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


def _end_the_rest(child: int) -> None:
    """End what a process that has ended left behind, in its session at least."""
    import signal

    try:
        if os.getpid() == 1:  # the sandbox's own process namespace: everything in it but us
            os.kill(-1, signal.SIGKILL)
        else:
            os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        pass
    while os.getpid() == 1:  # whatever it started is ours to reap
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break


# -- entering --------------------------------------------------------------------------------------------------------


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


if __name__ == "<sandbox>":
    main()
