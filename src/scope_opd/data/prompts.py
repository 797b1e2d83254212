"""Prompts from rows (chat template, tokens, length checks), and the schedule that deals them out to steps.

Rendering is the same for training and evaluation. Text and ids belong together: a chat template's output is tokenised
without further special tokens, since a template writes its own; a bare problem gets whatever the tokenizer puts in
front (never an end token behind).

A row with messages is rendered as it is, ``chat.suffix`` behind its last turn. Its own system message stays;
``chat.system`` is for rows that have none. With ``chat.template = "none"`` a single user message is used as text.

Not covered: few-shot examples, tool definitions, images, prompts cut to length (too long is a bad row).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scope_opd.config import ChatConfig
from scope_opd.data.messages import conversation
from scope_opd.data.rows import Row, Skipped
from scope_opd.errors import ConfigError, DataError, ModelError
from scope_opd.types import Prompt
from scope_opd.words import counted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BARE = "none"
"""``chat.template`` for the bare problem text."""


def render_prompts(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    chat: ChatConfig,
    *,
    max_prompt_tokens: int,
    max_tokens: int = 0,
    contexts: Mapping[str, int | None] | None = None,
    skipped: list[Skipped] | None = None,
) -> list[Prompt]:
    """Render and tokenise every row.

    Args:
        rows: checked rows.
        tokenizer: the student's.
        chat: template, its arguments, system message and suffix.
        max_prompt_tokens: longest prompt allowed.
        max_tokens: response tokens that must fit behind the prompt.
        contexts: context length in tokens by model name ("student"); None where a model states none.
        skipped: where given, rows that make no fitting prompt are listed here and left out.

    Returns:
        One ``Prompt`` a row, in order, less those that were skipped.

    Raises:
        DataError: a prompt that is empty, too long, or leaves no room for ``max_tokens``, or messages that the
            template refuses, naming the row; every row was skipped.
        ConfigError: ``chat`` asks for what the template cannot do.
        ModelError: the tokenizer has no chat template and none is given.
    """
    render = _renderer(tokenizer, chat)
    texts, sound = [], []
    for row in rows:
        try:
            texts.append(render(row))
        except DataError as error:
            _skip(row, error, skipped)
            continue
        sound.append(row)
    ids = _tokenise(texts, tokenizer, bare=chat.template == BARE)
    limits = {name: length for name, length in (contexts or {}).items() if length is not None}
    prompts = []
    for row, text, token_ids in zip(sound, texts, ids, strict=True):
        try:
            _check_length(row, len(token_ids), max_prompt_tokens, max_tokens, limits)
        except DataError as error:
            _skip(row, error, skipped)
            continue
        prompts.append(Prompt(row.id, row.problem, row.answer, tuple(token_ids), text, row.fields))
    if rows and not prompts:
        assert skipped
        raise DataError(
            f"no prompt from {counted(len(rows), 'row')}; the first, {skipped[-len(rows)].where}: "
            f"{skipped[-len(rows)].reason}", "at least one", "check [chat] and data.max_prompt_tokens",
        )  # fmt: skip
    return prompts


def _skip(row: Row, error: DataError, skipped: list[Skipped] | None) -> None:
    if skipped is None:
        raise error
    skipped.append(Skipped.of(f"{row.where} (id {row.id!r})", error))


def _check_length(row: Row, tokens: int, max_prompt_tokens: int, max_tokens: int, limits: Mapping[str, int]) -> None:
    where = f"{row.where} (id {row.id!r})"
    if not tokens:
        raise DataError(f"{where}: an empty prompt", "at least one token", "check the template")
    if tokens > max_prompt_tokens:
        raise DataError(
            f"{where}: a prompt of {tokens} tokens",
            f"at most data.max_prompt_tokens = {max_prompt_tokens}",
            "raise it, drop the row, or set data.on_bad_row",
        )
    for name, limit in limits.items():
        if tokens + max_tokens > limit:
            raise DataError(
                f"{where}: a prompt of {tokens} tokens and max_tokens = {max_tokens}",
                f"together at most {limit}, the context of the {name}",
                "lower rollout.max_tokens (or eval.max_tokens), or drop the row",
            )


class PromptSchedule:
    """Which prompts a step gets: a function of (seed, step) alone, so that a resumed run needs no state.

    Shuffled: every epoch is a fresh permutation drawn from (seed, epoch) and cut into whole batches; the few rows left
    over at its end wait for another epoch, so that no step holds a prompt twice. In order: batches run on through the
    rows and wrap around.

    Args:
        prompts: all prompts of the data set.
        prompts_per_step: size of a batch.
        seed: the run's seed.
        shuffle: False takes the rows in order.

    Raises:
        DataError: fewer prompts than a batch.
    """

    def __init__(
        self, prompts: Sequence[Prompt], prompts_per_step: int, *, seed: int = 0, shuffle: bool = True
    ) -> None:
        if len(prompts) < prompts_per_step:
            raise DataError(
                f"{counted(len(prompts), 'row')} in data.train",
                f"at least train.prompts_per_step = {prompts_per_step}",
                "add rows or lower train.prompts_per_step",
            )
        self.prompts = list(prompts)
        self.prompts_per_step = prompts_per_step
        self.seed = seed
        self.shuffle = shuffle
        self._epoch: int | None = None
        self._order: list[int] = []

    @property
    def steps_per_epoch(self) -> int:
        """Whole batches in the data set."""
        return len(self.prompts) // self.prompts_per_step

    def batch(self, step: int) -> list[Prompt]:
        """The prompts of a step, counted from 0, all different.

        Raises:
            ValueError: a negative step.
        """
        if step < 0:
            raise ValueError(f"step {step}; expected a step >= 0")
        size = self.prompts_per_step
        if not self.shuffle:
            start = step * size
            return [self.prompts[index % len(self.prompts)] for index in range(start, start + size)]
        epoch, position = divmod(step, self.steps_per_epoch)
        if epoch != self._epoch:
            self._order = list(range(len(self.prompts)))
            random.Random(f"prompts/{self.seed}/{epoch}").shuffle(self._order)
            self._epoch = epoch
        return [self.prompts[index] for index in self._order[position * size : (position + 1) * size]]


def _renderer(tokenizer: PreTrainedTokenizerBase, chat: ChatConfig) -> Callable[[Row], str]:
    """What turns a row into a prompt's text; the settings are checked here, once."""
    if chat.template == BARE:
        for name in ("system", "kwargs"):
            if getattr(chat, name):
                raise ConfigError(
                    f"chat.{name} is set and chat.template = {BARE!r}",
                    "a template that has a place for it",
                    f"remove chat.{name} or name a template",
                )
        return lambda row: _bare_text(row) + chat.suffix
    template = read_template(chat)
    if template is None and not tokenizer.chat_template:
        raise ModelError(
            "the student's tokenizer has no chat template",
            "one, or a choice in [chat]",
            f"set chat.template to {BARE!r} (the bare problem) or to the path of a Jinja file",
        )
    for name in ("tokenize", "add_generation_prompt", "chat_template", "return_dict", "return_tensors"):
        if name in chat.kwargs:
            raise ConfigError(f"chat.kwargs.{name} is set", "arguments of the template itself", "remove it")

    def render(row: Row) -> str:
        messages = conversation(row.messages or ({"role": "user", "content": row.problem},), chat.system, chat.suffix)
        try:
            text = tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True, **chat.kwargs
            )
        except Exception as error:
            raise _template_error(error, row, chat) from error
        return str(text)

    return render


def _bare_text(row: Row) -> str:
    if len(row.messages) > 1:
        raise DataError(
            f"{row.where} (id {row.id!r}): {len(row.messages)} messages and chat.template = {BARE!r}",
            "a single user message", "name a template, or drop the row",
        )  # fmt: skip
    return row.problem


def read_template(chat: ChatConfig) -> str | None:
    """The Jinja text to render with; None means the tokenizer's own, or no template at all.

    Raises:
        ConfigError: a file that cannot be read, or is empty.
    """
    if chat.template is None or chat.template == BARE:
        return None
    try:
        text = Path(chat.template).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise ConfigError(
            f"chat.template = {chat.template!r}: {reason}", f"a Jinja file or {BARE!r}", "check the path"
        ) from None
    if not text.strip():
        raise ConfigError(f"chat.template = {chat.template!r} is empty", f"a Jinja file or {BARE!r}", "fill it in")
    return text


def _template_error(error: Exception, row: Row, chat: ChatConfig) -> Exception:
    """Errors that the template raises are the user's; any other is a bug and keeps its traceback."""
    import jinja2

    if not isinstance(error, jinja2.TemplateError | TypeError):
        return error
    reason = " ".join(str(error).split())
    remedy = "remove chat.system if the template knows no system role" if chat.system else "mend chat.template"
    if len(row.messages) > 1:  # a conversation may be one that the template refuses while it takes others
        return DataError(f"{row.where} (id {row.id!r}): the chat template fails: {reason}", "a prompt", remedy)
    return ConfigError(f"the chat template fails on {row.where} (id {row.id!r}): {reason}", "a prompt", remedy)


def _tokenise(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, *, bare: bool) -> list[list[int]]:
    if not texts:
        return []
    # verbose=False: lengths are checked against the model's context, not warned about
    encoded = tokenizer(list(texts), add_special_tokens=bare, return_attention_mask=False, verbose=False)
    ids: list[list[int]] = encoded["input_ids"]
    if bare:
        ids = [_trim(token_ids, tokenizer) for token_ids in ids]
    return ids


def _trim(ids: list[int], tokenizer: Any) -> list[int]:
    """Undo what a tokenizer adds and generation cannot use: an end token behind, a begin token that comes twice."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if eos is not None and eos != bos and ids and ids[-1] == eos:
        ids = ids[:-1]
    if bos is not None and ids[:2] == [bos, bos]:
        ids = ids[1:]
    return ids
