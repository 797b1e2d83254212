"""LoRA: a frozen model whose linear layers carry trained low-rank adapters, W x + (alpha / rank) B A x.

The adapters are peft's, put into the model in place: its class, its forward pass and all that takes it apart stay as
they are. ``plain_state_dict`` gives the weights of the model without adapters that computes the same, W + (alpha /
rank) B A, under the names of its checkpoint; the model itself is not changed. B begins at zero, so an adapted model
begins as its base. Adapters are in float32 whatever the frozen weights are in (float64 for a float64 model).

Not covered: adapters on embeddings, on a head that is tied to them, on experts; dropout (a response's log-probs must be
the sampler's); adapters that a model brings along.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from scope_opd.config import LoraConfig
from scope_opd.errors import ConfigError

NAME = "default"
"""peft's name for the one adapter of a model."""
_MARK, _BASE = ".lora_", ".base_layer."


def add_adapters(model: PreTrainedModel, lora: LoraConfig, *, seed: int | None = 0) -> None:
    """Freeze a model and put trained adapters into it; nothing is done for rank 0.

    Args:
        model: in eval mode, before it is taken apart or sharded.
        lora: ``[model.lora]``.
        seed: of A; None: the model has no data, and its adapters get none.

    Raises:
        ConfigError: peft is not installed, or a name belongs to no linear layer or to a tied head.
    """
    if not lora.rank:
        return
    try:
        import peft
        from peft.tuners.lora.layer import Linear
        from peft.tuners.tuners_utils import BaseTunerLayer
    except ImportError as error:
        raise ConfigError(
            f"model.lora.rank = {lora.rank} and peft cannot be imported ({error})",
            "peft",
            "pip install 'scope-opd[lora]'",
        ) from None
    names = lora.target_modules
    if not isinstance(names, str):
        _check_names(model, names)
    settings = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        target_modules=names,
        lora_dropout=0.0,
        bias="none",
        task_type=peft.TaskType.CAUSAL_LM,
    )
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.default_generator.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model, adapter_name=NAME, low_cpu_mem_usage=seed is None)
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, Linear):
            raise _no_linear(name, model)
    exact = _exact(model.dtype)
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            if parameter.requires_grad and seed is None:
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, dtype=exact, device=model.device)))
            elif parameter.requires_grad:
                parameter.data = parameter.data.to(exact)
    model.eval()


def adapted(model: nn.Module) -> bool:
    """Whether ``add_adapters`` was called with it."""
    return NAME in (getattr(model, "peft_config", None) or {})


@torch.no_grad()
def plain_state_dict(model: nn.Module, weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """A model's state dict with its adapters merged, in the dtype and under the names of the model without them.

    Args:
        model: without adapters this is its state dict.
        weights: its state dict, whole, where it is sharded.

    Returns:
        name -> tensor: the model's own memory, but for merged weights, whose sum is taken in float32 (float64).
    """
    state: dict[str, Tensor] = dict(model.state_dict() if weights is None else weights)
    if not adapted(model):
        return state
    plain = {name.replace(_BASE, "."): tensor for name, tensor in state.items() if _MARK not in name}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            layer: Any = module
            weight = state[f"{name}{_BASE}weight"]
            exact = _exact(weight.dtype)
            up, down = (state[f"{name}{_MARK}{part}.{NAME}.weight"] for part in "BA")
            delta = (up @ down) * layer.scaling[NAME]
            plain[f"{name}.weight"] = (weight.to(exact) + delta.to(exact)).to(weight.dtype)
    return plain


def save_adapter(model: Any, folder: Path, base: str, weights: Mapping[str, Tensor] | None = None) -> None:
    """Write the adapters as ``peft.PeftModel.from_pretrained(base model, folder)`` loads them.

    Args:
        model: adapted.
        folder: made if it is not there.
        base: what the frozen model is called: a folder or a hub id.
        weights: its state dict, whole, where it is sharded.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        f"base_model.model.{name.replace(f'.{NAME}.', '.')}": tensor.detach().contiguous()
        for name, tensor in (model.state_dict() if weights is None else weights).items()
        if _MARK in name
    }
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = copy.copy(model.peft_config[NAME])
    settings.base_model_name_or_path, settings.inference_mode = base, True
    settings.target_modules = sorted(settings.target_modules)
    settings.save_pretrained(str(folder))


def _check_names(model: PreTrainedModel, names: Sequence[str]) -> None:
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    modules = dict(model.named_modules())
    for wanted in names:
        found = [name for name in modules if name == wanted or name.endswith(f".{wanted}")]
        if not found or not all(isinstance(modules[name], nn.Linear) for name in found):
            raise _no_linear(wanted, model)
        if head is not None and head.weight is embedding.weight and any(modules[name] is head for name in found):
            raise ConfigError(
                f"model.lora.target_modules: {wanted!r} is the head, which is tied to the embedding",
                "layers between them",
                "leave it out",
            )


def _no_linear(name: str, model: nn.Module) -> ConfigError:
    known = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)})
    return ConfigError(
        f"model.lora.target_modules: {name!r} is no linear layer of the model", f"among {', '.join(known)}",
        "mend model.lora.target_modules",
    )  # fmt: skip


def _exact(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
