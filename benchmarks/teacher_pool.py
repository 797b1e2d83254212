"""Many scorings by the teacher pool while its servers fail at random: wrong numbers, memory, what is left at the end.

    python benchmarks/teacher_pool.py [--scorings 10000] [--share 0.3] [--servers 2] [--seed 0]

Real HTTP servers of our own answer as vLLM does, from a table that a real tiny model filled, and inject each fault of
``tests/fault_server.py`` (resets, truncated and slow answers, NaN, inf, -9999, another request's answer, 429, 5xx ...)
into a share of all requests, fingerprints included. Every score is compared with the model's own. Prints one JSON
line; ``wrong`` must be 0. ``memory_mb`` is the resident memory after 20, 60 and 100 % of the scorings.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import os
import sys
import threading
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

from fault_server import FAULTS, HARMLESS, FaultServer, Table, at_random, made_rollouts
from scope_opd.types import TeacherScore
from teacher_kit import teacher_of
from tiny import tiny_model

DISTINCT = 500
STEP = 500
"""Scorings a step: each has an event loop of its own, as in training."""


def memory_mb() -> float:
    gc.collect()
    fields = Path("/proc/self/statm").read_text().split()
    return round(int(fields[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20, 1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scorings", type=int, default=10_000)
    parser.add_argument("--share", type=float, default=0.3)
    parser.add_argument("--servers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    table = Table(tiny_model("qwen3", seed=3))
    rollouts = made_rollouts(DISTINCT, seed=options.seed)
    expected = [table.response(rollout) for rollout in rollouts]
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    wrong = unscored = requests = 0
    memory, marks = [], [0.2, 0.6, 1.0]
    injected: Counter[str] = Counter()
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                FaultServer(table, at_random(options.share, (*FAULTS, *HARMLESS), options.seed + index))
            )
            for index in range(options.servers)
        ]
        teacher = stack.enter_context(
            teacher_of(*(server.url for server in servers), client={"read_timeout_s": 1.0}, pool={"deadline_s": 60.0},
                       max_unscored=1.0)
        )  # fmt: skip
        began, done = time.perf_counter(), 0

        async def step(number: int, count: int) -> list[TeacherScore]:
            await teacher.begin_step([], number)
            scores = await teacher.score([rollouts[(done + index) % DISTINCT] for index in range(count)])
            await teacher.end_step(number)
            return scores

        while done < options.scorings:
            scores = asyncio.run(step(done // STEP, min(STEP, options.scorings - done)))
            for index, score in enumerate(scores):
                right = expected[(done + index) % DISTINCT]
                requests += score.tries
                if score.logprobs is None:
                    unscored += 1
                elif len(score.logprobs) != len(right) or max(
                    abs(a - b) for a, b in zip(score.logprobs, right, strict=True)
                ) > 1e-6:  # fmt: skip
                    wrong += 1
            done += len(scores)
            if done >= marks[0] * options.scorings:
                memory.append(memory_mb())
                marks.pop(0)
        seconds = time.perf_counter() - began
        time.sleep(0.1)
        tasks = teacher.servers.thread.tasks()
        for server in servers:
            injected += server.injected
    print(
        json.dumps({
            "scorings": done, "wrong": wrong, "unscored": unscored, "requests": requests,
            "faults_injected": injected.total(), "kinds": len(injected), "share": options.share,
            "memory_mb": memory, "tasks_left": tasks, "threads_left": threading.active_count() - threads,
            "files_left": len(os.listdir("/proc/self/fd")) - files, "seconds": round(seconds, 1),
            "ratio": round(requests / done, 3),
        })
    )  # fmt: skip
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
