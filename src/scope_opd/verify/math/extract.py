r"""The final answer of a response: which part of a text is held against the gold answer.

1. What a chat template or a model wrote after the end of its message (``<|im_end|>`` and its kind) is not read.
2. Thinking: with ``after_think`` what follows the last closing tag counts; without tags all of it. Text inside a block
   that was never closed counts in neither scope.
3. The last balanced, outermost ``\boxed{}`` (``\fbox{}``). Boxes that follow each other directly, with nothing between
   them but punctuation, "and", "or", a name and "=", or a word that names what was counted, form a list. A box on a
   line that is a LaTeX comment does not count. An empty box is an answer. Where there is none, what follows the last
   ``\boxed`` without braces, up to the end of its formula or line.
4. Without a box, where the fall-back is on: the last ``<answer>`` block; else what follows the last "#### ", "A:",
   "Answer:", "answer is" (and its kind); else the last formula or number.

Not covered: answers in a language other than English that carry no box.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import dataclass

from scope_opd.verify.math.settings import MathSettings
from scope_opd.verify.math.units import is_known

_END = re.compile(
    r"<\|(?:im_end|im_start|endoftext|eot_id|end_of_text|end|user|eom_id|EOT)\|>|</s>|<end_of_turn>|<｜end▁of▁sentence｜>"
)
_NAMES = r"(?:seed:)?(?:think|thinking|thought|thoughts|reasoning|reason|scratchpad|analysis|REASONING_START|REASONING)"
_OPENING = re.compile(rf"<{_NAMES}>|<\|begin_of_thought\|>|◁think▷|\[THINK\]|<\|begin_of_thinking\|>", re.IGNORECASE)
_CLOSING = re.compile(
    rf"</{_NAMES}>|</REASONING_END>|<\|end_of_thought\|>|◁/think▷|\[/THINK\]|<\|end_of_thinking\|>", re.IGNORECASE
)
_BRACES = re.compile(r"\\{1,2}(?:boxed|fbox|framebox)\s*\{|\\.|[{}]", re.DOTALL)
_BARE_BOX = re.compile(r"\\boxed[ \t]+([^\s{}$][^$\n]*)")
_COMMENT = re.compile(r"^[ \t]*%[^\n]*", re.MULTILINE)
_WORD = r"(?:\\text\{[^{}]{0,30}\}|[A-Za-z]{1,20})"
_BETWEEN = re.compile(
    r"(?:[\s.,;:$&]|\\[\[\]()]|\\\\|\\[,;:! ]|\\q?quad|\*\*|\\left|\\right)*"
    rf"(?:\s{_WORD}\s*(?=,|\\?\$?\s*and))?[\s,;$]*"
    r"(?:(?:(?:and|or)(?![a-z])|\\text\{[^{}]{0,40}(?:\band|\bor|,)\s*\}|\\(?:land|lor|vee|cup)(?![a-z])))?"
    r"(?:[\s.,;:$&]|\\[\[\]()]|\\\\|\\[,;:! ]|\\q?quad|\*\*)*"
    r"(?:[A-Za-z](?:_\{?[0-9a-zA-Z]{1,3}\}?)?(?:\([a-zA-Z0-9]\))?\s*=\s*\$?\s*)?"
)
_ANSWER_BLOCK = re.compile(r"<answer>(.*?)</answer>", re.DOTALL | re.IGNORECASE)
_MARKER = re.compile(
    r"(?:^|(?<=[\s*_.]))####\s*|(?:^|\n)[ \t>*#_-]*(?:A|Ans)[*_]*\s*[:：][ \t*_]*"
    r"|\b(?:final\s+)?(?:answer|(?:correct|right)\s+(?:option|choice))[*_]*(?:\s+to\s+[^.\n]{1,60}?)?(?:\s+(?:is|was|would\s+be|should\s+be|equals|must\s+be))?"
    r"(?:(?<=is)|(?<=was)|(?<=be)|(?<=equals)|(?=[*_]*\s*[:：=]))[*_]*\s*[:：=]?[ \t*_]*(?:\n[ \t]*(?=\S))?",
    re.IGNORECASE,
)
_FORMULA = re.compile(
    r"(?<!\\)\$\$(.+?)(?<!\\)\$\$|(?<![\\0-9])\$(?![\s]*[0-9][0-9,.]*(?:[\s.;:!?)]|$)(?![^$\n]*\$))((?:\\.|[^$\\\n])+?)\$"
    r"|\\\[(.+?)\\\]|\\\((.+?)\\\)|(\\begin\{(?:[bBpvV]?matrix|array)\}.+?\\end\{(?:[bBpvV]?matrix|array)\})",
    re.DOTALL,
)
_NUMBER = re.compile(
    r"(?<![A-Za-z0-9_.,^\\√])(?:[$€£¥]\s?)?[-−+]?(?:[$€£¥]\s?)?(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)?(?:\.[0-9]+)?"
    r"(?<=[0-9])(?:√[0-9]+)?(?:[eE][+-]?[0-9]+)?(?:\s*/\s*-?[0-9]+)?(?:\s*\\?%|\s*°|\s*(?:percent|pct)\b"
    r"|(?:mm|cm|dm|km|m|kg|mg|g|mL|ml|L|h|s)[²³]?(?=[\s.,;)]|$))?(?![A-Za-z0-9_]|\.?[0-9])"
)
_SENTENCE_END = re.compile(r"\n|(?<=[^\d\s])[.!?](?=\s|$)|(?<=\d)[.!?](?=\s|$)")
_EMPHASIS = re.compile(r"\*\*|__|(?<!\w)\*(?=\S)|(?<=\S)\*(?!\w)|`")
_HEDGES = re.compile(
    r"\b(?:or|either|maybe|perhaps|possibly|might|could|unsure|between|guess|probably)\b|\?", re.IGNORECASE
)
_DENIED = re.compile(
    r"(?:\b(?:not|never|except|but|without|than|most|least|above|below|under|over|beyond|between|instead\s+of"
    r"|(?:not|n't|cannot|can't)\s+(?:be|equal|equal\s+to))|n't|[<>≤≥]=?)\s*(?:\*\*|\$)?\s*$",
    re.IGNORECASE,
)


_JOINT = re.compile(r"\s*(?:,|(,?\s*(?:and|or)))\s*")
_CONTRAST = re.compile(
    r"(?<=[0-9$)%])\s*,\s*(?:and\s+)?(?:not|rather\s+than|instead\s+of)\s+(?:\$[^$\n]{1,40}\$|-?[0-9][0-9.,/]*%?)\s*[.!]?\s*$"
)
"""It's 12, *not 13*."""


@dataclass(frozen=True, slots=True)
class Extracted:
    """A final answer and where it stood.

    Attributes:
        parts: usually one; several boxes that form a list.
        source: "box", "boxes", "marker" or "last"; "answer" when the whole text is the answer.
    """

    parts: tuple[str, ...]
    source: str

    @property
    def text(self) -> str:
        """The answer on one line, for people."""
        return ", ".join(part.strip() for part in self.parts)


def extract(text: str, settings: MathSettings) -> Extracted | str:
    """The final answer of ``text``, or the reason why there is none."""
    if settings.form == "answer":
        if (boxes := last_boxes(text)) is not None:
            return boxes
        core = sentence_core(text)
        return Extracted((text if core is None else core,), "answer")
    text = visible(text, settings.scope)
    if not text.strip():
        return "nothing follows the thinking block"
    uncommented = _COMMENT.sub("", text)
    boxes = last_boxes(uncommented)
    if boxes is not None:
        return boxes
    if bare := _BARE_BOX.findall(uncommented):
        return Extracted((bare[-1].strip(" .,"),), "box")
    if not settings.fallback:
        return r"no balanced \boxed{}"
    return from_prose(text) or "no final answer"


def visible(text: str, scope: str) -> str:
    """The part of a response that may hold its answer: see points 1 and 2 of the module."""
    if (end := _END.search(text)) and text[: end.start()].strip():
        text = text[: end.start()]
    closings = list(_CLOSING.finditer(text))
    after = closings[-1].end() if closings else 0
    if opening := _OPENING.search(text, after):
        text = text[: opening.start()]  # never closed
    return text[after:] if scope == "after_think" else text


def opened_by(prompt: str) -> str:
    """The thinking tag with which a rendered prompt ends, else "": a response to it begins inside the block.

    Chat templates of reasoning models open the block themselves; put the tag before the response to judge it.
    """
    tail = prompt.rstrip()[-40:]
    tags = [match for match in _OPENING.finditer(tail) if match.end() == len(tail)]
    return tags[-1][0] if tags else ""


def last_boxes(text: str) -> Extracted | None:
    """The last box, or the last boxes that follow each other directly; None without a balanced one."""
    opened: list[tuple[int, int]] = []
    boxes: list[tuple[int, int, int]] = []
    for match in _BRACES.finditer(text):
        token = match.group()
        if token[-1] == "{" and (token == "{" or len(token) > 2):
            opened.append((match.start() if len(token) > 2 else -1, match.end()))
        elif token == "}" and opened:
            outside, start = opened.pop()
            if outside >= 0:
                while boxes and boxes[-1][0] > outside:
                    boxes.pop()
                boxes.append((outside, start, match.start()))
    if not boxes:
        return None
    run = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        if run[0][0] - box[2] > 80 or not _BETWEEN.fullmatch(text, box[2] + 1, run[0][0]):
            break
        run.insert(0, box)
    parts: list[str] = []
    for _, start, end in run:
        if text[start:end].strip() not in parts:
            parts.append(text[start:end].strip())
    return Extracted(tuple(parts), "box" if len(parts) == 1 else "boxes")


def from_prose(text: str) -> Extracted | None:
    """The fall-back of point 4; None where there is neither a marker nor a formula nor a number."""
    if _is_bare(text):
        return Extracted((text.strip(),), "last")
    if blocks := _ANSWER_BLOCK.findall(text):
        return Extracted((blocks[-1].strip(),), "marker")
    if (stated := stated_answer(text)) is not None:
        return Extracted((stated,), "marker")
    found = last_value(text)
    return Extracted((found,), "last") if found else None


def stated_answer(text: str) -> str | None:
    """What follows the last "answer is" (and its kind); None without one."""
    for marker in reversed(list(_MARKER.finditer(text))):
        if found := _after_marker(text[marker.end() :]):
            return found
    return None


def _is_bare(text: str) -> bool:
    """Whether a response is nothing but LaTeX without delimiters: then it is the answer."""
    if not re.search(r"\\[a-zA-Z{]", text) or re.search(r"(?<!\\)\$|\\\(|\\\[", text):
        return False
    return not re.search(
        r"[A-Za-z]{3}", re.sub(r"\\text\w*\s*\{[^{}]*\}|\\(?:begin|end)\{\w+\}|\\[a-zA-Z]+", " ", text)
    )


def _after_marker(rest: str) -> str | None:
    rest = rest.lstrip(" \t")
    if rest[:1] == "\n":
        rest = rest.lstrip()
    formula = _FORMULA.match(rest)
    if formula and "\n" in formula[0]:
        return _inside(formula)
    end = _first_end(rest)
    sentence = _EMPHASIS.sub("", rest[:end]).strip()
    if not sentence or not re.search(r"[0-9A-Za-z\\]", sentence):
        return None
    if leading := _leading(sentence):
        return leading
    cut = list(re.finditer(r"\b(?:is|are|equals|be|of)\b\s*:?|:(?!\d)", sentence))
    if cut and (leading := _leading(sentence[cut[-1].end() :].strip())):
        return leading
    if not re.search(r"[0-9$\\=]", sentence):
        return sentence.strip(" .")  # a word: "Evelyn", "odd", "(C)"
    return sentence if _HEDGES.search(sentence) else (last_value(sentence) or sentence)


def _first_end(rest: str) -> int:
    """Where the sentence ends: outside formulas."""
    formulas = [match.span() for match in _FORMULA.finditer(rest[:2000])]
    for match in _SENTENCE_END.finditer(rest):
        if not any(start < match.start() < end for start, end in formulas):
            return match.start()
    return len(rest)


def _leading(sentence: str) -> str | None:
    """What stands at the start: a run of formulas joined by commas and "and", a number with its unit, an equation."""
    if formula := _FORMULA.match(sentence):
        parts, end = [_inside(formula)], formula.end()
        while link := re.compile(r"\s*(?:,|;|,?\s*(?:and|or))\s*(?=[$\\])").match(sentence, end):
            following = _FORMULA.match(sentence, link.end())
            if following is None:
                break
            parts.append(_inside(following))
            end = following.end()
        unit = re.match(r"\s*(?:\\?%|percent|pct|°|degrees)", sentence[end:])
        rest = sentence[end:]
        if re.match(r"\s*(?:or|and)\s", rest):
            return sentence  # more answers follow: all of it is read
        return ", ".join(parts) + (r"\%" if unit and "°" not in unit[0] and "deg" not in unit[0] else "")
    if number := _NUMBER.match(sentence):
        rest = sentence[number.end() :]
        head = re.split(r"\b(?:because|since|which|that|where|when|as|so|if)\b|[.;(]", rest)[0]
        if re.search(r"^\s*,?\s*(?:and|or)\b|^\s*[-+*/^=<>\\$]|^\s*,\s*[-$0-9(\\]", rest):
            return sentence  # more answers, or a formula: all of it is read
        if re.match(r"\s*(?:to|times|x|through)\s+[0-9]|\s+[0-9]|\s*:[0-9]", rest) or re.search(
            r"\b(?:and|or)\s+\$?-?[0-9]", head
        ):
            return sentence
        return number[0].strip() + _known_unit(rest)
    if re.match(r"[-+(\[{\\]|[A-Za-z]\w{0,3}(?:\(\w\))?\s*(?:=|\\in|<|>)", sentence):
        return sentence
    return None


def last_value(text: str) -> str | None:
    """The last formula, or the last number outside of formulas, whichever stands later."""
    text = _CONTRAST.sub("", _EMPHASIS.sub("", text))
    formulas = list(_FORMULA.finditer(text))
    tail = formulas[-1].end() if formulas else 0
    number = _last_number(text, tail)
    if number is not None:
        return _denial(text[: number.start()]) + number[0].strip() + _known_unit(text[number.end() :])
    if formulas:
        unit = re.match(r"\s*(?:\\?%|percent\b|pct\b)", text[tail:])
        first = len(formulas) - 1  # "$2$ and $3$": all of them
        joints = [_JOINT.fullmatch(text, a.end(), b.start()) for a, b in itertools.pairwise(formulas)]
        while first and (joint := joints[first - 1]) and (joint[1] or first < len(formulas) - 1):
            first -= 1
        run = ", ".join(map(_inside, formulas[first:]))
        return _denial(text[: formulas[first].start()]) + run + (r"\%" if unit else "")
    return None


def _last_number(text: str, start: int) -> re.Match[str] | None:
    numbers = list(_NUMBER.finditer(text, start))
    return numbers[-1] if numbers else None


def _denial(before: str) -> str:
    """The words in front of a value that make it no answer ("not", "less than"), so that they are read with it."""
    denied = _DENIED.search(before)
    return f"{denied[0].strip()} " if denied else ""


def _known_unit(rest: str) -> str:
    """A unit of measure that follows a number directly."""
    word = re.match(r"\s([A-Za-z]{2,12}(?:\^[23]|[²³])?)(?![A-Za-z^])", rest)
    return word[0] if word and is_known(re.sub(r"\^?[23²³]$", "", word[1])) else ""


def sentence_core(text: str) -> str | None:
    """The formula or number that closes an answer given as an English sentence; None if it is not such a sentence.

    A sentence has at least two words outside formulas, ends in the formula or number, does not hedge ("either",
    "or", "maybe") and does not deny it ("not 5").
    """
    stripped = text.strip().rstrip(".").strip()
    formulas = list(_FORMULA.finditer(stripped))
    outside = _FORMULA.sub(" ", stripped)
    if (
        r"\text" in outside
        or re.match(r"(?:yes|no|true|false)\b", stripped, re.IGNORECASE)
        or re.search(r"[0-9$]\s*[,;]\s+[A-Za-z]", stripped)
        or len(re.findall(r"(?<![\\A-Za-z])(?!and\b|or\b)[A-Za-z]{2,}", outside)) < 2
    ):
        return None
    if formulas and formulas[-1].end() == len(stripped):
        start, core = formulas[-1].start(), _inside(formulas[-1])
    else:
        number = _last_number(stripped, formulas[-1].end() if formulas else 0)
        if number is None or stripped[number.end() :].strip(" €$£") != "":
            return None
        start, core = number.start(), number[0].strip()
    before = stripped[:start]
    return None if _HEDGES.search(before.replace("?", "")) or _DENIED.search(before) else core


def _inside(formula: re.Match[str]) -> str:
    return next(part for part in formula.groups() if part is not None).strip()
