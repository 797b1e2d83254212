"""Duplicates within a data set, and held-out problems that it holds: pure text comparison, streamed over the rows.

A problem is cut into tokens: words, numbers, LaTeX commands, symbols; within ``$..$`` every letter is a token of its
own. Dropped are the layout (case, blanks, braces, punctuation, ``\\left``, ``\\dfrac`` for ``\\frac`` and the like) and
a last clause that only tells where to put the answer. From the tokens come

    the key          all tokens: two problems with the same key are the same problem
    the word n-grams of words, numbers and commands. overlap(e, t) = |n-grams of e that are in t| / |n-grams of e|;
                     t contaminates e from a threshold on. A problem of fewer than n words is compared by its key
    the template     the key with every number (and its sign) masked, and variables numbered by first appearance:
                     problems that differ in their numbers or the names of variables alone are neighbours

Not covered: paraphrases, translations, the same problem with other names or objects, numbers written as words; answers
are not looked at.

Source: n-gram overlap as in Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C (13 words).
"""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Literal

NGRAM = 13
OVERLAP = 0.5

# A last clause in prose that leads to an empty box, or to GSM8K's mark, is an instruction and no part of the problem:
# "Put your final answer within \boxed{}."
_INSTRUCTION = re.compile(r"[A-Z][a-z,' -]*(?:\$?\\boxed\{\{?\s*\}?\}\$?|\"####\"|####)[^\w\\$]*$")
_MATH = re.compile(r"(\$\$.+?\$\$|(?<!\\)\$[^$]+\$|\\\(.+?\\\)|\\\[.+?\\\])", re.DOTALL)
_LONG_WORD = re.compile(r"(?<![\\a-z])[a-z]{4,}")
_LAYOUT = re.compile(
    r"\\(?:left|right|displaystyle|textstyle|limits|quad|qquad|text|textbf|textit|mathrm|mathbf|mathit|operatorname"
    r"|[bB]igg?[lrm]?)(?![a-z])|\\[\[\]()!,;:> ]|[{}~]"
)
_SAME = (
    (re.compile(r"\\[dtc]frac(?![a-z])"), r"\\frac"),
    (re.compile(r"\\[dt]binom(?![a-z])"), r"\\binom"),
    (re.compile(r"\\(?:l|c|v|d)?dots[cbmio]?(?![a-z])|\.\.\.|…"), r"\\dots "),
    (re.compile(r"\\le(?:q|qslant)?(?![a-z])|≤"), r"\\le "),
    (re.compile(r"\\ge(?:q|qslant)?(?![a-z])|≥"), r"\\ge "),
    (re.compile(r"\\neq?(?![a-z])|≠"), r"\\ne "),
    (re.compile(r"[−–—]"), "-"),
    (re.compile(r"(?<=\d)(?:\{,\}|\\?,\\?!?)(?=\d{3}(?!\d))"), ""),
)
_NUMBER = r"\d+(?:\.\d+)?"
_IN_MATH = re.compile(rf"{_NUMBER}|\\[a-z]+|\\\\|[^\W\d_]|[^\s\w]|_")
_IN_TEXT = re.compile(rf"{_NUMBER}|\\[a-z]+|\\\\|[^\W\d_]+|[^\s\w]|_")
_DROPPED = frozenset(".,;:?'\"`’‘“”$_\\") | {"\\\\"}
_GREEK = "alpha beta gamma delta epsilon varepsilon theta lambda mu nu rho sigma tau phi varphi chi psi omega"
_LETTERS = frozenset("\\" + name for name in _GREEK.split())
Kind = Literal["identical", "same", "overlap", "template"]


@dataclass(frozen=True, slots=True)
class Forms:
    """What two problems are compared by."""

    key: str
    words: tuple[str, ...]
    template: str


def forms(problem: str) -> Forms:
    """The key, the words and the template of a problem's text."""
    tokens = list(_tokens(problem))
    kept = [token for token, _ in tokens if token not in _DROPPED]
    words = tuple(token.lstrip("\\") for token in kept if token[-1].isalnum())
    return Forms(" ".join(kept), words, _template(tokens))


@dataclass(frozen=True, slots=True)
class Match:
    """A pair of problems, each by its place in its data set.

    Attributes:
        kind: "identical" letter for letter, "same" but for layout, "overlap" of word n-grams, or same "template".
        held_out, train: the two; within one data set ``held_out`` is the earlier one.
        share: of the held-out problem's n-grams that the other holds; 1 where they are the same.
    """

    kind: Kind
    held_out: int
    train: int
    share: float


@dataclass(slots=True)
class Overlap:
    """Compares one training problem after the other with all held-out problems and with those before it.

    Args:
        held_out: texts of the held-out problems.
        ngram: words in an n-gram.
        threshold: share of n-grams from which a pair is contaminated, in (0, 1].
    """

    held_out: Sequence[str]
    ngram: int = NGRAM
    threshold: float = OVERLAP
    duplicates: list[Match] = field(default_factory=list)
    contaminated: list[Match] = field(default_factory=list)
    templates: list[Match] = field(default_factory=list)
    _seen: dict[bytes, tuple[int, bytes]] = field(default_factory=dict)
    _keys: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    _templates: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    _grams: dict[tuple[str, ...], list[int]] = field(default_factory=lambda: defaultdict(list))
    _sizes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        for index, problem in enumerate(self.held_out):
            form = forms(problem)
            self._keys[form.key].append(index)
            self._templates[form.template].append(index)
            grams = self._grams_of(form.words)
            self._sizes.append(len(grams))
            for gram in grams:
                self._grams[gram].append(index)

    def add(self, problem: str, place: int) -> None:
        """Compare a training problem; ``place`` names it in matches."""
        form, text = forms(problem), problem.strip()
        key, raw = _digest(form.key), _digest(text)
        if key in self._seen:
            before, as_it_was = self._seen[key]
            self.duplicates.append(Match("identical" if as_it_was == raw else "same", before, place, 1.0))
        else:
            self._seen[key] = (place, raw)
        same = self._keys.get(form.key, ())
        for index in same:
            kind: Kind = "identical" if self.held_out[index].strip() == text else "same"
            self.contaminated.append(Match(kind, index, place, 1.0))
        counts: dict[int, int] = defaultdict(int)
        for gram in self._grams_of(form.words):
            for index in self._grams.get(gram, ()):
                counts[index] += 1
        for index, count in counts.items():
            share = count / self._sizes[index]
            if share >= self.threshold and index not in same:
                self.contaminated.append(Match("overlap", index, place, share))
        for index in self._templates.get(form.template, ()):
            if index not in same:
                self.templates.append(Match("template", index, place, counts[index] / max(self._sizes[index], 1)))

    def _grams_of(self, words: tuple[str, ...]) -> set[tuple[str, ...]]:
        return {words[start : start + self.ngram] for start in range(len(words) - self.ngram + 1)}


def _digest(text: str) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _tokens(problem: str) -> Iterator[tuple[str, bool]]:
    """(token, whether it stands within dollars), with the punctuation that ``_DROPPED`` names."""
    text = unicodedata.normalize("NFKC", _INSTRUCTION.sub("", problem.strip())).lower()
    for pattern, replacement in _SAME:
        text = pattern.sub(replacement, text)
    for part, segment in enumerate(_MATH.split(text)):
        # Two amounts of money enclose words, not mathematics.
        math = part % 2 == 1 and not _LONG_WORD.search(segment)
        for token in (_IN_MATH if math else _IN_TEXT).findall(_LAYOUT.sub(" ", segment)):
            yield token, math


def _template(tokens: Iterable[tuple[str, bool]]) -> str:
    masked: list[str] = []
    names: dict[str, str] = {}
    before = ""
    for token, math in tokens:
        if token[0].isdigit():
            # The sign of a number belongs to it, unless something stands before it that it is subtracted from.
            if before == "-" and (len(masked) < 2 or not _ends_term(masked[-2])):
                masked.pop()
            masked.append("#")
        elif token in _LETTERS or (len(token) == 1 and token.isalpha() and (math or token not in "ai")):
            masked.append(names.setdefault(token, f"@{len(names) + 1}"))
        else:
            masked.append(token)
        before = token
    return " ".join(token for token in masked if token not in _DROPPED)


def _ends_term(token: str) -> bool:
    return token == "#" or token[0] == "@" or token in (")", "]", "|", "!")
