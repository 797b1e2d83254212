"""Laws of wider heads: the same model, and one that training keeps the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from scope_opd.cli.main import main
from scope_opd.zoo import model_path
from scope_opd.zoo.widen import widen_heads


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def log_probs(model: PreTrainedModel) -> torch.Tensor:
    torch.manual_seed(0)
    return model(torch.randint(3, 64, (8, 100))).logits.log_softmax(-1)


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    assert main(["zoo", "copy", str(tmp_path / "zoo"), "--head-dim", "32"]) == 0
    return tmp_path / "zoo"


@torch.no_grad()
def test_wider_heads_give_the_same_log_probs(wide: Path) -> None:
    student = load(wide / "student")
    assert student.config.head_dim == 32
    own = log_probs(load(model_path("student")))
    assert (log_probs(student) - own).abs().mean() <= 1e-5
    for layer in student.model.layers:  # what the zeros do to the norms' epsilon is all that differs
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            norm.variance_epsilon /= 2
    assert (log_probs(student) - own).abs().max() <= 1e-4
    assert (wide / "teacher" / "model.safetensors").read_bytes() == (
        model_path("teacher") / "model.safetensors"
    ).read_bytes()  # its heads are that wide already


def test_training_moves_wide_and_narrow_models_alike(wide: Path) -> None:
    models = [load(model_path("student")), load(wide / "student")]
    for model in models:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(3):
            optimizer.zero_grad()
            loss = -log_probs(model)[..., 7].mean()
            loss.backward()
            weight = model.model.layers[0].self_attn.k_norm.weight
            assert weight.grad is not None
            weight.grad.mul_(32 / weight.shape[0])  # its scale of 1 / sqrt 2 halves its step under plain descent
            optimizer.step()
    narrow, widened = (log_probs(model).detach() for model in models)
    assert (narrow - log_probs(load(model_path("student"))).detach()).abs().max() > 1e-2
    zeros = models[1].model.layers[0].self_attn.q_proj.weight.view(4, 32, 64)[:, 1::2]
    assert not zeros.any()
    assert (widened - narrow).abs().mean() <= 0.05


def test_a_width_that_is_no_multiple_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["zoo", "copy", str(tmp_path / "zoo"), "--head-dim", "24"]) == 2
    assert "error: --head-dim 24; expected a multiple of 32" in capsys.readouterr().err
    assert not (tmp_path / "zoo").exists()
    with pytest.raises(ValueError, match="expected a multiple of 16"):
        widen_heads(model_path("student"), 24)
