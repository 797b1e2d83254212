"""Columns that a file calls otherwise: ``--map OURS=THEIRS``, the same in every command that takes it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

from scope_opd.errors import ConfigError, DataError


def parse_map(entries: Iterable[str], ours: Collection[str]) -> dict[str, str]:
    """``["answer=gold"]`` -> ``{"answer": "gold"}``: our name, the file's.

    Args:
        entries: as typed.
        ours: the names that may stand on the left.

    Raises:
        ConfigError: something else, or a name that is not ours.
    """
    found: dict[str, str] = {}
    for entry in entries:
        name, separator, theirs = entry.partition("=")
        if not separator or not theirs or name not in ours:
            raise ConfigError(f"--map {entry}", f"OURS=THEIRS with OURS one of {', '.join(ours)}", "mend it")
        if name in found:
            raise ConfigError(f"--map names {name} twice", "each once", "drop one")
        found[name] = theirs
    return found


def mapped_row(
    row: Mapping[str, Any], columns: Mapping[str, str], ours: Iterable[str], where: str, *, needed: Iterable[str] = ()
) -> dict[str, Any]:
    """A row's values by our names, None where there is no such column.

    Args:
        row: as the file has it.
        columns: names that differ, from ``parse_map``.
        ours: the names to read.
        where: file and row, for complaints.
        needed: columns that must be there, besides those that ``columns`` names.

    Raises:
        DataError: one of them is not.
    """
    for name in (*needed, *columns):
        theirs = columns.get(name, name)
        if theirs not in row:
            raise DataError(
                f"{where}: no column {theirs!r}, found {', '.join(map(str, row)) or 'none'}",
                "it in every row",
                f"name it with --map {name}=COLUMN",
            )
    return {name: row.get(columns.get(name, name)) for name in ours}
