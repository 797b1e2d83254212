"""Ranks as processes: ``run(scenario, world)`` forks them from one that has torch loaded, and tells how each ended.

As a program (``rank_program.py FOLDER``) it prints one JSON line: by scenario, how each of three ranks ended (exit
code, last line) and how long that took.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from scope_opd.errors import ModelError, ScopeError
from scope_opd.ranks import Ranks

LIMIT_S = 120.0


def fork_ranks(world: int, folder: Path, body: Callable[[int], int], **environment: str) -> list[int]:
    """Process ids of ``world`` children that run ``body(rank)``; their output goes to ``folder/rank-N.txt``."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid:
            pids.append(pid)
            continue
        code = 70
        try:
            signal.alarm(int(LIMIT_S))
            output = os.open(folder / f"rank-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ.update(
                {"RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(world),
                 "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), **environment}
            )  # fmt: skip
            code = body(rank)
        except ScopeError as error:
            print(f"error: {error}", file=sys.stderr)
            code = error.exit_code
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    return pids


def wait_all(pids: list[int], limit_s: float = LIMIT_S) -> list[int | None]:
    """Exit codes (negative: the signal); None and killed where a process did not end in time."""
    codes: dict[int, int | None] = {}
    deadline = time.monotonic() + limit_s
    while len(codes) < len(pids) and time.monotonic() < deadline:
        for pid in pids:
            if pid not in codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    codes[pid] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for pid in pids:
        if pid not in codes:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            codes[pid] = None
    return [codes[pid] for pid in pids]


def all_reduce(_: Any) -> float:
    return float(Ranks.sum(RANKS[0], torch.ones(4, dtype=torch.float64))[0])


RANKS: list[Ranks] = []


def body(scenario: str, rank: int) -> int:
    with Ranks.from_environment(6.0 if scenario.endswith("hang") else 30.0) as ranks:
        RANKS.append(ranks)
        ranks.register("sum", all_reduce)
        ranks.register("double", lambda share: 2 * share)

        def stuck(share: Any) -> None:
            """Everybody but rank ``world - 1`` waits for it in a collective; it comes to a bad end instead."""
            if ranks.rank != share[0]:
                all_reduce(None)
            print("bad end", flush=True)
            time.sleep(0.3)
            if share[1] == "hang":
                time.sleep(LIMIT_S)
            if share[1] == "raise":
                raise ModelError("weights of nothing", "some", "mend them")
            if share[1] == "bug":
                raise RuntimeError("an invariant")
            if share[1] == "kill":
                os.kill(os.getpid(), signal.SIGKILL)

        def slow(share: int) -> str:
            for piece in range(share):
                ranks.tell((ranks.rank, piece))
            while ranks.rank == 1 and share == 0 and not ranks.cancelled:
                time.sleep(0.01)
            return "done"

        ranks.register("stuck", stuck)
        ranks.register("slow", slow)
        told = ranks.meet({"from": rank})
        assert told == {"from": 0}
        if not ranks.leads:
            ranks.follow()
            return 0
        lead(scenario, ranks)
    return 0


def lead(scenario: str, ranks: Ranks) -> None:
    world = ranks.world
    assert ranks.everywhere("double", list(range(world))) == [2 * r for r in range(world)]
    assert ranks.everywhere("sum", [None] * world) == [float(world)] * world
    if scenario == "work":
        with ranks.begin("slow", [2] * (world - 1)) as work:
            parts, done = [], False
            while not done:
                found, done = work.take()
                parts += found
        assert sorted(parts) == [(r, p) for r in range(1, world) for p in range(2)]
        with ranks.begin("slow", [0] * (world - 1)):
            pass
        assert ranks.everywhere("sum", [None] * world) == [float(world)] * world
        return
    who, what = scenario.split("-")
    if what in ("raise", "kill", "bug", "hang"):
        victim = world - 1 if who == "follower" else 0
        ranks.everywhere("stuck", [(victim, what)] * world)
    elif what == "idle":  # a follower dies while rank 0 waits for something else
        ranks.register("none", lambda _: None)
        print("idle", flush=True)
        time.sleep(LIMIT_S)


def main(scenario: str, world: int, folder: Path) -> dict[str, Any]:
    for rank in range(world):
        (folder / f"rank-{rank}.txt").unlink(missing_ok=True)
    pids = fork_ranks(world, folder, lambda rank: body(scenario, rank))
    began = time.monotonic()
    if scenario.endswith("-idle"):
        said = folder / "rank-0.txt"
        while not said.exists() or "idle" not in said.read_text():
            time.sleep(0.02)
        began = time.monotonic()
        os.kill(pids[0 if scenario.startswith("leader") else world - 1], signal.SIGKILL)
    codes = wait_all(pids)
    lines = [(folder / f"rank-{rank}.txt").read_text().strip().splitlines()[-1:] for rank in range(world)]
    return {"codes": codes, "lines": [line[0] if line else "" for line in lines], "seconds": time.monotonic() - began}


ENDS = ("raise", "bug", "kill", "idle")
SCENARIOS = ["work", *(f"{who}-{what}" for who in ("leader", "follower") for what in ENDS), "follower-hang"]

if __name__ == "__main__":
    print(json.dumps({scenario: main(scenario, 3, Path(sys.argv[1])) for scenario in SCENARIOS}))
