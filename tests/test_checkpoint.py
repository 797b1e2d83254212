"""Checkpoints are whole or not there; the newest sound one is found, whatever was done to the others."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scope_opd.config import TrainConfig
from scope_opd.errors import RunFailed
from scope_opd.ranks import Ranks
from scope_opd.train.checkpoint import Checkpoint, Checkpoints, list_checkpoints
from scope_opd.train.optim import Optimizer
from scope_opd.train.shards import Shards, rng_state, trained_weights
from tiny import tiny_model
from train_kit import files_limited_to

PARTS = ("__0_0.distcp", ".metadata", "trainer.json")


def store(root: Path, model: Any, *, keep_last: int = 2, **config: Any) -> Checkpoints:
    return Checkpoints(root, Shards(Ranks(), model, Optimizer(model, TrainConfig(**config))), keep_last=keep_last)


def save(root: Path, step: int, model: Any, keep_last: int = 2, keep: tuple[int, ...] = ()) -> Path:
    path = write(store(root, model, keep_last=keep_last), step, keep)
    assert path is not None
    return path


def write(kept: Checkpoints, step: int, keep: tuple[int, ...] = ()) -> Path | None:
    kept.save(step, {"step": step, "note": "x" * 100}, rng_state(), keep=keep)
    return kept.settle(wait=True)


def newest_sound(root: Path, report: Callable[[str], Any]) -> Checkpoint | None:
    return store(root, tiny_model(layers=1)).newest_sound(report)


def one_update(model: Any, optimizer: Optimizer, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
    optimizer.step(1e-2)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_weights_and_states_come_back_bit_for_bit_into_the_same_tensors(
    kind: str, dtype: torch.dtype, optimizer: str, tmp_path: Path
) -> None:
    model, other = tiny_model(kind, seed=1, dtype=dtype), tiny_model(kind, seed=2, dtype=dtype)
    one, two = store(tmp_path, model, optimizer=optimizer), store(tmp_path, other, optimizer=optimizer)
    one_update(model, one.shards.optimizer, 0)
    random = torch.random.get_rng_state()
    one.save(3, {"step": 3}, rng_state())
    assert one.settle(wait=True) == tmp_path / "step-000003"
    torch.rand(3)
    found = two.newest_sound(pytest.fail)
    assert found is not None
    assert (found.step, found.world, found.trainer) == (3, 1, {"step": 3})
    places = [parameter.data_ptr() for parameter in other.parameters()]
    two.load(found)
    assert [parameter.data_ptr() for parameter in other.parameters()] == places
    assert torch.equal(torch.random.get_rng_state(), random)
    for step in range(3):
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
        states = one.shards.optimizer.states(), two.shards.optimizer.states()
        assert states[0].keys() == states[1].keys() != set()
        assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
        one_update(model, one.shards.optimizer, step)
        one_update(other, two.shards.optimizer, step)
    tied = {"qwen3": True, "llama": False}[kind]
    assert ("lm_head.weight" not in trained_weights(model)) == tied


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, may_write = tiny_model(seed=1), threading.Event()
    kept, write = store(tmp_path, model), Shards.write

    def slow(self: Shards) -> Any:
        assert may_write.wait(20)
        return write(self)

    monkeypatch.setattr(Shards, "write", slow)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    kept.save(1, {}, rng_state())
    assert kept.settle(wait=False) is None
    one_update(model, kept.shards.optimizer, 0)  # what is written is what was there when it was asked for
    may_write.set()
    assert kept.settle(wait=True) == tmp_path / "step-000001"
    assert kept.settle(wait=True) is None
    other = tiny_model(seed=2)
    again = store(tmp_path, other)
    found = again.newest_sound(pytest.fail)
    assert found is not None
    again.load(found)
    assert all(torch.equal(before[name], weight) for name, weight in other.named_parameters())
    assert again.shards.optimizer.states() == {}


def test_frozen_weights_are_not_saved_and_stay_what_they_are(tmp_path: Path) -> None:
    def half_frozen(seed: int) -> Any:
        model = tiny_model("llama", seed=seed)
        for parameter in model.model.layers[0].parameters():
            parameter.requires_grad_(False)
        return model

    save(tmp_path, 1, half_frozen(1))
    other = half_frozen(2)
    before = {name: weight.detach().clone() for name, weight in other.named_parameters()}
    kept = store(tmp_path, other)
    found = kept.newest_sound(pytest.fail)
    assert found is not None
    kept.load(found)
    for name, weight in other.named_parameters():
        assert torch.equal(weight, before[name]) != weight.requires_grad or "norm" in name


def test_weights_and_states_of_another_kind_are_refused(tmp_path: Path) -> None:
    model = tiny_model("qwen3")
    kept = store(tmp_path, model, optimizer="adamw")
    one_update(model, kept.shards.optimizer, 0)
    kept.save(1, {}, rng_state())
    kept.settle(wait=True)
    found = kept.newest_sound(pytest.fail)
    assert found is not None
    with pytest.raises(ValueError, match="differ by name"):
        store(tmp_path, tiny_model("llama")).load(found)
    with pytest.raises(ValueError, match="expected torch"):
        store(tmp_path, tiny_model("qwen3", hidden_size=16)).load(found)
    with pytest.raises(ValueError, match="is not one of this optimiser's"):
        store(tmp_path, tiny_model("qwen3"), optimizer="muon").load(found)


def test_only_the_last_few_are_kept(tmp_path: Path) -> None:
    model = tiny_model()
    for step in (1, 2, 30, 4_000_000):
        save(tmp_path, step, model)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [30, 4_000_000]


def test_the_best_is_kept_besides_the_last_few(tmp_path: Path) -> None:
    model = tiny_model(layers=1)
    for step in range(1, 6):
        save(tmp_path, step, model, keep=(2,) if step > 1 else ())
    assert [step for step, _ in list_checkpoints(tmp_path)] == [2, 4, 5]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    **{f"{part} cut": (lambda c, part=part: truncate(c / part), f"{part} has") for part in PARTS},
    **{f"{part} altered": (lambda c, part=part: flip(c / part), f"{part} does not have the sha256") for part in PARTS},
    **{f"{part} gone": (lambda c, part=part: (c / part).unlink(), f"{part} is missing") for part in PARTS},
    "no manifest": (lambda c: (c / "manifest.json").unlink(), "manifest.json is missing"),
    "manifest empty": (lambda c: (c / "manifest.json").write_text(""), "JSONDecodeError"),
    "manifest of another kind": (lambda c: (c / "manifest.json").write_text("[]"), "TypeError"),
    "manifest without a part": (
        lambda c: (c / "manifest.json").write_text('{"step": 2, "world": 1, "files": {}}'),
        "does not list .metadata",
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_newest_is_reported_and_the_one_before_used(damage: str, tmp_path: Path) -> None:
    model = tiny_model(layers=1, hidden_size=8)
    save(tmp_path, 1, model)
    newest = save(tmp_path, 2, model)
    harm, expected = DAMAGE[damage]
    harm(newest)
    reports: list[str] = []
    found = newest_sound(tmp_path, reports.append)
    assert found is not None
    assert found.step == 1
    assert len(reports) == 1
    assert expected in reports[0]
    assert "step-000002 is damaged" in reports[0]
    # A later save must not count the damaged one among those kept.
    save(tmp_path, 3, model, keep_last=2)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [1, 3]


def test_all_damaged_is_none_at_all_and_nothing_is_touched(tmp_path: Path) -> None:
    (tmp_path / ".writing-step-000009").mkdir()
    flip(save(tmp_path, 1, tiny_model(layers=1)) / PARTS[0])
    reports: list[str] = []
    assert newest_sound(tmp_path, reports.append) is None
    assert len(reports) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".writing-step-000009", "step-000001"]
    assert newest_sound(tmp_path / "nowhere", pytest.fail) is None


def test_what_was_half_written_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".writing-step-000009").mkdir()
    (tmp_path / ".writing-step-000009" / PARTS[0]).write_bytes(b"half")
    save(tmp_path, 1, tiny_model(layers=1))
    assert newest_sound(tmp_path, pytest.fail) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize("size", [0, 1_000, 60_000])
def test_a_full_disk_fails_with_one_line_and_leaves_the_older_one_intact(size: int, tmp_path: Path) -> None:
    model = tiny_model(layers=1, hidden_size=16)  # about 40 kB of weights, three times that with states
    save(tmp_path, 1, model)
    kept = store(tmp_path, model, keep_last=1)
    one_update(model, kept.shards.optimizer, 0)
    with files_limited_to(size), pytest.raises(RunFailed, match="step-000002 could not be written") as failure:
        write(kept, 2)
    assert "\n" not in str(failure.value)
    assert failure.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    found = newest_sound(tmp_path, pytest.fail)
    assert found is not None
    assert found.step == 1
    assert write(kept, 2) is not None  # there is room again


def test_the_manifest_lists_every_part(tmp_path: Path) -> None:
    path = save(tmp_path, 5, tiny_model(layers=1))
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"].keys() == {item.name for item in path.iterdir()} - {"manifest.json"}
