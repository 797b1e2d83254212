"""Gold answers: the forms that a data set may write them in, read once into one shape.

    "42", 42, 0.5                                     one answer
    {"any_of": ["1/2", "0.5"]}                        any of these is right
    {"all_of": ["2", "-2"]}                           all of these, in any order, and nothing else
    {"any_of": ["3", {"all_of": ["1", "2"]}]}         alternatives may themselves be lists
    {"any_of": ["1.6"], "tolerance": "1%"}            a stated tolerance: a share in per cent, or an absolute number
    {"format": "humaneval" | "stdio" | "functional", ...}    code: judged by running it (``verify/code``)

Reading a data set and judging an answer both start here, so that what cannot be judged is found when it is read.
"""

from __future__ import annotations

import json
import keyword
import math
import re
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

CODE_FORMATS = ("humaneval", "stdio", "functional")
_SHARE = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*%")


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far a number may be from the gold one: at most ``absolute``, or ``relative`` x |gold|."""

    absolute: float = 0.0
    relative: float = 0.0


@dataclass(frozen=True, slots=True)
class MathGold:
    """What a maths answer is held against.

    Attributes:
        alternatives: any one of these is right; each is a list of answers that must all be there (usually one).
        tolerance: the data set's own; None where it states none.
    """

    alternatives: tuple[tuple[str, ...], ...]
    tolerance: Tolerance | None = None


def is_code(answer: Any) -> bool:
    """Whether a gold answer asks for code to be run."""
    return isinstance(answer, Mapping) and "format" in answer


def parse_tolerance(value: Any) -> Tolerance:
    """``0.1`` is absolute, ``"1%"`` is relative to the gold value.

    Raises:
        ValueError: anything else, or a number that is negative or not finite.
    """
    if isinstance(value, str) and (share := _SHARE.fullmatch(value.strip())):
        return Tolerance(relative=float(share[1]) / 100)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= sys.float_info.max:
        return Tolerance(absolute=float(value))
    raise ValueError(f'tolerance = {value!r}; expected a number >= 0 or a share such as "1%"')


def parse_math_gold(answer: Any) -> MathGold:
    """Read a maths answer in any of its forms.

    Raises:
        ValueError: saying what was found and what is expected.
    """
    if not isinstance(answer, Mapping):
        return MathGold(((_text(answer),),))
    forms = [key for key in ("any_of", "all_of") if key in answer]
    unknown = [str(key) for key in answer if key not in ("any_of", "all_of", "tolerance")]
    if len(forms) != 1 or unknown:
        raise ValueError(
            f"an answer with the keys {', '.join(map(str, answer)) or '(none)'}; expected one of any_of and all_of, "
            "and perhaps tolerance"
        )
    items = answer[forms[0]]
    if not isinstance(items, list | tuple) or not items:
        raise ValueError(f"{forms[0]} is {_shown(items)}; expected a list of answers, not empty")
    if forms[0] == "all_of":
        alternatives: tuple[tuple[str, ...], ...] = (tuple(_text(item) for item in items),)
    else:
        alternatives = tuple(_alternative(item) for item in items)
    tolerance = parse_tolerance(answer["tolerance"]) if answer.get("tolerance") is not None else None
    return MathGold(alternatives, tolerance)


def check_answer(answer: Any) -> None:
    """Refuse what no verifier could judge.

    Raises:
        ValueError: saying what was found and what is expected.
    """
    if is_code(answer):
        check_code_answer(answer)
    else:
        parse_math_gold(answer)


def check_code_answer(answer: Mapping[str, Any]) -> None:
    """Refuse a code answer of an unknown format, or without what its format needs: keys and types of every test.

    Raises:
        ValueError: saying what was found and what is expected.
    """
    form = answer["format"]
    if form not in CODE_FORMATS:
        raise ValueError(f"format = {form!r}; expected one of {', '.join(CODE_FORMATS)}")
    if form == "humaneval":
        for key in ("prompt", "test", "entry_point"):
            if not isinstance(answer.get(key), str) or not answer[key].strip():
                raise ValueError(f"{key} is {_shown(answer.get(key))}; expected a text (format humaneval)")
        return
    tests = answer.get("tests")
    if not isinstance(tests, list) or not tests or not all(isinstance(test, Mapping) for test in tests):
        raise ValueError(f"tests is {_shown(tests)}; expected a list of objects, not empty (format {form})")
    if answer.get("tolerance") is not None:
        parse_tolerance(answer["tolerance"])
    if form == "functional" and len({"check" in test for test in tests}) == 2:
        raise ValueError("tests holds check code beside calls; expected one kind (format functional)")
    for place, test in enumerate(tests, 1):
        if form == "stdio":
            _check_pair(test, place)
        elif "check" in test:
            if not isinstance(test["check"], str):
                raise ValueError(f"test {place}: check is {_shown(test['check'])}; expected code (format functional)")
        else:
            _check_call(test, answer, place)


def _check_pair(test: Mapping[str, Any], place: int) -> None:
    """Format stdio: two texts."""
    for key in ("input", "output"):
        if not isinstance(test.get(key), str):
            raise ValueError(f"test {place}: {key} is {_shown(test.get(key))}; expected a text (format stdio)")


def _check_call(test: Mapping[str, Any], answer: Mapping[str, Any], place: int) -> None:
    """Format functional: a function's name, arguments and outputs. What they hold, the verifier looks at."""
    name = test.get("fn_name") or answer.get("fn_name")
    if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
        raise ValueError(f"test {place}: fn_name is {_shown(name)}; expected the name of a function")
    if not isinstance(test.get("args", test.get("input")), list) and (
        "args" in test or not isinstance(test.get("input"), str)
    ):
        raise ValueError(f"test {place}: no args; expected args as a list, or input with a JSON value on each line")
    if "output_any_of" in test:
        outputs = test["output_any_of"]
        if not isinstance(outputs, list) or not outputs:
            raise ValueError(f"test {place}: output_any_of is {_shown(outputs)}; expected a list, not empty")
    elif "output" not in test:
        raise ValueError(f"test {place}: no output; expected output or output_any_of (format functional)")


def answer_from_text(value: Any) -> Any:
    """An answer column that holds a JSON object of one of the forms above as text: the object. Else the value."""
    if isinstance(value, str) and value.lstrip()[:1] == "{" and value.rstrip()[-1:] == "}":
        try:
            decoded = json.loads(value)
        except (ValueError, RecursionError):
            return value  # a set such as {1, 2}
        if isinstance(decoded, dict) and {"any_of", "all_of", "format"} & set(decoded):
            return decoded
    return value


def _alternative(item: Any) -> tuple[str, ...]:
    if isinstance(item, Mapping):
        if set(item) != {"all_of"}:
            raise ValueError(f"any_of holds {_shown(item)}; expected answers, or objects with all_of alone")
        return parse_math_gold(item).alternatives[0]
    return (_text(item),)


def _text(answer: Any) -> str:
    if isinstance(answer, str) and answer.strip():
        return answer
    if isinstance(answer, int) and not isinstance(answer, bool):
        return str(answer)  # of any length: floats end at 309 digits
    if isinstance(answer, float) and math.isfinite(answer):
        return format(Decimal(repr(answer)), "f")
    raise ValueError(f"the answer is {_shown(answer)}; expected a text that is not empty, or a finite number")


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"
