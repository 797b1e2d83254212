r"""Whether two formulas have the same value: math-verify's parser, exact numbers, and evaluation at fixed points.

Two constants are equal if they agree to 20 digits of 30. Two formulas with variables are equal if they agree so at
every one of a few fixed points, positive and negative, where both are defined (a polynomial or an analytic identity that
holds at random points holds everywhere; the points are the same in every process). What cannot be evaluated
(integrals, unknown functions, matrices) is left to ``math_verify.verify``.

Powers and factorials too large to be anybody's answer raise ``TooHard`` before they are evaluated; what slips through
is bounded by the CPU limit of the worker process.

Not covered: equality that needs assumptions on variables (n an integer, x > 0).
"""

from __future__ import annotations

import logging
import random
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from scope_opd.gold import Tolerance
from scope_opd.verify.math.numbers import Number, same_number
from scope_opd.verify.math.text import MAX_DEPTH, MAX_LENGTH, closing, depth

DIGITS = 30
AGREEMENT = 10**-20
POINTS = 5
MAX_POWER_DIGITS = 20_000
"""Digits of an integer power that is evaluated."""
MAX_FACTORIAL = 2_000


class TooHard(Exception):
    """An answer that is not evaluated; the text says why."""


_FUNCTIONS = "arcsin|arccos|arctan|sinh|cosh|tanh|sin|cos|tan|cot|sec|csc|log|ln|exp|max|min|gcd|lcm"
_BARE = re.compile(
    rf"(?<![\\a-zA-Z])(?:np\.|math\.)?({_FUNCTIONS}|pi|infty|infinity|theta|alpha|beta|gamma|lambda|phi|omega)(?![a-zA-Z])"
)
_BARE_ROOT = re.compile(r"(?<![\\a-zA-Z])(?:np\.|math\.)?sqrt\s*\(")
_TIGHT_NUMBERS = re.compile(r"(?<![_^a-zA-Z0-9{])[0-9.]+\s+[0-9.]|%|[0-9)}]\s*_")
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_DEGREES = re.compile(r"([0-9.]+)\s*\^\s*\{?\s*\\circ\s*\}?")
_PRIME = re.compile(r"([A-Za-z])\s*(?:'+|\^\s*\{\s*(?:\\prime\s*)+\}|\^\s*\\prime(?![a-z]))")
_CHOOSE = re.compile(r"(?<![a-zA-Z\\])C_\s*\{?([0-9]+)\}?\s*\^\s*\{?([0-9]+)\}?")
_POWER_INDEX = re.compile(r"(?<=[A-Za-z])\s*\^\s*(\{[^{}]*\}|[0-9a-zA-Z])\s*_\s*(\{[^{}]*\}|[0-9a-zA-Z])")
_INDEX_SIGN = re.compile(r"_\s*\{?\s*\\(odot|oplus|max|min|infty|parallel|perp|ast|star|text\{[a-zA-Z]*\})\s*\}?")
_POWER = re.compile(r"([0-9]+)\s*\}?\)?\s*\^\s*[{(]*\s*([0-9]+)")
_TOWER = re.compile(r"\^\s*[{(]*\s*([0-9]+)\s*\^\s*[{(]*\s*([0-9]+)")
_FACTORIAL = re.compile(r"([0-9]+)\s*[)}]*\s*!|!\s*[)}]*\s*!|\^\s*\{[^{}]*\}\s*\)?\s*!")


def check_size(latex: str) -> None:
    """Raise ``TooHard`` for what would take longer to evaluate than any answer is worth."""
    if len(latex) > MAX_LENGTH:
        raise TooHard(f"an answer of {len(latex)} characters")
    if depth(latex) > MAX_DEPTH:
        raise TooHard("brackets nested too deep")
    for base, exponent in _POWER.findall(latex):
        if len(exponent) > 7 or len(base) * int(exponent) > MAX_POWER_DIGITS:
            raise TooHard("a power too large to evaluate")
    for base, exponent in _TOWER.findall(latex):
        if len(exponent) > 3 or len(base) * int(exponent) > 4:
            raise TooHard("a power too large to evaluate")
    for match in _FACTORIAL.finditer(latex):
        if match[1] is None or len(match[1]) > 4 or int(match[1]) > MAX_FACTORIAL:
            raise TooHard("a factorial too large to evaluate")


def too_large(latex: str) -> bool:
    """Whether ``check_size`` would refuse a formula."""
    try:
        check_size(latex)
    except TooHard:
        return True
    return False


def parser_spelling(latex: str) -> str:
    """The spelling that math-verify's parser reads: function names with a backslash, roots in braces."""
    if "circ" in latex:
        degrees = r"(\1\\cdot\\frac{\\pi}{180})" if _TRIGONOMETRY.search(latex) else r"\1"
        latex = _DEGREES.sub(degrees, latex)
    latex = _PRIME.sub(lambda m: m[1] + "_{" + "prime" * (m[0].count("'") or m[0].count("prime")) + "}", latex)
    latex = _POWER_INDEX.sub(r"_\2^\1", latex)
    latex = _INDEX_SIGN.sub(r"_{\1}", latex)
    latex = _CHOOSE.sub(r"\\binom{\1}{\2}", latex)
    text = _BARE.sub(lambda m: "\\" + ("infty" if m[1] == "infinity" else m[1]), latex)
    while match := _BARE_ROOT.search(text):
        end = closing(text, match.end() - 1)
        if end < 0:
            break
        text = text[: match.start()] + r"\sqrt{" + text[match.end() : end] + "}" + text[end + 1 :]
    return (
        text.replace("**", "^").replace(r"\div", "/").replace("[", "(").replace("]", ")")
        if r"\sqrt[" not in text
        else text
    )


@lru_cache(maxsize=4096)
def parse(latex: str) -> Any:
    """The sympy object of a formula, None where the parser cannot read it.

    Raises:
        TooHard: not to be evaluated.
    """
    from latex2sympy2_extended import latex2sympy
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from sympy import Float, Rational

    check_size(latex)
    text = parser_spelling(latex)
    if not text.strip() or _TIGHT_NUMBERS.search(text) or not text.isascii():
        return None
    logging.disable(logging.ERROR)
    try:
        config = ConversionConfig(lowercase_symbols=False)  # R is not r
        parsed = latex2sympy(
            text, is_real=True, convert_degrees=False, normalization_config=None, conversion_config=config
        )
        if hasattr(parsed, "atoms"):
            floats = {number: Rational(str(number)) for number in parsed.atoms(Float)}
            parsed = parsed.xreplace(floats) if floats else parsed
    except (MemoryError, RecursionError):
        raise
    except Exception:  # the parser raises bare Exceptions for whatever it cannot read
        return None
    finally:
        logging.disable(logging.NOTSET)
    return parsed


def same_formula(
    found: str, gold: str, tolerance: Tolerance | None, numbers: tuple[Number | None, Number | None], factor: Fraction
) -> bool:
    """Whether ``factor`` x ``found`` equals ``gold``; ``numbers`` are the sides that are plain numbers."""
    left, right = parse(found), parse(gold)
    if left is None or right is None:
        return False
    from sympy import Basic, Expr, MatrixBase, Rational, Tuple
    from sympy.sets import Set

    if isinstance(left, MatrixBase) or isinstance(right, MatrixBase):
        return _verified(left, right)
    if (
        not isinstance(left, Basic)
        or not isinstance(right, Basic)
        or isinstance(left, Set | Tuple)
        or isinstance(right, Set | Tuple)
    ):
        return False
    if not isinstance(left, Expr) or not isinstance(right, Expr):
        return False
    if factor != 1:
        left = Rational(factor.numerator, factor.denominator) * left
    values = constant(left), constant(right)
    if values[0] is not None and values[1] is not None:
        return _same_constant(values[0], values[1], tolerance, numbers)
    if (values[0] is None) != (values[1] is None) and not (_variables(left) or _variables(right)):
        return False
    agreed = _same_at_points(left, right)
    return _verified(left, right) if agreed is None else agreed


def same_parsed(left: Any, right: Any) -> bool:
    """Whether two parsed formulas agree at the fixed points."""
    return _same_at_points(left, right) is True


def constant(expression: Any) -> complex | Any | None:
    """The value of a formula without variables to 30 digits; None if it has variables or cannot be evaluated."""
    if _variables(expression):
        return None
    return _evaluated(expression, {})


def _variables(expression: Any) -> list[Any]:
    return sorted((symbol for symbol in expression.free_symbols if str(symbol) != "i"), key=str)


def _evaluated(expression: Any, point: dict[Any, Any]) -> Any:
    from sympy import I, N, Symbol

    try:
        imaginary = {
            symbol: I for symbol in expression.free_symbols if isinstance(symbol, Symbol) and symbol.name == "i"
        }
        value = N(expression.subs({**point, **imaginary}), DIGITS)
        if value.is_infinite or value.is_number is False:
            return value if value.is_infinite and value.is_extended_real else None
        real, _imag = value.as_real_imag()
        return value if real.is_Float or real.is_Integer or real.is_Rational or real == 0 else None
    except (MemoryError, RecursionError):
        raise
    except Exception:  # sympy raises what it likes on functions that it cannot evaluate
        return None


def _same_constant(
    found: Any, gold: Any, tolerance: Tolerance | None, numbers: tuple[Number | None, Number | None]
) -> bool:
    if found.is_infinite or gold.is_infinite:
        return bool(found == gold)
    if _close(found, gold):
        return True
    if not (found.is_real and gold.is_real):
        return False
    sides = [number or Number(Fraction(str(value))) for number, value in zip(numbers, (found, gold), strict=True)]
    return same_number(sides[0], sides[1], tolerance)


def _close(left: Any, right: Any) -> bool:
    difference = abs(left - right)
    size = max(abs(left), abs(right))
    return bool(difference <= AGREEMENT * size) or bool(size < AGREEMENT**1.2)


def _same_at_points(left: Any, right: Any) -> bool | None:
    """True or False after evaluation, None if it could not be evaluated."""
    from sympy import Rational

    symbols = sorted({*_variables(left), *_variables(right)}, key=str)
    names = sorted({str(symbol) for symbol in symbols})
    if len(names) > 12:
        return None
    draw = random.Random(0)
    compared = 0
    for at in range(POINTS):
        values = {name: Rational(draw.randint(11, 79), 31) * (-1 if at >= 3 else 1) for name in names}
        point = {symbol: values[str(symbol)] for symbol in symbols}
        a, b = _evaluated(left, point), _evaluated(right, point)
        if a is None and b is None:
            continue
        if a is None or b is None or a.is_infinite or b.is_infinite or not _close(a, b):
            return None if (a is None) != (b is None) and compared == 0 else False
        compared += 1
    return True if compared >= 3 else None


def _verified(left: Any, right: Any) -> bool:
    from math_verify import verify
    from sympy import nan, zoo

    if left in (nan, zoo) or right in (nan, zoo):
        return False
    logging.disable(logging.ERROR)
    try:
        return bool(verify([right], [left], timeout_seconds=None))
    finally:
        logging.disable(logging.NOTSET)


def proportional(found: tuple[str, str], gold: tuple[str, str]) -> bool:
    """Whether two equations say the same: their differences are a constant, other than zero, times each other."""
    from sympy import Expr

    sides = [parse(side) for side in (*found, *gold)]
    if any(not isinstance(side, Expr) for side in sides):
        return False
    left, right = sides[0] - sides[1], sides[2] - sides[3]
    symbols = sorted({*_variables(left), *_variables(right)}, key=str)
    names = sorted({str(symbol) for symbol in symbols})
    if {str(s) for s in _variables(left)} != {str(s) for s in _variables(right)} or not names or len(names) > 12:
        return False
    from sympy import Rational

    draw = random.Random(1)
    ratio = None
    compared = 0
    for at in range(POINTS + 1):
        values = {name: Rational(draw.randint(11, 79), 31) * (-1 if at >= 4 else 1) for name in names}
        point = {symbol: values[str(symbol)] for symbol in symbols}
        a, b = _evaluated(left, point), _evaluated(right, point)
        if a is None or b is None or a.is_infinite or b.is_infinite:
            continue
        if abs(b) < AGREEMENT or abs(a) < AGREEMENT:
            return False
        if ratio is not None and not _close(a / b, ratio):
            return False
        ratio = a / b
        compared += 1
    return compared >= 4


def symbols_of(latex: str) -> frozenset[str]:
    """The names of a formula's variables; empty where it cannot be read."""
    parsed = parse(latex)
    return frozenset(str(symbol) for symbol in parsed.free_symbols) if hasattr(parsed, "free_symbols") else frozenset()
