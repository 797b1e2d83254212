"""Laws of ``scope score``: every row once, in order, by the model's own numbers; nothing on disk is asked for again."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fault_server import FAULTS, MODEL, FaultServer, Table, at_random, made_rollouts, servers
from scope_opd.cli import score_command
from scope_opd.cli.main import main
from tiny import tiny_model

KEY = "sk-a-secret-key-1234567890"
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def table() -> Table:
    return Table(tiny_model("qwen3", seed=3))


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(source: Path, out: Path, *more: str, urls: list[str]) -> tuple[int, str, str]:
        options = [option for url in urls for option in ("--teacher-url", url)]
        code = main(["score", str(source), "--out", str(out), *options, "--teacher-model", MODEL, *more])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


def rows_of(count: int, seed: int = 0) -> list[dict[str, Any]]:
    return [
        {"id": r.id, "prompt_token_ids": r.prompt_token_ids, "token_ids": r.token_ids, "note": "é"}
        for r in made_rollouts(count, seed)
    ]


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def check(found: list[dict[str, Any]], rows: list[dict[str, Any]], table: Table) -> None:
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    for row in found:
        expected = table.logprobs([*row["prompt_token_ids"], *row["token_ids"]])[len(row["prompt_token_ids"]) - 1 :]
        assert row["teacher_logprobs"] == pytest.approx(expected, abs=1e-6)
        assert row["note"] == "é"


def test_rows_gain_the_teachers_log_probs_in_order(run: Run, table: Table, tmp_path: Path) -> None:
    rows = rows_of(30)
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    left, right = FaultServer(table), FaultServer(table)
    with servers(left, right):
        code, told, _ = run(source, out, urls=[left.url, right.url])
    assert code == 0
    check(read(out), rows, table)
    assert "30 of 30 rows have scores, 0 could not be scored" in told


def test_faults_change_no_number(run: Run, table: Table, tmp_path: Path) -> None:
    rows = rows_of(60)
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    kinds = [fault for fault in FAULTS if fault not in ("slow", "429_later")]
    with FaultServer(table, at_random(0.3, kinds)) as server:
        code, _, _ = run(source, out, "--read-timeout-s", "5", urls=[server.url])
        assert server.injected.total() >= 15
    assert code == 0
    check(read(out), rows, table)


def test_a_second_call_sends_nothing_and_changes_nothing(run: Run, table: Table, tmp_path: Path) -> None:
    source, out = write(tmp_path / "in.jsonl", rows_of(5)), tmp_path / "out.jsonl"
    with FaultServer(table) as server:
        assert run(source, out, urls=[server.url])[0] == 0
        before, asked = out.read_bytes(), server.seen.total()
        assert run(source, out, urls=[server.url])[0] == 0
        assert server.seen.total() == asked
    assert run(source, out, urls=["http://127.0.0.1:9/v1"])[0] == 0  # nobody is asked
    assert out.read_bytes() == before


def test_what_is_on_disk_is_not_sent_again_and_a_torn_line_is_mended(run: Run, table: Table, tmp_path: Path) -> None:
    rows = rows_of(12)
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    with FaultServer(table) as server:
        run(source, out, urls=[server.url])
    lines = out.read_text().splitlines()
    out.write_text("\n".join([*lines[6:10], lines[0], lines[1][: len(lines[1]) // 2]]))
    with FaultServer(table) as server:
        assert run(source, out, urls=[server.url])[0] == 0
        asked = set(server.seen)
    check(read(out), rows, table)
    kept = [(*row["prompt_token_ids"], *row["token_ids"]) for row in (*rows[6:10], rows[0])]
    assert not asked.intersection(kept)
    assert len(asked) in (7, 8)  # the fingerprint's tokens may be a row's own


def test_a_row_whose_tokens_changed_is_scored_anew(run: Run, table: Table, tmp_path: Path) -> None:
    rows = rows_of(4)
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    with FaultServer(table) as server:
        run(source, out, urls=[server.url])
        rows[2]["token_ids"] = [9, 8, 7]
        write(source, rows)
        assert run(source, out, urls=[server.url])[0] == 0
    check(read(out), rows, table)


def test_what_cannot_be_scored_is_null_with_its_reason(run: Run, table: Table, tmp_path: Path) -> None:
    rows = rows_of(6)
    rows[1]["token_ids"] = [5] * 400
    rows[3]["token_ids"] = [400]
    rows[4]["prompt_token_ids"] = []
    rows[5]["token_ids"] = []
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    with FaultServer(table) as server:
        code, told, _ = run(source, out, urls=[server.url])
        assert code == 1
        assert "3 of 6 rows have scores, 3 could not be scored" in told
        found, asked = read(out), server.seen.total()
        assert [row["teacher_logprobs"] is None for row in found] == [False, True, False, True, True, False]
        assert "maximum context" in found[1]["error"]
        assert "out of vocabulary" in found[3]["error"]
        assert "prompt" in found[4]["error"]
        assert found[5]["teacher_logprobs"] == []
        assert run(source, out, urls=[server.url])[0] == 1
        assert server.seen.total() == asked


def test_a_row_without_an_answer_is_tried_again_by_the_next_call(run: Run, table: Table, tmp_path: Path) -> None:
    rows = rows_of(3)
    source, out, faulty = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", [False]
    with FaultServer(table, lambda: "500" if faulty[0] else None) as server:
        calls = iter([None, *["500"] * 10_000])
        server.plan = lambda: next(calls)
        code, _, _ = run(source, out, "--deadline-s", "0.5", urls=[server.url])
        assert code == 1
        assert all(row["teacher_logprobs"] is None and "no answer" in row["error"] for row in read(out))
        server.plan = None
        assert run(source, out, urls=[server.url])[0] == 0
    check(read(out), rows, table)
    assert not any("error" in row for row in read(out))


def test_dead_servers_end_the_command_and_keep_what_is_done(
    run: Run, table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(score_command, "GIVE_UP_AFTER", 4)
    source, out = write(tmp_path / "in.jsonl", rows_of(50)), tmp_path / "out.jsonl"
    with FaultServer(table) as server:
        calls = iter([*[None] * 10, *["500"] * 100_000])
        server.plan = lambda: next(calls)
        code, _, told = run(source, out, "--deadline-s", "0.2", "--concurrency", "2", urls=[server.url])
    assert code == 1
    assert "got no answer" in told
    assert sum(row["teacher_logprobs"] is not None for row in read(out)) >= 5


def test_a_resumed_call_refuses_another_teacher(run: Run, table: Table, tmp_path: Path) -> None:
    rows = rows_of(8)
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    with FaultServer(table) as server:
        run(source, out, urls=[server.url])
    out.write_text("".join(f"{line}\n" for line in out.read_text().splitlines()[:4]))
    with FaultServer(Table(tiny_model("qwen3", seed=9))) as server:
        code, _, told = run(source, out, urls=[server.url])
        assert (code, "another model" in told) == (2, True)
        out.unlink()
        assert run(source, out, urls=[server.url])[0] == 0  # begun anew: that teacher it is
        assert run(source, out, urls=[server.url])[0] == 0


MISTAKES: dict[str, tuple[list[str], str]] = {
    "url": (["--teacher-url", "teacher:8000"], "begin it with http"),
    "key": (["--api-key-env", "sk-abcdefgh12345678"], "not the name of an environment variable"),
    "absent": (["--api-key-env", "NO_SUCH_VARIABLE"], "not set"),
    "number": (["--concurrency", "0"], "a number > 0"),
    "bundle": (["--ca-bundle", "/nowhere.pem"], "No such file"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line(name: str, run: Run, table: Table, tmp_path: Path) -> None:
    source, (options, expected) = write(tmp_path / "in.jsonl", rows_of(1)), MISTAKES[name]
    code, _, told = run(source, tmp_path / "out.jsonl", *options, urls=["http://127.0.0.1:9/v1"])
    assert code == 2
    assert expected in told
    assert told.count("\n") == 1
    assert "abcdefgh" not in told


def test_wrong_rows_and_files_are_one_line(run: Run, tmp_path: Path) -> None:
    urls = ["http://127.0.0.1:9/v1"]
    good = rows_of(2)
    for rows, expected in (
        ([], "no rows"),
        ([{**good[0], "token_ids": ["a"]}], "not a list of token ids"),
        ([{"id": "a", "token_ids": [1]}], "no 'prompt_token_ids'"),
        ([good[0], good[0]], "used before"),
    ):
        code, _, told = run(write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl", urls=urls)
        assert (code, expected in told, told.count("\n")) == (2, True, 1)
    source = write(tmp_path / "in.jsonl", good)
    assert "the input itself" in run(source, source, urls=urls)[2]
    assert "has not" in run(source, write(tmp_path / "other.jsonl", [{**good[0], "id": "x"}]), urls=urls)[2]


def test_no_secret_appears_anywhere(
    run: Run, table: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("TEACHER_KEY", KEY)
    source, out = write(tmp_path / "in.jsonl", rows_of(20)), tmp_path / "out.jsonl"
    options = ["--api-key-env", "TEACHER_KEY", "--read-timeout-s", "5"]
    with FaultServer(table, at_random(0.3, [f for f in FAULTS if f not in ("slow", "429_later")]), key=KEY) as server:
        code, told, complained = run(source, out, *options, urls=[server.url])
        assert code == 0
        texts = [p.read_text() for p in tmp_path.iterdir()]
        server.key = f"{KEY}-other"  # the refusal repeats the key that was sent
        out.unlink()
        code, _, refused = run(source, out, *options, urls=[server.url])
        assert (code, "answers 401" in refused) == (2, True)
    assert len(texts) == 3
    texts += [told, complained, refused, caplog.text]
    assert not any(KEY in text for text in texts)


@pytest.mark.slow
def test_a_killed_call_goes_on(table: Table, tmp_path: Path) -> None:
    rows = rows_of(200)
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with FaultServer(table) as server:
        server.delay_s = 0.05
        command = [sys.executable, "-m", "scope_opd", "score", str(source), "--out", str(out)]
        command += ["--teacher-url", server.url, "--teacher-model", MODEL, "--concurrency", "4"]
        for _ in range(2):
            process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            size, deadline = out.stat().st_size if out.exists() else 0, time.monotonic() + 60
            while (out.stat().st_size if out.exists() else 0) < size + 5000 and time.monotonic() < deadline:
                time.sleep(0.01)
            process.send_signal(signal.SIGKILL)
            process.communicate()
        ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    assert "there before" in ended.stdout
    check(read(out), rows, table)
