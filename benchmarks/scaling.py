"""How an update scales: its time in tokens at a fixed length, its memory in the size of a group.

    python benchmarks/scaling.py                    # about three minutes on two quiet cores
    python benchmarks/scaling.py --device cuda

A random Qwen3 (hidden 128, 6 layers, 32,000 ids) through ``Learner.update``, micro-batches of 1,024 tokens. Time: 1, 2,
4, 8 and 16 times eight sequences of 256 tokens, in turn, medians over --rounds; a straight line is fitted to them, and
``r2`` is its share of the variance (goal: 0.99 at least). Memory: one prompt with 8, 16, 32, 64 and 128 rollouts of
that length, two micro-batches and more, a process each: the largest resident memory (on a GPU: what torch has
allocated) of two updates, beyond what was there before the first; ``spread`` is (largest - smallest) / smallest (goal:
0.05 at most).
Prints one JSON line; exit code 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

LENGTH, SEQUENCES, BUDGET = 256, 8, 1024
TIMES = (1, 2, 4, 8, 16)
GROUPS = (8, 16, 32, 64, 128)
R2_GOAL, SPREAD_GOAL = 0.99, 0.05


def make_learner(args: argparse.Namespace) -> Any:
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    from scope_opd.config import TrainConfig
    from scope_opd.ranks import Ranks
    from scope_opd.train.engines import Follower, SurrogateSettings
    from scope_opd.train.step import Learner

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32_000, hidden_size=args.hidden, intermediate_size=3 * args.hidden, num_hidden_layers=args.layers,
        num_attention_heads=4, num_key_value_heads=2, head_dim=args.hidden // 4, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.device(args.device):
        model = Qwen3ForCausalLM(config).eval()
    surrogate = SurrogateSettings(aggregation="token")
    parts = Follower(trained=model, surrogate=surrogate, ranks=Ranks(), model=model)
    return Learner(parts, TrainConfig(max_tokens_per_microbatch=BUDGET, lr=1e-6))


def make_update(learner: Any, sequences: int, length: int) -> Any:
    """A step's batch of one group."""
    import torch

    from scope_opd.train.batch import make_batch
    from scope_opd.types import Rollout

    rollouts = []
    for index in range(sequences):
        ids = torch.randint(3, 32_000, (length,)).tolist()
        made = Rollout(
            id=str(index), group="g", prompt_token_ids=ids[:8], token_ids=ids[8:], logprobs=[-10.0] * (length - 8),
            text="", finish_reason="stop", policy_version=0, sample=index, step=0,
        )  # fmt: skip
        made.reinforce, made.distill = (1.0, -1.0)[index % 2], 0.0
        rollouts.append(made)
    return make_batch(
        rollouts, aggregation="token", max_tokens=BUDGET, packed=learner.forward.packs,
        crossover=learner.forward.crossover,
    )  # fmt: skip


def measure_time(args: argparse.Namespace) -> dict[str, Any]:
    learner = make_learner(args)
    batches = {times: make_update(learner, SEQUENCES * times, args.length) for times in TIMES}
    seconds: dict[int, list[float]] = {times: [] for times in TIMES}
    for number in range(args.rounds + 1):
        for times, batch in batches.items():
            if number == 0 and times > 1:
                continue  # one small update warms up
            began = clock(args)
            assert learner.update(batch, 1e-6).finite
            if number:
                seconds[times].append(clock(args) - began)
    tokens = [SEQUENCES * args.length * times for times in TIMES]
    medians = [statistics.median(seconds[times]) for times in TIMES]
    slope, intercept = statistics.linear_regression(tokens, medians)
    return {
        "tokens": tokens,
        "seconds": [round(value, 4) for value in medians],
        "micro_batches": [len(batch.micro) for batch in batches.values()],
        "tokens_per_s": round(1 / slope, 1),
        "intercept_s": round(intercept, 4),
        "r2": round(statistics.correlation(tokens, medians) ** 2, 5),
    }


def clock(args: argparse.Namespace) -> float:
    import torch

    if args.device == "cuda":
        torch.cuda.synchronize()
    return time.process_time() if args.cpu_time else time.perf_counter()


def measure_memory(args: argparse.Namespace) -> dict[str, float]:
    """In a process of its own."""
    from logprobs import read_peak, reset_peak

    learner = make_learner(args)
    assert learner.update(make_update(learner, 1, 16), 1e-6).finite  # the optimiser's states, the libraries' workspaces
    batch = make_update(learner, args.group, args.length)
    before = reset_peak(args.device)
    for _ in range(2):
        assert learner.update(batch, 1e-6).finite
    return {"growth_mb": (read_peak(args.device) - before) / 1e6, "before_mb": before / 1e6}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS)
    parser.add_argument("--cpu-time", action="store_true", help="of the process, for busy machines")
    parser.add_argument("--group", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.group:
        print(json.dumps(measure_memory(args)))
        return 0
    found = measure_time(args)
    print(f"time: {json.dumps(found)}", file=sys.stderr, flush=True)
    memory = {}
    common = ["--device", args.device, "--threads", str(args.threads), "--hidden", str(args.hidden)]
    common += ["--layers", str(args.layers), "--length", str(args.length)]
    # Freed tensors go back to the system at once, so that resident memory is what is in use and not fragments.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for group in args.groups:
        command = [sys.executable, __file__, "--group", str(group), *common]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        memory[group] = {key: round(value, 1) for key, value in json.loads(done.stdout.splitlines()[-1]).items()}
        print(f"group of {group}: {memory[group]}", file=sys.stderr, flush=True)
    growth = [entry["growth_mb"] for entry in memory.values()]
    spread = (max(growth) - min(growth)) / min(growth)
    goals = found["r2"] >= R2_GOAL and spread <= SPREAD_GOAL
    print(
        json.dumps(
            {
                "benchmark": "scaling", "device": args.device, "threads": args.threads, "hidden": args.hidden,
                "layers": args.layers, "time": found, "memory_by_group": memory, "spread": round(spread, 4),
                "goals": {"r2": R2_GOAL, "spread": SPREAD_GOAL, "met": goals},
            }
        )
    )  # fmt: skip
    return 0 if goals else 1


if __name__ == "__main__":
    raise SystemExit(main())
