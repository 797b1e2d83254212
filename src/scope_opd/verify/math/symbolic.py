r"""Whether two formulas have the same value: math-verify's parser, exact numbers, and evaluation at fixed points.

Two constants are equal if their difference is zero: exactly where it is rational, else to 300 digits. Two formulas with
variables are equal if they agree so at a few fixed points (an analytic identity that holds at points drawn at random
holds everywhere; the points are the same in every process). The points are positive and negative, so that x is not
|x|; with three variables or more they are positive. A point where neither formula is real says nothing. What
cannot be evaluated there (integrals, unknown functions, matrices) is left to ``math_verify.verify``.

Powers and factorials too large to be anybody's answer raise ``TooHard`` before they are evaluated; what slips through
is bounded by the CPU limit of the worker process.

Not covered: equality that needs assumptions on variables (n an integer, x > 0).
"""

from __future__ import annotations

import logging
import math
import random
import re
from fractions import Fraction
from functools import lru_cache
from typing import Any

from scope_opd.gold import Tolerance
from scope_opd.verify.math.numbers import Number, same_number
from scope_opd.verify.math.text import MAX_DEPTH, MAX_LENGTH, closing, depth

DIGITS = 30
"""Digits of a value that is rounded."""
MAX_DIGITS = 300
"""Digits to which a difference is evaluated before it counts as zero."""
POINTS = 5
MAX_VARIABLES = 12
MIN_QUANTITIES = 3
"""With so many variables a formula is one of quantities (masses, lengths, speeds), which are positive."""
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
_TIGHT_NUMBERS = re.compile(
    r"(?<![_^a-zA-Z0-9{])[0-9.]+\s+[0-9.]|%|[0-9)}]\s*_|!\s*!|\\[a-z]*dots|\\(?:phantom|color|cancel)"
)
_TRIGONOMETRY = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)(?![a-z])")
_DEGREES = re.compile(r"([0-9.]+)\s*\^\s*\{?\s*\\circ\s*\}?")
_PROSE = re.compile(r"(?<![\\a-zA-Z{])[a-zA-Z]{6,}|[a-zA-Z]{2,}[ .,][a-zA-Z]{2,}[ .,][a-zA-Z]{2,}")
_PRIME = re.compile(r"([A-Za-z])\s*(?:'+|\^\s*\{\s*(?:\\prime\s*)+\}|\^\s*\\prime(?![a-z]))")
_LOG_E = re.compile(r"\\log\s*_\s*(?:\{\s*e\s*\}|e)")
_LISTED = re.compile(r"\\(max|min|gcd|lcm)\s*\\\{([^{}]*)\\\}")
_CHOOSE = re.compile(r"(?<![a-zA-Z\\])C_\s*\{?([0-9]+)\}?\s*\^\s*\{?([0-9]+)\}?")
_POWER_INDEX = re.compile(r"(?<=[A-Za-z])\s*\^\s*(\{[^{}]*\}|[0-9a-zA-Z])\s*_\s*(\{[^{}]*\}|[0-9a-zA-Z])")
_INDEX_SIGN = re.compile(r"_\s*\{?\s*\\(odot|oplus|max|min|infty|parallel|perp|ast|star|text\{[a-zA-Z]*\})\s*\}?")
_POWER = re.compile(r"([0-9]+)\s*\}?\)?\s*\^\s*[{(]*\s*([0-9]+)")
_TOWER = re.compile(r"\^\s*[{(]*\s*([0-9]+)\s*\^\s*[{(]*\s*([0-9]+)")
_FACTORIAL = re.compile(r"(?:[0-9]\s*!\s*[)}]+\s*!)|([0-9]+)\s*[)}]*\s*!|\^\s*\{[^{}]*\}\s*\)?\s*!")


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


def _check_tree(expression: Any) -> float:
    """An upper bound of log10 of a formula's size, variables as 1; raises ``TooHard`` beyond what is evaluated."""
    from sympy import Add, Mul, Pow, binomial, factorial, factorial2

    if expression.is_Rational:
        return math.log10(max(abs(expression.p) / expression.q, 1.0)) if abs(expression.p) < 10**300 else 300.0
    sizes = [_check_tree(part) for part in expression.args if hasattr(part, "args")]
    if isinstance(expression, factorial | factorial2):
        if sizes[0] > math.log10(MAX_FACTORIAL):
            raise TooHard("a factorial too large to evaluate")
        return 10 ** sizes[0] * max(sizes[0], 1.0)
    if isinstance(expression, binomial) and max(sizes) > 6:
        raise TooHard("a binomial coefficient too large to evaluate")
    if isinstance(expression, Pow):
        digits = max(sizes[0], 0.3) * 10 ** min(sizes[1], 9.0)
        if digits > MAX_POWER_DIGITS:
            raise TooHard("a power too large to evaluate")
        return digits if expression.args[1].is_negative is not True else 0.0
    if isinstance(expression, Add):
        return max(sizes, default=0.0) + math.log10(len(sizes) or 1)
    return sum(sizes) if isinstance(expression, Mul) else max(sizes, default=0.0)


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
    latex = _LOG_E.sub(r"\\ln ", latex)
    latex = _LISTED.sub(r"\\\1(\2)", latex)
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
    from sympy import Derivative, Expr, Float, Rational, Symbol

    check_size(latex)
    text = parser_spelling(latex)
    if _PROSE.search(text):
        return None
    if not text.strip() or _TIGHT_NUMBERS.search(text) or not text.isascii():
        return None
    logging.disable(logging.ERROR)
    try:
        config = ConversionConfig(lowercase_symbols=False)  # R is not r
        parsed = latex2sympy(
            text, is_real=True, convert_degrees=False, normalization_config=None, conversion_config=config
        )
        if hasattr(parsed, "atoms"):
            exact = {number: Rational(str(number)) for number in parsed.atoms(Float)}
            for rate in parsed.atoms(Derivative):
                if not set(rate.variables) & rate.expr.free_symbols:  # dy/dx is not zero
                    exact[rate] = Symbol(re.sub(r"\W", "_", str(rate)), real=True)
            parsed = parsed.xreplace(exact) if exact else parsed
    except (MemoryError, RecursionError):
        raise
    except Exception:  # the parser raises bare Exceptions for whatever it cannot read
        return None
    finally:
        logging.disable(logging.NOTSET)
    if isinstance(parsed, Expr):
        _check_tree(parsed)
    return parsed


def same_formula(
    found: str, gold: str, tolerance: Tolerance | None, numbers: tuple[Number | None, Number | None], factor: Fraction
) -> bool:
    """Whether ``factor`` x ``found`` equals ``gold``; ``numbers`` are the sides that are plain numbers."""
    from sympy import Expr, MatrixBase, Rational

    left, right = parse(found), parse(gold)
    if isinstance(left, MatrixBase) or isinstance(right, MatrixBase):
        return left is not None and right is not None and _verified(left, right)
    if not isinstance(left, Expr) or not isinstance(right, Expr):
        return False
    if factor != 1:
        left = Rational(factor.numerator, factor.denominator) * left
    if _variables(left) or _variables(right):
        agreed = same_parsed(left, right)
        return _verified(left, right) if agreed is None else agreed
    return _same_constant(_with_i(left), _with_i(right), tolerance, numbers)


def _same_constant(
    left: Any, right: Any, tolerance: Tolerance | None, numbers: tuple[Number | None, Number | None]
) -> bool:
    from sympy import oo

    ends = [side.doit() for side in (left, right)]
    if any(end in (oo, -oo) for end in ends):
        return bool(ends[0] == ends[1])
    zero = _is_zero(ends[0] - ends[1])
    if zero is not False:
        return zero is True
    if tolerance is None and not any(number and number.decimals is not None for number in numbers):
        return False  # nothing here is rounded
    values = [end if end.is_Rational else end.evalf(DIGITS) for end in ends]
    if not all(value.is_Float or value.is_Rational for value in values):
        return False  # complex numbers have no rounding
    sides = [number or Number(_fraction(value)) for number, value in zip(numbers, values, strict=True)]
    return same_number(sides[0], sides[1], tolerance)


def _fraction(value: Any) -> Fraction:
    return Fraction(value.p, value.q) if value.is_Rational else Fraction(str(value))


def _is_zero(difference: Any) -> bool | None:
    """Whether a constant is zero: exactly if rational, else to ``MAX_DIGITS`` digits; None: not to be evaluated."""
    try:
        value = difference.doit()
        if value.is_Rational:
            return bool(value == 0)
        value = value.evalf(15, maxn=MAX_DIGITS)
        parts = value.as_real_imag()
        if not all(part.is_Float or part.is_Rational for part in parts):
            return None
        return all(part == 0 or getattr(part, "_prec", 0) == 1 for part in parts)
    except MemoryError:
        raise
    except Exception:  # sympy raises what it likes on functions that it cannot evaluate
        return None


def same_parsed(left: Any, right: Any) -> bool | None:
    """Whether two parsed formulas agree at the fixed points; None if they could not be evaluated there."""
    from sympy import I

    compared = 0
    both = {*_variables(left), *_variables(right)}
    sides = _summed(_with_i(left)), _summed(_with_i(right))
    imaginary = any(side.has(I) for side in sides)
    if not imaginary:
        sides = _real_roots(sides[0]), _real_roots(sides[1])
    difference = sides[0] - sides[1]
    for point in _points(left, right, signed=len({str(s) for s in both}) < MIN_QUANTITIES):
        zero = _is_zero(difference.subs(point))
        if zero is False and not imaginary and not any(_is_real(side.subs(point)) for side in sides):
            continue  # neither is defined there
        if zero is False:
            return False
        compared += zero is True
    return True if compared >= 3 else None


def _real_roots(expression: Any) -> Any:
    """With the real value, for negative numbers too, of roots of odd degree."""
    from sympy import Abs, Pow, sign

    roots = {
        power: (sign(power.base) * Abs(power.base) ** (power.exp / power.exp.p)) ** power.exp.p
        for power in expression.atoms(Pow)
        if power.exp.is_Rational and power.exp.q % 2 == 1 and power.exp.q > 1 and power.base.free_symbols
    }
    return expression.xreplace(roots) if roots else expression


def _is_real(expression: Any) -> bool:
    """Whether a formula without variables has a real value."""
    try:
        return bool(expression.evalf(15).is_extended_real)
    except MemoryError:
        raise
    except Exception:  # sympy raises what it likes on functions that it cannot evaluate
        return True


def _points(left: Any, right: Any, *, signed: bool = True) -> list[dict[Any, Any]]:
    """Fixed points, by the names of the variables, positive and if ``signed`` also negative; none where there are too
    many variables.
    """
    from sympy import Rational

    symbols = sorted({*_variables(left), *_variables(right)}, key=str)
    names = sorted({str(symbol) for symbol in symbols})
    draw = random.Random(0)
    points = []
    for at in range(POINTS if len(names) <= MAX_VARIABLES else 0):
        values = {name: Rational(draw.randint(11, 79), 31) for name in names}
        if signed and at >= 3:  # all of them negative, and every other one
            values = {name: -values[name] if at == 3 or i % 2 == 0 else values[name] for i, name in enumerate(names)}
        points.append({symbol: values[str(symbol)] for symbol in symbols})
    return points


def _summed(expression: Any) -> Any:
    """With sums, products, integrals and limits carried out where sympy can."""
    from sympy import Integral, Limit, Product, Sum

    if not expression.has(Sum, Product, Integral, Limit):
        return expression
    try:
        return expression.doit()
    except MemoryError:
        raise
    except Exception:  # sympy raises what it likes; the formula stays as it is
        return expression


def _variables(expression: Any) -> list[Any]:
    return [symbol for symbol in expression.free_symbols if str(symbol) != "i"]


def _with_i(expression: Any) -> Any:
    """With the imaginary unit for the letter i."""
    from sympy import I

    letters = {symbol: I for symbol in expression.free_symbols if str(symbol) == "i"}
    return expression.subs(letters) if letters else expression


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
    """Whether two equations say the same: the differences of their sides, as fractions in lowest terms, have
    numerators that are a constant, other than zero, times each other.
    """
    from sympy import Expr, fraction, together

    sides = [parse(side) for side in (*found, *gold)]
    if any(not isinstance(side, Expr) for side in sides):
        return False
    left, right = (fraction(together((a - b).doit()))[0] for a, b in (sides[:2], sides[2:]))
    if {str(s) for s in _variables(left)} != {str(s) for s in _variables(right)} or not _variables(left):
        return False
    points = _points(left, right)
    start = [side.subs(points[0]) for side in (left, right)] if points else []
    if not start or any(_is_zero(value) is not False for value in start):
        return False
    zeros = [_is_zero(left.subs(point) * start[1] - right.subs(point) * start[0]) for point in points[1:]]
    return False not in zeros and zeros.count(True) >= 3


def symbols_of(latex: str) -> frozenset[str]:
    """The names of a formula's variables; empty where it cannot be read."""
    parsed = parse(latex)
    return frozenset(str(symbol) for symbol in parsed.free_symbols) if hasattr(parsed, "free_symbols") else frozenset()
