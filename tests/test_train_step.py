"""Laws of the update: its gradient is that of docs/method.md written out with full logits in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from scope_opd.pipeline import StageStats
from scope_opd.train.batch import Batch, make_batch
from scope_opd.train.engines import Engines
from scope_opd.train.metrics import step_metrics
from scope_opd.train.step import Learner
from scope_opd.types import Rollout
from test_train_batch import distance
from tiny import tiny_model
from train_kit import TEMPERATURE, make_config, make_engines


def prepare(
    method: str = "reward_opd", dtype: torch.dtype = torch.float64, engines: dict[str, Any] | None = None, **tables: Any
) -> tuple[Engines, Learner, list[Rollout], Batch]:
    tables["objective"] = {"method": method, **tables.get("objective", {})}
    config = make_config(Path("unused"), **tables)
    made = make_engines(config, dtype=dtype, **(engines or {}))
    rollouts = made.pipeline.collect(made.schedule.batch(0), made.sampling, step=0, policy_version=0).rollouts
    made.credit(rollouts)
    batch = make_batch(rollouts, aggregation=made.surrogate.aggregation, max_tokens=256)
    return made, Learner(made, config.train), rollouts, batch


def recorded(logprobs: list[float] | None) -> torch.Tensor:
    return torch.tensor(logprobs, dtype=torch.float64)


def naive_logits(model: Any, rollout: Rollout) -> torch.Tensor:
    ids = torch.tensor([[*rollout.prompt_token_ids, *rollout.token_ids]])
    return model(ids).logits[0, len(rollout.prompt_token_ids) - 1 : -1]


def naive_gradient(engines: Engines, rollouts: list[Rollout], term: Callable[..., torch.Tensor]) -> list[torch.Tensor]:
    """Gradient of the sum of ``term(rollout, log pi at student and at sampling temperature, logits)`` / tokens."""
    settings, tokens = engines.surrogate, sum(len(r.token_ids) for r in rollouts)
    total = torch.zeros((), dtype=torch.float64)
    for rollout in rollouts:
        logits = naive_logits(engines.model, rollout)
        chosen = torch.tensor(rollout.token_ids)[:, None]
        student, sampling = (
            (logits / t).log_softmax(-1).gather(-1, chosen).squeeze(-1)
            for t in (settings.student_temperature, settings.sampling_temperature)
        )
        total = total + term(rollout, student, sampling, logits) / tokens
    engines.model.zero_grad()
    total.backward()
    grads = [parameter.grad.clone() for parameter in engines.model.parameters()]  # type: ignore[union-attr]
    engines.model.zero_grad()
    return grads


def off_policy(rollouts: list[Rollout], shift: float = 0.3) -> None:
    """Pretend that another policy sampled: half of the tokens were likelier under it, half less likely."""
    for rollout in rollouts:
        rollout.logprobs = [value + (shift if i % 2 else -shift) for i, value in enumerate(rollout.logprobs)]


@pytest.mark.parametrize("convention", ["matched", "released", "raw"])
def test_gradient_is_that_of_the_written_out_surrogate(convention: str) -> None:
    engines, learner, rollouts, _ = prepare(objective={"temperature": convention, "sampler_correction_cap": 1.2})
    off_policy(rollouts)
    batch = make_batch(rollouts, aggregation="token", max_tokens=256)

    def term(r: Rollout, student: torch.Tensor, sampling: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        correction = (sampling.detach() - recorded(r.logprobs)).exp().clamp(max=1.2)
        advantage = r.reinforce + r.distill * (recorded(r.teacher_logprobs) - student.detach())  # type: ignore[operator]
        return -(correction * advantage * student).sum()

    expected = naive_gradient(engines, rollouts, term)
    assert distance(learner.gradient(batch)[1], expected) < 1e-10
    assert engines.surrogate.student_temperature == (1.0 if convention == "raw" else TEMPERATURE)


def test_the_sampler_correction_compares_at_the_temperature_that_sampled() -> None:
    _, learner, _, batch = prepare(objective={"temperature": "raw"}, rollout={"max_tokens": 12})
    figures = learner.update(batch, 0.0).tokens
    assert figures.mismatch.abs().max() < 1e-5  # on policy: mu is the trainer's own policy at T
    assert not figures.capped.any()


def test_reference_kl_adds_its_k3_gradient_over_the_unmasked_tokens() -> None:
    engines, learner, rollouts, batch = prepare(objective={"reference_kl": 0.5})
    assert engines.reference is not None
    reference = tiny_model("qwen3", seed=2, dtype=torch.float64)  # the kit's anchor is its teacher

    def term(r: Rollout, student: torch.Tensor, sampling: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            rows = (naive_logits(reference, r) / TEMPERATURE).log_softmax(-1)
            anchor = rows.gather(-1, torch.tensor(r.token_ids)[:, None]).squeeze(-1)
            correction = (sampling - recorded(r.logprobs)).exp()
        advantage = r.reinforce + r.distill * (recorded(r.teacher_logprobs) - student.detach())  # type: ignore[operator]
        delta = anchor - student
        return (0.5 * (delta.exp() - delta - 1) - correction * advantage * student).sum()

    assert distance(learner.gradient(batch)[1], naive_gradient(engines, rollouts, term)) < 1e-10
    assert (learner.update(batch, 0.0).kl_reference or 0.0) > 0.0


def test_responses_of_the_teacher_are_learnt_as_plain_likelihood() -> None:
    engines, learner, rollouts, batch = prepare("kd")

    def term(r: Rollout, student: torch.Tensor, sampling: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        return -student.sum()

    assert distance(learner.gradient(batch)[1], naive_gradient(engines, rollouts, term)) < 1e-10
    assert not learner.update(batch, 0.0).tokens.mismatch.any()


def test_two_updates_use_the_policy_recorded_before_the_first() -> None:
    """With clip tiny, every token whose ratio moved the way of its advantage is clipped in the second pass."""
    _, learner, _, batch = prepare(
        "grpo", train={"updates_per_batch": 2, "lr": 1e-2}, objective={"clip": 1e-4}
    )  # fmt: skip
    outcome = learner.update(batch, 1e-2)
    assert outcome.updates == 2
    assert 0.2 < outcome.clipped <= 0.5
    single = prepare("grpo", objective={"clip": 1e-4})
    assert single[1].update(single[3], 1e-2).clipped == 0.0
    again = prepare("kd", train={"updates_per_batch": 2}, objective={"clip": 1e-4})
    assert again[1].update(again[3], 1e-2).clipped == 0.0


def test_the_second_update_uses_the_correction_recorded_before_the_first() -> None:
    """Off policy, c of the second update is pi_old / mu with the policy before the first, though that has moved."""
    engines, learner, rollouts, _ = prepare("positive", train={"updates_per_batch": 2, "grad_clip": 1e9})
    off_policy(rollouts)
    batch = make_batch(rollouts, aggregation="token", max_tokens=256)
    old = {}
    for rollout in rollouts:
        chosen = torch.tensor(rollout.token_ids)[:, None]
        with torch.no_grad():
            rows = (naive_logits(engines.model, rollout) / TEMPERATURE).log_softmax(-1)
        old[rollout.id] = rows.gather(-1, chosen).squeeze(-1)
    seen: list[list[torch.Tensor]] = []
    step = learner.optimizer.step
    moved: list[torch.Tensor] = []

    def second(lr: float) -> None:
        seen.append([parameter.grad.clone() for parameter in engines.model.parameters()])  # type: ignore[union-attr]
        if len(seen) == 1:  # the expected gradient is worked out at the weights that the second update met
            step(lr)

    learner.optimizer.step = second  # type: ignore[method-assign]
    assert learner.update(batch, 1e-2).updates == 2

    def term(r: Rollout, student: torch.Tensor, sampling: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        moved.append((student.detach() - old[r.id]).abs().max())
        correction = (old[r.id] - recorded(r.logprobs)).exp().clamp(max=2.0)
        return -(correction * r.reinforce * (student - old[r.id]).exp()).sum()

    expected = naive_gradient(engines, rollouts, term)  # at the weights after the first update
    assert distance(seen[1], expected) < 1e-10
    assert max(moved) > 0.1


def test_grad_clip_off_leaves_the_gradient_alone() -> None:
    engines, learner, _, batch = prepare(train={"grad_clip": "off"})
    moved: dict[str, float] = {}

    def look() -> None:
        grads = [p.grad for p in engines.model.parameters() if p.grad is not None]
        moved["norm"] = float(torch.nn.utils.get_total_norm(grads))

    assert learner.update(batch, 1e-3, before_change=look).grad_norm == moved["norm"]


def test_mismatch_capped_share_and_log_ratios_are_those_of_a_batch_made_by_hand() -> None:
    """One correct and one incorrect rollout, both scored; one token of each is outside the loss and counts nowhere."""
    engines, learner, _, _ = prepare("reward_opd", objective={"sampler_correction_cap": 1.5})
    prompt = engines.schedule.batch(0)[0]

    def made(name: str, tokens: list[int], shifts: list[float], gaps: list[float], scored: bool) -> Rollout:
        rollout = Rollout(name, "g", list(prompt.token_ids), tokens, [0.0] * len(tokens))
        with torch.no_grad():
            rows = (naive_logits(engines.model, rollout) / TEMPERATURE).log_softmax(-1)
        own = rows.gather(-1, torch.tensor(tokens)[:, None]).squeeze(-1).tolist()
        rollout.logprobs = [value + shift for value, shift in zip(own, shifts, strict=True)]
        if scored:
            rollout.teacher_logprobs = [value + gap for value, gap in zip(own, gaps, strict=True)]
        rollout.reinforce, rollout.distill, rollout.masked = 1.0, float(scored), False
        return rollout

    right = made("right", [11, 12, 13], [0.5, -1.0, 9.0], [0.25, 0.75, 9.0], True)
    unscored = made("unscored", [14, 16], [0.1, 0.1], [0.0, 0.0], False)
    wrong = made("wrong", [17, 18], [-0.2, -0.6], [-1.0, -2.0], True)
    right.loss_mask = [1, 1, 0]
    right.correct, unscored.correct, wrong.correct = True, True, False
    rollouts = [right, unscored, wrong]
    batch = make_batch(rollouts, aggregation="token", max_tokens=256)
    row = step_metrics(
        step=0, policy_version=0, lr=0.0, rollouts=rollouts, verdicts=[True, True, False], stats=StageStats(),
        batch=batch, outcome=learner.update(batch, 0.0), sampled_by_student=True, update_s=0.0, step_s=1.0,
    )  # fmt: skip
    assert row["tokens/trained"] == 6
    assert row["mismatch/kl"] == pytest.approx((0.5 - 1.0 + 0.1 + 0.1 - 0.2 - 0.6) / 6)
    assert row["mismatch/capped_share"] == pytest.approx(2 / 6)  # exp(1.0) and exp(0.6) exceed 1.5
    assert row["logratio/correct"] == pytest.approx((0.25 + 0.75) / 2)
    assert row["logratio/incorrect"] == pytest.approx(-1.5)


def test_gradient_is_clipped_to_its_norm() -> None:
    engines, learner, _, batch = prepare(train={"grad_clip": 0.01})
    moved: dict[str, float] = {}

    def look() -> None:
        grads = [p.grad for p in engines.model.parameters() if p.grad is not None]
        moved["norm"] = float(torch.nn.utils.get_total_norm(grads))

    outcome = learner.update(batch, 1e-3, before_change=look)
    assert outcome.grad_norm is not None
    assert outcome.grad_norm > 0.1
    assert moved["norm"] == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_number_that_is_not_finite_takes_no_optimiser_step(poison: float) -> None:
    engines, learner, rollouts, _ = prepare("positive", dtype=torch.float32)
    for rollout in rollouts:
        rollout.reinforce = poison
    before = copy.deepcopy(engines.model.state_dict())
    outcome = learner.update(make_batch(rollouts, aggregation="token", max_tokens=256), 1e-3)
    assert (outcome.updates, outcome.finite, outcome.loss) == (0, False, None)
    assert all(torch.equal(before[name], value) for name, value in engines.model.state_dict().items())
    assert not any(part.state for part in learner.optimizer._parts)


def test_activation_checkpointing_changes_memory_and_not_the_gradient() -> None:
    _, plain, _, batch = prepare(dtype=torch.float64)
    engines, saving, _, _ = prepare(dtype=torch.float64, train={"activation_checkpointing": "full"})
    assert distance(saving.gradient(batch)[1], plain.gradient(batch)[1]) < 1e-12
    assert not any(module.training for module in engines.model.modules())


def test_activation_checkpointing_leaves_dropout_off() -> None:
    _, plain, _, batch = prepare(dtype=torch.float64)
    model = tiny_model("qwen3", seed=1, dtype=torch.float64, attention_dropout=0.5)
    _, saving, _, _ = prepare(train={"activation_checkpointing": "full"}, engines={"model": model})
    assert distance(saving.gradient(batch)[1], plain.gradient(batch)[1]) < 1e-12


def test_pure_bfloat16_loses_small_updates_and_float32_masters_do_not() -> None:
    for dtype, expected_move in ((torch.float32, True), (torch.bfloat16, False)):
        engines, learner, _, batch = prepare(dtype=dtype, train={"weight_decay": 0.0})
        before = engines.model.get_input_embeddings().weight.clone()
        learner.update(batch, 1e-6)
        touched = batch.micro[0].rows.input_ids[0, 0]
        large = before[touched].abs() > 0.1  # neighbours of 0.1 are 5e-4 apart in bfloat16
        moved = bool((engines.model.get_input_embeddings().weight != before)[touched][large].any())
        assert moved is expected_move
