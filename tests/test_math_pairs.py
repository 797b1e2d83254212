"""The maths verifier agrees with pairs labelled by hand (``math_pairs.jsonl``), and no attack or bomb wins.

The labels say what a careful mathematician who grades final answers would say; they were written without knowledge of
the verifier's rules (but for the kinds ``blind-3`` to ``blind-5``). Each row: ``kind``, ``form``, ``prediction``,
``answer`` (a gold answer in any of its forms), ``expected``, and for some ``problem`` and ``tolerance``. Not covered:
the labelled pairs of other projects, which are not part of this one.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from scope_opd.gold import parse_math_gold, parse_tolerance
from scope_opd.types import Verdict
from scope_opd.verify.math.settings import MathSettings

ROWS: list[dict[str, Any]] = [
    json.loads(line) for line in (Path(__file__).parent / "math_pairs.jsonl").read_text(encoding="utf-8").splitlines()
]
BOMBS = ("bomb", "malformed")
"""Kinds that go through the workers: each must not be called correct, and must cost no more than its limit."""
JUDGED = [row for row in ROWS if row["kind"] not in BOMBS]
KINDS = sorted({row["kind"] for row in JUDGED})
MIN_AGREEMENT = 0.96
MAX_FALSE_ACCEPTS = 0.01
BOMB_LIMIT_S = 1.0


def settings_of(row: dict[str, Any]) -> MathSettings:
    tolerance = parse_tolerance(row["tolerance"]) if "tolerance" in row else None
    return MathSettings(form=row["form"], tolerance=tolerance)


@functools.cache
def verdict_of(index: int) -> Verdict:
    from scope_opd.verify.math.judge import judge

    row = JUDGED[index]
    return judge(row["prediction"], parse_math_gold(row["answer"]), row.get("problem"), settings_of(row))


def disagreements(indices: list[int]) -> list[str]:
    lines = []
    for index in indices:
        row, verdict = JUDGED[index], verdict_of(index)
        if verdict.correct is not row["expected"]:
            lines.append(
                f"{row['id']}: {row['prediction']!r} against {row['answer']!r}: expected {row['expected']}, "
                f"got {verdict.correct} ({verdict.extracted!r}: {verdict.reason})"
            )
    return lines


def test_the_pairs_are_balanced_and_many() -> None:
    false = sum(not row["expected"] for row in ROWS)
    attacks = sum(row["kind"].startswith("attack") for row in ROWS)
    assert len(ROWS) >= 350
    assert false >= 0.45 * len(ROWS)
    assert attacks >= 60
    assert sum(row["kind"] in BOMBS for row in ROWS) >= 20
    assert len({row["id"] for row in ROWS}) == len(ROWS)


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_is_judged_as_labelled(kind: str) -> None:
    """Attacks without exception; other kinds may miss one pair, or a tenth."""
    indices = [index for index, row in enumerate(JUDGED) if row["kind"] == kind]
    wrong = disagreements(indices)
    allowed = 0 if kind.startswith("attack") else max(1, len(indices) // 10)
    assert len(wrong) <= allowed, "\n" + "\n".join(wrong)


def test_agreement_over_all_pairs_and_few_false_accepts() -> None:
    everything = list(range(len(JUDGED)))
    wrong = disagreements(everything)
    assert 1 - len(wrong) / len(JUDGED) >= MIN_AGREEMENT, "\n" + "\n".join(wrong)
    false = [index for index in everything if not JUDGED[index]["expected"]]
    accepted = [line for index in false if verdict_of(index).correct for line in disagreements([index])]
    assert len(accepted) <= MAX_FALSE_ACCEPTS * len(false), "\n" + "\n".join(accepted)


def test_no_bomb_or_malformed_text_is_correct_and_none_ends_the_verifier() -> None:
    from scope_opd.verify.math_verifier import MathVerifier

    verifier = MathVerifier(MathSettings(), timeout_s=BOMB_LIMIT_S)
    try:
        accepted = [
            row["id"]
            for row in ROWS
            if row["kind"] in BOMBS
            and verifier.judge(row["prediction"], row["answer"], settings=settings_of(row)).correct
        ]
        after = verifier.judge("so $\\boxed{2\\sqrt{3}}$", "\\sqrt{12}")
    finally:
        verifier.close()
    assert accepted == []
    assert after.correct is True
