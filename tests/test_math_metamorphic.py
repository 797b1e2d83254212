r"""Metamorphic laws of the maths verifier, on the gold answers of the public benchmarks.

A gold answer given back in another writing keeps the verdict: in dollars, in a box, with ``\left``/``\right``,
``\dfrac``, spaces, a final full stop, its list in another order. What changes the answer turns it: a digit, the sign, a
factor of ten, the order of a tuple, a bracket of an interval, a member left out or added, a second answer beside it.
Also: judging depends on nothing but its arguments, and the fast path says what the full one says.

The sample is drawn with a fixed seed. Not covered: golds in words, and changes whose effect this file cannot compute.
"""

from __future__ import annotations

import functools
import math
import random
import re
from collections.abc import Callable, Iterator

import pytest

from scope_opd.gold import MathGold, parse_math_gold
from scope_opd.types import Verdict
from scope_opd.verify.math.settings import MathSettings
from shared_data import data_rows

FILES = ("aime24", "aime25", "amc23", "math500", "minerva", "olympiadbench")
SAMPLE = 36
"""Golds drawn for each law."""
KEEPS_MIN = 0.97
"""Share of the rewritten golds that must stay correct: a few golds of the benchmarks are damaged themselves."""
SEED = 20240

Case = tuple[str, str, str]
"""form, prediction, gold."""

_NUMBER = re.compile(r"-?[0-9]+(?:\.[0-9]+)?")
_ARITHMETIC = re.compile(r"(?:\\(?:d?frac|sqrt|pi|left|right|cdot)|[-+0-9./{}() ])+")


@functools.cache
def golds() -> tuple[str, ...]:
    """The distinct gold answers, but for damaged ones (odd dollars) and those that hold code or prose."""
    found = dict.fromkeys(row["answer"].strip() for name in FILES for row in data_rows(f"eval/{name}.jsonl"))
    return tuple(
        gold
        for gold in found
        if gold.count("$") % 2 == 0 and "np." not in gold and not re.search("[a-z]{3} [a-z]", gold)
    )


def bare(gold: str) -> str:
    r"""The answer without dollars and negative space (``10,\!080``)."""
    return re.sub(r"\\!\s*", "", gold.replace("$", "")).strip()


def split_list(text: str) -> list[str]:
    """The parts between the commas that no bracket encloses."""
    parts, depth, start = [], 0, 0
    for index, char in enumerate(text):
        depth += (char in "([{") - (char in ")]}")
        if char == "," and depth == 0:
            parts.append(text[start:index])
            start = index + 1
    return [part.strip() for part in [*parts, text[start:]]]


def thousands(parts: list[str]) -> bool:
    """Whether the commas may be thousands separators (``1,000``)."""
    return len(parts) > 1 and all(re.fullmatch("[0-9]{3}", part) for part in parts[1:])


def value(latex: str) -> float | None:
    """The value of plain LaTeX arithmetic by a small evaluator of our own; None where it is anything else."""
    text = latex.replace(r"\left", "").replace(r"\right", "").replace(" ", "").replace(r"\cdot", "*")
    text = re.sub(r"\\d?frac([0-9])([0-9])", r"\\frac{\1}{\2}", text)
    text = re.sub(r"\\sqrt([0-9])", r"\\sqrt{\1}", text)
    if not _ARITHMETIC.fullmatch(text.replace("*", "")) or re.search(r"[0-9)}]\\d?frac[{][0-9]+[}]", text):
        return None  # a mixed number reads as a sum, and this evaluator as a product
    text = re.sub(r"\\d?frac(\{)", r"F\1", text).replace(r"\sqrt{", "S{").replace(r"\pi", "P")
    while (
        folded := re.sub(r"F\{([^{}]*)\}\{([^{}]*)\}", r"((\1)/(\2))", re.sub(r"S\{([^{}]*)\}", r"R(\1)", text))
    ) != text:
        text = folded
    text = re.sub(r"(?<=[0-9)P])(?=[(RP])|(?<=[)P])(?=[0-9])", "*", text)
    if not re.fullmatch(r"[-+*/().0-9RP]+", text):
        return None
    try:
        return float(eval(text, {"__builtins__": {}}, {"R": math.sqrt, "P": math.pi}))
    except (SyntaxError, ZeroDivisionError, ValueError, TypeError, OverflowError):
        return None


def tuple_parts(gold: str) -> list[str]:
    """The members of one tuple in round brackets; empty for anything else, or where it could be an interval."""
    text = bare(gold).replace(r"\left", "").replace(r"\right", "").strip()
    if not text.startswith("(") or not text.endswith(")") or "infty" in text or len(split_list(text)) != 1:
        return []
    parts = split_list(text[1:-1])
    return parts if len(parts) > 1 and "(" not in "".join(parts) else []


# Writings that keep the answer: each yields predictions for one gold.
def wrapped(gold: str, _: random.Random) -> Iterator[Case]:
    text = bare(gold)
    yield "answer", f"${text}$", gold
    yield "answer", rf"\( {text} \)", gold
    yield "answer", f"  {text} ", gold
    yield "answer", f"{text}.", gold


def boxed(gold: str, _: random.Random) -> Iterator[Case]:
    text = bare(gold)
    yield "response", rf"Some steps with $2+2=4$. So the answer is $\boxed{{{text}}}$.", gold
    yield (
        "response",
        f"<think>\nPerhaps \\boxed{{99}}?\n</think>\n\n**Final answer**\n\\[\n\\boxed{{ {text} }}\n\\]",
        gold,
    )


def as_last_words(gold: str, _: random.Random) -> Iterator[Case]:
    if _NUMBER.fullmatch(gold):
        yield "response", f"Adding 3 and 4 first, we go on. The answer is {gold}.", gold
        yield "response", f"So, in 2 steps:\n\n#### {gold}", gold


def left_right(gold: str, _: random.Random) -> Iterator[Case]:
    text = bare(gold)
    if "(" in text and r"\left" not in text and text.count("(") == text.count(")"):
        yield "answer", text.replace("(", r"\left(").replace(")", r"\right)"), gold


def fraction_style(gold: str, _: random.Random) -> Iterator[Case]:
    text = bare(gold)
    if r"\frac" in text:
        yield "answer", text.replace(r"\frac", r"\dfrac"), gold
        yield "answer", text.replace(r"\frac", r"\tfrac"), gold
        yield "answer", r"\displaystyle " + text, gold


def spacing(gold: str, _: random.Random) -> Iterator[Case]:
    text = bare(gold)
    if "," in text and not thousands(split_list(text)):
        yield "answer", re.sub(r",\s*", ", ", text), gold
        yield "answer", re.sub(r",\s*", r",\\, ", text), gold


def plain_fraction(gold: str, _: random.Random) -> Iterator[Case]:
    if found := re.fullmatch(r"(-?)\\d?frac\{([0-9]+)\}\{([0-9]+)\}", bare(gold)):
        yield "answer", f"{found[1]}{found[2]}/{found[3]}", gold
        yield "answer", f"\\frac{{{found[1]}{int(found[2]) * 3}}}{{{int(found[3]) * 3}}}", gold


def reordered(gold: str, rng: random.Random) -> Iterator[Case]:
    parts = split_list(bare(gold))
    if (
        len(parts) > 1
        and not thousands(parts)
        and "=" not in gold
        and "dots" not in gold
        and len(set(parts)) == len(parts)
    ):
        mixed = parts[:]
        rng.shuffle(mixed)
        yield "answer", ", ".join(mixed), gold
        yield "answer", r" \text{ and } ".join(mixed) if len(mixed) == 2 else ", ".join(mixed[::-1]), gold
        yield "response", ", ".join(rf"$\boxed{{{part}}}$" for part in mixed), gold


# Changes that turn the verdict.
def another_digit(gold: str, rng: random.Random) -> Iterator[Case]:
    text = bare(gold)
    before = value(text)
    places = [match.start() for match in re.finditer("[0-9]", text)]
    if before is None or not places:
        return
    for place in rng.sample(places, min(2, len(places))):
        changed = text[:place] + rng.choice([d for d in "123456789" if d != text[place]]) + text[place + 1 :]
        after = value(changed)
        if after is not None and abs(after - before) > 1e-9 * abs(before):
            yield "answer", changed, gold


def other_sign(gold: str, _: random.Random) -> Iterator[Case]:
    text = bare(gold)
    if value(text):
        flipped = (text[1:] if text.startswith("-") else f"-{text}") if _NUMBER.fullmatch(text) else f"-({text})"
        yield "answer", flipped, gold
        yield "response", rf"\boxed{{{flipped}}}", gold


def ten_times(gold: str, _: random.Random) -> Iterator[Case]:
    if _NUMBER.fullmatch(gold) and float(gold):
        yield "answer", f"{float(gold) * 10:.12g}", gold
        yield "answer", f"{float(gold) / 10:.12g}", gold
        yield "answer", rf"{gold} \times 10^{{2}}", gold


def swapped_tuple(gold: str, _: random.Random) -> Iterator[Case]:
    parts = tuple_parts(gold)
    if parts and parts[0] != parts[1]:
        yield "answer", f"({', '.join([parts[1], parts[0], *parts[2:]])})", gold


def other_bracket(gold: str, _: random.Random) -> Iterator[Case]:
    text = bare(gold)
    parts = split_list(text)
    interval = ("[" in text or "infty" in text) and text.count(",") >= 1 and len(parts) == 1
    if not interval or not re.search(r"^[^a-z]*[\[(]|\\in|cup", text):
        return
    flip = {"(": "[", ")": "]", "[": "(", "]": ")"}
    for match in re.finditer(r"[\[(](?!-?\\infty)|(?<!\\infty)(?<!\\infty )[\])]", text):
        yield "answer", text[: match.start()] + flip[match.group()] + text[match.end() :], gold


def one_left_out(gold: str, _: random.Random) -> Iterator[Case]:
    parts = split_list(bare(gold))
    if len(parts) > 1 and not thousands(parts) and len(set(parts)) == len(parts):
        yield "answer", ", ".join(parts[1:]), gold
        yield "answer", ", ".join(parts[:-1]), gold


def one_added(gold: str, _: random.Random) -> Iterator[Case]:
    text = bare(gold)
    if value(text) is not None:
        yield "answer", rf"{text}, 123456", gold
        yield "answer", rf"{text} \text{{ or }} 123456", gold
        yield "response", rf"\boxed{{123456}}, \boxed{{{text}}}", gold
        yield "response", rf"\boxed{{{text}}}. No, that is wrong: \boxed{{123456}}", gold
        yield "response", rf"<think>\boxed{{{text}}}", gold


def more_than_that(gold: str, _: random.Random) -> Iterator[Case]:
    text = bare(gold)
    if value(text):
        yield "answer", f"{text}+1", gold
        yield "answer", rf"x > {text}", gold
        yield "answer", rf"{text} x", gold


HEDGES = (
    r"{gold} \text{{ or }} {other}",
    r"{other} \text{{ or }} {gold}",
    r"{gold}; {other}",
    r"{gold} \lor {other}",
    r"{gold} \to {other}",
    r"{gold} \implies {other}",
    r"{other} = {gold}",
    r"{gold} \ne {other}",
    r"{gold} \approx {other}",
    r"{gold} \quad {other}",
    r"{gold} \pm {other}",
    r"({gold}, {other})",
    r"{gold} \text{{ (or }} {other} \text{{)}}",
    r"\text{{not }} {gold}",
    r"{gold} \text{{ is wrong}}",
    r"\cancel{{{gold}}} {other}",
    r"\text{{between }} {gold} \text{{ and }} {other}",
    r"{gold} \text{{ to }} {other}",
    r"\text{{at least }} {gold}",
    r"\text{{minus }} {gold}",
    r"{gold} \text{{ million}}",
    r"{gold} \text{{ if }} x > 0",
    r"{gold} \text{{ or more}}",
    r"x = {gold}, {other}",
    r"x = {other} = {gold}",
    r"\geq {gold}",
)
"""Answers that hold the gold one and say something else."""


def hedged(gold: str, rng: random.Random) -> Iterator[Case]:
    text = bare(gold)
    if value(text):
        for hedge in rng.sample(HEDGES, 6):
            said = hedge.format(gold=text, other="123456")
            yield "answer", said, gold
            yield "response", rf"Hence $\boxed{{{said}}}$.", gold


def just_off(gold: str, _: random.Random) -> Iterator[Case]:
    text = bare(gold)
    if value(text):
        yield "answer", rf"{text} + \frac{{1}}{{10^{{12}}}}", gold
        yield "answer", rf"{text} - \frac{{1}}{{2^{{100}}}}", gold
        if text.isdigit():
            yield "answer", f"{text}.0000000001", gold
            yield "answer", rf"{text} \cdot 10^{{40}} + 1", rf"{text} \cdot 10^{{40}}"


KEEP: dict[str, Callable[[str, random.Random], Iterator[Case]]] = {
    law.__name__: law
    for law in (wrapped, boxed, as_last_words, left_right, fraction_style, spacing, plain_fraction, reordered)
}
TURN: dict[str, Callable[[str, random.Random], Iterator[Case]]] = {
    law.__name__: law
    for law in (
        another_digit,
        other_sign,
        ten_times,
        swapped_tuple,
        other_bracket,
        one_left_out,
        one_added,
        more_than_that,
        hedged,
        just_off,
    )
}


def cases(law: Callable[[str, random.Random], Iterator[Case]], sample: int) -> list[Case]:
    """One law's cases on at most ``sample`` golds, at least half of them more than a number."""
    rng = random.Random(SEED)
    able = [(gold, found) for gold in golds() if (found := list(law(gold, rng)))]
    rng.shuffle(able)
    able.sort(key=lambda item: bool(_NUMBER.fullmatch(item[0])))
    formulae = [item for item in able if not _NUMBER.fullmatch(item[0])]
    chosen = formulae[: max(sample // 2, sample - (len(able) - len(formulae)))]
    chosen += able[len(formulae) :][: sample - len(chosen)]
    return [case for _, found in chosen for case in found]


def arguments(case: Case) -> tuple[str, MathGold, None, MathSettings]:
    form, prediction, gold = case
    return prediction, parse_math_gold(gold), None, MathSettings(form="answer" if form == "answer" else "response")


def verdict(case: Case) -> Verdict:
    from scope_opd.verify.math.judge import judge

    return judge(*arguments(case))


def test_the_evaluator_of_this_file() -> None:
    assert value(r"-\frac{3}{4}") == -0.75
    assert value(r"2\sqrt{9}\pi") == pytest.approx(6 * math.pi)
    assert value(r"\dfrac{1+\sqrt{25}}{3}") == 2
    assert value("x+1") is None


@pytest.mark.parametrize("name", KEEP)
def test_another_writing_keeps_the_verdict(name: str) -> None:
    tried = cases(KEEP[name], SAMPLE)
    wrong = [(case, verdict(case).reason) for case in tried if not verdict(case).correct]
    assert tried
    assert len(wrong) <= (1 - KEEPS_MIN) * len(tried), "\n".join(map(str, wrong))


@pytest.mark.parametrize("name", TURN)
def test_another_answer_turns_the_verdict(name: str) -> None:
    tried = cases(TURN[name], SAMPLE)
    wrong = [(case, verdict(case).reason) for case in tried if verdict(case).correct]
    assert tried
    assert wrong == []


def mixed_cases() -> list[Case]:
    return [case for law in (*KEEP.values(), *TURN.values()) for case in cases(law, 4)]


def test_a_verdict_depends_on_nothing_but_its_arguments() -> None:
    tried = mixed_cases()
    first = {case: verdict(case) for case in tried}
    random.Random(SEED).shuffle(tried)
    assert [case for case in tried if verdict(case) != first[case]] == []


def test_the_fast_path_says_what_the_full_one_says() -> None:
    """Correct, extracted and reason alike, wherever it answers; and it answers for most plain numbers."""
    from scope_opd.verify.math.fast import judge_fast

    answered = [(case, fast) for case in mixed_cases() if (fast := judge_fast(*arguments(case))) is not None]
    assert [(case, fast, verdict(case)) for case, fast in answered if fast != verdict(case)] == []
    assert len(answered) >= 20
