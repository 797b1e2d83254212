"""Laws of the weight sync: what a server gets is the student bit for bit, in the right order, or the run says so."""

from __future__ import annotations

import ast
import asyncio
import errno
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from fault_server import Table, servers
from sampling_server import Weights, drawn_by, made_prompts, sampler_over, samplers_of, sampling
from scope_opd.config import Config
from scope_opd.errors import ConfigError, RunFailed
from scope_opd.rollout.samplers import Samplers
from scope_opd.rollout.weight_sync import files, native
from scope_opd.rollout.weight_sync.carrier import Carrier, checkpoint_tensors
from scope_opd.rollout.weight_sync.files import Files
from scope_opd.rollout.weight_sync.native import Native
from scope_opd.rollout.weight_sync.publisher import Publisher
from scope_opd.serving.control import Control
from scope_opd.serving.launch import INSIDE
from scope_opd.types import WeightPublisher
from sync_server import GONE, SyncServer
from tiny import tiny_model

PROBE = (5, 6, 7, 8, 9, 10, 11, 12)
KINDS = ("qwen3", "llama")
"""Tied and untied."""


class Trainer:
    """A model that changes, its samplers and its publisher."""

    def __init__(self, model: PreTrainedModel, samplers: Samplers, carrier: Carrier, **options: Any) -> None:
        self.model, self.samplers, self.sampler = model, samplers, sampler_over(samplers)
        values = {"tolerance": 1e-5, "patience_s": 1.0, **options}
        self.publisher = Publisher(samplers, carrier, PROBE, lambda ids: Table(model).logprobs(ids), **values)

    def step(self) -> None:
        with torch.no_grad():
            for parameter in self.model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))


@contextmanager
def training(
    carrier: Callable[[PreTrainedModel], Carrier], *made: SyncServer, kind: str = "qwen3", **options: Any
) -> Iterator[Trainer]:
    with servers(*made), samplers_of(*(server.url for server in made)) as samplers:
        model = tiny_model(kind, seed=7)
        trainer = Trainer(model, samplers, carrier(model), **options)
        try:
            yield trainer
        finally:
            trainer.publisher.close()


def started(kind: str = "qwen3") -> SyncServer:
    return SyncServer(Weights(tiny_model(kind, seed=3)))


def by_files(folder: Path) -> Callable[[PreTrainedModel], Carrier]:
    return lambda model: Files(folder / "sync", model)


def by_gloo(model: PreTrainedModel) -> Carrier:
    return Native(model, "gloo", send_s=10.0)


def same(one: PreTrainedModel, other: PreTrainedModel) -> bool:
    left, right = one.state_dict(), other.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


# --- what is written -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["qwen3", "llama", "gemma2", "gpt_neox"])
def test_a_version_is_the_model_bit_for_bit(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind, seed=1)
    carrier = Files(tmp_path / "sync", model)
    carrier.prepare(4, "tag")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "sync" / "v4")
    assert same(again, model)
    assert [path.name for path in (tmp_path / "sync").iterdir()] == ["v4"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_cast_version_holds_what_the_server_would_round_to(kind: str, tmp_path: Path) -> None:
    model = tiny_model(kind, seed=1)
    Files(tmp_path, model, dtype=torch.bfloat16).prepare(0, "tag")
    found = load_file(tmp_path / "v0" / "model.safetensors")
    own = model.state_dict()
    assert found.keys() == own.keys() - ({"lm_head.weight"} if kind == "qwen3" else set())
    assert all(torch.equal(found[name], own[name].bfloat16()) for name in found)


def test_the_two_newest_versions_stay_and_none_after_the_end(tmp_path: Path) -> None:
    (tmp_path / "v70").mkdir()
    (tmp_path / ".writing-v71").mkdir()
    (tmp_path / "notes").mkdir()
    carrier = Files(tmp_path, tiny_model())
    for version in (8, 9, 10, 11):
        carrier.prepare(version, f"t/{version}")
    assert {path.name for path in tmp_path.iterdir()} == {"v10", "v11", "notes"}
    carrier.close()
    carrier.close()
    assert {path.name for path in tmp_path.iterdir()} == {"notes"}


def test_a_full_disk_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    carrier = Files(tmp_path / "sync", tiny_model())
    carrier.prepare(0, "t/0")

    def full(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "save_file", full)
    with pytest.raises(RunFailed, match=r"could not be written to .*v1: .*No space left.*free some space"):
        carrier.prepare(1, "t/1")
    assert [path.name for path in (tmp_path / "sync").iterdir()] == ["v0"]


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"rollout\.sync_dir: .*file/sync cannot be written: Not a directory"):
        Files(tmp_path / "file" / "sync", tiny_model()).prepare(0, "t/0")


def test_names_are_those_of_the_checkpoint() -> None:
    model = tiny_model("qwen3")
    tensors = checkpoint_tensors(model)
    assert "lm_head.weight" not in tensors
    assert tensors["model.embed_tokens.weight"].data_ptr() == model.get_output_embeddings().weight.data_ptr()


# --- in which order --------------------------------------------------------------------------------------------------

LOAD_BY_FILES = ["/collective_rpc scope_reload"]
UPDATE = ["/start_weight_update", "/update_weights", "/finish_weight_update"]
LOAD_BY_GLOO = ["/get_world_size", "/init_weight_transfer_engine", *UPDATE]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sync", ["files", "gloo"])
def test_each_version_reaches_every_server_bit_for_bit(kind: str, sync: str, tmp_path: Path) -> None:
    made = [started(kind), started(kind)]
    carrier = by_files(tmp_path) if sync == "files" else by_gloo
    with training(carrier, *made, kind=kind) as trainer:
        assert isinstance(trainer.publisher, WeightPublisher)
        for version in range(5):
            parts = trainer.publisher.publish(version)
            assert set(parts) == {"export", "load", "probe"}
            assert trainer.publisher.publish(version) == {}
            assert all(same(server.weights.model, trainer.model) for server in made)
            assert len(trainer.publisher.gaps) == 2
            assert max(trainer.publisher.gaps.values()) <= 1e-5
            assert len({server.weights.tag for server in made}) == 1
            trainer.step()
        load = LOAD_BY_FILES if sync == "files" else LOAD_BY_GLOO
        after = ["/reset_prefix_cache?reset_running_requests=true", "/update_weight_version", "/resume"]
        for server in made:
            assert server.calls[: len(load) + 4] == ["/pause?mode=wait", *load, *after]
            assert server.counted()["/resume"] == 5
            assert server.counted()["/init_weight_transfer_engine"] == (sync == "gloo")
        assert {rollout.policy_version for rollout in drawn_by(trainer.sampler, made_prompts(4), sampling())} == {4}
    assert not (tmp_path / "sync").exists()


@pytest.mark.parametrize("sync", ["files", "gloo"])
def test_responses_under_way_go_on_with_the_new_weights(sync: str, tmp_path: Path) -> None:
    server = started()
    with training(by_files(tmp_path) if sync == "files" else by_gloo, server) as trainer:
        trainer.publisher.publish(3)
        prompts, params = made_prompts(6), sampling(max_tokens=30, stop_token_ids=())
        drawn_by(trainer.sampler, prompts[:1], params)
        server.token_delay_s = 0.005
        server.calls.clear()
        found: list[Any] = []
        drawing = threading.Thread(target=lambda: found.extend(drawn_by(trainer.sampler, prompts, params)))
        drawing.start()
        for version in (4, 5):
            time.sleep(0.06)
            trainer.step()
            trainer.publisher.publish(version)
        drawing.join()
        tags = {seed: [int(tag.partition("/")[2]) for tag in all_tags] for seed, all_tags in server.versions.items()}
    assert server.calls[0] == "/pause?mode=keep"
    assert server.calls.count("/pause?mode=keep") == 2
    spans = [[version for first, last, version in r.policy_versions for _ in range(first, last)] for r in found]
    assert sorted(spans) == sorted(tags.values())[-len(spans) :] or all(span in tags.values() for span in spans)
    assert any(len(set(span)) == 3 for span in spans)


def test_servers_on_the_trainers_gpu_sleep_while_it_steps(tmp_path: Path) -> None:
    server = started()
    with training(by_files(tmp_path), server, colocated=True) as trainer:
        trainer.publisher.publish(0)
        server.calls.clear()
        trainer.publisher.release()
        trainer.publisher.release()
        assert server.calls == ["/update_weight_version", "/sleep?level=2"]
        server.calls.clear()
        trainer.publisher.publish(0)  # the same version: its weights are gone all the same
        assert server.calls == [
            "/wake_up?tags=weights", "/collective_rpc scope_reload", "/update_weight_version",
            "/wake_up?tags=kv_cache", "/resume",
        ]  # fmt: skip
        assert same(server.weights.model, trainer.model)


def test_servers_elsewhere_do_not_sleep(tmp_path: Path) -> None:
    server = started()
    with training(by_files(tmp_path), server) as trainer:
        trainer.publisher.publish(0)
        count = len(server.calls)
        trainer.publisher.release()
        assert trainer.publisher.publish(0) == {}
        assert len(server.calls) == count


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_other_numbers_than_the_trainers_end_the_run(tmp_path: Path) -> None:
    server = started()
    with training(by_files(tmp_path), server) as trainer:
        trainer.publisher.publish(0)
        server.broken = True
        trainer.step()
        with pytest.raises(
            RunFailed, match=r"127\.0\.0\.1.*does not serve the trainer's weights.*differ by \d"
        ) as error:
            trainer.publisher.publish(1)
    assert error.value.exit_code == 1
    assert "at most 1e-05" in str(error.value)


@pytest.mark.parametrize("sync", ["files", "gloo"])
@pytest.mark.parametrize("path", ["/pause", "load", "/reset_prefix_cache", "/update_weight_version", "/resume"])
@pytest.mark.parametrize("status", [500, 0])
def test_a_server_that_fails_is_left_out_and_comes_back_with_the_weights(
    sync: str, path: str, status: int, tmp_path: Path
) -> None:
    good, bad = started(), started()
    with training(by_files(tmp_path) if sync == "files" else by_gloo, good, bad) as trainer:
        trainer.publisher.publish(0)
        trainer.step()
        load = "/collective_rpc" if sync == "files" else "/update_weights"
        bad.fail[load if path == "load" else path] = [status]
        trainer.publisher.publish(1)
        assert same(good.weights.model, trainer.model)
        assert [endpoint.state for endpoint in trainer.samplers.endpoints] == ["up", "down"]
        prompts = made_prompts(8)
        end = time.monotonic() + 10
        while trainer.samplers.endpoints[1].state != "up" and time.monotonic() < end:
            rollouts = drawn_by(trainer.sampler, prompts, sampling(4))
            assert {rollout.policy_version for rollout in rollouts} == {1}
        assert same(bad.weights.model, trainer.model)
        assert not bad.paused
        assert bad.weights.tag == good.weights.tag


def test_a_worker_that_fails_in_mid_broadcast_hangs_nobody() -> None:
    good, bad = started(), started()
    with training(by_gloo, good, bad) as trainer:
        trainer.publisher.publish(0)
        trainer.step()
        bad.stuck.add(GONE)
        began = time.monotonic()
        trainer.publisher.publish(1)
        assert time.monotonic() - began < 5
        assert trainer.samplers.endpoints[1].state == "down"
        bad.stuck.clear()
        trainer.step()
        time.sleep(0.2)
        drawn_by(trainer.sampler, made_prompts(2), sampling(1))
        trainer.publisher.publish(2)
        assert same(good.weights.model, trainer.model)


def test_without_any_server_the_run_ends(tmp_path: Path) -> None:
    server = started()
    with training(by_files(tmp_path), server, patience_s=0.5) as trainer:
        trainer.publisher.publish(0)
        server.fail["/collective_rpc"] = [503] * 1000
        with pytest.raises(
            RunFailed, match=r"no server of the student could be given .* version 1: .*status 503|told to"
        ):
            trainer.publisher.publish(1)
        server.fail.clear()
        trainer.publisher.publish(1)


def test_a_call_that_is_never_answered_has_a_limit(tmp_path: Path) -> None:
    server = started()
    with training(by_files(tmp_path), server, patience_s=0.2, load_s=0.3) as trainer:
        trainer.publisher.publish(0)
        server.stuck.add("/pause")
        began = time.monotonic()
        with pytest.raises(RunFailed, match=r"POST /pause: no whole answer in 0\.3 s"):
            trainer.publisher.publish(1)
        assert time.monotonic() - began < 5


def test_a_bad_folder_is_found_before_the_server_is_told(tmp_path: Path) -> None:
    server, model = started(), tiny_model()
    with servers(server), samplers_of(server.url) as samplers:
        load = Files(tmp_path, model).prepare(1, "t/1")
        (tmp_path / "v1" / "model.safetensors").write_bytes(b"")
        control = Control(samplers.http, samplers.endpoints[0])
        with pytest.raises(RunFailed, match="no longer holds the weights 't/1'"):
            samplers.thread.run(load(control))
    assert server.calls == []


def test_a_folder_that_the_server_does_not_see_names_the_setting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = started()
    monkeypatch.setattr(files, "SEEN_S", 0.3)
    answer = {"results": [{"error": "/x has no *.safetensors on the server's machine", "untouched": True}]}
    server._do_collective_rpc = lambda query, request: answer  # type: ignore[method-assign]
    with (
        training(by_files(tmp_path), server) as trainer,
        pytest.raises(RunFailed, match=r"cannot read the new weights.*set rollout\.sync_dir .*'gloo'"),
    ):
        trainer.publisher.publish(0)
    assert server.counted()["/collective_rpc"] > 1


@pytest.mark.parametrize(("sync", "lack", "words"), [
    ("files", "development", "VLLM_SERVER_DEV_MODE=1"), ("files", "extension", "--worker-extension-cls"),
    ("gloo", "transfer", "--weight-transfer-config"),
])  # fmt: skip
def test_a_server_started_without_what_is_needed_names_it(sync: str, lack: str, words: str, tmp_path: Path) -> None:
    server = started()
    setattr(server, lack, False)
    began = time.monotonic()
    with (
        training(by_files(tmp_path) if sync == "files" else by_gloo, server) as trainer,
        pytest.raises(RunFailed, match=words),
    ):
        trainer.publisher.publish(0)
    assert time.monotonic() - began < 10


# --- over connections ------------------------------------------------------------------------------------------------


def test_what_is_sent_is_the_version_that_was_published(tmp_path: Path) -> None:
    server, model = started(), tiny_model()
    carrier = Native(model, "gloo")
    with servers(server), samplers_of(server.url) as samplers:
        load = carrier.prepare(0, "t/0")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        samplers.thread.run(load(Control(samplers.http, samplers.endpoints[0])))
        carrier.close()
        assert all(torch.equal(before[name], tensor) for name, tensor in server.weights.model.state_dict().items())


@pytest.mark.parametrize("method", ["nccl", "ipc"])
def test_ways_between_gpus_need_one(method: Any) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(ConfigError, match=rf"rollout\.sync = '{method}' and the trainer has no GPU"):
        Native(tiny_model(), method)


def test_an_address_of_another_machine_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"rollout\.sync_host = '192\.0\.2\.1'"):
        Native(tiny_model(), "gloo", host="192.0.2.1")


def test_ipc_hands_over_handles_in_one_update(monkeypatch: pytest.MonkeyPatch) -> None:
    """The order alone: handles need a GPU."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(native, "ipc_handle", lambda tensor: {"shape": list(tensor.shape)})
    server, seen = started(), []
    server._do_init_weight_transfer_engine = lambda query, request: seen.append(request) or {}  # type: ignore
    server._do_update_weights = lambda query, request: seen.append(request) or {}  # type: ignore
    server._do_finish_weight_update = lambda query, request: {}  # type: ignore[method-assign]
    model = tiny_model()
    with servers(server), samplers_of(server.url) as samplers:
        load = Native(model, "ipc").prepare(0, "t/0")
        samplers.thread.run(load(Control(samplers.http, samplers.endpoints[0])))
    assert server.calls == ["/init_weight_transfer_engine", *UPDATE]
    assert seen[0] == {"init_info": {"method": "ipc"}}
    update = seen[1]["update_info"]
    assert update["names"] == list(checkpoint_tensors(model))
    assert [each["shape"] for each in update["handles"]] == update["shapes"]


def test_servers_elsewhere_need_the_trainers_address() -> None:
    table = {"base_urls": ["http://10.0.0.7:8000/v1"], "model": "student", "sync": "gloo"}
    with pytest.raises(ValueError, match="no sync_host"):
        Config.model_validate({"rollout": table})
    Config.model_validate({"rollout": {**table, "sync_host": "10.0.0.1"}})
    Config.model_validate({"rollout": {**table, "sync": "files"}})


def test_what_runs_inside_a_server_imports_nothing_of_ours() -> None:
    allowed = {*sys.stdlib_module_names, "torch", "safetensors", "vllm"}
    for file in INSIDE.glob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        names = [node.module or "." for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
        names += [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names]
        assert {name.partition(".")[0] for name in names} <= allowed
    assert [file.name for file in INSIDE.glob("*.py")] == ["scope_vllm.py"]


def test_work_apart_gives_its_answer_or_its_error() -> None:
    def fails() -> Sequence[int]:
        raise ValueError("no")

    assert asyncio.run(native.apart(lambda: 3)) == 3
    with pytest.raises(ValueError, match="no"):
        asyncio.run(native.apart(fails))
