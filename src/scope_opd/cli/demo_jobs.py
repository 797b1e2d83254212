"""The jobs of ``scope demo``, what a worker process does with one, and the figures that come out."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import signal
import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from scope_opd.config import Config, load_config
from scope_opd.errors import ScopeError

Kind = Literal["training", "evaluation"]
TRAINING_SHARE = 0.6
"""Part of a training job's bar that its steps fill; the rest is its evaluation."""


@dataclass(frozen=True, slots=True)
class Job:
    """A training with its evaluation, or the evaluation of a model as it is.

    Attributes:
        name: its folder's name.
        label: "start" or "teacher" for an evaluation.
        values: the config as plain values, since a worker gets it pickled.
    """

    kind: Kind
    name: str
    folder: Path
    values: dict[str, Any]
    label: str = ""

    @property
    def log(self) -> Path:
        """What the worker said meanwhile."""
        return self.folder.parent / "logs" / f"{self.name}.log"

    def progress(self) -> tuple[float, str]:
        """(share done, state) from the run folder."""
        try:
            status = json.loads((self.folder / "status.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return 0.0, "waits"
        steps = int(self.values["train"]["steps"])
        if status["phase"] in ("evaluation", "saving", "done") and status["step"] >= steps - 1:
            return TRAINING_SHARE if self.kind == "training" else 0.0, str(status["phase"])
        return TRAINING_SHARE * status["step"] / steps, f"step {status['step']}/{steps}"


def demo_config(overrides: Sequence[str]) -> Config:
    """The demo's config, which is part of the package, with overrides."""
    with resources.as_file(resources.files("scope_opd").joinpath("configs", "demo.toml")) as path:
        return load_config(path, overrides)


def build_jobs(base: Config, out: Path, methods: Sequence[str], seeds: int) -> list[Job]:
    """All jobs, the longest first. The methods differ in ``objective.method``, seed and folder, in nothing else."""
    jobs = []
    values = base.model_dump(mode="json")
    evaluated = {"teacher": base.teacher.path, "start": base.model.path}
    for label, path in evaluated.items():
        folder = out / label
        own = {**values, "model": {**values["model"], "path": path}, "run": {**values["run"], "dir": str(folder)}}
        jobs.append(Job("evaluation", label, folder, own, label))
    for seed in range(seeds):
        for method in methods:
            folder = out / f"{method}-{seed}"
            own = {
                **values,
                "objective": {**values["objective"], "method": method},
                "run": {**values["run"], "dir": str(folder), "seed": seed, "export": method == "scope", "keep_last": 1},
            }
            jobs.append(Job("training", folder.name, folder, own))
    return jobs


def begin_worker() -> None:
    """Set up a worker: one thread, quiet on Ctrl-C (the parent ends it), gone when the parent is gone."""
    import multiprocessing

    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()

    def follow() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def run_job(job: Job) -> str | None:
    """Do a job in this process; what it prints goes to its log.

    Returns:
        None, or the line of the error that ended it.
    """
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("w", encoding="utf-8") as log, contextlib.redirect_stderr(log), contextlib.redirect_stdout(log):
        try:
            config = Config.model_validate(job.values)
            if job.kind == "training":
                _train(config)
            else:
                _evaluate(config, job)
        except ScopeError as error:
            print(f"error: {error}")
            return str(error)
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {' '.join(str(error).split())}"
    return None


def _train(config: Config) -> None:
    from scope_opd.cli.engines import build_engines
    from scope_opd.train.loop import train

    built = build_engines(config)
    print("\n".join(f"warning: {line}" for line in built.warnings))
    train(config, built.engines, progress=False)


def _evaluate(config: Config, job: Job) -> None:
    """An evaluation folder: run.json and eval.jsonl, as reports read them."""
    import asyncio

    from scope_opd.cli.engines import build_model_evaluator
    from scope_opd.records import write_jsonl

    job.folder.mkdir(parents=True, exist_ok=True)
    info = {"kind": "evaluation", "label": job.label, "model": config.model.path, "seed": config.run.seed}
    (job.folder / "run.json").write_text(json.dumps(info), encoding="utf-8")
    status = {"step": config.train.steps, "phase": "evaluation", "pid": os.getpid()}
    (job.folder / "status.json").write_text(json.dumps(status), encoding="utf-8")
    write_jsonl(job.folder / "eval.jsonl", asyncio.run(build_model_evaluator(config)(0, 0)))
    (job.folder / "status.json").write_text(json.dumps({**status, "phase": "done"}), encoding="utf-8")


def summarise_demo(base: Config, jobs: Sequence[Job], *, seconds: float, workers: int) -> dict[str, Any]:
    """Every figure of a demo with the settings that it holds for; percentages, 95 % intervals over problems."""
    from scope_opd import __version__
    from scope_opd.report.groups import group_runs
    from scope_opd.report.load import load_run
    from scope_opd.report.results import Estimate, collect, compare

    runs = [load_run(job.folder) for job in jobs]
    groups, notes = group_runs(runs)
    results = collect(groups, runs)

    def shown(estimate: Estimate | None) -> dict[str, Any] | None:
        if estimate is None:
            return None
        ends = None if estimate.low is None else [estimate.low, estimate.high]
        return {"value": estimate.value, "ci95": ends, "per_seed": list(estimate.per_seed)}

    lines, differences = [], []
    for line in results.lines:
        runs_of = line.group.runs if line.group is not None else []
        entropies = [run.metrics[-1].get("entropy") for run in runs_of if run.metrics]
        figures = {}
        for temperature, found in line.by_temperature.items():
            ks = [k for k in (1 << power for power in range(10)) if k <= found.n]
            figures[f"{temperature:g}"] = {
                "n": found.n,
                "problems": len(found.ids or ()),
                "avg@k": shown(found.estimate(1)),
                "pass@k": {str(k): shown(found.estimate(k)) for k in ks},
                "pass@k_with_replacement": {str(k): found.with_replacement(k) for k in ks},
                "truncated": _mean([row.get("truncated") for row in found.stored]),
                "distinct_solutions": _mean([row.get("distinct_solutions") for row in found.stored]),
                "mean_length": _mean([row.get("mean_length") for row in found.stored]),
            }
        lines.append(
            {
                "label": line.label,
                "role": line.role,
                "method": line.group.method if line.group is not None else None,
                "seeds": [run.seed for run in runs_of],
                "entropy_of_last_batch": _mean(entropies),
                "by_temperature": figures,
            }
        )
    ours = next((line for line in results.lines if line.group is not None and line.group.method == "scope"), None)
    for other in results.lines:
        if ours is None or other is ours or other.role == "teacher":
            continue
        for temperature, found in other.by_temperature.items():
            for k in (1, 4, 8):
                difference = compare(results, ours, other, temperature, k)
                if difference is not None:
                    differences.append(
                        {
                            "of": f"{ours.label} - {other.label}",
                            "temperature": temperature,
                            "figure": f"avg@{found.n}" if k == 1 else f"pass@{k}",
                            "value": difference.value,
                            "ci95": [difference.low, difference.high],
                            "seed_margin": difference.seed_margin,
                            "resolved": difference.resolved,
                        }
                    )
    return {
        "what": "percentages on held-out problems; ci95: bootstrap over problems, for these very models; "
        "seed_margin: half the 95 % t interval over seeds; resolved: both exclude 0",
        "settings": base.model_dump(mode="json"),
        "environment": {
            "scope_version": __version__,
            "python": platform.python_version(),
            "torch": version("torch"),
            "transformers": version("transformers"),
            "cores": os.cpu_count(),
            "worker_processes": workers,
            "seconds": round(seconds, 1),
        },
        "results": lines,
        "differences": differences,
        "notes": [*notes, *results.notes],
    }


def print_table(summary: dict[str, Any]) -> None:
    """The answer on the terminal: a line a method, and SCOPE's differences."""
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(width=None if Console().is_terminal else 100)
    temperatures = sorted({float(name) for line in summary["results"] for name in line["by_temperature"]})
    seeds = max((len(line["seeds"]) for line in summary["results"]), default=0)
    problems = max(
        (entry["problems"] for line in summary["results"] for entry in line["by_temperature"].values()), default=0
    )
    console.print(
        f"\n{problems} held-out problems, per cent [95 % interval over problems], {seeds} seeds a method",
        markup=False,
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("", no_wrap=True)
    columns = []
    for temperature in temperatures:
        found = [line["by_temperature"].get(f"{temperature:g}") for line in summary["results"]]
        n = min(entry["n"] for entry in found if entry)
        ks = [k for k in ((4, 8) if temperature < 1 else (32,)) if k <= n]
        columns.append((temperature, ks))
        table.add_column(f"T={temperature:g} Avg@{n}", justify="right", no_wrap=True)
        for k in ks:
            table.add_column(f"Pass@{k}", justify="right", no_wrap=True)
    table.add_column("entropy", justify="right", no_wrap=True)
    for line in summary["results"]:
        cells = [line["label"]]
        for temperature, ks in columns:
            entry = line["by_temperature"].get(f"{temperature:g}")
            cells.append(_with_interval(entry["avg@k"]) if entry else "-")
            cells += [f"{entry['pass@k'][str(k)]['value']:.1f}" if entry else "-" for k in ks]
        entropy = line["entropy_of_last_batch"]
        cells.append("-" if entropy is None else f"{entropy:.3f}")
        table.add_row(*map(escape, cells))
    console.print(table)
    for row in sorted(summary["differences"], key=lambda row: float(row["temperature"])):
        if row["figure"].startswith("avg"):
            low, high = row["ci95"]
            margin = "" if row["seed_margin"] is None else f", seeds +-{row['seed_margin']:.1f}"
            verdict = "" if row["resolved"] else ": not resolved"
            console.print(
                f"{row['of']}: {row['value']:+.1f} points of {row['figure'].capitalize()} at T={row['temperature']:g} "
                f"[{low:+.1f}, {high:+.1f}]{margin}{verdict}",
                highlight=False,
                markup=False,
            )
    for note in summary["notes"]:
        console.print(f"note: {note}", highlight=False, markup=False)


def _with_interval(estimate: dict[str, Any]) -> str:
    ends = estimate["ci95"]
    return f"{estimate['value']:.1f}" + (f" [{ends[0]:.1f}, {ends[1]:.1f}]" if ends else "")


def _mean(values: Sequence[Any]) -> float | None:
    found = [float(value) for value in values if value is not None]
    return sum(found) / len(found) if found else None
