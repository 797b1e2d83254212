"""A step's row of metrics.jsonl and its sampled rows of rollouts.jsonl.

Every value is a function of the seed and the config, except those under ``time/`` and ``perf/``. A figure that does not
exist on a step (no correct rollout, no score ...) is null, never 0. By path: *student* is the rollouts routed as
correct, *teacher* those routed as incorrect, masked ones left out.
"""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from scope_opd.credit import student_nll, teacher_nll, trained_tokens
from scope_opd.objective.weights import effective_sample_size
from scope_opd.pipeline import StageStats, Timeline
from scope_opd.pipeline.timeline import shortened
from scope_opd.records import rollout_to_dict
from scope_opd.train.batch import Batch
from scope_opd.train.outcome import Outcome
from scope_opd.types import Rollout

SPANS_A_ROW = 256

# key -> what it is. The order is that of the rows; docs and tests read it too.
METRIC_KEYS: dict[str, str] = {
    "step": "0-based: the rollouts come from the weights after this many steps",
    "policy_version": "optimiser steps behind the weights that the update starts from",
    "loss": "the step's surrogate loss",
    "grad_norm": "norm of the whole gradient before clipping",
    "lr": "learning rate of the update",
    "update/skipped": "1 when no optimiser step was taken (nothing unmasked, or a number not finite)",
    "update/not_finite": "1 when loss or gradient was not finite",
    "reward/mean": "mean reward of the rollouts that have one",
    "accuracy": "share correct among the judged rollouts",
    "pass@n": "share of groups with at least one correct rollout, among those with a judged one",
    "groups/all_correct": "share of fully judged groups in which every rollout is correct",
    "groups/all_wrong": "share of fully judged groups in which none is",
    "entropy": "mean entropy a token in the loss, nats, at the objective's student temperature",
    "entropy/correct": "the same over the student path",
    "logratio/correct": "mean log pi_T - log pi_theta a token of the student path that the teacher judges",
    "logratio/incorrect": "the same over the teacher path",
    "ess/student": "effective sample size of reinforce within a group, mean over groups with >= 2 on the student path",
    "ess/teacher": "effective sample size of distill, likewise on the teacher path",
    "ess_tokens/student": "the same of reinforce x tokens",
    "ess_tokens/teacher": "the same of distill x tokens",
    "truncated/share": "share of rollouts without an end token",
    "truncated/weight_share": "their share of the sum of (|reinforce| + |distill|) x tokens",
    "length/mean": "response tokens a rollout",
    "length/max": "response tokens of the longest rollout",
    "masked/truncated": "rollouts left out: truncated and ignored",
    "masked/unscored": "rollouts left out: no teacher score to be had",
    "masked/no_verdict": "rollouts left out: no verdict to be had",
    "masked/other": "rollouts left out for another reason (by the method; no token in the loss)",
    "floored_tokens": "teacher log-probs raised to the floor",
    "teacher/scored_tokens": "response tokens that the teacher scored",
    "teacher/scored_rollouts": "rollouts that the teacher scored",
    "teacher/unscored": "rollouts that the teacher was asked to score and that came back without a score",
    "mismatch/kl": "mean log mu - log pi_old a token: k1 estimate of KL(sampler || trainer)",
    "mismatch/capped_share": "share of tokens with c at its cap",
    "clip/share": "share of tokens where a PPO clip acted",
    "kl/reference": "mean k3 estimate of KL(student || reference) a token",
    "ppl/student_mean": "mean perplexity of student-path rollouts under the sampling distribution",
    "ppl/teacher_mean": "mean perplexity of teacher-path rollouts under the teacher",
    "rollout/staleness_mean": "mean over response tokens of the policy version at the update minus the token's own",
    "rollout/staleness_max": "the same for the oldest token",
    "tokens/trained": "tokens in the loss",
    "padding/share": "share of padding in the update's micro-batches, 0 where they are packed",
    "time/generation_s": "until the last rollout ended",
    "time/verify_s": "sum over verdicts",
    "time/teacher_s": "sum over scoring calls",
    "time/teacher_exposed_s": "part of the step in which the teacher was the only stage at work",
    "time/sync_s": "new weights to servers that sample and to copies on ranks, since the step before; null without any",
    "time/update_s": "batch, forward, backward, optimiser",
    "time/step_s": "the whole step",
    "perf/tokens_per_s": "generated tokens by step time",
    "perf/teacher_hidden_share": "share of the teacher's time within the step that is not exposed; null without any",
    "perf/teacher_retries": "requests to teacher servers that had to be made again",
    "perf/peak_rss_mb": "largest resident memory of the process so far",
    "perf/peak_gpu_mb": "largest memory allocated on the GPU so far; null on a CPU",
}


def step_metrics(
    *,
    step: int,
    policy_version: int,
    lr: float,
    rollouts: Sequence[Rollout],
    verdicts: Sequence[bool | None],
    stats: StageStats,
    batch: Batch,
    outcome: Outcome,
    sampled_by_student: bool,
    update_s: float,
    step_s: float,
    sync_s: float | None = None,
    teacher_exposed_s: float = 0.0,
    teacher_busy_s: float = 0.0,
) -> dict[str, Any]:
    """One row with exactly the keys of ``METRIC_KEYS``; numbers that are not finite become null.

    ``policy_version`` is that of the weights that the update starts from. ``teacher_busy_s`` and ``teacher_exposed_s``
    are seconds of the step in which the teacher was at work, and the only stage that was.
    """
    correct = [r.correct if r.correct is not None else verdict for r, verdict in zip(rollouts, verdicts, strict=True)]
    judged = [verdict for verdict in correct if verdict is not None]
    groups = _by_group(rollouts, correct)
    whole = [members for members in groups if None not in members]
    student = [r for r, verdict in zip(rollouts, verdicts, strict=True) if verdict is True and not r.masked]
    teacher = [r for r, verdict in zip(rollouts, verdicts, strict=True) if verdict is False and not r.masked]
    tokens, trained = outcome.tokens, batch.tokens > 0
    on_student, on_teacher = _owned_by(tokens.rollout, rollouts, student), _owned_by(tokens.rollout, rollouts, teacher)
    scored = _owned_by(tokens.rollout, rollouts, [r for r in rollouts if r.teacher_logprobs is not None])
    scored &= _judged(tokens.rollout, tokens.place, rollouts)
    reasons = [r.mask_reason for r in rollouts if r.masked]
    known = ("truncated", "unscored", "no_verdict")
    lengths = [len(r.token_ids) for r in rollouts]
    mismatch = trained and sampled_by_student
    ages = staleness(rollouts, policy_version) if sampled_by_student else None
    row = {
        "step": step,
        "policy_version": policy_version,
        "loss": outcome.loss,
        "grad_norm": outcome.grad_norm,
        "lr": lr,
        "update/skipped": int(outcome.updates == 0),
        "update/not_finite": int(not outcome.finite),
        "reward/mean": _mean(r.reward for r in rollouts if r.reward is not None),
        "accuracy": _mean(judged),
        "pass@n": _mean(any(members) for members in groups if any(member is not None for member in members)),
        "groups/all_correct": _mean(all(members) for members in whole),
        "groups/all_wrong": _mean(not any(members) for members in whole),
        "entropy": _tensor_mean(tokens.entropy),
        "entropy/correct": _tensor_mean(tokens.entropy[on_student]),
        "logratio/correct": _tensor_mean(tokens.teacher_gap[on_student & scored]),
        "logratio/incorrect": _tensor_mean(tokens.teacher_gap[on_teacher & scored]),
        "ess/student": _group_ess(student, lambda r: r.reinforce or 0.0),
        "ess/teacher": _group_ess(teacher, lambda r: r.distill or 0.0),
        "ess_tokens/student": _group_ess(student, lambda r: (r.reinforce or 0.0) * trained_tokens(r)),
        "ess_tokens/teacher": _group_ess(teacher, lambda r: (r.distill or 0.0) * trained_tokens(r)),
        "truncated/share": _mean(r.finish_reason == "length" for r in rollouts),
        "truncated/weight_share": _truncated_weight(rollouts),
        "length/mean": _mean(lengths),
        "length/max": max(lengths, default=None),
        **{f"masked/{reason}": reasons.count(reason) for reason in known},
        "masked/other": sum(reason not in known for reason in reasons),
        "floored_tokens": stats.floored_tokens,
        "teacher/scored_tokens": stats.scored_tokens,
        "teacher/scored_rollouts": stats.scored_rollouts,
        "teacher/unscored": stats.unscored,
        "mismatch/kl": _tensor_mean(tokens.mismatch) if mismatch else None,
        "mismatch/capped_share": _tensor_mean(tokens.capped) if mismatch else None,
        "clip/share": outcome.clipped if trained else None,
        "kl/reference": outcome.kl_reference,
        "ppl/student_mean": _mean(_perplexity(student_nll(r)) for r in student),
        "ppl/teacher_mean": _mean(_perplexity(nll) for r in teacher if (nll := teacher_nll(r)) is not None),
        "rollout/staleness_mean": ages and ages[0],
        "rollout/staleness_max": ages and ages[1],
        "tokens/trained": batch.tokens,
        "padding/share": batch.padding,
        "time/generation_s": stats.generation_s,
        "time/verify_s": stats.verify_s,
        "time/teacher_s": stats.teacher_s,
        "time/teacher_exposed_s": teacher_exposed_s,
        "time/sync_s": sync_s,
        "time/update_s": update_s,
        "time/step_s": step_s,
        "perf/tokens_per_s": stats.generated_tokens / step_s if step_s > 0 else None,
        "perf/teacher_hidden_share": 1 - teacher_exposed_s / teacher_busy_s if teacher_busy_s > 0 else None,
        "perf/teacher_retries": stats.teacher_retries,
        "perf/peak_rss_mb": _peak_rss_mb(),
        "perf/peak_gpu_mb": torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else None,
    }
    assert row.keys() == METRIC_KEYS.keys()
    return {key: _strict(value) for key, value in row.items()}


def timeline_row(timeline: Timeline, step: int, begin: float, end: float) -> dict[str, Any]:
    """A row of timeline.jsonl: a step's own spans by stage, in seconds from its begin.

    Negative where its generation ran ahead. At most ``SPANS_A_ROW`` a stage; the shortest gaps are closed.
    """
    return {
        "step": step,
        "seconds": round(end - begin, 6),
        "spans": {
            stage: [[round(a - begin, 6), round(b - begin, 6)] for a, b in shortened(spans, SPANS_A_ROW)]
            for stage, spans in timeline.spans(step).items()
        },
    }


def staleness(rollouts: Sequence[Rollout], version: int) -> tuple[float, int] | None:
    """Mean and largest difference between ``version`` and the versions that response tokens were sampled with.

    None where there is no token. A rollout without ``policy_versions`` is of its ``policy_version`` throughout.
    """
    total = tokens = oldest = 0
    for rollout in rollouts:
        for first, last, own in rollout.policy_versions or [[0, len(rollout.token_ids), rollout.policy_version]]:
            if last > first:
                total += (version - own) * (last - first)
                tokens += last - first
                oldest = max(oldest, version - own)
    return (total / tokens, oldest) if tokens else None


def rollout_rows(
    rollouts: Sequence[Rollout], outcome: Outcome, *, step: int, limit: int, tokenizer: Any
) -> list[dict[str, Any]]:
    """The rows for rollouts.jsonl: as many whole groups as fit into ``limit``, and one at least where it is above 0.

    Groups stay whole because weights are normalised in them: ``scope weights`` on the file gives the run's numbers.
    Each row is the whole record, without a teacher's top-k rows (many times the rest), with ``step``, ``prompt`` (its
    text), ``tokens`` (the text of every response token) and ``advantages`` (A_t of every response token as the update
    saw it; 0 where the token was not in the loss).
    """
    chosen: list[int] = []
    members: dict[str, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        members.setdefault(rollout.group, []).append(index)
    for indices in members.values():
        if limit == 0 or (chosen and len(chosen) + len(indices) > limit):
            break
        chosen += indices
    rows = []
    for index in chosen:
        rollout = rollouts[index]
        own = outcome.tokens.rollout == index
        advantages = torch.zeros(len(rollout.token_ids), dtype=torch.float64)
        advantages[outcome.tokens.place[own]] = outcome.tokens.advantage[own].double()
        rows.append({
            **rollout_to_dict(replace(rollout, teacher_topk=None)),
            "step": step,
            "prompt": tokenizer.decode(rollout.prompt_token_ids),
            "tokens": [tokenizer.decode([token]) for token in rollout.token_ids],
            "advantages": advantages.tolist(),
        })  # fmt: skip
    return rows if outcome.finite else [_strict(row) for row in rows]


def _strict(value: Any) -> Any:
    """The same with null for every number that is not finite: what a step gone wrong leaves must still be JSON."""
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _by_group(rollouts: Sequence[Rollout], values: Sequence[bool | None]) -> list[list[bool | None]]:
    groups: dict[str, list[bool | None]] = {}
    for rollout, value in zip(rollouts, values, strict=True):
        groups.setdefault(rollout.group, []).append(value)
    return list(groups.values())


def _group_ess(path: Sequence[Rollout], weight: Callable[[Rollout], float]) -> float | None:
    """Mean effective sample size over groups with two members or more on the path and weights to speak of."""
    groups: dict[str, list[float]] = {}
    for rollout in path:
        groups.setdefault(rollout.group, []).append(weight(rollout))
    sizes = [
        effective_sample_size(torch.tensor(weights, dtype=torch.float64))
        for weights in groups.values()
        if len(weights) >= 2 and min(weights) >= 0.0 and max(weights) > 0.0
    ]
    return _mean(sizes)


def _truncated_weight(rollouts: Sequence[Rollout]) -> float | None:
    weights = [(abs(r.reinforce or 0.0) + abs(r.distill or 0.0)) * trained_tokens(r) for r in rollouts]
    total = sum(weights)
    if total == 0.0:
        return None
    return sum(w for w, r in zip(weights, rollouts, strict=True) if r.finish_reason == "length") / total


def _perplexity(nll: float) -> float:
    """exp(nll); infinite (null in the row) where a float has no room for it."""
    return math.exp(nll) if nll <= 700.0 else math.inf


def _owned_by(owner: Tensor, rollouts: Sequence[Rollout], chosen: Sequence[Rollout]) -> Tensor:
    """Which tokens belong to one of the chosen rollouts, bool [T]."""
    identities = {id(rollout) for rollout in chosen}
    return torch.tensor([id(rollout) in identities for rollout in rollouts], dtype=torch.bool)[owner]


def _judged(owner: Tensor, place: Tensor, rollouts: Sequence[Rollout]) -> Tensor:
    """Which tokens the teacher judges (``Rollout.teacher_mask``), bool [T]."""
    masks = [rollout.teacher_mask for rollout in rollouts]
    if not any(masks):
        return torch.ones(owner.shape, dtype=torch.bool)
    flags = [(mask := masks[i]) is None or bool(mask[j]) for i, j in zip(owner.tolist(), place.tolist(), strict=True)]
    return torch.tensor(flags, dtype=torch.bool)


def _mean(values: Iterable[float]) -> float | None:
    numbers = list(values)
    return sum(numbers) / len(numbers) if numbers else None


def _tensor_mean(values: Tensor) -> float | None:
    return float(values.double().mean()) if values.numel() else None


def _peak_rss_mb() -> float:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (2**20 if sys.platform == "darwin" else 2**10)
