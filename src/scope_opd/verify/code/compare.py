"""When an output is right: the rules of the contests' own graders, in one place.

Printed text (``stdio``): white space at both ends of the output and of each line does not count, nor does how much of
it separates two tokens; line breaks between do. Two tokens are equal as texts or as decimal numbers (``1.0`` is ``1``,
``5e1`` is ``50``), which is LiveCodeBench's rule; only digits of ASCII make a number. Upper and lower case differ.

Returned values (``functional``): equal as Python compares JSON values (``1`` is ``1.0`` is ``true``), a tuple as a
list. A set, or any other type that JSON lacks, is never right.

With a tolerance a number may differ by ``absolute`` or ``relative`` x |expected|, in both, but only where the expected
one is not whole as it is written (``0.5``, ``1e-3``; in values a float): a count is right or wrong.

What a solution returned is walked along the expected value and never built into a set or dictionary of our own, whose
keys it could have chosen to collide; what it printed is cut into no more pieces than the expected text has.
"""

from __future__ import annotations

import math
from decimal import Decimal, DecimalException
from typing import Any

from scope_opd.gold import Tolerance
from scope_opd.verify.sandbox.plain import NotPlainError, decode

SHOWN = 60
"""Characters of a value in a reason at most."""
_NUMBER_LENGTH = 400
"""Characters of a token that may be a number at most: longer ones are compared as texts, exactly and fast."""


def text_difference(expected: str, printed: str, tolerance: Tolerance | None = None) -> str | None:
    """None where the printed text is right, else what differs, short."""
    if expected == printed:
        return None
    expected, printed = expected.strip(), printed.strip()
    wanted = expected.split("\n")
    found = printed.split("\n", len(wanted))
    for place, (left, right) in enumerate(zip(wanted, found, strict=False), 1):
        if left != right and not _same_line(left.split(), right, tolerance):
            return f"line {place}: expected {shown(left.strip())}, found {shown(right.strip())}"
    if len(wanted) != len(found):
        return f"expected {len(wanted)} lines, found {printed.count(chr(10)) + 1}"
    return None


def _same_line(wanted: list[str], line: str, tolerance: Tolerance | None) -> bool:
    found = line.split(None, len(wanted))
    return len(wanted) == len(found) and all(
        left == right or _same_number(left, right, tolerance) for left, right in zip(wanted, found, strict=True)
    )


def _same_number(left: str, right: str, tolerance: Tolerance | None) -> bool:
    both = left + right
    if max(len(left), len(right)) > _NUMBER_LENGTH or "_" in both or not both.isascii():  # Decimal reads 1_0 as 10
        return False
    try:
        wanted, found = Decimal(left), Decimal(right)
    except DecimalException:
        return False
    if not (wanted.is_finite() and found.is_finite()):
        return False
    if wanted == found:
        return True
    return tolerance is not None and not left.lstrip("+-").isdigit() and _near(float(wanted), float(found), tolerance)


def _near(wanted: float, found: float, tolerance: Tolerance) -> bool:
    if not (math.isfinite(wanted) and math.isfinite(found)):  # 1e400 is infinite, and near to everything
        return False
    return abs(wanted - found) <= max(tolerance.absolute, tolerance.relative * abs(wanted))


def same_value(expected: Any, tree: Any, tolerance: Tolerance | None = None) -> bool:
    """Whether a returned value, as the JSON tree of ``driver.read_json``, is the expected one."""
    if isinstance(tree, dict):
        if len(tree) != 1:
            return False
        ((tag, body),) = tree.items()
        if tag == "t" and isinstance(body, list):
            tree = body
        elif tag == "d":
            return isinstance(expected, dict) and _same_pairs(expected, body, tolerance)
        elif tag in ("i", "f"):
            try:
                tree = decode(tree)
            except NotPlainError:
                return False
        else:
            return False
    if isinstance(expected, list | tuple):
        return (
            isinstance(tree, list)
            and len(tree) == len(expected)
            and all(same_value(left, right, tolerance) for left, right in zip(expected, tree, strict=True))
        )
    if isinstance(tree, list | dict) or isinstance(expected, dict):
        return False
    if expected == tree or expected is tree:
        return True
    if tolerance is None or not isinstance(expected, float) or type(tree) not in (int, float):
        return False
    try:
        return _near(float(expected), float(tree), tolerance)
    except OverflowError:
        return False


def _same_pairs(expected: dict[Any, Any], pairs: Any, tolerance: Tolerance | None) -> bool:
    if not isinstance(pairs, list) or len(pairs) != len(expected):
        return False
    seen = set()
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2:
            return False
        key, value = pair
        if isinstance(key, list | dict) or key not in expected or not same_value(expected[key], value, tolerance):
            return False
        seen.add(key)  # only keys of the expected value get this far
    return len(seen) == len(expected)


def shown_value(value: Any) -> str:
    """A value for a reason, as it is written in Python."""
    try:
        return shown(repr(value))
    except ValueError:
        return "a number of more digits than the interpreter writes"


def shown(text: str) -> str:
    """A text for a reason: short, on one line."""
    text = " ".join(text[: 10 * SHOWN].split())
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return repr(text if len(text) <= SHOWN else text[: SHOWN - 3] + "...")
