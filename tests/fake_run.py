"""Writes plausible run folders in the documented format, for tests of the report (a fixture of the format, no trainer).

``python tests/fake_run.py FOLDER`` writes four methods with two seeds each and the teacher's evaluation.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w

from scope_opd.evaluate.metrics import summarise

# (final Avg at T=0.6, at T=1, final entropy)
ENDS = {
    "scope": (0.66, 0.24, 0.61),
    "dual_path": (0.65, 0.235, 0.615),
    "opd": (0.56, 0.15, 0.74),
    "grpo": (0.565, 0.18, 0.64),
}
START = (0.253, 0.047, 0.77)
TEACHER = (0.97, 0.78, 0.2)


def write_run(
    path: Path,
    method: str = "scope",
    seed: int = 0,
    *,
    steps: int = 50,
    problems: int = 200,
    n: int = 32,
    objective: dict[str, Any] | None = None,
    tokens: bool = True,
    evaluate: bool = True,
    timeline: bool = False,
) -> Path:
    """One finished training run; ``objective`` adds settings to its table, ``timeline`` the spans of served engines."""
    rng = np.random.default_rng([seed, sorted(ENDS).index(method) if method in ENDS else 9])
    path.mkdir(parents=True)
    config = {
        "model": {"path": "zoo:student"},
        "teacher": {"path": "zoo:teacher"},
        "rollout": {"n": 8, "temperature": 0.6, "max_tokens": 64},
        "objective": {"method": method, "tau": 1.0, **(objective or {})},
        "train": {"steps": steps, "prompts_per_step": 16, "lr": 3e-4},
        "run": {"dir": f"runs/{path.name}", "seed": seed},
    }
    (path / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
    info = {
        "run_id": f"{method}-{seed}",
        "scope_version": "0.1.0",
        "created": "2026-06-01T10:00:00Z",
        "method": method,
        "seed": seed,
        "model": "zoo:student",
        "teacher": "zoo:teacher",
        "python": "3.11.9",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "device": "cpu",
        "first_prompt": "-2 +15 -15 -6 :",
    }
    (path / "run.json").write_text(json.dumps(info), encoding="utf-8")
    end = ENDS.get(method, ENDS["opd"])
    write_jsonl(path / "metrics.jsonl", [metrics_row(rng, method, step, steps, end) for step in range(1, steps + 1)])
    if timeline:
        write_jsonl(path / "timeline.jsonl", [timeline_row(method, step) for step in range(1, steps + 1)])
    write_jsonl(
        path / "rollouts.jsonl",
        [row for step in range(1, steps + 1) for row in rollout_rows(rng, method, step, end, steps, tokens=tokens)],
    )
    if evaluate:
        rows = eval_rows(seed, 0, START, problems, n)
        rows += eval_rows(seed, steps, end, problems, n, shift=float(rng.normal(0, 0.01)))
        write_jsonl(path / "eval.jsonl", rows)
    uniform = method == "scope" and seed == 0
    events = [{"step": 12, "kind": "alarm", "message": "ess/student = 0.996: tau does nothing here"}] if uniform else []
    write_jsonl(path / "events.jsonl", [*events, {"step": steps, "kind": "checkpoint", "message": f"step-{steps:06d}"}])
    (path / "status.json").write_text(json.dumps({"step": steps, "phase": "done", "pid": 1}), encoding="utf-8")
    return path


def write_evaluation(path: Path, label: str, ends: tuple[float, float, float] = TEACHER, **sizes: int) -> Path:
    """A folder with an evaluation only: the teacher's or the start's."""
    path.mkdir(parents=True)
    info = {"kind": "evaluation", "label": label, "model": f"zoo:{label}", "created": "2026-06-01T09:00:00Z"}
    (path / "run.json").write_text(json.dumps(info), encoding="utf-8")
    write_jsonl(path / "eval.jsonl", eval_rows(0, 0, ends, sizes.get("problems", 200), sizes.get("n", 32)))
    return path


def write_demo(folder: Path, **kwargs: Any) -> list[Path]:
    """Four methods, two seeds each, and the teacher."""
    runs = [write_run(folder / f"{method}-s{seed}", method, seed, **kwargs) for method in ENDS for seed in (0, 1)]
    sizes = {key: value for key, value in kwargs.items() if key in ("problems", "n")}
    return [*runs, write_evaluation(folder / "teacher", "teacher", **sizes)]


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, allow_nan=False) + "\n" for row in rows), encoding="utf-8")


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def eval_rows(
    seed: int, step: int, ends: tuple[float, float, float], problems: int, n: int, shift: float = 0.0
) -> list[dict[str, Any]]:
    """Both temperatures; a problem's difficulty is the same for every seed and method."""
    difficulty = np.random.default_rng(7).normal(0, 0.9, problems)
    rng = np.random.default_rng([seed, step])
    rows = []
    for temperature, mean in zip((0.6, 1.0), ends[:2], strict=True):
        logit = np.log(mean / (1 - mean)) + shift * 5
        counts = rng.binomial(n, 1 / (1 + np.exp(-(logit * 1.15 + difficulty))))
        row = {"step": step, "temperature": temperature, **summarise(counts.tolist(), n, resamples=200)}
        extra = {"truncated": 0.004, "mean_length": 36.2, "distinct_solutions": 5.1, "nll": 0.3}
        rows.append({**row, **extra, "problem_ids": [f"zoo-heldout-{i:05d}" for i in range(problems)]})
    return rows


def metrics_row(
    rng: np.random.Generator, method: str, step: int, steps: int, end: tuple[float, float, float]
) -> dict[str, Any]:
    progress = 1 - np.exp(-3 * step / steps)
    accuracy = float(np.clip(START[0] + (end[0] - START[0]) * progress + rng.normal(0, 0.04), 0, 1))
    teacher_s = 0.0 if method == "grpo" else 0.16 if method == "opd" else 0.07
    times = {
        "time/generation_s": 0.31 + abs(rng.normal(0, 0.02)),
        "time/verify_s": 0.003,
        "time/teacher_s": teacher_s,
        "time/update_s": 0.38 + abs(rng.normal(0, 0.02)),
    }
    weighted = method in ("scope", "dual_path")
    return {
        "step": step,
        "loss": float(rng.normal(0, 0.1)),
        "grad_norm": float(abs(rng.normal(1, 0.2))),
        "lr": 3e-4,
        "reward/mean": accuracy,
        "accuracy": accuracy,
        "pass@n": float(np.clip(accuracy + 0.35 * (1 - accuracy) + 0.05 * rng.normal(), 0, 1)),
        "entropy": float(START[2] + (end[2] - START[2]) * progress + rng.normal(0, 0.012)),
        "length/mean": float(36 + rng.normal(0, 0.7)),
        "truncated/share": float(max(0.0, 0.03 * (1 - progress) + rng.normal(0, 0.004))),
        "ess/student": (1.0 if method == "dual_path" else float(0.996 - abs(rng.normal(0, 0.002))))
        if weighted
        else None,
        "ess/teacher": (1.0 if method == "dual_path" else float(0.966 - abs(rng.normal(0, 0.01))))
        if weighted
        else None,
        **times,
        "time/step_s": sum(times.values()) + 0.04,
        "perf/tokens_per_s": 9500.0 + float(rng.normal(0, 200)),
        "perf/peak_rss_mb": 610.0,
    }


def timeline_row(method: str, step: int) -> dict[str, Any]:
    """A streamed step: the teacher works behind generation and update, but for half a second (step 2: all alone)."""
    generation = 10.0 + (step % 3)
    verify = [[2.0 + i / 4, 2.05 + i / 4] for i in range(int(4 * (generation - 2)))]
    spans = {"generation": [[0.3, generation]], "verify": verify, "sync": [[0.0, 0.3]]}
    teacher = [] if method == "grpo" else [[3.0, 5.5], [6.0, generation + 1.5]]
    update = [[generation + 0.5, generation + 1.0], [generation + 1.5, generation + 6]]
    if step == 2 and teacher:
        teacher = [[generation + 0.2, generation + 8.2]]
        update = [[generation + 8.2, generation + 14]]
    row = {"step": step, "seconds": update[-1][1] + 0.1, "spans": {**spans, "teacher": teacher, "update": update}}
    if step == 4:
        row["spans"]["generation"].insert(0, [-1.5, 0.0])  # ran ahead
    return row


def rollout_rows(
    rng: np.random.Generator, method: str, step: int, end: tuple[float, float, float], steps: int, *, tokens: bool
) -> list[dict[str, Any]]:
    """Two whole groups of eight."""
    rows = []
    accuracy = START[0] + (end[0] - START[0]) * (1 - np.exp(-3 * step / steps))
    for which in range(2):
        name = f"zoo-train-{(step * 2 + which) % 2048:05d}"
        items = [(str(rng.choice(["+", "-"])), int(rng.integers(1, 17))) for _ in range(int(rng.integers(8, 13)))]
        members = [one_rollout(rng, name, step, sample, items, rng.random() < accuracy) for sample in range(8)]
        if not tokens:
            for member in members:
                del member["tokens"]
        credit(members, method)
        rows += members
    return rows


def one_rollout(
    rng: np.random.Generator, name: str, step: int, sample: int, items: list[tuple[str, int]], correct: bool
) -> dict[str, Any]:
    total, strings = 0, []
    for sign, value in (items[i] for i in rng.permutation(len(items))):
        total = (total + (value if sign == "+" else -value)) % 23
        strings += [sign, str(value), str(total)]
    strings += ["#", str(total if correct else (total + 3) % 23), "<eos>"]
    student = -rng.gamma(0.35, 0.9, len(strings))
    teacher = student * 0.7 - rng.gamma(0.1, 1.5, len(strings))
    return {
        "id": f"{name}/{step}/{sample}",
        "group": name,
        "step": step,
        "sample": sample,
        "prompt": " ".join(f"{sign}{value}" for sign, value in items) + " :",
        "prompt_token_ids": list(range(len(items) + 1)),
        "token_ids": [int(rng.integers(4, 64)) for _ in strings],
        "tokens": strings,
        "text": " ".join(strings[:-1]),
        "logprobs": student.tolist(),
        "teacher_logprobs": teacher.tolist(),
        "finish_reason": "stop",
        "policy_version": step - 1,
        "correct": bool(correct),
        "reward": float(correct),
        "extracted": strings[-2],
        "masked": False,
    }


def credit(members: list[dict[str, Any]], method: str) -> None:
    """The two numbers of a rollout, roughly as each method gives them, and the advantages that follow."""
    rewards = np.array([member["reward"] for member in members])
    for path in (True, False):
        same = [member for member in members if member["correct"] is path]
        source, sign = ("logprobs", 1.0) if path else ("teacher_logprobs", -1.0)
        nll = np.array([-np.mean(member[source]) for member in same])
        raw = np.exp(sign * (nll - nll.mean())) if method == "scope" and same else np.ones(len(same))
        for member, weight in zip(same, raw / max(raw.sum(), 1e-9), strict=True):
            member["reinforce"], member["distill"] = (float(weight), 0.0) if path else (0.0, float(weight))
    for member in members:
        if method == "opd":
            member["reinforce"], member["distill"] = 0.0, 1.0
        elif method == "grpo":
            spread = rewards.std(ddof=1)
            member["reinforce"] = float((member["reward"] - rewards.mean()) / (spread + 1e-6)) if spread else 0.0
            member["distill"], member["teacher_logprobs"] = 0.0, None
        elif member["correct"]:
            member["teacher_logprobs"] = None
        teacher = member["teacher_logprobs"] or member["logprobs"]
        member["advantages"] = [
            member["reinforce"] + member["distill"] * (t - s) for t, s in zip(teacher, member["logprobs"], strict=True)
        ]


if __name__ == "__main__":
    print("\n".join(str(path) for path in write_demo(Path(sys.argv[1]))))
