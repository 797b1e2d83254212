"""From a TOML file and dotted overrides to a ``Config``; every complaint is one ``ConfigError`` line."""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

from scope_opd.config.schema import Config
from scope_opd.errors import ConfigError
from scope_opd.words import counted

SHOWN = 120
"""Characters of a wrong value that an error shows."""
TABLE = "a table"
WORDS = {
    "bool_type": ("true or false", "true and false"),
    "int_type": ("an integer", "integers"),
    "int_from_float": ("an integer", "integers"),
    "int_parsing_size": ("a smaller integer", "smaller integers"),
    "float_type": ("a number", "numbers"),
    "finite_number": ("a finite number", "finite numbers"),
    "string_type": ("a string", "strings"),
    "list_type": ("a list", "lists"),
    "tuple_type": ("a list", "lists"),
    "dict_type": (TABLE, "tables"),
    "model_type": (TABLE, "tables"),
}
"""What pydantic misses, by its name of the complaint: of a value, of the elements of a list."""


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a TOML file, apply dotted overrides, validate.

    Args:
        path: the TOML file; None starts from the defaults.
        overrides: ``table.key=value`` strings; the value is read as TOML, and as a plain string where that fails.

    Raises:
        ConfigError: file missing, not UTF-8 or not TOML, unknown key, wrong type or value, rules between tables broken.
    """
    return validate_config(read_values(path, overrides))


def read_values(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The plain values of a TOML file and dotted overrides, as ``load_config`` takes them, not validated.

    Raises:
        ConfigError: the file is missing, not UTF-8 or not TOML, or an override has no name and value.
    """
    values: dict[str, Any] = {}
    if path is not None:
        source = Path(path).expanduser()
        try:
            values = tomllib.loads(source.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ConfigError(f"{source}: no such file", "a TOML config file", "check the path") from None
        except IsADirectoryError:
            raise ConfigError(f"{source} is a folder", "a TOML config file", "name the file itself") from None
        except OSError as error:
            raise ConfigError(f"{source}: {error.strerror}", "a readable file", "check its permissions") from None
        except UnicodeDecodeError as error:
            raise ConfigError(f"{source}: byte {error.start} is not UTF-8", "UTF-8 text", "re-save the file") from None
        except tomllib.TOMLDecodeError as error:
            raise ConfigError(f"{source}: {error}", "valid TOML", "mend that line") from None
        except (ValueError, RecursionError) as error:  # an integer of thousands of digits, thousands of brackets
            raise ConfigError(f"{source}: {error}", "TOML with plain values", "mend the file") from None
    for override in overrides:
        _apply_override(values, override)
    return values


def validate_config(values: dict[str, Any]) -> Config:
    """Turn nested plain values into a ``Config``; every pydantic complaint becomes one ``ConfigError`` line."""
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise _explain(error) from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    name, separator, text = override.partition("=")
    keys = name.strip().split(".")
    if not separator or len(keys) < 2 or not all(keys):
        raise ConfigError(f"--set {override}", "TABLE.KEY=VALUE", "for example --set objective.tau=0.5")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except ValueError:
        value = text
    except RecursionError as error:
        raise ConfigError(f"--set {name}: {error}", "TABLE.KEY=VALUE", "give a plain value") from None
    node = values
    for key in keys[:-1]:
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise ConfigError(f"--set {override}: {key} is not a table", "TABLE.KEY=VALUE", "check the name")
    node[keys[-1]] = value


def _explain(error: ValidationError) -> ConfigError:
    # A value that may be of several kinds gives a complaint a kind: together they are one.
    by_place: dict[tuple[str, ...], list[Any]] = {}
    for each in error.errors(include_url=False):
        by_place.setdefault(_place([str(part) for part in each["loc"]]), []).append(each)
    place, problems = next(iter(by_place.items()))
    problem, location = problems[0], list(place)
    name = ".".join(location)
    more = len(by_place) - 1
    also = f" ({more} more after this one)" if more else ""
    if problem["type"] == "extra_forbidden":
        known = list(_known_keys(location[:-1]))
        close = difflib.get_close_matches(location[-1], known, n=1, cutoff=0.0)
        kind = "key" if location[:-1] else "table"
        remedy = f"did you mean {'.'.join([*location[:-1], close[0]])}?" if close else "remove it"
        return ConfigError(f"unknown {kind} {name}", f"one of {', '.join(sorted(known))}", remedy + also)
    if problem["type"] == "value_error":
        return ConfigError(problem["msg"].removeprefix("Value error, ") + also)
    if problem["type"] == "missing":  # only an element of a list can be missing: every key has a default
        return ConfigError(
            f"{'.'.join(location[:-1])} = {_shown(problem['input'])}", "more elements", f"add them{also}"
        )
    wanted = [kind for each in problems for kind in _wanted(each, within=_is_element(each, place))]
    *others, last = dict.fromkeys(wanted)
    expected = f"{', '.join(others)} or {last}" if others else last
    remedy = f"set its keys under [{name}]" if expected == TABLE else f"change {name}"
    return ConfigError(f"{name} = {_shown(problem['input'])}", expected, remedy + also)


def _wanted(problem: Any, *, within: bool = False) -> list[str]:
    """What a value should have been, in a config's words: one or several, of which any would do.

    Args:
        problem: a complaint of pydantic's.
        within: it is about an element, and the list is what is shown.
    """
    kind, limits = problem["type"], problem.get("ctx", {})
    if kind == "literal_error":
        return re.split(r", | or ", limits["expected"])
    if kind in ("too_short", "too_long"):
        count = limits.get("min_length", limits.get("max_length"))
        return [f"a list of at {'least' if kind == 'too_short' else 'most'} {counted(count, 'element')}"]
    one, several = WORDS.get(kind, (problem["msg"].removeprefix("Input should be "),) * 2)
    if within:
        return [f"a list of {several}" if kind in WORDS else f"a list of elements that are {one}"]
    return ["true", "false"] if kind == "bool_type" else [one]


def _is_element(problem: Any, place: Sequence[str]) -> bool:
    """Whether it is about an element of the value at ``place``."""
    return len(problem["loc"]) > len(place) and isinstance(problem["loc"][-1], int)


def _shown(value: Any) -> str:
    """A value as it may stand in one line."""
    text = repr(list(value) if isinstance(value, tuple) else value)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} ... ({counted(len(text), 'character')})"


def _place(location: Sequence[str]) -> tuple[str, ...]:
    """A complaint's place without pydantic's name of the kind that it tried, where a value may be of several kinds."""
    model: type[BaseModel] = Config
    for depth, part in enumerate(location, start=1):
        if part not in model.model_fields:
            break
        annotation = model.model_fields[part].annotation
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            model = annotation
            continue
        kinds = [kind for kind in get_args(annotation) if kind is not type(None)]
        if get_origin(annotation) in (Union, UnionType) and len(kinds) > 1:
            return tuple(location[:depth])
        break
    return tuple(location)


def _known_keys(tables: Sequence[str]) -> Iterator[str]:
    model: type[BaseModel] = Config
    names = iter(tables)
    for table in names:
        annotation = model.model_fields[table].annotation
        if get_origin(annotation) is dict and next(names, None) is not None:  # tables under names of the user's choice
            annotation = get_args(annotation)[1]
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return
        model = annotation
    yield from model.model_fields
