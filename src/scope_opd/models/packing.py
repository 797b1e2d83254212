"""Sequences packed into rows without padding, and dealt to micro-batches and ranks by what they cost.

``deal`` cuts a step: packs of at most so many tokens, balanced by cost = tokens + tokens^2 / crossover summed over
their sequences, where ``crossover`` is the length at which attention costs as much as everything else. It is a function
of the lengths alone. ``pack`` lays the sequences of a pack one after another, positions counted anew in each;
``packed_hidden`` runs the model over them, and ``models.packed_attention`` keeps them apart. Packed hidden states are
those of each sequence alone; ``packs_exactly`` checks a model for that and says no where its attention cannot be told.
Not covered: sequences split over ranks, models whose layers carry a state from token to token (linear attention).
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from scope_opd.models.head import HeadView
from scope_opd.models.packed_attention import Layout, enable, without_masks


@dataclass(frozen=True, slots=True)
class Pack:
    """Several sequences in one row of N tokens, in the order in which they were given.

    Attributes:
        input_ids: I[1, N].
        position_ids: I[1, N], 0, 1, ... anew in each sequence.
        boundaries: I32[B + 1], where sequences begin, and N.
        layout: the same for the attention of ``models.packed_attention``.
    """

    input_ids: Tensor
    position_ids: Tensor
    boundaries: Tensor
    layout: Layout

    def to(self, device: torch.device) -> Pack:
        """A copy on a device."""
        ids, positions, boundaries = (part.to(device) for part in (self.input_ids, self.position_ids, self.boundaries))
        return Pack(ids, positions, boundaries, self.layout)

    def arguments(self) -> dict[str, Any]:
        """What the model's forward gets besides the ids: read by ``packed_attention`` and by flash attention alike."""
        longest = max(self.layout.lengths, default=0)
        return {
            "position_ids": self.position_ids,
            "cu_seq_lens_q": self.boundaries,
            "cu_seq_lens_k": self.boundaries,
            "max_length_q": longest,
            "max_length_k": longest,
            "packed_layout": self.layout,
        }


def pack(sequences: Sequence[Sequence[int]], device: torch.device | str | None = None) -> Pack:
    """One row of all sequences, one after another.

    Raises:
        ValueError: an empty sequence (its index).
    """
    lengths = [len(sequence) for sequence in sequences]
    if 0 in lengths:
        raise ValueError(f"sequences[{lengths.index(0)}] is empty; expected at least one token")
    starts = [0]
    for length in lengths:
        starts.append(starts[-1] + length)
    return Pack(
        input_ids=torch.tensor([[token for sequence in sequences for token in sequence]], dtype=torch.long).to(device),
        position_ids=torch.cat([torch.arange(length) for length in lengths] or [torch.arange(0)])[None].to(device),
        boundaries=torch.tensor(starts, dtype=torch.int32).to(device),
        layout=Layout(tuple(lengths)),
    )


def response_places(
    prompt_lengths: Sequence[int], response_lengths: Sequence[int], device: torch.device | str | None = None
) -> Tensor:
    """Where the response tokens of packed prompt + response sequences stand.

    Returns:
        I64[T], sequence by sequence, T = sum(response_lengths): the hidden state one place before predicts each token,
        which belongs to the same sequence since a prompt has a token at least.
    """
    places: list[int] = []
    start = 0
    for prompt, response in zip(prompt_lengths, response_lengths, strict=True):
        places.extend(range(start + prompt, start + prompt + response))
        start += prompt + response
    return torch.tensor(places, dtype=torch.long).to(device)


def packed_hidden(view: HeadView, packed: Pack) -> Tensor:
    """``HeadView.hidden`` of every token of a pack, [N, H]; for a model that ``packs_exactly``."""
    with without_masks():
        return view.hidden(packed.input_ids, **packed.arguments())[0]


def packs_exactly(view: HeadView) -> bool:
    """Whether the model's packed hidden states are those of each sequence alone; prepares its attention for packs.

    A model on ``sdpa`` gets an attention that is ``sdpa`` but for packs; flash attention takes packs as it is; any
    other (eager, with its soft-caps) is left alone and cannot be packed.
    """
    if not enable(view.model):
        return False
    device = next(view.model.parameters()).device
    rows = view.model.get_input_embeddings().num_embeddings
    sequences = [[(7 * place + 3 * index + 1) % rows for place in range(size)] for index, size in enumerate((5, 3, 6))]
    with torch.no_grad():
        together = packed_hidden(view, pack(sequences, device)).double()
        alone = [view.hidden(torch.tensor([sequence], device=device))[0].double() for sequence in sequences]
    error = (together - torch.cat(alone)).abs().max()
    exact = {torch.float64: 1e-10, torch.float32: 1e-4}
    tolerance = 5e-2 if torch.is_autocast_enabled(device.type) else exact.get(view.model.dtype, 5e-2)
    return bool(error <= tolerance * together.abs().max())


def crossover(parameters: int, layers: int, width: int) -> float:
    """Length at which a causal sequence's attention costs as much as all products with weights: P / (layers width).

    A token costs 2 P floating-point operations in the weights, and 4 width layers (length / 2) on average in scores
    and values.

    Args:
        parameters: weights that a token is multiplied with (the head counts, an embedding table does not).
        layers: with attention.
        width: query heads x head size.
    """
    return parameters / (layers * width)


def crossover_of(model: PreTrainedModel) -> float:
    """``crossover`` of a model: all its layers attend."""
    text = model.config.get_text_config()
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    if head is not None and head.weight is not embedding.weight:
        parameters -= embedding.weight.numel()
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return crossover(parameters, text.num_hidden_layers, text.num_attention_heads * size)


def cost(length: int, crossover: float = math.inf) -> float:
    """Cost of a sequence in tokens' worth of products with weights: length + length^2 / crossover."""
    return length + length * length / crossover


def deal(
    lengths: Sequence[int], max_tokens: int, *, ranks: int = 1, crossover: float = math.inf
) -> list[list[list[int]]]:
    """Cut sequences into packs, as many for every rank.

    Sequences are taken longest first (equal lengths by index), each into the cheapest pack that has room for it; where
    one has none, all begin again with one pack more a rank. Packs are then sorted by cost, dearest first, so that
    what ranks do at the same time costs about the same and the largest memory is met at once.

    Args:
        lengths: tokens of each sequence, >= 1.
        max_tokens: tokens of a pack at most, >= 1; a longer sequence is a pack of its own.
        ranks: packs that are worked on at the same time.
        crossover: see ``cost``; infinite counts tokens alone.

    Returns:
        Indices into ``lengths`` by [micro-batch][rank], longest first; a pack is empty only where sequences are too
        few. Nothing at all for no sequences.

    Raises:
        ValueError: a number out of range (with its index).
    """
    for name, value in (("max_tokens", max_tokens), ("ranks", ranks)):
        if value < 1:
            raise ValueError(f"{name} = {value}; expected at least 1")
    if not crossover > 0:
        raise ValueError(f"crossover = {crossover}; expected a number > 0")
    for index, length in enumerate(lengths):
        if length < 1:
            raise ValueError(f"lengths[{index}] = {length}; expected at least 1")
    if not lengths:
        return []
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    rows = math.ceil(sum(min(length, max_tokens) for length in lengths) / (ranks * max_tokens))
    while (packs := _fill(lengths, order, rows * ranks, max_tokens, crossover)) is None:
        rows += 1
    packs.sort(key=lambda members: (-sum(cost(lengths[index], crossover) for index in members), members))
    dealt = [packs[start : start + ranks] for start in range(0, len(packs), ranks)]
    # Every other micro-batch the other way round, so that no rank gets the dearest of each.
    return [members[::-1] if number % 2 else members for number, members in enumerate(dealt)]


def waste(lengths: Sequence[int], dealt: Sequence[Sequence[Sequence[int]]], crossover: float = math.inf) -> float:
    """Share of the ranks' time lost while they wait for the dearest pack of each micro-batch; 0 for one rank."""
    costs = [[sum(cost(lengths[index], crossover) for index in members) for members in packs] for packs in dealt]
    paid = sum(len(packs) * max(packs) for packs in costs)
    return 1.0 - sum(map(sum, costs)) / paid if paid else 0.0


def _fill(
    lengths: Sequence[int], order: Sequence[int], count: int, max_tokens: int, crossover: float
) -> list[list[int]] | None:
    """``count`` packs by cost; None where a sequence fits into none."""
    packs: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    heap = [(0.0, number) for number in range(count)]
    for index in order:
        length, full = lengths[index], []
        while heap:
            spent, number = heap[0]
            if not tokens[number] or tokens[number] + length <= max_tokens:
                break
            full.append(heapq.heappop(heap))
        else:
            return None
        heapq.heapreplace(heap, (spent + cost(length, crossover), number))
        packs[number].append(index)
        tokens[number] += length
        for entry in full:
            heapq.heappush(heap, entry)
    return packs
