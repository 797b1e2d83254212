"""Data sets from files: every format gives the same rows, verl's layout is read as it is, and bad rows have places."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from scope_opd.config import ChatConfig
from scope_opd.data.adapters import gsm8k_answer, olympiadbench_answer, split_answers, without_leading_zeros
from scope_opd.data.dataset import read_dataset
from scope_opd.data.prompts import render_prompts
from scope_opd.data.rows import Columns
from scope_opd.errors import ConfigError, DataError
from scope_opd.gold import check_answer, parse_math_gold
from shared_data import data_file, data_rows
from tiny import tiny_tokenizer

ROWS = [
    {"id": "a", "problem": "Was ist 1+1,\n„bitte“?", "answer": "2"},
    {"id": "b", "problem": 'Say "4".', "answer": "4"},
    {"id": "c", "problem": "$x^2 = 4$", "answer": '{"all_of": ["2", "-2"]}'},
]


def write(path: Path, text: str | bytes) -> Path:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def write_lines(path: Path, rows: list[Any]) -> Path:
    return write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_csv(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8") -> Path:
    with path.open("w", newline="", encoding=encoding) as stream:
        writer = csv.DictWriter(stream, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def message(role: str, content: Any) -> dict[str, Any]:
    return {"role": role, "content": content}


def verl_row(index: int, *messages: dict[str, Any], truth: Any = "7") -> dict[str, Any]:
    return {
        "data_source": "mine",
        "prompt": list(messages) or [message("user", f"What is {index}? Put it in \\boxed{{{{}}}}.")],
        "ability": "math",
        "reward_model": {"ground_truth": truth, "style": "rule"},
        "extra_info": {"index": index, "split": "train"},
    }


class TestFormats:
    def test_all_formats_give_the_same_rows(self, tmp_path: Path) -> None:
        lines = write_lines(tmp_path / "r.jsonl", ROWS)
        paths = [
            lines,
            write(tmp_path / "r.jsonl.gz", gzip.compress(lines.read_bytes())),
            write(tmp_path / "r.json", json.dumps(ROWS)),
            write_csv(tmp_path / "r.csv", ROWS),
            write_csv(tmp_path / "bom.csv", ROWS, "utf-8-sig"),
            write_parquet(tmp_path / "r.parquet", ROWS),
        ]
        read = [[(row.id, row.problem, row.answer) for row in read_dataset(path).rows] for path in paths]
        assert read == [read[0]] * len(paths)
        assert read[0][0] == ("a", "Was ist 1+1,\n„bitte“?", "2")
        assert read[0][2][2] == {"all_of": ["2", "-2"]}

    def test_a_csv_row_is_placed_by_the_line_on_which_it_begins(self, tmp_path: Path) -> None:
        data = read_dataset(write_csv(tmp_path / "r.csv", ROWS))
        assert [row.where.rsplit(", ", 1)[1] for row in data.rows] == ["line 2", "line 4", "line 5"]

    def test_the_hash_is_that_of_the_bytes(self, tmp_path: Path) -> None:
        path = write(tmp_path / "r.jsonl", '{"problem": "p", "answer": "1"}\n')
        assert read_dataset(path).sha256 == hashlib.sha256(path.read_bytes()).hexdigest()

    @pytest.mark.parametrize("kind", ["jsonl", "parquet"])
    def test_a_dotted_name_reaches_into_objects(self, kind: str, tmp_path: Path) -> None:
        rows = [{"task": {"text": "p", "meta": {"gold": 3}}, "key": {"n": 9}, "long": {"trace": ["x"] * 9}}]
        path = (write_lines if kind == "jsonl" else write_parquet)(tmp_path / f"r.{kind}", rows)
        (row,) = read_dataset(path, Columns("task.text", "task.meta.gold", "key.n")).rows
        assert (row.id, row.problem, row.answer) == ("9", "p", 3)

    def test_a_whole_name_with_a_dot_goes_before_the_object(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "r.jsonl", [{"a.b": "whole", "a": {"b": "inner"}, "answer": 1}])
        assert read_dataset(path, Columns("a.b")).rows[0].problem == "whole"

    def test_an_answer_of_every_form_is_read(self, tmp_path: Path) -> None:
        answers = [
            "1/2", 3, 0.5, {"any_of": ["1/2", "0.5"]}, {"all_of": ["1", "2"], "tolerance": "1%"},
            {"format": "stdio", "tests": [{"input": "1", "output": "2"}]},
            {"format": "humaneval", "prompt": "def f():", "test": "def check(f): pass", "entry_point": "f"},
        ]  # fmt: skip
        path = write_lines(tmp_path / "r.jsonl", [{"problem": "p", "answer": answer} for answer in answers])
        assert [row.answer for row in read_dataset(path).rows] == answers

    def test_parquet_decimals_and_the_nulls_of_its_structs_are_no_obstacle(self, tmp_path: Path) -> None:
        path = write_parquet(tmp_path / "d.parquet", [{"problem": "p", "answer": Decimal("1.50")}])
        assert read_dataset(path).rows[0].answer == "1.50"
        rows = [{"problem": "p", "answer": {"any_of": ["1"]}}, {"problem": "q", "answer": {"all_of": ["1", "2"]}}]
        read = read_dataset(write_parquet(tmp_path / "s.parquet", rows)).rows
        assert [row.answer for row in read] == [{"any_of": ["1"]}, {"all_of": ["1", "2"]}]


class TestVerl:
    @pytest.mark.parametrize("kind", ["jsonl", "parquet"])
    def test_its_layout_is_read_without_settings(self, kind: str, tmp_path: Path) -> None:
        rows = [verl_row(5, message("system", "Be brief."), message("user", "What is 3+4?")), verl_row(5)]
        path = (write_lines if kind == "jsonl" else write_parquet)(tmp_path / f"r.{kind}", rows)
        data = read_dataset(path)
        assert data.layout == "verl"
        first, second = data.rows
        assert (first.id, second.id) == ("row-000001", "row-000002")
        assert (first.problem, first.answer) == ("What is 3+4?", "7")
        assert [m["role"] for m in first.messages] == ["system", "user"]
        assert first.fields == {
            "data_source": "mine", "ability": "math", "extra_info.index": 5, "extra_info.split": "train"
        }  # fmt: skip

    def test_named_columns_are_never_overridden(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "r.jsonl", [verl_row(1)])
        with pytest.raises(DataError, match="no column 'question'"):
            read_dataset(path, Columns("question"))

    def test_double_braces_are_reported_and_mended_only_on_request(self, tmp_path: Path) -> None:
        rows = [verl_row(1), verl_row(2, message("user", "fine \\boxed{}"))]
        path = write_lines(tmp_path / "r.jsonl", rows)
        left = read_dataset(path)
        assert "1 of 2 prompts with a literal \\boxed{{}}" in left.notes[0]
        assert len(left.notes) == 1
        assert left.rows[0].problem.endswith("\\boxed{{}}.")
        mended = read_dataset(path, fix_double_braces=True)
        assert mended.rows[0].problem == mended.rows[0].messages[0]["content"] == "What is 1? Put it in \\boxed{}."
        assert mended.rows[1] == left.rows[1]
        assert "mended in 1 of 2" in mended.notes[0]

    def test_the_published_sample_is_read_whole_and_its_braces_counted(self) -> None:
        data = read_dataset(data_file("train/scope_train_sample.parquet"))
        assert (len(data.rows), data.layout, data.skipped) == (2000, "verl", [])
        assert "2000 of 2000 prompts with a literal" in data.notes[0]
        assert len({row.id for row in data.rows}) == 2000
        prompts = render_prompts(data.rows, tiny_tokenizer(), ChatConfig(), max_prompt_tokens=4096)
        assert prompts[0].text == f"user: {data.rows[0].problem}\nassistant: "


BAD_MESSAGES = {
    "no messages": ([], "no messages"),
    "an assistant's turn last": ([message("user", "p"), message("assistant", "42")], "ends with a turn of the role"),
    "an unknown role": ([message("tool", "p")], "role 'tool'"),
    "no role": ([{"content": "p"}], "role None"),
    "content of parts": ([message("user", [{"type": "text", "text": "p"}])], "of the kind list"),
    "a late system message": ([message("user", "p"), message("system", "s"), message("user", "q")], "message 2"),
    "an empty last turn": ([message("user", " ")], "is empty"),
}


class TestMessages:
    @pytest.mark.parametrize("case", BAD_MESSAGES, ids=str)
    def test_a_conversation_that_cannot_be_answered_is_a_bad_row(self, case: str, tmp_path: Path) -> None:
        messages, words = BAD_MESSAGES[case]
        path = write_lines(tmp_path / "r.jsonl", [{"problem": messages, "answer": "1"}])
        with pytest.raises(DataError, match=words) as raised:
            read_dataset(path)
        assert "line 1" in str(raised.value)
        assert raised.value.remedy

    def texts(self, rows: list[Any], chat: ChatConfig, tmp_path: Path) -> list[str]:
        path = write_lines(tmp_path / "r.jsonl", [{"problem": row, "answer": "1"} for row in rows])
        prompts = render_prompts(read_dataset(path).rows, tiny_tokenizer(), chat, max_prompt_tokens=200)
        return [prompt.text for prompt in prompts]

    def test_the_rows_own_system_message_stays_and_the_suffix_follows_the_last_turn(self, tmp_path: Path) -> None:
        own = [message("system", "mine"), message("user", "p"), message("assistant", "q"), message("user", "r")]
        rows = [own, [message("user", "p")], "plain"]
        assert self.texts(rows, ChatConfig(system="theirs", suffix="!"), tmp_path) == [
            "system: mine\nuser: p\nassistant: q\nuser: r!\nassistant: ",
            "system: theirs\nuser: p!\nassistant: ",
            "system: theirs\nuser: plain!\nassistant: ",
        ]

    def test_without_a_template_one_user_message_is_its_text_and_more_are_a_bad_row(self, tmp_path: Path) -> None:
        assert self.texts([[message("user", "p")]], ChatConfig(template="none", suffix="!"), tmp_path) == ["p!"]
        rows = [[message("system", "s"), message("user", "p")]]
        with pytest.raises(DataError, match=r"line 1 .*2 messages and chat.template = 'none'"):
            self.texts(rows, ChatConfig(template="none"), tmp_path)

    def test_a_template_that_refuses_a_conversation_names_the_row(self, tmp_path: Path) -> None:
        template = tmp_path / "t.jinja"
        template.write_text("{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}x")
        chat = ChatConfig(template=str(template))
        with pytest.raises(DataError, match=r"line 2 .*one turn"):
            self.texts(["p", [message("user", "a"), message("assistant", "b"), message("user", "c")]], chat, tmp_path)
        with pytest.raises(ConfigError, match="one turn"):
            self.texts(["p"], ChatConfig(template=str(template), system="s"), tmp_path)


def truncated(path: Path, content: bytes) -> Path:
    return write(path, content[: int(len(content) * 0.8)])


def parquet_bytes(tmp_path: Path) -> bytes:
    rows = [{"problem": f"p{i}", "answer": "1"} for i in range(50)]
    return write_parquet(tmp_path / "whole.parquet", rows).read_bytes()


def parquet_in_latin1(folder: Path) -> None:
    bad = pyarrow.array([b"\xe9"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    table = pyarrow.table({"problem": bad, "answer": ["1"]})
    pyarrow.parquet.write_table(table, folder / "r.parquet")


LINE = '{"problem": "p", "answer": "1"}\n'


def text(name: str, content: str | bytes) -> tuple[str, Callable[[Path], Any]]:
    return name, lambda folder: write(folder / name, content)


DAMAGED: dict[str, tuple[tuple[str, Callable[[Path], Any]], str]] = {
    "truncated parquet": (("r.parquet", lambda tmp: truncated(tmp / "r.parquet", parquet_bytes(tmp))), "cut off"),
    "truncated line": (text("r.jsonl", LINE * 2 + LINE[:20]), "cut off"),
    "truncated JSON": (text("r.json", "[" + LINE.strip() + ", {"), "cut off"),
    "truncated gzip": (text("r.jsonl.gz", gzip.compress((LINE * 99).encode())[:30]), "gzip"),
    "no gzip at all": (text("r.jsonl.gz", LINE), "gzip"),
    "lines in Latin-1": (text("r.jsonl", LINE.encode() + b'{"problem": "\xe9"}\n'), "line 2"),
    "csv in Latin-1": (text("r.csv", b"problem,answer\n\xe9,1\n"), "UTF-8"),
    "csv with an open quote": (text("r.csv", 'problem,answer\np,1\n"q,2\n'), "line 3"),
    "csv with two columns of a name": (text("r.csv", "problem,problem\np,1\n"), "two columns"),
    "csv with a column without a name": (text("r.csv", "problem,\np,1\n"), "without a name"),
    "csv without the column": (text("r.csv", "question,answer\np,1\n"), "no column 'problem'"),
    "parquet with text that is not UTF-8": (("r.parquet", parquet_in_latin1), "after row 0"),
    "parquet without the column": (
        ("r.parquet", lambda tmp: write_parquet(tmp / "r.parquet", [{"question": "p", "answer": "1"}])),
        "no column 'problem'",
    ),
    "no sound row": (text("r.jsonl", '{"problem": ""}\n{}\n'), "line 1: problem is empty"),
}


class TestBadRows:
    @pytest.mark.parametrize("on_bad_row", ["error", "skip"])
    @pytest.mark.parametrize("case", DAMAGED, ids=str)
    def test_a_damaged_file_is_an_error_whatever_becomes_of_bad_rows(
        self, case: str, on_bad_row: Any, tmp_path: Path
    ) -> None:
        (name, make), words = DAMAGED[case]
        make(tmp_path)
        with pytest.raises(DataError) as raised:
            read_dataset(tmp_path / name, on_bad_row=on_bad_row)
        line = str(raised.value)
        assert name in line
        assert words in line
        assert "\n" not in line
        assert raised.value.remedy

    def test_skipped_rows_are_all_listed_and_the_first_few_are_told(self, tmp_path: Path) -> None:
        good = {"id": "g", "problem": "p", "answer": "1"}
        lines = [
            json.dumps(good), "not json", json.dumps({**good, "id": "h", "answer": ""}), json.dumps(good),
            json.dumps({"id": "i", "answer": "1"}), "[1]", json.dumps({**good, "id": "j", "answer": [1]}),
            '{"id": "n", "problem": "p", "answer": NaN}', '{"id": "u", "problem": "\\ud83d", "answer": 1}',
            json.dumps({**good, "id": "z"}),
        ]  # fmt: skip
        path = write(tmp_path / "r.jsonl", "\n".join(lines) + "\n")
        data = read_dataset(path, on_bad_row="skip")
        assert [row.id for row in data.rows] == ["g", "z"]
        assert [each.where.rsplit(" ", 1)[1] for each in data.skipped] == list("23456789")
        reasons = [each.reason for each in data.skipped]
        for reason, words in zip(
            reasons,
            [
                "not JSON",
                "empty",
                "used before, at line 1",
                "no column",
                "(list)",
                "(list)",
                "NaN",
                "half of a character",
            ],
            strict=True,
        ):
            assert words in reason
        (warning,) = data.warnings
        assert "8 of 10 rows skipped: line 2: not JSON" in warning
        assert warning.endswith("5 more")
        with pytest.raises(DataError, match="line 2: not JSON"):
            read_dataset(path)

    def test_a_csv_row_of_another_width_is_skipped(self, tmp_path: Path) -> None:
        path = write(tmp_path / "r.csv", "problem,answer\np,1\nq, with a comma,2\nr,3\n")
        data = read_dataset(path, on_bad_row="skip")
        assert [row.problem for row in data.rows] == ["p", "r"]
        assert data.skipped[0].reason == "3 fields; expected 2, as in the first line"

    def test_ids_by_place_do_not_shift_where_rows_are_skipped(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "r.jsonl", [{"problem": "p", "answer": a} for a in ("1", "", "3")])
        assert [row.id for row in read_dataset(path, on_bad_row="skip").rows] == ["row-000001", "row-000003"]

    def test_prompts_over_the_limit_are_bad_rows_too(self, tmp_path: Path) -> None:
        path = write_lines(tmp_path / "r.jsonl", [{"problem": "p" * n, "answer": "1"} for n in (3, 90, 4)])
        rows = read_dataset(path).rows
        skipped: list[Any] = []
        prompts = render_prompts(rows, tiny_tokenizer(), ChatConfig(), max_prompt_tokens=60, skipped=skipped)
        assert [prompt.problem for prompt in prompts] == ["ppp", "pppp"]
        assert [(each.where, each.reason[:11]) for each in skipped] == [
            (f"{rows[1].where} (id 'row-000002')", "a prompt of")
        ]
        with pytest.raises(
            DataError, match=r"no prompt from 3 rows; the first, .*line 1 \(id 'row-000001'\): a prompt of"
        ):
            render_prompts(rows, tiny_tokenizer(), ChatConfig(), max_prompt_tokens=2, skipped=[])


class TestAdapters:
    def test_gsm8k_answers_follow_the_last_mark(self) -> None:
        assert gsm8k_answer("2 * 500 = 1000\n#### 1,000") == "1000"
        for bad in ("no mark", "####  "):
            with pytest.raises(ValueError, match="####"):
                gsm8k_answer(bad)

    def test_the_adapter_agrees_with_the_answers_of_all_of_gsm8k(self) -> None:
        for row in data_rows("train/gsm8k_test.jsonl"):
            assert gsm8k_answer(row["solution"]) == row["answer"].replace(",", "")

    @pytest.mark.parametrize(
        ("given", "expected"), [("073", "73"), ("000", "0"), ("27.0", "27.0"), ("10", "10"), ("0.5", "0.5")]
    )
    def test_padding_goes_from_runs_of_digits_alone(self, given: str, expected: str) -> None:
        assert without_leading_zeros(given) == expected

    @pytest.mark.parametrize(
        ("text", "parts"),
        [
            ("1,2,3", ["1", "2", "3"]),
            ("$(1,2),(3, 4)$", ["(1,2)", "(3, 4)"]),
            ("$10^{100}$,$10^{1 / 100}$", ["10^{100}", "10^{1 / 100}"]),
            ("$[0,1)$, $\\{2, 3\\}$", ["[0,1)", "\\{2, 3\\}"]),
            ("7", ["7"]),
        ],
    )
    def test_answers_are_cut_at_commas_outside_brackets(self, text: str, parts: list[str]) -> None:
        assert split_answers(text) == parts

    def test_olympiadbench_becomes_lists_and_tolerances(self) -> None:
        assert olympiadbench_answer(["$\\frac{1}{2}$"]) == "\\frac{1}{2}"
        assert olympiadbench_answer("2,-2", is_multiple_answer=True) == {"all_of": ["2", "-2"]}
        assert olympiadbench_answer(["4.2"], error="1e-1") == {"any_of": ["4.2"], "tolerance": 0.1}
        for bad in ([], ["4"]):
            with pytest.raises(ValueError, match=r"final_answer|error"):
                olympiadbench_answer(bad, error="-1")

    def test_every_olympiadbench_answer_becomes_one_that_can_be_judged(self) -> None:
        several = 0
        for row in data_rows("eval/olympiadbench.jsonl"):
            gold = olympiadbench_answer(
                row["final_answer"], is_multiple_answer=row["is_multiple_answer"], error=row["error"]
            )
            check_answer(gold)
            several += len(parse_math_gold(gold).alternatives[0]) > 1
        assert several > 80


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ({"format": "stdio", "tests": [{"input": "1", "output": "1"}, {"input": 1}]}, "test 2: input is 1 (int)"),
        ({"format": "stdio", "tests": [{"input": "1"}]}, "test 1: output is None"),
        ({"format": "stdio", "tests": [{"input": "1", "output": "1"}], "tolerance": "x"}, "tolerance = 'x'"),
        ({"format": "functional", "tests": [{"args": [], "output": 1}]}, "test 1: fn_name is None"),
        ({"format": "functional", "fn_name": "f", "tests": [{"output": 1}]}, "test 1: no args"),
        ({"format": "functional", "fn_name": "f", "tests": [{"args": [1]}]}, "test 1: no output"),
        ({"format": "functional", "fn_name": "f", "tests": [{"args": [], "output_any_of": []}]}, "output_any_of is []"),
        ({"format": "functional", "tests": [{"check": 1}]}, "test 1: check is 1"),
        ({"format": "functional", "tests": [{"check": "x"}, {"args": []}]}, "check code beside calls"),
    ],
)
def test_code_without_the_tests_that_its_format_needs_is_a_bad_row(
    answer: dict[str, Any], found: str, tmp_path: Path
) -> None:
    sound = {"format": "functional", "fn_name": "f", "tests": [{"input": "1\n2", "output": None}]}
    rows = [{"problem": "p", "answer": answer}, {"problem": "q", "answer": sound}]
    data = read_dataset(write_lines(tmp_path / "r.jsonl", rows), on_bad_row="skip")
    assert [row.problem for row in data.rows] == ["q"]
    assert found in data.skipped[0].reason
