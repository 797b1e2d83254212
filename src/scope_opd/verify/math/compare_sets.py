r"""Names, equations, inequalities and sets of real numbers.

``name = value`` equals ``value``; an interval equals the inequality that describes it. An equation that still has to be
solved is not the answer that solves it.

Not covered: inequalities in several variables beyond their own spelling; sets that are not unions of intervals.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

from scope_opd.verify.math import symbolic
from scope_opd.verify.math.compare_values import Context
from scope_opd.verify.math.numbers import read_number
from scope_opd.verify.math.reading import read
from scope_opd.verify.math.shapes import Group, Many, Named, Relation, Shape, Unite, Value, Words
from scope_opd.verify.math.text import squeezed

_FLIPPED = {"<": ">", ">": "<", r"\leq": r"\geq", r"\geq": r"\leq", "=": "=", r"\neq": r"\neq"}
INDEX = re.compile(r"_\{?[0-9]+\}?$")
_SYMBOL = re.compile(r"\\?[a-zA-Z]{3,}|\\[a-zA-Z]+|[a-zA-Z]")
_LENGTH = re.compile(r"^(?:\||\\overline\{)\s*([A-Z]{2})\s*[|}]$")
_EXTREME = re.compile(r"_\{?\\?(?:text\{)?(?:max|min)\}?\}?\s*$")
_CALL = re.compile(r"([A-Za-z]|\\[a-zA-Z]+)\(([a-z])\)")
_ABSOLUTE = re.compile(r"\s*\|\s*([a-zA-Z])\s*\|\s*")


def same(found: Shape, gold: Shape, context: Context) -> bool:
    """``compare.same``, which needs this module."""
    from scope_opd.verify.math import compare

    return compare.same(found, gold, context)


def brackets(group: Group) -> tuple[str, str]:
    """The brackets; at an infinite end they are round."""
    ends = [isinstance(item, Value) and item.latex.lstrip("+-") == r"\infty" for item in group.items]
    return ("(" if ends[0] else group.opening, ")" if ends[-1] else group.ending)


def same_named(found: Shape, gold: Shape, context: Context) -> bool:
    if isinstance(found, Named) and isinstance(gold, Named):
        names = [_LENGTH.sub(r"\1", _EXTREME.sub("", side.name)) for side in (found, gold)]
        if names[0] == names[1]:
            return same(found.value, gold.value, context) or _same_constants(found.value, found, gold, context)
        if names[0].startswith("mod ") or names[1].startswith("mod "):  # x = 7 (mod 12), and 7 (mod 12)
            return names[0].rsplit(" ", 1)[1] == names[1].rsplit(" ", 1)[-1] and same(found.value, gold.value, context)
        for short, long in (names, names[::-1]):
            if re.fullmatch(r"[A-Z]", short) and re.fullmatch(rf"{short}\([A-Z]\w*\)", long):
                return same(found.value, gold.value, context)  # P = 1/6 for P(A) = 1/6
        calls = [_CALL.fullmatch(name) for name in names]
        if calls[0] and calls[1] and calls[0][1] == calls[1][1]:
            if calls[0][2] != calls[1][2] and calls[1][2] in symbolic.symbols_of(latex_of(found.value)):
                return False  # f(y) = 2x
            value = _renamed(found.value, calls[0][2], calls[1][2])
            return same(value, gold.value, context) or _same_constants(value, found, gold, context)
        for call in filter(None, calls):
            if "y" in names and call[2] in symbolic.symbols_of(latex_of(gold.value)):
                return same(found.value, gold.value, context)  # y = 2x + 1 for f(x) = 2x + 1
        if INDEX.sub("", names[0]) == INDEX.sub("", names[1]) and (
            INDEX.search(names[0]) is None or INDEX.search(names[1]) is None
        ):
            return same(found.value, gold.value, context)
        return same_relation(_equation(found), _equation(gold), context, curves=True)
    if isinstance(found, Named):
        if isinstance(gold, Relation):
            return same_relation(_equation(found), gold, context)
        return same(found.value, gold, context)
    if isinstance(gold, Named):
        if isinstance(found, Relation):
            if isinstance(gold.value, Relation):
                return same(found, gold.value, context)  # A = {x | 1 < x < 2}
            return same_relation(found, _equation(gold), context, curves=True)
        if same(found, gold.value, context):
            return True
        product = re.fullmatch(r"[a-z]{2,3}", gold.name) is not None  # xy = 6
        return product and isinstance(found, Value | Words) and answers_equation(_equation(gold), found, context)
    return False


def _same_constants(value: Shape, found: Named, gold: Named, context: Context) -> bool:
    """Whether two functions are the same up to the letter of a constant that one of them declares arbitrary."""
    declared = found.constant or gold.constant
    letters = [symbolic.symbols_of(latex_of(side)) for side in (value, gold.value)]
    only = [letters[0] - letters[1], letters[1] - letters[0]]
    if not declared or len(only[0]) != 1 or len(only[1]) != 1 or declared not in only[0] | only[1]:
        return False
    return same(_renamed(value, next(iter(only[0])), next(iter(only[1]))), gold.value, context)


def _renamed(shape: Shape, old: str, new: str) -> Shape:
    def letter(match: re.Match[str]) -> str:
        return new if match[0] == old else match[0]

    if isinstance(shape, Value):
        return replace(shape, latex=_SYMBOL.sub(letter, shape.latex))
    if isinstance(shape, Words) and len(shape.text.strip()) <= 3:
        return Words(_SYMBOL.sub(letter, shape.text))
    return shape


def _equation(named: Named) -> Relation:
    return Relation((named.name, latex_of(named.value)), ("=",))


def latex_of(shape: Shape) -> str:
    """The formula of a single value; "" for shapes that have none."""
    if isinstance(shape, Value) and not (shape.unit or shape.percent or shape.degrees or shape.base):
        return shape.latex
    return shape.text if isinstance(shape, Words) else ""


def same_relation(found: Relation, gold: Relation, context: Context, *, curves: bool = False) -> bool:
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
    return squeezed(found) == squeezed(gold) or same(read(found), read(gold), context)


def answers_equation(relation: Relation, other: Shape, context: Context, *, found_is_relation: bool = False) -> bool:
    """``a = b = value`` against ``value``: a true computation, or an expression that the problem asks for."""
    if set(relation.operators) != {"="}:
        return False
    if not found_is_relation and len(relation.sides) == 2:
        unknown = symbolic.symbols_of(relation.sides[0]) | symbolic.symbols_of(relation.sides[1])
        rest = unknown - symbolic.symbols_of(latex_of(other) or "0")
        if len(unknown) == 2 and len(rest) == 1:  # an expression in x, for an equation in x and y: y = expression
            sides = (next(iter(rest)), latex_of(other))
            return symbolic.proportional(sides, (relation.sides[0], relation.sides[1]))
    *before, last = relation.sides
    side = read(last)
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


ANY = r"\square"
"""The variable of an inequality that names none."""
_WHOLE = Piece("-" + r"\infty", True, r"\infty", True)


def set_like(shape: Shape) -> bool:
    if isinstance(shape, Many):
        return any(set_like(item) for item in shape.items)
    return isinstance(shape, Relation | Unite) or (isinstance(shape, Group) and len(shape.items) == 2)


def same_sets(found: Shape, gold: Shape, context: Context) -> bool:
    """Two sets of reals: interval by interval, else as sets if all their ends are numbers."""
    if not (is_set(found) or is_set(gold)):
        return False
    if any(isinstance(side, Many) and not side.braces and not is_set(side) for side in (found, gold)):
        return False
    variables = _set_variables(found), _set_variables(gold)
    if variables[0] and variables[1] and variables[0] != variables[1]:
        return False
    left, right = _pieces(found), _pieces(gold)
    if left and right and len(left) == len(right) and _same_pieces(left, right, context):
        return True
    sets = real_set(found), real_set(gold)
    return None not in sets and bool(sets[0] == sets[1]) and not sets[0].is_empty


def is_set(shape: Shape) -> bool:
    """Whether a shape can only be a set of reals: a list of pairs, and a pair, may be points."""
    if isinstance(shape, Many):
        parts = [item for item in shape.items if not isinstance(item, Named)]
        return not shape.braces and any(is_set(item) for item in parts) and all(set_like(item) for item in parts)
    if isinstance(shape, Group) and len(shape.items) == 2:
        infinite = any(isinstance(item, Value) and item.latex.lstrip("+-") == r"\infty" for item in shape.items)
        return infinite or (shape.opening, shape.ending) in (("[", ")"), ("(", "]"))
    return isinstance(shape, Relation | Unite)


def _set_variables(shape: Shape) -> frozenset[str]:
    """The variables of the inequalities in a shape."""
    if isinstance(shape, Many):
        return frozenset().union(*map(_set_variables, shape.items))
    if isinstance(shape, Relation):
        return frozenset(side.strip() for side in shape.sides if _is_variable(side) and side.strip() != ANY)
    return frozenset()


def _same_pieces(left: list[Piece], right: list[Piece], context: Context) -> bool:
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
        kinds = brackets(shape)
        return [Piece(ends[0], kinds[0] == "(", ends[1], kinds[1] == ")")] if all(ends) else None
    if isinstance(shape, Relation):
        return _pieces_of_relation(shape)
    if isinstance(shape, Value) and re.fullmatch(r"\\mathbb\s*\{?R\}?|\\R", shape.latex):
        return [_WHOLE]
    if isinstance(shape, Value) and (
        half := re.fullmatch(r"\\mathbb\s*\{?R\}?\s*[\^_]\s*\{?\s*([+-])\s*\}?", shape.latex)
    ):
        return [Piece("0", True, r"\infty", True) if half[1] == "+" else Piece(r"-\infty", True, "0", True)]
    if isinstance(shape, Value) and (
        cut := re.fullmatch(r"\\mathbb\s*\{?R\}?\s*(?:\\setminus|\\backslash|-)\s*(\\\{.*\\\})", shape.latex)
    ):
        points = read(cut[1])
        latex = [latex_of(item) for item in points.items] if isinstance(points, Many) else []
        return _without(latex) if len(latex) == 1 and all(latex) else None
    if isinstance(shape, Named):
        point = latex_of(shape.value)
        return [Piece(point, False, point, False)] if point else None
    parts: tuple[Shape, ...] = ()
    if isinstance(shape, Unite):
        if shape.operation != "union":
            return None
        parts = shape.parts
    elif isinstance(shape, Many):
        if shape.joint != "or" and any(isinstance(item, Relation) for item in shape.items):
            return None  # "x > 1 and x < 5": left to the sets
        if shape.braces or not any(isinstance(item, Relation | Group | Unite) for item in shape.items):
            members = [latex_of(item) for item in shape.items]
            return (
                [Piece(member, False, member, False) for member in members] if all(members) and shape.braces else None
            )
        parts = shape.items
    pieces: list[Piece] = []
    for part in parts:
        inner = _pieces(part)
        if inner is None:
            return None
        pieces += inner
    return pieces or None


def real_set(shape: Shape) -> Any:
    """The sympy set of reals that a shape stands for; None if it is none, or has ends that are not numbers."""
    from sympy import Complement, Intersection, Union

    if isinstance(shape, Unite) or (isinstance(shape, Many) and not shape.braces and len(shape.items) > 1):
        parts = [real_set(part) for part in (shape.parts if isinstance(shape, Unite) else shape.items)]
        if any(part is None for part in parts):
            return None
        if isinstance(shape, Unite):
            operations = {"union": Union, "intersection": Intersection, "difference": Complement}
            return operations[shape.operation](*parts)
        common = Intersection(*parts) if shape.joint != "or" else None
        if common is None or (common.is_empty and shape.joint == ","):
            return Union(*parts)
        return common
    pieces = _pieces(shape)
    if not pieces or isinstance(shape, Named):
        return None
    intervals = [_interval(piece) for piece in pieces]
    return None if any(interval is None for interval in intervals) else Union(*intervals)


def _interval(piece: Piece) -> Any:
    from sympy import Interval

    ends = [symbolic.parse(end) for end in (piece.low, piece.high)]
    if any(end is None or not hasattr(end, "doit") or end.free_symbols for end in ends):
        return None
    low, high = (end.doit() for end in ends)
    if low.is_extended_real is not True or high.is_extended_real is not True:
        return None
    return Interval(low, high, piece.low_open, piece.high_open)


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
    return text.strip() == ANY or (
        re.fullmatch(
            r"\s*(?:[A-Za-z]|\\(?:theta|alpha|beta|lambda|mu|rho|phi|omega))(?:_\{?\w\}?)?\s*(?:\([a-z]\))?", text
        )
        is not None
    )
