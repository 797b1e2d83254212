"""Batches under a token budget: sequences sorted by length, cut so that little is padding, padded on the right.

The cut is a function of the lengths alone, so the same step gives the same batches. Not covered: packing several
sequences into one row.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def microbatches(lengths: Sequence[int], max_tokens: int, max_padding: float = 0.05) -> list[list[int]]:
    """Cut sequences into batches of like length.

    Sequences are sorted by length, longest first (equal lengths by index), and taken greedily: a batch is closed when
    one more sequence would push rows x longest over ``max_tokens``, or its padding 1 - sum(lengths) / (rows x longest)
    over ``max_padding``. Every sequence comes exactly once; one that is longer than ``max_tokens`` forms a batch of
    its own.

    Args:
        lengths: tokens of each sequence, >= 0.
        max_tokens: tokens of a batch at most, padding included; > 0.
        max_padding: share of padding that a batch may have, in [0, 1). 0 puts only equal lengths together.

    Returns:
        Indices into ``lengths``, batch by batch, longest batch first.

    Raises:
        ValueError: a budget or share out of range, a negative length (with its index).
    """
    if max_tokens < 1:
        raise ValueError(f"max_tokens = {max_tokens}, expected at least 1")
    if not 0 <= max_padding < 1:
        raise ValueError(f"max_padding = {max_padding}, expected a share in [0, 1)")
    for index, length in enumerate(lengths):
        if length < 0:
            raise ValueError(f"lengths[{index}] = {length}, expected at least 0")
    batches: list[list[int]] = []
    current: list[int] = []
    longest = total = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        length = lengths[index]
        padded = (len(current) + 1) * longest
        if current and (padded > max_tokens or padded - total - length > max_padding * padded):
            batches.append(current)
            current, total = [], 0
        if not current:
            longest = length
        current.append(index)
        total += length
    if current:
        batches.append(current)
    return batches


def padding_share(lengths: Sequence[int], batches: Sequence[Sequence[int]]) -> float:
    """Share of padding in all batches together: 1 - tokens / sum(rows x longest); 0 where there is nothing."""
    padded = sum(len(batch) * max(lengths[index] for index in batch) for batch in batches if batch)
    tokens = sum(lengths[index] for batch in batches for index in batch)
    return 1 - tokens / padded if padded else 0.0


def pad_right(
    sequences: Sequence[Sequence[int]], pad_id: int = 0, device: torch.device | str | None = None
) -> tuple[Tensor, Tensor]:
    """Stack token ids, padded on the right.

    Returns:
        input_ids I64[B, L] and attention_mask I64[B, L] (1 on tokens, 0 on padding), L the longest sequence.
    """
    longest = max((len(sequence) for sequence in sequences), default=0)
    ids = [[*sequence, *([pad_id] * (longest - len(sequence)))] for sequence in sequences]
    mask = [[1] * len(sequence) + [0] * (longest - len(sequence)) for sequence in sequences]
    shape = (len(sequences), longest)
    return (
        torch.tensor(ids, dtype=torch.long).reshape(shape).to(device),
        torch.tensor(mask, dtype=torch.long).reshape(shape).to(device),
    )


def response_positions(
    prompt_lengths: Sequence[int], response_lengths: Sequence[int], device: torch.device | str | None = None
) -> Tensor:
    """Where the response tokens of right-padded prompt + response rows stand.

    Returns:
        I64[T, 2] of (row, column), row by row, T = sum(response_lengths): what ``models.head`` takes as positions.
    """
    rows = torch.repeat_interleave(
        torch.arange(len(response_lengths)), torch.tensor(response_lengths, dtype=torch.long)
    )
    columns = [
        column
        for start, length in zip(prompt_lengths, response_lengths, strict=True)
        for column in range(start, start + length)
    ]
    return torch.stack((rows, torch.tensor(columns, dtype=torch.long)), dim=1).to(device)
