r"""Verdicts that need no symbolic mathematics: no answer, identical spellings, plain numbers.

``judge_fast`` is the first step of ``judge``, so both agree by construction; it imports neither sympy nor math-verify,
and returns None for whatever it cannot decide.
"""

from __future__ import annotations

import re
from functools import lru_cache

from scope_opd.gold import MathGold, Tolerance
from scope_opd.types import Verdict
from scope_opd.verify.math.extract import Extracted, extract, last_boxes, stated_answer
from scope_opd.verify.math.numbers import Number, read_number, same_number
from scope_opd.verify.math.settings import MathSettings
from scope_opd.verify.math.text import MAX_LENGTH, clean, squeezed

_PLAIN = re.compile(r"[+-]?(?:[0-9]{1,40}(?:\.[0-9]{0,40})?|\.[0-9]{1,40})")
_OPEN_BOX = re.compile(r"\\{1,2}boxed\s*\{(.*)", re.DOTALL)
CORRECT = "equal to the gold answer"
WRONG = "not equal to the gold answer"


def judge_fast(prediction: str, gold: MathGold, problem: str | None, settings: MathSettings) -> Verdict | None:
    """The verdict if it needs no symbolic mathematics, else None. Arguments as for ``judge``."""
    found = extract(prediction, settings)
    if isinstance(found, str) or no_answer(found) is not None:
        return no_answer(found)
    return decide(found, gold, settings)


def no_answer(found: Extracted | str) -> Verdict | None:
    """The verdict where there is no answer to compare."""
    if isinstance(found, str):
        return Verdict(correct=False, reward=0.0, reason=found)
    if not any(part.strip() for part in found.parts):
        return Verdict(correct=False, reward=0.0, extracted="", reason="the answer is empty")
    if len(found.text) > MAX_LENGTH:
        return Verdict(correct=False, reward=0.0, extracted=found.text[:80], reason="too long for a final answer")
    return None


def decide(found: Extracted, gold: MathGold, settings: MathSettings) -> Verdict | None:
    """Identical spellings and plain numbers; None for the rest."""
    if len(found.parts) != 1:
        return None
    spelling = clean(found.parts[0])
    number = _plain(spelling)
    tolerance = gold.tolerance or settings.tolerance
    undecided = number is None
    for alternative in gold.alternatives:
        if len(alternative) != 1:
            undecided = True
            continue
        gold_spelling, gold_number = _gold(alternative[0])
        if (spelling and spelling == gold_spelling) or _same_plain(number, gold_number, tolerance):
            return Verdict(correct=True, reward=1.0, extracted=found.text, reason=CORRECT)
        undecided = undecided or gold_number is None
    return None if undecided else Verdict(correct=False, reward=0.0, extracted=found.text, reason=WRONG)


def _plain(spelling: str) -> Number | None:
    return read_number(spelling) if _PLAIN.fullmatch(spelling) else None


def _same_plain(found: Number | None, gold: Number | None, tolerance: Tolerance | None) -> bool:
    return found is not None and gold is not None and same_number(found, gold, tolerance)


@lru_cache(maxsize=8192)
def _gold(answer: str) -> tuple[str, Number | None]:
    spelling = clean(", ".join(gold_parts(answer)))
    return spelling, _plain(spelling)


@lru_cache(maxsize=8192)
def gold_parts(answer: str) -> tuple[str, ...]:
    """What counts of a gold answer: its boxes if it is a whole solution, else all of it."""
    if (boxes := last_boxes(answer)) is not None:
        return boxes.parts
    if opened := _OPEN_BOX.search(answer):
        return (opened[1],)
    if len(answer.split()) > 12 and (stated := stated_answer(answer)) is not None:
        return (stated,)
    return (answer,)


def spelled_alike(found: str, gold: str) -> bool:
    """Whether two answers have one spelling."""
    return bool(clean(found)) and squeezed(clean(found)) == squeezed(clean(gold))
