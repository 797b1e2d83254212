"""Trackers: keys unchanged, one run across resumes, libraries only when asked for, a clear line when one is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from scope_opd.errors import ConfigError
from scope_opd.tracking import base, open_trackers
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


class Recorder:
    """A tracker that keeps what it is told."""

    def __init__(self, name: str = "recorder", failure: str = "") -> None:
        self.name, self.failure = name, failure
        self.logged: list[dict[str, float]] = []
        self.closed = 0

    def log(self, metrics: Any, step: int) -> None:
        self.logged.append(dict(metrics))

    def close(self) -> None:
        self.closed += 1
        if self.failure:
            raise OSError(self.failure)


def test_the_first_tracker_is_closed_when_the_second_does_not_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, opened = Recorder(failure="gone"), base._open
    monkeypatch.setattr(base, "_open", lambda name, run: first if name == "first" else opened(name, run))
    with pytest.raises(ConfigError, match="'mlflow'"):
        open_trackers(["first", "mlflow"], description(tmp_path))
    assert first.closed == 1


def test_a_tracker_that_fails_to_close_is_a_warning_and_stops_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trackers = [Recorder("first", "no network"), Recorder("second")]
    monkeypatch.setattr("scope_opd.train.session.open_trackers", lambda names, run: trackers)
    config = make_config(tmp_path / "run", train={"steps": 1})
    train(config, make_engines(config), progress=False)
    assert [tracker.closed for tracker in trackers] == [1, 1]
    assert "tracker first did not close: OSError: no network" in (tmp_path / "run" / "events.jsonl").read_text()
    train(config, make_engines(config), resume=True, progress=False)  # the folder was let go of


def test_trackers_get_an_evaluations_figures_and_not_its_settings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluator(step: int, policy_version: int) -> list[dict[str, Any]]:
        settings = {"step": step, "policy_version": 0, "problems": 4, "n": 2, "sampling": {"seed": 7, "top_p": 0.9}}
        return [{**settings, "temperature": 0.6, "avg@k": 0.5, "pass@k": {"1": 0.5}}]

    tracker = Recorder()
    monkeypatch.setattr("scope_opd.train.session.open_trackers", lambda names, run: [tracker])
    config = make_config(tmp_path / "run", train={"steps": 1}, eval={"at_end": True})
    train(config, make_engines(config, evaluator=evaluator), progress=False)
    assert tracker.logged[-1] == {"eval/T0.6/avg@k": 0.5, "eval/T0.6/pass@k/1": 0.5}


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
