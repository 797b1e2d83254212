"""Laws of ``scope_opd.models``: loading refuses with a remedy, heads are exact, chunks and batches change nothing."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from scope_opd.errors import ModelError
from scope_opd.models.batching import microbatches, pad_right, padding_share, response_positions
from scope_opd.models.head import HeadView, map_logits, response_logprobs
from scope_opd.models.loading import (
    context_length,
    end_token_ids,
    load_model,
    load_tokenizer,
    resolve_device,
    resolve_path,
    vocabulary_mismatch,
)
from tiny import END_ID, EOS_ID, KINDS, save_pair, tiny_model, tiny_tokenizer

ALL_KINDS = (*KINDS, "cohere", "granite")


def ragged(vocabulary: int = 320, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Right-padded ids [5, 17], their mask, and positions of responses that start at column 3."""
    draw = random.Random(seed)
    lengths = [17, 9, 4, 12, 17]
    ids, mask = pad_right([[draw.randrange(3, vocabulary) for _ in range(length)] for length in lengths])
    return ids, mask, response_positions([3] * 5, [length - 3 for length in lengths])


def naive(
    model: nn.Module, ids: Tensor, mask: Tensor | None, positions: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies from the model's own full forward."""
    logits = model(input_ids=ids, attention_mask=mask).logits
    logprobs = (logits / temperature).log_softmax(-1)[positions[:, 0], positions[:, 1] - 1]
    targets = ids[positions[:, 0], positions[:, 1]]
    return logprobs.gather(-1, targets[:, None])[:, 0], -(logprobs.exp() * logprobs).sum(-1)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_head_view_is_exact_for_known_architectures(kind: str) -> None:
    assert HeadView(tiny_model(kind)).exact


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("with_mask", [True, False])
def test_response_logprobs_equal_the_models_own_forward(kind: str, with_mask: bool) -> None:
    model = tiny_model(kind)
    ids, mask, positions = ragged()
    with torch.no_grad():
        expected, entropy = naive(model, ids, mask, positions, 0.6)
        scores = response_logprobs(model, ids, mask if with_mask else None, positions, 0.6, extra_temperature=1.3)
        extra, _ = naive(model, ids, mask, positions, 1.3)
    assert scores.entropy is not None
    assert scores.extra_logprobs is not None
    torch.testing.assert_close(scores.logprobs, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(scores.entropy, entropy, atol=2e-5, rtol=0)
    torch.testing.assert_close(scores.extra_logprobs, extra, atol=2e-5, rtol=0)


def test_an_unknown_head_falls_back_to_the_models_own_forward() -> None:
    model = tiny_model("llama")
    own_forward = model.forward

    def forward(*args: object, **kwargs: object) -> object:
        output = own_forward(*args, **kwargs)
        output.logits = output.logits - 0.05 * output.logits**2
        return output

    model.forward = forward
    view = HeadView(model)
    assert not view.exact
    ids, mask, positions = ragged()
    with torch.no_grad():
        expected, _ = naive(model, ids, mask, positions, 0.7)
        scores = response_logprobs(view, ids, mask, positions, 0.7, chunk_tokens=4)
    torch.testing.assert_close(scores.logprobs, expected, atol=2e-5, rtol=0)


def test_an_unknown_soft_cap_is_noticed_even_where_logits_are_small() -> None:
    model = tiny_model("llama", initializer_range=0.02)
    own_forward = model.forward

    def forward(*args: object, **kwargs: object) -> object:
        output = own_forward(*args, **kwargs)
        output.logits = 30.0 * torch.tanh(output.logits / 30.0)
        return output

    assert HeadView(model).exact
    model.forward = forward
    assert not HeadView(model).exact


def test_a_head_with_bias_is_exact() -> None:
    model = tiny_model("llama")
    head = nn.Linear(32, 320)
    nn.init.normal_(head.bias)
    model.set_output_embeddings(head)
    assert HeadView(model).exact


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_equals_naive_autograd_in_float64_whatever_the_chunk(kind: str) -> None:
    model = tiny_model(kind, dtype=torch.float64)
    ids, _, positions = ragged()
    weights = torch.randn(len(positions), generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def gradient(loss: Tensor) -> Tensor:
        parameters = list(model.parameters())
        return torch.cat([piece.flatten() for piece in torch.autograd.grad(loss, parameters)])

    # Without a mask: eager attention of a float64 Gemma 2 gives NaN in rows that a mask hides altogether.
    expected = gradient((naive(model, ids, None, positions, 0.6)[0] * weights).sum())
    view = HeadView(model)
    for chunk in (1, 7, None):
        scores = response_logprobs(view, ids, None, positions, 0.6, chunk_tokens=chunk, extra_temperature=1.0)
        assert scores.logprobs.dtype == torch.float64
        assert scores.entropy is not None
        assert not scores.entropy.requires_grad
        assert scores.extra_logprobs is not None
        assert not scores.extra_logprobs.requires_grad
        found = gradient((scores.logprobs * weights).sum())
        assert (found - expected).norm() <= 1e-10 * expected.norm()


def test_no_full_vocabulary_tensor_outlives_its_chunk() -> None:
    model = tiny_model("llama")
    view = HeadView(model)
    ids, mask, positions = ragged()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        if tensor.shape[-1:] == (320,) and tensor.dim() == 2 and tensor.shape[0] < 320:
            kept.append(tensor.shape[0])
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        response_logprobs(view, ids, mask, positions, 0.6, chunk_tokens=8)
        assert kept == []
        response_logprobs(view, ids, mask, positions, 0.6)
    assert kept != []


def test_chunks_do_not_change_scores() -> None:
    model = tiny_model("qwen3")
    ids, mask, positions = ragged()
    with torch.no_grad():
        whole = response_logprobs(model, ids, mask, positions, 0.6)
        for chunk in (1, 5, 100):
            part = response_logprobs(model, ids, mask, positions, 0.6, chunk_tokens=chunk)
            torch.testing.assert_close(part.logprobs, whole.logprobs, atol=1e-5, rtol=0)
            assert part.entropy is not None
            torch.testing.assert_close(part.entropy, whole.entropy, atol=1e-5, rtol=0)


def test_exact_kl_by_chunks_equals_the_one_from_full_logits() -> None:
    student, teacher = HeadView(tiny_model("qwen3", seed=1)), HeadView(tiny_model("llama", seed=2))
    ids, mask, positions = ragged()

    def kl(ours: Tensor, theirs: Tensor) -> tuple[Tensor, ...]:
        p, q = ours.log_softmax(-1), teacher.project(theirs).log_softmax(-1)
        return ((p.exp() * (p - q)).sum(-1),)

    with torch.no_grad():
        theirs = teacher.response_hidden(ids, mask, positions)
    (chunked,) = map_logits(student, student.response_hidden(ids, mask, positions), kl, theirs, chunk_tokens=6)
    p, q = (v.project(v.response_hidden(ids, mask, positions)).log_softmax(-1) for v in (student, teacher))
    torch.testing.assert_close(chunked, (p.exp() * (p - q)).sum(-1), atol=1e-5, rtol=1e-5)
    chunked.sum().backward()


def test_an_empty_batch_of_positions_gives_empty_scores_with_gradient() -> None:
    ids, mask, positions = ragged()
    scores = response_logprobs(tiny_model("qwen3"), ids, mask, positions[:0], 0.6)
    assert scores.logprobs.shape == (0,)
    scores.logprobs.sum().backward()


@pytest.mark.parametrize(("low", "high"), [(27, 63), (40, 85), (200, 12288)])
def test_padding_stays_under_five_percent_on_realistic_lengths(low: int, high: int) -> None:
    draw = random.Random(low)
    lengths = [draw.randint(low, high) for _ in range(128)]
    batches = microbatches(lengths, 16384)
    assert sorted(index for batch in batches for index in batch) == list(range(128))
    assert padding_share(lengths, batches) < 0.05
    for batch in batches:
        longest = max(lengths[index] for index in batch)
        assert longest * len(batch) <= 16384 or len(batch) == 1
        assert 1 - sum(lengths[index] for index in batch) / (longest * len(batch)) <= 0.05 + 1e-12


def test_batches_depend_on_lengths_alone_and_take_the_longest_first() -> None:
    assert microbatches([3, 9, 9, 3, 20], 18) == [[4], [1, 2], [0, 3]]
    assert microbatches([], 10) == []
    assert microbatches([0, 0], 10) == [[0, 1]]


@pytest.mark.parametrize(("lengths", "tokens", "padding"), [([1], 0, 0.05), ([1], 5, 1.0), ([-1], 5, 0.05)])
def test_impossible_batches_are_refused(lengths: list[int], tokens: int, padding: float) -> None:
    with pytest.raises(ValueError, match="expected"):
        microbatches(lengths, tokens, padding)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pair(tmp_path_factory.mktemp("models") / "whole", "llama")


def test_a_saved_pair_loads_in_eval_mode_and_the_dtype_asked_for(
    folder: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = load_model(str(folder), dtype=torch.bfloat16)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert load_tokenizer(str(folder)).get_vocab() == tiny_tokenizer().get_vocab()
    captured = capfd.readouterr()
    assert captured.out == ""
    assert captured.err == ""


def _edit(folder: Path, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def _damage(case: str, folder: Path) -> None:
    weights = folder / "model.safetensors"
    match case:
        case "no config.json":
            (folder / "config.json").unlink()
        case "readable JSON":
            (folder / "config.json").write_text("{")
        case "no model_type":
            (folder / "config.json").write_text("{}")
        case "no weights":
            weights.unlink()
        case "damaged":
            weights.write_bytes(weights.read_bytes()[:5000])
        case "header":
            weights.write_bytes(b"")
        case "wobble":
            _edit(folder, model_type="wobble")
        case "trust_remote_code":
            _edit(folder, model_type="wobble", auto_map={"AutoModelForCausalLM": "code.Model"})
        case "lacks 9 weights":
            _edit(folder, num_hidden_layers=3)
        case "belong together":
            _edit(folder, hidden_size=64)
        case "adapter":
            (folder / "config.json").rename(folder / "adapter_config.json")
        case "lacks model-00002":
            index = {"weight_map": {"a": "model.safetensors", "b": "model-00002.safetensors"}}
            (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        case _:
            raise AssertionError(case)


@pytest.mark.parametrize(
    "case",
    [
        "no config.json", "readable JSON", "no model_type", "no weights", "damaged", "header", "wobble",
        "trust_remote_code", "lacks 9 weights", "belong together", "adapter", "lacks model-00002",
    ],
)  # fmt: skip
def test_a_damaged_folder_is_refused_with_a_remedy(case: str, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    _damage(case, copy)
    with pytest.raises(ModelError) as caught:
        load_model(str(copy))
    assert case in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.expected
    assert caught.value.remedy


@pytest.mark.parametrize("path", ["./absent", "/no/such/folder", "~/no-such-folder-here", "a/b/c", "zoo:panda", ""])
def test_what_looks_like_a_folder_is_never_looked_up_on_the_hub(path: str) -> None:
    with pytest.raises(ModelError):
        resolve_path(path)


def test_a_missing_folder_beside_an_existing_parent_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert resolve_path("models/absent") == "models/absent"
    (tmp_path / "models").mkdir()
    with pytest.raises(ModelError, match="no such folder"):
        resolve_path("models/absent")
    (tmp_path / "models" / "file").write_text("")
    with pytest.raises(ModelError, match="is a file"):
        resolve_path("models/file")


def test_an_unknown_attention_implementation_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match="attn_implementation"):
        load_model(str(folder), attn_implementation="wobble")


def test_a_folder_without_tokenizer_is_refused_rather_than_given_an_empty_one(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    (copy / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match="tokenizer"):
        load_tokenizer(str(copy))
    (copy / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="no tokenizer"):
        load_tokenizer(str(copy))


def test_end_tokens_come_from_model_tokenizer_and_config() -> None:
    model, tokenizer = tiny_model("llama"), tiny_tokenizer()
    assert end_token_ids(model, tokenizer) == (EOS_ID,)
    assert end_token_ids(model, tokenizer, [END_ID, EOS_ID]) == (EOS_ID, END_ID)
    model.generation_config.eos_token_id = [7, 5]
    assert end_token_ids(model, tokenizer) == (EOS_ID, 5, 7)
    with pytest.raises(ModelError, match="320"):
        end_token_ids(model, tokenizer, [320])
    bare = tiny_model("llama", eos_token_id=None)
    with pytest.raises(ModelError, match="end token"):
        end_token_ids(bare, None)


def test_the_context_is_read_from_the_config() -> None:
    assert context_length(tiny_model("gpt_neox", context=77).config) == 77
    assert context_length(object()) is None


def test_devices_that_are_not_there_are_refused() -> None:
    assert resolve_device("cpu").type == "cpu"
    for name in ("wobble", "cuda:99"):
        with pytest.raises(ModelError, match="device"):
            resolve_device(name)


def test_vocabularies_are_compared_id_by_id() -> None:
    student, teacher = tiny_tokenizer(), tiny_tokenizer()
    assert vocabulary_mismatch(student, teacher) == []
    teacher.add_tokens(["<extra>"])
    assert vocabulary_mismatch(student, teacher) == [(320, None, "<extra>")]
