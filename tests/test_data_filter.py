"""``scope data filter`` on the zoo and on a folder of one's own; a filter that is killed; training on what it kept.

Also what training and evaluation make of data: verl's layout through the whole command, skipped rows as warnings.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from scope_opd.cli.data_filter import RatesFile, batch_size, described, filter_seed, parse_range
from scope_opd.cli.main import main
from scope_opd.config import load_config
from scope_opd.data.dataset import DataSet
from scope_opd.errors import ConfigError, RunFolderError
from scope_opd.evaluate.run import evaluation_seed
from shared_data import data_file
from tiny import save_pair

PROMPTS, SAMPLES = 30, 2


def lines(path: Path) -> list[dict[str, Any]]:
    with path.open(encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def command(folder: Path, out: Path, *more: str) -> list[str]:
    config = folder / "zoo.toml"
    config.write_text(
        f"[data]\nmax_rows = {PROMPTS}\n[rollout]\nn = 2\nmax_tokens = 48\n[train]\nprompts_per_step = 2\nthreads = 1\n"
    )
    return ["data", "filter", str(config), "--out", str(out), "--samples", str(SAMPLES), *more]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return save_pair(tmp_path / "model", context=4096)


class TestFilter:
    def test_a_killed_filter_goes_on_and_ends_with_the_same_files(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
        assert main(command(tmp_path, whole)) == 0
        rates = killed.with_name("killed.jsonl.rates.jsonl")
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        process = subprocess.Popen(
            [sys.executable, "-m", "scope_opd", *command(tmp_path, killed)],
            env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 120
        while not rates.exists() or rates.read_bytes().count(b"\n") < 5:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert not killed.exists()
        assert 5 <= len(lines(rates)) < PROMPTS
        with rates.open("ab") as stream:
            stream.write(b'{"id":"zoo-tr')  # as if it had died within a write
        capsys.readouterr()
        assert main(command(tmp_path, killed)) == 0
        assert "going on after" in capsys.readouterr().err
        assert killed.read_bytes() == whole.read_bytes()
        assert rates.read_bytes() == whole.with_name("whole.jsonl.rates.jsonl").read_bytes()

    def test_what_is_kept_lies_in_the_range_and_another_range_samples_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        out = tmp_path / "kept.jsonl"
        assert main(command(tmp_path, out, "--pass-rate", "0.1..0.5")) == 0
        output = capsys.readouterr().out
        rates = lines(tmp_path / "kept.jsonl.rates.jsonl")[1:]
        assert len(rates) == PROMPTS
        expected = {row["id"]: row["pass_rate"] for row in rates if 0.1 <= row["pass_rate"] <= 0.5}
        assert {row["id"]: row["pass_rate"] for row in lines(out)} == expected
        assert 0 < len(expected) < PROMPTS
        assert f"{len(expected)} of {PROMPTS} prompts kept" in output
        assert all(row["samples"] == SAMPLES and row["correct"] == row["pass_rate"] * SAMPLES for row in rates)

        def refuse(*_: Any) -> None:
            raise AssertionError("sampled again")

        monkeypatch.setattr("scope_opd.cli.data_filter.sample_rates", refuse)
        assert main(command(tmp_path, out, "--pass-rate", "0..0")) == 0
        assert {row["pass_rate"] for row in lines(out)} == {0.0}

    def test_the_kept_rows_of_verls_layout_train_as_they_are(self, tmp_path: Path) -> None:
        save_pair(tmp_path / "model", context=256)
        rows = [
            {
                "prompt": [{"role": "user", "content": f"What is {i}?"}],
                "reward_model": {"ground_truth": str(i), "style": "rule"},
                "extra_info": {"index": i, "note": "kept"},
            }
            for i in range(4)
        ]
        source = tmp_path / "verl.jsonl"
        source.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "my.toml").write_text("")
        settings = [
            f"model.path={tmp_path / 'model'}", f"teacher.path={tmp_path / 'model'}", "data.verifier=boxed",
            "rollout.n=2", "rollout.max_tokens=4", "train.steps=1", "train.prompts_per_step=2", "train.threads=1",
            "objective.truncated=incorrect",
        ]  # fmt: skip
        options = [part for value in settings for part in ("--set", value)]
        out = tmp_path / "kept.jsonl"
        filtering = ["data", "filter", str(tmp_path / "my.toml"), "--out", str(out), "--samples", "2", *options]
        assert main([*filtering, "--pass-rate", "0..1", "--set", f"data.train={source}"]) == 0
        kept = lines(out)
        assert [row["id"] for row in kept] == [f"row-{n:06d}" for n in range(1, 5)]
        assert kept[0]["extra_info"] == {"index": 0, "note": "kept"}
        run = tmp_path / "run"
        training = ["train", str(tmp_path / "my.toml"), "--run-dir", str(run), *options]
        assert main([*training, "--set", f"data.train={out}"]) == 0
        assert {row["group"] for row in lines(run / "rollouts.jsonl")} <= {row["id"] for row in kept}
        assert main([*filtering, "--set", f"data.train={out}"]) == 2

    def test_rates_of_other_settings_are_not_mixed(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        file = RatesFile(path, {"samples": 4, "model": {"path": "a"}}, batch=2)
        assert file.open(["p", "q", "r"]) == 0
        file.append([{"id": "p"}, {"id": "q"}])
        again = RatesFile(path, {"samples": 4, "model": {"path": "a"}}, batch=2)
        assert again.open(["p", "q", "r"]) == 2
        again.append([{"id": "r"}])
        assert RatesFile(path, {"samples": 4, "model": {"path": "a"}}, batch=2).open(["p", "q", "r"]) == 3
        with pytest.raises(RunFolderError, match=r"other settings: model\.path"):
            RatesFile(path, {"samples": 4, "model": {"path": "b"}}, batch=2).open(["p", "q", "r"])
        with pytest.raises(RunFolderError, match="other prompts"):
            RatesFile(path, {"samples": 4, "model": {"path": "a"}}, batch=2).open(["p", "x", "r"])

    def test_a_batch_that_is_not_whole_is_repeated(self, tmp_path: Path) -> None:
        path = tmp_path / "r.jsonl"
        file = RatesFile(path, {}, batch=2)
        file.open(["p", "q", "r", "s"])
        file.append([{"id": "p"}, {"id": "q"}])
        whole = path.read_bytes()
        file.append([{"id": "r"}])
        assert RatesFile(path, {}, batch=2).open(["p", "q", "r", "s"]) == 2
        assert path.read_bytes() == whole

    def test_two_filters_do_not_share_rates_and_a_foreign_file_stays(self, tmp_path: Path) -> None:
        first, second = (RatesFile(tmp_path / "rates.jsonl", {"a": 1}, batch=2) for _ in range(2))
        assert first.open(["p", "q"]) == 0
        script = (
            f"from scope_opd.cli.data_filter import *; RatesFile(Path({str(second.path)!r}), {{'a': 1}}, 2).open([])"
        )
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        refused = subprocess.run(
            [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
        )
        assert "in use by another process" in refused.stderr
        del first
        assert second.open(["p", "q"]) == 0
        foreign = tmp_path / "notes.jsonl"
        foreign.write_text("mine")
        with pytest.raises(RunFolderError, match="other settings"):
            RatesFile(foreign, {"a": 1}, batch=2).open(["p"])
        assert foreign.read_text() == "mine"

    def test_a_range_is_exact_and_nothing_else(self) -> None:
        assert parse_range("0.1..0.9") == (Fraction(1, 10), Fraction(9, 10))
        assert parse_range("0..1") == (0, 1)
        for bad in ("0.5", "0.9..0.1", "-1..1", "0..1.5", "a..b", "0.1...0.9", "nan..1"):
            with pytest.raises(ConfigError, match=r"LOW\.\.HIGH"):
                parse_range(bad)

    def test_a_batch_decodes_what_training_does_and_draws_are_its_own(self) -> None:
        config = load_config(None, ["rollout.n=8", "train.prompts_per_step=4"])
        assert [batch_size(config, samples) for samples in (1, 8, 100)] == [32, 4, 1]
        assert len({filter_seed(0), evaluation_seed(0), filter_seed(1), 0}) == 4


class TestTraining:
    def options(self, model: Path, *more: str) -> list[str]:
        settings = [
            f"model.path={model}", f"teacher.path={model}", "data.verifier=boxed", "objective.truncated=incorrect",
            "rollout.n=2", "rollout.max_tokens=4", "train.steps=1", "train.prompts_per_step=2", "run.export=false",
            "eval.problems=3", "eval.n=2", "eval.at_end=true",
        ]  # fmt: skip
        return [part for value in [*settings, *more] for part in ("--set", value)]

    def test_the_published_sample_trains_and_evaluates_unconverted(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        sample = data_file("train/scope_train_sample.parquet")
        (tmp_path / "my.toml").write_text("")
        data = [f"data.train={sample}", f"data.eval={sample}", "data.fix_double_braces=true"]
        run = tmp_path / "run"
        assert main(["train", str(tmp_path / "my.toml"), "--run-dir", str(run), *self.options(model, *data)]) == 0
        errors = capsys.readouterr().err
        assert "mended in 2000 of 2000 prompts" in errors
        assert "within \\\\boxed{}." in errors  # the first prompt
        assert lines(run / "eval.jsonl")[-1]["problem_ids"] == ["row-000001", "row-000002", "row-000003"]

    def test_skipped_rows_are_warned_of_by_training_and_doctor(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [{"id": str(i), "problem": "p" * (5 if i else 900), "answer": "" if i == 1 else "1"} for i in range(6)]
        train = tmp_path / "r.jsonl"
        train.write_text("".join(json.dumps(row) + "\n" for row in rows))
        (tmp_path / "my.toml").write_text("")
        options = self.options(model, f"data.train={train}", f"data.eval={train}", "data.max_prompt_tokens=64")
        skipping = [*options, "--set", "data.on_bad_row=skip"]
        run = tmp_path / "run"
        assert main(["train", str(tmp_path / "my.toml"), "--run-dir", str(run), *options]) == 2
        assert "line 2: answer is empty" in capsys.readouterr().err
        assert main(["train", str(tmp_path / "my.toml"), "--run-dir", str(run), *skipping]) == 0
        errors = capsys.readouterr().err
        assert "1 of 6 rows skipped: line 2: answer is empty" in errors
        assert "1 of 5 rows skipped" in errors
        assert "a prompt of" in errors
        assert main(["doctor", str(tmp_path / "my.toml"), *skipping]) == 0
        assert "rows skipped" in " ".join(capsys.readouterr().out.split())

    def test_doctor_says_which_answers_the_verifier_will_not_take(
        self, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train = tmp_path / "code.jsonl"
        answer = {"format": "humaneval", "prompt": "def f():\n", "test": "f()", "entry_point": "f"}
        train.write_text("".join(json.dumps({"problem": f"p{i}", "answer": answer}) + "\n" for i in range(6)))
        (tmp_path / "my.toml").write_text("")
        options = self.options(model, f"data.train={train}", f"data.eval={train}", "verify.allow_unsandboxed=true")
        options += ["--set", "data.verifier=auto"]
        assert main(["doctor", str(tmp_path / "my.toml"), *options]) == 1
        out = " ".join(capsys.readouterr().out.replace("\u2502", " ").split())
        assert "verifier FAIL prompt 'row-000001': test defines no check" in out


class TestDescribed:
    def test_rates_belong_to_contents_and_not_to_times(self, model: Path, tmp_path: Path) -> None:
        template = tmp_path / "t.jinja"
        template.write_text("{{ messages[0].content }}")
        rows = DataSet("r.jsonl", [])
        config = load_config(None, [f"model.path={model}", f"chat.template={template}"])
        before = described(config, rows, 2)
        for file in model.iterdir():
            os.utime(file, (1, 1))
        assert described(config, rows, 2) == before
        template.write_text("{{ messages[0].content }}!")
        other = described(config, rows, 2)
        assert other["chat"]["template_sha256"] != before["chat"]["template_sha256"]
        (model / "pytorch_model.bin").write_bytes(b"other weights")
        assert described(config, rows, 2)["model"]["sha256"] != before["model"]["sha256"]

    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ("model.path=zoo:studnt", "zoo:studnt"),
            ("train.device=gpu", "device 'gpu'"),
            ("chat.template=gone.jinja", "gone.jinja"),
            ("data.train=gone.jsonl", "gone.jsonl does not exist"),
        ],
    )
    @pytest.mark.parametrize("command", ["filter", "train"])
    def test_slips_are_told_before_torch_is_loaded(
        self, command: str, setting: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "my.toml").write_text("")
        place = str(tmp_path / "my.toml")
        arguments = {
            "filter": ["data", "filter", place, "--out", str(tmp_path / "out.jsonl")],
            "train": ["train", place, "--run-dir", str(tmp_path / "run")],
        }[command]
        assert main([*arguments, "--set", setting]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
