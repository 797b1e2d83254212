"""Rows of a data set: read from JSON lines, JSON or parquet, checked, and named so that every complaint has a place.

A row is a problem, its gold answer and an id; short scalar columns beside them are kept as ``fields``. What is wrong
with a file or a row is one ``DataError`` line with the file, the row, what was found and what to do. Reading is
streamed, so that a parquet file with long solution columns costs no more memory than its problems.

Not covered: hub data sets, csv, chat-message columns and nested layouts such as verl's, skipping of bad rows,
duplicate problems. Rows that are wrong are errors, never dropped.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from scope_opd.errors import DataError
from scope_opd.records import iter_jsonl

SUFFIXES = (".jsonl", ".json", ".parquet")
MAX_FIELD_CHARACTERS = 200
"""Text columns beyond this are not carried along with a prompt: they are solutions and traces, not labels."""


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column holds what. A file without the column ``id`` is numbered: ``row-000001``, ``row-000002`` ..."""

    problem: str = "problem"
    answer: str = "answer"
    id: str = "id"


@dataclass(frozen=True, slots=True)
class Row:
    """One problem.

    Attributes:
        id: unique in its data set.
        problem: the problem's text, never empty.
        answer: the gold answer: a text that is not empty, an integer or a finite float.
        where: file and row, for complaints ("train.jsonl, line 12").
        fields: the other columns that are numbers, booleans or texts of at most ``MAX_FIELD_CHARACTERS``.
    """

    id: str
    problem: str
    answer: str | int | float
    where: str
    fields: Mapping[str, Any] = field(default_factory=dict)


def read_rows(path: str | Path, columns: Columns | None = None, *, max_rows: int | None = None) -> list[Row]:
    """Read and check the rows of a ``.jsonl``, ``.json`` (a list of objects) or ``.parquet`` file.

    Args:
        path: the file.
        columns: names of the columns.
        max_rows: take the first rows only; what follows is not looked at.

    Raises:
        DataError: missing, empty, unreadable, corrupt or unknown kind of file; a row that fails a check.
    """
    source = Path(path)
    if source.suffix not in SUFFIXES:
        raise DataError(f"data file {source}", f"a name ending in {', '.join(SUFFIXES)}", "convert or rename the file")
    if source.is_dir():
        raise DataError(f"data file {source} is a folder", "a file", "name the file inside it")
    if not source.exists():
        raise DataError(f"data file {source} does not exist", "a data file", "check the path")
    if source.stat().st_size == 0:
        raise DataError(f"data file {source} is empty", "at least one row", "check how it was written")
    names = columns or Columns()
    numbered: Iterator[tuple[str, Mapping[str, Any]]]
    if source.suffix == ".parquet":
        numbered = _parquet_rows(source, names)
    else:
        numbered = _json_rows(source) if source.suffix == ".json" else _jsonl_rows(source)
    return check_rows(numbered, names, source=str(source), max_rows=max_rows)


def check_rows(
    numbered: Iterable[tuple[str, Mapping[str, Any]]],
    columns: Columns | None = None,
    *,
    source: str,
    max_rows: int | None = None,
) -> list[Row]:
    """Turn mappings into rows, checking columns, types, emptiness and that no id comes twice.

    Args:
        numbered: (place, mapping) pairs; the place is what a complaint names after the source ("line 12").
        columns: names of the columns.
        source: what a complaint names first: the file.
        max_rows: take the first rows only.

    Raises:
        DataError: naming source and row.
    """
    names = columns or Columns()
    rows: list[Row] = []
    seen: dict[str, str] = {}
    has_ids: bool | None = None
    for number, (place, values) in enumerate(islice(numbered, max_rows), start=1):
        where = f"{source}, {place}"
        for name in (names.problem, names.answer):
            _require_column(values, name, where)
        if has_ids is None:
            has_ids = names.id in values or names.id != Columns().id
        if has_ids:
            _require_column(values, names.id, where)
        row_id = _checked_id(values[names.id], names.id, where) if has_ids else f"row-{number:06d}"
        if row_id in seen:
            raise DataError(
                f"{where}: the id {row_id!r} was used before, at {seen[row_id]}", "ids that are unique", "rename one"
            )
        seen[row_id] = place
        taken = (names.problem, names.answer, names.id)
        rows.append(
            Row(
                id=row_id,
                problem=_checked_problem(values[names.problem], names.problem, where),
                answer=_checked_answer(values[names.answer], names.answer, where),
                where=where,
                fields={name: value for name, value in values.items() if name not in taken and _is_label(value)},
            )
        )
    if not rows:
        raise DataError(f"data file {source} has no rows", "at least one row", "check how it was written")
    return rows


def _require_column(values: Iterable[Any], name: str, where: str) -> None:
    if name not in values:
        found = ", ".join(map(str, values)) or "none"
        raise DataError(
            f"{where}: no column {name!r} among {found}",
            f"a column {name!r}",
            "name yours with data.problem_column, data.answer_column or data.id_column",
        )


def _checked_id(value: Any, name: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{where}: {name} is {_shown(value)}", "a text or an integer", "give every row an id, or none")
    return str(value)


def _checked_problem(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {_shown(value)}", "a text", "convert the column to text")
    if not value.strip():
        raise DataError(f"{where}: {name} is empty", "a problem", "drop the row or fill it in")
    return value


def _checked_answer(value: Any, name: str, where: str) -> str | int | float:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{where}: {name} is empty", "the gold answer", "drop the row or fill it in")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{where}: {name} is {_shown(value)}", "a text or a number", "convert the column")
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{where}: {name} is {value}", "a finite number or a text", "drop the row or fill it in")
    return value


def _is_label(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= MAX_FIELD_CHARACTERS)


def _shown(value: Any) -> str:
    """A value as a complaint shows it: its type, and the start of it."""
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, row in iter_jsonl(path):
        yield f"line {number}", row


def _json_rows(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"data file {path}: {error.strerror}", "a readable file", "check its permissions") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8", "UTF-8 text", "re-save the file") from None
    except json.JSONDecodeError as error:
        raise DataError(f"{path}, line {error.lineno}: {error.msg}", "valid JSON", "mend that line") from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, thousands of brackets
        raise DataError(f"{path}: {error}", "a list of objects with plain values", "mend the file") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: one {type(rows).__name__}", "a list of objects", "wrap the rows in [ ]")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f"{path}, row {number}: {_shown(row)}", "an object with named columns", "mend that row")
        yield f"row {number}", row


def _parquet_rows(path: Path, names: Columns) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import pyarrow
    import pyarrow.parquet
    import pyarrow.types

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            for name in (names.problem, names.answer):
                _require_column(schema.names, name, str(path))
            # Lists and structs (chats, traces) are not read, unless a name given is one of them and must be refused.
            taken = (names.problem, names.answer, names.id)
            wanted = [each.name for each in schema if each.name in taken or not pyarrow.types.is_nested(each.type)]
            number = 0
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            f"{path}: {reason}", "a complete parquet file", "copy or write the file again; it may be cut off"
        ) from None
