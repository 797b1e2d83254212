"""Laws of a run whose teacher is behind servers: it trains as with the same teacher in process, or it stops."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

from fault_server import FAULTS, MODEL, FaultServer, Table, at_random, servers
from scope_opd.cli.engines import build_engines
from scope_opd.cli.main import main
from scope_opd.config import Config, load_config
from scope_opd.errors import ConfigError, RunFailed, ScopeError
from scope_opd.teacher.pool import PoolTeacher
from scope_opd.train.loop import train
from tiny import save_pair, tiny_model
from train_kit import lasting

KEY = "sk-a-secret-key-1234567890"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder / "student", "qwen3", seed=1)
    save_pair(folder / "teacher", "llama", seed=2)
    rows = [{"id": f"p{i}", "problem": f"What is {i} + {i + 1}?", "answer": 2 * i + 1, "source": "ab"[i % 2]}
            for i in range(6)]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def table(pair: Path) -> Table:
    return Table(AutoModelForCausalLM.from_pretrained(pair / "teacher").eval())


def configured(pair: Path, folder: Path, *more: str) -> Config:
    return load_config(
        None,
        [
            f"model.path={pair / 'student'}", f"teacher.path={pair / 'teacher'}", f"data.train={pair / 'rows.jsonl'}",
            "rollout.n=3", "rollout.max_tokens=6", "rollout.temperature=1.0", "train.prompts_per_step=2",
            "train.steps=3", "train.lr=1e-2", "train.device=cpu", "objective.truncated=incorrect", "run.export=false",
            "run.rollouts_logged=1000", "run.alarms.uniform_weights=off", "run.alarms.truncation=off",
            "run.checkpoint_every=0", f"run.dir={folder}", *more,
        ],
    )  # fmt: skip


def served(*urls: str, more: tuple[str, ...] = ()) -> tuple[str, ...]:
    listed = ", ".join(f'"{url}"' for url in urls)
    return (f"teacher.base_urls=[{listed}]", f"teacher.model={MODEL}", *more)


def run(config: Config, *, resume: bool = False) -> list[dict[str, Any]]:
    built = build_engines(config)
    try:
        train(config, built.engines, resume=resume, progress=False)
    finally:
        built.close()
    return [json.loads(line) for line in (Path(config.run.dir) / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def in_process(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return lasting(run(configured(pair, tmp_path_factory.mktemp("run") / "local")))


def nearly(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> bool:
    assert len(found) == len(expected)
    for one, other in zip(lasting(found), expected, strict=True):
        for key, value in other.items():
            if key == "padding/share":  # of micro-batches that depend on which groups were complete first
                continue
            same = one[key] == value if value is None else one[key] == pytest.approx(value, rel=1e-3, abs=1e-4)
            assert same, (key, one[key], value)
    return True


def test_a_run_with_servers_is_the_run_with_that_teacher_in_process(
    pair: Path, table: Table, in_process: list[dict[str, Any]], tmp_path: Path
) -> None:
    with FaultServer(table) as server:
        rows = run(configured(pair, tmp_path / "run", *served(server.url)))
    assert nearly(rows, in_process)
    assert sum(row["teacher/scored_rollouts"] for row in rows) > 0
    ledger = [json.loads(line) for line in (tmp_path / "run" / "teacher.jsonl").read_text().splitlines()]
    assert sum("id" in row for row in ledger) == sum(row["teacher/scored_rollouts"] for row in rows)


@pytest.mark.parametrize("kind", ["topk_reverse_kl", "topk_forward_kl"])
def test_a_run_with_the_rows_of_servers_is_the_run_with_that_teachers_own(
    kind: str, pair: Path, table: Table, tmp_path: Path
) -> None:
    more = (f"objective.distill={kind}", "objective.topk=16", "train.steps=2")
    expected = run(configured(pair, tmp_path / "local", *more))
    with FaultServer(table) as server:
        rows = run(configured(pair, tmp_path / "run", *served(server.url), *more))
        assert {body["prompt_logprobs"] for body in server.bodies} == {16}
    assert nearly(rows, lasting(expected))
    logged = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert any(row["teacher_logprobs"] for row in logged)
    assert not any(row["teacher_topk"] for row in logged)  # many times the rest


def test_random_faults_leave_the_loss_as_it_is(
    pair: Path, table: Table, in_process: list[dict[str, Any]], tmp_path: Path
) -> None:
    kinds = [fault for fault in FAULTS if fault not in ("slow", "429_later")]
    left, right = FaultServer(table, at_random(0.3, kinds, 1)), FaultServer(table, at_random(0.3, kinds, 2))
    with servers(left, right):
        rows = run(configured(pair, tmp_path / "run", *served(left.url, right.url)))
    injected = (left.injected + right.injected).total()
    print(f"\n{injected} faults injected, {sum(row['perf/teacher_retries'] for row in rows)} retries")
    assert injected >= 10
    assert nearly(rows, in_process)


def test_dead_servers_stop_the_run_and_it_resumes_as_if_nothing_had_happened(
    pair: Path, table: Table, in_process: list[dict[str, Any]], tmp_path: Path
) -> None:
    server, asked = FaultServer(table), [0]

    def die_at_the_tenth() -> str | None:
        asked[0] += 1
        return "500" if asked[0] > 14 else None

    server.plan = die_at_the_tenth
    with servers(server):
        config = configured(pair, tmp_path / "run", *served(server.url, more=("teacher.deadline_s=0.3",)))
        with pytest.raises(RunFailed, match=r"could not be scored.*teacher.max_unscored.*--resume") as error:
            run(config)
        assert error.value.exit_code == 1
        server.plan = None
        done = len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
        assert 0 < done < 3
        rows = run(config, resume=True)
    assert nearly(rows, in_process)


def test_a_server_that_dies_is_told_of_once_and_changes_nothing(
    pair: Path, table: Table, in_process: list[dict[str, Any]], tmp_path: Path
) -> None:
    left, right = FaultServer(table), FaultServer(table)
    with servers(left, right):
        config = configured(pair, tmp_path / "run", *served(left.url, right.url))
        built = build_engines(config)
        right.kill()
        try:
            train(config, built.engines, progress=False)
        finally:
            built.close()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert nearly(rows, in_process)
    events = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    told = [event["message"] for event in events if event["kind"] == "warning"]
    assert len(told) == 1
    assert right.url in told[0]
    assert "is down" in told[0]


def test_another_teacher_under_the_same_name_stops_a_resumed_run(pair: Path, table: Table, tmp_path: Path) -> None:
    with FaultServer(table) as server:
        run(configured(pair, tmp_path / "run", *served(server.url), "train.steps=1"))
        server.table = Table(tiny_model("llama", seed=8))
        with pytest.raises(ConfigError, match="another model"):
            run(configured(pair, tmp_path / "run", *served(server.url)), resume=True)


def test_each_prompt_is_scored_by_the_teacher_of_its_route(pair: Path, table: Table, tmp_path: Path) -> None:
    other = Table(tiny_model("llama", seed=8))
    left, right = FaultServer(table, model="one"), FaultServer(other, model="two")
    with servers(left, right):
        config = configured(
            pair, tmp_path / "run", "teacher.route_by=source",
            f'teacher.routes.a={{base_urls = ["{left.url}"], model = "one"}}',
            f'teacher.routes.b={{base_urls = "{right.url}", model = "two"}}',
        )  # fmt: skip
        run(config)
    assert load_config(tmp_path / "run" / "config.toml") == config
    rows = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    scored = [row for row in rows if row["teacher_logprobs"] is not None]
    assert {int(row["group"][1:]) % 2 for row in scored} == {0, 1}
    for row in scored:
        own = (table, other)[int(row["group"][1:]) % 2]
        expected = own.logprobs([*row["prompt_token_ids"], *row["token_ids"]])[len(row["prompt_token_ids"]) - 1 :]
        assert row["teacher_logprobs"] == pytest.approx(expected, abs=1e-5)


def test_prompts_without_a_route_are_found_before_the_run(pair: Path, table: Table, tmp_path: Path) -> None:
    with FaultServer(table) as server:
        route = f'teacher.routes.a={{base_urls = "{server.url}", model = "{MODEL}"}}'
        config = configured(pair, tmp_path / "run", "teacher.route_by=source", route)
        with pytest.raises(ScopeError, match=r"source = 'b'.*no such route"):
            build_engines(config)


def test_the_temperature_that_is_served_must_be_the_one_that_is_needed(
    pair: Path, table: Table, tmp_path: Path
) -> None:
    with FaultServer(table) as server:
        settings = (*served(server.url), "rollout.temperature=0.5")
        with pytest.raises(ConfigError, match=r"temperature 0.5.*served_temperature = 1;.*divided by 0.5"):
            build_engines(configured(pair, tmp_path / "run", *settings))
        for more in ("objective.temperature=released", "teacher.served_temperature=0.5"):
            built = build_engines(configured(pair, tmp_path / "run", *settings, more))
            assert isinstance(built.teacher, PoolTeacher)
            built.close()


def test_a_prompt_that_the_servers_cannot_hold_is_found_before_the_run(
    pair: Path, table: Table, tmp_path: Path
) -> None:
    with FaultServer(table) as server:
        server.context = 100
        with pytest.raises(ScopeError, match=r"at most 99, the context of the teacher"):
            build_engines(configured(pair, tmp_path / "run", *served(server.url), "rollout.max_tokens=90"))


MISTAKES: dict[str, tuple[list[str], str]] = {
    "no model": (['teacher.base_urls=["http://h/v1"]'], "without a model"),
    "address": (['teacher.base_urls=["h:8000"]', "teacher.model=t"], "begin it with http"),
    "twice": (['teacher.base_urls=["http://h/v1", "http://H:80"]', "teacher.model=t"], "twice"),
    "credentials": ([f"teacher.base_urls=http://u:{KEY}@h/v1", "teacher.model=t"], "api_key_env instead"),
    "key in env": ([f"teacher.api_key_env={KEY}"], "not the name"),
    "key in file": ([f"teacher.api_key_file={KEY}"], "looks like a key"),
    "key itself": ([f"teacher.api_key={KEY}"], "unknown key teacher.api_key"),
    "key in a route": ([f'teacher.routes.a={{api_key_env = "{KEY}"}}'], "not the name"),
    "unknown in a route": (['teacher.routes.a={base_url = "http://h"}'], "did you mean teacher.routes.a.base_urls"),
    "route_by alone": (["teacher.route_by=source"], "without teacher.routes"),
    "routes alone": (['teacher.routes.a={base_urls = "http://h", model = "m"}'], "without teacher.route_by"),
    "route without urls": (["teacher.route_by=x", 'teacher.routes.a={model = "m"}'], "no base_urls"),
    **{
        kind: (
            ['teacher.base_urls=["http://h/v1"]', "teacher.model=t", f"objective.distill={kind}"],
            "'topk_reverse_kl'",
        )
        for kind in ("full_kl", "jsd")
    },
}


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_are_one_line_without_a_key(name: str) -> None:
    options, expected = MISTAKES[name]
    with pytest.raises(ConfigError) as error:
        load_config(None, options)
    assert expected in str(error.value)
    assert KEY not in str(error.value)
    assert "\n" not in str(error.value)


def test_the_teachers_own_samples_come_from_its_servers(pair: Path, table: Table, tmp_path: Path) -> None:
    class Sampling(FaultServer):
        def _completion(self, request: dict[str, Any], fault: str | None) -> dict[str, Any]:
            if "prompt_logprobs" in request:
                return super()._completion(request, fault)
            drawn = [20 + request["seed"] % 50, 30]
            values = [-1.0, -2.0] if request["top_k"] != 2 else [-0.6931, -0.6931]
            choice = {
                "index": 0, "text": "x", "finish_reason": "length", "token_ids": drawn,
                "prompt_token_ids": request["prompt"], "logprobs": {"token_logprobs": values},
            }  # fmt: skip
            return {"choices": [choice]}

    with Sampling(table) as server:
        config = configured(pair, tmp_path / "run", *served(server.url), "objective.method=kd", "rollout.n=2")
        rows = run(config)
        assert len(rows) == 3
        assert all(row["update/skipped"] == 0 for row in rows)
        assert len({body["seed"] for body in server.bodies if "prompt_logprobs" not in body}) == 12
    logged = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert len(logged) == 12
    assert {row["sampling"]["server"] for row in logged} == {server.url}


def test_no_secret_is_in_anything_that_a_run_leaves(
    pair: Path,
    table: Table,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("TEACHER_KEY", KEY)
    with FaultServer(table, at_random(0.2, ["500", "reset_mid_body", "nan", "key"]), key=KEY) as server:
        options = [*served(server.url), "teacher.api_key_env=TEACHER_KEY"]
        config = configured(pair, tmp_path / "run", *options)
        run(config)
        report = tmp_path / "report.html"
        assert main(["report", str(tmp_path / "run"), "--out", str(report)]) == 0
        server.key = f"{KEY}-other"
        with pytest.raises(ConfigError, match="answers 401") as error:
            run(configured(pair, tmp_path / "other", *options))
        import traceback

        shown = "".join(traceback.format_exception(error.value))
        chained: list[BaseException | None] = [error.value, error.value.__cause__, error.value.__context__]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) >= 8
    texts = [path.read_bytes().decode("latin-1") for path in files]
    captured = capsys.readouterr()
    texts += [captured.out, captured.err, caplog.text, shown, repr(chained), repr(config), str(config.model_dump())]
    assert not any(KEY in text for text in texts)
    assert "TEACHER_KEY" in (tmp_path / "run" / "config.toml").read_text()


def test_the_doctor_knows_a_served_teacher(
    pair: Path, table: Table, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with FaultServer(table) as server:
        options = [
            f"model.path={pair / 'student'}", f"data.train={pair / 'rows.jsonl'}", "rollout.max_tokens=6",
            "rollout.temperature=1.0", "train.prompts_per_step=2", f"run.dir={tmp_path / 'run'}", *served(server.url),
        ]  # fmt: skip
        command = ["doctor", *(word for option in options for word in ("--set", option))]
        assert main(command) == 0
        told = capsys.readouterr().out
        assert "behind servers" in told
        assert "teacher.tokenizer" in told
        command += ["--set", f"teacher.tokenizer={pair / 'teacher'}", "--set", "rollout.temperature=0.5"]
        assert main(command) == 1
        assert "served_temperature" in capsys.readouterr().out
