"""Answers for code, the layouts they come from, which program a response holds, and when an output is right."""

from __future__ import annotations

import base64
import contextlib
import json
import pickle
import time
import zlib
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scope_opd.gold import Tolerance
from scope_opd.verify.code import loaders
from scope_opd.verify.code.compare import same_value, text_difference
from scope_opd.verify.code.extract import completion_of, last_block
from scope_opd.verify.code.formats import CallTask, CheckTask, StdioTask, parse_code_answer
from scope_opd.verify.code.preamble import names_for
from scope_opd.verify.code.verifier import program
from scope_opd.verify.math.extract import visible
from scope_opd.verify.sandbox.plain import encode, read_json
from shared_data import data_rows

HUMANEVAL = {
    "format": "humaneval",
    "prompt": "def f(x):\n",
    "test": "def check(candidate):\n    pass",
    "entry_point": "f",
}


def packed(value: object, protocol: int = 4) -> str:
    return base64.b64encode(zlib.compress(pickle.dumps(value, protocol))).decode()


# -- answers ---------------------------------------------------------------------------------------------------------


def test_each_format_is_read_into_its_task() -> None:
    check = parse_code_answer(HUMANEVAL)
    assert isinstance(check, CheckTask)
    assert check.call_check
    stdio = parse_code_answer({"format": "stdio", "tests": [{"input": "1", "output": "2"}], "tolerance": "0.1%"})
    assert stdio == StdioTask((("1", "2"),), Tolerance(relative=0.001))
    calls = parse_code_answer({"format": "functional", "fn_name": "g", "tests": [{"args": [1, [2]], "output": None}]})
    assert isinstance(calls, CallTask)
    assert (calls.tests[0].name, calls.tests[0].args, calls.tests[0].outputs) == ("*.g", (1, [2]), (None,))
    written = parse_code_answer(
        {"format": "functional", "tests": [{"input": '[1]\n"a"', "output": "true", "fn_name": "g"}]}
    )
    assert isinstance(written, CallTask)
    assert (written.tests[0].args, written.tests[0].outputs) == (([1], "a"), (True,))


@pytest.mark.parametrize(("last", "name"), [("check(Solution().go)", "Solution.go"), ("check( go )\n", "go")])
def test_check_code_names_its_function(last: str, name: str) -> None:
    task = parse_code_answer(
        {"format": "functional", "tests": [{"check": f"def check(candidate):\n    assert candidate(1)\n\n{last}"}]}
    )
    assert isinstance(task, CheckTask)
    assert (task.entry_point, task.call_check) == (name, False)


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({**HUMANEVAL, "entry_point": "a b"}, "entry_point"),
    ({**HUMANEVAL, "entry_point": "class"}, "entry_point"),
    ({**HUMANEVAL, "test": "assert f(1) == 2"}, "check"),
    ({**HUMANEVAL, "prompt": None}, "prompt"),
    ({"format": "stdio", "tests": []}, "tests"),
    ({"format": "stdio", "tests": [{"input": 1, "output": "2"}]}, "test 1: input"),
    ({"format": "stdio", "tests": [{"input": "1"}]}, "test 1: output"),
    ({"format": "stdio", "tests": [{"input": "1", "output": "2"}], "tolerance": -1}, "tolerance"),
    ({"format": "functional", "tests": [{"args": [1], "output": 2}]}, "fn_name"),
    ({"format": "functional", "fn_name": "f()", "tests": [{"args": [1], "output": 2}]}, "fn_name"),
    ({"format": "functional", "fn_name": "f", "tests": [{"args": 1, "output": 2}]}, "args"),
    ({"format": "functional", "fn_name": "f", "tests": [{"output": 2}]}, "args"),
    ({"format": "functional", "fn_name": "f", "tests": [{"args": [1]}]}, "output"),
    ({"format": "functional", "fn_name": "f", "tests": [{"args": [1], "output_any_of": []}]}, "output_any_of"),
    ({"format": "functional", "fn_name": "f", "tests": [{"input": "n = 5", "output": "2"}]}, "JSON"),
    ({"format": "functional", "fn_name": "f", "tests": [{"input": "5", "output": "x"}]}, "JSON"),
    ({"format": "functional", "fn_name": "f", "tests": [{"args": [object()], "output": 2}]}, "plain data"),
    ({"format": "functional", "tests": [{"check": "def check(c): pass"}]}, "check"),
    ({"format": "functional", "tests": [{"check": "check(f)"}, {"args": [], "output": 1}]}, "one kind"),
    ({"format": "functional", "tests": [{"check": "check(f)"}, {"check": "check(g)"}]}, "one function"),
    ({"format": "stdio", "tests": [{"input": "\udc80", "output": "x"}]}, "test 1: input holds half a character"),
    ({"format": "java", "tests": []}, "format"),
    ({"tests": []}, "format is missing"),
]


@pytest.mark.parametrize(("answer", "named"), BROKEN, ids=range(len(BROKEN)))
def test_a_broken_answer_is_refused_in_one_line_that_names_the_place(answer: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match="expected") as caught:
        parse_code_answer(answer)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


# -- layouts ---------------------------------------------------------------------------------------------------------


def test_every_row_of_the_public_layouts_becomes_an_answer() -> None:
    for sample in data_rows("code/code_schema_samples.jsonl"):
        row = sample["row"]
        if sample["kind"].startswith("livecodebench"):
            answer = loaders.from_livecodebench(row)
        elif sample["kind"].startswith("taco"):
            answer = loaders.from_taco(row)
        else:
            answer = loaders.from_tests(row["tests"])
        parse_code_answer(answer)
    for row in data_rows("code/humaneval.jsonl"):
        parse_code_answer(loaders.from_humaneval(row))


TESTS = [{"input": "1\n", "output": "2\n", "testtype": "stdin"}]


@pytest.mark.parametrize("private", [json.dumps(TESTS), packed(json.dumps(TESTS)), packed(json.dumps(TESTS), 2), TESTS])
def test_private_tests_follow_the_public_ones(private: Any) -> None:
    row = {"public_test_cases": json.dumps(TESTS), "private_test_cases": private, "metadata": "{}"}
    answer = loaders.from_livecodebench(row)
    assert answer == {"format": "stdio", "tests": [{"input": "1\n", "output": "2\n"}] * 2}


def test_functional_tests_of_livecodebench_take_the_name_from_the_metadata() -> None:
    tests = json.dumps([{"input": "[1]\n2", "output": "[1, 2]", "testtype": "functional"}])
    row = {"public_test_cases": tests, "private_test_cases": "", "metadata": json.dumps({"func_name": "go"})}
    task = parse_code_answer(loaders.from_livecodebench(row))
    assert isinstance(task, CallTask)
    assert (task.tests[0].name, task.tests[0].args) == ("*.go", ([1], 2))


class Bomb:
    ran = False

    def __reduce__(self) -> tuple[Any, ...]:
        return (setattr, (Bomb, "ran", True))


HOSTILE = {
    "a global": packed(Bomb()),
    "a class": packed(ValueError),
    "a list": packed([1, 2]),
    "bytes": packed(b"x"),
    "a huge memo index": base64.b64encode(zlib.compress(b"\x80\x04X\x01\x00\x00\x00ar\xff\xff\xff\x7f.")).decode(),
    "cut short": base64.b64encode(zlib.compress(pickle.dumps("abc")[:-2])).decode(),
    "not zlib": base64.b64encode(b"hello").decode(),
    "not base64": "?!",
    "text that is no JSON": packed("hello"),
    "JSON that is no list": packed('{"a": 1}'),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_private_tests_are_refused_and_nothing_runs(name: str) -> None:
    with pytest.raises(ValueError, match="private_test_cases"):
        loaders.private_tests(HOSTILE[name])
    assert not Bomb.ran


def test_a_decompression_bomb_stops_at_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaders, "MAX_TESTS_BYTES", 1 << 20)
    bomb = base64.b64encode(zlib.compress(bytes(64 << 20))).decode()
    with pytest.raises(ValueError, match="decompressed"):
        loaders.private_tests(bomb)


def test_taco_rows_of_each_kind() -> None:
    stdio = loaders.from_taco({"input_output": json.dumps({"inputs": ["1\n", ["2", "3"]], "outputs": ["1\n", ["5"]]})})
    assert stdio["tests"] == [{"input": "1\n", "output": "1\n"}, {"input": "2\n3", "output": "5"}]
    assert stdio["tolerance"] == loaders.TACO_TOLERANCE
    calls = loaders.from_taco(
        {"input_output": json.dumps({"fn_name": "g", "inputs": [[{"1": 2}]], "outputs": [[[3]]]}), "starter_code": ""}
    )
    assert calls["tests"] == [{"args": [{1: 2}], "output_any_of": [[[3]], [3]]}]
    geeks = {
        "input_output": json.dumps({"inputs": ["N = 3\narr[] = {1,2,3}"], "outputs": ["6"]}),
        "starter_code": "class Solution:\n    def total(self, arr, n):\n        #code here\n",
    }
    assert loaders.from_taco(geeks) == {
        "format": "functional",
        "fn_name": "total",
        "tests": [{"args": [[1, 2, 3], 3], "output": 6}],
    }
    geeks["input_output"] = json.dumps({"inputs": ["3\n1 2 3"], "outputs": ["6"]})
    with pytest.raises(ValueError, match="arr, n"):
        loaders.from_taco(geeks)


@pytest.mark.parametrize(
    "tests", [[], None, 3, "x", {"inputs": ["1"], "outputs": []}, {}, [1], [{"input": 1, "output": "2"}], [{}]]
)
def test_tests_of_no_known_layout_are_refused(tests: Any) -> None:
    with pytest.raises(ValueError, match="expected"):
        loaders.from_tests(tests)


KEYS = ["format", "tests", "input", "output", "args", "fn_name", "check", "tolerance", "output_any_of", "inputs",
        "outputs", "functional", "testtype", "metadata", "func_name", "input_output", "starter_code",
        "public_test_cases", "private_test_cases", "prompt", "test", "entry_point"]  # fmt: skip
LEAVES = st.sampled_from(
    ["stdio", "functional", "humaneval", "", "f", "[1]", "{}", "1e-6", "class Solution:\n def f(self, a, b): pass",
     "a = {1,2}\nb = 3", "def check(c): pass\ncheck(f)", "\udc80", "9" * 5000, "[" * 5000, None, True, 1, 0.5, b"x"]
)  # fmt: skip
ANYTHING = st.recursive(LEAVES, lambda part: st.lists(part) | st.dictionaries(st.sampled_from(KEYS), part))


@given(st.dictionaries(st.sampled_from(KEYS), ANYTHING))
def test_a_row_of_anything_is_read_or_refused(row: dict[str, Any]) -> None:
    for read in (loaders.from_humaneval, loaders.from_livecodebench, loaders.from_taco, loaders.from_tests, dict):
        with contextlib.suppress(ValueError):
            parse_code_answer(read(row))


@pytest.mark.parametrize(
    "read",
    [
        lambda: loaders.from_taco({"input_output": {"inputs": ["1"], "outputs": ["2"]}, "starter_code": 5}),
        lambda: loaders.from_livecodebench({"public_test_cases": [{"testtype": ["stdin"]}]}),
    ],
)
def test_columns_of_a_wrong_type_are_refused(read: Callable[[], object]) -> None:
    with pytest.raises(ValueError, match="expected"):
        read()


# -- the program in a response ---------------------------------------------------------------------------------------

BLOCKS = [
    ("```python\na\n```", "a\n"),
    ("```python\na\n```\ntext\n```python\nb\n```", "b\n"),
    ("```python\na\n```\n```\nb\n```", "a\n"),
    ("```cpp\na\n```\n```\nb\n```", "b\n"),
    ("```Python3\na\n  ```", "a\n"),
    ("   ```py\n  a\n   ```", "  a\n"),
    ("Answer:```python\na\n```", "a\n"),
    ("~~~python\na\n```\n~~~", "a\n```\n"),
    ("````python\n```\na\n````", "```\na\n"),
    ("```python\na\n", None),
    ("```python\na\n```\n```python\nb", "a\n"),
    ("no fence", None),
    ("```a```", None),
    ("", None),
    ("```python\n```", "\n"),
    ("Use ``` fences.\n```python\na\n```", "a\n"),
    ("```python\nhalf\nAgain:\n```python\na\n```", "a\n"),
    ("````markdown\n```python\na\n```\n````", "a\n"),
    ("```python\nprint('```python')\n```", "print('```python')\n"),
    ("```python\r\ns = '\u2028\x0c'\r\n```\r\n", "s = '\u2028\x0c'\n"),
]


@pytest.mark.parametrize(("text", "block"), BLOCKS, ids=range(len(BLOCKS)))
def test_the_last_closed_python_block_is_the_program(text: str, block: str | None) -> None:
    assert last_block(text) == block


@pytest.mark.parametrize("line", ["```" + "a" * 10**6 + "`", "```" + " " * 10**6 + "`", "~" * 10**6 + "`"])
def test_extraction_reads_a_long_line_once(line: str) -> None:
    start = time.process_time()
    assert last_block(line) is None
    assert time.process_time() - start < 1


@given(st.text(alphabet="`~ apython\n"))
def test_extraction_never_fails(text: str) -> None:
    last_block(text)
    completion_of(text, "def f():\n")


@pytest.mark.parametrize(
    ("text", "scope", "part"),
    [
        ("<think>a</think>b", "after_think", "b"),
        ("a</think>b</think>c", "after_think", "c"),
        ("a<think>b", "after_think", "a"),
        ("<think>b", "after_think", ""),
        ("<think>a</think>b<think>c", "after_think", "b"),
        ("plain", "after_think", "plain"),
        ("<think>a</think>b", "all", "<think>a</think>b"),
    ],
)
def test_an_unfinished_thinking_block_never_counts(text: str, scope: Any, part: str) -> None:
    assert visible(text, scope) == part


def test_a_completion_ends_where_the_function_does() -> None:
    prompt = "def f(x):\n"
    assert completion_of("    return x\n", prompt) == "    return x\n"
    assert completion_of("    return x\n\ndef g(): pass\n", prompt) == "    return x\n\ndef g(): pass\n"
    assert completion_of("    return x\n\nThis returns x.\n", prompt) == "    return x\n\n"
    assert completion_of("    return x\n```\nThis returns x.", prompt) == "    return x\n"


def test_a_program_is_a_completion_of_the_prompt_or_a_whole_function() -> None:
    task = parse_code_answer({**HUMANEVAL, "prompt": "import math\ndef f(x):\n"})
    assert program("    return x\n", task)[1] == ["import math\ndef f(x):\n    return x\n"]
    code, pieces = program("Sure:\n```python\ndef f(x):\n    return 2\n```", task)
    assert code == "def f(x):\n    return 2\n"
    assert pieces == ["import math\ndef f(x):\n\n    pass\n", code]
    assert program("```python\n    return x\n```", task)[1] == ["import math\ndef f(x):\n    return x\n"]
    assert program("<think>```python\ndef f(x): pass\n```", task) == (None, [])
    stdio = parse_code_answer({"format": "stdio", "tests": [{"input": "", "output": ""}]})
    assert program("print(1)", stdio) == (None, [])
    assert program("print(1)", stdio, form="answer") == ("print(1)", ["print(1)"])


def test_only_names_that_a_program_uses_are_provided() -> None:
    assert names_for("def f(a: List[int]) -> int: return gcd(*a) + sum(a)") == [["List", "typing"], ["gcd", "math"]]
    assert names_for("copy.copy(datetime)") == [["copy", "copy"], ["datetime", "datetime"]]


# -- when an output is right -----------------------------------------------------------------------------------------

SAME = [
    ("3", "3\n"), ("3\n", "3"), ("1 2", "1  2 "), ("1\n2\n", "1\r\n2\r\n\n"), ("1.0", "1"), ("5e1", "50"),
    (" a", "a"), ("0.10", ".1"), ("", "\n"), ("1 x", "1.00 x"),
]  # fmt: skip
DIFFERENT = [
    ("3", "4"), ("1 2", "12"), ("1\n2", "1 2"), ("YES", "Yes"), ("1", ""), ("", "1"), ("0.5", "0.5000001"),
    ("1 2 3", "1 2"), ("1\n\n2", "1\n2"), ("nan", "NaN"), ("3", "3\n4"), ("1", "1_0"), ("10", "1_0"), ("2", "two"),
    ("12", "\uff11\uff12"), ("1\n2", "1\n2\n3\n4"), ("", "1 2"), ("5", "5\0"),
]  # fmt: skip


@pytest.mark.parametrize(("expected", "printed"), SAME)
def test_white_space_and_the_writing_of_numbers_do_not_count(expected: str, printed: str) -> None:
    assert text_difference(expected, printed) is None


@pytest.mark.parametrize(("expected", "printed"), DIFFERENT)
def test_everything_else_does(expected: str, printed: str) -> None:
    assert text_difference(expected, printed)


def test_a_tolerance_is_for_numbers_that_are_not_whole() -> None:
    near = Tolerance(absolute=1e-6)
    assert text_difference("0.5", "0.5000001", near) is None
    assert text_difference("0.5", "0.51", near)
    assert text_difference("1000000007", "1000000008", Tolerance(relative=1e-5))
    assert text_difference("0.5", "inf", near)
    assert text_difference("0.5", "1e999999", near)
    assert text_difference("1e400", "5", Tolerance(relative=1e-5))
    assert same_value(0.5, 0.5000001, near)
    assert not same_value(5, 5.0000001, near)
    assert not same_value(0.5, True, Tolerance(absolute=9))


def test_a_difference_is_short_whatever_was_printed() -> None:
    start = time.process_time()
    for printed in ("x" * (16 << 20), "ab\n" * (5 << 20), "ab " * (5 << 20)):
        assert len(text_difference("1\n2 3\n4", printed) or "") < 150
    assert time.process_time() - start < 2
    assert text_difference("1\n2", "1\n2\n3\n4\n") == "expected 2 lines, found 4"


def returned(value: object) -> Any:
    return read_json(encode(value).encode("ascii"))


@pytest.mark.parametrize(
    ("expected", "value"),
    [
        (1, 1), (1, 1.0), (True, 1), ([1, 2], (1, 2)), ([[1]], [(1,)]), ({"a": [1]}, {"a": (1,)}), ({1: 2}, {1: 2}),
        (None, None), ("a", "a"), (10**30, 10**30), ([], ()), ({}, {}), (float("inf"), float("inf")),
    ],
)  # fmt: skip
def test_a_returned_value_is_right(expected: object, value: object) -> None:
    assert same_value(expected, returned(value))


@pytest.mark.parametrize(
    ("expected", "value"),
    [
        (1, "1"), ("1", 1), ([1], 1), (1, [1]), ([1, 2], [2, 1]), ([1], {1}), (None, 0), (None, False), ("", None),
        ({"a": 1}, {"a": 2}), ({"a": 1}, {"b": 1}), ({"a": 1}, {"a": 1, "b": 2}), ({}, []), ([], {}), ([1], [1, 2]),
        (0.5, 0.5000001), (float("nan"), float("nan")), ("ab", ["a", "b"]), (b"a", "a"), ([[1]], [1]),
    ],
)  # fmt: skip
def test_a_returned_value_is_wrong(expected: object, value: object) -> None:
    assert not same_value(expected, returned(value))


@pytest.mark.parametrize(
    "payload",
    [b'{"d": [["a", 1], ["a", 1]]}', b'{"d": [[["a"], 1], 2]}', b'{"d": 5}', b'{"i": []}', b'{"t": 7}', b"{}"],
)
def test_a_forged_value_is_wrong(payload: bytes) -> None:
    for expected in ({"a": 1, "b": 1}, {"a": 1}, [1], 7, None):
        assert not same_value(expected, read_json(payload))
