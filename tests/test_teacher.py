"""Laws of the in-process teacher: it equals a plain forward pass, however its batches and chunks are cut."""

from __future__ import annotations

import asyncio
import random

import pytest
import torch

from scope_opd.errors import ModelError, RunFailed, ScopeError
from scope_opd.models.rows import positions_of, stack
from scope_opd.teacher.kept import KeptHidden
from scope_opd.teacher.local import LocalTeacher
from scope_opd.types import Rollout, Teacher
from tiny import EOS_ID, KINDS, tiny_model


def ragged_rollouts(count: int = 9, seed: int = 0) -> list[Rollout]:
    draw = random.Random(seed)
    rollouts = []
    for index in range(count):
        tokens = [draw.randrange(3, 320) for _ in range(draw.randint(1, 30))] + [EOS_ID]
        prompt = [draw.randrange(3, 320) for _ in range(draw.randint(1, 12))]
        rollouts.append(Rollout(f"r{index}", "g", prompt, tokens, [0.0] * len(tokens)))
    return rollouts


def plain(model: torch.nn.Module, rollout: Rollout, temperature: float) -> torch.Tensor:
    """Log-probs of one rollout by one unpadded forward pass."""
    ids = torch.tensor([rollout.prompt_token_ids + rollout.token_ids])
    with torch.no_grad():
        logprobs = (model(input_ids=ids).logits[0] / temperature).log_softmax(-1)
    start = len(rollout.prompt_token_ids)
    return logprobs[start - 1 : -1].gather(-1, ids[0, start:, None])[:, 0]


def score(teacher: LocalTeacher, rollouts: list[Rollout]) -> list[list[float]]:
    scores = asyncio.run(teacher.score(rollouts))
    assert all(one.logprobs is not None for one in scores)
    return [one.logprobs or [] for one in scores]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_scores_equal_a_plain_forward_pass(kind: str, temperature: float) -> None:
    model, rollouts = tiny_model(kind), ragged_rollouts()
    teacher = LocalTeacher(model, temperature=temperature, max_tokens_per_batch=100)
    assert isinstance(teacher, Teacher)
    for rollout, found in zip(rollouts, score(teacher, rollouts), strict=True):
        torch.testing.assert_close(torch.tensor(found), plain(model, rollout, temperature), atol=1e-5, rtol=1e-5)


def test_batches_chunks_and_order_do_not_change_scores() -> None:
    model, rollouts = tiny_model("qwen3"), ragged_rollouts()
    expected = score(LocalTeacher(model), rollouts)
    for tokens, chunk in ((40, None), (8192, 3), (1, 1)):
        found = score(LocalTeacher(model, max_tokens_per_batch=tokens, chunk_tokens=chunk), rollouts)
        for left, right in zip(found, expected, strict=True):
            torch.testing.assert_close(torch.tensor(left), torch.tensor(right), atol=1e-5, rtol=0)
    found = score(LocalTeacher(model), rollouts[::-1])[::-1]
    for left, right in zip(found, expected, strict=True):
        torch.testing.assert_close(torch.tensor(left), torch.tensor(right), atol=1e-5, rtol=0)


def test_the_same_call_gives_the_same_bits() -> None:
    model, rollouts = tiny_model("llama"), ragged_rollouts()
    assert score(LocalTeacher(model), rollouts) == score(LocalTeacher(model), rollouts)


def test_log_probs_below_the_floor_are_raised_and_counted() -> None:
    model, rollouts = tiny_model("llama"), ragged_rollouts(3)
    found = asyncio.run(LocalTeacher(model, log_prob_floor=-5.0).score(rollouts))
    for rollout, one in zip(rollouts, found, strict=True):
        expected = plain(model, rollout, 1.0)
        assert one.floored == int((expected < -5).sum())
        assert one.logprobs is not None
        assert min(one.logprobs) >= -5.0
    assert sum(one.floored for one in found) > 0


def test_minus_infinity_is_floored_and_counted() -> None:
    model = tiny_model("llama")
    head = torch.nn.Linear(32, 320)
    with torch.no_grad():
        head.bias[EOS_ID] = -torch.inf
    model.set_output_embeddings(head)
    for one in asyncio.run(LocalTeacher(model).score(ragged_rollouts(3))):
        assert one.logprobs is not None
        assert one.logprobs[-1] == -100.0
        assert one.floored == 1


def test_nan_stops_the_run_and_names_the_rollout() -> None:
    model, rollouts = tiny_model("llama"), ragged_rollouts(3)
    teacher = LocalTeacher(model)
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(RunFailed, match=r"'r[0-2]'.*NaN"):
        asyncio.run(teacher.score(rollouts))


def test_a_token_that_the_teacher_lacks_leaves_its_rollout_unscored() -> None:
    rollouts = ragged_rollouts(3)
    rollouts[1].token_ids[-1] = 320
    teacher = LocalTeacher(tiny_model("qwen3"))
    found = asyncio.run(teacher.score(rollouts))
    assert [one.logprobs is None for one in found] == [False, True, False]


def test_a_rollout_beyond_the_context_is_refused() -> None:
    with pytest.raises(ModelError, match="context of 8"):
        asyncio.run(LocalTeacher(tiny_model("llama", context=8)).score(ragged_rollouts()))


def test_nothing_to_score_gives_nothing() -> None:
    teacher = LocalTeacher(tiny_model("llama"))
    assert asyncio.run(teacher.score([])) == []
    assert score(teacher, [Rollout("r", "g", [5, 6], [], [])]) == [[]]


def test_bfloat16_scores_stay_near_float32() -> None:
    rollouts = ragged_rollouts()
    wide = score(LocalTeacher(tiny_model("llama")), rollouts)
    narrow = score(LocalTeacher(tiny_model("llama", dtype=torch.bfloat16)), rollouts)
    gaps = [abs(a - b) for left, right in zip(wide, narrow, strict=True) for a, b in zip(left, right, strict=True)]
    assert max(gaps) < 0.2
    assert sum(gaps) / len(gaps) < 0.03


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_projected_hidden_states_are_tempered_logits_and_carry_no_gradient(kind: str, packed: bool) -> None:
    """Whether the student's rows are packed or not, and whether the teacher can take packs (Gemma 2 cannot)."""
    model, rollouts = tiny_model(kind), ragged_rollouts(4)
    teacher = LocalTeacher(model, temperature=0.6)
    sequences = [rollout.prompt_token_ids + rollout.token_ids for rollout in rollouts]
    rows = stack(sequences, packed=packed)
    positions = positions_of(
        [len(rollout.prompt_token_ids) for rollout in rollouts],
        [len(rollout.token_ids) for rollout in rollouts],
        packed=packed,
    )
    logits = teacher.project(teacher.response_hidden(rows, positions))
    assert not logits.requires_grad
    found = logits.log_softmax(-1).gather(-1, rows.tokens(positions)[:, None])[:, 0]
    expected = torch.cat([plain(model, rollout, 0.6) for rollout in rollouts])
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("scored", "keep_bytes", "reads"), [(6, 2**30, 0), (3, 2**30, 1), (6, 4096, 1), (6, 0, 1)])
def test_hidden_states_kept_at_scoring_are_those_of_another_pass(
    packed: bool, scored: int, keep_bytes: int, reads: int
) -> None:
    model, rollouts = tiny_model("qwen3", dtype=torch.float64), ragged_rollouts(6)
    # The same tokens with another prompt: what one of them needs is not all that was kept for the other.
    whole = rollouts[0].prompt_token_ids + rollouts[0].token_ids
    rollouts[1] = Rollout("same", "g", whole[:-1], whole[-1:], [0.0])
    rows = stack([rollout.prompt_token_ids + rollout.token_ids for rollout in rollouts], packed=packed)
    positions = positions_of(
        [len(rollout.prompt_token_ids) for rollout in rollouts],
        [len(rollout.token_ids) for rollout in rollouts],
        packed=packed,
    )
    positions = positions[torch.randperm(len(positions), generator=torch.Generator().manual_seed(0))]
    teacher = LocalTeacher(model, keep_bytes=keep_bytes, max_tokens_per_batch=60)
    expected = teacher.response_hidden(rows, positions)  # nothing is kept yet
    score(teacher, rollouts[:scored])
    passes = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    torch.testing.assert_close(teacher.response_hidden(rows, positions), expected, atol=1e-12, rtol=1e-10)
    assert len(passes) == reads
    score(teacher, [rollouts[1]])
    torch.testing.assert_close(teacher.response_hidden(rows, positions), expected, atol=1e-12, rtol=1e-10)


def test_a_store_of_hidden_states_keeps_what_was_put_first() -> None:
    one = torch.ones(2, 4)  # 32 bytes
    store = KeptHidden(64)
    store.put([7, 0], one[:1])
    store.put([7, 1], torch.ones(5, 4))
    store.put([7, 2], one)
    store.put([7, 3], one)  # full
    assert (len(store), store.bytes) == (2, 48)
    assert store.get([7, 1]) is store.get([7, 3]) is None
    store.put([7, 0], one)  # more of the same sequence, which takes the place of less
    store.put([7, 2], one[:1])
    assert (len(store), store.bytes, len(store.get([7, 0])), len(store.get([7, 2]))) == (2, 64, 2, 2)  # type: ignore[arg-type]
    store.clear()
    assert (len(store), store.bytes, store.get([7, 0])) == (0, 0, None)


def test_nothing_of_an_earlier_step_is_read_again() -> None:
    """Another batch has other last bits, and a resumed run does not have them."""
    model, rollouts = tiny_model("qwen3"), ragged_rollouts(6)
    teacher = LocalTeacher(model, keep_bytes=2**30)
    score(teacher, rollouts)
    score(teacher, rollouts[:1])
    rows = stack([rollout.prompt_token_ids + rollout.token_ids for rollout in rollouts[1:]], packed=False)
    positions = positions_of(
        [len(rollout.prompt_token_ids) for rollout in rollouts[1:]],
        [len(rollout.token_ids) for rollout in rollouts[1:]],
        packed=False,
    )
    found = teacher.response_hidden(rows, positions)
    assert torch.equal(found, LocalTeacher(model).response_hidden(rows, positions))


@pytest.mark.parametrize("settings", [{"temperature": 0.0}, {"max_tokens_per_batch": 0}, {"log_prob_floor": 1.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(ScopeError, match="expected"):
        LocalTeacher(tiny_model("llama"), **settings)  # type: ignore[arg-type]
