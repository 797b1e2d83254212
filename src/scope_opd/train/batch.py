"""From a step's credited rollouts to micro-batches: padded ids, and flat numbers for the tokens that enter the loss.

The denominators of the whole step are folded into each rollout's two numbers here, before anything is cut, so that the
gradient of the step is a plain sum over tokens and no cut can change it. Masked rollouts never reach the model. Ranks
get as many micro-batches each: where sequences are too few some are empty, so that all ranks run as many passes.
Not covered: packing of several rollouts into a row.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from scope_opd.credit import trained_tokens
from scope_opd.models.batching import microbatches, pad_right, response_positions
from scope_opd.objective.aggregate import coefficients, denominator, undivided
from scope_opd.objective.methods import Aggregation
from scope_opd.types import Rollout


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Rows that go through the model together. B rows, L columns, T tokens that enter the loss.

    An empty one is a row of a single token, none of them in the loss: it goes through forward and backward passes as
    any other does, and its loss is a zero whose gradient is zero on every parameter.

    Attributes:
        input_ids, attention_mask: I[B, L], prompt + response, padded on the right.
        positions: I[T, 2], (row, column) of each token in the loss.
        rollout, place: I[T], the token's rollout (index within the step) and its index within the response.
        sampler: F64[T], the recorded log mu.
        teacher: F64[T], log pi_T; 0 where there is none (``distill`` is 0 there).
        reinforce, distill: F64[T], the coefficients with the step's denominators folded in; ``distill`` is 0 where the
            teacher does not judge the token (``Rollout.teacher_mask``).
        credit_reinforce, credit_distill: F64[T], the method's own numbers; the latter likewise.
    """

    input_ids: Tensor
    attention_mask: Tensor
    positions: Tensor
    rollout: Tensor
    place: Tensor
    sampler: Tensor
    teacher: Tensor
    reinforce: Tensor
    distill: Tensor
    credit_reinforce: Tensor
    credit_distill: Tensor

    @property
    def cells(self) -> int:
        """Tokens with padding; 0 of an empty one."""
        return self.input_ids.numel() if self.rollout.numel() else 0

    @property
    def padded(self) -> int:
        """Cells that hold padding."""
        return self.cells and self.cells - int(self.attention_mask.sum())

    def to(self, device: torch.device, dtype: torch.dtype) -> MicroBatch:
        """A copy on a device, its floats in ``dtype``."""

        def move(tensor: Tensor) -> Tensor:
            return tensor.to(device, dtype) if tensor.is_floating_point() else tensor.to(device)

        return MicroBatch(**{field.name: move(getattr(self, field.name)) for field in fields(self)})


@dataclass(frozen=True, slots=True)
class Batch:
    """A step's update.

    Attributes:
        shares: each rank's micro-batches, a function of the rollouts' lengths alone; as many for every rank, none when
            nothing is unmasked.
        tokens: tokens that enter the loss.
        padding: share of padding in all micro-batches together.
        divide_by: the step's denominator, for loss and gradient in the end, where the micro-batches hold undivided
            numbers; None where it is folded in.
    """

    shares: list[list[MicroBatch]]
    tokens: int
    padding: float
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
    cut: Sequence[Sequence[int]] | None = None,
) -> Batch:
    """Fold the denominators in, then cut.

    Args:
        rollouts: all of a step's, credited.
        aggregation: see ``objective.aggregate.coefficients``.
        max_tokens: prompt + response tokens of a micro-batch, padding included.
        ranks: that share the micro-batches.
        cut: indices of the unmasked rollouts by micro-batch, in place of the cut by length (tests of the law that the
            cut does not matter).

    Raises:
        ValueError: a rollout that was not credited, or one with distill != 0 and no teacher log-probs (its id).
    """
    reinforce, distill, lengths, masked = _credit(rollouts)
    reinforce, distill = coefficients(reinforce, distill, lengths, masked, _groups(rollouts), aggregation)
    live, sizes = _live(rollouts)
    if cut is None:
        cut = [[live[index] for index in batch] for batch in microbatches(sizes, max_tokens)]
    micro = [_micro_batch(rollouts, indices, reinforce, distill) for indices in cut]
    return Batch(_dealt(micro, ranks), sum(part.rollout.numel() for part in micro), padding_share(micro))


def make_part(
    rollouts: Sequence[Rollout], places: Sequence[int], *, aggregation: Aggregation, max_tokens: int, ranks: int = 1
) -> list[list[MicroBatch]]:
    """Shares of some of a step's rollouts, with numbers that are not divided by the step's denominator.

    Args:
        rollouts: credited, whole groups.
        places: their indices within the step.
        aggregation: one of ``objective.aggregate.ONE_DENOMINATOR``.
        max_tokens, ranks: as for ``make_batch``.

    Returns:
        As ``Batch.shares``.

    Raises:
        ValueError: as ``make_batch``.
    """
    reinforce, distill = undivided(*_credit(rollouts), aggregation)
    live, sizes = _live(rollouts)
    of_step = torch.tensor(places, dtype=torch.long)
    parts = [
        _micro_batch(rollouts, [live[index] for index in batch], reinforce, distill)
        for batch in microbatches(sizes, max_tokens)
    ]
    return _dealt([replace(part, rollout=of_step[part.rollout]) for part in parts], ranks)


def padding_share(micro: Iterable[MicroBatch]) -> float:
    """Share of padding in all micro-batches together; 0 where there is nothing."""
    cells = padded = 0
    for part in micro:
        cells, padded = cells + part.cells, padded + part.padded
    return padded / cells if cells else 0.0


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


def _live(rollouts: Sequence[Rollout]) -> tuple[list[int], list[int]]:
    """Rollouts that go through the model, and their tokens with the prompt."""
    live = [index for index, rollout in enumerate(rollouts) if not rollout.masked and trained_tokens(rollout)]
    return live, [len(rollouts[index].prompt_token_ids) + len(rollouts[index].token_ids) for index in live]


def _dealt(micro: list[MicroBatch], ranks: int) -> list[list[MicroBatch]]:
    """By rank: taken in turn, longest first, every other time the other way round."""
    whole = [*micro, *([_empty()] * (-len(micro) % ranks))]
    turns = [whole[start : start + ranks] for start in range(0, len(whole), ranks)]
    turns = [turn[::-1] if number % 2 else turn for number, turn in enumerate(turns)]
    return [[turn[rank] for turn in turns] for rank in range(ranks)]


def _empty() -> MicroBatch:
    none, real = torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.float64)
    return MicroBatch(
        input_ids=torch.zeros(1, 1, dtype=torch.long),
        attention_mask=torch.ones(1, 1, dtype=torch.long),
        positions=torch.zeros(0, 2, dtype=torch.long),
        rollout=none,
        place=none,
        sampler=real,
        teacher=real,
        reinforce=real,
        distill=real,
        credit_reinforce=real,
        credit_distill=real,
    )


def _micro_batch(rollouts: Sequence[Rollout], indices: Sequence[int], reinforce: Tensor, distill: Tensor) -> MicroBatch:
    chosen = [rollouts[index] for index in indices]
    input_ids, attention_mask = pad_right([[*rollout.prompt_token_ids, *rollout.token_ids] for rollout in chosen])
    sizes = [len(rollout.token_ids) for rollout in chosen]
    positions = response_positions([len(rollout.prompt_token_ids) for rollout in chosen], sizes)
    kept = torch.tensor(
        [bool(flag) for rollout in chosen for flag in (rollout.loss_mask or [1] * len(rollout.token_ids))]
    )
    owner = torch.tensor(indices, dtype=torch.long).repeat_interleave(torch.tensor(sizes))[kept]
    place = torch.tensor([place for size in sizes for place in range(size)], dtype=torch.long)[kept]
    sampler = [value for rollout in chosen for value in rollout.logprobs]
    teacher = [value for rollout in chosen for value in (rollout.teacher_logprobs or [0.0] * len(rollout.token_ids))]
    judged = [flag for rollout in chosen for flag in (rollout.teacher_mask or [1] * len(rollout.token_ids))]
    taught = torch.tensor(judged, dtype=torch.float64)[kept]
    credit = torch.tensor([[rollout.reinforce, rollout.distill] for rollout in rollouts], dtype=torch.float64)
    return MicroBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        positions=positions[kept],
        rollout=owner,
        place=place,
        sampler=torch.tensor(sampler, dtype=torch.float64)[kept],
        teacher=torch.tensor(teacher, dtype=torch.float64)[kept],
        reinforce=reinforce[owner],
        distill=distill[owner] * taught,
        credit_reinforce=credit[owner, 0],
        credit_distill=credit[owner, 1] * taught,
    )
