"""Judging processes: real ones, really killed, and real bombs. Each costs its own answer, and at most its limit.

Not covered: whether verdicts are right (test_math_*), Windows.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from scope_opd.errors import DataError, ScopeError
from scope_opd.gold import MathGold, Tolerance, parse_math_gold
from scope_opd.types import Prompt, Rollout, Verdict
from scope_opd.verify.answers import AnswerVerifier
from scope_opd.verify.math.settings import MathSettings
from scope_opd.verify.math_verifier import MathVerifier
from scope_opd.verify.worker import PEAK_MB, decode_job, encode_job
from scope_opd.verify.workers import WorkerPool

TESTS = Path(__file__).parent
SLACK_S = 0.5
"""CPU seconds that an answer may cost beyond its limit: forking its successor, reading what came with it."""
BUSY_S = 15.0
"""Wall seconds that the machine may take for what needs none, since it runs other things too."""
A = parse_math_gold("a")
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture
def pool(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., WorkerPool]]:
    """Makes pools with the obedient judge."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")]))
    made: list[WorkerPool] = []

    def make(**options: Any) -> WorkerPool:
        made.append(WorkerPool(**{"judge": "judges:obedient", "workers": 1, "cpu_s": 5.0, **options}))
        return made[-1]

    yield make
    for each in made:
        each.close()


def ask(pool: WorkerPool, prediction: str) -> Verdict:
    return pool.submit(prediction, A, None, MathSettings()).result(60)


def facts(verdict: Verdict) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(verdict.reason)
    return found


def alive(pid: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def gone(*pids: int, within_s: float = 10.0) -> bool:
    end = time.monotonic() + within_s
    while any(alive(pid) for pid in pids):
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return True


def cpu_s(pool: WorkerPool) -> float:
    """CPU seconds that a pool's processes have used so far, those that ended included."""
    ticks = 0
    for worker in pool.pids():
        children = Path(f"/proc/{worker}/task/{worker}/children").read_text().split()
        ticks += sum(map(int, fields(worker)[11:15])) + sum(
            sum(map(int, fields(int(child))[11:13])) for child in children
        )
    return ticks / os.sysconf("SC_CLK_TCK")


def fields(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def settle(pool: WorkerPool) -> None:
    """Wait until no worker has anything to say."""
    while len(pool._state.free) < len(pool._state.threads):
        time.sleep(0.01)


def test_each_job_gets_its_own_verdict(pool: Callable[..., WorkerPool]) -> None:
    several = pool(workers=2)
    words = [random.Random(index).choice("ab") + " " * (index % 3) for index in range(300)]
    futures = [several.submit(word, A, None, MathSettings()) for word in words]
    assert [(f.result().extracted, f.result().correct) for f in futures] == [(word, word == "a") for word in words]


def test_jobs_come_from_any_thread_and_any_event_loop(pool: Callable[..., WorkerPool]) -> None:
    one = pool(workers=2)

    async def some(word: str) -> list[bool | None]:
        futures = [one.submit(word, A, None, MathSettings()) for _ in range(10)]
        return [verdict.correct for verdict in await asyncio.gather(*map(asyncio.wrap_future, futures))]

    assert asyncio.run(some("a")) == [True] * 10
    assert asyncio.run(some("b")) == [False] * 10
    with ThreadPoolExecutor(4) as threads:
        assert list(threads.map(lambda word: ask(one, word).correct, "abab" * 5)) == [True, False] * 10


@linux
@pytest.mark.parametrize("bomb", ["spin", "power"])
def test_the_kernel_ends_an_answer_at_its_cpu_limit_and_the_next_does_not_wait_for_a_start(
    pool: Callable[..., WorkerPool], bomb: str
) -> None:
    one = pool(cpu_s=0.5)
    before = facts(ask(one, "a"))
    start = cpu_s(one)
    verdict = ask(one, bomb)
    assert verdict == Verdict(None, None, None, "took more than 0.5 s of CPU time")
    settle(one)
    assert 0.4 < cpu_s(one) - start < 0.5 + SLACK_S
    after = facts(ask(one, "a"))
    assert after["worker"] == before["worker"]
    assert after["pid"] != before["pid"]


@pytest.mark.parametrize(
    ("order", "reason"),
    [
        (f"signal {int(signal.SIGKILL)}", "its verifier process was ended by SIGKILL"),
        (f"signal {int(signal.SIGSEGV)}", "its verifier process was ended by SIGSEGV"),
        ("exit 7", "its verifier process ended with exit status 7"),
        ("exit 0", "its verifier process ended with exit status 0"),
        ("orphan", "its verifier process was ended by SIGKILL"),
        ("raise", "judging failed: ValueError: two lines"),
        ("memory", f"took more than {PEAK_MB} MB of memory"),
    ],
)
def test_an_answer_that_ends_its_process_has_no_verdict_and_says_why(
    pool: Callable[..., WorkerPool], order: str, reason: str
) -> None:
    one = pool()
    assert ask(one, order) == Verdict(None, None, None, reason)
    assert ask(one, "a").correct is True


def test_a_killed_answer_costs_nobody_else_a_verdict(pool: Callable[..., WorkerPool]) -> None:
    one = pool(workers=2, cpu_s=0.3)
    orders = ["a", "signal 9", "b", "spin", "a", "memory", "exit 3", "orphan", "raise", "flood", "b"] * 2
    futures = [one.submit(order, A, None, MathSettings()) for order in orders]
    expected = {"a": True, "b": False, "flood": False}
    assert [future.result(60).correct for future in futures] == [expected.get(order) for order in orders]


def test_a_worker_that_hangs_without_using_cpu_meets_the_wall_clock(pool: Callable[..., WorkerPool]) -> None:
    one = pool(wall_s=0.5)
    ask(one, "a")
    start = time.monotonic()
    assert ask(one, "sleep") == Verdict(None, None, None, "took more than 0.5 s")
    assert time.monotonic() - start < 0.5 + BUSY_S
    stopped = facts(ask(one, "a"))["worker"]
    settle(one)
    os.killpg(stopped, signal.SIGSTOP)
    assert ask(one, "a" * 2**20).correct is None  # more than a pipe holds
    assert ask(one, "a").correct is True
    assert gone(stopped)


@linux
def test_a_worker_killed_while_idle_costs_no_verdict(pool: Callable[..., WorkerPool]) -> None:
    one = pool()
    for victim in ("pid", "worker"):
        pids = facts(ask(one, "a"))
        os.kill(pids[victim], signal.SIGKILL)
        assert gone(pids[victim])
        time.sleep(0.2)
        assert ask(one, "a").correct is True


def test_a_flood_on_stdout_and_stderr_stays_out_of_the_verdicts(pool: Callable[..., WorkerPool]) -> None:
    one = pool()
    assert [ask(one, word).correct for word in ("flood", "a", "flood", "b")] == [False, True, False, False]


def test_a_long_answer_with_any_characters_crosses_the_pipe(pool: Callable[..., WorkerPool]) -> None:
    one = pool()
    text = "".join(map(chr, [*range(0x250), 0x2028, 0xDFFF, 0xD800, 0x1F600])) * 2000
    assert ask(one, text).extracted == text


def test_workers_see_no_secrets_and_load_no_torch(
    pool: Callable[..., WorkerPool], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    found = facts(ask(pool(), "a"))
    assert "secret" not in found["environment"].values()
    assert found["environment"]["PYTHONHASHSEED"] == "0"
    assert found["environment"]["OMP_NUM_THREADS"] == "1"
    assert found["torch"] is False


@pytest.mark.parametrize(
    ("judge", "reason"),
    [
        ("no_such_module:judge", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("judges:unable", "RuntimeError: the judge does not work here"),
        ("judges:deadly", "exit status 9"),
    ],
)
def test_workers_that_cannot_start_are_one_line_for_all_that_wait(
    pool: Callable[..., WorkerPool], judge: str, reason: str
) -> None:
    broken = pool(judge=judge, workers=2)
    for _ in range(2):
        futures = [broken.submit("a", A, None, MathSettings()) for _ in range(20)]
        for future in futures:
            with pytest.raises(ScopeError, match=reason) as error:
                future.result(60)
            assert "\n" not in str(error.value)


@linux
def test_idle_workers_cost_nothing(pool: Callable[..., WorkerPool]) -> None:
    one = pool(workers=2)
    pids = facts(ask(one, "a"))

    def cpu() -> list[str]:
        return [field for name in ("pid", "worker") for field in fields(pids[name])[11:13]]

    settle(one)
    before, own = cpu(), time.process_time()
    time.sleep(0.5)
    assert cpu() == before
    assert time.process_time() - own < 0.1


@linux
def test_closing_ends_all_processes_and_may_be_done_twice(pool: Callable[..., WorkerPool]) -> None:
    one = pool(cpu_s=60)
    pids = facts(ask(one, "a"))
    running = one.submit("power", A, None, MathSettings())
    time.sleep(0.2)
    waiting = one.submit("a", A, None, MathSettings())
    one.close()
    one.close()
    assert one.pids() == []
    assert gone(pids["pid"], pids["worker"], within_s=0.5)
    with pytest.raises(RuntimeError, match="closed"):
        running.result(1)
    with pytest.raises((CancelledError, RuntimeError)):
        waiting.result(1)
    with pytest.raises(RuntimeError, match="closed"):
        ask(one, "a")


@linux
def test_a_pool_that_nobody_holds_ends_its_workers(pool: Callable[..., WorkerPool]) -> None:
    lone = WorkerPool(judge="judges:obedient", workers=1)
    pids = facts(ask(lone, "a"))
    del lone
    gc.collect()
    assert gone(pids["pid"], pids["worker"])


SCRIPT = """
import os, signal, sys, time
from scope_opd.gold import parse_math_gold
from scope_opd.verify.math.settings import MathSettings
from scope_opd.verify.workers import WorkerPool

pool = WorkerPool(judge="judges:obedient", workers=2, cpu_s=60)
ask = lambda text: pool.submit(text, parse_math_gold("a"), None, MathSettings())
print(ask("a").result().reason, flush=True)
busy = ask("power")
time.sleep(0.3)
print(*pool.pids(), flush=True)
"""


def run_script(end: str) -> tuple[list[int], int]:
    """Pids that a script with a busy pool started, and its exit code."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), *filter(None, sys.path)])}
    command = [sys.executable, "-c", SCRIPT + end]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    first, second = done.stdout.splitlines()
    found = json.loads(first)
    return [found["pid"], found["worker"], *map(int, second.split())], done.returncode


@linux
@pytest.mark.parametrize(
    ("end", "code"),
    [
        ("", 0),
        ("raise SystemExit(3)", 3),
        ("os.kill(os.getpid(), signal.SIGKILL)", -9),
        ("os._exit(4)", 4),
    ],
)
def test_no_worker_outlives_its_parent_however_that_ends(end: str, code: int) -> None:
    pids, returncode = run_script(end)
    assert returncode == code
    assert gone(*pids, within_s=2)


@linux
def test_a_fork_has_workers_of_its_own_and_leaves_the_parents_alone() -> None:
    end = """
child = os.fork()
if child == 0:
    assert ask("a").result().correct
    sys.exit(5)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 5
assert ask("a").result().correct
"""
    pids, returncode = run_script(end)
    assert returncode == 0
    assert gone(*pids)


def test_a_job_survives_the_pipe_unchanged() -> None:
    gold = MathGold((("1", "2"), ("x",)), Tolerance(relative=0.01))
    for settings in (MathSettings(), MathSettings("answer", "all", False, Tolerance(absolute=0.5))):
        job = json.loads(json.dumps(encode_job("p", gold, None, settings)))
        assert decode_job(job) == ("p", gold, None, settings)
    assert asdict(decode_job(job)[1]) == asdict(gold)


# The real judge.


@pytest.fixture(scope="module")
def maths() -> Iterator[MathVerifier]:
    verifier = MathVerifier(timeout_s=1.0, workers=2)
    for future in [verifier.submit(r"\boxed{x+1}", "1+x") for _ in range(40)]:
        future.result(60)  # both workers are started
    yield verifier
    verifier.close()


NESTED = r"\frac{1}{" * 600 + "2" + "}" * 600
BOMBS = {
    "power tower": "9^{9^{9^9}}",
    "tower of twos": "2^{2^{2^{2^{2^2}}}}",
    "factorial": "(10^8)!",
    "factorial of a factorial": "((10!)!)!",
    "binomial": r"\binom{10^9}{5\cdot 10^8}",
    "nested fractions": NESTED,
    "nested roots": NESTED.replace(r"\frac{1}", r"\sqrt"),
    "brackets": "(" * 3000 + "1" + ")" * 3000,
    "open braces": "{" * 50_000,
    "sum": r"\sum_{n=1}^{10^{12}} \frac{1}{n^2}",
    "product": r"\prod_{k=1}^{10^9} k",
    "expansion": "(x+y+z)^{5000} - (z+y+x)^{5000}",
    "integral": r"\int_0^1 x^{x^{x^x}} dx",
    "digits": "7" * 100_000,
    "terms": "x^{2}+" * 2000 + "1",
}


@linux
@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_bomb_costs_at_most_its_limit_and_never_wins(maths: MathVerifier, bomb: str) -> None:
    gold = r"42+\pi"
    for prediction, answer in ((rf"\boxed{{{bomb}}}", gold), (rf"\boxed{{{gold}}}", bomb)):
        start = cpu_s(maths.pool)
        verdict = maths.judge(prediction, answer)
        settle(maths.pool)
        assert cpu_s(maths.pool) - start < 1.0 + SLACK_S
        assert verdict.correct is not True
        assert verdict.reason
    assert maths.judge(r"\boxed{\pi+42}", gold).correct is True


def test_bombs_all_at_once_leave_the_other_verdicts_as_they_were(maths: MathVerifier) -> None:
    honest = [(rf"\boxed{{{n}x + \sqrt{{{n}}}}}", rf"\sqrt{{{n}}}+{n}x", True) for n in range(2, 22)]
    honest += [(rf"\boxed{{{n}x - \sqrt{{2}}}}", rf"\sqrt{{2}}+{n}x", False) for n in range(2, 22)]
    work = [(prediction, gold) for prediction, gold, _ in honest]
    work += [(rf"\boxed{{{bomb}}}", r"42+\pi") for bomb in list(BOMBS.values())[:5]]
    random.Random(0).shuffle(work)
    found = dict(zip(work, [future.result(120) for future in [maths.submit(*pair) for pair in work]], strict=True))
    assert [found[prediction, gold].correct for prediction, gold, _ in honest] == [correct for *_, correct in honest]


def test_verdicts_do_not_depend_on_order_or_on_the_number_of_workers() -> None:
    pieces = ["1/2", "0.5", r"\frac{1}{2}", "x+1", "1+x", r"(-\infty, 2]", "x \\le 2", r"\{1,2\}", "2, 1", "(1,2)",
              r"50\%", "7 cm", r"\sqrt{8}", r"2\sqrt{2}", "", r"\text{even}", "1,000", "x=3", "3", r"\pi"]  # fmt: skip
    draw = random.Random(1)
    golds = [piece for piece in pieces if piece]
    pairs = [(rf"so \boxed{{{draw.choice(pieces)}}}", draw.choice(golds)) for _ in range(120)]
    expected: dict[tuple[str, str], Verdict] = {}
    for workers in (1, 2, 3):
        verifier = MathVerifier(workers=workers, timeout_s=30)
        try:
            draw.shuffle(pairs)
            for pair, future in [(pair, verifier.submit(*pair)) for pair in pairs]:
                assert expected.setdefault(pair, future.result(120)) == future.result()
        finally:
            verifier.close()
    assert {verdict.correct for verdict in expected.values()} == {True, False}


def test_the_two_ways_agree(maths: MathVerifier, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["7", "7.0", r"\boxed{7}", r"\boxed{}", "no answer", r"\boxed{x}", "<think> 7", r"\boxed{8}", "seven"]
    fast = [maths.submit(text, "7") for text in texts]
    assert [text for text, future in zip(texts, fast, strict=True) if future.done()][:4] == texts[:4]
    monkeypatch.setattr("scope_opd.verify.math_verifier.judge_fast", lambda *_: None)
    slow = [maths.submit(text, "7") for text in texts]
    assert [future.result(60) for future in fast] == [future.result(60) for future in slow]


def rollout(text: str) -> Rollout:
    return Rollout(id="p/0/0", group="p", prompt_token_ids=[1], token_ids=[1], logprobs=[-1.0], text=text)


def prompt(answer: Any) -> Prompt:
    return Prompt(id="p", problem="What?", answer=answer, token_ids=(1,))


def test_a_rollout_is_judged_by_the_answer_of_its_prompt_in_successive_loops(maths: MathVerifier) -> None:
    for _ in range(2):
        assert asyncio.run(maths.verify(rollout(r"\boxed{x+1}"), prompt("1+x"))).correct is True
        assert asyncio.run(maths.verify(rollout(r"\boxed{2}"), prompt({"any_of": ["3", 2]}))).correct is True
        assert asyncio.run(maths.verify(rollout(r"\boxed{2}"), prompt({"all_of": ["3", "2"]}))).correct is False


def test_a_thinking_block_that_the_prompt_opened_must_be_closed_before_an_answer_counts(maths: MathVerifier) -> None:
    opened = replace(prompt("2"), text="<|user|>What?<|assistant|><think>\n")
    assert asyncio.run(maths.verify(rollout(r"perhaps \boxed{2}"), opened)).correct is False
    assert asyncio.run(maths.verify(rollout(r"perhaps 3</think> \boxed{2}"), opened)).correct is True


@pytest.mark.parametrize("answer", ["", None, True, float("nan"), {}, {"any_of": []}, ["1"]])
def test_a_gold_answer_that_is_none_names_its_prompt(maths: MathVerifier, answer: Any) -> None:
    with pytest.raises(DataError, match="prompt 'p'"):
        asyncio.run(maths.verify(rollout("1"), prompt(answer)))


CODE = {"format": "stdio", "tests": [{"input": "1\n", "output": "2\n"}]}


def test_answers_go_where_their_form_says() -> None:
    class Code:
        closed = 0

        async def verify(self, rollout: Rollout, prompt: Prompt) -> Verdict:
            return Verdict(True, 1.0, None, "ran")

        def close(self) -> None:
            self.closed += 1

    built: list[Code] = []

    def build() -> Any:
        built.append(Code())
        return built[-1]

    both = AnswerVerifier(MathVerifier(workers=1), build)
    assert asyncio.run(both.verify(rollout(r"\boxed{2}"), prompt("2"))).correct is True
    assert built == []
    both.prepare([prompt("1"), prompt(CODE)])
    assert len(built) == 1
    assert asyncio.run(both.verify(rollout("print(2)"), prompt(CODE))).reason == "ran"
    both.close()
    both.close()
    assert len(built) == 1
    with pytest.raises(DataError, match="'p': the answer is code"):
        AnswerVerifier(MathVerifier(workers=1), None).prepare([prompt(CODE)])
    with pytest.raises(DataError, match="'p': the answer is not code"):
        asyncio.run(AnswerVerifier(None, build).verify(rollout("2"), prompt("2")))


TRAINER = """
import os, runpy, signal, sys, threading, time
from scope_opd.verify import math_verifier, workers
math_verifier.judge_fast = lambda *_: None  # everything goes to the workers
start = workers._Worker.__init__

def tell(self, state):
    start(self, state)
    os.write(2, f"WORKER {self.process.pid}\\n".encode())
    if sys.argv[-1] == "kill":
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGKILL)).start()

workers._Worker.__init__ = tell
kill = sys.argv[1:] == ["kill"]
sys.argv = ["scope", "train", "run.toml"]
if kill:
    sys.argv.append("kill")
    from scope_opd.cli.train_command import train
    train("run.toml")
else:
    runpy.run_module("scope_opd", run_name="__main__")
"""


@linux
@pytest.mark.parametrize(("end", "code"), [([], 0), (["kill"], -9)])
def test_no_worker_outlives_a_training_run(tmp_path: Path, end: list[str], code: int) -> None:
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"id": f"r{n}", "problem": f"{n}+{n}", "answer": str(2 * n)}) + "\n" for n in range(8))
    )
    (tmp_path / "run.toml").write_text("""
[data]
train = "rows.jsonl"
[chat]
template = "none"
[rollout]
n = 2
max_tokens = 8
[train]
steps = 2
prompts_per_step = 4
threads = 1
[run]
dir = "run"
export = false
""")
    done = subprocess.run(
        [sys.executable, "-c", TRAINER, *end],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    pids = [int(line.split()[1]) for line in done.stderr.splitlines() if line.startswith("WORKER ")]
    assert pids
    assert gone(*pids, within_s=2)
