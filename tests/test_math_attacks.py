r"""Answers that try to win by their form are not correct.

Each attack is judged as an answer and in a box; none may be accepted, and none may raise. Not covered: attacks on the
process that judges (time, memory), which the workers bound.
"""

from __future__ import annotations

import pytest

from scope_opd.gold import parse_math_gold
from scope_opd.verify.math.judge import judge
from scope_opd.verify.math.settings import MathSettings

OPTIONS = r"What is it? $\textbf{(A)}\ 10 \qquad \textbf{(B)}\ 11 \qquad \textbf{(C)}\ 12$"

ATTACKS: dict[str, list[tuple[str, str]]] = {
    "several answers to one question": [
        ("3, 5", "5"), ("3 or 5", "5"), (r"3 \text{ or } 5", "5"), ("5;6", "5"), (r"\{5, 6\}", "5"), ("(4, 5)", "5"),
        ("1,2,3,4,5,6,7,8,9,10", "7"), ("5 (or 6)", "5"), ("x=5, x=6", "5"), (r"\text{5 or 6}", "5"), ("5/6", "5"),
        ("5|6", "5"), (r"5 \vee 6", "5"), (r"5 \\ 6", "5"), ("5 & 6", "5"), (r"5\to 6", "5"), ("4, 5, \\ldots", "5"),
        (r"5 \pm 1", "6"), ("3=4=5", "5"), ("6 = 7", "7"), (r"37 \approx 36 \approx 38", "37"), (r"5 \approx 6", "5"),
    ],
    "too few or too many of several answers": [
        ("1", "1,2"), ("1,2,3", "1,2"), (r"\pm 2", "2"), ("2", r"\pm 2"), ("16,3,1", "16,3,1,1"), ("x=1", "1,2"),
    ],
    "an interval or a set instead of a number": [
        ("[4,6]", "5"), ("(4,6)", "5"), ("4<x<6", "5"), (r"x \geq 5", "5"), (r"\mathbb{R}", "5"), (r"\mathbb{N}", "5"),
        (r"5 \in \{5,6\}", "5"), (r"5 \neq 6", "5"), ("5<6", "5"), (r"\{1,2,3,4,5\}", "5"), (r"\emptyset", "5"),
    ],
    "hedges and denials": [
        ("maybe 5", "5"), ("either 3 or 5", "5"), ("not 5", "5"), (r"\text{not } 5", "5"), ("anything but 5", "5"),
        ("less than 5", "5"), ("at most 5", "5"), (r"5 \text{ is wrong}", "5"), ("5?", "5"),
        ("5 if possible, else 6", "5"),
        ("Yes and no", "Yes"), ("Yes or no", "Yes"), ("True, not false", "False"),
    ],
    "the gold answer inside something else": [
        ("15", "5"), ("51", "5"), ("5x", "5"), ("5e", "5"), ("AZYUK2A", "2"), (r"\cancel{6}5", "5"), ("5!", "5"),
        (r"\phantom{6}5", "5"), (r"5 \% \text{ of } 6", "5"), ("5 % 6", "5"), ("6 % 5", "5"), ("5_2", "5"),
        ("lambda: 5", "5"),
        (r"5 \text{ million}", "5"), ("5 6", "56"), ("5 6", "5"), (r"\text{the odd ones}", "odd"), ("evenly", "even"),
    ],
    "things that are no number": [
        ("nan", "5"), (r"\frac{0}{0}", "0"), (r"\frac{5}{0}", "5"), (r"\infty", "5"), (r"-\infty", r"\infty"),
        ("", "5"),
        ("{}", "5"), (r"\{\}", "5"), ("$$", "5"), (r"\text{}", "5"), (r"\infty - \infty", "0"), ("zoo", "5"),
    ],
    "identities and equations to be solved": [
        ("x=x", "x=3"), ("0=0", "x^2+y^2=4"), ("2x=6", "x=3"), ("2x=6", "3"), ("x^2=4", r"\pm 2"),
        ("x^2-5x+6<0", "(2,3)"),
        ("2+2=5", "5"), ("x=3", "y=3"), ("y=2x", "y=3x"),
    ],
    "look-alikes": [
        ("А", "A"), ("٥", "5"), ("О", "0"), ("l", "1"), ("R", "r"), (r"\frac{R}{r}", "1"), ("y'", "y"), ("n!!", "n!"),
        ("x_1", "x"), ("𝟝", "5"),
    ],
    "near misses": [
        (r"2^{100}-1", "2^{100}"), ("50!+1", "50!"), (r"\sqrt{10^{20}+1}", "10^{10}"), ("e^{-100}", "0"),
        ("0", "10^{-8}"),
        ("3.14", r"\pi"), ("0.33", r"\frac{1}{3}"), ("[1,2)", "[1,2]"), ("(2,1)", "(1,2)"), ("52_7", "52_8"),
        ("42", "52_8"),
        ("5 cm", "5 m"), ("5 s", "5 m"), ("5 cents", r"\$5"), ("0.5%", "0.5"), ("3:30 AM", "3:30 PM"),
        ("1, 000", "1000"),
        (r"x<1 \text{ and } x>2", r"x<1 \text{ or } x>2"), ("x>3", "y>3"), (r"60^\circ", r"60 \text{ radians}"),
    ],
}  # fmt: skip
CASES = [(kind, *pair) for kind, pairs in ATTACKS.items() for pair in pairs]

COPIES = [
    ("2+2", "4", "Compute $2+2$."),
    (r"\frac{2}{4}", r"\frac{1}{2}", r"Simplify $\frac{2}{4}$."),
    (r"\sqrt{144}", "12", r"What is $\sqrt{144}$?"),
    ("x^2-1", "(x-1)(x+1)", "Factor $x^2-1$."),
    ("(x+1)^2", "x^2+2x+1", "Expand $(x+1)^2$."),
    (r"\sin 30^\circ", r"\frac{1}{2}", r"Find $\sin 30^\circ$."),
    ("2x = 6", "3", "Solve $2x = 6$."),
    ("Compute $2+2$.", "4", "Compute $2+2$."),
    ("What is the capital of France?", "Paris", "What is the capital of France?"),
    ("A, B, C", "C", OPTIONS),
    ("10, 11, 12", "C", OPTIONS),
    ("11", "C", OPTIONS),
    ("(B) 12", "C", OPTIONS),
    ("(C) 11", "C", OPTIONS),
    ("B or C", "C", OPTIONS),
    ("not C", "C", OPTIONS),
    (r"(A)\ 10 (B)\ 11 (C)\ 12", "12", OPTIONS),
]


def test_there_are_many_attacks() -> None:
    assert len(CASES) + len(COPIES) >= 120


@pytest.mark.parametrize(
    ("kind", "attack", "gold"), CASES, ids=[f"{kind}: {attack} for {g}" for kind, attack, g in CASES]
)
def test_an_attack_is_not_correct(kind: str, attack: str, gold: str) -> None:
    for text, settings in (
        (attack, MathSettings(form="answer")),
        (rf"So the answer is $\boxed{{{attack}}}$.", MathSettings()),
    ):
        verdict = judge(text, parse_math_gold(gold), None, settings)
        assert verdict.correct is not True, (text, verdict)
        assert verdict.reward in (0.0, None)


@pytest.mark.parametrize(("attack", "gold", "problem"), COPIES)
def test_what_the_problem_says_already_is_no_answer(attack: str, gold: str, problem: str) -> None:
    assert judge(rf"\boxed{{{attack}}}", parse_math_gold(gold), problem, MathSettings()).correct is False
    assert judge(attack, parse_math_gold(gold), problem, MathSettings(form="answer")).correct is False


RESPONSES = [
    (r"<think>it is \boxed{5}", "5"),
    (r"<think>it is \boxed{5}</think> I do not know.", "5"),
    (r"\boxed{5} \boxed{6}", "5"),
    (r"\boxed{6} \boxed{5}", "5"),
    (r"\boxed{5}, or \boxed{6}", "5"),
    (r"\boxed{5} was my first idea, but the count gives \boxed{6}", "5"),
    (r"\boxed{5", "5"),
    ("The answer is not 5.", "5"),
    ("The answer is less than 5.", "5"),
    ("The answer is 4 or 5.", "5"),
    ("The answer is 4 and 5.", "5"),
    ("The answer is between 3 and 5.", "5"),
    ("A: 4\nThe 5 in the problem is a decoy.", "5"),
    (r"\boxed{}" + " 5", "5"),
    ("% \\boxed{5}\n\\boxed{6}", "5"),
    ("\\boxed{6}\n% \\boxed{5}", "5"),
    (r"\boxed{6} <|im_end|> \boxed{5}", "5"),
]


@pytest.mark.parametrize(("response", "gold"), RESPONSES)
def test_a_response_does_not_win_by_its_form(response: str, gold: str) -> None:
    assert judge(response, parse_math_gold(gold), None, MathSettings()).correct is False


@pytest.mark.parametrize(
    "bomb",
    [
        "9^{9^{9^9}}",
        "100000!",
        "((5!)!)!",
        "10^{10^{10}}",
        "{" * 200 + "5" + "}" * 200,
        r"\frac{1}{" * 60 + "5" + "}" * 60,
    ],
)
def test_a_bomb_is_refused_before_it_is_evaluated(bomb: str) -> None:
    verdict = judge(bomb, parse_math_gold("5"), None, MathSettings(form="answer"))
    assert verdict.correct is not True
    assert verdict.reason


def test_an_answer_of_thousands_of_characters_is_wrong() -> None:
    verdict = judge(r"\boxed{" + "1+" * 3000 + "1}", parse_math_gold("3001"), None, MathSettings())
    assert verdict.correct is False
    assert verdict.reason == "too long for a final answer"
