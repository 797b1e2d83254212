"""Laws of rollouts by servers: a sample is the model's own or there is none, nothing is lost, nothing comes twice."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from fault_server import at_random, servers
from sampling_server import (
    DEFAULT_TAG,
    STREAM_FAULTS,
    SamplingServer,
    Weights,
    drawn_by,
    made_prompts,
    sampler_over,
    samplers_of,
    sampling,
    target,
)
from scope_opd.errors import ConfigError, RunFailed, ScopeError
from scope_opd.rollout.samplers import Live
from scope_opd.serving.http import Events
from scope_opd.serving.route import sample_seed
from scope_opd.serving.vllm import SampleStream
from scope_opd.types import Prompt, Rollout, Sampler
from tiny import EOS_ID, tiny_model

KEY = "sk-a-secret-key-1234567890"


@pytest.fixture(scope="module")
def old() -> Weights:
    return Weights(tiny_model("qwen3", seed=3))


@pytest.fixture(scope="module")
def new() -> Weights:
    return Weights(tiny_model("qwen3", seed=4), "run-1")


def content(rollouts: list[Rollout]) -> list[Any]:
    return [(r.id, r.token_ids, r.logprobs, r.finish_reason, r.policy_versions) for r in rollouts]


def are_the_models_own(rollouts: list[Rollout], weights: Weights, temperature: float) -> bool:
    for rollout in rollouts:
        for place, (token, value) in enumerate(zip(rollout.token_ids, rollout.logprobs, strict=True)):
            row = weights.logits([*rollout.prompt_token_ids, *rollout.token_ids[:place]])
            assert value == pytest.approx(float((row / temperature).log_softmax(-1)[token]), abs=1e-6)
    return True


def test_log_probs_are_those_of_the_distribution_that_sampled(old: Weights) -> None:
    prompts, params = made_prompts(6), sampling(3)
    with SamplingServer(old) as server, samplers_of(server.url) as samplers:
        sampler = sampler_over(samplers)
        assert isinstance(sampler, Sampler)
        rollouts = drawn_by(sampler, prompts, params)
        body = server.bodies[-1]
    assert [(r.group, r.sample) for r in rollouts] == [(p.id, s) for p in prompts for s in range(3)]
    assert are_the_models_own(rollouts, old, 0.7)
    for rollout in rollouts:
        stopped = rollout.token_ids[-1] in params.stop_token_ids
        assert rollout.finish_reason == ("stop" if stopped else "length")
        assert stopped or len(rollout.token_ids) == 8
        assert not set(rollout.token_ids[:-1]) & set(params.stop_token_ids)
        assert rollout.policy_versions == [[0, len(rollout.token_ids), 0]]
    explicit = {"temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "seed",
                "frequency_penalty", "max_tokens", "stop_token_ids", "ignore_eos", "n", "stream"}  # fmt: skip
    assert explicit <= body.keys()


def test_a_sample_is_a_function_of_seed_step_prompt_and_sample(old: Weights) -> None:
    prompts, params = made_prompts(5), sampling(2)
    left, right = SamplingServer(old), SamplingServer(old)
    with servers(left, right):
        with samplers_of(left.url) as samplers:
            alone = content(drawn_by(sampler_over(samplers), prompts, params))
        with samplers_of(left.url, right.url) as samplers:
            sampler = sampler_over(samplers)
            assert (
                content(drawn_by(sampler, prompts[::-1], params))
                == alone[8:] + alone[6:8] + alone[4:6] + alone[2:4] + alone[:2]
            )
            again = content(drawn_by(sampler, prompts[2:], params))
            assert again == alone[4:]
            others = [drawn_by(sampler, prompts, replace(params, seed=12)), drawn_by(sampler, prompts, params, step=4)]
    for other in others:
        assert sum(one[1] == two[1] for one, two in zip(content(other), alone, strict=True)) < len(alone) // 2
    assert alone[0][1] != alone[1][1]


@pytest.mark.parametrize("fault", STREAM_FAULTS)
def test_a_fault_is_never_a_token(fault: str, old: Weights) -> None:
    prompts, params = made_prompts(5, seed=1), sampling(2)
    with SamplingServer(old) as server, samplers_of(server.url, client={"read_timeout_s": 0.4}) as samplers:
        expected = content(drawn_by(sampler_over(samplers), prompts, params))
        server.plan = at_random(0.4, [fault], 3)
        sampler = sampler_over(samplers)
        sampler._asked = True  # the question which log-probs it reports is no stream
        rollouts = drawn_by(sampler, prompts, params)
        assert server.injected[fault] >= 3
    assert content(rollouts) == expected
    assert sum(rollout.sampling["tries"] - 1 for rollout in rollouts) >= 3


def test_nothing_is_lost_and_nothing_comes_twice_under_random_faults(old: Weights) -> None:
    prompts, params = made_prompts(60, seed=2), sampling(4)
    kinds = [fault for fault in STREAM_FAULTS if fault != "silent"]
    left, right = SamplingServer(old), SamplingServer(old)
    with servers(left, right), samplers_of(left.url, right.url) as samplers:
        sampler = sampler_over(samplers)
        expected = content(drawn_by(sampler, prompts, params))
        left.plan, right.plan = at_random(0.3, kinds, 1), at_random(0.3, kinds, 2)
        rollouts = drawn_by(sampler, prompts, params)
        time.sleep(0.05)
        assert samplers.thread.tasks() == 0
    injected = left.injected + right.injected
    print(f"\n{injected.total()} faults of {len(injected)} kinds injected into {len(rollouts)} samples")
    assert injected.total() >= 80
    assert len(injected) == len(kinds)
    assert content(rollouts) == expected
    assert {rollout.sampling["server"] for rollout in rollouts} == {left.url, right.url}


def test_a_server_killed_in_mid_step_loses_no_rollout(old: Weights) -> None:
    prompts, params = made_prompts(12, seed=3), sampling(3)
    left, right = SamplingServer(old), SamplingServer(old)
    with servers(left, right), samplers_of(left.url, right.url) as samplers:
        sampler = sampler_over(samplers)
        expected = content(drawn_by(sampler, prompts, params))
        left.token_delay_s = right.token_delay_s = 0.02
        before = right.sent
        killer = threading.Thread(target=lambda: (_until(lambda: right.sent > before + 20), right.kill()))
        killer.start()
        rollouts = drawn_by(sampler, prompts, params)
        killer.join()
        assert any("is down" in line and right.url in line for line in sampler.notes())
        assert sampler.notes() == []
    assert content(rollouts) == expected
    assert max(rollout.sampling["tries"] for rollout in rollouts) > 1


def test_the_only_server_killed_and_started_again_finishes_the_step_with_the_current_weights(
    old: Weights, new: Weights
) -> None:
    prompts, params = made_prompts(8, seed=4), sampling(3)
    first = SamplingServer(old)
    with servers(first), samplers_of(first.url) as samplers:
        second = SamplingServer(old, port=first.port)
        samplers.target = target(samplers, [first], new, 5)
        sampler = sampler_over(samplers)
        samplers.thread.run(samplers.confirm(samplers.endpoints[0]))
        assert first.loads == ["run-1"]
        expected = content(drawn_by(sampler, prompts, params))
        assert {rollout[4][0][2] for rollout in expected} == {5}
        samplers.target = target(samplers, [second], new, 5)
        first.token_delay_s = 0.02
        before = first.sent

        def restart() -> None:
            _until(lambda: first.sent > before + 10)
            first.kill()
            time.sleep(0.1)
            second.__enter__()

        other = threading.Thread(target=restart)
        other.start()
        with servers():
            try:
                rollouts = drawn_by(sampler, prompts, params)
            finally:
                other.join()
                second.kill()
    assert second.loads == ["run-1"]
    assert content(rollouts) == expected
    assert are_the_models_own(rollouts, new, 0.7)


def test_what_a_restarted_server_sampled_before_it_had_the_weights_does_not_count(old: Weights, new: Weights) -> None:
    """Nothing breaks: idle connections are gone, and the server behind the address is another one."""
    prompts, params = made_prompts(4, seed=5), sampling(2)
    with SamplingServer(old) as server, samplers_of(server.url) as samplers:
        samplers.target = target(samplers, [server], new, 1)
        samplers.thread.run(samplers.confirm(samplers.endpoints[0]))
        sampler = sampler_over(samplers)
        expected = content(drawn_by(sampler, prompts, params))
        server.weights = old  # as after a restart
        samplers.endpoints[0].verified_at = float("-inf")  # as for a connection that is newer than the last proof
        rollouts = drawn_by(sampler, prompts, params)
        assert server.loads == ["run-1", "run-1"]
    assert content(rollouts) == expected
    assert min(rollout.sampling["tries"] for rollout in rollouts) > 1


@pytest.mark.parametrize("wrong", ["tag", "numbers"])
def test_a_server_that_cannot_be_brought_to_the_weights_stops_the_run(wrong: str, old: Weights, new: Weights) -> None:
    with SamplingServer(old) as server, samplers_of(server.url) as samplers:
        aim = target(samplers, [server], new, 1)

        async def nothing(endpoint: Any) -> None:
            server.load(Weights(old.model, new.tag if wrong == "numbers" else "other"))

        samplers.target = replace(aim, load=nothing)
        with pytest.raises(RunFailed, match=server.url) as error:
            samplers.thread.run(samplers.confirm(samplers.endpoints[0]))
        expected = (
            "does not serve the trainer's weights" if wrong == "numbers" else "'other' after it was given 'run-1'"
        )
        assert expected in str(error.value)
        assert "\n" not in str(error.value)


def test_versions_are_exact_to_the_token_when_weights_change_in_flight(old: Weights, new: Weights) -> None:
    prompts, params = made_prompts(10, seed=6), sampling(2, max_tokens=24, stop_token_ids=(EOS_ID,))
    by_tag = {DEFAULT_TAG: 0, "run-1": 1, "run-2": 2}
    third = Weights(tiny_model("qwen3", seed=5), "run-2")
    left, right = SamplingServer(old), SamplingServer(old)
    with servers(left, right), samplers_of(left.url, right.url) as samplers:
        sampler = sampler_over(samplers)
        left.token_delay_s = right.token_delay_s = 0.01
        samplers.target = target(samplers, [left, right], old, 0)
        for endpoint in samplers.endpoints:
            samplers.thread.run(samplers.confirm(endpoint))

        async def sync(weights: Weights, version: int) -> None:
            samplers.target = target(samplers, [left, right], weights, version)
            for endpoint, server in zip(samplers.endpoints, (left, right), strict=True):
                async with samplers.lock(endpoint):
                    await server.pause()
                    await samplers.target.load(endpoint)
                    await samplers.mark(endpoint, version)
                    server.resume()
                    await samplers.prove(endpoint, samplers.target)

        def publish() -> None:
            for weights, version in ((new, 1), (third, 2)):
                before = left.sent
                _until(lambda before=before: left.sent > before + 60)  # type: ignore[misc]
                samplers.thread.run(sync(weights, version))

        other = threading.Thread(target=publish)
        other.start()
        rollouts = drawn_by(sampler, prompts, params)
        other.join()
        truth = {**left.versions, **right.versions}
    for rollout in rollouts:
        assert rollout.policy_versions is not None
        found = [v for first, last, v in rollout.policy_versions for _ in range(first, last)]
        assert found == [by_tag[tag] for tag in truth[sample_seed(params.seed, 3, rollout.sample, rollout.group)]]
        assert len(found) == len(rollout.token_ids)
        assert rollout.policy_version == found[0]
    several = sum(len(rollout.policy_versions or ()) > 1 for rollout in rollouts)
    print(f"\n{several} of {len(rollouts)} rollouts have tokens of several versions")
    assert several >= 5


def test_spans_cover_a_response_without_empty_ones() -> None:
    stream = SampleStream([5], sampling())
    live = Live(stream, [(0, 3)])
    live.mark(4)  # before the first token
    stream.token_ids += [1, 2]
    live.mark(5)
    live.mark(6)
    stream.token_ids += [3]
    live.mark(7)  # behind the last
    assert live.spans() == [[0, 2, 4], [2, 3, 6]]


def test_a_response_cut_short_by_the_server_stops_the_run(old: Weights) -> None:
    with SamplingServer(old, lambda: "clipped") as server, samplers_of(server.url) as samplers:
        sampler = sampler_over(samplers)
        sampler._asked = True
        with pytest.raises(RunFailed, match=r"cut short by the server at 2 tokens.*max_tokens = 8.*--max-model-len"):
            drawn_by(sampler, made_prompts(1), sampling(1))


def test_a_prompt_that_would_be_cut_short_is_found_before_anything_is_asked(old: Weights) -> None:
    with SamplingServer(old) as server, samplers_of(server.url) as samplers:
        prompt = Prompt("long", "?", 0, tuple(range(3, 13)))
        with pytest.raises(RunFailed, match=r"'long' with max_tokens 247 needs 257 tokens.*256 of the servers"):
            drawn_by(sampler_over(samplers), [prompt], sampling(max_tokens=247))
        with pytest.raises(ScopeError, match="has no tokens"):
            drawn_by(sampler_over(samplers), [Prompt("p", "?", 0, ())], sampling())
        assert not server.bodies


def test_an_id_that_the_student_has_no_row_for_stops_the_run(old: Weights) -> None:
    with SamplingServer(old, lambda: "foreign") as server, samplers_of(server.url) as samplers:
        sampler = sampler_over(samplers)
        sampler._asked = True
        with pytest.raises(RunFailed, match=r"drew id 325.*ids below 320"):
            drawn_by(sampler, made_prompts(1), sampling(1))


def test_only_the_students_end_tokens_end_a_response(old: Weights) -> None:
    prompts, params = made_prompts(3), sampling(2, stop_token_ids=(4,), max_tokens=20)
    with SamplingServer(old) as server, samplers_of(server.url) as samplers:
        expected = content(drawn_by(sampler_over(samplers), prompts, params))
        server.eos = expected[0][1][3]  # an end token that the server alone knows
        assert content(drawn_by(sampler_over(samplers), prompts, params)) == expected
        loose = drawn_by(sampler_over(samplers, known_ends=False), prompts, params)
        assert loose[0].token_ids == expected[0][1][: expected[0][1].index(server.eos) + 1]
        assert loose[0].finish_reason == "stop"


@pytest.mark.parametrize("params", [sampling(1), sampling(1, temperature=1.0, top_k=5)])
def test_a_server_that_reports_other_log_probs_is_refused(params: Any, old: Weights) -> None:
    with SamplingServer(old, honest=False) as server, samplers_of(server.url) as samplers:
        with pytest.raises(RunFailed, match="--logprobs-mode processed_logprobs"):
            drawn_by(sampler_over(samplers), made_prompts(1), params)
        assert not any(body["stream"] for body in server.bodies)


def test_without_temperature_and_the_like_a_servers_own_log_probs_are_right(old: Weights) -> None:
    with SamplingServer(old, honest=False) as server, samplers_of(server.url) as samplers:
        params = sampling(2, temperature=1.0)
        assert are_the_models_own(drawn_by(sampler_over(samplers), made_prompts(3), params), old, 1.0)


def test_where_log_probs_are_not_needed_wrong_ones_are_left_out(old: Weights) -> None:
    with SamplingServer(old, honest=False) as server, samplers_of(server.url) as samplers:
        rollouts = drawn_by(sampler_over(samplers, need_logprobs=False), made_prompts(3), sampling(2))
    assert all(rollout.token_ids and not rollout.logprobs for rollout in rollouts)


def test_dead_servers_stop_the_run_at_the_deadline(old: Weights) -> None:
    with SamplingServer(old) as server, samplers_of(server.url, pool={"deadline_s": 0.3}) as samplers:
        sampler = sampler_over(samplers)
        server.kill()
        with pytest.raises(RunFailed, match=r"sample 'p0/3/0' of the student could not be had") as error:
            drawn_by(sampler, made_prompts(1), sampling(1))
    assert error.value.exit_code == 1


def test_an_interrupt_leaves_no_task_thread_or_request(old: Weights) -> None:
    before = threading.active_count()
    with SamplingServer(old) as server:
        server.token_delay_s = 0.05
        with samplers_of(server.url) as samplers:
            sampler = sampler_over(samplers)

            async def some() -> None:
                source = sampler.sample(made_prompts(4), sampling(4), step=0, policy_version=0)
                async for _ in source:
                    break
                raise KeyboardInterrupt

            with pytest.raises(KeyboardInterrupt):
                asyncio.run(some())
            _until(lambda: samplers.thread.tasks() == 0)
            assert [samplers.in_flight(endpoint) for endpoint in samplers.endpoints] == [0]
            assert [endpoint.in_flight for endpoint in samplers.endpoints] == [0]
        samplers.close()
    assert threading.active_count() == before


def test_requests_go_where_the_fewest_tokens_are_outstanding(old: Weights) -> None:
    left, right = SamplingServer(old), SamplingServer(old)
    with servers(left, right), samplers_of(left.url, right.url, pool={"max_concurrency": 4}) as samplers:
        left.token_delay_s, right.token_delay_s = 0.15, 0.0
        rollouts = drawn_by(sampler_over(samplers), made_prompts(20), sampling(2))
        assert left.most_in_flight <= 6
    shares = Counter(rollout.sampling["server"] for rollout in rollouts)
    assert shares[right.url] > shares[left.url] > 0


def test_a_key_is_in_no_error(old: Weights) -> None:
    with SamplingServer(old, key=KEY) as server:
        with (
            pytest.raises(ConfigError, match=r"answers 401.*rollout.api_key_env") as error,
            samplers_of(server.url, key=f"{KEY}-other"),
        ):
            pass
        assert KEY not in str(error.value)
        server.plan = lambda: "error_event"
        with samplers_of(server.url, key=KEY, pool={"deadline_s": 0.2}) as samplers:
            sampler = sampler_over(samplers)
            sampler._asked = True
            with pytest.raises(RunFailed, match="it broke") as failed:
                drawn_by(sampler, made_prompts(1), sampling(1))
        assert KEY not in str(failed.value)


def test_development_routes_that_others_reach_are_refused_unless_allowed(old: Weights) -> None:
    host = _address_of_this_machine()
    with SamplingServer(old, host=host) as server:
        told = r"development routes.*rollout.allow_unprotected_routes"
        with pytest.raises(ConfigError, match=told), samplers_of(server.url):
            pass
        with samplers_of(server.url, client={"allow_unprotected": True}) as samplers:
            assert len(drawn_by(sampler_over(samplers), made_prompts(1), sampling(1))) == 1
    with SamplingServer(old) as server, samplers_of(server.url):
        pass


def test_events_are_cut_the_same_however_the_bytes_come() -> None:
    text = b": hello\r\ndata: one\r\n\r\nevent: x\ndata:two\ndata: more\n\n\n\ndata: [DONE]\n\ndata: rest"
    for size in range(1, len(text)):
        events, found = Events(), []
        for start in range(0, len(text), size):
            found += events.feed(text[start : start + size])
        assert found == [b"one", b"two\nmore", b"[DONE]"]


def _until(condition: Any, within_s: float = 20.0) -> None:
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, "it never came to it"
        time.sleep(0.005)


def _address_of_this_machine() -> str:
    import socket

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
        except OSError:
            pytest.skip("no network interface besides loopback")
        return str(probe.getsockname()[0])
