"""What ranks hold of a student while they load and deal it out, in forked processes.

As a program (``rank_loading.py FOLDER``) it prints one JSON line: by case, whether every rank's shards are those of a
student that was loaded whole, and the most that its parameters took meanwhile.
"""

from __future__ import annotations

import json
import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rank_program import fork_ranks, wait_all
from scope_opd.cli.models import load_trainee
from scope_opd.config import Config, validate_config
from scope_opd.models import deferred, sharding
from scope_opd.models.adapters import add_adapters
from scope_opd.models.deferred import SOURCE
from scope_opd.models.sharding import local
from scope_opd.models.watch import decoder_layers
from scope_opd.ranks import Ranks
from scope_opd.train.engines import Follower, SurrogateSettings
from scope_opd.train.step import Learner
from tiny import tiny_model

KINDS = {"tied": "qwen3", "untied": "llama"}
CASES = {
    "tied world 2": {}, "untied world 3": {}, "tied bfloat16 world 2": {"train": {"param_dtype": "bfloat16"}},
    "untied adapters world 2": {"model": {"lora": {"rank": 2}}},
}  # fmt: skip


def settings(name: str, folder: Path) -> Config:
    tables: dict[str, Any] = {"train": {"device": "cpu"}, **CASES[name]}
    tables["model"] = {**tables.get("model", {}), "path": str(folder / name.split()[0])}
    return validate_config(tables)


def held(model: nn.Module) -> int:
    """Bytes of all parameters' memory on this rank but for what is mapped from files."""
    found = {}
    for parameter in model.parameters():
        storage, source = local(parameter.detach()).untyped_storage(), getattr(parameter, SOURCE, None)
        if source is None or source.untyped_storage().data_ptr() != storage.data_ptr():
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def body(name: str, folder: Path, rank: int) -> int:
    with Ranks.from_environment(30.0) as ranks:
        config = settings(name, folder)
        student = load_trainee(config, torch.device("cpu"), ranks)
        assert deferred.deferred(student)
        add_adapters(student, config.model.lora, seed=config.run.seed)
        peak, fill = 0, deferred.fill

        def watched(module: nn.Module, **more: Any) -> None:
            nonlocal peak
            fill(module, **more)
            peak = max(peak, held(student))

        deferred.fill = sharding.fill = watched
        learner = Learner(Follower(student, SurrogateSettings(), ranks), config.train)
        share = held(student)
        (folder / f"found-{rank}").write_bytes(pickle.dumps((max(peak, share), share, learner.forward.packs)))
        if ranks.leads:
            torch.save(learner.whole(), folder / "weights")
        else:
            ranks.follow()
    return 0


def main(folder: Path) -> dict[str, Any]:
    found = {}
    for head, kind in KINDS.items():
        model = tiny_model(kind, hidden_size=64, layers=8, dtype=torch.bfloat16)
        model.save_pretrained(folder / head)
    for name in CASES:
        world = int(name.split()[-1])
        codes = wait_all(fork_ranks(world, folder, partial(body, name, folder)))
        if any(codes):
            texts = "\n".join((folder / f"rank-{rank}.txt").read_text() for rank in range(world))
            raise SystemExit(f"{name}: {codes}\n{texts}")
        results = [pickle.loads((folder / f"found-{rank}").read_bytes()) for rank in range(world)]
        config = settings(name, folder)
        whole = load_trainee(config, torch.device("cpu"), Ranks())
        add_adapters(whole, config.model.lora, seed=config.run.seed)
        expected = dict(whole.named_parameters())
        size = sum(parameter.nbytes for parameter in expected.values())
        layers = [sum(parameter.nbytes for parameter in layer.parameters()) for layer in decoder_layers(whole)]
        weights = torch.load(folder / "weights")
        found[name] = {
            "equal": all(torch.equal(weights[key], value) for key, value in expected.items()),
            "packs": all(result[2] for result in results),
            "peaks": [result[:2] for result in results],
            "layer": max(layers),
            "around": size - sum(layers),
            "whole": size,
        }
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
