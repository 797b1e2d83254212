"""8-bit and offloaded states and Muon on several ranks: the steps of one rank, and checkpoints across numbers of ranks.

Real processes: ``rank_optim.py`` loads torch once, forks its ranks with time limits, and leaves none behind.
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

from rank_optim import FULL, PARITY

ENDS = [
    *(f"{setting}: {end}" for setting in ("offload", "muon", "adamw_8bit")
      for end in ("saved by 2", "loaded by 2", "loaded by 1", "loaded by 3")),
    "muon: loaded by 2 machines of 2", "adamw_8bit: loaded by 2 machines of 2",
]  # fmt: skip


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the program prints; its whole process group is killed at the limit."""
    of_ranks = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
    environment = {key: value for key, value in os.environ.items() if key not in of_ranks}
    running = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("rank_optim.py")), str(tmp_path_factory.mktemp("optim"))],
        env={**environment, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    try:
        out, said = running.communicate(timeout=300)
    except subprocess.TimeoutExpired:
        os.killpg(running.pid, signal.SIGKILL)
        pytest.fail("rank_optim took more than 300 s")
    assert running.returncode == 0, said[-3000:]
    printed: dict[str, Any] = json.loads(out.splitlines()[-1])
    return printed


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("case", [case for case in PARITY if "float64" in case])
def test_five_steps_of_offloaded_states_and_of_muon_are_those_of_one_rank(
    found: dict[str, Any], case: str, world: int
) -> None:
    gaps = found["parity"][f"{case}, world {world}"]
    assert max(gaps["loss"], gaps["norm"], gaps["weights"]) <= 1e-9
    assert gaps["moved"] > 0.05
    assert gaps["tokens"]


def test_8_bit_states_on_two_ranks_are_cut_into_the_blocks_of_one(found: dict[str, Any]) -> None:
    """A last bit of a gradient may move a code, so the limit is a share of the distance that the weights have moved."""
    gaps = found["parity"]["tied float32 adamw_8bit, world 2"]
    assert gaps["weights"] <= 0.01 * gaps["moved"]
    assert gaps["moved"] > 0.05
    assert max(gaps["loss"], gaps["norm"]) <= 1e-3


def test_where_shares_are_too_small_for_8_bits_their_states_are_those_of_adamw(found: dict[str, Any]) -> None:
    gaps = found["parity"]["tied float32 adamw_8bit, world 3"]
    assert found["parity"][FULL]["weights"] <= 1e-4 * gaps["moved"]
    assert 0.01 * gaps["moved"] < gaps["weights"] < 0.5 * gaps["moved"], "what 8 bits of the embedding's states cost"


@pytest.mark.parametrize("name", ENDS)
def test_what_two_ranks_saved_any_number_loads_bit_for_bit_and_goes_on_from(found: dict[str, Any], name: str) -> None:
    """At the same number of ranks the next step is the same bit for bit as well, at another to the last bits."""
    end = found["checkpoints"][name]
    assert set(end["codes"]) == {0}, end["lines"]


def test_8_bit_states_that_other_ranks_would_cut_otherwise_are_refused_in_one_line_and_stay(
    found: dict[str, Any],
) -> None:
    ends = found["checkpoints"]
    assert ends["odd: saved by 2"]["codes"] == [0, 0]
    refused = ends["odd: refused by 3"]
    assert refused["codes"] == [2, 2, 2]
    for line in refused["lines"]:
        assert line.startswith("error: ")
        assert "model.embed_tokens.weight are cut as the 2 ranks that saved it cut them, not as these 3 do" in line
        assert "expected 2 ranks" in line
    assert ends["odd: loaded by 2"]["codes"] == [0, 0]
