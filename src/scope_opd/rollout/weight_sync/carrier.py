"""What carries weights to servers, as the publisher sees it, and the tensors that are carried.

Source of the names: transformers' ``save_pretrained``, of which ``checkpoint_tensors`` is the part before the file.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from scope_opd.models.adapters import plain_state_dict
from scope_opd.serving.control import Control

Load = Callable[[Control], Awaitable[None]]
"""Brings the weights of one version to one server, which is paused. May be called for several servers at once, and
again later, while the trainer's own weights change: it holds, or has written, a copy.

Raises ``Fault`` where it may work another time, ``ScopeError`` where a setting is wrong.
"""


class Carrier(Protocol):
    """One way to carry weights. ``prepare`` and ``close`` are called by the trainer's thread."""

    def prepare(self, version: int, tag: str) -> Load:
        """Copy the student's weights as they are now.

        Raises:
            RunFailed: that could not be done (a full disk ...).
        """
        ...

    def close(self) -> None:
        """Let go of everything. May be called twice."""
        ...


def checkpoint_tensors(model: Any, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """A model's tensors under the names of its Hugging Face checkpoint, each stored once where it is tied.

    Adapters are merged into copies of the weights that they belong to: servers know nothing of them.

    Args:
        model: a transformers model, whole on its device (not sharded).
        dtype: floating-point tensors are cast to it; None leaves them.

    Returns:
        name -> tensor, detached; not a copy where nothing was cast.
    """
    from transformers.core_model_loading import revert_weight_conversion
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    tensors: dict[str, Tensor] = remove_tied_weights_from_state_dict(plain_state_dict(model), model)
    tensors = revert_weight_conversion(model, tensors)
    return {
        name: tensor.detach().to(dtype) if dtype is not None and tensor.is_floating_point() else tensor.detach()
        for name, tensor in tensors.items()
    }
