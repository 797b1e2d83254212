"""A run under Ray: a worker that dies costs no more than the steps since the last checkpoint."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from scope_opd.cli.main import main
from scope_opd.cli.ray_launcher import _knock, train_under_ray
from scope_opd.cli.ray_worker import Desk
from scope_opd.config import validate_config
from scope_opd.errors import ConfigError
from scope_opd.train.signals import Interrupted, Signals, request


class TestARunThatGetsNoSignals:
    """Ray runs the ranks in threads, where Python delivers no signals."""

    def test_stops_where_it_polls_and_never_inside_a_shielded_section(self) -> None:
        seen: list[str] = []

        def run() -> None:
            with Signals() as signals:
                assert request(signal.SIGTERM)
                try:
                    with signals.shielded():
                        signals.poll()
                        seen.append("shielded")
                except Interrupted as error:
                    seen.append(str(error))
                signals.poll()  # once: what the interruption leads to is not interrupted
                seen.append("saved")

        thread = threading.Thread(target=run)
        thread.start()
        thread.join(10)
        assert seen == ["shielded", "SIGTERM", "saved"]

    def test_cannot_be_asked_before_it_has_begun(self) -> None:
        assert not request(signal.SIGINT)
        with Signals() as signals:
            assert request(signal.SIGINT)
            with pytest.raises(Interrupted, match="SIGINT"):
                signals.poll()
        assert not request(signal.SIGINT)


@pytest.mark.parametrize(
    ("key", "value", "line"),
    [
        ("workers", 0, r"launch.ray.workers = 0; expected greater than 0"),
        ("gpus_per_worker", 2, r"launch.ray.gpus_per_worker = 2; expected 0 or 1"),
        ("resources", {"GPU": 1.0}, r"launch.ray.resources names GPU; .*set launch.ray.gpus_per_worker"),
        ("placement", "near", r"launch.ray.placement = 'near'; expected 'pack'"),
        ("max_failures", -2, r"launch.ray.max_failures = -2"),
    ],
)
def test_a_wrong_setting_is_one_line(key: str, value: Any, line: str) -> None:
    with pytest.raises(ConfigError, match=line):
        validate_config({"launch": {"ray": {key: value}}})


def test_without_ray_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    for name in ("RAY_USAGE_STATS_ENABLED", "RAY_CHDIR_TO_TRIAL_DIR", "RAY_TRAIN_ENABLE_PRINT_PATCH"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "60")
    with pytest.raises(ConfigError, match=r"ray is not installed; .*pip install 'scope-opd\[ray\]'"):
        train_under_ray(validate_config({}))


def test_another_config_is_for_a_run_that_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.toml").write_text("[train]\nsteps = 1\n")
    assert main(["train", str(tmp_path / "run.toml"), "--allow-config-change"]) == 2
    assert "--allow-config-change without --resume" in capsys.readouterr().err


def test_an_address_needs_the_launcher(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "run.toml"
    config.touch()
    assert main(["train", str(config), "--address", "auto"]) == 2
    assert "--address auto without --launcher" in capsys.readouterr().err


@pytest.mark.parametrize("address", ["127.0.0.1:1", "ray://127.0.0.1:1", "nobody", "a:b", "127.0.0.1:99999"])
def test_a_cluster_that_is_not_there_is_one_line_at_once(address: str) -> None:
    with pytest.raises(ConfigError, match=rf"--address {address}: .*; expected HOST:PORT"):
        _knock(address)


class TestTheDesk:
    def test_the_first_rank_that_fails_says_how_the_run_ended(self) -> None:
        desk = Desk()
        for rank in (0, 1):
            assert desk.begin(rank) == (0, False)
        desk.end(1, 2, ["no model"])
        desk.end(0, 2, ["rank 1: no model"])
        assert desk.outcome() == (2, ["no model"])

    def test_rank_0_says_what_a_finished_run_has_to_say(self) -> None:
        desk = Desk()
        desk.begin(1), desk.begin(0)
        desk.end(1, 0, [])
        assert desk.outcome() is None
        desk.end(0, 0, ["done"])
        assert desk.outcome() == (0, ["done"])

    def test_a_group_that_starts_again_forgets_how_the_last_one_failed(self) -> None:
        desk = Desk()
        desk.begin(0), desk.begin(1)
        desk.end(0, 1, ["rank 1 is gone"])
        assert desk.begin(0) == desk.begin(1) == (1, False)
        assert desk.news() == (2, [])
        desk.end(0, 0, ["done"])
        assert desk.outcome() == (0, ["done"])

    @pytest.mark.parametrize("code", [0, 2, 130])
    def test_what_would_come_again_is_not_tried_again(self, code: int) -> None:
        desk = Desk()
        desk.begin(0), desk.begin(1)
        desk.end(0, code, ["line"])
        assert desk.begin(0) == desk.begin(1) == (1, True)  # rank 1 was stuck in a collective, and ended its process
        assert desk.outcome() == (code, ["line"])

    def test_what_a_rank_prints_is_seen_once_and_the_signal_reaches_it(self) -> None:
        desk = Desk()
        desk.begin(0)
        assert desk.exchange(0, ["a", "b"]) is None
        assert desk.news() == (1, [(0, "a"), (0, "b")])
        assert desk.news() == (1, [])
        desk.stop(signal.SIGTERM)
        assert desk.exchange(0, []) == signal.SIGTERM


# --- with Ray ---------------------------------------------------------------------------------------------------------

STEPS = 8
CONFIG = f"""
[objective]
method = "scope"
[rollout]
n = 4
max_tokens = 48
[teacher]
dtype = "float32"
api_key_env = "SCOPE_TEST_KEY"
[train]
steps = {STEPS}
prompts_per_step = 4
lr = 3e-4
threads = 1
device = "cpu"
max_tokens_per_microbatch = 256
[run]
checkpoint_every = 1
rollouts_logged = 0
[launch.ray]
workers = 2
"""
KEY = "value-that-nobody-else-may-see"
LIMIT_S = 300.0


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder with a short name, for Ray's sockets; whatever was started with it in its environment is killed."""
    folder = Path(tempfile.mkdtemp(prefix="scope-ray-"))
    try:
        yield folder
    finally:
        for pid in started_with(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(folder, ignore_errors=True)


def environment(place: Path, **more: str) -> dict[str, str]:
    return {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "HOME": str(place),
        "RAY_TMPDIR": str(place), "RAY_USAGE_STATS_ENABLED": "0", "SCOPE_TEST_KEY": KEY, "HF_HUB_OFFLINE": "1", **more,
    }  # fmt: skip


def started_with(place: Path) -> list[int]:
    """Processes, not yet ended, that inherited the folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            state = (path / "stat").read_text().rpartition(") ")[2][0]
            if f"RAY_TMPDIR={place}\0".encode() in (path / "environ").read_bytes() and state not in "ZX":
                found.append(int(path.name))
    return found


def workers(place: Path) -> list[int]:
    """Processes of Ray Train's workers."""
    found = []
    for pid in started_with(place):
        with suppress(OSError):
            if b"RayTrainWorker" in Path(f"/proc/{pid}/cmdline").read_bytes():
                found.append(pid)
    return found


def command(folder: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "scope_opd", "train", "run.toml", "--run-dir", str(folder), *more]


def uninterrupted(place: Path, folder: Path) -> None:
    """The same run by two processes with torchrun's variables and no launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    ranks = []
    for rank in range(2):
        variables = environment(
            place, RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
            MASTER_PORT=port,
        )  # fmt: skip
        ranks.append(subprocess.Popen(command(folder), cwd=place, env=variables, stderr=subprocess.PIPE, text=True))
    for process in ranks:
        _, output = process.communicate(timeout=LIMIT_S)
        assert process.returncode == 0, output


def metrics(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{name: value for name, value in row.items() if not name.startswith(("time/", "perf/"))} for row in rows]


def test_a_worker_that_is_killed_costs_nothing_but_time(place: Path) -> None:
    (place / "run.toml").write_text(CONFIG)
    whole, broken = place / "whole", place / "broken"
    uninterrupted(place, whole)

    output = place / "output"
    with output.open("w") as stream:
        driver = subprocess.Popen(
            command(Path("broken"), "--launcher", "ray"),
            cwd=place, env=environment(place), stdout=stream, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    until = time.monotonic() + LIMIT_S
    while len(metrics(broken)) < 2:
        assert driver.poll() is None, output.read_text()
        assert time.monotonic() < until, f"no second step: {output.read_text()}"
        time.sleep(0.02)
    leader = json.loads((broken / "status.json").read_text())["pid"]
    follower = [pid for pid in workers(place) if pid != leader]
    assert len(follower) == 1
    os.kill(follower[0], signal.SIGKILL)
    assert driver.wait(LIMIT_S) == 0, output.read_text()

    said = output.read_text()
    assert "a worker failed: all start again from the last checkpoint (start 2)" in said
    assert f"done: {STEPS} steps" in said
    assert any("resumed from step" in line for line in (broken / "events.jsonl").read_text().splitlines())
    assert metrics(broken) == metrics(whole)
    weights = [(run / "export" / "model.safetensors").read_bytes() for run in (whole, broken)]
    assert weights[0] == weights[1]
    until = time.monotonic() + 20  # Ray's own watchdog ends a moment after what it watches
    while left := started_with(place):
        assert time.monotonic() < until, [Path(f"/proc/{pid}/cmdline").read_bytes() for pid in left]
        time.sleep(0.1)
    assert not list(place.glob(".broken.ray-*"))
    logs = [path for kind in ("log", "out", "err") for path in (place / "ray").rglob(f"*.{kind}")]
    assert logs
    for path in (output, *logs):
        assert KEY.encode() not in path.read_bytes(), f"{path.name} holds a key"
