"""The final student as a Hugging Face folder with its tokenizer and a model card.

A student with adapters is written with them merged, and they alone in the folder ``adapter``, in peft's layout.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor
from transformers.utils import logging

from scope_opd.config import Config
from scope_opd.errors import RunFailed
from scope_opd.models.adapters import adapted, plain_state_dict, save_adapter
from scope_opd.train.runfolder import replace_folder

ADAPTER = "adapter"
_SETTINGS = (
    "objective.method", "objective.preset", "objective.tau", "objective.student_weight", "objective.teacher_weight",
    "objective.scale", "objective.truncated", "objective.distill", "objective.temperature", "rollout.n",
    "rollout.temperature", "rollout.max_tokens", "train.steps", "train.prompts_per_step", "train.optimizer", "train.lr",
    "train.schedule", "train.weight_decay", "train.param_dtype", "run.seed",
)  # fmt: skip


def export_model(
    folder: Path,
    model: Any,
    tokenizer: Any,
    *,
    config: Config,
    steps: int,
    metrics: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
    weights: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write what ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer.from_pretrained`` load.

    Args:
        folder: replaced as a whole when the new one is complete.
        model: a transformers model.
        tokenizer: its tokenizer.
        config, steps, metrics, evaluations: for the card; the last metrics row and the rows of eval.jsonl.
        weights: of a model that is sharded, whole (``Learner.whole``); None: the model's own.

    Raises:
        RunFailed: it could not be written (a full disk ...).
    """
    writing = folder.with_name(f".writing-{folder.name}")
    try:
        shutil.rmtree(writing, ignore_errors=True)
        with _no_progress_bar():
            model.save_pretrained(writing, state_dict=plain_state_dict(model, weights))
        if adapted(model):
            save_adapter(model, writing / ADAPTER, config.model.path, weights)
        tokenizer.save_pretrained(writing)
        for file in writing.glob("**/*.safetensors"):  # written for the owner alone, unlike the rest
            shutil.copymode(writing / "config.json", file)
        card = model_card(config, steps, metrics, evaluations, adapter=adapted(model))
        (writing / "README.md").write_text(card, encoding="utf-8")
        replace_folder(writing, folder)
    except Exception as error:
        shutil.rmtree(writing, ignore_errors=True)
        # A fast tokenizer reports a full disk as a bare Exception; any other kind is a bug, not the disk.
        if type(error) is not Exception and not isinstance(error, (OSError, RuntimeError, SafetensorError)):
            raise
        raise RunFailed(
            f"export {folder} could not be written: {error}",
            "room for it on the disk",
            "mend that; the checkpoints are whole: scope train --resume, or scope export, writes it then",
        ) from error
    return folder


def model_card(
    config: Config,
    steps: int,
    metrics: Mapping[str, Any],
    evaluations: Sequence[Mapping[str, Any]],
    *,
    adapter: bool = False,
) -> str:
    """The card's Markdown: where the model comes from, its settings, and the figures it reached.

    Args:
        config, steps, metrics, evaluations: as for ``export_model``.
        adapter: whether the adapters are there by themselves too.
    """
    values = _flat(config)
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        "tags: [scope, on-policy-distillation]",
        "---",
        "",
        f"# Student after {steps} steps of `{config.objective.method}`",
        "",
        f"Trained with scope-opd from `{config.model.path}`, with `{config.teacher.shown}` as the teacher, on "
        f"`{config.data.train}`. Method: arXiv 2604.10688.",
        "",
        "## Settings",
        "",
        "| setting | value |",
        "|---|---|",
        *[f"| `{name}` | {values[name]} |" for name in _SETTINGS if values.get(name) is not None],
        "",
        "## Figures",
        "",
    ]
    if evaluations:
        lines += ["| after step | temperature | problems | n | avg@n | pass@k |", "|---|---|---|---|---|---|"]
        for row in evaluations:
            passes = row.get("pass@k")
            shown = ", ".join(f"{k}: {_figure(v)}" for k, v in passes.items()) if isinstance(passes, dict) else ""
            figures = [row.get("step"), row.get("temperature"), row.get("problems"), row.get("n"), row.get("avg@k")]
            lines.append("| " + " | ".join([*map(_figure, figures), shown]) + " |")
    else:
        lines.append("No held-out evaluation was run.")
    if config.model.lora.rank:
        lines += [
            "",
            f"Trained were low-rank adapters (rank {config.model.lora.rank}, alpha {config.model.lora.alpha:g}), "
            "which are merged into these weights" + (f"; `{ADAPTER}/` holds them alone, for peft." if adapter else "."),
        ]
    if metrics:
        lines += [
            "",
            f"On the last training batch (its rollouts, not held out): accuracy {_figure(metrics.get('accuracy'))}, "
            f"entropy {_figure(metrics.get('entropy'))}.",
        ]
    return "\n".join(lines) + "\n"


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    """The run has a display of its own."""
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _figure(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _flat(config: Config) -> dict[str, Any]:
    return {
        f"{table}.{key}": value for table, values in config.model_dump(mode="json").items()
        for key, value in values.items()
    }  # fmt: skip
