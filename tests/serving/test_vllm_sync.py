"""Laws of the weight sync against real vLLM servers: after a sync a server is the trainer's model, or the run ends."""

from __future__ import annotations

import asyncio
import math
import statistics
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM
from vllm_server import KEY, MODEL, PYTHON, VllmServer

from scope_opd.addresses import parse_base_url
from scope_opd.errors import RunFailed
from scope_opd.rollout.samplers import NAMES, Samplers
from scope_opd.rollout.served import ServedSampler
from scope_opd.rollout.weight_sync.carrier import Carrier, Load, checkpoint_tensors
from scope_opd.rollout.weight_sync.files import Files
from scope_opd.rollout.weight_sync.native import Native, Sending
from scope_opd.rollout.weight_sync.publisher import Publisher
from scope_opd.serving.control import Control
from scope_opd.serving.pool import PoolSettings
from scope_opd.serving.route import ClientSettings, RouteSettings
from scope_opd.serving.secrets import Secret
from scope_opd.types import Prompt, Rollout, SamplingParams
from tiny import EOS_ID, save_pair, tiny_tokenizer

pytestmark = [pytest.mark.serving, pytest.mark.slow, pytest.mark.skipif(not PYTHON, reason="no SCOPE_VLLM_PYTHON")]

PROBE = [5, 9, 30, 77, 100, 3, 250, 310, 44, 12, 200, 180, 7, 8, 19, 60, 61, 62, 290, 33]
KINDS = ("tied", "untied")
"""tied: Qwen2, with biases and one matrix for embedding and head; untied: Llama."""


def qwen2(seed: int) -> Qwen2ForCausalLM:
    config = Qwen2Config(
        vocab_size=320, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=256, initializer_range=0.15, pad_token_id=0, eos_token_id=EOS_ID,
        bos_token_id=None, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen2ForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    qwen2(7).save_pretrained(folder / "tied")
    tiny_tokenizer().save_pretrained(folder / "tied")
    save_pair(folder / "untied", "llama", seed=8, hidden_size=64, head_dim=32, context=256, initializer_range=0.15)
    return folder


@pytest.fixture(scope="module")
def served(folders: Path) -> Iterator[dict[str, VllmServer]]:
    with ExitStack() as stack:
        started = {kind: VllmServer(folders / kind, student=True) for kind in KINDS}
        for server in started.values():
            stack.callback(server.kill)
        yield {kind: server.wait() for kind, server in started.items()}


class Trainer:
    """A model that changes, its samplers and its publisher. Use as a context manager."""

    def __init__(
        self,
        model: PreTrainedModel,
        server: VllmServer,
        carrier: Callable[[PreTrainedModel], Carrier],
        *,
        seed: int = 0,
        patience_s: float = 20.0,
    ) -> None:
        self.model, self._random = model, torch.Generator().manual_seed(seed)
        self.samplers = Samplers(
            RouteSettings((parse_base_url(server.url),), MODEL, Secret(KEY), NAMES),
            client=ClientSettings(connect_timeout_s=10.0, read_timeout_s=120.0, start_s=120.0),
            pool=PoolSettings(deadline_s=max(patience_s, 60.0)),
            prompt=(5, 6),
        )
        self.publisher = Publisher(
            self.samplers, carrier(model), PROBE, self.logprobs, tolerance=1e-4, patience_s=patience_s
        )

    def __enter__(self) -> Trainer:
        self.samplers.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.publisher.close()
        self.samplers.close()

    def logprobs(self, token_ids: Any, temperature: float = 1.0) -> list[float]:
        ids = torch.tensor([list(token_ids)])
        with torch.no_grad():
            rows = (self.model(input_ids=ids).logits[0] / temperature).log_softmax(-1)
        return rows[:-1].gather(-1, ids[0, 1:, None])[:, 0].tolist()

    def step(self, size: float = 0.05) -> None:
        """Every parameter changes, biases and norms too."""
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(size * torch.randn(parameter.shape, generator=self._random))

    def draw(self, n: int = 2, prompts: int = 4, **more: Any) -> list[Rollout]:
        sampler = ServedSampler(self.samplers, tiny_tokenizer(), vocabulary=320)
        rows = [Prompt(f"p{index}", "", None, (5 + index, 9, 30)) for index in range(prompts)]
        values = {"temperature": 0.7, "max_tokens": 24, "stop_token_ids": (), "seed": 1}

        async def collect() -> list[Rollout]:
            params = SamplingParams(n=n, **{**values, **more})
            return [each async for each in sampler.sample(rows, params, step=0, policy_version=0)]

        return asyncio.run(collect())

    def gap(self, rollout: Rollout, first: int = 0, last: int | None = None, temperature: float = 0.7) -> float:
        """Largest difference of a rollout's log-probs from those of the model as it is now, in nats."""
        own = self.logprobs((*rollout.prompt_token_ids, *rollout.token_ids), temperature)
        own = own[len(rollout.prompt_token_ids) - 1 :]
        return max(abs(a - b) for a, b in list(zip(own, rollout.logprobs, strict=True))[first:last])


def by_files(folder: Path) -> Callable[[PreTrainedModel], Carrier]:
    return lambda model: Files(folder, model)


def by_gloo(model: PreTrainedModel) -> Carrier:
    return Native(model, "gloo")


def load(folders: Path, kind: str) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folders / kind).eval()
    return model


@pytest.mark.parametrize("sync", ["files", "gloo"])
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_versions_are_served_as_the_trainer_has_them(
    kind: str, sync: str, folders: Path, served: dict[str, VllmServer], tmp_path: Path
) -> None:
    carrier = by_files(tmp_path / "sync") if sync == "files" else by_gloo
    gaps, seconds = [], []
    with Trainer(load(folders, kind), served[kind], carrier) as trainer:
        for version in range(20):
            if version:
                trainer.step()
            parts = trainer.publisher.publish(version)
            assert trainer.publisher.publish(version) == {}
            seconds.append(sum(parts.values()))
            gaps += trainer.publisher.gaps.values()
            rollouts = trainer.draw()
            assert {rollout.policy_version for rollout in rollouts} == {version}
            assert max(trainer.gap(rollout) for rollout in rollouts) <= 1e-4
    print(f"\n{kind}, {sync}: worst probe {max(gaps):.2g} nats, a publish {statistics.median(seconds):.3f} s")
    assert len(gaps) == 20
    assert max(gaps) <= 1e-4
    if sync == "files":
        assert not (tmp_path / "sync").exists()


class Plain:
    """vLLM's own reload, which leaves a tied head as it was on a CPU."""

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        self.folder, self.model = folder, model

    def prepare(self, version: int, tag: str) -> Load:
        self.model.save_pretrained(self.folder)

        async def load(control: Control) -> None:
            await control._post(
                "/collective_rpc", 60.0, {"method": "reload_weights", "kwargs": {"weights_path": str(self.folder)}}
            )

        return load

    def close(self) -> None: ...


def test_a_load_that_went_wrong_in_silence_ends_the_run(
    folders: Path, served: dict[str, VllmServer], tmp_path: Path
) -> None:
    with Trainer(load(folders, "tied"), served["tied"], lambda model: Plain(tmp_path / "plain", model)) as trainer:
        trainer.step()
        with pytest.raises(RunFailed, match=r"does not serve the trainer's weights.*differ by \d.* at most 0\.0001"):
            trainer.publisher.publish(1)
    with Trainer(load(folders, "tied"), served["tied"], by_files(tmp_path / "sync")) as trainer:
        trainer.step()  # the same server, loaded rightly
        trainer.publisher.publish(1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_load_that_broke_off_leaves_no_trace(
    kind: str, folders: Path, served: dict[str, VllmServer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Trainer(load(folders, kind), served[kind], by_gloo) as trainer:
        trainer.publisher.publish(0)
        endpoint = trainer.samplers.endpoints[0]
        control = Control(trainer.samplers.http, endpoint)
        tensors = {name: tensor.clone() for name, tensor in checkpoint_tensors(trainer.model).items()}
        tensors[next(name for name in tensors if "down_proj" in name)] = torch.zeros(3, 3)
        save_file(tensors, tmp_path / "model.safetensors", metadata={"scope_tag": "bad"})
        said = trainer.samplers.thread.run(control.reload(str(tmp_path), "bad"))
        assert said["untouched"] is False
        trainer.step()
        trainer.publisher.publish(1)

        whole, sent = Sending._broadcast, []

        def breaks_off(self: Sending, link: Any) -> None:
            if not sent:
                sent.append(0)
                self = Sending(self.native, dict(list(self.tensors.items())[:5]))
                whole(self, link)
                raise RuntimeError("the trainer's connection broke")
            whole(self, link)

        monkeypatch.setattr(Sending, "_broadcast", breaks_off)
        trainer.step()
        trainer.publisher.publish(2)
        assert sent
        assert max(trainer.gap(rollout) for rollout in trainer.draw()) <= 1e-4


def clone(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def wait_for_tokens(known: Any, count: int, drawing: threading.Thread) -> None:
    """Until a rollout in the making has got `count` tokens more, or a new one has so many."""
    before = {id(each.stream): len(each.stream.token_ids) for each in list(known.live)}
    while not any(len(each.stream.token_ids) >= before.get(id(each.stream), 0) + count for each in list(known.live)):
        assert drawing.is_alive()
        threading.Event().wait(0.005)


@pytest.mark.parametrize("sync", ["files", "gloo"])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_change_in_flight_change_what_follows_and_nothing_else(
    kind: str, sync: str, folders: Path, served: dict[str, VllmServer], tmp_path: Path
) -> None:
    carrier = by_files(tmp_path / "sync") if sync == "files" else by_gloo
    found: list[Rollout] = []
    with Trainer(load(folders, kind), served[kind], carrier) as trainer:
        trainer.publisher.publish(0)
        trainer.draw(max_tokens=4)  # which log-probs it reports is asked before the first sample
        states = [clone(trainer.model)]
        for _ in range(2):
            trainer.step()
            states.append(clone(trainer.model))
        known, over = trainer.samplers._known[trainer.samplers.endpoints[0]], threading.Event()

        def keep_drawing() -> None:  # a publish may take as long as a whole draw
            while not over.is_set():
                found.extend(trainer.draw(n=6, prompts=4, max_tokens=220))

        drawing = threading.Thread(target=keep_drawing)
        drawing.start()
        try:
            for version in (1, 2):
                wait_for_tokens(known, 30, drawing)
                trainer.model.load_state_dict(states[version])
                trainer.publisher.publish(version)
            wait_for_tokens(known, 30, drawing)
        finally:
            over.set()
            drawing.join()
        worst, nearest_other, counts = 0.0, math.inf, [0, 0, 0]
        for version, state in enumerate(states):
            trainer.model.load_state_dict(state)
            for rollout in found:
                for first, last, of in rollout.policy_versions or []:
                    if of == version:
                        counts[version] += last - first
                        worst = max(worst, trainer.gap(rollout, first, last))
                    elif last - first > 10:
                        nearest_other = min(nearest_other, trainer.gap(rollout, first, last))
    several = sum(len(rollout.policy_versions or []) > 1 for rollout in found)
    print(f"\n{kind}, {sync}: {counts} tokens of versions 0, 1, 2; {several} of {len(found)} rollouts of several; "
          f"worst difference {worst:.2g} nats, another version's at least {nearest_other:.2g}")  # fmt: skip
    assert len(found) >= 24
    assert all(len(rollout.token_ids) == 220 for rollout in found)
    assert sum(counts) == len(found) * 220
    assert min(counts) > 0
    assert several > 0
    assert worst <= 1e-4
    assert nearest_other > 0.01


def test_a_server_that_restarts_gets_the_weights_before_it_is_used(
    folders: Path, served: dict[str, VllmServer]
) -> None:
    server = served["tied"]
    try:
        with Trainer(load(folders, "tied"), server, by_gloo, patience_s=300.0) as trainer:
            trainer.step()
            trainer.publisher.publish(1)
            server.kill()
            server = VllmServer(folders / "tied", port=server.port, student=True)
            rollouts = trainer.draw()  # waits until it is back
            assert {rollout.policy_version for rollout in rollouts} == {1}
            assert max(trainer.gap(rollout) for rollout in rollouts) <= 1e-4
            server.kill()
            server = VllmServer(folders / "tied", port=server.port, student=True)
            trainer.step()
            trainer.publisher.publish(2)  # so does this
            assert max(trainer.gap(rollout) for rollout in trainer.draw()) <= 1e-4
    finally:
        server.kill()
