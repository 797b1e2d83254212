"""From stored samples to results.json: the figures of each benchmark, macro averages, and the counts behind them.

Everything in results.json is a function of the settings and the samples, and all figures can be computed again from
what is in it: each benchmark lists its problems with their samples, correct ones, lengths and distinct answers.

Figures of a benchmark (``metrics``): those of ``metrics.summarise`` with 95 % intervals over problems, and

    truncated        share of samples that ended at max_tokens; None where it is not known of some
    no_verdict       share of samples that could not be judged; they count as not correct
    length           response tokens (characters where there are no tokens): mean, median, 95th percentile
    distinct         mean over problems of the number of different final answers among its samples
    no_answer        share of samples without a final answer
    nll              mean over response tokens of -log-prob of the distribution they were drawn from

Not covered: tables (``tables``), comparisons (``compare``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from scope_opd.evaluate.intervals import RESAMPLES, macro_interval
from scope_opd.evaluate.metrics import figures, pass_at_k_with_replacement, powers_of_two, summarise
from scope_opd.evaluate.session import Task
from scope_opd.evaluate.store import SampleStore
from scope_opd.verify.boxed import normalise

FORMAT = "scope-evaluation-1"
"""What ``format`` says in results.json; another number where its shape changes."""
BOOTSTRAP_SEED = 0


def build_results(
    tasks: Sequence[Task], store: SampleStore, settings: Mapping[str, Any], data: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """The object of results.json.

    Args:
        tasks: the evaluation, complete in ``store``.
        store: its samples.
        settings: as they stand in settings.json.
        data: what is recorded of each benchmark's data, by name.
    """
    benchmarks = {
        task.name: {"data": dict(data[task.name]), **benchmark_results(task, store, resamples=RESAMPLES)}
        for task in tasks
    }
    return {
        "format": FORMAT,
        "settings": dict(settings),
        "bootstrap": {"resamples": RESAMPLES, "seed": BOOTSTRAP_SEED, "level": 0.95},
        "benchmarks": benchmarks,
        "macro": macro(benchmarks) if len(benchmarks) > 1 else None,
    }


def benchmark_results(task: Task, store: SampleStore, *, resamples: int) -> dict[str, Any]:
    """``{"metrics": .., "problems": [..]}`` of one benchmark."""
    problems, samples = [], []
    for prompt in task.prompts:
        rows = [store.samples[key] for key in task.keys([prompt])]
        samples += rows
        problems.append(_problem(task.problem(prompt.id), rows))
    unit = "tokens" if all(row["tokens"] is not None for row in samples) else "characters"
    for problem in problems:
        problem["lengths"] = problem.pop(unit)
        problem.pop("characters" if unit == "tokens" else "tokens")
    counts = [problem["correct"] for problem in problems]
    ns = [problem["n"] for problem in problems]
    n = ns[0] if len(set(ns)) == 1 else ns
    found = summarise(counts, n, seed=BOOTSTRAP_SEED, resamples=resamples)
    del found["correct_counts"]
    if not isinstance(n, int):
        found["n"] = {"smallest": min(ns), "largest": max(ns)}
    total = len(samples)
    scored = [(row["nll"], row["tokens"]) for row in samples if row["nll"] is not None]
    tokens = sum(length for _, length in scored)
    metrics = {
        **found,
        "samples": total,
        "truncated": _share(row["finish_reason"] == "length" if row["finish_reason"] else None for row in samples),
        "no_verdict": sum(row["correct"] is None for row in samples) / total,
        "no_answer": sum(row["extracted"] is None for row in samples) / total,
        "length": {"unit": unit, **_quantiles([length for problem in problems for length in problem["lengths"]])},
        "distinct": sum(problem["distinct"] for problem in problems) / len(problems),
        "nll": math.fsum(nll * length for nll, length in scored) / tokens if len(scored) == total else None,
    }
    return {"metrics": metrics, "problems": problems}


def macro(benchmarks: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Means over benchmarks, each weighing the same, at the k that all have; intervals resample within benchmarks."""
    tables = {name: counts_of(entry) for name, entry in benchmarks.items()}
    smallest = min(int(ns.min()) for _, ns in tables.values())
    shared = set.intersection(*({int(k) for k in entry["metrics"]["pass@k"]} for entry in benchmarks.values()))
    ks = sorted(k for k in {*shared, *powers_of_two(smallest)} if k <= smallest)
    values = {name: figures(counts, ns, ks) for name, (counts, ns) in tables.items()}
    found = {
        figure: macro_interval([values[name][figure] for name in tables], seed=BOOTSTRAP_SEED, shares=True)
        for figure in ("avg@k", *(f"pass@{k}" for k in ks))
    }
    biased = {
        str(k): float(np.mean([pass_at_k_with_replacement(c, n, k).mean() for c, n in tables.values()])) for k in ks
    }
    return {
        "benchmarks": list(tables),
        "avg@k": found["avg@k"].value,
        "pass@k": {str(k): found[f"pass@{k}"].value for k in ks},
        "pass@k_with_replacement": biased,
        "ci95": {name: [interval.low, interval.high] for name, interval in found.items()},
    }


def counts_of(entry: Mapping[str, Any]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """I[P] correct samples and I[P] samples of a benchmark in results.json."""
    problems = entry["problems"]
    return np.array([p["correct"] for p in problems]), np.array([p["n"] for p in problems])


def _problem(name: str, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    answers = {normalise(row["extracted"]) for row in rows if row["extracted"] is not None}
    endings = [row["finish_reason"] for row in rows]
    return {
        "id": name,
        "n": len(rows),
        "correct": sum(row["correct"] is True for row in rows),
        "no_verdict": sum(row["correct"] is None for row in rows),
        "truncated": sum(ends == "length" for ends in endings) if all(endings) else None,
        "distinct": len(answers),
        "tokens": [row["tokens"] for row in rows],
        "characters": [row["characters"] for row in rows],
    }


def _share(flags: Any) -> float | None:
    found = list(flags)
    return None if None in found else sum(found) / len(found)


def _quantiles(lengths: Sequence[int]) -> dict[str, float]:
    """The median and the 95th percentile are lengths that occur: the smallest that such a share does not exceed."""
    ordered = sorted(lengths)
    ranks = {"median": 0.5, "p95": 0.95}
    found = {name: float(ordered[max(0, math.ceil(share * len(ordered)) - 1)]) for name, share in ranks.items()}
    return {"mean": math.fsum(ordered) / len(ordered), **found}
