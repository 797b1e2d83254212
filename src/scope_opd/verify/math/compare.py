r"""Whether two answers, read into shapes, are the same answer.

Lists and sets compare without order, tuples with it, and items that carry names (x = 1, y = 2) or units by those.

Not covered: see ``reading``.
"""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

from scope_opd.gold import Tolerance
from scope_opd.verify.math import symbolic
from scope_opd.verify.math.compare_sets import (
    INDEX,
    answers_equation,
    brackets,
    same_named,
    same_relation,
    same_sets,
    set_like,
)
from scope_opd.verify.math.compare_values import (
    Context,
    decimal_comma,
    is_empty,
    restates,
    same_latex,
    same_value,
    same_words,
    same_words_and_value,
)
from scope_opd.verify.math.reading import read
from scope_opd.verify.math.shapes import Clock, Group, Many, Matrix, Named, Relation, Shape, Value, Words
from scope_opd.verify.math.text import squeezed

MAX_PAIRS = 60
"""Items of lists that are matched with each other."""


def same(found: Shape, gold: Shape, context: Context) -> bool:
    """Whether ``found`` is the answer ``gold``."""
    if any(isinstance(side, Many) and side.items and side.braces and is_empty(side.items[0]) for side in (found, gold)):
        return found == gold  # the set that holds the empty set is not empty
    if isinstance(found, Many) and len(found.items) == 1 and not (isinstance(gold, Many) and gold.braces):
        return same(found.items[0], gold, context)
    if isinstance(gold, Many) and len(gold.items) == 1 and not isinstance(found, Many):
        return same(found, gold.items[0], context)
    if isinstance(found, Relation) and r"\approx" in found.operators:
        return _same_approximated(found, gold, context)
    if isinstance(gold, Relation) and r"\approx" in gold.operators:
        return same(found, _exact_part(gold), context)
    if is_empty(gold) or is_empty(found):
        return is_empty(gold) and is_empty(found)
    if isinstance(gold, Named) or isinstance(found, Named):
        return same_named(found, gold, context)
    if isinstance(gold, Many) and isinstance(found, Many):
        return _same_many(found, gold, context)
    if isinstance(gold, Value) and isinstance(found, Value):
        return same_value(found, gold, context)
    if isinstance(gold, Words) and isinstance(found, Words):
        return same_words(found.text, gold.text) or restates(found.text, gold.text, context)
    if isinstance(gold, Clock) or isinstance(found, Clock):
        return _same_clock(found, gold, context)
    if isinstance(gold, Group) and isinstance(found, Group):
        return _same_group(found, gold, context)
    if (isinstance(gold, Words) and isinstance(found, Many)) or (isinstance(found, Words) and isinstance(gold, Many)):
        return _same_letters(found, gold)
    if isinstance(gold, Matrix) or isinstance(found, Matrix):
        return _same_matrix(found, gold, context)
    if isinstance(gold, Relation) and isinstance(found, Relation):
        return same_relation(found, gold, context) or same_sets(found, gold, context)
    if isinstance(gold, Relation) and isinstance(found, Value | Words):
        return answers_equation(gold, found, context) or same_sets(found, gold, context)
    if isinstance(found, Relation) and isinstance(gold, Value | Words):
        return answers_equation(found, gold, context, found_is_relation=True) or same_sets(found, gold, context)
    if (
        (isinstance(found, Many) and found.items and not found.braces)
        and isinstance(gold, Value | Words)
        and all(same(item, gold, context) for item in found.items)
    ):
        return True  # 5 or 5.0
    if (isinstance(gold, Many) and isinstance(found, Group)) or (isinstance(found, Many) and isinstance(gold, Group)):
        return _same_list_and_tuple(found, gold, context) or same_sets(found, gold, context)
    if isinstance(gold, Value) and gold.grouped and isinstance(found, Many):
        return _same_many(found, Many(gold.grouped), context)
    if isinstance(found, Value) and found.grouped and isinstance(gold, Many):
        return _same_many(Many(found.grouped), gold, context)
    if (isinstance(found, Many) and isinstance(gold, Value)) or (isinstance(gold, Many) and isinstance(found, Value)):
        return decimal_comma(found, gold, context)
    if (isinstance(gold, Words) and isinstance(found, Value)) or (isinstance(gold, Value) and isinstance(found, Words)):
        return same_words_and_value(found, gold, context)
    return same_sets(found, gold, context)


def _exact_part(relation: Relation) -> Shape:
    at = relation.operators.index(r"\approx")
    spelt = [part for pair in zip(relation.sides[:at], relation.operators[:at], strict=True) for part in pair]
    return read(" ".join([*spelt, relation.sides[at]]))


def _same_approximated(found: Relation, gold: Shape, context: Context) -> bool:
    """``exact = formula`` with an approximation behind it that fits: either of them may be the answer."""
    at = found.operators.index(r"\approx")
    if at + 2 != len(found.sides):
        return False
    exact, rounded = _exact_part(found), read(found.sides[-1])
    decimals = rounded.number.decimals if isinstance(rounded, Value) and rounded.number else None
    loose = replace(context, tolerance=Tolerance(absolute=0.99 * 10.0 ** -(decimals or 0)))
    value = exact.value if isinstance(exact, Named) else exact
    if not same(rounded, value, loose):
        return False
    return same(exact, gold, context) or same(rounded, gold, context)


def _same_letters(found: Shape, gold: Shape) -> bool:
    """ABD for A, B, D: several choices written together."""
    words, many = (found, gold) if isinstance(found, Words) else (gold, found)
    if not isinstance(words, Words) or not isinstance(many, Many):
        return False
    letters = [item.text.strip("() ") for item in many.items if isinstance(item, Words)]
    together = re.fullmatch(r"[A-H]{2,8}", words.text.strip()) and "".join(sorted(set(words.text.strip())))
    return len(letters) == len(many.items) and together == words.text.strip() and sorted(letters) == list(together)


def _same_many(found: Many, gold: Many, context: Context) -> bool:
    if len(found.items) > MAX_PAIRS or len(gold.items) > MAX_PAIRS:
        return len(found.items) == len(gold.items) and all(
            map(lambda a, b: squeezed_shape(a) == squeezed_shape(b), found.items, gold.items)
        )
    if {found.joint, gold.joint} == {"and", "or"} and any(isinstance(item, Relation) for item in gold.items):
        return same_sets(found, gold, context)
    ordered = _order(found.items, gold.items)
    if ordered is not None:
        return (
            ordered
            and len(found.items) == len(gold.items)
            and all(same(a, b, context) for a, b in zip(*_by_label(found.items, gold.items), strict=True))
        )
    if set_like(found) and set_like(gold) and same_sets(found, gold, context):
        return True
    if found.braces and gold.braces:
        return _unordered(found.items, gold.items, context) or _unordered(gold.items, found.items, context)
    return _unordered(found.items, gold.items, context)


def _unordered(found: tuple[Shape, ...], gold: tuple[Shape, ...], context: Context) -> bool:
    """Every gold item is found and every found item is gold; a gold item twice asks for as many."""
    if len(found) < len(gold):
        return False
    rest = list(gold)
    extra: list[Shape] = []
    for item in found:
        for at, other in enumerate(rest):
            if _is_braced(item) == _is_braced(other) and same(item, other, context):
                del rest[at]
                break
        else:
            extra.append(item)
    if rest:
        return False
    if extra and any(same(a, b, context) for i, a in enumerate(gold) for b in gold[i + 1 :]):
        return False  # a gold list in which numbers repeat: how often matters
    return all(
        any(_is_braced(item) == _is_braced(other) and same(item, other, context) for other in gold) for item in extra
    )


def _is_braced(shape: Shape) -> bool:
    return isinstance(shape, Many) and shape.braces


def _labels(items: tuple[Shape, ...]) -> list[str] | None:
    """What distinguishes the items besides their values: names, or units; None if nothing does."""
    if all(isinstance(item, Named) for item in items):
        names = [item.name for item in items if isinstance(item, Named)]
        bases = [INDEX.sub("", name) for name in names]
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
    if len(gold.items) <= 2 and brackets(found) != brackets(gold):
        return False
    return all(same(a, b, context) for a, b in zip(found.items, gold.items, strict=True))


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
    left, right = _rows(found), _rows(gold)
    if left is None or right is None:
        if isinstance(found, Matrix | Value) and isinstance(gold, Matrix | Value):
            return symbolic.same_formula(found.latex, gold.latex, None, (None, None), Fraction(1))
        return False
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
    if isinstance(shape, Group) and all(isinstance(i, Group) and i.opening + i.ending == "[]" for i in shape.items):
        return [list(row.items) for row in shape.items if isinstance(row, Group)]
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
    ratio = read(rf"\frac{{{clock.numbers[0]}}}{{{clock.numbers[1]}}}")
    return isinstance(ratio, Value) and same_latex(*((ratio, other) if clock is found else (other, ratio)), context)


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
