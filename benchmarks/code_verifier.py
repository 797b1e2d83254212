"""How many solutions a second the code verifier judges, with the sandbox and without, on HumanEval.

    python benchmarks/code_verifier.py HUMANEVAL.jsonl [--workers 2] [--rounds 3]

The file is HumanEval's (``task_id``, ``prompt``, ``canonical_solution``, ``test``, ``entry_point``), or the same with
``id``, ``problem`` and ``answer``. Every canonical solution is judged, and each with its result broken; both sides, in
bubblewrap and without it, take turns for --rounds rounds. Prints one JSON line: ``passed`` and ``broken_passed`` of
``problems``, solutions a second (median over rounds), CPU time a solution over all rounds (what a busy machine changes
least), and ``ratio`` = sandboxed / unsandboxed speed. Exit code 1 if a canonical solution fails or a broken one passes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

from scope_opd.verify.code.loaders import from_humaneval
from scope_opd.verify.code.verifier import CodeLimits, CodeVerifier

Pairs = list[tuple[str, dict]]


def read(path: str) -> tuple[Pairs, Pairs]:
    """(solution, answer) pairs, and the same with every result wrapped into a tuple."""
    good, broken = [], []
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        answer, name = from_humaneval(row), row["entry_point"]
        code = row.get("canonical_solution", row.get("answer"))
        wrap = f"\n_whole = {name}\ndef {name}(*args, **kwargs):\n    return ('broken', _whole(*args, **kwargs))\n"
        good.append((code, answer))
        broken.append((answer["prompt"] + code + wrap, answer))
    return good, broken


def judge_all(verifier: CodeVerifier, pairs: Pairs, workers: int) -> tuple[int, float]:
    """How many pass, and solutions a second."""
    start = time.perf_counter()
    with ThreadPoolExecutor(2 * workers) as pool:
        verdicts = list(pool.map(lambda pair: verifier.judge(*pair, form="answer"), pairs))
    passed = sum(verdict.correct is True for verdict in verdicts)
    return passed, len(pairs) / (time.perf_counter() - start)


def cpu_s() -> float:
    """CPU time of this process and of every one that it has waited for."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file")
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    good, broken = read(options.file)
    sides = {
        "sandboxed": CodeVerifier(CodeLimits(timeout_s=30), workers=options.workers),
        "unsandboxed": CodeVerifier(CodeLimits(timeout_s=30), workers=options.workers, allow_unsandboxed=True),
    }
    speeds: dict[str, list[float]] = {side: [] for side in sides}
    passed = {side: len(good) for side in sides}
    used = cpu_s()
    broken_passed = judge_all(sides["sandboxed"], broken, options.workers)[0]
    for _ in range(options.rounds):
        for side, verifier in sides.items():
            count, speed = judge_all(verifier, good, options.workers)
            passed[side] = min(passed[side], count)
            speeds[side].append(speed)
    cpu_ms = 1000 * (cpu_s() - used) / ((2 * options.rounds + 1) * len(good))
    for verifier in sides.values():
        verifier.close()
    medians = {side: statistics.median(values) for side, values in speeds.items()}
    print(
        json.dumps(
            {
                "problems": len(good),
                "passed": passed["sandboxed"],
                "broken_passed": broken_passed,
                "workers": options.workers,
                "solutions_per_s": round(medians["sandboxed"], 1),
                "unsandboxed_per_s": round(medians["unsandboxed"], 1),
                "cpu_ms_per_solution": round(cpu_ms, 1),
                "ratio": round(medians["sandboxed"] / medians["unsandboxed"], 2),
            }
        )
    )
    return 0 if passed["sandboxed"] == len(good) and broken_passed == 0 else 1


if __name__ == "__main__":
    sys.exit(main())
