"""Adapters: only they train, merged they are the same model, and everything that follows the student follows them."""

from __future__ import annotations

import builtins
import json
import random
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from transformers import AutoModelForCausalLM, Qwen3Config

from scope_opd.cli import checks
from scope_opd.cli.export_command import export
from scope_opd.config import LoraConfig, validate_config
from scope_opd.errors import ConfigError, ModelError
from scope_opd.models.adapters import adapted, add_adapters, plain_state_dict, save_adapter
from scope_opd.models.batching import pad_right
from scope_opd.models.checkpointing import set_checkpointing
from scope_opd.models.fingerprint import weights_digest
from scope_opd.models.footprint import run_update, shape_of, update_moments
from scope_opd.models.head import HeadView, response_logprobs
from scope_opd.models.loading import load_model, load_tokenizer
from scope_opd.models.memory import Student
from scope_opd.models.watch import Watch
from scope_opd.rollout.weight_sync.carrier import checkpoint_tensors
from scope_opd.rollout.weight_sync.files import Files
from scope_opd.train import train
from scope_opd.train.optim import Optimizer
from scope_opd.zoo.task import demonstration, load_rows
from tiny import save_pair, tiny_model
from train_kit import lasting, make_config, make_engines, same_weights, weights_of

LORA = LoraConfig(rank=4, alpha=8.0)


def trained_adapters(kind: str = "qwen3", lora: LoraConfig = LORA, **options: Any) -> Any:
    """A model whose adapters do something: B is not zero."""
    model = tiny_model(kind, **options)
    add_adapters(model, lora)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def logprobs(model: Any) -> Tensor:
    ids = torch.randint(3, 300, (2, 12), generator=torch.Generator().manual_seed(0))
    positions = torch.tensor([[row, column] for row in range(2) for column in range(1, 12)])
    return response_logprobs(model, ids, None, positions, 0.7).logprobs


def adapters_of(model: Any) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if "lora_" in name}


class TestModel:
    @pytest.mark.parametrize("kind", ["qwen3", "llama", "gpt_neox", "gemma2"])
    def test_merged_weights_compute_what_the_adapted_model_computes(self, kind: str) -> None:
        model, plain = trained_adapters(kind), tiny_model(kind)
        before = weights_of(model)
        state = plain_state_dict(model)
        assert state.keys() == plain.state_dict().keys()
        plain.load_state_dict(state)
        assert (logprobs(model) - logprobs(plain)).abs().max() < 1e-5
        assert (logprobs(model) - logprobs(tiny_model(kind))).abs().max() > 1e-3
        assert same_weights(weights_of(model), before)

    def test_an_adapted_model_keeps_its_class_and_begins_as_its_base(self) -> None:
        model, base = tiny_model(), tiny_model()
        add_adapters(model, LORA)
        assert type(model) is type(base)
        assert adapted(model)
        assert not adapted(base)
        assert torch.equal(logprobs(model), logprobs(base))
        assert not any(module.training for module in model.modules())

    def test_rank_0_changes_nothing(self) -> None:
        model = tiny_model()
        add_adapters(model, LoraConfig())
        assert not adapted(model)
        assert all(parameter.requires_grad for parameter in model.parameters())

    @pytest.mark.parametrize("checkpointing", ["off", "full", "offload"])
    def test_only_adapters_have_gradients_and_only_they_are_optimised(self, checkpointing: Any) -> None:
        model = trained_adapters()
        set_checkpointing(model, checkpointing)
        logprobs(model).sum().backward()
        with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
        assert with_gradient == adapters_of(model).keys()
        assert all(parameter.grad.abs().max() > 0 for parameter in adapters_of(model).values())  # type: ignore[union-attr]
        settings = validate_config({}).train
        assert {id(p) for p in Optimizer(model, settings).parameters} == {id(p) for p in adapters_of(model).values()}

    def test_adapters_are_drawn_from_the_seed_alone(self) -> None:
        found = []
        for noise, seed in ((1, 7), (2, 7), (1, 8)):
            torch.manual_seed(noise)
            model = tiny_model()
            state = torch.get_rng_state()
            add_adapters(model, LORA, seed=seed)
            assert torch.equal(torch.get_rng_state(), state)
            found.append(weights_of(model))
        assert same_weights(found[0], found[1])
        assert not same_weights(found[0], found[2])

    def test_adapters_of_a_bfloat16_model_are_float32(self) -> None:
        model = trained_adapters(dtype=torch.bfloat16)
        assert {parameter.dtype for parameter in adapters_of(model).values()} == {torch.float32}
        assert {tensor.dtype for tensor in plain_state_dict(model).values()} == {torch.bfloat16}
        assert logprobs(model).isfinite().all()

    def test_an_adapted_head_is_not_taken_tile_by_tile(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = trained_adapters("llama", LoraConfig(rank=2, target_modules=["q_proj", "lm_head"]))
        view = HeadView(model)
        assert view.exact
        assert not view.plain
        monkeypatch.setattr("scope_opd.models.head.KEPT_LOGITS", 1)
        plain = tiny_model("llama")
        plain.load_state_dict(plain_state_dict(model))
        assert (logprobs(view) - logprobs(plain)).abs().max() < 1e-5
        assert HeadView(trained_adapters("llama")).plain

    @pytest.mark.parametrize(
        ("kind", "names", "message"),
        [
            ("qwen3", ["q_proj", "nothing"], "'nothing' is no linear layer of the model; expected among .*q_proj"),
            ("qwen3", ["embed_tokens"], "'embed_tokens' is no linear layer"),
            ("qwen3", ["mlp"], "'mlp' is no linear layer"),
            ("qwen3", ["lm_head"], "'lm_head' is the head, which is tied to the embedding"),
        ],
    )
    def test_what_cannot_be_adapted_is_refused(self, kind: str, names: list[str], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            add_adapters(tiny_model(kind), LoraConfig(rank=2, target_modules=names))

    def test_without_peft_it_is_one_line(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real = builtins.__import__

        def missing(name: str, *args: Any) -> Any:
            if name.startswith("peft"):
                raise ImportError("No module named 'peft'")
            return real(name, *args)

        monkeypatch.setattr(builtins, "__import__", missing)
        with pytest.raises(ConfigError, match=r"model\.lora\.rank = 4.*scope-opd\[lora\]"):
            add_adapters(tiny_model(), LORA)


class TestWhatLeavesTheTrainer:
    @pytest.mark.parametrize("kind", ["qwen3", "llama"])
    def test_servers_get_merged_weights_under_plain_names(self, kind: str, tmp_path: Path) -> None:
        model = trained_adapters(kind)
        plain = tiny_model(kind)
        plain.load_state_dict(plain_state_dict(model))
        expected = checkpoint_tensors(plain)
        assert same_weights(checkpoint_tensors(model), expected)
        carrier = Files(tmp_path / "sync", model, dtype=torch.bfloat16)
        carrier.prepare(1, "a/1")
        written = load_file(tmp_path / "sync" / "v1" / "model.safetensors")
        assert same_weights(written, {name: tensor.bfloat16() for name, tensor in expected.items()})
        assert "lora" not in (tmp_path / "sync" / "v1" / "config.json").read_text()
        carrier.close()

    def test_an_adapter_by_itself_is_loaded_by_peft(self, tmp_path: Path) -> None:
        import peft

        model = trained_adapters()
        save_adapter(model, tmp_path, "somewhere/base")
        about = json.loads((tmp_path / "adapter_config.json").read_text())
        assert (about["base_model_name_or_path"], about["r"], about["lora_alpha"]) == ("somewhere/base", 4, 8)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # of transformers, for what peft asks it
            loaded: Any = peft.PeftModel.from_pretrained(tiny_model(), str(tmp_path)).eval()
        assert torch.equal(logprobs(loaded.base_model.model), logprobs(model))


SIZES: dict[str, Any] = {
    "vocab_size": 500, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
TABLES: dict[str, Any] = {
    "model": {"lora": {"rank": 4, "alpha": 8.0}},
    "train": {"steps": 4, "lr": 5e-2},
    "run": {"export": True},
}


def test_a_few_steps_bring_a_zoo_student_closer_to_its_teacher() -> None:
    """KL(student || teacher) on held-out problems, after ten steps on others that change adapters alone."""
    student, teacher, tokenizer = load_model("zoo:student"), load_model("zoo:teacher"), load_tokenizer("zoo:student")
    add_adapters(student, LoraConfig(rank=8, alpha=16.0))
    draw = random.Random(0)

    def divergence(rows: list[dict[str, str]]) -> Tensor:
        texts = [f"{row['problem']} : {demonstration(row['problem'], draw)}" for row in rows]
        ids, mask = pad_right([tokenizer(text)["input_ids"] for text in texts])
        with torch.no_grad():
            theirs = teacher(ids).logits.log_softmax(-1)
        own = student(ids).logits.log_softmax(-1)
        return (own.exp() * (own - theirs)).sum(-1)[mask.bool()].mean()

    held_out = load_rows("heldout")[:32]
    optimizer = Optimizer(student, validate_config({}).train)
    with torch.no_grad():
        before = divergence(held_out)
    for step in range(10):
        optimizer.zero_grad()
        divergence(load_rows("train")[32 * step : 32 * step + 32]).backward()
        optimizer.step(1e-2)
    with torch.no_grad():
        after = divergence(held_out)
    assert after < 0.8 * before


class TestPlanning:
    @pytest.mark.parametrize(("dtype", "checkpointing"), [(torch.float32, "full"), (torch.bfloat16, "off")])
    def test_planned_moments_are_those_of_a_real_pass(self, dtype: torch.dtype, checkpointing: Any) -> None:
        config = Qwen3Config(**SIZES)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        add_adapters(model, LORA)
        for parameter in adapters_of(model).values():
            parameter.grad = torch.zeros_like(parameter)
        watch = Watch(model)
        run_update(HeadView(model), watch, 200, checkpointing=checkpointing)
        watch.detach()
        planned = update_moments(config, 200, dtype=dtype, checkpointing=checkpointing, lora=LORA)
        sizes = ({name: sum(parts.values()) for name, parts in of.items()} for of in (planned, watch.moments))
        assert next(sizes) == next(sizes)

    def test_gradients_and_states_are_those_of_the_adapters(self) -> None:
        config = Qwen3Config(**SIZES)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        whole = sum(parameter.numel() for parameter in model.parameters())
        add_adapters(model, LORA)
        trained = sum(parameter.numel() for parameter in adapters_of(model).values())
        student = Student(config, shape_of(config, LORA), dtype=torch.bfloat16, lora=LORA)
        assert (student.weights, student.gradients, student.states) == (
            2 * whole + 4 * trained,
            4 * trained,
            8 * trained,
        )

    def test_a_rate_for_full_fine_tuning_is_warned_of(self) -> None:
        def level(lr: float) -> str:
            return checks.learning_rate(
                validate_config({"model": {"lora": {"rank": 8}}, "train": {"lr": lr}}), 10**9
            ).level

        assert [level(lr) for lr in (2e-6, 1e-4, 5e-4, 2e-3)] == ["warn", "ok", "ok", "warn"]


class TestRun:
    def run(self, folder: Path, **changes: Any) -> Any:
        tables = {name: {**values, **changes.get(name, {})} for name, values in TABLES.items()}
        config = make_config(folder, **tables)
        engines = make_engines(config)
        result = train(config, engines, resume=folder.exists(), progress=False)
        return engines.model, result

    def test_a_run_trains_adapters_alone_and_exports_them_merged_and_by_themselves(self, tmp_path: Path) -> None:
        model, result = self.run(tmp_path / "run")
        base = tiny_model("qwen3", seed=1)
        frozen = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if not p.requires_grad}
        assert same_weights(frozen, dict(base.named_parameters()))
        assert (logprobs(model) - logprobs(base)).abs().max() > 1e-3
        exported = AutoModelForCausalLM.from_pretrained(result.export).eval()
        assert type(exported) is type(base)
        assert (logprobs(model) - logprobs(exported)).abs().max() < 1e-5
        assert sorted(path.name for path in (result.export / "adapter").iterdir()) == [
            "adapter_config.json", "adapter_model.safetensors",
        ]  # fmt: skip
        assert "low-rank adapters (rank 4, alpha 8)" in (result.export / "README.md").read_text()
        saved = FileSystemReader(result.checkpoint).read_metadata().state_dict_metadata
        assert {name for name in saved if name.startswith("weights.")} == {f"weights.{n}" for n in adapters_of(model)}

    def test_a_checkpoint_is_exported_with_its_base_and_no_other(self, tmp_path: Path) -> None:
        base = save_pair(tmp_path / "base", seed=1)
        digest = {"student": {"weights": weights_digest(tiny_model(seed=1))}}
        config = make_config(tmp_path / "run", **TABLES | {"model": {**TABLES["model"], "path": str(base)}})
        engines = make_engines(config, fingerprints=digest)
        train(config, engines, progress=False)
        assert export(tmp_path / "run", out=tmp_path / "out") == 0
        exported = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
        assert (logprobs(engines.model) - logprobs(exported)).abs().max() < 1e-5
        assert (tmp_path / "out" / "adapter" / "adapter_model.safetensors").exists()
        tiny_model(seed=2).save_pretrained(base)
        with pytest.raises(ModelError, match="holds other weights than the run's adapters were trained on"):
            export(tmp_path / "run", out=tmp_path / "again")

    def test_a_resumed_run_ends_as_one_that_was_not_cut(self, tmp_path: Path) -> None:
        whole, _ = self.run(tmp_path / "whole")
        self.run(tmp_path / "cut", train={"steps": 2})
        resumed, _ = self.run(tmp_path / "cut")
        assert same_weights(weights_of(resumed), weights_of(whole))
        rows = [
            lasting([json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()])
            for name in ("whole", "cut")
        ]
        assert rows[0] == rows[1]
