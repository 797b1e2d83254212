"""Rollout records on disk: strict JSON (no NaN, no infinity), one object a line.

Reading is forgiving about columns that are absent and strict about those that are there: a wrong type names the file,
the line and the field.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from scope_opd.errors import DataError
from scope_opd.types import Rollout, TopK

_FIELDS = {field.name for field in dataclasses.fields(Rollout)}
_REQUIRED = ("id", "group", "prompt_token_ids", "token_ids", "logprobs")
_SLACK = 1e-3  # engines round: a log-prob a hair above 0 stands for 0
# Field -> (what it must be, the test of it), for fields without a rule of their own.
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "correct": ("true or false", lambda value: isinstance(value, bool)),
    "masked": ("true or false", lambda value: isinstance(value, bool)),
    "reward": ("a finite number", lambda value: _is_number(value)),
    "reinforce": ("a finite number", lambda value: _is_number(value)),
    "distill": ("a finite number", lambda value: _is_number(value)),
    "finish_reason": ("'stop' or 'length'", lambda value: value in ("stop", "length")),
    "text": ("a string", lambda value: isinstance(value, str)),
    "extracted": ("a string", lambda value: isinstance(value, str)),
    "mask_reason": ("a string", lambda value: isinstance(value, str)),
    "policy_version": ("an integer >= 0", lambda value: type(value) is int and value >= 0),
    "sample": ("an integer >= 0", lambda value: type(value) is int and value >= 0),
    "step": ("an integer >= 0", lambda value: type(value) is int and value >= 0),
    "sampling": ("an object", lambda value: isinstance(value, dict)),
    "teacher_topk": ("lists of [id, log-prob] pairs", lambda value: _is_topk(value)),
    "policy_versions": ("a list of lists", lambda value: _is_list_of(value, list)),
    "loss_mask": ("a list of 0 and 1", lambda value: _is_mask(value)),
    "teacher_mask": ("a list of 0 and 1", lambda value: _is_mask(value)),
}


def dumps(value: Any) -> str:
    """Strict JSON on one line.

    Raises:
        ValueError: a NaN or an infinity is in it.
    """
    return json.dumps(value, allow_nan=False, ensure_ascii=False, separators=(",", ":"))


def rollout_to_dict(rollout: Rollout) -> dict[str, Any]:
    """All fields of the record; floats keep full precision. ``teacher_topk`` is [id, log-prob] pairs a token."""
    values = {name: getattr(rollout, name) for name in rollout.__slots__}
    if rollout.teacher_topk is not None:
        values["teacher_topk"] = [[list(pair) for pair in row] for row in rollout.teacher_topk]
    return values


def rollout_to_json(rollout: Rollout) -> str:
    """The record as one line of strict JSON."""
    return dumps(rollout_to_dict(rollout))


def rollout_from_dict(row: dict[str, Any], *, where: str, required: Iterable[str] = _REQUIRED) -> Rollout:
    """Check a row and make a record of it; unknown keys (``tokens``, ``advantages`` ...) are left aside.

    Args:
        row: one decoded JSON object.
        where: "FILE line N", for errors.
        required: fields that must be present and not null.

    Raises:
        DataError: a missing field, a wrong type, a log-prob that is positive or not finite, lengths that differ.
    """
    name = f"{where} (id {row['id']!r})" if "id" in row else where
    for key in required:
        if row.get(key) is None:
            raise DataError(f"{name}: no {key!r}", f"the fields {', '.join(required)}", "add it to the row")
    values: dict[str, Any] = {"prompt_token_ids": [], "token_ids": [], "logprobs": []}
    values.update({key: value for key, value in row.items() if key in _FIELDS and value is not None})
    for key in ("id", "group"):
        if isinstance(values.get(key), int) and not isinstance(values[key], bool):
            values[key] = str(values[key])
        if not isinstance(values.get(key), str):
            raise DataError(f"{name}: {key} = {values.get(key)!r}", "a string", "quote it")
    for key, (expected, holds) in _RULES.items():
        if key in values and not holds(values[key]):
            raise DataError(f"{name}: {key} = {_short(values[key])}", expected, "mend the row")
    for key in ("prompt_token_ids", "token_ids"):
        if not isinstance(values[key], list) or not all(type(item) is int and item >= 0 for item in values[key]):
            raise DataError(f"{name}: {key} is not a list of token ids", "a list of integers >= 0", "mend the row")
    _check_logprobs(values, "logprobs", name)
    _check_logprobs(values, "teacher_logprobs", name)
    length = len(values["logprobs"])
    for key in ("token_ids", "teacher_logprobs", "loss_mask", "teacher_mask", "teacher_topk"):
        if row.get(key) is not None and len(values[key]) != length:
            raise DataError(f"{name}: {len(values[key])} {key} and {length} logprobs", "one of each a response token",
                            "score the same tokens")  # fmt: skip
    if "teacher_topk" in values:
        values["teacher_topk"] = TopK.of([[(index, value) for index, value in row] for row in values["teacher_topk"]])
    return Rollout(**values)


def iter_jsonl(path: str | Path | IO[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (1-based line number, object) of every line that is not blank.

    Raises:
        DataError: missing or unreadable file, not UTF-8, bad JSON, NaN or infinity, a line that is no object.
    """
    if not isinstance(path, (str, Path)):
        yield from _lines(path, "standard input")
        return
    source = Path(path)
    try:
        with source.open("rb") as stream:
            yield from _lines(stream, str(source))
    except FileNotFoundError:
        raise DataError(f"{source}: no such file", "a JSONL file", "check the path") from None
    except IsADirectoryError:
        raise DataError(f"{source} is a folder", "a JSONL file", "name the file itself") from None
    except OSError as error:
        raise DataError(f"{source}: {error.strerror}", "a readable file", "check its permissions") from None


def write_jsonl(path: str | Path, objects: Iterable[Any], *, append: bool = False) -> None:
    """Write one strict JSON object a line."""
    with Path(path).open("a" if append else "w", encoding="utf-8") as stream:
        stream.writelines(dumps(item) + "\n" for item in objects)


def cut_torn_line(path: str | Path) -> int:
    """Cut a last line that lacks its end (its writer was killed); returns the bytes cut, 0 where all is well.

    Raises:
        OSError: the file is there and cannot be changed.
    """
    target = Path(path)
    if not target.exists():
        return 0
    with target.open("rb+") as stream:
        size = kept = stream.seek(0, 2)
        while kept:
            start = max(0, kept - (1 << 16))
            stream.seek(start)
            end = stream.read(kept - start).rfind(b"\n")
            if end >= 0:
                kept = start + end + 1
                break
            kept = start
        if kept < size:
            stream.truncate(kept)
    return size - kept


def _lines(stream: Iterable[str | bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(stream, start=1):
        if not line.strip():
            continue
        try:
            text = line.decode("utf-8") if isinstance(line, bytes) else line
            row = json.loads(text, parse_constant=_refuse)
        except _NotStrict as error:
            raise DataError(f"{name} line {number}: {error}", "finite numbers or null", "mend the line") from None
        except UnicodeDecodeError as error:
            raise DataError(
                f"{name} line {number}: {error.reason} at its byte {error.start} (not UTF-8)",
                "UTF-8 text",
                "re-save it",
            ) from None
        except (ValueError, RecursionError) as error:  # ValueError: bad JSON, or an integer of thousands of digits
            raise DataError(
                f"{name} line {number}: not JSON ({error})", "one JSON object a line", "mend the line"
            ) from None
        if not isinstance(row, dict):
            raise DataError(f"{name} line {number}: {type(row).__name__}", "a JSON object", "one object a line")
        yield number, row


class _NotStrict(ValueError):
    pass


def _refuse(constant: str) -> None:
    raise _NotStrict(constant)


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the floats
        return False


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _is_mask(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is int and item in (0, 1) for item in value)


def _is_topk(value: Any) -> bool:
    def holds(pair: Any) -> bool:
        if not isinstance(pair, list) or len(pair) != 2 or type(pair[0]) is not int or not _is_number(pair[1]):
            return False
        return 0 <= pair[0] < 2**31 and -1e38 < pair[1] <= _SLACK  # they are kept in 32 bits

    return _is_list_of(value, list) and all(holds(pair) for row in value for pair in row)


def _short(value: Any) -> str:
    shown = repr(value)
    return shown if len(shown) <= 60 else f"{shown[:57]}..."


def _check_logprobs(values: dict[str, Any], key: str, name: str) -> None:
    if key not in values:
        return
    numbers = values[key]
    if not isinstance(numbers, list) or not numbers:
        raise DataError(f"{name}: {key} is {'empty' if numbers == [] else type(numbers).__name__}",
                        "a list with one log-prob a response token", "mend the row")  # fmt: skip
    for position, number in enumerate(numbers):
        if not _is_number(number) or number > _SLACK:
            raise DataError(f"{name}: {key}[{position}] = {_short(number)}", "a finite log-prob <= 0", "mend the row")
