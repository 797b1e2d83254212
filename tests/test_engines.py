"""What ``build_engines`` joins: which setting reaches which engine, checked against tables and by a run's own dump."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from scope_opd.cli import engines
from scope_opd.cli.engines import Built, build_engines
from scope_opd.config import Config, load_config
from scope_opd.evaluate.run import evaluation_seed
from scope_opd.models.rows import positions_of, stack
from scope_opd.rollout.local import LocalSampler
from scope_opd.teacher.local import LocalTeacher
from scope_opd.train.loop import train
from scope_opd.types import SamplingParams
from tiny import save_pair

TEMPERATURE = 0.6


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders student, teacher, and wide: a teacher whose head has more rows than its tokenizer; rows.jsonl."""
    folder = tmp_path_factory.mktemp("pair")
    save_pair(folder / "student", "qwen3", seed=1)
    save_pair(folder / "teacher", "llama", seed=2)
    save_pair(folder / "wide", "llama", seed=3, vocab_size=2000)
    rows = [{"id": f"p{i}", "problem": f"What is {i} + {i + 1}?", "answer": 2 * i + 1} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def configured(pair: Path, *more: str, teacher: str = "teacher") -> Config:
    return load_config(
        None,
        [
            f"model.path={pair / 'student'}", f"teacher.path={pair / teacher}", f"data.train={pair / 'rows.jsonl'}",
            "rollout.n=3", "rollout.max_tokens=6", f"rollout.temperature={TEMPERATURE}", "train.prompts_per_step=2",
            "train.steps=2", "train.lr=1e-2", "train.device=cpu", "objective.truncated=incorrect", "run.export=false",
            "run.rollouts_logged=1000", "run.alarms.uniform_weights=off", "run.alarms.truncation=off", *more,
        ],
    )  # fmt: skip


def sampler_of(built: Built) -> LocalSampler:
    sampler = built.engines.pipeline.sampler  # type: ignore[attr-defined]
    assert isinstance(sampler, LocalSampler)
    return sampler


def teacher_of(built: Built) -> LocalTeacher:
    teacher = built.engines.pipeline.teacher  # type: ignore[attr-defined]
    assert isinstance(teacher, LocalTeacher)
    return teacher


# Convention -> temperature of the teacher's log-probs, and of the student's.
TEMPERATURES = {"matched": (TEMPERATURE, TEMPERATURE), "released": (1.0, TEMPERATURE), "raw": (1.0, 1.0)}


@pytest.mark.parametrize("convention", TEMPERATURES)
def test_every_convention_reaches_teacher_and_student(convention: str, pair: Path) -> None:
    built = build_engines(configured(pair, f"objective.temperature={convention}"))
    settings = built.engines.surrogate
    assert (teacher_of(built).temperature, settings.student_temperature) == TEMPERATURES[convention]
    assert settings.sampling_temperature == built.engines.sampling.temperature == TEMPERATURE


# Settings -> aggregation, clip, dual_clip, correction_cap.
SURROGATES: dict[str, tuple[Any, ...]] = {
    "": ("prompt", None, None, 2.0),
    "objective.method=grpo": ("token", 0.2, 3.0, 2.0),
    "objective.method=grpo objective.clip=0.3 objective.dual_clip=5.0": ("token", 0.3, 5.0, 2.0),
    "objective.method=opd objective.sampler_correction_cap=1.5": ("token", None, None, 1.5),
    "objective.method=grpo objective.clip=off objective.dual_clip=off": ("token", None, None, 2.0),
    "objective.method=grpo objective.clip=off": ("token", None, 3.0, 2.0),
    "objective.preset=paper": ("prompt", None, None, 2.0),
    "objective.preset=paper objective.method=grpo": ("token", 0.2, 3.0, 2.0),
    "objective.clip=0.1 objective.aggregation=sequence": ("sequence", 0.1, None, 2.0),
    "objective.preset=as_released": ("released", None, None, 2.0),
}  # fmt: skip


@pytest.mark.parametrize("settings", SURROGATES)
def test_the_surrogate_is_the_configs_and_else_the_methods(settings: str, pair: Path) -> None:
    got = build_engines(configured(pair, *settings.split())).engines.surrogate
    assert (got.aggregation, got.clip, got.dual_clip, got.correction_cap) == SURROGATES[settings]


def test_what_the_teacher_is_told_and_what_samples(pair: Path) -> None:
    more = ["teacher.max_tokens_per_batch=77", "teacher.log_prob_floor=-9.0", "rollout.max_rows=4", "run.seed=5"]
    built = build_engines(configured(pair, *more))
    teacher, sampler, params = teacher_of(built), sampler_of(built), built.engines.sampling
    assert (teacher.max_tokens_per_batch, teacher.log_prob_floor) == (77, -9.0)
    assert not any(parameter.requires_grad for parameter in teacher.view.model.parameters())
    assert sampler.model is built.engines.model
    assert (sampler.max_rows, sampler.autocast, sampler.vocabulary) == (4, None, None)
    assert (params.n, params.max_tokens, params.seed) == (3, 6, 5)
    assert (params.top_p, params.top_k, params.repetition_penalty) == (1.0, 0, 1.0)


def test_the_teachers_logits_and_the_reference_are_there_where_they_are_asked_for(pair: Path) -> None:
    plain = build_engines(configured(pair)).engines
    assert (plain.teacher_head, plain.reference, plain.evaluator) == (None, None, None)
    asked = build_engines(configured(pair, "objective.distill=full_kl", "objective.reference_kl=0.1")).engines
    assert asked.teacher_head is not None
    assert asked.reference is not None
    assert (asked.surrogate.distill, asked.surrogate.reference_kl) == ("full_kl", 0.1)
    few = build_engines(configured(pair, "objective.distill=topk_forward_kl", "objective.topk=7")).engines
    assert few.teacher_head is not None
    assert (few.surrogate.distill, few.surrogate.topk) == ("topk_forward_kl", 7)
    assert few.surrogate.common_vocabulary


@pytest.mark.parametrize("convention", TEMPERATURES)
def test_the_reference_is_a_frozen_copy_at_the_students_temperature(convention: str, pair: Path) -> None:
    made = build_engines(configured(pair, "objective.reference_kl=0.1", f"objective.temperature={convention}")).engines
    assert made.reference is not None
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        scaled = made.model(ids).logits[0, 1:4] / TEMPERATURES[convention][1]
        expected = scaled.log_softmax(-1).gather(-1, ids[0, 2:, None])[:, 0]
        for parameter in made.model.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    for packed in (False, True):
        rows = stack([ids[0].tolist(), [5, 6]], packed=packed)
        found = made.reference(rows, positions_of([2, 1], [3, 1], packed=packed))
        assert not found.requires_grad
        torch.testing.assert_close(found[:3], expected, atol=1e-4, rtol=0)


def test_evaluation_samples_as_eval_says_and_on_a_stream_of_its_own(
    pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(
        pair, f"data.eval={pair / 'rows.jsonl'}", "eval.at_end=true", "eval.n=2", "eval.problems=3", "run.seed=5",
        "eval.temperatures=[0.7, 1.1]", "eval.top_p=0.9", "eval.top_k=17", "eval.repetition_penalty=1.1",
        "eval.max_tokens=4", "chat.stop_token_ids=[9]",
    )  # fmt: skip
    built = build_engines(config)
    seen: list[tuple[Any, SamplingParams, int]] = []
    real = engines.evaluate

    async def listening(sampler: Any, verifier: Any, prompts: Any, params: SamplingParams, **more: Any) -> Any:
        seen.append((sampler, params, len(prompts)))
        return await real(sampler, verifier, prompts, params, **more)

    monkeypatch.setattr(engines, "evaluate", listening)
    assert built.engines.evaluator is not None
    answer: Any = built.engines.evaluator(0, 0)
    rows = asyncio.run(answer)
    assert [row["temperature"] for row in rows] == [0.7, 1.1]
    for (sampler, params, problems), temperature in zip(seen, (0.7, 1.1), strict=True):
        assert sampler.model is built.engines.model
        assert (params.temperature, params.n, params.max_tokens, problems) == (temperature, 2, 4, 3)
        assert (params.top_p, params.top_k, params.repetition_penalty) == (0.9, 17, 1.1)
        assert params.seed == evaluation_seed(5) != built.engines.sampling.seed
        assert params.stop_token_ids == built.engines.sampling.stop_token_ids
        assert 9 in params.stop_token_ids


@pytest.mark.parametrize("convention", ["matched", "released"])
def test_a_dump_holds_the_teachers_logprobs_at_the_conventions_temperature(
    convention: str, pair: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = configured(pair, "objective.method=opd", f"objective.temperature={convention}", f"run.dir={run}")
    train(config, build_engines(config).engines, progress=False)
    teacher = AutoModelForCausalLM.from_pretrained(pair / "teacher").eval()
    dumped = [json.loads(line) for line in (run / "rollouts.jsonl").read_text().splitlines()]
    assert len(dumped) == 12
    for row in dumped:
        ids = torch.tensor([[*row["prompt_token_ids"], *row["token_ids"]]])
        with torch.no_grad():
            logits = teacher(ids).logits[0, len(row["prompt_token_ids"]) - 1 : -1]
        expected = (logits / TEMPERATURES[convention][0]).log_softmax(-1)
        picked = expected.gather(-1, torch.tensor(row["token_ids"])[:, None])[:, 0]
        assert row["teacher_logprobs"] == pytest.approx(picked.tolist(), abs=1e-4)


def test_kd_draws_only_what_the_student_has_a_row_for(pair: Path, tmp_path: Path) -> None:
    config = configured(
        pair, "objective.method=kd", "rollout.temperature=2.0", "run.seed=1", f"run.dir={tmp_path / 'run'}",
        teacher="wide",
    )  # fmt: skip
    built = build_engines(config)
    sampler = sampler_of(built)
    assert sampler.vocabulary == built.engines.model.get_input_embeddings().num_embeddings == 320
    assert sampler.model.config.vocab_size == 2000
    rollouts = built.engines.pipeline.collect(
        built.train_prompts, built.engines.sampling, step=0, policy_version=0
    ).rollouts
    assert max(max(rollout.token_ids) for rollout in rollouts) < 320
    assert train(config, built.engines, progress=False).steps == 2


class Leading:
    """The first of two ranks, the other of which is not there."""

    world, rank, local_rank, leads = 2, 0, 0, True

    def register(self, name: str, job: Any) -> None: ...

    def meet(self, value: Any = None) -> Any:
        return value


@pytest.mark.parametrize(
    ("settings", "copies"),
    [("objective.method=kd", 0), ("objective.method=kd eval.at_end=true data.eval={rows}", 1), ("", 1)],
)
def test_with_several_ranks_a_plain_copy_of_the_student_is_kept_where_something_decodes_with_it(
    settings: str, copies: int, pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    real = engines.plain_student
    monkeypatch.setattr(engines, "plain_student", lambda *given: made.append(real(*given)) or made[-1])
    words = settings.format(rows=pair / "rows.jsonl").split()
    built = build_engines(configured(pair, *words), ranks=Leading()).engines  # type: ignore[arg-type]
    assert len(made) == copies
    assert (built.trainee is None) == (copies == 0)
    assert built.model is (made[0] if copies else built.trained)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ("", None),
        ("objective.preset=paper objective.method=grpo", None),
        ("objective.preset=as_released", None),
        ("objective.preset=as_released objective.method=dual_path", None),
        ("objective.preset=as_released objective.method=opd", "preset is meant for scope"),
        ("objective.method=kd", None),
        ("objective.method=kd teacher.temperature=0.6", None),
        ("objective.method=kd teacher.temperature=1.2", "its logits tend to 0.5 times the teacher's"),
        ("teacher.temperature=1.2", None),
        ("objective.temperature=raw", "use 'matched'"),
    ],
)
def test_what_is_odd_in_the_settings_is_warned_of_at_the_start(settings: str, words: str | None, pair: Path) -> None:
    warnings = build_engines(configured(pair, *settings.split())).warnings
    assert [words in warning for warning in warnings] == ([True] if words else [])  # type: ignore[operator]


def test_max_rows_cuts_the_training_rows_alone(pair: Path) -> None:
    built = build_engines(
        configured(pair, "data.max_rows=2", f"data.eval={pair / 'rows.jsonl'}", "eval.at_end=true", "eval.problems=5")
    )
    assert (len(built.train_prompts), len(built.eval_prompts)) == (2, 5)


@pytest.mark.parametrize(
    ("device", "dtype", "expected"),
    [("cpu", "float32", None), ("cuda", "float32", torch.bfloat16), ("cuda", "bfloat16", None)],
)
def test_autocast_follows_device_and_weights_in_training_and_evaluation_alike(
    device: str, dtype: str, expected: torch.dtype | None, pair: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = configured(pair, f"train.param_dtype={dtype}", f"data.eval={pair / 'rows.jsonl'}", "eval.at_end=true")
    assert engines.autocast_dtype(config, torch.device(device)) == expected
    seen: list[torch.dtype | None] = []
    real = engines.eval_sampler

    def listening(config: Config, model: Any, tokenizer: Any, autocast: torch.dtype | None) -> LocalSampler:
        seen.append(autocast)
        return real(config, model, tokenizer, autocast)

    monkeypatch.setattr(engines, "eval_sampler", listening)
    monkeypatch.setattr(engines, "autocast_dtype", lambda *_: expected)
    built = build_engines(config)
    engines.build_model_evaluator(config)
    assert seen == [expected, expected]
    assert sampler_of(built).autocast == expected
