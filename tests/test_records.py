"""Rollout records on disk: strict JSON both ways, and every wrong row named by file, line and field."""

from __future__ import annotations

import dataclasses
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scope_opd.errors import DataError
from scope_opd.records import dumps, iter_jsonl, rollout_from_dict, rollout_to_dict, rollout_to_json, write_jsonl
from scope_opd.types import Rollout, TopK

LAW = settings(max_examples=60, deadline=None, derandomize=True)
GOOD: dict[str, Any] = {
    "id": "p/0/1", "group": "p", "prompt_token_ids": [1, 2], "token_ids": [3, 4], "logprobs": [-0.5, -1.0],
}  # fmt: skip

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
logprobs = st.floats(max_value=0.0, allow_nan=False, allow_infinity=False)
finite = st.floats(allow_nan=False, allow_infinity=False)
likely = st.tuples(st.integers(0, 2**31 - 1), st.floats(-1e6, 0.0, width=32))


@st.composite
def full_rollouts(draw: st.DrawFn) -> Rollout:
    n = draw(st.integers(1, 6))
    ids = st.lists(st.integers(0, 200_000), min_size=n, max_size=n)
    values = st.lists(logprobs, min_size=n, max_size=n)
    return Rollout(
        id=draw(texts), group=draw(texts), prompt_token_ids=draw(st.lists(st.integers(0, 9), max_size=3)),
        token_ids=draw(ids), logprobs=draw(values), text=draw(texts),
        finish_reason=draw(st.sampled_from(["stop", "length"])),
        policy_version=draw(st.integers(0, 99)), sample=draw(st.integers(0, 99)),
        step=draw(st.none() | st.integers(0, 99)), correct=draw(st.none() | st.booleans()),
        reward=draw(st.none() | finite), extracted=draw(st.none() | texts),
        teacher_logprobs=draw(st.none() | values), reinforce=draw(st.none() | finite),
        distill=draw(st.none() | finite), masked=draw(st.booleans()), mask_reason=draw(st.none() | texts),
        loss_mask=draw(st.none() | st.lists(st.integers(0, 1), min_size=n, max_size=n)),
        sampling=draw(st.dictionaries(texts, finite | st.integers(0, 9) | texts, max_size=2)),
        teacher_topk=draw(st.none() | st.lists(st.lists(likely, max_size=3), min_size=n, max_size=n).map(TopK.of)),
        policy_versions=draw(st.none() | st.just([[0, n, 3]])),
    )  # fmt: skip


@LAW
@given(rollout=full_rollouts())
def test_every_record_survives_the_round_trip_bit_for_bit(rollout: Rollout) -> None:
    line = rollout_to_json(rollout)
    assert "\n" not in line
    assert rollout_from_dict(json.loads(line), where="x line 1") == rollout


def test_the_round_trip_through_a_file_keeps_every_bit_and_the_order(tmp_path: Path) -> None:
    values = [-0.1, -1 / 3, -math.pi, -5e-324, -1.7976931348623157e308, -2.220446049250313e-16]
    rows = [
        Rollout(id=f"p/0/{i}", group="p", prompt_token_ids=[1], token_ids=list(range(6)), logprobs=values, sample=i,
                text="é\u2028\r\n☃ \\boxed{1}\x00")
        for i in range(3)
    ]  # fmt: skip
    path = tmp_path / "rollouts.jsonl"
    write_jsonl(path, [rollout_to_dict(row) for row in rows[:1]])
    write_jsonl(path, [rollout_to_dict(row) for row in rows[1:]], append=True)
    read = list(iter_jsonl(path))
    assert [number for number, _ in read] == [1, 2, 3]
    assert [rollout_from_dict(row, where="f") for _, row in read] == rows


def test_every_field_of_the_record_is_written() -> None:
    rollout = rollout_from_dict(GOOD, where="f line 1")
    assert set(json.loads(rollout_to_json(rollout))) == {field.name for field in dataclasses.fields(Rollout)}


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_nan_and_infinity_are_never_written(bad: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        dumps({"x": [bad]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_jsonl(tmp_path / "x.jsonl", [{"x": bad}])


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity"])
def test_nan_and_infinity_are_refused_with_file_and_line(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(f'{{"id": "a"}}\n\n{{"id": "b", "logprobs": [-1.0, {text}]}}\n')
    rows = iter_jsonl(path)
    assert next(rows) == (1, {"id": "a"})
    with pytest.raises(DataError, match=rf"bad\.jsonl line 3: {text}; expected finite numbers"):
        next(rows)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"id": "a"\n', "line 1: not JSON"),
        (b'{"id": "a"}\n[1, 2]\n', "line 2: list; expected a JSON object"),
        (b'"text"\n', "line 1: str"),
        (b'{"id": "a"}\n{"id": "\xff"}\n', r"line 2: .*not UTF-8"),
        (b'\xef\xbb\xbf{"id": "a"}\n', "line 1: not JSON"),
        (b'{"x": ' + b"9" * 5000 + b"}\n", "line 1: not JSON"),
        (b"[" * 200_000 + b"\n", "line 1: not JSON"),
        (b'{"id": "a"} {"id": "b"}\n', "line 1: not JSON"),
    ],
)
def test_a_line_that_is_no_json_object_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"bad\.jsonl {message}"):
        list(iter_jsonl(path))


def test_line_numbers_count_blank_lines_and_bytes_beyond_the_first_buffer(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_bytes(b'{"a": "' + b"x" * 20_000 + b'"}\r\n   \r\n{"b": 1}\r\n{"c": "\xe9"}\n')
    rows = iter_jsonl(path)
    assert [next(rows)[0], next(rows)] == [1, (3, {"b": 1})]
    with pytest.raises(DataError, match=r"line 4: .* at its byte 7"):
        next(rows)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        list(iter_jsonl(tmp_path / "gone.jsonl"))
    with pytest.raises(DataError, match="is a folder"):
        list(iter_jsonl(tmp_path))


def test_a_stream_is_read_like_a_file_and_named_standard_input() -> None:
    assert list(iter_jsonl(io.StringIO('{"a": 1}\n\n{"a": 2}'))) == [(1, {"a": 1}), (3, {"a": 2})]
    with pytest.raises(DataError, match="standard input line 1"):
        list(iter_jsonl(io.StringIO("{")))


def test_an_empty_file_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n \n")
    assert list(iter_jsonl(tmp_path / "empty.jsonl")) == []


BAD_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"id": None}, "no 'id'"),
    ({"group": None}, "no 'group'"),
    ({"logprobs": None}, "no 'logprobs'"),
    ({"id": 1.5}, "id = 1.5; expected a string"),
    ({"id": True}, "id = True; expected a string"),
    ({"group": ["p"]}, r"group = \['p'\]; expected a string"),
    ({"correct": 1}, "correct = 1; expected true or false"),
    ({"correct": "yes"}, "correct = 'yes'"),
    ({"masked": 0}, "masked = 0"),
    ({"reward": "1"}, "reward = '1'; expected a finite number"),
    ({"reward": True}, "reward = True"),
    ({"reward": math.inf}, "reward = inf"),
    ({"finish_reason": "eos"}, "finish_reason = 'eos'; expected 'stop' or 'length'"),
    ({"finish_reason": []}, r"finish_reason = \[\]"),
    ({"token_ids": [3, -4]}, "token_ids is not a list of token ids"),
    ({"token_ids": [3, 4.0]}, "token_ids is not a list of token ids"),
    ({"token_ids": "34"}, "token_ids is not a list of token ids"),
    ({"prompt_token_ids": [True]}, "prompt_token_ids is not a list of token ids"),
    ({"token_ids": [3]}, "1 token_ids and 2 logprobs"),
    ({"token_ids": []}, "0 token_ids and 2 logprobs"),
    ({"logprobs": []}, "logprobs is empty"),
    ({"logprobs": -1.0}, "logprobs is float"),
    ({"logprobs": [-1.0, None]}, r"logprobs\[1\] = None; expected a finite log-prob"),
    ({"logprobs": [-1.0, "x"]}, r"logprobs\[1\] = 'x'"),
    ({"logprobs": [-1.0, math.nan]}, r"logprobs\[1\] = nan"),
    ({"logprobs": [-1.0, -math.inf]}, r"logprobs\[1\] = -inf"),
    ({"logprobs": [0.5, -1.0]}, r"logprobs\[0\] = 0.5; expected a finite log-prob <= 0"),
    ({"logprobs": [True, -1.0]}, r"logprobs\[0\] = True"),
    ({"logprobs": [-1.0, -(10**400)]}, r"logprobs\[1\] = -10000"),
    ({"teacher_logprobs": [-1.0]}, "1 teacher_logprobs and 2 logprobs"),
    ({"teacher_logprobs": []}, "teacher_logprobs is empty"),
    ({"teacher_logprobs": [-1.0, 2.0]}, r"teacher_logprobs\[1\] = 2.0"),
    ({"loss_mask": [1]}, "1 loss_mask and 2 logprobs"),
    ({"loss_mask": []}, "0 loss_mask and 2 logprobs"),
    ({"loss_mask": [1, 2]}, r"loss_mask = \[1, 2\]; expected a list of 0 and 1"),
    ({"loss_mask": [1, 0.5]}, "expected a list of 0 and 1"),
    ({"loss_mask": "10"}, "expected a list of 0 and 1"),
    ({"text": 3}, "text = 3; expected a string"),
    ({"extracted": 3}, "extracted = 3; expected a string"),
    ({"mask_reason": 3}, "mask_reason = 3; expected a string"),
    ({"step": "3"}, "step = '3'; expected an integer >= 0"),
    ({"sample": -1}, "sample = -1"),
    ({"policy_version": 1.0}, "policy_version = 1.0"),
    ({"sampling": []}, r"sampling = \[\]; expected an object"),
    *(
        ({"teacher_topk": [row, []]}, r"expected lists of \[id, log-prob\] pairs")
        for row in (
            1,
            [1],
            [[1]],
            [[1, -1.0, 2]],
            [[-1, -1.0]],
            [[2**31, -1.0]],
            [[1.0, -1.0]],
            [[1, 0.1]],
            [[1, -1e39]],
        )
    ),
    ({"teacher_topk": [[]]}, "1 teacher_topk and 2 logprobs"),
    ({"policy_versions": [1]}, "expected a list of lists"),
    ({"reinforce": "1"}, "reinforce = '1'"),
    ({"distill": math.nan}, "distill = nan"),
]


@pytest.mark.parametrize(("change", "message"), BAD_FIELDS)
def test_a_wrong_field_is_named_with_file_line_and_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=rf"^f\.jsonl line 7.*{message}"):
        rollout_from_dict({**GOOD, **change}, where="f.jsonl line 7")


@pytest.mark.parametrize("field", ["id", "group", "prompt_token_ids", "token_ids", "logprobs"])
def test_a_missing_field_is_named_and_asked_for_only_where_required(field: str) -> None:
    row = {key: value for key, value in GOOD.items() if key != field}
    with pytest.raises(DataError, match=f"no '{field}'; expected the fields id, group"):
        rollout_from_dict(row, where="f line 1")
    if field.endswith("token_ids"):
        read = rollout_from_dict(row, where="f line 1", required=("id", "group", "logprobs"))
        assert getattr(read, field) == []


def test_whole_numbers_serve_as_names_and_as_logprobs_and_unknown_keys_are_left_aside() -> None:
    read = rollout_from_dict({**GOOD, "id": 5, "group": 7, "logprobs": [0, -1], "advantages": [1, 2]}, where="f line 1")
    assert (read.id, read.group, read.logprobs) == ("5", "7", [0, -1])


def test_null_is_absence() -> None:
    row = {**GOOD, "correct": None, "reward": None, "teacher_logprobs": None, "loss_mask": None, "finish_reason": None}
    assert rollout_from_dict(row, where="f") == rollout_from_dict(GOOD, where="f")


def test_a_logprob_a_hair_above_zero_is_the_rounding_of_an_engine() -> None:
    assert rollout_from_dict({**GOOD, "logprobs": [1e-6, -1.0]}, where="f").logprobs == [1e-6, -1.0]
    with pytest.raises(DataError, match=r"0\.01"):
        rollout_from_dict({**GOOD, "logprobs": [0.01, -1.0]}, where="f")
