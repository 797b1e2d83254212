"""Optimisers and learning-rate schedules.

AdamW (fused on a GPU) or torch's Muon on hidden matrices with AdamW on the rest. Weight decay acts on parameters of two
and more dimensions (embeddings included) and spares norms and biases, as Hugging Face's Trainer has it. Not covered:
sharded, offloaded or 8-bit states.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from scope_opd.config import TrainConfig


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
        config: optimizer, weight_decay, betas, eps.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parameters: list[Tensor] = [parameter for _, parameter in named]
        self._names = {id(parameter): name for name, parameter in named}
        hidden = _hidden_matrices(model, self.parameters) if config.optimizer == "muon" else []
        chosen = {id(parameter) for parameter in hidden}
        rest = [parameter for parameter in self.parameters if id(parameter) not in chosen]
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
            on_gpu = all(parameter.is_cuda for parameter in rest)
            self._parts.append(
                torch.optim.AdamW(
                    [group for group in groups if group["params"]],
                    lr=config.lr,
                    betas=config.betas,
                    eps=config.eps,
                    fused=True if on_gpu else None,
                )
            )

    def step(self, lr: float) -> None:
        """One update at learning rate ``lr``."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()

    def zero_grad(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    def states(self) -> dict[str, Tensor]:
        """Every state tensor by "<parameter's name>/<state's name>", the optimiser's own memory; sharded as it is.

        Hyperparameters are not among them: they come from the config, the learning rate with every step.
        """
        return {
            f"{self._names[id(parameter)]}/{key}": value
            for part in self._parts
            for parameter, state in part.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
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

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self._parts]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for part, saved in zip(self._parts, state["parts"], strict=True):
            part.load_state_dict(saved)


def _hidden_matrices(model: nn.Module, parameters: Iterable[Tensor]) -> list[Tensor]:
    """2-D parameters that are neither an embedding nor the output head: Muon is for maps between hidden states."""
    outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if isinstance(model, PreTrainedModel) and (head := model.get_output_embeddings()) is not None:
        outer.add(id(head.weight))
    return [parameter for parameter in parameters if parameter.ndim == 2 and id(parameter) not in outer]
