r"""One judging process: ``python -m scope_opd.verify.worker``. It reads jobs and writes verdicts as JSON lines.

It is two processes. The first loads the judge, warms it up, and from then on only waits; the second, forked from it,
judges. When an answer ends the second, the first forks another, already warm, within milliseconds. The limits bind the
second and are the kernel's, so that not even a loop inside C code escapes them:

    CPU time      ITIMER_PROF, set anew for each answer; its signal, left at its default, ends the process.
    memory        RLIMIT_AS = ``ADDRESS_SPACE_MB``. Libraries may swallow the MemoryError that follows, so an answer
                  whose process ever held more than ``PEAK_MB`` has no verdict either, whatever the judge said.

Every answer begins with an empty sympy cache and fresh random seeds: its verdict does not depend on those before it.
Both processes end with the one that started them (end of input; on Linux also the kernel's parent-death signal).

    in      {"batch": 7, "jobs": [{"prediction", "gold", "problem", "settings"}, ...]}
    out     {"ready": true} or {"failed": why}      once, at the start
            {"job": 0, "verdict": [correct, reward, extracted, reason]}      one a job, in order
            {"done": 7}                             the batch is over; jobs without a verdict are to be sent again
            {"ended": wait status}                  the judging process died; another is there

Not covered: wall time (the pool's), a judge that is itself hostile (untrusted code runs in the sandbox instead), one
allocation of more than ``ADDRESS_SPACE_MB`` at once whose failure the judge takes for "not equal".
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import json
import os
import random
import resource
import signal
import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from scope_opd.gold import MathGold, Tolerance
from scope_opd.types import Verdict
from scope_opd.verify.math.settings import MathSettings

Judge = Callable[[str, MathGold, str | None, MathSettings], Verdict]

DEFAULT_JUDGE = "scope_opd.verify.math.judge:judge"
ADDRESS_SPACE_MB = 1024
"""A judging process starts with about 70 MB; no honest answer comes near this."""
PEAK_MB = ADDRESS_SPACE_MB // 4
"""What grows by doubling has passed a quarter of the limit before it meets it."""
RETIRE_MB = 160
"""A process that has grown to this (parser caches) is replaced after its answer, which keeps its verdict."""
RETIRED = 113
"""Exit status of a judging process that asks for a successor; no library exits with it."""
PR_SET_PDEATHSIG = 1
WARM_UP = (
    (r"Then $x = 3$, so \boxed{\frac{1}{2}}", r"0.5"),
    (r"\boxed{\dfrac{3\sqrt{13}}{2} + \pi i}", r"\frac{3 \sqrt{13}}{2}+i\pi"),
    (r"\boxed{\left(3, \frac{\pi}{2}\right)}", r"(3,\pi/2)"),
    (r"\boxed{x \in (-\infty, 2] \cup [5, \infty)}", r"(-\infty,2]\cup[5,\infty)"),
    (r"\boxed{\{1, -2, 3\}}", r"\{3,1,-2\}"),
    (r"\boxed{x^2 + 2xy - \log_2 8}", r"2xy+x^{2}-3"),
    (r"\boxed{\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}}", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
    (r"\boxed{90^\circ}", "90"),
    (r"\boxed{y = 2x + \sin(30)}", r"y=2 x+\sin 30"),
    (r"\boxed{1.5 \times 10^{8}}", "1.5e8"),
    (r"the answer is 12,000 \text{ dollars}", "12000"),
    (r"\boxed{\text{Evelyn}}", r"\text{Evelyn}"),
)
"""Judged once at the start, so that what libraries load and learn at first use is not counted to an answer."""


def encode_job(prediction: str, gold: MathGold, problem: str | None, settings: MathSettings) -> dict[str, Any]:
    """A job as plain JSON values."""
    return {"prediction": prediction, "gold": asdict(gold), "problem": problem, "settings": asdict(settings)}


def decode_job(job: dict[str, Any]) -> tuple[str, MathGold, str | None, MathSettings]:
    """The arguments of a judge, from what ``encode_job`` made."""
    gold, settings = job["gold"], dict(job["settings"])
    alternatives = tuple(tuple(parts) for parts in gold["alternatives"])
    settings["tolerance"] = _tolerance(settings["tolerance"])
    return (
        job["prediction"],
        MathGold(alternatives, _tolerance(gold["tolerance"])),
        job["problem"],
        MathSettings(**settings),
    )


def _tolerance(values: dict[str, float] | None) -> Tolerance | None:
    return None if values is None else Tolerance(**values)


def no_verdict(reason: str) -> Verdict:
    """A verdict that was not reached."""
    return Verdict(correct=None, reward=None, reason=reason)


def main() -> int:
    parser = argparse.ArgumentParser(description="Judges answers that arrive on standard input. Started by the pool.")
    parser.add_argument("--judge", default=DEFAULT_JUDGE, help="MODULE:FUNCTION")
    parser.add_argument("--cpu-s", type=float, default=5.0)
    parser.add_argument("--parent", type=int, default=0, help="end when this process does")
    options = parser.parse_args()
    end_with_parent(options.parent)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    jobs, replies = os.dup(0), os.dup(1)  # what a library prints or reads must not get between the lines
    with open(os.devnull, "r+b") as nothing:
        os.dup2(nothing.fileno(), 0)
        os.dup2(2, 1)
    try:
        judge = load(options.judge)
        for prediction, gold in WARM_UP:
            judge(prediction, MathGold(((gold,),)), None, MathSettings())
    except Exception as error:
        send(replies, {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"})
        return 1
    send(replies, {"ready": True})
    gc.collect()
    gc.freeze()  # the children share these pages
    first = os.getpid()
    while True:
        child = os.fork()
        if child == 0:
            end_with_parent(first)
            status = 1
            try:
                status = serve(judge, jobs, replies, options.cpu_s)
            finally:
                os._exit(status)
        _, status = os.waitpid(child, 0)
        if status == 0:
            return 0
        if os.waitstatus_to_exitcode(status) != RETIRED:
            send(replies, {"ended": status}, apart=True)


def load(name: str) -> Judge:
    """The function that ``MODULE:FUNCTION`` names."""
    module, _, function = name.partition(":")
    judge: Judge = getattr(importlib.import_module(module), function)
    return judge


def serve(judge: Judge, jobs: int, replies: int, cpu_s: float) -> int:
    """Judge until the input ends (0) or this process has grown too large (``RETIRED``)."""
    space = ADDRESS_SPACE_MB * 2**20
    with contextlib.suppress(ValueError, OSError):  # a lower limit is in force already, or the system knows none
        resource.setrlimit(resource.RLIMIT_AS, (space, space))
    with os.fdopen(jobs, "rb", closefd=False) as lines:
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError:
                continue  # the tail of a line whose head went down with the process before
            for number, job in enumerate(message["jobs"]):
                verdict = judge_one(judge, job, cpu_s)
                peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
                    2**20 if sys.platform == "darwin" else 2**10
                )
                if peak_mb > PEAK_MB:
                    verdict = no_verdict(f"took more than {PEAK_MB} MB of memory")
                values = [verdict.correct, verdict.reward, verdict.extracted, verdict.reason]
                send(replies, {"job": number, "verdict": values})
                if peak_mb > RETIRE_MB:
                    send(replies, {"done": message["batch"]})
                    return RETIRED
            send(replies, {"done": message["batch"]})
    return 0


def judge_one(judge: Judge, job: dict[str, Any], cpu_s: float) -> Verdict:
    """One answer under its CPU limit; what a judge raises is no verdict."""
    forget()
    signal.setitimer(signal.ITIMER_PROF, cpu_s)
    try:
        return judge(*decode_job(job))
    except MemoryError:
        return no_verdict(f"took more than {PEAK_MB} MB of memory")
    except Exception as error:
        return no_verdict(f"judging failed: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def forget() -> None:
    """Put back what one answer could leave to the next: random states and sympy's cache."""
    random.seed(0)
    if "sympy" in sys.modules:
        from sympy.core.cache import clear_cache
        from sympy.core.random import seed

        seed(0)
        clear_cache()


def send(pipe: int, message: dict[str, Any], apart: bool = False) -> None:
    """Write one line; ``apart`` from what a process that died may have left unfinished."""
    data = (b"\n" if apart else b"") + json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(pipe, data) :]


def end_with_parent(parent: int) -> None:
    """Ask the kernel to end this process with its parent; end at once if that has happened already."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if parent and os.getppid() != parent:
        os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
