"""Tables that do not fit a terminal are split between columns, never inside a cell."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from scope_opd.cli.show import column_parts


@given(st.lists(st.integers(1, 30), min_size=2, max_size=12), st.integers(40, 200), st.integers(1, 2))
def test_parts_hold_every_column_once_behind_the_labels_and_fit(widths: list[int], width: int, labels: int) -> None:
    parts = column_parts(widths, width, labels=min(labels, len(widths) - 1))
    first = list(range(min(labels, len(widths) - 1)))
    assert [part[: len(first)] for part in parts] == [first] * len(parts)
    assert [index for part in parts for index in part[len(first) :]] == list(range(len(first), len(widths)))
    for part in parts:
        assert sum(widths[index] for index in part) + 3 * (len(part) - 1) <= width or len(part) == len(first) + 1


def test_a_table_that_fits_stays_whole() -> None:
    assert column_parts([10, 10, 10], 36, labels=1) == [[0, 1, 2]]
    assert column_parts([10, 10, 10], 35, labels=1) == [[0, 1], [0, 2]]
