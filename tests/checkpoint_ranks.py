"""Checkpoints of sharded students: a program that forks ranks, saves and loads with them, and prints what came of it.

``checkpoint_ranks.py FOLDER`` prints one JSON object: scenario -> exit codes and the last line of each rank. Which laws
hold is in test_checkpoint_ranks.py; the scenarios themselves assert them.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from rank_program import fork_ranks, wait_all
from scope_opd.config import TrainConfig
from scope_opd.errors import RunFailed
from scope_opd.models.sharding import make_mesh, shard
from scope_opd.ranks import Ranks
from scope_opd.train.checkpoint import Checkpoints, list_checkpoints
from scope_opd.train.optim import Optimizer
from scope_opd.train.shards import Shards, rng_state, trained_weights
from tiny import tiny_model
from train_kit import files_limited_to


class Trained:
    """A tiny student on a rank, dealt out where there are several, and jobs to change and to see it."""

    def __init__(self, ranks: Ranks, kind: str, seed: int, root: Path) -> None:
        self.model: Any = tiny_model(kind, seed=seed, layers=1, hidden_size=40)  # not even among 3
        if ranks.world > 1:
            shard(self.model, self.model, make_mesh(ranks.world, "cpu", "full"), low_precision=False)
        self.optimizer = Optimizer(self.model, TrainConfig())
        self.shards = Shards(ranks, self.model, self.optimizer)
        self.store = Checkpoints(root, self.shards, keep_last=2)
        self.ranks = ranks
        ranks.register("update", self.update)
        ranks.register("whole", self.whole)

    def update(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        self.optimizer.step(1e-2)

    def whole(self, _: None) -> dict[str, torch.Tensor]:
        tensors = {**trained_weights(self.model), **self.optimizer.states()}
        return {
            name: (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()
            for name, tensor in tensors.items()
        }

    def everywhere(self, name: str, share: Any = None) -> Any:
        return self.ranks.everywhere(name, [share] * self.ranks.world)[0]


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def save(trained: Trained, root: Path) -> None:
    """Save while training goes on, and again; what each was asked to hold goes to whole-N.pt."""
    for step in (1, 2):
        trained.everywhere("update", step)
        torch.save(trained.everywhere("whole"), root / f"whole-{step}.pt")
        trained.store.save(step, {"step": step}, rng_state())
        trained.everywhere("update", 10 * step)  # what is written is what was there when it was asked for
        assert trained.store.settle(wait=True) == root / f"step-00000{step}"
    files = {path.name for path in (root / "step-000002").iterdir()}
    data = {f"__{rank}_0.distcp" for rank in range(trained.ranks.world)}
    assert files == data | {".metadata", "trainer.json", "manifest.json"}, files


def load(trained: Trained, root: Path, written_by: int) -> None:
    found = trained.store.newest_sound(print)
    assert found is not None
    assert (found.step, found.world) == (2, written_by)
    before = [parameter.data_ptr() for parameter in map(local, trained.model.parameters())]
    trained.store.load(found)
    assert before == [parameter.data_ptr() for parameter in map(local, trained.model.parameters())]
    assert same(trained.everywhere("whole"), torch.load(root / "whole-2.pt"))
    trained.everywhere("update", 3)


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def damage(trained: Trained, root: Path) -> None:
    """Each rank reads its share of the files; what one of them finds wrong is known."""
    target = root / "step-000002" / "__1_0.distcp"
    data = bytearray(target.read_bytes())
    data[len(data) // 2] ^= 1
    target.write_bytes(bytes(data))
    reports: list[str] = []
    found = trained.store.newest_sound(reports.append)
    assert found is not None
    assert found.step == 1
    assert len(reports) == 1
    assert "__1_0.distcp does not have the sha256" in reports[0]
    trained.store.load(found)
    assert same(trained.everywhere("whole"), torch.load(root / "whole-1.pt"))


def full_disk_elsewhere(trained: Trained, root: Path) -> None:
    """The disk is full where rank 1 writes: one line, the older one intact; then there is room again."""
    trained.everywhere("update", 1)
    trained.store.save(7, {}, rng_state())
    trained.store.settle(wait=True)
    trained.everywhere("limit", 100)
    trained.store.save(8, {}, rng_state())
    with pytest.raises(RunFailed, match="step-000008 could not be written: rank 1: "):
        trained.store.settle(wait=True)
    assert [path.name for path in root.iterdir()] == ["step-000007"]
    trained.everywhere("limit", None)
    trained.store.save(9, {}, rng_state())
    assert trained.store.settle(wait=True) is not None


def killed_elsewhere(trained: Trained, root: Path) -> None:
    """Rank 1 is killed as it writes: rank 0 hears of it, does not wait for its part, and no half checkpoint counts."""
    trained.store.save(1, {}, rng_state())
    trained.store.settle(wait=True)
    trained.everywhere("die while writing", None)
    began = time.monotonic()
    trained.store.save(2, {}, rng_state())
    try:
        trained.store.settle(wait=True)
    except RunFailed:
        assert time.monotonic() - began < 20
        assert [step for step, _ in list_checkpoints(root)] == [1]
        raise
    finally:
        trained.store.abandon()


def register_harm(ranks: Ranks) -> None:
    limited: list[Any] = []

    def limit(size: int | None) -> None:
        if ranks.rank != 1:
            return
        if size is None:
            limited.pop().__exit__(None, None, None)
        else:
            limited.append(files_limited_to(size))
            limited[0].__enter__()

    def die_while_writing(_: None) -> None:
        if ranks.rank == 1:
            Shards.write = lambda self: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[method-assign,assignment,return-value]

    ranks.register("limit", limit)
    ranks.register("die while writing", die_while_writing)


def body(scenario: Callable[[Trained, Path], None], root: Path, kind: str, rank: int) -> int:
    torch.set_num_threads(1)
    with Ranks.from_environment(30.0) as ranks:
        register_harm(ranks)
        trained = Trained(ranks, kind, ranks.world, root)
        ranks.meet()
        if ranks.leads:
            scenario(trained, root)
        else:
            ranks.follow()
    return 0


def main(folder: Path) -> None:
    found = {}

    def run(name: str, world: int, scenario: Any, root: str, kind: str) -> None:
        outputs = folder / name
        outputs.mkdir()
        (folder / root).mkdir(exist_ok=True)
        pids = fork_ranks(world, outputs, partial(body, scenario, folder / root, kind))
        codes = wait_all(pids)
        lines = [(outputs / f"rank-{rank}.txt").read_text().splitlines() for rank in range(world)]
        found[name] = {"codes": codes, "lines": [text[-1] if text else "" for text in lines]}

    run("tied: saved by 2", 2, save, "tied", "qwen3")
    for world in (2, 1, 3):
        run(f"tied: loaded by {world}", world, partial(load, written_by=2), "tied", "qwen3")
    run("untied: saved by 3", 3, save, "untied", "llama")
    run("untied: loaded by 2", 2, partial(load, written_by=3), "untied", "llama")
    run("alone: saved by 1", 1, save, "alone", "qwen3")
    run("alone: loaded by 2", 2, partial(load, written_by=1), "alone", "qwen3")
    run("damage", 2, damage, "tied", "qwen3")
    run("full disk elsewhere", 2, full_disk_elsewhere, "full", "qwen3")
    run("killed elsewhere", 2, killed_elsewhere, "killed", "qwen3")
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
