"""Files of rows as streams of (place, row): JSON lines (also gzipped), JSON, csv and parquet.

Two kinds of fault. What is wrong with one row (a line that is not JSON, a csv line with too few fields) is yielded in
the row's place as a ``DataError``, and the reader goes on: whoever reads may skip it. What is wrong with the file (cut
off, not UTF-8, no header, an unknown kind) is raised, and never skipped: rows of a damaged file prove nothing about
those that are missing. A last line that is not JSON and has no line end is a file that was cut off.

Not covered: compressed files other than ``.jsonl.gz``, files without names of columns, csv dialects (the separator is a
comma, the quote ``"``).
"""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from scope_opd.errors import DataError

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".csv", ".parquet")
Record = tuple[str, Mapping[str, Any] | DataError]
"""Where ("line 12") and what: the row, or what is wrong with it."""
Select = Callable[[Collection[str]], Sequence[str]]
"""From the names of a file (dotted ones for members of objects) to those that are wanted, besides plain columns."""


def suffix_of(path: Path) -> str:
    """The ending that tells the kind of a file; empty if none of ``SUFFIXES``."""
    return next((suffix for suffix in SUFFIXES if path.name.endswith(suffix)), "")


def file_records(path: Path, select: Select | None = None) -> Iterator[Record]:
    """The rows of a file, one after the other.

    Args:
        path: a file with one of ``SUFFIXES``.
        select: parquet alone: which members of nested columns to read; None reads every column whole.

    Raises:
        DataError: a file that is missing, empty, unreadable, damaged or of another kind.
    """
    suffix = check_file(path)
    try:
        if suffix == ".parquet":
            yield from _parquet(path, select)
        elif suffix == ".csv":
            yield from _csv(path)
        elif suffix == ".json":
            yield from _json(path)
        else:
            yield from _jsonl(path, gzip.open if suffix.endswith(".gz") else Path.open)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}: {error}", "a complete gzip file", "copy or write the file again") from None
    except OSError as error:
        reason = error.strerror or str(error).strip().splitlines()[0]
        raise DataError(f"data file {path}: {reason}", "a readable file", "check it and its permissions") from None


def check_file(path: Path) -> str:
    """Which of ``SUFFIXES`` a data file has.

    Raises:
        DataError: none of them, or a file that is missing, empty or a folder.
    """
    if path.is_dir():
        raise DataError(f"data file {path} is a folder", "a file", "name the file inside it")
    suffix = suffix_of(path)
    if not path.exists():
        raise DataError(f"data file {path} does not exist", "a data file", "check the path")
    if not suffix:
        raise DataError(f"data file {path}", f"a name ending in {', '.join(SUFFIXES)}", "convert or rename the file")
    if path.stat().st_size == 0:
        raise DataError(f"data file {path} is empty", "at least one row", "check how it was written")
    return suffix


def names_of(row: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Names of a row's columns, with dotted names for the members of objects."""
    names = []
    for key, value in row.items():
        names.append(f"{prefix}{key}")
        if isinstance(value, Mapping):
            names += names_of(value, f"{prefix}{key}.")
    return names


def _jsonl(path: Path, opened: Callable[..., Any]) -> Iterator[Record]:
    with opened(path, "rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"line {number}"
            try:
                row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"), parse_constant=_refuse)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path}, {place}: byte {error.start} is not UTF-8", "UTF-8 text", "re-save the file as UTF-8"
                ) from None
            except (ValueError, RecursionError) as error:
                if not line.endswith(b"\n"):
                    raise DataError(
                        f"{path}, {place}: not JSON ({error}), and the file ends in the middle of a line",
                        "one JSON object a line", "the file may be cut off: copy or write it again",
                    ) from None  # fmt: skip
                yield (
                    place,
                    DataError(
                        f"{path}, {place}: not JSON ({error})", "one JSON object a line", "mend or remove the line"
                    ),
                )
                continue
            yield place, _object(row, path, place)


def _refuse(constant: str) -> NoReturn:
    raise ValueError(f"{constant} where a finite number or null should be")


def _object(row: Any, path: Path, place: str) -> Mapping[str, Any] | DataError:
    if isinstance(row, dict):
        return row
    shown = repr(row)
    return DataError(
        f"{path}, {place}: {shown if len(shown) <= 40 else shown[:37] + '...'} ({type(row).__name__})",
        "an object with named columns", "mend or remove it",
    )  # fmt: skip


def _json(path: Path) -> Iterator[Record]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8", "UTF-8 text", "re-save the file") from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}: {error.msg}", "valid JSON", "mend that line; the file may be cut off"
        ) from None
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits, thousands of brackets
        raise DataError(f"{path}: {error}", "a list of objects with plain values", "mend the file") from None
    if not isinstance(rows, list):
        raise DataError(f"{path}: one {type(rows).__name__}", "a list of objects", "wrap the rows in [ ]")
    for number, row in enumerate(rows, start=1):
        yield f"row {number}", _object(row, path, f"row {number}")


def _csv(path: Path) -> Iterator[Record]:
    with path.open(encoding="utf-8-sig", newline="") as stream:
        reader = csv.reader(stream, strict=True)
        line = 1
        try:
            header = [name.strip() for name in next(reader, [])]
            _check_header(header, path)
            line = reader.line_num + 1
            for fields in reader:
                if fields:
                    yield f"line {line}", _csv_row(fields, header, path, line)
                line = reader.line_num + 1
        except csv.Error as error:
            raise DataError(
                f"{path}, line {line}: {error}", "comma-separated text with balanced quotes",
                "mend the quotes there; the file may be cut off",
            ) from None  # fmt: skip
        except UnicodeDecodeError as error:
            raise DataError(
                f"{path}, after line {line - 1}: {error.reason} (not UTF-8)", "UTF-8 text", "re-save the file as UTF-8"
            ) from None


def _check_header(header: Sequence[str], path: Path) -> None:
    if not all(header) or not header:
        raise DataError(f"{path}, line 1: a column without a name", "names of all columns", "mend the first line")
    twice = next((name for name in header if header.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"{path}, line 1: two columns {twice!r}", "names that differ", "rename one of them")


def _csv_row(fields: Sequence[str], header: Sequence[str], path: Path, line: int) -> Mapping[str, Any] | DataError:
    if len(fields) == len(header):
        return dict(zip(header, fields, strict=True))
    return DataError(
        f"{path}, line {line}: {len(fields)} fields", f"{len(header)}, as in the first line",
        "quote text that holds commas or line ends",
    )  # fmt: skip


def _parquet(path: Path, select: Select | None) -> Iterator[Record]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            schema = file.schema_arrow
            wanted = None if select is None else _wanted(schema, select(_schema_names(schema)))
            for batch in file.iter_batches(batch_size=1024, columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield f"row {number}", row
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}, after row {number}: {error.reason} (not UTF-8)", "text columns in UTF-8", "write the file again"
        ) from None
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError) as error:  # dates beyond Python's, for example
        reason = " ".join(str(error).split())[:200]
        raise DataError(
            f"{path}: {reason}", "a complete parquet file", "copy or write the file again; it may be cut off"
        ) from None


def _schema_names(fields: Iterable[Any], prefix: str = "") -> list[str]:
    """Names as ``names_of`` gives them, from a schema."""
    import pyarrow.types

    names = []
    for field in fields:
        names.append(f"{prefix}{field.name}")
        if pyarrow.types.is_struct(field.type):
            names += _schema_names((field.type.field(i) for i in range(field.type.num_fields)), f"{names[-1]}.")
    return names


def _wanted(schema: Any, named: Sequence[str]) -> list[str]:
    """Plain columns, which are cheap, and what was named; other nested ones (chats, traces) are not read."""
    import pyarrow.types

    plain = [field.name for field in schema if not pyarrow.types.is_nested(field.type)]
    return list(dict.fromkeys([*plain, *named]))
