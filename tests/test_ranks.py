"""Several ranks train as one does, and end together. Real processes throughout.

Each program (rank_program, rank_parity, rank_runs) loads torch once and forks its ranks, has time limits of its own and
leaves no process behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rank_parity import CASES, worlds_of
from rank_runs import RUNS, SERVED
from scope_opd.cli.ranks import open_ranks
from scope_opd.config import validate_config
from scope_opd.errors import ConfigError, ScopeError
from scope_opd.ranks import Ranks
from scope_opd.rollout.shared import deal_in_turn
from scope_opd.teacher.shared import by_tokens
from scope_opd.types import Rollout
from scope_opd.wires import ending_of

TESTS = Path(__file__).parent


def program(name: str, *arguments: str, limit_s: float) -> Any:
    """What a program of this folder prints; its whole process group is killed at the limit."""
    of_ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    environment = {key: value for key, value in os.environ.items() if key not in of_ranks}
    paths = os.pathsep.join([str(TESTS), *filter(None, sys.path)])
    running = subprocess.Popen(
        [sys.executable, *([str(TESTS / f"{name}.py")] if name.startswith("rank_") else ["-m", name]), *arguments],
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, said = running.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        pytest.fail(f"{name} {arguments} took more than {limit_s} s")
    assert running.returncode == 0, said[-3000:]
    return json.loads(out.splitlines()[-1]) if name.startswith("rank_") else out


# --- the same numbers ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parity(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = program("rank_parity", str(tmp_path_factory.mktemp("parity")), limit_s=400)
    return found


@pytest.mark.parametrize(("case", "world"), [(case, world) for case in CASES for world in worlds_of(case)])
def test_five_steps_on_recorded_rollouts_are_those_of_one_rank(
    parity: dict[str, dict[str, float]], case: str, world: int
) -> None:
    found = parity[f"{case}, world {world}"]
    exact = "float64" in case
    assert found["loss"] <= (1e-9 if exact else 1e-5)
    assert found["norm"] <= (1e-9 if exact else 1e-5)
    assert found["weights"] <= (1e-9 if exact else 1e-4)
    assert found["moved"] > 0.05
    assert found["tokens"]
    assert found["clipped"] == 0.0


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = program("rank_runs", str(tmp_path_factory.mktemp("runs")), limit_s=400)
    return found


@pytest.mark.parametrize("name", [*RUNS, SERVED])
def test_a_run_on_two_ranks_is_the_run_on_one(runs: dict[str, dict[str, Any]], name: str) -> None:
    """Sampling, scoring, evaluation, update and export: all that a run leaves but its times."""
    found = runs[name]
    assert found["metrics"] < 1e-4
    assert found["evaluations"] < 1e-5
    assert found["weights"] < 1e-5
    assert found["dtypes"] == 0


def test_torchrun_trains_with_the_command_line_of_one_rank(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(
        'train = {steps = 1, prompts_per_step = 2, device = "cpu", threads = 1}\n'
        'rollout = {n = 2, max_tokens = 16}\nteacher = {dtype = "float32"}\nrun = {export = false}\n'
    )
    run = tmp_path / "run"
    train = ["-m", "scope_opd", "train", str(config), "--run-dir", str(run)]
    out = program("torch.distributed.run", "--standalone", "--nproc-per-node", "2", *train, limit_s=200)
    assert out.count("done: 1 step in") == 1
    assert json.loads((run / "status.json").read_text())["phase"] == "done"
    assert {file.name for file in (run / "checkpoints" / "step-000001").glob("*.distcp")} >= {"__1_0.distcp"}


# --- the end ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = program("rank_program", str(tmp_path_factory.mktemp("ends")), limit_s=200)
    return found


def test_jobs_give_what_every_rank_returned_and_work_tells_in_between(ends: dict[str, dict[str, Any]]) -> None:
    assert ends["work"]["codes"] == [0, 0, 0]


@pytest.mark.parametrize("who", ["leader", "follower"])
@pytest.mark.parametrize("what", ["raise", "bug", "kill", "idle"])
def test_ranks_end_together_with_the_line_of_the_first_error(
    ends: dict[str, dict[str, Any]], who: str, what: str
) -> None:
    """One raises, or is killed, while the others wait for it in a collective ("idle": while they wait for a job)."""
    found, victim = ends[f"{who}-{what}"], 0 if who == "leader" else 2
    others = [rank for rank in range(3) if rank != victim]
    assert found["seconds"] < 10
    killed = what in ("kill", "idle")
    assert found["codes"][victim] == (-9 if killed else 2 if what == "raise" else 1)
    for rank in others:
        assert found["codes"][rank] == (2 if what == "raise" else 1)
        line = found["lines"][rank]
        assert line.startswith(f"error: rank {victim}: ")
        wanted = {
            "raise": "weights of nothing; expected some; mend them",
            "bug": "RuntimeError: an invariant; the traceback is in that rank's own output",
        }
        assert wanted.get(what, "is gone; expected every rank alive until the end") in line
    if what == "raise":
        assert found["lines"][victim] == "error: weights of nothing; expected some; mend them"


def test_a_rank_that_stands_still_ends_all_of_them_with_a_line_that_says_so(ends: dict[str, dict[str, Any]]) -> None:
    found = ends["follower-hang"]
    assert found["seconds"] < 25  # the limit of its collectives is 6 s
    assert found["codes"] == [1, 1, 1]
    for line in found["lines"]:
        assert line.startswith("error: ")
        assert "a rank stood still while others waited for it" in line
        assert "collective_timeout_s" in line


def test_a_signal_to_all_ranks_saves_once_and_ends_them_all(runs: dict[str, dict[str, Any]]) -> None:
    found = runs["told"]
    assert found["codes"] == [143, 143]
    assert found["seconds"] < 20
    assert int(found["last"].removeprefix("step-")) == found["steps"]
    assert "SIGTERM after" in found["lines"][0]
    assert found["lines"][1].startswith("error: rank 0: SIGTERM after")


def test_a_killed_rank_ends_the_run_with_its_folder_closed(runs: dict[str, dict[str, Any]]) -> None:
    found = runs["killed"]
    assert found["codes"] == [1, -9]
    assert found["seconds"] < 20
    assert found["lines"][0].startswith("error: rank 1: its process (pid ")
    assert found["free"]


def test_a_line_to_other_ranks_hides_what_the_environment_keeps_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "sk-0123456789")
    ending = ending_of(RuntimeError("401 for sk-0123456789\nand more"), 3)
    assert str(ending.error()).startswith("rank 3: RuntimeError: 401 for *** and more; ")
    kept = ending_of(ConfigError("a = 1", "a = 2", "set it"), 1)
    assert str(kept.error()) == "rank 1: a = 1; expected a = 2; set it"
    assert kept.error().exit_code == 2


# --- small things ----------------------------------------------------------------------------------------------------


def test_a_world_of_one_calls_the_function_and_needs_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    with Ranks.from_environment(1.0) as ranks:
        ranks.register("double", lambda share: 2 * share)
        assert ranks.everywhere("double", [21]) == [42]
        assert ranks.meet("facts") == "facts"
    assert (ranks.rank, ranks.world, ranks.leads) == (0, 1, True)


def test_an_environment_that_is_not_whole_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(ScopeError, match="start the ranks with torchrun"):
        Ranks.from_environment(1.0)


def test_weights_within_a_gpu_are_refused_on_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    rollout = {"sync": "ipc", "colocated": True, "model": "m", "base_urls": ["http://127.0.0.1:9/v1"]}
    with pytest.raises(ConfigError, match="it reaches only a server on the GPU of rank 0"):
        open_ranks(validate_config({"rollout": rollout}))


def test_prompts_are_dealt_evenly_and_rollouts_by_tokens() -> None:
    sizes = [5, 9, 1, 7, 3]
    assert deal_in_turn("abcde", sizes, 2) == [["b", "e", "c"], ["d", "a"]]
    assert deal_in_turn([], [], 2) == [[], []]
    rollouts = [Rollout(str(size), "g", [0], [0] * (size - 1), []) for size in sizes]
    shares = by_tokens(rollouts, 2)
    assert shares == [[1, 2, 4], [0, 3]]
    assert sorted(index for share in shares for index in share) == list(range(5))
