"""The training loop, on one page: prompts, rollouts, credit, batch, update, evaluation, log, checkpoint.

The trainer never learns which method ran and never imports an engine: all it gets is ``Engines``. (Skeleton: the
signatures are final, the body is not there yet.)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from scope_opd.config import Config
from scope_opd.train.step import SurrogateSettings
from scope_opd.types import Prompt, Rollout, SamplingParams


class Collector(Protocol):
    """``pipeline.Pipeline``: complete, judged and scored groups, ordered by (prompt, sample), and the stages' times."""

    def collect(self, prompts: Sequence[Prompt], params: SamplingParams, *, step: int, policy_version: int) -> Any: ...


class PromptSchedule(Protocol):
    """Which prompts step 0, 1, 2 ... draws: a function of the step alone."""

    def batch(self, step: int) -> list[Prompt]: ...


class TokenFunction(Protocol):
    """Something computed for every predicted token of a right-padded batch, without gradient.

    Args:
        input_ids, attention_mask: I[B, L].
        positions: (rows I[T], columns I[T]) of the hidden states that predict the T tokens.

    Returns:
        F[T, V] (``teacher_logits``, its temperature already applied), or F[T], the log-probs of the tokens that stand
        at ``columns + 1`` (``reference``, at the objective's student temperature).
    """

    def __call__(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, positions: tuple[torch.Tensor, torch.Tensor]
    ) -> torch.Tensor: ...


# (step, policy_version) -> the rows for eval.jsonl, one a temperature; plain or ``async``.
Evaluator = Callable[[int, int], Any]


@dataclass(slots=True)
class Engines:
    """Everything that the trainer is handed.

    Attributes:
        model: the student, the same module that the sampler decodes with; on its device, in its final dtype
            (``train.param_dtype``).
        tokenizer: the student's, for token strings in dumps and for the export.
        pipeline: anything with ``pipeline.Pipeline.collect``.
        credit: writes ``reinforce``, ``distill``, ``masked``, ``mask_reason`` on all rollouts of a step, e.g.
            ``partial(assign_credit, method=..., truncated=..., reward_threshold=...)``.
        schedule: prompts of each step.
        sampling: how responses are drawn; log-probs are compared at its temperature.
        surrogate: aggregation, clips, temperatures, see ``SurrogateSettings``.
        teacher_logits: the in-process teacher's full rows, for ``distill = "full_kl"``.
        reference: log-probs of a frozen reference, for ``reference_kl`` > 0.
        evaluator: called with (step, policy_version) where ``[eval]`` says so; returns rows for eval.jsonl (each gets
            "step" if it has none). May be a coroutine function.
        weights_use_tau: whether the method weights rollouts by perplexity ** (1 / tau): only then does the alarm
            ``uniform_weights`` ("tau does nothing here") mean anything.
    """

    model: torch.nn.Module
    tokenizer: Any
    pipeline: Collector
    credit: Callable[[Sequence[Rollout]], Any]
    schedule: PromptSchedule
    sampling: SamplingParams
    surrogate: SurrogateSettings
    teacher_logits: TokenFunction | None = None
    reference: TokenFunction | None = None
    evaluator: Evaluator | None = None
    weights_use_tau: bool = False


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a finished run leaves.

    Attributes:
        folder: the run folder.
        steps: optimiser steps behind the final weights, those of earlier sittings included.
        metrics: the last row of metrics.jsonl (empty when no step was taken).
        evaluations: the rows of eval.jsonl.
        checkpoint: the newest checkpoint.
        export: the Hugging Face folder, None where ``run.export = false``.
    """

    folder: Path
    steps: int
    metrics: Mapping[str, Any]
    evaluations: Sequence[Mapping[str, Any]]
    checkpoint: Path | None
    export: Path | None


def train(config: Config, engines: Engines, *, resume: bool = False, progress: bool | None = None) -> TrainResult:
    """Run ``config.train.steps`` optimiser steps and leave a run folder at ``config.run.dir``.

    Args:
        config: the resolved config; of it the trainer reads ``train``, ``run``, ``eval.every/at_start/at_end`` and
            ``objective`` names for the record only.
        engines: see ``Engines``.
        resume: continue from the newest sound checkpoint of the run folder (from the beginning when it has none).
            Without it a run folder that is not empty is refused.
        progress: True a live display, False plain lines, None live on a terminal and plain lines elsewhere.

    Raises:
        RunFolderError: the folder is occupied, not writable, or belongs to another config.
        RunFailed: an alarm set to "stop", a full disk (exit code 1); state was saved where possible.
        RunInterrupted: SIGINT or SIGTERM; saved at the last completed step (exit code 130 or 143).
    """
    raise NotImplementedError
