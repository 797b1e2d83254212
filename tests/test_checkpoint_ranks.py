"""Checkpoints of sharded students: saved by one number of ranks, loaded bit for bit by another; failures stay whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SOUND = [
    "tied: saved by 2", "tied: loaded by 2", "tied: loaded by 1", "tied: loaded by 3", "untied: saved by 3",
    "untied: loaded by 2", "alone: saved by 1", "alone: loaded by 2", "damage", "full disk elsewhere",
]  # fmt: skip


@pytest.fixture(scope="module")
def ends(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What became of every scenario of checkpoint_ranks.py, all run by one program."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("checkpoint_ranks.py")), str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("scenario", SOUND)
def test_what_some_ranks_saved_while_they_trained_others_load_bit_for_bit(scenario: str, ends: dict[str, Any]) -> None:
    end = ends[scenario]
    assert set(end["codes"]) == {0}, end["lines"]


def test_a_rank_that_is_killed_as_it_writes_ends_the_run_in_one_line_and_leaves_the_older_one(
    ends: dict[str, Any],
) -> None:
    end = ends["killed elsewhere"]
    assert end["codes"] == [1, -9]
    assert "rank 1: its process" in end["lines"][0]
    assert end["lines"][0].startswith("error: ")
