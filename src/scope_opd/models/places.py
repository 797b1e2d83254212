"""Paths of models and names of devices, looked at without torch, so that a slip is known before seconds of loading.

Not covered: what lies in a folder, whether a device is there (``loading``).
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import scope_opd
from scope_opd.errors import ModelError

ZOO = "zoo:"
_ZOO_MODELS = ("student", "teacher")


def resolve_path(path: str) -> str:
    """The folder or hub id that a configured path stands for.

    ``zoo:NAME`` is the shipped model's folder. A path that exists, starts with ``/``, ``.`` or ``~``, or has a
    separator and an existing parent is a folder; anything else is a hub id.

    Returns:
        An existing folder's path, or the hub id unchanged.

    Raises:
        ModelError: an unknown zoo model, a folder that does not exist, a file.
    """
    if not path.strip():
        raise ModelError("an empty model path", "a folder, a hub id, zoo:student or zoo:teacher", "set the path")
    if path.startswith(ZOO):
        name = path.removeprefix(ZOO)
        if name not in _ZOO_MODELS:
            raise ModelError(f"model path {path!r}", "zoo:student or zoo:teacher", "choose one of the two")
        folder = Path(scope_opd.__file__).parent / "zoo" / "models" / name
        if not folder.is_dir():
            raise ModelError(f"{path}: no folder {folder}", "the shipped model", "run `scope zoo build`, or reinstall")
        return str(folder)
    folder = Path(path).expanduser()
    if folder.is_file():
        raise ModelError(f"model path {path!r} is a file", "a Hugging Face folder", "name the folder that holds it")
    if folder.is_dir():
        return str(folder)
    looks_local = path.startswith(("/", ".", "~")) or (
        ("/" in path or os.sep in path) and (path.count("/") > 1 or folder.parent.is_dir())
    )
    if looks_local:
        raise ModelError(
            f"model path {path!r}: no such folder", "a folder with config.json and weights", "check the path"
        )
    return path


def check_device_name(name: str) -> None:
    """Refuse what names no device.

    Raises:
        ModelError: not ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", name):
        raise ModelError(f"device {name!r}", "auto, cpu, cuda or cuda:N", "set train.device")
