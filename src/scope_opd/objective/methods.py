"""Methods: pure functions from a group to two numbers a rollout, and the registry that users extend.

A method is a small frozen dataclass with a ``credit`` function. Its fields are its settings; its class attributes say
who samples, which rollouts the teacher must score, and which surrogate it is published with. ``register`` puts one of
your own beside these; nothing else in the project needs to learn of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar

import torch
from torch import Tensor

from scope_opd.objective.weights import Direction, Scale, softmax_weights

Aggregation = Literal["prompt", "token", "sequence", "released"]
GRPO_EPS = 1e-6


class RowError(ValueError):
    """A bad value in one row of a group; callers that know the rollout's id name it."""

    def __init__(self, row: int, found: str, expected: str) -> None:
        self.row, self.found, self.expected = row, found, expected
        super().__init__(f"row {row}: {found}; expected {expected}")


@dataclass(frozen=True)
class Group:
    """What a method may know of one prompt's n rollouts.

    Attributes:
        rewards: [n] float64.
        correct: [n] bool.
        nll_student: [n] float64, mean negative log-prob a response token under the distribution that sampled it.
        nll_teacher: [n] float64, likewise under the teacher; read only where ``scored``.
        scored: [n] bool, whether the teacher's log-probs are at hand.
        lengths: [n] int64, response tokens that enter the loss.
        masked: [n] bool, rollouts that take no part (truncated and ignored, no verdict).

    Raises:
        RowError: a number that is not finite where it is needed.
        ValueError: differing shapes.
    """

    rewards: Tensor
    correct: Tensor
    nll_student: Tensor
    nll_teacher: Tensor
    scored: Tensor
    lengths: Tensor
    masked: Tensor

    def __post_init__(self) -> None:
        size = self.rewards.shape
        for field in dataclasses.fields(self):
            if getattr(self, field.name).shape != size:
                raise ValueError(
                    f"{field.name} has shape {tuple(getattr(self, field.name).shape)}; expected {tuple(size)}"
                )
        live = ~self.masked
        for name, needed in (("rewards", live), ("nll_student", live), ("nll_teacher", live & self.scored)):
            values = getattr(self, name)
            bad = (needed & ~torch.isfinite(values)).nonzero()
            if bad.numel():
                row = int(bad[0])
                raise RowError(row, f"{name} = {float(values[row])}", "a finite number")

    @property
    def live(self) -> Tensor:
        return ~self.masked


@dataclass(frozen=True)
class Credit:
    """A method's answer: [n] float64 ``reinforce`` and ``distill``, and [n] bool ``masked`` (the group's, or more)."""

    reinforce: Tensor
    distill: Tensor
    masked: Tensor


class Method(Protocol):
    """What the rest of the project sees of a method."""

    sampled_by: ClassVar[Literal["student", "teacher"]]
    aggregation: ClassVar[Aggregation]
    clip: ClassVar[float | None]
    dual_clip: ClassVar[float | None]
    smallest_group: ClassVar[int]

    def needs_teacher(self, correct: bool) -> bool:
        """Whether a rollout with this verdict must be scored by the teacher."""
        ...

    def credit(self, group: Group) -> Credit:
        """Two numbers a rollout."""
        ...


MethodClass = TypeVar("MethodClass", bound=type)
_METHODS: dict[str, type] = {}
_PARTS = ("credit", "needs_teacher", "sampled_by", "aggregation", "clip", "dual_clip", "smallest_group")


def register(name: str) -> Callable[[MethodClass], MethodClass]:
    """Class decorator: make a method known by ``name`` (``objective.method = "name"``).

    Raises:
        ValueError: the name is taken, or the class is no dataclass with ``credit`` and ``needs_teacher``.
    """

    def add(cls: MethodClass) -> MethodClass:
        holder = _METHODS.get(name, cls)
        # A module that is loaded again may register its own class again; nobody else may take the name.
        if (holder.__module__, holder.__qualname__) != (cls.__module__, cls.__qualname__):
            raise ValueError(f"method {name!r} is already registered by {holder.__module__}.{holder.__qualname__}")
        missing = [part for part in _PARTS if not hasattr(cls, part)]
        if missing or not dataclasses.is_dataclass(cls):
            raise ValueError(f"method {name!r}: expected a dataclass with {', '.join(missing) or 'fields'}")
        _METHODS[name] = cls
        return cls

    return add


def method_names() -> list[str]:
    """Names of all registered methods, sorted."""
    return sorted(_METHODS)


def build_method(name: str, settings: Mapping[str, Any] | None = None, /, **own: Any) -> Method:
    """Make a method by name.

    Args:
        name: a registered name.
        settings: a pool of common settings (tau, scale, beta ...), of which the method takes those it declares.
        own: settings meant for this method; one that it does not declare is an error.

    Raises:
        ValueError: unknown name, unknown setting, or a value that the method refuses.
    """
    if name not in _METHODS:
        raise ValueError(f"method = {name!r}; expected one of {', '.join(method_names())}")
    cls = _METHODS[name]
    declared = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(own) - declared)
    if unknown:
        raise ValueError(
            f"method {name!r} has no setting {unknown[0]!r}; expected {', '.join(sorted(declared)) or 'none'}"
        )
    taken = {key: value for key, value in (settings or {}).items() if key in declared}
    method: Method = cls(**{**taken, **own})
    return method


class MethodDefaults:
    """Base with what most methods share; override what differs.

    Attributes:
        sampled_by: whose responses are trained on.
        aggregation, clip, dual_clip: the surrogate that the method is published with; the config may override them.
        smallest_group: rollouts a prompt below which the method says nothing (2 for a group-relative advantage).
    """

    sampled_by: ClassVar[Literal["student", "teacher"]] = "student"
    aggregation: ClassVar[Aggregation] = "token"
    clip: ClassVar[float | None] = None
    dual_clip: ClassVar[float | None] = None
    smallest_group: ClassVar[int] = 1

    def needs_teacher(self, correct: bool) -> bool:
        return False


def _blank(group: Group) -> tuple[Tensor, Tensor]:
    zeros = torch.zeros(group.rewards.shape, dtype=torch.float64)
    return zeros, zeros.clone()


@register("scope")
@dataclass(frozen=True)
class Scope(MethodDefaults):
    """SCOPE: correct rollouts are reinforced, incorrect ones distilled, each path weighted within its group.

    correct: (w_stu, 0), w_stu = softmax(+NLL_S / tau) over the group's correct rollouts          (Eq. 4)
    wrong:   (0, w_tea), w_tea = softmax(-NLL_T / tau) over the group's scored wrong rollouts     (Eq. 5)

    A wrong rollout without a teacher score is masked; the weights are normalised over the rest.
    """

    aggregation: ClassVar[Aggregation] = "prompt"
    tau: float = 1.0
    student_weight: Direction = "ppl"
    teacher_weight: Direction = "inverse_ppl"
    scale: Scale = "sum"

    def __post_init__(self) -> None:
        for direction in (self.student_weight, self.teacher_weight):
            softmax_weights(torch.zeros(1), self.tau, direction, self.scale)  # refuses bad settings before a run

    def needs_teacher(self, correct: bool) -> bool:
        return not correct

    def credit(self, group: Group) -> Credit:
        reinforce, distill = _blank(group)
        right = group.live & group.correct
        wrong = group.live & ~group.correct & group.scored
        reinforce[right] = softmax_weights(group.nll_student[right], self.tau, self.student_weight, self.scale)
        distill[wrong] = softmax_weights(group.nll_teacher[wrong], self.tau, self.teacher_weight, self.scale)
        return Credit(reinforce, distill, ~(right | wrong))


@register("dual_path")
@dataclass(frozen=True)
class DualPath(MethodDefaults):
    """SCOPE's routing with both weights uniform: what routing alone is worth."""

    aggregation: ClassVar[Aggregation] = "prompt"
    scale: Scale = "sum"

    def needs_teacher(self, correct: bool) -> bool:
        return not correct

    def credit(self, group: Group) -> Credit:
        return Scope(student_weight="uniform", teacher_weight="uniform", scale=self.scale).credit(group)


@register("opd")
@dataclass(frozen=True)
class OnPolicyDistillation(MethodDefaults):
    """On-policy distillation on every rollout: (0, 1)."""

    def needs_teacher(self, correct: bool) -> bool:
        return True

    def credit(self, group: Group) -> Credit:
        reinforce, distill = _blank(group)
        live = group.live & group.scored
        distill[live] = 1.0
        return Credit(reinforce, distill, ~live)


def group_advantage(rewards: Tensor) -> Tensor:
    """(R - mean) / (std_{n-1} + 1e-6) over the rollouts given; zeros for one rollout or without spread.

    Args:
        rewards: [n] float64.

    Source: GRPO, arXiv 2402.03300, with the sample standard deviation of the common implementations.
    """
    if rewards.numel() < 2 or bool(rewards.max() == rewards.min()):
        return torch.zeros_like(rewards)
    return (rewards - rewards.mean()) / (rewards.std(unbiased=True) + GRPO_EPS)


@register("grpo")
@dataclass(frozen=True)
class Grpo(MethodDefaults):
    """GRPO: (group-normalised reward, 0), token mean, clip 0.2, dual clip 3."""

    clip: ClassVar[float | None] = 0.2
    dual_clip: ClassVar[float | None] = 3.0
    smallest_group: ClassVar[int] = 2

    def credit(self, group: Group) -> Credit:
        reinforce, distill = _blank(group)
        reinforce[group.live] = group_advantage(group.rewards[group.live])
        return Credit(reinforce, distill, group.masked)


@register("positive")
@dataclass(frozen=True)
class Positive(MethodDefaults):
    """Positive-sample reinforcement: (1, 0) on correct rollouts, (0, 0) on the others."""

    def credit(self, group: Group) -> Credit:
        reinforce, distill = _blank(group)
        reinforce[group.live & group.correct] = 1.0
        return Credit(reinforce, distill, group.masked)


@register("kd")
@dataclass(frozen=True)
class KnowledgeDistillation(MethodDefaults):
    """Sequence-level distillation: (1, 0) on responses that the teacher sampled, whatever their verdict."""

    sampled_by: ClassVar[Literal["student", "teacher"]] = "teacher"

    def credit(self, group: Group) -> Credit:
        reinforce, distill = _blank(group)
        reinforce[group.live] = 1.0
        return Credit(reinforce, distill, group.masked)


@register("reward_opd")
@dataclass(frozen=True)
class RewardOpd(MethodDefaults):
    """Reward and distillation mixed: (group-normalised reward, beta) on every scored rollout."""

    smallest_group: ClassVar[int] = 2
    beta: float = 1.0

    def needs_teacher(self, correct: bool) -> bool:
        return True

    def credit(self, group: Group) -> Credit:
        reinforce, distill = _blank(group)
        live = group.live & group.scored
        reinforce[live] = group_advantage(group.rewards[live])
        distill[live] = self.beta
        return Credit(reinforce, distill, ~live)
