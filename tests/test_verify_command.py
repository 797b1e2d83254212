"""``scope verify``: rows in, verdicts out in the same order, by the verifier of training."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import Future
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from scope_opd.cli.main import main
from scope_opd.cli.verify_command import MAX_WAITING, AnswerRow, Judging, answer_row
from scope_opd.config import VerifyConfig
from scope_opd.errors import DataError
from scope_opd.types import Prompt, Verdict
from scope_opd.verify.answers import build_answer_verifier
from shared_data import data_rows

COMMAND = [sys.executable, "-m", "scope_opd", "verify"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def judge(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: list[Any], *options: str
) -> tuple[int, list[dict[str, Any]], str]:
    """Exit code, output rows and stderr of the command on a file with these rows (texts go in as they are)."""
    file = tmp_path / "rows.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(line + "\n" for line in lines))
    code = main(["verify", str(file), "--workers", "1", *options])
    out, err = capsys.readouterr()

    def refuse(constant: str) -> None:
        raise ValueError(constant)

    return code, [json.loads(line, parse_constant=refuse) for line in out.splitlines()], err


def verdicts(rows: list[dict[str, Any]]) -> list[bool | None]:
    return [row["correct"] for row in rows]


def test_every_row_is_judged_in_input_order(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"id": "a", "prediction": r"so \boxed{x+1}", "answer": "1+x"},
        {"id": 7, "prediction": r"so \boxed{4}", "answer": 4},
        "",
        {"prediction": "1/2", "answer": "0.5", "form": "answer"},
        {"prediction": r"\boxed{2, 3}", "answer": {"all_of": ["3", "2"]}},
        {"prediction": r"\boxed{2}", "answer": {"all_of": ["3", "2"]}, "id": None, "kind": "math"},
        {"prediction": r"\boxed{2}", "answer": '{"any_of": ["3", "2"]}', "other": [1]},
        {"prediction": r"\boxed{9^{9^{9^9}}}", "answer": r"\pi"},
    ]
    code, found, err = judge(tmp_path, capsys, rows)
    assert (code, err) == (0, "")
    assert [list(row) for row in found] == [["id", "correct", "extracted", "reason"]] * 7
    assert [row["id"] for row in found] == ["a", 7, 4, 5, 6, 7, 8]
    assert verdicts(found) == [True, True, True, True, False, True, None]
    assert found[0]["extracted"] == "x+1"
    assert all(row["reason"] for row in found)


def test_options_and_rows_say_how_numbers_may_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prediction": r"\boxed{101}", "answer": "100"},
        {"prediction": r"\boxed{101}", "answer": "100", "tolerance": 0.5},
        {"prediction": r"\boxed{101}", "answer": "100", "tolerance": "2%"},
        {"prediction": r"\boxed{101}", "answer": {"any_of": ["100"], "tolerance": 0.5}, "tolerance": "2%"},
    ]
    assert verdicts(judge(tmp_path, capsys, rows)[1]) == [False, False, True, False]
    assert verdicts(judge(tmp_path, capsys, rows, "--tolerance", "1%")[1]) == [True, False, True, False]
    assert verdicts(judge(tmp_path, capsys, rows, "--tolerance", "1")[1]) == [True, False, True, False]


def test_options_say_where_an_answer_may_stand(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prediction": "I think the answer is 5", "answer": "5"},
        {"prediction": r"<think> it is \boxed{5}", "answer": "5"},
        {"prediction": r"<think> hm </think> \boxed{5}", "answer": "5"},
        {"prediction": r"<think> \boxed{5} </think> That is it.", "answer": "5"},
    ]
    assert verdicts(judge(tmp_path, capsys, rows)[1]) == [True, False, True, False]
    assert verdicts(judge(tmp_path, capsys, rows, "--no-fallback")[1]) == [False, False, True, False]
    assert verdicts(judge(tmp_path, capsys, rows, "--scope", "all")[1]) == [True, False, True, True]


def test_a_bomb_has_no_verdict_within_the_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"prediction": r"\boxed{((10!)!)!}", "answer": r"42+\pi"}, {"prediction": r"\boxed{x+1}", "answer": "1+x"}]
    _, found, _ = judge(tmp_path, capsys, rows, "--timeout-s", "0.5")
    assert verdicts(found) == [None, True]


def test_code_is_judged_by_running_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = {"format": "stdio", "tests": [{"input": "3\n", "output": "4\n"}]}
    rows = [
        {"prediction": "```python\nprint(int(input()) + 1)\n```", "answer": answer, "kind": "code"},
        {"prediction": "```python\nprint(5)\n```", "answer": answer},
        {"prediction": "print(4)", "answer": answer, "form": "answer"},
        {"prediction": r"\boxed{x+1}", "answer": "1+x"},
    ]
    code, found, err = judge(tmp_path, capsys, rows, "--allow-unsandboxed")
    assert (code, verdicts(found)) == (0, [True, False, True, True]), err


@pytest.mark.parametrize(
    ("row", "complaint"),
    [
        ({"prediction": "3"}, "no 'answer'"),
        ({"answer": "3", "id": "q"}, "(id 'q'): no 'prediction'"),
        ({"prediction": 3, "answer": "3"}, "prediction = 3; expected a text"),
        ({"prediction": "3", "answer": ""}, "expected a text that is not empty"),
        ({"prediction": "3", "answer": {"any_of": []}}, "not empty"),
        ({"prediction": "3", "answer": {"format": "cobol"}}, "format = 'cobol'"),
        ({"prediction": "3", "answer": "3", "form": "box"}, "form = 'box'; expected response or answer"),
        ({"prediction": "3", "answer": "3", "kind": "logic"}, "kind = 'logic'; expected math or code"),
        ({"prediction": "3", "answer": "3", "kind": "code"}, "kind = 'code' and an answer without a format"),
        ({"prediction": "3", "answer": "3", "tolerance": -1}, "tolerance = -1"),
        ({"prediction": "3", "answer": "3", "problem": 3}, "problem = 3; expected a text"),
        ({"prediction": "3", "answer": "3", "expected": 1}, "expected = 1; expected true or false"),
        ({"prediction": "3", "answer": "3", "id": []}, "the id is neither text nor number"),
        ('{"prediction": "3", "answer": NaN}', "NaN"),
        ("[1]", "expected a JSON object"),
        ('{"prediction": ', "not JSON"),
    ],
)
def test_a_bad_row_is_one_line_and_loses_nothing_before_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], row: Any, complaint: str
) -> None:
    good = {"prediction": r"\boxed{x+1}", "answer": "1+x"}
    code, found, err = judge(tmp_path, capsys, [good, good, row, good])
    assert (code, verdicts(found)) == (2, [True, True])
    assert len(err.splitlines()) == 1
    assert f"{tmp_path / 'rows.jsonl'} line 3" in err
    assert complaint in err


def test_a_byte_that_is_no_text_loses_nothing_before_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = b'{"prediction": "3", "answer": "3"}\n{"prediction": "\xff", "answer": "3"}\n'
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert main(["verify", "-"]) == 2
    out, err = capsys.readouterr()
    assert json.loads(out)["correct"] is True
    assert "standard input line 2" in err
    assert "UTF-8" in err


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (["--tolerance", "some"], "--tolerance = 'some'; expected a number >= 0 or a share"),
        (["--timeout-s", "0"], "--timeout-s = 0.0; expected greater than 0; change --timeout-s"),
        (["--workers", "0"], "--workers = 0"),
        (["--scope", "nowhere"], "--scope"),
    ],
)
def test_a_bad_option_is_one_line(capsys: pytest.CaptureFixture[str], options: list[str], complaint: str) -> None:
    assert main(["verify", "-", *options]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1
    assert complaint in err


def test_missing_and_empty_files_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, complaint in (("nowhere.jsonl", "no such file"), ("empty.jsonl", "has no rows"), ("", "is a folder")):
        assert main(["verify", str(tmp_path / name)]) == 2
        assert complaint in capsys.readouterr().err


def test_the_summary_counts_and_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prediction": "3", "answer": "3", "expected": True},
        {"prediction": "3", "answer": "3", "expected": False},
        {"prediction": "3", "answer": "4", "expected": True},
        {"prediction": r"\boxed{9^{9^{9^9}}}", "answer": r"\pi", "expected": False},
        {"prediction": "3", "answer": "4"},
    ]
    _, _, err = judge(tmp_path, capsys, rows, "--summary")
    assert err.splitlines() == [
        "5 judged: 2 correct, 2 incorrect, 1 without a verdict",
        "1 of 4 as expected (25.0 %): 1 wrongly accepted, 1 wrongly refused, 1 without a verdict",
    ]
    _, _, err = judge(tmp_path, capsys, rows[4:], "--summary")
    assert err == "1 judged: 0 correct, 1 incorrect, 0 without a verdict\n"


def test_texts_that_utf8_cannot_hold_come_out_as_escapes(tmp_path: Path) -> None:
    row = {"id": "\udc80é", "prediction": "\ud800", "answer": "\ud800", "form": "answer"}
    done = subprocess.run(
        [*COMMAND, "-"], input=json.dumps(row).encode(), env=ENVIRONMENT, capture_output=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["id"] == "\udc80é"


def test_a_program_may_wait_for_each_verdict() -> None:
    with subprocess.Popen([*COMMAND, "-"], env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for number, text in enumerate(["3", r"\boxed{x+1}", r"\boxed{3}"], start=1):
            row = {"prediction": text, "answer": {"any_of": ["3", "1+x"]}}
            process.stdin.write(json.dumps(row).encode() + b"\n")
            process.stdin.flush()
            found = json.loads(process.stdout.readline())
            assert (found["id"], found["correct"]) == (number, True)
        process.stdin.close()
        assert process.wait(60) == 0


def test_an_interrupted_command_prints_no_row_that_it_did_not_judge() -> None:
    loop = {"format": "functional", "fn_name": "f", "tests": [{"args": [], "output": 1}]}
    rows = [
        {"prediction": "3", "answer": "3"},
        {"prediction": "```python\ndef f():\n    while True: pass\n```", "answer": loop},
        {"prediction": "4", "answer": "4"},
    ]
    command = [*COMMAND, "-", "--allow-unsandboxed", "--code-timeout-s", "120"]
    with subprocess.Popen(
        command, env=ENVIRONMENT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["id"] == 1
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stdout.read() == b""
        assert process.stderr.read().decode() == "interrupted: 1 row judged; the output is partial\n"


def test_keys_of_other_names_are_mapped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"response": "3", "gold": "3", "answer": "no gold answer"}, {"response": "3", "answer": "3"}]
    mapped = ["--map", "prediction=response", "--map", "answer=gold"]
    code, found, err = judge(tmp_path, capsys, rows, *mapped)
    assert (code, verdicts(found)) == (2, [True])
    assert "line 2: no column 'gold', found response, answer; expected it in every row; name it with --map" in err
    assert judge(tmp_path, capsys, rows, "--map", "gold=answer")[0] == 2


def test_each_kind_of_answer_has_its_own_limit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []

    def refuse(settings: VerifyConfig, *_: Any) -> Any:
        seen.append((settings.timeout_s, settings.code_timeout_s))
        raise DataError("enough")

    for room in ("verify.answers", "cli.eval_responses"):
        monkeypatch.setattr(f"scope_opd.{room}.build_answer_verifier", refuse)
    file = tmp_path / "r.jsonl"
    file.write_text('{"prediction": "1", "answer": "1"}\n')
    for options in (["--timeout-s", "3"], ["--code-timeout-s", "4"]):
        assert main(["verify", str(file), *options]) == 2
        assert main(["eval", "--responses", str(file), "--out", str(tmp_path / "out"), *options]) == 2
    assert seen == [(3.0, 10.0)] * 2 + [(5.0, 4.0)] * 2


def test_a_pipe_closed_early_is_fine(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prediction": "\\\\boxed{x+1}", "answer": "1+x"}\n' * 3000)
    with subprocess.Popen(
        [*COMMAND, str(tmp_path / "rows.jsonl")], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert json.loads(process.stdout.readline())["correct"] is True
        process.stdout.close()
        assert process.wait(60) == 1
        assert process.stderr.read() == b""


def test_rows_that_wait_are_bounded() -> None:
    release = threading.Event()
    submitted: list[int] = []

    class Slow:
        maths: Any

        def submit(self, *_: Any, **__: Any) -> Future[Verdict]:
            submitted.append(1)
            future: Future[Verdict] = Future()
            if release.is_set():
                future.set_result(Verdict(True, 1.0))
            else:
                waiting.append(future)
            return future

        def close(self) -> None:
            pass

    waiting: list[Future[Verdict]] = []
    slow: Any = Slow()
    slow.maths = slow
    row = answer_row({"prediction": "3", "answer": "3"}, 1, "line 1")
    with Judging(slow, VerifyConfig()) as judging:
        reader = threading.Thread(target=lambda: [judging.submit(row) for _ in range(2 * MAX_WAITING)])
        reader.start()
        reader.join(0.5)
        assert reader.is_alive()
        assert len(submitted) <= MAX_WAITING + 2
        release.set()
        for future in waiting:
            future.set_result(Verdict(True, 1.0))
        reader.join(30)
        judging.finish()
    assert judging.counts[True] == 2 * MAX_WAITING


def test_an_error_of_judging_ends_the_command() -> None:
    class Broken:
        maths: Any

        def submit(self, *_: Any, **__: Any) -> Future[Verdict]:
            future: Future[Verdict] = Future()
            future.set_exception(DataError("broken"))
            return future

        def close(self) -> None:
            pass

    broken: Any = Broken()
    broken.maths = broken
    row: AnswerRow = answer_row({"prediction": "3", "answer": "3"}, 1, "line 1")

    def run() -> None:
        with Judging(broken, VerifyConfig()) as judging:
            for _ in range(10 * MAX_WAITING):
                judging.submit(row)
            judging.finish()

    with pytest.raises(DataError, match="broken"):
        run()


def test_real_outputs_are_judged_as_their_labels_say(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = data_rows("verifier/gsm8k_model_outputs.jsonl")
    rows = [{**row, "answer": row["gold"]} for row in rows]
    _, found, err = judge(tmp_path, capsys, rows, "--summary")
    assert [row["id"] for row in found] == [row["id"] for row in rows]
    assert "600 of 600 as expected (100.0 %)" in err


def test_code_whose_tests_cannot_be_read_is_named_by_its_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = {"format": "stdio", "tests": [{"input": 1, "output": "1"}]}
    code, _, err = judge(tmp_path, capsys, [{"id": "a", "prediction": "x", "answer": answer}], "--allow-unsandboxed")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "rows.jsonl line 1 (id 'a'): test 1: input is 1" in err
    with (
        closing(build_answer_verifier(VerifyConfig(allow_unsandboxed=True))) as verifier,
        pytest.raises(DataError, match="'p': test 1"),
    ):
        verifier.prepare([Prompt("p", "q", answer, ())])
