"""On several ranks: LoRA, groups that come early, mini-batches, checkpointing, resuming; and parts of jobs that end.

``rank_more`` forks real ranks, has time limits of its own and leaves no process behind.
"""

from __future__ import annotations

import socket
import threading
import time
from typing import Any

import pytest

from rank_more import CASES, OTHERS, RESUMED
from scope_opd.ranks import Ranks, Work
from scope_opd.wires import Wire
from test_ranks import program

EXACT = 1e-9


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    told: dict[str, dict[str, Any]] = program("rank_more", str(tmp_path_factory.mktemp("more")), limit_s=400)
    return told


@pytest.mark.parametrize(("name", "world"), [(name, world) for name, case in CASES.items() for world in case.worlds])
def test_recorded_rollouts_lead_several_ranks_where_they_lead_one_that_takes_them_all_at_once(
    found: dict[str, dict[str, Any]], name: str, world: int
) -> None:
    """Losses, norms, weights (adapters among them) and the plain copies that sample; whatever comes early or again."""
    case, row = CASES[name], found["cases"][f"{name}, world {world}"]
    for figure in ("loss", "norm", "kl", "clipped", "advantages", "weights", "copies"):
        assert row[figure] <= EXACT, figure
    assert row["tokens"]
    assert row["moved"] > 1e-3
    assert row["base"]
    train = case.tables.get("train", {})
    assert row["updates"] == train.get("minibatches", 1) * train.get("updates_per_batch", 1)
    assert row["recomputed"] == [0.0, 1.0 if "checkpointing" in name else 0.0]


@pytest.mark.parametrize("name", RESUMED)
def test_a_lora_run_that_two_ranks_began_ends_on_any_number_as_one_that_was_not_cut(
    found: dict[str, dict[str, Any]], name: str
) -> None:
    row = found["runs"][name]
    assert row["steps"] == 4
    assert row["metrics"] <= EXACT
    assert row["weights"] <= EXACT
    assert row["bits"] or RESUMED[name] != 2
    assert row["base"]
    assert row["moved"] > 1e-3


@pytest.mark.parametrize("name", OTHERS)
def test_a_copy_with_other_weights_than_the_student_ends_the_run_before_it_samples(
    found: dict[str, dict[str, Any]], name: str
) -> None:
    ends = found["refused"][name]
    weight = {"a head of its own": "lm_head.weight", "wider": "model.layers.0.mlp.down_proj.weight"}[name]
    assert ends["codes"] == [2, 2]
    for line in (line for (line,) in ends["lines"]):
        assert "the student's copy that samples has other weights than the student" in line
        assert weight in line
        assert "expected the same names and shapes" in line


def test_nothing_is_taken_in_for_a_job_once_it_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part that arrives as a job is called off goes to that job as a whole, before it is over."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        connection = socket.create_connection(server.getsockname())
        near, far = Wire(connection, "rank 0"), Wire(server.accept()[0], "rank 1")
    order: list[str] = []
    inside = threading.Event()

    def slow(work: Work, kind: str, rank: int, value: Any) -> None:
        inside.set()
        time.sleep(0.2)
        order.append(value)

    monkeypatch.setattr(Work, "add", slow)
    try:
        with Ranks(0, 2, 0, {1: near}) as ranks:
            with ranks.begin("draw", [None]):
                number = far.receive()[1]
                far.send(("part", number, "a rollout"))
                assert inside.wait(10.0)
            order.append("over")
            far.send(("part", number, "a late one"))
            far.send(("here", 0, None))
        assert far.receive() == ("cancel", number)
    finally:
        far.close()
    assert order == ["a rollout", "over"]
