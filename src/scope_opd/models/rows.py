"""Sequences that go through a model together: packed into one row without padding, or a row each, padded on the right.

Either way the tokens that matter are named by positions (row, column), and the hidden state one column before predicts
each of them. Not covered: which sequences go together (``packing.deal``, ``batching.microbatches``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from scope_opd.models.batching import pad_right, response_positions
from scope_opd.models.head import HeadView, TokenScores, score_hidden
from scope_opd.models.packing import Pack, pack, packed_hidden, response_places


@dataclass(frozen=True, slots=True)
class Rows:
    """B sequences.

    Attributes:
        input_ids: I[1, N] packed, I[B, L] padded.
        lengths: tokens of each sequence.
        packed: how the one row is made up; None where rows are padded.
    """

    input_ids: Tensor
    lengths: tuple[int, ...]
    packed: Pack | None = None

    @property
    def cells(self) -> int:
        """Tokens with padding."""
        return self.input_ids.numel()

    @property
    def padding(self) -> int:
        """Cells that hold padding."""
        return self.cells - sum(self.lengths)

    def to(self, device: torch.device) -> Rows:
        """A copy on a device."""
        return Rows(self.input_ids.to(device), self.lengths, None if self.packed is None else self.packed.to(device))

    def tokens(self, positions: Tensor) -> Tensor:
        """I[T]: the tokens at ``positions`` I[T, 2]."""
        return self.input_ids[positions[:, 0], positions[:, 1]]

    def response_hidden(self, view: HeadView, positions: Tensor) -> Tensor:
        """Hidden states that predict the tokens at ``positions``.

        Args:
            view: of the model; where sequences are packed, one that ``packing.packs_exactly``.
            positions: I[T, 2] of (row, column); no sequence's first token is among them.

        Returns:
            [T, H].
        """
        if self.packed is not None:
            return packed_hidden(view, self.packed)[positions[:, 1] - 1]
        return view.response_hidden(self.input_ids, None, positions)  # padding is on the right: no token sees it

    def below(self, rows: int) -> Rows:
        """With ids that an embedding of so many rows does not have replaced by its last."""
        ids = self.input_ids.clamp_max(rows - 1)
        return Rows(ids, self.lengths, None if self.packed is None else replace(self.packed, input_ids=ids))

    def touched(self, positions: Tensor, *, packed: bool | None = None) -> tuple[Rows, Tensor]:
        """The sequences that hold some of ``positions``, on their own.

        Args:
            positions: I[T, 2] in these rows.
            packed: how the new rows are laid out; None as these are.

        Returns:
            The new rows, and where the same tokens stand in them, I[T, 2].
        """
        packed = self.packed is not None if packed is None else packed
        owner, place = self.owners(positions)
        chosen, owner = owner.unique(return_inverse=True)
        if len(chosen) == len(self.lengths) and packed == (self.packed is not None):
            return self, positions
        sequences = self.sequences()
        rows = stack([sequences[index] for index in chosen.tolist()], packed=packed, device=self.input_ids.device)
        if rows.packed is not None:
            owner, place = torch.zeros_like(owner), place + rows.packed.boundaries[owner]
        return rows, torch.stack((owner, place), dim=1)

    def owners(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """For ``positions`` I[T, 2] the sequences that hold them, and their places in these; I[T] each."""
        owner, place = positions.unbind(1)
        if self.packed is not None:
            owner = torch.searchsorted(self.packed.boundaries, place.contiguous(), right=True) - 1
            place = place - self.packed.boundaries[owner]
        return owner, place

    def sequences(self) -> list[list[int]]:
        """The token ids of each."""
        if self.packed is None:
            return [row[:length] for row, length in zip(self.input_ids.tolist(), self.lengths, strict=True)]
        row = self.input_ids[0].tolist()
        return [row[start:end] for start, end in pairwise(self.packed.boundaries.tolist())]


def stack(sequences: Sequence[Sequence[int]], *, packed: bool, device: torch.device | str | None = None) -> Rows:
    """Sequences as rows.

    Args:
        sequences: token ids, at least one each where they are packed.
        packed: into one row; else padded on the right.
    """
    lengths = tuple(len(sequence) for sequence in sequences)
    if packed:
        made = pack(sequences, device)
        return Rows(made.input_ids, lengths, made)
    return Rows(pad_right(sequences, device=device)[0], lengths)


def rows_logprobs(
    view: HeadView, rows: Rows, positions: Tensor, temperature: float = 1.0, **options: Any
) -> TokenScores:
    """``head.response_logprobs`` of rows; ``options`` go to ``head.score_hidden``."""
    return score_hidden(view, rows.response_hidden(view, positions), rows.tokens(positions), temperature, **options)


def positions_of(prompts: Sequence[int], responses: Sequence[int], *, packed: bool) -> Tensor:
    """I[T, 2]: where the response tokens of prompt + response sequences of these lengths stand, in order."""
    if not packed:
        return response_positions(prompts, responses)
    places = response_places(prompts, responses)
    return torch.stack((torch.zeros_like(places), places), dim=1)
