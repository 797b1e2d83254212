"""LoRA, groups that come early, mini-batches, checkpointing and resuming on several ranks, against one rank without.

As a program (``rank_more.py FOLDER``) it prints one JSON line: by case and world, how far recorded rollouts lead from
where they lead one rank; how runs that were cut and resumed differ from one that was not; how ranks end whose plain
copy has other weights than they train. All models are tiny and in float64. Ranks are forked from this process.
"""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from rank_program import fork_ranks, wait_all
from rank_runs import gap, rows, texts
from scope_opd.config import Config
from scope_opd.models.adapters import add_adapters, plain_state_dict
from scope_opd.models.watch import decoder_layers
from scope_opd.ranks import Ranks
from scope_opd.train import train
from scope_opd.train.early import Gathering
from scope_opd.train.engines import Engines, Follower
from scope_opd.train.loop import follow
from scope_opd.train.step import Learner
from tiny import tiny_model
from train_kit import lasting, make_config, make_engines

STEPS = 3
LIMIT_S = 30.0
LORA = {"lora": {"rank": 4, "alpha": 8.0}}
Weights = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Case:
    """Recorded rollouts, and what learners are told.

    Attributes:
        kind: of the student. GPT-NeoX is in float64 throughout; the others compute their norms in float32, where a
            gradient that is divided only in the end is rounded alike if the denominator is a power of two.
        tables: of the config.
        many: further ones where there are several ranks; one rank updates plainly.
        early: which of a step's groups several ranks get before the rest, in which parts.
        worlds: that are compared with one rank.
    """

    kind: str
    tables: dict[str, dict[str, Any]]
    many: dict[str, dict[str, Any]] = field(default_factory=dict)
    early: tuple[tuple[int, ...], ...] = ()
    worlds: tuple[int, ...] = (2, 3)


ANCHORED = {"aggregation": "token", "reference_kl": 0.3}
FULL = {"train": {"activation_checkpointing": "full"}}
CASES = {
    "lora, tied": Case(
        "qwen3", {"model": LORA, "objective": {"method": "reward_opd", "distill": "full_kl", **ANCHORED}}
    ),
    "lora, untied, checkpointing": Case(
        "llama", {"model": LORA, "objective": {"method": "scope"}, "train": {"grad_clip": 0.1}}, many=FULL
    ),
    "early": Case("gpt_neox", {"objective": {"method": "scope", **ANCHORED}}, early=((2, 0), (1,))),
    "early, tied": Case("qwen3", {"objective": {"method": "scope"}}, early=((3,),), worlds=(2,)),
    "early, lora, checkpointing": Case(
        "gpt_neox", {"model": LORA, "objective": {"method": "reward_opd", "distill": "full_kl"}},
        many=FULL, early=((1, 2), (3,), (0,)),
    ),
    "mini-batches, checkpointing": Case(
        "qwen3", {"objective": {"method": "scope"}, "train": {"minibatches": 3}}, many=FULL, worlds=(2,)
    ),
    "mini-batches twice, lora, checkpointing": Case(
        "llama", {"model": LORA, "objective": {"method": "grpo"}, "train": {"minibatches": 2, "updates_per_batch": 2}},
        many=FULL, worlds=(2,),
    ),
}  # fmt: skip
RESUMED = {"resumed by 2": 2, "resumed by 1": 1, "resumed by 3": 3}
"""Runs that two ranks began and were stopped, by the number of ranks that went on with them."""


def configured(folder: Path, *tables: dict[str, dict[str, Any]]) -> Config:
    merged: dict[str, dict[str, Any]] = {
        "train": {"max_tokens_per_microbatch": 64, "prompts_per_step": 4, "lr": 3e-3, "collective_timeout_s": LIMIT_S}
    }
    for more in tables:
        for table, values in more.items():
            merged[table] = {**merged.get(table, {}), **values}
    return make_config(folder, **merged)


def built(config: Config, kind: str, ranks: Ranks) -> Engines:
    """Engines of rank 0, whose parts are those of any rank."""
    trained = tiny_model(kind, seed=1, dtype=torch.float64)
    add_adapters(trained, config.model.lora, seed=config.run.seed)
    plain = trained if ranks.world == 1 else tiny_model(kind, seed=1, dtype=torch.float64)
    engines = make_engines(
        config, dtype=torch.float64, model=plain, trainee=None if plain is trained else trained, ranks=ranks
    )
    engines.pipeline.sampler.model = plain  # type: ignore[attr-defined]
    return engines


def follower(engines: Engines) -> Follower:
    return Follower(
        engines.trained, engines.surrogate, engines.ranks, engines.model, engines.teacher_head, engines.reference
    )


def whole(engines: Engines) -> Weights:
    """On rank 0: all weights of what is trained, adapters apart, each tied one once."""
    ranks = engines.ranks
    names = [name for name, _ in engines.trained.named_parameters()]
    found = engines.trained.state_dict()
    if ranks.world > 1:
        found = ranks.everywhere("learner/gather", [None] * ranks.world)[0]
    return {name: found[name].detach().clone() for name in names}


# --- recorded rollouts -----------------------------------------------------------------------------------------------


def record(case: Case) -> list[Any]:
    """A few steps of scored rollouts without credit, with holes of every kind."""
    engines = built(configured(Path("unused"), case.tables), case.kind, Ranks())
    steps = []
    for step in range(STEPS):
        collected = engines.pipeline.collect(
            engines.schedule.batch(step), engines.sampling, step=step, policy_version=0
        )
        rollouts = list(collected.rollouts)
        rollouts[0].loss_mask = [1] * (len(rollouts[0].token_ids) - 1) + [0]
        rollouts[5].loss_mask = [0] * len(rollouts[5].token_ids)
        rollouts[9].masked = True
        for rollout in rollouts[2::3]:
            if rollout.teacher_logprobs is not None:
                rollout.teacher_mask = [1] * (len(rollout.token_ids) - 1) + [0]
        steps.append(rollouts)
    return steps


class Led:
    """A learner on each rank, one case after the other."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks = ranks
        self.engines: Engines
        self.learner: Learner
        self.config: Config
        self.calls: list[int] = []
        ranks.register("build", self.build)
        ranks.register("calls", lambda _: self.calls)

    def build(self, name: str) -> None:
        case, several = CASES[name], self.ranks.world > 1
        self.config = configured(Path("unused"), case.tables, *([case.many] if several else []))
        self.engines = built(self.config, case.kind, self.ranks)
        self.learner = Learner(self.engines if self.ranks.leads else follower(self.engines), self.config.train)
        self.calls = calls = [0, 0]
        layer = decoder_layers(self.engines.trained)[0]
        for place, module in enumerate((layer, next(layer.children()))):

            def count(*_: Any, place: int = place) -> None:
                calls[place] += torch.is_grad_enabled()

            module.register_forward_hook(count)

    def case(self, name: str, steps: list[Any]) -> tuple[list[dict[str, Any]], Weights, Weights]:
        """Rank 0: what each update says; all weights; the plain ones, adapters merged, as samplers have them."""
        world, case = self.ranks.world, CASES[name]
        self.ranks.everywhere("build", [name] * world)
        engines, learner, config = self.engines, self.learner, self.config
        outcomes = []
        for step, rollouts in enumerate(copy.deepcopy(steps)):
            prompts = engines.schedule.batch(step)
            gathering = Gathering(engines, learner, config.train, prompts)
            if world > 1 and case.early:
                assert gathering.early is not None
                groups = {prompt.id: [r for r in rollouts if r.group == prompt.id] for prompt in prompts}
                for part in case.early:
                    gathering.early([groups[prompts[index].id] for index in part])
            _, batch = gathering.complete(rollouts)
            outcome = learner.update(batch, config.train.lr, begun=gathering.begun)
            tokens = outcome.tokens
            order = sorted(zip(tokens.rollout.tolist(), tokens.place.tolist(), range(batch.tokens), strict=True))
            outcomes.append({
                "loss": outcome.loss, "norm": outcome.grad_norm, "kl": outcome.kl_reference or 0.0,
                "clipped": outcome.clipped, "updates": outcome.updates,
                "tokens": [place[:2] for place in order],
                "advantages": [float(tokens.advantage[place[2]]) for place in order],
            })  # fmt: skip
        calls = self.ranks.everywhere("calls", [None] * world)
        outcomes[0]["recomputed"] = sum(inside for _, inside in calls) / sum(passes for passes, _ in calls) - 1
        learner.refresh(1)
        weights = whole(engines)
        names = [name for name, _ in tiny_model(case.kind, dtype=torch.float64).named_parameters()]
        plain = plain_state_dict(engines.model) if world == 1 else engines.model.state_dict()
        return outcomes, weights, {name: plain[name].detach().clone() for name in names}


def cases_of(world: int) -> list[str]:
    return [name for name, case in CASES.items() if world == 1 or world in case.worlds]


def body_of_cases(recorded: Path, result: Path, rank: int) -> int:
    with Ranks.from_environment(LIMIT_S) as ranks:
        led = Led(ranks)
        if not ranks.leads:
            ranks.follow()
            return 0
        steps = pickle.loads(recorded.read_bytes())
        result.write_bytes(pickle.dumps({name: led.case(name, steps[name]) for name in cases_of(ranks.world)}))
    return 0


def largest(left: Weights, right: Weights) -> float:
    """The largest difference of a weight."""
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    return max(float((left[name] - right[name]).detach().abs().max()) for name in left)


def base_of(weights: Weights) -> Weights:
    """The frozen ones, under their plain names; nothing without adapters."""
    adapted = any(".lora_" in name for name in weights)
    return {name.replace(".base_layer.", "."): w for name, w in weights.items() if adapted and ".lora_" not in name}


def same_base(weights: Weights, kind: str) -> bool:
    """Whether the frozen weights are, bit for bit, those that the student began with."""
    began = dict(tiny_model(kind, seed=1, dtype=torch.float64).named_parameters())
    base = base_of(weights)
    return not base or (base.keys() == began.keys() and all(torch.equal(base[name], began[name]) for name in base))


def compare_cases(folder: Path) -> dict[str, dict[str, Any]]:
    recorded, results = folder / "rollouts", {}
    recorded.write_bytes(pickle.dumps({name: record(case) for name, case in CASES.items()}))
    for world in (1, 2, 3):
        result = folder / f"cases-{world}"
        ended(f"cases, world {world}", fork_ranks(world, folder, partial(body_of_cases, recorded, result)), folder)
        results[world] = pickle.loads(result.read_bytes())
    found = {}
    for world in (2, 3):
        for name in cases_of(world):
            (one, weights, plain), (many, theirs, copied) = results[1][name], results[world][name]
            began = dict(tiny_model(CASES[name].kind, seed=1, dtype=torch.float64).named_parameters())
            pairs = list(zip(one, many, strict=True))
            found[f"{name}, world {world}"] = {
                **{key: max(gap(a[key], b[key]) for a, b in pairs) for key in ("loss", "norm", "kl", "clipped")},
                "advantages": max(
                    abs(x - y) for a, b in pairs for x, y in zip(a["advantages"], b["advantages"], strict=True)
                ),
                "tokens": all(a["tokens"] == b["tokens"] and a["updates"] == b["updates"] for a, b in pairs),
                "updates": one[0]["updates"],
                "weights": largest(weights, theirs),
                "copies": largest(plain, copied),
                "moved": largest(plain, began),
                "base": same_base(weights, CASES[name].kind) and same_base(theirs, CASES[name].kind),
                "recomputed": [row[0]["recomputed"] for row in (one, many)],
            }
    return found


# --- runs ------------------------------------------------------------------------------------------------------------

RUN: dict[str, dict[str, Any]] = {
    "model": LORA, "objective": {"method": "scope", **ANCHORED},
    "train": {"minibatches": 2, "activation_checkpointing": "full"}, "run": {"checkpoint_every": 2},
}  # fmt: skip
RUN_KIND = "gpt_neox"


def body_of_run(folder: Path, steps: int, resume: bool, result: Path, rank: int) -> int:
    config = configured(folder, RUN, {"train": {"steps": steps}})
    with Ranks.from_environment(LIMIT_S) as ranks:
        engines = built(config, RUN_KIND, ranks)
        if not ranks.leads:
            follow(config, follower(engines))
            return 0
        train(config, engines, resume=resume, progress=False)
        result.write_bytes(pickle.dumps((lasting(rows(folder, "metrics")), whole(engines))))
    return 0


def compare_runs(folder: Path) -> dict[str, dict[str, Any]]:
    def run(name: str, world: int, steps: int, *, resume: bool = False) -> tuple[list[dict[str, Any]], Weights]:
        result = folder / f"result of {name}"
        pids = fork_ranks(world, folder, partial(body_of_run, folder / name, steps, resume, result))
        ended(name, pids, folder)
        made: tuple[list[dict[str, Any]], Weights] = pickle.loads(result.read_bytes())
        return made

    metrics, weights = run("whole", 2, 4)
    _, halfway = run("stopped", 2, 2)
    found = {}
    for name, world in RESUMED.items():
        shutil.copytree(folder / "stopped", folder / name)
        theirs, resumed = run(name, world, 4, resume=True)
        found[name] = {
            "metrics": max(gap(a, b) for a, b in zip(metrics, theirs, strict=True)),
            "weights": largest(weights, resumed),
            "bits": metrics == theirs and all(torch.equal(weights[key], resumed[key]) for key in weights),
            "base": all(same_base(each, RUN_KIND) for each in (weights, halfway, resumed)),
            "moved": min(largest(halfway, weights), largest(halfway, resumed)),
            "steps": len(theirs),
        }
    return found


# --- a copy that is another model ------------------------------------------------------------------------------------

OTHERS: dict[str, dict[str, Any]] = {
    "a head of its own": {"tie_word_embeddings": False},
    "wider": {"intermediate_size": 65},
}
"""What a copy has that the student has not."""


def body_with_other_copy(name: str, rank: int) -> int:
    """Every rank has the copy that is wider; the other is rank 0's alone, as where servers sample."""
    with Ranks.from_environment(LIMIT_S) as ranks:
        config = configured(Path("unused"))
        engines = built(config, "qwen3", ranks)
        parts = follower(engines)
        parts.model = None
        if ranks.leads or name == "wider":
            parts.model = tiny_model("qwen3", seed=1, dtype=torch.float64, **OTHERS[name])
        learner = Learner(parts, config.train)
        if ranks.leads:
            learner.refresh(1)
        else:
            ranks.follow()
    return 0


def refused(folder: Path) -> dict[str, Any]:
    found = {}
    for name in OTHERS:
        codes = wait_all(fork_ranks(2, folder, partial(body_with_other_copy, name)), 90.0)
        found[name] = {"codes": codes, "lines": [text.strip().splitlines()[-1:] for text in texts(folder, 2)]}
    return found


# --- all of it -------------------------------------------------------------------------------------------------------


def ended(what: str, pids: list[int], folder: Path) -> None:
    """Waits for ranks that ought to end well; those that do not in time are killed."""
    codes = wait_all(pids, 90.0)
    if any(code != 0 for code in codes):
        raise SystemExit(f"{what}: {codes}\n" + "\n".join(texts(folder, len(pids))))


def main(folder: Path) -> dict[str, Any]:
    return {"cases": compare_cases(folder), "runs": compare_runs(folder), "refused": refused(folder)}


if __name__ == "__main__":
    torch.set_num_threads(1)  # so that ranks can be forked from a process that has computed
    print(json.dumps(main(Path(sys.argv[1]))))
