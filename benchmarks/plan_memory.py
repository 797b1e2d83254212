"""How well ``scope plan`` foretells the memory of an update: planned and measured, on this machine's CPU.

    python benchmarks/plan_memory.py                 # six cases, a few minutes on one core
    python benchmarks/plan_memory.py --only 512      # the cases whose name has it

Each case runs in a process of its own: a random model and its ``Learner`` are made, a smaller model is updated once
(libraries load their code), resident memory is read, then an update of a few tokens (it makes the optimiser's states)
and the update in question, of two packed micro-batches, run while a thread reads resident memory every 2 ms. Measured
is the largest growth; planned is ``models.memory.Updates`` without the weights, which were there before.
MALLOC_MMAP_THRESHOLD_ is set, so that glibc gives freed tensors back at once instead of keeping them as fragments;
``--default-malloc`` leaves it alone.

Prints one JSON line last: planned / measured for each case, and the largest distance from 1 (goal: 0.15).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "src"
sys.path.insert(0, str(SOURCE))

# name: family, hidden, MLP, layers, heads, key-value heads, vocabulary, tied, tokens, checkpointing, dtype
CASES: dict[str, tuple[Any, ...]] = {
    "qwen3-256": ("Qwen3", 256, 768, 8, 4, 2, 32_000, True, 2048, "off", "float32"),
    "qwen3-256-checkpointed": ("Qwen3", 256, 768, 8, 4, 2, 151_936, True, 1024, "full", "float32"),
    "llama-512": ("Llama", 512, 1536, 6, 8, 4, 64_000, False, 1024, "off", "float32"),
    "llama-512-checkpointed": ("Llama", 512, 1536, 6, 8, 4, 128_256, False, 1024, "full", "float32"),
    "llama-768-layers": ("Llama", 768, 3072, 10, 12, 12, 1000, False, 2048, "off", "float32"),
    "qwen3-1024": ("Qwen3", 1024, 3072, 4, 8, 4, 151_936, True, 1024, "off", "float32"),
    "qwen3-1024-bfloat16": ("Qwen3", 1024, 3072, 4, 8, 4, 151_936, True, 1024, "off", "bfloat16"),
}
GOAL = 0.15


def config_of(name: str) -> Any:
    import transformers

    family, hidden, mlp, layers, heads, kv, vocabulary, tied, *_ = CASES[name]
    return getattr(transformers, f"{family}Config")(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv, head_dim=hidden // heads, tie_word_embeddings=tied,
    )  # fmt: skip


def plan(name: str) -> dict[str, Any]:
    import torch

    from scope_opd.models.footprint import shape_of
    from scope_opd.models.memory import Layout, Student, Updates

    config = config_of(name)
    tokens, checkpointing, dtype = CASES[name][8:]
    student = Student(
        config, shape_of(config), dtype=getattr(torch, dtype), checkpointing=checkpointing,
        temperature=0.6,
    )  # fmt: skip
    begin = time.perf_counter()
    stage = Updates(student, Layout()).exactly(tokens)  # both micro-batches have just so many
    return {
        "growth": stage.total - student.weights,
        "weights": student.weights,
        "parts": stage.parts,
        "moment": stage.moment,
        "seconds": round(time.perf_counter() - begin, 1),
    }


class Resident(threading.Thread):
    """Reads resident memory until told to stop."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.largest = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.is_set():
            self.largest = max(self.largest, resident_bytes())
            time.sleep(0.002)


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def made_rollout(index: int, length: int) -> Any:
    """A credited rollout of ``length`` tokens, one of them its prompt."""
    from scope_opd.types import Rollout

    made = Rollout(
        id=str(index), group="g", prompt_token_ids=[1], token_ids=[index % 7 + 2] * (length - 1),
        logprobs=[-1.0] * (length - 1), text="", finish_reason="stop", policy_version=0, sample=index, step=0,
    )  # fmt: skip
    made.reinforce, made.distill = 1.0, 0.0
    return made


def measure(name: str) -> dict[str, Any]:
    """In a process of its own."""
    import gc

    import torch
    from transformers import AutoModelForCausalLM

    from scope_opd.config import TrainConfig
    from scope_opd.models.footprint import ragged
    from scope_opd.ranks import Ranks
    from scope_opd.train.batch import make_batch
    from scope_opd.train.engines import Follower, SurrogateSettings
    from scope_opd.train.step import Learner

    torch.set_num_threads(1)
    tokens, checkpointing, dtype = CASES[name][8:]

    def learner(config: Any) -> Learner:
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        surrogate = SurrogateSettings(student_temperature=0.6, sampling_temperature=0.6)
        alone = Follower(model, surrogate, Ranks(), model)
        return Learner(alone, TrainConfig(activation_checkpointing=checkpointing, lr=1e-5))

    def batch(size: int) -> Any:
        lengths = 2 * ragged(size)
        return make_batch(
            [made_rollout(i, length) for i, length in enumerate(lengths)],
            aggregation="token",
            max_tokens=size,
            packed=True,
        )

    small = config_of(name)
    small.hidden_size, small.intermediate_size, small.num_hidden_layers, small.vocab_size = 64, 64, 2, 500
    small.num_attention_heads, small.num_key_value_heads, small.head_dim = 2, 2, 32
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:2]
    learner(small).update(batch(32), 1e-5)
    ready = learner(config_of(name))
    work = batch(tokens)
    assert [micro.rows.lengths for micro in work.micro] == [ragged(tokens)] * 2
    gc.collect()
    before = resident_bytes()
    watch = Resident()
    watch.start()
    begin = time.perf_counter()
    for each in (batch(32), work):
        assert ready.update(each, 1e-5).finite
    watch.stopped.set()
    watch.join()
    return {"growth": watch.largest - before, "seconds": round(time.perf_counter() - begin, 1)}


def child(name: str, kind: str, default_malloc: bool) -> dict[str, Any]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    if not default_malloc:
        environment["MALLOC_MMAP_THRESHOLD_"] = "65536"
    done = subprocess.run(
        [sys.executable, __file__, "--child", kind, name],
        env=environment,
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="")
    parser.add_argument("--default-malloc", action="store_true")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        kind, name = arguments.child
        print(json.dumps(plan(name) if kind == "plan" else measure(name)))
        return 0
    results: dict[str, Any] = {}
    for name in CASES:
        if arguments.only not in name:
            continue
        planned, measured = (child(name, kind, arguments.default_malloc) for kind in ("plan", "measure"))
        results[name] = {
            "ratio": round(planned["growth"] / measured["growth"], 3),
            "planned_mb": round(planned["growth"] / 1e6, 1),
            "measured_mb": round(measured["growth"] / 1e6, 1),
            "weights_mb": round(planned["weights"] / 1e6, 1),
            "moment": planned["moment"],
            "plan_s": planned["seconds"],
            "updates_s": measured["seconds"],
        }
        print(name, json.dumps(results[name]), file=sys.stderr, flush=True)
    worst = max(abs(result["ratio"] - 1) for result in results.values())
    print(json.dumps({"benchmark": "plan_memory", "worst": round(worst, 3), "goal": GOAL, "cases": results}))
    return 0 if worst <= GOAL else 1


if __name__ == "__main__":
    raise SystemExit(main())
