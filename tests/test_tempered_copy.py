"""Laws of the copy at a temperature: its log-probs are log_softmax(logits / T), or there is no copy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedModel,
)

from scope_opd.errors import ModelError
from scope_opd.models.tempered_copy import EXACT, MARKER, check_copy, copy_folder, served_temperature, tempered_copy
from tiny import save_pair

SHAPE: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "initializer_range": 0.25,
    "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4,
    "num_experts_per_tok": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": 1, "use_qkv_bias": True,
}  # fmt: skip


def random_model(kind: str, *, tied: bool) -> PreTrainedModel:
    """Every weight is random, norms too: in a fresh model they are all 1, and a division could hide."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SHAPE, tie_word_embeddings=tied))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.add_(torch.rand_like(weight))
    return model.eval()


def log_probs(folder: Path, temperature: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    with torch.no_grad():
        logits = model(torch.arange(3, 43)[None]).logits.float()
    return (logits / temperature).log_softmax(-1)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", sorted(EXACT))
def test_log_probs_of_the_copy_are_those_of_the_logits_over_t(kind: str, tied: bool, tmp_path: Path) -> None:
    random_model(kind, tied=tied).save_pretrained(tmp_path / "m")
    for temperature in (0.6, 1.7):
        folder = tmp_path / f"t{temperature}"
        assert tempered_copy(str(tmp_path / "m"), temperature, folder)
        expected = log_probs(tmp_path / "m", temperature)
        assert (log_probs(folder) - expected).abs().max() <= 1e-5
        assert (log_probs(folder) - log_probs(tmp_path / "m")).abs().max() > 1e-2
        assert served_temperature(folder) == temperature


def test_a_sharded_checkpoint_is_copied_by_rewriting_one_shard(tmp_path: Path) -> None:
    random_model("qwen2", tied=False).save_pretrained(tmp_path / "m", max_shard_size="10KB")
    shards = sorted(tmp_path.glob("m/*.safetensors"))
    assert len(shards) > 2
    tempered_copy(str(tmp_path / "m"), 0.5, tmp_path / "copy")
    assert (log_probs(tmp_path / "copy") - log_probs(tmp_path / "m", 0.5)).abs().max() <= 1e-5
    rewritten = [shard.name for shard in shards if not shard.samefile(tmp_path / "copy" / shard.name)]
    places = json.loads((tmp_path / "m" / "model.safetensors.index.json").read_text())["weight_map"]
    assert rewritten == [places["model.norm.weight"]]


def test_the_original_stays_as_it_is(tmp_path: Path) -> None:
    source = save_pair(tmp_path / "m", "qwen3")
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    tempered_copy(str(source), 0.6, tmp_path / "copy")
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    assert {file.name for file in (tmp_path / "copy").iterdir()} == {*before, MARKER}


def test_a_copy_is_used_again_until_the_original_or_the_temperature_changes(tmp_path: Path) -> None:
    source, folder = save_pair(tmp_path / "m", "qwen3"), tmp_path / "copy"
    assert tempered_copy(str(source), 0.6, folder)
    assert not tempered_copy(str(source), 0.6, folder)
    assert tempered_copy(str(source), 0.8, folder)
    save_pair(tmp_path / "m", "qwen3", seed=1)
    assert tempered_copy(str(source), 0.8, folder)
    assert (log_probs(folder) - log_probs(source, 0.8)).abs().max() <= 1e-5
    (folder / "tokenizer.json").unlink()
    assert tempered_copy(str(source), 0.8, folder)
    assert [entry.name for entry in tmp_path.iterdir() if entry.name.startswith(".")] == []


def test_a_folder_with_anything_else_in_it_is_left_alone(tmp_path: Path) -> None:
    source = save_pair(tmp_path / "m", "qwen3")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    with pytest.raises(ModelError, match="holds something else"):
        tempered_copy(str(source), 0.6, tmp_path / "mine")
    assert [entry.name for entry in (tmp_path / "mine").iterdir()] == ["thesis.txt"]


def test_a_bfloat16_checkpoint_is_exact_in_float32_and_close_in_bfloat16(tmp_path: Path) -> None:
    random_model("qwen3", tied=True).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    tempered_copy(str(tmp_path / "m"), 0.6, tmp_path / "copy")
    assert (log_probs(tmp_path / "copy") - log_probs(tmp_path / "m", 0.6)).abs().max() <= 1e-5
    exact, half = log_probs(tmp_path / "m", 0.6), torch.bfloat16
    own = (log_probs(tmp_path / "m", 0.6, half) - exact).abs().mean()
    copied = (log_probs(tmp_path / "copy", 1.0, half) - exact).abs().mean()
    print(f"\nbfloat16: off by {own:.3g} nats a token as it is, {copied:.3g} as a copy")
    assert copied <= 1.5 * own


def gemma(folder: Path) -> None:
    GemmaForCausalLM(GemmaConfig(**SHAPE)).save_pretrained(folder)


def head_with_a_bias(folder: Path) -> None:
    PhiForCausalLM(PhiConfig(**SHAPE)).save_pretrained(folder)


def llama_whose_head_has_a_bias(folder: Path) -> None:
    save_pair(folder, "llama")
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors") | {"lm_head.bias": torch.zeros(320)}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edited(**values: Any) -> Any:
    def make(folder: Path) -> None:
        save_pair(folder, "qwen3")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | values))

    return make


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (gemma, "model_type 'gemma'"),
        (head_with_a_bias, "model_type 'phi'"),
        (lambda folder: save_pair(folder, "gemma2"), "model_type 'gemma2'"),
        (lambda folder: save_pair(folder, "cohere"), "model_type 'cohere'"),
        (lambda folder: save_pair(folder, "granite"), "model_type 'granite'"),
        (llama_whose_head_has_a_bias, r"head with a bias"),
        (edited(final_logit_softcapping=30.0), "final_logit_softcapping = 30.0"),
        (edited(logit_scale=0.25), "logit_scale = 0.25"),
        (edited(quantization_config={"quant_method": "awq"}), "is quantised"),
        (edited(auto_map={"AutoModelForCausalLM": "own.Own"}), "not known to be exact"),
    ],
)
def test_what_would_not_be_exact_is_refused(make: Any, message: str, tmp_path: Path) -> None:
    make(tmp_path / "m")
    with pytest.raises(ModelError, match=message) as error:
        tempered_copy(str(tmp_path / "m"), 0.6, tmp_path / "copy")
    assert "sample at temperature 1" in str(error.value)
    assert not (tmp_path / "copy").exists()


def test_a_model_that_is_none_of_what_can_be_copied_is_one_line(tmp_path: Path) -> None:
    source = save_pair(tmp_path / "m", "qwen3")
    tempered_copy(str(source), 0.6, tmp_path / "copy")
    with pytest.raises(ModelError, match=r"is a copy at temperature 0\.6 itself"):
        tempered_copy(str(tmp_path / "copy"), 0.6, tmp_path / "again")
    for temperature in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ModelError, match="expected a number > 0"):
            tempered_copy(str(source), temperature, tmp_path / "x")
    (source / "model.safetensors").write_bytes(b"no")
    with pytest.raises(ModelError, match="is damaged"):
        tempered_copy(str(source), 0.6, tmp_path / "x")
    (source / "model.safetensors").unlink()
    with pytest.raises(ModelError, match="no safetensors weights"):
        tempered_copy(str(source), 0.6, tmp_path / "x")


def test_the_check_sees_a_copy_that_is_not_one(tmp_path: Path) -> None:
    source = save_pair(tmp_path / "m", "qwen3")
    tempered_copy(str(source), 0.6, tmp_path / "copy")
    assert check_copy(str(source), tmp_path / "copy", 0.6) <= 1e-5
    with pytest.raises(ModelError, match="is off by"):
        check_copy(str(source), tmp_path / "copy", 0.61)


def test_copies_of_models_of_one_name_are_kept_apart(tmp_path: Path) -> None:
    models = [str(tmp_path / place / "m") for place in ("a", "b")]
    places = {copy_folder(tmp_path, model, temperature) for model in models for temperature in (0.6, 0.7)}
    assert len(places) == 4
