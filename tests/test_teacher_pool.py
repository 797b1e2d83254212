"""Laws of the teacher behind servers: a score is the model's own or there is none, whatever the servers do."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from fault_server import FAULTS, HARMLESS, FaultServer, Table, at_random, made_rollouts, servers
from scope_opd.errors import ConfigError, RunFailed
from scope_opd.teacher.pool import Outcome, PoolTeacher
from scope_opd.types import Prompt, Rollout, StepTeacher, Teacher, TeacherScore
from teacher_kit import FINGERPRINT, route, teacher_of
from tiny import tiny_model


@pytest.fixture(scope="module")
def table() -> Table:
    return Table(tiny_model("qwen3", seed=3))


@pytest.fixture(scope="module")
def other() -> Table:
    return Table(tiny_model("qwen3", seed=4))


def wrong(scores: list[TeacherScore], rollouts: list[Rollout], table: Table) -> int:
    """Scores that are neither None nor the model's own."""
    count = 0
    for score, rollout in zip(scores, rollouts, strict=True):
        expected = table.response(rollout)
        if score.logprobs is not None:
            close = len(score.logprobs) == len(expected)
            close = close and all(abs(a - b) <= 1e-6 for a, b in zip(score.logprobs, expected, strict=True))
            count += not close
    return count


def test_scores_are_the_models_own_in_order(table: Table) -> None:
    rollouts = made_rollouts(20)
    with FaultServer(table) as server, teacher_of(server.url) as teacher:
        assert isinstance(teacher, Teacher)
        assert isinstance(teacher, StepTeacher)
        scores = asyncio.run(teacher.score(rollouts))
    assert all(score.logprobs is not None for score in scores)
    assert wrong(scores, rollouts, table) == 0


def test_each_step_has_an_event_loop_of_its_own_and_nothing_is_left(table: Table) -> None:
    rollouts = made_rollouts(3)
    before = threading.active_count()
    with FaultServer(table) as server:
        with teacher_of(server.url) as teacher:
            for _ in range(3):
                assert wrong(asyncio.run(teacher.score(rollouts)), rollouts, table) == 0
            time.sleep(0.05)
            assert teacher.servers.thread.tasks() == 0
        teacher.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_never_a_number(fault: str, table: Table) -> None:
    rollouts = made_rollouts(8, seed=1)
    with FaultServer(table, at_random(0.4, [fault])) as server:
        with teacher_of(server.url, client={"read_timeout_s": 0.4}) as teacher:
            scores = asyncio.run(teacher.score(rollouts))
        assert server.injected[fault] >= 3
    assert all(score.logprobs is not None for score in scores)
    assert wrong(scores, rollouts, table) == 0


@pytest.mark.parametrize("oddity", HARMLESS)
def test_what_is_merely_odd_changes_nothing(oddity: str, table: Table) -> None:
    rollouts = made_rollouts(8, seed=2)
    with FaultServer(table, lambda: oddity) as server, teacher_of(server.url) as teacher:
        scores = asyncio.run(teacher.score(rollouts))
        assert server.injected[oddity] >= 9
    assert [score.tries for score in scores] == [1] * 8
    assert wrong(scores, rollouts, table) == 0


@pytest.mark.parametrize("fault", ["positive", "500", "reset_mid_body", "other_request"])
def test_a_server_that_always_fails_leaves_rollouts_unscored(fault: str, table: Table) -> None:
    rollouts, faulty = made_rollouts(3), [False]
    with FaultServer(table, lambda: fault if faulty[0] else None) as server:
        with teacher_of(server.url, pool={"deadline_s": 0.5}) as teacher:
            faulty[0] = True
            scores = asyncio.run(teacher.score(rollouts))
    assert [score.logprobs for score in scores] == [None] * 3


def test_at_least_six_tries_are_made_however_short_the_deadline(table: Table) -> None:
    faulty = [False]
    with FaultServer(table, lambda: "500" if faulty[0] else None) as server:
        with teacher_of(server.url, pool={"deadline_s": 0.0, "failures_to_open": 100}) as teacher:
            faulty[0] = True
            (score,) = asyncio.run(teacher.score(made_rollouts(1)))
    assert (score.logprobs, score.tries) == (None, 6)


def test_random_faults_of_two_servers_change_no_score(table: Table) -> None:
    rollouts = made_rollouts(300, seed=5)
    kinds = [*(fault for fault in FAULTS if fault not in ("slow", "429_later")), *HARMLESS]
    left, right = FaultServer(table, at_random(0.3, kinds, 1)), FaultServer(table, at_random(0.3, kinds, 2))
    with servers(left, right), teacher_of(left.url, right.url) as teacher:
        scores = asyncio.run(teacher.score(rollouts))
        time.sleep(0.05)
        assert teacher.servers.thread.tasks() == 0
    injected = left.injected + right.injected
    print(f"\n{injected.total()} faults injected of {len(injected)} kinds, unscored "
          f"{sum(score.logprobs is None for score in scores)} of {len(scores)}")  # fmt: skip
    assert injected.total() >= 100
    assert len(injected) == len(kinds)
    assert wrong(scores, rollouts, table) == 0
    assert sum(score.logprobs is None for score in scores) == 0


def test_a_burst_of_errors_opens_the_circuit_and_one_probe_at_a_time_closes_it(table: Table) -> None:
    asked: list[str | None] = []

    def burst() -> str | None:
        asked.append("500" if 1 <= len(asked) < 60 else None)
        return asked[-1]

    rollouts = made_rollouts(20, seed=8)
    pool = {"max_concurrency": 20, "down_s": 0.01, "down_max_s": 0.02}
    with FaultServer(table, burst) as server, teacher_of(server.url, pool=pool) as teacher:
        scores = asyncio.run(teacher.score(rollouts))
        failed = [tuple(body["prompt"]) for body in server.bodies[1:60]]
    assert wrong(scores, rollouts, table) == 0
    assert all(score.logprobs is not None for score in scores)
    # All twenty may be under way, and four of them for a second time, when the fifth failure opens the circuit; from
    # then on nothing but fingerprints is sent.
    assert set(failed[24:]) == {FINGERPRINT}


def test_proxies_of_the_environment_are_not_used(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with FaultServer(table) as server, teacher_of(server.url) as teacher:
        assert wrong(asyncio.run(teacher.score(made_rollouts(2))), made_rollouts(2), table) == 0


def test_a_redirect_is_refused_and_not_followed(table: Table) -> None:
    with FaultServer(table, key="k" * 20) as server:
        server.redirect = "http://127.0.0.1:9/v1/models"
        with pytest.raises(ConfigError, match=r"answers 302.*no redirect.*teacher.base_urls"):
            with teacher_of(server.url, key="k" * 20):
                pass


def test_a_failed_try_goes_to_the_other_server(table: Table) -> None:
    faulty = [False]
    bad, good = FaultServer(table, lambda: "positive" if faulty[0] else None), FaultServer(table)
    with servers(bad, good), teacher_of(bad.url, good.url) as teacher:
        faulty[0] = True
        rollouts = made_rollouts(6)
        scores = asyncio.run(teacher.score(rollouts))
    assert wrong(scores, rollouts, table) == 0
    assert max(score.tries for score in scores) == 2


def test_the_server_with_fewer_outstanding_tokens_is_asked(table: Table) -> None:
    slow, quick = FaultServer(table), FaultServer(table)
    rollouts = made_rollouts(40, seed=9)
    with servers(slow, quick), teacher_of(slow.url, quick.url, pool={"max_concurrency": 4}) as teacher:
        slow.delay_s = 0.3
        asyncio.run(teacher.score(rollouts))
        assert quick.seen.total() > 3 * slow.seen.total()


def test_tokens_are_weighed_not_requests(table: Table) -> None:
    big = Rollout("big", "g", [5] * 10, [6] * 200, [0.0] * 200)
    left, right = FaultServer(table), FaultServer(table)
    with servers(left, right), teacher_of(left.url, right.url) as teacher:
        left.delay_s = right.delay_s = 0.3
        asyncio.run(teacher.score([big, *made_rollouts(8, longest=8)]))
        asked = [{prompt for prompt in server.seen if prompt != FINGERPRINT} for server in (left, right)]
    assert sorted(len(prompts) for prompts in asked) == [1, 8]


def test_no_server_gets_more_requests_at_once_than_allowed(table: Table) -> None:
    left, right = FaultServer(table), FaultServer(table)
    with servers(left, right), teacher_of(left.url, right.url, pool={"max_concurrency": 3}) as teacher:
        left.delay_s = 0.02
        right.kill()
        scores = asyncio.run(teacher.score(made_rollouts(30)))
        assert all(score.logprobs is not None for score in scores)
        # Besides three rollouts there may be one fingerprint.
        assert 3 <= left.most_in_flight <= 4


def test_a_killed_server_loses_nothing_and_is_used_again_when_it_returns(table: Table) -> None:
    rollouts = made_rollouts(60, seed=6)
    left, right = FaultServer(table), FaultServer(table)
    with servers(left, right), teacher_of(left.url, right.url, pool={"max_concurrency": 2}) as teacher:
        left.delay_s = right.delay_s = 0.02

        async def kill_in_the_middle() -> list[TeacherScore]:
            work = asyncio.create_task(teacher.score(rollouts))
            await asyncio.sleep(0.15)
            left.kill()
            return await work

        scores = asyncio.run(kill_in_the_middle())
        assert wrong(scores, rollouts, table) == 0
        assert all(score.logprobs is not None for score in scores)
        with FaultServer(table, port=left.port) as back:
            end = time.monotonic() + 20
            while back.seen.total() <= 5 and time.monotonic() < end:
                assert wrong(asyncio.run(teacher.score(rollouts)), rollouts, table) == 0
            assert back.seen.total() > 5


def test_other_weights_behind_the_same_address_stop_the_run(table: Table, other: Table) -> None:
    rollouts = made_rollouts(40, seed=6)
    server = FaultServer(table)
    with servers(server), teacher_of(server.url, pool={"max_concurrency": 2}) as teacher:
        asyncio.run(teacher.score(rollouts[:3]))
        server.kill()
        with FaultServer(other, port=server.port), pytest.raises(RunFailed, match=r"serves another model.*a token"):
            asyncio.run(teacher.score(rollouts))


def test_weights_that_change_without_a_broken_connection_are_found_at_the_end_of_the_step(
    table: Table, other: Table
) -> None:
    async def step(teacher: Teacher) -> None:
        assert isinstance(teacher, StepTeacher)
        await teacher.begin_step([], 0)
        await teacher.score(made_rollouts(3))
        server.table = other
        await teacher.end_step(0)

    with FaultServer(table) as server, teacher_of(server.url) as teacher, pytest.raises(RunFailed, match="another"):
        asyncio.run(step(teacher))


def test_one_odd_fingerprint_is_asked_for_again_before_the_run_stops(table: Table) -> None:
    async def step() -> None:
        await teacher.begin_step([], 0)
        await teacher.score(made_rollouts(3))
        await teacher.end_step(0)

    plans = iter([None, "shifted", *[None] * 50])
    with FaultServer(table, lambda: next(plans)) as server, teacher_of(server.url) as teacher:
        asyncio.run(teacher._probe(wait=True))
        assert server.injected["shifted"] == 1
        asyncio.run(step())


def test_an_endless_answer_is_a_failure(table: Table) -> None:
    faulty = [False]
    with FaultServer(table, lambda: "endless" if faulty[0] else None) as server:
        with teacher_of(server.url, pool={"deadline_s": 0.0, "failures_to_open": 100}) as teacher:
            faulty[0] = True
            (outcome,) = asyncio.run(_outcomes(teacher, made_rollouts(1)))
    assert outcome.logprobs is None
    assert "more than" in (outcome.error or "")


async def _outcomes(teacher: PoolTeacher, rollouts: list[Rollout]) -> list[Outcome]:
    return [await asyncio.wrap_future(teacher.servers.thread.submit(teacher.request(each))) for each in rollouts]


def test_servers_of_one_teacher_must_serve_the_same_model(table: Table, other: Table) -> None:
    left, right = FaultServer(table), FaultServer(other)
    with servers(left, right), pytest.raises(ConfigError, match="another model"), teacher_of(left.url, right.url):
        pass


def test_a_resumed_run_knows_the_fingerprint_of_before(table: Table, other: Table, tmp_path: Path) -> None:
    from scope_opd.teacher.ledger import first_fingerprints

    path = tmp_path / "teacher.jsonl"
    with FaultServer(table) as server, teacher_of(server.url, ledger=path) as teacher:
        asyncio.run(teacher.begin_step([], 0))
    with path.open("a") as stream:
        stream.write('{"torn": ')
    known = first_fingerprints(path)
    assert len(known) == 1
    with FaultServer(table) as server, teacher_of(server.url, references=known):
        pass
    with FaultServer(other) as server, pytest.raises(ConfigError, match="another"):
        with teacher_of(server.url, references=known):
            pass


def test_too_many_unscored_rollouts_stop_the_step(table: Table) -> None:
    async def step() -> None:
        await teacher.begin_step([], 7)
        faulty[0] = True
        await teacher.score(made_rollouts(5))
        faulty[0] = False
        await teacher.end_step(7)

    faulty = [False]
    with FaultServer(table, lambda: "500" if faulty[0] else None) as server:
        with teacher_of(server.url, pool={"deadline_s": 0.1}, max_unscored=0.5) as teacher:
            with pytest.raises(RunFailed, match=r"step 7: 5 of 5 rollouts could not be scored.*EngineCore"):
                asyncio.run(step())
        with teacher_of(server.url, pool={"deadline_s": 0.1}, max_unscored=1.0) as teacher:
            asyncio.run(step())


def test_prompts_go_to_the_teacher_of_their_route(table: Table, other: Table) -> None:
    rollouts = made_rollouts(10)
    prompts = [Prompt(r.group, "", None, tuple(r.prompt_token_ids), fields={"source": "ab"[i % 2]})
               for i, r in enumerate(rollouts)]  # fmt: skip
    left, right = FaultServer(table, model="one"), FaultServer(other, model="two")
    with servers(left, right):
        routes = {"a": route(left.url, model="one"), "b": route(right.url, model="two")}
        with teacher_of(routes=routes, route_of=lambda prompt: str(prompt.fields["source"])) as teacher:

            async def step() -> list[TeacherScore]:
                await teacher.begin_step(prompts, 0)
                scores = await teacher.score(rollouts)
                await teacher.end_step(0)
                return scores

            scores = asyncio.run(step())
    assert wrong(scores[::2], rollouts[::2], table) == 0
    assert wrong(scores[1::2], rollouts[1::2], other) == 0


def test_floors_are_applied_and_counted(table: Table) -> None:
    rollouts = made_rollouts(5)
    with FaultServer(table) as server, teacher_of(server.url, log_prob_floor=-5.0) as teacher:
        scores = asyncio.run(teacher.score(rollouts))
    for score, rollout in zip(scores, rollouts, strict=True):
        expected = table.response(rollout)
        assert score.floored == sum(value < -5 for value in expected)
        assert score.logprobs == pytest.approx([max(value, -5.0) for value in expected])


def test_a_rollout_beyond_the_context_is_named(table: Table) -> None:
    long = Rollout("r/long", "g", [5] * 10, [6] * 300, [0.0] * 300)
    with FaultServer(table) as server, teacher_of(server.url) as teacher:
        with pytest.raises(RunFailed, match=r"'r/long' with 310 tokens.*answers 400.*maximum context.*max-model-len"):
            asyncio.run(teacher.score([long]))


def test_a_token_that_the_teacher_lacks_leaves_its_rollout_unscored(table: Table) -> None:
    rollouts = made_rollouts(3)
    rollouts[1].token_ids[-1] = 320
    with FaultServer(table) as server, teacher_of(server.url) as teacher:
        scores = asyncio.run(teacher.score(rollouts))
    assert [score.logprobs is None for score in scores] == [False, True, False]


def test_the_ledger_says_who_scored_what(table: Table, tmp_path: Path) -> None:
    async def step() -> None:
        await teacher.begin_step([], 3)
        await teacher.score(made_rollouts(4))
        await teacher.end_step(3)

    path = tmp_path / "teacher.jsonl"
    with FaultServer(table) as server, teacher_of(server.url, ledger=path) as teacher:
        assert not path.exists()
        asyncio.run(step())
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    scores = [row for row in rows if "id" in row]
    assert sorted(row["id"] for row in scores) == ["r0", "r1", "r2", "r3"]
    assert {row["endpoint"] for row in scores} == {server.url}
    assert all(row["step"] == 3 and row["attempts"] == 1 and row["latency_s"] > 0 and row["scored"] for row in scores)
    assert len({row["token_hash"] for row in scores}) == 4
    assert sum("fingerprint" in row for row in rows) == 1
    assert sum(row.get("gap") == 0 for row in rows) >= 3


def test_cancelling_a_score_leaves_no_task(table: Table) -> None:
    async def give_up() -> None:
        work = asyncio.create_task(teacher.score(made_rollouts(10)))
        await asyncio.sleep(0.1)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work

    with FaultServer(table) as server, teacher_of(server.url) as teacher:
        server.delay_s = 5.0
        asyncio.run(give_up())
        time.sleep(0.2)
        assert teacher.servers.thread.tasks() == 0
        server.delay_s = 0.0
        assert len(asyncio.run(teacher.score(made_rollouts(2)))) == 2


def test_retry_after_is_honoured(table: Table) -> None:
    plans = iter([None, "429_later", *[None] * 10])
    with FaultServer(table, lambda: next(plans)) as server, teacher_of(server.url) as teacher:
        began = time.monotonic()
        asyncio.run(teacher.score(made_rollouts(1)))
        assert time.monotonic() - began >= 1.0


def test_a_server_that_is_down_at_the_start_is_used_later(table: Table) -> None:
    up, late = FaultServer(table), FaultServer(table)
    with servers(up, late):
        late.kill()
        with teacher_of(up.url, late.url, client={"start_s": 0.2}, pool={"max_concurrency": 2}) as teacher:
            asyncio.run(teacher.score(made_rollouts(3)))
            with FaultServer(table, port=late.port) as back:
                time.sleep(0.2)
                asyncio.run(teacher.score(made_rollouts(30)))
                asyncio.run(teacher.score(made_rollouts(30)))
                assert back.seen.total() > 1


def test_no_server_at_all_is_one_line(table: Table) -> None:
    with FaultServer(table) as server:
        pass
    with pytest.raises(ConfigError, match=r"no server of the teacher answers: http://127.0.0.1:\d+/v1: .*start it"):
        with teacher_of(server.url, client={"start_s": 0.2}):
            pass


def test_a_wrong_model_name_is_one_line(table: Table) -> None:
    with FaultServer(table) as server, pytest.raises(ConfigError, match=r"teacher.model = 'nobody'.*serves 'teacher'"):
        with teacher_of(server.url, model="nobody"):
            pass


@pytest.mark.parametrize("key", [None, "sk-wrong-key-1234567"])
def test_a_wrong_key_is_one_line_without_the_key(key: str | None, table: Table) -> None:
    with FaultServer(table, key="sk-right-key-1234567") as server:
        with (
            pytest.raises(ConfigError, match=r"answers 401.*teacher.api_key_env") as error,
            teacher_of(server.url, key=key),
        ):
            pass
    assert "sk-wrong" not in str(error.value)
    with FaultServer(table, key="sk-right-key-1234567") as server, teacher_of(server.url, key="sk-right-key-1234567"):
        pass


def test_a_setting_that_turns_wrong_in_mid_run_ends_it_in_one_line(table: Table) -> None:
    for change, expected in (
        ({"key": "sk-another-key-1234567"}, r"/v1 answers 401.*not accepted there.*set teacher\.api_key_env"),
        ({"model": "moved"}, r"/v1 answers 404.*does not exist.*'teacher' of teacher\.model.*check teacher\.model"),
    ):
        with FaultServer(table, key="sk-right-key-1234567") as server:
            with teacher_of(server.url, key="sk-right-key-1234567") as teacher:
                asyncio.run(teacher.score(made_rollouts(2)))
                vars(server).update(change)
                with pytest.raises(RunFailed, match=expected) as error:
                    asyncio.run(teacher.score(made_rollouts(2)))
                assert error.value.exit_code == 1
                assert "sk-right" not in str(error.value)
                assert "\n" not in str(error.value)


def test_a_prefix_and_ipv6_reach_the_server(table: Table) -> None:
    with FaultServer(table, host="::1", prefix="/pool/a") as server, teacher_of(server.url) as teacher:
        assert wrong(asyncio.run(teacher.score(made_rollouts(2))), made_rollouts(2), table) == 0


def test_https_needs_a_certificate_that_the_bundle_vouches_for(table: Table, tmp_path: Path) -> None:
    key, certificate = str(tmp_path / "key.pem"), str(tmp_path / "certificate.pem")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out", certificate, "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"],
        check=True, capture_output=True,
    )  # fmt: skip
    tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    tls.load_cert_chain(certificate, key)
    with FaultServer(table, tls=tls) as server:
        assert server.url.startswith("https://")
        with teacher_of(server.url, client={"ca_bundle": certificate}) as teacher:
            rollouts = made_rollouts(5)
            assert wrong(asyncio.run(teacher.score(rollouts)), rollouts, table) == 0
        with pytest.raises(ConfigError, match=r"no server.*CERTIFICATE_VERIFY_FAILED"):
            with teacher_of(server.url, client={"start_s": 0.2}):
                pass
    (tmp_path / "empty.pem").write_text("")
    empty = {"ca_bundle": str(tmp_path / "empty.pem")}
    with pytest.raises(ConfigError, match=r"ca_bundle .*empty\.pem"), teacher_of(server.url, client=empty):
        pass


def test_development_routes_are_refused_unless_allowed(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    from scope_opd.addresses import parse_base_url

    with FaultServer(table, development=True) as server:
        far = route(server.url)
        far = replace(far, urls=(replace(parse_base_url(server.url), loopback=False),))
        with pytest.raises(ConfigError, match=r"development routes without a key.*allow_unprotected_routes"):
            with teacher_of(routes={"": far}):
                pass
        with teacher_of(routes={"": far}, client={"allow_unprotected": True}):
            pass
        with teacher_of(server.url):  # loopback
            pass
        server.development = False
        with teacher_of(routes={"": far}) as teacher:
            server.development = True  # as after a restart
            endpoint = teacher.servers.routes[""].pool.endpoints[0]
            teacher.servers.routes[""].pool.take_down(endpoint)
            with pytest.raises(RunFailed, match="development routes without a key"):
                asyncio.run(teacher.score(made_rollouts(1)))


def test_every_sampling_parameter_is_explicit(table: Table) -> None:
    with FaultServer(table) as server, teacher_of(server.url) as teacher:
        asyncio.run(teacher.score(made_rollouts(1)))
        body = server.bodies[-1]
    assert (body["temperature"], body["top_p"], body["top_k"], body["repetition_penalty"], body["max_tokens"]) == (
        1.0, 1.0, 0, 1.0, 1,
    )  # fmt: skip
    assert body["return_token_ids"] is True
    assert body["prompt_logprobs"] == 0


def test_a_program_that_forgets_to_close_ends_all_the_same(table: Table) -> None:
    program = """
import asyncio, sys
from fault_server import made_rollouts
from scope_opd.teacher.pool import PoolTeacher
from scope_opd.serving.route import ClientSettings
from scope_opd.teacher.servers import Servers
from scope_opd.serving.pool import PoolSettings
from teacher_kit import FINGERPRINT, route
servers = Servers({"": route(sys.argv[1])}, FINGERPRINT, client=ClientSettings(), pool=PoolSettings())
servers.open()
print(len(asyncio.run(PoolTeacher(servers).score(made_rollouts(3)))))
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with FaultServer(table) as server:
        command = [
            sys.executable,
            "-X",
            "dev",
            "-W",
            "error",
            "-W",
            "ignore::DeprecationWarning",
            "-c",
            program,
            server.url,
        ]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "3"), done.stderr
    assert not any(word in done.stderr for word in ("Traceback", "Exception", "never awaited", "was destroyed"))


def test_a_server_that_hangs_at_the_end_of_a_step_is_not_waited_for_again_and_again(table: Table) -> None:
    async def step() -> float:
        await teacher.begin_step([], 0)
        await teacher.score(made_rollouts(2))
        server.delay_s = 30.0
        began = time.monotonic()
        await teacher.end_step(0)
        return time.monotonic() - began

    with FaultServer(table) as server, teacher_of(server.url, client={"read_timeout_s": 0.5}) as teacher:
        assert asyncio.run(step()) < 1.5
