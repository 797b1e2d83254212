"""Laws of rollouts by real vLLM servers: the model's own samples, to the token, whatever dies."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from vllm_server import KEY, MODEL, PYTHON, VllmServer

from scope_opd.addresses import parse_base_url
from scope_opd.cli.main import main
from scope_opd.errors import ConfigError, RunFailed
from scope_opd.rollout.samplers import NAMES, Samplers
from scope_opd.rollout.served import ServedSampler
from scope_opd.serving.pool import PoolSettings
from scope_opd.serving.route import ClientSettings, RouteSettings
from scope_opd.serving.secrets import Secret
from scope_opd.types import Prompt, Rollout, SamplingParams
from tiny import EOS_ID, save_pair, tiny_tokenizer

pytestmark = [pytest.mark.serving, pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="no SCOPE_VLLM_PYTHON")]

T = 0.7


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "student"
    save_pair(folder, "qwen3", seed=3, hidden_size=64, head_dim=32, context=256)
    rows = [{"id": f"p{i}", "problem": f"What is {i} + {i + 1}?", "answer": 2 * i + 1} for i in range(6)]
    (folder.parent / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def two(folder: Path) -> Iterator[dict[str, VllmServer]]:
    """ "one" reports what it samples from; "raw" does not. They start side by side."""
    servers: dict[str, VllmServer] = {}
    try:
        servers["one"] = VllmServer(folder, student=True)
        servers["raw"] = VllmServer(folder)
        for server in servers.values():
            server.wait()
        yield servers
    finally:
        for server in servers.values():
            server.kill()


@contextmanager
def sampler_over(*servers: VllmServer, key: str = KEY, model: str = MODEL, **options: Any) -> Iterator[ServedSampler]:
    addresses = tuple(parse_base_url(server.url) for server in servers)
    samplers = Samplers(
        RouteSettings(addresses, model, Secret(key), NAMES),
        client=ClientSettings(connect_timeout_s=10.0, read_timeout_s=120.0, start_s=60.0),
        pool=PoolSettings(),
        prompt=(5, 6),
    )
    try:
        samplers.open()
        yield ServedSampler(samplers, tiny_tokenizer(), **{"vocabulary": 320, **options})
    finally:
        samplers.close()


def prompts(count: int) -> list[Prompt]:
    return [Prompt(f"p{index}", "", None, (5 + index, 9, 30, 41 + index)) for index in range(count)]


def drawn_by(sampler: ServedSampler, given: Sequence[Prompt], **more: Any) -> list[Rollout]:
    values = {"n": 3, "temperature": T, "max_tokens": 40, "stop_token_ids": (EOS_ID,), "seed": 5}

    async def collect() -> list[Rollout]:
        params = SamplingParams(**{**values, **more})
        return [each async for each in sampler.sample(given, params, step=2, policy_version=7)]

    return sorted(asyncio.run(collect()), key=lambda rollout: rollout.id)


def forward(model: PreTrainedModel, rollout: Rollout, temperature: float) -> torch.Tensor:
    """Log-probs of the vocabulary at each place of the response."""
    ids = torch.tensor([[*rollout.prompt_token_ids, *rollout.token_ids]])
    with torch.no_grad():
        rows = (model(input_ids=ids).logits[0].double() / temperature).log_softmax(-1)
    return rows[len(rollout.prompt_token_ids) - 1 : -1]


def gap(model: PreTrainedModel, rollouts: Sequence[Rollout], temperature: float) -> float:
    """Largest difference of a sampled log-prob from that of the forward pass, in nats."""
    worst = 0.0
    for rollout in rollouts:
        rows = forward(model, rollout, temperature).gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
        worst = max(worst, float((rows - torch.tensor(rollout.logprobs).double()).abs().max()))
    return worst


@pytest.mark.parametrize("temperature", [0.7, 1.0, 1.6])
def test_sampled_log_probs_are_those_of_the_forward_pass(
    temperature: float, two: dict[str, VllmServer], model: PreTrainedModel
) -> None:
    with sampler_over(two["one"]) as sampler:
        rollouts = drawn_by(sampler, prompts(4), temperature=temperature)
    found = gap(model, rollouts, temperature)
    print(f"\nT = {temperature}: largest difference {found:.2e} nats over {sum(len(r.token_ids) for r in rollouts)}")
    assert found <= 1e-4
    assert [(r.group, r.sample) for r in rollouts] == [(f"p{p}", s) for p in range(4) for s in range(3)]
    assert all(r.policy_versions == [[0, len(r.token_ids), 7]] for r in rollouts)


def test_log_probs_under_top_k_are_those_of_what_is_left(two: dict[str, VllmServer], model: PreTrainedModel) -> None:
    with sampler_over(two["one"]) as sampler:
        rollouts = drawn_by(sampler, prompts(3), top_k=5)
    for rollout in rollouts:
        rows = forward(model, rollout, T)
        kept = rows.topk(5).values.logsumexp(-1)
        own = rows.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0] - kept
        assert (own - torch.tensor(rollout.logprobs).double()).abs().max() <= 1e-4


def test_seeds_reproduce_and_differ(two: dict[str, VllmServer]) -> None:
    with sampler_over(two["one"]) as sampler:
        first, again = (drawn_by(sampler, prompts(4)) for _ in range(2))
        other = drawn_by(sampler, prompts(4), seed=6)
    same = sum(a.token_ids == b.token_ids for a, b in zip(first, again, strict=True))
    print(f"\n{same} of {len(first)} the same")
    assert same == len(first)
    assert len({tuple(r.token_ids) for r in first}) == len(first)
    assert not {tuple(r.token_ids) for r in first} & {tuple(r.token_ids) for r in other}


def test_a_response_ends_at_the_students_end_tokens_alone(two: dict[str, VllmServer]) -> None:
    with sampler_over(two["one"]) as sampler:
        free = drawn_by(sampler, prompts(3), stop_token_ids=())
        assert all(r.finish_reason == "length" and len(r.token_ids) == 40 for r in free)
        stops = (free[0].token_ids[10], free[4].token_ids[5])
        stopped = drawn_by(sampler, prompts(3), stop_token_ids=stops)
    for whole, rollout in zip(free, stopped, strict=True):
        places = [place for place, token in enumerate(whole.token_ids) if token in stops]
        expected = whole.token_ids[: places[0] + 1] if places else whole.token_ids
        assert rollout.token_ids == expected
        assert rollout.finish_reason == ("stop" if places else "length")
    assert any(rollout.finish_reason == "stop" for rollout in stopped)


def test_the_context_is_used_to_its_last_token_and_not_beyond(two: dict[str, VllmServer]) -> None:
    with sampler_over(two["one"]) as sampler:
        assert sampler.samplers.context == 256
        rollouts = drawn_by(sampler, prompts(1), n=1, max_tokens=252, stop_token_ids=())
        assert len(rollouts[0].token_ids) == 252
        with pytest.raises(RunFailed, match=r"needs 257 tokens.*at most the 256"):
            drawn_by(sampler, prompts(1), n=1, max_tokens=253)
        sampler.samplers._known[sampler.samplers.endpoints[0]].context = None  # as of a server that does not tell
        with pytest.raises(RunFailed, match=r"cut short by the server at 252 tokens"):
            drawn_by(sampler, prompts(1), n=1, max_tokens=253, stop_token_ids=())


def test_a_server_that_reports_other_log_probs_is_refused(two: dict[str, VllmServer], model: PreTrainedModel) -> None:
    with sampler_over(two["raw"]) as sampler, pytest.raises(RunFailed, match="processed_logprobs"):
        drawn_by(sampler, prompts(1))
    with sampler_over(two["raw"]) as sampler:
        assert gap(model, drawn_by(sampler, prompts(2), temperature=1.0), 1.0) <= 1e-4


def test_a_wrong_key_or_name_is_one_line(two: dict[str, VllmServer]) -> None:
    with pytest.raises(ConfigError, match=r"answers 401.*rollout.api_key_env"), sampler_over(two["one"], key="wrong"):
        pass
    with pytest.raises(ConfigError, match=rf"serves '{MODEL}'"), sampler_over(two["one"], model="another"):
        pass


def test_scope_eval_draws_from_the_server(
    two: dict[str, VllmServer], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EVAL_KEY", KEY)
    command = [
        "eval", "--base-url", two["one"].url, "--served-model", MODEL, "--api-key-env", "EVAL_KEY", "--tokenizer",
        str(folder), "--benchmark", f"mine={folder.parent / 'rows.jsonl'}", "--n", "4", "--max-tokens", "20",
        "--top-p", "0.9", "--workers", "1",
    ]  # fmt: skip
    began = time.monotonic()
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    print(f"\n24 samples in {time.monotonic() - began:.1f} s")
    assert main([*command, "--out", str(tmp_path / "again")]) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["settings"]["source"]["model"] == MODEL
    assert sum(len(problem["lengths"]) for problem in found["benchmarks"]["mine"]["problems"]) == 24
    assert found["benchmarks"]["mine"]["metrics"]["nll"] > 0
    texts = []
    for name in ("out", "again"):
        rows = map(json.loads, (tmp_path / name / "samples.jsonl").read_text().splitlines())
        texts.append({(row["problem"], row["sample"]): row["text"] for row in rows})
    assert texts[0] == texts[1]


def test_every_rollout_arrives_though_one_of_two_servers_is_killed_in_mid_step(
    two: dict[str, VllmServer], folder: Path, model: PreTrainedModel
) -> None:
    two["raw"].kill()
    two["second"] = VllmServer(folder, student=True).wait()
    given = prompts(16)
    with sampler_over(two["one"], two["second"]) as sampler:
        drawn_by(sampler, prompts(2))
        dead = sampler.samplers.endpoints[1]

        def kill() -> None:
            end = time.monotonic() + 60
            while sum(len(live.stream.token_ids) for live in sampler.samplers._known[dead].live) < 200:
                assert time.monotonic() < end, "it never got going"
                time.sleep(0.005)
            two["second"].kill()

        killer = threading.Thread(target=kill)
        killer.start()
        began = time.monotonic()
        rollouts = drawn_by(sampler, given, n=4, max_tokens=200, stop_token_ids=())
        seconds = time.monotonic() - began
        killer.join()
        told = sampler.notes()
    again = sum(rollout.sampling["tries"] > 1 for rollout in rollouts)
    print(f"\n{again} of {len(rollouts)} rollouts were asked for again; {seconds:.1f} s")
    assert again >= 1
    assert len({rollout.id for rollout in rollouts}) == len(rollouts) == 64
    assert all(len(rollout.token_ids) == 200 for rollout in rollouts)
    assert gap(model, rollouts, T) <= 1e-4
    assert any("is down" in line and two["second"].url in line for line in told)
