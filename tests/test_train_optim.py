"""Learning-rate schedules against values worked out by hand; which parameter is decayed and which goes to Muon."""

from __future__ import annotations

import math

import pytest
import torch

from scope_opd.config import TrainConfig
from scope_opd.train.optim import Optimizer, lr_at
from tiny import tiny_model


def config(**values: object) -> TrainConfig:
    return TrainConfig(**{"steps": 10, "lr": 1.0, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, {0: 1.0, 9: 1.0, 50: 1.0}),
        ({"warmup_steps": 4}, {0: 0.25, 1: 0.5, 3: 1.0, 4: 1.0, 9: 1.0}),
        ({"schedule": "linear"}, {0: 1.0, 5: 0.5, 9: 0.1, 10: 0.0}),
        ({"schedule": "linear", "warmup_steps": 2, "min_lr_ratio": 0.2}, {1: 1.0, 2: 1.0, 6: 0.6, 10: 0.2}),
        ({"schedule": "cosine"}, {0: 1.0, 5: 0.5, 9: 0.5 * (1 + math.cos(0.9 * math.pi)), 10: 0.0}),
        ({"schedule": "cosine", "min_lr_ratio": 0.1}, {5: 0.55, 10: 0.1, 99: 0.1}),
        ({"schedule": "cosine", "warmup_steps": 10}, {9: 1.0, 10: 1.0}),
    ],
)
def test_learning_rate_is_the_documented_function_of_the_step(
    values: dict[str, object], expected: dict[int, float]
) -> None:
    settings = config(**values)
    for step, rate in expected.items():
        assert lr_at(step, settings) == pytest.approx(rate, abs=1e-12)


def test_weight_decay_spares_norms_and_biases() -> None:
    model = tiny_model("gpt_neox")
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    optimizer = Optimizer(model, config(weight_decay=0.5))
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step(0.1)
    for name, parameter in model.named_parameters():
        factor = 1 - 0.1 * 0.5 if parameter.ndim >= 2 else 1.0
        assert torch.allclose(parameter, before[name] * factor), name


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_muon_takes_hidden_matrices_and_leaves_embedding_head_and_norms_to_adamw(kind: str) -> None:
    model = tiny_model(kind)
    optimizer = Optimizer(model, config(optimizer="muon"))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    muon, adamw = ({names[id(p)] for group in part.param_groups for p in group["params"]} for part in optimizer._parts)
    assert isinstance(optimizer._parts[0], torch.optim.Muon)
    assert muon | adamw == set(names.values())
    assert all("_proj" in name for name in muon)
    assert not any("_proj" in name for name in adamw)
    assert any("embed" in name for name in adamw)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_optimiser_state_survives_saving_bit_for_bit(kind: str) -> None:
    def run(reload_at: int | None) -> list[torch.Tensor]:
        model = tiny_model("qwen3")
        optimizer = Optimizer(model, config(optimizer=kind, weight_decay=0.1))
        for step in range(4):
            if step == reload_at:
                saved = {name: state.clone() for name, state in optimizer.states().items()}
                weights = [parameter.clone() for parameter in model.parameters()]
                optimizer = Optimizer(model, config(optimizer=kind, weight_decay=0.1))
                for name, state in optimizer.make_states(saved).items():
                    state.copy_(saved[name])
                assert all(torch.equal(a, b) for a, b in zip(weights, model.parameters(), strict=True))
            generator = torch.Generator().manual_seed(step)
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            optimizer.step(1e-2)
        return list(model.parameters())

    assert all(torch.equal(a, b) for a, b in zip(run(None), run(2), strict=True))
