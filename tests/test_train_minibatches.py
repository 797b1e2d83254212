"""Laws of several optimiser steps a step: whole groups, own denominators, one recorded policy."""

from __future__ import annotations

import copy
import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from scope_opd.cli.pipelines import steps_ahead
from scope_opd.config import validate_config
from scope_opd.errors import ConfigError
from scope_opd.objective.aggregate import coefficients
from scope_opd.train import train
from scope_opd.train.batch import make_batch
from scope_opd.train.early import exact_in_parts
from scope_opd.train.optim import Optimizer
from scope_opd.types import Rollout
from test_train_batch import distance
from test_train_step import naive_logits, off_policy, prepare, recorded
from train_kit import TEMPERATURE, make_config, make_engines


def by_prompt(rollouts: list[Rollout], count: int) -> list[list[Rollout]]:
    """Whole groups in order, as even as can be, in an own way: the first prompts go first."""
    groups: dict[str, list[Rollout]] = {}
    for rollout in rollouts:
        groups.setdefault(rollout.group, []).append(rollout)
    names = list(groups)
    edges = [-(-len(names) * part // count) for part in range(count + 1)]
    return [[rollout for name in names[first:last] for rollout in groups[name]] for first, last in pairwise(edges)]


def logprobs(model: Any, rollout: Rollout) -> torch.Tensor:
    logs = (naive_logits(model, rollout) / TEMPERATURE).log_softmax(-1)
    return logs.gather(-1, torch.tensor(rollout.token_ids)[:, None]).squeeze(-1)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("aggregation", ["prompt", "token"])
@pytest.mark.parametrize(("minibatches", "passes"), [(1, 1), (2, 1), (3, 2)])
def test_mini_batches_are_as_many_updates_made_by_hand_with_the_policy_recorded_before_the_first(
    minibatches: int, passes: int, aggregation: str, packed: bool
) -> None:
    engines, learner, rollouts, _ = prepare(
        "reward_opd", train={"minibatches": minibatches, "updates_per_batch": passes},
        objective={"sampler_correction_cap": 1.5},
    )  # fmt: skip
    off_policy(rollouts)
    twin = copy.deepcopy(engines.model)
    optimizer = Optimizer(twin, learner.config)
    batch = make_batch(
        rollouts, aggregation=aggregation, max_tokens=64, packed=packed, minibatches=minibatches  # type: ignore[arg-type]
    )  # fmt: skip
    assert [mini.tokens for mini in batch.minibatches] == [
        sum(len(rollout.token_ids) for rollout in part) for part in by_prompt(rollouts, minibatches)
    ]
    outcome = learner.update(batch, 1e-2)
    with torch.no_grad():
        old = {rollout.id: logprobs(twin, rollout) for rollout in rollouts}
    norms, losses = [], []
    for _ in range(passes):
        for part in by_prompt(rollouts, minibatches):
            credit = [torch.tensor([getattr(rollout, name) for rollout in part], dtype=torch.float64)
                      for name in ("reinforce", "distill")]  # fmt: skip
            groups = torch.tensor([[rollout.group for rollout in part].index(rollout.group) for rollout in part])
            lengths = torch.tensor([len(rollout.token_ids) for rollout in part])
            weights = coefficients(*credit, lengths, torch.zeros(len(part), dtype=torch.bool), groups, aggregation)  # type: ignore[arg-type]
            optimizer.zero_grad()
            total = torch.zeros((), dtype=torch.float64)
            for rollout, reinforce, distill in zip(part, *weights, strict=True):
                own = logprobs(twin, rollout)
                correction = (old[rollout.id] - recorded(rollout.logprobs)).exp().clamp(max=1.5)
                advantage = reinforce + distill * (recorded(rollout.teacher_logprobs) - own.detach())
                total = total - (correction * (own - old[rollout.id]).exp() * advantage).sum()
            total.backward()
            losses.append(float(total.detach()))
            norms.append(float(torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)))
            optimizer.step(1e-2)
    assert outcome.updates == len(norms) == minibatches * passes
    assert outcome.loss == pytest.approx(sum(losses) / len(losses), rel=1e-9)
    assert outcome.grad_norm == pytest.approx(sum(norms) / len(norms), rel=1e-9)
    moved, expected = ([p.detach() for p in model.parameters()] for model in (engines.model, twin))
    assert distance(moved, expected) < 1e-10


def test_mismatch_and_c_are_those_of_the_recorded_policy_for_every_mini_batch() -> None:
    whole, parts = (prepare("reward_opd", train={"minibatches": count}) for count in (1, 3))
    seen = []
    for (_, learner, rollouts, _), count in ((whole, 1), (parts, 3)):
        off_policy(rollouts)
        batch = make_batch(rollouts, aggregation="token", max_tokens=64, minibatches=count)
        figures = learner.update(batch, 1e-1).tokens
        order = (figures.rollout * 1000 + figures.place).argsort()
        seen.append((figures.mismatch[order], figures.capped[order], figures.logprobs[order]))
    (mismatch, capped, logs), (of_parts, capped_of_parts, logs_of_parts) = seen
    torch.testing.assert_close(of_parts, mismatch, rtol=0, atol=1e-10)
    assert torch.equal(capped_of_parts, capped)
    assert (logs_of_parts - logs).abs().max() > 0.01  # what the later parts met had moved


def test_a_mini_batch_with_nothing_unmasked_is_left_out() -> None:
    _, learner, rollouts, _ = prepare("opd", train={"minibatches": 3})
    for rollout in rollouts[4:8]:
        rollout.masked, rollout.reinforce, rollout.distill = True, 0.0, 0.0
    batch = make_batch(rollouts, aggregation="prompt", max_tokens=64, minibatches=3)
    assert learner.update(batch, 1e-3).updates == len(batch.minibatches) == 2
    dealt = make_batch(rollouts, aggregation="prompt", max_tokens=64, minibatches=3, ranks=2)
    first, second = dealt.minibatches
    assert first.stop == second.start
    assert second.stop == len(dealt.shares[0]) == len(dealt.shares[1])


def test_a_run_counts_optimiser_steps_and_never_begins_early(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", train={"minibatches": 3, "steps": 2})
    train(config, engines := make_engines(config))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["policy_version"] for row in rows] == [0, 3]
    assert [row["padding/share"] for row in rows] == [0.0, 0.0]
    assert not exact_in_parts(engines.surrogate, config.train)


def test_more_mini_batches_than_prompts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"train\.minibatches = 4 with train\.prompts_per_step = 3; expected at most"):
        validate_config({"train": {"minibatches": 4, "prompts_per_step": 3}})


@pytest.mark.parametrize(("staleness", "ahead"), [(0, 0), (6, 1), (13, 2)])
def test_a_step_ahead_is_as_many_versions_as_it_has_optimiser_steps(staleness: int, ahead: int) -> None:
    values: dict[str, Any] = {
        "rollout": {"base_urls": ["http://a"], "model": "m", "max_staleness": staleness},
        "train": {"minibatches": 3, "updates_per_batch": 2},
    }
    assert steps_ahead(validate_config(values)) == ahead
    values["rollout"]["max_staleness"] = 5
    with pytest.raises(ConfigError, match=r"updates_per_batch = 2 and train\.minibatches = 3: .* already 6 optimiser"):
        steps_ahead(validate_config(values))
