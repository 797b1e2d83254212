"""Which tokens end a response for student and teacher, and what ``objective.end_token`` makes of a difference.

The teacher's own end token, which takes the place of the student's under ``map``, is the first of these that it has:
the one with which its chat template closes a turn of the assistant; its tokenizer's end token; the one of the lowest
id. Not covered: what the student learns to end with (its own end tokens, unless the teacher samples).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scope_opd.cli.checks import Finding
from scope_opd.cli.inputs import served_teacher_folder
from scope_opd.config import Config
from scope_opd.errors import ModelError
from scope_opd.models.places import resolve_path
from scope_opd.teacher.ends import EndTokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAID = "ANSWER"
"""What the assistant says in the turn that shows how a chat template ends one."""


def served_ends(config: Config, tokenizer: PreTrainedTokenizerBase | None) -> tuple[int, ...] | None:
    """The end tokens of a served teacher, as far as its tokenizer's folder tells; None where they are not known.

    Args:
        config: with ``teacher.served``.
        tokenizer: the teacher's.
    """
    if tokenizer is None:
        return None
    ids = set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}
    path = served_teacher_folder(config)
    if path is not None:
        ids.update(_declared(path))
    return tuple(sorted(ids)) or None


def own_end(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> int:
    """The one end token with which a teacher would have ended the response."""
    closing = _closes_a_turn(tokenizer, ends)
    if closing is not None:
        return closing
    return int(tokenizer.eos_token_id) if tokenizer.eos_token_id in ends else ends[0]


def judge_ends(
    config: Config,
    student: Sequence[int],
    teacher: Sequence[int] | None,
    tokenizer: PreTrainedTokenizerBase,
    theirs: PreTrainedTokenizerBase | None,
) -> tuple[Finding, EndTokens | None]:
    """How the end tokens stand to each other, and what the teacher needs to know of it (None: score them as any token).

    Args:
        config: ``objective.end_token`` and ``objective.distill`` count.
        student, teacher: the end tokens of each; None for a teacher whose are not known.
        tokenizer, theirs: of student and teacher, to name tokens and to choose the teacher's own.
    """
    rule, subject = config.objective.end_token, "end tokens"
    if teacher is None or theirs is None:
        found = f"the student ends with {_named(student, tokenizer)}; the served teacher's end tokens are not known"
        remedy = "set teacher.tokenizer to the teacher's folder"
        return Finding(subject, "warn" if rule == "score" else "FAIL", found, remedy), None
    alone = sorted(set(student) - set(teacher))
    if not alone:
        return Finding(subject, "ok", _named(student, tokenizer)), None
    own, named = own_end(theirs, teacher), _named(alone, tokenizer)
    found = f"the student ends with {_named(student, tokenizer)}, the teacher with {_named(teacher, theirs)}"
    if rule == "score":
        remedy = (
            f"the teacher scores {named} as any token: make sure that it knows it from prompts like yours, or set "
            "objective.end_token to 'map' or 'exclude'"
        )
        return Finding(subject, "warn", found, remedy), None
    if rule == "map" and config.objective.distill != "sampled":
        return Finding(
            subject, "FAIL",
            f"{found}; objective.end_token = 'map' with objective.distill = {config.objective.distill!r}",
            "use 'exclude' or 'score': a divergence compares whole distributions, in which no drawn token is replaced",
        ), None  # fmt: skip
    done = f"{named} is scored as {_named([own], theirs)}" if rule == "map" else f"the teacher does not judge {named}"
    finding = Finding(subject, "ok", f"{found}: {done} (objective.end_token = {rule!r})")
    return finding, EndTokens(rule, student, teacher, own)


def _named(ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    return ", ".join(f"{index} {tokenizer.convert_ids_to_tokens(index)!r}" for index in ids)


def _closes_a_turn(tokenizer: PreTrainedTokenizerBase, ends: Sequence[int]) -> int | None:
    """The first end token that the chat template writes behind what the assistant said."""
    if not tokenizer.chat_template:
        return None
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _SAID}]
    try:
        text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    except Exception:  # a template may refuse anything, in words of its own: then it says nothing here
        return None
    _, said, behind = text.rpartition(_SAID)
    if not said:
        return None
    ids = tokenizer(behind, add_special_tokens=False)["input_ids"]
    return next((index for index in ids if index in ends), None)


def _declared(path: str) -> list[int]:
    """eos_token_id of a folder's generation_config.json, else of its config.json."""
    with suppress(ModelError):
        for name in ("generation_config.json", "config.json"):
            declared = read_json(Path(resolve_path(path)) / name).get("eos_token_id")
            ids = [declared] if isinstance(declared, int) else declared
            if isinstance(ids, list) and ids and all(type(index) is int for index in ids):
                return ids
    return []


def read_json(path: Path) -> dict[str, Any]:
    """An object from a file; empty where there is none."""
    with suppress(OSError, ValueError):
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    return {}
