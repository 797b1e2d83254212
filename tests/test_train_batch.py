"""Laws of the batch: the cut does not matter, masked rollouts do not exist, denominators are the whole step's."""

from __future__ import annotations

import copy
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from scope_opd.objective.methods import method_names
from scope_opd.train.batch import make_batch
from scope_opd.train.engines import Engines
from scope_opd.train.step import Learner
from scope_opd.types import Rollout
from train_kit import make_config, make_engines

AGGREGATIONS = ("prompt", "token", "sequence", "released")


@lru_cache
def collected(method: str, dtype: torch.dtype) -> tuple[Engines, Learner, tuple[Rollout, ...]]:
    config = make_config(Path("unused"), objective={"method": method}, rollout={"max_tokens": 9})
    engines = make_engines(config, dtype=dtype)
    rollouts = engines.pipeline.collect(engines.schedule.batch(0), engines.sampling, step=0, policy_version=0).rollouts
    engines.credit(rollouts)
    return engines, Learner(engines, config.train), tuple(rollouts)


def distance(left: list[torch.Tensor], right: list[torch.Tensor]) -> float:
    gap = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(left, right, strict=True)) ** 0.5
    size = sum(float(b.double().square().sum()) for b in right) ** 0.5
    return gap / size if size else gap


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("method", method_names())
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_any_split_into_micro_batches_gives_the_same_gradient(
    method: str, aggregation: str, dtype: torch.dtype, limit: float
) -> None:
    _, learner, rollouts = collected(method, dtype)
    whole = make_batch(rollouts, aggregation=aggregation, max_tokens=100_000)  # type: ignore[arg-type]
    loss, gradient = learner.gradient(whole)
    assert any(bool(part.any()) for part in gradient)
    live = [index for index, rollout in enumerate(rollouts) if not rollout.masked]
    for cut in ([[index] for index in live], [live[::2], live[1::2]], None):
        other = make_batch(rollouts, aggregation=aggregation, max_tokens=64, cut=cut)  # type: ignore[arg-type]
        assert other.tokens == whole.tokens
        loss_other, gradient_other = learner.gradient(other)
        assert loss_other == pytest.approx(loss, rel=limit, abs=limit)
        assert distance(gradient_other, gradient) <= limit


def test_masked_rollouts_do_not_reach_the_model_and_change_no_gradient() -> None:
    _, learner, rollouts = collected("opd", torch.float64)
    live = list(copy.deepcopy(rollouts))
    for rollout in live[::3]:
        rollout.masked, rollout.reinforce, rollout.distill = True, 0.0, 0.0
    with_masked = make_batch(live, aggregation="sequence", max_tokens=256)
    without = make_batch([r for r in live if not r.masked], aggregation="sequence", max_tokens=256)
    assert sum(len(micro.rows.input_ids) for micro in with_masked.micro) == sum(not r.masked for r in live)
    assert distance(learner.gradient(with_masked)[1], learner.gradient(without)[1]) == 0.0


def test_tokens_outside_the_loss_mask_have_no_gradient_and_count_in_no_denominator() -> None:
    _, learner, rollouts = collected("opd", torch.float64)
    rollout = copy.deepcopy(max(rollouts, key=lambda r: len(r.token_ids)))
    rollout.loss_mask = [1] * (len(rollout.token_ids) - 1) + [0]
    cut = copy.deepcopy(rollout)
    cut.loss_mask = None
    for name in ("token_ids", "logprobs", "teacher_logprobs"):
        setattr(cut, name, getattr(cut, name)[:-1])
    masked, shortened = (make_batch([r], aggregation="token", max_tokens=256) for r in (rollout, cut))
    assert masked.tokens == shortened.tokens == len(rollout.token_ids) - 1
    assert distance(learner.gradient(masked)[1], learner.gradient(shortened)[1]) < 1e-12


def test_tokens_keep_their_own_numbers_through_sorting_and_padding() -> None:
    _, _, rollouts = collected("reward_opd", torch.float64)
    batch = make_batch(rollouts, aggregation="token", max_tokens=128)
    assert len(batch.micro) > 1
    assert batch.padding <= 0.05
    seen = 0
    for micro in batch.micro:
        for token in range(micro.rollout.numel()):
            rollout, place = rollouts[int(micro.rollout[token])], int(micro.place[token])
            row, column = micro.positions[token].tolist()
            assert micro.rows.input_ids[row, column] == rollout.token_ids[place]
            assert column == len(rollout.prompt_token_ids) + place
            assert micro.sampler[token] == rollout.logprobs[place]
            assert rollout.teacher_logprobs is not None
            assert micro.teacher[token] == rollout.teacher_logprobs[place]
            assert micro.credit_distill[token] == rollout.distill
            assert micro.reinforce[token] == pytest.approx((rollout.reinforce or 0.0) / batch.tokens)
            seen += 1
    assert seen == batch.tokens == sum(len(rollout.token_ids) for rollout in rollouts)


def test_a_batch_with_nothing_unmasked_is_empty_and_takes_no_optimiser_step() -> None:
    engines, learner, rollouts = collected("opd", torch.float64)
    masked = list(copy.deepcopy(rollouts))
    for rollout in masked:
        rollout.masked, rollout.reinforce, rollout.distill = True, 0.0, 0.0
    batch = make_batch(masked, aggregation="prompt", max_tokens=256)
    assert (batch.micro, batch.tokens, batch.padding) == ([], 0, 0.0)
    before = [parameter.clone() for parameter in engines.model.parameters()]
    outcome = learner.update(batch, 1e-3)
    assert (outcome.updates, outcome.loss, outcome.grad_norm, outcome.finite) == (0, 0.0, 0.0, True)
    assert all(torch.equal(a, b) for a, b in zip(before, engines.model.parameters(), strict=True))
    assert make_batch([], aggregation="prompt", max_tokens=256).micro == []


def test_credit_that_is_missing_names_the_rollout() -> None:
    _, _, rollouts = collected("opd", torch.float64)
    uncredited = list(copy.deepcopy(rollouts[:2]))
    uncredited[1].reinforce = None
    with pytest.raises(ValueError, match=f"rollout '{uncredited[1].id}' has no credit"):
        make_batch(uncredited, aggregation="prompt", max_tokens=256)
    unscored = list(copy.deepcopy(rollouts[:2]))
    unscored[0].teacher_logprobs = None
    with pytest.raises(ValueError, match=f"rollout '{unscored[0].id}' has distill"):
        make_batch(unscored, aggregation="prompt", max_tokens=256)
