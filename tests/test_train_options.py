"""What saves memory or time in the update changes nothing that it must not: recomputation, states, precision."""

from __future__ import annotations

import builtins
import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from scope_opd.config import TrainConfig, validate_config
from scope_opd.errors import ConfigError
from scope_opd.models.checkpointing import recomputed_share, set_checkpointing
from scope_opd.models.head import HeadView, response_logprobs
from scope_opd.models.packing import pack, packed_hidden, packs_exactly
from scope_opd.models.watch import decoder_layers
from scope_opd.train.optim import Optimizer
from tiny import tiny_model

SETTINGS: list[Any] = ["full", "offload", 1, 2, 3]


def rows(generator: torch.Generator, size: tuple[int, int] = (3, 12)) -> tuple[Tensor, Tensor]:
    ids = torch.randint(3, 300, size, generator=generator)
    positions = torch.tensor([[row, column] for row in range(size[0]) for column in range(1, size[1])])
    return ids, positions


def gradient(model: Any, ids: Tensor, positions: Tensor) -> list[Tensor]:
    loss = response_logprobs(model, ids, None, positions, 0.7).logprobs.square().sum()
    return list(torch.autograd.grad(loss, list(model.parameters())))


class Counting:
    """How often each layer's attention runs."""

    def __init__(self, model: Any) -> None:
        self.calls = [0] * len(decoder_layers(model))
        for index, layer in enumerate(decoder_layers(model)):
            attention = next(child for name, child in layer.named_children() if "att" in name)
            attention.register_forward_hook(self._count(index))

    def _count(self, index: int) -> Any:
        def ran(*_: Any) -> None:
            self.calls[index] += 1

        return ran


class TestCheckpointing:
    @pytest.mark.parametrize("setting", SETTINGS)
    @pytest.mark.parametrize("kind", ["qwen3", "gpt_neox"])
    def test_gradients_are_those_of_off_bit_for_bit(self, kind: str, setting: Any) -> None:
        model = tiny_model(kind, layers=4)
        ids, positions = rows(torch.Generator().manual_seed(0))
        expected = gradient(model, ids, positions)
        set_checkpointing(model, setting)
        assert all(map(torch.equal, gradient(model, ids, positions), expected))

    @pytest.mark.parametrize(
        ("setting", "expected"),
        [
            ("off", [1, 1, 1, 1]),
            ("full", [2, 2, 2, 2]),
            ("offload", [2, 2, 2, 2]),
            (2, [2, 1, 2, 1]),
            (3, [2, 1, 1, 2]),
        ],
    )
    def test_just_the_layers_that_the_setting_names_run_twice(self, setting: Any, expected: list[int]) -> None:
        model = tiny_model("llama", layers=4)
        ids, positions = rows(torch.Generator().manual_seed(0))
        view = HeadView(model)
        set_checkpointing(model, "full")
        set_checkpointing(model, setting)  # replaces the one before
        counting = Counting(model)
        response_logprobs(view, ids, None, positions).logprobs.sum().backward()
        assert counting.calls == expected
        assert recomputed_share(4, setting) == sum(calls - 1 for calls in expected) / 4

    def test_nothing_is_recomputed_without_gradient_and_decoding_keeps_its_cache(self) -> None:
        plain, model = tiny_model("qwen3", layers=3), tiny_model("qwen3", layers=3)
        set_checkpointing(model, "full")
        counting = Counting(model)
        ids, positions = rows(torch.Generator().manual_seed(0))
        with torch.no_grad():
            view = HeadView(model)
            before = list(counting.calls)
            response_logprobs(view, ids, None, positions)
        assert [calls - was for calls, was in zip(counting.calls, before, strict=True)] == [1, 1, 1]
        kept = {"do_sample": False, "max_new_tokens": 8, "attention_mask": torch.ones_like(ids), "eos_token_id": None}
        assert torch.equal(model.generate(ids, **kept), plain.generate(ids, **kept))

    @pytest.mark.parametrize("setting", ["full", "offload", 2])
    def test_packs_are_kept_apart_in_recomputed_layers_too(self, setting: Any) -> None:
        model = tiny_model("qwen3", layers=3, dtype=torch.float64)
        view = HeadView(model)
        assert packs_exactly(view)
        sequences = [[7 * i % 300 + 3 for i in range(size)] for size in (5, 9, 2)]
        body = list(model.model.parameters())

        def packed_gradient() -> list[Tensor]:
            return list(torch.autograd.grad(packed_hidden(view, pack(sequences)).square().sum(), body))

        expected = packed_gradient()
        set_checkpointing(model, setting)
        assert all(map(torch.equal, packed_gradient(), expected))

    def test_a_copy_runs_its_own_layers(self) -> None:
        model = tiny_model("qwen3")
        set_checkpointing(model, "full")
        twin = copy.deepcopy(model)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        ids, positions = rows(torch.Generator().manual_seed(0))
        assert all(map(torch.equal, gradient(twin, ids, positions), gradient(tiny_model("qwen3"), ids, positions)))

    def test_an_offloaded_input_is_what_the_layer_was_given(self) -> None:
        """And nothing else passes through the context that saves it: masks and the like stay where they are."""
        model = tiny_model("qwen3", layers=3)
        ids, positions = rows(torch.Generator().manual_seed(0))
        given: list[Tensor] = []
        for layer in decoder_layers(model):
            layer.register_forward_pre_hook(lambda _, args: given.append(args[0].detach().clone()))
        saved: list[Tensor] = []

        def keep(hidden: Tensor) -> Any:
            def pack_one(tensor: Tensor) -> Tensor:
                saved.append(tensor.detach().clone())
                return tensor

            return torch.autograd.graph.saved_tensors_hooks(pack_one, lambda tensor: tensor)

        set_checkpointing(model, "offload", keep=keep)
        view = HeadView(model)
        given.clear()
        response_logprobs(view, ids, None, positions).logprobs.sum().backward()
        assert len(saved) == 3
        assert all(map(torch.equal, saved, given))

    def test_modules_stay_in_eval_mode(self) -> None:
        model = tiny_model("qwen3", attention_dropout=0.5)
        set_checkpointing(model, "full")
        ids, positions = rows(torch.Generator().manual_seed(0))
        assert all(map(torch.equal, gradient(model, ids, positions), gradient(tiny_model("qwen3"), ids, positions)))
        assert not any(module.training for module in model.modules())

    def test_every_0th_layer_is_refused(self) -> None:
        with pytest.raises(ValueError, match="activation_checkpointing = 0"):
            set_checkpointing(tiny_model("qwen3"), 0)


def settings(**values: Any) -> TrainConfig:
    return TrainConfig(**{"lr": 1e-2, "weight_decay": 0.1, **values})


def set_gradients(model: Any, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in model.parameters():
        drawn = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        parameter.grad = drawn if parameter.requires_grad else None


def stepped(config: TrainConfig, steps: int = 4, *, resume_at: int | None = None, **model: Any) -> dict[str, Tensor]:
    """Weights after some steps; from ``resume_at`` on of a new model and optimiser with the weights and states then."""
    student = tiny_model("qwen3", **model)
    optimizer = Optimizer(student, config)
    for step in range(steps):
        if step == resume_at:
            weights = copy.deepcopy(student.state_dict())
            saved = {name: tensor.clone() for name, tensor in optimizer.states().items()}
            student = tiny_model("qwen3", **model)
            optimizer = Optimizer(student, config)
            states = optimizer.make_states(saved)
            assert states.keys() == saved.keys()
            with torch.no_grad():
                for name, tensor in states.items():
                    tensor.copy_(saved[name])
            student.load_state_dict(weights)
        set_gradients(student, step)
        optimizer.step(1e-2)
    return dict(student.state_dict())


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


class TestStates:
    def test_offloaded_states_step_as_those_beside_the_model_bit_for_bit(self) -> None:
        assert same(stepped(settings(offload="optimizer")), stepped(settings()))

    def test_offloaded_states_step_from_weights_that_something_else_has_changed(self) -> None:
        found = []
        for offload in ("off", "optimizer"):
            model = tiny_model("qwen3")
            optimizer = Optimizer(model, settings(offload=offload))
            for step in range(3):
                set_gradients(model, step)
                optimizer.step(1e-2)
                for parameter in model.parameters():
                    parameter.data.mul_(0.5)  # unseen by version counters
            found.append(dict(model.state_dict()))
        assert same(*found)

    def test_a_parameter_without_gradient_is_left_alone(self) -> None:
        model = tiny_model("qwen3")
        optimizer = Optimizer(model, settings(offload="optimizer"))
        before = copy.deepcopy(model.state_dict())
        for _ in range(2):
            set_gradients(model, 0)
            model.model.norm.weight.grad = None
            optimizer.step(1e-2)
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        assert changed == before.keys() - {"model.norm.weight"}
        assert not any(name.startswith("model.norm.") for name in optimizer.states())

    @pytest.mark.parametrize("values", [{"offload": "optimizer"}, {"optimizer": "adamw_8bit"}])
    def test_a_resumed_optimiser_goes_on_bit_for_bit(self, values: dict[str, Any]) -> None:
        assert same(stepped(settings(**values), resume_at=2), stepped(settings(**values)))

    def test_8_bit_states_take_a_quarter_and_small_ones_stay_as_they_are(self) -> None:
        model = tiny_model("qwen3")
        optimizer = Optimizer(model, settings(optimizer="adamw_8bit"))
        set_gradients(model, 0)
        optimizer.step(1e-2)
        sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in optimizer.states().items()}
        embedding, norm = model.model.embed_tokens.weight, model.model.norm.weight
        assert sizes["model.embed_tokens.weight/exp_avg.codes"] == embedding.numel()
        assert sizes["model.embed_tokens.weight/exp_avg_sq.scale"] == 4 * embedding.numel() // 256
        assert sizes["model.norm.weight/exp_avg"] == 4 * norm.numel()

    def test_8_bit_steps_are_close_to_full_ones(self) -> None:
        start = dict(tiny_model("qwen3").state_dict())
        full, small = stepped(settings(weight_decay=0.0)), stepped(settings(weight_decay=0.0, optimizer="adamw_8bit"))
        name = "model.embed_tokens.weight"
        moved = (full[name] - start[name]).norm()
        assert 0 < (full[name] - small[name]).norm() < 0.05 * moved

    def test_8_bit_states_without_torchao_are_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = builtins.__import__

        def missing(name: str, *args: Any) -> Any:
            if name.startswith("torchao"):
                raise ImportError("No module named 'torchao'")
            return real(name, *args)

        monkeypatch.setattr(builtins, "__import__", missing)
        with pytest.raises(ConfigError, match=r"adamw_8bit.*torchao.*scope-opd\[low-bit\]"):
            Optimizer(tiny_model("qwen3"), settings(optimizer="adamw_8bit"))

    def test_only_the_states_of_adamw_are_offloaded(self) -> None:
        with pytest.raises(ConfigError, match=r"train\.offload = 'optimizer' with train\.optimizer = 'muon'"):
            validate_config({"train": {"optimizer": "muon", "offload": "optimizer"}})


class TestPrecision:
    def test_bfloat16_parameters_have_bfloat16_gradients_and_states_and_float32_log_probs(self) -> None:
        model = tiny_model("qwen3", dtype=torch.bfloat16)
        ids, positions = rows(torch.Generator().manual_seed(0))
        found = response_logprobs(model, ids, None, positions, 0.7)
        assert (found.logprobs.dtype, found.entropy.dtype) == (torch.float32, torch.float32)  # type: ignore[union-attr]
        found.logprobs.sum().backward()
        assert {parameter.grad.dtype for parameter in model.parameters()} == {torch.bfloat16}
        optimizer = Optimizer(model, settings())
        optimizer.step(1e-2)
        moments = {tensor.dtype for name, tensor in optimizer.states().items() if not name.endswith("/step")}
        assert moments == {torch.bfloat16}

    def test_float32_masters_keep_what_bfloat16_parameters_round_away(self) -> None:
        """A hundred steps of a tenth of the spacing of bfloat16: the masters move by ten, the parameters not at all."""
        moved = {}
        for dtype in (torch.float32, torch.bfloat16):
            model = tiny_model("qwen3", dtype=dtype)
            weight = model.model.embed_tokens.weight
            with torch.no_grad():
                weight.fill_(1.0)  # neighbours of 1 are 2^-7 above it and 2^-8 below
            optimizer = Optimizer(model, settings(weight_decay=0.0))
            for _ in range(100):
                weight.grad = torch.ones_like(weight)
                optimizer.step(2.0**-8 / 10)
            moved[dtype] = float(1.0 - weight.detach().double().mean())
        assert moved[torch.bfloat16] == 0
        assert moved[torch.float32] == pytest.approx(10 * 2.0**-8, rel=1e-3)

    def test_bfloat16_log_probs_are_those_of_float32_weights_to_bfloat16s_three_digits(self) -> None:
        low = tiny_model("qwen3", dtype=torch.bfloat16, initializer_range=0.05)
        full = tiny_model("qwen3", initializer_range=0.05)
        full.load_state_dict({name: tensor.float() for name, tensor in low.state_dict().items()})
        ids, positions = rows(torch.Generator().manual_seed(0))
        gap = (
            response_logprobs(low, ids, None, positions).logprobs
            - response_logprobs(full, ids, None, positions).logprobs
        )
        assert gap.abs().mean() < 0.02
