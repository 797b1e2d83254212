"""Rows written as JSON lines, in files that appear whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scope_opd.errors import DataError
from scope_opd.records import dumps


def write_rows(path: Path, rows: Iterable[tuple[str, Any]]) -> int:
    """Write (place, row) pairs, a row a line; returns their number. After an error nothing is left of the file.

    Raises:
        DataError: a row with a value that JSON does not know (bytes, dates).
    """
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    count = 0
    try:
        with part.open("w", encoding="utf-8") as stream:
            for where, row in rows:
                try:
                    stream.write(dumps(row) + "\n")
                except (TypeError, ValueError) as error:
                    raise DataError(
                        f"{where}: {error}", "values that JSON knows", "drop or convert the column first"
                    ) from None
                count += 1
            stream.flush()
            os.fsync(stream.fileno())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    return count
