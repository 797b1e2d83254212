"""Where a training step's time goes, and how it compares with TRL's GRPOTrainer on the same student.

    python benchmarks/pipeline.py                                        # our GRPO, OPD and SCOPE steps by stage
    python benchmarks/pipeline.py --trl-python /path/to/trl-env/bin/python   # interleaved with TRL 1.16

16 prompts x 8 rollouts of about 36 tokens on the zoo's student, one optimiser update a step, float32, one thread a
process. Every measurement is a process of its own (so that peak memory is its own); the sides take turns for --rounds
rounds, and medians over rounds of each process's median step are reported. TRL's environment:

    python3 -m venv trl-env && trl-env/bin/pip install torch==2.13.0 \
      && trl-env/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0

Prints one JSON line. The sampler against `model.generate` alone is benchmarks/sampler.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

METHODS = ("grpo", "opd", "scope")
STAGES = ("generation", "verify", "teacher", "update")


def one_side(method: str, warmup: int, steps: int, threads: int) -> dict:
    """Our step in this process: run `scope train` for a few steps and read its own metrics."""
    import resource

    from scope_opd.cli.main import main

    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        settings = [
            f"objective.method={method}",
            "rollout.n=8",
            "rollout.max_tokens=64",
            f"train.steps={warmup + steps}",
            "train.prompts_per_step=16",
            "train.lr=3e-4",
            "train.max_tokens_per_microbatch=2048",
            f"train.threads={threads}",
            "run.checkpoint_every=0",
            "run.export=false",
        ]
        config = Path(folder) / "bench.toml"
        config.write_text("")
        stdout, sys.stdout = sys.stdout, sys.stderr
        try:
            code = main(["train", str(config), "--run-dir", str(run), *(w for s in settings for w in ("--set", s))])
        finally:
            sys.stdout = stdout
        if code:
            raise SystemExit(code)
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][warmup:]
    return {
        "step_s": [row["time/step_s"] for row in rows],
        "stages_s": {stage: statistics.median(row[f"time/{stage}_s"] for row in rows) for stage in STAGES},
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "mean_length": round(statistics.mean(row["length/mean"] for row in rows), 1),
        "reward_mean": round(statistics.mean(row["reward/mean"] for row in rows), 4),
    }


def measure(command: list[str], threads: int) -> dict:
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command[:3])} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="interpreter of an environment with TRL; omit to measure our side only")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--side", choices=METHODS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(one_side(args.side, args.warmup, args.steps, args.threads)))
        return

    from scope_opd.zoo import model_path

    common = ["--steps", str(args.steps), "--warmup", str(args.warmup), "--threads", str(args.threads)]
    here = Path(__file__).resolve()
    sides = {name: [sys.executable, str(here), "--side", name, *common] for name in args.methods}
    if args.trl_python:
        trl = here.with_name("trl_grpo_step.py")
        sides["trl_grpo"] = [args.trl_python, str(trl), "--model", str(model_path("student")), *common]
    results: dict[str, list[dict]] = {name: [] for name in sides}
    for number in range(args.rounds):
        for name, command in sides.items():
            results[name].append(measure(command, args.threads))
            print(f"round {number + 1}/{args.rounds} {name}: {results[name][-1]['step_s'][-1]} s", file=sys.stderr)

    summary: dict[str, object] = {"benchmark": "pipeline", "rounds": args.rounds, "threads": args.threads}
    step, memory = {}, {}
    for name, runs in results.items():
        step[name] = statistics.median(statistics.median(run["step_s"]) for run in runs)
        memory[name] = statistics.median(run["peak_rss_mb"] for run in runs)
        entry = {"step_s": round(step[name], 4), "peak_rss_mb": memory[name], "mean_length": runs[0]["mean_length"]}
        if "stages_s" in runs[0]:
            entry["stages_s"] = {
                stage: round(statistics.median(run["stages_s"][stage] for run in runs), 4) for stage in STAGES
            }
        summary[name] = entry
    if "trl_grpo" in step and "grpo" in step:
        summary["ratio_step_grpo_to_trl"] = round(step["grpo"] / step["trl_grpo"], 3)
        summary["ratio_memory_grpo_to_trl"] = round(memory["grpo"] / memory["trl_grpo"], 3)
    if "scope" in step and "grpo" in step:
        summary["ratio_step_scope_to_grpo"] = round(step["scope"] / step["grpo"], 3)
    print(json.dumps(summary))


if __name__ == "__main__":
    main()
