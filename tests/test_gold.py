"""Gold answers: every form is read into one shape, and what cannot be judged is refused in one line.

Not covered: whether answers are equal (test_math_judge), code tests by format (test_code_formats).
"""

from __future__ import annotations

from typing import Any

import pytest

from scope_opd.gold import (
    MathGold,
    Tolerance,
    answer_from_text,
    check_answer,
    is_code,
    parse_math_gold,
    parse_tolerance,
)


@pytest.mark.parametrize(
    ("answer", "alternatives"),
    [
        ("42", (("42",),)),
        (42, (("42",),)),
        (0.1, (("0.1",),)),
        (1e-7, (("0.0000001",),)),
        ({"any_of": ["1/2", 0.5]}, (("1/2",), ("0.5",))),
        ({"all_of": ["2", "-2"]}, (("2", "-2"),)),
        ({"any_of": ["3", {"all_of": ["1", "2"]}]}, (("3",), ("1", "2"))),
    ],
)
def test_every_form_becomes_alternatives_of_lists(answer: Any, alternatives: tuple[tuple[str, ...], ...]) -> None:
    assert parse_math_gold(answer) == MathGold(alternatives)


def test_a_tolerance_is_absolute_or_a_share_of_the_gold_value() -> None:
    assert parse_math_gold({"any_of": ["1.6"], "tolerance": "1%"}).tolerance == Tolerance(relative=0.01)
    assert parse_math_gold({"all_of": ["1.6"], "tolerance": 0.1}).tolerance == Tolerance(absolute=0.1)
    for wrong in ("1", "-1%", -0.1, float("nan"), float("inf"), True, [1]):
        with pytest.raises(ValueError, match="expected a number >= 0 or a share"):
            parse_tolerance(wrong)


@pytest.mark.parametrize(
    "answer",
    [
        "", "  ", None, True, float("nan"), float("inf"), [], ["1"], {},
        {"any_of": []}, {"any_of": "1"}, {"any_of": [""]},
        {"any_of": ["1"], "all_of": ["1"]}, {"any_of": ["1"], "other": 1}, {"any_of": [{"any_of": ["1"]}]},
        {"all_of": [{"all_of": ["1"]}]}, {"format": "bash"}, {"format": "humaneval", "prompt": "x"},
        {"format": "stdio", "tests": []}, {"format": "stdio", "tests": [{"input": 1, "output": "1"}]},
        {"format": "functional", "fn_name": "f", "tests": [{"args": [1]}]},
    ],
)  # fmt: skip
def test_what_cannot_be_judged_is_refused_in_one_line(answer: Any) -> None:
    with pytest.raises(ValueError, match="expected") as raised:
        check_answer(answer)
    assert "\n" not in str(raised.value)


def test_a_text_that_holds_a_form_is_read_and_any_other_text_is_left_alone() -> None:
    assert answer_from_text('{"any_of": ["1", "2"]}') == {"any_of": ["1", "2"]}
    assert is_code(answer_from_text('{"format": "stdio", "tests": []}'))
    for text in ("{1, 2}", '{"a": 1}', "42", r"\{1\}", "{" * 100_000 + "}"):
        assert answer_from_text(text) == text
