"""Laws of addresses, keys, waits and answers."""

from __future__ import annotations

import copy
import json
import math
import pickle
import random
import traceback
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from typing import Any

import httpx
import pytest

from scope_opd.addresses import check_variable_name, looks_like_a_key, parse_base_url
from scope_opd.errors import ConfigError
from scope_opd.serving import vllm
from scope_opd.serving.faults import BadAnswer, retry_after_s
from scope_opd.serving.secrets import BearerAuth, Secret, load_secret, redact
from scope_opd.types import SamplingParams, TopK

KEY = "sk-abcdefgh-12345678"

URLS = {
    "http://teacher:8000/v1": "http://teacher:8000/v1",
    "http://teacher:8000/v1/": "http://teacher:8000/v1",
    "http://Teacher:8000": "http://teacher:8000/v1",
    "https://api.example.com/pool//a/v1": "https://api.example.com/pool/a/v1",
    "https://api.example.com:443/v1": "https://api.example.com/v1",
    "http://[::1]:8000/v1": "http://[::1]:8000/v1",
    "http://[FD00:0:0::7]": "http://[fd00::7]/v1",
    "http://127.0.0.1:80/v1": "http://127.0.0.1/v1",
    " http://localhost:1 ": "http://localhost:1/v1",
    "http://bücher.example/v1": "http://xn--bcher-kva.example/v1",
}


@pytest.mark.parametrize(("given", "expected"), URLS.items())
def test_addresses_are_normalised(given: str, expected: str) -> None:
    found = parse_base_url(given)
    assert found.text == expected
    assert parse_base_url(found.text) == found


def test_loopback_and_root_are_known() -> None:
    assert [parse_base_url(url).loopback for url in ("http://127.0.0.9", "http://[::1]", "http://localhost:8000")] == [
        True
    ] * 3
    assert not any(
        parse_base_url(url).loopback for url in ("http://10.0.0.1", "http://teacher", "http://127.example.com")
    )
    assert parse_base_url("http://h/pool/v1").root == "http://h/pool"
    assert parse_base_url("http://h/pool").root == "http://h/pool"


@pytest.mark.parametrize(
    "text",
    ["", "teacher:8000", "ftp://h", "http://", "http://h:99999", "http://h:0", "http://h/v1?x=1", "http://h/#a",
     "http://[::1", "http://h:x/v1", "http://a b/v1", "http://h/../v1", "http://h\n/v1"],
)  # fmt: skip
def test_what_is_no_address_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        parse_base_url(text)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("text", [f"http://user:{KEY}@h/v1", f"http://{KEY}@h/v1", f"http://user:{KEY}@h:x/v1"])
def test_credentials_in_an_address_are_refused_and_not_repeated(text: str) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        parse_base_url(text)
    assert KEY not in str(error.value)


def test_a_secret_never_shows_itself() -> None:
    secret = Secret(KEY)
    shown = [
        repr(secret),
        str(secret),
        f"{secret}",
        f"{secret:>40}",
        repr([secret]),
        repr({"k": secret}),
    ]
    try:
        raise ValueError(f"with {secret}")
    except ValueError:
        shown.append(traceback.format_exc())
    assert not any(KEY in text for text in shown)
    for leak in (pickle.dumps, copy.deepcopy, json.dumps):
        with pytest.raises(TypeError):
            leak(secret)
    assert secret.reveal() == KEY
    assert not hasattr(secret, "__dict__")


def test_a_request_shows_no_key() -> None:
    request = httpx.Request("POST", "http://h/v1")
    flow = BearerAuth(Secret(KEY)).auth_flow(request)
    next(flow)
    assert request.headers["Authorization"] == f"Bearer {KEY}"
    assert KEY not in repr(request) + repr(request.headers) + repr(BearerAuth(Secret(KEY)).__dict__)


def test_keys_come_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHER_KEY", f" {KEY}\n")
    found = load_secret(env="TEACHER_KEY", file=None, setting="teacher.api_key")
    assert found is not None
    assert found.reveal() == KEY
    (tmp_path / "key").write_text(f"{KEY}\n")
    found = load_secret(env=None, file=str(tmp_path / "key"), setting="teacher.api_key")
    assert found is not None
    assert found.reveal() == KEY
    assert load_secret(env=None, file=None, setting="teacher.api_key") is None


def test_a_missing_or_broken_key_is_one_line_without_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TWO_LINES", f"{KEY}\n{KEY}")
    monkeypatch.setenv("NOTHING", "  ")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    for env, file in (("ABSENT", None), ("TWO_LINES", None), ("NOTHING", None), (None, str(tmp_path / "absent")),
                      (None, str(tmp_path / "binary")), ("A", "b")):  # fmt: skip
        with pytest.raises(ConfigError, match=r"teacher\.api_key") as error:
            load_secret(env=env, file=file, setting="teacher.api_key")
        assert KEY not in str(error.value)
        assert "\n" not in str(error.value)


def test_a_key_in_place_of_a_name_is_refused_and_not_repeated() -> None:
    for text in (KEY, "hf_abcdefghijkl", "0123456789abcdef01234567", "a b"):
        with pytest.raises(ValueError, match="not the name") as error:
            check_variable_name(text, "teacher.api_key_env")
        assert text not in str(error.value)
    assert check_variable_name("TEACHER_API_KEY", "x") == "TEACHER_API_KEY"
    assert not looks_like_a_key("/run/secrets/teacher")


def test_redaction_takes_the_key_out_of_any_text() -> None:
    said = f"Incorrect API key provided: {KEY}.\nSee Bearer {KEY}"
    assert KEY not in redact(said, [None, Secret(KEY)])
    assert "\n" not in redact(said, [])
    assert len(redact("x" * 5000, [])) <= 300


def test_retry_after_is_read_as_seconds_and_as_a_date() -> None:
    now = datetime(2026, 5, 4, 3, 2, 1, tzinfo=UTC)
    assert retry_after_s("7") == 7.0
    assert retry_after_s(" 0 ") == 0.0
    assert retry_after_s(format_datetime(now + timedelta(seconds=90), usegmt=True), now) == 90.0
    assert retry_after_s(format_datetime(now - timedelta(seconds=90), usegmt=True), now) == 0.0
    assert [retry_after_s(value) for value in (None, "", "soon", "-3", "1.5")] == [None] * 5


REQUEST = vllm.ScoreRequest((5, 6, 7, 8), 2, top_k=0)


def answer(**changes: Any) -> dict[str, Any]:
    rows = [
        None,
        {"6": {"logprob": -9999.0}},
        {"7": {"logprob": -1.5}},
        {"9": {"logprob": -0.5}, "8": {"logprob": 1e-4}},
    ]
    return {"choices": [{"prompt_token_ids": [5, 6, 7, 8], "prompt_logprobs": rows, **changes}]}


def parsed(value: Any, request: vllm.ScoreRequest = REQUEST) -> vllm.Scored:
    return vllm.parse_score(value if isinstance(value, bytes) else json.dumps(value).encode(), request)


def test_a_good_answer_gives_the_responses_log_probs_by_id() -> None:
    assert parsed(answer()).logprobs == [-1.5, 0.0]  # the prompt's own -inf is nobody's business; 1e-4 is rounding


def test_top_k_keeps_the_likeliest_whatever_their_order() -> None:
    request = vllm.ScoreRequest((5, 6), 1, top_k=2)
    row = {"9": {"logprob": -9.0}, "6": {"logprob": -4.0}, "3": {"logprob": -1.0}}
    for order in (list(row), list(row)[::-1]):
        choice = {"prompt_token_ids": [5, 6], "prompt_logprobs": [None, {key: row[key] for key in order}]}
        found = parsed({"choices": [choice]}, request)
        assert found.top == TopK.of([[(3, -1.0), (6, -4.0)]])
        assert found.logprobs == [-4.0]
    none = {"6": {"logprob": -4.0}, "7": {"logprob": -9999.0}}
    found = parsed({"choices": [{"prompt_token_ids": [5, 6], "prompt_logprobs": [None, none]}]}, request)
    assert found.top == TopK.of([[(6, -4.0)]])  # what has no mass is no entry


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"9": {"logprob": -0.1}, "6": {"logprob": -0.1}, "3": {"logprob": -0.2}}, "add up to more than 1"),
        ({"6": {"logprob": -4.0}}, "1 entries at 1 where top_k is 2"),
        ({"6": {"logprob": -4.0}, "-3": {"logprob": -1.0}}, "no token id"),
        ({"6": {"logprob": -4.0}, "2147483648": {"logprob": -1.0}}, "no token id"),
        ({"6": {"logprob": -4.0}, "9" * 5000: {"logprob": -1.0}}, "no token id"),
        ({"6": {"logprob": -4.0}, "3": {"logprob": 0.5}}, "log-prob 0.5"),
        ({"6": {"logprob": -4.0}, "3": {"logprob": None}}, "log-prob None"),
        ({"3": {"logprob": -4.0}, "4": {"logprob": -1.0}}, "is not among those"),
    ],
)  # fmt: skip
def test_a_row_of_likeliest_tokens_that_cannot_be_one_is_a_bad_answer(row: dict[str, Any], message: str) -> None:
    request = vllm.ScoreRequest((5, 6), 1, top_k=2)
    with pytest.raises(BadAnswer, match=message):
        parsed({"choices": [{"prompt_token_ids": [5, 6], "prompt_logprobs": [None, row]}]}, request)


BAD: dict[str, Any] = {
    "not json": b"{",
    "not utf-8": b"\xff{}",
    "deep": b"[" * 100_000,
    "list": [],
    "no choices": {},
    "two choices": {"choices": [answer()["choices"][0]] * 2},
    "no echo": answer(prompt_token_ids=None),
    "other tokens": answer(prompt_token_ids=[5, 6, 7, 9]),
    "shorter": answer(prompt_token_ids=[5, 6, 7]),
    "floats for ids": answer(prompt_token_ids=["5", "6", "7", "8"]),
    "no rows": answer(prompt_logprobs=None),
    "rows missing": answer(prompt_logprobs=answer()["choices"][0]["prompt_logprobs"][:3]),
    "row is null": answer(prompt_logprobs=[None, None, None, None]),
    "NaN": json.dumps(answer()).replace("-1.5", "NaN").encode(),
    "Infinity": json.dumps(answer()).replace("-1.5", "-Infinity").encode(),
    "huge": json.dumps(answer()).replace("-1.5", "-1e999").encode(),
    **{
        f"value {value!r}": answer(prompt_logprobs=[None, {}, {"7": {"logprob": value}}, {"8": {"logprob": -1.0}}])
        for value in (-9999.0, -1000.0, 0.5, None, "-1.5", True, [], 10**400)
    },
    "entry is a number": answer(prompt_logprobs=[None, {}, {"7": -1.5}, {"8": -1.0}]),
    "token missing": answer(prompt_logprobs=[None, {}, {"77": {"logprob": -1.5}}, {"8": {"logprob": -1.0}}]),
}


@pytest.mark.parametrize("name", BAD)
def test_an_answer_that_is_not_as_it_must_be_is_a_failure(name: str) -> None:
    with pytest.raises(BadAnswer):
        parsed(BAD[name])


def test_no_mutilated_answer_gives_a_wrong_number() -> None:
    """Random damage to the bytes of an answer: it fails, or gives log-probs that it holds."""
    draw = random.Random(0)
    body = json.dumps(answer()).encode()
    for _ in range(3000):
        damaged = bytearray(body)
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(damaged))
            if draw.random() < 0.5:
                del damaged[place]
            else:
                damaged[place] = draw.randrange(256)
        try:
            found = parsed(bytes(damaged))
        except BadAnswer:
            continue
        assert len(found.logprobs) == 2
        assert all(math.isfinite(value) and -1000 < value <= 0 for value in found.logprobs)


def test_a_sampled_response_is_checked() -> None:
    params = SamplingParams(n=1, temperature=1.0, max_tokens=3, stop_token_ids=(1,), seed=0)
    good = {
        "prompt_token_ids": [5, 6], "token_ids": [7, 1], "finish_reason": "stop", "text": "a",
        "logprobs": {"token_logprobs": [-1.0, -2.0]},
    }  # fmt: skip
    found = vllm.parse_sample(json.dumps({"choices": [good]}).encode(), [5, 6], params)
    assert (found.token_ids, found.logprobs, found.finish_reason) == ([7, 1], [-1.0, -2.0], "stop")
    for change in ({"token_ids": []}, {"token_ids": [7] * 4}, {"logprobs": None}, {"finish_reason": "abort"},
                   {"logprobs": {"token_logprobs": [-1.0]}}, {"token_ids": ["7", "1"]}, {"text": None},
                   {"logprobs": {"token_logprobs": [-1.0, -9999.0]}}, {"prompt_token_ids": [5]}):  # fmt: skip
        with pytest.raises(BadAnswer):
            vllm.parse_sample(json.dumps({"choices": [{**good, **change}]}).encode(), [5, 6], params)
