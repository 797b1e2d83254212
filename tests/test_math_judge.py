r"""When an answer is the gold answer: the rules of docs/judging.md, and their agreement with labelled pairs.

Not covered: which part of a response is the answer (test_math_extract), attacks (test_math_attacks).
"""

from __future__ import annotations

import hashlib
import json
import random
from typing import Any

import pytest

from scope_opd.gold import MathGold, Tolerance, parse_math_gold
from scope_opd.types import Verdict
from scope_opd.verify.math.fast import judge_fast
from scope_opd.verify.math.judge import judge
from scope_opd.verify.math.settings import MathSettings
from shared_data import data_file, data_rows

ANSWER = MathSettings(form="answer")

EQUAL = [
    (r"x>2 \text{ and } x<5", "(2,5)", ""),
    (r"(-\infty,1)\cup(1,\infty)", r"x \neq 1", ""),
    (r"\mathbb{R}\setminus\{1\}", r"(-\infty,1)\cup(1,\infty)", ""),
    (r"[1,3]\cap[2,5]", "[2,3]", ""),
    (r"(0,2)\cup(1,3)", "(0,3)", ""),
    (r"\{1\}\cup\{1,4\}", r"\{1,4\}", ""),
    ("all real numbers", r"(-\infty,\infty)", ""),
    ("x=3", "3", ""),
    ("3=x", "x=3", ""),
    ("1,000", "1000", ""),
    ("1,2", "2,1", ""),
    ("1,2", "(1,2)", ""),
    ("50%", "0.5", ""),
    ("50%", "50", ""),
    ("0.5", "50%", ""),
    ("50", r"50\%", ""),
    (r"45^\circ", "45", ""),
    (r"45^\circ", r"\frac{\pi}{4}", ""),
    ("$5", "5", ""),
    ("500 cents", "$5", ""),
    (r"\$5.00", "5", ""),
    ("100 cm", "1 m", ""),
    ("5 apples", "5", ""),
    ("5 or 5", "5", ""),
    (r"\{5\}", "5", ""),
    ("5+0", "5", ""),
    (r"\text{five}", "5", ""),
    (r"\text{5}", "5", ""),
    ("５", "5", ""),
    ("5!", "120", ""),
    ("4", "4", "Compute $2+2$."),
    ("(x-1)(x+1)", "(x-1)(x+1)", "Factor $x^2-1$."),
    (r"\sqrt{2}", "1.41421356", ""),
    ("3.14159265", r"\pi", ""),
    ("0.3333333", "1/3", ""),
    ("4.5e33", r"4.5 \times 10^{33}", ""),
    ("1e-3", "0.001", ""),
    ("52_8", "52_8", ""),
    ("52", "52_8", ""),
    ("3:30 PM", "15:30", ""),
    ("3:30", "3:30 p.m.", ""),
    ("1:2", "2:4", ""),
    ("1:2", "0.5", ""),
    ("A", "A", ""),
    ("(A)", "A", ""),
    ("12", "(C) 12", ""),
    ("C", "(C) 12", ""),
    ("12", "C", "What? (A) 10 (B) 11 (C) 12 (D) 13"),
    ("(C) 12", "C", "What? (A) 10 (B) 11 (C) 12 (D) 13"),
    ("C", "12", "What? (A) 10 (B) 11 (C) 12 (D) 13"),
    ("yes", "Yes", ""),
    ("Yes, because 5>3", "Yes", ""),
    ("True", "true", ""),
    (r"\sin x", r"\sin(x)", ""),
    (r"\sin^2 x+\cos^2 x", "1", ""),
    (r"2\sin x\cos x", r"\sin 2x", ""),
    (r"1\frac12", "1.5", ""),
    ("1 1/2", "3/2", ""),
    (r"-1\frac12", "-1.5", ""),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{bmatrix}1\\2\end{bmatrix}", ""),
    ("(1,2,3)", r"\begin{pmatrix}1\\2\\3\end{pmatrix}", ""),
    (r"\langle 1,2,3\rangle", "(1,2,3)", ""),
    (r"\text{The answer is } 5", "5", ""),
    ("5 units", "5", ""),
    (r"5 \text{ cm}^2", "5", ""),
    ("x=1,y=2", "(1,2)", ""),
    ("x=1, y=2", "y=2, x=1", ""),
    ("1,2", "x=1,y=2", ""),
    ("x=1,x=2", "1,2", ""),
    ("x=1 or x=2", "1,2", ""),
    ("y=2x+1", "2x-y+1=0", ""),
    ("y=2x+1", "2x+1", ""),
    ("x^2+y^2=4", "x^2+y^2-4=0", ""),
    ("1=1", "1", ""),
    (r"n\pi", r"k\pi", ""),
    (r"\frac{\pi}{4}+n\pi, n\in\mathbb{Z}", r"x=\frac{\pi}{4}+k\pi", ""),
    (r"0.\overline{3}", "1/3", ""),
    ("1,5", "1.5", ""),
    ("2,50", "2.5", ""),
    ("16,3,1,1", "16,3,1,1", ""),
    ("1,1,2", "1,2", ""),
    ("4 dogs and 7 cats", "7 cats and 4 dogs", ""),
    ("12th", "12", ""),
    (r"12^{\text{th}}", "12", ""),
    ("two", "2", ""),
    ("+5", "5", ""),
    ("5.", "5", ""),
    ("5.0", "5", ""),
    ("05", "5", ""),
    ("ABD", "A, B, D", ""),
    ("C_{10}^{3}", "120", ""),
    (r"\binom{10}{3}", "120", ""),
    (r"\lg 100", "2", ""),
    (r"\log_2 8", "3", ""),
    (r"\operatorname{arctg} 1", r"\frac{\pi}{4}", ""),
    ("i^2", "-1", ""),
    (r"e^{i\pi}", "-1", ""),
    (r"\sqrt{-4}", "2i", ""),
    ("5=5=5", "5", ""),
    ("(5)", "5", ""),
    ("|5|", "5", ""),
    ("|-5|", "5", ""),
    ("5,", "5", ""),
    ("5, 5.0", "5", ""),
    ("the answer is 5", "5", ""),
    (r"\text{}5", "5", ""),
    ("5^1", "5", ""),
    (r"x\in\{5\}", "5", ""),
    ("5=6-1", "5", ""),
    ("10^{2}", "100", ""),
    ("xy=1", "x=1/y", ""),
    ("[[1,2],[3,4]]", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", ""),
    (
        r"\begin{pmatrix}1&2\\3&4\end{pmatrix}+\begin{pmatrix}1&0\\0&1\end{pmatrix}",
        r"\begin{pmatrix}2&2\\3&5\end{pmatrix}",
        "",
    ),
    ("2 hours and 30 minutes", "2.5 hours", ""),
    ("5 million", "5000000", ""),
    (r"\begin{cases} x=1 \\ y=2 \end{cases}", "x=1, y=2", ""),
    (r"\{x \mid -1 < x < 1\}", "(-1, 1)", ""),
    (r"1 \leq |z| \leq 2", r"[-2,-1] \cup [1,2]", ""),
    ("]1,2[", "(1,2)", ""),
    (r"n \equiv 2 \pmod{5}", r"n \equiv 2 \pmod 5", ""),
    ("f(n) = n^2", "f(x)=x^2", ""),
    (r"(f(n), g(n)) = (n, 1)", "f(n)=n, g(n)=1", ""),
    (r"(\pm 1, \pm 2)", "(1,2),(1,-2),(-1,2),(-1,-2)", ""),
    ("p=5,q=2;p=7,q=2", "(5,2),(7,2)", ""),
    ("x + 1 = 3", "3", "Given $x$, determine $x + 1$."),
    ("5 m", "500", "How many centimeters is it?"),
    ("Petya", "Petya will receive the last token.", "Who will receive the last token?"),
    (r"\frac{\sqrt{17}}{17}", r"\frac{1}{\sqrt{17}}", ""),
]


def verdict(prediction: str, gold: Any, problem: str | None = None, settings: MathSettings = ANSWER) -> Verdict:
    return judge(prediction, parse_math_gold(gold), problem, settings)


@pytest.mark.parametrize(("prediction", "gold", "problem"), EQUAL)
def test_another_writing_of_the_gold_answer_is_correct(prediction: str, gold: str, problem: str) -> None:
    assert verdict(prediction, gold, problem or None).correct is True
    assert verdict(
        rf"\boxed{{{prediction}}}", gold, problem or None, MathSettings()
    ).correct is True or prediction.startswith("the answer")


@pytest.mark.parametrize(
    ("prediction", "gold", "correct"),
    [
        ("2", {"any_of": ["1/2", "2"]}, True),
        ("0.5", {"any_of": ["1/2", "2"]}, True),
        ("1/2, 2", {"any_of": ["1/2", "2"]}, False),
        ("-2, 2", {"all_of": ["2", "-2"]}, True),
        (r"\pm 2", {"all_of": ["2", "-2"]}, True),
        ("2", {"all_of": ["2", "-2"]}, False),
        ("2, -2, 3", {"all_of": ["2", "-2"]}, False),
        ("(2,1), (1,2)", {"all_of": ["(1,2)", "(2,1)"]}, True),
        ("2, 1", {"any_of": ["3", {"all_of": ["1", "2"]}]}, True),
        ("3", {"any_of": ["3", {"all_of": ["1", "2"]}]}, True),
        ("1.61", {"any_of": ["1.6"], "tolerance": "1%"}, True),
        ("1.62", {"any_of": ["1.6"], "tolerance": "1%"}, False),
        ("4.3", {"any_of": ["4.2"], "tolerance": 0.1}, True),
        (r"\pi", {"any_of": ["3.14"], "tolerance": 0.01}, True),
    ],
)
def test_alternatives_lists_and_tolerances(prediction: str, gold: Any, correct: bool) -> None:
    assert verdict(prediction, gold).correct is correct


def test_a_gold_answer_states_its_tolerance_before_the_settings_do() -> None:
    wide = MathSettings(form="answer", tolerance=Tolerance(relative=0.1))
    assert verdict("1.7", "1.6", None, wide).correct is True
    assert verdict("1.7", {"any_of": ["1.6"], "tolerance": "1%"}, None, wide).correct is False
    assert verdict("1.7", "1.6").correct is False


def test_a_verdict_names_its_reason_and_its_answer() -> None:
    settings = MathSettings()
    assert verdict(r"\boxed{ 4 }", "4", None, settings) == Verdict(True, 1.0, "4", "equal to the gold answer")
    assert verdict(r"\boxed{5}", "4", None, settings) == Verdict(False, 0.0, "5", "not equal to the gold answer")
    assert verdict(r"\boxed{}", "4", None, settings) == Verdict(False, 0.0, "", "the answer is empty")
    assert verdict("<think>so 4", "4", None, settings).reason == "nothing follows the thinking block"
    assert verdict(r"\boxed{2+2}", "4", "What is $2+2$?", settings).reason == "copied from the problem"


def pairs() -> list[dict[str, Any]]:
    lines = data_file("verifier/verifier_pairs.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def test_pairs_of_other_projects_are_judged_as_labelled() -> None:
    halves: dict[int, list[bool]] = {0: [], 1: []}
    accepted = 0
    for row in pairs():
        got = verdict(row["prediction"], row["gold"], row.get("problem"), MathSettings(form=row["form"])).correct
        half = int(hashlib.sha256((row["prediction"] + "\0" + row["gold"]).encode()).hexdigest(), 16) % 2
        halves[half].append(got is row["expected"])
        accepted += got is True and not row["expected"]
    everything = halves[0] + halves[1]
    assert sum(everything) / len(everything) >= 0.96
    assert min(sum(half) / len(half) for half in halves.values()) >= 0.94
    assert accepted <= 2


def golds() -> list[tuple[MathGold, str]]:
    out = []
    for name in ("aime24", "aime25", "amc23", "math500", "minerva"):
        out += [(parse_math_gold(row["answer"]), row["problem"]) for row in data_rows(f"eval/{name}.jsonl")]
    for row in data_rows("eval/olympiadbench.jsonl"):
        several = row["is_multiple_answer"]
        answer = {"all_of": row["final_answer"]} if several else row["final_answer"][0]
        out.append((parse_math_gold(answer), row["problem"]))
    return out


def test_every_gold_answer_of_the_benchmarks_is_equal_to_itself_and_to_no_other() -> None:
    everything = golds()
    wrong, accepted = [], []
    for at, (gold, problem) in enumerate(everything):
        own = ", ".join(gold.alternatives[0])
        if judge(rf"\boxed{{{own}}}", gold, problem, MathSettings()).correct is not True:
            wrong.append(own)
        other = everything[(at + 7) % len(everything)][0]
        theirs = ", ".join(other.alternatives[0])
        if other != gold and judge(rf"\boxed{{{theirs}}}", gold, problem, MathSettings()).correct:
            accepted.append((theirs, own))
    assert wrong == []
    assert accepted == []


def test_the_fast_path_says_what_the_full_one_says_and_order_does_not_matter() -> None:
    rows = pairs()
    random.Random(3).shuffle(rows)
    for row in rows[:200]:
        settings = MathSettings(form=row["form"])
        gold = parse_math_gold(row["gold"])
        full = judge(row["prediction"], gold, row.get("problem"), settings)
        quick = judge_fast(row["prediction"], gold, row.get("problem"), settings)
        assert quick is None or quick == full
        assert judge(row["prediction"], gold, row.get("problem"), settings) == full


def test_the_fast_path_answers_plain_numbers_and_identical_spellings() -> None:
    assert judge_fast(r"\boxed{42}", parse_math_gold("42.0"), None, MathSettings()) is not None
    assert judge_fast(r"\boxed{41}", parse_math_gold("42"), None, MathSettings()) is not None
    assert judge_fast(r"$\boxed{\dfrac{1}{2}}$", parse_math_gold(r"\frac{1}{2}"), None, MathSettings()) is not None
    assert judge_fast(r"\boxed{x+1}", parse_math_gold("1+x"), None, MathSettings()) is None


def test_no_damaged_text_makes_the_judge_raise() -> None:
    draw = random.Random(11)
    fragments = [
        "\\",
        "{",
        "}",
        "$",
        r"\frac",
        "^",
        "_",
        "(",
        ")",
        r"\boxed{",
        r"\text{",
        "%",
        "&",
        r"\\",
        "=",
        r"\pm",
        "nan",
    ]
    fragments += [
        "|",
        r"\infty",
        "\x00",
        r"\begin{pmatrix}",
        r"\end{cases}",
        "0/0",
        r"\left",
        "°",
        "'",
        r"\{",
        "!",
        "…",
    ]
    rows = pairs()
    for _ in range(250):
        row = draw.choice(rows)
        text = list(row["prediction"][-60:])
        for _ in range(draw.randint(1, 4)):
            text.insert(draw.randrange(len(text) + 1), draw.choice(fragments))
        assert verdict("".join(text), row["gold"], row.get("problem")).reason
