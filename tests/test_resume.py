"""A run that was cut anywhere and resumed ends as one that was not: bit for bit, in weights, metrics and dumps."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch

from scope_opd.config import Config, validate_config
from scope_opd.errors import RunFailed, RunFolderError
from scope_opd.models.fingerprint import weights_digest
from scope_opd.records import iter_jsonl
from scope_opd.train import RunInterrupted, train
from scope_opd.train.resume import recorded_revisions, refuse_other_config, refuse_other_data, refuse_other_models
from scope_opd.train.runfolder import PHASES, RunFolder
from scope_opd.train.shards import Shards
from scope_opd.train.signals import Interrupted
from tiny import tiny_model
from train_kit import fake_evaluator, lasting, make_config, make_engines, same_weights, weights_of

STEPS = 5
TABLES: dict[str, Any] = {
    "train": {"steps": STEPS, "warmup_steps": 2, "optimizer": "muon"},
    "eval": {"every": 2, "at_start": True, "at_end": True},
}
# Every place of a step where a run can be cut: a phase begins (the first and the third step, and a save).
CUTS = [(phase, step) for phase in PHASES[1:5] for step in (0, 3)] + [("evaluation", 2), ("saving", 2), ("saving", 5)]


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [row for _, row in iter_jsonl(folder / f"{name}.jsonl")]


def run(folder: Path, *, resume: bool = False, tables: dict[str, Any] | None = None, **engines: Any) -> Any:
    config = make_config(folder, **(tables or TABLES))
    made = make_engines(config, **{"evaluator": fake_evaluator, **engines})
    train(config, made, resume=resume, progress=False)
    return made.model


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    folder = tmp_path_factory.mktemp("whole") / "run"
    return folder, weights_of(run(folder))


def assert_equal_runs(left: Path, right: Path) -> None:
    for name in ("metrics", "rollouts", "eval"):
        assert lasting(rows(left, name)) == lasting(rows(right, name)), name
    alarms = [[row for row in rows(folder, "events") if row["kind"] == "alarm"] for folder in (left, right)]
    assert alarms[0] == alarms[1]
    final = f"checkpoints/step-{STEPS:06d}"
    parts = [sorted((folder / final).glob("*.distcp")) for folder in (left, right)]
    assert [part.read_bytes() for part in parts[0]] == [part.read_bytes() for part in parts[1]] != []


class Cut(BaseException):
    """Stands for a death on the spot: nothing of ours catches it."""


@pytest.fixture
def cut_at(monkeypatch: pytest.MonkeyPatch) -> Any:
    told = RunFolder.phase

    def arm(phase: str, step: int, error: BaseException) -> None:
        def tell(self: RunFolder, at: int, name: str) -> None:
            told(self, at, name)
            if (name, at) == (phase, step):
                monkeypatch.setattr(RunFolder, "phase", told)
                raise error

        monkeypatch.setattr(RunFolder, "phase", tell)

    return arm


@pytest.mark.parametrize(("phase", "step"), CUTS)
def test_a_run_cut_in_any_phase_and_resumed_equals_an_uninterrupted_one(
    phase: str, step: int, whole: tuple[Path, dict[str, torch.Tensor]], cut_at: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    cut_at(phase, step, Cut())
    with pytest.raises(Cut):
        run(folder)
    assert json.loads((folder / "status.json").read_text())["phase"] == phase
    resumed = run(folder, resume=True)
    assert same_weights(weights_of(resumed), whole[1])
    assert_equal_runs(folder, whole[0])


@pytest.mark.parametrize(("phase", "step"), [("scoring", 3), ("forward_backward", 1), ("evaluation", 4)])
def test_an_interrupt_saves_the_last_completed_step_and_loses_nothing(
    phase: str, step: int, whole: tuple[Path, dict[str, torch.Tensor]], cut_at: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    cut_at(phase, step, Interrupted(signal.SIGINT))
    with pytest.raises(RunInterrupted, match="--resume") as interrupt:
        run(folder)
    assert interrupt.value.exit_code == 130
    assert (folder / "checkpoints" / f"step-{step:06d}").is_dir()
    assert same_weights(weights_of(run(folder, resume=True)), whole[1])
    assert_equal_runs(folder, whole[0])


def test_an_engine_that_fails_leaves_the_last_completed_step_saved(
    whole: tuple[Path, dict[str, torch.Tensor]], cut_at: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    cut_at("scoring", 3, RunFailed("the teacher is gone"))
    with pytest.raises(RunFailed, match="the teacher is gone"):
        run(folder)
    assert (folder / "checkpoints" / "step-000003").is_dir()
    assert same_weights(weights_of(run(folder, resume=True)), whole[1])
    assert_equal_runs(folder, whole[0])


def test_a_failure_between_weights_and_log_is_never_saved(
    whole: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, append = tmp_path / "run", RunFolder.append

    def full(self: RunFolder, name: str, lines: Any) -> None:
        if name == "metrics" and len(rows(folder, "metrics") if (folder / "metrics.jsonl").exists() else []) == 3:
            raise RunFailed("No space left on device")
        append(self, name, lines)

    monkeypatch.setattr(RunFolder, "append", full)
    with pytest.raises(RunFailed, match="No space left"):
        run(folder)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000002"]
    monkeypatch.setattr(RunFolder, "append", append)
    assert same_weights(weights_of(run(folder, resume=True)), whole[1])
    assert_equal_runs(folder, whole[0])


def test_a_damaged_newest_checkpoint_is_reported_and_the_run_still_ends_the_same(
    whole: tuple[Path, dict[str, torch.Tensor]], cut_at: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    cut_at("generation", 4, Cut())
    with pytest.raises(Cut):
        run(folder)
    weights = folder / "checkpoints" / "step-000004" / "__0_0.distcp"
    weights.write_bytes(weights.read_bytes()[:1000])
    resumed = run(folder, resume=True)
    events = rows(folder, "events")
    assert [e["message"] for e in events if e["kind"] == "resume"] == ["resumed from step 2"]
    assert any("step-000004 is damaged" in e["message"] for e in events if e["kind"] == "warning")
    assert "step-000004 is damaged (__0_0.distcp has 1000 bytes" in capfd.readouterr().err
    assert same_weights(weights_of(resumed), whole[1])
    assert_equal_runs(folder, whole[0])


def test_extending_a_finished_run_equals_running_longer_at_once(
    whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    short = {**TABLES, "train": {**TABLES["train"], "steps": 3}, "eval": {"every": 2, "at_start": True}}
    run(folder, tables=short)
    longer = {**short, "train": TABLES["train"]}
    assert same_weights(weights_of(run(folder, resume=True, tables=longer)), whole[1])
    assert lasting(rows(folder, "metrics")) == lasting(rows(whole[0], "metrics"))


def test_resuming_a_finished_run_changes_nothing(whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    assert same_weights(weights_of(run(folder, resume=True)), whole[1])
    assert_equal_runs(folder, whole[0])


def test_run_id_stays_and_trackers_start_after_what_they_have(
    whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    before = json.loads((folder / "run.json").read_text())
    (folder / "run.json").unlink()  # the checkpoint knows it as well
    run(folder, resume=True)
    assert json.loads((folder / "run.json").read_text())["run_id"] == before["run_id"]


@pytest.mark.parametrize("background", [True, False])
def test_a_disk_that_is_full_as_a_checkpoint_is_written_ends_the_run_at_a_boundary(
    background: bool, whole: tuple[Path, dict[str, torch.Tensor]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder, write, room = tmp_path / "run", Shards.write, [False]

    def full(self: Shards) -> Any:
        if self._folder.name.endswith("2") or room[0]:
            return write(self)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Shards, "write", full)
    tables = {**TABLES, "run": {"async_checkpoints": background}}
    with pytest.raises(RunFailed, match="step-000004 could not be written: No space left on device"):
        run(folder, tables=tables)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step-000002"]
    # Behind training the fault is met at the next boundary, or at this one if it came before that was left.
    assert json.loads((folder / "status.json").read_text())["step"] in ((4, 5) if background else (4,))
    room[0] = True
    assert same_weights(weights_of(run(folder, resume=True, tables=tables)), whole[1])
    assert_equal_runs(folder, whole[0])


def test_a_changed_config_is_accepted_on_request_and_told_of(
    whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    run(folder, tables={**TABLES, "train": {**TABLES["train"], "steps": 3}})
    changed = {**TABLES, "objective": {"tau": 0.5}, "train": {**TABLES["train"], "lr": 1e-4}}
    config = make_config(folder, **changed)
    train(config, make_engines(config, evaluator=fake_evaluator), resume=True, allow_config_change=True, progress=False)
    told = [row["message"] for row in rows(folder, "events") if row["kind"] == "config_change"]
    assert told == ["accepted: objective.tau = 0.5 (was 1.0), train.lr = 0.0001 (was 0.001)"]
    assert [row["lr"] for row in rows(folder, "metrics")][-2:] == [1e-4] * 2
    run(folder, resume=True, tables=changed)  # it is the run's config from then on
    for table, values in {"train": {"optimizer": "adamw"}, "model": {"path": "zoo:teacher"}}.items():
        other = make_config(folder, **{**changed, table: {**changed.get(table, {}), **values}})
        with pytest.raises(RunFolderError, match=rf"cannot be used with another {table}\."):
            train(other, make_engines(other), resume=True, allow_config_change=True, progress=False)


def test_another_teacher_or_student_under_the_same_name_is_refused(tmp_path: Path) -> None:
    def served(value: float, tokens: str = "aa") -> dict[str, Any]:
        return {"served": {"": {"tokens": tokens, "logprobs": [value, -1.0]}}}

    folder, own = tmp_path / "run", weights_digest(tiny_model(seed=1))
    models = {"student": {"weights": own}, "teacher": {"weights": weights_digest(tiny_model(seed=2))}}
    run(folder, fingerprints=models)
    run(folder, resume=True, fingerprints=models)
    run(folder, resume=True)  # what is not known is not compared
    for role in models:
        other = {**models, role: {"weights": weights_digest(tiny_model(seed=3))}}
        with pytest.raises(RunFolderError, match=f"the {role} is not the one that the run began with") as error:
            run(folder, resume=True, fingerprints=other)
        assert "\n" not in str(error.value)

    def compare(was: Any, now: Any, *accepted: str) -> None:
        refuse_other_models({"teacher": was}, {"teacher": now}, tolerance=0.05, accepted=accepted)

    compare(served(-2.0), served(-2.04))
    compare(served(-2.0), served(-9.0, tokens="bb"))
    compare(served(-2.0), served(-9.0), "teacher.model = 'x' (was 'y')")
    with pytest.raises(RunFolderError, match=r"differ by 0\.1 a token"):
        compare(served(-2.0), served(-2.2))
    with pytest.raises(RunFolderError, match="behind servers now"):
        compare({"weights": own}, served(-2.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objective": {"tau": 0.5}}, r"objective\.tau = 0\.5 \(was 1\.0\)"),
        ({"train": {**TABLES["train"], "lr": 1e-4}, "run": {"seed": 3}}, r"run\.seed = 3 .*train\.lr = 0\.0001"),
        ({"train": {**TABLES["train"], "steps": 2}}, r"train\.steps = 2 but the run has done 5"),
        ({"train": {**TABLES["train"], "schedule": "cosine"}}, r"train\.schedule = 'cosine' .*train\.steps"),
    ],
)
def test_another_config_is_refused_with_its_differences(
    change: dict[str, Any], message: str, whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    before = (folder / "config.toml").read_text()
    with pytest.raises(RunFolderError, match=message):
        run(folder, resume=True, tables={**TABLES, **change})
    assert (folder / "config.toml").read_text() == before
    # How often to save, where, and which alarms: these may change.
    run(folder, resume=True, tables={**TABLES, "run": {"keep_last": 1, "alarms": {"truncation": "off"}}})


def test_steps_that_the_schedule_depends_on_may_not_change(tmp_path: Path) -> None:
    cosine = {"train": {"steps": 2, "schedule": "cosine"}}
    run(tmp_path / "run", tables=cosine)
    with pytest.raises(RunFolderError, match=r"train\.steps = 4 \(was 2\)"):
        run(tmp_path / "run", resume=True, tables={"train": {"steps": 4, "schedule": "cosine"}})


def test_a_line_file_that_lost_lines_is_refused(tmp_path: Path) -> None:
    run(tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("")
    with pytest.raises(RunFolderError, match=r"metrics\.jsonl has 0 bytes; expected at least"):
        run(tmp_path / "run", resume=True)


def test_resuming_where_nothing_is_yet_starts_at_the_beginning(
    whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    assert same_weights(weights_of(run(tmp_path / "run", resume=True)), whole[1])


def everything(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def all_damaged(folder: Path) -> None:
    for path in (folder / "checkpoints").glob("step-*/*.distcp"):
        path.write_bytes(b"")


def all_moved_aside(folder: Path) -> None:
    for path in (folder / "checkpoints").glob("step-*"):
        path.rename(path.with_name(f"damaged-{path.name}"))


def no_checkpoints(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")


def no_checkpoints_of_a_run_under_way(folder: Path) -> None:
    no_checkpoints(folder)
    (folder / "status.json").write_text('{"step": 4, "phase": "scoring", "pid": 1}')


def an_evaluation(folder: Path) -> None:
    no_checkpoints(folder)
    (folder / "run.json").write_text('{"kind": "evaluation"}')


def no_config(folder: Path) -> None:
    for name in ("events.jsonl", "status.json", "config.toml"):
        (folder / name).unlink()
    no_checkpoints(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (all_damaged, r"step-000005 is damaged .*step-000004 is damaged .*expected a sound checkpoint; restore"),
        (all_moved_aside, r"only damaged checkpoints are left \(damaged-step-0.*expected a sound checkpoint"),
        (no_checkpoints, r"is finished and has none now; expected its checkpoints; restore checkpoints/"),
        (no_checkpoints_of_a_run_under_way, r"had saved checkpoints and has none now"),
        (an_evaluation, r"holds an evaluation, not a training run"),
        (no_config, r"neither config\.toml nor a checkpoint"),
    ],
)
def test_resuming_without_a_sound_checkpoint_never_erases_a_run(
    spoil: Any, message: str, whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    spoil(folder)
    before = everything(folder)
    with pytest.raises(RunFolderError, match=message):
        run(folder, resume=True)
    assert everything(folder) == before


def test_a_run_cut_before_its_first_checkpoint_starts_over_only_with_its_own_config(
    cut_at: Any, whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    cut_at("scoring", 1, Cut())
    with pytest.raises(Cut):
        run(folder)
    before = everything(folder)
    with pytest.raises(RunFolderError, match=r"objective\.tau = 0\.5 \(was 1\.0\)"):
        run(folder, resume=True, tables={**TABLES, "objective": {"tau": 0.5}})
    assert everything(folder) == before
    assert same_weights(weights_of(run(folder, resume=True)), whole[1])


def test_a_key_that_an_older_version_did_not_write_counts_as_its_default(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    saved = config.model_dump(mode="json")
    del saved["train"]["grad_clip"], saved["chat"]
    refuse_other_config(config, saved, 0)
    with pytest.raises(RunFolderError, match=r"train\.grad_clip = 0\.5 \(was 1\.0\)"):
        refuse_other_config(make_config(tmp_path / "run", train={"grad_clip": 0.5}), saved, 0)


# --- real processes, real signals ------------------------------------------------------------------------------------


def start(folder: Path, pause_in: str, *, resume: bool = False) -> subprocess.Popen[str]:
    tables = make_config(folder, **TABLES).model_dump(mode="json", exclude_none=True)
    folder.with_suffix(".toml").write_text(tomli_w.dumps(tables))
    return subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("train_kit.py")), str(folder), pause_in, "resume" * resume],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def wait_for(process: subprocess.Popen[str], phase: str) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if line.strip() == phase:
            return
    pytest.fail(f"the run ended before {phase}: {process.stderr.read() if process.stderr else ''}")


def test_a_killed_process_resumes_to_the_same_bits_and_signals_exit_with_their_codes(
    whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    """One run, cut three times: SIGTERM; SIGKILL while saving; Ctrl-C, twice, in the stretch that must not be cut."""
    folder = tmp_path / "run"

    process = start(folder, "scoring:1")
    wait_for(process, "scoring:1")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "SIGTERM after 1 steps" in errors
    assert "Traceback" not in errors
    assert (folder / "checkpoints" / "step-000001").is_dir()

    process = start(folder, "saving:2", resume=True)
    wait_for(process, "saving:2")
    process.kill()
    process.communicate(timeout=60)
    status = json.loads((folder / "status.json").read_text())
    assert (status["phase"], status["step"], status["pid"]) == ("saving", 2, process.pid)
    assert not (folder / "checkpoints" / "step-000002").exists()

    process = start(folder, "optimiser:2", resume=True)
    wait_for(process, "optimiser:2")
    process.send_signal(signal.SIGINT)  # heard, but not heeded before the step is logged
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.5)
    process.send_signal(signal.SIGINT)  # the second one ends it on the spot
    process.communicate(timeout=60)
    assert process.returncode == 130
    assert not (folder / "checkpoints" / "step-000003").exists()

    process = start(folder, "", resume=True)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert_equal_runs(folder, whole[0])


def test_a_signal_waits_for_the_checkpoint_being_written_and_a_second_one_does_not(
    whole: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    process = start(folder, "writing:2")
    wait_for(process, "generation:2")  # training goes on meanwhile
    assert not (folder / "checkpoints" / "step-000002").exists()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert not (folder / "checkpoints" / "step-000002").exists()

    process = start(folder, "writing:2", resume=True)
    wait_for(process, "generation:2")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert (folder / "checkpoints" / "step-000002").is_dir()

    process = start(folder, "", resume=True)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    assert_equal_runs(folder, whole[0])


def test_two_processes_do_not_share_a_run_folder(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    process = start(folder, "generation:0")
    try:
        wait_for(process, "generation:0")
        with pytest.raises(RunFolderError, match="in use by another process"):
            run(folder, resume=True)
    finally:
        process.kill()
        process.communicate(timeout=60)


def test_the_number_of_judging_processes_is_free_on_resume_and_their_limit_is_not() -> None:
    config = validate_config({})
    saved = config.model_dump(mode="json")
    refuse_other_config(validate_config({"verify": {"workers": 3}}), saved, 0)
    with pytest.raises(RunFolderError, match=r"verify\.timeout_s = 9\.0 \(was 5\.0\)"):
        refuse_other_config(validate_config({"verify": {"timeout_s": 9.0}}), saved, 0)


def test_trainer_and_servers_may_have_moved_on_resume() -> None:
    def served(**more: Any) -> Config:
        table = {"base_urls": ["http://10.0.0.5:1/v1"], "model": "s", "sync": "gloo", "sync_host": "10.0.0.1"}
        return validate_config({"rollout": {**table, **more}})

    saved = served().model_dump(mode="json")
    refuse_other_config(served(base_urls=["http://10.0.0.6:1/v1"], sync_host="10.0.0.2"), saved, 0)
    with pytest.raises(RunFolderError, match=r"rollout\.sync_tolerance = 1\.0"):
        refuse_other_config(served(sync_tolerance=1.0), saved, 0)


def test_a_run_does_not_go_on_with_other_data_under_the_same_name(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text(json.dumps({"data": {"train": {"sha256": "aa", "revision": None}}}))
    refuse_other_data(tmp_path, {"train": {"source": "t.jsonl", "sha256": "aa", "revision": None}})
    with pytest.raises(RunFolderError, match=r"data\.train = 't\.jsonl' has the sha256 bb, at the run's start aa"):
        refuse_other_data(tmp_path, {"train": {"source": "t.jsonl", "sha256": "bb", "revision": None}})
    (tmp_path / "run.json").write_text("{}")  # written before data sets were recorded
    refuse_other_data(tmp_path, {"train": {"source": "t.jsonl", "sha256": "bb"}})


def test_a_resumed_run_asks_for_the_commit_that_it_began_with(tmp_path: Path) -> None:
    about = {"train": {"source": "hf:a/b", "revision": "c" * 40}, "eval": {"source": "r.jsonl", "revision": None}}
    (tmp_path / "run.json").write_text(json.dumps({"data": about}))
    assert recorded_revisions(tmp_path, {"train": "hf:a/b", "eval": "r.jsonl"}) == {"train": "c" * 40}
    assert recorded_revisions(tmp_path, {"train": "hf:a/other", "eval": None}) == {}
    assert recorded_revisions(tmp_path / "none", {"train": "hf:a/b"}) == {}
