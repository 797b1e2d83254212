"""A student whose weights wait in their files is the loaded one but for its memory, until they are dealt out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel

from rank_loading import CASES
from scope_opd.config import LoraConfig
from scope_opd.errors import ModelError
from scope_opd.models.adapters import add_adapters
from scope_opd.models.deferred import defer, deferred, fill, runnable, values
from scope_opd.models.fingerprint import weights_digest
from scope_opd.models.head import HeadView
from scope_opd.models.loading import load_model
from scope_opd.models.packing import packs_exactly
from scope_opd.models.watch import decoder_layers
from test_ranks import program
from tiny import tiny_model

IDS = torch.arange(3, 40).reshape(1, -1)
BF16, FP32 = torch.bfloat16, torch.float32


def saved(folder: Path, kind: str = "qwen3", dtype: torch.dtype = BF16, **options: Any) -> str:
    tiny_model(kind, dtype=dtype).save_pretrained(folder, **options)
    return str(folder)


def held_bytes(model: nn.Module) -> int:
    """Of all parameters' memory; what only looks like a whole tensor counts as what it is."""
    storages = {p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}
    return sum(storages.values())


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return found


def about(model: PreTrainedModel) -> dict[str, tuple[Any, ...]]:
    return {name: (p.shape, p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt_neox", "cohere", "granite"])
@pytest.mark.parametrize(("stored", "dtype"), [(BF16, FP32), (FP32, FP32), (BF16, BF16)], ids=str)
def test_a_deferred_model_is_the_loaded_one_without_its_memory(
    tmp_path: Path, kind: str, stored: torch.dtype, dtype: torch.dtype
) -> None:
    path = saved(tmp_path, kind, stored, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    whole, model = load_model(path, dtype=dtype), load_model(path, dtype=dtype, in_files=True)
    assert deferred(model)
    assert not deferred(whole)
    assert about(model) == about(whole)
    assert model.config.to_dict() == whole.config.to_dict()
    assert model.generation_config.to_dict() == whole.generation_config.to_dict()
    assert not model.training
    buffers, expected = dict(model.named_buffers()), dict(whole.named_buffers())
    assert buffers.keys() == expected.keys()
    assert expected
    for name, buffer in buffers.items():
        assert buffer.dtype == expected[name].dtype
        assert torch.equal(buffer, expected[name])
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (whole.get_input_embeddings().weight is whole.get_output_embeddings().weight)
    assert weights_digest(model) == weights_digest(whole)
    assert held_bytes(model) <= 4 * len(about(model))
    with runnable(model):
        assert torch.equal(logits(model), logits(whole))
    assert held_bytes(model) <= 4 * len(about(model))
    assert all(parameter.isnan().all() for parameter in model.parameters())
    fill(model)
    assert about(model) == about(whole)
    for (_, one), (_, other) in zip(model.named_parameters(), whole.named_parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_deferred_model_s_weights_are_those_pages_of_the_file_that_all_processes_share(tmp_path: Path) -> None:
    model = load_model(saved(tmp_path), dtype=FP32, in_files=True)
    mapped = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(str(tmp_path / "model.safetensors")):
            first, last = (int(part, 16) for part in line.split()[0].split("-"))
            mapped.append(range(first, last))
    sources = [values(parameter) for parameter in model.parameters()]
    assert all(any(source.data_ptr() in pages for pages in mapped) for source in sources)
    assert all(source.dtype == BF16 for source in sources)


@pytest.mark.parametrize("size", ["1GB", "20KB"])
def test_a_hub_id_is_deferred_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    place = tmp_path / "models--some--model"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("abc123")
    path = saved(place / "snapshots" / "abc123", max_shard_size=size)
    model = load_model("some/model", in_files=True)
    assert deferred(model)
    assert weights_digest(model) == weights_digest(load_model(path))


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_while_it_runs_one_layer_is_there_and_what_is_around_the_layers(tmp_path: Path, kind: str) -> None:
    tiny_model(kind, layers=5, dtype=BF16).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), in_files=True)
    layers = decoder_layers(model)
    layer = sum(4 * parameter.numel() for parameter in layers[0].parameters())
    around = sum(4 * p.numel() for p in model.parameters()) - len(layers) * layer
    seen: list[int] = []
    for each in layers:
        each.register_forward_hook(lambda *_: seen.append(held_bytes(model)))
    with runnable(model):
        logits(model)
        before = held_bytes(model)
    names = len(about(model))
    assert len(seen) == len(layers)
    assert all(around + layer <= size <= around + layer + 4 * names for size in seen)
    assert around <= before <= around + 4 * names


def test_a_layer_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    model = load_model(saved(tmp_path), in_files=True)

    def fail(*_: Any) -> None:
        raise RuntimeError("in a layer")

    handle = decoder_layers(model)[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in a layer"), runnable(model):
        logits(model)
    handle.remove()
    assert held_bytes(model) <= 4 * len(about(model))
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in decoder_layers(model))


def test_a_weight_that_a_layer_shares_with_what_is_around_stays_there(tmp_path: Path) -> None:
    whole, model = tiny_model("llama"), tiny_model("llama")
    for each in (whole, model):
        decoder_layers(each)[1].input_layernorm.weight = each.model.norm.weight
        decoder_layers(each)[1].post_attention_layernorm.weight = decoder_layers(each)[0].input_layernorm.weight
    defer(model, torch.device("cpu"))
    with runnable(model):
        assert torch.equal(logits(model), logits(whole))


@pytest.mark.parametrize("kind", ["qwen3", "llama", "cohere", "granite"])
def test_what_is_tried_out_before_sharding_finds_the_same(tmp_path: Path, kind: str) -> None:
    path = saved(tmp_path, kind)
    whole, model = load_model(path), load_model(path, in_files=True)
    with runnable(model):
        view = HeadView(model)
        packs = packs_exactly(view)
    expected = HeadView(whole)
    assert (view.exact, view._tail) == (expected.exact, expected._tail)
    assert packs == packs_exactly(expected)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_adapters_begin_as_those_of_a_loaded_model(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    path = saved(tmp_path, kind)
    lora = LoraConfig(rank=4, alpha=8.0)
    whole, model = load_model(path, dtype=dtype), load_model(path, dtype=dtype, in_files=True)
    for each in (whole, model):
        add_adapters(each, lora, seed=3)
    assert about(model) == about(whole)
    adapters = {name: p for name, p in model.named_parameters() if ".lora_" in name}
    assert len(adapters) >= 8
    assert all(torch.equal(p, whole.get_parameter(name)) for name, p in adapters.items())
    assert weights_digest(model) == weights_digest(whole)
    with runnable(model):
        assert torch.equal(logits(model), logits(whole))
    fill(model)
    assert all(torch.equal(p, whole.get_parameter(name)) for name, p in model.named_parameters())


# --- what is loaded as a whole ---------------------------------------------------------------------------------------


def mixed(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def pickled(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("change", [mixed, pickled])
def test_files_that_cannot_be_taken_as_they_are_are_loaded_whole(tmp_path: Path, change: Any) -> None:
    path = saved(tmp_path)
    change(tmp_path)
    whole, model = load_model(path), load_model(path, in_files=True)
    assert not deferred(model)
    assert weights_digest(model) == weights_digest(whole)


def test_weights_that_would_lose_digits_are_loaded_whole(tmp_path: Path) -> None:
    assert not deferred(load_model(saved(tmp_path, dtype=FP32), dtype=BF16, in_files=True))


def test_a_model_whose_buffers_follow_the_dtype_of_its_weights_is_loaded_whole(tmp_path: Path) -> None:
    """Gemma 3 multiplies embeddings by sqrt(hidden), in the dtype in which it was loaded."""
    config = Gemma3TextConfig(
        vocab_size=64, hidden_size=40, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, pad_token_id=0, eos_token_id=1, bos_token_id=2,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        Gemma3ForCausalLM(config).to(BF16).save_pretrained(tmp_path)
    whole, model = load_model(str(tmp_path)), load_model(str(tmp_path), in_files=True)
    assert not deferred(model)
    assert torch.equal(logits(model), logits(whole))
    as_stored = load_model(str(tmp_path), dtype=BF16, in_files=True)
    assert deferred(as_stored)


def missing(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def misshapen(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))


def damaged(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])


def gone(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("change", [missing, misshapen, damaged, gone])
def test_what_is_wrong_with_a_checkpoint_is_said_in_the_same_line(tmp_path: Path, change: Any) -> None:
    path = saved(tmp_path)
    change(tmp_path)
    with pytest.raises(ModelError) as expected:
        load_model(path)
    with pytest.raises(ModelError) as found:
        load_model(path, in_files=True)
    assert str(found.value) == str(expected.value)


def test_more_than_the_architecture_has_is_passed_over(tmp_path: Path) -> None:
    path = saved(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file(tensors | {"more": torch.zeros(3, dtype=BF16)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert weights_digest(load_model(path, in_files=True)) == weights_digest(load_model(path))


# --- on ranks --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = program("rank_loading", str(tmp_path_factory.mktemp("loading")), limit_s=120)
    return found


@pytest.mark.parametrize("case", CASES)
def test_ranks_deal_out_what_they_would_have_loaded_and_hold_no_more_than_a_share_and_a_layer(
    ranks: dict[str, dict[str, Any]], case: str
) -> None:
    found = ranks[case]
    assert found["equal"]
    assert found["packs"]
    assert all(share <= peak <= share + found["layer"] + found["around"] for peak, share in found["peaks"])
    assert all(peak < 0.75 * found["whole"] for peak, _ in found["peaks"])
