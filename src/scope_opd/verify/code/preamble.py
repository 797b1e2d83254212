"""Names of the standard library that contest programs use without importing them.

LiveCodeBench's runner puts star imports of these modules in front of every program (starter code says ``List[int]``
and no more). Importing them all costs several times the start of the interpreter, so only names that a program uses
are provided, which comes to the same.
"""

from __future__ import annotations

import builtins
import importlib
import re
from functools import cache

# In LiveCodeBench's order: of two modules with a name the later one provides it.
MODULES = (
    "string", "re", "datetime", "collections", "heapq", "bisect", "copy", "math", "random", "statistics", "itertools",
    "functools", "operator", "io", "sys", "json", "typing",
)  # fmt: skip
_WORD = re.compile(r"[A-Za-z_]\w*")


@cache
def provided() -> dict[str, str]:
    """Which module provides a name; built-in names stay what they are."""
    homes: dict[str, str] = {}
    for name in MODULES:
        module = importlib.import_module(name)
        public = getattr(module, "__all__", None) or [word for word in vars(module) if not word.startswith("_")]
        homes |= dict.fromkeys(public, name)
    homes |= {name: name for name in MODULES}
    return {name: home for name, home in homes.items() if not hasattr(builtins, name)}


def names_for(code: str) -> list[list[str]]:
    """Pairs (name, module) for the words of a program; the driver drops those that it does not use as names."""
    homes = provided()
    return [[word, homes[word]] for word in sorted(set(_WORD.findall(code))) if word in homes]
