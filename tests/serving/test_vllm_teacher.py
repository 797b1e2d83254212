"""Laws of the served teacher against real vLLM servers: it scores as the same model in process, whatever dies."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm_server import KEY, MODEL, PYTHON, VllmServer

from fault_server import Table, made_rollouts
from scope_opd.cli.engines import build_engines
from scope_opd.cli.main import main
from scope_opd.config import Config, load_config
from scope_opd.errors import ConfigError, RunFailed
from scope_opd.teacher.local import LocalTeacher
from scope_opd.teacher.sampling import ServerSampler
from scope_opd.train.loop import train
from scope_opd.types import Prompt, SamplingParams
from teacher_kit import teacher_of
from tiny import save_pair, tiny_tokenizer

pytestmark = [pytest.mark.serving, pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="no SCOPE_VLLM_PYTHON")]

PATIENT = {"read_timeout_s": 120.0, "connect_timeout_s": 10.0, "start_s": 120.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    shape: dict[str, Any] = {"hidden_size": 64, "head_dim": 32, "context": 256}  # vLLM's CPU attention wants 32
    save_pair(folder / "tied", "qwen3", seed=3, **shape)
    save_pair(folder / "untied", "llama", seed=4, **shape)
    save_pair(folder / "other", "qwen3", seed=5, **shape)
    save_pair(folder / "student", "qwen3", seed=6, **shape)
    rows = [{"id": f"p{i}", "problem": f"What is {i} + {i + 1}?", "answer": 2 * i + 1} for i in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def three(folders: Path) -> Iterator[dict[str, VllmServer]]:
    """Servers "tied", "again" (the same weights) and "untied"; they start side by side."""
    servers: dict[str, VllmServer] = {}
    try:
        for name, model in (("tied", "tied"), ("untied", "untied"), ("again", "tied")):
            servers[name] = VllmServer(folders / model)
        for server in servers.values():
            server.wait()
        yield servers
    finally:
        for server in servers.values():
            server.kill()


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_scores_equal_those_of_the_teacher_in_process(name: str, folders: Path, three: dict[str, VllmServer]) -> None:
    rollouts = made_rollouts(40, seed=1, longest=100)
    local = LocalTeacher(AutoModelForCausalLM.from_pretrained(folders / name).eval())
    expected = asyncio.run(local.score(rollouts))
    with teacher_of(three[name].url, key=KEY, model=MODEL, client=PATIENT) as teacher:
        found = asyncio.run(teacher.score(rollouts))
    gaps = [
        abs(a - b)
        for one, other in zip(found, expected, strict=True)
        for a, b in zip(one.logprobs or [], other.logprobs or [], strict=True)
    ]
    print(f"\n{name}: {len(gaps)} tokens, largest difference {max(gaps):.2g}")
    assert len(gaps) == sum(len(rollout.token_ids) for rollout in rollouts)
    assert max(gaps) <= 1e-4


def test_the_likeliest_tokens_are_those_of_the_teacher_in_process(folders: Path, three: dict[str, VllmServer]) -> None:
    rollouts = made_rollouts(12, seed=3, longest=60)
    model = AutoModelForCausalLM.from_pretrained(folders / "untied").eval()
    client = {"key": KEY, "model": MODEL, "client": PATIENT, "top_k": 20}
    with teacher_of(three["untied"].url, **client) as teacher:
        found = asyncio.run(teacher.score(rollouts))
    worst = 0.0
    for rollout, score in zip(rollouts, found, strict=True):
        assert score.topk is not None
        assert score.topk.k == 20
        assert len(score.topk) == len(rollout.token_ids)
        with torch.no_grad():
            logits = model(torch.tensor([[*rollout.prompt_token_ids, *rollout.token_ids]])).logits[0]
        expected = logits[len(rollout.prompt_token_ids) - 1 : -1].log_softmax(-1)
        for row, pairs in zip(expected, score.topk, strict=True):
            ids, values = zip(*pairs, strict=True)
            worst = max(worst, float((row[list(ids)] - torch.tensor(values)).abs().max()))
            worst = max(worst, float((row.topk(20).values - torch.tensor(values)).abs().max()))
    print(f"\nlargest difference {worst:.2g}")
    assert worst <= 1e-4
    with (
        pytest.raises(ConfigError, match="--max-logprobs 65"),
        teacher_of(three["untied"].url, **{**client, "top_k": 65}),
    ):
        pass


def test_scope_score_gives_the_same_numbers(
    folders: Path, three: dict[str, VllmServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    rollouts, out = made_rollouts(20, seed=2), tmp_path / "out.jsonl"
    rows = [{"id": r.id, "prompt_token_ids": r.prompt_token_ids, "token_ids": r.token_ids} for r in rollouts]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["score", str(tmp_path / "in.jsonl"), "--out", str(out), "--teacher-model", MODEL]
    for name in ("tied", "again"):
        command += ["--teacher-url", three[name].url]
    assert main([*command, "--api-key-env", "TEACHER_KEY"]) == 0
    table = Table(AutoModelForCausalLM.from_pretrained(folders / "tied").eval())
    for line, rollout in zip(out.read_text().splitlines(), rollouts, strict=True):
        assert json.loads(line)["teacher_logprobs"] == pytest.approx(table.response(rollout), abs=1e-4)
    asked = {json.loads(line)["endpoint"] for line in Path(f"{out}.teacher.jsonl").read_text().splitlines()}
    assert len(asked) == 2


def test_servers_of_different_weights_are_no_pool(three: dict[str, VllmServer]) -> None:
    urls = three["tied"].url, three["untied"].url
    with pytest.raises(ConfigError, match="another model"), teacher_of(*urls, key=KEY, model=MODEL, client=PATIENT):
        pass


def test_a_wrong_key_and_a_wrong_name_are_one_line(three: dict[str, VllmServer]) -> None:
    url = three["tied"].url
    for key, model, expected in (("sk-wrong-key-123456", MODEL, "answers 401"), (None, MODEL, "answers 401"),
                                 (KEY, "nobody", "serves 'tiny'")):  # fmt: skip
        with pytest.raises(ConfigError, match=expected) as error, teacher_of(url, key=key, model=model, client=PATIENT):
            pass
        assert "sk-wrong" not in str(error.value)


def test_sampled_log_probs_are_the_models_and_others_are_refused(folders: Path, three: dict[str, VllmServer]) -> None:
    table = Table(AutoModelForCausalLM.from_pretrained(folders / "tied").eval())
    prompts = [Prompt(f"p{i}", "", None, (5 + i, 6, 7)) for i in range(4)]

    async def draw(temperature: float) -> list[Any]:
        params = SamplingParams(n=3, temperature=temperature, max_tokens=12, stop_token_ids=(1, 30, 60, 90), seed=0)
        return [one async for one in sampler.sample(prompts, params, step=0, policy_version=0)]

    with teacher_of(three["tied"].url, key=KEY, model=MODEL, client=PATIENT) as teacher:
        sampler = ServerSampler(teacher.servers, tiny_tokenizer())
        rollouts = asyncio.run(draw(1.0))
        assert len(rollouts) == 12
        assert len({tuple(rollout.token_ids) for rollout in rollouts}) > 8
        for rollout in rollouts:
            assert rollout.logprobs == pytest.approx(table.response(rollout), abs=1e-4)
            assert (rollout.finish_reason == "stop") == (rollout.token_ids[-1] in (1, 30, 60, 90))
        with pytest.raises(RunFailed, match="processed_logprobs"):
            asyncio.run(draw(0.7))


def configured(folders: Path, folder: Path, servers: list[VllmServer], *more: str) -> Config:
    urls = ", ".join(f'"{server.url}"' for server in servers)
    return load_config(
        None,
        [
            f"model.path={folders / 'student'}", f"teacher.base_urls=[{urls}]", f"teacher.model={MODEL}",
            f"teacher.tokenizer={folders / 'tied'}", "teacher.api_key_env=TEACHER_KEY", "teacher.deadline_s=20",
            f"data.train={folders / 'rows.jsonl'}", "rollout.n=8", "rollout.max_tokens=40", "rollout.temperature=1.0",
            "train.prompts_per_step=6", "train.steps=4", "train.lr=1e-3", "train.device=cpu",
            "objective.truncated=incorrect", "run.export=false", "run.alarms.truncation=off",
            "run.alarms.uniform_weights=off", f"run.dir={folder}", *more,
        ],
    )  # fmt: skip


def run(config: Config, *, resume: bool = False) -> list[dict[str, Any]]:
    built = build_engines(config)
    try:
        train(config, built.engines, resume=resume, progress=False)
    finally:
        built.close()
    return lines(Path(config.run.dir) / "metrics.jsonl")


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kill_in_step(ledger: Path, step: int, *servers: VllmServer) -> threading.Thread:
    """A thread that kills servers once a few rollouts of a step are scored."""

    def watch() -> None:
        end = time.monotonic() + 300
        while time.monotonic() < end:
            text = ledger.read_text() if ledger.exists() else ""
            if text.count(f'"step":{step},') >= 5:
                for server in servers:
                    server.kill()
                return
            time.sleep(0.002)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    return thread


def test_a_run_survives_one_server_stops_without_any_and_resumes(
    folders: Path, three: dict[str, VllmServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    pool, folder = [three["tied"], three["again"]], tmp_path / "run"
    config = configured(folders, folder, pool)
    kill_in_step(folder / "teacher.jsonl", 1, three["again"])
    killer = kill_in_step(folder / "teacher.jsonl", 2, three["tied"])
    with pytest.raises(RunFailed, match=r"could not be scored.*--resume"):
        run(config)
    killer.join()
    done = lines(folder / "metrics.jsonl")
    assert [row["step"] for row in done] == [0, 1]  # step 1 lost a server and nothing else
    assert [row["teacher/unscored"] for row in done] == [0, 0]
    assert done[1]["teacher/scored_rollouts"] > 5
    scored = [row for row in lines(folder / "teacher.jsonl") if row.get("scored") and row["step"] == 1]
    used = {row["endpoint"] for row in scored}
    assert used == {server.url for server in pool} or any("connection" in row["faults"] for row in scored)

    fake = VllmServer(folders / "other", port=three["tied"].port)
    try:
        fake.wait()
        with pytest.raises(ConfigError, match="another model"):
            run(configured(folders, folder, pool[:1]), resume=True)
    finally:
        fake.kill()
    back = VllmServer(folders / "tied", port=three["tied"].port)
    try:
        back.wait()
        rows = run(config, resume=True)  # the other one is still dead: a warning
    finally:
        back.kill()
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    assert not any(row["teacher/unscored"] for row in rows)
    assert not any(KEY in path.read_bytes().decode("latin-1") for path in folder.rglob("*") if path.is_file())
