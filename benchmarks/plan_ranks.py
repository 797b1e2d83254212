"""How well ``scope plan`` foretells the memory of an update on several ranks: planned and measured, on a CPU over gloo.

    python benchmarks/plan_ranks.py                  # two ranks, two cases, a few minutes on two cores
    python benchmarks/plan_ranks.py --only qwen3
    python benchmarks/plan_ranks.py --loading        # what a rank holds until the weights are dealt, about a minute

As benchmarks/plan_memory.py, of which it takes cases and meter, but each rank is a process with its share of the
weights: measured is the largest growth of its resident memory in an update of a few tokens and one of two micro-batches
a rank, after the weights were dealt. Gloo's own buffers are in it and are not planned.

Prints one JSON line last: planned / measured for each case and rank, and the largest distance from 1 (goal: 0.15).

``--loading`` measures each rank from its start until the weights of a student of 103 million parameters, stored in
bfloat16 and trained in float32, have been dealt: the most anonymous memory (pages of files, which ranks share and the
system may drop, are told apart), loaded whole by every rank and dealt from the files.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from plan_memory import CASES, GOAL, Resident, config_of, made_rollout, resident_bytes

WORLD = 2
NAMES = ("llama-512", "qwen3-256")
LOADED = {
    "vocab_size": 32_000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 6, "head_dim": 64, "tie_word_embeddings": True,
}  # fmt: skip


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


def memory() -> dict[str, float]:
    """Megabytes of this process: its own, and of files."""
    status = Path("/proc/self/status").read_text().split("\n")
    sizes = {name: int(line.split()[1]) / 1e3 for line in status for name in [line.split(":")[0]] if "Rss" in name}
    return {"anonymous": sizes["RssAnon"], "files": sizes["RssFile"]}


def measure_loading(folder: str, how: str) -> dict[str, Any]:
    """On one rank."""
    import torch

    from scope_opd.config import TrainConfig
    from scope_opd.models.loading import load_model
    from scope_opd.ranks import Ranks
    from scope_opd.train.engines import SurrogateSettings
    from scope_opd.train.step import Learner

    torch.set_num_threads(1)
    with Ranks.from_environment(300.0) as ranks:
        gc.collect()
        before, most, stopped = memory(), memory(), threading.Event()

        def watch() -> None:
            while not stopped.is_set():
                for name, size in memory().items():
                    most[name] = max(most[name], size)
                time.sleep(0.002)

        watching = threading.Thread(target=watch, daemon=True)
        watching.start()
        began = time.perf_counter()
        model = load_model(folder, in_files=how == "from files")
        surrogate = SurrogateSettings(student_temperature=0.6, sampling_temperature=0.6)
        parts: Any = SimpleNamespace(
            model=None, trained=model, surrogate=surrogate, teacher_head=None, reference=None, ranks=ranks
        )
        learner = Learner(parts, TrainConfig(lr=1e-5))
        seconds = time.perf_counter() - began
        stopped.set()
        watching.join()
        gc.collect()
        after = memory()
        assert learner.forward.packs
        if not ranks.leads:
            ranks.follow()
    return {
        "peak_mb": round(most["anonymous"] - before["anonymous"], 1),
        "kept_mb": round(after["anonymous"] - before["anonymous"], 1),
        "files_mb": round(most["files"] - before["files"], 1),
        "seconds": round(seconds, 1),
    }


def loading() -> dict[str, Any]:
    """What every rank found, by how it loads."""
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        model = Qwen3ForCausalLM(Qwen3Config(**LOADED))
        parameters = model.num_parameters()
        model.to(torch.bfloat16).save_pretrained(folder)
        del model
        found = {how: on_ranks("--child-loading", folder, how) for how in ("whole", "from files")}
    return {
        "parameters": parameters,
        "whole_mb": parameters * 4 / 1e6,
        "share_mb": parameters * 4 / 1e6 / WORLD,
    } | found


def on_ranks(*arguments: str) -> list[dict[str, Any]]:
    """What this program prints on every rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MALLOC_MMAP_THRESHOLD_": "65536",
        "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, *arguments],
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
    parser.add_argument("--loading", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--child-loading", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(arguments.child)))
        return 0
    if arguments.child_loading:
        print(json.dumps(measure_loading(*arguments.child_loading)))
        return 0
    if arguments.loading:
        print(json.dumps({"benchmark": "plan_ranks --loading", **loading()}))
        return 0
    results = {}
    for name in NAMES:
        if arguments.only in name:
            results[name] = on_ranks("--child", name)
            print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    worst = max(abs(rank["ratio"] - 1) for ranks in results.values() for rank in ranks)
    print(json.dumps({"benchmark": "plan_ranks", "worst": round(worst, 3), "goal": GOAL, "cases": results}))
    return 0 if worst <= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
