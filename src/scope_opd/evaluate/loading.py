"""Reading a benchmark whole: rows from the zoo, a local file or the hub, adapted, checked, counted and hashed.

A benchmark with a row missing is another benchmark: where the table knows how many rows there are, any other number is
an error, unless the first N are asked for, and then the results say so.

Not covered: rendering prompts, and judging.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scope_opd.data.dataset import double_braces, file_sha256
from scope_opd.data.files import file_records
from scope_opd.data.hub import is_hub, load_hub
from scope_opd.data.rows import NAME_COLUMNS, Columns, Row, check_rows
from scope_opd.errors import DataError
from scope_opd.evaluate.benchmarks import TABLE, Benchmark, custom, is_own
from scope_opd.words import counted


@dataclass(frozen=True, slots=True)
class Loaded:
    """A benchmark's rows, and what is recorded of where they came from.

    Attributes:
        rows: those to evaluate.
        data: source, sha256 (of a file), revision (of a hub data set), content_sha256 (of ids, problems and gold
            answers, however they are stored), rows, expected_rows, left_out (rows that cannot be judged), partial,
            checked_copy (whether a file is the very copy that the table was checked with; None: not known).
        notes: what is worth knowing, a line each.
    """

    benchmark: Benchmark
    rows: list[Row]
    data: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def parse_benchmark(text: str) -> tuple[Benchmark, str | None]:
    """``NAME`` or ``NAME=PATH``; a path may also be a hub data set (``hf:OWNER/NAME?split=test``).

    Raises:
        DataError: a name that the table does not know, without a path.
    """
    name, separator, place = text.partition("=")
    name, place = name.strip(), place.strip()
    if not name or (separator and not place):
        raise DataError(f"--benchmark {text!r}", "NAME or NAME=PATH", "give both, or a name of the table alone")
    if name in TABLE:
        return TABLE[name], place or None
    if place:
        return custom(name), place
    known = [entry.name for entry in TABLE.values() if entry.role == "benchmark"]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    raise DataError(
        f"--benchmark {name!r}",
        f"one of {', '.join(known)}" + (f"; did you mean {close[0]}?" if close else ""),
        "or NAME=PATH for a file of your own",
    )


def parse_benchmarks(texts: Iterable[str]) -> list[tuple[Benchmark, str | None]]:
    """Several, as ``parse_benchmark`` reads them.

    Raises:
        DataError: also for a name that comes twice.
    """
    parsed = [parse_benchmark(text) for text in texts]
    seen: set[str] = set()
    for benchmark, _ in parsed:
        if benchmark.name in seen:
            raise DataError(f"--benchmark names {benchmark.name} twice", "each once", "drop one, or rename it")
        seen.add(benchmark.name)
    return parsed


def load_benchmark(
    benchmark: Benchmark,
    place: str | None,
    *,
    problems: int | None = None,
    fix_double_braces: bool = False,
    columns: Columns | None = None,
) -> Loaded:
    """Read a benchmark.

    Args:
        benchmark: what it is.
        place: a local file or a hub data set in place of the table's; None: the zoo's or the hub's.
        problems: take the first N rows only.
        fix_double_braces: mend ``\\boxed{{}}`` in prompts; without it their number is noted.
        columns: what a set of the user's own calls problem, answer and id; the table's layouts are known.

    Raises:
        DataError: it cannot be read, a row cannot be used, or there are more or fewer rows than it has.
    """
    expected = [] if benchmark.rows is None else [benchmark.rows]
    if benchmark.verifier == "zoo" and place is None:
        from scope_opd.zoo import data_path

        path = data_path("heldout")
        records: Iterator[tuple[str, Any]] = file_records(path)
        data: dict[str, Any] = {"source": "zoo (heldout)", "sha256": file_sha256(path), "revision": None}
        source = "zoo (heldout)"
    elif place is not None and not is_hub(place):
        path = Path(place).expanduser()
        records = file_records(path)
        data = {"source": place, "sha256": file_sha256(path) if path.is_file() else None, "revision": None}
        source = str(path)
        expected += [] if benchmark.copy_rows is None else [benchmark.copy_rows]
    else:
        source = place or benchmark.source
        table = load_hub(source)
        records = table.rows()
        data = {"source": source, "sha256": None, "revision": table.revision}
    left_out: list[str] = []
    try:
        rows = check_rows(_adapted(records, benchmark, left_out), columns if is_own(benchmark) else None, source=source)
    except DataError as error:
        if error.remedy != NAME_COLUMNS:
            raise
        remedy = "name yours with --map" if is_own(benchmark) else "rename yours: problem, answer and perhaps id"
        raise DataError(error.found, error.expected, remedy) from None
    found = len(rows) + len(left_out)
    if expected and found not in expected:
        raise DataError(
            f"{benchmark.name} from {source} has {counted(found, 'row')}",
            f"the {' or '.join(map(str, expected))} of the whole benchmark",
            "get the whole file; for a set of your own, give it another name (--benchmark MINE=PATH)",
        )
    taken, notes = double_braces(rows[:problems], source, fix=fix_double_braces, option="--fix-double-braces")
    data["checked_copy"] = _is_checked_copy(benchmark, place, data["sha256"])
    if data["checked_copy"] is False:
        notes.append(
            f"{benchmark.name}: {source} is not the copy that was checked (sha256 {str(data['sha256'])[:10]}, not "
            f"{str(benchmark.sha256)[:10]}); its figures count as {benchmark.name} only if its problems are the same"
        )
    partial = len(taken) < len(rows)
    data["content_sha256"] = content_sha256((row.id, row.problem, row.answer) for row in taken)
    data |= {"rows": found, "expected_rows": found if expected else None, "left_out": len(left_out), "partial": partial}
    return Loaded(benchmark, taken, data, notes)


def _is_checked_copy(benchmark: Benchmark, place: str | None, sha256: str | None) -> bool | None:
    """Whether a file's bytes are those that the table names; None where there is no file or the table names none."""
    return None if place is None or sha256 is None or benchmark.sha256 is None else sha256 == benchmark.sha256


def _adapted(
    records: Iterator[tuple[str, Any]], benchmark: Benchmark, left_out: list[str]
) -> Iterator[tuple[str, Mapping[str, Any] | DataError]]:
    for number, (place, row) in enumerate(records, start=1):
        if isinstance(row, DataError):
            yield place, row
            continue
        try:
            adapted = benchmark.adapt(row, number)
        except (KeyError, TypeError, ValueError) as error:
            yield (
                place,
                DataError(f"{benchmark.name}, {place}: {error}", "a row of that benchmark's layout", "check the file"),
            )
            continue
        if adapted is None:
            left_out.append(place)
        else:
            yield place, adapted


def content_sha256(problems: Iterable[tuple[str, str, Any]]) -> str:
    """Of (id, problem, gold answer) triples in order, in hexadecimal."""
    digest = hashlib.sha256()
    for problem in problems:
        digest.update(json.dumps(problem, sort_keys=True, ensure_ascii=True).encode() + b"\n")
    return digest.hexdigest()
