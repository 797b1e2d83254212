"""A training step against TRL's on the same student: GRPO, OPD and SCOPE; GRPOTrainer and DistillationTrainer.

    python benchmarks/against_trl.py                                        # our methods alone, by stage
    python benchmarks/against_trl.py --trl-python trl-env/bin/python        # the zoo's student: 16 prompts x 8
    python benchmarks/against_trl.py --trl-python trl-env/bin/python --shape real --rounds 2 --threads 2 \\
        --sides grpo trl_grpo --tokens 1024 4096 --rows 1 4                 # like the real thing; micro-batches tuned

TRL's environment:

    python3 -m venv trl-env && trl-env/bin/pip install torch==2.13.0 \\
      && trl-env/bin/pip install torch==2.13.0 transformers==5.23.0 trl==1.16.0 accelerate==1.15.0 datasets==5.2.0

``zoo`` is the zoo's student with 24-48 tokens a response; ``real`` a random Qwen3 of hidden size 512, 8 layers and
151,936 ids, 16 rollouts of 64-512 tokens. Both sides get the same weights, prompts, groups, response lengths, verdicts,
optimiser and float32 (benchmarks/workload.py says how); the line says how many tokens each generated and trained on and
how many optimiser steps it took, and the exit code is 1 if they differ. ``opd`` and ``scope`` use the log-prob of the
sampled token, ``opd_exact`` the full reverse KL, which is what TRL's distillation always does.

Every side is a process of its own; all live at the same time and take turns step by step, so that what disturbs the
machine disturbs all. The first step warms up. Several --tokens (of our micro-batches) or --rows (of TRL's) make a side
each; ratios are of the fastest, and of the smallest, of either library. Peak memory is resident memory of the process.
Prints one JSON line last.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from workload import (
    BETAS,
    CLIP,
    DUAL_CLIP,
    EPS,
    GRAD_CLIP,
    LR,
    SHAPES,
    TEMPERATURE,
    WEIGHT_DECAY,
    Gate,
    Shape,
    correct,
    make_models,
    prescribe,
    shape_of,
)

HERE = Path(__file__).resolve().parent
OURS = {"grpo": "grpo", "opd": "opd", "opd_exact": "opd", "scope": "scope"}
PAIRS = [("grpo", "trl_grpo"), ("opd", "trl_distillation"), ("opd_exact", "trl_distillation"),
         ("scope", "trl_distillation")]  # fmt: skip
STAGES = ("generation", "verify", "teacher", "update")
SAME = ("generated", "trained", "prompt_tokens", "optimiser_steps")


def our_side(name: str, shape: Shape, student: str, teacher: str, tokens: int, steps: int, threads: int) -> None:
    """`scope train` in this process, stopped at the gate before every step."""
    gate = Gate()
    import torch
    import transformers

    from scope_opd.cli.engines import build_engines
    from scope_opd.config import validate_config
    from scope_opd.rollout import local
    from scope_opd.train.loop import train
    from scope_opd.types import Verdict

    class Coin:
        async def verify(self, rollout: Any, prompt: Any) -> Verdict:
            return Verdict(correct=correct(rollout.sample), reward=float(correct(rollout.sample)), reason="a coin")

    wanted: dict[tuple[str, int], int] = {}

    class Prescribed(local._DecodeBatch):
        def _draw(self, logits: torch.Tensor) -> torch.Tensor:
            lengths = [wanted[prompt.id, sample] for prompt, sample in self.rows]
            return super()._draw(prescribe(logits, self.t, lengths, self.params.stop_token_ids))

    local._DecodeBatch = Prescribed  # type: ignore[misc]
    with tempfile.TemporaryDirectory() as folder:
        config = validate_config(
            {
                "model": {"path": student},
                "teacher": {"path": teacher, "dtype": "float32", "max_tokens_per_batch": tokens},
                "data": {"train": "zoo", "verifier": "zoo", "shuffle": False},
                "rollout": {"n": shape.samples, "temperature": TEMPERATURE, "max_tokens": shape.high},
                "objective": {
                    "method": OURS[name],
                    "distill": "full_kl" if name == "opd_exact" else "sampled",
                    **({"aggregation": "token", "clip": CLIP, "dual_clip": DUAL_CLIP} if name == "grpo" else {}),
                },
                "train": {
                    "steps": steps, "prompts_per_step": shape.prompts, "lr": LR, "betas": list(BETAS), "eps": EPS,
                    "weight_decay": WEIGHT_DECAY, "grad_clip": GRAD_CLIP, "max_tokens_per_microbatch": tokens,
                    "threads": threads, "device": "cpu",
                },
                "run": {
                    "dir": f"{folder}/run", "checkpoint_every": 0, "export": False,
                    "alarms": {"truncation": "off", "uniform_weights": "off", "grad_norm": "off"},
                },
            }
        )  # fmt: skip
        built = build_engines(config)
        engines = built.engines
        engines.pipeline.verifier = Coin()  # type: ignore[attr-defined]
        watched = next(value for key, value in engines.model.named_parameters() if key.endswith("q_proj.weight"))
        start = watched.detach().clone()
        metrics = Path(folder) / "run" / "metrics.jsonl"
        collect = engines.pipeline.collect
        facts: dict[str, Any] = {}

        def gated(prompts: Any, params: Any, **more: Any) -> Any:
            if more["step"]:
                row = json.loads(metrics.read_text().splitlines()[-1])
                gate.stages = {stage: row[f"time/{stage}_s"] for stage in STAGES}
                facts.update(generated=round(row["length/mean"] * shape.rows), trained=row["tokens/trained"])
            gate.next_step(
                **facts, optimiser_steps=more["policy_version"], weights_moved=float((watched.detach() - start).norm()),
                versions={"torch": torch.__version__, "transformers": transformers.__version__},
            )  # fmt: skip
            facts["prompt_tokens"] = shape.samples * sum(len(prompt.token_ids) for prompt in prompts)
            wanted.clear()
            order = [(prompt.id, sample) for prompt in prompts for sample in range(params.n)]
            wanted.update(zip(order, shape.lengths(warm=more["step"] == 0), strict=True))
            return collect(prompts, params, **more)

        engines.pipeline.collect = gated  # type: ignore[method-assign]
        train(config, engines, progress=False)


@dataclass
class Side:
    """A process that does one step when it is told to."""

    name: str
    command: list[str]
    rows: list[dict[str, Any]] = field(default_factory=list)
    process: subprocess.Popen[str] | None = None
    errors: IO[bytes] | None = None

    def start(self, threads: int) -> None:
        environment = {
            **os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
            "PYTHONWARNINGS": "ignore",
        }  # fmt: skip
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        self.process = subprocess.Popen(
            self.command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True
        )
        self.first = self.read()

    def step(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        return self.read()

    def read(self) -> dict[str, Any]:
        assert self.process is not None
        assert self.process.stdout is not None
        assert self.errors is not None
        line = self.process.stdout.readline()
        if not line:
            self.errors.seek(0)
            raise SystemExit(f"{self.name} ended:\n{self.errors.read().decode(errors='replace')[-3000:]}")
        return json.loads(line)

    def stop(self) -> None:
        if self.process is None:
            return
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trl-python", help="interpreter of an environment with TRL; omit to measure our side only")
    parser.add_argument("--shape", choices=SHAPES, default="zoo")
    parser.add_argument("--sides", nargs="+", choices=[*OURS, "trl_grpo", "trl_distillation"])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--scale", type=float, default=1.0, help="of the response lengths, for trials")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048], help="of our micro-batches")
    parser.add_argument("--rows", type=int, nargs="+", help="rollouts of TRL's micro-batches; all of a step by default")
    parser.add_argument("--one", choices=OURS, help=argparse.SUPPRESS)
    parser.add_argument("--student", help=argparse.SUPPRESS)
    parser.add_argument("--teacher", help=argparse.SUPPRESS)
    args = parser.parse_args()
    shape, steps = shape_of(args.shape, args.scale), args.rounds + 2  # one warms up, the last is begun but not done
    if args.one:
        our_side(args.one, shape, args.student, args.teacher, args.tokens[0], steps, args.threads)
        return 0
    for rows in args.rows or ():
        if shape.rows % rows:
            parser.error(f"--rows {rows}: {shape.rows} rollouts cannot be cut so")
    names = args.sides or [*OURS, *(("trl_grpo", "trl_distillation") if args.trl_python else ())]
    if not args.trl_python and any(name.startswith("trl_") for name in names):
        parser.error("--sides of TRL need --trl-python")
    with tempfile.TemporaryDirectory() as folder:
        student, teacher = make_models(shape, Path(folder))
        common = ["--shape", args.shape, "--student", student, "--teacher", teacher, "--threads", str(args.threads)]
        common += ["--scale", str(args.scale)]
        sides: list[Side] = []
        for name in names:
            if name in OURS:
                command = [sys.executable, str(HERE / "against_trl.py"), "--one", name, "--rounds", str(args.rounds)]
                sides += [Side(f"{name}@{size}", [*command, *common, "--tokens", str(size)]) for size in args.tokens]
            else:
                command = [args.trl_python, str(HERE / "trl_side.py"), "--method", name.removeprefix("trl_")]
                command += ["--steps", str(steps), *common]
                sizes = args.rows or [shape.rows]
                sides += [Side(f"{name}@{size}", [*command, "--rows", str(size)]) for size in sizes]
        try:
            for side in sides:
                side.start(args.threads)
            for number in range(args.rounds + 1):
                for side in sides:
                    row = side.step()
                    print(f"round {number} {side.name}: {row['seconds']:.3f} s", file=sys.stderr, flush=True)
                    if number:
                        side.rows.append(row)
        finally:
            for side in sides:
                side.stop()
    report, same = summary(args, shape, sides)
    print(json.dumps(report))
    return 0 if same else 1


def summary(args: argparse.Namespace, shape: Shape, sides: list[Side]) -> tuple[dict[str, Any], bool]:
    """Medians of each side, ratios of the tuned ones, and whether all did the same work."""
    found: dict[str, dict[str, Any]] = {}
    for side in sides:
        stages = {
            key: statistics.median(row["stages"].get(key, 0.0) for row in side.rows) for key in side.rows[0]["stages"]
        }
        seconds = statistics.median(row["seconds"] for row in side.rows)
        if side.name.startswith("trl_"):  # what its own stages leave: everything but the model that generates
            stages["rest"] = seconds - sum(stages.values())
        found[side.name] = {
            "step_s": round(seconds, 4),
            "spread_s": round(max(row["seconds"] for row in side.rows) - min(row["seconds"] for row in side.rows), 4),
            "stages_s": {key: round(value, 4) for key, value in stages.items()},
            "peak_rss_mb": round(side.rows[-1]["peak_rss_mb"], 1),
            "before_first_step_mb": round(side.first["peak_rss_mb"], 1),
            "work": {key: side.rows[-1][key] for key in SAME},
            "weights_moved": side.rows[-1]["weights_moved"],
            "versions": side.first["versions"],
        }
    ratios: dict[str, Any] = {}
    by_name = {side.name: side for side in sides}
    for ours, theirs in PAIRS:
        own = [name for name in found if name.split("@")[0] == ours]
        other = [name for name in found if name.split("@")[0] == theirs]
        if not own or not other:
            continue
        fast, slow = (min(group, key=lambda name: found[name]["step_s"]) for group in (own, other))
        small, large = (min(group, key=lambda name: found[name]["peak_rss_mb"]) for group in (own, other))
        paired = [
            one["seconds"] / two["seconds"] for one, two in zip(by_name[fast].rows, by_name[slow].rows, strict=True)
        ]
        ratios[f"{ours} / {theirs}"] = {
            "step": round(statistics.median(paired), 3),
            "steps_from_to": [round(min(paired), 3), round(max(paired), 3)],
            "of": [fast, slow],
            "memory_of_these": round(found[fast]["peak_rss_mb"] / found[slow]["peak_rss_mb"], 3),
            "memory_of_the_smallest": round(found[small]["peak_rss_mb"] / found[large]["peak_rss_mb"], 3),
            "smallest": [small, large],
        }
    works = [entry["work"] for entry in found.values()]
    expected = {"generated": sum(shape.lengths()), "trained": sum(shape.lengths()), "optimiser_steps": args.rounds + 1}
    same = all(work == works[0] and all(work[key] == value for key, value in expected.items()) for work in works)
    report = {
        "benchmark": "against_trl", "shape": args.shape, "scale": args.scale, "rounds": args.rounds,
        "threads": args.threads, "rollouts": shape.rows, "same_work": same, "ratios": ratios, "sides": found,
    }  # fmt: skip
    return report, same


if __name__ == "__main__":
    raise SystemExit(main())
