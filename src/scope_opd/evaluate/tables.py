"""Results as tables: rows of text cells, written as Markdown or shown on a terminal. Shares in per cent.

Not covered: colour and width of a terminal (rich, in the command line).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

SHOWN_KS = 8
"""Pass@k columns at most; all k stand in results.json."""
TERMINAL_KS = 3
NOT_THE_WHOLE = "not comparable with figures of the whole."
MOSTLY = 0.5
"""Share of truncated samples above which a note says so."""
COMPARISON_LABELS = 3
"""Columns of a comparison that say what a row is: benchmark, figure, evaluation."""


def result_table(results: Mapping[str, Any], *, most_ks: int = SHOWN_KS) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a benchmark a row, then the macro average.

    The column "repl." is the largest Pass@k by drawing with replacement, as the method's first release has it.
    """
    entries = results["benchmarks"]
    ks = shared_ks([entry["metrics"] for entry in entries.values()], most_ks)
    last = str(ks[-1])
    ns = {_n(entry["metrics"]["n"]) for entry in entries.values()}
    first = f"Avg@{ns.pop()}" if len(ns) == 1 and "-" not in next(iter(ns)) else "Avg@n"
    header = ["benchmark", "problems", "n", first, *(f"Pass@{k}" for k in ks if k != 1)]
    header += [f"Pass@{last} repl."] if ks[-1] != 1 else []
    header += ["truncated", "no verdict", "length", "answers"]
    rows = []
    for name, entry in entries.items():
        metrics = entry["metrics"]
        length = metrics["length"]
        problems = f"{metrics['problems']}"
        if entry["data"].get("partial"):
            problems += f" of {entry['data']['rows']}"
        row = [name, problems, _n(metrics["n"]), with_interval(metrics["avg@k"], metrics["ci95"]["avg@k"])]
        row += [with_interval(metrics["pass@k"].get(str(k)), metrics["ci95"].get(f"pass@{k}")) for k in ks if k != 1]
        row += [percent(metrics["pass@k_with_replacement"].get(last))] if ks[-1] != 1 else []
        row += [percent(metrics["truncated"]), percent(metrics["no_verdict"])]
        row += [f"{length['mean']:.0f}{'' if length['unit'] == 'tokens' else ' ch'}", f"{metrics['distinct']:.1f}"]
        rows.append(row)
    macro = results.get("macro")
    if macro:
        row = ["macro", "", "", with_interval(macro["avg@k"], macro["ci95"]["avg@k"])]
        row += [with_interval(macro["pass@k"].get(str(k)), macro["ci95"].get(f"pass@{k}")) for k in ks if k != 1]
        row += [percent(macro["pass@k_with_replacement"].get(last))] if ks[-1] != 1 else []
        rows.append([*row, "", "", "", ""])
    return header, rows


def biased_table(results: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Pass@k by drawing with replacement, as the method's first release has it, beside the unbiased one."""
    entries = {name: entry["metrics"] for name, entry in results["benchmarks"].items()}
    if results.get("macro"):
        entries["macro"] = results["macro"]
    ks = [k for k in shared_ks(list(entries.values())) if k != 1]
    header = ["benchmark", *(f"Pass@{k}" for k in ks), *(f"with replacement @{k}" for k in ks)]
    rows = [
        [
            name,
            *(percent(metrics["pass@k"].get(str(k))) for k in ks),
            *(percent(metrics["pass@k_with_replacement"].get(str(k))) for k in ks),
        ]
        for name, metrics in entries.items()
    ]
    return header, rows if ks else []


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], *, labels: int = 1) -> str:
    """A Markdown table; its first ``labels`` columns are text, the others figures."""
    lines = [header, [*["---"] * labels, *["---:"] * (len(header) - labels)], *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def results_markdown(results: Mapping[str, Any]) -> str:
    """results.md: what was evaluated, the table, the two estimators of Pass@k side by side."""
    settings = results["settings"]
    text = f"# Evaluation of {settings['source'].get('model') or settings['source'].get('responses')}\n\n"
    text += markdown(*result_table(results)) + "\n" + "\n".join(notes(results)) + "\n"
    header, rows = biased_table(results)
    if rows:
        text += "\n## The two estimators of Pass@k\n\n" + markdown(header, rows)
        text += "\nOnly the unbiased one should be reported; the other is for comparison with figures published so.\n"
    return text


def notes(results: Mapping[str, Any]) -> list[str]:
    """Lines that belong under the table."""
    entries = results["benchmarks"].values()
    estimated = any(len(entry["metrics"]["pass@k"]) > 1 for entry in entries)
    lines = ["Per cent, 95 % intervals over problems" + ("; Pass@k unbiased; repl.: with replacement, biased low,"
             " for comparison with figures published so." if estimated else ".")]  # fmt: skip
    lines.append("length: mean response tokens (ch: characters); answers: different final answers a problem.")
    sampling = results["settings"].get("sampling")
    if sampling:
        shown = ", ".join(f"{name} {value}" for name, value in sampling.items())
        lines.append(f"Sampling: {shown}.")
    if any(isinstance(entry["metrics"]["n"], dict) for entry in entries):
        lines.append(
            "Samples a problem differ: Avg@n is the mean over problems, Pass@k goes up to the smallest number."
        )
    lines += [
        f"{name}: {percent(entry['metrics']['truncated'])} % of the samples ran into {_limit(results, name)}: "
        "its figures measure that limit more than the model."
        for name, entry in results["benchmarks"].items()
        if (entry["metrics"]["truncated"] or 0.0) > MOSTLY
    ]
    left = sum(entry["data"].get("left_out") or 0 for entry in entries)
    if left:
        lines.append(f"{left} problems were left out, because they cannot be judged by comparing outputs.")
    if any(entry["data"].get("partial") for entry in entries):
        lines.append(f"Only the first problems of a benchmark were evaluated: {NOT_THE_WHOLE}")
    return lines


def _limit(results: Mapping[str, Any], name: str) -> str:
    limit = ((results["settings"].get("benchmarks") or {}).get(name) or {}).get("max_tokens")
    return "their token limit" if limit is None else f"--max-tokens {limit}"


def shared_ks(metrics: Sequence[Mapping[str, Any]], most: int = SHOWN_KS) -> list[int]:
    """Every k that some entry has; the smaller powers of two leave first where there are too many to show."""
    ks = sorted({int(k) for entry in metrics for k in entry["pass@k"]})
    while len(ks) > most:
        ks.pop(1)
    return ks


def percent(share: float | None) -> str:
    """A share as "12.5", a dash where there is none."""
    return "-" if share is None else f"{100 * share:.1f}"


def with_interval(share: float | None, ends: Sequence[float] | None) -> str:
    """ "12.5 [8.1, 17.0]" """
    if share is None:
        return "-"
    return percent(share) if ends is None else f"{percent(share)} [{percent(ends[0])}, {percent(ends[1])}]"


def _n(n: int | Mapping[str, int]) -> str:
    return str(n) if isinstance(n, int) else f"{n['smallest']}-{n['largest']}"


def comparison_table(comparison: Mapping[str, Any], *, few: bool = False) -> tuple[list[str], list[list[str]]]:
    """Header and rows: for each benchmark and figure a row an evaluation; ``few``: Avg@k and the largest k alone."""
    header = ["benchmark", "figure", "evaluation", "value", "difference", "p", "wins-losses-ties"]
    rows = []
    for scope, entry in comparison["benchmarks"].items():
        names = list(entry["figures"])
        for name in [names[0], *([names[-1]] if len(names) > 1 else [])] if few else names:
            found = entry["figures"][name]
            for label, value in found["values"].items():
                difference = found["differences"].get(label)
                won = (entry["by_problem"] or {}).get(label) if name == "avg@k" else None
                rows.append(
                    [
                        scope,
                        name.replace("avg@k", "Avg@n").replace("pass", "Pass"),
                        label,
                        with_interval(value["value"], value["ci95"]),
                        "base" if difference is None else _points(difference),
                        "" if difference is None else _p(difference),
                        "" if won is None else f"{won['wins']}-{won['losses']}-{won['ties']}",
                    ]
                )
    return header, rows


def comparison_markdown(comparison: Mapping[str, Any]) -> str:
    """comparison.md."""
    text = "# Comparison\n\n" + "".join(f"- {label}: `{path}`\n" for label, path in comparison["evaluations"].items())
    if comparison["warnings"]:
        text += "\n" + "".join(f"- **Warning:** {line}\n" for line in comparison["warnings"])
    text += "\n" + markdown(*comparison_table(comparison), labels=COMPARISON_LABELS)
    return f"{text}\n{' '.join(comparison_notes(comparison))}\n\n![Pass@k](passk.png)\n"


def comparison_notes(comparison: Mapping[str, Any]) -> list[str]:
    """Lines that belong under a comparison's table."""
    line = f"Per cent; differences from {comparison['base']} in points, 95 % intervals over problems; p two-sided, by "
    line += "sign flips"
    lines = [line + (", Holm-adjusted in brackets." if len(comparison["evaluations"]) > 2 else ".")]
    if comparison["partial"]:
        lines.append(f"Only the first problems of {', '.join(comparison['partial'])}: {NOT_THE_WHOLE}")
    return lines


def _points(difference: Mapping[str, Any]) -> str:
    low, high = difference["ci95"]
    return f"{100 * difference['value']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"


def _p(difference: Mapping[str, Any]) -> str:
    shown = f"{difference['p']:.3g}"
    return shown + (f" ({difference['p_holm']:.3g})" if "p_holm" in difference else "")
