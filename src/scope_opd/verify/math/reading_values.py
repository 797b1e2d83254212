r"""Read one value: its number or formula, and the sign, unit, currency, per cent, degree or base that stands with it.

Not covered: units that are not separated from variables in any way (``5x`` is a product).
"""

from __future__ import annotations

import re
from dataclasses import replace

from scope_opd.verify.math.numbers import read_number
from scope_opd.verify.math.shapes import Value, Words
from scope_opd.verify.math.text import closing, full_fractions
from scope_opd.verify.math.units import LETTERS, Unit, is_known, read_unit

_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_BASE = re.compile(
    r"\(?([0-9A-Fa-f][0-9A-Fa-f ,]*)\)?_\s*"
    r"(?:\{\s*(?:\\text\{)?\s*([0-9]{1,2}|two|three|four|five|six|seven|eight|nine|ten)\s*\}?\s*\}|([0-9]{1,2}))"
)
_BASES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
FUNCTIONS = frozenset(
    [
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "ln",
        "lg",
        "exp",
        "sqrt",
        "frac",
        "arcsin",
        "arccos",
        "arctan",
        "sinh",
        "cosh",
        "tanh",
        "lim",
        "sum",
        "int",
        "prod",
        "pi",
        "infty",
        "pm",
        "mp",
        "cdot",
        "times",
        "div",
        "ldots",
        "dot",
        "ddot",
    ]
)
_ENGLISH_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
            "twenty",
        ]
    )
}
_MONEY = re.compile(r"(\\?\$|€|£|¥|₹|\\text\{\s*(?:Rs\.?|USD|US\$)\s*\}|Rs\.?|USD|US\\?\$)")
_TRAILING_TEXT = re.compile(
    r"^(.*?[0-9a-zA-Z)}\]%!|.])\s*((?:\\text\{[^{}]*\}\s*(?:\^\s*(?:\{\s*-?[0-9]\s*\}|-?[0-9]))?\s*(?:/|\\cdot)?\s*)+)$",
    re.DOTALL,
)
_TRAILING_WORDS = re.compile(r"^(.*?[0-9}%)])\s*((?:[A-Za-z][A-Za-z.]*[ /-]?)+(?:\s*\^\s*\{?[23]\}?)?)$", re.DOTALL)
_NOT_A_UNIT = re.compile(
    r"\b(?:and|or|not|to|but|if|than|else|except|plus|minus|nor|is|are|was|were|be|isn|maybe|perhaps|possibly|either"
    r"|wrong|false|incorrect|impossible|less|more|fewer|greater|least|most|least|unless|instead|likely|unlikely|no|never"
    r"|mod|choose|which|who|when|where|because|since|so|then|i|it|we|you)\b|(?<![\^{-])[0-9]|(?:\S+\s+){5}",
    re.IGNORECASE,
)
_PERCENT = re.compile(
    r"\s*(?:\\?%|\\text\{\s*(?:%|percent|percentage|pct|per cent)\.?\s*\}|\s(?:percent|percentage|pct|per cent))$",
    re.IGNORECASE,
)
_GLUED_PERCENT = re.compile(r"(?<=[0-9}])\s*(?:percent|percentage|pct)$", re.IGNORECASE)
_DEGREE = re.compile(r"\s*(?:\^\{\\circ\}|\\text\{\s*(?:degrees|degree|deg)\.?\s*\}|\s(?:degrees|degree|deg))$")
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|log|ln)(?![a-z])")
_MICRO = re.compile(r"^([0-9.]+)\s*((?:\\mu|[µμ])\s*(?:\\text\{)?[a-zA-Z]+\}?)$")
_PER = re.compile(r"(?:\\text\{\s*(?:per|each|apiece)\b[^{}]*\}|\s(?:per|each|apiece)\b[a-z ]*)$")
_MULTIPLES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_SCALE = re.compile(r"(\^\{\\circ\})\s*(?:\\text\{\s*([CF])\s*\}|([CF]))$")


def read_value(text: str) -> Words | Value:
    """A single value or a word, in clean spelling."""
    if re.fullmatch(r"[A-Za-z][A-Za-z' .-]*", text):
        return Words(text)
    percent = degrees = False
    unit: Unit | None = None
    if (money := _MONEY.match(text)) or ((money := _MONEY.search(text)) and text.endswith(money[0])):
        rest = text[: money.start()] + text[money.end() :]
        if re.search(r"[0-9]", rest):
            text, unit = _PER.sub("", rest).strip(), read_unit(money[0])
    elif (signed := re.fullmatch(r"(-)\s*(\\?\$|€|£)\s*(.+)", text)) is not None:
        text, unit = signed[1] + signed[3], read_unit(signed[2])
    if scale := _SCALE.search(text):
        text, unit = text[: scale.start()], read_unit("°" + (scale[2] or scale[3]))
    elif (sign := _PERCENT.search(text) or _GLUED_PERCENT.search(text)) and text[: sign.start()].strip():
        text, percent = text[: sign.start()].strip(), True
    elif (sign := _DEGREE.search(text)) and text[: sign.start()].strip() and not _FUNCTION.search(text):
        text, degrees = text[: sign.start()].strip(), True
    elif (
        (trailing := _TRAILING_TEXT.match(text))
        and not trailing[1].rstrip().endswith(("_", "^"))
        and not _NOT_A_UNIT.search(trailing[2])
    ):
        text, found = trailing[1].strip(), read_unit(trailing[2])
        unit = unit if unit and found is None else found
        if sign := _DEGREE.search(text):
            text, degrees = text[: sign.start()].strip(), True
    elif (trailing := _MICRO.match(text)) is not None or (
        (trailing := _TRAILING_WORDS.match(text)) and _is_unit_text(trailing[1].strip(), trailing[2], text)
    ):
        text, unit = trailing[1].strip(), read_unit(trailing[2])
    if unit is not None and (scale_word := _MULTIPLES.get(unit.words.split()[0].lower())) is not None:
        amount = read_number(full_fractions(text))
        if amount is not None:
            of = read_unit(unit.words.partition(" ")[2]) or (read_unit(money[0]) if money else None)
            value = amount.value * scale_word
            return Value(str(value), replace(amount, value=value, decimals=None), unit=of)
    if base := _BASE.fullmatch(text):
        digits = re.sub(r"[ ,]", "", base[1])
        stated = base[2] or base[3]
        return Value(digits, None, base=_BASES.index(stated) + 2 if stated in _BASES else int(stated), unit=unit)
    text = full_fractions(text)
    if text.startswith("(") and closing(text, 0) == len(text) - 1 and (inner := read_number(text[1:-1].strip())):
        return Value(text[1:-1].strip(), inner, percent, degrees, unit)
    if r"\text" in text and not re.search(r"[0-9_]", text):
        return Words(_TEXT.sub(r" \1 ", text))
    return Value(text, read_number(text), percent, degrees, unit)


def english_number(word: str) -> str | None:
    """The digits of an English number up to twenty."""
    return _ENGLISH_NUMBERS.get(word)


def _is_unit_text(value: str, words: str, whole: str) -> bool:
    """Whether letters behind a value are a unit, and not factors: known units, or English words behind a number."""
    words = words.strip()
    if _NOT_A_UNIT.search(words):
        return False
    number = read_number(full_fractions(value)) is not None
    first = re.split(r"[ /^]", words)[0]
    if re.fullmatch(r"[A-Za-z]", words):
        return number and words in LETTERS and re.search(r"\s[A-Za-z]$", whole) is not None
    if re.fullmatch(r"m\s*\^\s*\{?[23]\}?", words):
        return number
    if first in FUNCTIONS or words in FUNCTIONS:
        return False
    if is_known(re.split(r"\s*\^|(?<=[a-z])[23]$", words)[0]) or is_known(first) or ("/" in words and number):
        return True
    return number and (len(first) >= 3 or first in ("sq", "cu"))
