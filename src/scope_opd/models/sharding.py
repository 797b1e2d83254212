"""A student dealt to ranks with FSDP2: every rank holds a share of each weight, of its gradient and of its states.

Each decoder layer is a unit whose weights are gathered for its pass and let go of after it. What is around the layers
(embedding, last norm, head, tied or not) belongs to the module that computes the loss, and stays whole from its forward
pass to its backward pass. Gradients are added up over ranks, not averaged: the denominators are in them already.

On a GPU float32 weights are gathered and computed with in bfloat16 and gradients are added up in float32; elsewhere all
is in the dtype of the weights. Not covered: tensor, sequence and expert parallelism.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from scope_opd.errors import ConfigError
from scope_opd.models.deferred import fill
from scope_opd.models.watch import decoder_layers
from scope_opd.ranks import Ranks

_ADAPTER = "default"
"""peft's name for the one adapter of a model, see ``adapters``."""


def make_mesh(
    world: int, device_type: str, how: Literal["full", "hybrid"], timeout_s: float | None = None
) -> DeviceMesh:
    """The ranks in a row ("full"), or those of each machine in a row and machines above one another ("hybrid").

    Args:
        world: ranks; LOCAL_WORLD_SIZE says how many of them a machine has.
        device_type: "cpu" or "cuda".
        how: ``train.shard``.
        timeout_s: limit of each collective; None leaves torch's to the groups that "hybrid" makes.

    Raises:
        ConfigError: "hybrid" on machines that do not have the same number of ranks.
    """
    each = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    if how == "full" or each == world:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    if world % each:
        raise ConfigError(
            f"train.shard = 'hybrid' with {world} ranks, {each} of them on this machine",
            "as many ranks on every machine",
            "start as many everywhere, or set train.shard = 'full'",
        )
    mesh = init_device_mesh(device_type, (world // each, each), mesh_dim_names=("replicate", "shard"))
    if timeout_s is not None:
        for group in mesh.get_all_groups():  # made with torch's own limit, whatever that of the default group is
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout_s), group)
    return mesh


def shard(root: nn.Module, model: PreTrainedModel, mesh: DeviceMesh, *, low_precision: bool) -> None:
    """Deal the weights of a model to the ranks of a mesh, in place. Its parameters are DTensors then.

    A deferred model's weights are read as they are dealt, a layer at a time.

    Args:
        root: the module around it within which everything happens.
        model: whole or deferred, the same on every rank.
        mesh: from ``make_mesh``.
        low_precision: float32 weights are computed with in bfloat16.
    """
    policy = MixedPrecisionPolicy()
    around = policy
    if low_precision:
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
        # What the loss is given is not the model's to cast.
        around = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    for layer in decoder_layers(model):
        fill(layer)
        fully_shard(layer, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    fill(root)
    fully_shard(root, mesh=mesh, mp_policy=around, reshard_after_forward=False)
    for module in root.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def in_whole_blocks(shape: Sequence[int], shards: int, block: int = 256) -> bool:
    """Whether AdamW with 8-bit states keeps those of a parameter in 8 bits, on every rank or on none.

    It does where each share is rows of whole blocks and, as torchao wants it, of 4,096 values and more. Those of norms
    and biases never are: they are small, and their states would depend on the number of ranks.

    Args:
        shape: of the whole parameter.
        shards: ranks that it is dealt to, by its rows.
        block: values that have one scale.
    """
    if len(shape) < 2:
        return False
    each = -(-shape[0] // shards)
    width = math.prod(shape[1:])
    sizes = [rows * width for rows in (each, shape[0] - (shards - 1) * each)]
    return all(size >= 4096 and size % block == 0 for size in sizes)


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a tensor; the tensor where it is not dealt out."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def total_norm(norm: Tensor, parameters: Sequence[Tensor], ranks: Ranks) -> Tensor:
    """The 2-norm of the whole gradient from that of each rank's shards; a collective.

    Args:
        norm: of this rank's shards.
        parameters: sharded; from them is known how many ranks hold the same shard.
        ranks: of the run.
    """
    meshes = {parameter.device_mesh.shape for parameter in parameters if isinstance(parameter, DTensor)}
    assert len(meshes) == 1, f"one mesh, not {meshes}"
    replicas = ranks.world // meshes.pop()[-1]
    squares = ranks.sum(norm.double().cpu() ** 2) / replicas
    return squares.sqrt().to(norm)


def whole_weights(model: nn.Module, *, merged: bool) -> Iterator[tuple[str, Tensor]]:
    """(name, weight) of a sharded model, gathered one at a time; a collective, every rank has to take all of them.

    Tied weights come once, under the name that ``named_parameters`` has for them.

    Args:
        model: sharded.
        merged: names are those of the model without adapters; a weight that carries one comes with it, the sum taken in
            the precision of the adapter. Else names and weights are the model's own.
    """
    if not merged:
        for name, parameter in model.named_parameters():
            yield name, _whole(parameter)
        return
    adapted = {
        f"{name}.base_layer.weight": module for name, module in model.named_modules() if hasattr(module, "lora_A")
    }
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            continue
        weight = _whole(parameter)
        if name in adapted:
            weight = _merged(weight, adapted[name])
        yield name.replace(".base_layer.", "."), weight


def _merged(weight: Tensor, layer: Any) -> Tensor:
    down, up = (_whole(part[_ADAPTER].weight) for part in (layer.lora_A, layer.lora_B))
    return (weight.to(up.dtype) + layer.scaling[_ADAPTER] * (up @ down)).to(weight.dtype)


@torch.no_grad()
def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
