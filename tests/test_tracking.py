"""Trackers: keys unchanged, one run across resumes, libraries only when asked for, a clear line when one is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scope_opd.errors import ConfigError
from scope_opd.tracking import open_trackers
from scope_opd.tracking.base import RunDescription, numbers
from scope_opd.train import train
from scope_opd.train.metrics import METRIC_KEYS
from train_kit import fake_evaluator, make_config, make_engines


def description(folder: Path, step: int = 0) -> RunDescription:
    return RunDescription(folder, project="scope", name="run", run_id="abc123", config={"lr": 1.0}, step=step)


def test_numbers_keep_their_keys_and_leave_out_what_is_none() -> None:
    row = {"a/b": 1, "c": None, "d": "text", "e": {"1": 0.5, "x": None}, "f": True}
    assert numbers(row) == {"a/b": 1, "e/1": 0.5}


def test_no_tracker_is_imported_before_it_is_asked_for() -> None:
    heavy = ("wandb", "tensorboard", "trackio", "torch")
    code = f"import sys, scope_opd.tracking; print([name for name in {heavy} if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio"])
def test_a_missing_library_names_its_extra(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=rf"{name} is not installed; .*pip install 'scope-opd\[{name}\]'"):
        open_trackers([name], description(tmp_path))


def test_an_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'mlflow'; expected some of tensorboard, wandb, trackio"):
        open_trackers(["mlflow"], description(tmp_path))


def scalars(folder: Path) -> dict[str, list[int]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [event.step for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_tensorboard_has_every_step_once_across_a_resume(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    tables: dict[str, Any] = {"run": {"trackers": ["tensorboard"]}, "eval": {"every": 2}}
    for steps, resume in ((2, False), (4, True)):
        config = make_config(tmp_path / "run", train={"steps": steps}, **tables)
        train(config, make_engines(config, evaluator=fake_evaluator), resume=resume, progress=False)
    found = scalars(tmp_path / "run")
    assert found["loss"] == found["length/mean"] == found["time/step_s"] == [0, 1, 2, 3]
    assert found["eval/T0.6/pass@k/1"] == [2, 4]
    assert {tag for tag in found if not tag.startswith("eval/")} <= METRIC_KEYS.keys()


def test_wandb_runs_offline_under_one_id_across_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for step in (0, 2):
        (tracker,) = open_trackers(["wandb"], description(tmp_path, step))
        tracker.log({"loss": 1.0 + step, "pass@n": 0.5}, step)
        tracker.close()
    wandb.teardown()  # its service writes the files out at the latest when the process ends
    runs = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert runs
    assert {path.name.rsplit("-", 1)[1] for path in runs} == {"abc123"}
    for path in runs:
        (record,) = path.glob("*.wandb")
        assert b"pass@n" in record.read_bytes()
