"""Whether student and teacher would write the same prompt: chat templates and tokenizers, rendered on both sides.

The teacher scores responses behind the student's prompts, token by token as the student has them. Where its own
template writes another prompt it judges text that it was not trained on. Not covered: whether that matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from scope_opd.cli.checks import Finding
from scope_opd.config import Config
from scope_opd.data.prompts import render_prompts
from scope_opd.data.rows import Row
from scope_opd.errors import ScopeError
from scope_opd.types import Prompt
from scope_opd.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

RENDERED = 8
"""Rows that are rendered for both."""
_AROUND = 24
"""Characters shown before and after the first difference."""


def compare_prompts(
    config: Config, rows: Sequence[Row], student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> Finding:
    """The first rows as prompts of both; a warning shows the first difference.

    Args:
        config: ``[chat]`` counts, for both.
        rows: of ``data.train``.
        student, teacher: tokenizers, with their chat templates.
    """
    subject = "chat template"
    remedy = (
        "the teacher scores responses behind the student's prompts: make sure that it knows such prompts, or write its "
        "template's with chat.template and chat.kwargs"
    )
    if config.chat.template is None and not teacher.chat_template:
        return Finding(subject, "warn", "the teacher's tokenizer has none; the student's writes the prompts", remedy)
    try:
        ours, theirs = (
            render_prompts(rows[:RENDERED], each, config.chat, max_prompt_tokens=1 << 40) for each in (student, teacher)
        )
    except ScopeError as error:
        return Finding(subject, "warn", f"cannot be compared: {error.found}", remedy)
    for one, other in zip(ours, theirs, strict=True):
        if one.token_ids != other.token_ids:
            return Finding(subject, "warn", _difference(one, other), remedy)
    return Finding(subject, "ok", f"{counted(len(ours), 'prompt')} rendered on both sides, the same ids")


def _difference(one: Prompt, other: Prompt) -> str:
    if one.text == other.text:
        return (
            f"prompt {one.id!r} is the same text and other ids: {len(one.token_ids)} tokens to the student, "
            f"{len(other.token_ids)} to the teacher"
        )
    place = next(
        (at for at, (a, b) in enumerate(zip(one.text, other.text, strict=False)) if a != b),
        min(len(one.text), len(other.text)),
    )
    start = max(0, place - _AROUND)
    ours, theirs = (repr(text[start : place + _AROUND]) for text in (one.text, other.text))
    return f"prompt {one.id!r} differs from character {place} on: {ours} by the student's, {theirs} by the teacher's"
