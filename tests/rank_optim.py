"""Optimisers whose states are dealt to ranks in other ways than AdamW's, in forked processes.

``rank_optim.py FOLDER`` prints one JSON object. "parity": by case, how far five steps of two and three ranks on
recorded rollouts are from those of one (``rank_parity``). "checkpoints": how every scenario of saving and loading ended
(exit codes, the last line of each rank); which laws hold the scenarios assert themselves.
"""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._dynamo  # with torchao, once for all ranks that are forked
import torchao.optim  # noqa: F401
from torch.distributed.tensor import DTensor, distribute_tensor

import rank_parity
from checkpoint_ranks import Trained, same
from rank_program import fork_ranks, wait_all
from scope_opd.config import TrainConfig
from scope_opd.models.sharding import make_mesh, shard
from scope_opd.ranks import Ranks
from scope_opd.train.checkpoint import Checkpoints
from scope_opd.train.optim import Optimizer, _cpu_mesh
from scope_opd.train.shards import Shards, rng_state
from tiny import tiny_model

PARITY: dict[str, dict[str, Any]] = {
    "tied float64 offload": {"train": {"offload": "optimizer", "updates_per_batch": 2}},
    "untied float64 muon": {"train": {"optimizer": "muon", "weight_decay": 0.1}},
    "tied float32 adamw_8bit": {"train": {"optimizer": "adamw_8bit"}},
}
"""In the last three ranks keep the states of the embedding in full (its shares are of less than 4,096 values), one and
two in 8 bits; those of all else are in full. So it is followed by one rank with AdamW's states in full."""
FULL = "tied float32 adamw"

NARROW: dict[str, Any] = {"hidden_size": 40, "head_dim": 4, "num_key_value_heads": 1}
WIDE: dict[str, Any] = {"hidden_size": 256, "head_dim": 64, "intermediate_size": 256}
SETTINGS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "offload": ({"offload": "optimizer"}, {**NARROW, "dtype": torch.float64}),
    "muon": ({"optimizer": "muon"}, {**NARROW, "dtype": torch.float64}),
    "adamw_8bit": ({"optimizer": "adamw_8bit"}, WIDE),
    "odd": ({"optimizer": "adamw_8bit"}, NARROW),
}
"""What a checkpoint is of: settings and student. Of some parameters of the narrow one the last of three ranks has
nothing. Rows of 256 values are whole blocks however they are dealt; of rows of 40 three ranks have none."""


class Student(Trained):
    """As its base, of other settings and sizes."""

    def __init__(self, ranks: Ranks, setting: str, seed: int, root: Path, how: Any) -> None:
        values, sizes = SETTINGS[setting]
        self.model = tiny_model("qwen3", seed=seed, layers=1, **sizes)
        if ranks.world > 1:
            shard(self.model, self.model, make_mesh(ranks.world, "cpu", how), low_precision=False)
        self.optimizer = Optimizer(self.model, TrainConfig(weight_decay=0.1, **values))
        self.shards = Shards(ranks, self.model, self.optimizer)
        self.store = Checkpoints(root, self.shards, keep_last=2)
        self.ranks = ranks
        ranks.register("update", self.update)
        ranks.register("whole", self.whole)
        ranks.register("twin", self.twin)

    def twin(self, _: None) -> None:
        """The mesh that offloaded states of parameters on GPUs have deals them out as the parameters' own does."""
        for parameter in self.model.parameters():
            if isinstance(parameter, DTensor):
                dealt = DTensor.from_local(
                    parameter.detach().to_local(), _cpu_mesh(parameter.device_mesh), parameter.placements,
                    run_check=False, shape=parameter.shape, stride=parameter.stride(),
                )  # fmt: skip
                assert dealt.__create_chunk_list__() == parameter.__create_chunk_list__()
                assert torch.equal(dealt.full_tensor(), parameter.detach().full_tensor())

    def update(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for parameter in self.model.parameters():
            gradient = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            if isinstance(parameter, DTensor):
                gradient = distribute_tensor(gradient, parameter.device_mesh, parameter.placements)
            parameter.grad = gradient
        self.optimizer.step(1e-2)


def save(student: Student, root: Path) -> None:
    """Two updates, a checkpoint, a third update while it is written; whole weights and states before it and after."""
    for step in (1, 2):
        student.everywhere("update", step)
    torch.save(student.everywhere("whole"), root / "before.pt")
    student.store.save(2, {}, rng_state())
    student.everywhere("update", 3)
    assert student.store.settle(wait=True) is not None
    torch.save(student.everywhere("whole"), root / "after.pt")


def load(student: Student, root: Path, *, exact: bool) -> None:
    """What was saved is there bit for bit, and the third update is the one of the ranks that saved."""
    student.everywhere("update", 7)
    found = student.store.newest_sound(print)
    assert found is not None
    student.store.load(found)
    assert same(student.everywhere("whole"), torch.load(root / "before.pt"))
    student.everywhere("twin")
    student.everywhere("update", 3)
    now, then = student.everywhere("whole"), torch.load(root / "after.pt")
    assert now.keys() == then.keys()
    if exact:
        assert same(now, then)
        return
    gaps = {name: apart(now[name], then[name]) for name in then}
    worst = max(gaps, key=lambda name: gaps[name])
    limit = 1e-12 if then[worst].dtype == torch.float64 else 1e-6
    assert gaps[worst] <= limit, f"{worst}: {gaps[worst]}"


def apart(left: torch.Tensor, right: torch.Tensor) -> float:
    """The norm of the difference by that of the second; of codes how many differ."""
    if left.dtype == torch.uint8:
        return float((left != right).double().mean())
    return float((left - right).double().norm()) / max(float(right.double().norm()), 1e-30)


def body(scenario: Callable[[Student, Path], None], setting: str, root: Path, how: str, rank: int) -> int:
    torch.set_num_threads(1)
    with Ranks.from_environment(30.0) as ranks:
        student = Student(ranks, setting, ranks.world, root, how)
        ranks.meet()
        if ranks.leads:
            scenario(student, root)
        else:
            ranks.follow()
    return 0


def checkpoints(folder: Path) -> dict[str, Any]:
    found = {}

    def run(name: str, setting: str, world: int, scenario: Any, how: str = "full", **environment: str) -> None:
        outputs, root = folder / name, folder / setting
        outputs.mkdir()
        root.mkdir(exist_ok=True)
        codes = wait_all(fork_ranks(world, outputs, partial(body, scenario, setting, root, how), **environment))
        lines = [(outputs / f"rank-{rank}.txt").read_text().splitlines() for rank in range(world)]
        found[name] = {"codes": codes, "lines": [text[-1] if text else "" for text in lines]}

    for setting in ("offload", "muon", "adamw_8bit"):
        run(f"{setting}: saved by 2", setting, 2, save)
        run(f"{setting}: loaded by 2", setting, 2, partial(load, exact=True))
        for world in (1, 3):
            run(f"{setting}: loaded by {world}", setting, world, partial(load, exact=False))
    for setting in ("muon", "adamw_8bit"):
        pairs = {"LOCAL_WORLD_SIZE": "2"}
        run(f"{setting}: loaded by 2 machines of 2", setting, 4, partial(load, exact=True), "hybrid", **pairs)
    run("odd: saved by 2", "odd", 2, save)
    run("odd: refused by 3", "odd", 3, partial(load, exact=False))
    run("odd: loaded by 2", "odd", 2, partial(load, exact=True))
    return found


def parity(folder: Path) -> dict[str, Any]:
    """As ``rank_parity.main`` of these cases, and how far 8-bit states on three ranks are from AdamW on one."""
    rank_parity.CASES.clear()
    rank_parity.CASES.update({**PARITY})
    found = rank_parity.main(folder)
    rank_parity.CASES[FULL] = {}
    alone = folder / "alone"
    codes = wait_all(fork_ranks(1, folder, partial(rank_parity.body, FULL, folder / "rollouts", alone)))
    assert codes == [0], (folder / "rank-0.txt").read_text()
    (_, full), (_, three) = (pickle.loads(file.read_bytes()) for file in (alone, folder / "result-3"))
    gap, norm = (sum(float(each.double().pow(2).sum()) for each in parts) for parts in (
        [full[name] - three[name] for name in full], full.values(),
    ))  # fmt: skip
    return found | {FULL: {"weights": (gap / norm) ** 0.5}}


def main(folder: Path) -> dict[str, Any]:
    recorded = folder / "parity"
    recorded.mkdir()
    return {"parity": parity(recorded), "checkpoints": checkpoints(folder)}


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(json.dumps(main(Path(sys.argv[1]))))
