"""Checkpoints that are either whole or not there, and the choice of the newest sound one.

A checkpoint is a folder ``step-000050`` with ``model.safetensors`` (the weights in the dtype they train in),
``optimizer.pt`` (optimiser state, RNG state), ``trainer.json`` and ``manifest.json`` (sha256 and size of the others).
It is written under another name, forced to disk, and renamed. Not covered: sharded and asynchronous saving.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from scope_opd.errors import RunFailed

_NAME = re.compile(r"step-(\d{6,})$")
_TEMPORARY = ".writing-"
_PARTS = ("model.safetensors", "optimizer.pt", "trainer.json")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint as read: ``weights`` by name, ``optimizer`` (the saved dict), ``trainer`` (the JSON object)."""

    path: Path
    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    trainer: dict[str, Any]


class DamagedCheckpoint(Exception):
    """Why a checkpoint folder cannot be used; ``newest_sound`` reports it and goes on to the one before."""


def checkpoint_name(step: int) -> str:
    return f"step-{step:06d}"


def list_checkpoints(root: Path) -> list[tuple[int, Path]]:
    """(step, folder) of every finished checkpoint under ``root``, oldest first; sound or not."""
    if not root.is_dir():
        return []
    found = [(int(match[1]), path) for path in root.iterdir() if (match := _NAME.fullmatch(path.name))]
    return sorted(found)


def unique_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with every shared tensor (tied embeddings) once, under its first name."""
    seen: set[tuple[int, torch.Size]] = set()
    weights = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.shape)
        if tensor.numel() == 0 or key not in seen:
            weights[name] = tensor
            seen.add(key)
    return weights


def restore_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Copy saved weights into the model's own tensors, which the sampler and the optimiser share.

    Raises:
        ValueError: names or shapes differ from the model's.
    """
    own = unique_weights(model)
    if own.keys() != weights.keys():
        odd = sorted(own.keys() ^ weights.keys())
        raise ValueError(f"weights differ by name: {', '.join(odd[:4])}")
    with torch.no_grad():
        for name, tensor in own.items():
            if tensor.shape != weights[name].shape or tensor.dtype != weights[name].dtype:
                raise ValueError(f"{name} is {weights[name].dtype}{list(weights[name].shape)}; expected "
                                 f"{tensor.dtype}{list(tensor.shape)}")  # fmt: skip
            tensor.copy_(weights[name])


def save_checkpoint(
    root: Path,
    step: int,
    *,
    model: nn.Module,
    optimizer: dict[str, Any],
    trainer: dict[str, Any],
    keep_last: int,
) -> Path:
    """Write ``root/step-<step>`` atomically, then remove all but the ``keep_last`` newest.

    Raises:
        RunFailed: it could not be written (a full disk ...); what was written of it is removed, older ones are intact.
    """
    final = root / checkpoint_name(step)
    temporary = root / f"{_TEMPORARY}{final.name}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        temporary.mkdir()
        weights = {name: tensor.detach().contiguous().cpu() for name, tensor in unique_weights(model).items()}
        save_file(weights, temporary / "model.safetensors", metadata={"format": "pt"})
        torch.save(optimizer, temporary / "optimizer.pt")
        (temporary / "trainer.json").write_text(json.dumps(trainer, allow_nan=False, indent=1), encoding="utf-8")
        manifest = {"step": step, "files": {name: _fingerprint(temporary / name) for name in _PARTS}}
        (temporary / "manifest.json").write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for name in (*_PARTS, "manifest.json"):
            _sync(temporary / name)
        _sync(temporary)
        _remove(final)
        temporary.rename(final)
        _sync(root)
    except (OSError, RuntimeError, SafetensorError) as error:
        _remove(temporary)
        raise RunFailed(
            f"checkpoint {final} could not be written: {_reason(error)}",
            "room for it on the disk",
            "free some space and continue with --resume; the checkpoints before it are intact",
        ) from error
    for _, old in list_checkpoints(root)[:-keep_last]:
        _remove(old)
    return final


def newest_sound(root: Path, report: Callable[[str], None]) -> Checkpoint | None:
    """The newest checkpoint that can be trusted; None when there is none, and then nothing is touched.

    Args:
        root: the folder of checkpoints.
        report: called with one line for every damaged one that is newer. Where an older one is used they are renamed
            ``damaged-step-...``, so that they count neither as the newest nor among those kept.
    """
    damaged: list[tuple[Path, DamagedCheckpoint]] = []
    found = None
    for _, path in reversed(list_checkpoints(root)):
        try:
            found = read_checkpoint(path)
            break
        except DamagedCheckpoint as damage:
            damaged.append((path, damage))
    for path, reason in damaged:
        told = f"checkpoint {path.name} is damaged ({reason})"
        if found is not None:
            aside = path.with_name(f"damaged-{path.name}")
            _remove(aside)
            path.rename(aside)
            told += f"; moved to {aside.name}, the one before is used"
        report(told)
    if found is not None or not damaged:
        for leftover in root.glob(f"{_TEMPORARY}*"):
            _remove(leftover)
    return found


def read_checkpoint(path: Path) -> Checkpoint:
    """Check a checkpoint against its manifest and read it.

    Raises:
        DamagedCheckpoint: a part is missing, truncated, altered or unreadable.
    """
    try:
        manifest = json.loads((path / "manifest.json").read_text(encoding="utf-8"))
        for name in _PARTS:
            expected, found = manifest["files"][name], _fingerprint(path / name)
            if found["bytes"] != expected["bytes"]:
                raise DamagedCheckpoint(f"{name} has {found['bytes']} bytes instead of {expected['bytes']}")
            if found["sha256"] != expected["sha256"]:
                raise DamagedCheckpoint(f"{name} does not have the sha256 of its manifest")
        return Checkpoint(
            path=path,
            step=manifest["step"],
            weights=load_file(path / "model.safetensors"),
            optimizer=torch.load(path / "optimizer.pt", map_location="cpu", weights_only=True),
            trainer=json.loads((path / "trainer.json").read_text(encoding="utf-8")),
        )
    except FileNotFoundError as error:
        raise DamagedCheckpoint(f"{Path(error.filename).name} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise DamagedCheckpoint(f"{type(error).__name__}: {_reason(error)}") from error


def rng_state() -> dict[str, Any]:
    """Torch's random states. Sampling does not use them; dropout in a student that has it would."""
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": devices}


def restore_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"sha256": digest, "bytes": path.stat().st_size}


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.exists():
        shutil.rmtree(path)


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).splitlines()[0] if str(error) else type(error).__name__
