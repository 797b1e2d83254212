"""A copy of a causal LM whose logits are the original's divided by T, for servers that know no temperature.

Where the head is a plain matrix W without bias, soft-cap or scale, and the final norm's output is linear in its own
weight w (and bias b), logits / T = W norm(h; w, b) / T = W norm(h; w / T, b / T): only w (and b) are divided. The norm
is stored in float32; a server that computes in bfloat16 rounds it again (docs/serving.md says what that costs).

Architectures are a list, since what a norm computes cannot be read off its weights: Gemma's multiplies by 1 + w, which
divided by T would be something else. On top of the list the checkpoint itself is looked at, and a model that is small
enough is run.

Torch is imported where weights are touched: what is there already is found without it.

Not covered: other architectures, quantised checkpoints, adapters, weights that are not safetensors.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from scope_opd.errors import ModelError
from scope_opd.models.places import resolve_path

MARKER = "tempered.json"
"""In a copy's folder: what it is a copy of, and its temperature."""
CHECK_LIMIT = 1_000_000_000
"""Bytes of weights up to which a copy is run beside its original."""
TOLERANCE = 1e-5
"""Nats, relative to the largest log-prob where that is above 1."""
_LLAMA, _NEOX = ("model.norm", "lm_head"), ("gpt_neox.final_layer_norm", "embed_out")
EXACT: dict[str, tuple[str, str]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "mixtral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen2_moe": _LLAMA,
    "qwen3": _LLAMA,
    "qwen3_moe": _LLAMA,
    "olmo2": _LLAMA,
    "phi3": _LLAMA,
    "smollm3": _LLAMA,
    "stablelm": _LLAMA,
    "gpt_neox": _NEOX,
}
"""model_type -> (final norm, head) of architectures for which the tests show that the copy is exact."""
_HEAD_SETTINGS = (
    "final_logit_softcapping", "softcap", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier",
)  # fmt: skip
_LEFT_OUT = (".bin", ".pt", ".pth", ".gguf", ".onnx", ".h5", ".msgpack")


def copy_folder(cache: Path, path: str, temperature: float) -> Path:
    """Where in a cache the copy of a model belongs: named after it, its place and the temperature."""
    place = hashlib.sha256(os.path.realpath(path).encode()).hexdigest()[:8]
    return cache / f"{Path(path).name or 'model'}-{place}-T{temperature:g}"


def served_temperature(folder: str | Path) -> float:
    """What a folder's logits are divided by: of a copy made here its temperature, else 1."""
    marker = _read_marker(Path(folder))
    return float(marker["temperature"]) if marker else 1.0


def tempered_copy(path: str, temperature: float, folder: Path, *, revision: str | None = None) -> bool:
    """Write the copy, or find it there already.

    Files other than the one with the final norm are hard links where the file system allows it, else copies.

    Args:
        path: the original: a folder, a hub id (fetched into the local cache), or ``zoo:NAME``.
        temperature: T > 0, other than 1.
        folder: of the copy; appears at once as a whole. What is there must be a copy made here, or nothing.
        revision: of a hub id.

    Returns:
        Whether it was written now.

    Raises:
        ModelError: the copy would not be exact, the model is not one that can be copied, or the folder is taken.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ModelError(f"temperature {temperature:g}", "a number > 0", "change --temperature")
    source = _fetch(resolve_path(path), revision)
    if _read_marker(source):
        raise ModelError(
            f"model {path!r} is a copy at temperature {served_temperature(source):g} itself", "the original",
            "name the model that it was made of",
        )  # fmt: skip
    norm, shard = _norm_of(source, path)
    state = {"source": str(source.resolve()), "temperature": temperature, "files": _state(source)}
    present = _read_marker(folder)
    if present == state and _whole(source, folder):
        return False
    if present is None and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ModelError(f"folder {folder} holds something else", "a new or empty folder", "choose another --copy-dir")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        writing = Path(tempfile.mkdtemp(prefix=f".writing-{folder.name}-", dir=folder.parent))
    except OSError as error:
        raise ModelError(f"{folder}: {error.strerror}", "a place that can be written", "choose --copy-dir") from None
    try:
        _write(source, writing, shard, norm, temperature)
        (writing / MARKER).write_text(json.dumps(state, indent=1), encoding="utf-8")
        writing.chmod(0o755)
        if sum(file.stat().st_size for file in source.glob("*.safetensors")) <= CHECK_LIMIT:
            check_copy(str(source), writing, temperature)
        _replace(writing, folder)
    except OSError as error:
        raise ModelError(f"{folder}: {error.strerror}", "room for a copy", "choose another --copy-dir") from None
    finally:
        shutil.rmtree(writing, ignore_errors=True)
    return True


def check_copy(source: str, folder: Path, temperature: float) -> float:
    """Run both in float32 on the CPU and compare log-probs with log_softmax(logits / T).

    Returns:
        The largest difference, in nats.

    Raises:
        ModelError: it is above ``TOLERANCE``.
    """
    import torch

    from scope_opd.models.loading import load_model

    with torch.no_grad():
        original = load_model(source)
        rows = original.get_input_embeddings().num_embeddings
        ids = torch.linspace(0, rows - 1, 16).long()[None]
        expected = (original(input_ids=ids, use_cache=False).logits.double() / temperature).log_softmax(-1)
        del original
        found = load_model(str(folder))(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    gap = float((found - expected).abs().max())
    if not gap <= TOLERANCE * max(1.0, float(expected.abs().max())):
        raise ModelError(
            f"model {source!r}: the copy at temperature {temperature:g} is off by {gap:.2g} nats",
            f"at most {TOLERANCE:g}", "sample at temperature 1, or set objective.temperature = 'released'",
        )  # fmt: skip
    return gap


def _fetch(target: str, revision: str | None) -> Path:
    if Path(target).is_dir():
        return Path(target)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(target, revision=revision, ignore_patterns=[f"*{end}" for end in _LEFT_OUT]))
    except Exception as error:  # of the hub, the network, the disk: one line for all
        raise ModelError(
            f"model {target!r}: {type(error).__name__}: {' '.join(str(error).split())[:200]}",
            "a folder, or a hub id that can be fetched", "check its spelling and the network",
        ) from None  # fmt: skip


def _norm_of(source: Path, path: str) -> tuple[list[str], Path]:
    """Names of the final norm's tensors and the file that holds them, once everything speaks for an exact copy."""
    config = _json(source / "config.json")
    kind = config.get("model_type")
    places = EXACT.get(kind) if isinstance(kind, str) else None
    if places is None or "AutoModelForCausalLM" in config.get("auto_map", {}):
        raise _inexact(path, f"has model_type {kind!r}, for which a copy is not known to be exact")
    if config.get("quantization_config"):
        raise _inexact(path, "is quantised")
    for name in _HEAD_SETTINGS:
        if config.get(name) not in (None, 1, 1.0):
            raise _inexact(path, f"has {name} = {config[name]!r}, which comes after its head")
    files = _tensors(source, path)
    norm, head = places
    if f"{head}.bias" in files:
        raise _inexact(path, f"has a head with a bias ({head}.bias)")
    names = [name for name in (f"{norm}.weight", f"{norm}.bias") if name in files]
    if f"{norm}.weight" not in names:
        raise _inexact(path, f"has no {norm}.weight")
    shards = {files[name] for name in names}
    if len(shards) > 1:
        raise _inexact(path, "has its final norm's weight and bias in two files")
    return names, source / shards.pop()


def _inexact(path: str, why: str) -> ModelError:
    return ModelError(
        f"model {path!r} {why}", f"a plain head after a plain norm: {', '.join(sorted(EXACT))}",
        "sample at temperature 1, or set objective.temperature = 'released'",
    )  # fmt: skip


def _tensors(source: Path, path: str) -> dict[str, str]:
    """Tensor name -> file, of the checkpoint that a server would load."""
    index = source / "model.safetensors.index.json"
    if index.is_file():
        places = _json(index).get("weight_map")
        if isinstance(places, dict) and all((source / str(file)).is_file() for file in places.values()):
            return places
        raise ModelError(f"{index} does not fit its folder", "all files that it names", "copy the model again")
    weights = source / "model.safetensors"
    if not weights.is_file():
        raise ModelError(f"model {path!r} has no safetensors weights", "model.safetensors", "save it again so")
    from safetensors import safe_open

    try:
        with safe_open(weights, framework="pt") as stream:
            return dict.fromkeys(stream.keys(), weights.name)
    except Exception as error:  # safetensors' own error, or the system's
        raise ModelError(f"{weights} is damaged ({error})", "a whole safetensors file", "copy it again") from None


def _write(source: Path, writing: Path, shard: Path, norm: list[str], temperature: float) -> None:
    import torch
    from safetensors import safe_open
    from safetensors.torch import load_file, save_file

    for file in _files(source):
        if file != shard:
            _link(file, writing / file.name)
    with safe_open(shard, framework="pt") as stream:
        metadata = stream.metadata()
    config, tensors = _json(source / "config.json"), load_file(shard)
    names_dtype = bool(config.get("dtype") or config.get("torch_dtype"))  # else loaders ask the first tensor
    for name in norm:
        divided = tensors[name].double() / temperature
        tensors[name] = divided.to(torch.float32 if names_dtype else tensors[name].dtype).contiguous()
    save_file(tensors, writing / shard.name, metadata=metadata or {"format": "pt"})
    shutil.copymode(shard, writing / shard.name)


def _link(file: Path, target: Path) -> None:
    real = file.resolve()  # a hub cache is made of symbolic links
    try:
        os.link(real, target)
    except OSError:
        shutil.copy2(real, target)


def _replace(writing: Path, folder: Path) -> None:
    """Put a whole folder in the place of another; where two do so at once, one of the two equal copies stays."""
    if folder.exists():
        former = Path(tempfile.mkdtemp(prefix=f".former-{folder.name}-", dir=folder.parent))
        with contextlib.suppress(FileNotFoundError):
            folder.rename(former / folder.name)
        shutil.rmtree(former, ignore_errors=True)
    try:
        writing.rename(folder)
    except OSError:
        if _read_marker(folder) != _read_marker(writing):
            raise


def _files(source: Path) -> list[Path]:
    return sorted(
        file for file in source.iterdir()
        if file.is_file() and not file.name.startswith(".") and file.suffix not in _LEFT_OUT and file.name != MARKER
    )  # fmt: skip


def _state(source: Path) -> dict[str, list[int]]:
    found = {file.name: file.stat() for file in _files(source)}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in found.items()}


def _whole(source: Path, folder: Path) -> bool:
    return all((folder / file.name).is_file() for file in _files(source))


def _read_marker(folder: Path) -> dict[str, Any] | None:
    try:
        marker = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    sound = isinstance(marker, dict) and isinstance(marker.get("temperature"), int | float)
    return marker if sound else None


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{file}: {error}", "readable JSON", "copy the file again") from None
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds no object", "readable JSON", "copy the file again")
    return value
