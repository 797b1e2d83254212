"""The answer of a report: Avg@k and Pass@k of start, methods and teacher, and SCOPE's paired differences.

Everything is recomputed from the counts in eval.jsonl with ``evaluate.metrics``; rows without counts show the figures
and interval they were written with, and cannot be compared in pairs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scope_opd.evaluate.metrics import (
    PairedDifference,
    SeedSpread,
    bootstrap_interval,
    paired_difference,
    pass_at_k,
    pass_at_k_with_replacement,
    pooled_seed_spread,
)
from scope_opd.report.groups import Group
from scope_opd.report.load import Run, number, numbers

FloatArray = NDArray[np.float64]
PREFERRED_KS = (1, 4, 8, 32)


@dataclass(frozen=True, slots=True)
class Estimate:
    """A figure in percent; ``low`` and ``high`` are None where no interval can be had."""

    value: float
    low: float | None
    high: float | None
    per_seed: tuple[float, ...]


@dataclass(slots=True)
class Evaluated:
    """One line of the table at one temperature: the same problems answered by every seed.

    Attributes:
        counts: I[S, P], or None where a row came without counts.
        ids: P problem ids, None where a row came without.
        stored: the rows as written, one a seed.
    """

    n: int
    counts: NDArray[np.int64] | None
    ids: tuple[str, ...] | None
    stored: list[dict[str, Any]]

    def values(self, k: int) -> FloatArray:
        """Pass@k of each problem, F[S, P]; k = 1 is Avg@n."""
        assert self.counts is not None
        return pass_at_k(self.counts, self.n, k)

    def estimate(self, k: int) -> Estimate | None:
        if k > self.n:
            return None
        if self.counts is not None:
            values = 100.0 * self.values(k)
            interval = bootstrap_interval(values)
            return Estimate(interval.value, interval.low, interval.high, tuple(values.mean(axis=1).tolist()))
        return self._as_stored(k)

    def with_replacement(self, k: int) -> float | None:
        """The biased Pass@k of the method's first release in percent; None where there is nothing to have it from."""
        if self.counts is not None:
            return 100.0 * float(pass_at_k_with_replacement(self.counts, self.n, k).mean())
        shares = [number(_get(row, "pass@k_with_replacement", str(k))) for row in self.stored]
        found = [100.0 * share for share in shares if share is not None]
        return sum(found) / len(found) if found else None

    def _as_stored(self, k: int) -> Estimate | None:
        shares = [number(row.get("avg@k")) if k == 1 else number(_get(row, "pass@k", str(k))) for row in self.stored]
        found = [100.0 * share for share in shares if share is not None]
        if not found:
            return None
        ends = numbers(_get(self.stored[0], "ci95", "avg@k" if k == 1 else f"pass@{k}"))
        low, high = (100.0 * ends[0], 100.0 * ends[1]) if ends and len(ends) == 2 and len(found) == 1 else (None, None)
        return Estimate(sum(found) / len(found), low, high, tuple(found))


@dataclass(slots=True)
class Line:
    """A line of the result table.

    Attributes:
        role: "start", "method" or "teacher".
        group: the runs behind a method's line.
    """

    role: str
    label: str
    group: Group | None = None
    seeds: str = ""
    by_temperature: dict[float, Evaluated] = field(default_factory=dict)


@dataclass(slots=True)
class Results:
    """Everything above the first figure of a report."""

    lines: list[Line]
    temperatures: list[float]
    notes: list[str]

    def of(self, role: str) -> list[Line]:
        return [line for line in self.lines if line.role == role]

    def seed_spread(self, temperature: float, k: int) -> SeedSpread | None:
        """Pooled over the methods, in percentage points."""
        found = [line.by_temperature.get(temperature) for line in self.of("method")]
        return pooled_seed_spread([100.0 * e.values(k) for e in found if e and e.counts is not None and k <= e.n])

    def ks(self, temperature: float) -> list[int]:
        """The k of the table's columns: 1, 4, 8, 32 and the largest n, as far as every line has them."""
        ns = [line.by_temperature[temperature].n for line in self.lines if temperature in line.by_temperature]
        smallest = min(ns)
        return sorted({k for k in PREFERRED_KS if k <= smallest} | {smallest})


def collect(groups: Sequence[Group], runs: Sequence[Run]) -> Results:
    """Start, methods and teacher from training runs (first and last evaluations) and evaluation folders."""
    notes: list[str] = []
    lines = [*_start_lines(groups, runs, notes)]
    for group in groups:
        rows = {run.name: _final(run) for run in group.runs}
        missing = [name for name, found in rows.items() if not found]
        if missing:
            notes.append(f"{group.label}: no evaluation after the start in {', '.join(missing)}.")
        last = {max(row["step"] for row in found) for found in rows.values() if found}
        if len(last) > 1:
            steps = ", ".join(map(str, sorted(last)))
            notes.append(f"{group.label}: the seeds’ last evaluations are of different steps ({steps}).")
        line = Line("method", group.label, group, group.seeds)
        _fill(line, [row for found in rows.values() for row in found], notes)
        lines.append(line)
    by_label: dict[str, list[Run]] = {}
    for run in runs:
        if run.kind == "evaluation" and (run.label or "").lower() != "start":
            by_label.setdefault(run.label or run.name, []).append(run)
    for label, same in by_label.items():
        role = "teacher" if label.lower() == "teacher" else "method"
        line = Line(role, "Teacher" if role == "teacher" else label)
        _fill(line, [row for run in same for row in run.evals], notes)
        lines.append(line)
    order = {"start": 0, "method": 1, "teacher": 2}
    lines.sort(key=lambda line: order[line.role])
    temperatures = sorted({temperature for line in lines for temperature in line.by_temperature})
    return Results(lines, temperatures, notes)


def _final(run: Run) -> list[dict[str, Any]]:
    """The last step's rows after step 0, one a temperature."""
    later = [row for row in run.evals if row["step"] > 0]
    return [row for row in later if row["step"] == later[-1]["step"]]


def _start_lines(groups: Sequence[Group], runs: Sequence[Run], notes: list[str]) -> list[Line]:
    """The start: an evaluation folder labelled "start", else what training runs evaluated at step 0, by model."""
    given = [run for run in runs if run.kind == "evaluation" and (run.label or "").lower() == "start"]
    if given:
        line = Line("start", "Start")
        _fill(line, [row for run in given for row in run.evals], notes)
        return [line]
    by_model: dict[str, list[dict[str, Any]]] = {}
    for run in (run for group in groups for run in group.runs):
        by_model.setdefault(str(run.info.get("model")), []).extend(row for row in run.evals if row["step"] == 0)
    lines = []
    for model, rows in by_model.items():
        # methods that share a seed share their start's draws: the same counts are one evaluation, not two
        distinct = {
            (row["temperature"], row["n"], str(row.get("correct_counts")), row.get("avg@k")): row for row in rows
        }
        line = Line("start", "Start" if len(by_model) == 1 else f"Start · {model}")
        _fill(line, list(distinct.values()), notes)
        if line.by_temperature:
            lines.append(line)
    return lines


def _fill(line: Line, rows: Sequence[dict[str, Any]], notes: list[str]) -> None:
    """Put rows (one a seed and temperature) together by temperature, on the problems that all of them answered."""
    for temperature in sorted({float(row["temperature"]) for row in rows}):
        here = [row for row in rows if row["temperature"] == temperature]
        n = Counter(int(row["n"]) for row in here).most_common(1)[0][0]
        if any(row["n"] != n for row in here):
            notes.append(f"{line.label}: evaluations with another n than {n} at T = {temperature:g} are left out.")
        same_n = [row for row in here if row["n"] == n]
        if n >= 1:
            line.by_temperature[temperature] = _evaluated(line.label, n, same_n, notes)


def _evaluated(label: str, n: int, rows: list[dict[str, Any]], notes: list[str]) -> Evaluated:
    counts = [numbers(row.get("correct_counts")) for row in rows]
    usable = [c for c in counts if c and all(v.is_integer() and 0 <= v <= n for v in c)]
    if len(usable) < len(rows):
        notes.append(f"{label}: an evaluation came without usable correct_counts; its figures are shown as written.")
        return Evaluated(n, None, None, rows)
    ids = [_ids(row, len(c)) for row, c in zip(rows, usable, strict=True)]
    shared = [name for name in ids[0] if all(name in set(other) for other in ids)]
    if not shared:
        notes.append(f"{label}: its seeds answered different problems; their figures are averaged without interval.")
        return Evaluated(n, None, None, rows)
    if any(len(other) != len(shared) for other in ids):
        notes.append(f"{label}: seeds answered different sets of problems; the {len(shared)} in common are used.")
    table = [[dict(zip(names, c, strict=True))[name] for name in shared] for names, c in zip(ids, usable, strict=True)]
    return Evaluated(n, np.asarray(table, dtype=np.int64), tuple(shared), rows)


def _ids(row: dict[str, Any], problems: int) -> list[str]:
    """Problem ids; the position stands in where a row has none (or not one a problem)."""
    ids = row.get("problem_ids")
    if isinstance(ids, list) and len({str(name) for name in ids}) == problems == len(ids):
        return [str(name) for name in ids]
    return [f"#{index}" for index in range(problems)]


def compare(results: Results, a: Line, b: Line, temperature: float, k: int) -> PairedDifference | None:
    """a minus b in percentage points on the problems that both answered; None where they cannot be paired."""
    left, right = a.by_temperature.get(temperature), b.by_temperature.get(temperature)
    if left is None or right is None or left.counts is None or right.counts is None or k > min(left.n, right.n):
        return None
    places = {name: place for place, name in enumerate(right.ids or ())}
    pairs = [(place, places[name]) for place, name in enumerate(left.ids or ()) if name in places]
    if len(pairs) < 2:
        return None
    first, second = (list(side) for side in zip(*pairs, strict=True))
    spread = results.seed_spread(temperature, k)
    return paired_difference(100.0 * left.values(k)[:, first], 100.0 * right.values(k)[:, second], spread=spread)


def main_line(results: Results) -> Line | None:
    """The line that the headline is about: the first method named scope, else the first method evaluated."""
    methods = [line for line in results.of("method") if line.by_temperature]
    ours = [line for line in methods if line.group is not None and line.group.method == "scope"]
    return next(iter([*ours, *methods]), None)


def start_of(line: Line, results: Results) -> Line | None:
    """The start that belongs to a method: the one of its model where there are several."""
    starts = results.of("start")
    if len(starts) <= 1 or line.group is None:
        return next(iter(starts), None)
    model = str(line.group.runs[0].info.get("model"))
    return next((start for start in starts if start.label == f"Start · {model}"), None)


def _get(row: dict[str, Any], *keys: str) -> Any:
    value: Any = row
    for key in keys:
        value = value.get(key) if isinstance(value, dict) else None
    return value
