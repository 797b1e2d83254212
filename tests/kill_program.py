"""Runs that are killed with SIGKILL again and again, at chosen moments, and then finished: real commands, real kills.

``kill_program.py FOLDER WORLD KILLS`` runs ``scope train`` on WORLD ranks in processes forked from this one (which has
torch loaded, so that a start takes a second): once undisturbed, and once killed KILLS times, each resumption too. It
prints a line a kill, and a JSON object in the end; test_kill.py says what must hold. Several ranks are interrupted once
besides, by SIGTERM.

A moment is a rank, a place, the first step or count from which it counts, and a delay into it. Places of rank 0 are the
phases of status.json, "writing" (a checkpoint goes to disk while training goes on) and "committing" (it is about to be
renamed). Of other ranks they are the jobs that rank 0 gives them, counted, and "writing".
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rank_program
from rank_program import fork_ranks, wait_all

STEPS = 24 if "SCOPE_KILLS" in os.environ else 12
PHASES = ("generation", "scoring", "forward_backward", "optimiser", "saving")
PLACES = (*PHASES, "writing", "committing")
JOBS = ("sample", "learner/update", "writing", "save/copy")
LIMIT_S = 240.0

CONFIG = """
[objective]
method = "scope"
[rollout]
n = 4
max_tokens = 64
[teacher]
dtype = "float32"
[train]
steps = {steps}
prompts_per_step = 4
lr = 3e-4
warmup_steps = 2
threads = 1
[eval]
every = 5
problems = 4
n = 2
[run]
checkpoint_every = 2
keep_best = true
rollouts_logged = 4
export = false
"""


@dataclass(frozen=True, slots=True)
class Moment:
    rank: int
    place: str
    start: int
    delay_s: float
    signal: int = signal.SIGKILL


def plan(kills: int, world: int) -> list[Moment]:
    """Steps spread over the run; every place in turn; delays from none to a few milliseconds.

    The optimiser's phase, and what is done to a small checkpoint, is over in less than a millisecond here, so these are
    killed as they begin. With several ranks every other kill is one of rank 1.
    """
    draw = random.Random(world)
    moments = []
    for number in range(kills):
        start = 1 + number * (STEPS - 3) // kills
        if world > 1 and number % 2:
            moments.append(Moment(1, JOBS[number // 2 % len(JOBS)], 1, draw.choice([0.0, 0.002])))
            continue
        place = PLACES[(number // 2 if world > 1 else number) % len(PLACES)]
        brief = place in ("optimiser", "writing", "committing")
        moments.append(Moment(0, place, start, 0.0 if brief else draw.choice([0.0, 0.001, 0.003, 0.008])))
    return moments


def arm(moment: Moment, folder: Path) -> None:
    """Have this process killed at a moment, and leave in kill.json what was going on then."""
    from scope_opd.ranks import Ranks
    from scope_opd.train import checkpoint
    from scope_opd.train.runfolder import RunFolder
    from scope_opd.train.shards import Shards

    def kill() -> None:
        status = json.loads((folder / "status.json").read_text())
        written = [path.name for path in (folder / "checkpoints").glob(".writing-*")]
        about = {"phase": status["phase"], "step": status["step"], "written": written}
        (folder.parent / "kill.json").write_text(json.dumps(about))
        os.kill(os.getpid(), moment.signal)
        if moment.signal == signal.SIGKILL:
            time.sleep(60)

    hit: list[bool] = []

    def now_or_soon() -> None:
        if hit:
            return
        hit.append(True)
        threading.Timer(moment.delay_s, kill).start() if moment.delay_s else kill()

    def before(owner: Any, name: str, due: Callable[..., bool], *, after: bool = False) -> None:
        own = getattr(owner, name)

        def watched(self: Any, *arguments: Any) -> Any:
            if after:
                own(self, *arguments)
            if due(self, *arguments):
                now_or_soon()
            return None if after else own(self, *arguments)

        setattr(owner, name, watched)

    if moment.place == "writing" and moment.rank == 0:
        before(Shards, "write", lambda shards: int(shards._folder.name[-6:]) >= moment.start)
    elif moment.place == "writing":
        before(Shards, "write", lambda shards: True)
    elif moment.place == "committing":
        before(checkpoint._Save, "_commit", lambda save, parts: save._step >= moment.start)
    elif moment.rank == 0:
        before(RunFolder, "phase", lambda _, step, name: name == moment.place and step >= moment.start, after=True)
    else:
        seen = [0]

        def due(ranks: Any, name: str, job: Any) -> bool:
            def counted(share: Any) -> Any:
                seen[0] += 1
                if seen[0] > moment.start:
                    now_or_soon()
                return job(share)

            if name == moment.place:
                ranks._jobs[name] = counted
            return False

        own = Ranks.register

        def register(self: Any, name: str, job: Any) -> None:
            own(self, name, job)
            due(self, name, job)

        Ranks.register = register  # type: ignore[method-assign]


def start(folder: Path, run: Path, world: int, *moments: Moment, resume: bool) -> list[int | None]:
    """``scope train`` on so many ranks; their exit codes."""

    rank_program.LIMIT_S = LIMIT_S

    def body(rank: int) -> int:
        from scope_opd.cli.main import main

        if world == 1:
            for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
                os.environ.pop(name, None)
        for moment in moments:
            if moment.rank == rank:
                arm(moment, run)
        return main(["train", str(folder / "run.toml"), "--run-dir", str(run), *["--resume"] * resume])

    return wait_all(fork_ranks(world, folder, body), LIMIT_S)


def lasting(run: Path, name: str) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))} for row in rows]


def final(run: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((run / "checkpoints").iterdir())[-1].glob("*.distcp")}


def main(folder: Path, world: int, kills: int) -> dict[str, Any]:
    (folder / "run.toml").write_text(CONFIG.format(steps=STEPS))
    whole, broken = folder / "whole", folder / "broken"
    found: dict[str, Any] = {"kills": [], "ends": [], "same": {}}

    def output() -> str:
        return "".join(path.read_text()[-1500:] for path in sorted(folder.glob("rank-*.txt")))

    def undisturbed(run: Path, *, resume: bool) -> None:
        found["ends"].append(start(folder, run, world, resume=resume))
        if any(found["ends"][-1]):
            sys.exit(f"{run.name} ended with {found['ends'][-1]}\n{output()}")

    undisturbed(whole, resume=False)
    for number, moment in enumerate(plan(kills, world)):
        codes = start(folder, broken, world, moment, resume=number > 0)
        if codes[moment.rank] != -9:
            sys.exit(f"{moment}: the run ended with {codes} before it could be killed\n{output()}")
        about = json.loads((folder / "kill.json").read_text())
        print(f"kill {number + 1}: wanted {moment}, died in {about}, exit codes {codes}", flush=True)
        found["kills"].append({"place": moment.place, "rank": moment.rank, "codes": codes, **about})
    if world > 1:  # as torchrun does it: SIGTERM for every rank
        both = [Moment(0, "generation", STEPS - 3, 0.0, signal.SIGTERM), Moment(1, "sample", 1, 0.0, signal.SIGTERM)]
        found["stopped"] = start(folder, broken, world, *both, resume=True)
        found["saved"] = sorted(path.name for path in (broken / "checkpoints").iterdir())[-1]
    undisturbed(broken, resume=True)
    for name in ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl"):
        found["same"][name] = lasting(broken, name) == lasting(whole, name)
    found["same"]["weights and states"] = final(broken) == final(whole)
    best = [json.loads((run / "run.json").read_text())["best"] for run in (whole, broken)]
    found["same"]["best"] = best[0] == best[1]
    return found


if __name__ == "__main__":
    import torch

    import scope_opd.cli.engines  # loaded once, for all runs
    import scope_opd.train.loop  # noqa: F401

    torch.set_num_threads(1)
    print(json.dumps(main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
