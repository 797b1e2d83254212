"""The same recorded rollouts through learners of one, two and three ranks, in forked processes.

As a program (``rank_parity.py FOLDER``) it prints one JSON line: by case, how far losses and weights of many ranks are
from those of one. A case is a student (tied or untied head), its dtype and what the config says.
"""

from __future__ import annotations

import copy
import json
import math
import os
import pickle
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from rank_program import fork_ranks, wait_all
from scope_opd.config import Config
from scope_opd.ranks import Ranks
from scope_opd.train.batch import make_batch
from scope_opd.train.engines import Engines, Follower
from scope_opd.train.step import Learner
from scope_opd.types import Rollout
from tiny import tiny_model
from train_kit import make_config, make_engines

STEPS = 5
LIMIT_S = 30.0
KINDS = {"tied": "qwen3", "untied": "llama"}
CASES: dict[str, dict[str, Any]] = {
    "tied float64": {},
    "untied float64": {"train": {"updates_per_batch": 2, "activation_checkpointing": "full"}},
    "tied float32": {"objective": {"distill": "full_kl"}, "train": {"max_tokens_per_microbatch": 4096}},
    "untied float32": {"train": {"grad_clip": "off", "minibatches": 2}},
    "untied float64 hybrid": {"train": {"shard": "hybrid", "grad_clip": 0.1}},
}
"""The third case has one micro-batch, so that ranks get empty ones."""


def worlds_of(name: str) -> tuple[int, ...]:
    """Ranks beside the one that they are compared with; in pairs on two pretended machines where weights are dealt to
    those of a machine."""
    return (4,) if name.endswith("hybrid") else (2, 3)


def case(name: str) -> tuple[Config, torch.dtype, str]:
    kind, dtype = name.split()[:2]
    tables = copy.deepcopy(CASES[name])
    tables["train"] = {
        "max_tokens_per_microbatch": 64, "prompts_per_step": 4, "lr": 1e-2, "collective_timeout_s": LIMIT_S,
        **tables.get("train", {}),
    }  # fmt: skip
    tables["objective"] = {"method": "reward_opd", **tables.get("objective", {})}
    return make_config(Path("unused"), **tables), getattr(torch, dtype), KINDS[kind]


def record(name: str, file: Path) -> None:
    config, dtype, kind = case(name)
    engines = make_engines(config, dtype=dtype)
    student = tiny_model(kind, seed=1, dtype=dtype)
    engines.pipeline.sampler.model = student  # type: ignore[attr-defined]
    steps = []
    for step in range(STEPS):
        rollouts = engines.pipeline.collect(
            engines.schedule.batch(step), engines.sampling, step=step, policy_version=0
        ).rollouts
        engines.credit(rollouts)
        steps.append(rollouts)
    file.write_bytes(pickle.dumps(steps))


def parts(name: str, ranks: Ranks) -> tuple[Config, Engines]:
    config, dtype, kind = case(name)
    student = tiny_model(kind, seed=1, dtype=dtype)
    trainee = tiny_model(kind, seed=1, dtype=dtype) if ranks.world > 1 else None
    return config, make_engines(config, dtype=dtype, model=student, trainee=trainee, ranks=ranks)


def limits(model: torch.nn.Module) -> list[float]:
    """Seconds that collectives of each group with the model's weights may take; nothing where they are whole."""
    parameter = next(model.parameters())
    if not isinstance(parameter, DTensor):
        return []
    groups = parameter.device_mesh.get_all_groups()
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def body(name: str, recorded: Path, result: Path, rank: int) -> int:
    with Ranks.from_environment(LIMIT_S) as ranks:
        config, engines = parts(name, ranks)
        if not ranks.leads:
            Learner(
                Follower(engines.trained, engines.surrogate, ranks, engines.model, engines.teacher_head), config.train
            )
            ranks.follow()
            return 0
        learner = Learner(engines, config.train)
        assert set(limits(engines.trained)) <= {LIMIT_S}
        steps: list[list[Rollout]] = pickle.loads(recorded.read_bytes())
        outcomes = []
        for rollouts in steps:
            batch = make_batch(
                rollouts, aggregation=engines.surrogate.aggregation, ranks=ranks.world,
                max_tokens=config.train.max_tokens_per_microbatch, packed=learner.forward.packs,
                minibatches=config.train.minibatches,
            )  # fmt: skip
            outcome = learner.update(batch, config.train.lr)
            outcomes.append((outcome.loss, outcome.grad_norm, int(outcome.tokens.rollout.numel()), outcome.clipped))
        learner.refresh(1)
        weights = learner.whole() or dict(engines.model.named_parameters())
        copied = dict(engines.model.named_parameters())
        assert all(torch.equal(copied[key], value) for key, value in weights.items())
        assert weights.keys() == copied.keys()
        result.write_bytes(pickle.dumps((outcomes, {key: value.detach() for key, value in weights.items()})))
    return 0


def main(folder: Path) -> dict[str, Any]:
    found = {}
    for name in CASES:
        worlds, machine = worlds_of(name), {"LOCAL_WORLD_SIZE": "2"} if name.endswith("hybrid") else {}
        recorded, results = folder / "rollouts", {}
        record(name, recorded)
        for world in (1, *worlds):
            result = folder / f"result-{world}"
            codes = wait_all(fork_ranks(world, folder, partial(body, name, recorded, result), **machine))
            if any(codes):
                texts = "\n".join((folder / f"rank-{rank}.txt").read_text() for rank in range(world))
                raise SystemExit(f"{name}, world {world}: {codes}\n{texts}")
            results[world] = pickle.loads(result.read_bytes())
        one, weights = results[1]
        start = dict(tiny_model(case(name)[2], seed=1, dtype=case(name)[1]).named_parameters())
        moved = math.sqrt(sum(float((weights[key] - start[key]).detach().double().pow(2).sum()) for key in weights))
        for world in worlds:
            many, theirs = results[world]
            gap = math.sqrt(sum(float((weights[k] - theirs[k]).double().pow(2).sum()) for k in weights))
            norm = math.sqrt(sum(float(weights[k].double().pow(2).sum()) for k in weights))
            found[f"{name}, world {world}"] = {
                "loss": max(abs(a[0] - b[0]) / max(abs(a[0]), 1e-3) for a, b in zip(one, many, strict=True)),
                "norm": max(abs(a[1] - b[1]) / a[1] for a, b in zip(one, many, strict=True)),
                "tokens": [row[2] for row in one] == [row[2] for row in many],
                "clipped": max(abs(a[3] - b[3]) for a, b in zip(one, many, strict=True)),
                "weights": gap / norm,
                "moved": moved / norm,
            }
    return found


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    print(json.dumps(main(Path(sys.argv[1]))))
