"""Answers of published data sets, as their authors write them, in the forms of ``scope_opd.gold``. Pure functions.

Not covered: code (``verify/code`` has its own loaders), what a benchmark's judge is to do with units.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

_GSM8K_MARK = "####"


def gsm8k_answer(solution: str) -> str:
    """The number behind the last ``####`` of a GSM8K solution, without thousands separators.

    Raises:
        ValueError: no mark, or nothing behind it.
    """
    _, mark, answer = solution.rpartition(_GSM8K_MARK)
    answer = answer.strip().replace(",", "")
    if not mark or not answer:
        raise ValueError(f"a solution without {_GSM8K_MARK} and an answer: {solution[-40:]!r}")
    return answer


def without_leading_zeros(answer: str) -> str:
    """ "073" as "73", as AIME pads its answers; what is no run of digits stays as it is."""
    text = answer.strip()
    return (text.lstrip("0") or "0") if text.isascii() and text.isdigit() else answer


def olympiadbench_answer(
    final_answer: str | Sequence[str], *, is_multiple_answer: bool = False, error: str | float | None = None
) -> Any:
    """OlympiadBench's ``final_answer``: one text, or several comma-joined answers, perhaps with a tolerance.

    ``error`` is an absolute tolerance ("1e-1"). Units stand in a column of their own and are no part of the answer.

    Returns:
        A text, ``{"all_of": [...]}`` where several answers are joined, either within ``{"any_of": [...],
        "tolerance": ..}`` where there is a tolerance.

    Raises:
        ValueError: no answer, or a tolerance that is no number >= 0.
    """
    texts = [final_answer] if isinstance(final_answer, str) else list(final_answer)
    texts = [_bare(text) for text in texts if text.strip()]
    if not texts:
        raise ValueError("final_answer is empty")
    parts = [part for text in texts for part in (split_answers(text) if is_multiple_answer else [text])]
    gold: Any = parts[0] if len(parts) == 1 else {"all_of": parts}
    if error is None or str(error).strip() == "":
        return gold
    tolerance = float(error)
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"error = {error!r}; expected a number >= 0")
    return {**gold, "tolerance": tolerance} if isinstance(gold, dict) else {"any_of": [gold], "tolerance": tolerance}


def split_answers(text: str) -> list[str]:
    """Cut at the commas outside brackets: "(1,2),(3,4)" is two answers. Dollars around each part go.

    Half-open intervals count as brackets: any of ``( [ \\{`` opens, any of ``) ] \\}`` closes.
    """
    parts, depth, start = [], 0, 0
    for index, character in enumerate(text):
        depth += (character in "([{") - (character in ")]}")
        if character == "," and depth <= 0:
            parts.append(text[start:index])
            start = index + 1
    parts.append(text[start:])
    return [bare for part in parts if (bare := _bare(part))]


def _bare(text: str) -> str:
    """Without blanks and without the dollars that enclose all of it."""
    text = text.strip()
    inner = re.fullmatch(r"\$([^$]*)\$", text)
    return inner[1].strip() if inner else text.strip("$").strip() if text.count("$") == 1 else text
