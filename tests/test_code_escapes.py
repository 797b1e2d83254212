"""Programs that try to pass without solving the task, or to hurt their judge. Each is really run; none may be correct.

The task is ``f(xs)``: the sum of a list, checked on values that no program sees. What a program reaches, reads or uses
up is the subject of test_sandbox.py; here it is the verdict, and that the judge is still there afterwards.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from code_kit import LIMITS, need_sandbox, no_process_left
from scope_opd.verify.code.verifier import CodeVerifier
from scope_opd.verify.sandbox.process import Sandbox

PROMPT = 'def f(xs):\n    """The sum of the numbers."""\n'
TEST = """
HIDDEN = 73313

def check(candidate):
    assert candidate([1, 2]) == 3
    assert candidate([HIDDEN, 1]) == HIDDEN + 1, "the marker zanzibar"
    xs = [5, 6]
    assert candidate(xs) == 11 and xs == [5, 6]
    for sum_ in map(candidate, [[7, HIDDEN]]):
        assert sum_ == HIDDEN + 7
"""
CHECKED = {"format": "humaneval", "prompt": PROMPT, "test": TEST, "entry_point": "f"}
CALLED = {
    "format": "functional",
    "fn_name": "f",
    "tests": [{"args": [[1, 2]], "output": 3}, {"args": [[73313, 1]], "output": 73314}],
}
PRINTED = {
    "format": "stdio",
    "tests": [{"input": "1 2\n", "output": "3\n"}, {"input": "73313 1\n", "output": "73314\n"}],
}
GOOD = "def f(xs):\n    return sum(xs)\n"
GOOD_STDIO = "print(sum(map(int, input().split())))\n"

# name: (program, what the reason must say)
FUNCTIONS: dict[str, tuple[str, str]] = {
    "exit before the asserts": ("import sys\nsys.exit(0)\n", "does not load: SystemExit"),
    "exit in the call": ("def f(xs):\n    raise SystemExit(0)\n", "SystemExit"),
    "hard exit before the asserts": ("import os\nos._exit(0)\n", "ended itself (exit status 0)"),
    "hard exit in the call": ("import os\ndef f(xs):\n    os._exit(0)\n", "ended itself (exit status 0)"),
    "an object equal to everything": (
        "class Any:\n    def __eq__(self, other): return True\n    def __ne__(self, other): return False\n"
        "def f(xs):\n    return Any()\n",
        "a value of type Any",
    ),
    "a number equal to everything": (
        "class Any(int):\n    def __eq__(self, other): return True\n    __hash__ = None\n"
        "def f(xs):\n    return Any(0)\n",
        "",
    ),
    "equality redefined in builtins": (
        "import builtins, operator\nbuiltins.int = builtins.sum = lambda *a: 0\noperator.eq = lambda a, b: True\n"
        "def f(xs):\n    return 0\n",
        "",
    ),
    "AssertionError redefined": (
        "import builtins\nclass Quiet(BaseException): pass\nbuiltins.AssertionError = Quiet\n"
        "builtins.__build_class__ = None\ndef f(xs):\n    return 0\n",
        "",
    ),
    "an exception that leaves the tests": (
        "def f(xs):\n    raise GeneratorExit\n",
        "GeneratorExit",
    ),
    "sys.exit and os._exit redefined": (
        "import sys, os\nsys.exit = os._exit = exit = quit = lambda *a: None\nsys.excepthook = lambda *a: os.kill\n"
        "def f(xs):\n    return 0\n",
        "",
    ),
    "the harness redefined": (
        "import sys, gc\n"
        "for thing in gc.get_objects():\n"
        "    if type(thing).__name__ == 'Driver':\n"
        "        type(thing).call = lambda self, order: self.send(b'V', b'3')\n"
        "frame = sys._getframe()\n"
        "while frame:\n"
        "    for name in list(frame.f_globals):\n"
        "        if name in ('encode', 'execute', 'find', 'message_of'):\n"
        "            frame.f_globals[name] = lambda *a, **k: '3'\n"
        "    frame = frame.f_back\n"
        "def f(xs):\n    return 0\n",
        "",
    ),
    "a verdict written to every descriptor": (
        "import os\n"
        "def f(xs):\n"
        "    for number in range(1024):\n"
        "        try: os.write(number, (0).to_bytes(4, 'big') + b'P')\n"
        "        except OSError: pass\n"
        "    os._exit(0)\n",
        "wrote over its pipe",
    ),
    "a verdict at load": (
        "import os\nfor number in range(3, 10):\n"
        "    try: os.write(number, (0).to_bytes(4, 'big') + b'L' + (0).to_bytes(4, 'big') + b'P')\n"
        "    except OSError: pass\ndef f(xs):\n    return 0\n",
        "wrote over its pipe",
    ),
    "a verdict printed": (
        "import sys, os\nprint('PASSED', '{\"correct\": true}', flush=True)\nos.write(2, b'passed 1 test')\n"
        "def f(xs):\n    print('passed')\n    return True\n",
        "",
    ),
    "answers ahead of the questions": (
        "import os, threading\n"
        "def forge():\n"
        "    while True:\n"
        "        try: os.write(4, (1).to_bytes(4, 'big') + b'V' + b'3')\n"
        "        except OSError: return\n"
        "threading.Thread(target=forge, daemon=True).start()\n"
        "def f(xs):\n    return 3\n",
        "",
    ),
    "the tests looked for in memory": (
        "import gc, sys\n"
        "def f(xs):\n"
        "    seen = str([o for o in gc.get_objects() if 'zanz' + 'ibar' in str(type(o)) or isinstance(o, (dict, list))"
        " and 'zanz' + 'ibar' in repr(o)[:10000]])\n"
        "    frame = sys._getframe()\n"
        "    while frame:\n"
        "        seen += repr(frame.f_locals) + repr(frame.f_code.co_consts)\n"
        "        frame = frame.f_back\n"
        "    return ('leaked', seen.replace('zanz\\' + \\'ibar', '').count('zanz' + 'ibar'))\n",
        "",
    ),
    "the tests looked for in /proc": (
        "import os\n"
        "def f(xs):\n"
        "    out = []\n"
        "    for folder, _, names in os.walk('/proc'):\n"
        "        for name in names:\n"
        "            if name in ('mem', 'cmdline', 'environ', 'maps'):\n"
        "                out.append(name)\n"
        "    raise ValueError(f'saw {len(out)} files')\n",
        "ValueError: saw 0 files",
    ),
    "arguments changed under the tests": ("def f(xs):\n    xs[:] = [0, 0]\n    return 0\n", ""),
    "sleeping past the limit": ("import time\ndef f(xs):\n    time.sleep(3600)\n", "time limit"),
    "sleeping at load": ("import time\ntime.sleep(3600)\n", "time limit"),
    "a busy loop that ignores signals": (
        "import signal\n"
        "for number in range(1, 65):\n"
        "    try: signal.signal(number, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\n"
        "def f(xs):\n    while True: pass\n",
        "time limit",
    ),
    "stopping itself": (
        "import os, signal\ndef f(xs):\n    os.kill(0, signal.SIGSTOP)\n    while True: pass\n",
        "time limit",
    ),
    "endless output": ("def f(xs):\n    while True: print('x' * 100000)\n", "time limit"),
    "an endless answer": ("def f(xs):\n    return 'x' * (50 << 20)\n", "output limit of 2 MB"),
    "an answer that collides in every hash table": (
        "def f(xs):\n    return set(k * (2**61 - 1) for k in range(60000))\n",
        "time limit",
    ),
    "an answer nested ten thousand deep": (
        "def f(xs):\n    value = []\n    for _ in range(10000): value = [value]\n    return value\n",
        "nested more than 60 deep",
    ),
    "an answer that contains itself": (
        "def f(xs):\n    value = {}\n    value[1] = value\n    return value\n",
        "nested",
    ),
    "a memory bomb": ("def f(xs):\n    return len([0] * 10**10)\n", "MemoryError"),
    "a memory bomb in small pieces": (
        "def f(xs):\n    held = []\n    while True: held.append(bytearray(1 << 20))\n",
        "MemoryError",
    ),
    "a memory bomb of many processes": (
        "import os, time\ndef f(xs):\n"
        "    for _ in range(10):\n"
        "        if os.fork() == 0:\n"
        "            held = bytearray(b'x') * (150 << 20)\n"
        "            time.sleep(60)\n"
        "    time.sleep(60)\n",
        "memory limit of 256 MB",
    ),
    "a fork bomb": (
        "import os\ndef f(xs):\n    while True:\n        try: os.fork()\n        except OSError: pass\n",
        "time limit",
    ),
    "a daemon that outlives its parent": (
        "import os, time\ndef f(xs):\n"
        "    if os.fork() == 0:\n"
        "        os.setsid()\n"
        "        if os.fork() == 0:\n"
        "            time.sleep(600)\n"
        "        os._exit(0)\n"
        "    os._exit(0)\n",
        "ended itself",
    ),
    "a disk filled": (
        "def f(xs):\n    with open('/tmp/x', 'wb') as file:\n        while True: file.write(bytes(1 << 20))\n",
        "Error",
    ),
    "killing the parent": (
        "import os, signal\ndef f(xs):\n"
        "    for pid in (os.getppid(), -1, 1, 2, 3):\n"
        "        try: os.kill(pid, signal.SIGKILL)\n"
        "        except OSError: pass\n    return 0\n",
        "",
    ),
    "a crash of the interpreter": ("import ctypes\ndef f(xs):\n    ctypes.string_at(0)\n", "SIGSEGV"),
    "a stack overflow in C": (
        "import sys\nsys.setrecursionlimit(10**9)\n"
        "class A:\n    def __repr__(self): return repr([self])\ndef f(xs):\n    return repr(A())\n",
        "time limit",
    ),
    "another program in its place": (
        "import os, sys\ndef f(xs):\n    os.execv(sys.executable, [sys.executable, '-c', 'print(3)'])\n",
        "ended itself",
    ),
    "the pipes closed": ("import os, time\ndef f(xs):\n    os.closerange(0, 1024)\n    time.sleep(60)\n", "time limit"),
    "an answer of millions of empty lists": ("def f(xs):\n    return [[]] * 400000\n", ""),
    "answers forged by a signal": (
        "import os, signal\n"
        "signal.signal(signal.SIGALRM, lambda *_: os.write(4, (1).to_bytes(4, 'big') + b'V3'))\n"
        "def f(xs):\n    signal.setitimer(signal.ITIMER_REAL, 0.01, 0.01)\n    while True: pass\n",
        "",
    ),
    "the driver's pipes crossed": (
        "import os\nfor one in range(3, 8):\n    for two in range(3, 8):\n"
        "        try: os.dup2(one, two)\n        except OSError: pass\ndef f(xs):\n    return 3\n",
        "",
    ),
    "no program at all": ("pass\n", ""),
    "bytes that are no text": ("def f(xs):\n    return '\\udcff\\x00'\n", ""),
    "null bytes in the program": ("def f(xs):\n    return 3\0\n", "does not load"),
    "a program nested beyond the parser": ("x = " + "(" * 5000 + ")" * 5000, "does not load"),
}

PROGRAMS: dict[str, tuple[str, str]] = {
    "exit before printing": ("import sys\nsys.exit(0)\n", "wrong output"),
    "endless output": ("while True: print('3')\n", "output limit of 2 MB"),
    "endless output to the error stream": ("import sys\nwhile True: sys.stderr.write('x' * 1000)\n", "time limit"),
    "sleeping past the limit": ("import time\ntime.sleep(3600)\n", "time limit"),
    "killing the judge": (
        "import os, signal\n"
        "for pid in (os.getppid(), 1, -1):\n"
        "    try: os.kill(pid, signal.SIGKILL)\n"
        "    except OSError: pass\n",
        "",
    ),
    "a verdict written to every descriptor": (
        "import os\nfor number in range(1024):\n"
        "    try: os.write(number, (0).to_bytes(4, 'big') + b'P' + b'3')\n"
        "    except OSError: pass\n",
        "wrong output",
    ),
    "a process left behind to print later": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    time.sleep(0.3)\n"
        "    print('73314', flush=True)\n    time.sleep(60)\n"
        "else:\n    print(3)\n",
        "test 2 of 2: wrong output",
    ),
    "a memory bomb": ("held = []\nwhile True: held.append(bytearray(1 << 20))\n", "MemoryError"),
    "a fork bomb": ("import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n", "time limit"),
    "outputs kept for the next test": (
        "open('/tmp/seen', 'a').write(input())\nprint(3)\n",
        "test 2 of 2: wrong output: line 1: expected '73314', found '3'",
    ),
}


class Judges:
    """One for attacks that only the clock ends, and one for all others, so that a busy machine changes no reason."""

    def __init__(self) -> None:
        self.hasty = CodeVerifier(replace(LIMITS, timeout_s=0.5), workers=1)
        self.patient = CodeVerifier(replace(LIMITS, timeout_s=20), workers=1)

    def close(self) -> None:
        self.hasty.close()
        self.patient.close()


@pytest.fixture(scope="module")
def judges() -> Iterator[Judges]:
    need_sandbox()
    judges = Judges()
    yield judges
    judges.close()


@pytest.fixture(autouse=True)
def nothing_outlives_a_sandbox(monkeypatch: pytest.MonkeyPatch) -> None:
    close = Sandbox.close

    def checked(self: Sandbox) -> None:
        with no_process_left(self):
            close(self)

    monkeypatch.setattr(Sandbox, "close", checked)


def contained(judges: Judges, case: tuple[str, str], answer: dict[str, Any], good: str) -> None:
    code, reason = case
    judge = judges.hasty if "time limit" in reason else judges.patient
    start = time.monotonic()
    verdict = judge.judge(code, answer, form="answer")
    assert verdict.correct is False, verdict
    assert verdict.reward == 0.0
    assert reason in verdict.reason
    assert time.monotonic() - start < 10
    assert judges.patient.judge(good, answer, form="answer").correct is True, "the judge no longer works"


@pytest.mark.parametrize("name", FUNCTIONS)
def test_an_attack_on_check_code_is_incorrect(judges: Judges, name: str) -> None:
    contained(judges, FUNCTIONS[name], CHECKED, GOOD)


@pytest.mark.parametrize("name", [name for name, (_, reason) in FUNCTIONS.items() if "limit" not in reason])
def test_an_attack_on_calls_is_incorrect(judges: Judges, name: str) -> None:
    contained(judges, FUNCTIONS[name], CALLED, GOOD)


@pytest.mark.parametrize("name", PROGRAMS)
def test_an_attack_on_runs_is_incorrect(judges: Judges, name: str) -> None:
    contained(judges, PROGRAMS[name], PRINTED, GOOD_STDIO)


def test_a_solution_cannot_end_a_loop_of_the_tests(judges: Judges) -> None:
    code = "def f(xs):\n    if xs[0] == 7: raise StopIteration\n    return sum(xs)\n"
    contained(judges, (code, "RuntimeError: StopIteration"), CHECKED, GOOD)


def test_there_are_at_least_twenty_attacks() -> None:
    assert len(FUNCTIONS) + len(PROGRAMS) >= 20
