"""Rows of the public data sets' layouts, turned into the answers of ``formats``. Pure functions of the row.

    from_humaneval(row)       task_id, prompt (or problem), test, entry_point
    from_livecodebench(row)   public_test_cases, private_test_cases, metadata, starter_code
    from_taco(row)            input_output (JSON text), starter_code; APPS has the same layout
    from_tests(tests)         what graders are given: a list of {input, output}, {inputs, outputs, fn_name}, or
                              {"functional": "def check(candidate): ..."}

LiveCodeBench's private tests are base64 of zlib of a pickle of JSON text. The pickle is read by an unpickler that knows
no globals, after a look at its opcodes: text and nothing else. Decompression stops at ``MAX_TESTS_BYTES``.

Not covered: TACO's rows from GeeksforGeeks whose inputs are not written as ``name = value`` for every parameter of the
starter code; they are refused. Time and memory limits of a row are not read.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import pickle
import pickletools
import re
import zlib
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

MAX_TESTS_BYTES = 512 << 20
"""Tests of one problem, decompressed, at most (LiveCodeBench's largest have some hundred megabytes)."""
TACO_TOLERANCE = "0.001%"
"""The relative tolerance of TACO's grader (numpy's allclose)."""
_TEXT_PICKLE = frozenset({"PROTO", "FRAME", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "MEMOIZE"})
_PUTS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_METHOD = re.compile(r"def\s+([A-Za-z_]\w*)\s*\(\s*self\s*,?([^)]*)\)")
_ASSIGNMENT = re.compile(r"\s*([A-Za-z_]\w*)\s*(?:\[\s*\])*\s*=\s*(.+?)\s*,?\s*")


def from_humaneval(row: Mapping[str, Any]) -> dict[str, Any]:
    """``{"format": "humaneval", ...}`` of a row; ``problem`` stands for ``prompt`` where there is no ``prompt``.

    Raises:
        ValueError: a column is missing.
    """
    prompt = row.get("prompt") or row.get("problem")
    found = {"prompt": prompt, "test": row.get("test"), "entry_point": row.get("entry_point")}
    for key, value in found.items():
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f"{key} is {_shown(value)}; expected a text (HumanEval's layout)")
    return {"format": "humaneval", **found}


def from_livecodebench(row: Mapping[str, Any]) -> dict[str, Any]:
    """The public and the private tests of a row, in this order.

    Raises:
        ValueError: tests that cannot be read, or none.
    """
    public = _json_list(row.get("public_test_cases"), "public_test_cases")
    tests = public + private_tests(row.get("private_test_cases"))
    metadata = row.get("metadata") or "{}"
    metadata = _json(metadata, "metadata") if isinstance(metadata, str) else metadata
    name = metadata.get("func_name") if isinstance(metadata, Mapping) else None
    return from_tests(tests, fn_name=name)


def from_taco(row: Mapping[str, Any]) -> dict[str, Any]:
    """The tests of a row of TACO or APPS. Called functions are compared exactly, printed numbers as TACO's grader does.

    Raises:
        ValueError: tests that cannot be read, or none, or no way to call the solution.
    """
    tests = row.get("input_output")
    if isinstance(tests, str | bytes | bytearray):
        tests = _json(tests, "input_output")
    if not isinstance(tests, Mapping):
        raise ValueError(f"input_output is {_shown(tests)}; expected JSON with inputs and outputs (TACO's layout)")
    starter = row.get("starter_code") or ""
    if not isinstance(starter, str):
        raise ValueError(f"starter_code is {_shown(starter)}; expected a text (TACO's layout)")
    if not tests.get("fn_name") and "class Solution" in starter:
        return _from_starter(tests, starter)
    answer = from_tests(tests)
    return answer if answer["format"] == "functional" else {**answer, "tolerance": TACO_TOLERANCE}


def from_tests(tests: Any, *, fn_name: str | None = None) -> dict[str, Any]:
    """Tests in any of the layouts that graders are given.

    Args:
        tests: a list of objects with ``input`` and ``output`` (and ``testtype``, ``metadata``), an object with
            ``inputs`` and ``outputs`` (and ``fn_name``), one with ``functional`` (check code), or JSON text of these.
        fn_name: the function's name where the tests do not say it.

    Raises:
        ValueError: another layout, or no tests.
    """
    if isinstance(tests, str):
        tests = _json(tests, "tests")
    if isinstance(tests, Mapping):
        if isinstance(tests.get("functional"), str):
            return {"format": "functional", "tests": [{"check": tests["functional"]}]}
        return _from_columns(tests, fn_name)
    if not isinstance(tests, Sequence) or not tests or not all(isinstance(test, Mapping) for test in tests):
        raise ValueError(f"tests is {_shown(tests)}; expected a list of objects with input and output, not empty")
    given = [test.get("testtype", "functional" if fn_name else "stdin") for test in tests]
    kinds = {kind if kind is None or isinstance(kind, str) else _shown(kind) for kind in given}
    if kinds == {"functional"}:
        return {"format": "functional", "tests": [_functional(test, fn_name) for test in tests]}
    if not kinds <= {"stdin", "stdin_stdout", "stdio", None}:
        raise ValueError(f"testtype is {' and '.join(sorted(map(str, kinds)))}; expected stdin or functional, one kind")
    return {
        "format": "stdio",
        "tests": [{"input": _text(test.get("input")), "output": _text(test.get("output"))} for test in tests],
    }


def private_tests(value: Any) -> list[Any]:
    """LiveCodeBench's private tests: JSON text, or base64 of zlib of a pickle of JSON text.

    Raises:
        ValueError: neither, too large, or a pickle that holds anything but a text.
    """
    if value is None or value == "":
        return []
    if not isinstance(value, str):
        return _json_list(value, "private_test_cases")
    if value.lstrip()[:1] in ("[", "{"):
        return _json_list(value, "private_test_cases")
    try:
        packed = base64.b64decode(value, validate=True)
        decompressor = zlib.decompressobj()
        raw = decompressor.decompress(packed, MAX_TESTS_BYTES)
    except (binascii.Error, ValueError, zlib.error) as error:
        raise ValueError(f"private_test_cases: {error}; expected JSON, or base64 of zlib of a pickle") from None
    if decompressor.unconsumed_tail:
        raise ValueError(f"private_test_cases: more than {MAX_TESTS_BYTES >> 20} MB when decompressed; expected less")
    return _json_list(_pickled_text(raw), "private_test_cases")


class _NoGlobals(pickle.Unpickler):
    """Knows no class and no function: a pickle can then build plain data alone."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _pickled_text(raw: bytes) -> str:
    try:
        for opcode, argument, _ in pickletools.genops(raw):  # a huge memo index alone would take gigabytes
            if opcode.name in _PUTS and argument is not None and int(argument) < 256:
                continue
            if opcode.name not in _TEXT_PICKLE and opcode.name != "STOP":
                raise pickle.UnpicklingError(f"it holds {opcode.name}, not a text alone")
        value = _NoGlobals(io.BytesIO(raw)).load()
    except (pickle.UnpicklingError, ValueError, EOFError, IndexError, KeyError, AttributeError, MemoryError) as error:
        raise ValueError(f"private_test_cases: a pickle that is refused ({error}); expected a pickled text") from None
    if not isinstance(value, str):
        raise ValueError(f"private_test_cases: a pickle of {_shown(value)}; expected a pickled text")
    return value


def _functional(test: Mapping[str, Any], fn_name: str | None) -> dict[str, Any]:
    metadata = test.get("metadata")
    name = (metadata.get("func_name") if isinstance(metadata, Mapping) else None) or test.get("fn_name") or fn_name
    return {"input": test.get("input"), "output": test.get("output"), "fn_name": name}


def _from_columns(tests: Mapping[str, Any], fn_name: str | None) -> dict[str, Any]:
    pairs = _columns(tests)
    name = tests.get("fn_name") or fn_name
    if not name:
        return {"format": "stdio", "tests": [{"input": _text(left), "output": _text(right)} for left, right in pairs]}
    calls = []
    for place, (args, output) in enumerate(pairs, 1):
        if isinstance(args, str):
            args = [_json(line, f"input {place}") for line in args.split("\n") if line.strip()]
        if not isinstance(args, list):
            raise ValueError(f"input {place} is {_shown(args)}; expected a list of arguments")
        # APPS wraps most outputs into a list of one, and its grader accepts either reading.
        readings = [output, *(output if isinstance(output, list) and len(output) == 1 else [])]
        calls.append(
            {"args": [_int_keys(arg) for arg in args], "output_any_of": [_int_keys(each) for each in readings]}
        )
    return {"format": "functional", "fn_name": name, "tests": calls}


def _columns(tests: Mapping[str, Any]) -> list[tuple[Any, Any]]:
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not isinstance(inputs, list) or not isinstance(outputs, list) or not inputs or len(inputs) != len(outputs):
        raise ValueError(
            f"inputs is {_shown(inputs)}, outputs is {_shown(outputs)}; expected lists of equal length, not empty"
        )
    return list(zip(inputs, outputs, strict=True))


def _int_keys(value: Any) -> Any:
    """JSON has only texts as keys; APPS reads a dictionary whose keys are all numbers as one with whole numbers."""
    if isinstance(value, dict) and value and all(re.fullmatch(r"-?\d{1,18}", key) for key in value):
        return {int(key): item for key, item in value.items()}
    return value


def _from_starter(tests: Mapping[str, Any], starter: str) -> dict[str, Any]:
    """GeeksforGeeks: ``class Solution`` with one method, inputs as lines ``name = value``, arrays in braces."""
    method = _METHOD.search(starter)
    if method is None:
        raise ValueError("starter_code has a class Solution but no method; expected one to call (TACO's layout)")
    names = [part.partition(":")[0].partition("=")[0].strip() for part in method[2].split(",") if part.strip()]
    calls = []
    for place, (text, output) in enumerate(_columns(tests), 1):
        values = {}
        for line in text.splitlines() if isinstance(text, str) else ():
            if assigned := _ASSIGNMENT.fullmatch(line):
                values[assigned[1].lower()] = assigned[2]
        if set(values) != {name.lower() for name in names}:
            raise ValueError(
                f"input {place} is {_shown(text)}; expected a value for each of {', '.join(names)} (starter_code)"
            )
        args = [_braced(values[name.lower()], place) for name in names]
        calls.append({"args": args, "output": _braced(output, place) if isinstance(output, str) else output})
    return {"format": "functional", "fn_name": method[1], "tests": calls}


def _braced(text: str, place: int) -> Any:
    return _json(text.strip().replace("{", "[").replace("}", "]"), f"test {place}")


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    raise ValueError(f"a test holds {_shown(value)}; expected a text or a list of lines")


def _json(text: str | bytes | bytearray, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{what} is {_shown(text)}; expected JSON") from None


def _json_list(value: Any, what: str) -> list[Any]:
    value = _json(value, what) if isinstance(value, str) else value
    if value is None:
        return []
    if not isinstance(value, list):
        raise ValueError(f"{what} is {_shown(value)}; expected a list of tests")
    return value


def _shown(value: Any) -> str:
    text = repr(value) if not isinstance(value, str) else repr(value[:41])
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"
