"""Whole runs of ``scope train`` on several ranks, forked from one process that has everything loaded.

As a program (``rank_runs.py FOLDER``) it prints one JSON line: how runs on two ranks differ from the same on one, and
how runs end whose ranks are told to stop, or are killed.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import scope_opd.cli.followers  # noqa: F401 - and with it all that a run needs, once for all that are forked
from fault_server import MODEL
from rank_program import fork_ranks, wait_all
from sampling_server import SamplingServer, Weights
from scope_opd.cli.main import main as scope
from scope_opd.train.runfolder import RunFolder
from tiny import save_pair

COMMON = """
[rollout]
n = 4
max_tokens = 48
[teacher]
dtype = "float32"
[train]
steps = 2
prompts_per_step = 3
lr = 3e-4
threads = 1
device = "cpu"
max_tokens_per_microbatch = 512
[run]
rollouts_logged = 0
checkpoint_every = 1
"""
RUNS: dict[str, list[str]] = {
    "scope": ["eval.at_start=true", "eval.at_end=true", "eval.problems=3", "eval.n=2", "train.grad_clip=1.0"],
    "kd": ["objective.method=kd"],
    "full_kl": [
        "objective.method=reward_opd", "objective.distill=full_kl", "objective.reference_kl=0.01",
        "train.updates_per_batch=2",
    ],
}  # fmt: skip
SERVED = "served"
"""The run that a server samples, which rank 0 brings new weights, and both ranks score in process."""
NOT_COMPARED = ("time/", "perf/")


def start(config: Path, folder: Path, world: int, more: list[str]) -> list[int]:
    arguments = ["train", str(config), "--run-dir", str(folder)]
    for setting in more:
        key, _, value = setting.partition("=")
        plain = (
            value.startswith("[") or value in ("true", "false") or value.replace(".", "").replace("e-", "").isdigit()
        )
        arguments += ["--set", f"{key}={value}" if plain else f'{key}="{value}"']
    return fork_ranks(world, folder.parent, lambda rank: scope(arguments))


def texts(folder: Path, world: int) -> list[str]:
    return [(folder / f"rank-{rank}.txt").read_text() for rank in range(world)]


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    path = folder / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def gap(left: Any, right: Any) -> float:
    """The largest difference of two rows, relative to 1 or what is larger; 1e9 where they are of different kinds."""
    if isinstance(left, dict) and isinstance(right, dict) and left.keys() == right.keys():
        return max((gap(left[k], right[k]) for k in left if not k.startswith(NOT_COMPARED)), default=0.0)
    if isinstance(left, float | int) and isinstance(right, float | int):
        return abs(left - right) / max(1.0, abs(left))
    return 0.0 if left == right else 1e9


def compare(folder: Path, config: Path, name: str) -> dict[str, float]:
    found = []
    for world in (1, 2):
        run = folder / f"{name}-{world}"
        with served(folder) if name == SERVED else nullcontext(RUNS.get(name, [])) as settings:
            codes = wait_all(start(config, run, world, settings))
        if any(codes):
            raise SystemExit(f"{name}, world {world}: {codes}\n" + "\n".join(texts(folder, world)))
        found.append((rows(run, "metrics"), rows(run, "eval"), load_file(run / "export" / "model.safetensors")))
    one, two = found
    assert len(one[0]) == len(two[0]) == 2
    assert len(one[1]) == len(two[1])
    assert one[2].keys() == two[2].keys()
    return {
        "metrics": max(gap(a, b) for a, b in zip(one[0], two[0], strict=True)),
        "evaluations": max((gap(a, b) for a, b in zip(one[1], two[1], strict=True)), default=0.0),
        "weights": max(float((one[2][k] - two[2][k]).norm() / one[2][k].norm()) for k in one[2]),
        "dtypes": float(sum(tensor.dtype != torch.float32 for tensor in two[2].values())),
    }


@contextmanager
def served(folder: Path) -> Iterator[list[str]]:
    """Settings of a run that is sampled by a server, which lives in a process of its own meanwhile."""
    save_pair(folder / "student", "qwen3", seed=1)
    save_pair(folder / "teacher", "llama", seed=2)
    problems = [{"id": f"p{i}", "problem": f"What is {i} + {i + 1}?", "answer": 2 * i + 1} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    place = folder / "url"
    place.unlink(missing_ok=True)
    pid = os.fork()
    if not pid:
        signal.alarm(240)
        weights = Weights(AutoModelForCausalLM.from_pretrained(folder / "student").eval())
        with SamplingServer(weights) as server:
            place.with_suffix(".new").write_text(server.url)
            place.with_suffix(".new").rename(place)
            signal.pause()
        os._exit(0)
    try:
        while not place.exists():
            time.sleep(0.05)
        yield [
            f"model.path={folder / 'student'}", f"teacher.path={folder / 'teacher'}",
            f"data.train={folder / 'rows.jsonl'}", f"rollout.base_urls=[{json.dumps(place.read_text())}]",
            f"rollout.model={MODEL}", "rollout.max_tokens=6", "objective.truncated=incorrect",
            "run.alarms.uniform_weights=off", "train.lr=0.01",
        ]  # fmt: skip
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def stopped(folder: Path, config: Path, how: str) -> dict[str, Any]:
    """Ranks that are told to stop together, or one of which is killed, once the first checkpoint is there."""
    run = folder / how
    pids = start(config, run, 2, ["train.steps=500"])
    until = time.monotonic() + 30
    while not (run / "checkpoints").is_dir() or not list((run / "checkpoints").glob("step-*")):
        assert time.monotonic() < until, "\n".join(texts(folder, 2))
        time.sleep(0.02)
    began = time.monotonic()
    if how == "killed":
        os.kill(pids[1], signal.SIGKILL)
    else:
        for pid in pids:  # as torchrun passes it on, and as a terminal does
            os.kill(pid, signal.SIGTERM)
    codes = wait_all(pids, 30)
    seconds = time.monotonic() - began
    steps = len(rows(run, "metrics"))
    last = sorted((run / "checkpoints").glob("step-*"))[-1].name
    lines = [(text.strip().splitlines() or [""])[-1] for text in texts(folder, 2)]
    RunFolder.open(run, resume=True).close()  # refuses one that is in use
    return {"codes": codes, "seconds": seconds, "lines": lines, "steps": steps, "last": last, "free": True}


def main(folder: Path) -> dict[str, Any]:
    config = folder / "run.toml"
    config.write_text(COMMON)
    found: dict[str, Any] = {name: compare(folder, config, name) for name in (*RUNS, SERVED)}
    return found | {how: stopped(folder, config, how) for how in ("told", "killed")}


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
