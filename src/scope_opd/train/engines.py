"""What the trainer is handed: engines as Protocols and callables, never as classes of ours. No arithmetic here."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import Tensor
from transformers import PreTrainedModel

from scope_opd.models.rows import Rows as TokenRows
from scope_opd.objective.methods import Aggregation
from scope_opd.pipeline import Collected, GroupsHook, NoteHook, PhaseHook, ProgressHook, Timeline
from scope_opd.ranks import Ranks
from scope_opd.types import Prompt, Rollout, SamplingParams, WeightPublisher

Rows = Sequence[Mapping[str, Any]]


class Collector(Protocol):
    """``pipeline.Pipeline``: complete, judged and scored groups, ordered by (prompt, sample), and the stages' times.

    The trainer adds its own stages to ``timeline``, and calls ``close`` (perhaps twice) when a run ends, however.
    """

    timeline: Timeline

    def collect(
        self,
        prompts: Sequence[Prompt],
        params: SamplingParams,
        *,
        step: int,
        policy_version: int,
        on_phase: PhaseHook | None = None,
        on_progress: ProgressHook | None = None,
        on_groups: GroupsHook | None = None,
        on_note: NoteHook | None = None,
    ) -> Collected: ...

    def close(self) -> None: ...


class PromptSchedule(Protocol):
    """Which prompts step 0, 1, 2 ... draws: a function of the step alone."""

    def batch(self, step: int) -> list[Prompt]: ...


class TokenFunction(Protocol):
    """Something computed without gradient for response tokens.

    Args:
        rows: prompt + response sequences, packed or padded, on the student's device.
        positions: I[T, 2] of (row, column) of the predicted tokens.
    """

    def __call__(self, rows: TokenRows, positions: Tensor) -> Tensor: ...


class TeacherHead(Protocol):
    """An in-process teacher whose distributions are wanted, a chunk of tokens at a time.

    Computes without gradient and in the teacher's own dtype: it is called outside the student's autocast.
    ``vocabulary``: the size of its logit vectors.
    """

    @property
    def vocabulary(self) -> int: ...

    def response_hidden(self, rows: TokenRows, positions: Tensor) -> Tensor:
        """[T, H] at the places that predict the tokens at ``positions``; arguments as for ``TokenFunction``."""
        ...

    def project(self, hidden: Tensor) -> Tensor:
        """Logits / temperature, [c, V], of some of those hidden states."""
        ...

    def top(self, hidden: Tensor, k: int, excluded: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """The k likeliest ids [c, k], their log-probs and the log-mass of all others [c]; see ``HeadView.top``."""
        ...


# (step, policy_version) -> the rows for eval.jsonl, one a temperature; a plain or a coroutine function.
Evaluator = Callable[[int, int], Rows | Awaitable[Rows]]


@dataclass(frozen=True, slots=True)
class SurrogateSettings:
    """What the update needs to know of the objective; whoever builds the engines takes it from config and method.

    Attributes:
        aggregation: "prompt" | "token" | "sequence" | "released", see ``objective.aggregate``.
        clip: PPO clip of rho (None: none).
        dual_clip: bound of the surrogate where the advantage is negative (None: none).
        correction_cap: C of c = min(pi_old / mu, C).
        sampling_temperature: the temperature that sampled; c compares the trainer with the sampler there.
        student_temperature: the temperature of the student's log-probs in the objective: the sampling temperature for
            the conventions ``matched`` and ``released``, 1 for ``raw``.
        sampled_by: "student", or "teacher" (kd): then c = 1 and rho = 1 in value.
        distill: the distillation term: "sampled", or a divergence (``distillation``). "full_kl" and "jsd" need
            ``Engines.teacher_head``; the others use it where it is there, and else ``Rollout.teacher_topk``.
        topk: ids of the teacher's that the top-k kinds look at.
        reference_kl: coefficient of the k3 estimate of KL(student || reference); > 0 needs ``Engines.reference``.
        common_vocabulary: the ids that mean the same to student and teacher; a divergence is over those of them that
            both heads have, both sides renormalised. None: all ids of the smaller head.
    """

    aggregation: Aggregation = "prompt"
    clip: float | None = None
    dual_clip: float | None = None
    correction_cap: float = 2.0
    sampling_temperature: float = 1.0
    student_temperature: float = 1.0
    sampled_by: Literal["student", "teacher"] = "student"
    distill: Literal["sampled", "topk_reverse_kl", "topk_forward_kl", "full_kl", "jsd"] = "sampled"
    topk: int = 64
    reference_kl: float = 0.0
    common_vocabulary: Sequence[int] | None = None


class LearnerParts(Protocol):
    """What the learner needs, on any rank; see ``Engines``."""

    @property
    def model(self) -> PreTrainedModel | None: ...

    @property
    def trained(self) -> PreTrainedModel: ...

    @property
    def surrogate(self) -> SurrogateSettings: ...

    @property
    def teacher_head(self) -> TeacherHead | None: ...

    @property
    def reference(self) -> TokenFunction | None: ...

    @property
    def ranks(self) -> Ranks: ...


@dataclass(slots=True)
class Follower:
    """What the trainer is handed on a rank that follows.

    Attributes:
        trained: the student that is trained, before it is sharded.
        surrogate, teacher_head, reference, ranks: as in ``Engines``.
        model: the plain copy that this rank's sampler decodes with; None where it has none.
    """

    trained: PreTrainedModel
    surrogate: SurrogateSettings
    ranks: Ranks
    model: PreTrainedModel | None = None
    teacher_head: TeacherHead | None = None
    reference: TokenFunction | None = None


@dataclass(slots=True)
class Engines:
    """Everything that the trainer is handed.

    Attributes:
        model: the student as a plain module, the same that the sampler decodes with and that servers are sent; on its
            device, in ``train.param_dtype``, in eval mode. With one rank it is also what is trained.
        tokenizer: the student's, for token strings in dumps and for the export.
        pipeline: ``pipeline.Pipeline`` or anything with its ``collect``.
        credit: writes ``reinforce``, ``distill``, ``masked``, ``mask_reason`` on all rollouts of a step and returns
            their verdicts: ``partial(assign_credit, method=..., truncated=..., reward_threshold=...)``.
        schedule: prompts of each step.
        sampling: how responses are drawn.
        surrogate: aggregation, clips, temperatures.
        teacher_head: the in-process teacher, for every ``distill`` but "sampled".
        reference: log-probs F[T] of a frozen reference at the objective's student temperature, for
            ``reference_kl`` > 0.
        evaluator: called with (step, policy_version) where ``[eval]`` says so; returns rows for eval.jsonl (each gets
            "step" where it has none).
        weights_use_tau: the paths ("student", "teacher") on which the method weights rollouts by
            perplexity ** (1 / tau): only there does the alarm ``uniform_weights`` ("tau does nothing here") mean
            anything.
        publisher: brings new weights to samplers that hold a copy of their own; None where the sampler decodes with
            ``model`` itself.
        trainee: with several ranks, the student that is trained: another module than ``model``, of the same weights,
            not sharded yet. ``Learner.refresh`` brings its weights to ``model``.
        ranks: the processes of the run; this one is the first of them.
        data: which data sets these prompts are, by "train" and "eval", as plain values; kept in run.json.
        fingerprints: what tells the models that the run began with from others, as plain values, kept in checkpoints:
            "student" and "teacher", each ``{"weights": digest}`` or ``{"served": {route: {"tokens", "logprobs"}}}``.
    """

    model: PreTrainedModel
    tokenizer: Any
    pipeline: Collector
    credit: Callable[[Sequence[Rollout]], Sequence[bool | None]]
    schedule: PromptSchedule
    sampling: SamplingParams
    surrogate: SurrogateSettings
    teacher_head: TeacherHead | None = None
    reference: TokenFunction | None = None
    evaluator: Evaluator | None = None
    weights_use_tau: frozenset[str] = frozenset()
    publisher: WeightPublisher | None = None
    trainee: PreTrainedModel | None = None
    ranks: Ranks = field(default_factory=Ranks)
    data: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    fingerprints: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trained(self) -> PreTrainedModel:
        """What the learner changes."""
        return self.model if self.trainee is None else self.trainee


@dataclass(frozen=True, slots=True)
class TrainResult:
    """What a finished run leaves.

    Attributes:
        folder: the run folder.
        steps: steps behind the final weights, those of earlier sittings included.
        metrics: the last row of metrics.jsonl (empty when there is none).
        evaluations: the rows of eval.jsonl.
        checkpoint: the newest checkpoint.
        export: the Hugging Face folder, None where ``run.export = false``.
    """

    folder: Path
    steps: int
    metrics: Mapping[str, Any]
    evaluations: Rows
    checkpoint: Path
    export: Path | None
