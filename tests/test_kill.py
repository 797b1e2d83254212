"""A run killed by SIGKILL at any moment and resumed ends as if nothing had happened: real processes, real kills.

One run is killed again and again (each resumption is killed too), then finished and compared bit by bit with a run that
was left alone; see kill_program.py. `make test-kill` kills 21 times with one rank and 10 times with two; the test suite
kills once in each place with one rank, and twice with two.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from kill_program import JOBS, PHASES, PLACES, STEPS


def killed(folder: Path, world: int, kills: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("kill_program.py")), str(folder), str(world), str(kills)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=60 + 60 * kills,
        check=False,
    )
    print(*done.stdout.splitlines()[:-1], sep="\n")
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_run_killed_in_every_phase_and_resumed_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    found = killed(tmp_path, 1, int(os.environ.get("SCOPE_KILLS", len(PLACES))))
    kills = found["kills"]
    assert {kill["phase"] for kill in kills} >= set(PHASES)
    assert {kill["place"] for kill in kills} >= set(PLACES)
    assert all(kill["written"] for kill in kills if kill["place"] in ("writing", "committing"))
    assert all(found["same"].values()), found["same"]


def test_a_run_of_two_ranks_one_of_which_is_killed_resumes_to_the_same_bits(tmp_path: Path) -> None:
    number = int(os.environ.get("SCOPE_KILLS_OF_TWO", 2))
    found = killed(tmp_path, 2, number)
    kills = found["kills"]
    assert len(kills) == number
    for kill in kills:  # the other rank ends by itself, with an error
        assert kill["codes"][kill["rank"]] == -9
        assert kill["codes"][1 - kill["rank"]] == 1
    if number >= 10:
        assert {kill["place"] for kill in kills if kill["rank"] == 1} == set(JOBS)
        assert {kill["place"] for kill in kills if kill["rank"] == 0} >= set(PHASES)
    assert found["stopped"][0] == 143  # SIGTERM to both: saved at the boundary behind it
    assert found["stopped"][1] in (0, 143)
    assert found["saved"] == f"step-{STEPS - 3:06d}"
    assert all(found["same"].values()), found["same"]
