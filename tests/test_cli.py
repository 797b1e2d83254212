"""The command line: cheap help, `scope weights` against numbers by hand, training on folders of one's own."""

from __future__ import annotations

import io
import json
import math
import os
import resource
import subprocess
import sys
from concurrent.futures import Future
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from scope_opd.cli import checks
from scope_opd.cli.demo import _watch, prepare_folder
from scope_opd.cli.demo_jobs import Job, demo_config, run_job
from scope_opd.cli.main import COMMANDS, main
from scope_opd.config import load_config
from scope_opd.errors import ModelError, RunFailed, RunFolderError
from scope_opd.types import Prompt
from tiny import save_pair, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parent.parent
ROWS = [{"id": f"p{i}", "problem": f"What is {i} + {i + 1}?", "answer": 2 * i + 1} for i in range(6)]
SETTINGS = [
    "data.max_prompt_tokens=64", "chat.suffix=' Put it in a box.'", "rollout.n=3", "rollout.max_tokens=6",
    "objective.truncated=incorrect", "train.steps=2", "train.prompts_per_step=2", "train.lr=1e-3",
    "run.alarms.uniform_weights=off", "run.alarms.truncation=off",
]  # fmt: skip


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders llama (untied), neox, and rows.parquet, rows.jsonl."""
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder / "llama", "llama", seed=1)
    save_pair(folder / "neox", "gpt_neox", seed=2)
    save_pair(folder / "qwen", "qwen3", seed=3)
    text = [{**row, "answer": str(row["answer"])} for row in ROWS]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(text), folder / "rows.parquet")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    (folder / "empty.toml").write_text("")
    return folder


def train_arguments(pair: Path, run: Path, *more: str, student: str = "llama", teacher: str = "neox") -> list[str]:
    paths = [
        f"model.path={pair / student}", f"teacher.path={pair / teacher}", f"data.train={pair / 'rows.parquet'}",
    ]  # fmt: skip
    options = [part for value in [*paths, *SETTINGS, *more] for part in ("--set", value)]
    return ["train", str(pair / "empty.toml"), "--run-dir", str(run), *options]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def lines(text: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in text.splitlines()]


class TestHelp:
    def test_import_and_help_load_neither_torch_nor_transformers(self) -> None:
        code = (
            "import sys, scope_opd\n"
            "from scope_opd.cli.main import main\n"
            "assert main(['--help']) == 0 and main(['train', '--help']) == 0\n"
            "print(sorted({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"

    def test_help_costs_less_than_four_tenths_of_a_second(self) -> None:
        costs = []
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run([sys.executable, "-m", "scope_opd", "--help"], capture_output=True, check=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            costs.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
        assert min(costs) < 0.4

    @pytest.mark.parametrize("command", [*COMMANDS, "data check", "data filter", "zoo list", "zoo copy", "zoo build"])
    def test_every_command_shows_examples(self, command: str, capsys: pytest.CaptureFixture[str]) -> None:
        assert main([*command.split(), "--help"]) == 0
        output = capsys.readouterr().out
        if command not in ("data", "zoo"):
            assert "Examples" in output
            assert f"  scope {command}" in output
        assert all(len(line) <= 80 for line in output.splitlines())

    @pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
    def test_no_command_shows_them_all(self, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
        assert main(arguments) == 0
        output = capsys.readouterr().out
        assert all(command in output for command in COMMANDS)

    def test_version(self, capsys: pytest.CaptureFixture[str]) -> None:
        from scope_opd import __version__

        assert main(["--version"]) == 0
        assert capsys.readouterr().out.strip() == __version__


class TestConfigs:
    @pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.toml")), ids=lambda path: path.name)
    def test_every_committed_config_parses(self, path: Path) -> None:
        load_config(path)

    def test_the_configs_folder_is_the_one_in_the_package(self) -> None:
        names = {path.name for path in (ROOT / "configs").iterdir()}
        assert {"demo.toml", "debug.toml", "local_pair.toml"} <= names
        assert (ROOT / "configs").resolve() == ROOT / "src" / "scope_opd" / "configs"


class TestWeights:
    rows: tuple[dict[str, Any], ...] = (
        {"id": "a", "group": "g", "correct": True, "logprobs": [-0.5, -0.5]},
        {"id": "x", "group": "h", "correct": True, "logprobs": [-9.0]},
        {"id": "c", "group": "g", "correct": False, "logprobs": [-1.0, -1.0], "teacher_logprobs": [-1.0, -2.0]},
        {"id": "b", "group": "g", "correct": True, "logprobs": [-1.5, -0.5]},
        {"id": "d", "group": "g", "correct": False, "logprobs": [-1.0], "teacher_logprobs": [-0.5]},
        {"id": "e", "group": "g", "correct": False, "logprobs": [-1.0]},
        {"id": "f", "group": "g", "correct": True, "logprobs": [-1.0], "finish_reason": "length"},
    )

    def run(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], *options: str) -> dict[str, dict[str, Any]]:
        assert main(["weights", str(write_rows(tmp_path / "r.jsonl", list(self.rows))), *options]) == 0
        printed = lines(capsys.readouterr().out)
        assert [line["id"] for line in printed] == [row["id"] for row in self.rows]
        assert all(list(line) == ["id", "path", "ppl", "reinforce", "distill", "masked"] for line in printed)
        return {line["id"]: line for line in printed}

    def test_weights_are_those_worked_out_by_hand(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        found = self.run(tmp_path, capsys)
        student = math.exp(0.5) / (math.exp(0.5) + math.exp(1.0))
        teacher = math.exp(-1.5) / (math.exp(-1.5) + math.exp(-0.5))
        expected = {
            "a": ("student", math.exp(0.5), student, 0.0, False),
            "x": ("student", math.exp(9.0), 1.0, 0.0, False),
            "c": ("teacher", math.exp(1.5), 0.0, teacher, False),
            "b": ("student", math.exp(1.0), 1 - student, 0.0, False),
            "d": ("teacher", math.exp(0.5), 0.0, 1 - teacher, False),
            "e": ("teacher", None, 0.0, 0.0, True),
            "f": (None, None, 0.0, 0.0, True),
        }
        for name, (path, ppl, reinforce, distill, masked) in expected.items():
            line = found[name]
            assert (line["path"], line["masked"]) == (path, masked)
            assert line["ppl"] == (ppl if ppl is None else pytest.approx(ppl, abs=1e-12))
            assert line["reinforce"] == pytest.approx(reinforce, abs=1e-12)
            assert line["distill"] == pytest.approx(distill, abs=1e-12)

    def test_a_high_tau_is_uniform(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        found = self.run(tmp_path, capsys, "--tau", "1e9")
        assert found["a"]["reinforce"] == pytest.approx(0.5, abs=1e-8)
        assert found["c"]["distill"] == pytest.approx(0.5, abs=1e-8)

    def test_directions_and_scale_are_options(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        options = ("--student-weight", "inverse_ppl", "--teacher-weight", "uniform", "--scale", "mean")
        found = self.run(tmp_path, capsys, *options)
        assert found["a"]["reinforce"] == pytest.approx(2 * math.exp(1.0) / (math.exp(0.5) + math.exp(1.0)))
        assert found["c"]["distill"] == found["d"]["distill"] == 1.0

    def test_a_preset_sets_several_and_an_option_wins_over_it(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        released = self.run(tmp_path, capsys, "--preset", "as_released")
        assert released["a"]["reinforce"] == pytest.approx(2 * math.exp(1.0) / (math.exp(0.5) + math.exp(1.0)))
        assert (released["f"]["path"], released["f"]["masked"]) == ("teacher", True)
        mine = self.run(
            tmp_path, capsys, "--preset", "as_released", "--truncated", "ignore", "--student-weight", "uniform"
        )
        assert mine["f"]["path"] is None
        assert mine["a"]["reinforce"] == 1.0

    def test_standard_input_is_a_file(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        from_file = self.run(tmp_path, capsys)
        content = (tmp_path / "r.jsonl").read_bytes()
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))
        assert main(["weights", "-"]) == 0
        assert lines(capsys.readouterr().out) == list(from_file.values())

    def test_a_reward_stands_in_for_a_verdict(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        rows = [{"id": name, "group": "g", "reward": reward, "logprobs": [-1.0], "teacher_logprobs": [-1.0]}
                for name, reward in (("low", -1.0), ("high", 0.7))]  # fmt: skip
        path = write_rows(tmp_path / "r.jsonl", rows)
        assert main(["weights", str(path)]) == 0
        assert [line["path"] for line in lines(capsys.readouterr().out)] == ["teacher", "student"]
        assert main(["weights", str(path), "--reward-threshold", "0.8"]) == 0
        assert [line["path"] for line in lines(capsys.readouterr().out)] == ["teacher", "teacher"]

    def test_a_row_without_a_verdict_is_ignored(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write_rows(tmp_path / "r.jsonl", [{"id": "a", "group": "g", "correct": None, "logprobs": [-1.0]}])
        assert main(["weights", str(path)]) == 0
        assert lines(capsys.readouterr().out) == [
            {"id": "a", "path": None, "ppl": None, "reinforce": 0.0, "distill": 0.0, "masked": True}
        ]

    def test_teacher_logprobs_below_the_floor_are_raised_and_counted(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        row = {"id": "a", "group": "g", "correct": False, "logprobs": [-1.0, -1.0], "teacher_logprobs": [-9999.0, -2.0]}
        assert main(["weights", str(write_rows(tmp_path / "r.jsonl", [row]))]) == 0
        captured = capsys.readouterr()
        assert lines(captured.out)[0]["ppl"] == pytest.approx(math.exp(51.0))
        assert "1 teacher log-probs" in captured.err

    def test_a_reader_that_leaves_early_is_no_error(self, tmp_path: Path) -> None:
        rows = [{"id": f"r{i}", "group": "g", "correct": True, "logprobs": [-1.0]} for i in range(5000)]
        path = write_rows(tmp_path / "r.jsonl", rows)
        command = f"{sys.executable} -m scope_opd weights {path} | head -n 1"
        done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
        assert done.stdout.startswith('{"id":"r0"')
        assert done.stderr == ""


class TestTrain:
    @pytest.mark.parametrize(("student", "teacher"), [("llama", "neox"), ("neox", "llama")])
    def test_folders_of_other_architectures_train_from_a_parquet_file(
        self, student: str, teacher: str, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = tmp_path / "run"
        more = [
            f"data.eval={pair / 'rows.jsonl'}",
            "eval.at_end=true",
            "eval.n=2",
            "eval.problems=3",
            "run.rollouts_logged=100",
        ]
        assert main(train_arguments(pair, run, *more, student=student, teacher=teacher)) == 0
        captured = capsys.readouterr()
        assert "done: 2 steps" in captured.out
        assert "Put it in a box" in captured.err
        assert len(lines((run / "metrics.jsonl").read_text())) == 2
        assert len(lines((run / "eval.jsonl").read_text())[0]["correct_counts"]) == 3
        model = AutoModelForCausalLM.from_pretrained(run / "export")
        assert AutoTokenizer.from_pretrained(run / "export").get_vocab() == tiny_tokenizer().get_vocab()
        trained = AutoModelForCausalLM.from_pretrained(pair / student)
        changed = [not torch.equal(a, b) for a, b in zip(model.parameters(), trained.parameters(), strict=True)]
        assert any(changed)

        self._dump_gives_its_own_numbers(run, capsys)

    @staticmethod
    def _dump_gives_its_own_numbers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
        dumped = lines((run / "rollouts.jsonl").read_text())
        assert main(["weights", str(run / "rollouts.jsonl"), "--truncated", "incorrect"]) == 0
        weighed = lines(capsys.readouterr().out)
        assert len(dumped) == len(weighed) == 12
        for row, line in zip(dumped, weighed, strict=True):
            assert (row["id"], row["masked"]) == (line["id"], line["masked"])
            assert row["reinforce"] == pytest.approx(line["reinforce"], abs=1e-9)
            assert row["distill"] == pytest.approx(line["distill"], abs=1e-9)

    @pytest.mark.parametrize(
        "settings",
        [
            ["objective.method=dual_path"],
            ["objective.method=opd", "objective.temperature=released"],
            ["objective.method=opd", "objective.temperature=raw"],
            ["objective.method=grpo", "train.updates_per_batch=2"],
            ["objective.method=positive"],
            ["objective.method=kd", "teacher.temperature=1.0"],
            ["objective.method=reward_opd", "objective.beta=0.5"],
            ["objective.distill=full_kl"],
            ["objective.reference_kl=0.01"],
            ["objective.preset=as_released"],
            ["train.param_dtype=bfloat16", "teacher.dtype=bfloat16"],
            ["train.optimizer=muon", "rollout.max_rows=4"],
        ],
        ids=lambda settings: " ".join(settings),
    )
    def test_every_method_and_convention_takes_a_step(self, settings: list[str], pair: Path, tmp_path: Path) -> None:
        run = tmp_path / "run"
        assert main(train_arguments(pair, run, "train.steps=1", "run.export=false", *settings)) == 0
        (row,) = lines((run / "metrics.jsonl").read_text())
        assert math.isfinite(row["loss"])

    def test_only_methods_that_distil_load_the_teacher(self, pair: Path, tmp_path: Path) -> None:
        arguments = train_arguments(pair, tmp_path / "run", "objective.method=grpo", "teacher.path=/nowhere/at/all")
        assert main(arguments) == 0

    def test_kd_samples_with_the_teacher(self, pair: Path, tmp_path: Path) -> None:
        from scope_opd.cli.engines import build_engines

        overrides = train_arguments(pair, tmp_path, "objective.method=kd")[5::2]
        built = build_engines(load_config(None, overrides))
        collected = built.engines.pipeline.collect(
            built.train_prompts[:1], built.engines.sampling, step=0, policy_version=0
        )
        teacher = AutoModelForCausalLM.from_pretrained(pair / "neox").eval()
        rollout = collected.rollouts[0]
        ids = torch.tensor([[*rollout.prompt_token_ids, *rollout.token_ids]])
        with torch.no_grad():
            logits = teacher(ids).logits[0, len(rollout.prompt_token_ids) - 1 : -1]
        expected = (logits / built.engines.sampling.temperature).log_softmax(-1)
        assert expected.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0].tolist() == pytest.approx(
            rollout.logprobs, abs=1e-4
        )

    def test_a_finished_run_resumes_to_nothing_and_an_occupied_folder_is_refused(
        self, pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        run = tmp_path / "run"
        assert main(train_arguments(pair, run)) == 0
        before = (run / "metrics.jsonl").read_bytes()
        capsys.readouterr()
        assert main(train_arguments(pair, run)) == 2
        assert "--resume" in capsys.readouterr().err
        assert main([*train_arguments(pair, run), "--resume"]) == 0
        assert (run / "metrics.jsonl").read_bytes() == before

    def test_a_report_can_be_made_of_it(self, pair: Path, tmp_path: Path) -> None:
        assert main(train_arguments(pair, tmp_path / "run", "run.export=false")) == 0
        assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "r.html")]) == 0
        assert "<html" in (tmp_path / "r.html").read_text(encoding="utf-8")[:500]


class TestDoctor:
    def run(self, pair: Path, capsys: pytest.CaptureFixture[str], *more: str) -> tuple[int, str]:
        code = main(["doctor", *train_arguments(pair, pair / "unused", *more)[1:2], *self.options(pair, *more)])
        return code, capsys.readouterr().out

    @staticmethod
    def options(pair: Path, *more: str) -> list[str]:
        arguments = train_arguments(pair, pair / "unused", *more)
        return [*arguments[4:], "--set", f"run.dir={pair / 'unused'}"]

    def test_a_sound_pair_passes_every_check(self, pair: Path, capsys: pytest.CaptureFixture[str]) -> None:
        code, output = self.run(pair, capsys)
        assert code == 0
        for subject in ("environment", "data.train", "lengths", "first prompt", "tokenizers", "end tokens", "memory"):
            assert subject in output
        assert "FAIL" not in output
        assert not (pair / "unused").exists()

    def test_a_failed_check_gives_exit_code_one_and_hides_no_other(
        self, pair: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        code, output = self.run(pair, capsys, "data.train=/nowhere.jsonl", "teacher.path=/nowhere")
        assert code == 1
        assert output.count("FAIL") == 2
        assert "student" in output

    def test_a_bad_config_gives_exit_code_two(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["doctor", "--set", "objective.tau=0"]) == 2
        assert "objective.tau" in capsys.readouterr().err

    def test_large_models_are_described_without_loading(
        self, pair: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("scope_opd.cli.doctor.LOAD_LIMIT", 10)
        code, output = self.run(pair, capsys)
        assert code == 0
        assert "described by" in output


class TestChecks:
    def test_ids_of_only_one_tokenizer_warn_and_bound_the_common_vocabulary(self) -> None:
        student, teacher = tiny_tokenizer(), tiny_tokenizer()
        assert checks.compare_tokenizers(student, teacher).level == "ok"
        assert checks.common_vocabulary(student, teacher) == tuple(range(len(student)))
        student.add_tokens(["<extra>"])
        finding = checks.compare_tokenizers(student, teacher)
        assert (finding.level, "1 only the student has" in finding.found) == ("warn", True)
        assert checks.common_vocabulary(student, teacher) == tuple(range(len(teacher)))

    def test_the_common_vocabulary_is_every_id_that_means_the_same_wherever_it_stands(self) -> None:
        class Words:
            def __init__(self, *words: str) -> None:
                self.words = words

            def get_vocab(self) -> dict[str, int]:
                return {word: index for index, word in enumerate(self.words) if word}

        ours: Any = Words("<pad>", "a", "b", "", "c", "d")
        same: Any = Words("<end>", "a", "x", "y", "c")
        assert checks.common_vocabulary(ours, same) == (1, 4)
        shifted: Any = Words("a", "b", "c")
        with pytest.raises(ModelError, match="no id means the same token"):
            checks.common_vocabulary(ours, shifted)

    def test_a_prompt_id_without_a_row_fails_before_the_model_meets_it(self) -> None:
        prompt = Prompt("p", "x", "y", (1, 7))
        assert checks.vocabulary_rows([prompt], (2,), "student", 8).level == "ok"
        finding = checks.vocabulary_rows([prompt], (9,), "student", 8)
        assert finding.level == "FAIL"
        with pytest.raises(ModelError, match="student vocabulary"):
            checks.enforce([finding])

    def test_the_papers_learning_rate_warns_for_large_models_with_float32_weights(self) -> None:
        config = load_config(None, ["train.lr=5e-5"])
        assert checks.learning_rate(config, 1_500_000_000).level == "warn"
        assert checks.learning_rate(config, 86_000).level == "ok"
        bfloat16 = load_config(None, ["train.lr=5e-5", "train.param_dtype=bfloat16"])
        assert checks.learning_rate(bfloat16, 1_500_000_000).level == "ok"

    def test_raw_log_probs_at_another_temperature_warn(self) -> None:
        assert checks.temperature(load_config(None, ["objective.temperature=raw"])).level == "warn"
        assert (
            checks.temperature(load_config(None, ["objective.temperature=raw", "rollout.temperature=1.0"])).level
            == "ok"
        )

    def test_held_out_problems_that_are_trained_on_warn(self) -> None:
        one, other = Prompt("p", "x", "y", (1,)), Prompt("q", " x ", "y", (1,))
        assert checks.overlap([one], [other]).level == "warn"
        assert checks.overlap([one], [Prompt("r", "z", "y", (1,))]).level == "ok"

    def test_memory_counts_weights_gradients_and_moments(self) -> None:
        config = load_config(None, ["rollout.n=1", "train.prompts_per_step=1"])
        shape = tiny_model("llama").config
        one, _ = checks.estimated_memory(config, {"student": (10**9, shape)}, 1)
        two, parts = checks.estimated_memory(config, {"student": (10**9, shape), "teacher": (10**9, shape)}, 1)
        assert one == pytest.approx(16e9, rel=1e-3)
        assert two - one == 4 * 10**9
        on_gpu, _ = checks.estimated_memory(config, {"student": (10**9, shape), "teacher": (10**9, shape)}, 1, gpu=True)
        assert on_gpu - one == 2 * 10**9
        anchored = load_config(None, ["rollout.n=1", "train.prompts_per_step=1", "objective.reference_kl=0.1"])
        assert checks.estimated_memory(anchored, {"student": (10**9, shape)}, 1)[0] - one == 4 * 10**9
        assert "optimiser 8.0 GB" in parts


class TestZoo:
    def test_list_names_models_and_rows(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["zoo", "list"]) == 0
        output = capsys.readouterr().out
        assert "zoo:student" in output
        assert "2048 rows" in output

    def test_a_copy_loads_as_any_folder_and_never_overwrites(self, tmp_path: Path) -> None:
        assert main(["zoo", "copy", str(tmp_path / "zoo")]) == 0
        AutoModelForCausalLM.from_pretrained(tmp_path / "zoo" / "student")
        assert len((tmp_path / "zoo" / "train.jsonl").read_text().splitlines()) == 2048
        assert main(["zoo", "copy", str(tmp_path / "zoo")]) == 2


class TestDemoFolder:
    NAMES = ("scope-0", "logs", "report.html", "summary.json")

    def former(self, out: Path) -> Path:
        """What a demo leaves."""
        prepare_folder(out, self.NAMES)
        for name in ("scope-0", "logs"):
            (out / name).mkdir()
            (out / name / "metrics.jsonl").write_text("{}")
        for name in ("report.html", "summary.json"):
            (out / name).write_text("{}")
        return out

    def test_a_former_demo_is_replaced(self, tmp_path: Path) -> None:
        out = self.former(tmp_path / "demo")
        prepare_folder(out, ("opd-0",))
        assert [entry.name for entry in out.iterdir()] == [".demo"]
        assert (out / ".demo").read_text() == "opd-0\n"

    @pytest.mark.parametrize("name", ["thesis.txt", "my-run/run.json", "scope-7/run.json"])
    def test_what_no_demo_made_survives_with_all_beside_it(self, name: str, tmp_path: Path) -> None:
        out = self.former(tmp_path / "demo")
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
        before = sorted(out.rglob("*"))
        with pytest.raises(RunFolderError, match=f"no demo made {name.split('/')[0]}; expected .*; choose another"):
            prepare_folder(out, self.NAMES)
        assert sorted(out.rglob("*")) == before
        assert (out / name).read_text() == "mine"

    @pytest.mark.parametrize("marker", [None, "", "../thesis.txt\n", "/etc\n.\n..\n"])
    def test_a_summary_of_somebodys_own_makes_no_demo(self, marker: str | None, tmp_path: Path) -> None:
        out = tmp_path / "work"
        out.mkdir()
        for name in ("summary.json", "thesis.txt"):
            (out / name).write_text("mine")
            (tmp_path / name).write_text("mine")
        if marker is not None:
            (out / ".demo").write_text(marker)
        assert main(["demo", "--quick", "--out", str(out)]) == 2
        assert {entry.name for entry in out.iterdir()} - {".demo"} == {"summary.json", "thesis.txt"}
        assert (tmp_path / "thesis.txt").read_text() == "mine"

    def test_a_link_is_removed_and_not_what_it_points_to(self, tmp_path: Path) -> None:
        out = self.former(tmp_path / "demo")
        (tmp_path / "real").mkdir()
        (tmp_path / "real" / "thesis.txt").write_text("mine")
        (out / "logs" / "metrics.jsonl").unlink()
        (out / "logs").rmdir()
        (out / "logs").symlink_to(tmp_path / "real")
        prepare_folder(out, self.NAMES)
        assert (tmp_path / "real" / "thesis.txt").read_text() == "mine"


class TestDemoJobs:
    @staticmethod
    def jobs(tmp_path: Path, *names: str) -> list[Job]:
        values = demo_config([]).model_dump(mode="json")
        return [Job("training", name, tmp_path / name, values) for name in names]

    @pytest.mark.parametrize(
        ("outcome", "line"),
        [
            ("no teacher; expected one; set it", "no teacher; expected one; set it"),
            (BrokenProcessPool("gone"), "its worker process died"),
            (ValueError("odd"), "ValueError: odd"),
        ],
    )
    def test_a_failure_is_told_at_once_and_once(
        self, outcome: Any, line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        jobs = self.jobs(tmp_path, "good", "bad", "waiting")
        futures: list[Future[str | None]] = [Future() for _ in jobs]
        futures[0].set_result(None)
        if isinstance(outcome, Exception):
            futures[1].set_exception(outcome)
        else:
            futures[1].set_result(outcome)
        with pytest.raises(RunFailed) as caught:
            _watch(jobs, futures)
        assert str(caught.value).startswith(f"bad: {line}")
        assert str(caught.value).endswith(f"see {jobs[1].log}")
        assert str(caught.value).count("expected") <= 1
        printed = capsys.readouterr().out
        assert "good done (1/3)" in printed
        assert "bad failed" in printed
        assert "bad done" not in printed

    def test_an_unexpected_error_is_one_line_and_its_trace_is_in_the_log(self, tmp_path: Path) -> None:
        job = Job("training", "odd", tmp_path / "odd", {"train": 3})
        line = run_job(job)
        assert line is not None
        assert "\n" not in line
        assert "Traceback" in job.log.read_text()


@pytest.mark.slow
def test_the_demo_leaves_runs_a_report_and_every_figure(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    command = [sys.executable, "-m", "scope_opd", "demo", "--quick", "--seeds", "1", "--steps", "1", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ), check=False)
    assert done.returncode == 0, done.stderr
    assert str(out / "report.html") in done.stdout
    summary = json.loads((out / "summary.json").read_text())
    assert [line["label"] for line in summary["results"]] == ["Start", "SCOPE", "Dual path", "OPD", "GRPO", "Teacher"]
    for line in summary["results"]:
        assert set(line["by_temperature"]) == {"0.6", "1"}
        assert line["by_temperature"]["0.6"]["problems"] == 20
    assert {row["of"] for row in summary["differences"]} >= {"SCOPE - Start", "SCOPE - OPD"}
    prompts = [(out / f"{name}-0" / "run.json") for name in ("scope", "dual_path", "opd", "grpo")]
    assert len({json.loads(path.read_text())["first_prompt"] for path in prompts}) == 1
    assert "<html" in (out / "report.html").read_text(encoding="utf-8")[:500]
    again = subprocess.run([*command, "--set", "objective.tau=0"], capture_output=True, text=True, check=False)
    assert again.returncode == 2
    assert (out / "report.html").exists()
