r"""Exact match on the last balanced ``\boxed{}``, after a light normalisation.

The answer of a response is what stands in its last box whose braces balance; of boxes inside a box the outermost
counts. Escaped braces (``\{``) are text. It is right if it equals the gold answer after both are normalised. These make
no difference: white space that separates nothing, surrounding ``$``, ``\(``, ``\[``, surrounding ``{}`` or ``\text{}``
(and its kind), spacing commands, ``\left``/``\right``, ``\dfrac``/``\tfrac``, a final full stop, the writing of plain
decimals (``5.0`` is ``5``, ``+3`` is ``3``). Everything else does: ``1/2`` is not ``0.5``.

Not covered: mathematical equality, units, sets, several gold answers, ``\boxed 5`` without braces, thinking blocks.
"""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Any

from scope_opd.errors import DataError
from scope_opd.types import Prompt, Rollout, Verdict

_BRACES = re.compile(r"\\boxed\s*\{|\\.|[{}]", re.DOTALL)
_NUMBER = re.compile(r"([+-]?)([0-9]+)(?:\.([0-9]*))?")
_WRAPPERS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mbox|boxed)\s*\{")
_GROUP = re.compile(r"\{")
_MATHS = (("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"))
_NOTHING = re.compile(r"\\[,!;:]|\\left(?![a-zA-Z])|\\right(?![a-zA-Z])")
_FRACTION = re.compile(r"\\[dt]frac(?![a-zA-Z])")
MAX_LAYERS = 8
"""Wrappers taken off an answer at most: no honest answer has more, and it keeps hostile nesting cheap."""
_IDLE_SPACE = re.compile(r"(?<![A-Za-z0-9]) | (?![A-Za-z0-9])")


def last_boxed(text: str) -> str | None:
    r"""What stands in the last balanced, outermost ``\boxed{}``; None without one. One pass, whatever the text."""
    opened: list[tuple[bool, int]] = []
    boxes: list[tuple[int, int]] = []
    for match in _BRACES.finditer(text):
        token = match.group()
        if token.endswith("{") and (token == "{" or token.startswith(r"\boxed")):
            opened.append((token != "{", match.end()))
        elif token == "}" and opened:
            is_box, start = opened.pop()
            if is_box:
                while boxes and boxes[-1][0] > start:
                    boxes.pop()
                boxes.append((start, match.start()))
    return text[slice(*boxes[-1])] if boxes else None


def normalise(answer: str) -> str:
    """The form in which answers are compared."""
    text = answer.strip()
    for _ in range(MAX_LAYERS):
        if (peeled := _peel(text)) == text:
            break
        text = peeled
    text = _NOTHING.sub("", text.replace(r"\ ", " ").replace("~", " "))
    text = _FRACTION.sub(r"\\frac", text)
    text = _IDLE_SPACE.sub("", " ".join(text.split()))
    number = _NUMBER.fullmatch(text)
    return _plain_number(*number.groups("")) if number else text


def _peel(text: str) -> str:
    """Take one layer off: a full stop behind, maths delimiters, or braces around everything."""
    text = text.strip()
    if text.endswith(".") and not text.endswith(".."):
        text = text[:-1].rstrip()
    for start, end in _MATHS:
        if len(text) > len(start) + len(end) and text.startswith(start) and text.endswith(end):
            inner = text[len(start) : -len(end)]
            if start not in inner and end not in inner:
                return inner.strip()
    wrapper = _WRAPPERS.match(text) or _GROUP.match(text)
    if wrapper and _closes_at_end(text, wrapper.end()):
        return text[wrapper.end() : -1].strip()
    return text


def _closes_at_end(text: str, start: int) -> bool:
    """Whether the brace opened just before ``start`` is closed by the last character."""
    depth = 1
    for match in _BRACES.finditer(text, start):
        token = match.group()
        if token == "}":
            depth -= 1
            if depth == 0:
                return match.end() == len(text)
        elif token == "{" or token.startswith(r"\boxed"):
            depth += 1
    return False


def _plain_number(sign: str, whole: str, decimals: str) -> str:
    """One spelling for a plain decimal, exact at any length."""
    whole, decimals = whole.lstrip("0") or "0", decimals.rstrip("0")
    text = f"{whole}.{decimals}" if decimals else whole
    return f"-{text}" if sign == "-" and text != "0" else text


class BoxedVerifier:
    """Reward 1.0 if the last box holds the gold answer, else 0.0; no box is incorrect. Always reaches a verdict."""

    async def verify(self, rollout: Rollout, prompt: Prompt) -> Verdict:
        """Judge ``rollout.text`` against ``prompt.answer``, a text or a number.

        Raises:
            DataError: a gold answer that is neither.
        """
        gold = _gold_text(prompt.answer, prompt.id)
        found = last_boxed(rollout.text)
        if found is None:
            return Verdict(correct=False, reward=0.0, reason=r"no balanced \boxed{}")
        if not found.strip():
            return Verdict(correct=False, reward=0.0, extracted="", reason="the box is empty")
        correct = normalise(found) == normalise(gold)
        reason = "correct" if correct else "the box differs from the gold answer"
        return Verdict(correct=correct, reward=float(correct), extracted=found.strip(), reason=reason)


def _gold_text(answer: Any, prompt_id: str) -> str:
    if isinstance(answer, str) and answer.strip():
        return answer
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return format(Decimal(repr(answer)), "f")
    raise DataError(f"the answer of prompt {prompt_id!r} is {answer!r}", "a text or a number", "mend the data")
