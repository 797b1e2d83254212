"""Gold answers for code, read into one shape each and checked.

    {"format": "humaneval", "prompt": ..., "test": "def check(candidate): ...", "entry_point": "name"}
    {"format": "stdio", "tests": [{"input": "3 4\\n", "output": "7\\n"}, ...], "tolerance": 1e-6}
    {"format": "functional", "fn_name": "add", "tests": [{"args": [3, 4], "output": 7}, ...]}
    {"format": "functional", "tests": [{"input": "[1, 2]\\n5", "output": "3", "fn_name": "add"}]}   a JSON value a line
    {"format": "functional", "tests": [{"check": "def check(candidate): ...\\n\\ncheck(Solution().add)"}]}

``fn_name`` stands in the answer or in each test. It is a function, or a method of ``class Solution`` where the solution
has one. ``output_any_of``, a list, replaces ``output`` where several are right. ``tolerance`` is absolute (1e-6) or
relative ("1e-4%"); without one numbers must be equal.

Not covered: special judges (problems where many outputs are right and a program decides), interactive problems,
arguments that are not plain data (linked lists, trees).
"""

from __future__ import annotations

import json
import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from scope_opd.gold import CODE_FORMATS, Tolerance, check_code_answer, parse_tolerance
from scope_opd.verify.sandbox.plain import NotPlainError, encode

_CHECKED = re.compile(r"\bcheck\(\s*(Solution\(\)\s*\.\s*)?([A-Za-z_]\w*)\s*\)\s*\Z")
_CHECK_DEFINED = re.compile(r"^def\s+check\s*\(", re.MULTILINE)


@dataclass(frozen=True, slots=True)
class CheckTask:
    """Test code that calls the function: HumanEval's ``check(candidate)``.

    Attributes:
        prompt: the start of the program, for the solution and (its helpers) for the tests; "" where there is none.
        tests: pieces of test code, each a test; a piece sees the function under the name ``entry_point``.
        entry_point: ``name``, or ``Solution.name`` for a method of a new instance.
        call_check: whether ``check`` is yet to be called with the function; else the test code does so.
    """

    prompt: str
    tests: tuple[str, ...]
    entry_point: str
    call_check: bool


@dataclass(frozen=True, slots=True)
class StdioTask:
    """A program that reads an input and prints an output: pairs of texts."""

    tests: tuple[tuple[str, str], ...]
    tolerance: Tolerance | None


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a function, and the values of which it must return one."""

    name: str
    args: tuple[Any, ...]
    outputs: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class CallTask:
    """A function that is called with arguments."""

    tests: tuple[Call, ...]
    tolerance: Tolerance | None


Task = CheckTask | StdioTask | CallTask


def parse_code_answer(answer: Mapping[str, Any]) -> Task:
    """Read a code answer of any format.

    Raises:
        ValueError: one line that says what was found and what is expected.
    """
    if "format" not in answer:
        raise ValueError(f"format is missing; expected one of {', '.join(CODE_FORMATS)}")
    check_code_answer(answer)
    form = answer["format"]
    if form == "humaneval":
        name = _name(answer["entry_point"], "entry_point")
        if not _CHECK_DEFINED.search(answer["test"]):
            raise ValueError("test defines no check; expected `def check(candidate): ...` (format humaneval)")
        return CheckTask(answer["prompt"], (answer["test"],), name, call_check=True)
    tolerance = parse_tolerance(answer["tolerance"]) if answer.get("tolerance") is not None else None
    if form == "stdio":
        return StdioTask(tuple(_pair(test, place) for place, test in enumerate(answer["tests"], 1)), tolerance)
    if "check" in answer["tests"][0]:
        return _checks(answer)
    return CallTask(tuple(_call(test, answer, place) for place, test in enumerate(answer["tests"], 1)), tolerance)


# What follows reads tests whose keys and types ``check_code_answer`` has found right.


def _pair(test: Mapping[str, Any], place: int) -> tuple[str, str]:
    for key in ("input", "output"):
        try:
            test[key].encode()
        except UnicodeEncodeError:
            raise ValueError(f"test {place}: {key} holds half a character; expected UTF-8 (format stdio)") from None
    return test["input"], test["output"]


def _call(test: Mapping[str, Any], answer: Mapping[str, Any], place: int) -> Call:
    name = _name(test.get("fn_name") or answer.get("fn_name"), f"test {place}: fn_name")
    args = test.get("args", test.get("input"))
    written = isinstance(args, str)
    if written:  # LiveCodeBench: one JSON value a line
        args = [_json(line, f"test {place}: input") for line in args.split("\n") if line.strip()]
    if "output_any_of" in test:
        outputs = test["output_any_of"]
    else:
        output = test["output"]
        outputs = [_json(output, f"test {place}: output") if written and isinstance(output, str) else output]
    try:
        encode([args, outputs])
    except NotPlainError as error:
        raise ValueError(f"test {place}: {error}; expected plain data (format functional)") from None
    return Call(f"*.{name}", tuple(args), tuple(outputs))


def _checks(answer: Mapping[str, Any]) -> CheckTask:
    """LeetCode's layout: check code that ends in ``check(Solution().name)`` or ``check(name)``."""
    codes = []
    names = set()
    for place, test in enumerate(answer["tests"], 1):
        code = test["check"]
        called = _CHECKED.search(code.rstrip())
        if called is None:
            raise ValueError(
                f"test {place}: check is {_shown(code)}; expected code whose last line is check(Solution().NAME) or "
                "check(NAME) (format functional)"
            )
        codes.append(code)
        names.add(("Solution." if called[1] else "") + _name(called[2], f"test {place}: the name checked"))
    if len(names) != 1:
        raise ValueError(f"tests checks {', '.join(sorted(names))}; expected one function (format functional)")
    prompt = answer.get("prompt", "")
    if not isinstance(prompt, str):
        raise ValueError(f"prompt is {_shown(prompt)}; expected a text (format functional)")
    return CheckTask(prompt, tuple(codes), names.pop(), call_check=False)


def _name(value: Any, what: str) -> str:
    if not isinstance(value, str) or not value.isidentifier() or keyword.iskeyword(value):
        raise ValueError(f"{what} is {_shown(value)}; expected the name of a function")
    return value


def _json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{what} is {_shown(text)}; expected JSON (format functional)") from None


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"
