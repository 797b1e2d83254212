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
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from scope_opd.errors import ScopeError
from scope_opd.gold import MathGold, Tolerance, parse_math_gold
from scope_opd.types import Verdict
from scope_opd.verify.math.settings import MathSettings
from scope_opd.verify.worker import PEAK_MB, decode_job, encode_job
from scope_opd.verify.workers import WorkerPool

TESTS = Path(__file__).parent
SLACK_S = 1.5
"""Beyond its limit an answer may cost this in wall time: the machine runs other things too."""
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


@pytest.mark.parametrize("bomb", ["spin", "power"])
def test_the_kernel_ends_an_answer_at_its_cpu_limit_and_the_next_does_not_wait_for_a_start(
    pool: Callable[..., WorkerPool], bomb: str
) -> None:
    one = pool(cpu_s=0.5)
    before = facts(ask(one, "a"))
    start = time.monotonic()
    verdict = ask(one, bomb)
    assert verdict == Verdict(None, None, None, "took more than 0.5 s of CPU time")
    assert time.monotonic() - start < 0.5 + SLACK_S
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
    assert time.monotonic() - start < 0.5 + SLACK_S
    stopped = facts(ask(one, "a"))["worker"]
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
        stats = [Path(f"/proc/{pids[name]}/stat").read_text() for name in ("pid", "worker")]
        return [field for stat in stats for field in stat.rsplit(")", 1)[1].split()[11:13]]

    time.sleep(0.2)
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
