"""Laws of packed micro-batches in the update: packed is unpacked, empty shares are zeros, little is wasted."""

from __future__ import annotations

import copy
import math
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from scope_opd.models.packing import cost, crossover, crossover_of, deal, waste
from scope_opd.models.rows import positions_of, stack
from scope_opd.train.batch import make_batch, make_part
from scope_opd.train.step import Learner
from scope_opd.types import Rollout
from test_train_batch import distance
from tiny import tiny_model
from train_kit import make_config, make_engines


def prepare(dtype: torch.dtype = torch.float64, **tables: Any) -> tuple[Learner, list[Rollout]]:
    config = make_config(Path("unused"), **{"rollout": {"max_tokens": 9}, **tables})
    engines = make_engines(config, dtype=dtype)
    rollouts = engines.pipeline.collect(engines.schedule.batch(0), engines.sampling, step=0, policy_version=0).rollouts
    engines.credit(rollouts)
    return Learner(engines, config.train), list(rollouts)


DISTILL = ["sampled", "full_kl", "jsd", "topk_reverse_kl", "topk_forward_kl"]


@pytest.mark.parametrize(
    ("method", "distill"),
    [(method, distill) for method in ("scope", "opd") for distill in DISTILL] + [("kd", "sampled")],
)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-10), (torch.float32, 1e-5)], ids=["f64", "f32"])
def test_a_packed_update_is_the_padded_one_on_any_number_of_ranks(
    dtype: torch.dtype, limit: float, method: str, distill: str
) -> None:
    objective = {"method": method, "distill": distill, "reference_kl": 0.1}
    learner, rollouts = prepare(dtype, objective=objective)
    assert learner.forward.packs
    rollouts[0].loss_mask = [1] * (len(rollouts[0].token_ids) - 1) + [0]
    for rollout in rollouts[1::4]:  # the teacher reads some of the sequences of a pack only
        rollout.distill = 0.0
    loss, gradient = learner.gradient(make_batch(rollouts, aggregation="token", max_tokens=64))
    assert any(bool(part.any()) for part in gradient)
    for ranks in (1, 3):
        batch = make_batch(rollouts, aggregation="token", max_tokens=64, ranks=ranks, packed=True, crossover=50.0)
        assert batch.padding == 0.0
        assert all(micro.rows.packed for micro in batch.micro)
        assert max(len(micro.rows.lengths) for micro in batch.micro) > 1
        packed_loss, packed_gradient = learner.gradient(batch)
        assert packed_loss == pytest.approx(loss, rel=limit, abs=limit)
        assert distance(packed_gradient, gradient) <= limit


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("distill", DISTILL)
def test_shares_are_of_one_length_and_an_empty_micro_batch_is_a_zero_with_a_gradient(
    distill: str, packed: bool
) -> None:
    """Every rank runs as many passes: of an empty one the gradient is there, on every parameter, and zero."""
    learner, rollouts = prepare(objective={"distill": distill, "reference_kl": 0.1})
    live = sum(not rollout.masked for rollout in rollouts)
    batch = make_batch(rollouts, aggregation="prompt", max_tokens=1, ranks=live + 2, packed=packed)
    assert {len(share) for share in batch.shares} == {1}
    empty = [micro for micro in batch.micro if not micro.rollout.numel()]
    assert [micro.cells for micro in empty] == [0, 0]
    expected = learner.gradient(make_batch(rollouts, aggregation="prompt", max_tokens=64))
    loss, gradient = learner.gradient(batch)
    assert loss == pytest.approx(expected[0], rel=1e-10)
    assert distance(gradient, expected[1]) <= 1e-10
    learner.optimizer.zero_grad()
    result = learner.forward.run(empty[0], batch.tokens, learner.forward.record(empty[0]))
    total = result.loss.sum()
    total.backward()
    assert total.detach() == 0.0
    grads = [parameter.grad for parameter in learner.model.parameters()]
    assert all(grad is not None and not grad.any() for grad in grads)


@pytest.mark.parametrize("ranks", [1, 2, 5])
def test_every_rollout_is_in_one_micro_batch_of_one_rank(ranks: int) -> None:
    _, rollouts = prepare()
    for packed in (False, True):
        cut: dict[str, Any] = {"aggregation": "token", "max_tokens": 40, "ranks": ranks, "packed": packed}
        batch = make_batch(rollouts, **cut)
        places = list(range(100, 100 + len(rollouts)))
        for shares, first in ((batch.shares, 0), (make_part(rollouts, places, **cut), 100)):
            assert len(shares) == ranks
            assert len({len(share) for share in shares}) == 1
            owners = [set(micro.rollout.tolist()) for share in shares for micro in share]
            live = {first + index for index, rollout in enumerate(rollouts) if not rollout.masked}
            assert sum(map(len, owners)) == len(live)
            assert set().union(*owners) == live


def test_tokens_keep_their_own_numbers_in_a_pack() -> None:
    _, rollouts = prepare(objective={"method": "reward_opd"})
    batch = make_batch(rollouts, aggregation="token", max_tokens=128, packed=True)
    seen = 0
    for micro in batch.micro:
        assert micro.rows.packed is not None
        starts = micro.rows.packed.boundaries.tolist()
        owners = list(dict.fromkeys(micro.rollout.tolist()))
        for token in range(micro.rollout.numel()):
            index, place = int(micro.rollout[token]), int(micro.place[token])
            rollout, (row, column) = rollouts[index], micro.positions[token].tolist()
            assert row == 0
            assert column == starts[owners.index(index)] + len(rollout.prompt_token_ids) + place
            assert micro.rows.input_ids[0, column] == rollout.token_ids[place]
            assert micro.sampler[token] == rollout.logprobs[place]
            seen += 1
    assert seen == batch.tokens == sum(len(rollout.token_ids) for rollout in rollouts)


def test_a_share_travels_pickled_and_gives_the_same_loss() -> None:
    """Layouts that a pass has filled in are no part of it that matters."""
    learner, rollouts = prepare()
    (micro, *_), *_ = make_batch(rollouts, aggregation="token", max_tokens=64, packed=True).shares
    before = learner.forward.run(micro, 1, None).loss
    assert torch.equal(learner.forward.run(pickle.loads(pickle.dumps(micro)), 1, None).loss, before)


@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_what_cannot_be_packed_is_padded(family: str, packing: bool) -> None:
    """Gemma 2 has soft-caps and stays on its own attention; packing = false pads any model."""
    config = make_config(Path("unused"), train={"packing": packing})
    engines = make_engines(config, model=tiny_model(family))
    learner = Learner(engines, config.train)
    assert learner.forward.packs == (packing and family == "qwen3")


def test_the_crossover_of_a_model_is_that_of_its_weights() -> None:
    tied, untied = tiny_model("qwen3"), tiny_model("llama")
    for model in (tied, untied):
        text = model.config
        parameters = model.num_parameters() - (0 if text.tie_word_embeddings else text.vocab_size * text.hidden_size)
        width = text.num_attention_heads * text.head_dim
        assert crossover_of(model) == crossover(parameters, text.num_hidden_layers, width)
    assert tied.config.tie_word_embeddings != untied.config.tie_word_embeddings


@pytest.mark.parametrize("ranks", [1, 2, 8])
@pytest.mark.parametrize(
    ("count", "limit", "mean", "budget", "at"),
    [(128, 12_288, 7.5, 16_384, 36e3), (512, 12_288, 7.5, 12_800, 36e3), (256, 512, 4.5, 2048, 3e3)],
)
def test_at_most_three_percent_is_wasted_on_long_tailed_lengths(
    count: int, limit: int, mean: float, budget: int, at: float, ranks: int
) -> None:
    """Log-normal responses, a tenth of them at the limit: what is lost is waiting, for nothing is padding."""
    for seed in range(3):
        draw = random.Random(seed)
        lengths = [
            limit if draw.random() < 0.1 else min(limit, 100 + int(draw.lognormvariate(mean, 0.8)))
            for _ in range(count)
        ]
        dealt = deal(lengths, budget, ranks=ranks, crossover=at)
        assert waste(lengths, dealt, at) <= 0.03
        ideal = math.fsum(cost(length, at) for length in lengths) / ranks
        worst = max(sum(cost(lengths[i], at) for packs in dealt for i in packs[rank]) for rank in range(ranks))
        assert worst <= 1.03 * ideal


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("to", [False, True])
def test_the_sequences_that_positions_touch_keep_their_tokens(packed: bool, to: bool) -> None:
    sequences = [[5, 6, 7], [8, 9], [10, 11, 12, 13], [14, 15]]
    rows = stack(sequences, packed=packed)
    positions = positions_of([1, 1, 2, 1], [2, 1, 2, 1], packed=packed)
    chosen = positions[[3, 4, 5]]  # of the third and the last sequence
    fewer, places = rows.touched(chosen, packed=to)
    assert fewer.lengths == (4, 2)
    assert (fewer.packed is not None) == to
    assert fewer.tokens(places).tolist() == rows.tokens(chosen).tolist() == [12, 13, 15]
    assert fewer.input_ids.tolist() == ([[10, 11, 12, 13, 14, 15]] if to else [[10, 11, 12, 13], [14, 15, 0, 0]])
    whole, same = rows.touched(positions)
    assert whole is rows
    assert same is positions
    assert rows.below(10).tokens(positions).max() == 9
    assert rows.padding == (0 if packed else 5)
    assert copy.copy(rows).cells == (11 if packed else 16)
