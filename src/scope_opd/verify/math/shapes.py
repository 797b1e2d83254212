r"""The shapes of an answer: words, values, tuples, sets, unions, relations, named values, matrices, times.

What has no structure of its own is a ``Value``, which holds LaTeX for the symbolic comparison.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias, Union

from scope_opd.verify.math.numbers import Number
from scope_opd.verify.math.units import Unit


@dataclass(frozen=True, slots=True)
class Words:
    """An answer in words, as written."""

    text: str


@dataclass(frozen=True, slots=True)
class Value:
    """One value.

    Attributes:
        latex: its clean spelling without unit, per cent and degree signs.
        number: it, if it is a plain number.
        percent, degrees: whether such a sign followed.
        unit: the unit or the words behind it.
        base: the base in which an integer is written (52_8), None if not stated.
        grouped: another reading, a list, of digits grouped by commas (100,200).
    """

    latex: str
    number: Number | None = None
    percent: bool = False
    degrees: bool = False
    unit: Unit | None = None
    base: int | None = None
    grouped: tuple[Shape, ...] = ()


@dataclass(frozen=True, slots=True)
class Group:
    """Items in brackets: ``( )`` a tuple or an open interval, ``[ ]`` a closed one or a tuple, and half-open ones."""

    opening: str
    ending: str
    items: tuple[Shape, ...]


@dataclass(frozen=True, slots=True)
class Many:
    """Several answers, or a set: without order.

    Attributes:
        braces: it was written as a set.
        joint: "and" or "or" where these words alone join the items, else ",".
    """

    items: tuple[Shape, ...]
    braces: bool = False
    joint: str = ","


@dataclass(frozen=True, slots=True)
class Unite:
    """Sets under one operation: union, intersection or difference."""

    parts: tuple[Shape, ...]
    operation: str = "union"


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain ``a < b <= c``: one operator fewer than sides. ``sides`` are clean spellings."""

    sides: tuple[str, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Named:
    """``name = value``, where the name is a symbol, a function of symbols, a ratio of names or such.

    Attributes:
        constant: the letter that was declared an arbitrary constant, "" if none was.
    """

    name: str
    value: Shape
    constant: str = ""


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix by rows; a column or row vector is one too."""

    rows: tuple[tuple[Shape, ...], ...]
    latex: str


@dataclass(frozen=True, slots=True)
class Clock:
    """A time of day or a ratio: the numbers between colons, and am/pm."""

    numbers: tuple[str, ...]
    half: str = ""


Shape: TypeAlias = Union["Words", "Value", "Group", "Many", "Unite", "Relation", "Named", "Matrix", "Clock"]
