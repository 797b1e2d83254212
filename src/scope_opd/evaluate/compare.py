"""Evaluations side by side: paired differences on the same problems, wins and losses, and what makes them incomparable.

The first evaluation is the base; every other is compared with it, problem by problem. For each benchmark and figure
(Avg@k, and Pass@k at every k that all have), and for their macro average over the shared benchmarks:

    difference   mean over problems of (other - base), with the interval of ``intervals`` over problems
    p            two-sided, by flipping signs of the problems' differences: exact up to 14 differences that are not 0
    p_holm       Holm's adjustment over the comparisons of one figure and benchmark, where there is more than one

A problem is won by an evaluation with a higher share of correct samples. Interval and p-value speak of other problems,
for these very models: training again with another seed is not in them.

Not covered: several seeds of one method (the report of run folders), corrections over benchmarks and figures.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scope_opd.errors import DataError
from scope_opd.evaluate.intervals import FloatArray, holm, macro_interval, sign_flip_p_value
from scope_opd.evaluate.metrics import figures, powers_of_two
from scope_opd.evaluate.results import FORMAT, counts_of
from scope_opd.evaluate.store import RESULTS, differences

FORMAT_COMPARISON = "scope-comparison-1"
_MATTERS = ("sampling", "verifier", "prompt", "columns")
"""Settings whose difference makes figures hard to compare, beside those of a benchmark's data."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A results.json that was read, and the name it goes by."""

    label: str
    path: Path
    results: Mapping[str, Any]


def load_evaluations(paths: Sequence[Path]) -> list[Evaluation]:
    """Read results; a folder stands for its results.json. Labels are the shortest ends of the paths that differ.

    Raises:
        DataError: a path without results, or a file that is none.
    """
    files = []
    for path in paths:
        file = path.expanduser() / RESULTS if path.expanduser().is_dir() else path.expanduser()
        if not file.is_file():
            hint = "finish that evaluation first" if file.name == RESULTS and file.parent.is_dir() else "check the path"
            raise DataError(f"{path}: no {RESULTS}", "the results of scope eval, or their folder", hint)
        files.append(file)
    labels = _labels(files)
    return [Evaluation(label, file, _read(file)) for label, file in zip(labels, files, strict=True)]


def compare(evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """The object of comparison.json.

    Raises:
        DataError: no benchmark that all have, or a benchmark whose problems differ.
    """
    base = evaluations[0]
    names = [
        name for name in base.results["benchmarks"] if all(name in other.results["benchmarks"] for other in evaluations)
    ]
    if not names:
        found = "; ".join(f"{each.label} has {', '.join(each.results['benchmarks'])}" for each in evaluations)
        raise DataError(f"no benchmark that all have: {found}", "at least one", "evaluate on the same benchmarks")
    tables = {name: _aligned(name, evaluations) for name in names}
    scopes = {name: [name] for name in names}
    if len(names) > 1:
        scopes["macro"] = names
    compared = {}
    for scope, members in scopes.items():
        smallest = min(int(ns.min()) for member in members for _, ns in tables[member])
        wanted = ["avg@k", *(f"pass@{k}" for k in powers_of_two(smallest) if k > 1)]
        ks = [int(name.removeprefix("pass@")) for name in wanted[1:]]
        values = [[figures(*tables[member][index], ks) for member in members] for index in range(len(evaluations))]
        compared[scope] = {
            "problems": sum(len(tables[member][0][0]) for member in members),
            "figures": {name: _figure([[v[name] for v in each] for each in values], evaluations) for name in wanted},
            "by_problem": _by_problem(values, evaluations) if scope != "macro" else None,
        }
    left = sorted({name for each in evaluations for name in each.results["benchmarks"]} - set(names))
    return {
        "format": FORMAT_COMPARISON,
        "base": base.label,
        "evaluations": {each.label: str(each.path) for each in evaluations},
        "warnings": [*warnings(evaluations, names), *(f"{name}: not in all of them, left out" for name in left)],
        "partial": [name for name in names if any(_partial(each, name) for each in evaluations)],
        "benchmarks": compared,
    }


def warnings(evaluations: Sequence[Evaluation], names: Sequence[str]) -> list[str]:
    """What differs between the first evaluation and each other and matters to a comparison."""
    base, lines = evaluations[0], []
    for other in evaluations[1:]:
        ours, theirs = base.results["settings"], other.results["settings"]
        pairs: list[tuple[str, Any, Any]] = [(key, ours.get(key), theirs.get(key)) for key in _MATTERS]
        for name in names:
            a, b = (each.results["benchmarks"][name] for each in (base, other))
            pairs.append((f"{name}: samples a problem", a["metrics"]["n"], b["metrics"]["n"]))
            for key in ("content_sha256", "partial"):
                pairs += [(f"{name}: data {key}", a["data"].get(key), b["data"].get(key))]
            left, right = ((each.get("benchmarks") or {}).get(name) or {} for each in (ours, theirs))
            for key in ("max_tokens", "suffix"):
                pairs += [(f"{name}: {key}", left.get(key), right.get(key))]
        for key, left, right in pairs:
            lines += [
                f"{place} differs: {_shown(one)} ({base.label}), {_shown(another)} ({other.label})"
                for place, one, another in differences(left, right, key)
                if not place.endswith(".seed")
            ]
    return lines


def _partial(evaluation: Evaluation, name: str) -> bool:
    """Whether it has only the first problems of a benchmark."""
    return bool(evaluation.results["benchmarks"][name]["data"].get("partial"))


def _figure(values: Sequence[Sequence[FloatArray]], evaluations: Sequence[Evaluation]) -> dict[str, Any]:
    """One figure of one scope: every evaluation's value and its difference from the base.

    Args:
        values: for each evaluation, one F[P_b] a benchmark.
    """
    found: dict[str, Any] = {"values": {}, "differences": {}}
    for each, own in zip(evaluations, values, strict=True):
        interval = macro_interval(own, shares=True)
        found["values"][each.label] = {"value": interval.value, "ci95": [interval.low, interval.high]}
    p_values = []
    for each, own in zip(evaluations[1:], values[1:], strict=True):
        paired = [theirs - ours for theirs, ours in zip(own, values[0], strict=True)]
        interval = macro_interval(paired)
        p_values.append(sign_flip_p_value(paired))
        found["differences"][each.label] = {
            "value": interval.value,
            "ci95": [interval.low, interval.high],
            "p": p_values[-1],
        }
    if len(p_values) > 1:
        for each, adjusted in zip(evaluations[1:], holm(p_values), strict=True):
            found["differences"][each.label]["p_holm"] = adjusted
    return found


def _by_problem(
    values: Sequence[Sequence[Mapping[str, FloatArray]]], evaluations: Sequence[Evaluation]
) -> dict[str, dict[str, int]]:
    """Problems won, lost and tied against the base; "solved": those with a correct sample that the base has not."""
    ours = values[0][0]["avg@k"]
    found = {}
    for each, own in zip(evaluations[1:], values[1:], strict=True):
        theirs = own[0]["avg@k"]
        found[each.label] = {
            "wins": int((theirs > ours).sum()),
            "losses": int((theirs < ours).sum()),
            "ties": int((theirs == ours).sum()),
            "newly_solved": int(((theirs > 0) & (ours == 0)).sum()),
            "no_longer_solved": int(((theirs == 0) & (ours > 0)).sum()),
        }
    return found


def _aligned(name: str, evaluations: Sequence[Evaluation]) -> list[tuple[Any, Any]]:
    """(correct, samples) of each evaluation, in the order of the base's problems."""
    base = evaluations[0].results["benchmarks"][name]["problems"]
    order = {problem["id"]: index for index, problem in enumerate(base)}
    tables = []
    for each in evaluations:
        entry = each.results["benchmarks"][name]
        ids = [problem["id"] for problem in entry["problems"]]
        if set(ids) != set(order) or len(ids) != len(order):
            missing = [problem for problem in order if problem not in set(ids)]
            extra = [problem for problem in ids if problem not in order]
            shown = ", ".join(map(repr, [*missing, *extra][:3]))
            raise DataError(
                f"{name}: {each.label} lacks {len(missing)} problems of {evaluations[0].label} and has {len(extra)} "
                f"others ({shown} ...)",
                "the same problems",
                "evaluate both on the same file and the same --problems",
            )
        ordered = sorted(entry["problems"], key=lambda problem: order[problem["id"]])
        tables.append(counts_of({"problems": ordered}))
    return tables


def _read(file: Path) -> Mapping[str, Any]:
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"{file}: {error}", "the results of scope eval", "evaluate again") from None
    if not isinstance(results, dict) or results.get("format") != FORMAT:
        found = results.get("format") if isinstance(results, dict) else type(results).__name__
        raise DataError(f"{file}: format {found!r}", f"{FORMAT!r}, the results of scope eval", "name results.json")
    try:
        for entry in results["benchmarks"].values():
            figures(*counts_of(entry), [1])
            _ = results["settings"].keys(), entry["data"].keys(), entry["metrics"]["n"]
            _ = {problem["id"] for problem in entry["problems"]}
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise DataError(f"{file}: {reason}", "the results of scope eval, as it wrote them", "evaluate again") from None
    return results


def _labels(files: Sequence[Path]) -> list[str]:
    """The folders' names, with as much of what is above them as tells them apart."""
    ends = [file.parent if file.name == RESULTS else file.with_suffix("") for file in files]
    parts = [[part for part in end.absolute().parts if part not in ("/", "..")] for end in ends]
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [f"{index}:{'/'.join(part[-1:])}" for index, part in enumerate(parts, start=1)]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
