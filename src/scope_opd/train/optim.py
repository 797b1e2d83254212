"""Optimisers and learning-rate schedules.

AdamW (one fused kernel), torchao's AdamW with 8-bit states, or torch's Muon on hidden matrices with AdamW on the rest.
Weight decay acts on parameters of two and more dimensions (embeddings included) and spares norms and biases, as Hugging
Face's Trainer has it. AdamW's states, and with them its step, may be in CPU memory while the model is on a GPU.

Not covered: 8-bit and offloaded states of sharded parameters.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from scope_opd.config import TrainConfig
from scope_opd.errors import ConfigError


def lr_at(step: int, config: TrainConfig) -> float:
    """Learning rate of optimiser step ``step`` (0-based): a pure function, so that a resumed run needs no state.

    Warm-up: lr * (step + 1) / warmup_steps while step < warmup_steps. Afterwards, with
    p = (step - warmup_steps) / (steps - warmup_steps) and m = min_lr_ratio:

        constant  lr
        linear    lr * (m + (1 - m) * (1 - p))
        cosine    lr * (m + (1 - m) * (1 + cos(pi p)) / 2)
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    progress = min((step - config.warmup_steps) / max(config.steps - config.warmup_steps, 1), 1.0)
    left = 1.0 - progress if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.lr * (config.min_lr_ratio + (1.0 - config.min_lr_ratio) * left)


class Optimizer:
    """One or two torch optimisers under one learning rate.

    Args:
        model: its parameters that require a gradient are optimised.
        config: optimizer, offload, weight_decay, betas, eps.

    Raises:
        ConfigError: torchao is not installed, or states that cannot be sharded are asked for on several ranks.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parameters: list[Tensor] = [parameter for _, parameter in named]
        self._names = {id(parameter): name for name, parameter in named}
        hidden = _hidden_matrices(model, self.parameters) if config.optimizer == "muon" else []
        chosen = {id(parameter) for parameter in hidden}
        rest = [parameter for parameter in self.parameters if id(parameter) not in chosen]
        if any(isinstance(parameter, DTensor) for parameter in self.parameters):
            refuse_sharded(config)
        self._copies: _CpuCopies | None = None
        if config.offload == "optimizer":
            self._copies = _CpuCopies(rest)
            self._names |= {id(copy): self._names[id(own)] for own, copy in zip(rest, self._copies.all, strict=True)}
            rest = self._copies.all
        self._parts: list[torch.optim.Optimizer] = []
        if hidden:
            # match_rms_adamw: updates of AdamW's size, so that one learning rate serves both kinds of parameter.
            self._parts.append(
                torch.optim.Muon(hidden, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        if rest:
            groups = [
                {"params": [p for p in rest if p.ndim >= 2], "weight_decay": config.weight_decay},
                {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
            ]
            options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
            groups = [group for group in groups if group["params"]]
            if config.optimizer == "adamw_8bit":
                self._parts.append(_adamw_8bit()(groups, **options))
            else:
                self._parts.append(torch.optim.AdamW(groups, fused=True, **options))
        # What torchao compiles for a GPU would take a C++ compiler and minutes on a CPU.
        self._eager = config.optimizer == "adamw_8bit" and not any(parameter.is_cuda for parameter in self.parameters)

    def step(self, lr: float) -> None:
        """One update at learning rate ``lr``."""
        with contextlib.ExitStack() as stack:
            if self._copies is not None:
                stack.enter_context(self._copies.stepping())
            if self._eager:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            for part in self._parts:
                for group in part.param_groups:
                    group["lr"] = torch.tensor(lr) if isinstance(group["lr"], Tensor) else lr
                part.step()

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def states(self) -> dict[str, Tensor]:
        """Every state tensor by "<parameter's name>/<state's name>", the optimiser's own memory; sharded as it is.

        Hyperparameters are not among them: they come from the config, the learning rate with every step.
        """
        return {
            f"{self._names[id(parameter)]}/{name}": tensor
            for part in self._parts
            for parameter, state in part.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
            for name, tensor in _plain(key, value)
        }

    def make_states(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Just the states of these names, ready to be overwritten with saved values; all others are dropped.

        Call it before the weights are restored.

        Args:
            names: as of ``states``, of whole parameters: one that never got a gradient has none.

        Raises:
            ValueError: this optimiser has other states.
        """
        wanted = set(names)
        for parameter in self.parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.step(0.0)  # torch makes states in the first step
        self.zero_grad()
        odd = sorted(wanted - self.states().keys())
        if odd:
            raise ValueError(f"optimiser state {odd[0]} is not one of this optimiser's")
        held = {name.rpartition("/")[0] for name in wanted}
        for part in self._parts:
            for parameter in [p for p in part.state if self._names[id(p)] not in held]:
                del part.state[parameter]
        return self.states()


class _CpuCopies:
    """Copies of parameters in CPU memory (pinned for those on a GPU), where their optimiser has its states and steps.

    Args:
        own: the parameters.

    Attributes:
        all: their copies, in order.
    """

    def __init__(self, own: Sequence[Tensor]) -> None:
        self._own = own
        self.all: list[Tensor] = [self._empty(parameter).requires_grad_() for parameter in own]
        self._gradients = [self._empty(parameter) for parameter in own]

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Copies and their gradients are as the parameters' while a step begins, the parameters as the copies' after.

        Parameters are copied too, every time: whatever else changes them (a checkpoint that is restored) need not know.
        """
        with torch.no_grad():
            for own, copy, gradient in zip(self._own, self.all, self._gradients, strict=True):
                copy.copy_(own, non_blocking=True)
                copy.grad = None if own.grad is None else gradient.copy_(own.grad, non_blocking=True)
            self._wait()
        yield
        with torch.no_grad():
            for own, copy in zip(self._own, self.all, strict=True):
                own.copy_(copy, non_blocking=True)
            self._wait()

    def _wait(self) -> None:
        if any(parameter.is_cuda for parameter in self._own):
            torch.cuda.synchronize()

    @staticmethod
    def _empty(like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)


def _adamw_8bit() -> Any:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise ConfigError(
            f"train.optimizer = 'adamw_8bit' and torchao cannot be imported ({error})",
            "torchao",
            "pip install 'scope-opd[low-bit]'",
        ) from None
    return AdamW8bit


def refuse_sharded(config: TrainConfig) -> None:
    """What cannot be with weights that are dealt to several ranks.

    Raises:
        ConfigError: Muon, whose steps need whole matrices, 8-bit states, or states in CPU memory.
    """
    for name, value, instead in (
        ("optimizer", "muon", "adamw, since ranks hold shares of the matrices that Muon needs whole"),
        ("optimizer", "adamw_8bit", "adamw, whose states are dealt to the ranks"),
        ("offload", "optimizer", "off, since the states are dealt to the ranks"),
    ):
        if getattr(config, name) == value:
            raise ConfigError(f"train.{name} = {value!r} on several ranks", instead, f"leave train.{name} out")


def _plain(key: str, state: Any) -> Iterator[tuple[str, Tensor]]:
    """A state as tensors without further meaning: one of 8 bits is its codes and the scale of each block."""
    if hasattr(state, "codes"):
        yield f"{key}.codes", state.codes
        yield f"{key}.scale", state.scale
    else:
        yield key, state


def _hidden_matrices(model: nn.Module, parameters: Iterable[Tensor]) -> list[Tensor]:
    """2-D parameters that are neither an embedding nor the output head: Muon is for maps between hidden states."""
    outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if isinstance(model, PreTrainedModel) and (head := model.get_output_embeddings()) is not None:
        outer.add(id(head.weight))
    return [parameter for parameter in parameters if parameter.ndim == 2 and id(parameter) not in outer]
