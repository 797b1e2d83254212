"""Routing and credit: from judged, scored rollouts to the two numbers of each (training and ``scope weights``)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch

from scope_opd.errors import DataError
from scope_opd.objective.methods import Group, Method, RowError
from scope_opd.types import Rollout

Truncated = Literal["ignore", "incorrect"]


def verdict_of(rollout: Rollout, *, truncated: Truncated, reward_threshold: float) -> bool | None:
    """The verdict that routes a rollout: True, False, or None when it takes no part.

    A truncated rollout (``finish_reason`` "length") is ignored (None) or incorrect, as ``truncated`` says. Otherwise
    ``correct`` counts; without it, ``reward >= reward_threshold``; with neither there is no verdict.
    """
    if rollout.finish_reason == "length":
        return None if truncated == "ignore" else False
    if rollout.correct is not None:
        return rollout.correct
    return None if rollout.reward is None else rollout.reward >= reward_threshold


def _mean_nll(logprobs: Sequence[float], loss_mask: Sequence[int] | None) -> float:
    if loss_mask is not None:
        logprobs = [value for value, keep in zip(logprobs, loss_mask, strict=True) if keep]
    if not logprobs:
        return float("nan")
    return -sum(logprobs) / len(logprobs)


def student_nll(rollout: Rollout) -> float:
    """NLL_S: mean negative log-prob a response token under the sampling distribution, nats. NaN without a token."""
    return _mean_nll(rollout.logprobs, rollout.loss_mask)


def teacher_nll(rollout: Rollout) -> float | None:
    """NLL_T: likewise under the teacher, over the tokens that it judges (``teacher_mask``).

    None when unscored, and where the mask leaves the teacher no token.
    """
    if rollout.teacher_logprobs is None:
        return None
    judged = judged_tokens(rollout)
    if rollout.teacher_mask is not None and judged is not None and not any(judged):
        return None
    return _mean_nll(rollout.teacher_logprobs, judged)


def judged_tokens(rollout: Rollout) -> list[int] | None:
    """One 0/1 for each response token: in the loss, and its teacher log-prob may be used. None means all ones."""
    loss, teacher = rollout.loss_mask, rollout.teacher_mask
    if loss is None or teacher is None:
        return teacher if loss is None else loss
    return [own and theirs for own, theirs in zip(loss, teacher, strict=True)]


def trained_tokens(rollout: Rollout) -> int:
    """Response tokens that enter the loss."""
    return sum(rollout.loss_mask) if rollout.loss_mask is not None else len(rollout.logprobs)


def assign_credit(
    rollouts: Sequence[Rollout], method: Method, *, truncated: Truncated, reward_threshold: float
) -> list[bool | None]:
    """Write ``reinforce``, ``distill``, ``masked`` and ``mask_reason`` into every rollout, group by group.

    Rollouts of a group need not be contiguous. Masked rollouts get (0, 0).

    Args:
        rollouts: judged and, where the method asks, scored.
        method: from ``objective.methods``.
        truncated, reward_threshold: see ``verdict_of``.

    Returns:
        Each rollout's verdict as ``verdict_of`` gives it, in order.

    Raises:
        DataError: a number that is not finite, on a masked rollout too (it tells of an engine that is ill), naming the
            rollout.
    """
    for rollout in rollouts:
        _check_finite(rollout)
    verdicts = [verdict_of(r, truncated=truncated, reward_threshold=reward_threshold) for r in rollouts]
    members: dict[str, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        members.setdefault(rollout.group, []).append(index)
    for indices in members.values():
        _credit_group([rollouts[i] for i in indices], [verdicts[i] for i in indices], method, reward_threshold)
    return verdicts


def _check_finite(rollout: Rollout) -> None:
    numbers = {"logprobs": rollout.logprobs, "teacher_logprobs": rollout.teacher_logprobs, "reward": rollout.reward}
    for name, value in numbers.items():
        values = value if isinstance(value, list) else [] if value is None else [value]
        # A sum of floats is finite only if each of them is: one pass in C for the usual case.
        if not math.isfinite(sum(values)):
            bad = next((number for number in values if not math.isfinite(number)), sum(values))
            raise DataError(f"rollout {rollout.id!r}: {name} = {bad}", "finite numbers", "see its record")


def _credit_group(
    rollouts: list[Rollout], verdicts: list[bool | None], method: Method, reward_threshold: float
) -> None:
    teacher = [teacher_nll(rollout) for rollout in rollouts]
    lengths = torch.tensor([trained_tokens(rollout) for rollout in rollouts])
    group = Group(
        rewards=torch.tensor(
            [_reward(r, v, reward_threshold) for r, v in zip(rollouts, verdicts, strict=True)], dtype=torch.float64
        ),
        correct=torch.tensor([verdict is True for verdict in verdicts]),
        nll_student=torch.tensor([student_nll(rollout) for rollout in rollouts], dtype=torch.float64),
        nll_teacher=torch.tensor([float("nan") if nll is None else nll for nll in teacher], dtype=torch.float64),
        scored=torch.tensor([nll is not None for nll in teacher]),
        lengths=lengths,
        masked=torch.tensor([verdict is None for verdict in verdicts]) | (lengths == 0),
    )
    try:
        credit = method.credit(group)
    except RowError as error:
        found = f"rollout {rollouts[error.row].id!r}: {error.found}"
        raise DataError(found, error.expected, "see its record") from None
    for row, (rollout, verdict) in enumerate(zip(rollouts, verdicts, strict=True)):
        rollout.masked = bool(credit.masked[row] | group.masked[row])
        rollout.reinforce = 0.0 if rollout.masked else float(credit.reinforce[row])
        rollout.distill = 0.0 if rollout.masked else float(credit.distill[row])
        rollout.mask_reason = _mask_reason(rollout, verdict, method) if rollout.masked else None
        if not math.isfinite(rollout.reinforce + rollout.distill):
            found = f"rollout {rollout.id!r}: reinforce = {rollout.reinforce}, distill = {rollout.distill}"
            raise DataError(found, "finite numbers", "mend the method's credit()")


def _reward(rollout: Rollout, verdict: bool | None, threshold: float) -> float:
    """The reward as given; without one, the verdict as 0 or 1.

    A truncated rollout that counts as incorrect keeps a reward that says so (-1 stays -1) and has 0 for any other.
    """
    if rollout.reward is None:
        return float(verdict is True)
    if rollout.finish_reason == "length" and rollout.reward >= threshold:
        return 0.0
    return rollout.reward


def _mask_reason(rollout: Rollout, verdict: bool | None, method: Method) -> str:
    if trained_tokens(rollout) == 0:
        return "empty"
    if verdict is None:
        return "truncated" if rollout.finish_reason == "length" else "no_verdict"
    return "unscored" if teacher_nll(rollout) is None and method.needs_teacher(verdict) else "method"
