r"""The boxed verifier: the last balanced box, light normalisation, no mathematics."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from scope_opd.errors import DataError
from scope_opd.types import Prompt, Rollout, Verdict
from scope_opd.verify.boxed import BoxedVerifier, last_boxed, normalise


def judge(text: str, gold: Any) -> Verdict:
    rollout = Rollout(id="p/0/0", group="p", prompt_token_ids=[1], token_ids=[2], logprobs=[-0.1], text=text)
    return asyncio.run(BoxedVerifier().verify(rollout, Prompt("p", "problem", gold, (1,))))


@pytest.mark.parametrize(
    ("text", "box"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{a_{b_{c}}}", "a_{b_{c}}"),
        (r"\boxed {7}", "7"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{1\}", None),
        (r"\boxed{3} and \boxed{4", "3"),
        (r"\boxed{{5}", None),
        (r"\boxed{1 or \boxed{5}}", r"1 or \boxed{5}"),
        (r"\boxed{1 or \boxed{5}", "5"),
        (r"} \boxed{6} }", "6"),
        (r"{ \boxed{6}", "6"),
        (r"\boxed{}", ""),
        ("42", None),
        ("boxed{42}", None),
        (r"\boxed 42", None),
        (r"\\boxed{42}", None),
        ("", None),
    ],
)
def test_the_last_balanced_outermost_box_is_the_answer(text: str, box: str | None) -> None:
    assert last_boxed(text) == box


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (" 42 ", "42"),
        ("$42$", "42"),
        ("$$42$$", "42"),
        (r"\(42\)", "42"),
        (r"\[ 42 \]", "42"),
        (r"\text{Evelyn}", "Evelyn"),
        (r"$\text{ (A) }$", "(A)"),
        (r"\mathrm{\text{x}}", "x"),
        ("{5}", "5"),
        (r"\boxed{5}", "5"),
        ("x + 1", "x+1"),
        (r"\frac {1} {2}", r"\frac{1}{2}"),
        (r"\dfrac{1}{2}", r"\frac{1}{2}"),
        (r"\left( 1,\,2 \right)", "(1,2)"),
        ("5.0", "5"),
        ("5.", "5"),
        ("007", "7"),
        ("+3", "3"),
        ("-0", "0"),
        ("yes.", "yes"),
        ("a  b", "a b"),
    ],
)
def test_writing_that_means_nothing_makes_no_difference(one: str, other: str) -> None:
    assert normalise(one) == normalise(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("1 2", "12"),
        ("1/2", "0.5"),
        ("-5", "5"),
        ("5.01", "5.1"),
        ("1" * 40, "1" * 39 + "2"),
        ("a", "A"),
        ("$1$ or $2$", "1$ or $2"),
        (r"\text{a} b \text{c}", r"a} b \text{c"),
        (r"\leftarrow", "arrow"),
        ("٣", "3"),
        ("1...", "1"),
    ],
)
def test_writing_that_means_something_makes_a_difference(one: str, other: str) -> None:
    assert normalise(one) != normalise(other)


@pytest.mark.parametrize(
    ("text", "gold"),
    [
        (r"\boxed{5.0}", 5),
        (r"\boxed{5}", 5.0),
        (r"\boxed{0.1}", 0.1),
        (r"\boxed{1000000000000000000000}", 1e21),
        (r"$\boxed{ x }$", "$x$"),
    ],
)
def test_gold_may_be_text_or_number(text: str, gold: Any) -> None:
    assert judge(text, gold) == Verdict(True, 1.0, last_boxed(text).strip(), "correct")  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "extracted", "reason"),
    [
        ("the answer is 5", None, "no balanced"),
        (r"\boxed{5", None, "no balanced"),
        (r"\boxed{}", "", "empty"),
        (r"\boxed{6}", "6", "differs"),
        (r"\boxed{5 or 6}", "5 or 6", "differs"),
        (r"\boxed{5} wait, \boxed{6}", "6", "differs"),
        (r"\boxed{6 \boxed{5}}", r"6 \boxed{5}", "differs"),
    ],
)
def test_what_is_not_the_answer_is_incorrect_with_a_reason(text: str, extracted: str | None, reason: str) -> None:
    verdict = judge(text, "5")
    assert (verdict.correct, verdict.reward, verdict.extracted) == (False, 0.0, extracted)
    assert reason in verdict.reason


@pytest.mark.parametrize("gold", [None, "", " ", ["5"], True])
def test_a_gold_answer_of_another_kind_is_the_datas_fault(gold: Any) -> None:
    with pytest.raises(DataError, match="'p'"):
        judge(r"\boxed{5}", gold)


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 30000,
        r"\boxed{" + r"\text{" * 30000 + "}" * 30001,
        r"\boxed{5}" * 30000,
        r"\boxed" + " " * 200000,
        r"\boxed{" + "$" * 100000 + "}",
        "{" * 200000,
        r"\boxed{" + "1 " * 100000 + "}",
        r"\boxed{" + " " * 100000 + "}",
    ],
    ids=range(8),
)
def test_hostile_texts_cost_linear_time(text: str) -> None:
    start = time.process_time()
    judge(text, "5")
    assert time.process_time() - start < 2
