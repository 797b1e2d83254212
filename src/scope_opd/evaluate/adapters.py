"""From a data set's row to id, problem and gold answer: one small function a layout.

Each takes the layout of the hub and that of the usual local copies (``id``, ``problem``, ``answer`` and, for
OlympiadBench, ``final_answer``, ``is_multiple_answer``, ``unit``, ``error``). The loaders of code benchmarks live with
the code verifier and are imported when a row of theirs comes.

Not covered: checks of types and emptiness, which ``scope_opd.data`` makes of every row.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from scope_opd.data.adapters import gsm8k_answer, olympiadbench_answer, split_answers, without_leading_zeros
from scope_opd.gold import parse_math_gold

Adapted = Mapping[str, Any] | None
"""``{"problem", "answer"}`` and perhaps "id", or None for a row that cannot be judged and is left out, counted."""

_PROSE = re.compile(r"\s*(?:where|for|with|and|or)\b", re.IGNORECASE)


def as_it_is(row: Mapping[str, Any], number: int) -> Adapted:
    """A user's own file."""
    return row


def plain(row: Mapping[str, Any], number: int) -> Adapted:
    """``problem`` or ``question``, ``answer``, ``id`` or ``unique_id``."""
    return _named(row, _first(row, "problem", "question"), row.get("answer"))


def aime(row: Mapping[str, Any], number: int) -> Adapted:
    """As ``plain``; answers may be padded to three digits."""
    answer = row.get("answer")
    return _named(
        row, _first(row, "problem", "question"), without_leading_zeros(answer) if isinstance(answer, str) else answer
    )


def gsm8k(row: Mapping[str, Any], number: int) -> Adapted:
    """The hub's answer is a worked solution that ends "#### 18"; the local copy's is the number."""
    answer = row.get("answer")
    if isinstance(answer, str) and "####" in answer:
        answer = gsm8k_answer(answer)
    return _named(row, _first(row, "problem", "question"), answer)


def deepmath(row: Mapping[str, Any], number: int) -> Adapted:
    return _named(row, _first(row, "question", "problem"), _first(row, "final_answer", "answer"))


def olympiadbench(row: Mapping[str, Any], number: int) -> Adapted:
    """Several answers in one string become ``all_of``, ``error`` a tolerance, a unit another way to write the answer.

    An answer whose commas lead to prose ("where b is any integer") is one answer.
    """
    final = _first(row, "final_answer", "answer")
    texts = [final] if isinstance(final, str) else list(final or [])
    several = bool(row.get("is_multiple_answer"))
    if several and any(_PROSE.match(part) for text in texts for part in split_answers(text)):
        several = False
    answer = olympiadbench_answer(texts, is_multiple_answer=several, error=_largest(row.get("error")))
    unit = str(row.get("unit") or "").strip().strip("$").strip()
    if unit:
        answer = _or_with_unit(answer, unit)
    problem = _first(row, "problem", "question")
    context = row.get("context")
    if isinstance(context, str) and context.strip() and isinstance(problem, str):
        problem = f"{context.strip()}\n\n{problem}"
    return _named(row, problem, answer)


def humaneval(row: Mapping[str, Any], number: int) -> Adapted:
    from scope_opd.verify.code.loaders import from_humaneval

    problem = _first(row, "prompt", "problem")
    shown = f"Complete this Python function.\n\n```python\n{problem}```" if isinstance(problem, str) else problem
    return _named(row, shown, from_humaneval(row), _first(row, "task_id", "id"))


def livecodebench(row: Mapping[str, Any], number: int) -> Adapted:
    from scope_opd.verify.code.loaders import from_livecodebench

    problem = _with_starter(_first(row, "question_content", "problem"), row.get("starter_code"))
    return _named(row, problem, from_livecodebench(row), _first(row, "question_id", "id"))


def taco(row: Mapping[str, Any], number: int) -> Adapted:
    from scope_opd.verify.code.loaders import from_taco

    problem = _with_starter(_first(row, "question", "problem"), row.get("starter_code"))
    return _named(row, problem, from_taco(row))


def codeforces(row: Mapping[str, Any], number: int) -> Adapted:
    """Standard input and output with the official tests; a row whose answers need a checker of its own is left out."""
    if row.get("generated_checker") or row.get("interaction_format") or row.get("input_mode", "stdio") != "stdio":
        return None
    tests = row.get("official_tests")
    if not tests or row.get("official_tests_complete") is False:
        return None
    parts = [row.get("description"), row.get("input_format"), row.get("output_format"), row.get("note")]
    headings = ["", "Input\n", "Output\n", "Note\n"]
    text = "\n\n".join(head + str(part) for head, part in zip(headings, parts, strict=True) if part)
    answer = {"format": "stdio", "tests": [{"input": t["input"], "output": t["output"]} for t in tests]}
    return _named(row, text, answer)


def _with_starter(problem: Any, starter: Any) -> Any:
    if isinstance(problem, str) and isinstance(starter, str) and starter.strip():
        return f"{problem}\n\nBegin with this code:\n\n```python\n{starter}\n```"
    return problem


def _named(row: Mapping[str, Any], problem: Any, answer: Any, name: Any = None) -> Adapted:
    """A row of the columns that are read, without those that the layout does not have."""
    found = {"problem": problem, "answer": answer, "id": name if name is not None else _first(row, "id", "unique_id")}
    return {key: value for key, value in found.items() if value is not None}


def _first(row: Mapping[str, Any], *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def _or_with_unit(answer: Any, unit: str) -> dict[str, Any]:
    """The gold answer, or the same with its unit behind each part."""

    def behind(text: str) -> str:
        if unit in ("%", "\\%"):
            return f"{text}\\%"
        return f"{text}{unit}" if unit.startswith("^") else f"{text} \\mathrm{{{unit}}}"

    gold = parse_math_gold(answer)
    forms = [list(parts) for parts in gold.alternatives]
    forms += [[behind(part) for part in parts] for parts in forms]
    found: dict[str, Any] = {"any_of": [parts[0] if len(parts) == 1 else {"all_of": parts} for parts in forms]}
    if isinstance(answer, Mapping) and "tolerance" in answer:
        found["tolerance"] = answer["tolerance"]
    return found


def _largest(error: Any) -> float | None:
    """``"1e-1"`` as a number; of a list of tolerances, one an answer ("1e-1,1e-2"), the largest."""
    if error is None or not str(error).strip():
        return None
    return max(float(part) for part in str(error).split(","))
