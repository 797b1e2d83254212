"""Attention over packs: several sequences in one row that must not see one another.

A dense block-diagonal mask costs the square of the row; here every sequence costs its own square. On the CPU (and on a
GPU without a kernel for ragged rows) the sequences of a row are put into groups of like length, each group goes through
``scaled_dot_product_attention`` as a batch, padded on the right: with causal attention no token sees that padding. On a
GPU in half precision the ragged row goes to torch's variable-length flash attention as it is.

``enable`` registers this with transformers' attention interface under ``NAME`` and gives it to a model on ``sdpa``.
Without a pack in its arguments it *is* ``sdpa``, masks included, so that the model goes on doing everything else as
before; and since a layer that is computed again in the backward pass gets the same arguments, packs survive activation
checkpointing. Not covered: attention soft-caps and biases (such models stay on their own attention, and unpacked).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "scope_packed"
# Share of a group's cells that may be padding. Sequences of 2,048 tokens and more have work enough for a call each.
GROUP_PADDING = 0.15
LONG = 2048

_packed: ContextVar[bool] = ContextVar("packed", default=False)
_kernels: dict[tuple[str, int], Callable[..., Tensor] | None] = {}


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that go through attention together: ``members`` of the row, padded to ``longest``."""

    members: tuple[int, ...]
    longest: int

    @property
    def cells(self) -> int:
        """With padding."""
        return len(self.members) * self.longest


@dataclass(frozen=True, slots=True)
class Moves:
    """How a row of N tokens becomes the cells of its groups, one group after the other, and back.

    Attributes:
        places: I[cells], where in the row each comes from; for padding the sequence's last token.
        cells: I[N], the cell of each token.
    """

    places: Tensor
    cells: Tensor


@dataclass(eq=False)
class Layout:
    """Lengths of the sequences of a row, and how attention takes them; made once and used by every layer."""

    lengths: tuple[int, ...]
    _moves: dict[str, Moves] = field(default_factory=dict)
    _bands: dict[tuple[int, int, str], Tensor] = field(default_factory=dict)

    @functools.cached_property
    def groups(self) -> list[Group]:
        """Every sequence in one of them."""
        return [Group(tuple(members), self.lengths[members[0]]) for members in _alike(self.lengths)]

    def moves(self, device: torch.device) -> Moves | None:
        """None where the cells of the groups are the row as it is."""
        order = [index for group in self.groups for index in group.members]
        if order == sorted(order) and sum(group.cells for group in self.groups) == sum(self.lengths):
            return None
        name = str(device)
        if name not in self._moves:
            starts = [0, *accumulate(self.lengths)]
            places, cells = [], torch.empty(starts[-1], dtype=torch.long)
            first = 0
            for group in self.groups:
                for index in group.members:
                    length = self.lengths[index]
                    cells[starts[index] : starts[index + 1]] = torch.arange(first, first + length)
                    places.append(starts[index] + torch.arange(group.longest).clamp_max(length - 1))
                    first += group.longest
            self._moves[name] = Moves(torch.cat(places).to(device), cells.to(device))
        return self._moves[name]

    def band(self, longest: int, window: int, device: torch.device) -> Tensor:
        """bool[longest, longest], True where a query sees a key: itself and the window - 1 before it."""
        key = (longest, window, str(device))
        if key not in self._bands:
            places = torch.arange(longest, device=device)
            behind = places[:, None] - places
            self._bands[key] = (behind >= 0) & (behind < window)
        return self._bands[key]


def enable(model: PreTrainedModel) -> bool:
    """Let ``model`` take packs; False where its attention cannot: it is then left as it is."""
    current = model.config.get_text_config()._attn_implementation or ""
    if current == NAME or "flash" in current:
        return True
    if current != "sdpa":
        return False
    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, _mask)
    model.set_attn_implementation(NAME)
    return model.config.get_text_config()._attn_implementation == NAME


@contextmanager
def without_masks() -> Iterator[None]:
    """Models build no mask in here: what keeps sequences apart is the pack in their arguments."""
    token = _packed.set(True)
    try:
        yield
    finally:
        _packed.reset(token)


def _mask(*args: Any, **kwargs: Any) -> Tensor | None:
    return None if _packed.get() else sdpa_mask(*args, **kwargs)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed_layout: Layout | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each sequence of a pack; ``sdpa`` where there is no pack.

    Args:
        query: F[1, heads, N, D]; key, value: F[1, key-value heads, N, D].
        sliding_window: keys that a query sees at most, itself included.
        packed_layout: the sequences of the row.
        cu_seq_lens_q: I32[B + 1], the same for kernels.

    Returns:
        F[1, N, heads, D], None.
    """
    if packed_layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, sliding_window=sliding_window, **kwargs
        )
    assert attention_mask is None
    assert query.shape[0] == 1
    assert query.shape[2] == sum(packed_layout.lengths)
    if torch.is_autocast_enabled(query.device.type):
        # Norms and rotations hand on float32, which SDPA would cast on its own and the kernel does not take.
        compute = torch.get_autocast_dtype(query.device.type)
        query, key, value = (part.to(compute) for part in (query, key, value))
    row = tuple(part[0].transpose(0, 1) for part in (query, key, value))  # [N, heads, D]
    half = query.is_cuda and query.dtype in (torch.bfloat16, torch.float16)
    kernel = _ragged_kernel(query.device, query.shape[-1]) if half else None
    if kernel is not None and not dropout:
        longest = max(packed_layout.lengths)
        return kernel(*row, cu_seq_lens_q, longest, scaling, sliding_window)[None], None
    moves = packed_layout.moves(query.device)
    if moves is not None:
        row = tuple(part.index_select(0, moves.places) for part in row)
    groups = packed_layout.groups
    batches = zip(*(part.split([group.cells for group in groups]) for part in row), strict=True)
    cells = [
        _attend(batch, group, packed_layout, sliding_window, scaling, dropout)
        for batch, group in zip(batches, groups, strict=True)
    ]
    whole = cells[0] if len(cells) == 1 else torch.cat(cells)
    return (whole if moves is None else whole.index_select(0, moves.cells))[None], None


def _attend(
    batch: tuple[Tensor, ...], group: Group, layout: Layout, window: int | None, scaling: float | None, dropout: float
) -> Tensor:
    """F[cells, heads, D] of one group."""
    sides = (len(group.members), group.longest)
    query, key, value = (part.unflatten(0, sides).transpose(1, 2) for part in batch)
    band = layout.band(group.longest, window, query.device) if window and window < group.longest else None
    out = scaled_dot_product_attention(
        query, key, value, attn_mask=band, dropout_p=dropout, is_causal=band is None and group.longest > 1,
        scale=scaling, enable_gqa=query.shape[1] != key.shape[1],
    )  # fmt: skip
    return out.transpose(1, 2).flatten(0, 1)


def _alike(lengths: tuple[int, ...]) -> list[list[int]]:
    """Sequences by groups of like length, longest first: at most ``GROUP_PADDING`` of a group is padding."""
    groups: list[list[int]] = []
    longest = total = 0
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        length = lengths[index]
        if groups and longest < LONG:
            padded = (len(groups[-1]) + 1) * longest
            if padded - total - length <= GROUP_PADDING * padded:
                groups[-1].append(index)
                total += length
                continue
        groups.append([index])
        longest = total = length
    return groups


def _ragged_kernel(device: torch.device, size: int) -> Callable[..., Tensor] | None:
    """Torch's flash attention over ragged rows; None where it cannot be had for heads of this size on a device."""
    key = (str(device), size)
    if key not in _kernels:
        _kernels[key] = _find_kernel(device, size)
    return _kernels[key]


def _find_kernel(device: torch.device, size: int) -> Callable[..., Tensor] | None:
    """None where torch lacks something that is needed here, or ``_agrees`` says no."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= set(known):
        return None

    def attend(
        query: Tensor, key: Tensor, value: Tensor, boundaries: Tensor, longest: int, scaling: float | None,
        window: int | None,
    ) -> Tensor:  # fmt: skip
        grouped: dict[str, Any] = {}
        if query.shape[1] != key.shape[1]:
            if "enable_gqa" in known:
                grouped["enable_gqa"] = True
            else:
                repeats = query.shape[1] // key.shape[1]
                key, value = (part.repeat_interleave(repeats, dim=1) for part in (key, value))
        found = varlen_attn(
            query.contiguous(), key.contiguous(), value.contiguous(), boundaries, boundaries, longest, longest,
            scale=scaling, window_size=(window - 1 if window else -1, 0), **grouped,
        )  # fmt: skip
        assert isinstance(found, Tensor)
        return found

    return attend if _agrees(attend, device, size) else None


def _agrees(attend: Callable[..., Tensor], device: torch.device, size: int) -> bool:
    """Whether a kernel over ragged rows gives SDPA's numbers, forward and backward, causal and with a window."""
    lengths, window = (5, 3), 2
    boundaries = torch.tensor([0, 5, 8], dtype=torch.int32, device=device)
    places = torch.arange(sum(lengths), device=device)
    owner = torch.tensor([0] * 5 + [1] * 3, device=device)
    behind = places[:, None] - places
    with torch.enable_grad(), torch.autocast(device.type, enabled=False):
        generator = torch.Generator().manual_seed(0)
        drawn = [torch.randn(8, heads, size, generator=generator) for heads in (4, 2, 2)]
        row = [part.to(device, torch.bfloat16).requires_grad_() for part in drawn]
        for keys in (None, window):
            seen = (owner[:, None] == owner) & (behind >= 0) & (behind < (keys or 8))
            query, key, value = (part.float().transpose(0, 1)[None] for part in row)
            exact = scaled_dot_product_attention(query, key, value, attn_mask=seen, scale=0.3, enable_gqa=True)
            exact = exact[0].transpose(0, 1)
            try:
                found = attend(*row, boundaries, max(lengths), 0.3, keys)
                pairs = [(found.float(), exact)]
                gradients = (torch.autograd.grad(out.float().square().sum(), row) for out in (found, exact))
                pairs += zip(*gradients, strict=True)
            except Exception:  # whatever a kernel cannot do on this device: SDPA can
                return False
            if any((one.float() - two.float()).norm() > 5e-2 * two.float().norm() for one, two in pairs):
                return False
    return True
