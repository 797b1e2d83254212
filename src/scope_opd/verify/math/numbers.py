r"""Plain numbers, exactly: integers, decimals, fractions, mixed numbers and scientific notation as rationals.

``read_number`` knows how a number was written, because rounding depends on it; ``same_number`` is the one place where
two numbers are held against each other. Without a stated tolerance two numbers are equal if they are the same
rational, or, when one is written as a decimal with at least six decimals and five significant digits, if the
other one rounds to it (0.333333 for 1/3), or if one has 16 digits or more and differs by the rounding of a double
(0.30000000000000004 for 0.3).

Not covered: roots, pi and whatever else is not rational.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from scope_opd.gold import Tolerance

MAX_EXPONENT = 400
"""Powers of ten beyond this are left to the symbolic comparison (and its limit)."""
MIN_DECIMALS = 6
MIN_SIGNIFICANT = 5
DOUBLE_DIGITS = 16
NOISE = Fraction(1, 2**52)

_DECIMAL = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
_GROUPED = r"[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?|[1-9][0-9]{0,2}(?: [0-9]{3})+(?:\.[0-9]+)?"
_EXPONENT = r"[+-]?[0-9]{1,6}"
_TIMES = (
    r"\s*(?:\\times|\\cdot|\*|x)\s*10\s*(?:\^|\*\*)\s*"
    rf"(?:\{{\s*({_EXPONENT})\s*\}}|\(({_EXPONENT})\)|({_EXPONENT}))"
)
_PLAIN = re.compile(rf"([+-]?)\s*(?:({_GROUPED})|({_DECIMAL}))(?:[eE]([+-]?[0-9]{{1,6}})|{_TIMES})?")
_REPEATING = re.compile(
    r"([+-]?)([0-9]{1,40})\.([0-9]{0,40})"
    r"(?:\\(?:overline|bar)\s*\{([0-9]{1,40})\}|\(([0-9]{1,40})\)|\\dot\s*\{?([0-9])\}?(?:([0-9]*)\\dot\s*\{?([0-9])\}?)?)"
)
_TRAILING_OFF = re.compile(r"([+-]?)([0-9]{1,40})\.([0-9]{0,40}?)([0-9]{1,6}?)\4{2,}\s*(?:\\ldots|\.{3}|…)")
_POWER_OF_TEN = re.compile(r"([+-]?)\s*10\s*\^\s*(?:\{\s*([+-]?[0-9]{1,6})\s*\}|([+-]?[0-9]))")
_RATIO = re.compile(
    rf"([+-]?)\s*\(?([+-]?)({_GROUPED}|{_DECIMAL})\)?\s*/\s*\(?\s*([+-]?)\s*({_GROUPED}|{_DECIMAL})\s*\)?"
)
_FRAC = re.compile(
    rf"([+-]?)\s*(?:([0-9]+)\s*)?\\frac\{{\s*([+-]?)\s*({_GROUPED}|{_DECIMAL})\s*\}}\{{\s*([+-]?)\s*({_GROUPED}|{_DECIMAL})\s*\}}"
)
_MIXED = re.compile(r"([+-]?)\s*([0-9]+) +([0-9]+)\s*/\s*([0-9]+)")


@dataclass(frozen=True, slots=True)
class Number:
    """A rational and how it was written.

    Attributes:
        value: the number.
        decimals: digits after the point, None if it was written as an integer or a fraction.
        significant: significant digits of a decimal.
    """

    value: Fraction
    decimals: int | None = None
    significant: int = 0


def read_number(text: str) -> Number | None:
    """A plain number in clean spelling, None for anything else."""
    if match := _PLAIN.fullmatch(text):
        sign, grouped, plain, *exponents = match.groups()
        exponent = int(next((part for part in exponents if part), "0"))
        return _decimal(sign, (grouped or plain).replace(",", "").replace(" ", ""), exponent)
    if match := _TRAILING_OFF.fullmatch(text):
        return _repeating(match[1], match[2], match[3], match[4])
    if match := _REPEATING.fullmatch(text):
        return _repeating(*match.groups())
    if match := _POWER_OF_TEN.fullmatch(text):
        return _decimal(match[1], "1", int(match[2] or match[3]))
    if match := _RATIO.fullmatch(text):
        return _quotient(match[1], match[2], match[3], match[4], match[5])
    if match := _FRAC.fullmatch(text):
        sign, whole, top_sign, top, bottom_sign, bottom = match.groups()
        if whole is None:
            return _quotient(sign, top_sign, top, bottom_sign, bottom)
        return None if top_sign or bottom_sign else _mixed(sign, whole, top, bottom)
    if match := _MIXED.fullmatch(text):
        return _mixed(*match.groups())
    return None


def _decimal(sign: str, digits: str, exponent: int) -> Number | None:
    if abs(exponent) > MAX_EXPONENT or len(digits) > MAX_EXPONENT:
        return None
    value = Fraction(digits if digits[0] != "." else "0" + digits) * Fraction(10) ** exponent
    value = -value if sign == "-" else value
    after = len(digits.partition(".")[2]) - exponent if "." in digits else None
    return Number(value, after, len(digits.replace(".", "").lstrip("0")) if after is not None else 0)


def _repeating(sign: str, whole: str, fixed: str, *period: str | None) -> Number:
    digits = "".join(part for part in period if part)
    scale = 10 ** len(fixed)
    value = Fraction(int(whole + fixed), scale) + Fraction(int(digits), scale * (10 ** len(digits) - 1))
    return Number(-value if sign == "-" else value)


def _quotient(sign: str, top_sign: str, top: str, bottom_sign: str, bottom: str) -> Number | None:
    above, below = _decimal(top_sign, _plain(top), 0), _decimal(bottom_sign, _plain(bottom), 0)
    if above is None or below is None or below.value == 0:
        return None
    value = above.value / below.value
    return Number(-value if sign == "-" else value)


def _mixed(sign: str, whole: str, top: str, bottom: str) -> Number | None:
    if not (top.isdigit() and bottom.isdigit()) or len(whole + top + bottom) > MAX_EXPONENT:
        return None
    if int(top) >= int(bottom):
        return None  # 3 4/3 is nobody's mixed number
    value = int(whole) + Fraction(int(top), int(bottom))
    return Number(-value if sign == "-" else value)


def _plain(text: str) -> str:
    return text.replace(",", "").replace(" ", "")


def same_number(found: Number, gold: Number, tolerance: Tolerance | None) -> bool:
    """Whether two numbers count as the same: the rule of the module, or the stated tolerance."""
    difference = abs(found.value - gold.value)
    if difference == 0:
        return True
    if tolerance is not None:
        allowed = max(Fraction(tolerance.absolute), Fraction(tolerance.relative) * abs(gold.value))
        return difference <= allowed * (1 + Fraction(1, 10**9))
    for written in (found, gold):
        if written.decimals is None or written.value == 0:
            continue
        if written.significant >= DOUBLE_DIGITS and difference <= NOISE * abs(gold.value):
            return True
        precise = written.decimals >= MIN_DECIMALS and written.significant >= MIN_SIGNIFICANT
        if precise and 2 * difference <= Fraction(1, 10**written.decimals):
            return True
    return False
