"""Laws of ``models.packing``: every sequence once, within the budget, evenly; packed is unpacked, to rounding."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

from scope_opd.models.batching import pad_right, response_positions
from scope_opd.models.checkpointing import set_checkpointing
from scope_opd.models.head import HeadView, response_logprobs, score_hidden
from scope_opd.models.packed_attention import NAME, Layout, _agrees, _alike, _find_kernel, enable
from scope_opd.models.packing import cost, crossover, deal, pack, packed_hidden, packs_exactly, response_places, waste
from tiny import tiny_model

KINDS = ["qwen3", "llama", "qwen2", "qwen3 sliding", "qwen2 sliding"]
WINDOW = 6


def make(kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Grouped queries everywhere; of the sliding ones every other layer sees 6 tokens."""
    name, _, sliding = kind.partition(" ")
    more: dict[str, Any] = {}
    if sliding:
        more = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    if name != "qwen2":
        return tiny_model(name, dtype=dtype, **more)
    config = Qwen2Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.25, **more,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Qwen2ForCausalLM(config).to(dtype).eval()


def draw_sequences(lengths: list[int], seed: int = 0) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, 320) for _ in range(length)] for length in lengths]


def alone(view: HeadView, sequences: list[list[int]]) -> Tensor:
    return torch.cat([view.hidden(torch.tensor([sequence]))[0] for sequence in sequences])


RAGGED = [17, 1, 9, 30, 30, 4, 12, 2, 29, 31]


@pytest.mark.parametrize("kind", KINDS)
def test_packed_hidden_states_are_those_of_each_sequence_alone(kind: str) -> None:
    """To a relative 1e-5 in float32, in value and in gradient; the longest sequences reach beyond the window."""
    model = make(kind)
    view, sequences = HeadView(model), draw_sequences(RAGGED)
    expected = alone(view, sequences)
    assert packs_exactly(view)
    found = packed_hidden(view, pack(sequences))
    assert found.shape == expected.shape
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(0))
    body = list(model.model.parameters())
    got, want = (torch.autograd.grad((value * weights).sum(), body) for value in (found, expected))
    norm = torch.nn.utils.get_total_norm(want)
    assert torch.nn.utils.get_total_norm([a - b for a, b in zip(got, want, strict=True)]) <= 1e-5 * norm


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_log_probs_of_packed_responses_are_those_of_padded_ones(kind: str) -> None:
    view, sequences = HeadView(make(kind)), draw_sequences([17, 9, 4, 12, 17])
    prompts, sizes = [3, 1, 3, 5, 3], [14, 8, 1, 7, 14]
    ids, _ = pad_right(sequences)
    expected = response_logprobs(view, ids, None, response_positions(prompts, sizes), 0.6)
    assert packs_exactly(view)
    packed, places = pack(sequences), response_places(prompts, sizes)
    found = score_hidden(view, packed_hidden(view, packed)[places - 1], packed.input_ids[0, places], 0.6)
    torch.testing.assert_close(found.logprobs, expected.logprobs, rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 25), min_size=1, max_size=12), seed=st.integers(0, 99))
def test_any_lengths_in_any_order_pack_exactly(lengths: list[int], seed: int) -> None:
    view, sequences = HeadView(SLIDING), draw_sequences(lengths, seed)
    with torch.no_grad():
        expected, found = alone(view, sequences), packed_hidden(view, pack(sequences))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-11)


SLIDING = make("qwen3 sliding", torch.float64)
assert enable(SLIDING)


def test_no_sequence_sees_its_neighbours() -> None:
    """Changing one sequence changes the hidden states of no other, not by a bit."""
    model = make("llama")
    view = HeadView(model)
    assert packs_exactly(view)
    sequences = draw_sequences(RAGGED)
    with torch.no_grad():
        before = packed_hidden(view, pack(sequences)).split(RAGGED)
        sequences[3] = draw_sequences(RAGGED, seed=1)[3]
        after = packed_hidden(view, pack(sequences)).split(RAGGED)
    same = [bool(torch.equal(left, right)) for left, right in zip(before, after, strict=True)]
    assert same == [index != 3 for index in range(len(RAGGED))]


def test_without_a_pack_a_prepared_model_does_what_it_did() -> None:
    """Padding masks, caches and generation go through sdpa as before."""
    model, other = make("qwen3 sliding"), make("qwen3 sliding")
    assert enable(other)
    assert other.config._attn_implementation == NAME
    ids = torch.tensor(draw_sequences([14, 14]))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        for arguments in ({}, {"attention_mask": mask}):
            assert torch.equal(model(ids, **arguments).logits, other(ids, **arguments).logits)
        kept = {"do_sample": False, "max_new_tokens": 8, "attention_mask": mask, "eos_token_id": None}
        assert torch.equal(model.generate(ids, **kept), other.generate(ids, **kept))
    assert "attn" not in str(other.config.to_dict()).replace("use_attn", "")


def test_packs_survive_activation_checkpointing() -> None:
    """A layer that is computed again in the backward pass keeps the sequences apart too."""
    model = make("qwen3 sliding", torch.float64)
    view, sequences = HeadView(model), draw_sequences(RAGGED)
    assert packs_exactly(view)
    body = list(model.model.parameters())

    def gradient() -> list[Tensor]:
        return list(torch.autograd.grad(packed_hidden(view, pack(sequences)).square().sum(), body))

    expected = gradient()
    set_checkpointing(model, "full")
    for left, right in zip(gradient(), expected, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-12, atol=1e-12)


def test_under_autocast_packed_hidden_states_are_those_of_each_sequence_alone() -> None:
    """Norms and rotations hand float32 to attention there, values come in half precision."""
    view = HeadView(tiny_model("qwen3"))
    assert packs_exactly(view)
    sequences = [[3, 9, 27, 81, 5], [7, 1, 4], [2, 60, 90, 8]]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        together = packed_hidden(view, pack(sequences)).float()
        alone = torch.cat([view.hidden(torch.tensor([sequence]))[0].float() for sequence in sequences])
    assert (together - alone).norm() <= 2e-2 * alone.norm()


def test_a_kernel_is_used_only_where_it_gives_what_sdpa_gives() -> None:
    cpu = torch.device("cpu")

    def kernel(
        query: Tensor, key: Tensor, value: Tensor, bounds: Tensor, longest: int, scale: float, window: Any
    ) -> Tensor:
        owner = torch.bucketize(torch.arange(len(query)), bounds[1:], right=True)
        places = torch.arange(len(query))
        behind = places[:, None] - places
        seen = (owner[:, None] == owner) & (behind >= 0) & (behind < (window or len(query)))
        batch = [part.transpose(0, 1)[None] for part in (query, key, value)]
        out = torch.nn.functional.scaled_dot_product_attention(*batch, attn_mask=seen, scale=scale, enable_gqa=True)
        return out[0].transpose(0, 1)

    def leaks(*arguments: Any) -> Tensor:
        return kernel(*arguments[:3], torch.tensor([0, 8]), *arguments[4:])

    def no_window(*arguments: Any) -> Tensor:
        return kernel(*arguments[:-1], None)

    def no_gradient(*arguments: Any) -> Tensor:
        return kernel(*arguments).detach()

    assert _agrees(kernel, cpu, 16)
    for bad in (leaks, no_window, no_gradient):
        assert not _agrees(bad, cpu, 16)
    assert _find_kernel(cpu, 16) is None  # torch's own does not run on a CPU


def test_attention_with_a_soft_cap_is_left_alone() -> None:
    model = tiny_model("gemma2")
    before = model.config._attn_implementation
    assert not packs_exactly(HeadView(model))
    assert model.config._attn_implementation == before


def test_a_model_that_ignores_the_pack_is_found_out() -> None:
    model = make("llama")
    view = HeadView(model)
    forward = view.backbone.forward

    def deaf(*args: Any, packed_layout: object = None, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    view.backbone.forward = deaf
    assert not packs_exactly(view)


def test_a_pack_counts_positions_anew_and_says_where_sequences_begin() -> None:
    packed = pack([[7, 8], [9], [5, 6, 4]])
    assert packed.input_ids.tolist() == [[7, 8, 9, 5, 6, 4]]
    assert packed.position_ids.tolist() == [[0, 1, 0, 0, 1, 2]]
    assert packed.boundaries.tolist() == [0, 2, 3, 6]
    assert packed.boundaries.dtype == torch.int32
    arguments = packed.arguments()
    assert arguments["max_length_q"] == arguments["max_length_k"] == 3
    with pytest.raises(ValueError, match=r"sequences\[1\] is empty"):
        pack([[1], []])


@settings(max_examples=60, deadline=None)
@given(lengths=st.lists(st.integers(1, 4000), min_size=1, max_size=40))
def test_attention_groups_hold_every_sequence_once_with_little_padding(lengths: list[int]) -> None:
    groups = _alike(tuple(lengths))
    assert sorted(index for members in groups for index in members) == list(range(len(lengths)))
    for members in groups:
        padded = len(members) * max(lengths[index] for index in members)
        assert padded - sum(lengths[index] for index in members) <= 0.15 * padded


def test_equal_lengths_and_single_sequences_go_to_attention_without_a_copy() -> None:
    for lengths in ([12, 12, 12], [40]):
        layout = Layout(tuple(lengths))
        assert layout.moves(torch.device("cpu")) is None
        assert [group.cells for group in layout.groups] == [sum(lengths)]


# ---- dealing

steps = st.tuples(
    st.lists(st.integers(1, 3000), max_size=60), st.integers(1, 4096), st.integers(1, 5),
    st.sampled_from([100.0, 3000.0, float("inf")]),
)  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(step=steps)
def test_every_sequence_is_dealt_once_and_no_pack_exceeds_the_budget(
    step: tuple[list[int], int, int, float],
) -> None:
    lengths, budget, ranks, at = step
    dealt = deal(lengths, budget, ranks=ranks, crossover=at)
    assert sorted(i for packs in dealt for members in packs for i in members) == list(range(len(lengths)))
    assert all(len(packs) == ranks for packs in dealt)
    for packs in dealt:
        for members in packs:
            assert sum(lengths[index] for index in members) <= budget or len(members) == 1
    assert dealt == deal(lengths, budget, ranks=ranks, crossover=at)
    assert 0.0 <= waste(lengths, dealt, at) < 1.0
    if ranks == 1:
        assert waste(lengths, dealt, at) == pytest.approx(0.0, abs=1e-12)
        assert all(members for packs in dealt for members in packs)


@pytest.mark.parametrize(
    ("low", "high", "budget", "at"), [(40, 85, 2048, 1e4), (200, 12_288, 16_384, 3e4), (64, 512, 4096, 3e3)]
)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_at_most_three_percent_is_wasted_on_realistic_lengths(
    low: int, high: int, budget: int, at: float, ranks: int
) -> None:
    """Nothing is padding, so what is lost is ranks that wait for one another."""
    for seed in range(3):
        draw = random.Random(seed)
        lengths = [draw.randint(low, high) for _ in range(256)]
        dealt = deal(lengths, budget, ranks=ranks, crossover=at)
        assert waste(lengths, dealt, at) <= 0.03
        totals = [sum(cost(lengths[i], at) for packs in dealt for i in packs[rank]) for rank in range(ranks)]
        assert max(totals) <= 1.03 * sum(totals) / ranks


def test_the_dearest_packs_come_first() -> None:
    lengths = [random.Random(0).randint(10, 900) for _ in range(100)]
    lengths = [length + index for index, length in enumerate(lengths)]
    costs = [
        max(sum(cost(lengths[i], 500.0) for i in members) for members in packs)
        for packs in deal(lengths, 1500, ranks=2, crossover=500.0)
    ]
    assert costs == sorted(costs, reverse=True)


def test_a_long_sequence_counts_for_its_attention() -> None:
    """One of 1,000 costs as much as 2,000 tokens in short ones where attention costs as much as the rest at 1,000."""
    assert cost(1000, 1000.0) == 2000.0
    dealt = deal([1000] + [10] * 198, 4000, ranks=2, crossover=1000.0)
    long, short = dealt[0]
    assert sum(10 for i in short if i) - sum(10 for i in long if i) >= 900


def test_the_crossover_is_where_attention_costs_what_the_weights_cost() -> None:
    """Qwen2.5-1.5B: 1.54e9 weights, 28 layers, 12 heads of 128: about 36 thousand tokens."""
    parameters, layers, width = 1_543_714_304, 28, 1536
    length = crossover(parameters, layers, width)
    assert 2 * parameters * length == pytest.approx(4 * width * layers * length * length / 2)
    assert 35_000 < length < 37_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([1], 0), "max_tokens = 0"), (([3, 0], 5), r"lengths\[1\] = 0"),
        (([1], 5, 0), "ranks = 0"), (([1], 5, 1, 0.0), "crossover = 0"),
    ],
)  # fmt: skip
def test_numbers_out_of_range_are_refused(arguments: tuple[Any, ...], message: str) -> None:
    lengths, budget, ranks, at = (*arguments, *(1, 1.0)[len(arguments) - 2 :])
    with pytest.raises(ValueError, match=message):
        deal(lengths, budget, ranks=ranks, crossover=at)
    assert deal([], 5, ranks=3) == []
