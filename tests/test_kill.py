"""A run killed by SIGKILL in any phase and resumed ends as if nothing had happened: real processes, real kills.

One run is killed again and again (each resumption is killed too), at a chosen phase and a small delay into it, then
finished and compared bit by bit with a run that was left alone. `make kill-test` kills 20 times; the test suite, twice
in each phase.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest

PHASES = ("generation", "scoring", "forward_backward", "optimiser", "saving")
STEPS = 24

# Runs the real command line in this process, and kills it with SIGKILL `delay` seconds into the wanted phase.
DRIVER = """
import os, runpy, signal, sys, threading
from scope_opd.train.runfolder import RunFolder

step, phase, delay = int(sys.argv[1]), sys.argv[2], float(sys.argv[3])
tell = RunFolder.phase

def kill():
    os.kill(os.getpid(), signal.SIGKILL)

def watch(self, now, name):
    tell(self, now, name)
    if name == phase and now >= step:
        threading.Timer(delay, kill).start() if delay else kill()

RunFolder.phase = watch
sys.argv = ["scope", *sys.argv[4:]]
runpy.run_module("scope_opd", run_name="__main__")
"""

CONFIG = f"""
[objective]
method = "scope"
[rollout]
n = 4
max_tokens = 64
[teacher]
dtype = "float32"
[train]
steps = {STEPS}
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
rollouts_logged = 4
export = false
"""


def start(arguments: list[str], kill: tuple[int, str, float] | None, folder: Path) -> int:
    driver = ["-c", DRIVER, str(kill[0]), kill[1], str(kill[2])] if kill else ["-m", "scope_opd"]
    done = subprocess.run(
        [sys.executable, *driver, *arguments],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
        check=False,
    )
    if done.returncode not in (0, -9):
        pytest.fail(done.stdout[-3000:])
    return done.returncode


def plan(kills: int) -> list[tuple[int, str, float]]:
    """Steps spread over the run; every phase in turn; delays from none to a few milliseconds.

    The optimiser's phase is over in less than a millisecond here, so that one is killed as it begins.
    """
    draw = random.Random(0)
    chosen = []
    for number in range(kills):
        phase = PHASES[number % len(PHASES)]
        delay = 0.0 if phase == "optimiser" else draw.choice([0.0, 0.001, 0.003, 0.008])
        chosen.append((1 + number * (STEPS - 2) // kills, phase, delay))
    return chosen


def lasting(folder: Path, name: str) -> list[dict]:
    rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
    return [{key: value for key, value in row.items() if not key.startswith(("time/", "perf/"))} for row in rows]


def test_a_run_killed_in_every_phase_and_resumed_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    kills = int(os.environ.get("SCOPE_KILLS", 2 * len(PHASES)))
    config = tmp_path / "run.toml"
    config.write_text(CONFIG)
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert start(["train", str(config), "--run-dir", str(whole)], None, tmp_path) == 0

    hit: list[str] = []
    for number, kill in enumerate(plan(kills)):
        resume = ["--resume"] if number else []
        code = start(["train", str(config), "--run-dir", str(broken), *resume], kill, tmp_path)
        status = json.loads((broken / "status.json").read_text())
        print(f"kill {number + 1}: wanted {kill}, died in {status['phase']} of step {status['step']} (exit {code})")
        assert code == -9, "the run ended before it could be killed"
        hit.append(status["phase"])
    assert start(["train", str(config), "--run-dir", str(broken), "--resume"], None, tmp_path) == 0

    assert set(hit) >= set(PHASES), f"phases hit: {hit}"
    for name in ("metrics.jsonl", "rollouts.jsonl", "eval.jsonl"):
        assert lasting(broken, name) == lasting(whole, name), name
    last = sorted((whole / "checkpoints").iterdir())[-1].name
    weights = [(run / "checkpoints" / last / "model.safetensors").read_bytes() for run in (whole, broken)]
    assert weights[0] == weights[1]
