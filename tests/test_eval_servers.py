"""Laws of ``scope eval`` with servers: it is the evaluation of the model that they serve, whoever serves it."""

from __future__ import annotations

import json
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from fault_server import MODEL, at_random, servers
from sampling_server import STREAM_FAULTS, SamplingServer, Weights
from scope_opd.cli.main import main
from tiny import save_pair

KEY = "sk-a-secret-key-1234567890"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("served")
    save_pair(folder / "model", "qwen3", seed=1)
    (folder / "tokenizer").mkdir()
    for file in (folder / "model").iterdir():
        if file.name not in ("config.json", "model.safetensors", "generation_config.json"):
            shutil.copy(file, folder / "tokenizer")
    rows = [{"id": f"p{i}", "problem": f"What is {i} + {i + 1}?", "answer": 2 * i + 1} for i in range(8)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def server(folder: Path, *more: Any, **options: Any) -> SamplingServer:
    model = AutoModelForCausalLM.from_pretrained(folder / "model").eval()
    return SamplingServer(Weights(model), *more, **options)


def command(folder: Path, out: Path, *urls: str, more: tuple[str, ...] = ()) -> list[str]:
    addresses = [word for url in urls for word in ("--base-url", url)]
    return [
        "eval", *addresses, "--served-model", MODEL, "--tokenizer", str(folder / "tokenizer"), "--benchmark",
        f"mine={folder / 'rows.jsonl'}", "--n", "3", "--max-tokens", "10", "--suffix", "", "--max-rows", "6",
        "--temperature", "0.8", "--workers", "1", "--out", str(out), *more,
    ]  # fmt: skip


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def samples(out: Path) -> list[tuple[Any, ...]]:
    rows = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    return sorted((row["problem"], row["sample"], row["text"], row["tokens"], row["nll"]) for row in rows)


@pytest.fixture(scope="module")
def whole(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "out"
    with server(folder) as one:
        assert main(command(folder, out, one.url)) == 0
        body = next(body for body in one.bodies if body["stream"])
    assert (body["temperature"], body["top_p"], body["top_k"], body["max_tokens"]) == (0.8, 1.0, 0, 10)
    return out


def test_all_samples_come_from_the_servers_and_the_results_name_their_model(whole: Path) -> None:
    found = results(whole)
    assert found["settings"]["source"]["kind"] == "servers"
    assert found["settings"]["source"]["model"] == MODEL
    assert found["settings"]["engine"]["kind"] == "servers"
    assert "127.0.0.1" not in (whole / "results.json").read_text()
    assert len(samples(whole)) == 24
    assert all(nll is not None and 0 < tokens <= 10 for *_, tokens, nll in samples(whole))


def test_faults_and_another_number_of_servers_change_nothing(folder: Path, whole: Path, tmp_path: Path) -> None:
    kinds = [fault for fault in STREAM_FAULTS if fault not in ("silent", "reset_at_once")]
    left, right = server(folder), server(folder)
    for one, plan in ((left, at_random(0.3, kinds, 1)), (right, at_random(0.3, kinds, 2))):
        one.plan = lambda one=one, plan=plan: plan() if one.bodies[-1]["stream"] else None
    with servers(left, right):
        assert main(command(folder, tmp_path / "out", left.url, right.url)) == 0
    assert (left.injected + right.injected).total() >= 5
    assert (tmp_path / "out" / "results.json").read_bytes() == (whole / "results.json").read_bytes()


def test_an_interrupted_evaluation_goes_on_and_ends_the_same(folder: Path, whole: Path, tmp_path: Path) -> None:
    before = threading.active_count()
    with server(folder) as one:
        one.token_delay_s = 0.02

        def interrupt() -> None:
            while not (tmp_path / "out" / "samples.jsonl").exists() or len(samples(tmp_path / "out")) < 8:
                time.sleep(0.01)
            signal.raise_signal(signal.SIGINT)

        threading.Thread(target=interrupt, daemon=True).start()
        assert main(command(folder, tmp_path / "out", one.url)) == 130
        kept = len(samples(tmp_path / "out"))
        assert 8 <= kept < 24
        one.token_delay_s, asked = 0.0, len(one.seen)
        assert asked
        assert main(command(folder, tmp_path / "out", one.url)) == 0
    # Everything is there: no server is needed to say so again.
    assert main(command(folder, tmp_path / "out", one.url)) == 0
    assert (tmp_path / "out" / "results.json").read_bytes() == (whole / "results.json").read_bytes()
    time.sleep(0.1)
    assert threading.active_count() <= before + 1


def test_another_model_or_tokenizer_is_another_evaluation(
    folder: Path, whole: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = command(folder, whole, "http://127.0.0.1:9/v1")
    words[words.index(MODEL)] = "other"
    assert main(words) == 2
    assert "source.model" in capsys.readouterr().err


def test_log_probs_that_are_not_those_that_sampled_are_left_out_and_said_so(
    folder: Path, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with server(folder, honest=False) as one:
        assert main(command(folder, tmp_path / "out", one.url)) == 0
    assert "nll is left out" in capsys.readouterr().err
    assert [row[:4] for row in samples(tmp_path / "out")] == [row[:4] for row in samples(whole)]
    assert all(row[4] is None for row in samples(tmp_path / "out"))


def test_the_servers_context_bounds_a_response(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with server(folder) as one:
        one.context = 20
        assert main(command(folder, tmp_path / "out", one.url)) == 1
        assert not any(body["stream"] for body in one.bodies)
    assert "--max-model-len" in capsys.readouterr().err


def test_no_key_is_in_anything_that_an_evaluation_leaves(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("EVAL_KEY", KEY)
    with server(folder, key=KEY) as one:
        one.plan = at_random(0.3, ["500", "error_event"], 4)
        key = ("--api-key-env", "EVAL_KEY")
        assert main(command(folder, tmp_path / "out", one.url, more=key)) == 0
        (tmp_path / "key").write_text(f"{KEY}-wrong\n")
        key = ("--api-key-file", str(tmp_path / "key"))
        assert main(command(folder, tmp_path / "other", one.url, more=key)) == 2
    told = capsys.readouterr()
    assert "--api-key-env" in told.err
    assert KEY not in told.out + told.err
    kept = [path for place in ("out", "other") for path in (tmp_path / place).rglob("*") if path.is_file()]
    assert len(kept) >= 5
    assert not any(KEY.encode() in path.read_bytes() for path in kept)


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no name": (["--base-url", "http://h/v1", "--tokenizer", "zoo:student"], "--base-url without --served-model"),
    "no tokenizer": (["--base-url", "http://h/v1", "--served-model", "m"], "without a tokenizer"),
    "no server": (["--served-model", "m", "--model", "zoo:student"], "--served-model without --base-url"),
    "key alone": (["--api-key-env", "X", "--model", "zoo:student"], "--api-key-env without --base-url"),
    "tokenizer alone": (["--tokenizer", "zoo:student"], "--tokenizer without --base-url"),
    "address": (["--base-url", "h:8000", "--served-model", "m", "--model", "zoo:student"], "begin it with http"),
    "key": (["--base-url", "http://h", "--served-model", "m", "--model", "zoo:student", "--api-key-env", KEY],
            "not the name"),
    "dtype": (["--base-url", "http://h", "--served-model", "m", "--model", "zoo:student", "--dtype", "float32"],
              "--dtype with --base-url"),
    "responses": (["--base-url", "http://h", "--served-model", "m", "--responses", "x"], "--responses with --base-url"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words, expected = MISTAKES[name]
    assert main(["eval", *words, "--benchmark", "zoo", "--out", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert expected in told
    assert KEY not in told
