r"""Whether two single values, or two answers in words, are the same.

Not covered: infinite families of solutions but for multiples of pi; synonyms and paraphrases.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from scope_opd.gold import Tolerance
from scope_opd.verify.math import symbolic
from scope_opd.verify.math.numbers import read_number, same_number
from scope_opd.verify.math.reading_values import english_number
from scope_opd.verify.math.shapes import Many, Shape, Value, Words
from scope_opd.verify.math.text import squeezed
from scope_opd.verify.math.units import LETTERS, Unit, conversion

_NOTHING = frozenset(
    {"nosolution", "nosolutions", "norealsolution", "norealsolutions", "emptyset", "none", "nosuchnumber"}
)
_INTEGRATED = re.compile(r"\+\s*[cC]$")
_PARAMETER = re.compile(r"(?<![\\a-zA-Z])[abk]")
_INFINITE = frozenset({"infinitelymany", "infinite", "infinity", "infinitelymanysolutions"})


@dataclass(frozen=True, slots=True)
class Context:
    """What comparing depends on besides the two answers.

    Attributes:
        tolerance: stated for numbers, or None.
        problem: the problem in squeezed spelling, "" without one.
        asked: the unit that the problem asks for, None if it states none.
        words: the problem as ``words_of`` writes it.
    """

    tolerance: Tolerance | None = None
    problem: str = ""
    asked: Unit | None = None
    words: str = ""


def same_value(found: Value, gold: Value, context: Context) -> bool:
    """Two single values: bases, per cent, degrees, units, then the number or the formula."""
    if found.base is not None or gold.base is not None:
        return _same_in_base(found, gold, context)
    letters = [side.unit is not None and side.unit.words.split("^")[0] in LETTERS for side in (found, gold)]
    if letters[0] != letters[1] and (found.unit is None or gold.unit is None):
        # a unit of one letter on one side may be a variable on the other
        whole = [side.latex + (" " + side.unit.words if side.unit else "") for side in (found, gold)]
        if symbolic.same_formula(whole[0], whole[1], None, (None, None), Fraction(1)):
            return True
    factor = conversion(found.unit, gold.unit)
    if factor is None or any(a.percent and b.unit and b.unit.kind for a, b in ((found, gold), (gold, found))):
        return False
    if found.unit and gold.unit is None and context.asked and found.unit.kind == context.asked.kind:
        factor = found.unit.factor / context.asked.factor
    if any(a.degrees and b.unit and b.unit.kind == "radians" for a, b in ((found, gold), (gold, found))):
        return False
    if found.degrees != gold.degrees and (r"\pi" in found.latex or r"\pi" in gold.latex):
        degrees, radians = (found, gold) if found.degrees else (gold, found)
        if degrees.number is None or r"\pi" not in radians.latex:
            return False
        in_radians = rf"\frac{{{degrees.number.value.numerator}\pi}}{{{degrees.number.value.denominator * 180}}}"
        return symbolic.same_formula(in_radians, radians.latex, None, (None, None), Fraction(1))
    if found.percent != gold.percent:
        return _same_percent(found, gold, context)
    return same_latex(found, gold, context, factor)


def same_latex(found: Value, gold: Value, context: Context, factor: Fraction = Fraction(1)) -> bool:
    if factor == 1 and squeezed(found.latex) == squeezed(gold.latex):
        return True
    if found.number and gold.number:
        scaled = (
            found.number if factor == 1 else replace(found.number, value=found.number.value * factor, decimals=None)
        )
        return same_number(scaled, gold.number, context.tolerance)
    if _same_family(found.latex, gold.latex):
        return True
    if (
        _INTEGRATED.search(found.latex) and _INTEGRATED.search(gold.latex) and not _PARAMETER.search(gold.latex)
    ):  # the constant of integration
        found = replace(found, latex=found.latex[:-1] + gold.latex[-1])
    numbers = (found.number if factor == 1 else None, gold.number)
    return symbolic.same_formula(found.latex, gold.latex, context.tolerance, numbers, factor)


def _same_percent(found: Value, gold: Value, context: Context) -> bool:
    """Per cent on one side only: 50% is 1/2, and it is 50 where the answer is a number of per cent."""
    share, other = (found, gold) if found.percent else (gold, found)
    share, other = replace(share, percent=False), replace(other, percent=False)
    hundredth = Fraction(1, 100)
    if found.percent:
        if same_latex(share, other, context, hundredth):
            return True
    elif same_latex(other, share, context, Fraction(100)):
        return True
    counted = (
        other.number is None or abs(other.number.value) > 1 or "%" in context.problem or "percent" in context.problem
    )
    return counted and same_latex(replace(found, percent=False), replace(gold, percent=False), context)


def _same_in_base(found: Value, gold: Value, context: Context) -> bool:
    """Digits and base must agree; a base that is not written is the one that the problem states."""
    digits = [re.sub(r"[ ,]", "", side.latex).upper().lstrip("0") for side in (found, gold)]
    if digits[0] != digits[1]:
        return False
    if found.base == gold.base or found.base is None:
        return True
    return gold.base is None and ("base" in context.problem or found.base == 10)


def _same_family(found: str, gold: str) -> bool:
    """Multiples of pi counted by an integer: n pi and k pi are the same solutions."""
    if r"\pi" not in found or r"\pi" not in gold:
        return False
    counters = []
    for latex in (found, gold):
        parsed = symbolic.parse(latex)
        if parsed is None or not hasattr(parsed, "free_symbols"):
            return False
        names = {str(symbol) for symbol in parsed.free_symbols if str(symbol) != "pi"}
        if len(names) != 1 or not names <= {"k", "n", "m", "l", "t", "j"} or r"\pi" not in latex:
            return False
        counters.append((names.pop(), parsed))
    if counters[0][0] == counters[1][0]:
        return False  # left to the formulas
    from sympy import Symbol, diff, pi

    (name, left), (_, right) = counters
    symbol = next(iter(s for s in right.free_symbols if str(s) != "pi"))
    step = diff(right, symbol)
    if step.free_symbols - {s for s in step.free_symbols if str(s) == "pi"} or not (step / pi).doit().is_rational:
        step = step.subs({s: pi for s in step.free_symbols if str(s) == "pi"})
        if not (step / pi).doit().is_rational:
            return False
    renamed = left.subs({s: Symbol(str(symbol), real=True) for s in left.free_symbols if str(s) == name})
    return symbolic.same_parsed(renamed, right) is True


def decimal_comma(found: Shape, gold: Shape, context: Context) -> bool:
    """1000,99 for 1000.99: two whole numbers with a comma between, and not three digits behind it."""
    many, value = (found, gold) if isinstance(found, Many) else (gold, found)
    if (
        not isinstance(many, Many)
        or not isinstance(value, Value)
        or value.number is None
        or value.number.decimals is None
    ):
        return False
    if many.braces or len(many.items) != 2 or not all(isinstance(item, Value) for item in many.items):
        return False
    whole, after = (item.latex for item in many.items if isinstance(item, Value))
    if not (re.fullmatch(r"-?[0-9]+", whole) and re.fullmatch(r"[0-9]+", after)) or (
        len(after) == 3 and whole.lstrip("-") != "0"
    ):
        return False
    if isinstance(gold, Many) and len(after) < 2:
        return False  # a gold list such as 1,3
    number = read_number(f"{whole}.{after}")
    return number is not None and same_number(number, value.number, context.tolerance)


def words_of(text: str) -> str:
    """Words in lower case, without articles and punctuation."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"[^\w\\+*/^=<>-]+", " ", text.casefold().replace("'s", "s"))
    return " ".join(word for word in text.split() if word not in ("the", "a", "an") or text.strip() == word)


def same_words(found: str, gold: str) -> bool:
    left, right = words_of(found), words_of(gold)
    if len(found.strip()) == 1 or len(gold.strip()) == 1:
        return found.strip() == gold.strip()
    if not left or not right or (found.count("'") != gold.count("'") and not re.search("[A-Za-z]{3}", found)):
        return False
    if left == right:
        return True
    if left.startswith("all ") and right.startswith("all ") and left.split()[:-1] != right.split()[:-1]:
        left, right = (re.sub(r" [a-z]$", "", side) for side in (left, right))  # "all positive integers n"
        if left == right:
            return True
    plain = left.replace(" ", ""), right.replace(" ", "")
    if plain[0] == plain[1] or (plain[0] in _INFINITE and plain[1] in _INFINITE):
        return True
    if left in ("yes", "no", "true", "false"):
        found, gold, left, right = gold, found, right, left
    if right in ("yes", "no", "true", "false"):
        opposite = {"yes": "no", "no": "yes", "true": "false", "false": "true"}[right]
        head = re.match(r"\s*([A-Za-z]+)\s*[,.;:]", found)
        return (
            head is not None
            and head[1].casefold() == right
            and opposite not in left.split()
            and "not" not in left.split()
        )
    if max(map(len, plain)) <= 3 and [*plain] == [
        re.sub(r"\s", "", side) for side in (found, gold)
    ]:  # products: xy, yx
        return symbolic.same_formula(found, gold, None, (None, None), Fraction(1))
    return False


def restates(found: str, gold: str, context: Context) -> bool:
    """One is the other followed by at least three words of the problem: "Petya", "Petya will receive the token"."""
    short, long = sorted((words_of(found), words_of(gold)), key=len)
    rest = long.removeprefix(short + " ")
    return bool(short) and rest != long and len(rest.split()) >= 3 and f" {rest} " in f" {context.words} "


def same_words_and_value(found: Shape, gold: Shape, context: Context) -> bool:
    words, value = (found, gold) if isinstance(found, Words) else (gold, found)
    if not isinstance(words, Words) or not isinstance(value, Value):
        return False
    plain = words_of(words.text).replace(" ", "")
    if plain in _INFINITE:
        return value.latex in (r"\infty", r"+\infty")
    if number := english_number(plain):
        other = Value(number, read_number(number), value.percent, value.degrees, None)
        pair = (other, value) if isinstance(found, Words) else (value, other)
        return same_value(*pair, context)
    formula = re.search(r"[|()\[\]!']", value.latex) and r"\text" not in value.latex  # |a-b| is not a-b
    if not formula and (
        value.unit
        or value.percent
        or value.degrees
        or value.base
        or not re.fullmatch(r"[A-Za-z]{1,4}", words.text.strip())
    ):
        return words_of(re.sub(r"\\text\{([^{}]*)\}", r"\1", value.latex)).replace(" ", "") == plain and bool(plain)
    return symbolic.same_formula(
        found.text if isinstance(found, Words) else value.latex,
        gold.text if isinstance(gold, Words) else value.latex,
        context.tolerance,
        (None, None),
        Fraction(1),
    )


def is_empty(shape: Shape) -> bool:
    if isinstance(shape, Many):
        return not shape.items
    if isinstance(shape, Value):
        return shape.latex in (r"\emptyset", r"\phi", "{}", r"\{\}")
    return isinstance(shape, Words) and words_of(shape.text).replace(" ", "") in _NOTHING
