"""Laws of the zoo's models and of the build that makes them. Not covered: a full build (minutes; `scope zoo build`)."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen3ForCausalLM

from scope_opd.errors import RunFailed, RunFolderError
from scope_opd.zoo import model_path
from scope_opd.zoo.build import ModelSettings, ZooSettings, avg_percent, build, new_model, train_steps, training_batch
from scope_opd.zoo.task import MAX_RESPONSE_TOKENS, SHIPPED_ROWS, check_work, generate_rows, load_rows
from scope_opd.zoo.tokenizer import VOCABULARY_SIZE, build_tokenizer

NAMES = ("teacher", "student")
RECORD: dict[str, Any] = json.loads((model_path("teacher").parents[1] / "zoo.json").read_text(encoding="utf-8"))

TINY_MODEL = ModelSettings(hidden=16, layers=1, mlp=16, heads=2, lr=4e-3, steps=6, accept=(0, 100))
TINY = ZooSettings(
    teacher=TINY_MODEL,
    student=ModelSettings(hidden=8, layers=1, mlp=8, heads=2, lr=4e-3, steps=6, accept=(0, 100), target=26),
    batch_size=4,
    n_min=2,
    n_max=3,
    short_n=(2, 2),
    look_every=2,
    look_problems=4,
    look_samples=1,
    rows={"train": 8, "heldout": 4},
    heldout_samples=1,
    threads=1,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_folders_load_offline_as_any_hugging_face_model(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    model = AutoModelForCausalLM.from_pretrained(model_path(name), local_files_only=True)
    tokenizer = AutoTokenizer.from_pretrained(model_path(name), local_files_only=True)
    assert isinstance(model, Qwen3ForCausalLM)
    assert model.config.tie_word_embeddings
    assert model.config.vocab_size == VOCABULARY_SIZE == len(tokenizer)
    assert sum(p.numel() for p in model.parameters()) == RECORD["models"][name]["parameters"]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id
    assert tokenizer.get_vocab() == build_tokenizer().get_vocab()
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": "-2 +15"}], tokenize=False, add_generation_prompt=True
    )
    assert rendered == "-2 +15 :"
    assert tokenizer.decode(tokenizer(rendered)["input_ids"]) == rendered


@pytest.mark.parametrize(("name", "tolerance"), [("teacher", 5.0), ("student", 10.0)])
def test_shipped_models_reach_their_recorded_avg_within_sampling_error(name: str, tolerance: float) -> None:
    model = Qwen3ForCausalLM.from_pretrained(model_path(name))
    avg = avg_percent(model, load_rows("heldout")[:48], samples=6, temperature=0.6, seed=1)
    assert avg == pytest.approx(RECORD["models"][name]["heldout"]["avg_t0.6"], abs=tolerance)


def test_greedy_decoding_by_generate_agrees_with_the_strict_check() -> None:
    model = Qwen3ForCausalLM.from_pretrained(model_path("teacher"))
    tokenizer = AutoTokenizer.from_pretrained(model_path("teacher"))
    rows = load_rows("heldout")[:16]
    inputs = tokenizer([f"{row['problem']} :" for row in rows], padding=True, return_tensors="pt")
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        do_sample=False,
        max_new_tokens=MAX_RESPONSE_TOKENS,
    )
    texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    right = [check_work(row["problem"], row["answer"], text)[0] for row, text in zip(rows, texts, strict=True)]
    assert sum(right) >= 14


def test_the_record_states_figures_inside_what_the_settings_accept() -> None:
    for name in NAMES:
        low, high = RECORD["settings"][name]["accept"]
        assert low <= RECORD["models"][name]["selection_avg_t0.6"] <= high
    assert RECORD["settings"]["rows"] == SHIPPED_ROWS


def test_the_shipped_models_stay_below_3_megabytes() -> None:
    files = [path for name in NAMES for path in model_path(name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 3_000_000


def test_a_training_batch_scores_exactly_the_response_and_its_end() -> None:
    tokenizer = build_tokenizer()
    input_ids, labels = training_batch(tokenizer, 8, 2, 6, random.Random(0))
    assert input_ids.shape == labels.shape
    for row, scored in zip(input_ids, labels, strict=True):
        text = tokenizer.decode(row, skip_special_tokens=True)
        problem, response = text.split(" : ")
        assert tokenizer.decode(scored[scored != -100]) == f"{response} {tokenizer.eos_token}"
        assert check_work(problem, response.split()[-1], response)[0]


def test_training_lowers_the_loss() -> None:
    model = new_model(TINY_MODEL, seed=0)
    settings = ModelSettings(hidden=16, layers=1, mlp=16, heads=2, lr=1e-2, steps=60, accept=(0, 100))
    losses = [loss for _, loss in train_steps(model, settings, TINY, seed=0, name="test")]
    assert losses[0] == pytest.approx(4.16, abs=0.15)  # ln 64: an untrained model knows nothing
    assert sum(losses[-5:]) / 5 < losses[0] - 1


def test_a_small_build_writes_loadable_folders_and_is_reproducible(tmp_path: Path) -> None:
    lines: list[str] = []
    record = build(tmp_path / "a", seed=3, settings=TINY, progress=lines.append)
    again = build(tmp_path / "b", seed=3, settings=TINY)
    assert json.loads((tmp_path / "a" / "zoo.json").read_text()) == json.loads(json.dumps(record))
    assert any("teacher" in line for line in lines)
    assert any("student" in line for line in lines)
    for name in NAMES:
        folder = tmp_path / "a" / "models" / name
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert sum(p.numel() for p in model.parameters()) == record["models"][name]["parameters"]
        assert len(AutoTokenizer.from_pretrained(folder)) == VOCABULARY_SIZE
        assert (folder / "README.md").is_file()
        weights = Path("models", name, "model.safetensors")
        assert (tmp_path / "a" / weights).read_bytes() == (tmp_path / "b" / weights).read_bytes()
        assert again["models"][name]["heldout"] == record["models"][name]["heldout"]
    rows = [json.loads(line) for line in (tmp_path / "a" / "data" / "train.jsonl").read_text().splitlines()]
    assert rows == generate_rows("train", 8, n_min=2, n_max=3, seed=3)


def test_a_build_refuses_a_folder_that_holds_something(tmp_path: Path) -> None:
    (tmp_path / "kept.txt").write_text("mine")
    with pytest.raises(RunFolderError, match="not empty"):
        build(tmp_path, settings=TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_model_outside_what_is_accepted_is_not_shipped(tmp_path: Path) -> None:
    hopeless = ZooSettings(**{**vars(TINY), "teacher": ModelSettings(16, 1, 16, 2, 4e-3, 2, (90, 100))})
    with pytest.raises(RunFailed, match="another seed"):
        build(tmp_path / "zoo", settings=hopeless)
    assert not (tmp_path / "zoo" / "zoo.json").exists()
