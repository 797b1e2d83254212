r"""The structure of an answer: lists, tuples, sets, intervals, unions, relations, matrices, words, values with units.

``read`` turns a clean spelling into one of the shapes below; what has no structure of its own is a ``Value``, which
holds LaTeX for the symbolic comparison. Reading never evaluates anything.

Not covered: nested quantifiers, systems written as ``cases``, prose.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Union

from scope_opd.verify.math.numbers import Number, read_number
from scope_opd.verify.math.text import clean, closing, full_fractions, split, split_at, squeezed
from scope_opd.verify.math.units import LETTERS, Unit, is_known, read_unit

MAX_ITEMS = 200
"""Items of a list that are read."""


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
    """Items in brackets: ``( )`` a tuple or an open interval, ``[ ]`` a closed one or a tuple, and the half-open ones."""

    opening: str
    ending: str
    items: tuple[Shape, ...]


@dataclass(frozen=True, slots=True)
class Many:
    """Several answers, or a set: without order. ``braces``: it was written as a set."""

    items: tuple[Shape, ...]
    braces: bool = False


@dataclass(frozen=True, slots=True)
class Union_:
    """A union of sets."""

    parts: tuple[Shape, ...]


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain ``a < b <= c``: one operator fewer than sides. ``sides`` are clean spellings."""

    sides: tuple[str, ...]
    operators: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Named:
    """``name = value``, where the name is a symbol, a function of symbols, a ratio of names or such."""

    name: str
    value: Shape


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


Shape = Union[Words, Value, Group, Many, Union_, Relation, Named, Matrix, Clock]

_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_AND = re.compile(r"(?:,\s*)?(?:\\text\{\s*,?\s*(?:and|or)\s*,?\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-z]))")
_QUANTIFIER = re.compile(
    r"\\text\s*\{\s*for (?:all|every|each|any)\s*\}\s*[a-z](?:\s*,\s*[a-z])*\s*\\in\s*\\mathbb\s*(?:\{[A-Z]\}|[A-Z])(?:[_^]\{?[+*>0]+\}?)?"
)
_LABEL = re.compile(r"((?:\\text\{[^{}]*\}|[A-Z][A-Za-z]+(?: [A-Za-z]+){0,2}))\s*:\s*([^:]+)", re.DOTALL)
_GLUED_AND = re.compile(r"(?<=\w)[, ]\s*(and|or)\s*\}")
_LEADING_AND = re.compile(r"\\text\s*\{\s*(and|or)\s+(?=\w)")
_CONDITION = re.compile(
    r"[,;]?\s*\(?(?:(?:\\text\{\s*,?\s*)?(?:for|where|with)\s+(?:all|every|each|any|some|an|a|integer|integers|positive|real|any)\b.*"
    r"|\\text\{\s*,?\s*(?:for|where|with)\s*\}.*"
    r"|(?:where\s+)?(?<![A-Za-z\\])[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\\in\s*\\mathbb\s*\{?[ZNRQC]\}?(?:\^\{?[+*]\}?|_\{?[0-9+]+\}?)?\)?)$",
    re.DOTALL,
)
_RELATIONS = re.compile(
    r"\\leq(?![a-zA-Z])|\\geq(?![a-zA-Z])|\\neq(?![a-zA-Z])|\\approx(?![a-zA-Z])|<=|>=|!=|==|:=|[=<>]"
)
_OPERATORS = {"<=": r"\leq", ">=": r"\geq", "!=": r"\neq", "==": "=", ":=": "="}
_CUP = re.compile(r"\\cup(?![a-zA-Z])|(?<=[)\]}])\s*U\s*(?=[(\[\\])")
_SUCH_THAT = re.compile(r"\\mid(?![a-zA-Z])|\\vert|\||:")
_MATRIX = re.compile(
    r"(?:\\left)?[(\[]?\s*\\begin\{([pbB]?matrix|array|smallmatrix)\}(?:\{[^{}]*\})?((?:(?!\\end\{).)*)\\end\{\1\}\s*[)\]]?",
    re.DOTALL,
)
_BASE = re.compile(
    r"([0-9A-Fa-f][0-9A-Fa-f ,]*)_\s*(?:\{\s*(?:\\text\{)?\s*([0-9]{1,2}|two|three|four|five|six|seven|eight|nine|ten)\s*\}?\s*\}|([0-9]{1,2}))"
)
_BASES = ("two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_CLOCK = re.compile(
    r"([0-9]+(?:\.[0-9]+)?)\s*:\s*([0-9]+(?:\.[0-9]+)?)(?:\s*:\s*([0-9]+(?:\.[0-9]+)?))?\s*(?:\\text\{)?\s*([aApP]\.?\s?[mM]\.?)?\s*\}?"
)
_NAME = re.compile(
    r"(?:\\(?:angle|measuredangle|triangle|overline|operatorname|min|max|text|Delta)\s*)*"
    r"(?:\|?\s*(?:[A-Za-z]{1,4}|\\[a-zA-Z]+|\\text\{[^{}]*\})\s*\|?)(?:\s*_\s*(?:\{[^{}]*\}|[0-9a-zA-Z]|\\(?:min|max)))?'*"
    r"(?:\s*\^\s*\{?\\circ\}?)?(?:\(\s*[A-Za-z0-9, ]{1,12}\s*\))?"
)
_RATIO_NAME = re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}|([^/:]+)[/:]([^/:]+)")
_QUANTITY = re.compile(r"\s*\|?(?:\\angle\s*)?[A-Z]{1,3}(?:_\{?[0-9A-Za-z]+\}?)?\|?\s*")
_FUNCTIONS = frozenset(
    [
        "sin",
        "cos",
        "tan",
        "cot",
        "sec",
        "csc",
        "log",
        "ln",
        "lg",
        "exp",
        "sqrt",
        "frac",
        "arcsin",
        "arccos",
        "arctan",
        "sinh",
        "cosh",
        "tanh",
        "lim",
        "sum",
        "int",
        "prod",
        "pi",
        "infty",
        "pm",
        "mp",
        "cdot",
        "times",
        "div",
        "ldots",
        "dot",
        "ddot",
    ]
)
_ENGLISH_NUMBERS = {
    word: str(number)
    for number, word in enumerate(
        [
            "zero",
            "one",
            "two",
            "three",
            "four",
            "five",
            "six",
            "seven",
            "eight",
            "nine",
            "ten",
            "eleven",
            "twelve",
            "thirteen",
            "fourteen",
            "fifteen",
            "sixteen",
            "seventeen",
            "eighteen",
            "nineteen",
            "twenty",
        ]
    )
}
_COMMA_GROUPS = re.compile(r"[+-]?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_GROUPED_RUN = re.compile(r"(?<![0-9.,(\[{])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])")
_MONEY = re.compile(r"(\\?\$|€|£|¥|₹|\\text\{\s*(?:Rs\.?|USD|US\$)\s*\}|Rs\.?|USD|US\\?\$)")
_TRAILING_TEXT = re.compile(
    r"^(.*?[0-9a-zA-Z)}\]%!|.])\s*((?:\\text\{[^{}]*\}\s*(?:\^\s*(?:\{\s*-?[0-9]\s*\}|-?[0-9]))?\s*(?:/|\\cdot)?\s*)+)$",
    re.DOTALL,
)
_TRAILING_WORDS = re.compile(r"^(.*?[0-9}%)])\s*((?:[A-Za-z][A-Za-z.]*[ /-]?)+(?:\s*\^\s*\{?[23]\}?)?)$", re.DOTALL)
_NOT_A_UNIT = re.compile(
    r"\b(?:and|or|not|to|but|if|than|else|except|times|plus|minus|nor|is|are|was|were|be|isn|maybe|perhaps|possibly|either"
    r"|wrong|false|incorrect|impossible|less|more|fewer|greater|least|most|least|unless|instead|likely|unlikely|no|never"
    r"|mod|choose|which|who|when|where|because|since|so|then|i|it|we|you)\b|(?<![\^{-])[0-9]|(?:\S+\s+){5}",
    re.IGNORECASE,
)
_PERCENT = re.compile(
    r"\s*(?:\\?%|\\text\{\s*(?:%|percent|percentage|pct|per cent)\.?\s*\}|\s(?:percent|percentage|pct|per cent))$",
    re.IGNORECASE,
)
_GLUED_PERCENT = re.compile(r"(?<=[0-9}])\s*(?:percent|percentage|pct)$", re.IGNORECASE)
_DEGREE = re.compile(r"\s*(?:\^\{\\circ\}|\\text\{\s*(?:degrees|degree|deg)\.?\s*\}|\s(?:degrees|degree|deg))$")
_FUNCTION = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc|log|ln)(?![a-z])")
_SCALE = re.compile(r"(\^\{\\circ\})\s*(?:\\text\{\s*([CF])\s*\}|([CF]))$")


def read(answer: str) -> Shape:
    """The shape of an answer in any spelling."""
    return _read(clean(answer), 0)


def read_list(parts: tuple[str, ...]) -> Shape:
    """Several boxes: a list of their contents."""
    items: list[Shape] = []
    for part in parts:
        shape = read(part)
        items += shape.items if isinstance(shape, Many) and not shape.braces else [shape]
    return _many(items)


def _read(text: str, level: int) -> Shape:
    text = text.strip()
    if not text or level > 12:
        return Words(text)
    if (only := _TEXT.fullmatch(text)) is not None:
        return _words(only[1], level)
    text = _QUANTIFIER.sub(" ", text).strip()
    stripped = _CONDITION.sub("", text).rstrip(" ,;(")
    if stripped != text.rstrip(" ,;(") and re.search(r"[0-9a-zA-Z]", stripped):
        text = clean(stripped)
    if _COMMA_GROUPS.fullmatch(text):
        items = tuple(_read(part, level + 1) for part in text.split(","))
        return Value(text, read_number(text), grouped=items if level == 0 else ())
    several = _several(text, level)
    return several if several is not None else _single(text, level)


def _several(text: str, level: int) -> Shape | None:
    """A list at the top: cut at ``;``, then at commas, "and" and "or"."""
    head, sign, rest = text.partition("=")
    if sign and (names := _tuple_of_names(head.strip())) is not None:  # (x, y) = (1, 2) or (3, 4)
        value = _read(rest, level + 1)
        return _assigned(names, value)
    text = _GLUED_AND.sub(r"} \\text{\1} ", _LEADING_AND.sub(r" \\text{\1} \\text{", text))
    blocks = [part for part in split(text, ";") if part.strip()]
    if len(blocks) > 1:
        return _many([_read(part, level + 1) for part in blocks])
    pieces = split_at(text, _AND)
    if len(pieces) > 1 and all(piece.strip(" ,") for piece in pieces[0:1] + pieces[-1:]):
        pieces = pieces[::2]
    else:
        pieces = [text]
    if len(pieces) == 1 and not re.search(r"[0-9=\\(\[{<>]", text) and "," in text:
        return _many([_read(part, level + 1) for part in text.split(",") if part.strip()])
    items: list[str] = []
    for piece in pieces:
        items += _commas(piece)
    items = [item.strip() for item in items if item.strip()]
    if len(items) < 2:
        return None
    shapes = [_read(item, level + 1) for item in items[:MAX_ITEMS]]
    flat: list[Shape] = []
    for shape in shapes:
        flat += shape.items if isinstance(shape, Many) and not shape.braces else [shape]
    return _many(flat)


def _commas(text: str) -> list[str]:
    if re.fullmatch(r"[0-9]+,[0-9]+", text) and not _COMMA_GROUPS.fullmatch(text):
        return text.split(",")
    runs = list(_GROUPED_RUN.finditer(text))
    if len(runs) == 1 and runs[0][0].count(",") == text.count(","):
        return [text[: runs[0].start()] + runs[0][0].replace(",", "") + text[runs[0].end() :]]  # $3,140
    parts = split(text, ",")
    joined: list[str] = []
    for part in parts:
        # 1,234, 5 or 1,234 and 5: digits grouped in threes without a space stay one number
        tight = joined and re.search(r"(?:^|[^0-9.,])[0-9]{1,3}(?:,[0-9]{3})*$", joined[-1])
        spaced = any(re.match(r"\s", other) for other in parts[1:])
        if tight and spaced and re.match(r"[0-9]{3}(?![0-9])", part):
            joined[-1] += "," + part
        else:
            joined.append(part)
    return joined


def _many(items: list[Shape]) -> Shape:
    """A list; names that repeat (p=5, q=2; p=7, q=2) make it a list of tuples."""
    if len(items) == 1:
        return items[0]
    if all(isinstance(item, Many) and not item.braces for item in items):
        groups = [item.items for item in items if isinstance(item, Many)]
        if all(isinstance(part, Named) for group in groups for part in group):
            return Many(tuple(Group("(", ")", tuple(_unnamed(part) for part in group)) for group in groups))
    named = [item.name for item in items if isinstance(item, Named)]
    if len(named) == len(items) and len(set(named)) > 1 and len(set(named)) < len(named):
        width = len(set(named))
        if len(named) % width == 0 and all(named[i] == named[i % width] for i in range(len(named))):
            values = [_unnamed(item) for item in items]
            return Many(tuple(Group("(", ")", tuple(values[i : i + width])) for i in range(0, len(values), width)))
    first = items[0]
    if isinstance(first, Named) and not any(isinstance(item, Named) for item in items[1:]):
        items = [Named(first.name, first.value), *(Named(first.name, item) for item in items[1:])]  # x = 1, 2, 3
    flat: list[Shape] = []
    for item in items:
        inner = item.value if isinstance(item, Named) else item
        if isinstance(inner, Many) and not inner.braces:  # x = \pm 2
            flat += [Named(item.name, part) if isinstance(item, Named) else part for part in inner.items]
        else:
            flat.append(item)
    return Many(tuple(flat))


def _unnamed(shape: Shape) -> Shape:
    return shape.value if isinstance(shape, Named) else shape


def _single(text: str, level: int) -> Shape:
    if matrix := _MATRIX.fullmatch(text):
        rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr(?![a-z])", matrix[2]) if row.strip(" \\hline")]
        return Matrix(tuple(tuple(_read(clean(cell), level + 1) for cell in row.split("&")) for row in rows), text)
    if (shape := _bracketed(text, level)) is not None:
        return shape
    if (point := re.match(r"[A-Z]\s*(?=\()", text)) and closing(text, point.end()) == len(text) - 1:
        inside = _bracketed(text[point.end() :], level)
        if isinstance(inside, Group) and len(inside.items) > 1:
            return inside  # P(2, 3)
    if congruence := re.fullmatch(r"(.+?)\s*\\equiv\s*(.+?)\s*\\bmod\s*(\w+)", text):
        return Named(squeezed(congruence[1]) + f" mod {congruence[3]}", _read(congruence[2], level + 1))
    if label := _LABEL.fullmatch(text):
        return Named(label[1].strip().casefold(), _read(label[2], level + 1))
    parts = split_at(text, _CUP)
    if len(parts) > 1 and all(part.strip() for part in parts):
        return Union_(tuple(_read(part, level + 1) for part in parts[::2]))
    if (relation := _relation(text, level)) is not None:
        return relation
    if clock := _CLOCK.fullmatch(text):
        return Clock(
            tuple(part for part in clock.groups()[:3] if part), re.sub(r"[^apm]", "", (clock[4] or "").lower())
        )
    if re.search(r"\\(?:pm|mp)(?![a-zA-Z])", text):
        return _many([_read(re.sub(r"^\s*\+", "", _signed(text, sign)), level + 1) for sign in "+-"])
    return _value(text, level)


def _signed(text: str, sign: str) -> str:
    other = "-" if sign == "+" else "+"
    text = re.sub(r"\\pm(?![a-zA-Z])", sign, text)
    return re.sub(r"\\mp(?![a-zA-Z])", other, text)


def _bracketed(text: str, level: int) -> Shape | None:
    """Something that one pair of brackets surrounds: a set, a tuple, an interval, or one value in brackets."""
    first = 2 if text.startswith("\\{") else 1
    opening = text[:first]
    if opening not in ("\\{", "{", "(", "["):
        return None
    end = closing(text, first - 1)
    if end != len(text) - 1:
        return None
    ending = text[end]
    inner = text[first : end - (1 if text[end - 1 : end + 1] == "\\}" else 0)].strip()
    if opening in ("\\{", "{"):
        if ending != "}":
            return None
        return _set(inner, level) if opening == "\\{" or len(split(inner, ",;")) > 1 else _read(inner, level + 1)
    items = list(split(inner, ";" if len(split(inner, ";")) > 1 else ","))
    if len(items) > 1:
        items = items[:-1] if not items[-1].strip() else items
        shapes = tuple(_read(item, level + 1) for item in items[:MAX_ITEMS])
        return _combinations(Group(opening, ending, shapes))
    if opening == "(" and ending == ")":
        if re.fullmatch(r"[A-J]", inner):
            return Words(inner)
        return _read(inner, level + 1)
    return Group(opening, ending, (_read(inner, level + 1),)) if inner else None


def _combinations(group: Group) -> Shape:
    """A tuple with plus-minus in it: all the tuples that it stands for."""
    if not any(isinstance(item, Many) and not item.braces for item in group.items):
        return group
    tuples: list[tuple[Shape, ...]] = [()]
    for item in group.items:
        choices = item.items if isinstance(item, Many) and not item.braces else (item,)
        tuples = [(*head, choice) for head in tuples for choice in choices]
        if len(tuples) > MAX_ITEMS:
            return group
    return Many(tuple(Group(group.opening, group.ending, items) for items in tuples))


def _set(inner: str, level: int) -> Shape:
    if not inner:
        return Many((), braces=True)
    such_that = split_at(inner, _SUCH_THAT)
    if len(such_that) == 3 and re.fullmatch(
        r"\s*\(?[a-zA-Z, ]+\)?\s*(?:\\in\s*\\mathbb\s*\{?[RZNQ]\}?\s*)?", such_that[0]
    ):
        return _read(such_that[2], level + 1)
    items = [part for block in split(inner, ";") for part in split_at(block, _AND)[::2]]
    members: list[Shape] = []
    for item in [part for piece in items for part in split(piece, ",")][:MAX_ITEMS]:
        shape = _read(item, level + 1)
        members += shape.items if isinstance(shape, Many) and not shape.braces else [shape]
    return Many(tuple(members), braces=True)


def _relation(text: str, level: int) -> Shape | None:
    membership = re.fullmatch(r"(.{1,40}?)\s*\\in(?![a-zA-Z])\s*(.+)", text, re.DOTALL)
    if membership and _is_name(membership[1]):
        return _read(membership[2], level + 1)
    pieces = split_at(text, _RELATIONS)
    if len(pieces) == 1:
        return None
    sides = [piece.strip() for piece in pieces[::2]]
    operators = [_OPERATORS.get(piece.strip(), piece.strip()) for piece in pieces[1::2]]
    if not sides[0] and operators == ["="]:
        return _read(sides[1], level + 1)
    if any(not side for side in sides):
        return Words(text)
    if operators.count(r"\approx") == 1:
        at = operators.index(r"\approx")  # the exact part counts; only an approximation: that
        if at == 0 and not (_is_name(sides[0]) and len(sides) == 2):
            return _read(sides[0], level + 1)
        if at == 0:
            sides, operators = sides[:2], ["="]
        else:
            sides, operators = sides[: at + 1], operators[:at]
    if set(operators) == {"="}:
        if _is_name(sides[0]):
            if len(sides) > 2 and any(read_number(full_fractions(side)) for side in sides[1:-1]):
                return Named(
                    squeezed(sides[0]), Relation(tuple(map(full_fractions, sides[1:])), ("=",) * (len(sides) - 2))
                )
            return _named(sides[0], _read(sides[-1], level + 1))
    return Relation(tuple(full_fractions(side) for side in sides), tuple(operators))


def _assigned(names: list[str], value: Shape) -> Shape:
    """``(x, y) = (1, 2)``, or = one of several tuples."""
    if isinstance(value, Group) and len(value.items) == len(names):
        return Many(tuple(_named(name, item) for name, item in zip(names, value.items, strict=True)))
    return value


def _named(name: str, value: Shape) -> Shape:
    if isinstance(value, Many) and not value.braces:
        return Many(tuple(Named(squeezed(name), item) for item in value.items))
    return Named(squeezed(name), value)


def _tuple_of_names(text: str) -> list[str] | None:
    if not (text.startswith("(") and closing(text, 0) == len(text) - 1):
        return None
    names = [name.strip() for name in split(text[1:-1], ",")]
    return names if len(names) > 1 and all(_is_name(name) for name in names) else None


def _is_name(text: str) -> bool:
    text = text.strip()
    if _NAME.fullmatch(text):
        words = re.findall(r"[A-Za-z]+", _TEXT.sub("", re.sub(r"_\s*(?:\{[^{}]*\}|\S)", "", text)))
        return not any(word in _FUNCTIONS for word in words) and not re.fullmatch(r"\\(?:pi|infty)", text)
    if ratio := _RATIO_NAME.fullmatch(full_fractions(text)):
        return all(_QUANTITY.fullmatch(part) for part in ratio.groups() if part)
    return bool(re.fullmatch(r"\\text\{[^{}]*\}(?:\s*_?\s*\{?[a-zA-Z0-9]*\}?)?", text))


def _words(inner: str, level: int) -> Shape:
    """What stood in ``\\text{}``: a number or a list if it reads so, else words."""
    inner = inner.strip(" .")
    if re.search(r"[0-9]", inner):
        return _read(clean(inner), level + 1)
    if re.fullmatch(r"\(?[A-Z]\)?", inner):
        return Words(inner.strip("()"))
    return _read(inner, level + 1) if re.search(r",|\band\b|\bor\b", inner) else Words(inner)


def _value(text: str, level: int) -> Shape:
    if re.fullmatch(r"[A-Za-z][A-Za-z' .-]*", text):
        return Words(text)
    percent = degrees = False
    unit: Unit | None = None
    if (money := _MONEY.match(text)) or ((money := _MONEY.search(text)) and text.endswith(money[0])):
        rest = text[: money.start()] + text[money.end() :]
        if re.search(r"[0-9]", rest):
            text, unit = rest.strip(), read_unit(money[0])
    elif (signed := re.fullmatch(r"(-)\s*(\\?\$|€|£)\s*(.+)", text)) is not None:
        text, unit = signed[1] + signed[3], read_unit(signed[2])
    if scale := _SCALE.search(text):
        text, unit = text[: scale.start()], read_unit("°" + (scale[2] or scale[3]))
    elif (sign := _PERCENT.search(text) or _GLUED_PERCENT.search(text)) and text[: sign.start()].strip():
        text, percent = text[: sign.start()].strip(), True
    elif (sign := _DEGREE.search(text)) and text[: sign.start()].strip() and not _FUNCTION.search(text):
        text, degrees = text[: sign.start()].strip(), True
    elif (
        (trailing := _TRAILING_TEXT.match(text))
        and not trailing[1].rstrip().endswith(("_", "^"))
        and not _NOT_A_UNIT.search(trailing[2])
    ):
        text, found = trailing[1].strip(), read_unit(trailing[2])
        unit = unit if unit and found is None else found
        if sign := _DEGREE.search(text):
            text, degrees = text[: sign.start()].strip(), True
    elif (trailing := _TRAILING_WORDS.match(text)) and _is_unit_text(trailing[1].strip(), trailing[2], text):
        text, unit = trailing[1].strip(), read_unit(trailing[2])
    if base := _BASE.fullmatch(text):
        digits = re.sub(r"[ ,]", "", base[1])
        stated = base[2] or base[3]
        return Value(digits, None, base=_BASES.index(stated) + 2 if stated in _BASES else int(stated), unit=unit)
    text = full_fractions(text)
    if text.startswith("(") and closing(text, 0) == len(text) - 1 and (inner := read_number(text[1:-1].strip())):
        return Value(text[1:-1].strip(), inner, percent, degrees, unit)
    if r"\text" in text and not re.search(r"[0-9_]", text):
        return Words(_TEXT.sub(r" \1 ", text))
    return Value(text, read_number(text), percent, degrees, unit)


def english_number(word: str) -> str | None:
    """The digits of an English number up to twenty."""
    return _ENGLISH_NUMBERS.get(word)


def _is_unit_text(value: str, words: str, whole: str) -> bool:
    """Whether letters behind a value are a unit, and not factors: known units, or English words behind a number."""
    words = words.strip()
    if _NOT_A_UNIT.search(words):
        return False
    number = read_number(full_fractions(value)) is not None
    first = re.split(r"[ /^]", words)[0]
    if re.fullmatch(r"[A-Za-z]", words):
        return number and words in LETTERS and re.search(r"\s[A-Za-z]$", whole) is not None
    if re.fullmatch(r"m\s*\^\s*\{?[23]\}?", words):
        return number
    if first in _FUNCTIONS or words in _FUNCTIONS:
        return False
    if is_known(re.split(r"\s*\^|(?<=[a-z])[23]$", words)[0]) or is_known(first) or ("/" in words and number):
        return True
    return number and (len(first) >= 3 or first in ("sq", "cu"))
