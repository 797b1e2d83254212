"""Laws of a run whose rollouts come from servers: they hold the trainer's weights at each step, or the run stops."""

from __future__ import annotations

import json
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from fault_server import MODEL, at_random, servers
from sampling_server import STREAM_FAULTS, SamplingServer, Weights
from scope_opd.cli.engines import build_engines
from scope_opd.config import Config, load_config
from scope_opd.errors import ConfigError, RunFailed
from scope_opd.serving.route import ClientSettings
from scope_opd.train.loop import train
from tiny import save_pair

KEY = "sk-a-secret-key-1234567890"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder / "student", "qwen3", seed=1)
    save_pair(folder / "teacher", "llama", seed=2)
    rows = [{"id": f"p{i}", "problem": f"What is {i} + {i + 1}?", "answer": 2 * i + 1} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def server(pair: Path, *more: Any, **options: Any) -> SamplingServer:
    return SamplingServer(Weights(AutoModelForCausalLM.from_pretrained(pair / "student").eval()), *more, **options)


def configured(pair: Path, folder: Path, urls: list[str], *more: str) -> Config:
    return load_config(
        None,
        [
            f"model.path={pair / 'student'}", f"teacher.path={pair / 'teacher'}", f"data.train={pair / 'rows.jsonl'}",
            "rollout.n=3", "rollout.max_tokens=6", "rollout.temperature=0.8", "train.prompts_per_step=2",
            "train.steps=3", "train.lr=1e-2", "train.device=cpu", "objective.truncated=incorrect", "run.export=false",
            "run.rollouts_logged=1000", "run.alarms.uniform_weights=off", "run.alarms.truncation=off",
            "run.checkpoint_every=0", f"run.dir={folder}", f"rollout.base_urls={json.dumps(urls)}",
            f"rollout.model={MODEL}", *more,
        ],
    )  # fmt: skip


def run(config: Config) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of metrics.jsonl and of rollouts.jsonl."""
    built = build_engines(config)
    try:
        train(config, built.engines, progress=False)
    finally:
        built.close()
    return _rows(config, "metrics.jsonl"), _rows(config, "rollouts.jsonl")


def _rows(config: Config, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (Path(config.run.dir) / name).read_text().splitlines()]


def test_every_step_is_sampled_with_the_weights_of_that_step(pair: Path, tmp_path: Path) -> None:
    before = threading.active_count()
    with server(pair) as one:
        metrics, rollouts = run(configured(pair, tmp_path / "run", [one.url], "train.steps=4"))
        assert len(one.loads) == len(set(one.loads)) >= 4
    assert threading.active_count() == before
    assert len(rollouts) == 4 * 6
    for row in rollouts:
        assert row["policy_versions"] == [[0, len(row["token_ids"]), row["step"]]]
        assert row["policy_version"] == row["step"]
    for row in metrics:  # the trainer's log-probs of a rollout are its sampler's
        assert row["rollout/sampler_kl"] == pytest.approx(0.0, abs=1e-4) if "rollout/sampler_kl" in row else True


def test_faults_of_the_samplers_change_no_rollout(pair: Path, tmp_path: Path) -> None:
    kinds = [fault for fault in STREAM_FAULTS if fault not in ("silent", "reset_at_once")]
    with server(pair) as one:
        _, expected = run(configured(pair, tmp_path / "sound", [one.url]))
    plans = at_random(0.3, kinds, 1), at_random(0.3, kinds, 2)
    left, right = server(pair), server(pair)
    left.plan, right.plan = _streams_only(left, plans[0]), _streams_only(right, plans[1])
    with servers(left, right):
        _, found = run(configured(pair, tmp_path / "faulty", [left.url, right.url]))
    injected = left.injected + right.injected
    print(f"\n{injected.total()} faults injected into {len(found)} samples")
    assert injected.total() >= 5
    keys = ("id", "token_ids", "policy_versions")
    assert [[row[key] for key in keys] for row in found] == [[row[key] for key in keys] for row in expected]


def _streams_only(one: SamplingServer, plan: Any) -> Any:
    return lambda: plan() if one.bodies[-1]["stream"] else None


def test_a_server_that_serves_other_weights_stops_the_run(pair: Path, tmp_path: Path) -> None:
    class Lying(SamplingServer):
        """Says the new tag and keeps the old numbers, as tied embeddings on a CPU do."""

        def load(self, weights: Weights) -> None:
            super().load(Weights(self.weights.model, weights.tag))

    with Lying(Weights(AutoModelForCausalLM.from_pretrained(pair / "student").eval())) as one:
        config = configured(pair, tmp_path / "run", [one.url], "train.lr=0.3", "rollout.sync_tolerance=0.001")
        with pytest.raises(RunFailed, match=r"does not serve the trainer's weights: after the sync to version [12]"):
            run(config)


def test_evaluation_while_training_uses_the_servers_with_the_weights_of_the_moment(pair: Path, tmp_path: Path) -> None:
    with server(pair) as one:
        config = configured(
            pair, tmp_path / "run", [one.url], f"data.eval={pair / 'rows.jsonl'}", "eval.every=2", "eval.problems=2",
            "eval.n=2", "eval.at_start=true", "eval.at_end=true", "eval.temperatures=[0.6]", "eval.top_k=5",
        )  # fmt: skip
        run(config)
        asked = [body for body in one.bodies if body["stream"] and body["top_k"] == 5]
    rows = _rows(config, "eval.jsonl")
    assert [row["policy_version"] for row in rows] == [0, 2, 3]
    assert len(asked) == 3 * 4


def test_a_prompt_that_the_sampling_servers_cannot_hold_is_found_before_the_run(pair: Path, tmp_path: Path) -> None:
    with server(pair) as one:
        one.context = 90
        with pytest.raises(Exception, match=r"90, the context of the sampling servers"):
            build_engines(configured(pair, tmp_path / "run", [one.url], "rollout.max_tokens=85"))


def test_servers_of_the_student_are_refused_where_the_teacher_samples(pair: Path, tmp_path: Path) -> None:
    config = configured(pair, tmp_path / "run", ["http://127.0.0.1:9/v1"], "objective.method=kd")
    with pytest.raises(ConfigError, match=r"rollout.base_urls with objective.method = 'kd'"):
        build_engines(config)


def test_servers_that_are_not_there_stop_the_run_before_weights_are_loaded(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scope_opd.cli.samplers.ClientSettings", partial(ClientSettings, start_s=0.2))
    threads = threading.active_count()
    config = configured(pair, tmp_path / "run", ["http://127.0.0.1:9/v1"])
    with pytest.raises(
        ConfigError, match=r"no server of the student answers: http://127.0.0.1:9/v1.*rollout.base_urls"
    ):
        build_engines(config)
    assert threading.active_count() == threads


def test_no_key_is_in_anything_that_a_run_leaves(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STUDENT_KEY", KEY)
    with server(pair, key=KEY) as one:
        one.plan = _streams_only(one, at_random(0.3, ["500", "error_event"], 4))
        run(configured(pair, tmp_path / "run", [one.url], "rollout.api_key_env=STUDENT_KEY"))
        assert one.injected.total() >= 2
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 6
    assert not any(KEY.encode() in path.read_bytes() for path in files)
