"""The zoo's task: a signed running sum modulo 23, worked in any order. No torch, no transformers.

A problem is a list of signed items, ``-2 +15 -15 -6``. A response takes any unused item, writes ``op value new_total``,
repeats until every item is used, then writes ``# total``: ``+ 15 15 - 6 9 - 2 7 - 15 15 # 15``. Up to n! responses are
right, and the order chosen decides which sums are needed, so that diversity means something.

Train and held-out problems are disjoint by construction: a hash of the problem's *sorted* items puts it in one of
``SPLIT_BUCKETS`` buckets, bucket 0 is held-out and the others are train. A reordered problem is therefore in the same
split, whatever the seed and the difficulty.

Not covered: tokens (tokenizer.py), models (build.py), partial credit (the check is all or nothing).
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections import Counter
from importlib import resources
from typing import Literal

from scope_opd.errors import DataError

Split = Literal["train", "heldout"]

MODULUS = 23
MAX_VALUE = 16
"""Items are -16..-1 and +1..+16: 32 signed tokens, which with 23 totals and the signs fit a vocabulary of 64."""
SPLIT_BUCKETS = 16
SPLITS: tuple[Split, ...] = ("train", "heldout")
SHIPPED_ROWS: dict[Split, int] = {"train": 2048, "heldout": 400}
EASY = (8, 14)
HARD = (6, 20)
MAX_RESPONSE_TOKENS = 64
"""Room for the longest gold response: 3 tokens an item, 2 for the answer, 1 to end; 63 for 20 items."""

_ITEM = re.compile(r"([+-])([1-9][0-9]?)")
_TOTALS = {str(total): total for total in range(MODULUS)}


def parse_problem(problem: str) -> list[tuple[str, int]]:
    """The items of a problem as (sign, value), in the order written.

    Raises:
        DataError: an item is not a sign and a number of 1..``MAX_VALUE``, or there is none.
    """
    items: list[tuple[str, int]] = []
    for word in problem.split():
        match = _ITEM.fullmatch(word)
        if match is None or int(match[2]) > MAX_VALUE:
            raise DataError(
                f"running-sum problem {problem!r} has the item {word!r}",
                f"a sign and a number of 1..{MAX_VALUE}, such as -2 or +15",
                "use this verifier with rows of the zoo's task only",
            )
        items.append((match[1], int(match[2])))
    if not items:
        raise DataError(f"running-sum problem {problem!r} has no items", "items such as '-2 +15'", "drop the row")
    return items


def split_of(problem: str) -> Split:
    """The split that owns a problem: a function of its multiset of items alone."""
    canonical = " ".join(sorted(problem.split()))
    digest = hashlib.sha256(canonical.encode()).digest()
    return "heldout" if int.from_bytes(digest[:8], "big") % SPLIT_BUCKETS == 0 else "train"


def draw_problem(split: Split, n_min: int, n_max: int, rng: random.Random) -> str:
    """One problem of ``split`` with n_min..n_max items: drawn until the hash says that the split owns it."""
    while True:
        count = rng.randint(n_min, n_max)
        problem = " ".join(f"{rng.choice('+-')}{rng.randint(1, MAX_VALUE)}" for _ in range(count))
        if split_of(problem) == split:
            return problem


def solve(problem: str) -> str:
    """The gold answer, ``"0"`` .. ``"22"``."""
    return str(sum(value if sign == "+" else -value for sign, value in parse_problem(problem)) % MODULUS)


def generate_rows(
    split: Split, count: int, *, n_min: int = EASY[0], n_max: int = EASY[1], seed: int = 0
) -> list[dict[str, str]]:
    """Rows 0..count-1 of a split; row i is a function of (seed, split, i, n_min, n_max) alone.

    Args:
        split: "train" or "heldout".
        count: how many rows; a longer list begins with the shorter one.
        n_min, n_max: fewest and most items of a problem, both included.
        seed: another seed draws other problems of the same split.

    Returns:
        dicts with the keys id, problem, answer and source ("zoo"), all strings. Repeats are possible but, from 8 items
        on, not to be expected.

    Raises:
        DataError: an unknown split, or no problem has such sizes.
    """
    if split not in SPLITS:
        raise DataError(f"zoo split {split!r}", "'train' or 'heldout'", "choose one of the two")
    if count < 0 or not 2 <= n_min <= n_max:
        raise DataError(
            f"count {count}, n_min {n_min}, n_max {n_max}", "count >= 0 and 2 <= n_min <= n_max", "change the sizes"
        )
    rows = []
    for index in range(count):
        problem = draw_problem(split, n_min, n_max, random.Random(f"zoo/{seed}/{split}/{index}/{n_min}-{n_max}"))
        rows.append({"id": f"zoo-{split}-{index:05d}", "problem": problem, "answer": solve(problem), "source": "zoo"})
    return rows


def rows_to_jsonl(rows: list[dict[str, str]]) -> str:
    """The rows as JSON lines: the exact text of the shipped files."""
    return "".join(json.dumps(row) + "\n" for row in rows)


def load_rows(split: Split) -> list[dict[str, str]]:
    """The shipped rows of a split: easy difficulty, seed 0, ``SHIPPED_ROWS[split]`` of them.

    Raises:
        DataError: an unknown split.
    """
    if split not in SPLITS:
        raise DataError(f"zoo split {split!r}", "'train' or 'heldout'", "choose one of the two")
    text = resources.files("scope_opd.zoo").joinpath("data", f"{split}.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def demonstration(problem: str, rng: random.Random) -> str:
    """A right response to ``problem`` that takes the items in an order drawn from ``rng``."""
    items = parse_problem(problem)
    rng.shuffle(items)
    total, words = 0, []
    for sign, value in items:
        total = (total + value if sign == "+" else total - value) % MODULUS
        words += [sign, str(value), str(total)]
    return " ".join([*words, "#", str(total)])


def check_work(problem: str, answer: str, response: str) -> tuple[bool, str | None, str]:
    """Judge a response strictly: the work and the answer must both be right, with nothing before, between or after.

    Args:
        problem: the items, such as ``"-2 +15"``.
        answer: the gold answer, ``"0"`` .. ``"22"``.
        response: any text.

    Returns:
        (correct, final answer found or None, reason). The answer found is the number after the last ``#`` that a word
        follows, right or wrong, also where the work fails. The reason is "correct" or names the first fault; items
        count from 1.

    Raises:
        DataError: the problem (never the response) is malformed.
    """
    unused = Counter(parse_problem(problem))
    words = response.split()
    extracted = _final_answer(words)
    total, position, item = 0, 0, 0
    while position < len(words) and words[position] != "#":
        item += 1
        sign, value, claimed = (*words[position : position + 3], "", "", "")[:3]
        if sign not in ("+", "-") or value not in _TOTALS or claimed not in _TOTALS:
            return False, extracted, f"not 'op value total' at item {item}"
        step = (sign, _TOTALS[value])
        if unused[step] == 0:
            return False, extracted, f"{sign}{value} at item {item} is not an unused item"
        unused[step] -= 1
        total = (total + step[1] if sign == "+" else total - step[1]) % MODULUS
        if _TOTALS[claimed] != total:
            return False, extracted, f"running total wrong at item {item}"
        position += 3
    if position == len(words):
        return False, extracted, "no final answer"
    left = sum(unused.values())
    if left:
        return False, extracted, f"items unused: {left}"
    if len(words) - position != 2:
        return False, extracted, "text after the final answer" if len(words) - position > 2 else "no final answer"
    if words[-1] != str(total) or words[-1] != answer:
        return False, extracted, "final answer wrong"
    return True, extracted, "correct"


def distinct_key(response: str) -> str:
    """The order of items a response chose, ``"+15 -2"``: equal for two responses exactly if they chose alike.

    Totals and the answer do not count. Reading stops at ``#`` or at the first thing that is not ``op value total``.
    """
    words = response.split()
    chosen: list[str] = []
    for start in range(0, len(words) - 2, 3):
        sign, value, total = words[start : start + 3]
        if sign not in ("+", "-") or value not in _TOTALS or total not in _TOTALS:
            break
        chosen.append(sign + value)
    return " ".join(chosen)


def _final_answer(words: list[str]) -> str | None:
    """The number after the last ``#`` that a word follows, or None."""
    for position in range(len(words) - 2, -1, -1):
        if words[position] == "#":
            return words[position + 1] if words[position + 1] in _TOTALS else None
    return None
