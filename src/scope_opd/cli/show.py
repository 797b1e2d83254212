"""Tables on the terminal: columns that do not fit beside each other go below, with the label columns repeated.

Not covered: colour; Markdown (``evaluate.tables``).
"""

from __future__ import annotations

from collections.abc import Sequence

UNBOUNDED = 1000
"""Characters a line where standard output is no terminal: a file or a pipe gets each table whole."""
_GAP = 3
"""Characters between two columns of the box that is used."""


def show_table(header: Sequence[str], rows: Sequence[Sequence[str]], *, labels: int = 1) -> None:
    """A table on stdout, as wide as the terminal allows.

    Args:
        header: a name a column.
        rows: a text a column.
        labels: leading columns that say what a row is; they stand at the left and head every part of a split table.
    """
    from rich import box
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    width = console.width if console.is_terminal else UNBOUNDED
    console = Console(highlight=False, width=width)
    widths = [max(len(line[index]) for line in (header, *rows)) for index in range(len(header))]
    for number, part in enumerate(column_parts(widths, width, labels=labels)):
        if number:
            console.print()
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for index in part:
            table.add_column(header[index], justify="left" if index < labels else "right", overflow="fold")
        for row in rows:
            table.add_row(*(row[index] for index in part))
        console.print(table)


def column_parts(widths: Sequence[int], width: int, *, labels: int) -> list[list[int]]:
    """Which columns stand together: as many as fit, each part beginning with the labels.

    Args:
        widths: characters that each column needs.
        width: characters that there are.
        labels: leading columns that every part repeats.
    """
    first = list(range(labels))
    parts = [[*first]]
    taken = sum(widths[index] + _GAP for index in first)
    room = width - taken
    for index in range(labels, len(widths)):
        need = widths[index] + (_GAP if len(parts[-1]) > labels else 0)
        if need > room and len(parts[-1]) > labels:
            parts.append([*first])
            room, need = width - taken, widths[index]
        parts[-1].append(index)
        room -= need
    return parts
