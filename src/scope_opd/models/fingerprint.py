"""What tells one set of weights from another in a moment: a digest of names, shapes and a sample of the values."""

from __future__ import annotations

import hashlib

import torch
from torch import nn

from scope_opd.models.deferred import values

SAMPLED = 1024
"""Values of a tensor that enter the digest at most, evenly spread: training changes nearly all of them."""


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over every parameter's name, dtype, shape and sampled values; the same on any device, deferred or not."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        flat = values(parameter).reshape(-1)
        places = torch.linspace(0, max(flat.numel() - 1, 0), min(flat.numel(), SAMPLED), dtype=torch.float64)
        sample = flat[places.round().long().to(flat.device)].cpu().to(parameter.dtype)
        digest.update(f"{name} {parameter.dtype} {list(parameter.shape)}".encode())
        digest.update(sample.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
