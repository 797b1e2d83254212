"""Rows of a data set: checked, and named so that every complaint has a place.

A row is a problem (a text, or chat messages), its gold answer and an id; short scalar columns beside them are kept as
``fields``. What is wrong with a file or a row is one ``DataError`` line with the file, the row, what was found and what
to do. Rows are taken one at a time from what ``files`` or ``hub`` read, so that a file with long solution columns costs
no more memory than its problems.

Not covered: problems that occur twice (``overlap``), whether an answer is right.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from itertools import islice
from typing import Any

from scope_opd.data.files import names_of
from scope_opd.data.messages import Messages, check_messages, is_conversation
from scope_opd.errors import DataError
from scope_opd.gold import answer_from_text, check_answer
from scope_opd.words import counted

MAX_FIELD_CHARACTERS = 200
"""Text columns beyond this are not carried along with a prompt: they are solutions and traces, not labels."""
NAME_COLUMNS = "name yours with data.problem_column, data.answer_column or data.id_column"
"""The remedy for a column that is not there, in the words of a config; commands put their own in its place."""
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Columns:
    """Which column holds what; a dotted name reaches into an object where no column has the whole name.

    A file without the column ``id`` is numbered: ``row-000001``, ``row-000002`` ... by the places of its rows.

    Attributes:
        problem, answer, id: names. ``answer`` None: no answers are read (for looking at problems alone).
        extra: names that are kept as ``fields`` too, though they lie in objects.
    """

    problem: str = "problem"
    answer: str | None = "answer"
    id: str = "id"
    extra: tuple[str, ...] = ()

    @property
    def named(self) -> tuple[str, ...]:
        """Every name, whether it is there or not."""
        return tuple(name for name in (self.problem, self.answer, self.id, *self.extra) if name is not None)


VERL = Columns(
    problem="prompt", answer="reward_model.ground_truth", extra=("extra_info.index", "extra_info.split")
)  # fmt: skip
"""The layout that verl's users have: ``data_source``, ``prompt`` (messages), ``ability``, ``reward_model``,
``extra_info``. Rows are numbered: ``extra_info.index`` repeats where data sets were joined."""


@dataclass(frozen=True, slots=True)
class Row:
    """One problem.

    Attributes:
        id: unique in its data set.
        problem: the problem's text, never empty; of a conversation, its last message.
        answer: the gold answer in one of the forms of ``scope_opd.gold``; None where none was read.
        where: file and row, for complaints ("train.jsonl, line 12").
        fields: the other columns that are numbers, booleans or texts of at most ``MAX_FIELD_CHARACTERS``.
        messages: the conversation, ending with ``problem``; empty where the row is a plain problem.
    """

    id: str
    problem: str
    answer: Any
    where: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    messages: Messages = ()


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that was left out: its place, and why."""

    where: str
    reason: str

    @classmethod
    def of(cls, where: str, error: DataError) -> Skipped:
        """From the error that it would have been."""
        reason = error.found.removeprefix(where).lstrip(": ")
        return cls(where, f"{reason}; expected {error.expected}" if error.expected else reason)


def resolve_columns(columns: Columns, names: Collection[str]) -> tuple[Columns, str]:
    """The columns to read, and the name of the layout: "verl" where it is there and the defaults are not."""
    plain = columns.problem == "problem" and columns.answer in ("answer", None)
    absent = "problem" not in names and "answer" not in names
    if plain and absent and {"prompt", "reward_model"} <= set(names):
        answer = VERL.answer if columns.answer is not None else None
        return Columns(VERL.problem, answer, columns.id, (*columns.extra, *VERL.extra)), "verl"
    return columns, "plain"


def present(columns: Columns, names: Collection[str], source: str) -> list[str]:
    """Which of the columns a table with these names has.

    Raises:
        DataError: the problem or the answer is not there.
    """
    columns, _ = resolve_columns(columns, names)
    top = [name for name in names if "." not in name]
    for name in (columns.problem, columns.answer):
        if name is not None and name not in names:
            raise _no_column(name, top, source)
    return [name for name in columns.named if name in names]


def check_rows(
    numbered: Iterable[tuple[str, Mapping[str, Any] | DataError]],
    columns: Columns | None = None,
    *,
    source: str,
    max_rows: int | None = None,
    skipped: list[Skipped] | None = None,
) -> list[Row]:
    """Turn mappings into rows, checking columns, types, emptiness and that no id comes twice.

    Args:
        numbered: (place, mapping) pairs; the place is what a complaint names after the source ("line 12"). A
            ``DataError`` in a mapping's place is a row that could not be read.
        columns: names of the columns.
        source: what a complaint names first: the file.
        max_rows: look at the first rows only, sound or not.
        skipped: where given, rows that fail are listed here and left out; None makes the first of them an error.

    Raises:
        DataError: naming source and row; no row at all, or none that is sound.
    """
    names: Columns | None = None
    rows: list[Row] = []
    seen: dict[str, str] = {}
    has_ids = False
    number = 0
    first: DataError | None = None
    for number, (place, values) in enumerate(islice(numbered, max_rows), start=1):
        where = f"{source}, {place}"
        try:
            if isinstance(values, DataError):
                raise values
            if names is None:
                names, _ = resolve_columns(columns or Columns(), names_of(values))
                has_ids = pick(values, names.id) is not _ABSENT or names.id != Columns().id
            row = _row(values, names, where, f"row-{number:06d}", has_ids)
            if row.id in seen:
                raise DataError(
                    f"{where}: the id {row.id!r} was used before, at {seen[row.id]}",
                    "ids that are unique",
                    "rename one",
                )
        except DataError as error:
            if skipped is None:
                raise
            first = first or error
            skipped.append(Skipped.of(where, error))
            continue
        seen[row.id] = place
        rows.append(row)
    if not number:
        raise DataError(f"data file {source} has no rows", "at least one row", "check how it was written")
    if not rows:
        assert first is not None
        raise DataError(
            f"{source}: no sound row among {counted(number, 'row')}; the first, {first.found}",
            first.expected,
            first.remedy,
        )
    return rows


def pick(values: Mapping[str, Any], name: str) -> Any:
    """A column's value; a dotted name reaches into objects where no column has the whole name. ``_ABSENT`` if none."""
    if name in values:
        return values[name]
    head, dot, rest = name.partition(".")
    while dot:
        inner = values.get(head)
        if isinstance(inner, Mapping):
            return pick(inner, rest)
        more, dot, rest = rest.partition(".")
        head = f"{head}.{more}"
    return _ABSENT


def _row(values: Mapping[str, Any], names: Columns, where: str, numbered: str, has_ids: bool) -> Row:
    def column(name: str) -> Any:
        value = pick(values, name)
        if value is _ABSENT:
            raise _no_column(name, values, where)
        return value

    value = column(names.problem)
    messages: Messages = ()
    if is_conversation(value):
        messages = check_messages(value, names.problem, where)
        problem = messages[-1]["content"]
    else:
        problem = _checked_problem(value, names.problem, where)
    answer = None if names.answer is None else _checked_answer(column(names.answer), names.answer, where)
    row_id = _checked_id(column(names.id), names.id, where) if has_ids else numbered
    fields = {name: value for name, value in values.items() if name not in names.named and _is_label(value)}
    for name in names.extra:
        if _is_label(value := pick(values, name)):
            fields[name] = value
    check_text([row_id, problem, messages, answer, fields], where)
    return Row(row_id, problem, answer, where, fields, messages)


def check_text(values: Any, where: str) -> None:
    """Refuse half of a character, which JSON can write: no tokenizer and no file takes it.

    Args:
        values: of a row, as JSON knows them.
        where: file and row.

    Raises:
        DataError: some text among them holds one.
    """
    try:
        json.dumps(values, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: half of a character (the code {error.object[error.start]!r})", "text", "mend or drop the row"
        ) from None


def _no_column(name: str, names: Iterable[str], where: str) -> DataError:
    return DataError(
        f"{where}: no column {name!r}, found {', '.join(map(str, names)) or 'none'}",
        f"a column {name!r}",
        NAME_COLUMNS,
    )


def _checked_id(value: Any, name: str, where: str) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise DataError(f"{where}: {name} is {_shown(value)}", "a text or an integer", "give every row an id, or none")
    return str(value)


def _checked_problem(value: Any, name: str, where: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: {name} is {_shown(value)}", "a text, or chat messages", "convert the column")
    if not value.strip():
        raise DataError(f"{where}: {name} is empty", "a problem", "drop the row or fill it in")
    return value


def _checked_answer(value: Any, name: str, where: str) -> Any:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{where}: {name} is empty", "the gold answer", "drop the row or fill it in")
    value = answer_from_text(str(value) if isinstance(value, Decimal) else value)
    if isinstance(value, Mapping):
        # Parquet gives every row the keys of all of them.
        value = {key: item for key, item in value.items() if item is not None}
    try:
        check_answer(value)
    except ValueError as error:
        found, _, expected = str(error).partition("; expected ")
        raise DataError(f"{where}: {name}: {found}", expected, "mend or drop the row") from None
    return value


def _is_label(value: Any) -> bool:
    return isinstance(value, int | float) or (isinstance(value, str) and len(value) <= MAX_FIELD_CHARACTERS)


def _shown(value: Any) -> str:
    """A value as a complaint shows it: its type, and the start of it."""
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:37] + '...'} ({type(value).__name__})"
