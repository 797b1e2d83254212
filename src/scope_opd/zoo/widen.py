"""The same model with wider attention heads, for engines whose kernels do not know heads as narrow as the student's.

Each head of d dimensions becomes one of D, the new ones zero. Rotary embeddings turn dimension i against i + d/2 at
frequency base^(-2i/d); that pair moves to i D/d and i D/d + D/2, where the frequency is the same. The norms of queries
and keys divide by a root mean square that zeros have made sqrt(d/D) as large, and attention divides by sqrt(D): with
the keys' norm weight times sqrt(d/D) both cancel. The zeros get no gradient, so training keeps them. What differs is
rms_norm_eps, which counts D/d times as much: 1e-5 nats a token in the mean for the zoo, 3e-4 at most.

Not covered: other architectures than Qwen3.
"""

from __future__ import annotations

import json
from pathlib import Path


def widen_heads(folder: Path, head_dim: int) -> bool:
    """Rewrite a model's folder in place.

    Args:
        folder: a Qwen3 in one safetensors file.
        head_dim: D, a multiple of what the model has.

    Returns:
        Whether anything was to be done.

    Raises:
        ValueError: ``head_dim`` is no multiple.
    """
    import torch
    from safetensors.torch import load_file, save_file

    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    narrow: int = config["head_dim"]
    if head_dim == narrow:
        return False
    if head_dim < narrow or head_dim % narrow:
        raise ValueError(f"head_dim = {head_dim}, expected a multiple of {narrow}")
    factor, half = head_dim // narrow, narrow // 2
    places = torch.cat([torch.arange(half) * factor, torch.arange(half) * factor + head_dim // 2])

    def spread(weight: torch.Tensor, dim: int) -> torch.Tensor:
        """[..., heads * d, ...] or [d] to the same with D, along one dimension."""
        parts = weight.unflatten(dim, (-1, narrow))
        wide = parts.new_zeros([*parts.shape[: dim + 1], head_dim, *parts.shape[dim + 2 :]])
        return wide.index_copy(dim + 1, places, parts).flatten(dim, dim + 1).contiguous()

    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        kind = name.removesuffix(".weight").rpartition(".")[2]
        if kind in ("q_proj", "k_proj", "v_proj", "q_norm", "k_norm"):
            scale = factor**-0.5 if kind == "k_norm" else 1.0
            tensors[name] = spread(weight, 0) * scale
        elif kind == "o_proj":
            tensors[name] = spread(weight, 1)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    file.write_text(json.dumps(config | {"head_dim": head_dim}, indent=2) + "\n", encoding="utf-8")
    return True
