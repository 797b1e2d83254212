"""The options of ``scope eval`` and ``scope verify`` as a checked config, and errors in the words of those options.

The config's own tables do the checking, so that defaults and limits are those of training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from scope_opd.errors import ConfigError, ScopeError

if TYPE_CHECKING:
    from scope_opd.config import Config, VerifyConfig

MAX_ROWS = 64
"""Sequences decoded at once unless --max-rows says otherwise."""
PAPER = {"n": 32, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_tokens": 32768}
"""How the method's paper evaluates."""
PAPER_PENALTY = {"qwen3-1.7b-base": 1.08}
"""Its repetition penalty, by the last part of a model's name; no other model has one."""

OPTIONS = {
    "eval.temperatures.0": "--temperature",
    "eval.temperatures": "--temperature",
    "eval.n": "--n",
    "eval.top_p": "--top-p",
    "eval.top_k": "--top-k",
    "eval.repetition_penalty": "--repetition-penalty",
    "eval.max_tokens": "--max-tokens",
    "eval.problems": "--problems",
    "rollout.max_rows": "--max-rows",
    "rollout.max_tokens": "--max-tokens",
    "run.seed": "--seed",
    "chat.template": "--template",
    "chat.system": "--system",
    "chat.kwargs": "--chat",
    "chat.suffix": "--suffix",
    "chat.stop_token_ids": "--stop-token-id",
    "train.device": "--device",
    "model.tokenizer": "--tokenizer",
    "model.attn_implementation": "--attn",
    "model.revision": "--revision",
    "verify.scope": "--scope",
    "verify.tolerance": "--tolerance",
    "verify.timeout_s": "--timeout-s",
    "verify.code_timeout_s": "--code-timeout-s",
    "verify.workers": "--workers",
    "verify.allow_unsandboxed": "--allow-unsandboxed",
}
"""Config names and the options that set them here."""
_NAMES = re.compile("|".join(re.escape(name) for name in sorted(OPTIONS, key=len, reverse=True)))
_IN_A_CONFIG = re.compile(r" \(verify\.\w+ = \w+\)")
"""What a message says for the writers of configs beside the option."""


@contextmanager
def in_options() -> Iterator[None]:
    """Lets errors speak of this command's options where they would name settings of a config."""
    try:
        yield
    except ScopeError as error:
        parts = [_NAMES.sub(lambda match: OPTIONS[match[0]], _IN_A_CONFIG.sub("", part)) for part in _parts(error)]
        raise type(error)(*parts) from error.__cause__


def _parts(error: ScopeError) -> tuple[str, str, str]:
    return error.found, error.expected, error.remedy


def typed_tolerance(text: str | None) -> float | str | None:
    """A tolerance as typed: "0.01" is a number, "1%" a share that the verifier reads."""
    if text is None:
        return None
    try:
        return float(text)
    except ValueError:
        return text


def sampling_options(preset: str | None, model: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The preset's values for this model, with what was given in their place.

    Args:
        preset: "paper" or None.
        model: its path or hub id, which decides the preset's repetition penalty.
        given: options by name; None is not given.
    """
    found: dict[str, Any] = {}
    if preset == "paper":
        penalty = PAPER_PENALTY.get(model.rstrip("/").rsplit("/", 1)[-1].lower(), 1.0)
        found = {**PAPER, "repetition_penalty": penalty}
    return {**found, **{name: value for name, value in given.items() if value is not None}}


def chat_kwargs(entries: Iterable[str]) -> dict[str, Any]:
    """``["enable_thinking=false"]`` -> ``{"enable_thinking": False}``: values are JSON where they can be.

    Raises:
        ConfigError: no name, or no value.
    """
    found: dict[str, Any] = {}
    for entry in entries:
        name, separator, text = entry.partition("=")
        if not separator or not name:
            raise ConfigError(f"--chat {entry}", "NAME=VALUE", "for example --chat enable_thinking=false")
        try:
            found[name] = json.loads(text)
        except ValueError:
            found[name] = text
    return found


def build_config(
    model: str, revision: str | None, sampling: Mapping[str, Any], chat: Mapping[str, Any], **tables: Mapping[str, Any]
) -> Config:
    """A config from options; ``None`` leaves a default.

    Raises:
        ConfigError: a value out of range, in the words of the options.
    """
    from scope_opd.config import validate_config

    eval_table = {name: value for name, value in sampling.items() if name not in ("temperature", "seed")}
    if "temperature" in sampling:
        eval_table["temperatures"] = [sampling["temperature"]]
    values: dict[str, Any] = {
        "model": {"path": model, "revision": revision},
        "eval": eval_table,
        "chat": chat,
        "run": {"seed": sampling.get("seed")},
        **tables,
    }
    with in_options():
        return validate_config(
            {name: {k: v for k, v in table.items() if v is not None} for name, table in values.items()}
        )


def verify_options(settings: VerifyConfig) -> dict[str, Any]:
    """What a verdict depends on besides the answer, as it is recorded: ``[verify]`` and the versions of the rules."""
    from importlib.metadata import version

    from scope_opd import __version__

    rules = {"scope_opd": __version__, "math_verify": version("math-verify")}
    return {**settings.model_dump(mode="json", exclude={"workers"}), "rules": rules}
