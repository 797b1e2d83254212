"""The benchmarks run: the GPU script scaled down to a CPU leaves its one line, the others know their options.

Not covered: what they measure (benchmarks/results.md), a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *options],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )


def refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


@pytest.mark.parametrize(
    "script",
    [
        "against_trl.py", "code_verifier.py", "logprobs.py", "profile_step.py", "sampler.py", "scaling.py",
        "step_overlap.py", "teacher_pool.py", "trl_side.py", "verifier.py",
    ],
)  # fmt: skip
def test_a_benchmark_names_its_options(script: str) -> None:
    done = run(script, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage:" in done.stdout


def test_the_gpu_script_scaled_down_prints_one_line_with_every_figure() -> None:
    done = run("update_gpu.py", "--smoke", "--parts", "update-0.6b-16k", "logprobs-4k", "sampler", "step")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    report = json.loads(line, parse_constant=refuse)
    assert {"device", "python", "torch", "cuda", "transformers"} <= set(report)
    update, logprobs, sampler, step = report["parts"].values()
    assert set(update["stages_s"]) == {"forward_backward", "optimiser"}
    assert update["tokens_per_s"] > 0
    assert update["packed"]
    assert update["memory"]["planned_gib"] > 0
    assert set(logprobs["ratios"]) == {"naive", "chunked", "chunked, no entropy", "chunked, frozen head"}
    assert {"ours / generate, autocast", "ours / generate, bfloat16", "ours / generate_batch, bfloat16"} <= set(sampler)
    assert set(step["stages_s"]) == {"generation", "verify", "teacher", "update", "step"}
    assert all(figure > 0 for figure in step["tokens_per_s"].values())


def test_a_part_that_fails_leaves_the_others_and_exit_code_one() -> None:
    done = run("update_gpu.py", "--smoke", "--parts", "step", "agreement", "--max-tokens", "0")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["failed"] == ["step"]
    assert "ZeroDivisionError" in report["parts"]["step"]["error"]
    agreement = report["parts"]["agreement"]
    assert agreement["cpu, packed"]["gradient_relative_l2"] < 1e-4


def test_a_part_that_hangs_is_ended() -> None:
    done = run("update_gpu.py", "--smoke", "--parts", "agreement", "--part-limit-s", "0.2")
    assert done.returncode == 1
    assert json.loads(done.stdout)["parts"]["agreement"]["error"] == "not done within 0.2 s; killed"


def test_the_teacher_pool_gives_no_wrong_number_and_leaves_nothing() -> None:
    done = run("teacher_pool.py", "--scorings", "120")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout, parse_constant=refuse)
    assert (report["scorings"], report["wrong"], report["tasks_left"], report["threads_left"]) == (120, 0, 0, 0)
    assert report["faults_injected"] >= 20


def test_streamed_steps_send_the_tokens_of_wrong_rollouts_alone_and_train_on_all(tmp_path: Path) -> None:
    small = {"prompts": 4, "steps": 2, "seeds": 1, "wrong": 0.6, "scale": 0.002, "keep": tmp_path}
    done = run("step_overlap.py", *(word for key, value in small.items() for word in (f"--{key}", str(value))))
    assert done.returncode in (0, 1), done.stderr  # 1: so short a step may miss the goal
    report = json.loads(done.stdout, parse_constant=refuse)
    (entry,) = report["shares"]
    assert report["teacher_tokens_exact"]
    assert entry["scope"]["teacher_tokens"] == entry["wrong_tokens"] < entry["tokens"]
    assert entry["release"]["teacher_tokens"] == entry["tokens"]
    assert entry["grpo"]["teacher_tokens"] == 0
    assert entry["scope"]["exposed_s"] < entry["release"]["exposed_s"]
    assert {path.name for path in tmp_path.iterdir()} == {"grpo-60-s0", "scope-60-s0", "release-60-s0"}
