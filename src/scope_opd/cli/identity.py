"""What tells models and templates apart in the records of a command that goes on only where nothing has changed."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from scope_opd.cli.inputs import model_config
from scope_opd.config import Config
from scope_opd.models.places import resolve_path

_TOKENIZER_FILES = ("*token*.json", "vocab.json", "merges.txt", "generation_config.json", "*.model", "*.jinja")
_IDENTITY_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.jinja", "*.txt", "*.py")


def model_identity(config: Config) -> dict[str, str | None]:
    """What tells a model's weights apart: a hash of a folder's files, or the hub's commit."""
    model = config.model
    return _identity(model.path, model.revision, model.trust_remote_code)


def served_identity(config: Config) -> dict[str, str | None]:
    """The same of all that is read of a model behind servers: its tokenizer."""
    model = config.model
    return _identity(model.tokenizer or model.path, model.revision, model.trust_remote_code, _TOKENIZER_FILES)


def tokenizer_identity(config: Config) -> dict[str, str | None] | None:
    """The same of ``model.tokenizer``; None where the model brings its own."""
    model = config.model
    return None if model.tokenizer is None else _identity(model.tokenizer, model.revision, model.trust_remote_code)


def template_sha256(config: Config) -> str | None:
    """Of a Jinja file's bytes: the same path may hold another template tomorrow."""
    template = config.chat.template
    if template is None or not Path(template).is_file():
        return None
    return hashlib.sha256(Path(template).read_bytes()).hexdigest()


def _identity(
    place: str, revision: str | None, trust_remote_code: bool, patterns: Sequence[str] = _IDENTITY_FILES
) -> dict[str, Any]:
    path = resolve_path(place)
    if not Path(path).is_dir():
        found = model_config(path, revision, trust_remote_code)
        return {"sha256": None, "commit": getattr(found, "_commit_hash", None)}
    digest = hashlib.sha256()
    for file in sorted({file for pattern in patterns for file in Path(path).glob(pattern)}):
        with file.open("rb") as stream:
            digest.update(f"{file.name}\0{hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
    return {"sha256": digest.hexdigest(), "commit": None}
