"""Laws of a run whose generation goes on while it trains, against a real vLLM server."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from test_vllm_sync import qwen2
from vllm_server import KEY, MODEL, PYTHON, VllmServer

from scope_opd.cli.engines import build_engines
from scope_opd.config import load_config
from scope_opd.pipeline import BackgroundPipeline, Collected
from scope_opd.train import train
from scope_opd.types import Rollout
from tiny import save_pair, tiny_tokenizer

pytestmark = [pytest.mark.serving, pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="no SCOPE_VLLM_PYTHON")]

STEPS = 8


def test_every_token_has_the_log_prob_of_the_version_that_its_span_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two steps ahead, weights that change in flight, a teacher in process: no token is older than two versions."""
    monkeypatch.setenv("SAMPLER_KEY", KEY)
    qwen2(7).save_pretrained(tmp_path / "student")
    tiny_tokenizer().save_pretrained(tmp_path / "student")
    save_pair(tmp_path / "teacher", "llama", seed=9)
    lines = [{"id": f"p{i}", "problem": f"What is {i} + {i + 1}?", "answer": 2 * i + 1} for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    server = VllmServer(tmp_path / "student", student=True)
    try:
        server.wait()
        config = load_config(
            None,
            [
                f"model.path={tmp_path / 'student'}", f"teacher.path={tmp_path / 'teacher'}",
                f"data.train={tmp_path / 'rows.jsonl'}", f"rollout.base_urls={server.url}", f"rollout.model={MODEL}",
                "rollout.api_key_env=SAMPLER_KEY", "rollout.max_staleness=2", "rollout.n=4", "rollout.max_tokens=96",
                "rollout.temperature=0.8", "rollout.sync_tolerance=1e-3", "objective.truncated=incorrect",
                f"train.steps={STEPS}", "train.prompts_per_step=3", "train.lr=1e-2", "train.device=cpu",
                "run.export=false", "run.rollouts_logged=100", "run.alarms.uniform_weights=off",
                "run.alarms.truncation=off", "run.alarms.entropy_halved=off", f"run.dir={tmp_path / 'run'}",
            ],
        )  # fmt: skip
        built = build_engines(config)
        versions, collected = watch(built.engines)
        try:
            assert isinstance(built.engines.pipeline, BackgroundPipeline)
            train(config, built.engines, progress=False)
        finally:
            built.close()
    finally:
        server.kill()
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("scope-")] == []
    model, gaps, mixed = qwen2(7), [], 0
    for rollout in collected:
        spans = rollout.policy_versions or []
        assert [span[0] for span in spans] == [0, *(span[1] for span in spans[:-1])]
        mixed += len(spans) > 1
        for first, last, version in spans:
            model.load_state_dict(versions[version])
            gaps.append(gap(model, rollout, first, last))
    metrics = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    oldest = [row["rollout/staleness_max"] for row in metrics]
    ahead = [
        min(span[0] for span in json.loads(line)["spans"]["generation"])
        for line in (tmp_path / "run" / "timeline.jsonl").read_text().splitlines()
    ]
    print(f"\n{len(collected)} rollouts, {mixed} of several versions, staleness {oldest}, worst gap {max(gaps):.2g}")
    assert len(collected) == STEPS * 12
    assert len({rollout.id for rollout in collected}) == STEPS * 12
    assert sorted(versions) == list(range(STEPS))
    assert max(gaps) <= 1e-3
    assert mixed > 0
    assert 0 < max(oldest) <= 2
    assert min(ahead) < 0
    assert all(row["time/sync_s"] > 0 for row in metrics)


def watch(engines: Any) -> tuple[dict[int, Any], list[Rollout]]:
    """The weights of every version that is published, and every rollout that is collected."""
    versions: dict[int, Any] = {}
    rollouts: list[Rollout] = []
    publish, collect = engines.publisher.publish, engines.pipeline.collect

    def published(version: int) -> dict[str, float]:
        versions.setdefault(version, copy.deepcopy(engines.model.state_dict()))
        return publish(version)  # type: ignore[no-any-return]

    def collected(*args: Any, **more: Any) -> Collected:
        found: Collected = collect(*args, **more)
        rollouts.extend(found.rollouts)
        return found

    engines.publisher.publish, engines.pipeline.collect = published, collected
    return versions, rollouts


def gap(model: Any, rollout: Rollout, first: int, last: int) -> float:
    """Largest difference of a span's log-probs from the model's, given the whole prefix."""
    ids = torch.tensor([[*rollout.prompt_token_ids, *rollout.token_ids]])
    with torch.no_grad():
        rows = (model(input_ids=ids).logits[0] / 0.8).log_softmax(-1)
    own = rows[:-1].gather(-1, ids[0, 1:, None])[len(rollout.prompt_token_ids) - 1 :, 0]
    return float((own - torch.tensor(rollout.logprobs))[first:last].abs().max())
