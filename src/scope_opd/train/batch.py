"""From a step's credited rollouts to micro-batches: rows of ids, and flat numbers for the tokens that enter the loss.

The denominators of the whole step are folded into each rollout's two numbers here, before anything is cut, so that the
gradient of the step is a plain sum over tokens and no cut can change it. Masked rollouts never reach the model. Ranks
get as many micro-batches each: where sequences are too few some are empty, so that all ranks run as many passes. A
micro-batch is one row of several rollouts (``models.packing``), or rows of like length where a model cannot have that.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from scope_opd.credit import trained_tokens
from scope_opd.models.batching import microbatches
from scope_opd.models.packing import deal
from scope_opd.models.rows import Rows, positions_of, stack
from scope_opd.objective.aggregate import coefficients, denominator, undivided
from scope_opd.objective.methods import Aggregation
from scope_opd.types import Rollout


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences that go through the model together. T tokens of them enter the loss.

    An empty one is a row of a single token, none of them in the loss: it goes through forward and backward passes as
    any other does, and its loss is a zero whose gradient is zero on every parameter.

    Attributes:
        rows: prompt + response of each rollout.
        positions: I[T, 2], (row, column) of each token in the loss.
        rollout, place: I[T], the token's rollout (index within the step) and its index within the response.
        sampler: F64[T], the recorded log mu.
        teacher: F64[T], log pi_T; 0 where there is none (``distill`` is 0 there).
        reinforce, distill: F64[T], the coefficients with the step's denominators folded in; ``distill`` is 0 where the
            teacher does not judge the token (``Rollout.teacher_mask``).
        credit_reinforce, credit_distill: F64[T], the method's own numbers; the latter likewise.
        teacher_ids, teacher_id_logprobs: I[T, K], F64[T, K], the likeliest tokens of a teacher behind servers
            (``Rollout.teacher_topk``; -1 and -inf where there is none); None where no rollout has any.
    """

    rows: Rows
    positions: Tensor
    rollout: Tensor
    place: Tensor
    sampler: Tensor
    teacher: Tensor
    reinforce: Tensor
    distill: Tensor
    credit_reinforce: Tensor
    credit_distill: Tensor
    teacher_ids: Tensor | None = None
    teacher_id_logprobs: Tensor | None = None

    @property
    def cells(self) -> int:
        """Tokens with padding; 0 of an empty one."""
        return self.rows.cells if self.rollout.numel() else 0

    @property
    def padded(self) -> int:
        """Cells that hold padding."""
        return self.rows.padding

    def to(self, device: torch.device, dtype: torch.dtype) -> MicroBatch:
        """A copy on a device, its floats in ``dtype``."""

        def move(part: Any) -> Any:
            if isinstance(part, Tensor) and part.is_floating_point():
                return part.to(device, dtype)
            return None if part is None else part.to(device)

        return MicroBatch(**{field.name: move(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True, slots=True)
class MiniBatch:
    """One optimiser step: micro-batches ``start`` to ``stop`` - 1 of every rank's share, ``tokens`` in the loss."""

    start: int
    stop: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's update.

    Attributes:
        shares: each rank's micro-batches, a function of the rollouts' lengths alone; as many for every rank, none when
            nothing is unmasked.
        tokens: tokens that enter the loss.
        minibatches: what each optimiser step takes of every share, in order.
        padding: share of padding in all micro-batches together.
        divide_by: the step's denominator, for loss and gradient in the end, where the micro-batches hold undivided
            numbers; None where it is folded in.
    """

    shares: list[list[MicroBatch]]
    tokens: int
    padding: float
    minibatches: list[MiniBatch]
    divide_by: float | None = None

    @property
    def micro(self) -> list[MicroBatch]:
        """All ranks' micro-batches, rank by rank."""
        return [micro for share in self.shares for micro in share]


def make_batch(
    rollouts: Sequence[Rollout],
    *,
    aggregation: Aggregation,
    max_tokens: int,
    ranks: int = 1,
    packed: bool = False,
    crossover: float = math.inf,
    minibatches: int = 1,
    cut: Sequence[Sequence[int]] | None = None,
) -> Batch:
    """Fold the denominators in, then cut.

    Args:
        rollouts: all of a step's, credited.
        aggregation: see ``objective.aggregate.coefficients``.
        max_tokens: prompt + response tokens of a micro-batch, padding included.
        ranks: that share the micro-batches.
        packed: one row of several rollouts without padding; else rows of like length, padded on the right.
        crossover: as for ``packing.deal``, which cuts what is packed.
        minibatches: parts of whole groups in the order of the rollouts, as even as can be; each is cut on its own, with
            denominators of its own. One with nothing unmasked is left out.
        cut: indices of the unmasked rollouts by micro-batch, in place of the cut by length (tests of the law that the
            cut does not matter); of a single mini-batch.

    Raises:
        ValueError: a rollout that was not credited, or one with distill != 0 and no teacher log-probs (its id).
    """
    shares: list[list[MicroBatch]] = [[] for _ in range(ranks)]
    minis: list[MiniBatch] = []
    for places in _by_groups(rollouts, minibatches):
        part = [rollouts[place] for place in places]
        reinforce, distill, lengths, masked = _credit(part)
        numbers = coefficients(reinforce, distill, lengths, masked, _groups(part), aggregation)
        dealt = _deal(part, max_tokens, ranks, packed, crossover) if cut is None else _in_turn(cut, ranks)
        start, tokens = len(shares[0]), 0
        for share, more in zip(shares, _micro_batches(part, places, dealt, *numbers, packed=packed), strict=True):
            share += more
            tokens += sum(micro.rollout.numel() for micro in more)
        if tokens:
            minis.append(MiniBatch(start, len(shares[0]), tokens))
    return Batch(shares, sum(mini.tokens for mini in minis), padding_share(shares), minis)


def make_part(
    rollouts: Sequence[Rollout],
    places: Sequence[int],
    *,
    aggregation: Aggregation,
    max_tokens: int,
    ranks: int = 1,
    packed: bool = False,
    crossover: float = math.inf,
) -> list[list[MicroBatch]]:
    """Shares of some of a step's rollouts, with numbers that are not divided by the step's denominator.

    Args:
        rollouts: credited, whole groups.
        places: their indices within the step.
        aggregation: one of ``objective.aggregate.ONE_DENOMINATOR``.
        max_tokens, ranks, packed, crossover: as for ``make_batch``.

    Returns:
        As ``Batch.shares``.

    Raises:
        ValueError: as ``make_batch``.
    """
    reinforce, distill = undivided(*_credit(rollouts), aggregation)
    dealt = _deal(rollouts, max_tokens, ranks, packed, crossover)
    return _micro_batches(rollouts, places, dealt, reinforce, distill, packed=packed)


def padding_share(shares: Iterable[Iterable[MicroBatch]]) -> float:
    """Share of padding in all micro-batches together; 0 where there is nothing."""
    cells = padding = 0
    for share in shares:
        for micro in share:
            cells, padding = cells + micro.cells, padding + micro.padded
    return padding / cells if cells else 0.0


def step_denominator(rollouts: Sequence[Rollout], aggregation: Aggregation) -> float:
    """What the parts of a step are divided by in the end; of all of its rollouts."""
    _, _, lengths, masked = _credit(rollouts)
    return denominator(lengths, masked, _groups(rollouts), aggregation)


def _credit(rollouts: Sequence[Rollout]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """reinforce F64[N], distill F64[N], tokens in the loss I[N], masked bool[N]."""
    for rollout in rollouts:
        if rollout.reinforce is None or rollout.distill is None:
            raise ValueError(f"rollout {rollout.id!r} has no credit; expected reinforce and distill")
        if rollout.distill and not rollout.masked and rollout.teacher_logprobs is None:
            raise ValueError(f"rollout {rollout.id!r} has distill = {rollout.distill} and no teacher log-probs")
    return (
        torch.tensor([rollout.reinforce for rollout in rollouts], dtype=torch.float64),
        torch.tensor([rollout.distill for rollout in rollouts], dtype=torch.float64),
        torch.tensor([trained_tokens(rollout) for rollout in rollouts], dtype=torch.long),
        torch.tensor([rollout.masked for rollout in rollouts], dtype=torch.bool),
    )


def _groups(rollouts: Sequence[Rollout]) -> Tensor:
    groups: dict[str, int] = {}
    return torch.tensor([groups.setdefault(rollout.group, len(groups)) for rollout in rollouts], dtype=torch.long)


def _by_groups(rollouts: Sequence[Rollout], count: int) -> list[list[int]]:
    """Indices by mini-batch; none is empty."""
    groups = _groups(rollouts).tolist()
    total = max(groups, default=-1) + 1
    parts: list[list[int]] = [[] for _ in range(count)]
    for index, group in enumerate(groups):
        parts[group * count // total].append(index)
    return [part for part in parts if part]


def _deal(
    rollouts: Sequence[Rollout], max_tokens: int, ranks: int, packed: bool, crossover: float
) -> list[list[Sequence[int]]]:
    """Those that go through the model, by [rank][micro-batch]."""
    live = [index for index, rollout in enumerate(rollouts) if not rollout.masked and trained_tokens(rollout)]
    lengths = [len(rollouts[index].prompt_token_ids) + len(rollouts[index].token_ids) for index in live]
    if packed:
        dealt = deal(lengths, max_tokens, ranks=ranks, crossover=crossover)
        return [[[live[index] for index in packs[rank]] for packs in dealt] for rank in range(ranks)]
    return _in_turn([[live[index] for index in members] for members in microbatches(lengths, max_tokens)], ranks)


def _in_turn(batches: Sequence[Sequence[int]], ranks: int) -> list[list[Sequence[int]]]:
    """By [rank][micro-batch]: longest first, every other time the other way round, empty ones last."""
    whole = [*batches, *([()] * (-len(batches) % ranks))]
    turns = [whole[start : start + ranks] for start in range(0, len(whole), ranks)]
    turns = [turn[::-1] if number % 2 else turn for number, turn in enumerate(turns)]
    return [[turn[rank] for turn in turns] for rank in range(ranks)]


def _micro_batches(
    rollouts: Sequence[Rollout],
    places: Sequence[int],
    dealt: Sequence[Sequence[Sequence[int]]],
    reinforce: Tensor,
    distill: Tensor,
    *,
    packed: bool,
) -> list[list[MicroBatch]]:
    """What is dealt, by [rank][micro-batch]; ``places`` are the rollouts' indices within the step."""
    of_step = torch.tensor(places, dtype=torch.long)
    made = [[_micro_batch(rollouts, members, reinforce, distill, packed) for members in share] for share in dealt]
    return [[replace(micro, rollout=of_step[micro.rollout]) for micro in share] for share in made]


def _micro_batch(
    rollouts: Sequence[Rollout], indices: Sequence[int], reinforce: Tensor, distill: Tensor, packed: bool
) -> MicroBatch:
    chosen = [rollouts[index] for index in indices]
    sizes = [len(rollout.token_ids) for rollout in chosen]
    positions = positions_of([len(rollout.prompt_token_ids) for rollout in chosen], sizes, packed=packed)
    kept = torch.tensor(
        [bool(flag) for rollout in chosen for flag in (rollout.loss_mask or [1] * len(rollout.token_ids))],
        dtype=torch.bool,
    )
    owner = torch.tensor(indices, dtype=torch.long).repeat_interleave(torch.tensor(sizes, dtype=torch.long))[kept]
    place = torch.tensor([place for size in sizes for place in range(size)], dtype=torch.long)[kept]
    sampler = [value for rollout in chosen for value in rollout.logprobs]
    teacher = [value for rollout in chosen for value in (rollout.teacher_logprobs or [0.0] * len(rollout.token_ids))]
    judged = [flag for rollout in chosen for flag in (rollout.teacher_mask or [1] * len(rollout.token_ids))]
    taught = torch.tensor(judged, dtype=torch.float64)[kept]
    likeliest = _likeliest(chosen, sizes)
    credit = torch.tensor([[rollout.reinforce, rollout.distill] for rollout in rollouts], dtype=torch.float64)
    return MicroBatch(
        # An empty micro-batch is a row of one token, so that it goes through the model as any other does.
        rows=stack([[*rollout.prompt_token_ids, *rollout.token_ids] for rollout in chosen] or [[0]], packed=packed),
        positions=positions[kept],
        rollout=owner,
        place=place,
        sampler=torch.tensor(sampler, dtype=torch.float64)[kept],
        teacher=torch.tensor(teacher, dtype=torch.float64)[kept],
        reinforce=reinforce[owner],
        distill=distill[owner] * taught,
        credit_reinforce=credit[owner, 0],
        credit_distill=credit[owner, 1] * taught,
        teacher_ids=None if likeliest is None else likeliest[0][kept],
        teacher_id_logprobs=None if likeliest is None else likeliest[1][kept],
    )


def _likeliest(rollouts: Sequence[Rollout], sizes: Sequence[int]) -> tuple[Tensor, Tensor] | None:
    """``Rollout.teacher_topk`` of all response tokens, as ids and log-probs [T, K]; None where there are none."""
    width = max((rollout.teacher_topk.k for rollout in rollouts if rollout.teacher_topk is not None), default=0)
    if not width:
        return None
    ids = torch.full((sum(sizes), width), -1, dtype=torch.long)
    logprobs = torch.full((sum(sizes), width), -torch.inf, dtype=torch.float64)
    start = 0
    for rollout, size in zip(rollouts, sizes, strict=True):
        rows = rollout.teacher_topk
        if rows is not None and size:
            ids[start : start + size, : rows.k] = torch.frombuffer(rows.ids, dtype=torch.int32).view(size, rows.k)
            logprobs[start : start + size, : rows.k] = torch.frombuffer(rows.logprobs, dtype=torch.float32).view(
                size, rows.k
            )
        start += size
    return ids, logprobs
