"""Weights that stay in their files until they are wanted, so that no rank holds a student whole before it is dealt out.

A deferred parameter knows its shape, its dtype and its device, and takes no memory: all its entries are one NaN, which
whoever reads them too early will notice. Its values are a tensor that is mapped from the checkpoint and belongs to the
page cache, which all ranks of a machine share. ``fill`` gives a module its weights, for good where they are dealt out
next (``sharding.shard``); ``runnable`` gives each layer its own for the time of its pass, so that a deferred model can
be tried out. What transformers makes while it loads (the stacked experts of mixtures) is no part of a file: each rank
has it in memory of its own until the layer is filled. Not covered: gradients of deferred parameters, copies of deferred
models.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scope_opd.models.watch import decoder_layers

SOURCE = "_scope_source"
"""Attribute of a deferred parameter: its values."""


def defer(model: nn.Module, device: torch.device, dtype: torch.dtype | None = None) -> None:
    """Set a model's weights aside, in place.

    Args:
        model: whole, on the CPU.
        device: on which weights will be.
        dtype: in which; None: each in its own.
    """
    for parameter in model.parameters():
        setattr(parameter, SOURCE, parameter.data)
        kept = dtype if dtype is not None and parameter.is_floating_point() else parameter.dtype
        parameter.data = _stand_in(parameter.shape, kept, device)


def deferred(model: nn.Module) -> bool:
    """Whether a model has weights that are set aside."""
    return any(_source(parameter) is not None for parameter in model.parameters())


def values(parameter: Tensor) -> Tensor:
    """Those of a parameter, wherever they are; perhaps not in its dtype yet, nor on its device."""
    source = _source(parameter)
    return parameter.detach() if source is None else source


def fill(module: nn.Module, *, recurse: bool = True) -> None:
    """Give a module the weights that were set aside, and those of all modules within it unless not ``recurse``."""
    for parameter in module.parameters(recurse=recurse):
        source = _source(parameter)
        if source is not None:
            # First to the device: what moves is then as small as in the file.
            parameter.data = source.to(parameter.device).to(parameter.dtype)


@contextmanager
def runnable(model: PreTrainedModel) -> Iterator[None]:
    """Within it a deferred model computes: what is around its layers has its weights, a layer while it runs.

    Nothing is done for a model that is whole.
    """
    if not deferred(model):
        yield
        return
    layers = decoder_layers(model)
    inside = {id(module) for layer in layers for module in layer.modules()}
    outside = [module for module in model.modules() if id(module) not in inside]
    kept = {id(parameter) for module in outside for parameter in module.parameters(recurse=False)}

    def leave(layer: nn.Module, *_: Any) -> None:
        _let_go(parameter for parameter in layer.parameters() if id(parameter) not in kept)

    def enter(layer: nn.Module, *_: Any) -> None:
        fill(layer)

    handles = [layer.register_forward_pre_hook(enter) for layer in layers]
    handles += [layer.register_forward_hook(leave, always_call=True) for layer in layers]
    try:
        for module in outside:
            fill(module, recurse=False)
        yield
    finally:
        for handle in handles:
            handle.remove()
        _let_go(model.parameters())


def _let_go(parameters: Iterator[nn.Parameter]) -> None:
    for parameter in parameters:
        if _source(parameter) is not None:
            parameter.data = _stand_in(parameter.shape, parameter.dtype, parameter.device)


def _source(parameter: Tensor) -> Tensor | None:
    found: Tensor | None = getattr(parameter, SOURCE, None)
    return found


def _stand_in(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    one = torch.full((), math.nan if dtype.is_floating_point else 0, dtype=dtype, device=device)
    return one.expand(shape)
