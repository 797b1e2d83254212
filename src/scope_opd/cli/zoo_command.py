"""``scope zoo``: the embedded task and its two models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from cyclopts import App

COPY_EXAMPLES = """Examples:
  scope zoo copy zoo
  scope zoo copy runs/zoo --head-dim 32          for vLLM on a CPU, whose attention knows no narrower heads
  scope train configs/debug.toml --set model.path=zoo/student
"""
BUILD_EXAMPLES = """Examples:
  scope zoo build --out zoo-new
  scope zoo build --out zoo-7 --seed 7
"""
app = App(name="zoo", help="The embedded task: list it, copy it, build it anew.", help_format="plaintext")


@app.command(name="list", help_epilogue="Examples:\n  scope zoo list")
def list_zoo() -> int:
    """List what is shipped: models and data, with sizes and paths."""
    from scope_opd.zoo import data_path, model_path

    for name in ("student", "teacher"):
        folder = model_path(name)
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        size = sum(file.stat().st_size for file in folder.iterdir())
        shape = f"{config['num_hidden_layers']} layers of {config['hidden_size']}"
        print(f"zoo:{name:8} {config['model_type']}, {shape}, {size / 1e6:.1f} MB  {folder}")
    for split in ("train", "heldout"):
        path = data_path(split)
        rows = len(path.read_text(encoding="utf-8").splitlines())
        print(f"zoo:{split:8} {rows} rows  {path}")
    return 0


@app.command(help_epilogue=COPY_EXAMPLES)
def copy(folder: Path, /, *, head_dim: int | None = None) -> int:
    """Copy the shipped models and data to a folder of yours.

    Parameters
    ----------
    folder
        Where to; it must not exist or be empty.
    head_dim
        Give attention heads that are narrower than this that many dimensions, the
        new ones zero: the same models to others' attention kernels.
    """
    from scope_opd.errors import ConfigError
    from scope_opd.zoo import data_path, model_path

    folder = folder.expanduser()
    _require_empty(folder)
    widths = {name: _head_dim(model_path(name)) for name in ("student", "teacher")}
    if head_dim is not None and (head_dim < 1 or any(head_dim % width for width in widths.values())):
        raise ConfigError(
            f"--head-dim {head_dim}", f"a multiple of {max(widths.values())}", "leave it out for the models as they are"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in widths:
        shutil.copytree(model_path(name), folder / name)
        if head_dim is not None:
            from scope_opd.zoo.widen import widen_heads

            widen_heads(folder / name, head_dim)
    for split in ("train", "heldout"):
        shutil.copyfile(data_path(split), folder / f"{split}.jsonl")
    print(f"copied the zoo to {folder}")
    return 0


@app.command(help_epilogue=BUILD_EXAMPLES)
def build(*, out: Path, seed: int = 0) -> int:
    """Train the zoo's teacher and student from nothing (at most 15 minutes on 2 cores).

    Prints the figures that they reach.

    Parameters
    ----------
    out
        Where to; it must not exist or be empty.
    seed
        Everything follows from it (on one kind of processor, one torch version and thread count).
    """
    from scope_opd.zoo.build import build as build_zoo

    out = out.expanduser()
    _require_empty(out)
    figures: Any = build_zoo(out, seed=seed, progress=lambda line: print(line, flush=True))
    print(json.dumps(figures, indent=2, default=str))
    return 0


def _head_dim(folder: Path) -> int:
    return int(json.loads((folder / "config.json").read_text(encoding="utf-8"))["head_dim"])


def _require_empty(folder: Path) -> None:
    from scope_opd.errors import RunFolderError

    if folder.is_file() or (folder.is_dir() and any(folder.iterdir())):
        raise RunFolderError(f"{folder} exists", "a new or empty folder", "name another, or move it away")
