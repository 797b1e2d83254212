"""Which program a response holds.

Scope first, by the rule of maths answers (``verify.math.extract.visible``): with ``after_think`` only what follows the
last closed thinking block counts, and nothing of a block that is never closed. In what is left, the last fenced block
marked as Python is the program; without one the last fenced block of no or another language. A block that is never
closed is cut off and does not count; nor does one that another Python block opens in, which then counts by itself.
Without any block there is no program, except for a completion of a given start (HumanEval), where the text itself is
the completion.

Not covered: indented code without a fence; programs spread over several blocks.
"""

from __future__ import annotations

import ast
import re
import warnings

# Possessive, or a long line would be read again from each of its characters.
_FENCE = re.compile(r"[^`~]*+(`{3,}+|~{3,}+)[ \t]*+([A-Za-z0-9_+#.-]*+)[^`]*+\Z")
PYTHON = frozenset({"python", "py", "python3", "python2", "ipython"})


def last_block(text: str) -> str | None:
    """The last closed fenced Python block, else the last closed fenced block, else None. One pass."""
    python = other = None
    fence, language, lines = "", "", [""]
    for line in text.replace("\r\n", "\n").split("\n"):  # and at nothing else: a text in a program may hold U+2028
        mark = _FENCE.match(line)
        if mark and (not fence or (mark[2].lower() in PYTHON and not line[: mark.start(1)].strip())):
            fence, language, lines = mark[1], mark[2].lower(), []
        elif not fence:
            continue
        elif mark and not mark[2] and line.strip().strip(fence[0]) == "" and len(mark[1]) >= len(fence):
            block = "\n".join(lines) + "\n"
            if language in PYTHON:
                python = block
            else:
                other = block
            fence = ""
        else:
            lines.append(line)
    return python if python is not None else other


def completion_of(text: str, prompt: str) -> str:
    """A bare completion of ``prompt``: the text, up to the first line from which on it is no Python.

    A model that was never told to stop goes on after the function: with prose, a fence, the next exercise. Where
    prompt and text together do not compile, the lines that belong to the function are kept: those before the first
    one that is neither blank nor indented.
    """
    kept = re.split(r"^[ \t]*(?:```|~~~)", text, maxsplit=1, flags=re.MULTILINE)[0]
    if compiles(prompt + kept):
        return kept
    lines = kept.splitlines(keepends=True)
    for place, line in enumerate(lines):
        if place and line.strip() and not line[0].isspace():
            return "".join(lines[:place])
    return kept


def defines(code: str, name: str) -> bool:
    """Whether code defines a function of that name at its outermost level."""
    return re.search(rf"^(?:async[ \t]+)?def[ \t]+{re.escape(name)}[ \t]*\(", code, re.MULTILINE) is not None


def compiles(code: str) -> bool:
    """Whether code is Python; nothing of it is run."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return True
