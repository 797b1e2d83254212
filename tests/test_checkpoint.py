"""Checkpoints are whole or not there; the newest sound one is found, whatever was done to the others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scope_opd.errors import RunFailed
from scope_opd.train.checkpoint import (
    list_checkpoints,
    newest_sound,
    restore_weights,
    rng_state,
    save_checkpoint,
    unique_weights,
)
from tiny import tiny_model
from train_kit import files_limited_to

PARTS = ("model.safetensors", "optimizer.pt", "trainer.json")


def save(root: Path, step: int, model: Any, keep_last: int = 2) -> Path:
    return save_checkpoint(
        root,
        step,
        model=model,
        optimizer={"optimizer": {"parts": [torch.full((100,), float(step))]}, "rng": rng_state()},
        trainer={"step": step, "note": "x" * 100},
        keep_last=keep_last,
    )


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_come_back_bit_for_bit_into_the_same_tensors(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = tiny_model(kind, seed=1, dtype=dtype)
    save(tmp_path, 3, model)
    found = newest_sound(tmp_path, pytest.fail)
    assert found is not None
    assert (found.step, found.trainer["step"]) == (3, 3)
    other = tiny_model(kind, seed=2, dtype=dtype)
    places = [parameter.data_ptr() for parameter in other.parameters()]
    restore_weights(other, found.weights)
    assert [parameter.data_ptr() for parameter in other.parameters()] == places
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    tied = {"qwen3": True, "llama": False}[kind]
    assert ("lm_head.weight" not in unique_weights(model)) == tied


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    save(tmp_path, 1, tiny_model("qwen3"))
    found = newest_sound(tmp_path, pytest.fail)
    assert found is not None
    with pytest.raises(ValueError, match="differ by name"):
        restore_weights(tiny_model("llama"), found.weights)
    with pytest.raises(ValueError, match="expected torch"):
        restore_weights(tiny_model("qwen3", hidden_size=16), found.weights)


def test_only_the_last_few_are_kept(tmp_path: Path) -> None:
    model = tiny_model()
    for step in (1, 2, 30, 4_000_000):
        save(tmp_path, step, model)
    assert [step for step, _ in list_checkpoints(tmp_path)] == [30, 4_000_000]


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
    "manifest without a part": (lambda c: (c / "manifest.json").write_text('{"step": 2, "files": {}}'), "KeyError"),
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
    flip(save(tmp_path, 1, tiny_model(layers=1)) / "model.safetensors")
    reports: list[str] = []
    assert newest_sound(tmp_path, reports.append) is None
    assert len(reports) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == [".writing-step-000009", "step-000001"]
    assert newest_sound(tmp_path / "nowhere", pytest.fail) is None


def test_what_was_half_written_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".writing-step-000009").mkdir()
    (tmp_path / ".writing-step-000009" / "model.safetensors").write_bytes(b"half")
    save(tmp_path, 1, tiny_model(layers=1))
    assert newest_sound(tmp_path, pytest.fail) is not None
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


@pytest.mark.parametrize("size", [0, 1_000, 60_000])
def test_a_full_disk_fails_with_one_line_and_leaves_the_older_one_intact(size: int, tmp_path: Path) -> None:
    model = tiny_model(layers=1, hidden_size=16)  # about 40 kB of weights
    save(tmp_path, 1, model)
    big = {"optimizer": {"parts": [torch.zeros(50_000)]}, "rng": rng_state()}
    with files_limited_to(size), pytest.raises(RunFailed, match="step-000002 could not be written") as failure:
        save_checkpoint(tmp_path, 2, model=model, optimizer=big, trainer={}, keep_last=1)
    assert "\n" not in str(failure.value)
    assert failure.value.exit_code == 1
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    found = newest_sound(tmp_path, pytest.fail)
    assert found is not None
    assert found.step == 1


def test_the_manifest_lists_every_part(tmp_path: Path) -> None:
    path = save(tmp_path, 5, tiny_model(layers=1))
    manifest = json.loads((path / "manifest.json").read_text())
    assert manifest["files"].keys() == {item.name for item in path.iterdir()} - {"manifest.json"}
