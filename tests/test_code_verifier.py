"""The code verifier on real programs: HumanEval, the graders' rows, other formats, other users, no bubblewrap."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from code_kit import need_sandbox, processes_in
from scope_opd.errors import DataError, ScopeError
from scope_opd.types import Prompt, Rollout, Verdict, Verifier
from scope_opd.verify.code import loaders
from scope_opd.verify.code.verifier import CodeLimits, CodeVerifier
from scope_opd.verify.sandbox.process import Sandbox, SandboxFailure
from shared_data import data_rows

STDIO = {"format": "stdio", "tests": [{"input": f"{n} 1\n", "output": f"{n + 1}\n"} for n in range(3)]}
CALLS = {"format": "functional", "fn_name": "f", "tests": [{"args": [n], "output": n + 1} for n in range(3)]}


@pytest.fixture(scope="module")
def verifier() -> Iterator[CodeVerifier]:
    need_sandbox()
    verifier = CodeVerifier(CodeLimits(timeout_s=20))
    yield verifier
    verifier.close()


def judge_all(verifier: CodeVerifier, pairs: list[tuple[str, dict[str, Any]]], form: Any) -> list[Verdict]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda pair: verifier.judge(*pair, form=form), pairs))


def test_humaneval_canonical_solutions_pass(verifier: CodeVerifier) -> None:
    rows = data_rows("code/humaneval.jsonl")
    verdicts = judge_all(verifier, [(row["answer"], loaders.from_humaneval(row)) for row in rows], "response")
    assert [
        (row["id"], verdict.reason) for row, verdict in zip(rows, verdicts, strict=True) if not verdict.correct
    ] == []
    assert len(rows) == 164


def test_humaneval_solutions_with_a_broken_result_fail(verifier: CodeVerifier) -> None:
    rows = data_rows("code/humaneval.jsonl")
    pairs = []
    for row in rows:
        name = row["entry_point"]
        broken = f"\n_whole = {name}\ndef {name}(*args, **kwargs):\n    return ('broken', _whole(*args, **kwargs))\n"
        response = f"Here it is:\n```python\n{row['problem']}{row['answer']}{broken}```\nDone."
        pairs.append((response, loaders.from_humaneval(row)))
    verdicts = judge_all(verifier, pairs, "response")
    assert [row["id"] for row, verdict in zip(rows, verdicts, strict=True) if verdict.correct is not False] == []


def test_graders_rows_come_out_as_expected(verifier: CodeVerifier) -> None:
    judged = 0
    for sample in data_rows("code/code_schema_samples.jsonl"):
        row = sample["row"]
        if "tests" not in row:
            continue
        answer = loaders.from_tests(row["tests"])
        if "model_response" in row:
            verdict = verifier.judge(row["model_response"], answer)
            assert verdict.correct is row["expected_correct"], (sample["id"], verdict)
        elif isinstance(row.get("solutions"), str):
            assert verifier.judge(row["solutions"], answer, form="answer").correct, sample["id"]
        else:
            assert verifier.judge("```python\nprint(-12345)\n```", answer).correct is False, sample["id"]
            continue
        judged += 1
    assert judged >= 10


@pytest.mark.parametrize(
    ("code", "answer", "reason"),
    [
        ("print(sum(map(int, input().split())))", STDIO, "passed 3 tests"),
        ("a, b = map(int, open(0).read().split())\nprint(a + b)", STDIO, "passed 3 tests"),
        ("import sys\nif __name__ == '__main__':\n    print(sum(map(int, sys.stdin.buffer.read().split())))\n"
         "    exit(3)",
         STDIO, "passed 3 tests"),
        ("import threading\nthreading.Thread(target=lambda: print(sum(map(int, input().split())))).start()",
         STDIO, "passed 3 tests"),
        ("import atexit, io, os, sys\nout = io.StringIO()\n"
         "atexit.register(lambda: os.write(1, out.getvalue().encode()))\n"
         "out.write(str(sum(map(int, input().split()))))", STDIO, "passed 3 tests"),
        ("def depth(n):\n    return 0 if n == 0 else 1 + depth(n - 1)\ndepth(20000)\n"
         "print(sum(map(int, input().split())))", STDIO, "passed 3 tests"),
        ("print(1)", STDIO, "test 2 of 3: wrong output: line 1: expected '2', found '1'"),
        ("raise ValueError('\\x1b[2J\\ud800')", STDIO, "test 1 of 3: ValueError: ?[2J? (line 1)"),
        ("a = input()\nprint(a[99])", STDIO, "test 1 of 3: IndexError: string index out of range (line 2)"),
        ("import os\nos._exit(7)", STDIO, "test 1 of 3: exit status 7"),
        ("import os\nos.abort()", STDIO, "test 1 of 3: ended by signal 6"),
        ("print(", STDIO,
         "test 1 of 3: the program does not load: SyntaxError: '(' was never closed (<solution>, line 1)"),
        ("def f(n):\n    return n + 1", CALLS, "passed 3 tests"),
        ("class Solution:\n    def __init__(self): self.seen = []\n    def f(self, n: int) -> Optional[int]:\n"
         "        self.seen.append(n)\n        return n + len(self.seen)", CALLS, "passed 3 tests"),
        ("def f(n):\n    return max(1, n)", CALLS, "test 2 of 3: wrong result: expected '2', found '1'"),
        ("def g(n):\n    return n + 1", CALLS, "test 1 of 3: NameError: name 'f' is not defined"),
        ("def f():\n    return 1", CALLS, "test 1 of 3: TypeError: f() takes 0 positional arguments but 1 was given"),
        ("def f(n):\n    yield n + 1", CALLS, "test 1 of 3: returned a value of type generator"),
        ("def f(n):\n    return {n + 1}", CALLS, "test 1 of 3: wrong result: expected '1', found '{1}'"),
        ("import numpy\ndef f(n):\n    return n + 1", CALLS,
         "test 1 of 3: the program does not load: ModuleNotFoundError: No module named 'numpy' (line 1)"),
    ],
)  # fmt: skip
def test_the_reason_says_which_test_failed_and_why(
    verifier: CodeVerifier, code: str, answer: dict[str, Any], reason: str
) -> None:
    verdict = verifier.judge(f"```python\n{code}\n```", answer)
    assert verdict.reason == reason
    assert verdict.correct is reason.startswith("passed")
    assert verdict.reward == float(reason.startswith("passed"))
    assert verdict.extracted == code + "\n"


def test_a_response_without_a_program_is_incorrect(verifier: CodeVerifier) -> None:
    assert verifier.judge("I cannot.", STDIO) == Verdict(False, 0.0, None, "no code block in the response")
    assert verifier.judge("<think>\n```python\nprint(1)\n```", STDIO).extracted is None


def test_verdicts_do_not_depend_on_the_order_or_the_event_loop(verifier: CodeVerifier) -> None:
    codes = [f"```python\nprint({n})\n```" for n in range(1, 5)] * 3
    answer = {"format": "stdio", "tests": [{"input": "", "output": "2"}]}
    prompt = Prompt("p", "problem", answer, ())

    async def all_of(order: list[str]) -> dict[str, bool | None]:
        rollouts = [Rollout("r", "p", [], [], [], text=text) for text in order]
        verdicts = await asyncio.gather(*(verifier.verify(rollout, prompt) for rollout in rollouts))
        return dict(zip(order, (verdict.correct for verdict in verdicts), strict=True))

    assert asyncio.run(all_of(codes)) == asyncio.run(all_of(codes[::-1]))
    assert isinstance(verifier, Verifier)


def test_a_set_is_printed_in_the_same_order_every_time(verifier: CodeVerifier) -> None:
    answer = {"format": "stdio", "tests": [{"input": "", "output": "x"}]}
    code = "```python\nprint(*{'a', 'b', 'c', 'd', 'e', 'f'})\n```"
    assert len({verifier.judge(code, answer).reason for _ in range(4)}) == 1


def test_tests_that_draw_their_inputs_draw_the_same_ones(verifier: CodeVerifier) -> None:
    test = "import random\ndef check(candidate):\n    raise ValueError([random.random(), candidate(1)])\n"
    answer = {"format": "humaneval", "prompt": "def f(x):\n", "test": test, "entry_point": "f"}
    assert len({verifier.judge("    return x\n", answer).reason for _ in range(3)}) == 1


def test_tests_see_the_helpers_of_the_prompt_and_exceptions_by_name(verifier: CodeVerifier) -> None:
    prompt = "def helper(x):\n    return x * 2\n\ndef f(x):\n    '''Twice, or ValueError.'''\n"
    test = (
        "def check(candidate):\n    assert candidate(x=4) == helper(4) == f(4)\n    try:\n        candidate(-1)\n"
        "    except ValueError as error:\n        assert 'negative' in str(error)\n    else:\n        assert False\n"
    )
    answer = {"format": "humaneval", "prompt": prompt, "test": test, "entry_point": "f"}
    good = "    if x < 0:\n        raise ValueError('negative')\n    return helper(x)\n"
    assert verifier.judge(good, answer).reason == "passed 1 test"
    assert verifier.judge("    return helper(x)\n", answer).reason == "AssertionError in 'assert False'"


def test_check_code_for_values_that_are_not_plain_data_gives_no_verdict(verifier: CodeVerifier) -> None:
    check = "class Node:\n    pass\ndef check(candidate):\n    assert candidate(Node()) == 1\n\ncheck(f)"
    verdict = verifier.judge("def f(x): return 1", {"format": "functional", "tests": [{"check": check}]}, form="answer")
    assert verdict.correct is None
    assert "the tests call the function with a value of type Node" in verdict.reason
    # A solution cannot bring that about: too deep a value of its own is its own fault.
    check = "def check(candidate):\n    assert candidate(candidate(1)) == 1\n\ncheck(f)"
    code = "def f(x):\n    x = []\n    for _ in range(59): x = [x]\n    return x"
    verdict = verifier.judge(code, {"format": "functional", "tests": [{"check": check}]}, form="answer")
    assert verdict.correct is False


def test_a_number_of_too_many_digits_is_judged_and_named(verifier: CodeVerifier) -> None:
    answer = {"format": "functional", "fn_name": "f", "tests": [{"args": [], "output": 10**5000}]}
    assert verifier.judge("def f(): return 10**5000", answer, form="answer").correct is True
    assert "more digits" in verifier.judge("def f(): return 3", answer, form="answer").reason


@pytest.mark.parametrize(
    "code",
    [
        "out = open(1, 'w')\nout.write('3\\n')",
        "import sys\nout = open(1, 'w')\nout.write('3\\n')\nsys.exit()",
        "import io\nout = io.BufferedWriter(io.FileIO(1, 'w'))\nout.write(b'3\\n')",
        "import io, sys\nprint(3)\nsys.stdout = io.StringIO()",
        "import atexit, io, sys\nsys.stdout = text = io.StringIO()\n"
        "atexit.register(lambda: sys.__stdout__.write(text.getvalue()))\nprint(3)",
        "import sys\nprint(3)\nsys.stdout.close()",
        "import os, sys\nsys.stdout = os.fdopen(1, 'w')\nprint(3)",
        "import sys\nprint(3)\ndel sys.modules['__main__']",
    ],
)
def test_what_the_interpreter_writes_at_its_end_counts(verifier: CodeVerifier, code: str) -> None:
    answer = {"format": "stdio", "tests": [{"input": "", "output": "3"}]}
    assert verifier.judge(code, answer, form="answer").reason == "passed 1 test"


def test_a_malformed_answer_is_a_data_error_that_names_the_prompt(verifier: CodeVerifier) -> None:
    with pytest.raises(DataError, match="tests"):
        verifier.judge("x", {"format": "stdio", "tests": []})
    rollout, prompt = Rollout("r", "p7", [], [], [], text="x"), Prompt("p7", "", {"format": "cobol"}, ())
    with pytest.raises(DataError, match=r"p7.*cobol"):
        asyncio.run(verifier.verify(rollout, prompt))


def test_a_failing_sandbox_gives_no_verdict(verifier: CodeVerifier, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: Sandbox) -> None:
        raise SandboxFailure("no namespaces left")

    with monkeypatch.context() as patch:
        patch.setattr(Sandbox, "enter", fail)
        verdict = verifier.judge("```python\nprint(1)\n```", STDIO)
    assert verdict == Verdict(None, None, "print(1)\n", "no verdict: the sandbox failed (no namespaces left)")


def test_a_tests_sandbox_that_died_while_idle_is_replaced(verifier: CodeVerifier) -> None:
    answer = {
        "format": "humaneval",
        "prompt": "def f(x):\n",
        "test": "def check(candidate):\n    assert candidate(1) == 1\n",
        "entry_point": "f",
    }
    assert verifier.judge("    return x\n", answer).correct
    for sandbox in verifier._rooms._idle:
        sandbox.kill()
    assert [verifier.judge("    return x\n", answer).correct for _ in range(4)] == [True] * 4


def test_closing_ends_what_runs_and_may_be_repeated() -> None:
    need_sandbox()
    verifier = CodeVerifier(CodeLimits(timeout_s=60), workers=1)
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(verifier.judge, "```python\nimport time\ntime.sleep(60)\n```", STDIO)
        time.sleep(0.5)
        start = time.monotonic()
        verifier.close()
        verifier.close()
        assert waiting.result().correct is None
    assert time.monotonic() - start < 5


def test_without_a_sandbox_the_verdicts_are_the_same() -> None:
    rows = data_rows("code/humaneval.jsonl")[:10]
    verifier = CodeVerifier(CodeLimits(timeout_s=20), allow_unsandboxed=True)
    try:
        for row in rows:
            assert verifier.judge(row["answer"], loaders.from_humaneval(row)).correct is True
        assert verifier.judge("```python\nprint(1)\n```", STDIO).correct is False
        assert verifier.judge("```python\nprint(sum(map(int, input().split())))\n```", STDIO).correct is True
    finally:
        verifier.close()


def test_without_a_sandbox_the_time_limit_ends_the_whole_tree(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    kill = Sandbox.kill

    def noting(self: Sandbox) -> None:
        seen.extend(self.processes())
        kill(self)

    monkeypatch.setattr(Sandbox, "kill", noting)
    verifier = CodeVerifier(CodeLimits(timeout_s=1), allow_unsandboxed=True)
    code = "```python\nimport os\nif os.fork() == 0:\n    os.setsid()\nwhile True:\n    os.getppid()\n```"
    assert verifier.judge(code, STDIO).reason == "test 1 of 3: time limit of 1 s"
    verifier.close()
    assert len(seen) == 3
    until = time.monotonic() + 5
    while any(map(alive, seen)) and time.monotonic() < until:
        time.sleep(0.01)
    assert not any(map(alive, seen))


def alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False


def test_without_bubblewrap_it_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ScopeError, match="--allow-unsandboxed"):
        CodeVerifier()


KILLED = """
import os, sys
from scope_opd.verify.code.verifier import CodeVerifier
from scope_opd.verify.sandbox.process import Sandbox
enter = Sandbox.enter
def telling(self):
    enter(self)
    print(os.stat(f"/proc/{self.first_process}/ns/pid").st_ino, flush=True)
Sandbox.enter = telling
test = {"input": "", "output": ""} if sys.argv[1] == "stdio" else {"args": [], "output": ""}
answer = {"format": sys.argv[1], "fn_name": "f", "tests": [test]}
CodeVerifier().judge("import time\\ntime.sleep(600)", answer, form="answer")
"""


@pytest.mark.parametrize("form", ["stdio", "functional"])
def test_nothing_outlives_a_verifier_that_is_killed(form: str) -> None:
    need_sandbox()
    source = str(Path(__file__).resolve().parents[1] / "src")
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, form], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": source}
    ) as process:
        assert process.stdout is not None
        process.stdout.readline()  # the probe's
        namespace = int(process.stdout.readline())
        time.sleep(0.5)  # the program sleeps by now: nothing inside reads the pipe and sees its end
        assert processes_in(namespace)
        held = os.open(f"/proc/{processes_in(namespace)[0]}/ns/pid", os.O_RDONLY)
        try:
            process.kill()
            process.wait()
            until = time.monotonic() + 5
            while processes_in(namespace) and time.monotonic() < until:
                time.sleep(0.01)
            assert not processes_in(namespace)
        finally:
            os.close(held)


ORDINARY_USER = """
import sys
from scope_opd.errors import ScopeError
from scope_opd.verify.code.verifier import CodeLimits, CodeVerifier
try:
    verifier = CodeVerifier(CodeLimits(timeout_s=20, memory_mb=256))
except ScopeError as error:
    print("refused", error)
    sys.exit()
answer = {"format": "functional", "fn_name": "f", "tests": [{"args": [], "output": 1}]}
look = (
    "import os\\ndef f():\\n    count = 0\\n    try:\\n        while os.fork(): count += 1\\n"
    "        import time\\n        time.sleep(60)\\n    except OSError: pass\\n"
    "    written = [p for p in ('/', '/dev', '/usr/lib') if os.access(p, os.W_OK)]\\n"
    "    return count < 16, sorted(os.listdir('/')), written, dict(os.environ)"
)
print(verifier.judge("def f(): return 1", answer, form="answer").correct)
print(verifier.judge(look, answer, form="answer").reason)
verifier.close()
"""


@pytest.mark.parametrize("way", ["an ordinary user", "root without the right to create namespaces"])
def test_other_users_are_confined_as_well(way: str) -> None:
    """As root only: as anybody else every other test is this one."""
    need_sandbox()
    python = shutil.which("python3", path="/usr/bin:/usr/local/bin")
    if os.geteuid() != 0 or python is None or shutil.which("setpriv") is None:
        assert os.geteuid() != 0 or sys.platform == "linux"
        return
    setpriv = ["setpriv", "--reuid=65533", "--regid=65533", "--clear-groups"]
    if way.startswith("root"):
        setpriv = ["setpriv", "--bounding-set=-sys_admin", "--inh-caps=-sys_admin"]
    source = Path(__file__).resolve().parents[1] / "src" / "scope_opd"
    with tempfile.TemporaryDirectory() as folder:  # where that user may read
        os.chmod(folder, 0o755)
        shutil.copytree(source / "verify", Path(folder) / "scope_opd" / "verify")
        for name in ("__init__", "errors", "gold", "types"):
            shutil.copy(source / f"{name}.py", Path(folder) / "scope_opd")
        ran = subprocess.run(
            [*setpriv, python, "-c", ORDINARY_USER],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": folder, "SECRET": "x"},
            capture_output=True,
            text=True,
            timeout=120,
            check=True,
        )
    lines = ran.stdout.splitlines()
    if lines[0].startswith("refused"):  # user namespaces are forbidden here: then in one line that says so
        assert "namespaces" in lines[0]
        return
    assert lines[0] == "True"
    assert "found \"(True, ['dev', 'etc', 'lib" in lines[1]
    assert "'tmp', 'usr']" in lines[1] or "..." in lines[1]
