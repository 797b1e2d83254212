"""Laws of the in-process sampler: what is recorded is what was drawn, and draws depend on their address alone."""

from __future__ import annotations

import asyncio
import math
import random
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from scope_opd.errors import ModelError, RunFailed, ScopeError
from scope_opd.models.batching import response_positions
from scope_opd.models.head import response_logprobs
from scope_opd.rollout.drawing import draw, invert
from scope_opd.rollout.local import BURST, LocalSampler
from scope_opd.rollout.random import rollout_keys, uniforms
from scope_opd.types import Prompt, Rollout, Sampler, SamplingParams
from tiny import END_ID, EOS_ID, KINDS, tiny_model, tiny_tokenizer

PLAIN = SamplingParams(n=3, temperature=0.8, max_tokens=24, stop_token_ids=(EOS_ID,), seed=7)


def ragged_prompts(count: int = 5, seed: int = 0, vocabulary: int = 320) -> list[Prompt]:
    pick = random.Random(seed)
    return [
        Prompt(f"p{i}", "", "", tuple(pick.randrange(3, vocabulary) for _ in range(pick.randint(1, 14))))
        for i in range(count)
    ]


def run(sampler: LocalSampler, prompts: list[Prompt], params: SamplingParams, step: int = 0) -> dict[str, Rollout]:
    """All rollouts by id, after checking that each comes once."""

    async def collect() -> list[Rollout]:
        return [rollout async for rollout in sampler.sample(prompts, params, step=step, policy_version=step)]

    rollouts = asyncio.run(collect())
    by_id = {rollout.id: rollout for rollout in rollouts}
    assert set(by_id) == {f"{prompt.id}/{step}/{sample}" for prompt in prompts for sample in range(params.n)}
    assert len(by_id) == len(rollouts)
    return by_id


def forced(model: torch.nn.Module, rollout: Rollout, temperature: float) -> list[float]:
    """Log-probs of one response by one teacher-forced, unpadded forward pass."""
    ids = torch.tensor([rollout.prompt_token_ids + rollout.token_ids])
    positions = response_positions([len(rollout.prompt_token_ids)], [len(rollout.token_ids)])
    with torch.no_grad():
        return response_logprobs(model, ids, None, positions, temperature).logprobs.tolist()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_rows", [None, 4])
def test_recorded_logprobs_equal_a_teacher_forced_forward_pass(kind: str, max_rows: int | None) -> None:
    model = tiny_model(kind)
    sampler = LocalSampler(model, tiny_tokenizer(), max_rows=max_rows)
    assert isinstance(sampler, Sampler)
    ends = (EOS_ID, *range(100, 112))
    for rollout in run(sampler, ragged_prompts(), replace(PLAIN, stop_token_ids=ends)).values():
        assert rollout.logprobs == pytest.approx(forced(model, rollout, 0.8), abs=1e-4)
        ended = [token in ends for token in rollout.token_ids]
        assert not any(ended[:-1])
        assert rollout.finish_reason == ("stop" if ended[-1] else "length")
        assert len(rollout.token_ids) == 24 or ended[-1]


def test_the_record_says_what_was_asked() -> None:
    prompts, tokenizer = ragged_prompts(), tiny_tokenizer()
    rollouts = run(LocalSampler(tiny_model("qwen3"), tokenizer), prompts, PLAIN, step=3)
    rollout = rollouts["p1/3/2"]
    assert (rollout.group, rollout.sample, rollout.step, rollout.policy_version) == ("p1", 2, 3, 3)
    assert rollout.prompt_token_ids == list(prompts[1].token_ids)
    assert rollout.text == tokenizer.decode(rollout.token_ids, skip_special_tokens=True)
    assert rollout.sampling == {
        "temperature": 0.8, "seed": 7, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "max_tokens": 24,
    }  # fmt: skip


CUTS = [
    {"top_p": 0.7},
    {"top_k": 5},
    {"top_k": 20, "top_p": 0.8},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "top_k": 7, "top_p": 0.9},
    {"top_p": 1e-9},
]


def reference_logprobs(logits: Tensor, ids: Tensor, params: SamplingParams) -> Tensor:
    """The distribution that transformers' own processors make of logits [1, V] after ids [1, L]."""
    if params.repetition_penalty != 1:
        logits = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, logits)
    logits = TemperatureLogitsWarper(params.temperature)(ids, logits)
    if params.top_k:
        logits = TopKLogitsWarper(params.top_k)(ids, logits)
    if params.top_p < 1:
        logits = TopPLogitsWarper(params.top_p)(ids, logits)
    return logits.log_softmax(-1)


@pytest.mark.parametrize("cuts", CUTS)
def test_cuts_and_penalty_equal_those_of_transformers(cuts: dict[str, float]) -> None:
    # Many end tokens, so that rows leave the batch and take their history with them.
    model, params = tiny_model("llama"), replace(PLAIN, stop_token_ids=tuple(range(60, 90)), **cuts)  # type: ignore[arg-type]
    rollouts = run(LocalSampler(model, tiny_tokenizer()), ragged_prompts(), params)
    for rollout in rollouts.values():
        ids = torch.tensor([rollout.prompt_token_ids + rollout.token_ids])
        start = len(rollout.prompt_token_ids)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0]
        for place, (token, logprob) in enumerate(zip(rollout.token_ids, rollout.logprobs, strict=True)):
            end = start + place
            expected = reference_logprobs(logits[end - 1 : end].clone(), ids[:, :end], params)
            assert logprob == pytest.approx(float(expected[0, token]), abs=1e-4)


def test_the_cut_distribution_keeps_the_right_tokens() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(50, 40, generator=generator) * 3
    history = torch.randint(0, 40, (50, 6), generator=generator)
    seen = torch.zeros(50, 40, dtype=torch.bool).scatter_(1, history, True)
    for cuts in CUTS:
        params = replace(PLAIN, **cuts)  # type: ignore[arg-type]
        expected = torch.cat(
            [reference_logprobs(logits[row : row + 1].clone(), history[row : row + 1], params) for row in range(50)]
        )
        for quantile in (1e-12, 0.3, 0.77, 1 - 2.0**-53):
            uniform = torch.full((50,), quantile, dtype=torch.float64)
            token, logprob = draw(logits, uniform, params, seen)
            torch.testing.assert_close(logprob, expected.gather(1, token[:, None])[:, 0], atol=1e-5, rtol=0)
            below = expected.double().exp().cumsum(-1).gather(1, token[:, None])[:, 0]
            assert bool((below >= quantile - 1e-6).all())
            assert bool((below - logprob.double().exp() <= quantile + 1e-6).all())


@pytest.mark.parametrize("max_rows", [1, 2, 4, 7, 100])
def test_other_batch_cuts_give_the_same_tokens(max_rows: int) -> None:
    model, prompts = tiny_model("qwen3"), ragged_prompts()
    params = replace(PLAIN, stop_token_ids=tuple(range(60, 75)))
    whole = run(LocalSampler(model, tiny_tokenizer()), prompts, params)
    cut = run(LocalSampler(model, tiny_tokenizer(), max_rows=max_rows), prompts, params)
    for identity, rollout in whole.items():
        assert cut[identity].token_ids == rollout.token_ids
        assert cut[identity].logprobs == pytest.approx(rollout.logprobs, abs=1e-4)


@pytest.mark.parametrize("burst", [2, 5, 100])
def test_looking_less_often_gives_the_same_rollouts(burst: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, prompts = tiny_model("llama"), ragged_prompts()
    params = replace(PLAIN, max_tokens=70, stop_token_ids=tuple(range(60, 75)))
    every = run(LocalSampler(model, tiny_tokenizer()), prompts, params)
    monkeypatch.setitem(BURST, "cpu", burst)
    seldom = run(LocalSampler(model, tiny_tokenizer()), prompts, params)
    for identity, rollout in every.items():
        assert seldom[identity].token_ids == rollout.token_ids
        assert seldom[identity].finish_reason == rollout.finish_reason
        assert seldom[identity].logprobs == pytest.approx(rollout.logprobs, abs=1e-4)


def test_a_rollout_depends_neither_on_its_companions_nor_on_their_order() -> None:
    model, prompts = tiny_model("llama"), ragged_prompts()
    sampler = LocalSampler(model, tiny_tokenizer())
    whole = run(sampler, prompts, PLAIN)
    alone = run(sampler, prompts[2:3], replace(PLAIN, n=1))
    assert alone["p2/0/0"].token_ids == whole["p2/0/0"].token_ids
    turned = run(sampler, prompts[::-1], PLAIN)
    assert {key: value.token_ids for key, value in turned.items()} == {k: v.token_ids for k, v in whole.items()}


@pytest.mark.parametrize("kind", ["qwen3", "gemma2"])
def test_the_same_call_gives_the_same_bits(kind: str) -> None:
    model, prompts = tiny_model(kind), ragged_prompts()
    sampler = LocalSampler(model, tiny_tokenizer(), max_rows=6)
    assert run(sampler, prompts, PLAIN) == run(sampler, prompts, PLAIN)


def test_samples_seeds_and_steps_differ() -> None:
    sampler, prompts = LocalSampler(tiny_model("qwen3"), tiny_tokenizer()), ragged_prompts(1)
    texts = [
        tuple(rollout.token_ids)
        for params, step in ((PLAIN, 0), (PLAIN, 1), (replace(PLAIN, seed=8), 0))
        for rollout in run(sampler, prompts, params, step).values()
    ]
    assert len(set(texts)) == 9


def test_any_of_several_end_tokens_ends_a_response_and_special_ones_leave_the_text() -> None:
    model = tiny_model("llama")
    ends = (EOS_ID, END_ID, 70)
    head = torch.nn.Linear(32, 320)
    with torch.no_grad():
        head.weight.copy_(model.get_output_embeddings().weight)
        head.bias.zero_()
        head.bias[list(ends)] = 5.0
    model.set_output_embeddings(head)
    params = replace(PLAIN, n=8, stop_token_ids=ends)
    rollouts = run(LocalSampler(model, tiny_tokenizer()), ragged_prompts(), params).values()
    assert {rollout.token_ids[-1] for rollout in rollouts if rollout.finish_reason == "stop"} == set(ends)
    for rollout in rollouts:
        assert "<e" not in rollout.text


def test_finished_rows_leave_the_batch_and_are_handed_out_as_they_end(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("qwen3")
    rows: list[int] = []
    own_forward = model.forward

    def forward(*args: object, **kwargs: object) -> object:
        rows.append(len(kwargs["input_ids"]))  # type: ignore[arg-type]
        return own_forward(*args, **kwargs)

    model.forward = forward
    ends = tuple(range(60, 100))
    params = replace(PLAIN, n=8, max_tokens=60, stop_token_ids=ends)
    rollouts = list(run(LocalSampler(model, tiny_tokenizer()), ragged_prompts(4), params).values())
    assert rows[0] == 4  # every prompt is read once
    assert rows[1:] == sorted(rows[1:], reverse=True)
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    assert lengths == sorted(lengths)
    assert len(rows) == max(lengths)
    for step, width in enumerate(rows[1:], start=1):
        alive = sum(length > step for length in lengths)
        assert alive <= width < alive / (1 - 0.125) + 1


def test_control_goes_back_to_the_event_loop_at_every_step() -> None:
    sampler = LocalSampler(tiny_model("qwen3"), tiny_tokenizer())
    ticks = 0

    async def watch() -> int:
        nonlocal ticks

        async def tick() -> None:
            nonlocal ticks
            while True:
                ticks += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(tick())
        stream = sampler.sample(ragged_prompts(2), replace(PLAIN, stop_token_ids=()), step=0, policy_version=0)
        count = len([rollout async for rollout in stream])
        other.cancel()
        return count

    assert asyncio.run(watch()) == 6
    assert ticks >= PLAIN.max_tokens - 1


def test_the_model_can_be_trained_after_and_between_samples() -> None:
    model = tiny_model("qwen3")
    sampler = LocalSampler(model, tiny_tokenizer())

    async def interleaved() -> None:
        stream = sampler.sample(ragged_prompts(2), PLAIN, step=0, policy_version=0)
        async for rollout in stream:
            assert torch.is_grad_enabled()
            ids = torch.tensor([rollout.prompt_token_ids + rollout.token_ids])
            model(input_ids=ids).logits.logsumexp(-1).sum().backward()

    asyncio.run(interleaved())
    assert all(parameter.grad is not None for parameter in model.parameters())
    before = run(sampler, ragged_prompts(2), PLAIN)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad.sign()
    assert run(sampler, ragged_prompts(2), PLAIN) != before


def test_the_distribution_sampled_is_the_models_own() -> None:
    model = tiny_model("llama", vocab_size=12, seed=3)
    prompt, params = Prompt("p", "", "", (3, 5, 7)), replace(PLAIN, n=4000, max_tokens=2, stop_token_ids=())
    rollouts = run(LocalSampler(model, tiny_tokenizer()), [prompt], params).values()
    with torch.no_grad():
        first = (model(input_ids=torch.tensor([[3, 5, 7]])).logits[0, -1] / 0.8).softmax(-1)
        grown = torch.tensor([[3, 5, 7, token] for token in range(12)])
        second = (model(input_ids=grown).logits[:, -1] / 0.8).softmax(-1)
    expected = (first[:, None] * second).flatten().double() * 4000
    observed = torch.zeros(144, dtype=torch.float64)
    for rollout in rollouts:
        observed[rollout.token_ids[0] * 12 + rollout.token_ids[1]] += 1
    common = expected >= 5
    cells = [((observed - expected) ** 2 / expected)[common].sum()]
    cells.append((observed[~common].sum() - expected[~common].sum()) ** 2 / expected[~common].sum())
    freedom = int(common.sum())
    statistic = float(sum(cells))
    # Wilson-Hilferty: the cube root of chi-square / k is near normal. Four standard deviations.
    normal = ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert abs(normal) < 4


@pytest.mark.parametrize("vocabulary", [5000, 5120, 4097])
def test_a_long_row_is_inverted_by_blocks_as_by_one_running_sum(vocabulary: int) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 3 * torch.randn(300, vocabulary, generator=generator)
    logits[::3, torch.arange(vocabulary) % 7 > 0] = -torch.inf  # most ids ruled out, whole blocks among them
    logits[::3, 1024:3072] = -torch.inf
    mass = logits.softmax(-1)
    uniform = torch.rand(300, 1, dtype=torch.float64, generator=generator)
    uniform[:4, 0] = torch.tensor([2.0**-54, 1 - 2.0**-53, 1 - 2.0**-30, 0.5])
    cumulative = mass.cumsum(-1, dtype=torch.float64)
    expected = torch.searchsorted(cumulative, uniform * cumulative[:, -1:], right=True)
    found = invert(mass, uniform)
    assert (mass.gather(-1, found) > 0).all()
    # At a boundary the two sums may round apart; the masses in between are then within rounding.
    apart = (cumulative.gather(-1, found) - uniform * cumulative[:, -1:]).abs()
    assert bool(((found == expected) | (apart < 1e-14)).all())
    assert (found[4:] == expected[4:]).all()


def test_uniforms_look_uniform_and_independent() -> None:
    keys = rollout_keys(0, 0, [(f"p{i}", sample) for i in range(64) for sample in range(8)])
    values = uniforms(keys, 0, 256)
    assert values.shape == (256, 512)
    assert values.dtype == torch.float64
    assert 0 < float(values.min()) < float(values.max()) < 1
    count = values.numel()
    deviation = math.sqrt(1 / 12 / count)
    assert abs(float(values.mean()) - 0.5) < 4 * deviation
    cells = torch.histc(values, 100, 0, 1)
    statistic = float(((cells - count / 100) ** 2 / (count / 100)).sum())
    assert abs(statistic - 99) < 4 * math.sqrt(2 * 99)
    centred = values - 0.5
    for left, right in (
        (centred[:-1], centred[1:]),  # neighbouring positions
        (centred[:, :-1], centred[:, 1:]),  # neighbouring samples
        (centred[:, :-8], centred[:, 8:]),  # neighbouring prompts
    ):
        correlation = float((left * right).mean() * 12)
        assert abs(correlation) < 4 / math.sqrt(left.numel())


def test_a_uniform_depends_on_its_address_alone() -> None:
    keys = rollout_keys(1, 2, [("a", 0), ("a", 1), ("a/0", 1), ("é\ud800", 0)])
    assert len(set(keys.tolist())) == 4
    whole = uniforms(keys, 0, 100)
    assert torch.equal(uniforms(keys[1:3], 40, 7), whole[40:47, 1:3])
    # A change of these figures changes every run: SplitMix64 by hand for key 0, positions 0 and 1.
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4]
    found = uniforms(torch.zeros(1, dtype=torch.int64), 0, 2)[:, 0].tolist()
    assert found == [((value >> 11) + 0.5) * 2.0**-53 for value in expected]


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n": 0}, "n = 0"),
        ({"max_tokens": 0}, "max_tokens = 0"),
        ({"temperature": 0.0}, "temperature = 0.0"),
        ({"top_p": 0.0}, "top_p = 0.0"),
        ({"top_k": -1}, "top_k = -1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty = 0.0"),
        ({"max_tokens": 250}, "'p0'.*context of 256.*lower rollout.max_tokens to 24"),
    ],
)
def test_settings_out_of_range_are_refused_before_sampling(changes: dict[str, float], match: str) -> None:
    sampler = LocalSampler(tiny_model("qwen3"), tiny_tokenizer())
    with pytest.raises(ScopeError, match=match):
        run(sampler, ragged_prompts(1), replace(PLAIN, **changes))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tokens", "match"), [((), "no tokens"), ((5, 320), "320"), (tuple(range(256)), "drop the prompt")]
)
def test_prompts_that_cannot_be_read_are_refused(tokens: tuple[int, ...], match: str) -> None:
    sampler = LocalSampler(tiny_model("qwen3"), tiny_tokenizer())
    with pytest.raises(ScopeError, match=match):
        run(sampler, [Prompt("bad", "", "", tokens)], PLAIN)


def test_doubled_prompts_are_refused() -> None:
    sampler = LocalSampler(tiny_model("qwen3"), tiny_tokenizer())
    with pytest.raises(ScopeError, match="comes twice"):
        run(sampler, [*ragged_prompts(1), *ragged_prompts(1)], PLAIN)
    with pytest.raises(ScopeError, match="max_rows = 0"):
        LocalSampler(tiny_model("qwen3"), tiny_tokenizer(), max_rows=0)


def test_models_without_an_attention_cache_are_refused() -> None:
    model = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, state_size=4))
    with pytest.raises(ModelError, match="mamba"):
        LocalSampler(model.eval(), tiny_tokenizer())


def test_nan_logits_stop_the_run_and_name_the_prompt() -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight[5] = torch.nan
    with pytest.raises(RunFailed, match=r"'p0'.*NaN"):
        run(LocalSampler(model, tiny_tokenizer()), ragged_prompts(1), PLAIN)


def test_autocast_samples_with_float32_logits() -> None:
    model = tiny_model("llama")
    rollouts = run(LocalSampler(model, tiny_tokenizer(), autocast=torch.bfloat16), ragged_prompts(), PLAIN)
    gaps = [
        abs(a - b)
        for rollout in rollouts.values()
        for a, b in zip(rollout.logprobs, forced(model, rollout, 0.8), strict=True)
    ]
    assert 0 < max(gaps) < 0.5
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_float64_model_is_sampled_in_float64() -> None:
    model = tiny_model("qwen3", dtype=torch.float64)
    for rollout in run(LocalSampler(model, tiny_tokenizer()), ragged_prompts(2), PLAIN).values():
        assert rollout.logprobs == pytest.approx(forced(model, rollout, 0.8), abs=1e-6)


@pytest.mark.parametrize("cuts", [{}, {"top_k": 50}, {"top_p": 0.9}, {"repetition_penalty": 1.3}])
def test_ids_beyond_the_vocabulary_are_never_drawn_and_logprobs_are_those_of_the_rest(cuts: dict[str, float]) -> None:
    model, below = tiny_model(), 40
    prompts = ragged_prompts(vocabulary=below)
    params = replace(PLAIN, stop_token_ids=(EOS_ID,), **cuts)
    free = run(LocalSampler(model, tiny_tokenizer()), prompts, params)
    assert max(max(rollout.token_ids) for rollout in free.values()) >= below
    for rollout in run(LocalSampler(model, tiny_tokenizer(), vocabulary=below), prompts, params).values():
        assert max(rollout.token_ids) < below
        if cuts:
            continue
        ids = torch.tensor([[*rollout.prompt_token_ids, *rollout.token_ids]])
        with torch.no_grad():
            logits = model(ids).logits[0, len(rollout.prompt_token_ids) - 1 : -1, :below]
        expected = (logits / params.temperature).log_softmax(-1)
        picked = expected.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
        assert rollout.logprobs == pytest.approx(picked.tolist(), abs=1e-4)


def test_a_vocabulary_of_the_whole_head_changes_nothing_and_none_at_all_is_refused() -> None:
    model, prompts = tiny_model(), ragged_prompts()
    free = run(LocalSampler(model, tiny_tokenizer()), prompts, PLAIN)
    assert run(LocalSampler(model, tiny_tokenizer(), vocabulary=320), prompts, PLAIN) == free
    with pytest.raises(ScopeError, match="vocabulary = 0; expected at least 1"):
        LocalSampler(model, tiny_tokenizer(), vocabulary=0)
