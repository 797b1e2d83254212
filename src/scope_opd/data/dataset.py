"""A data set as a run uses it: its rows, the rows that were skipped and why, what is odd about it, and which it was.

Layouts. Columns are named by the user; where they are left at their defaults and the file has verl's columns instead,
those are read (``rows.VERL``). A literal ``\\boxed{{}}`` in a prompt, which a Python format string leaves when nobody
formats it, is counted and reported, and mended only on request: a model trained with it should meet it again.

Not covered: the embedded task (its rows are in ``zoo``), several files as one data set.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from scope_opd.data.files import Record, file_records
from scope_opd.data.hub import HubTable, is_hub, load_hub, parse_hub
from scope_opd.data.rows import Columns, Row, Skipped, check_rows, present, resolve_columns
from scope_opd.words import counted

OnBadRow = Literal["error", "skip"]
DOUBLE_BRACES, SINGLE_BRACES = r"\boxed{{}}", r"\boxed{}"
SHOWN_SKIPS = 3
"""Skipped rows that a warning names; all are in ``DataSet.skipped``."""


@dataclass(frozen=True, slots=True)
class DataSet:
    """What was read.

    Attributes:
        source: the file or the hub data set, as it was named.
        rows: the sound rows, in order.
        skipped: the others, where they are to be skipped.
        notes: what is worth knowing, a line each.
        layout: "plain" or "verl".
        revision: the commit of a hub data set, where it is known.
        sha256: of a file's bytes, in hexadecimal; None for a hub data set.
    """

    source: str
    rows: list[Row]
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    layout: str = "plain"
    revision: str | None = None
    sha256: str | None = None

    @property
    def pinned(self) -> str:
        """The source, of a hub data set at the commit that was read."""
        if self.revision is None:
            return self.source
        return str(replace(parse_hub(self.source), revision=self.revision))

    def about(self) -> dict[str, Any]:
        """Which data set it was, as plain values, for the records of a run."""
        return {
            "source": self.source,
            "layout": self.layout,
            "rows": len(self.rows),
            "skipped": len(self.skipped),
            "revision": self.revision,
            "sha256": self.sha256,
        }

    @property
    def warnings(self) -> list[str]:
        """The notes, and one line about the rows that were skipped."""
        return [*self.notes, *skip_lines(self.source, self.skipped, len(self.rows) + len(self.skipped))]


def read_dataset(
    source: str | Path,
    columns: Columns | None = None,
    *,
    revision: str | None = None,
    max_rows: int | None = None,
    on_bad_row: OnBadRow = "error",
    fix_double_braces: bool = False,
) -> DataSet:
    """Read and check a file or a hub data set.

    Args:
        source: a ``.jsonl`` (``.jsonl.gz``), ``.json``, ``.csv`` or ``.parquet`` file, or ``hf:OWNER/NAME?..``.
        columns: names of the columns; the defaults let verl's layout be recognised.
        revision: the commit of a hub data set to read, in place of what its own revision stands for today.
        max_rows: look at the first rows only, sound or not.
        on_bad_row: "skip" lists bad rows in place of raising the first. A damaged file is an error either way.
        fix_double_braces: mend ``\\boxed{{}}`` in prompts.

    Raises:
        DataError: with file, row and remedy.
    """
    name, wanted = str(source), columns or Columns()
    skipped: list[Skipped] = []
    kept = skipped if on_bad_row == "skip" else None
    sha256 = None
    records: Iterator[Record]
    if is_hub(name):
        asked = parse_hub(name)
        table = load_hub(replace(asked, revision=revision) if revision else asked)
        records, revision = iter(_hub_records(table, wanted)), table.revision
        layout = resolve_columns(wanted, table.names)[1]
        rows = check_rows(records, wanted, source=name, max_rows=max_rows, skipped=kept)
    else:
        layouts: list[str] = []
        records = _told_layout(file_records(Path(name), lambda names: present(wanted, names, name)), wanted, layouts)
        rows = check_rows(records, wanted, source=name, max_rows=max_rows, skipped=kept)
        layout = layouts[0]
        sha256 = file_sha256(name)
    rows, notes = double_braces(rows, name, fix=fix_double_braces)
    if is_hub(name) and revision is None and not parse_hub(name).is_folder:
        notes.append(f"{name}: read from the local cache, its revision is not known")
    return DataSet(name, rows, skipped, notes, layout, revision, sha256)


def read_raw(source: str | Path) -> Iterator[Record]:
    """All columns of every row, unchecked: (place, row), the places being those of ``read_dataset``'s rows."""
    name = str(source)
    return load_hub(name).rows() if is_hub(name) else file_records(Path(name))


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def skip_lines(source: str, skipped: Sequence[Skipped], total: int) -> list[str]:
    """No line, or one: how many rows were left out, and the first few places with their reasons."""
    if not skipped:
        return []
    shown = "; ".join(
        f"{each.where.removeprefix(source).lstrip(', ')}: {each.reason}" for each in skipped[:SHOWN_SKIPS]
    )
    more = f"; {len(skipped) - SHOWN_SKIPS} more" if len(skipped) > SHOWN_SKIPS else ""
    return [f"{source}: {len(skipped)} of {counted(total, 'row')} skipped: {shown}{more}"]


def _hub_records(table: HubTable, columns: Columns) -> Iterator[Record]:
    plain = [name for name in table.names if "." not in name and not _is_nested(table.table.features[name])]
    return table.rows([*plain, *present(columns, table.names, str(table.source))])


def _is_nested(feature: Any) -> bool:
    return isinstance(feature, dict | list) or type(feature).__name__ not in ("Value", "ClassLabel")


def _told_layout(records: Iterator[Record], columns: Columns, layouts: list[str]) -> Iterator[Record]:
    """The records, while ``layouts`` gets the layout's name as the first row passes."""
    from scope_opd.data.files import names_of

    for place, values in records:
        if not layouts and isinstance(values, Mapping):
            layouts.append(resolve_columns(columns, names_of(values))[1])
        yield place, values


def double_braces(
    rows: list[Row], source: str, *, fix: bool, option: str = "data.fix_double_braces"
) -> tuple[list[Row], list[str]]:
    """Count, and on request mend, what a format string left behind; ``option`` is how to request it."""
    found = [index for index, row in enumerate(rows) if DOUBLE_BRACES in _prompt_text(row)]
    if not found:
        return rows, []
    if not fix:
        note = f"{len(found)} of {counted(len(rows), 'prompt')} with a literal {DOUBLE_BRACES}; {option} mends it"
        return rows, [f"{source}: {note}"]
    for index in found:
        row = rows[index]
        messages = tuple({**m, "content": m["content"].replace(DOUBLE_BRACES, SINGLE_BRACES)} for m in row.messages)
        rows[index] = replace(row, problem=row.problem.replace(DOUBLE_BRACES, SINGLE_BRACES), messages=messages)
    return rows, [f"{source}: {DOUBLE_BRACES} mended in {len(found)} of {counted(len(rows), 'prompt')}"]


def _prompt_text(row: Row) -> str:
    return "\n".join(message["content"] for message in row.messages) if row.messages else row.problem
