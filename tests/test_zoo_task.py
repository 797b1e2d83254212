"""Laws of the zoo's task, verifier and tokenizer. Not covered: the models (test_zoo.py)."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scope_opd.errors import DataError, ModelError
from scope_opd.types import Prompt, Rollout, Verdict, Verifier
from scope_opd.zoo import data_path, model_path
from scope_opd.zoo.task import (
    HARD,
    MAX_RESPONSE_TOKENS,
    SHIPPED_ROWS,
    SPLITS,
    Split,
    check_work,
    demonstration,
    distinct_key,
    generate_rows,
    load_rows,
    rows_to_jsonl,
    solve,
    split_of,
)
from scope_opd.zoo.tokenizer import VOCABULARY_SIZE, build_tokenizer, vocabulary
from scope_opd.zoo.verifier import RunningSumVerifier

# By hand: 15 - 6 = 9; 9 - 2 = 7; 7 - 15 = -8 = 15 (mod 23).
PROBLEM, ANSWER = "-2 +15 -15 -6", "15"
GOLD = "+ 15 15 - 6 9 - 2 7 - 15 15 # 15"


def test_the_answer_is_the_signed_sum_modulo_23() -> None:
    assert solve(PROBLEM) == ANSWER
    assert solve("-1") == "22"
    assert solve("+16 +7") == "0"


@pytest.mark.parametrize("split", SPLITS)
def test_shipped_rows_equal_a_fresh_generation(split: Split) -> None:
    fresh = generate_rows(split, SHIPPED_ROWS[split])
    assert data_path(split).read_text(encoding="utf-8") == rows_to_jsonl(fresh)
    assert load_rows(split) == fresh


def test_shipped_rows_are_unique_and_the_splits_disjoint() -> None:
    train, heldout = ({multiset(row["problem"]) for row in load_rows(split)} for split in SPLITS)
    assert len(train) == SHIPPED_ROWS["train"]
    assert len(heldout) == SHIPPED_ROWS["heldout"]
    assert not train & heldout


def multiset(problem: str) -> tuple[str, ...]:
    return tuple(sorted(problem.split()))


@pytest.mark.parametrize("split", SPLITS)
def test_every_generated_problem_belongs_to_its_split_in_any_order_and_difficulty(split: Split) -> None:
    rng = random.Random(0)
    for row in generate_rows(split, 50, n_min=HARD[0], n_max=HARD[1], seed=7):
        items = row["problem"].split()
        assert HARD[0] <= len(items) <= HARD[1]
        rng.shuffle(items)
        assert split_of(" ".join(items)) == split


def test_a_row_depends_on_its_index_and_not_on_the_count() -> None:
    assert generate_rows("train", 20)[:5] == generate_rows("train", 5)
    assert generate_rows("train", 5) != generate_rows("train", 5, seed=1)
    assert generate_rows("train", 18)[17]["id"] == "zoo-train-00017"


@pytest.mark.parametrize("bad", [{"n_min": 1}, {"n_min": 9, "n_max": 8}, {"count": -1}, {"split": "test"}])
def test_impossible_sizes_and_splits_are_refused(bad: dict[str, object]) -> None:
    with pytest.raises(DataError, match="expected"):
        generate_rows(**{"split": "train", "count": 1, **bad})  # type: ignore[arg-type]


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ModelError, match="teacher"):
        model_path("judge")
    with pytest.raises(DataError, match="heldout"):
        data_path("test")
    with pytest.raises(DataError, match="heldout"):
        load_rows("test")  # type: ignore[arg-type]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_every_demonstration_is_right_and_fits_the_token_budget(seed: int) -> None:
    row = generate_rows("train", 1, n_min=HARD[0], n_max=HARD[1], seed=seed)[0]
    response = demonstration(row["problem"], random.Random(seed))
    assert check_work(row["problem"], row["answer"], response) == (True, row["answer"], "correct")
    tokens = len(response.split()) + 1
    assert tokens == 3 * len(row["problem"].split()) + 3
    assert tokens < MAX_RESPONSE_TOKENS


@pytest.mark.parametrize(
    ("response", "extracted", "reason"),
    [
        ("# 15", "15", "items unused: 4"),
        ("+ 15 15 # 15", "15", "items unused: 3"),
        ("+ 15 15 - 6 9 - 2 7 # 15", "15", "items unused: 1"),
        ("+ 15 15 - 6 9 - 2 7 - 15 14 # 15", "15", "running total wrong at item 4"),
        ("+ 15 3 - 6 9 - 2 7 - 15 15 # 15", "15", "running total wrong at item 1"),
        ("+ 15 15 - 6 9 - 6 3 - 15 11 # 15", "15", "-6 at item 3 is not an unused item"),
        ("+ 15 15 - 6 9 - 2 7 - 15 15 - 15 0 # 0", "0", "-15 at item 5 is not an unused item"),
        ("+ 15 15 + 6 21 - 2 19 - 15 4 # 4", "4", "+6 at item 2 is not an unused item"),
        ("+ 0 0 " + GOLD, "15", "+0 at item 1 is not an unused item"),
        ("+ 15 15 - 6 9 - 2 7 - 15 15 # 14", "14", "final answer wrong"),
        ("+ 15 15 - 6 9 - 2 7 - 15 15", None, "no final answer"),
        ("+ 15 15 - 6 9 - 2 7 - 15 15 #", None, "no final answer"),
        ("+ 15 15 - 6 9 - 2 7 - 15 15 15", None, "not 'op value total' at item 5"),
        (GOLD + " # 15", "15", "text after the final answer"),
        (GOLD + " +", "15", "text after the final answer"),
        (GOLD + " thanks", "15", "text after the final answer"),
        ("so " + GOLD, "15", "not 'op value total' at item 1"),
        (GOLD.replace("# 15", "# fifteen"), None, "final answer wrong"),
        (GOLD.replace("# 15", "# 015"), None, "final answer wrong"),
        (GOLD.replace("# 15", "# 38"), None, "final answer wrong"),
        (GOLD.replace("- 2 7", "-2 7"), "15", "not 'op value total' at item 3"),
        (GOLD.replace("- 2 7", "- 02 7"), "15", "not 'op value total' at item 3"),
        (GOLD.replace("- 2 7", "- ２ 7"), "15", "not 'op value total' at item 3"),
        ("", None, "no final answer"),
        ("\x00 \ud800 {{ '#", None, "not 'op value total' at item 1"),
    ],
)
def test_wrong_work_earns_nothing_and_the_reason_names_the_first_fault(
    response: str, extracted: str | None, reason: str
) -> None:
    assert check_work(PROBLEM, ANSWER, response) == (False, extracted, reason)


def test_a_gold_answer_that_disagrees_with_right_work_is_not_correct() -> None:
    assert check_work(PROBLEM, "14", GOLD) == (False, "15", "final answer wrong")


def test_equal_items_may_be_used_as_often_as_they_stand_in_the_problem() -> None:
    assert check_work("+1 +1", "2", "+ 1 1 + 1 2 # 2")[0]
    assert not check_work("+1 +2", "2", "+ 1 1 + 1 2 # 2")[0]


@pytest.mark.parametrize("problem", ["", "+1 2", "+17", "+0", "x", "-2 +15 :"])
def test_a_malformed_problem_is_the_users_mistake(problem: str) -> None:
    with pytest.raises(DataError, match="running-sum problem"):
        check_work(problem, "0", "# 0")


@settings(max_examples=100, deadline=None)
@given(st.one_of(st.text(), st.lists(st.sampled_from(list(vocabulary()))).map(" ".join)))
def test_any_text_gets_a_verdict(text: str) -> None:
    verdict = verify(text)
    assert isinstance(verdict.correct, bool)
    assert verdict.reward == float(verdict.correct)


def test_changing_any_one_word_of_right_work_makes_it_wrong() -> None:
    words = GOLD.split()
    for position, word in enumerate(words):
        for other in vocabulary():
            changed = " ".join([*words[:position], other, *words[position + 1 :]])
            assert check_work(PROBLEM, ANSWER, changed)[0] is (other == word)


def test_distinct_key_is_the_order_of_items_and_nothing_else() -> None:
    assert distinct_key(GOLD) == "+15 -6 -2 -15"
    assert distinct_key(GOLD.replace("# 15", "# 3")) == distinct_key(GOLD)
    assert distinct_key("- 6 17 + 15 9 - 2 7 - 15 15 # 15") != distinct_key(GOLD)
    assert distinct_key("+ 15 15 junk - 6 9") == "+15"
    assert distinct_key("") == ""


def verify(text: str, answer: object = ANSWER) -> Verdict:
    prompt = Prompt(id="p", problem=PROBLEM, answer=answer, token_ids=())
    rollout = Rollout(id="p/0/0", group="p", prompt_token_ids=[], token_ids=[], logprobs=[], text=text)
    return asyncio.run(RunningSumVerifier().verify(rollout, prompt))


def test_the_verifier_rewards_right_work_and_not_a_right_answer() -> None:
    assert isinstance(RunningSumVerifier(), Verifier)
    assert verify(GOLD) == Verdict(True, 1.0, "15", "correct")
    assert verify(GOLD, answer=15) == Verdict(True, 1.0, "15", "correct")
    assert verify("# 15") == Verdict(False, 0.0, "15", "items unused: 4")


def test_tokens_round_trip_and_counts_hold() -> None:
    tokenizer = build_tokenizer()
    assert len(tokenizer) == VOCABULARY_SIZE
    for text in (f"{PROBLEM} :", GOLD):
        ids = tokenizer(text)["input_ids"]
        assert len(ids) == len(text.split())
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text
    ids = [*tokenizer(GOLD)["input_ids"], tokenizer.eos_token_id, tokenizer.pad_token_id]
    assert tokenizer.decode(ids, skip_special_tokens=True) == GOLD
    assert len({tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id, tokenizer.unk_token_id}) == 4


def test_the_chat_template_writes_problem_and_colon_with_the_system_message_in_front() -> None:
    tokenizer = build_tokenizer()
    user = {"role": "user", "content": PROBLEM}
    render = {"tokenize": False, "add_generation_prompt": True}
    assert tokenizer.apply_chat_template([user], **render) == f"{PROBLEM} :"
    system = {"role": "system", "content": "Be right."}
    assert tokenizer.apply_chat_template([system, user], **render) == f"Be right. {PROBLEM} :"
    suffixed = {"role": "user", "content": f"{PROBLEM}\n\nThink.\n"}
    assert tokenizer.apply_chat_template([suffixed], **render).endswith("Think. :")
    whole = tokenizer.apply_chat_template([user, {"role": "assistant", "content": GOLD}], tokenize=False)
    assert whole == f"{PROBLEM} : {GOLD} <eos>"


def test_task_and_verifier_load_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, scope_opd.zoo, scope_opd.zoo.task, scope_opd.zoo.verifier;"
        "sys.exit(bool({'torch', 'transformers', 'tokenizers'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
