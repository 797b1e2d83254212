"""Laws of ``scope doctor`` for runs with servers: each mistake is found, named with its remedy, and hides no other."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from fault_server import MODEL, FaultServer, Table, servers
from scope_opd.addresses import BaseUrl
from scope_opd.cli import doctor as doctor_module
from scope_opd.cli.checks import Finding
from scope_opd.cli.doctor import diagnose
from scope_opd.cli.doctor_asks import declared_defaults
from scope_opd.cli.engines import build_engines
from scope_opd.cli.main import main
from scope_opd.cli.templates import compare_prompts
from scope_opd.config import Config, load_config, validate_config
from scope_opd.data.rows import Row
from scope_opd.errors import ScopeError
from tiny import save_pair, tiny_model, tiny_tokenizer

KEY = "sk-a-secret-key-1234567890"


class Sampler(FaultServer):
    """Draws as vLLM does, too.

    Attributes:
        raw: report log-probs of the model at temperature 1.
        defaults: sampling parameters for requests that name none.
        max_logprobs: more prompt log-probs are refused with 400, as vLLM does.
        same_seed_same_tokens: False makes every draw another.
    """

    raw = False
    defaults: ClassVar[dict[str, float]] = {}
    max_logprobs = 20
    same_seed_same_tokens = True
    draws = 0

    async def _answer(self, method: str, path: str, headers: Any, body: bytes, writer: Any) -> bool:
        if self.development and path == f"{self.prefix}/weight_info":
            self.paths[path] += 1
            return await self._send(writer, 200, {"weight_version": "default"})
        if method == "POST" and json.loads(body).get("prompt_logprobs", -1) > self.max_logprobs:
            self.paths[path] += 1
            return await self._error(writer, 400, f"Requested logprobs exceed max_logprobs {self.max_logprobs}")
        return await super()._answer(method, path, headers, body, writer)

    def _completion(self, request: dict[str, Any], fault: str | None) -> dict[str, Any]:
        if "prompt_logprobs" in request:
            return super()._completion(request, fault)
        self.draws += 1
        asked = {"temperature": 1.0, "top_k": 0, **self.defaults, **request}
        draw = random.Random(request["seed"] if self.same_seed_same_tokens else self.draws)
        ids, values = list(request["prompt"]), []
        for _ in range(request["max_tokens"]):
            with torch.no_grad():
                logits = self.table.model(input_ids=torch.tensor([ids])).logits[0, -1].double()
            shaped = logits / asked["temperature"]
            if allowed := asked.get("allowed_token_ids"):
                shaped[[token for token in range(len(shaped)) if token not in allowed]] = -torch.inf
            if asked["top_k"]:
                shaped[shaped < shaped.topk(int(asked["top_k"])).values[-1]] = -torch.inf
            token = draw.choices(range(len(shaped)), shaped.softmax(-1).tolist())[0]
            values.append(float((logits if self.raw else shaped).log_softmax(-1)[token]))
            ids.append(token)
        size = len(request["prompt"])
        choice = {
            "index": 0, "text": "x", "finish_reason": "length", "token_ids": ids[size:],
            "prompt_token_ids": ids[:size], "logprobs": {"token_logprobs": values},
        }  # fmt: skip
        return {"id": "cmpl", "model": self.model, "choices": [choice]}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder / "student", "qwen3", seed=1)
    save_pair(folder / "teacher", "llama", seed=2)
    rows = [{"id": f"p{i}", "problem": f"What is {i} + {i + 1}?", "answer": 2 * i + 1} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def teacher_table() -> Table:
    return Table(tiny_model("llama", seed=2))


@pytest.fixture(scope="module")
def student_table() -> Table:
    return Table(tiny_model("qwen3", seed=1))


@pytest.fixture
def both(student_table: Table, teacher_table: Table) -> Iterator[tuple[FaultServer, Sampler]]:
    """A teacher and a sampler without a fault."""
    with servers(FaultServer(teacher_table), Sampler(student_table, development=True)) as (teacher, sampler):
        assert isinstance(sampler, Sampler)
        yield teacher, sampler


def configured(pair: Path, folder: Path, *more: str, teacher: tuple[str, ...] = (), sampler: str = "") -> Config:
    options = [
        f"model.path={pair / 'student'}", f"data.train={pair / 'rows.jsonl'}", "rollout.max_tokens=6",
        "rollout.temperature=0.7", "objective.temperature=released", "train.prompts_per_step=2", "train.device=cpu",
        "rollout.connect_timeout_s=1", "teacher.connect_timeout_s=1", f"run.dir={folder / 'run'}",
    ]  # fmt: skip
    if teacher:
        listed = ", ".join(f'"{url}"' for url in teacher)
        options += [f"teacher.base_urls=[{listed}]", f"teacher.model={MODEL}", f"teacher.path={pair / 'teacher'}"]
    if sampler:
        options += [f'rollout.base_urls=["{sampler}"]', f"rollout.model={MODEL}"]
    return load_config(None, [*options, *more])


def found(config: Config) -> dict[str, Finding]:
    """Findings that are about servers, by subject; of several with one subject the worst."""
    listed: dict[str, Finding] = {}
    order = ("ok", "warn", "FAIL")
    for finding in diagnose(config, "x"):
        other = listed.get(finding.subject)
        if other is None or order.index(finding.level) > order.index(other.level):
            listed[finding.subject] = finding
    return listed


def levels(findings: dict[str, Finding], level: str) -> set[str]:
    return {subject for subject, finding in findings.items() if finding.level == level}


def test_sound_servers_are_ok_in_every_respect(pair: Path, both: tuple[FaultServer, Sampler], tmp_path: Path) -> None:
    teacher, sampler = both
    findings = found(configured(pair, tmp_path, teacher=(teacher.url,), sampler=sampler.url))
    assert levels(findings, "FAIL") == levels(findings, "warn") == set()
    for check in ("server", "model name", "context", "log-probs", "numbers"):
        assert {f"teacher: {check}", f"sampler: {check}"} <= findings.keys()
    assert {"sampler: logprobs mode", "sampler: defaults", "sampler: routes"} <= findings.keys()
    assert {"tokenizers", "end tokens", "chat template"} <= findings.keys()
    assert "neutral" in findings["sampler: defaults"].found
    assert sampler.bodies[0]["prompt_logprobs"] == 0


# Each: what is done to the servers and the config, which finding it must give, and words of it.
Change = Callable[[Any, Any], list[str]]


def does(*options: str, **attributes: Any) -> Change:
    def change(teacher: Any, sampler: Any) -> list[str]:
        for name, value in attributes.items():
            which, _, what = name.partition("_")
            setattr({"t": teacher, "s": sampler}[which], what, value)
        return list(options)

    return change


MISTAKES: dict[str, tuple[Change, str, str, str]] = {
    "teacher wants a key": (does(t_key=KEY), "teacher: key", "FAIL", "it wants a key, none is set"),
    "sampler wants a key": (does(s_key=KEY), "sampler: key", "FAIL", "set rollout.api_key_env"),
    "teacher name": (does("teacher.model=other"), "teacher: model name", "FAIL", "serves 'teacher' and teacher.model"),
    "sampler name": (does("rollout.model=other"), "sampler: model name", "FAIL", "--served-model-name other"),
    "teacher context": (
        does("rollout.max_tokens=200", t_context=100), "teacher: context", "FAIL", "100 tokens, and the run needs",
    ),
    "sampler context": (
        does("rollout.max_tokens=200", s_context=100), "sampler: context", "FAIL", "--max-model-len",
    ),
    "path": (
        lambda teacher, sampler: [f'teacher.base_urls=["{teacher.url[:-3]}/other"]'], "teacher: server", "FAIL",
        "answers 404",
    ),
    "redirect": (does(t_redirect="http://127.0.0.1:9/v1"), "teacher: server", "FAIL", "no redirect"),
    "development": (does(s_development=False), "sampler: routes", "FAIL", "VLLM_SERVER_DEV_MODE=1"),
    "raw log-probs": (does(s_raw=True), "sampler: logprobs mode", "FAIL", "processed_logprobs"),
    "max-logprobs": (does(s_max_logprobs=-1), "sampler: log-probs", "FAIL", "larger --max-logprobs"),
    "likeliest tokens": (
        does("objective.distill=topk_reverse_kl", "objective.topk=30", t_max_likeliest=20),
        "teacher: log-probs", "FAIL", "--max-logprobs 30",
    ),
    "defaults": (does(s_defaults={"temperature": 0.2, "top_k": 1}), "sampler: defaults", "ok", "not neutral"),
    "nondeterminism": (does(s_same_seed_same_tokens=False), "sampler: defaults", "ok", "cannot be told"),
    "other teacher": (
        does(t_table=Table(tiny_model("llama", seed=8))), "teacher: numbers", "FAIL", "nats a token apart",
    ),
    "other student": (
        does(s_table=Table(tiny_model("qwen3", seed=9))), "sampler: numbers", "warn", "the first sync replaces them",
    ),
    "served temperature": (
        does("teacher.served_temperature=0.7", "objective.temperature=matched"), "teacher: numbers", "FAIL",
        "at temperature 0.7",
    ),
    "bad answers": (does(t_plan=lambda: "positive"), "teacher: log-probs", "FAIL", "no usable answer"),
    "key variable": (does("teacher.api_key_env=NO_SUCH_KEY"), "teacher: key", "FAIL", "the variable is not set"),
    "certificates": (does("rollout.ca_bundle=/no/such.pem"), "rollout", "FAIL", "ca_bundle"),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_finding_and_hides_nothing_of_the_other_server(
    name: str, pair: Path, both: tuple[FaultServer, Sampler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("scope_opd.cli.doctor_asks.PATIENCE_S", 0.3)
    change, subject, level, words = MISTAKES[name]
    options = change(*both)
    findings = found(configured(pair, tmp_path, *options, teacher=(both[0].url,), sampler=both[1].url))
    assert findings[subject].level == level
    assert words in str(findings[subject])
    if level != "ok":
        assert levels(findings, "FAIL") | levels(findings, "warn") == {subject}
        assert findings[subject].remedy
    other = "sampler" if subject.startswith("teacher") else "teacher"
    assert findings[f"{other}: numbers"].level == "ok"


def test_a_wrong_key_names_its_variable_and_shows_itself_nowhere(
    pair: Path, both: tuple[FaultServer, Sampler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    both[0].key = "another"
    findings = found(
        configured(pair, tmp_path, "teacher.api_key_env=TEACHER_KEY", teacher=(both[0].url,), sampler=both[1].url)
    )
    finding = findings["teacher: key"]
    assert finding.level == "FAIL"
    assert "environment variable TEACHER_KEY (teacher.api_key_env)" in finding.found
    both[0].key = KEY
    again = found(configured(pair, tmp_path, "teacher.api_key_env=TEACHER_KEY", teacher=(both[0].url,)))
    assert again["teacher: key"].level == "ok"
    assert not any(KEY in str(each) for each in (*findings.values(), *again.values()))


def test_a_dead_server_hides_no_other_and_exit_code_is_1(
    pair: Path, both: tuple[FaultServer, Sampler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr("scope_opd.cli.doctor_asks.PATIENCE_S", 0.3)
    monkeypatch.setenv("COLUMNS", "100")
    config = configured(pair, tmp_path, teacher=("http://127.0.0.1:9/v1", both[0].url), sampler=both[1].url)
    listed = list(diagnose(config, "x"))
    dead = [finding for finding in listed if finding.level == "FAIL"]
    assert [finding.subject for finding in dead] == ["teacher: server"]
    assert "http://127.0.0.1:9/v1: no answer" in dead[0].found
    assert "scope serve teacher" in dead[0].remedy
    assert {"teacher: numbers", "sampler: numbers"} <= {finding.subject for finding in listed if finding.level == "ok"}
    words = ["doctor", *(word for table, values in config.model_dump(exclude_none=True).items()
                         if table in ("model", "data") for key, value in values.items()
                         if key in ("path", "train") for word in ("--set", f"{table}.{key}={value}"))]  # fmt: skip
    words += ["--set", 'teacher.base_urls=["http://127.0.0.1:9/v1"]', "--set", f"teacher.model={MODEL}"]
    words += ["--set", "rollout.max_tokens=6", "--set", "train.prompts_per_step=2"]
    words += ["--set", "objective.temperature=released", "--set", f"run.dir={tmp_path / 'run'}"]
    assert main(words) == 1
    told = capsys.readouterr().out
    assert "no answer" in told
    assert "teacher.tokenizer" in told


def test_servers_of_different_weights_are_no_pool(
    pair: Path, both: tuple[FaultServer, Sampler], tmp_path: Path
) -> None:
    with FaultServer(Table(tiny_model("llama", seed=8))) as second:
        findings = found(configured(pair, tmp_path, teacher=(both[0].url, second.url)))
    assert findings["teacher: weights"].level == "FAIL"
    assert both[0].url in findings["teacher: weights"].found


def test_routes_are_visited_each_by_its_own_settings(
    pair: Path, both: tuple[FaultServer, Sampler], tmp_path: Path
) -> None:
    with FaultServer(both[0].table, model="two", key=KEY) as second:
        routes = [
            "teacher.route_by=source", f'teacher.routes.math={{base_urls = ["{both[0].url}"], model = "{MODEL}"}}',
            f'teacher.routes.code={{base_urls = ["{second.url}"], model = "two"}}',
        ]  # fmt: skip
        findings = found(configured(pair, tmp_path, *routes))
    assert findings["teacher math: log-probs"].level == "ok"
    assert "set teacher.routes.code.api_key_env" in findings["teacher code: key"].remedy


@pytest.mark.parametrize("allowed", [False, True])
def test_development_routes_that_others_reach_are_refused_unless_allowed(
    allowed: bool, pair: Path, both: tuple[FaultServer, Sampler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two addresses of this machine only one can be had everywhere: the other is told to be no loopback."""
    both[0].development = True
    monkeypatch.setattr(
        "scope_opd.cli.doctor_servers.parse_base_url",
        lambda url: BaseUrl(url, url.removesuffix("/v1"), loopback=False),
    )
    more = [f"teacher.allow_unprotected_routes={str(allowed).lower()}"]
    findings = found(configured(pair, tmp_path, *more, teacher=(both[0].url,), sampler=both[1].url))
    assert findings["teacher: routes"].level == ("warn" if allowed else "FAIL")
    assert findings["sampler: routes"].level == "FAIL"
    assert "rollout.allow_unprotected_routes" in findings["sampler: routes"].remedy


class TestTeacherIsStudent:
    @pytest.mark.parametrize("convention", ["matched", "raw", "released"])
    def test_in_process_its_kl_is_0(self, convention: str, pair: Path, tmp_path: Path) -> None:
        config = configured(pair, tmp_path, f"teacher.path={pair / 'student'}", f"objective.temperature={convention}")
        finding = found(config)["teacher = student"]
        assert finding.level == "ok"
        assert ("not compared" if convention == "released" else "KL ") in finding.found

    def test_behind_a_server_its_kl_is_0(
        self, pair: Path, both: tuple[FaultServer, Sampler], student_table: Table, tmp_path: Path
    ) -> None:
        both[0].table = student_table
        more = (f"teacher.path={pair / 'student'}", "rollout.temperature=1.0")
        config = configured(pair, tmp_path, *more, teacher=(both[0].url,))
        assert found(config)["teacher = student"].level == "ok"
        both[0].table = Table(tiny_model("qwen3", seed=9))
        assert found(config)["teacher = student"].level == "FAIL"

    def test_another_teacher_is_not_compared(self, pair: Path, tmp_path: Path) -> None:
        assert "teacher = student" not in found(configured(pair, tmp_path, f"teacher.path={pair / 'teacher'}"))


class TestChatTemplate:
    def rows(self) -> list[Row]:
        return [Row("r", "Add 3 and 4", 7, "line 1")]

    def test_the_first_difference_is_shown(self) -> None:
        config, ours, theirs = validate_config({}), tiny_tokenizer(), tiny_tokenizer()
        assert compare_prompts(config, self.rows(), ours, theirs).level == "ok"
        theirs.chat_template = str(ours.chat_template).replace("assistant: ", "assistant: <think>")
        finding = compare_prompts(config, self.rows(), ours, theirs)
        assert finding.level == "warn"
        assert "4\\nassistant: '" in finding.found
        assert "4\\nassistant: <think>'" in finding.found

    def test_a_teacher_without_one_or_with_one_that_fails_is_warned_of(self) -> None:
        config, ours, theirs = validate_config({}), tiny_tokenizer(), tiny_tokenizer()
        theirs.chat_template = None
        assert "has none" in compare_prompts(config, self.rows(), ours, theirs).found
        bare = validate_config({"chat": {"template": "none"}})
        assert compare_prompts(bare, self.rows(), ours, theirs).level == "ok"
        theirs.chat_template = "{{ raise_exception('no') }}"
        assert "cannot be compared" in compare_prompts(config, self.rows(), ours, theirs).found

    def test_training_warns_of_it_too(self, pair: Path, tmp_path: Path) -> None:
        folder = save_pair(tmp_path / "teacher", "llama", seed=2)
        tokenizer = tiny_tokenizer()
        tokenizer.chat_template = str(tokenizer.chat_template).replace("assistant: ", "assistant: <think>")
        tokenizer.save_pretrained(folder)
        built = build_engines(configured(pair, tmp_path, f"teacher.path={folder}"))
        built.close()
        assert [line for line in built.warnings if line.startswith("chat template")]


def test_what_a_checkpoint_declares_is_shown(pair: Path, both: tuple[FaultServer, Sampler], tmp_path: Path) -> None:
    folder = save_pair(tmp_path / "student", "qwen3", seed=1)
    plain = json.loads((folder / "generation_config.json").read_text())
    assert declared_defaults(str(folder)) == {}
    (folder / "generation_config.json").write_text(json.dumps({**plain, "temperature": 0.6, "top_p": 1.0, "top_k": 20}))
    assert declared_defaults(str(folder)) == {"temperature": 0.6, "top_k": 20}
    both[1].defaults = {"temperature": 0.6, "top_k": 20}
    config = configured(pair, tmp_path, f"model.path={folder}", sampler=both[1].url)
    assert "temperature 0.6, top_k 20" in found(config)["sampler: defaults"].found


def test_large_models_are_not_loaded_for_it(
    pair: Path, both: tuple[FaultServer, Sampler], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor_module, "LOAD_LIMIT", 10)
    findings = found(configured(pair, tmp_path, teacher=(both[0].url,), sampler=both[1].url))
    assert not {"teacher: numbers", "sampler: numbers"} & findings.keys()
    assert findings["teacher: log-probs"].level == findings["sampler: log-probs"].level == "ok"


@pytest.mark.parametrize(("change", "words"), [
    (does(s_raw=True), "processed_logprobs"), (does(s_development=False), "VLLM_SERVER_DEV_MODE"),
    (does(s_key=KEY), "rollout.api_key_env"), (does("rollout.model=other"), "serves 'teacher'"),
    (does("rollout.max_tokens=200", s_context=100), "together at most 100, the context of the sampling servers"),
    (does("objective.end_token=map", "teacher.path=zoo:teacher"), "teacher.tokenizer"),
])  # fmt: skip
def test_training_finds_the_same_before_its_first_step(
    change: Change, words: str, pair: Path, both: tuple[FaultServer, Sampler], tmp_path: Path
) -> None:
    options = change(*both)
    config = configured(pair, tmp_path, *options, teacher=(both[0].url,), sampler=both[1].url)
    with pytest.raises(ScopeError, match=re.escape(words)) as error:
        build_engines(config)
    assert error.value.exit_code == 2


def test_training_asks_a_sound_sampler_twice_and_a_teacher_once(
    pair: Path, both: tuple[FaultServer, Sampler], tmp_path: Path
) -> None:
    """Besides GET /models: a fingerprint, which log-probs are reported, and what the weights are called."""
    build_engines(configured(pair, tmp_path, teacher=(both[0].url,), sampler=both[1].url)).close()
    assert both[0].paths == {"/v1/models": 1, "/v1/completions": 1}
    assert both[1].paths == {"/v1/models": 1, "/v1/completions": 1, "/weight_info": 1}
