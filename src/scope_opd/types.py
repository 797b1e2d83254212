"""Boundary types and engine Protocols: what the rooms of SCOPE hand to one another.

Nothing here imports torch: a record can be read, judged and written without an engine. Token ids, log-probs and text
always describe the *response* (the end token included) unless the name says ``prompt``. All log-probs are natural
logarithms.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, slots=True)
class Prompt:
    """One problem, rendered and tokenised for the student.

    Attributes:
        id: unique within its data set; seeds and groups derive from it.
        problem: the problem as the data set has it (before any chat template).
        answer: the gold answer, in one of the forms of ``scope_opd.gold``.
        token_ids: the rendered prompt as the student's token ids.
        text: the rendered prompt as text.
        fields: every other column of the row (source, level, a routing key ...).
    """

    id: str
    problem: str
    answer: Any
    token_ids: tuple[int, ...]
    text: str = ""
    fields: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How responses are drawn. Log-probs of a rollout are those of exactly this distribution.

    Attributes:
        n: samples for each prompt.
        temperature: > 0; logits are divided by it.
        max_tokens: response tokens at most, the end token included.
        top_p, top_k, repetition_penalty: 1.0, 0 and 1.0 switch them off. Evaluation only: training refuses them.
        stop_token_ids: any of these ends a response and is its last token.
        seed: the run's seed. Token t of a sample is a function of (seed, step, prompt id, sample, t) and the model.
    """

    n: int
    temperature: float
    max_tokens: int
    stop_token_ids: tuple[int, ...]
    seed: int
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class TopK:
    """A teacher's likeliest tokens at each response token: T rows of ``k``, one after the other.

    Attributes:
        k: entries of a row, at least 1.
        ids: I32[T k], likeliest first; -1 where a row has fewer.
        logprobs: F32[T k], <= 0; -inf where the id is -1.
    """

    k: int
    ids: array[int]
    logprobs: array[float]

    @classmethod
    def of(cls, rows: Sequence[Sequence[tuple[int, float]]]) -> TopK:
        """From (id, log-prob) pairs a row; shorter rows are filled up."""
        k = max((len(row) for row in rows), default=0) or 1
        whole = [[*row, *[(-1, float("-inf"))] * (k - len(row))] for row in rows]
        return cls(
            k,
            array("i", [index for row in whole for index, _ in row]),
            array("f", [value for row in whole for _, value in row]),
        )

    def __len__(self) -> int:
        return len(self.ids) // self.k

    def __iter__(self) -> Iterator[list[tuple[int, float]]]:
        """The rows, without what fills them up."""
        for start in range(0, len(self.ids), self.k):
            row = slice(start, start + self.k)
            yield [pair for pair in zip(self.ids[row], self.logprobs[row], strict=True) if pair[0] >= 0]


@dataclass(slots=True)
class Rollout:
    """One sampled response and everything learnt about it: the record of training, dumps, evaluation and commands.

    Attributes:
        id: ``{prompt id}/{step}/{sample}`` in training.
        group: the prompt's id; rollouts of one group are weighted together.
        prompt_token_ids, token_ids: prompt and response ids, the end token included in the response.
        logprobs: log-prob of every response token under the distribution that sampled it; NLL_S is their negative mean.
        text: the response as text, without special tokens.
        finish_reason: "stop" (an end token) or "length" (truncated).
        policy_version: optimiser steps behind the weights that sampled it.
        sample: index within its group.
        step: the optimiser step that the rollout was drawn for (None outside training).
        correct, reward, extracted: the verdict; None until judged (``correct`` stays None without a verdict).
        teacher_logprobs: teacher log-prob of every response token, None where not asked for or not to be had.
        reinforce, distill: the method's two numbers, None until credited.
        masked: True when the rollout takes no part in the update (truncated and ignored, unscored, no verdict).
        mask_reason: why: "truncated", "no_verdict", "unscored", "empty", "method"; None when not masked.
        loss_mask: one 0/1 for each response token; None means all ones.
        teacher_mask: one 0/1 for each response token, 0 where the teacher's log-prob is not to be used (an end token
            that it does not know as one); NLL_T and the distillation term leave those out. None means all ones.
        sampling: temperature, seed and whatever else describes the draw.
        teacher_topk: the likeliest tokens of a teacher behind servers, a row for each response token, where
            ``objective.distill`` asks for them. A run's rollouts.jsonl leaves them out.
        policy_versions: spans ``[first_token, last_token_exclusive, version]`` of a rollout that servers sampled; more
            than one where weights changed in flight. ``policy_version`` is the first one's.
    """

    id: str
    group: str
    prompt_token_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    text: str = ""
    finish_reason: FinishReason = "stop"
    policy_version: int = 0
    sample: int = 0
    step: int | None = None
    correct: bool | None = None
    reward: float | None = None
    extracted: str | None = None
    teacher_logprobs: list[float] | None = None
    reinforce: float | None = None
    distill: float | None = None
    masked: bool = False
    mask_reason: str | None = None
    loss_mask: list[int] | None = None
    teacher_mask: list[int] | None = None
    sampling: dict[str, Any] = field(default_factory=dict)
    teacher_topk: TopK | None = None
    policy_versions: list[list[int]] | None = None


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says of one response.

    Attributes:
        correct: True, False, or None when no verdict could be reached (the rollout is then masked).
        reward: a number, usually 0.0 or 1.0; None with no verdict.
        extracted: the final answer found in the response, None when there is none.
        reason: one short phrase, such as "running total wrong at item 3".
    """

    correct: bool | None
    reward: float | None
    extracted: str | None = None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class TeacherScore:
    """The teacher's log-probs of one rollout's response tokens.

    Attributes:
        logprobs: one for each response token, already floored; None when the teacher could not score it.
        floored: how many tokens were raised to the floor.
        tries: requests that it took a server; 0 in process.
        mask: see ``Rollout.teacher_mask``.
        topk: see ``Rollout.teacher_topk``.
    """

    logprobs: list[float] | None
    floored: int = 0
    tries: int = 0
    mask: list[int] | None = None
    topk: TopK | None = None


@runtime_checkable
class Sampler(Protocol):
    """Draws responses. The student's and, for ``kd``, the teacher's."""

    def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, step: int, policy_version: int
    ) -> AsyncIterator[Rollout]:
        """Yield every rollout (``params.n`` for each prompt) as it ends, in any order."""
        ...


@runtime_checkable
class Verifier(Protocol):
    """Judges one response. The verdict is a function of (response, problem, gold, settings) alone.

    Every step and every evaluation has an event loop of its own: a verifier holds nothing that belongs to one. One
    that holds processes has a ``close()`` besides, ends them at exit, and may be closed twice.
    """

    async def verify(self, rollout: Rollout, prompt: Prompt) -> Verdict: ...


@runtime_checkable
class Teacher(Protocol):
    """Scores response tokens.

    ``streams`` says how the pipeline feeds it: True, one rollout at a time as each ends (servers); False, all rollouts
    of a step together in (prompt, sample) order, so that batches are a function of the step (in process).
    """

    streams: bool

    async def score(self, rollouts: Sequence[Rollout]) -> list[TeacherScore]:
        """One score for each rollout, in order. A rollout that cannot be scored gets ``logprobs=None``."""
        ...


@runtime_checkable
class StepTeacher(Teacher, Protocol):
    """A teacher that wants to know where a step begins and ends (servers: whom to ask for which prompt; is it still
    the same model?). The pipeline tells it."""

    async def begin_step(self, prompts: Sequence[Prompt], step: int) -> None:
        """Before the first rollout of a step."""
        ...

    async def end_step(self, step: int) -> list[str]:
        """After the last score of a step (others may have begun meanwhile); returns lines for the user.

        If it raises, the step is not taken.
        """
        ...


@runtime_checkable
class WeightPublisher(Protocol):
    """Brings the student's weights to samplers that hold a copy of their own (servers).

    Called by the trainer's thread alone. ``close`` may be called twice.
    """

    def publish(self, version: int) -> dict[str, float]:
        """Have every usable sampler hold, and confirm, the student's weights as they are now.

        Args:
            version: optimiser steps behind them. One that is published already costs nothing.

        Returns:
            Seconds by part, such as ``{"export": 0.1, "load": 0.4, "probe": 0.1}``; empty if nothing was to be done.

        Raises:
            RunFailed: no sampler could be brought there, or one serves other numbers than the trainer's.
        """
        ...

    def release(self) -> None:
        """Generation is over for now and the trainer needs the room: samplers on its own GPU go to sleep.

        Does nothing for samplers elsewhere. ``publish`` wakes them.
        """
        ...

    def close(self) -> None: ...
