"""Laws of ``scope doctor`` against a real vLLM server, which is teacher and sampler at once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from vllm_server import KEY, MODEL, PYTHON, VllmServer

from scope_opd.cli.checks import Finding
from scope_opd.cli.doctor import diagnose
from scope_opd.config import Config, load_config
from tiny import save_pair

pytestmark = [pytest.mark.serving, pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="no SCOPE_VLLM_PYTHON")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shape: dict[str, Any] = {"hidden_size": 64, "head_dim": 32, "context": 512}  # vLLM's CPU attention wants 32
    save_pair(folder / "student", "qwen3", seed=3, **shape)
    save_pair(folder / "other", "qwen3", seed=5, **shape)
    plain = json.loads((folder / "student" / "generation_config.json").read_text())
    declared = {**plain, "do_sample": True, "temperature": 0.4, "top_k": 5}
    (folder / "student" / "generation_config.json").write_text(json.dumps(declared))
    rows = [{"id": f"p{i}", "problem": f"What is {i} + {i + 1}?", "answer": 2 * i + 1} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[VllmServer]:
    made = VllmServer(folder / "student", student=True)
    try:
        yield made.wait()
    finally:
        made.kill()


@pytest.fixture(autouse=True)
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVER_KEY", KEY)
    monkeypatch.setenv("WRONG_KEY", "sk-wrong-key-123456")


def configured(folder: Path, run: Path, server: VllmServer, *more: str) -> Config:
    return load_config(
        None,
        [
            f"model.path={folder / 'student'}", f"data.train={folder / 'rows.jsonl'}", f"run.dir={run}",
            f'teacher.base_urls=["{server.url}"]', f"teacher.model={MODEL}", "teacher.api_key_env=SERVER_KEY",
            f"teacher.path={folder / 'student'}", f'rollout.base_urls=["{server.url}"]', f"rollout.model={MODEL}",
            "rollout.api_key_env=SERVER_KEY", "rollout.max_tokens=24", "rollout.temperature=1.0",
            "train.prompts_per_step=2", "train.device=cpu", *more,
        ],
    )  # fmt: skip


def found(config: Config) -> dict[str, Finding]:
    return {finding.subject: finding for finding in diagnose(config, "x")}


def failed(findings: dict[str, Finding]) -> set[str]:
    return {subject for subject, finding in findings.items() if finding.level != "ok"}


def nats(finding: Finding) -> float:
    """The figure of "to 1.2e-06 nats a token" or "KL 1.2e-06 nats a token"."""
    return abs(float(finding.found.split(" nats a token")[0].rsplit(" ", 1)[1]))


def test_a_sound_server_agrees_with_the_model_in_process(folder: Path, server: VllmServer, tmp_path: Path) -> None:
    findings = found(configured(folder, tmp_path / "run", server))
    print("\n" + "\n".join(f"{each.level:4} {each}" for subject, each in findings.items() if ":" in subject))
    assert failed(findings) == set()
    for subject in ("teacher: numbers", "sampler: numbers", "teacher = student"):
        assert nats(findings[subject]) <= 1e-4
    assert "not neutral (generation_config.json" in findings["sampler: defaults"].found
    assert "temperature 0.4, top_k 5" in findings["sampler: defaults"].found
    assert {"sampler: logprobs mode", "sampler: routes", "teacher: routes"} <= findings.keys()


MISTAKES: dict[str, tuple[list[str], set[str], str]] = {
    "key": (
        ["teacher.api_key_env=WRONG_KEY"], {"teacher: key"}, "environment variable WRONG_KEY (teacher.api_key_env)",
    ),
    "no key": (["rollout.api_key_env=NOT_SET"], {"sampler: key"}, "export NOT_SET"),
    "name": (["rollout.model=nobody"], {"sampler: model name"}, f"serves '{MODEL}' and rollout.model = 'nobody'"),
    "context": (["rollout.max_tokens=240"], {"teacher: context", "sampler: context"}, "256 tokens, and the run needs"),
    "other weights": (
        ["teacher.path={folder}/other", "model.path={folder}/other"],
        {"teacher: numbers", "sampler: numbers", "teacher = student"}, "nats a token apart",
    ),
    "temperature": (
        ["teacher.served_temperature=0.7", "rollout.temperature=0.7"], {"teacher: numbers", "teacher = student"},
        "at temperature 0.7",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found(name: str, folder: Path, server: VllmServer, tmp_path: Path) -> None:
    options, subjects, words = MISTAKES[name]
    options = [option.replace("{folder}", str(folder)) for option in options]
    findings = found(configured(folder, tmp_path / "run", server, *options))
    assert failed(findings) == subjects
    assert words in str(findings[min(subjects - {"teacher = student"})])
    assert not any("sk-wrong" in str(each) or KEY in str(each) for each in findings.values())
