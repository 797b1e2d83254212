r"""Names in front of "=": symbols, functions of symbols, angles, lengths, vectors, ratios of names.

Not covered: names of more than four letters that are not in ``\\text{}``.
"""

from __future__ import annotations

import re

from scope_opd.verify.math.reading_values import FUNCTIONS
from scope_opd.verify.math.text import closing, full_fractions, split

_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_NAME = re.compile(
    r"(?:\\(?:angle|measuredangle|triangle|overline|operatorname|min|max|text|Delta)\s*)*"
    r"(?:\|?\s*(?:[A-Za-z]{1,4}|\\[a-zA-Z]+|\\text\{[^{}]*\})\s*\|?)(?:\s*_\s*(?:\{[^{}]*\}|[0-9a-zA-Z]|\\(?:min|max)))?'*"
    r"(?:\s*\^\s*\{?\\circ\}?)?(?:\(\s*[A-Za-z0-9, ]{1,12}\s*\))?"
)
_DECORATED = re.compile(
    r"\\(?:overrightarrow|overline|widehat|dot|ddot|bar|hat|vec)\s*\{([A-Za-z]{1,3})\}|(?<![^|])\{([A-Za-z]{1,3})\}(?![^|])"
)
_ANGLE_FUNCTION = re.compile(
    r"\\(?:sin|cos|tan|cot)\s*(?:\(\s*)?(?:\\angle\s*(?:\{\s*)?)?(?:[A-Z]{1,3}|\\(?:theta|alpha|beta|gamma|phi|varphi|omega))(?:\s*\})?(?:\s*\))?"
)
_SET_NAME = re.compile(
    r"(?:[A-Z]|\\complement_\{?[A-Z]\}?|C_\{?[A-Z]\}?|[\s()]|\\(?:cap|cup|setminus|complement))+(?=\s*=)"
)
_RATIO_NAME = re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}|([^/:]+)[/:]([^/:]+)")
_QUANTITY = re.compile(r"\s*\|?(?:\\angle\s*)?[A-Z]{1,3}(?:_\{?[0-9A-Za-z]+\}?)?\|?\s*")


def tuple_of_names(text: str) -> list[str] | None:
    """The names in ``(x, y)``; None if it is no tuple of names."""
    if not (text.startswith("(") and closing(text, 0) == len(text) - 1):
        return None
    names = [name.strip() for name in split(text[1:-1], ",")]
    return names if len(names) > 1 and all(is_name(name) for name in names) else None


def is_name(text: str) -> bool:
    """Whether a text names a value, as what stands before "=" does."""
    text = _DECORATED.sub(r"\1\2", text.strip())
    if _ANGLE_FUNCTION.fullmatch(text):
        return True
    if _NAME.fullmatch(text):
        words = re.findall(r"[A-Za-z]+", _TEXT.sub("", re.sub(r"_\s*(?:\{[^{}]*\}|\S)", "", text)))
        return not any(word in FUNCTIONS for word in words) and not re.fullmatch(r"\\(?:pi|infty)", text)
    if ratio := _RATIO_NAME.fullmatch(full_fractions(text)):
        letters = ":" in text and all(re.fullmatch(r"\s*[a-z]\s*", part) for part in ratio.groups() if part)
        return letters or all(_QUANTITY.fullmatch(part) for part in ratio.groups() if part)
    return bool(re.fullmatch(r"\\text\{[^{}]*\}(?:\s*_?\s*\{?[a-zA-Z0-9]*\}?)?", text))


def set_name(text: str) -> str:
    r"""The name of a set in terms of others, as in ``A \cap B = [1, 2]``; "" if there is none."""
    named = _SET_NAME.match(text)
    found = named is not None and re.search(r"\\(?:cap|cup|setminus|complement)|C_", named[0])
    return text[: named.end()].strip() if named and found else ""
