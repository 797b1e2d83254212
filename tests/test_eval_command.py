"""``scope eval`` as its users run it: the zoo, stored responses, local benchmarks, interruptions, mistakes."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from scope_opd.cli import eval_progress
from scope_opd.cli.eval_settings import sampling_options
from scope_opd.cli.main import main
from scope_opd.evaluate.metrics import pass_at_k
from scope_opd.evaluate.tables import notes
from shared_data import data_file, data_rows
from tiny import save_pair

ZOO = ["eval", "--model", "zoo:student", "--benchmark", "zoo", "--problems", "12", "--n", "4", "--max-rows", "16"]
SIX = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench")

# Runs the real command line; after `count` samples writes half a line more, then sends itself the signal.
DRIVER = """
import os, runpy, signal, sys
from scope_opd.evaluate.store import SampleStore

count, number = int(sys.argv[1]), int(sys.argv[2])
append = SampleStore.append

def counted(self, key, row):
    global count
    append(self, key, row)
    count -= 1
    if count == 0:
        if number == signal.SIGKILL:
            self._stream.write(b'{"benchmark":"zoo","problem":"zoo-held')
        os.kill(os.getpid(), number)

SampleStore.append = counted
sys.argv = ["scope", *sys.argv[3:]]
runpy.run_module("scope_opd", run_name="__main__")
"""


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def results_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "results.json").read_text(encoding="utf-8"))


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def driven(count: int, number: int, arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", DRIVER, str(count), str(number), *arguments],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted evaluation of the zoo's student."""
    folder = tmp_path_factory.mktemp("zoo") / "whole"
    assert main([*ZOO, "--out", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with room for long problems."""
    return save_pair(tmp_path_factory.mktemp("tiny") / "model", context=8192)


# --- what comes out ------------------------------------------------------------


def test_every_figure_can_be_computed_again_from_what_is_kept(zoo: Path) -> None:
    entry = results_of(zoo)["benchmarks"]["zoo"]
    samples = rows_of(zoo / "samples.jsonl")
    assert len(samples) == 48
    correct = Counter(row["problem"] for row in samples if row["correct"])
    assert [problem["correct"] for problem in entry["problems"]] == [correct[p["id"]] for p in entry["problems"]]
    metrics, counts = entry["metrics"], np.array([problem["correct"] for problem in entry["problems"]])
    assert metrics["avg@k"] == pytest.approx(counts.mean() / 4)
    assert metrics["pass@k"]["2"] == pytest.approx(pass_at_k(counts, 4, 2).mean())
    assert metrics["pass@k_with_replacement"]["4"] == pytest.approx((1 - (1 - counts / 4) ** 4).mean())
    lengths = sorted(row["tokens"] for row in samples)
    assert sorted(length for problem in entry["problems"] for length in problem["lengths"]) == lengths
    expected = {"unit": "tokens", "mean": np.mean(lengths), "median": lengths[23], "p95": lengths[45]}
    assert metrics["length"] == pytest.approx(expected)
    distinct = [len({r["extracted"] for r in samples if r["problem"] == p["id"]} - {None}) for p in entry["problems"]]
    assert [problem["distinct"] for problem in entry["problems"]] == distinct
    assert metrics["truncated"] == sum(row["finish_reason"] == "length" for row in samples) / 48
    assert (metrics["no_verdict"], entry["data"]["partial"], entry["data"]["rows"]) == (0.0, True, 400)
    for name, (low, high) in metrics["ci95"].items():
        value = metrics["avg@k"] if name == "avg@k" else metrics["pass@k"][name.removeprefix("pass@")]
        assert low <= value <= high


def test_results_hold_the_settings_and_neither_time_nor_machine(zoo: Path) -> None:
    text = (zoo / "results.json").read_text()
    settings = json.loads(text)["settings"]
    assert settings["sampling"] == {
        "n": 4, "temperature": 0.6, "top_p": 1.0, "top_k": 0, "repetition_penalty": 1.0, "seed": 0
    }  # fmt: skip
    assert settings["benchmarks"]["zoo"]["max_tokens"] == 64
    assert len(settings["source"]["sha256"]) == 64
    run = json.loads((zoo / "run.json").read_text())["runs"][0]
    assert run["samples"] == 48
    assert run["tokens_per_s"] > 0
    assert not any(str(run[key]) in text for key in ("ended", "seconds", "platform"))
    table = (zoo / "results.md").read_text()
    assert "| zoo | 12 of 400 | 4 |" in table
    assert "with replacement" in table


def test_the_same_command_again_draws_nothing_and_loads_no_weights(
    zoo: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from scope_opd.cli import eval_model

    monkeypatch.setattr(eval_model, "load_model", lambda *_, **__: pytest.fail("loaded the model"))
    before = (zoo / "results.json").read_bytes(), (zoo / "samples.jsonl").read_bytes()
    assert main([*ZOO, "--out", str(zoo)]) == 0
    assert ((zoo / "results.json").read_bytes(), (zoo / "samples.jsonl").read_bytes()) == before
    assert "all 48 samples are there already" in capsys.readouterr().err


def test_other_settings_in_the_same_folder_are_one_line(zoo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ZOO, "--temperature", "1.0", "--out", str(zoo)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "sampling.temperature = 0.6, and now sampling.temperature = 1.0" in line


def test_an_evaluation_that_is_interrupted_and_killed_ends_as_if_nothing_had_happened(
    zoo: Path, tmp_path: Path
) -> None:
    arguments = [*ZOO, "--out", str(tmp_path / "broken")]
    stopped = driven(10, signal.SIGINT, arguments)
    assert stopped.returncode == 130, stopped.stderr
    lines = stopped.stderr.splitlines()
    assert "of 48 samples are kept" in lines[-1]
    assert "same command again" in lines[-1]
    assert "Traceback" not in stopped.stderr
    killed = driven(25, signal.SIGKILL, arguments)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    torn = (tmp_path / "broken" / "samples.jsonl").read_bytes()
    assert not torn.endswith(b"\n")
    assert main(arguments) == 0
    ours, theirs = tmp_path / "broken", zoo
    assert (ours / "results.json").read_bytes() == (theirs / "results.json").read_bytes()
    by_key = [sorted(json.dumps(row) for row in rows_of(each / "samples.jsonl")) for each in (ours, theirs)]
    assert by_key[0] == by_key[1]
    # a batch that was whole before the kill is not drawn again: its lines stand where they stood
    first = torn.splitlines()[:16]
    assert (ours / "samples.jsonl").read_bytes().splitlines()[:16] == first


def test_the_paper_s_preset_and_what_wins_over_it() -> None:
    base = {"n": 32, "temperature": 0.6, "top_p": 0.95, "top_k": 20, "max_tokens": 32768}
    assert sampling_options("paper", "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B", {}) == {
        **base, "repetition_penalty": 1.0
    }  # fmt: skip
    penalised = sampling_options("paper", "/models/Qwen3-1.7B-Base/", {"n": 8, "top_k": None})
    assert penalised == {**base, "n": 8, "repetition_penalty": 1.08}
    assert sampling_options(None, "x", {"n": None, "seed": 3}) == {"seed": 3}


# --- benchmarks ----------------------------------------------------------------


def test_the_six_local_benchmarks_run_with_a_random_model(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [part for name in SIX for part in ("--benchmark", f"{name}={data_file(f'eval/{name}.jsonl')}")]
    out = tmp_path / "six"
    arguments = ["--n", "2", "--max-tokens", "4", "--problems", "30", "--out", str(out)]
    assert main(["eval", "--model", str(tiny), *files, *arguments]) == 0
    results = results_of(out)
    assert list(results["benchmarks"]) == list(SIX)
    for entry in results["benchmarks"].values():
        assert entry["metrics"]["problems"] == 30
        assert entry["metrics"]["length"]["p95"] <= 4
    assert results["benchmarks"]["aime24"]["data"]["partial"] is False
    assert results["macro"]["benchmarks"] == list(SIX)
    figures = [entry["metrics"]["avg@k"] for entry in results["benchmarks"].values()]
    assert results["macro"]["avg@k"] == pytest.approx(np.mean(figures))
    output = capsys.readouterr()
    assert "macro" in output.out
    assert "put your final answer within \\\\boxed{}" in output.err  # the first prompt, as it is


def test_prompts_are_what_the_options_ask_for(tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    problems = write(tmp_path / "p.jsonl", [{"id": "a", "problem": "1+1?", "answer": 2}])
    common = ["eval", "--model", str(tiny), "--benchmark", f"mine={problems}", "--n", "1", "--max-tokens", "2"]
    asked = {
        "bare": (["--template", "none", "--suffix", " Go."], "'1+1? Go.'"),
        "system": (["--system", "Add.", "--suffix", ""], "'system: Add.\\nuser: 1+1?\\nassistant: '"),
    }
    for name, (options, expected) in asked.items():
        assert main([*common, *options, "--out", str(tmp_path / name)]) == 0
        assert f"first prompt: {expected}" in capsys.readouterr().err


def test_the_preset_s_limit_is_lowered_to_what_the_context_leaves_and_that_is_said(tiny: Path, tmp_path: Path) -> None:
    from scope_opd.cli.eval_model import from_model
    from scope_opd.cli.eval_settings import build_config
    from scope_opd.evaluate.loading import parse_benchmarks

    path = write(tmp_path / "p.jsonl", [{"id": str(i), "problem": "1+1?" * (i + 1), "answer": "2"} for i in range(3)])
    config = build_config(str(tiny), None, sampling_options("paper", str(tiny), {}), {"template": "none"})
    options: Any = {"suffix": None, "preset": "paper", "dtype": "auto"}
    prepared = from_model(config, parse_benchmarks([f"mine={path}"]), lower_max_tokens=True, **options)
    prepared.close()
    longest = max(len(prompt.token_ids) for prompt in prepared.tasks[0].prompts)
    assert prepared.tasks[0].params.max_tokens == 8192 - longest
    assert prepared.settings["benchmarks"]["mine"]["max_tokens"] == 8192 - longest
    assert any("in place of 32768" in line for line in prepared.lines)


def test_a_literal_box_of_two_braces_is_reported_and_mended_only_on_request(
    tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sample = data_file("train/scope_train_sample.parquet")
    command = ["eval", "--model", str(tiny), "--template", "none", "--benchmark", f"verl={sample}", "--problems", "2"]
    command += ["--n", "1", "--max-tokens", "2"]
    hashes = []
    for options, shown in (([], "--fix-double-braces mends it"), (["--fix-double-braces"], "mended in 2 of 2 prompts")):
        out = tmp_path / str(len(hashes))
        assert main([*command, *options, "--out", str(out)]) == 0
        assert shown in capsys.readouterr().err
        hashes.append(results_of(out)["benchmarks"]["verl"]["data"]["content_sha256"])
    assert hashes[0] != hashes[1]


# --- stored responses ----------------------------------------------------------


def test_stored_responses_are_judged_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = data_file("verifier/gsm8k_model_outputs.jsonl")
    out = tmp_path / "judged"
    mapping = ["--map", "answer=gold", "--map", "problem_id=problem_index"]
    assert main(["eval", "--responses", str(file), *mapping, "--out", str(out)]) == 0
    entry = results_of(out)["benchmarks"]["gsm8k_model_outputs"]
    labelled = data_rows("verifier/gsm8k_model_outputs.jsonl")
    right, n = Counter(), Counter(row["problem_index"] for row in labelled)
    for row in labelled:
        right[row["problem_index"]] += row["expected"]
    assert {int(p["id"]): p["correct"] for p in entry["problems"]} == {index: right[index] for index in n}
    assert entry["metrics"]["n"] == {"smallest": 1, "largest": max(n.values())}
    assert list(entry["metrics"]["pass@k"]) == ["1"]
    assert entry["metrics"]["avg@k"] == pytest.approx(np.mean([right[i] / n[i] for i in n]))
    assert entry["metrics"]["truncated"] is None
    assert entry["metrics"]["length"]["unit"] == "characters"
    assert "Samples a problem differ" in capsys.readouterr().out


def test_rows_without_a_problem_id_are_problems_of_their_own_and_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [
        {"prediction": r"\boxed{2}", "answer": "2", "finish_reason": "stop", "tokens": 5},
        {"prediction": r"\boxed{2.05}", "answer": "2", "tolerance": 0.1, "finish_reason": "length", "tokens": 7},
        {"prediction": "", "answer": {"any_of": ["1", "2"]}, "finish_reason": "length", "tokens": 0},
    ]
    path = write(tmp_path / "r.jsonl", rows)
    assert main(["eval", "--responses", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "each row is a problem of its own" in capsys.readouterr().err
    metrics = results_of(tmp_path / "out")["benchmarks"]["r"]["metrics"]
    assert metrics["avg@k"] == pytest.approx(2 / 3)
    assert metrics["truncated"] == pytest.approx(2 / 3)
    assert metrics["no_answer"] == pytest.approx(1 / 3)
    assert metrics["length"] == {"unit": "tokens", "mean": 4.0, "median": 5.0, "p95": 7.0}


def test_how_a_problem_s_samples_ended_is_not_known_where_one_row_does_not_say(tmp_path: Path) -> None:
    ends = [("a", "length"), ("a", "stop"), ("b", "length"), ("b", None)]
    rows = [{"prediction": "1", "answer": "1", "problem_id": p, "finish_reason": end} for p, end in ends]
    assert main(["eval", "--responses", str(write(tmp_path / "r.jsonl", rows)), "--out", str(tmp_path / "out")]) == 0
    entry = results_of(tmp_path / "out")["benchmarks"]["r"]
    assert [problem["truncated"] for problem in entry["problems"]] == [1, None]
    assert entry["metrics"]["truncated"] is None


def test_eval_and_verify_agree_whose_tolerance_holds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prediction": r"\boxed{1.3}", "answer": {"any_of": ["1"], "tolerance": 0.5}, "tolerance": 0.1},
        {"prediction": r"\boxed{1.3}", "answer": {"any_of": ["1"], "tolerance": 0.1}, "tolerance": 0.5},
        {"prediction": r"\boxed{1.3}", "answer": "1", "tolerance": 0.5},
        {"prediction": r"\boxed{1.3}", "answer": "1"},
    ]
    path = write(tmp_path / "r.jsonl", rows)
    assert main(["verify", str(path), "--tolerance", "0.4"]) == 0
    verified = [json.loads(line)["correct"] for line in capsys.readouterr().out.splitlines()]
    assert main(["eval", "--responses", str(path), "--tolerance", "0.4", "--out", str(tmp_path / "out")]) == 0
    problems = results_of(tmp_path / "out")["benchmarks"]["r"]["problems"]
    assert verified == [problem["correct"] == 1 for problem in problems] == [True, False, True, True]


def test_two_models_responses_are_compared_under_one_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for model, answers in {"a": "12", "b": "13"}.items():
        rows = [{"id": i, "prediction": each, "answer": str(i)} for i, each in enumerate(answers, start=1)]
        path = write(tmp_path / f"{model}.jsonl", rows)
        command = ["eval", "--responses", str(path), "--benchmark", "mine", "--out", str(tmp_path / model)]
        assert main(command) == 0
    assert main(["compare", str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(tmp_path / "ab")]) == 0
    compared = json.loads((tmp_path / "ab" / "comparison.json").read_text())["benchmarks"]["mine"]
    assert compared["by_problem"]["b"]["losses"] == 1
    capsys.readouterr()
    again = ["eval", "--responses", str(path), "--benchmark", f"mine={path}", "--out", str(tmp_path / "c")]
    assert main(again) == 2
    assert "one name without a path" in capsys.readouterr().err


def test_csv_responses_may_have_every_column(tmp_path: Path) -> None:
    path = tmp_path / "r.csv"
    header = "prediction,answer,problem_id,tokens,finish_reason,tolerance\n"
    path.write_text(header + r"\boxed{1.3},1,a,12,stop,0.5" + "\n" + r"\boxed{1},1,b,9,length," + "\n")
    assert main(["eval", "--responses", str(path), "--out", str(tmp_path / "out")]) == 0
    entry = results_of(tmp_path / "out")["benchmarks"]["r"]
    assert [(p["id"], p["correct"], p["lengths"]) for p in entry["problems"]] == [("a", 1, [12]), ("b", 1, [9])]
    assert entry["metrics"]["truncated"] == 0.5


# --- mistakes ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--benchmark", "aime24=FILE"], "3 rows; expected the 30"),
        (["--benchmark", "aime2024"], "did you mean aime24"),
        (["--benchmark", "mine=FILE", "--benchmark", "mine=FILE"], "names mine twice"),
        (["--benchmark", "mine=missing.jsonl"], "does not exist"),
        ([], "no --benchmark"),
        (["--benchmark", "mine=FILE", "--temperature", "0"], "--temperature = 0"),
        (["--benchmark", "mine=FILE", "--top-p", "1.5"], "--top-p = 1.5"),
        (["--benchmark", "mine=FILE", "--n", "0"], "--n = 0"),
        (["--benchmark", "mine=FILE", "--max-rows", "0"], "--max-rows = 0"),
        (["--benchmark", "mine=FILE", "--tolerance", "much"], "tolerance"),
        (["--benchmark", "mine=FILE", "--chat", "x"], "NAME=VALUE"),
        (["--benchmark", "mine=FILE", "--map", "answer=gold"], "no column 'gold'"),
        (["--benchmark", "mine=FILE", "--map", "gold=answer"], "OURS=THEIRS"),
        (["--benchmark", "zoo", "--map", "answer=gold"], "--map with zoo alone"),
        (["--benchmark", "mine=FILE", "--device", "gpu"], "device 'gpu'"),
        (["--benchmark", "mine=FILE", "--template", "gone.jinja"], "--template = 'gone.jinja'"),
        (["--benchmark", "mine=FILE", "--device", "cuda:99"], "cuda:99"),
        (["--benchmark", "mine=FILE", "--responses", "FILE"], "--model and --responses both"),
        (["--benchmark", "mine=FILE", "--max-tokens", "32768"], "give --max-tokens 8"),
    ],
)
def test_mistakes_are_one_line_with_a_remedy(
    options: list[str], message: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"id": str(i), "problem": "1+1?", "answer": "2"} for i in range(3)]
    path = write(tmp_path / "p.jsonl", rows)
    options = [option.replace("FILE", str(path)) for option in options]
    assert main(["eval", "--model", str(tiny), *options, "--out", str(tmp_path / "out")]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("loading torch")]
    assert len(error) == 1
    assert message in error[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"prediction": "1"}], [], "no column 'answer'"),
        ([{"prediction": "1", "answer": ""}], [], "the answer is ''"),
        ([{"prediction": 1, "answer": "1"}], [], "prediction is int"),
        ([{"prediction": "1", "answer": "1", "id": 1}] * 2, [], "the id '1' was used before"),
        ([{"prediction": "1", "answer": a, "problem_id": 1} for a in "12"], [], "one answer a problem"),
        ([{"prediction": "1", "answer": "1", "problem_id": i} for i in (1, None)], [], "no problem_id"),
        ([{"prediction": "1", "answer": "1", "tokens": "3"}], [], "tokens = '3'"),
        ([{"prediction": "1", "answer": "1"}], ["--map", "gold=answer"], "OURS=THEIRS"),
        ([{"prediction": "1", "answer": "1"}], ["--map", "answer=gold"], "no column 'gold'"),
        ([{"prediction": "1", "answer": "1"}], ["--n", "3"], "--n with --responses"),
        ([{"prediction": "1", "answer": "1"}], ["--max-rows", "3"], "--max-rows with --responses"),
        ([{"prediction": "half \ud83d", "answer": "1"}], [], "line 1: half of a character"),
        ([], [], "is empty"),
    ],
)
def test_mistakes_in_responses_are_one_line_with_a_remedy(
    rows: list[dict[str, Any]], options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "r.jsonl", rows)
    assert main(["eval", "--responses", str(path), *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_a_responses_file_that_is_not_there_is_named_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "--responses", str(tmp_path / "gone"), "--out", str(tmp_path / "out")]) == 2
    assert "gone does not exist" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "zoo:studnt"], "model path 'zoo:studnt'"),
        (["--model", "zoo:student", "--device", "gpu"], "device 'gpu'"),
        (["--model", "zoo:student", "--template", "gone.jinja"], "--template = 'gone.jinja'"),
        (["--model", "zoo:student", "--benchmark", "mine=gone.jsonl"], "gone.jsonl does not exist"),
    ],
)
def test_what_can_be_known_without_torch_is_said_before_it_is_loaded(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["eval", "--benchmark", "zoo", *options, "--out", str(tmp_path / "out")]) == 2
    (line,) = capsys.readouterr().err.splitlines()  # without "loading torch ..."
    assert message in line


def test_the_cheap_checks_load_no_torch() -> None:
    script = "import sys, scope_opd.cli.early, scope_opd.evaluate.loading; sys.exit('torch' in sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    assert subprocess.run([sys.executable, "-c", script], env=environment, check=False).returncode == 0


def test_a_long_silence_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eval_progress, "_SILENCE_S", 0.1)
    said: list[float] = []
    enough = threading.Event()

    def say(seconds: float) -> None:
        said.append(seconds)
        if len(said) == 3:
            enough.set()

    heartbeat = eval_progress.Heartbeat(say, 0.2)
    heartbeat.start()
    assert enough.wait(30)
    heartbeat.close()
    assert said == sorted(said)
    assert said[0] >= 0.1
    count = len(said)
    time.sleep(0.5)
    assert len(said) == count


def test_the_line_in_a_silence_says_what_goes_on_and_for_how_long() -> None:
    stream = io.StringIO()
    progress = eval_progress.PlainProgress(Console(file=stream), eval_progress.Meter(), "decoding")
    progress.begin(0, 8)
    progress.benchmark("aime24")
    progress._silent(30.2)
    progress.close()
    assert stream.getvalue() == "aime24  0/8 samples  decoding, 0:30\n"


def test_a_benchmark_that_was_mostly_cut_off_has_a_note(zoo: Path) -> None:
    results = results_of(zoo)
    assert not any("ran into" in line for line in notes(results))
    results["benchmarks"]["zoo"]["metrics"]["truncated"] = 0.62
    assert "zoo: 62.0 % of the samples ran into --max-tokens 64: its figures measure" in "\n".join(notes(results))
    results["settings"]["benchmarks"] = None
    assert "ran into their token limit" in "\n".join(notes(results))
