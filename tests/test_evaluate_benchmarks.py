"""Laws of the benchmark table: local copies are those it names, rows become gold forms, whole or not at all."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from scope_opd.data.hub import parse_hub
from scope_opd.data.rows import Columns
from scope_opd.errors import DataError
from scope_opd.evaluate import adapters
from scope_opd.evaluate.benchmarks import TABLE
from scope_opd.evaluate.loading import Loaded, load_benchmark, parse_benchmark
from scope_opd.gold import check_answer, parse_math_gold
from shared_data import data_file

COPIES = {
    "aime24": "eval/aime24.jsonl",
    "aime25": "eval/aime25.jsonl",
    "amc23": "eval/amc23.jsonl",
    "math500": "eval/math500.jsonl",
    "minerva": "eval/minerva.jsonl",
    "olympiadbench": "eval/olympiadbench.jsonl",
    "gsm8k": "train/gsm8k_test.jsonl",
    "humaneval": "code/humaneval.jsonl",
}


def load(text: str, **kwargs: Any) -> Loaded:
    return load_benchmark(*parse_benchmark(text), **kwargs)


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_names_asked_for_are_there() -> None:
    wanted = {"aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench", "gsm8k", "humaneval",
              "livecodebench", "codeforces", "zoo", "deepmath", "taco"}  # fmt: skip
    assert set(TABLE) == wanted
    assert {entry.name for entry in TABLE.values() if entry.role == "training"} == {"deepmath", "taco"}


@pytest.mark.parametrize("name", [name for name in TABLE if name != "zoo"])
def test_every_hub_source_reads_back_and_pins_a_whole_commit_or_none(name: str) -> None:
    entry = TABLE[name]
    source = parse_hub(entry.source)
    assert (source.name, source.subset, source.split) == (entry.hub, entry.subset, entry.split)
    assert entry.revision is None or re.fullmatch("[0-9a-f]{40}", entry.revision)
    assert entry.checked


@pytest.mark.parametrize("name", COPIES)
def test_local_copies_are_whole_and_the_ones_named(name: str) -> None:
    entry = TABLE[name]
    found = load(f"{name}={data_file(COPIES[name])}")
    assert found.data["sha256"] == entry.sha256
    assert len(found.rows) == (entry.copy_rows or entry.rows)
    assert (found.data["partial"], found.data["left_out"]) == (False, 0)
    for row in found.rows:
        check_answer(row.answer)


def test_olympiadbench_has_its_many_answers_units_and_tolerance() -> None:
    rows = load(f"olympiadbench={data_file(COPIES['olympiadbench'])}").rows
    by_id = {row.id.rpartition("-")[2]: row.answer for row in rows}
    assert by_id["1618"] == {"all_of": ["(1,8,19)", "(2,7,13)", "(4,5,7)"]}
    assert by_id["1664"] == {"all_of": ["69", "84"]}
    assert isinstance(by_id["1965"], str)  # "f(x)=ax+b, where b is ...": commas that separate no answers
    assert by_id["2426"] == {"any_of": [r"\frac{600}{7}", r"\frac{600}{7} \mathrm{km/h}"]}
    assert by_id["2592"] == {"any_of": ["4.2", r"4.2\%"], "tolerance": 0.1}
    several = [answer for answer in by_id.values() if any(len(a) > 1 for a in parse_math_gold(answer).alternatives)]
    assert len(several) >= 85


def test_rows_of_the_hub_s_layouts_are_read_too() -> None:
    assert adapters.gsm8k({"question": "q", "answer": "work\n#### 1,234"}, 1) == {"problem": "q", "answer": "1234"}
    assert adapters.aime({"id": 60, "problem": "p", "answer": "033"}, 1) == {"problem": "p", "answer": "33", "id": 60}
    assert adapters.plain({"question": "q", "answer": "1/2"}, 1) == {"problem": "q", "answer": "1/2"}
    assert adapters.deepmath({"question": "q", "final_answer": "Yes"}, 1) == {"problem": "q", "answer": "Yes"}
    row = {"id": 7, "question": "q", "final_answer": ["$2$,$-2$"], "is_multiple_answer": True, "context": "c"}
    expected = {"problem": "c\n\nq", "answer": {"all_of": ["2", "-2"]}, "id": 7}
    assert adapters.olympiadbench(row, 1) == expected
    tests = [{"input": "1\n", "output": "2\n"}]
    row = {"id": "1A", "description": "Add one.", "input_format": "a", "official_tests": tests, "input_mode": "stdio"}
    adapted = adapters.codeforces(row, 1)
    assert adapted is not None
    assert (adapted["answer"], adapted["problem"]) == ({"format": "stdio", "tests": tests}, "Add one.\n\nInput\na")
    check_answer(adapted["answer"])
    assert adapters.codeforces({**row, "generated_checker": "def check(): ..."}, 1) is None


def test_code_rows_become_code_answers() -> None:
    rows = [json.loads(line) for line in data_file("code/code_schema_samples.jsonl").read_text().splitlines()]
    kinds = {"livecodebench_dataset_row": adapters.livecodebench, "taco_dataset_row_partial": adapters.taco}
    seen = set()
    for row in rows:
        if row["kind"] in kinds:
            adapted = kinds[row["kind"]](row["row"], 1)
            assert adapted is not None
            check_answer(adapted["answer"])
            seen.add(row["kind"])
    assert seen == set(kinds)


def test_rows_that_cannot_be_judged_are_counted_not_hidden(tmp_path: Path) -> None:
    row = {"description": "d", "official_tests": [{"input": "1", "output": "1"}], "input_mode": "stdio"}
    path = write(tmp_path / "cf.jsonl", [{**row, "id": "a"}, {**row, "id": "b", "generated_checker": "x"}])
    found = load(f"codeforces={path}")
    assert (len(found.rows), found.data["left_out"], found.data["rows"]) == (1, 1, 2)


def test_a_benchmark_with_a_row_missing_is_refused_and_its_first_rows_on_request_are_not(tmp_path: Path) -> None:
    rows = [{"id": str(i), "problem": f"p{i}", "answer": "1"} for i in range(29)]
    path = write(tmp_path / "aime24.jsonl", rows)
    with pytest.raises(DataError, match=r"29 rows; expected the 30 of the whole benchmark; get the whole file"):
        load(f"aime24={path}")
    with pytest.raises(DataError, match="29 rows"):
        load(f"aime24={path}", problems=5)
    mine = load(f"mine={path}", problems=5)
    assert (len(mine.rows), mine.data["partial"], mine.data["rows"]) == (5, True, 29)


def test_a_file_may_be_the_hub_s_version_or_the_usual_copy(tmp_path: Path) -> None:
    entry = TABLE["olympiadbench"]
    rows = [{"id": str(i), "problem": f"p{i}", "answer": "1"} for i in range(676)]
    for count in (entry.rows, entry.copy_rows):
        path = write(tmp_path / f"{count}.jsonl", rows[:count])
        assert load(f"olympiadbench={path}").data["expected_rows"] == count
    with pytest.raises(DataError, match="676 rows; expected the 674 or 675"):
        load(f"olympiadbench={write(tmp_path / '676.jsonl', rows)}")


def test_a_missing_column_is_named_in_words_that_this_command_knows(tmp_path: Path) -> None:
    path = write(tmp_path / "q.jsonl", [{"question": "p", "answer": "1"}])
    with pytest.raises(DataError, match=r"no column 'problem', .* name yours with --map"):
        load(f"mine={path}")


def test_integers_beyond_the_floats_are_answers_and_no_tolerances() -> None:
    assert parse_math_gold(10**400).alternatives == (("1" + "0" * 400,),)
    with pytest.raises(ValueError, match="tolerance = 1000"):
        parse_math_gold({"any_of": ["1"], "tolerance": 10**400})


def test_the_zoo_is_a_benchmark() -> None:
    found = load("zoo", problems=3)
    assert (len(found.rows), found.data["rows"], found.benchmark.suffix) == (3, 400, "")


@pytest.mark.parametrize(
    ("text", "message"),
    [("aime2024", "did you mean aime24"), ("", "NAME or NAME=PATH"), ("aime24=", "NAME or NAME=PATH")],
)
def test_unknown_benchmarks_name_the_nearest(text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_benchmark(text)


def test_a_row_of_another_layout_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "he.jsonl", [{"id": "a", "problem": "p", "answer": "x"}])
    with pytest.raises(DataError, match=r"humaneval, line 1"):
        load(f"humaneval={path}")
    path = write(tmp_path / "m.jsonl", [{"id": "a", "text": "p", "answer": "x"}])
    with pytest.raises(DataError, match=r"line 1.*'problem'"):
        load(f"math500={path}")


def test_the_hub_s_layout_has_the_content_of_the_local_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("hub").mkdir()
    write(tmp_path / "hub" / "test.jsonl", [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(272)])
    copy = [{"id": f"row-{i + 1:06d}", "problem": f"{i}+1?", "answer": str(i + 1)} for i in range(272)]
    hub, local = load("minerva=hf:./hub?split=test"), load(f"minerva={write(tmp_path / 'copy.jsonl', copy)}")
    assert hub.data["content_sha256"] == local.data["content_sha256"]
    assert (hub.data["sha256"], hub.data["source"]) == (None, "hf:./hub?split=test")
    write(tmp_path / "hub" / "test.jsonl", [{"question": f"{i}+1?", "answer": str(i + 1)} for i in range(200)])
    with pytest.raises(DataError, match="200 rows; expected the 272"):
        load("minerva=hf:./hub?split=test")


def test_the_documented_table_is_the_table() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "evaluation.md").read_text(encoding="utf-8")
    lines = {line.split("`")[1]: line for line in text.split("## Benchmarks")[1].splitlines() if line.startswith("| `")}
    assert list(lines) == list(TABLE)
    for name, entry in TABLE.items():
        for value in (entry.hub, entry.subset, entry.rows, entry.copy_rows, (entry.revision or "")[:10], entry.checked):
            assert str(value or "") in lines[name]


def test_a_file_that_is_not_the_checked_copy_is_said_so() -> None:
    found = load(f"aime24={data_file('eval/aime24.jsonl')}")
    assert (found.data["checked_copy"], found.notes) == (True, [])
    other = load(f"aime24={data_file('eval/aime25.jsonl')}")
    assert other.data["checked_copy"] is False
    (note,) = other.notes
    assert "is not the copy that was checked (sha256 a064406e4f, not 5126362d4a)" in note


def test_where_nothing_was_checked_nothing_is_said(tmp_path: Path) -> None:
    own = write(tmp_path / "q.jsonl", [{"problem": "p", "answer": "1"}])
    for found in (load("zoo", problems=2), load(f"mine={own}")):
        assert (found.data["checked_copy"], found.notes) == (None, [])


def test_columns_of_one_s_own_set_may_have_other_names(tmp_path: Path) -> None:
    rows = [{"question": "p", "gold": "1", "key": "a"}, {"question": "q", "gold": "2", "key": "b"}]
    path = write(tmp_path / "q.jsonl", rows)
    found = load(f"mine={path}", columns=Columns("question", "gold", "key"))
    assert [(row.id, row.problem, row.answer) for row in found.rows] == [("a", "p", "1"), ("b", "q", "2")]
