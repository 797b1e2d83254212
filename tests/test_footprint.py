"""What is planned without data must be what torch really allocates and autograd really keeps."""

from __future__ import annotations

import contextlib
import copy
import gc
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config, Qwen3Config

from scope_opd.config import TrainConfig
from scope_opd.errors import ModelError
from scope_opd.models.checkpointing import Setting
from scope_opd.models.footprint import (
    forward_flops,
    ragged,
    run_update,
    scoring_moments,
    shape_of,
    update_moments,
)
from scope_opd.models.head import HeadView, response_logprobs
from scope_opd.models.memory import DRAW_BYTES, Layout, Student, Updates, cache_bytes, largest, resident
from scope_opd.models.packed_attention import Layout as Pack
from scope_opd.models.packed_attention import enable
from scope_opd.models.shapes import published_config
from scope_opd.models.watch import Watch, decoder_layers
from scope_opd.rollout.drawing import draw
from scope_opd.train.optim import Optimizer
from scope_opd.types import SamplingParams

SIZES: dict[str, Any] = {
    "vocab_size": 3000,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
}
CONFIGS = {
    "qwen3": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "qwen2": Qwen2Config(**{k: v for k, v in SIZES.items() if k != "head_dim"}, tie_word_embeddings=False),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
}
TOKENS = 384


def real(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()


class Unwatched(contextlib.AbstractContextManager[None]):
    """Stands where a ``Watch`` would, and sees nothing."""

    moment = ""

    def note(self, moment: str) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def totals(moments: Any) -> dict[str, int]:
    return {name: sum(parts.values()) for name, parts in moments.items()}


def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four chunks of tokens x six blocks of the vocabulary, the last of each smaller."""
    monkeypatch.setattr("scope_opd.models.head.KEPT_LOGITS", 100_000)
    monkeypatch.setattr("scope_opd.objective.chunked.TILE_TOKENS", 120)
    monkeypatch.setattr("scope_opd.objective.chunked.TILE_VOCABULARY", 512)


@pytest.mark.parametrize("family", CONFIGS)
class TestAgainstTheRealModel:
    @pytest.mark.parametrize(("rows", "checkpointing"), [(1, "off"), (3, "full"), (1, 2), (1, "offload")])
    def test_planned_moments_are_those_of_a_real_pass_to_the_byte(
        self, family: str, checkpointing: Setting, rows: int
    ) -> None:
        config = CONFIGS[family]
        model = real(config)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        watch = Watch(model)
        run_update(HeadView(model), watch, TOKENS, rows=rows, checkpointing=checkpointing)
        watch.detach()
        planned = update_moments(config, TOKENS, rows=rows, checkpointing=checkpointing)
        assert totals(planned) == totals(watch.moments)

    @pytest.mark.parametrize(("long", "checkpointing"), [(2048, "off"), (2048, "full"), (64, "off")])
    def test_so_they_are_of_a_packed_row(
        self, family: str, checkpointing: Setting, long: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Short sequences are padded in attention; long ones go through it as they lie in the row."""
        monkeypatch.setattr("scope_opd.models.packed_attention.LONG", long)
        config, tokens = CONFIGS[family], TOKENS
        model = real(config)
        assert enable(model)
        assert (Pack(ragged(tokens)).moves(torch.device("cpu")) is None) == (long == 64)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        watch = Watch(model)
        run_update(HeadView(model), watch, tokens, packed=True, checkpointing=checkpointing)
        watch.detach()
        planned = update_moments(config, tokens, packed=True, checkpointing=checkpointing)
        assert totals(planned) == totals(watch.moments)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("autocast", [None, torch.bfloat16])
    def test_so_they_are_where_log_probs_come_in_tiles(
        self, family: str, dtype: torch.dtype, autocast: torch.dtype | None, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        small_tiles(monkeypatch)
        config = CONFIGS[family]
        model = real(config, dtype)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        watch = Watch(model)
        run_update(HeadView(model), watch, TOKENS, autocast=autocast, extra_temperature=0.6)
        watch.detach()
        planned = update_moments(config, TOKENS, dtype=dtype, autocast=autocast, extra_temperature=0.6)
        logits = 4 * SIZES["vocab_size"] * TOKENS
        assert planned["head"]["log-prob chunk"] < logits
        assert totals(planned) == totals(watch.moments)

    @pytest.mark.parametrize("checkpointing", ["off", "full"])
    @pytest.mark.parametrize("vocabulary", [3000, 20_000])
    @pytest.mark.parametrize("tiled", [False, True])
    def test_the_peak_is_the_one_that_torch_reports(
        self, family: str, checkpointing: Setting, vocabulary: int, tiled: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Without any watch, under which autograd would add up gradients out of place."""
        if tiled:
            small_tiles(monkeypatch)
        config = copy.deepcopy(CONFIGS[family])
        config.vocab_size = vocabulary
        model = real(config)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        view = HeadView(model)

        def update() -> None:
            run_update(view, cast(Watch, Unwatched()), TOKENS, checkpointing=checkpointing)

        update()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            update()
        now = reported = 0
        for event in profile.profiler.kineto_results.events():
            if event.name() == "[memory]":
                now += event.nbytes()
                reported = max(reported, now)
        planned = max(totals(update_moments(config, TOKENS, checkpointing=checkpointing)).values())
        ids = 8 * TOKENS  # made before anything is counted
        assert reported - planned == ids

    def test_so_are_those_of_scoring_in_tiles(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        small_tiles(monkeypatch)
        config = CONFIGS[family]
        model = real(config)
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        places = torch.stack((torch.zeros(TOKENS - 1, dtype=torch.long), torch.arange(1, TOKENS)), dim=1)
        watch, view = Watch(model), HeadView(model)
        with watch, torch.no_grad():
            watch.moment = "head"
            response_logprobs(view, ids, None, places)
        watch.detach()
        planned = scoring_moments(config, TOKENS)
        assert totals(planned)["head"] == totals(watch.moments)["head"]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_what_is_kept_is_what_autograd_saves(self, family: str, dtype: torch.dtype) -> None:
        config = CONFIGS[family]
        model = real(config, dtype)
        view = HeadView(model)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if tensor.untyped_storage().data_ptr() not in weights:
                saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            hidden = view.hidden(ids)
        gc.collect()
        planned = sum(update_moments(config, TOKENS, dtype=dtype)["kept"].values())
        handed_on = (TOKENS - 1) * (hidden.shape[-1] * hidden.element_size() + 2 * 8)  # states of tokens, two indices
        assert abs(planned - sum(saved.values()) - handed_on) <= 16


class TestDepthAndLength:
    @pytest.mark.parametrize("checkpointing", ["off", "full", 2, "offload"])
    def test_shallow_traces_give_any_depth_exactly(
        self, checkpointing: Setting, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = Qwen3Config(**{**SIZES, "num_hidden_layers": 9}, tie_word_embeddings=True)
        shallow = update_moments(config, TOKENS, checkpointing=checkpointing)
        monkeypatch.setattr("scope_opd.models.footprint.SHALLOW", (5, 6))
        assert totals(shallow) == totals(update_moments(config, TOKENS, checkpointing=checkpointing))

    def test_the_lowest_layers_backward_holds_no_other_layers_gradients(self) -> None:
        held = {
            layers: update_moments(CONFIGS["qwen3"], TOKENS, checkpointing="full", layers=layers)["lowest layer"]
            for layers in (3, 12)
        }
        assert held[3]["backward"] == held[12]["backward"]

    def test_memory_grows_with_every_token(self) -> None:
        config = CONFIGS["llama"]
        updates = Updates(Student(config, shape_of(config)), Layout())
        sizes = [updates.stage(tokens).total for tokens in (256, 1024, 4096, 60_000, 90_000)]
        assert sizes == sorted(sizes)


class TestPrecision:
    @pytest.mark.parametrize("checkpointing", ["off", "full"])
    def test_autocast_is_planned_as_it_runs(self, checkpointing: Setting) -> None:
        config = CONFIGS["qwen3"]
        model = real(config)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        watch = Watch(model)
        run_update(HeadView(model), watch, TOKENS, autocast=torch.bfloat16, checkpointing=checkpointing)
        watch.detach()
        planned = update_moments(config, TOKENS, autocast=torch.bfloat16, checkpointing=checkpointing)
        assert totals(planned) == totals(watch.moments)
        assert planned["kept"]["cast weights"] == 2 * sum(
            p.numel() for name, p in model.named_parameters() if "proj" in name
        )

    def test_the_cache_is_in_the_weights_dtype_under_autocast_too(self) -> None:
        config = CONFIGS["qwen3"]
        model = real(config)
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            cache = model(torch.zeros(2, 7, dtype=torch.long), use_cache=True).past_key_values
        held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
        shape = shape_of(config)
        assert held == 2 * 7 * cache_bytes(shape, torch.float32)

    def test_drawing_takes_what_is_planned_for_a_logit(self) -> None:
        model = real(CONFIGS["qwen3"])
        rows, vocabulary = 3, 600_000  # so long that what is summed by blocks is small
        logits, uniform = torch.randn(rows, vocabulary), torch.rand(rows, dtype=torch.float64)
        watch = Watch(model)
        with watch:
            draw(logits, uniform, SamplingParams(n=1, temperature=0.6, max_tokens=1, stop_token_ids=(), seed=0))
        watch.detach()
        assert max(totals(watch.moments).values()) == pytest.approx(DRAW_BYTES * rows * vocabulary, rel=0.01)

    def test_scoring_keeps_no_layer(self) -> None:
        shallow = Qwen3Config(**{**SIZES, "num_hidden_layers": 3})
        deep = Qwen3Config(**{**SIZES, "num_hidden_layers": 12})
        few, many = (max(totals(scoring_moments(config, TOKENS)).values()) for config in (shallow, deep))
        assert few == many


class TestShapes:
    @pytest.mark.parametrize(
        ("name", "parameters"),
        [
            ("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", 1_777_088_000),
            ("Skywork/Skywork-OR1-7B", 7_615_616_512),
            ("Qwen/Qwen3-1.7B-Base", 1_720_574_976),
            ("Qwen/Qwen3-8B", 8_190_735_360),
        ],
    )
    def test_published_shapes_have_the_published_number_of_parameters(self, name: str, parameters: int) -> None:
        assert shape_of(published_config(name)).parameters == parameters

    def test_parameters_are_those_of_the_loaded_model(self) -> None:
        for config in CONFIGS.values():
            shape, model = shape_of(config), real(config)
            assert shape.parameters == sum(p.numel() for p in model.parameters())
            assert shape.root_parameters + shape.layers * shape.layer_parameters == shape.parameters

    def test_a_mixture_of_experts_is_refused_in_one_line(self) -> None:
        from transformers import Qwen3MoeConfig

        config = Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
        with pytest.raises(ModelError, match="cannot be planned"):
            update_moments(config, 64)


class TestArithmetic:
    def student(self, **more: Any) -> Student:
        config = CONFIGS["qwen3"]
        return Student(config, shape_of(config), **more)

    def test_optimiser_states_are_those_that_torch_makes(self) -> None:
        model = real(CONFIGS["qwen3"])
        for name in ("adamw", "muon"):
            optimizer = Optimizer(model, TrainConfig(optimizer=name, lr=1e-4))
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter)
            optimizer.step(1e-4)
            held = sum(state.nbytes for state in optimizer.states().values() if state.numel() > 1)
            assert held == self.student(optimizer=name).states

    def test_shares_of_all_ranks_make_up_the_whole(self) -> None:
        student = self.student()
        alone, shared = (resident(student, layout, {}) for layout in (Layout(), Layout(4, 4)))
        assert all(4 * shared[part] >= alone[part] > 4 * (shared[part] - 1) for part in alone)
        assert shared.keys() - alone.keys() == {"plain copy"}
        assert resident(student, Layout(8, 4), {}) == shared  # dealt to the ranks of each machine

    def test_sharding_gathers_root_and_two_layers(self) -> None:
        student = self.student(autocast=torch.bfloat16)
        stage = Updates(student, Layout(4, 4)).stage(1024)
        shape = student.shape
        assert stage.parts["gathered weights"] == 2 * (shape.root_parameters + 2 * shape.layer_parameters)
        assert "cast weights" not in stage.parts
        assert "gathered weights" not in Updates(student, Layout()).stage(1024).parts

    def test_the_largest_that_fits_is_found(self) -> None:
        assert largest(lambda tokens: tokens, 1000, 1 << 20) == 896
        assert largest(lambda tokens: tokens, 127, 1 << 20) == 0
        assert largest(lambda tokens: tokens, 1 << 20, 1 << 20) == 1 << 20

    @given(st.integers(1, 1 << 20), st.integers(1, 2000), st.integers(0, 1 << 20))
    def test_the_largest_that_fits_is_found_whatever_bends(self, fits: int, slope: int, bend: int) -> None:
        calls = []

        def size(tokens: int) -> int:
            calls.append(tokens)
            return tokens + slope * max(tokens - bend, 0)

        found = largest(size, size(fits), 1 << 20)
        assert found == fits // 128 * 128
        assert len(calls) <= 2 + 5 * 14

    def test_states_in_8_bits_are_those_whose_shares_are_whole_blocks(self) -> None:
        config = Qwen3Config(**{**SIZES, "hidden_size": 896})  # rows are whole blocks where there are two of them
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        for shards in (1, 2, 3, 4):
            matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
            shares = [[rows.numel() for rows in matrix.chunk(shards)] for matrix in matrices]
            whole = [all(size % 256 == 0 and size >= 4096 for size in of) for of in shares]
            expected = sum(matrix.numel() for matrix, yes in zip(matrices, whole, strict=True) if yes)
            assert shape_of(config, shards=shards).block_parameters == expected
            assert shards == 3 or expected > 0

    def test_forward_flops_of_short_sequences_are_two_a_weight(self) -> None:
        shape = shape_of(published_config("Qwen/Qwen3-8B"))
        assert forward_flops(shape, 1) == pytest.approx(2 * shape.matrix_parameters, rel=1e-4)


def test_a_layers_experts_are_not_taken_for_the_decoders_layers() -> None:
    model = AutoModelForCausalLM.from_config(Qwen3Config(**SIZES), dtype=torch.float32)
    for layer in model.model.layers:
        layer.mlp.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(8))
    assert decoder_layers(model) is model.model.layers
