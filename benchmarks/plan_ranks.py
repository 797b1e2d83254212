"""How well ``scope plan`` foretells the memory of an update on several ranks: planned and measured, on a CPU over gloo.

    python benchmarks/plan_ranks.py                  # two ranks, two cases, a few minutes on two cores
    python benchmarks/plan_ranks.py --only qwen3

As benchmarks/plan_memory.py, of which it takes cases and meter, but each rank is a process with its share of the
weights: measured is the largest growth of its resident memory in an update of a few tokens and one of two micro-batches
a rank, after the weights were dealt. Gloo's own buffers are in it and are not planned.

Prints one JSON line last: planned / measured for each case and rank, and the largest distance from 1 (goal: 0.15).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

from plan_memory import CASES, GOAL, Resident, config_of, made_rollout, resident_bytes

WORLD = 2
NAMES = ("llama-512", "qwen3-256")


def measure(name: str) -> dict[str, Any]:
    """On one rank."""
    import torch
    from transformers import AutoModelForCausalLM

    from scope_opd.config import TrainConfig
    from scope_opd.models.footprint import shape_of
    from scope_opd.models.memory import Layout, Student, Updates
    from scope_opd.ranks import Ranks
    from scope_opd.train.batch import make_batch
    from scope_opd.train.engines import SurrogateSettings
    from scope_opd.train.step import Learner

    torch.set_num_threads(1)
    tokens, checkpointing, dtype = CASES[name][8:]

    def batch(length: int) -> Any:
        found = make_batch(
            [made_rollout(i, length) for i in range(4 * WORLD)], aggregation="token", max_tokens=2 * length, ranks=WORLD
        )
        assert [len(share) for share in found.shares] == [2] * WORLD
        return found

    with Ranks.from_environment(300.0) as ranks:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config_of(name), dtype=getattr(torch, dtype)).eval()
        surrogate = SurrogateSettings(student_temperature=0.6, sampling_temperature=0.6)
        parts: Any = SimpleNamespace(
            model=None, trained=model, surrogate=surrogate, teacher_head=None, reference=None, ranks=ranks
        )
        learner = Learner(parts, TrainConfig(activation_checkpointing=checkpointing, lr=1e-5))
        gc.collect()
        before = resident_bytes()
        watch = Resident()
        watch.start()
        if ranks.leads:
            for work in (batch(16), batch(tokens // 2)):
                assert learner.update(work, 1e-5).finite
        else:
            ranks.follow()
        watch.stopped.set()
        watch.join()
    growth = watch.largest - before
    config = config_of(name)
    student = Student(
        config, shape_of(config), dtype=getattr(torch, dtype), checkpointing=checkpointing, temperature=0.6
    )
    stage = Updates(student, Layout(WORLD, WORLD)).exactly(tokens)
    planned = stage.total - stage.parts["weights"] - stage.parts["plain copy"]
    return {
        "ratio": round(planned / growth, 3),
        "planned_mb": round(planned / 1e6, 1),
        "measured_mb": round(growth / 1e6, 1),
        "moment": stage.moment,
    }


def case(name: str) -> list[dict[str, Any]]:
    """What every rank found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
        "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--child", name],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    found = []
    for process in ranks:
        output, _ = process.communicate()
        if process.returncode:
            raise SystemExit(process.returncode)
        found.append(json.loads(output.strip().splitlines()[-1]))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return 0
    results = {}
    for name in NAMES:
        if arguments.only in name:
            results[name] = case(name)
            print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    worst = max(abs(rank["ratio"] - 1) for ranks in results.values() for rank in ranks)
    print(json.dumps({"benchmark": "plan_ranks", "worst": round(worst, 3), "goal": GOAL, "cases": results}))
    return 0 if worst <= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
