r"""Conditions behind an answer, as text: "for all x in R", "k in Z", "where c is a constant", "x integer".

A condition that only says over which numbers a letter runs is taken off; a letter that is declared an arbitrary
constant is reported, because such constants may be renamed. Integers that satisfy an inequality with two numbers as its
ends are listed.

Not covered: conditions in prose beyond these; integers between ends that are not plain numbers.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from scope_opd.verify.math.numbers import read_number
from scope_opd.verify.math.text import clean, full_fractions

MAX_INTEGERS = 100
"""Integers of an inequality that are listed."""

_QUANTIFIER = re.compile(
    r"\\text\s*\{\s*for (?:all|every|each|any)\s*\}\s*[a-z](?:\s*,\s*[a-z])*\s*\\in\s*"
    r"\\mathbb\s*(?:\{[A-Z]\}|[A-Z])(?:[_^]\{?[+*>0]+\}?)?"
)
_NUMBERS = r"(?:\\mathbb\s*)?\{?[ZNRQC]\}?(?:\^\{?[+*]\}?|_\{?[0-9+]+\}?)?"
_LETTER = r"[a-zA-Z](?:_\{?\w\}?)?"
_CONDITION = re.compile(
    r"[,;]?\s*\(?(?:\\text\{\s*,?\s*)?(?:for|where|with)\s+"
    r"(?:all|every|each|any|some|an|a|integer|integers|positive|real|any)\b.*$"
    r"|[,;]?\s*\(?\\text\{\s*,?\s*(?:for|where|with)(?:\s+(?:all|any|some|an|a)(?:\s\w+){0,2})?\s*\}.*$"
    rf"|(?:[,;(]|where)\s*(?:\\text\{{\s*where\s*\}}\s*)?\(?\s*{_LETTER}(?:\s*,\s*{_LETTER})*\s*\\in\s*{_NUMBERS}\)?$"
    rf"|\s{_LETTER}\s*\\in\s*{_NUMBERS}\)?$",
    re.DOTALL,
)
_CONSTANT = re.compile(
    r"(?:constants?|real(?:\s+numbers?)?|any|arbitrary)\s*\}?\s*\$?([a-zA-Z])\b"
    r"|(?<![a-zA-Z\\])([a-zA-Z])\s*\$?\s*(?:\\text\{\s*)?(?:is|be)\s+(?:an?\s+|any\s+)?(?:arbitrary\s+|real\s+)*(?:constant|real|number)"
    r"|(?<![a-zA-Z\\])([a-zA-Z])\s*\\in\s*\\mathbb\s*\{?R\}?\s*\)?\s*$"
)
_INTEGERS = re.compile(
    r"[,;(]?\s*(?:\(\s*)?([a-zA-Z])\s*\\in\s*(?:\\mathbb\s*)?\{?([ZN])\}?([\^_]\s*\{?[+*]\}?)?\s*\)?\s*"
)
_BETWEEN = re.compile(r"(.+?)(<|\\leq|>|\\geq)\s*([a-zA-Z])\s*(<|\\leq|>|\\geq)(.+)", re.DOTALL)
_RESTRICTED = re.compile(r"([^=<>]*=[^=<>]*?)\s*\(\s*([^()=]*(?:\\neq|\\leq|\\geq|<|>)[^()=]*)\)", re.DOTALL)


def without_condition(text: str) -> tuple[str, str]:
    """The answer without the condition behind it, and the letter that the condition declares a constant, else ""."""
    text = _QUANTIFIER.sub(" ", text).strip()
    if restricted := _RESTRICTED.fullmatch(text):
        return f"{restricted[1]}, {restricted[2]}", ""  # x^2 + y^2 = 1 (x != 0): both count
    stripped = _CONDITION.sub("", text).rstrip(" ,;(")
    if stripped == text.rstrip(" ,;(") or not re.search(r"[0-9a-zA-Z]", stripped):
        return text, ""
    constant = _CONSTANT.search(text[len(stripped) :])
    return clean(stripped), next((name for name in constant.groups() if name), "") if constant else ""


def integers_between(text: str) -> list[int] | None:
    r"""The integers that ``-2 < x < 3, x \in \mathbb{Z}`` lists; None where the text is nothing like it."""
    declared = _INTEGERS.search(text)
    if declared is None:
        return None
    chain = (text[: declared.start()] + text[declared.end() :]).strip(" ,;)")
    if declared[2] == "N" and re.match(rf"{declared[1]}\s*(?:<|\\leq)", chain):
        chain = rf"0\leq {chain}"
    between = _BETWEEN.fullmatch(chain)
    if between is None or between[3] != declared[1]:
        return None
    low, first, _, second, high = between.groups()
    if ("<" in first or "l" in first) != ("<" in second or "l" in second):
        return None
    if ">" in first or "g" in first:
        low, first, second, high = high, second, first, low
    ends = [read_number(full_fractions(end.strip())) for end in (low, high)]
    if ends[0] is None or ends[1] is None:
        return None
    start = _after(ends[0].value, "<" in first or ">" in first)
    end = -_after(-ends[1].value, "<" in second or ">" in second)
    if declared[2] == "N" or declared[3]:
        start = max(start, 1 if declared[3] else 0)
    return list(range(start, end + 1)) if end - start < MAX_INTEGERS else None


def _after(bound: Fraction, strict: bool) -> int:
    whole = math.ceil(bound)
    return whole + 1 if strict and whole == bound else whole
