r"""Multiple choice: the options that a problem lists, and the letter that an answer names.

Options are read from "(A) ... (B) ...", "A) ... B) ...", "A. ... B. ..." and their bold forms; there must be at least
two, in alphabetical order from A.

Not covered: options by number, options in pictures.
"""

from __future__ import annotations

import re

from scope_opd.verify.math.text import clean

_MARKS = (
    re.compile(r"(?:\\(?:textbf|text|mathrm|mathbf|bf)\s*\{?\s*)?\(\s*([A-J])\s*\)\s*\}?\s*[:.]?"),
    re.compile(r"(?:^|(?<=[\s$}]))(?:\\(?:textbf|text|mathrm)\s*\{\s*)?([A-J])\s*[).:]\s*\}?(?=\s|\$|\\|[0-9])"),
)
_LETTER = re.compile(
    r"(?:(?:the\s+)?(?:option|choice|answer)(?:\s+is)?\s*:?\s*)?\(?\s*([A-J])\s*\)?\s*[.:]?", re.IGNORECASE
)
_LETTERED = re.compile(r"(?:option\s+|choice\s+)?(?:\(\s*([A-J])\s*\)|([A-J])\s*[).:])\s*(.+)", re.DOTALL)


def options(problem: str) -> dict[str, str]:
    """Letter to text of the options that a problem lists; empty without at least two in order."""
    for mark in _MARKS:
        found = list(mark.finditer(problem))
        for start in range(len(found) - 1, -1, -1):
            if found[start][1] != "A":
                continue
            run = found[start:]
            letters = [match[1] for match in run]
            if len(run) >= 2 and letters == [chr(ord("A") + i) for i in range(len(run))]:
                ends = [match.start() for match in run[1:]] + [len(problem)]
                return {m[1]: _text(problem[m.end() : end]) for m, end in zip(run, ends, strict=True)}
    return {}


def _text(raw: str) -> str:
    text = re.sub(r"\\(?:qquad|quad|hspace\{[^{}]*\}|newline|textbf\{\s*$)|\\\\|&", " ", raw.split("\n\n")[0])
    text = text.strip()
    if text.count("$") % 2:
        text = text.strip("$")
    return re.sub(r"\\ $|\\$", "", text).strip(" ,;.\n~")


def letter_of(answer: str) -> tuple[str, str] | None:
    """The letter that an answer names and what follows it: "(C)", "C.", "option C", "(C) 12"."""
    answer = re.sub(r"\\(?:text|textbf|mathrm)\s*\{\s*([A-J]\s*[.):])\s*\}", r" \1 ", answer)
    text = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", clean(answer)).replace("*", "").strip()
    if re.fullmatch(r"[a-j]", text):
        return None
    if match := _LETTER.fullmatch(text):
        return match[1].upper(), ""
    if match := _LETTERED.fullmatch(text):
        return match[1] or match[2], match[3].strip()
    return None
