"""Plain data: the only things that cross between a sandbox and its parent, and how they are written.

Runs on both sides, and inside a sandbox its import is paid once a program: standard library alone, as little as can be.

Not covered: objects other than plain data. A function that returns a generator, an instance of a class or a numpy array
fails its test.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

try:  # the C halves of json: the module itself costs as much start-up as the whole interpreter
    from _json import encode_basestring_ascii, make_scanner
except ImportError:  # pragma: no cover - not CPython
    from json.encoder import encode_basestring_ascii
    from json.scanner import make_scanner  # type: ignore[no-redef,attr-defined,unused-ignore]

if TYPE_CHECKING:
    from typing import Any, NoReturn

MAX_DEPTH = 60
"""Nesting of a value at most: deeper ones are refused rather than risk the stack of whoever reads them."""
MAX_DIGITS = 40
"""Characters of a number in a frame at most; longer whole numbers travel in hexadecimal, read in linear time."""
MAX_MESSAGE = 300
"""Characters of an error message at most."""


class NotPlainError(Exception):
    """A value that may not cross a pipe, or a frame that is not one of ours."""


class ForeignTypeError(NotPlainError):
    """A value, or a part of one, of a type that is not plain data."""


def encode(value: Any, depth: int = 0) -> str:
    """Plain data as JSON text. What JSON lacks is an object of one tagged member: ``{"t": [1, 2]}`` is a tuple.

    Subclasses (``defaultdict``, a named tuple, an ``IntEnum``) cross as what they subclass.

    Raises:
        NotPlainError: another type (``ForeignTypeError``), or nesting beyond ``MAX_DEPTH``.
    """
    if value is None:
        return "null"
    if value is True:
        return "true"
    if value is False:
        return "false"
    if depth > MAX_DEPTH:
        raise NotPlainError(f"a value nested more than {MAX_DEPTH} deep")
    if isinstance(value, str):
        return encode_basestring_ascii(str.__str__(value))
    if isinstance(value, int):
        number = int.__index__(value)
        return int.__repr__(number) if -(1 << 63) <= number < 1 << 63 else f'{{"i": "{number:x}"}}'
    if isinstance(value, float):
        text = float.__repr__(value)
        return f'{{"f": "{text}"}}' if text in ("nan", "inf", "-inf") else text
    if isinstance(value, list):
        return _sequence(value, depth)
    if isinstance(value, tuple):
        return f'{{"t": {_sequence(value, depth)}}}'
    if isinstance(value, dict):
        pairs = [f"[{encode(key, depth + 1)}, {encode(item, depth + 1)}]" for key, item in dict.items(value)]
        return f'{{"d": [{", ".join(pairs)}]}}'
    if isinstance(value, frozenset):
        return f'{{"z": {_sequence(value, depth)}}}'
    if isinstance(value, set):
        return f'{{"s": {_sequence(value, depth)}}}'
    if isinstance(value, complex):
        return f'{{"c": [{encode(value.real)}, {encode(value.imag)}]}}'
    if isinstance(value, bytes):
        return f'{{"b": "{bytes.hex(value)}"}}'
    raise ForeignTypeError(f"a value of type {type(value).__name__}")


def _sequence(values: Any, depth: int) -> str:
    return f"[{', '.join([encode(item, depth + 1) for item in values])}]"


def _short_int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise NotPlainError("a number of too many digits")
    return int(text)


def _short_float(text: str) -> float:
    if len(text) > MAX_DIGITS:
        raise NotPlainError("a number of too many digits")
    return float(text)


def _no_constant(text: str) -> NoReturn:
    raise NotPlainError(f"{text} in a frame")


class _Scanner:
    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_int = staticmethod(_short_int)
    parse_float = staticmethod(_short_float)
    parse_constant = staticmethod(_no_constant)
    memo: dict[str, str] = {}  # noqa: RUF012 - read by json's pure Python scanner alone


_scan = make_scanner(_Scanner())  # type: ignore[arg-type,unused-ignore]


def read_json(payload: bytes) -> Any:
    """The JSON tree of a payload, tags unread: lists, objects, texts, short numbers.

    Raises:
        NotPlainError: not such a tree.
    """
    try:
        text = payload.decode("ascii")
        tree, end = _scan(text, 0)
    except NotPlainError:
        raise
    except (ValueError, StopIteration, RecursionError):
        raise NotPlainError("a frame that is not JSON") from None
    if end != len(text):
        raise NotPlainError("a frame that is not JSON")
    return tree


def decode(tree: Any, depth: int = 0) -> Any:
    """The value that ``encode`` wrote, from its JSON tree; only built-in types come out.

    Raises:
        NotPlainError: an unknown tag, a key that cannot be hashed, nesting beyond ``MAX_DEPTH``.
    """
    if depth > MAX_DEPTH:
        raise NotPlainError(f"a value nested more than {MAX_DEPTH} deep")
    if isinstance(tree, list):
        return [decode(item, depth + 1) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if len(tree) != 1:
        raise NotPlainError("an object that is no tagged value")
    ((tag, body),) = tree.items()
    try:
        if tag == "i":
            return int(body, 16)
        if tag == "f":
            return float(body) if body in ("nan", "inf", "-inf") else _no_constant(body)
        if tag == "b":
            return bytes.fromhex(body)
        if tag == "c":
            real, imaginary = (decode(part) for part in body)
            return complex(real, imaginary)
        if tag == "d":
            return {decode(key, depth + 1): decode(item, depth + 1) for key, item in body}
        if tag in ("t", "s", "z"):
            return {"t": tuple, "s": set, "z": frozenset}[tag]([decode(item, depth + 1) for item in body])
    except (ValueError, TypeError):
        raise NotPlainError(f"a broken value with the tag {tag!r}") from None
    raise NotPlainError(f"an unknown tag {tag!r}")


def message_of(error: BaseException) -> list[str]:
    """``[type, message]`` of an exception, short, whatever its ``__str__`` does."""
    try:
        text = str(error)
    except BaseException:
        text = ""
    line = _line_of(error)
    where = f" (line {line})" if line else ""
    return [str(type(error).__name__)[:80], " ".join(text[: MAX_MESSAGE * 2].split())[:MAX_MESSAGE] + where]


def _line_of(error: BaseException) -> int | None:
    """The line of the innermost frame that belongs to foreign code."""
    line, trace = None, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename in ("<solution>", "<tests>"):
            line = trace.tb_lineno
        trace = trace.tb_next
    return line
