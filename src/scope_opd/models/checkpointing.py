"""Activation checkpointing: decoder layers whose activations the backward pass computes again instead of keeping them.

A layer's own ``forward`` is replaced on the instance, inside whatever hooks the module has: those of FSDP, which gather
its weights, run once a pass and not again as the layer is recomputed. A recomputed layer gets the arguments of its
forward pass as they were, those that describe a pack included. Nothing is recomputed without gradient (sampling,
scoring) or where keys and values are cached, so one model serves training and decoding; modules stay in eval mode, so
dropout stays off and no random state is kept.

Not covered: selective recomputation inside a layer; what other modules (embedding, head) keep.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from scope_opd.errors import ConfigError
from scope_opd.models.watch import decoder_layers
from scope_opd.words import counted

Setting = Literal["off", "full", "offload"] | int
"""``train.activation_checkpointing``."""
Keep = Callable[[Tensor], AbstractContextManager[Any]]
"""Makes of a layer's input the context in which it is saved for the backward pass."""


def recomputed(index: int, setting: Setting) -> bool:
    """Whether layer ``index``, counted from the lowest, is computed again: all of them, or every ``setting``-th."""
    if isinstance(setting, int):
        return index % setting == 0
    return setting != "off"


def recomputed_share(layers: int, setting: Setting) -> float:
    """Share of the layers that are computed again."""
    return sum(recomputed(index, setting) for index in range(layers)) / layers


def check_setting(setting: Setting, layers: int) -> None:
    """Refuse what means nothing to a model: every n-th of fewer than n layers.

    Args:
        setting: of ``train.activation_checkpointing``.
        layers: of the model.

    Raises:
        ConfigError: there are fewer layers.
    """
    if isinstance(setting, int) and setting > layers:
        raise ConfigError(
            f"train.activation_checkpointing = {setting} and the student has {counted(layers, 'layer')}",
            f"every n-th of them, n from 1 to {layers}", "lower it, or set 'full' or 'off'",
        )  # fmt: skip


def set_checkpointing(model: PreTrainedModel, setting: Setting, *, keep: Keep | None = None) -> None:
    """Set up a model's decoder layers; replaces what was set up before. Gradients are those of "off", bit for bit.

    Args:
        model: before it is sharded.
        setting: "off"; "full": every layer is recomputed; n: every n-th is, from the lowest on; "offload": every layer
            is, and its input waits in CPU memory (pinned where the model is on a GPU; a CPU's stay where they are).
        keep: in place of how "offload" saves a layer's input.

    Raises:
        ModelError: the model has no list of layers.
        ValueError: n < 1.
    """
    if isinstance(setting, int) and setting < 1:
        raise ValueError(f"activation_checkpointing = {setting}; expected at least 1")
    if setting == "offload":
        keep = keep or _on_cpu
    elif keep is None:
        keep = _in_place
    for index, layer in enumerate(decoder_layers(model)):
        vars(layer).pop("forward", None)
        if recomputed(index, setting):
            # A bound method, so that a deep copy of the model runs its own layers.
            vars(layer)["forward"] = MethodType(partial(_forward, keep), layer)


def _forward(keep: Keep, layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = type(layer).forward
    if not torch.is_grad_enabled() or kwargs.get("past_key_values") is not None:
        return forward(layer, *args, **kwargs)
    if not args:
        args = (kwargs.pop("hidden_states"),)
    # Only what ``checkpoint`` itself saves, its positional arguments, passes through ``keep``.
    with keep(args[0]):
        return checkpoint(partial(forward, layer, **kwargs), *args, use_reentrant=False, preserve_rng_state=False)


def _in_place(hidden: Tensor) -> AbstractContextManager[Any]:
    return nullcontext()


def _on_cpu(hidden: Tensor) -> AbstractContextManager[Any]:
    return save_on_cpu(pin_memory=hidden.is_cuda)
