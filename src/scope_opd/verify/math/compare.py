r"""Whether two answers, read into shapes, are the same answer.

Lists and sets compare without order, tuples with it, and items that carry names (x = 1, y = 2) or units by those. An
interval equals the inequality that describes it. ``name = value`` equals ``value``. What remains is held against each
other as formulas (``symbolic``).

Not covered: see ``shape``; infinite families of solutions but for multiples of pi.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from scope_opd.gold import Tolerance
from scope_opd.verify.math import shape as shapes
from scope_opd.verify.math import symbolic
from scope_opd.verify.math.numbers import read_number, same_number
from scope_opd.verify.math.shape import Clock, Group, Many, Matrix, Named, Relation, Shape, Union_, Value, Words
from scope_opd.verify.math.text import squeezed
from scope_opd.verify.math.units import LETTERS, Unit, conversion

MAX_PAIRS = 60
"""Items of lists that are matched with each other."""

_FLIPPED = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq", "=": "=", r"\neq": r"\neq"}
_INDEX = re.compile(r"_\{?[0-9]+\}?$")
_EXTREME = re.compile(r"_\{?\\?(?:text\{)?(?:max|min)\}?\}?\s*$")
_CALL = re.compile(r"([A-Za-z]|\\[a-zA-Z]+)\(([a-z])\)")
_ABSOLUTE = re.compile(r"\s*\|\s*([a-zA-Z])\s*\|\s*")
_NOTHING = frozenset(
    {"nosolution", "nosolutions", "norealsolution", "norealsolutions", "emptyset", "none", "nosuchnumber"}
)
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


def same(found: Shape, gold: Shape, context: Context) -> bool:
    """Whether ``found`` is the answer ``gold``."""
    if isinstance(found, Many) and len(found.items) == 1 and not (isinstance(gold, Many) and gold.braces):
        return same(found.items[0], gold, context)
    if isinstance(gold, Many) and len(gold.items) == 1 and not isinstance(found, Many):
        return same(found, gold.items[0], context)
    if _is_empty(gold) or _is_empty(found):
        return _is_empty(gold) and _is_empty(found)
    if isinstance(gold, Named) or isinstance(found, Named):
        return _same_named(found, gold, context)
    if isinstance(gold, Many) and isinstance(found, Many):
        return _same_many(found, gold, context)
    if isinstance(gold, Value) and isinstance(found, Value):
        return same_value(found, gold, context)
    if isinstance(gold, Words) and isinstance(found, Words):
        return _same_words(found.text, gold.text) or _restates(found.text, gold.text, context)
    if isinstance(gold, Clock) or isinstance(found, Clock):
        return _same_clock(found, gold, context)
    if isinstance(gold, Group) and isinstance(found, Group):
        return _same_group(found, gold, context)
    if isinstance(gold, Matrix) or isinstance(found, Matrix):
        return _same_matrix(found, gold, context)
    if isinstance(gold, Relation) and isinstance(found, Relation):
        return _same_relation(found, gold, context) or _same_sets(found, gold, context)
    if isinstance(gold, Relation) and isinstance(found, Value | Words):
        return _answers_equation(gold, found, context)
    if isinstance(found, Relation) and isinstance(gold, Value | Words):
        return _answers_equation(found, gold, context, found_is_relation=True)
    if (isinstance(gold, Many) and isinstance(found, Group)) or (isinstance(found, Many) and isinstance(gold, Group)):
        return _same_list_and_tuple(found, gold, context) or _same_sets(found, gold, context)
    if isinstance(gold, Value) and gold.grouped and isinstance(found, Many):
        return _same_many(found, Many(gold.grouped), context)
    if isinstance(found, Value) and found.grouped and isinstance(gold, Many):
        return _same_many(Many(found.grouped), gold, context)
    if (isinstance(found, Many) and isinstance(gold, Value)) or (isinstance(gold, Many) and isinstance(found, Value)):
        return _decimal_comma(found, gold, context)
    if (isinstance(gold, Words) and isinstance(found, Value)) or (isinstance(gold, Value) and isinstance(found, Words)):
        return _same_words_and_value(found, gold, context)
    return _same_sets(found, gold, context)


# --- values -----------------------------------------------------------------------------------------------------------


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
    if factor is None:
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
    return _same_latex(found, gold, context, factor)


def _same_latex(found: Value, gold: Value, context: Context, factor: Fraction = Fraction(1)) -> bool:
    if factor == 1 and squeezed(found.latex) == squeezed(gold.latex):
        return True
    if found.number and gold.number:
        scaled = (
            found.number if factor == 1 else replace(found.number, value=found.number.value * factor, decimals=None)
        )
        return same_number(scaled, gold.number, context.tolerance)
    if _same_family(found.latex, gold.latex):
        return True
    numbers = (found.number if factor == 1 else None, gold.number)
    return symbolic.same_formula(found.latex, gold.latex, context.tolerance, numbers, factor)


def _same_percent(found: Value, gold: Value, context: Context) -> bool:
    """Per cent on one side only: 50% is 1/2, and it is 50 where the answer is a number of per cent."""
    share, other = (found, gold) if found.percent else (gold, found)
    share, other = replace(share, percent=False), replace(other, percent=False)
    hundredth = Fraction(1, 100)
    if found.percent:
        if _same_latex(share, other, context, hundredth):
            return True
    elif _same_latex(other, share, context, Fraction(100)):
        return True
    counted = (
        other.number is None or abs(other.number.value) > 1 or "%" in context.problem or "percent" in context.problem
    )
    return counted and _same_latex(replace(found, percent=False), replace(gold, percent=False), context)


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
    return symbolic.same_parsed(renamed, right)


def _decimal_comma(found: Shape, gold: Shape, context: Context) -> bool:
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


# --- words ------------------------------------------------------------------------------------------------------------


def words_of(text: str) -> str:
    """Words in lower case, without articles and punctuation."""
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", text)
    text = re.sub(r"[^\w\\+*/^=<>-]+", " ", text.casefold().replace("'s", "s"))
    return " ".join(word for word in text.split() if word not in ("the", "a", "an") or text.strip() == word)


def _same_words(found: str, gold: str) -> bool:
    left, right = words_of(found), words_of(gold)
    if len(found.strip()) == 1 or len(gold.strip()) == 1:
        return found.strip() == gold.strip()
    if not left or not right:
        return False
    if left == right:
        return True
    plain = left.replace(" ", ""), right.replace(" ", "")
    if plain[0] == plain[1] or (plain[0] in _INFINITE and plain[1] in _INFINITE):
        return True
    if right in ("yes", "no", "true", "false"):
        opposite = {"yes": "no", "no": "yes", "true": "false", "false": "true"}[right]
        head = re.match(r"\s*([A-Za-z]+)\s*[,.;:]", found)
        return bool(head) and head[1].casefold() == right and opposite not in left.split() and "not" not in left.split()
    if len(plain[0]) <= 3 and len(plain[1]) <= 3:
        return symbolic.same_formula(found, gold, None, (None, None), Fraction(1))
    return False


def _restates(found: str, gold: str, context: Context) -> bool:
    """One is the other followed by at least three words of the problem: "Petya", "Petya will receive the token"."""
    short, long = sorted((words_of(found), words_of(gold)), key=len)
    rest = long.removeprefix(short + " ")
    return bool(short) and rest != long and len(rest.split()) >= 3 and f" {rest} " in f" {context.words} "


def _same_words_and_value(found: Shape, gold: Shape, context: Context) -> bool:
    words, value = (found, gold) if isinstance(found, Words) else (gold, found)
    if not isinstance(words, Words) or not isinstance(value, Value):
        return False
    plain = words_of(words.text).replace(" ", "")
    if plain in _INFINITE:
        return value.latex in (r"\infty", r"+\infty")
    if number := shapes.english_number(plain):
        other = Value(number, read_number(number), value.percent, value.degrees, None)
        pair = (other, value) if isinstance(found, Words) else (value, other)
        return same_value(*pair, context)
    if (
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


def _is_empty(shape: Shape) -> bool:
    if isinstance(shape, Many):
        return not shape.items
    if isinstance(shape, Value):
        return shape.latex in (r"\emptyset", r"\phi", "{}", r"\{\}")
    return isinstance(shape, Words) and words_of(shape.text).replace(" ", "") in _NOTHING


# --- lists, tuples, sets ----------------------------------------------------------------------------------------------


def _same_many(found: Many, gold: Many, context: Context) -> bool:
    if len(found.items) > MAX_PAIRS or len(gold.items) > MAX_PAIRS:
        return len(found.items) == len(gold.items) and all(
            map(lambda a, b: squeezed_shape(a) == squeezed_shape(b), found.items, gold.items)
        )
    ordered = _order(found.items, gold.items)
    if ordered is not None:
        return (
            ordered
            and len(found.items) == len(gold.items)
            and all(same(a, b, context) for a, b in zip(*_by_label(found.items, gold.items), strict=True))
        )
    if _set_like(found) and _set_like(gold) and _same_sets(found, gold, context):
        return True
    return _unordered(found.items, gold.items, context)


def _unordered(found: tuple[Shape, ...], gold: tuple[Shape, ...], context: Context) -> bool:
    """Every gold item is found and every found item is gold; a gold item twice asks for as many."""
    if len(found) < len(gold):
        return False
    rest = list(gold)
    extra: list[Shape] = []
    for item in found:
        for at, other in enumerate(rest):
            if same(item, other, context):
                del rest[at]
                break
        else:
            extra.append(item)
    if rest:
        return False
    if extra and any(same(a, b, context) for i, a in enumerate(gold) for b in gold[i + 1 :]):
        return False  # a gold list in which numbers repeat: how often matters
    return all(any(same(item, other, context) for other in gold) for item in extra)


def _labels(items: tuple[Shape, ...]) -> list[str] | None:
    """What distinguishes the items besides their values: names, or units; None if nothing does."""
    if all(isinstance(item, Named) for item in items):
        names = [item.name for item in items if isinstance(item, Named)]
        bases = [_INDEX.sub("", name) for name in names]
        return names if len(set(bases)) == len(bases) else None
    if all(isinstance(item, Value) and item.unit is not None for item in items):
        words = [item.unit.words for item in items if isinstance(item, Value) and item.unit]
        return words if len(set(words)) == len(words) else None
    return None


def _order(found: tuple[Shape, ...], gold: tuple[Shape, ...]) -> bool | None:
    """Whether the items compare one by one; None: without order. False: their labels contradict each other."""
    left, right = _labels(found), _labels(gold)
    if len(gold) < 2 or (left is None and right is None):
        return None
    return not (
        left and right and sorted(left) != sorted(right) and all(isinstance(item, Named) for item in (*found, *gold))
    )


def _by_label(found: tuple[Shape, ...], gold: tuple[Shape, ...]) -> tuple[list[Shape], list[Shape]]:
    left, right = _labels(found), _labels(gold)
    if left and right and sorted(left) == sorted(right):
        paired = [found[left.index(label)] for label in right]
        return [_bare(item) for item in paired], [_bare(item) for item in gold]
    drop = left is not None and right is not None
    return [_bare(item) if drop else item for item in found], [_bare(item) if drop else item for item in gold]


def _bare(item: Shape) -> Shape:
    if isinstance(item, Value) and item.unit is not None and item.unit.kind is None:
        return replace(item, unit=None)
    return item


def squeezed_shape(shape: Shape) -> str:
    """A spelling of a shape, for lists too long to match item by item."""
    return squeezed(str(shape))


def _same_group(found: Group, gold: Group, context: Context) -> bool:
    if len(found.items) != len(gold.items):
        return False
    if len(gold.items) <= 2 and _brackets(found) != _brackets(gold):
        return False
    return all(same(a, b, context) for a, b in zip(found.items, gold.items, strict=True))


def _brackets(group: Group) -> tuple[str, str]:
    """The brackets; at an infinite end they are round."""
    ends = [isinstance(item, Value) and item.latex.lstrip("+-") == r"\infty" for item in group.items]
    return ("(" if ends[0] else group.opening, ")" if ends[-1] else group.ending)


def _same_list_and_tuple(found: Shape, gold: Shape, context: Context) -> bool:
    """(1, 2) against 1, 2: a gold tuple without its brackets; or a gold list of named or three items as a tuple."""
    many, group = (found, gold) if isinstance(found, Many) else (gold, found)
    if not isinstance(many, Many) or not isinstance(group, Group) or many.braces or len(many.items) != len(group.items):
        return False
    if isinstance(gold, Many) and len(gold.items) < 3 and _labels(gold.items) is None:
        return False
    if isinstance(gold, Group) and (gold.opening, gold.ending) != ("(", ")"):
        return False
    left, right = (many.items, group.items) if found is many else (group.items, many.items)
    return all(same(a, b, context) for a, b in zip(left, right, strict=True))


def _same_matrix(found: Shape, gold: Shape, context: Context) -> bool:
    rows = [_rows(side) for side in (found, gold)]
    if rows[0] is None or rows[1] is None:
        if isinstance(found, Matrix | Value) and isinstance(gold, Matrix | Value):
            return symbolic.same_formula(found.latex, gold.latex, None, (None, None), Fraction(1))
        return False
    left, right = rows
    if isinstance(found, Group) or isinstance(gold, Group):  # a vector written as a tuple
        left, right = [
            [[item] for row in side for item in row] if 1 in (len(side), len(side[0])) else side
            for side in (left, right)
        ]
    return [len(row) for row in left] == [len(row) for row in right] and all(
        same(a, b, context) for r, s in zip(left, right, strict=True) for a, b in zip(r, s, strict=True)
    )


def _rows(shape: Shape) -> list[list[Shape]] | None:
    if isinstance(shape, Matrix):
        return [list(row) for row in shape.rows]
    if isinstance(shape, Group) and shape.opening + shape.ending in ("()", "[]"):
        return [[item] for item in shape.items]
    return None


def _same_clock(found: Shape, gold: Shape, context: Context) -> bool:
    if isinstance(found, Clock) and isinstance(gold, Clock):
        if _is_time(found) and _is_time(gold):
            return _same_time(found, gold)
        if len(found.numbers) != len(gold.numbers):
            return False
        return all(
            _same_product(found.numbers[0], gold.numbers[i], gold.numbers[0], found.numbers[i], context)
            for i in range(1, len(gold.numbers))
        )
    clock, other = (found, gold) if isinstance(found, Clock) else (gold, found)
    if not isinstance(clock, Clock) or not isinstance(other, Value) or len(clock.numbers) != 2 or clock.half:
        return False
    ratio = shapes.read(rf"\frac{{{clock.numbers[0]}}}{{{clock.numbers[1]}}}")
    return isinstance(ratio, Value) and _same_latex(*((ratio, other) if clock is found else (other, ratio)), context)


def _is_time(clock: Clock) -> bool:
    return bool(clock.half) or (
        re.fullmatch(r"[0-9]{1,2}", clock.numbers[0]) is not None
        and int(clock.numbers[0]) <= 24
        and all(re.fullmatch(r"[0-5][0-9]", part) for part in clock.numbers[1:])
    )


def _same_time(found: Clock, gold: Clock) -> bool:
    times = []
    for clock in (found, gold):
        hour, minute, second = (*(int(float(part)) for part in clock.numbers), 0)[:3]
        if clock.half:
            hour = hour % 12 + (12 if clock.half == "pm" else 0)
        times.append((hour, minute, second))
    if bool(found.half) != bool(gold.half):
        return times[0] == times[1] or (
            (times[0][0] % 12, *times[0][1:]) == (times[1][0] % 12, *times[1][1:])
            and max(int(found.numbers[0]), int(gold.numbers[0])) <= 12
        )
    return times[0] == times[1]


def _same_product(a: str, b: str, c: str, d: str, context: Context) -> bool:
    return symbolic.same_formula(rf"({a})\cdot ({b})", rf"({c})\cdot ({d})", None, (None, None), Fraction(1))


# --- names, equations, inequalities -----------------------------------------------------------------------------------


def _same_named(found: Shape, gold: Shape, context: Context) -> bool:
    if isinstance(found, Named) and isinstance(gold, Named):
        names = [_EXTREME.sub("", side.name) for side in (found, gold)]
        if names[0] == names[1]:
            return same(found.value, gold.value, context)
        calls = [_CALL.fullmatch(name) for name in names]
        if calls[0] and calls[1] and calls[0][1] == calls[1][1]:
            return same(_renamed(found.value, calls[0][2], calls[1][2]), gold.value, context)
        if _INDEX.sub("", names[0]) == _INDEX.sub("", names[1]) and (
            _INDEX.search(names[0]) is None or _INDEX.search(names[1]) is None
        ):
            return same(found.value, gold.value, context)
        return _same_relation(_equation(found), _equation(gold), context, curves=True)
    if isinstance(found, Named):
        if isinstance(gold, Relation):
            return _same_relation(_equation(found), gold, context)
        return same(found.value, gold, context)
    if isinstance(gold, Named):
        if isinstance(found, Relation):
            return _same_relation(found, _equation(gold), context, curves=True)
        return same(found, gold.value, context)
    return False


def _renamed(shape: Shape, old: str, new: str) -> Shape:
    if isinstance(shape, Value):
        latex = re.sub(rf"(?<![\\a-zA-Z]){old}(?![a-zA-Z])", new, shape.latex)
        return replace(shape, latex=latex)
    if isinstance(shape, Words):
        return Words(new) if shape.text.strip() == old else shape
    return shape


def _equation(named: Named) -> Relation:
    return Relation((named.name, latex_of(named.value)), ("=",))


def latex_of(shape: Shape) -> str:
    """The formula of a single value; "" for shapes that have none."""
    if isinstance(shape, Value) and not (shape.unit or shape.percent or shape.degrees or shape.base):
        return shape.latex
    return shape.text if isinstance(shape, Words) else ""


def _same_relation(found: Relation, gold: Relation, context: Context, *, curves: bool = False) -> bool:
    """Chains side by side, in either direction; equations also as curves.

    ``curves``: one of them is ``name = formula``; then both must be relations between at least two variables, because
    ``2x = 6`` is not yet the answer ``x = 3``.
    """
    if len(found.sides) == len(gold.sides):
        for sides, operators in (
            (found.sides, found.operators),
            (found.sides[::-1], tuple(_FLIPPED.get(o, o) for o in found.operators[::-1])),
        ):
            if operators == gold.operators and all(
                _same_side(a, b, context) for a, b in zip(sides, gold.sides, strict=True)
            ):
                return True
    if len(found.operators) == len(gold.operators) == 1 and found.operators != ("=",) and gold.operators != ("=",):
        if squeezed(found.operators[0].join(found.sides)) in context.problem:
            return False
        turns = [
            sign
            for sign, o in ((1, found.operators[0]), (-1, _FLIPPED.get(found.operators[0])))
            if o == gold.operators[0]
        ]
        return any(_same_difference(found.sides, gold.sides, sign) for sign in turns)
    if found.operators == gold.operators == ("=",):
        left, right = (found.sides[0], found.sides[1]), (gold.sides[0], gold.sides[1])
        variables = symbolic.symbols_of(gold.sides[0]) | symbolic.symbols_of(gold.sides[1])
        if len(variables) < 2 and (curves or len(variables) < 1 or squeezed("=".join(left)) in context.problem):
            return False
        return symbolic.proportional(left, right)
    return False


def _same_difference(found: tuple[str, ...], gold: tuple[str, ...], sign: int) -> bool:
    """Whether the sides of two inequalities differ by the same amount, or by its negative."""
    a, b = found if sign > 0 else found[::-1]
    difference = rf"({a}) - ({b})"
    return symbolic.same_formula(difference, rf"({gold[0]}) - ({gold[1]})", None, (None, None), Fraction(1))


def _same_side(found: str, gold: str, context: Context) -> bool:
    return squeezed(found) == squeezed(gold) or same(shapes.read(found), shapes.read(gold), context)


def _answers_equation(relation: Relation, other: Shape, context: Context, *, found_is_relation: bool = False) -> bool:
    """``a = b = value`` against ``value``: a true computation, or an expression that the problem asks for."""
    if set(relation.operators) != {"="}:
        return False
    *before, last = relation.sides
    side = shapes.read(last)
    if not (same(side, other, context) if found_is_relation else same(other, side, context)):
        return False
    if all(symbolic.same_formula(part, last, context.tolerance, (None, None), Fraction(1)) for part in before):
        return True
    expression = squeezed(before[0])
    asked = (
        len(before) == 1 and len(expression) > 2 and re.search("[A-Za-z]", expression) and expression in context.problem
    )
    return bool(asked) and squeezed(f"{before[0]}={last}") not in context.problem


@dataclass(frozen=True, slots=True)
class Piece:
    """One interval, or with ``low is high`` one point."""

    low: str
    low_open: bool
    high: str
    high_open: bool


_WHOLE = Piece("-" + r"\infty", True, r"\infty", True)


def _set_like(shape: Shape) -> bool:
    if isinstance(shape, Many):
        return any(_set_like(item) for item in shape.items)
    return isinstance(shape, Relation | Union_) or (isinstance(shape, Group) and len(shape.items) == 2)


def _same_sets(found: Shape, gold: Shape, context: Context) -> bool:
    left, right = _pieces(found), _pieces(gold)
    if not left or not right or len(left) != len(right):
        return False
    rest = list(right)
    for piece in left:
        for at, other in enumerate(rest):
            if _same_piece(piece, other, context):
                del rest[at]
                break
        else:
            return False
    return True


def _same_piece(found: Piece, gold: Piece, context: Context) -> bool:
    return (
        (found.low_open, found.high_open) == (gold.low_open, gold.high_open)
        and _same_side(found.low, gold.low, context)
        and _same_side(found.high, gold.high, context)
    )


def _pieces(shape: Shape) -> list[Piece] | None:
    """A set of reals as intervals and points; None if it is not written as one."""
    if isinstance(shape, Group) and len(shape.items) == 2:
        ends = [latex_of(item) for item in shape.items]
        brackets = _brackets(shape)
        return [Piece(ends[0], brackets[0] == "(", ends[1], brackets[1] == ")")] if all(ends) else None
    if isinstance(shape, Relation):
        return _pieces_of_relation(shape)
    if isinstance(shape, Value) and re.fullmatch(r"\\mathbb\s*\{?R\}?|\\R", shape.latex):
        return [_WHOLE]
    if isinstance(shape, Value) and (
        cut := re.fullmatch(r"\\mathbb\s*\{?R\}?\s*(?:\\setminus|\\backslash|-)\s*(\\\{.*\\\})", shape.latex)
    ):
        points = shapes.read(cut[1])
        latex = [latex_of(item) for item in points.items] if isinstance(points, Many) else []
        return _without(latex) if len(latex) == 1 and all(latex) else None
    if isinstance(shape, Named):
        point = latex_of(shape.value)
        return [Piece(point, False, point, False)] if point else None
    parts: tuple[Shape, ...] = ()
    if isinstance(shape, Union_):
        parts = shape.parts
    elif isinstance(shape, Many):
        if shape.braces or not any(isinstance(item, Relation | Group | Union_) for item in shape.items):
            points = [latex_of(item) for item in shape.items]
            return [Piece(point, False, point, False) for point in points] if all(points) and shape.braces else None
        parts = shape.items
    pieces: list[Piece] = []
    for part in parts:
        inner = _pieces(part)
        if inner is None:
            return None
        pieces += inner
    return pieces or None


def _without(points: list[str]) -> list[Piece]:
    return [Piece(r"-\infty", True, points[0], True), Piece(points[0], True, r"\infty", True)]


def _pieces_of_relation(relation: Relation) -> list[Piece] | None:
    """A solved inequality in one variable: x < 3, 1 < x <= 2, x != 3."""
    sides, operators = relation.sides, relation.operators
    if any(_ABSOLUTE.fullmatch(side) for side in sides):
        return _pieces_of_absolute(relation)
    if len(sides) == 2 and not _is_variable(sides[0]):
        sides, operators = sides[::-1], (_FLIPPED.get(operators[0], operators[0]),)
    if len(sides) == 2 and _is_variable(sides[0]) and not _is_variable(sides[1]):
        bound = sides[1]
        if operators[0] == r"\neq":
            return _without([bound])
        if operators[0] in ("<", r"\leq"):
            return [Piece(r"-\infty", True, bound, operators[0] == "<")]
        if operators[0] in (">", r"\geq"):
            return [Piece(bound, operators[0] == ">", r"\infty", True)]
        return None
    if len(sides) == 3 and _is_variable(sides[1]):
        if all(o in (">", r"\geq") for o in operators):
            sides, operators = sides[::-1], tuple(_FLIPPED[o] for o in operators[::-1])
        if all(o in ("<", r"\leq") for o in operators):
            return [Piece(sides[0], operators[0] == "<", sides[2], operators[1] == "<")]
    return None


def _pieces_of_absolute(relation: Relation) -> list[Piece] | None:
    """|x| < 3, 1 <= |x| <= 2, |x| > 1: an inequality on both sides of zero."""
    sides = tuple(match[1] if (match := _ABSOLUTE.fullmatch(side)) else side for side in relation.sides)
    bounds = [bound for bound in sides if not _is_variable(bound)]
    numbers = [read_number(bound) for bound in bounds]
    positive = _pieces_of_relation(Relation(sides, relation.operators))
    if not positive or len(positive) != 1 or any(number is None or number.value <= 0 for number in numbers):
        return None
    piece = positive[0]
    if piece.low == r"-\infty":
        return [Piece(f"-{piece.high}", piece.high_open, piece.high, piece.high_open)]
    low = f"-{piece.low}"
    high = r"-\infty" if piece.high == r"\infty" else f"-{piece.high}"
    return [Piece(high, piece.high_open, low, piece.low_open), piece]


def _is_variable(text: str) -> bool:
    return (
        re.fullmatch(
            r"\s*(?:[A-Za-z]|\\(?:theta|alpha|beta|lambda|mu|rho|phi|omega))(?:_\{?\w\}?)?\s*(?:\([a-z]\))?", text
        )
        is not None
    )
