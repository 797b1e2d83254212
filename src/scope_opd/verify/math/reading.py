r"""Read the structure of an answer: lists, tuples, sets, intervals, unions, relations, matrices.

``read`` turns any spelling into one of the ``shapes``. Reading never evaluates anything.

Not covered: nested quantifiers, ``cases`` with conditions, prose.
"""

from __future__ import annotations

import itertools
import re
from dataclasses import replace
from fractions import Fraction

from scope_opd.verify.math.conditions import integers_between, without_condition
from scope_opd.verify.math.names import is_name, set_name, tuple_of_names
from scope_opd.verify.math.numbers import Number, read_number
from scope_opd.verify.math.reading_values import read_value
from scope_opd.verify.math.shapes import Clock, Group, Many, Matrix, Named, Relation, Shape, Unite, Value, Words
from scope_opd.verify.math.text import clean, closing, full_fractions, split, split_at, squeezed

MAX_ITEMS = 200
"""Items of a list that are read."""

_TEXT = re.compile(r"\\text\s*\{([^{}]*)\}")
_AND = re.compile(r"(?:,\s*)?(?:\\text\{\s*,?\s*(?:and|or)\s*,?\s*\}|(?<![a-zA-Z\\])(?:and|or)(?![a-z]))")
_STATED = re.compile(r"\\text\s*\{([^{}]*(?:\b(?:is|are|equals|be)|:))\s*\}\s*(.+)", re.DOTALL)
_NOT_STATED = re.compile(
    r"\b(?:not|or|either|maybe|perhaps|possibly|might|could|may|than|except|but|never)\b|n't|\?", re.IGNORECASE
)
_SYSTEM = re.compile(
    r"(?:\\\{)?\s*\\begin\{(cases|aligned|array|gathered)\}(?:\{[lcr|]\})?((?:(?!\\begin|\\end).)*)\\end\{\1\}",
    re.DOTALL,
)
_LABEL = re.compile(r"((?:\\text\{[^{}]*\}|[A-Z][A-Za-z]+(?: [A-Za-z]+){0,2}))\s*:\s*([^:]+)", re.DOTALL)
_GLUED_AND = re.compile(r"(?<=\w)[, ]\s*(and|or)\s*\}")
_LEADING_AND = re.compile(r"\\text\s*\{\s*(and|or)\s+(?=\w)")
_RELATIONS = re.compile(
    r"\\leq(?![a-zA-Z])|\\geq(?![a-zA-Z])|\\neq(?![a-zA-Z])|\\approx(?![a-zA-Z])|<=|>=|!=|==|:=|[=<>]"
)
_OPERATORS = {"<=": r"\leq", ">=": r"\geq", "!=": r"\neq", "==": "=", ":=": "="}
_CUP = re.compile(r"\\cup(?![a-zA-Z])|(?<=[)\]}])\s*U\s*(?=[(\[\\])")
_OPERATIONS = {
    "union": _CUP,
    "intersection": re.compile(r"\\cap(?![a-zA-Z])"),
    "difference": re.compile(r"\\setminus(?![a-zA-Z])|\\backslash(?![a-zA-Z])"),
}
_SUCH_THAT = re.compile(r"\\mid(?![a-zA-Z])|\\vert|\||:")
_CASES = re.compile(r"(?:\\\{)?\s*\\begin\{cases\}((?:(?!\\begin|\\end).)*)\\end\{cases\}", re.DOTALL)
_IF = re.compile(r"^\s*\\text\s*\{\s*(?:if|when|for|where)\s*\}\s*|^(?:if|when|for)\s+")
_MATRIX = re.compile(
    r"(?:\\left)?[(\[]?\s*\\begin\{([pbB]?matrix|array|smallmatrix)\}(?:\{[^{}]*\})?((?:(?!\\end\{).)*)\\end\{\1\}\s*[)\]]?",
    re.DOTALL,
)
_EITHER = re.compile(r"\\(?:pm|mp)(?![a-zA-Z])")
_ARC = re.compile(
    r"([0-9]+)\s*\^\{\\circ\}\s*([0-9]+)\s*(?:'|\^\s*\{?\\prime\}?)(?:\s*([0-9]+)\s*(?:''|\^\s*\{\\prime\s*\\prime\}))?"
)
_TERM = re.compile(r"[0-9.]+(?:\s*/\s*[0-9.]+)?|[0-9.]*\s*\\(?:sqrt|frac|pi)(?![a-z])[^=<>,]*")
_CLOCK = re.compile(
    r"([0-9]+(?:\.[0-9]+)?)\s*:\s*([0-9]+(?:\.[0-9]+)?)(?:\s*:\s*([0-9]+(?:\.[0-9]+)?))?\s*(?:\\text\{)?\s*([aApP]\.?\s?[mM]\.?)?\s*\}?"
)
_TWO_UNITS = re.compile(
    r"([0-9.]+\s*(?:\\text\{[^{}]*\}|[a-z]+))\s*((?:\\text\{\s*and\s*\}|and)?\s*[0-9.]+\s*(?:\\text\{[^{}]*\}|[a-z]+))"
)
_COMMA_GROUPS = re.compile(r"[+-]?[1-9][0-9]{0,2}(?:,[0-9]{3})+(?:\.[0-9]+)?")
_GROUPED_RUN = re.compile(r"(?<![0-9.,(\[{])[1-9][0-9]{0,2}(?:,[0-9]{3})+(?![0-9,])")


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
    if (stated := _STATED.fullmatch(text)) and not _NOT_STATED.search(stated[1]):
        return _read(clean(stated[2]), level + 1)
    if (system := _SYSTEM.fullmatch(text)) and "&" not in system[2] and r"\text" not in system[2]:
        lines = [line for line in re.split(r"\\\\(?:\[[^\]]*\])?", system[2]) if line.strip(" \\,;.")]
        return _many([_read(clean(line), level + 1) for line in lines])
    if re.match(r"(?:yes|no|true|false)\s*[,.;:]\s*[a-z]", text, re.IGNORECASE):
        return Words(text)
    if re.fullmatch(r"(?:all|any)\s+real(?:s|\s+numbers?)", text, re.IGNORECASE):
        return Value(r"\mathbb{R}")
    if (integers := integers_between(text)) is not None:
        return Many(tuple(Value(str(number), read_number(str(number))) for number in integers), braces=True)
    text, constant = without_condition(text)
    if constant and isinstance(shape := _read(text, level + 1), Named):
        return replace(shape, constant=constant)
    if _COMMA_GROUPS.fullmatch(text):
        items = tuple(_read(part, level + 1) for part in text.split(","))
        return Value(text, read_number(text), grouped=items if level == 0 else ())
    several = _several(text, level)
    return several if several is not None else _single(text, level)


def _several(text: str, level: int) -> Shape | None:
    """A list at the top: cut at ``;``, then at commas, "and" and "or"."""
    head, sign, rest = text.partition("=")
    if sign and (names := tuple_of_names(head.strip())) is not None:  # (x, y) = (1, 2) or (3, 4)
        again = re.compile(r"(?<=[\s,}])" + r"\s*".join(map(re.escape, re.findall(r"\w+|\S", head))) + r"\s*=\s*")
        return _assigned(names, _read(again.sub("", rest), level + 1))
    text = _GLUED_AND.sub(r"} \\text{\1} ", _LEADING_AND.sub(r" \\text{\1} \\text{", text))
    blocks = [part for part in split(text, ";") if part.strip()]
    if len(blocks) > 1:
        return _many([_read(part, level + 1) for part in blocks])
    pieces = split_at(text, _AND)
    if len(pieces) > 1 and all(piece.strip(" ,") for piece in pieces[0:1] + pieces[-1:]):
        joints, pieces = pieces[1::2], pieces[::2]
    else:
        joints, pieces = [], [text]
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
    listed = _many(flat)
    words = {"and" if "and" in joint else "or" for joint in joints}
    if isinstance(listed, Many) and len(words) == 1 and len(joints) == len(items) - 1:
        return replace(listed, joint=words.pop())
    return listed


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
    if isinstance(first, Named) and not any(isinstance(item, Named | Relation) for item in items[1:]):
        items = [Named(first.name, first.value), *(Named(first.name, item) for item in items[1:])]  # x = 1, 2, 3
    if (total := _compound(items)) is not None:
        return total
    flat: list[Shape] = []
    for item in items:
        inner = item.value if isinstance(item, Named) else item
        if isinstance(inner, Many) and not inner.braces:  # x = \pm 2
            flat += [Named(item.name, part) if isinstance(item, Named) else part for part in inner.items]
        else:
            flat.append(item)
    return Many(tuple(flat))


def _compound(items: list[Shape]) -> Value | None:
    """2 hours and 30 minutes: one quantity in falling units of one kind."""
    pairs = [
        (item.number.value, item.unit)
        for item in items
        if isinstance(item, Value) and item.number and item.unit and item.unit.kind
    ]
    if len(pairs) != len(items) or len({unit.kind for _, unit in pairs}) != 1 or any(value < 0 for value, _ in pairs):
        return None
    factors = [unit.factor for _, unit in pairs]
    if any(larger <= smaller for larger, smaller in itertools.pairwise(factors)):
        return None
    total = sum((value * unit.factor for value, unit in pairs), Fraction(0)) / factors[0]
    return Value(str(total), Number(total), unit=pairs[0][1])


def _unnamed(shape: Shape) -> Shape:
    return shape.value if isinstance(shape, Named) else shape


def _single(text: str, level: int) -> Shape:
    if matrix := _MATRIX.fullmatch(text):
        rows = [row for row in re.split(r"\\\\(?:\[[^\]]*\])?|\\cr(?![a-z])", matrix[2]) if row.strip(" \\hline")]
        return Matrix(tuple(tuple(_read(clean(cell), level + 1) for cell in row.split("&")) for row in rows), text)
    if piecewise := _CASES.fullmatch(text):
        rows = [row.split("&") for row in re.split(r"\\\\(?:\[[^\]]*\])?", piecewise[1]) if row.strip(" \\,;.")]
        if all(len(row) == 2 for row in rows):
            cells = [(clean(row[0]), _IF.sub("", clean(row[1]))) for row in rows]
            return Many(tuple(Group("case", "case", tuple(_read(c, level + 1) for c in row)) for row in cells), True)
    if (shape := _bracketed(text, level)) is not None:
        return shape
    if (point := re.match(r"[A-Z](?:_\{?\w\}?|')?\s*(?=\()", text)) and closing(text, point.end()) == len(text) - 1:
        inside = _bracketed(text[point.end() :], level)
        if isinstance(inside, Group) and len(inside.items) > 1:
            return inside  # P(2, 3)
    if congruence := re.fullmatch(r"(.+?)\s*\\equiv\s*(.+?)\s*\\bmod\s*(\w+)", text):
        return Named(squeezed(congruence[1]) + f" mod {congruence[3]}", _read(congruence[2], level + 1))
    if (both := _TWO_UNITS.fullmatch(text)) and (
        total := _compound([_read(part, level + 1) for part in both.groups()])
    ):
        return total  # 3 hours 20 minutes
    if residue := re.fullmatch(r"([0-9]+)\s*(?:\\bmod|mod)\s*([0-9]+)", text):
        return Named(f"mod {residue[2]}", _read(residue[1], level + 1))  # 7 (mod 12)
    if label := _LABEL.fullmatch(text):
        return Named(label[1].strip().casefold(), _read(label[2], level + 1))
    if (curve := re.fullmatch(r"[a-zA-Z]\s*:\s*([^:]*[xy][^:]*=[^:]+)", text)) is not None:
        return _read(curve[1], level + 1)  # l: x + y = 3
    if name := set_name(text):
        return Named(squeezed(name), _read(text[text.index("=") + 1 :], level + 1))
    for operation, sign in _OPERATIONS.items():
        parts = split_at(text, sign)
        if len(parts) > 1 and all(part.strip() for part in parts):
            return Unite(tuple(_read(part, level + 1) for part in parts[::2]), operation)
    if (relation := _relation(text, level)) is not None:
        return relation
    if arc := _ARC.fullmatch(text):
        degrees, minutes, seconds = (Fraction(part) for part in arc.groups(default="0"))
        angle = degrees + minutes / 60 + seconds / 3600
        return Value(str(angle), Number(angle), degrees=True)
    terms = [term.strip() for term in split(text, ":")]
    if len(terms) in (2, 3) and ("\\" in text or "/" in text) and all(_TERM.fullmatch(term) for term in terms):
        return Clock(tuple(full_fractions(term) for term in terms))
    if clock := _CLOCK.fullmatch(text):
        return Clock(
            tuple(part for part in clock.groups()[:3] if part), re.sub(r"[^apm]", "", (clock[4] or "").lower())
        )
    if _EITHER.search(text):
        return _many([_read(re.sub(r"^\s*\+", "", _signed(text, sign)), level + 1) for sign in "+-"])
    return read_value(text)


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
        built = len(split_at(inner, _SUCH_THAT)) == 3 and re.search(r"[<>=]|\\(?:leq|geq|neq|in)", inner)
        is_set = opening == "\\{" or built or len(split(inner, ",;")) > 1
        return _set(inner, level) if is_set else _read(inner, level + 1)
    items = list(split(inner, ";" if len(split(inner, ";")) > 1 else ","))
    if len(items) > 1:
        if r"\mp" in inner and r"\pm" in inner:  # upper signs together, lower signs together
            return _many([_read(_signed(text, sign), level + 1) for sign in "+-"])
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
    if len(such_that) == 3 and re.search(r"\\mathbb\s*\{?[ZNQ]", such_that[0]):
        integers = integers_between(f"{such_that[2]}, {such_that[0]}")
        if integers is None:
            return Words(squeezed(inner))
        return Many(tuple(Value(str(number), read_number(str(number))) for number in integers), braces=True)
    if len(such_that) == 3 and re.fullmatch(r"\s*\(?[a-zA-Z, ]+\)?\s*(?:\\in\s*\\mathbb\s*\{?R\}?\s*)?", such_that[0]):
        return _read(such_that[2], level + 1)
    items = [part for block in split(inner, ";") for part in split_at(block, _AND)[::2]]
    members: list[Shape] = []
    for item in [part for piece in items for part in split(piece, ",")][:MAX_ITEMS]:
        shape = _read(item, level + 1)
        members += shape.items if isinstance(shape, Many) and not shape.braces else [shape]
    return Many(tuple(members), braces=True)


def _relation(text: str, level: int) -> Shape | None:
    membership = re.fullmatch(r"(.{1,40}?)\s*\\in(?![a-zA-Z])\s*(.+)", text, re.DOTALL)
    if membership and (is_name(membership[1]) or tuple_of_names(membership[1].strip())):
        return _read(membership[2], level + 1)
    pieces = split_at(text, _RELATIONS)
    if len(pieces) == 1:
        return None
    sides = [piece.strip() for piece in pieces[::2]]
    operators = [_OPERATORS.get(piece.strip(), piece.strip()) for piece in pieces[1::2]]
    if not sides[0] and operators == ["="]:
        return _read(sides[1], level + 1)
    if not sides[0] and len(operators) == 1 and operators[0] != r"\approx":
        sides[0] = r"\square"
    if any(not side for side in sides):
        return Words(text)
    if operators == [r"\approx"] and is_name(sides[0]):
        operators = ["="]  # x is about 11: the only value there is
    if set(operators) == {"="}:
        if len(sides) == 2 and is_name(sides[1]) and not is_name(sides[0]):
            sides = sides[::-1]
        if is_name(sides[0]):
            if len(sides) > 2 and any(read_number(full_fractions(side)) for side in sides[1:-1]):
                return Named(
                    squeezed(sides[0]), Relation(tuple(map(full_fractions, sides[1:])), ("=",) * (len(sides) - 2))
                )
            return _named(sides[0], _read(sides[-1], level + 1))
    if any(_EITHER.search(side) for side in sides):
        return _many([_read(_signed(text, sign), level + 1) for sign in "+-"])
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


def _words(inner: str, level: int) -> Shape:
    """What stood in ``\\text{}``: a number or a list if it reads so, else words."""
    inner = inner.strip(" .")
    if re.search(r"[0-9]", inner):
        return _read(clean(inner), level + 1)
    if re.fullmatch(r"\(?[A-Z]\)?", inner):
        return Words(inner.strip("()"))
    return _read(inner, level + 1) if re.search(r",|\band\b|\bor\b|\breal\b", inner) else Words(inner)
