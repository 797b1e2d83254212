"""Optimisers and learning-rate schedules.

AdamW (one fused kernel), torchao's AdamW with 8-bit states, or torch's Muon on hidden matrices with AdamW on the rest.
Weight decay acts on parameters of two and more dimensions (embeddings included) and spares norms and biases, as Hugging
Face's Trainer has it. AdamW's states, and with them its step, may be in CPU memory while the model is on a GPU.

With several ranks each steps its shares of the parameters, and has the states of these alone. 8-bit states are cut into
blocks of 256 values, row by row; where every rank's rows are whole blocks these are those of one rank, elsewhere the
states stay in full. Muon gathers one matrix at a time, and every rank orthogonalises it.

Not covered: 8-bit states of Muon; checkpoints whose 8-bit states the present number of ranks keeps in full.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

from scope_opd.config import TrainConfig
from scope_opd.errors import ConfigError
from scope_opd.models.sharding import in_whole_blocks, local

_BLOCK = 256
"""Values of a state in 8 bits that have one scale, torchao's default."""
_NEVER = 2**62
"""A block that no parameter fills: torchao keeps its states in full."""


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
        ConfigError: torchao is not installed.
    """

    def __init__(self, model: nn.Module, config: TrainConfig) -> None:
        named = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
        self.parameters: list[Tensor] = [parameter for _, parameter in named]
        self._owners = {id(parameter): (name, parameter) for name, parameter in named}
        hidden = _hidden_matrices(model, self.parameters) if config.optimizer == "muon" else []
        chosen = {id(parameter) for parameter in hidden}
        rest = [parameter for parameter in self.parameters if id(parameter) not in chosen]
        dealt = any(isinstance(parameter, DTensor) for parameter in self.parameters)
        self._stand_ins: _CpuCopies | _Shares | None = None
        if config.offload == "optimizer":
            self._stand_ins = _CpuCopies(rest)
        elif config.optimizer == "adamw_8bit" and dealt:
            self._stand_ins = _Shares(rest)
        if self._stand_ins is not None:
            self._owners |= {
                id(acting): self._owners[id(own)] for own, acting in zip(rest, self._stand_ins.all, strict=True)
            }
            rest = self._stand_ins.all
        self._parts: list[torch.optim.Optimizer] = []
        if hidden:
            # match_rms_adamw: updates of AdamW's size, so that one learning rate serves both kinds of parameter.
            muon = _DealtMuon if dealt else torch.optim.Muon
            self._parts.append(
                muon(hidden, lr=config.lr, weight_decay=config.weight_decay, adjust_lr_fn="match_rms_adamw")
            )
        options: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps}
        if config.optimizer == "adamw_8bit":
            adamw_8bit = _adamw_8bit()
            in_blocks = [_in_blocks(self._owners[id(acting)][1]) for acting in rest]
            for block, wanted in ((_BLOCK, True), (_NEVER, False)):
                some = [acting for acting, found in zip(rest, in_blocks, strict=True) if found is wanted]
                if some:
                    self._parts.append(adamw_8bit(_groups(some, config), block_size=block, **options))
        elif rest:
            self._parts.append(torch.optim.AdamW(_groups(rest, config), fused=True, **options))
        self._eight_bits = config.optimizer == "adamw_8bit"
        # What torchao compiles for a GPU would take a C++ compiler and minutes on a CPU.
        self._eager = self._eight_bits and not any(parameter.is_cuda for parameter in self.parameters)

    def step(self, lr: float) -> None:
        """One update at learning rate ``lr``; with several ranks and Muon a collective."""
        with contextlib.ExitStack() as stack:
            if self._stand_ins is not None:
                stack.enter_context(self._stand_ins.stepping())
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

        Names and shapes are those of whole parameters, whatever the number of ranks. Hyperparameters are not among
        them: they come from the config, the learning rate with every step.
        """
        return {
            f"{self._owners[id(parameter)][0]}/{name}": tensor
            for part in self._parts
            for parameter, state in part.state.items()
            for key, value in state.items()
            if isinstance(value, Tensor)
            for name, tensor in _plain(key, value, self._owners[id(parameter)][1])
        }

    def cut_otherwise(self, names: Collection[str]) -> str | None:
        """The first parameter whose states are in 8 bits here and in full among ``names``, or the other way round.

        Args:
            names: as of ``states``.
        """
        names = set(names)
        for name, parameter in self._owners.values() if self._eight_bits else ():
            coded = f"{name}/exp_avg.codes" in names
            if (coded or f"{name}/exp_avg" in names) and coded is not _in_blocks(parameter):
                return name
        return None

    def make_states(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Just the states of these names, ready to be overwritten with saved values; all others are dropped.

        Call it before the weights are restored, on all ranks.

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
            for parameter in [p for p in part.state if self._owners[id(p)][0] not in held]:
                del part.state[parameter]
        return self.states()


class _CpuCopies:
    """Copies of parameters in CPU memory (pinned for those on a GPU), where their optimiser has its states and steps.

    Args:
        own: the parameters; of those that are dealt to ranks the copy is of this rank's share.

    Attributes:
        all: their copies, in order.
    """

    def __init__(self, own: Sequence[Tensor]) -> None:
        self._own = own
        self.all: list[Tensor] = [self._empty(local(parameter)).requires_grad_() for parameter in own]
        self._gradients = [self._empty(local(parameter)) for parameter in own]

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Copies and their gradients are as the parameters' while a step begins, the parameters as the copies' after.

        Parameters are copied too, every time: whatever else changes them (a checkpoint that is restored) need not know.
        """
        with torch.no_grad():
            for own, copy, gradient in zip(self._own, self.all, self._gradients, strict=True):
                copy.copy_(local(own), non_blocking=True)
                copy.grad = None if own.grad is None else gradient.copy_(local(own.grad), non_blocking=True)
            self._wait()
        yield
        with torch.no_grad():
            for own, copy in zip(self._own, self.all, strict=True):
                local(own).copy_(copy, non_blocking=True)
            self._wait()

    def _wait(self) -> None:
        if any(parameter.is_cuda for parameter in self._own):
            torch.cuda.synchronize()

    @staticmethod
    def _empty(like: Tensor) -> Tensor:
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.is_cuda)


class _Shares:
    """This rank's shares of dealt parameters as plain tensors, of the same memory, for an optimiser of such.

    Args:
        own: the parameters.

    Attributes:
        all: their shares, in order.
    """

    def __init__(self, own: Sequence[Tensor]) -> None:
        self._own = own
        with torch.no_grad():
            self.all: list[Tensor] = [local(parameter).detach().requires_grad_() for parameter in own]

    @contextlib.contextmanager
    def stepping(self) -> Iterator[None]:
        """Shares have the gradients of theirs in a step, and their memory, which FSDP may have replaced."""
        with torch.no_grad():
            for own, share in zip(self._own, self.all, strict=True):
                share.data = local(own).detach()
                share.grad = None if own.grad is None else local(own.grad).detach()
        yield
        for share in self.all:
            share.grad = None


class _DealtMuon(torch.optim.Muon):
    """torch's Muon for matrices that are dealt to ranks by rows.

    Momentum is kept and added up in shares. The direction is gathered over the ranks that share a matrix, one matrix at
    a time, orthogonalised whole on each of them by torch's own Muon, and each takes its rows of what comes out.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One update; a collective, matrix by matrix."""
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(parameter.grad)
                own, gradient, momentum = map(local, (parameter, parameter.grad, state["momentum_buffer"]))
                momentum.lerp_(gradient, 1 - group["momentum"])
                share = gradient.lerp(momentum, group["momentum"])
                direction = _dealt(share, parameter, parameter.shape)
                assert isinstance(direction, DTensor)
                whole = _orthogonal(direction.full_tensor(), group)
                mesh, placements = parameter.device_mesh, parameter.placements
                rows = local(distribute_tensor(whole, mesh, placements, src_data_rank=None))
                own.mul_(1 - group["lr"] * group["weight_decay"]).add_(rows, alpha=group["lr"])


def _orthogonal(direction: Tensor, group: dict[str, Any]) -> Tensor:
    """What torch's Muon adds to a matrix at learning rate 1 for a direction that has its momentum already."""
    whole = torch.zeros_like(direction, dtype=torch.promote_types(direction.dtype, torch.float32)).requires_grad_()
    whole.grad = direction.to(whole.dtype)
    kept = {name: group[name] for name in ("ns_coefficients", "ns_steps", "eps", "adjust_lr_fn")}
    torch.optim.Muon([whole], lr=1.0, weight_decay=0.0, momentum=0.0, nesterov=False, **kept).step()
    return whole.detach()


def _groups(parameters: Sequence[Tensor], config: TrainConfig) -> list[dict[str, Any]]:
    """Parameter groups with and without weight decay."""
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


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


def _in_blocks(parameter: Tensor) -> bool:
    """Whether AdamW with 8-bit states keeps those of a parameter in 8 bits."""
    shards = parameter.device_mesh.shape[-1] if isinstance(parameter, DTensor) else 1
    return in_whole_blocks(parameter.shape, shards, _BLOCK)


def _plain(key: str, state: Any, owner: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A state as tensors without further meaning, dealt as its parameter is; one of 8 bits is its codes and scales.

    Scales are in rows of as many blocks as the fewest rows of the parameter that are whole blocks have, so that they
    are dealt to ranks as the parameter's rows are.
    """
    if not hasattr(state, "codes"):
        yield key, _dealt(state, owner, owner.shape)
        return
    width = owner.shape[1:].numel()
    blocks = width // math.gcd(width, _BLOCK)
    yield f"{key}.codes", _dealt(state.codes, owner, owner.shape)
    scale = state.scale.view(-1, blocks)
    yield f"{key}.scale", _dealt(scale, owner, torch.Size([owner.numel() // _BLOCK // blocks, blocks]))


def _dealt(share: Tensor, owner: Tensor, shape: torch.Size) -> Tensor:
    """A rank's share of a tensor as what it is to all ranks, in the same memory.

    Args:
        share: a number is the same everywhere, and what is a DTensor already stays as it is.
        owner: the parameter that it belongs to, with which it is dealt out.
        shape: of the whole.
    """
    if share.ndim == 0 or isinstance(share, DTensor) or not isinstance(owner, DTensor):
        return share
    mesh = owner.device_mesh if share.device.type == owner.device_mesh.device_type else _cpu_mesh(owner.device_mesh)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(share.detach(), mesh, owner.placements, run_check=False, shape=shape, stride=stride)


@functools.lru_cache(maxsize=1)
def _cpu_mesh(mesh: DeviceMesh) -> DeviceMesh:
    """The same ranks in the same groups, for tensors in CPU memory, which one of GPUs would bring to a GPU."""
    return DeviceMesh.from_group(mesh.get_all_groups(), "cpu", mesh=mesh.mesh, mesh_dim_names=mesh.mesh_dim_names)


def _hidden_matrices(model: nn.Module, parameters: Iterable[Tensor]) -> list[Tensor]:
    """2-D parameters that are neither an embedding nor the output head: Muon is for maps between hidden states."""
    outer = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    if isinstance(model, PreTrainedModel) and (head := model.get_output_embeddings()) is not None:
        outer.add(id(head.weight))
    return [parameter for parameter in parameters if parameter.ndim == 2 and id(parameter) not in outer]
