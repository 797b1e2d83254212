"""Counts what a model's passes allocate, storage by storage, as it is made and freed; tensors need no data.

Not covered: scratch memory inside kernels, an allocator's fragmentation.
"""

from __future__ import annotations

import weakref
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from scope_opd.errors import ModelError

UNSHARED = (4, 2)
"""Uses of a tensor and of its storage where a dispatch mode sees autograd add to a gradient that nobody else holds."""
Moments = dict[str, Counter[str]]
"""Bytes by part at the largest instant of each kind of moment."""


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers: the longest list of modules that is in no other (a layer's experts may be more)."""
    lists = [module for module in model.base_model.modules() if isinstance(module, nn.ModuleList)]
    within = {id(module) for outer in lists for child in outer for module in child.modules()}
    lists = [each for each in lists if id(each) not in within]
    if not lists:
        raise ModelError(f"model type {model.config.model_type!r} has no list of layers", "a decoder", "measure it")
    return max(lists, key=len)


@dataclass(slots=True)
class _Live:
    size: int
    part: str


@dataclass(slots=True)
class _Sizes:
    now: Counter[str] = field(default_factory=Counter)
    total: int = 0


class Watch(TorchDispatchMode):
    """Counts storages as they are made and freed, by the part of the model in whose forward pass they were made."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.moment = "forward"
        self.moments: Moments = {}
        self._live: dict[int, _Live] = {}
        self._sizes = _Sizes()
        self._stack: list[str] = []
        self._weights = {p.untyped_storage()._cdata for p in model.parameters()}
        self._parameters = list(model.parameters())
        self._gradients: set[int] = set()
        self._handles: list[Any] = []
        self._peaks: dict[str, int] = {}
        self._hook(model)

    def __enter__(self) -> Watch:
        # Gradients are added to in place: what is there already is not made by the pass.
        self._gradients = {p.grad.untyped_storage()._cdata for p in self._parameters if p.grad is not None}
        super().__enter__()
        return self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # asked twice for every operation; it makes nothing
        if func is torch.ops.aten.add.Tensor and not self._stack and isinstance(args[0], Tensor) and _unshared(args[0]):
            # Autograd adds a second gradient to the first in place, but not while a dispatch mode looks on.
            self._gone(args[0].untyped_storage()._cdata)
        result = func(*args, **(kwargs or {}))
        part = self._stack[0] if self._stack else "backward" if "layer" in self.moment else _REST[self.moment]
        if func is torch.ops.aten._to_copy.default and self._is_weight(args[0]):
            part = "cast weights"
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf, part)
        return result

    def note(self, moment: str) -> None:
        """Remember what is alive now, where it is the most for this kind of moment."""
        if self._sizes.total > self._peaks.get(moment, -1):
            self._peaks[moment] = self._sizes.total
            self.moments[moment] = +self._sizes.now

    def detach(self) -> None:
        for handle in self._handles:
            handle.remove()

    def _is_weight(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata in self._weights

    def _see(self, tensor: Tensor, part: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        size = storage.nbytes()
        if key in self._weights or key in self._gradients or key in self._live or not size:
            return
        self._live[key] = _Live(size, part)
        self._sizes.now[part] += size
        self._sizes.total += size
        weakref.finalize(storage, self._gone, key)
        self.note(self.moment)

    def _gone(self, key: int) -> None:
        live = self._live.pop(key, None)
        if live is not None:
            self._sizes.now[live.part] -= live.size
            self._sizes.total -= live.size

    def _hook(self, model: PreTrainedModel) -> None:
        layers = list(decoder_layers(model))
        for index, layer in enumerate(layers):
            place = "top layer" if index == len(layers) - 1 else "lowest layer" if index == 0 else "lower layers"
            self._handles.append(layer.register_forward_hook(self._watch_backward(place)))
            for name, child in layer.named_children():
                self._label(child, _part_of(name))
            self._label(layer, "residual stream")
        self._label(model.base_model, "embedding")
        self._handles.append(model.get_input_embeddings().register_forward_hook(self._watch_backward("embedding")))

    def _label(self, module: nn.Module, part: str) -> None:
        def enter(*_: Any) -> None:
            self._stack.insert(0, part)

        def leave(*_: Any) -> None:
            self._stack.pop(0)

        self._handles.append(module.register_forward_pre_hook(enter))
        self._handles.append(module.register_forward_hook(leave, always_call=True))

    def _watch_backward(self, place: str) -> Any:
        """The gradient of a layer's output arrives as the layer's backward pass begins."""

        def arrived(_: Tensor) -> None:
            self.moment = place

        def ran(_: nn.Module, __: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor) and hidden.requires_grad and self.moment == "forward":
                hidden.register_hook(arrived)

        return ran


def _unshared(tensor: Any) -> bool:
    if torch._C._current_graph_task_id() == -1:
        return False  # no backward pass is under way
    storage = tensor.untyped_storage()
    return (tensor._use_count(), torch._C._storage_Use_Count(storage._cdata)) == UNSHARED


_REST = {"forward": "embedding", "head": "log-prob chunk", "embedding": "backward"}


def _part_of(name: str) -> str:
    lowered = name.lower()
    if "norm" in lowered or lowered.startswith("ln"):
        return "norms"
    if "attn" in lowered or "attention" in lowered:
        return "attention"
    return "MLP"
