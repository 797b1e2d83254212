"""What a config names besides weights: rows, prompts, verifier, method, tokenizers. All of it is cheap to look at.

Not covered: weights (``engines``), whether the parts fit together (``checks``).
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from scope_opd.cli.early import ZOO
from scope_opd.cli.names import nearest
from scope_opd.config import Config
from scope_opd.data.dataset import DataSet, read_dataset, skip_lines
from scope_opd.data.prompts import render_prompts
from scope_opd.data.rows import Columns, Row, Skipped, check_rows
from scope_opd.errors import ConfigError
from scope_opd.models.loading import context_length, load_tokenizer
from scope_opd.models.places import resolve_path
from scope_opd.objective.methods import Method, build_method, method_names
from scope_opd.types import Prompt, Verifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN_PROMPT = 300
"""Characters of a prompt that a terminal is shown."""


def load_data(config: Config, source: str, split: str, revision: str | None = None) -> DataSet:
    """The zoo, a file or a hub data set, checked as ``[data]`` says.

    Args:
        config: names the columns, and says what becomes of bad rows.
        source: ``zoo``, a file or ``hf:OWNER/NAME?..``.
        split: "train", of which ``data.max_rows`` are looked at, or "heldout".
        revision: of a hub data set, in place of what its branch stands for today.
    """
    data = config.data
    max_rows = data.max_rows if split == "train" else None
    if source == ZOO:
        from scope_opd.zoo.task import load_rows as load_zoo

        rows = load_zoo("train" if split == "train" else "heldout")
        numbered = ((f"row {number}", row) for number, row in enumerate(rows, start=1))
        return DataSet(ZOO, check_rows(numbered, source=f"zoo ({split})", max_rows=max_rows))
    return read_dataset(
        source,
        Columns(data.problem_column, data.answer_column, data.id_column),
        revision=revision,
        max_rows=max_rows,
        on_bad_row=data.on_bad_row,
        fix_double_braces=data.fix_double_braces,
    )


def build_verifier(config: Config, prompts: Iterable[Prompt] = ()) -> tuple[Verifier, Callable[[str], str] | None]:
    """The verifier, and what makes two correct solutions "the same" (None: not counted).

    Args:
        config: names it.
        prompts: what will be judged, so that what cannot be is known now.

    Raises:
        ScopeError: ``[verify]`` is wrong, an answer does not fit the verifier, or code has nothing to run in.
    """
    name = config.data.verifier
    if name == "zoo" or (name == "auto" and config.data.train == ZOO):
        from scope_opd.zoo.task import distinct_key
        from scope_opd.zoo.verifier import RunningSumVerifier

        return RunningSumVerifier(), distinct_key
    if name == "boxed":
        from scope_opd.verify.boxed import BoxedVerifier

        return BoxedVerifier(), None
    from scope_opd.verify.answers import build_answer_verifier

    verifier = build_answer_verifier(config.verify, name)
    verifier.prepare(prompts)
    return verifier, None


def build_configured_method(config: Config) -> Method:
    """The method with its settings, after importing ``objective.plugins``.

    Raises:
        ConfigError: a plug-in that cannot be imported, an unknown method, settings that it refuses, or that refuse it.
    """
    objective = config.objective
    for plugin in objective.plugins:
        if os.getcwd() not in sys.path:
            sys.path.append(os.getcwd())  # behind all else: a file here must not stand in for an installed module
        try:
            importlib.import_module(plugin)
        except ImportError as error:
            raise ConfigError(
                f"objective.plugins has {plugin!r}: {error}", "an importable module", "check the name and where you are"
            ) from None
        except (Exception, SystemExit) as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise ConfigError(
                f"objective.plugins has {plugin!r}, which fails: {reason}", "an importable module", "mend it"
            ) from error
    if objective.method not in method_names():
        raise ConfigError(f"objective.method = {objective.method!r}", nearest(objective.method, method_names()))
    try:
        method = build_method(objective.method, objective.model_dump(), **objective.method_settings)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"objective: {error}", remedy="change [objective]") from None
    if config.rollout.n < method.smallest_group:
        raise ConfigError(
            f"rollout.n = {config.rollout.n} with objective.method = {objective.method!r}",
            f"n >= {method.smallest_group}, since it compares the rollouts of a group",
            "raise rollout.n",
        )
    if objective.distill != "sampled" and not (method.needs_teacher(True) or method.needs_teacher(False)):
        raise ConfigError(
            f"objective.distill = {objective.distill!r} with objective.method = {objective.method!r}",
            "a method that distils",
            "use 'sampled', or scope, dual_path, opd or reward_opd",
        )
    return method


def needs_teacher(config: Config, method: Method) -> bool:
    """Whether a run loads the teacher at all."""
    return method.sampled_by == "teacher" or method.needs_teacher(True) or method.needs_teacher(False)


def student_tokenizer(config: Config) -> PreTrainedTokenizerBase:
    """The student's tokenizer: that of its folder, or ``model.tokenizer``."""
    model = config.model
    path = model.tokenizer or model.path
    return load_tokenizer(path, revision=model.revision, trust_remote_code=model.trust_remote_code)


def teacher_tokenizer(config: Config) -> PreTrainedTokenizerBase | None:
    """The teacher's tokenizer: ``teacher.tokenizer``, else that of its folder; None where servers leave it unknown."""
    teacher = config.teacher
    path = served_teacher_folder(config) if teacher.served else teacher.tokenizer or teacher.path
    if path is None:
        return None
    return load_tokenizer(path, revision=teacher.revision, trust_remote_code=teacher.trust_remote_code)


def served_teacher_folder(config: Config) -> str | None:
    """Where to read of a served teacher: ``teacher.tokenizer``, else ``teacher.path`` where that was chosen."""
    teacher = config.teacher
    return teacher.tokenizer or (teacher.path if teacher.path != type(teacher)().path else None)


def model_config(path: str, revision: str | None = None, trust_remote_code: bool = False) -> Any:
    """A model's config without its weights; None where it cannot be read, which loading explains better."""
    from transformers import AutoConfig

    with suppress(OSError, ValueError, KeyError):
        return AutoConfig.from_pretrained(resolve_path(path), revision=revision, trust_remote_code=trust_remote_code)
    return None


def contexts(config: Config, with_teacher: bool) -> dict[str, int | None]:
    """Context lengths by name, as far as the configs state them."""
    named: dict[str, Any] = {"student": config.model}
    if with_teacher:
        named["teacher"] = config.teacher
    lengths = {}
    for name, table in named.items():
        found = model_config(table.path, table.revision, table.trust_remote_code)
        lengths[name] = None if found is None else context_length(found)
    return lengths


def render(
    config: Config,
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    limits: dict[str, int | None],
    *,
    max_tokens: int,
    warnings: list[str] | None = None,
) -> list[Prompt]:
    """Rows as prompts, with the config's chat settings and limits.

    With ``data.on_bad_row = "skip"`` rows that make no fitting prompt are left out, and a line in ``warnings`` says so.
    """
    skipped: list[Skipped] = []
    prompts = render_prompts(
        rows,
        tokenizer,
        config.chat,
        max_prompt_tokens=config.data.max_prompt_tokens,
        max_tokens=max_tokens,
        contexts=limits,
        skipped=skipped if config.data.on_bad_row == "skip" else None,
    )
    if warnings is not None:
        warnings += skip_lines("prompts", skipped, len(rows))
        own = sum(bool(row.messages) and row.messages[0]["role"] == "system" for row in rows)
        if own and config.chat.system is not None:
            warnings.append(f"chat.system: {own} of {len(rows)} rows have a system message of their own, which stays")
    return prompts


def shown_prompt(text: str) -> str:
    """A prompt on one line; of a long one both ends, where template and suffix stand."""
    cut = SHOWN_PROMPT // 2
    return repr(text if len(text) <= SHOWN_PROMPT else f"{text[:cut]} ... {text[-cut:]}")


def eval_max_tokens(config: Config) -> int:
    """Response tokens in evaluation; training's where ``[eval]`` names none."""
    return config.eval.max_tokens or config.rollout.max_tokens
