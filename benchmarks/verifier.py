"""The maths verifier against math-verify alone: agreement with labels, speed, and what bombs cost.

    python benchmarks/verifier.py [DATA] [--workers 2] [--repeats 3] [--timeout-s 2]

DATA (or the environment variable SCOPE_DATA) is a folder with verifier/verifier_pairs.jsonl (pairs of a prediction and
a gold answer, labelled; from the tests of other projects) and verifier/gsm8k_model_outputs.jsonl.

math-verify alone gets every chance: a pair counts as equal if it is under any of four readings (the gold answer as it
stands or between dollars, the prediction as it stands or in a box). For speed it runs one reading (dollars, box), in
this process, with its own time limits. ``plain`` are numbers in boxes, judged here; ``latex`` are the pairs that need
a worker, split over the repeats so that no answer is seen twice. Both run in turn with the peer and medians are
compared: answers a second of wall time, and CPU time an answer, which a busy machine distorts less. Prints one JSON
line: ``ratio`` is math-verify / ours in CPU time a LaTeX answer, above 1 when ours needs less; ``bombs.worst`` is CPU
time / limit.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import resource
import statistics
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from math_verify import parse
from math_verify import verify as equal

from scope_opd.gold import parse_math_gold
from scope_opd.types import Verdict
from scope_opd.verify.math.fast import judge_fast
from scope_opd.verify.math.settings import MathSettings
from scope_opd.verify.math_verifier import MathVerifier

RESPONSE, ANSWER = MathSettings(), MathSettings(form="answer")
NESTED = r"\frac{1}{" * 600 + "2" + "}" * 600
BOMBS = [
    "9^{9^{9^9}}", "2^{2^{2^{2^{2^2}}}}", "(10^8)!", "((10!)!)!", r"\binom{10^9}{5\cdot 10^8}", NESTED,
    NESTED.replace(r"\frac{1}", r"\sqrt"), "(" * 3000 + "1" + ")" * 3000, r"\prod_{k=1}^{10^9} k",
    r"\sum_{n=1}^{10^{12}} \frac{1}{n^2}", "(x+y+z)^{5000} - (z+y+x)^{5000}", r"\int_0^1 x^{x^{x^x}} dx",
]  # fmt: skip


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def settings_of(row: dict[str, Any]) -> MathSettings:
    return ANSWER if row.get("form") == "answer" else RESPONSE


def ours(verifier: MathVerifier, rows: list[dict[str, Any]]) -> list[Verdict]:
    futures = [verifier.submit(row["prediction"], row["gold"], None, settings_of(row)) for row in rows]
    return [future.result() for future in futures]


def alone(row: dict[str, Any], readings: str = "both") -> bool:
    """math-verify's verdict."""
    golds, predictions = [f"${row['gold']}$"], [row["prediction"]]
    if row.get("form") == "answer":
        predictions = [rf"\boxed{{{row['prediction']}}}"]
    if readings == "both":
        golds.append(row["gold"])
        predictions.append(row["prediction"])
    return any(equal(parse(gold), parse(prediction)) for gold in golds for prediction in dict.fromkeys(predictions))


def agreement(rows: list[dict[str, Any]], found: list[bool | None]) -> dict[str, float]:
    kinds = Counter((row["expected"], verdict) for row, verdict in zip(rows, found, strict=True))
    agreed = kinds[True, True] + kinds[False, False]
    return {
        "rows": len(rows),
        "agree": agreed,
        "agree_share": round(agreed / len(rows), 4),
        "wrongly_accepted": kinds[False, True],
        "wrongly_refused": kinds[True, False],
        "no_verdict": kinds[True, None] + kinds[False, None],
    }


def rate(count: int, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


def cpu_of_workers(verifier: MathVerifier) -> float:
    """CPU seconds of all judging processes so far, those that ended included (Linux)."""
    ticks = 0
    for worker in verifier.pool.pids():
        ticks += sum(map(int, _fields(worker)[11:15]))
        for child in Path(f"/proc/{worker}/task/{worker}/children").read_text().split():
            ticks += sum(map(int, _fields(int(child))[11:13]))
    return ticks / os.sysconf("SC_CLK_TCK")


def _fields(pid: int) -> list[str]:
    return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()


def bombs(timeout_s: float) -> dict[str, Any]:
    """What each bomb costs, as a prediction and as a gold answer."""
    verifier = MathVerifier(timeout_s=timeout_s, workers=1)
    verifier.judge(r"\boxed{x+1}", "1+x")
    cpu, wall, verdicts = [], [], Counter[str]()
    for bomb in BOMBS:
        for prediction, gold in ((bomb, r"42+\pi"), (r"42+\pi", bomb)):
            before, start = cpu_of_workers(verifier), time.perf_counter()
            verdicts[str(verifier.judge(prediction, gold, None, ANSWER).correct)] += 1
            wall.append(time.perf_counter() - start)
            time.sleep(0.05)  # the successor is forked
            cpu.append(cpu_of_workers(verifier) - before)
    verifier.close()
    return {
        "answers": len(cpu),
        "limit_s": timeout_s,
        "verdicts": dict(verdicts),
        "worst": round(max(cpu) / timeout_s, 3),
        "worst_wall": round(max(wall) / timeout_s, 3),
        "median_cpu_s": round(statistics.median(cpu), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="?", default=os.environ.get("SCOPE_DATA"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--timeout-s", type=float, default=2.0)
    options = parser.parse_args()
    if options.data is None:
        parser.error(
            "expected DATA or the environment variable SCOPE_DATA, a folder with verifier/verifier_pairs.jsonl"
        )
    logging.disable(logging.WARNING)
    pairs = rows_of(Path(options.data) / "verifier" / "verifier_pairs.jsonl")
    outputs = rows_of(Path(options.data) / "verifier" / "gsm8k_model_outputs.jsonl")
    result: dict[str, Any] = {"benchmark": "verifier", "workers": options.workers, "repeats": options.repeats}

    verifier = MathVerifier(workers=options.workers)
    start = time.perf_counter()
    verifier.judge(r"\boxed{x+1}", "1+x")
    result["first_answer_s"] = round(time.perf_counter() - start, 2)
    for name, rows in (("pairs", pairs), ("gsm8k", outputs)):
        result[name] = {
            "ours": agreement(rows, [verdict.correct for verdict in ours(verifier, rows)]),
            "math_verify": agreement(rows, [alone(row) for row in rows]),
        }

    draw = random.Random(0)
    plain = [
        {
            "prediction": rf"It follows that the sum is \boxed{{{number}}}.",
            "gold": str(draw.choice((number, number + 1))),
        }
        for number in (draw.randrange(10_000) for _ in range(4000))
    ]
    latex = [
        row
        for row in pairs
        if judge_fast(row["prediction"], parse_math_gold(row["gold"]), None, settings_of(row)) is None
    ]
    draw.shuffle(latex)
    few, part = plain[:200], len(latex) // options.repeats
    verifier.close()
    verifier = MathVerifier(workers=options.workers)  # one that has not seen the answers
    for future in [verifier.submit(r"\boxed{x+1}", "1+x") for _ in range(50)]:
        future.result()
    figures: dict[str, list[float]] = {}
    for number in range(options.repeats):
        fresh = latex[number * part : (number + 1) * part]
        for name, count, work in (
            ("plain_ours", len(plain), lambda: ours(verifier, plain)),
            ("plain_math_verify", len(few), lambda: [alone(row, "one") for row in few]),
            ("latex_ours", part, lambda fresh=fresh: ours(verifier, fresh)),
            ("latex_math_verify", part, lambda fresh=fresh: [alone(row, "one") for row in fresh]),
        ):
            before = cpu_of_workers(verifier) + time.process_time()
            figures.setdefault(name, []).append(rate(count, work))
            used = cpu_of_workers(verifier) + time.process_time() - before
            figures.setdefault(f"{name}_cpu_ms", []).append(1000 * used / count)
    verifier.close()
    median = {name: round(statistics.median(values), 3) for name, values in figures.items()}
    for kind, count in (("plain", len(plain)), ("latex", part)):
        result[kind] = {
            "answers": count,
            "per_s": median[f"{kind}_ours"],
            "math_verify_per_s": median[f"{kind}_math_verify"],
            "cpu_ms": median[f"{kind}_ours_cpu_ms"],
            "math_verify_cpu_ms": median[f"{kind}_math_verify_cpu_ms"],
            "ratio": round(median[f"{kind}_ours"] / median[f"{kind}_math_verify"], 2),
            "cpu_ratio": round(median[f"{kind}_math_verify_cpu_ms"] / median[f"{kind}_ours_cpu_ms"], 2),
        }
    result["bombs"] = bombs(options.timeout_s)
    result["peak_mb"] = {
        "here": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "worker": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024,
    }
    result["ratio"] = result["latex"]["cpu_ratio"]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
