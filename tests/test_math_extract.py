r"""Which part of a response is its final answer.

Not covered: whether that answer is right (test_math_judge); answers that try to win by form (test_math_attacks).
"""

from __future__ import annotations

import json

import pytest

from scope_opd.gold import parse_math_gold
from scope_opd.verify.math.extract import Extracted, extract, opened_by
from scope_opd.verify.math.judge import judge
from scope_opd.verify.math.settings import MathSettings
from shared_data import data_file

RESPONSE = MathSettings()
NO_FALLBACK = MathSettings(fallback=False)
ALL = MathSettings(scope="all")


def found(text: str, settings: MathSettings = RESPONSE) -> str | None:
    extracted = extract(text, settings)
    return extracted.text if isinstance(extracted, Extracted) else None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"First \boxed{1}, no: \boxed{2}.", "2"),
        (r"so \boxed{\frac{1}{2}} it is", r"\frac{1}{2}"),
        (r"\boxed{\boxed{5}}", r"\boxed{5}"),
        (r"\boxed{3} and then \boxed{4", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\fbox{7}", "7"),
        (r"JSON-escaped \\boxed{8}", "8"),
        (r"\boxed{}", ""),
        (r"x = \boxed{ 9 }$.", "9"),
        ("\\boxed{7}\n% \\boxed{8}\n", "7"),
    ],
)
def test_the_last_balanced_outermost_box_is_the_answer(text: str, answer: str) -> None:
    assert found(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"the roots are \boxed{1}, \boxed{2}.", "1, 2"),
        (r"$\boxed{1}$ and $\boxed{2}$", "1, 2"),
        (r"\boxed{k = 45} \quad \text{and} \quad \boxed{n = 2}", "k = 45, n = 2"),
        (r"\boxed{1} papers and \boxed{2} bins", "1, 2"),
        (r"x_1=\boxed{1}, x_2=\boxed{2}", "1, 2"),
        (r"\boxed{5} \boxed{5}", "5"),
        (r"we had \boxed{1}, but the right count gives \boxed{2}", "2"),
        (r"Case 1: \boxed{1}. Then Case 2 follows from it, so in total \boxed{2}", "2"),
    ],
)
def test_boxes_that_follow_each_other_directly_form_a_list(text: str, answer: str) -> None:
    assert found(text) == answer


@pytest.mark.parametrize("name", ["think", "thinking", "thought", "reasoning"])
def test_only_what_follows_a_closed_thinking_block_counts(name: str) -> None:
    assert found(rf"<{name}>\boxed{{1}}</{name}>\boxed{{2}}") == "2"
    assert found(rf"\boxed{{1}}</{name}>\boxed{{2}}") == "2"
    assert found(rf"<{name}>\boxed{{1}}</{name}> I am done.", NO_FALLBACK) is None
    assert found(rf"<{name}>\boxed{{1}}</{name}>", ALL) == "1"


@pytest.mark.parametrize("settings", [RESPONSE, ALL])
def test_text_inside_an_unfinished_thinking_block_never_counts(settings: MathSettings) -> None:
    assert found(r"<think>so \boxed{1}", settings) is None
    assert found(r"<think>a</think>\boxed{3}<think>or \boxed{1}", settings) == "3"
    assert found(r"\boxed{3} <think>wait, \boxed{1}", settings) == "3"


def test_what_follows_the_end_of_the_message_is_not_read() -> None:
    assert found("The answer is 2/3.<|im_end|>\n<|im_start|>user\nAnd 7?") == "2/3"


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7\nA: 7", "7"),
        ("so\n#### 1,234", "1,234"),
        ("The answer is 12 because 3 and 4 were counted.", "12"),
        ("The final answer is $(7, 6)$. I hope it is correct.", "(7, 6)"),
        ("**Answer:** **42**\nThat took 3 steps.", "42"),
        ("### Final Answer\n42 dollars", "42 dollars"),
        ("Answer: The largest $n$ is 34.", "34"),
        ("Answer: Evelyn", "Evelyn"),
        ("<answer>5</answer> after 9 tries", "5"),
        ("So Tom has 5 apples.", "5"),
        (r"it becomes $\frac{1}{2} + 1 = \frac{3}{2}$", r"\frac{1}{2} + 1 = \frac{3}{2}"),
        ("the error grows by 100%.", "100%"),
        ("I could not solve it.", None),
        ("", None),
    ],
)
def test_without_a_box_the_fallback_finds_markers_then_the_last_value(text: str, answer: str | None) -> None:
    assert found(text) == answer
    assert found(text, NO_FALLBACK) is None


def test_an_answer_is_itself_and_a_sentence_ends_in_its_value() -> None:
    answer = MathSettings(form="answer")
    assert found("1, 2", answer) == "1, 2"
    assert found("We find that $x < 3$.", answer) == "x < 3"
    assert found("either 4 or 5", answer) == "either 4 or 5"
    assert found("anything but 5", answer) == "anything but 5"


WRITINGS = {
    "as it is": "A: {}",
    "hashes": "#### {}",
    "money": "A: ${}",
    "unit": "A: {} apples",
    "decoy number after": "A: {}\nThis took 3 steps and 12 tokens.",
    "decoy on the line": "A: {} (not 99999)",
    "bold": "**Answer:** **{}**",
    "sentence": "Therefore, the answer is {}.",
    "reason": "The answer is {} because 3 and 4 were counted.",
    "heading": "### Final Answer\n{} dollars",
    "decoy box": "First \\boxed{{77777}}, but the sum of all of these gives \\boxed{{{}}}",
    "money in a box": "\\boxed{{\\${}}}",
    "unit in a box": "\\boxed{{{} \\text{{ dollars}}}}",
    "last number": "So Tom has {} apples.",
    "equation": "A: x = {}",
    "thinking": "<think>A: 12345678</think>A: {}",
    "windows": "A: {}\r\n",
}


@pytest.mark.parametrize("writing", WRITINGS)
@pytest.mark.parametrize("grouped", [False, True])
def test_real_model_outputs_keep_their_labels_in_every_writing(writing: str, grouped: bool) -> None:
    lines = data_file("verifier/gsm8k_model_outputs.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines][:: 1 if writing == "as it is" else 4]
    wrong = []
    for row in rows:
        reasoning, answer = row["prediction"].rsplit("\n", 1)[0], row["prediction_answer"]
        if grouped and answer.lstrip("-").isdigit():
            answer = f"{int(answer):,}"
        verdict = judge(
            f"{reasoning}\n{WRITINGS[writing].format(answer)}", parse_math_gold(row["gold"]), None, RESPONSE
        )
        if verdict.correct is not row["expected"]:
            wrong.append((answer, row["gold"], verdict))
    assert wrong == []


def test_a_box_without_braces_counts_where_there_is_no_other() -> None:
    assert extract(r"so $x = \boxed 5$.", MathSettings()) == Extracted(("5",), "box")
    assert extract(r"\boxed 4, that is \boxed{5}", MathSettings()) == Extracted(("5",), "box")


@pytest.mark.parametrize(
    ("prompt", "tag"),
    [
        ("<|assistant|><think>\n", "<think>"),
        ("user: Write <think> first.\nassistant: ", ""),
        ("<think>\n\n</think>\n\n", ""),
        ("", ""),
    ],
)
def test_a_prompt_that_ends_with_a_thinking_tag_has_opened_the_block(prompt: str, tag: str) -> None:
    assert opened_by(prompt) == tag
