"""Loading causal LMs and tokenizers in Hugging Face layout; every failure is one line that says what to do.

A path is a folder, a hub id, or a shipped model (``zoo:student``, ``zoo:teacher``). What looks like a folder is never
looked up on the hub. A checkpoint that lacks weights of its architecture is refused, where transformers would fill
them with random numbers. Not covered: quantised checkpoints, adapters (merge them first), models split over devices.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file
from transformers.utils import logging as transformers_logging
from transformers.utils.hub import get_checkpoint_shard_files

from scope_opd.errors import ModelError
from scope_opd.models.deferred import defer
from scope_opd.models.places import check_device_name, resolve_path

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "*.tiktoken")
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
_CONTEXT_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length")


def load_model(
    path: str,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    in_files: bool = False,
) -> PreTrainedModel:
    """A causal LM in eval mode on ``device``, its weights held in ``dtype``.

    Args:
        path: a folder, a hub id, or a shipped model.
        revision: of a hub id.
        dtype, device: of the weights.
        attn_implementation: as transformers has it; None: its choice.
        trust_remote_code: whether code that the model brings along may run.
        in_files: its weights may stay in their files for now (``models.deferred``), which they do where that gives the
            same numbers: files of safetensors, all in one dtype that ``dtype`` holds exactly. The model is the same but
            for that.

    Raises:
        ModelError: no such folder, no config.json, no weights, weights that are damaged or do not belong to the
            config, an unknown architecture, code that would have to be trusted, an attention implementation that is
            not there, a hub that cannot be reached.
    """
    target = resolve_path(path)
    if Path(target).is_dir():
        _check_config(Path(target), path, trust_remote_code)
        _check_weights(Path(target), path)
    options: dict[str, Any] = {"revision": revision} if revision is not None else {}
    if attn_implementation is not None:
        options["attn_implementation"] = attn_implementation
    options["trust_remote_code"] = trust_remote_code

    def load(held: torch.dtype) -> PreTrainedModel:
        try:
            with _quiet():
                model, report = AutoModelForCausalLM.from_pretrained(
                    target, dtype=held, output_loading_info=True, **options
                )
        except (MemoryError, torch.OutOfMemoryError):
            raise  # the folder may well be whole: whoever asked for the model says what to do about memory
        except Exception as error:
            raise _explain(error, path, f"a causal LM that transformers can load in {dtype}") from error
        _refuse_missing(report["missing_keys"], path)
        loaded: PreTrainedModel = model.eval()
        return loaded

    stored = _stored_dtype(target, revision) if in_files else None
    if stored is not None and torch.promote_types(stored, dtype) == dtype:
        model = load(stored)  # as stored, so that weights are views of the mapped files and not copies
        if stored == dtype:
            defer(model, torch.device(device))
            return model.to(device)
        # Buffers are made in the dtype of the weights where a model does not say otherwise.
        if all(buffer.dtype == torch.float32 for buffer in model.buffers() if buffer.is_floating_point()):
            defer(model, torch.device(device), dtype)
            for name in ("", *model.config.sub_configs):
                part = getattr(model.config, name, None) if name else model.config
                if part is not None:
                    part.dtype = dtype
            return model.to(device)
    return load(dtype).to(device)


def load_tokenizer(
    path: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer that belongs to a model.

    Raises:
        ModelError: no such folder, a folder without tokenizer files, damaged files, a hub that cannot be reached.
    """
    target = resolve_path(path)
    folder = Path(target)
    if folder.is_dir() and not any(any(folder.glob(name)) for name in _TOKENIZER_FILES):
        raise ModelError(
            f"folder {path!r} has no tokenizer", "tokenizer.json beside config.json", "save the tokenizer there too"
        )
    options: dict[str, Any] = {"revision": revision} if revision is not None else {}
    try:
        with _quiet():
            return AutoTokenizer.from_pretrained(target, trust_remote_code=trust_remote_code, **options)
    except Exception as error:
        raise _explain(error, path, "a tokenizer that transformers can load") from error


def resolve_device(name: str = "auto") -> torch.device:
    """``auto`` is the GPU where there is one, else the CPU; else ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ModelError: another name, a device that is not there, or one that refuses a first allocation.
    """
    check_device_name(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ModelError(
            f"device {name!r} with {torch.cuda.device_count()} GPUs visible",
            "a device that is there",
            "use auto or cpu",
        )
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ModelError(f"device {name!r} cannot be used: {reason}", "a device that works", "use cpu") from None
    return device


def end_token_ids(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, extra: Sequence[int] = ()
) -> tuple[int, ...]:
    """Every token that ends a response: the generation config's, the tokenizer's, and ``extra``; sorted, once each.

    Raises:
        ModelError: none at all, or an id that the model has no row for.
    """
    ids = set(extra)
    generation = getattr(model, "generation_config", None)
    declared = getattr(generation, "eos_token_id", None)
    if declared is None:
        declared = getattr(model.config.get_text_config(), "eos_token_id", None)
    ids.update([declared] if isinstance(declared, int) else declared or ())
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(int(tokenizer.eos_token_id))
    rows = model.get_input_embeddings().num_embeddings
    outside = sorted(token for token in ids if not 0 <= token < rows)
    if outside:
        raise ModelError(
            f"end token {outside[0]}", f"an id below the model's {rows} rows", "mend chat.stop_token_ids or the model"
        )
    if not ids:
        raise ModelError("a model without an end token", "at least one", "set chat.stop_token_ids")
    return tuple(sorted(ids))


def context_length(model_config: Any) -> int | None:
    """Tokens that a sequence may have, prompt and response together; None where the config sets no limit."""
    config = model_config.get_text_config() if hasattr(model_config, "get_text_config") else model_config
    for name in _CONTEXT_FIELDS:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None


def vocabulary_mismatch(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase
) -> list[tuple[int, str | None, str | None]]:
    """Ids that do not mean the same token to both: (id, student's token, teacher's token), in order of id.

    None where a tokenizer has nothing at an id. Rows that a head has beyond its tokenizer do not appear in either
    vocabulary and so are no mismatch.
    """
    left = {index: token for token, index in student.get_vocab().items()}
    right = {index: token for token, index in teacher.get_vocab().items()}
    return [
        (index, left.get(index), right.get(index))
        for index in sorted(left.keys() | right.keys())
        if left.get(index) != right.get(index)
    ]


def _check_config(folder: Path, path: str, trust_remote_code: bool) -> None:
    file = folder / "config.json"
    if not file.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ModelError(f"folder {path!r} holds an adapter", "a whole model", "merge the adapter into its base")
        raise ModelError(f"folder {path!r} has no config.json", "a Hugging Face model folder", "check the path")
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ModelError(f"{file}: {error}", "readable JSON", "copy the file again") from None
    kind = config.get("model_type") if isinstance(config, dict) else None
    if not isinstance(kind, str):
        raise ModelError(f"{file} has no model_type", "the config of a transformers model", "copy the file again")
    if "auto_map" in config and kind not in CONFIG_MAPPING and not trust_remote_code:
        raise ModelError(
            f"folder {path!r} brings its own Python code for model_type {kind!r}",
            "trust_remote_code = true to run it",
            "read the code, then set it",
        )
    if kind not in CONFIG_MAPPING and "auto_map" not in config:
        raise ModelError(
            f"folder {path!r} has model_type {kind!r}", "an architecture of the installed transformers", "upgrade it"
        )


def _check_weights(folder: Path, path: str) -> None:
    files = sorted(file for pattern in _WEIGHTS for file in folder.glob(pattern))
    if not files:
        raise ModelError(
            f"folder {path!r} has a config.json and no weights", "model.safetensors", "copy or download the weights"
        )
    for index in folder.glob("*.safetensors.index.json"):
        try:
            shards = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (ValueError, RecursionError, OSError, KeyError, TypeError, AttributeError) as error:
            raise ModelError(f"{index}: {error}", "the index of the weight files", "copy the file again") from None
        absent = sorted(name for name in shards if not (folder / name).is_file())
        if absent:
            raise ModelError(f"folder {path!r} lacks {absent[0]}", f"all {len(shards)} weight files", "copy it again")
    for file in files:
        if file.suffix != ".safetensors":
            continue
        try:
            with safe_open(file, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(f"{file} is damaged ({error})", "a whole safetensors file", "copy it again") from None


def _refuse_missing(keys: Collection[str], path: str) -> None:
    if keys:
        raise ModelError(
            f"model {path!r} lacks {len(keys)} weights of its architecture, the first {min(keys)}",
            "a complete checkpoint",
            "save the whole model again (an adapter must be merged first), or mend config.json",
        )


def _stored_dtype(target: str, revision: str | None) -> torch.dtype | None:
    """The one dtype of all tensors in the safetensors files that transformers loads; None where there is no such."""
    found = set()
    try:
        with _quiet():
            options: Any = {"revision": revision, "_raise_exceptions_for_missing_entries": False}
            single = cached_file(target, SAFE_WEIGHTS_NAME, **options)
            files = [single]
            if single is None:
                index = cached_file(target, SAFE_WEIGHTS_INDEX_NAME, **options)
                files, _ = get_checkpoint_shard_files(target, index, revision=revision)
        for file in files:
            with safe_open(file, framework="pt") as stream:
                names = stream.keys()
                found |= {stream.get_slice(name).get_dtype() for name in names}
    except Exception:  # a network, a folder without such files: loading them tells what is wrong, if anything is
        return None
    return _FLOATS.get(found.pop()) if len(found) == 1 else None


def _explain(error: Exception, path: str, expected: str) -> ModelError:
    """Turn what transformers raised into one line."""
    text = " ".join(str(error).split())
    lowered = text.lower()
    if "trust_remote_code" in lowered:
        remedy = "read the code, then set trust_remote_code = true"
    elif "connect" in lowered or "offline" in lowered or "name or service" in lowered:
        remedy = "no folder here has that name: check it, or the network (HF_HUB_OFFLINE=1 looks in the cache alone)"
    elif "not a valid model identifier" in lowered or "404" in lowered or "repository not found" in lowered:
        remedy = "check the spelling; a local folder must exist and hold config.json"
    elif "attn_implementation" in lowered or "attention" in lowered:
        remedy = "leave attn_implementation out, or install what it needs"
    elif "mismatch" in lowered or "size" in lowered:
        remedy = "config.json and weights must belong together: copy both again"
    elif "automodelforcausallm" in lowered:
        remedy = "choose a causal language model"
    else:
        remedy = "check that the folder is whole and that transformers knows the architecture"
    short = text if len(text) <= 240 else text[:237] + "..."
    return ModelError(f"model {path!r}: {type(error).__name__}: {short}", expected, remedy)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars, no load report: what matters in it is raised as an error."""
    bar, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity(transformers_logging.CRITICAL)
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bar:
            transformers_logging.enable_progress_bar()
