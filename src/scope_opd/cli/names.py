"""Nearest known names, for mistakes in what the user typed. Standard library only."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """ "expected one of a, b; did you mean a?" """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
    return f"one of {', '.join(names)}" + (f"; did you mean {close[0]}?" if close else "")
