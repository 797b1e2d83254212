"""Rows and prompts: what a file may hold, what a complaint says, and that a schedule is a function of its step."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from scope_opd.config import ChatConfig
from scope_opd.data.dataset import read_dataset
from scope_opd.data.prompts import PromptSchedule, render_prompts
from scope_opd.data.rows import Columns, check_rows
from scope_opd.errors import ConfigError, DataError, ModelError
from scope_opd.types import Prompt
from scope_opd.zoo.task import load_rows
from scope_opd.zoo.tokenizer import build_tokenizer

ROWS = [{"id": "a", "problem": "1+1", "answer": "2"}, {"id": "b", "problem": "2+2", "answer": 4}]
WORDS = ["<pad>", "<bos>", "<eos>", "<user>", "<assistant>", "<system>", "one", "two", "three", "four", "please"]


def write(path: Path, content: str | bytes | list[dict[str, Any]]) -> Path:
    if isinstance(content, list):
        content = "".join(json.dumps(row) + "\n" for row in content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def wordy_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """One id a word, with a begin and an end token put around bare text, as some tokenizers do."""
    backend = Tokenizer(WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<pad>"))
    backend.pre_tokenizer = WhitespaceSplit()
    backend.post_processor = TemplateProcessing(single="<bos> $A <eos>", special_tokens=[("<bos>", 1), ("<eos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<pad>"
    )
    tokenizer.chat_template = template
    return tokenizer


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %} <{{ m['role'] }}> {{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %} <assistant>{% endif %}{% if polite %} please{% endif %}"
)


def prompts_of(
    rows: list[dict[str, Any]], tokenizer: Any, chat: ChatConfig | None = None, **options: Any
) -> list[Prompt]:
    checked = check_rows(((f"row {i}", row) for i, row in enumerate(rows, 1)), source="memory")
    return render_prompts(checked, tokenizer, chat or ChatConfig(), **{"max_prompt_tokens": 100, **options})


class TestRows:
    def test_the_three_formats_give_the_same_rows(self, tmp_path: Path) -> None:
        rows = [{**row, "answer": str(row["answer"])} for row in ROWS]
        paths = [
            write(tmp_path / "r.jsonl", rows),
            write(tmp_path / "r.json", json.dumps(rows)),
            write_parquet(tmp_path / "r.parquet", rows),
        ]
        read = [[(row.id, row.problem, row.answer) for row in read_dataset(path).rows] for path in paths]
        assert read[0] == read[1] == read[2] == [("a", "1+1", "2"), ("b", "2+2", "4")]

    def test_columns_go_by_the_names_given(self, tmp_path: Path) -> None:
        path = write(tmp_path / "r.jsonl", [{"q": "1+1", "gold": 2, "key": 7}])
        (row,) = read_dataset(path, Columns("q", "gold", "key")).rows
        assert (row.id, row.problem, row.answer) == ("7", "1+1", 2)

    def test_rows_without_ids_are_numbered_from_one(self, tmp_path: Path) -> None:
        path = write(tmp_path / "r.jsonl", [{"problem": "p", "answer": "a"}] * 3)
        assert [row.id for row in read_dataset(path).rows] == ["row-000001", "row-000002", "row-000003"]

    def test_max_rows_takes_the_first_and_never_looks_at_the_rest(self, tmp_path: Path) -> None:
        path = write(tmp_path / "r.jsonl", json.dumps(ROWS[0]) + "\nnot json\n")
        assert [row.id for row in read_dataset(path, max_rows=1).rows] == ["a"]

    def test_short_scalar_columns_are_kept_and_long_or_nested_ones_are_not(self, tmp_path: Path) -> None:
        extra = {"level": 3, "source": "x", "trace": "y" * 1000, "nested": [1]}
        for path in (write(tmp_path / "r.jsonl", [{**ROWS[0], **extra}]), tmp_path / "r.parquet"):
            if path.suffix == ".parquet":
                write_parquet(path, [{**ROWS[0], **extra}])
            assert read_dataset(path).rows[0].fields == {"level": 3, "source": "x"}

    def test_the_zoo_rows_pass_the_same_checks(self) -> None:
        rows = load_rows("train")
        checked = check_rows(((f"row {i}", row) for i, row in enumerate(rows, 1)), source="zoo:train")
        assert [row.problem for row in checked] == [row["problem"] for row in rows]


def parquet_cut_short(path: Path) -> Path:
    write_parquet(path, ROWS[:1])
    return write(path, path.read_bytes()[:-20])


def parquet_without_rows(path: Path) -> Path:
    schema = pyarrow.schema([("problem", pyarrow.string()), ("answer", pyarrow.string())])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([], schema=schema), path)
    return path


BAD_FILES: dict[str, tuple[str, Callable[[Path], Any], list[str]]] = {
    "missing": ("r.jsonl", lambda path: None, ["r.jsonl", "does not exist"]),
    "a folder": ("r.jsonl", Path.mkdir, ["r.jsonl", "folder"]),
    "unknown kind": ("r.xlsx", lambda path: write(path, "x"), ["r.xlsx", ".parquet"]),
    "empty": ("r.jsonl", lambda path: write(path, ""), ["r.jsonl", "empty"]),
    "blank lines only": ("r.jsonl", lambda path: write(path, "\n\n"), ["r.jsonl", "no rows"]),
    "empty list": ("r.json", lambda path: write(path, "[]"), ["r.json", "no rows"]),
    "bad JSON line": ("r.jsonl", lambda path: write(path, json.dumps(ROWS[0]) + "\n{oops\n"), ["r.jsonl", "line 2"]),
    "bad JSON": ("r.json", lambda path: write(path, "[1,\n"), ["r.json", "line 2"]),
    "JSON object": ("r.json", lambda path: write(path, "{}"), ["r.json", "a list of objects"]),
    "JSON list of numbers": ("r.json", lambda path: write(path, "[1]"), ["row 1", "an object"]),
    "not UTF-8, lines": ("r.jsonl", lambda path: write(path, b'{"problem": "\xff"}\n'), ["r.jsonl", "UTF-8"]),
    "not UTF-8, JSON": ("r.json", lambda path: write(path, b'["\xff"]'), ["r.json", "UTF-8"]),
    "truncated parquet": ("r.parquet", parquet_cut_short, ["r.parquet", "cut off"]),
    "parquet of nothing": ("r.parquet", parquet_without_rows, ["r.parquet", "no rows"]),
    "parquet that is text": ("r.parquet", lambda path: write(path, "hello"), ["r.parquet", "parquet file"]),
    "missing column": ("r.jsonl", lambda path: write(path, [{"question": "p", "answer": "a"}]), ["question, answer"]),
    "missing parquet column": (
        "r.parquet",
        lambda path: write_parquet(path, [{"problem": "p"}]),
        ["'answer'", "found problem"],
    ),
    "problem is a list": ("r.jsonl", lambda path: write(path, [{"problem": ["p"], "answer": "a"}]), ["(list)"]),
    "id on some rows": ("r.jsonl", lambda path: write(path, [ROWS[0], {"problem": "p", "answer": "a"}]), ["line 2"]),
    "duplicate ids": ("r.jsonl", lambda path: write(path, [ROWS[0], ROWS[0]]), ["line 2", "'a'", "line 1"]),
    "problem is a number": (
        "r.jsonl",
        lambda path: write(path, [{"problem": 3, "answer": "a"}]),
        ["3 (int)", "line 1"],
    ),
    "problem is empty": ("r.jsonl", lambda path: write(path, [{"problem": " ", "answer": "a"}]), ["problem is empty"]),
    "answer is empty": ("r.jsonl", lambda path: write(path, [{"problem": "p", "answer": ""}]), ["answer is empty"]),
    "answer is null": ("r.jsonl", lambda path: write(path, [{"problem": "p", "answer": None}]), ["answer is empty"]),
    "answer is a list": ("r.jsonl", lambda path: write(path, [{"problem": "p", "answer": [1]}]), ["(list)"]),
    "answer is true": ("r.jsonl", lambda path: write(path, [{"problem": "p", "answer": True}]), ["(bool)"]),
    "answer is NaN": (
        "r.parquet",
        lambda path: write_parquet(path, [{"problem": "p", "answer": float("nan")}]),
        ["nan", "row 1"],
    ),
}


@pytest.mark.parametrize("case", BAD_FILES, ids=str)
def test_a_bad_file_is_one_line_naming_file_and_row(case: str, tmp_path: Path) -> None:
    name, make, words = BAD_FILES[case]
    path = tmp_path / name
    make(path)
    with pytest.raises(DataError) as raised:
        read_dataset(path)
    message = str(raised.value)
    assert "\n" not in message
    assert raised.value.expected
    assert raised.value.remedy
    for word in words:
        assert word in message


class TestPrompts:
    def test_a_template_writes_its_own_specials_and_none_comes_twice(self) -> None:
        (prompt,) = prompts_of([{"problem": "one two", "answer": 1}], wordy_tokenizer(TEMPLATE))
        assert prompt.text == "<bos> <user> one two <assistant>"
        assert [WORDS[i] for i in prompt.token_ids] == prompt.text.split()

    def test_bare_text_gets_a_begin_token_and_no_end_token(self) -> None:
        (prompt,) = prompts_of([{"problem": "one two", "answer": 1}], wordy_tokenizer(), ChatConfig(template="none"))
        assert [WORDS[i] for i in prompt.token_ids] == ["<bos>", "one", "two"]

    def test_a_begin_token_in_the_bare_text_is_not_doubled(self) -> None:
        chat = ChatConfig(template="none")
        (prompt,) = prompts_of([{"problem": "<bos> one", "answer": 1}], wordy_tokenizer(), chat)
        assert [WORDS[i] for i in prompt.token_ids] == ["<bos>", "one"]

    def test_system_suffix_and_kwargs_reach_the_template(self) -> None:
        chat = ChatConfig(system="three", suffix=" four", kwargs={"polite": True})
        (prompt,) = prompts_of([{"problem": "one", "answer": 1}], wordy_tokenizer(TEMPLATE), chat)
        assert prompt.text == "<bos> <system> three <user> one four <assistant> please"

    def test_a_template_file_replaces_the_tokenizers_own(self, tmp_path: Path) -> None:
        path = write(tmp_path / "t.jinja", "{{ messages[0]['content'] }} two")
        chat = ChatConfig(template=str(path))
        (prompt,) = prompts_of([{"problem": "one", "answer": 1}], wordy_tokenizer(TEMPLATE), chat)
        assert prompt.text == "one two"

    def test_the_zoo_prompt_is_the_problem_and_a_colon(self) -> None:
        (prompt,) = prompts_of([{"problem": "-2 +15", "answer": "13"}], build_tokenizer())
        assert prompt.text == "-2 +15 :"
        assert build_tokenizer().convert_ids_to_tokens(list(prompt.token_ids)) == ["-2", "+15", ":"]

    def test_a_prompt_over_the_limit_is_an_error_with_its_row(self) -> None:
        rows = [{"problem": "one", "answer": 1}, {"problem": "one " * 9, "answer": 1}]
        with pytest.raises(DataError, match=r"row 2 \(id 'row-000002'\): a prompt of 10 tokens; expected at most .* 5"):
            prompts_of(rows, wordy_tokenizer(), ChatConfig(template="none"), max_prompt_tokens=5)

    def test_prompt_and_response_must_fit_both_contexts(self) -> None:
        rows = [{"problem": "one two", "answer": 1}]
        chat, contexts = ChatConfig(template="none"), {"student": 100, "teacher": 12, "other": None}
        assert prompts_of(rows, wordy_tokenizer(), chat, max_tokens=9, contexts=contexts)
        with pytest.raises(DataError, match=r"row 1 .* max_tokens = 10; expected together at most 12, .*teacher"):
            prompts_of(rows, wordy_tokenizer(), chat, max_tokens=10, contexts=contexts)

    def test_no_template_anywhere_is_an_error_that_names_the_way_out(self) -> None:
        with pytest.raises(ModelError, match=r"no chat template.*chat.template"):
            prompts_of([{"problem": "one", "answer": 1}], wordy_tokenizer())

    @pytest.mark.parametrize("option", [{"system": "three"}, {"kwargs": {"polite": True}}])
    def test_bare_text_has_no_place_for_a_system_message_or_arguments(self, option: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=r"chat\.(system|kwargs)"):
            prompts_of([{"problem": "one", "answer": 1}], wordy_tokenizer(), ChatConfig(template="none", **option))

    def test_a_template_that_refuses_is_one_line(self) -> None:
        template = "{{ raise_exception('System role not supported') }}"
        with pytest.raises(ConfigError, match=r"row 1 .*System role not supported.*chat\.system"):
            prompts_of([{"problem": "one", "answer": 1}], wordy_tokenizer(template), ChatConfig(system="three"))

    @pytest.mark.parametrize("content", [None, "", b"\xff"])
    def test_a_bad_template_file_is_an_error(self, content: str | bytes | None, tmp_path: Path) -> None:
        path = tmp_path / "t.jinja"
        if content is not None:
            write(path, content)
        with pytest.raises(ConfigError, match=r"t\.jinja"):
            prompts_of([{"problem": "one", "answer": 1}], wordy_tokenizer(), ChatConfig(template=str(path)))

    def test_an_empty_prompt_is_an_error(self) -> None:
        with pytest.raises(DataError, match="empty prompt"):
            prompts_of([{"problem": "one", "answer": 1}], wordy_tokenizer("{% if false %}x{% endif %}"))


class TestSchedule:
    prompts: tuple[Prompt, ...] = tuple(Prompt(str(i), "p", "a", (1,)) for i in range(10))

    @pytest.mark.parametrize("shuffle", [True, False])
    def test_a_batch_is_a_function_of_seed_and_step_and_never_of_call_order(self, shuffle: bool) -> None:
        forward = PromptSchedule(self.prompts, 3, seed=5, shuffle=shuffle)
        backward = PromptSchedule(self.prompts, 3, seed=5, shuffle=shuffle)
        batches = [forward.batch(step) for step in range(12)]
        assert [backward.batch(step) for step in reversed(range(12))] == batches[::-1]

    @pytest.mark.parametrize("shuffle", [True, False])
    def test_no_step_holds_a_prompt_twice(self, shuffle: bool) -> None:
        schedule = PromptSchedule(self.prompts, 4, seed=1, shuffle=shuffle)
        for step in range(40):
            assert len({prompt.id for prompt in schedule.batch(step)}) == 4

    def test_an_epoch_holds_every_prompt_once_and_the_next_another_order(self) -> None:
        schedule = PromptSchedule(self.prompts, 5, seed=0)
        epochs = [[p.id for step in (2 * e, 2 * e + 1) for p in schedule.batch(step)] for e in range(3)]
        assert all(sorted(epoch) == sorted(p.id for p in self.prompts) for epoch in epochs)
        assert len({tuple(epoch) for epoch in epochs}) == 3

    def test_rows_left_over_in_an_epoch_come_up_in_others(self) -> None:
        schedule = PromptSchedule(self.prompts, 4, seed=0)
        counts = Counter(p.id for step in range(100) for p in schedule.batch(step))
        assert len(counts) == 10
        assert min(counts.values()) > 20

    def test_in_order_runs_through_the_rows_and_wraps_around(self) -> None:
        schedule = PromptSchedule(self.prompts, 4, shuffle=False)
        assert [[p.id for p in schedule.batch(step)] for step in (0, 2)] == [list("0123"), list("8901")]

    def test_another_seed_gives_another_order(self) -> None:
        assert PromptSchedule(self.prompts, 8, seed=0).batch(0) != PromptSchedule(self.prompts, 8, seed=1).batch(0)

    def test_the_order_of_seed_zero_is_pinned(self) -> None:
        """A resumed run draws the same prompts whatever the version: changing the schedule breaks old run folders."""
        assert [p.id for p in PromptSchedule(self.prompts, 10, seed=0).batch(0)] == list("3958124760")

    def test_fewer_rows_than_a_batch_is_an_error(self) -> None:
        with pytest.raises(DataError, match=r"10 rows.*prompts_per_step = 11"):
            PromptSchedule(self.prompts, 11)
