r"""Judge one answer: find it in the response, read both sides into shapes, compare them.

``docs/judging.md`` states the rules for users. The verdict is a function of (prediction, gold, problem, settings):
nothing is remembered but caches of parsed formulas, and every random choice has a fixed seed. No text makes ``judge``
raise: what cannot be read as mathematics is compared as words, and what is too large to evaluate has no verdict.

Not covered: a limit of time (``workers`` has one); paraphrases and misspellings; proofs.
"""

from __future__ import annotations

import math
import re
from functools import lru_cache

from scope_opd.gold import MathGold, Tolerance
from scope_opd.types import Verdict
from scope_opd.verify.math.choices import letter_of, options
from scope_opd.verify.math.compare import same
from scope_opd.verify.math.compare_values import Context, words_of
from scope_opd.verify.math.extract import Extracted, extract, sentence_core
from scope_opd.verify.math.fast import CORRECT, WRONG, decide, gold_parts, no_answer
from scope_opd.verify.math.reading import read, read_list
from scope_opd.verify.math.settings import MathSettings
from scope_opd.verify.math.shapes import Many, Shape, Words
from scope_opd.verify.math.symbolic import TooHard, check_size, parse, too_large
from scope_opd.verify.math.text import clean, squeezed
from scope_opd.verify.math.units import Unit, read_unit

_PREFIXED = re.compile(r"(?:\\text\{\s*)?\(\s*[A-J]\s*\)\s*\}?\s*(.+)", re.DOTALL)
UNEXPECTED = (ArithmeticError, AttributeError, LookupError, NotImplementedError, TypeError, ValueError)
"""What sympy raises on formulas that it was not made for: no verdict, and the reason says so."""
_ASKED = re.compile(
    r"(?:in|how many|number of|to the nearest(?: \w+)?)\s+(?:\$?\\(?:text|mathrm)\{\s*)?"
    r"((?:square |cubic )?(?:centi|milli|kilo)?(?:meters?|metres?|grams?|liters?|litres?)"
    r"|(?:square |cubic )?(?:inches|inch|feet|foot|yards?|miles?)"
    r"|seconds?|minutes?|hours?|days?|weeks?|months?|years?|dollars?|cents|degrees|radians|cm|mm|km|kg|pounds?|ounces?)\b",
    re.IGNORECASE,
)
_OPERATION = re.compile(
    r"[+*/^=<>]|(?<=[0-9A-Za-z)}])\s*-|\\(?:cdot|times|frac|sqrt|div|sin|cos|tan|log|ln|leq|geq|binom|sum|int)|!"
)


def judge(prediction: str, gold: MathGold, problem: str | None, settings: MathSettings) -> Verdict:
    """Judge a prediction against a gold answer.

    Args:
        prediction: a response or, with ``settings.form = "answer"``, an answer.
        gold: the alternatives, each a list of answers that must all be there.
        problem: the problem's text: options, units and expressions that were merely copied are looked up in it.
        settings: how the answer is found, and the tolerance where the gold answer states none.

    Returns:
        correct with reward 1.0 or 0.0, or None without a verdict; the extracted answer; the reason.
    """
    found = extract(prediction, settings)
    early = no_answer(found)
    if early is not None or isinstance(found, str):
        return early or Verdict(correct=False, reward=0.0, reason=str(found))
    if (quick := decide(found, gold, settings)) is not None:
        return quick
    from sympy.core.random import seed

    seed(0)  # sympy draws numbers to test for equality
    try:
        reason = _wrong(found, gold, problem or "", settings)
    except TooHard as error:
        return Verdict(correct=None, reward=None, extracted=found.text, reason=str(error))
    except (MemoryError, RecursionError, *UNEXPECTED) as error:
        return Verdict(correct=None, reward=None, extracted=found.text, reason=f"{type(error).__name__} while judging")
    return Verdict(correct=reason is None, reward=float(reason is None), extracted=found.text, reason=reason or CORRECT)


def _wrong(found: Extracted, gold: MathGold, problem: str, settings: MathSettings) -> str | None:
    """Why the answer is wrong; None if it is right."""
    for part in found.parts:
        check_size(clean(part))
    context = _context(gold.tolerance or settings.tolerance, problem)
    listed = options(problem) if problem else {}
    answer = found.parts[0] if len(found.parts) == 1 else None
    reason = WRONG
    for alternative in gold.alternatives:
        if len(alternative) == 1:
            parts = gold_parts(alternative[0])
            letter = letter_of(parts[0]) if len(parts) == 1 else None
            if letter is not None and (not letter[1] or letter[0] in listed):
                verdict = _chosen(answer, letter[0], listed, context)
                if verdict is None:
                    return None
                reason = verdict
                continue
            if letter is not None and answer is not None:  # a gold answer such as "(C) 12" without its problem
                if _chosen(answer, letter[0], {letter[0]: letter[1]}, context) is None:
                    return None
                continue
            prefixed = _PREFIXED.fullmatch(clean(answer)) if answer is not None and not listed else None
            if prefixed and same(read(prefixed[1]), _gold_shape(parts), context):
                return None  # "(C) 12" for 12
            if answer is not None and listed and (named := letter_of(answer)) and named[0] in listed:
                text = listed[named[0]]
                consistent = not named[1] or same(read(named[1]), read(text), context)
                if consistent and same(read(text), _gold_shape(parts), context):
                    return None
        gold_shape = _gold_list(alternative)
        if answer is not None and _copied(answer, alternative, context):
            reason = "copied from the problem"
            continue
        found_shape = read(answer) if answer is not None else read_list(found.parts)
        for part in alternative:
            if too_large(clean(part)):
                break  # only its own spelling could be equal, and that was tried
        else:
            if same(found_shape, gold_shape, context):
                return None
    return reason


def _chosen(answer: str | None, letter: str, listed: dict[str, str], context: Context) -> str | None:
    """A gold letter: why the answer does not choose it; None if it does."""
    if answer is None:
        return "several answers to one choice"
    if named := letter_of(answer):
        if named[0] != letter:
            return "another option"
        if named[1] and letter in listed and not same(read(named[1]), read(listed[letter]), context):
            return "the letter of one option with the text of another"
        if named[1] and letter not in listed and re.search(r"\b(?:or|and|not|[B-J])\b", named[1]):
            return "several answers to one choice"
        return None
    shape = read(answer)
    if isinstance(shape, Words) and shape.text.strip() == letter:
        return None
    matching = [key for key, text in listed.items() if same(shape, read(text), context)]
    return None if matching == [letter] else WRONG


@lru_cache(maxsize=4096)
def _gold_shape(parts: tuple[str, ...]) -> Shape:
    if len(parts) > 1:
        return read_list(parts)
    core = sentence_core(parts[0])
    return read(parts[0] if core is None else core)


@lru_cache(maxsize=4096)
def _gold_list(alternative: tuple[str, ...]) -> Shape:
    if len(alternative) == 1:
        return _gold_shape(gold_parts(alternative[0]))
    items: list[Shape] = []
    for answer in alternative:
        shape = _gold_shape(gold_parts(answer))
        items += shape.items if isinstance(shape, Many) and not shape.braces else [shape]
    return Many(tuple(items))


@lru_cache(maxsize=1024)
def _context(tolerance: Tolerance | None, problem: str) -> Context:
    return Context(tolerance, squeezed(clean(problem)), _asked(problem), words_of(problem))


@lru_cache(maxsize=1024)
def _asked(problem: str) -> Unit | None:
    """The one unit that the problem's last sentences ask for."""
    units = [read_unit(match[1]) for match in _ASKED.finditer(problem[-300:])]
    known = {unit for unit in units if unit and unit.kind}
    return known.pop() if len(known) == 1 else None


def _copied(answer: str, alternative: tuple[str, ...], context: Context) -> bool:
    r"""Whether an answer repeats an expression of the problem where the gold answer is its value.

    ``2+2`` in answer to "compute 2+2" is equal to 4 and no answer. A formula counts as copied if the problem contains
    it, the gold answer is written otherwise, and it has variables or more operations than the gold answer.
    """
    spelling = squeezed(clean(answer))
    if len(spelling) < 3 or not _OPERATION.search(clean(answer)) or spelling not in context.problem:
        return False
    golds = [squeezed(clean(", ".join(gold_parts(part)))) for part in alternative]
    if spelling in golds or any(spelling in gold.split("=")[-1:] for gold in golds):
        return False
    fraction = re.fullmatch(r"\\frac\{(\d+)\}\{(\d+)\}|(\d+)/(\d+)", spelling)
    if fraction and math.gcd(*(int(part) for part in fraction.groups() if part)) > 1:
        return True  # to be reduced
    if re.search(r"(?<![\\a-zA-Z])[a-df-zA-DF-Z](?![a-zA-Z])", re.sub(r"\\[a-zA-Z]+", " ", spelling)):
        return True
    return max(map(_operations, golds)) < _operations(spelling)


def _operations(spelling: str) -> int:
    parsed = parse(spelling)
    return (
        len(_OPERATION.findall(spelling))
        if parsed is None
        else len(re.findall(r"[-+*/^!]|\\(?:frac|sqrt|cdot|times|sin|cos|tan|log|ln|binom)", spelling))
    )
