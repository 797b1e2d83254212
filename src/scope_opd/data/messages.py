"""Chat messages as a data set holds them: checked when they are read, laid out when they are rendered.

A conversation is a list of ``{"role", "content"}`` with texts; other keys are left aside. It may begin with one system
message, then come user and assistant turns, and it ends with a user turn, which is the problem: the student writes
the next turn. A conversation that ends with an assistant turn holds an answer, and training on it from there would be
another thing (a prefill): it is refused.

Not covered: content that is a list of parts (images), tool calls and tool results, prefilled answers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scope_opd.errors import DataError

ROLES = ("system", "user", "assistant")
Messages = tuple[Mapping[str, str], ...]


def is_conversation(value: Any) -> bool:
    """Whether a problem column holds messages rather than a text."""
    return isinstance(value, list | tuple) and all(isinstance(item, Mapping) for item in value)


def check_messages(value: Sequence[Mapping[str, Any]], name: str, where: str) -> Messages:
    """A conversation that a student can answer.

    Raises:
        DataError: an unknown role, content that is no text, a system message that is not the first, a last turn that
            is not the user's.
    """
    messages = []
    for number, message in enumerate(value, start=1):
        role, content = message.get("role"), message.get("content")
        place = f"{where}: message {number} of {name}"
        if role not in ROLES:
            raise DataError(f"{place} has the role {role!r}", f"one of {', '.join(ROLES)}", "rename or drop the row")
        if not isinstance(content, str):
            raise DataError(
                f"{place} has content of the kind {type(content).__name__}", "a text", "convert or drop the row"
            )
        if role == "system" and number > 1:
            raise DataError(f"{place} is a system message", "it first, if at all", "move it or drop the row")
        messages.append({"role": role, "content": content})
    if not messages:
        raise DataError(f"{where}: {name} has no messages", "at least the user's", "drop the row or fill it in")
    if messages[-1]["role"] != "user":
        raise DataError(
            f"{where}: {name} ends with a turn of the role {messages[-1]['role']!r}",
            "the user's turn last, which the student answers", "remove what follows it",
        )  # fmt: skip
    if not messages[-1]["content"].strip():
        raise DataError(f"{where}: the last message of {name} is empty", "a problem", "drop the row or fill it in")
    return tuple(messages)


def conversation(messages: Messages, system: str | None, suffix: str) -> list[dict[str, str]]:
    """What a chat template is given: the row's own system message stays, ``system`` is for rows without one."""
    laid_out = [dict(message) for message in messages]
    laid_out[-1]["content"] += suffix
    if system is not None and laid_out[0]["role"] != "system":
        laid_out.insert(0, {"role": "system", "content": system})
    return laid_out
