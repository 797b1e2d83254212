"""``scope launch`` with real vLLM: a run with a teacher's and a sampler's server, from nothing to nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from vllm_server import PYTHON, READY_S

from scope_opd.cli.main import main

pytestmark = [pytest.mark.serving, pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="no SCOPE_VLLM_PYTHON")]

ROOT = Path(__file__).resolve().parents[2]


def processes_with(word: str) -> list[int]:
    """Living processes in whose environment or command line a word stands."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                alive = (entry / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
                words = (entry / "environ").read_bytes() + (entry / "cmdline").read_bytes()
            except OSError:
                continue
            if alive and word.encode() in words:
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_and_its_servers_begin_and_end_with_one_command(ranks: int, tmp_path: Path) -> None:
    assert main(["zoo", "copy", str(tmp_path / "zoo"), "--head-dim", "32"]) == 0
    sets = [
        f"serving.python={PYTHON}", f"model.path={tmp_path / 'zoo' / 'student'}", f"run.dir={tmp_path / 'runs' / 'a'}",
        "rollout.base_urls=[]", "teacher.base_urls=[]", "launch.samplers=1", "launch.teachers=1",
        f"launch.trainer={ranks}", "train.steps=2", "eval.at_start=false", "eval.problems=8",
        f'serving.env={{ OMP_NUM_THREADS = "1", SCOPE_LAUNCH_TEST = "{tmp_path.name}" }}',
    ]  # fmt: skip
    command = [sys.executable, "-m", "scope_opd", "launch", str(ROOT / "configs" / "vllm_cpu.toml")]
    command += [word for text in sets for word in ("--set", text)]
    shell = {
        name: value for name, value in os.environ.items() if name not in ("SCOPE_SAMPLER_KEY", "SCOPE_TEACHER_KEY")
    }
    answer = subprocess.run(command, env=shell, capture_output=True, text=True, timeout=2 * READY_S)
    assert answer.returncode == 0, answer.stdout[-3000:] + answer.stderr[-1000:]
    lines = answer.stdout.splitlines()
    label = "trainer" if ranks == 1 else "rank 0"
    assert any(line.startswith(label) and "done: 2 steps" in line for line in lines)
    assert sum("is ready after" in line for line in lines) == 2
    rows = [json.loads(line) for line in (tmp_path / "runs" / "a" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1]
    assert all(row["teacher/unscored"] == 0 for row in rows)
    assert {path.name for path in (tmp_path / "runs" / "a.logs").iterdir()} == {
        "launch.log", "sampler-0.log", "teacher-0.log",
        *(["trainer.log"] if ranks == 1 else [f"rank-{rank}.log" for rank in range(ranks)]),
    }  # fmt: skip
    assert processes_with(tmp_path.name) == []
