"""Duplicates and contamination: what counts as the same problem, by hand, and what public sets hold of each other."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from scope_opd.cli.main import main
from scope_opd.data.dataset import read_dataset
from scope_opd.data.overlap import Overlap, forms
from shared_data import data_file

LONG = "A farmer has twenty red hens and some brown cows that live together in the old red barn with {} legs."
SETS = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench")


def key(text: str) -> str:
    return forms(text).key


def template(text: str) -> str:
    return forms(text).template


class TestForms:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("What is $x^{2}$?", "what is  $x^2$ ?"),
            ("Compute $$\\dfrac{1}{2}+\\left(3\\right).$$", "Compute \\[\\frac{1}{2} + (3).\\]"),
            ("Sum $a_{1},\\ldots, a_{n}$", "Sum $a_1, \\dots, a_n$"),
            ("Let $jx=1$.", "Let $j x = 1$"),
            ("There are 1,000 of $10{,}000$.", "There are 1000 of $10000$."),
            ("Is $a\\leq b$?", "Is $a \\le b$?"),
            ("What is 2+2?Put your final answer within \\boxed{{}}.", "What is 2+2?"),
            ("What is 2+2? Let's think step by step and output the final answer within \\boxed{}.", "What is 2+2?"),
            ('He has 5. Let\'s think step by step and output the final answer after "####".', "He has 5."),
        ],
    )
    def test_layout_and_instructions_do_not_count(self, one: str, other: str) -> None:
        assert key(one) == key(other)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("What is $x+1$?", "What is $x-1$?"),
            ("What is $(3,7)$?", "What is $(37)$?"),
            ("What is 3.5?", "What is 35?"),
            ("What is $5!$?", "What is $5$?"),
            ("What is $x$?", "What is $y$?"),
            ("What is $\\sin x$?", "What is $\\cos x$?"),
            ("Solve $x = 1$ or \\boxed{x}", "Solve $x = 1$"),
        ],
    )
    def test_mathematics_does(self, one: str, other: str) -> None:
        assert key(one) != key(other)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("Simplify $\\sqrt{242}$.", "Simplify $\\sqrt{180}$."),
            ("Convert the point $(0,3)$.", "Convert the point $(-4,0)$."),
            ("Solve $x+x=4$ for $x$.", "Solve $y+y=12$ for $y$."),
            ("The angle $\\alpha$ is 3.", "The angle $\\theta$ is 40."),
        ],
    )
    def test_neighbours_differ_in_numbers_and_names_of_variables(self, one: str, other: str) -> None:
        assert template(one) == template(other)
        assert key(one) != key(other)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            ("Solve $x+x=4$.", "Solve $x+y=4$."),
            ("What is $x-4$?", "What is $x+4$?"),
            ("What is $\\pi r$?", "What is $\\alpha r$?"),
            ("Find a point $a$.", "Find b point $a$."),
        ],
    )
    def test_neighbours_keep_their_structure(self, one: str, other: str) -> None:
        assert template(one) != template(other)


class TestOverlap:
    def test_the_share_is_that_of_the_held_out_problems_ngrams(self) -> None:
        words = [f"w{chr(97 + i)}" for i in range(20)]  # 8 word 13-grams
        found = Overlap([" ".join(words)], threshold=0.01)
        found.add(" ".join(["other", *words[:16], "words"]), 0)  # holds the first four of them
        (match,) = found.contaminated
        assert (match.kind, match.share) == ("overlap", 0.5)

    @pytest.mark.parametrize(("threshold", "count"), [(0.5, 1), (0.51, 0)])
    def test_the_threshold_itself_counts(self, threshold: float, count: int) -> None:
        words = [f"w{chr(97 + i)}" for i in range(20)]
        found = Overlap([" ".join(words)], threshold=threshold)
        found.add(" ".join(words[:16]), 0)
        assert len(found.contaminated) == count

    def test_short_problems_are_compared_whole(self) -> None:
        found = Overlap(["Compute $\\cos 60^{\\circ}$.", "Compute $1+1$."])
        found.add("Compute $\\cos 60^\\circ$", 0)
        found.add("First say hello. Compute $1+1$. Then say goodbye.", 1)
        assert [(m.kind, m.held_out, m.train) for m in found.contaminated] == [("same", 0, 0)]

    def test_repeats_within_the_set_name_the_first(self) -> None:
        found = Overlap([])
        for place, text in enumerate(["What is $1$?", "other", "what is $ 1 $", "other"]):
            found.add(text, place)
        assert [(m.kind, m.held_out, m.train) for m in found.duplicates] == [("same", 0, 2), ("identical", 1, 3)]

    def test_the_order_of_the_rows_changes_no_pair(self) -> None:
        names = ("train/gsm8k_train.jsonl", "train/gsm8k_test.jsonl")
        rows, held_out = ([row.problem for row in read_dataset(data_file(name)).rows] for name in names)

        def pairs(order: list[int]) -> set[tuple[str, int, int]]:
            found = Overlap(held_out, ngram=8, threshold=0.3)
            for place in order:
                found.add(rows[place], place)
            return {(m.kind, m.held_out, m.train) for m in [*found.contaminated, *found.templates]}

        forward = pairs(list(range(2000)))
        assert forward == pairs(list(reversed(range(2000))))
        assert forward


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class TestCommand:
    @pytest.fixture
    def sets(self, tmp_path: Path) -> tuple[Path, Path]:
        train = [
            {"id": "t0", "problem": LONG.format(100), "answer": "1", "solution": "s" * 300},
            {"id": "t1", "problem": "What is $1+1$?", "answer": "2"},
            {"id": "t2", "problem": "What is  $1+1$", "answer": "2"},
            {"id": "t3", "problem": "Simplify $\\sqrt{8}$.", "answer": "x"},
            {"id": "t4", "problem": "Nothing like it.", "answer": ""},
            {"id": "t5", "problem": "Sound.", "answer": "5"},
        ]
        held_out = [{"id": "h0", "problem": LONG.format(120)}, {"id": "h1", "problem": "Simplify $\\sqrt{12}$."}]
        return write(tmp_path / "train.jsonl", train), write(tmp_path / "test.jsonl", held_out)

    def test_the_report_names_the_pairs_and_the_exit_code_says_so(
        self, sets: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        train, held_out = map(str, sets)
        assert main(["data", "check", train, "--against", held_out, "--json", str(tmp_path / "o.json")]) == 1
        output = capsys.readouterr().out
        for words in ("bad rows: 1", "line 5: answer is empty", "same: t1 | t2", "h0 | t0", "template: h1 | t3"):
            assert words in output
        found = json.loads((tmp_path / "o.json").read_text())
        assert [(m["held_out"]["id"], m["train"]["id"]) for m in found["contaminated"]] == [("h0", "t0")]
        assert {(m["held_out"]["id"], m["train"]["id"]) for m in found["same_template"]} == {("h0", "t0"), ("h1", "t3")}
        assert found["train"]["sha256"]

    def test_the_clean_set_has_none_of_it_and_keeps_all_columns(self, sets: tuple[Path, Path], tmp_path: Path) -> None:
        train, held_out = map(str, sets)
        clean = str(tmp_path / "clean.jsonl")
        assert main(["data", "check", train, "--against", held_out, "--write-clean", clean]) == 0
        rows = [json.loads(line) for line in Path(clean).read_text().splitlines()]
        assert [row["id"] for row in rows] == ["t1", "t3", "t5"]
        assert main(["data", "check", clean, "--against", held_out]) == 0
        assert main(["data", "check", train, "--write-clean", train]) == 2

    def test_repeats_alone_fail_nothing(self, tmp_path: Path) -> None:
        rows = [{"problem": "same", "answer": "1"}] * 2
        assert main(["data", "check", str(write(tmp_path / "t.jsonl", rows))]) == 0

    @pytest.mark.parametrize(
        "options", [["--overlap", "0"], ["--overlap", "1.5"], ["--ngram", "0"], ["--json", "/no/x"]]
    )
    def test_a_wrong_option_is_one_line(
        self, options: list[str], sets: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["data", "check", str(sets[0]), *options]) == 2
        assert capsys.readouterr().err.count("\n") == 1

    def test_math_holds_problems_of_olympiadbench_and_neighbours_of_math500(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        """The figures of docs/data.md, and in seconds: 12,000 rows against six benchmarks."""
        train = str(data_file("train/math_train_12k.jsonl"))
        against = [str(data_file(f"eval/{name}.jsonl")) for name in SETS]
        start = time.process_time()
        assert main(["data", "check", train, "--against", *against, "--json", str(tmp_path / "o.json")]) == 1
        assert time.process_time() - start < 20
        found = json.loads((tmp_path / "o.json").read_text())

        def problems(matches: list[dict[str, Any]], *kinds: str) -> dict[str, int]:
            ids = {(Path(m["held_out"]["set"]).stem, m["held_out"]["id"]) for m in matches if m["kind"] in kinds}
            return {name: count for name in SETS if (count := sum(each == name for each, _ in ids))}

        assert problems(found["contaminated"], "identical", "same") == {"olympiadbench": 6}
        assert problems(found["contaminated"], "overlap") == {"math500": 30, "olympiadbench": 2}
        assert problems(found["same_template"], "template") == {"math500": 36}
        assert len(found["duplicates"]) == 7
