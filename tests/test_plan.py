"""``scope plan``: a run is judged by its GPUs before anything is loaded."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scope_opd.cli.launch_asks import planned
from scope_opd.cli.main import main
from scope_opd.cli.plan import Machine, _student, hours, plan, read_config
from scope_opd.config import Config, load_config, validate_config
from scope_opd.errors import ConfigError
from scope_opd.models.footprint import update_moments
from scope_opd.models.memory import Layout, Updates, largest
from scope_opd.models.shapes import published_config

ROOT = Path(__file__).resolve().parents[1]
PAPER = sorted((ROOT / "configs" / "paper").glob("*.toml"))
GB = 10**9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of which only config.json is there."""
    from transformers import Qwen3Config

    path = tmp_path_factory.mktemp("model")
    Qwen3Config(
        vocab_size=5000, hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=4096, tie_word_embeddings=True,
    ).save_pretrained(path)  # fmt: skip
    return path


def settings(folder: Path, **tables: dict[str, Any]) -> Config:
    values: dict[str, dict[str, Any]] = {
        "model": {"path": str(folder)},
        "teacher": {"path": str(folder)},
        "data": {"max_prompt_tokens": 128},
        "rollout": {"max_tokens": 384, "n": 4},
        "train": {"prompts_per_step": 8, "max_tokens_per_microbatch": 1024},
    }
    for name, table in tables.items():
        values[name] = values.get(name, {}) | table
    return validate_config(values)


def machine(memory: float = 80, ranks: int = 1) -> Machine:
    return Machine(ranks, int(memory * GB), 0)


@pytest.mark.parametrize("path", PAPER, ids=lambda path: path.stem)
class TestThePapersConfigs:
    def test_they_fit_the_papers_machines(
        self, path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        assert main(["plan", str(path), "--gpus", "16", "--gpu-memory", "80", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found["fits"]
        assert found["gpus"] == 20
        assert found["step_tokens"]["generated"] == 256 * 8 * 12288
        assert found["largest_microbatch_tokens"] > found["microbatch_tokens"] == 16384

    def test_every_variable_of_the_releases_script_is_mapped(self, path: Path) -> None:
        text = (ROOT / "configs" / "paper" / "deepseek_r1_distill_qwen_1_5b.toml").read_text(encoding="utf-8")
        variables = (
            "POLICY_MODEL_PATH TEACHER_MODEL_NAME IP_POOL TRAIN_DATA VAL_DATA LR TRAIN_BATCH_SIZE PPO_MINI_BATCH_SIZE "
            "MAX_PROMPT_LENGTH MAX_RESPONSE_LENGTH ROLLOUT_N TEMPERATURE GPU_MEMORY_UTILIZATION TOTAL_EPOCHS SAVE_FREQ "
            "TEST_FREQ ADV_ESTIMATOR DISTILL_ENABLE DISTILL_SIGNAL_IN_LOSS DISTILL_LOSS_TYPE KL_LOSS_TYPE USE_KL_LOSS "
            "KL_LOSS_COEF KL_COEF USE_SCOPE_DUAL_PATH_WEIGHTING SCOPE_TAU SCOPE_USE_SEQ_WEIGHTS "
            "USE_STUDENT_PATH_WEIGHTS USE_TEACHER_PATH_WEIGHTS STUDENT_PATH_PPL_POSITIVE TEACHER_PATH_PPL_POSITIVE "
            "PROJECT_NAME EXTRA_NAME PYTHONPATH PATH PROJECT_PATH CUR_DIR NNODES MASTER_ADDR GPUS_PER_NODE NODE_RANK "
            "WORLD_SIZE PORT SAVE_DIR RAY_memory_monitor_refresh_ms VLLM_USE_V1 WANDB_MODE WANDB_DIR"
        )
        named = set(re.findall(r"\w+", text.split("[model]")[0]))
        assert set(re.findall(r"\w+", variables)) <= named
        assert path.name.removesuffix(".toml") in {"deepseek_r1_distill_qwen_1_5b", "qwen3_1_7b_base"}

    def test_they_say_what_the_paper_and_the_release_say(self, path: Path) -> None:
        config = load_config(path)
        assert (config.train.lr, config.train.param_dtype, config.train.weight_decay) == (5e-5, "bfloat16", 0.01)
        assert (config.train.prompts_per_step, config.rollout.n, config.rollout.temperature) == (256, 8, 0.6)
        assert (config.data.max_prompt_tokens, config.rollout.max_tokens) == (2048, 12288)
        assert (config.objective.student_weight, config.objective.teacher_weight) == ("inverse_ppl", "inverse_ppl")
        assert len(config.rollout.base_urls) == 16
        assert len(config.teacher.base_urls) == 4


def test_a_dry_run_of_the_papers_student_at_full_depth_is_what_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    config = published_config("deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B")
    planned = update_moments(config, 1024, dtype=torch.bfloat16, checkpointing="full", temperature=0.6)
    monkeypatch.setattr("scope_opd.models.footprint.SHALLOW", (27, 28))  # a trace of all 28 layers
    whole = update_moments(config, 1024, dtype=torch.bfloat16, checkpointing="full", temperature=0.6)
    assert {name: sum(parts.values()) for name, parts in planned.items()} == {
        name: sum(parts.values()) for name, parts in whole.items()
    }


class TestPlan:
    def test_a_folder_with_config_json_alone_is_enough(self, folder: Path) -> None:
        assert sorted(file.name for file in folder.iterdir()) == ["config.json"]
        found = plan(settings(folder), machine())
        assert found.failures == []
        assert [stage.name for stage in found.stages] == ["generation", "scoring", "update"]

    def test_what_does_not_fit_ends_with_1_and_says_where(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "a.toml"
        file.write_text(f'[model]\npath = "{folder}"\n[teacher]\npath = "{folder}"\n', encoding="utf-8")
        assert main(["plan", str(file), "--gpu-memory", "0.3", "--reserve", "0.1"]) == 1
        assert "does not fit: update needs" in capsys.readouterr().out
        assert main(["plan", str(file), "--gpu-memory", "80", "--tflops", "312"]) == 0
        output = capsys.readouterr().out
        assert "fits:" in output
        assert "hours a step" in output

    def test_the_largest_micro_batch_fits_and_the_next_does_not(self, folder: Path) -> None:
        config = settings(folder)
        room = 0.5
        found = plan(config, machine(room))
        largest = found.largest_microbatch
        assert 512 < largest < 1 << 20

        student = _student(config)
        frozen = {"teacher's weights": student.shape.parameters * 2}
        updates = Updates(student, Layout(), frozen)
        assert updates.stage(largest).total <= room * GB < updates.stage(largest + 128).total

    def test_a_sequence_longer_than_the_budget_is_planned_as_a_micro_batch(self, folder: Path) -> None:
        found = plan(settings(folder, train={"max_tokens_per_microbatch": 64}), machine())
        assert found.microbatch == 128 + 384
        assert any("below the longest sequence" in line for line in found.warnings)

    def test_prompts_are_those_that_the_context_has_room_for(self, folder: Path) -> None:
        found = plan(settings(folder, rollout={"max_tokens": 4000, "max_rows": 4}), machine())
        assert found.microbatch == 4096
        assert any("planned with prompts of 96" in line for line in found.warnings)
        none = plan(settings(folder, rollout={"max_tokens": 4096, "max_rows": 4}), machine())
        assert any("the student's context has 4096" in line for line in none.failures)

    def test_checkpointing_and_fewer_rows_need_less(self, folder: Path) -> None:
        plain = plan(settings(folder), machine())
        careful = plan(settings(folder, train={"activation_checkpointing": "full"}, rollout={"max_rows": 4}), machine())
        assert careful.stages[0].total < plain.stages[0].total
        assert careful.stages[2].total < plain.stages[2].total

    def test_servers_leave_the_rank_and_are_planned_for_themselves(self, folder: Path) -> None:
        served = {"base_urls": ["http://127.0.0.1:1/v1", "http://127.0.0.1:2/v1"], "model": "m"}
        found = plan(settings(folder, rollout=served, teacher={**served, "max_concurrency": 3}), machine())
        assert [stage.name for stage in found.stages] == ["update"]
        assert {name: count for name, (count, _, _) in found.servers.items()} == {"sampler": 2, "teacher": 2}
        teacher = found.servers["teacher"][2]
        assert teacher.wanted == 3
        assert teacher.outside == 6 * 5000 * 8192
        assert found.servers["sampler"][2].outside == 0
        assert teacher.sequence == (128 + 384 + 1) * 2 * 4 * 32 * 2  # keys and values in bfloat16

    def test_a_server_without_room_for_a_sequence_does_not_fit(self, folder: Path) -> None:
        served = {"base_urls": ["http://127.0.0.1:1/v1"], "model": "m"}
        found = plan(settings(folder, teacher=served), machine(0.004))
        assert any("teacher server" in line for line in found.failures)

    def test_a_method_without_teacher_scores_nothing(self, folder: Path) -> None:
        found = plan(settings(folder, objective={"method": "grpo"}), machine())
        assert [stage.name for stage in found.stages] == ["generation", "update"]
        assert found.tokens["scored"] == 0
        assert found.flops["scoring"] == 0

    def test_update_costs_three_passes_and_checkpointing_a_fourth(self, folder: Path) -> None:
        found = plan(settings(folder, train={"activation_checkpointing": "full"}), machine())
        assert found.flops["update"] == 3 * found.flops["generation"]
        assert found.flops["recomputation"] == found.flops["generation"]
        one, two = (hours(found, ranks, 100, 0.5) for ranks in (1, 2))
        assert one["update"] == pytest.approx(2 * two["update"])

    def test_a_mini_batch_has_the_tokens_of_its_prompts_and_the_policy_is_recorded_before(self, folder: Path) -> None:
        parts = settings(folder, train={"minibatches": 8, "max_tokens_per_microbatch": 4096})
        found = plan(parts, machine(1e9))
        assert found.microbatch == 4 * 512  # one prompt of eight
        assert found.flops["update"] == pytest.approx(4 * found.flops["generation"])
        assert _student(parts).packed
        assert not _student(settings(folder, train={"packing": False})).packed

    def test_an_unknown_model_without_network_says_what_to_fetch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ConfigError, match=r"hf download nobody/nothing config\.json"):
            read_config("nobody/nothing", None, False, "model.path")

    def test_every_nth_of_fewer_layers_is_refused(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match=r"checkpointing = 5 and the student has 4 layers; .* from 1 to 4"):
            plan(settings(folder, train={"activation_checkpointing": 5}), machine())
        assert plan(settings(folder, train={"activation_checkpointing": 4}), machine()).failures == []

    @pytest.mark.parametrize("option", [["--gpus", "0"], ["--gpu-memory", "-1"], ["--utilisation", "2"]])
    def test_options_out_of_range_are_refused(self, option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", str(ROOT / "configs" / "debug.toml"), *option]) == 2
        assert option[0] in capsys.readouterr().err

    def test_a_plan_that_takes_a_while_says_so(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("scope_opd.cli.plan_command.PATIENCE_S", 0.01)
        file = tmp_path / "a.toml"
        file.write_text(f'[model]\npath = "{folder}"\n[objective]\nmethod = "grpo"\n', encoding="utf-8")
        assert main(["plan", str(file), "--json", "--set", "rollout.max_tokens=64"]) == 0
        captured = capsys.readouterr()
        assert captured.err.splitlines()[-1].startswith("planning: ")
        json.loads(captured.out)

    def test_the_zoo_is_planned_too(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", str(ROOT / "configs" / "demo.toml"), "--gpu-memory", "16"]) == 0
        assert "fits:" in capsys.readouterr().out


@given(st.integers(1, 1 << 20), st.integers(0, 50), st.integers(0, 1 << 20), st.integers(0, 1 << 21))
def test_where_the_search_begins_is_of_no_consequence(fits: int, slope: int, bend: int, start: int) -> None:
    def size(tokens: int) -> int:
        return tokens + slope * max(tokens - bend, 0)

    assert largest(size, size(fits), 1 << 20, start=start) == fits // 128 * 128


def test_on_a_straight_line_a_known_size_three_more_are_enough() -> None:
    calls: list[int] = []

    def size(tokens: int) -> int:
        calls.append(tokens)
        return 7 * tokens + (1000 if tokens > 111 else 0)

    assert largest(size, size(300_000), 1 << 20, start=16384) == 299_904
    assert {*calls} == {300_000, 16384, 1 << 20, 299_904, 300_032}


class TestWhatLaunchAsksFor:
    def planned(self, tmp_path: Path, *sets: str, gpus: int | None = None) -> tuple[Config, int, list[str]]:
        (tmp_path / "a.toml").write_text("", encoding="utf-8")
        return planned(tmp_path / "a.toml", sets, gpus)

    def test_ranks_and_servers_are_those_of_a_launch(self, tmp_path: Path) -> None:
        config, ranks, lines = self.planned(
            tmp_path, "launch.trainer=[0, 3]", "launch.samplers=4", "serving.student.tensor_parallel_size=2",
            "launch.teachers=3",
        )  # fmt: skip
        assert (ranks, len(config.rollout.base_urls), len(config.teacher.base_urls), lines) == (2, 2, 3, [])
        assert config.teacher.tokenizer == "zoo:teacher"
        config, ranks, _ = self.planned(tmp_path, "rollout.colocated=true", "launch.trainer=6", "launch.teachers=2")
        assert (ranks, len(config.rollout.base_urls), len(config.teacher.base_urls)) == (6, 6, 2)
        config, ranks, _ = self.planned(tmp_path, "launch.trainer=2", "launch.samplers=2", "train.device=cpu")
        assert (ranks, len(config.rollout.base_urls), config.teacher.served) == (2, 2, False)

    def test_gpus_that_train_are_those_of_the_option_where_launch_names_none(self, tmp_path: Path) -> None:
        assert self.planned(tmp_path, "launch.samplers=1", gpus=3)[1:] == (3, [])
        _, ranks, (line,) = self.planned(tmp_path, "launch.samplers=1")
        assert ranks == 1
        assert line.startswith("launch.trainer is left out")
        assert self.planned(tmp_path)[1:] == (1, [])
        assert self.planned(tmp_path, "launch.ray.workers=5")[1:] == (5, [])
        assert self.planned(tmp_path, "launch.ray.workers=5", gpus=2)[1] == 2

    def test_what_contradicts_is_one_line(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"--gpus 3 and launch.trainer = 2; expected the same .*; leave --gpus"):
            self.planned(tmp_path, "launch.trainer=2", gpus=3)
        assert self.planned(tmp_path, "launch.trainer=2", gpus=2)[1] == 2
        with pytest.raises(ConfigError, match=r"launch.samplers = 3 with a tensor_parallel_size of 2"):
            self.planned(tmp_path, "launch.samplers=3", "serving.student.tensor_parallel_size=2")
        with pytest.raises(ConfigError, match=r"launch.trainer = \[\]"):
            self.planned(tmp_path, "launch.trainer=[]")

    def test_the_command_plans_them(self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = tmp_path / "a.toml"
        lines = ["[model]", f'path = "{folder}"', "[teacher]", f'path = "{folder}"', "[data]", "max_prompt_tokens = 64"]
        lines += ["[rollout]", "max_tokens = 64", "[launch]", "trainer = 2", "samplers = 1", "teachers = 2"]
        file.write_text("\n".join(lines), encoding="utf-8")
        assert main(["plan", str(file), "--gpu-memory", "16", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["ranks"], found["gpus"]) == (2, 5)
        assert {name: server["servers"] for name, server in found["servers"].items()} == {"sampler": 1, "teacher": 2}
        assert main(["plan", str(file), "--gpus", "4"]) == 2
        assert "launch.trainer = 2" in capsys.readouterr().err


class TestSeveralRanks:
    def test_the_state_is_dealt_to_all_or_to_those_of_a_machine(
        self, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = tmp_path / "a.toml"
        file.write_text(f'[model]\npath = "{folder}"\n[objective]\nmethod = "grpo"\n', encoding="utf-8")
        weights = {}
        for how in ("full", "hybrid"):
            options = ["--gpus", "16", "--machine-gpus", "4", "--set", f"train.shard={how}", "--json"]
            assert main(["plan", str(file), *options]) == 0
            found = json.loads(capsys.readouterr().out)
            weights[how] = found["stages"]["update"]["parts"]["weights"]
            assert ("of each machine" in found["layout"]) == (how == "hybrid")
        assert weights["hybrid"] == pytest.approx(4 * weights["full"], rel=1e-3)

    def test_weights_by_ipc_reach_no_gpu_but_rank_0s(self, folder: Path) -> None:
        urls = [f"http://127.0.0.1:81{k:02}/v1" for k in range(2)]
        served = {"base_urls": urls, "model": "student", "colocated": True, "sync": "ipc"}
        flags = {"student": {"gpu_memory_utilization": 0.5}}
        for ranks, failures in ((1, 0), (2, 1)):
            found = plan(settings(folder, rollout=served, serving=flags), machine(ranks=ranks))
            assert sum("'ipc'" in line for line in found.failures) == failures

    def test_colocated_servers_take_no_more_gpus_than_train(self, folder: Path) -> None:
        urls = [f"http://127.0.0.1:81{k:02}/v1" for k in range(2)]
        served = {"base_urls": urls, "model": "student", "colocated": True}
        flags = {"student": {"gpu_memory_utilization": 0.5}}
        for ranks, failures in ((1, 1), (2, 0), (3, 0)):
            found = plan(settings(folder, rollout=served, serving=flags), machine(ranks=ranks))
            assert sum("sampler servers on 2 GPUs" in line for line in found.failures) == failures
