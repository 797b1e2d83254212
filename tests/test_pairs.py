r"""`scope train` on pairs of other architectures than the zoo's, from a parquet file judged by ``\boxed{}``.

The folders are made here: random Llama (untied embeddings), Gemma 2 (soft-caps, sliding window) and GPT-NeoX, with a
byte-level BPE trained here. A *guesser* is such a model after a moment of maximum likelihood on every answer alike: it
knows how to answer and not what, so that both paths of SCOPE are met. Two runs go through the real command line in
processes of their own, the others through the same entry point in this one; together they set every key of
``[objective]`` and ``[train]``, and every named choice of each. Not covered: learning anything.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pyarrow
import pyarrow.parquet
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from scope_opd.cli.main import main
from scope_opd.config import PRESETS, ObjectiveConfig, TrainConfig, load_config
from scope_opd.objective.methods import method_names
from scope_opd.train.shards import load_weights
from tiny import EOS_ID, tiny_model, tiny_tokenizer

SUFFIX = " Put it in a box."
PROBLEMS = [(one, other) for one in range(1, 5) for other in range(1, 5)]
ANSWERS = (3, 4, 5)
STEPS, PROMPTS, N = 3, 4, 6
COMMON = [
    f"chat.suffix={SUFFIX}", "data.problem_column=question", "data.answer_column=gold", "data.max_prompt_tokens=96",
    f"rollout.n={N}", "rollout.max_tokens=14", "rollout.temperature=0.9", f"train.steps={STEPS}",
    f"train.prompts_per_step={PROMPTS}", "train.lr=1e-3", "train.threads=1", "train.device=cpu",
    "run.rollouts_logged=1000", "run.alarms.uniform_weights=off", "run.alarms.truncation=off",
    "run.alarms.length_growth=off", "run.alarms.entropy_halved=off",
]  # fmt: skip
PLUGIN = """
from dataclasses import dataclass
from scope_opd.objective.methods import Credit, MethodDefaults, register

@register("wrong_alone")
@dataclass(frozen=True)
class WrongAlone(MethodDefaults):
    weight: float = 1.0

    def needs_teacher(self, correct):
        return not correct

    def credit(self, group):
        wrong = group.live & ~group.correct & group.scored
        return Credit(0.0 * group.rewards, self.weight * wrong.double(), group.masked | ~(group.correct | wrong))
"""

# Runs in this process: student, teacher, settings.
RUNS: dict[str, tuple[str, str, list[str]]] = {
    "random weights, ends by a preset": (
        "random-llama", "random-neox",
        ["objective.method=scope", "objective.preset=paper", "train.optimizer=muon", "train.schedule=cosine",
         "train.warmup_steps=1", "train.min_lr_ratio=0.1", "train.weight_decay=0.1", "train.grad_clip=0.5",
         "verify.fallback=false"],  # else a number at the end of noise may be right by chance
    ),
    "released": (
        "llama", "gemma2",
        ["objective.preset=as_released", "train.param_dtype=bfloat16", "teacher.dtype=bfloat16",
         "train.betas=[0.9, 0.95]", "train.eps=1e-6", "train.shard=hybrid", "train.collective_timeout_s=60",
         "train.packing=false"],
    ),
    "documented, against the flow": (
        "neox", "llama",
        ["objective.preset=as_documented", "objective.truncated=ignore", "objective.scale=sum",
         "objective.teacher_weight=uniform", "objective.aggregation=sequence", "train.schedule=linear",
         "objective.distill=topk_reverse_kl", "objective.topk=5", "train.offload=optimizer",
         "train.activation_checkpointing=offload"],
    ),
    "exact divergence, anchored": (
        "gemma2", "random-neox",
        ["objective.method=scope", "objective.distill=full_kl", "objective.reference_kl=0.05", "objective.tau=0.5",
         "objective.student_weight=uniform", "objective.teacher_weight=ppl", "train.activation_checkpointing=full",
         "train.max_tokens_per_microbatch=128", "objective.end_token=exclude"],
    ),
    "opd at two temperatures": (
        "llama", "random-neox",
        ["objective.method=opd", "objective.temperature=raw", "objective.sampler_correction_cap=1.5",
         "objective.aggregation=token", "train.schedule=constant", "objective.end_token=map", "train.offload=off",
         "train.activation_checkpointing=off", "train.shard=full"],
    ),
    "grpo, updates clipped": (
        "neox", "gemma2",
        ["objective.method=grpo", "objective.clip=0.01", "objective.dual_clip=1.5", "objective.reward_threshold=0.9",
         "train.updates_per_batch=2", "train.optimizer=adamw", "train.param_dtype=float32"],
    ),
    "kd": ("random-llama", "gemma2", ["objective.method=kd", "teacher.temperature=0.7", "train.updates_per_batch=2",
                                      "train.optimizer=adamw_8bit"]),
    "reward and distillation": (
        "llama", "gemma2",
        ["objective.method=reward_opd", "objective.beta=0.3", "objective.temperature=released",
         "objective.distill=sampled", "objective.aggregation=released", "objective.end_token=score"],
    ),
    "positive": ("llama", "gemma2", ["objective.method=positive", "objective.truncated=incorrect",
                                       "objective.clip=off", "objective.dual_clip=off", "train.grad_clip=off"]),
    "dual path": ("gemma2", "llama", ["objective.method=dual_path", "objective.aggregation=prompt",
                                      "objective.distill=jsd", "train.minibatches=2"]),
    "dual path, by the teacher's likeliest": (
        "llama", "gemma2", ["objective.method=dual_path", "objective.distill=topk_forward_kl"]),
}  # fmt: skip
IN_A_PROCESS: dict[str, tuple[str, str, list[str]]] = {
    "scope": (
        "llama", "gemma2",
        ["objective.method=scope", "objective.tau=0.8", "objective.student_weight=ppl", "objective.scale=mean",
         "objective.teacher_weight=inverse_ppl", "objective.temperature=matched", "data.eval={eval}",
         "eval.at_end=true", "eval.n=4", "eval.problems=5"],
    ),
    "a method of one's own": (
        "gemma2", "llama",
        ["objective.plugins=['own_methods']", "objective.method=wrong_alone",
         "objective.method_settings={{weight=0.5}}", "objective.student_weight=inverse_ppl"],
    ),
}  # fmt: skip


def guesser(model: Any, tokenizer: Any) -> Any:
    """Teach a model to end every prompt with one of the answers in a box, whichever."""
    rows, targets = [], []
    for one, other in PROBLEMS[::3]:
        message = [{"role": "user", "content": question(one, other) + SUFFIX}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        for answer in ANSWERS:
            response = [*tokenizer(rf"\boxed{{{answer}}}")["input_ids"], EOS_ID]
            rows.append([*prompt, *response])
            targets.append([-100] * len(prompt) + response)
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    labels = torch.tensor([[*row, *[-100] * (width - len(row))] for row in targets])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model


def question(one: int, other: int) -> str:
    return f"What is {one} + {other}?"


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Folders random-llama, random-neox and the guessers llama, gemma2, neox; train.parquet, eval.parquet."""
    folder, tokenizer, threads = tmp_path_factory.mktemp("pairs"), tiny_tokenizer(), torch.get_num_threads()
    torch.set_num_threads(1)
    models = {name: tiny_model(kind, seed=seed) for name, kind, seed in (
        ("random-llama", "llama", 1), ("random-neox", "gpt_neox", 2), ("llama", "llama", 3), ("gemma2", "gemma2", 4),
        ("neox", "gpt_neox", 5),
    )}  # fmt: skip
    for name, model in models.items():
        if not name.startswith("random"):
            guesser(model, tokenizer)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    rows = [
        {"question": question(*pair), "gold": sum(pair), "level": "easy"} for pair in PROBLEMS if sum(pair) in ANSWERS
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
    held_out = [{"question": f"Say {answer}.", "gold": answer} for answer in ANSWERS * 2]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(held_out), folder / "eval.parquet")
    (folder / "run.toml").write_text(f'[data]\ntrain = "{folder / "train.parquet"}"\n')
    (folder / "own_methods.py").write_text(PLUGIN)
    yield folder
    torch.set_num_threads(threads)


def options(pairs: Path, student: str, teacher: str, settings: list[str]) -> list[str]:
    paths = [f"model.path={pairs / student}", f"teacher.path={pairs / teacher}"]
    own = [setting.format(eval=pairs / "eval.parquet") for setting in settings]
    return [word for value in [*paths, *COMMON, *own] for word in ("--set", value)]


def refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def rows_of(file: Path) -> list[dict[str, Any]]:
    """Strict JSON, one object a line."""
    return [json.loads(line, parse_constant=refuse) for line in file.read_text(encoding="utf-8").splitlines()]


def check_run(run: Path, student: Path) -> list[dict[str, Any]]:
    """What every run must leave; returns its metrics."""
    rows = rows_of(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(STEPS))
    assert all(math.isfinite(row["loss"]) and row["grad_norm"] > 0 for row in rows)
    assert not any(row["update/skipped"] or row["update/not_finite"] for row in rows)
    rows_of(run / "events.jsonl")
    assert len(rows_of(run / "rollouts.jsonl")) == STEPS * PROMPTS * N
    exported = AutoModelForCausalLM.from_pretrained(run / "export")
    saved = AutoModelForCausalLM.from_pretrained(student, dtype=exported.dtype)
    load_weights(saved, run / "checkpoints" / f"step-{STEPS:06d}")
    weights, start = exported.state_dict(), AutoModelForCausalLM.from_pretrained(student).state_dict()
    assert all(torch.equal(weights[name], tensor) for name, tensor in saved.state_dict().items())
    assert any(not torch.equal(weights[name].float(), start[name].float()) for name in start)
    assert AutoTokenizer.from_pretrained(run / "export").get_vocab() == tiny_tokenizer().get_vocab()
    assert exported.config.model_type == AutoModelForCausalLM.from_pretrained(student).config.model_type
    return rows


def check_weights(run: Path, capsys: pytest.CaptureFixture[str], *given: str) -> None:
    """`scope weights` on a dump gives the run's own numbers."""
    dumped = rows_of(run / "rollouts.jsonl")
    capsys.readouterr()
    assert main(["weights", str(run / "rollouts.jsonl"), *given]) == 0
    weighed = [json.loads(line, parse_constant=refuse) for line in capsys.readouterr().out.splitlines()]
    assert [(row["id"], row["masked"]) for row in weighed] == [(row["id"], row["masked"]) for row in dumped]
    for row, own in zip(weighed, dumped, strict=True):
        assert row["reinforce"] == pytest.approx(own["reinforce"], abs=1e-9)
        assert row["distill"] == pytest.approx(own["distill"], abs=1e-9)


def command(pairs: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-m", "scope_opd", *words],
        capture_output=True,
        text=True,
        cwd=pairs,
        env=environment,
        check=False,
    )


class TestTheCommandLine:
    def test_scope_on_two_folders_and_a_parquet_file(
        self, pairs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        student, teacher, settings = IN_A_PROCESS["scope"]
        given = options(pairs, student, teacher, settings)
        assert main(["doctor", str(pairs / "run.toml"), *given, "--set", f"run.dir={tmp_path / 'run'}"]) == 0
        assert "FAIL" not in capsys.readouterr().out
        run = tmp_path / "run"
        done = command(pairs, "train", str(pairs / "run.toml"), *given, "--run-dir", str(run))
        assert done.returncode == 0, done.stderr
        assert f"done: {STEPS} steps" in done.stdout
        assert "Avg@4" in done.stdout
        assert "Traceback" not in done.stderr
        rows = check_run(run, pairs / student)
        # Both paths are met, and only wrong rollouts are scored.
        assert all(row["ppl/student_mean"] and row["ppl/teacher_mean"] for row in rows)
        assert all(0 < row["accuracy"] < 1 and row["ess/student"] and row["ess/teacher"] for row in rows)
        dumped = rows_of(run / "rollouts.jsonl")
        scored = [row for row in dumped if row["teacher_logprobs"] is not None]
        assert sum(row["teacher/scored_rollouts"] for row in rows) == len(scored)
        assert sum(row["teacher/scored_tokens"] for row in rows) == sum(len(row["token_ids"]) for row in scored)
        assert {row["correct"] for row in scored} == {False}
        assert all(row["reinforce"] > 0 == row["distill"] for row in dumped if row["correct"])
        check_weights(run, capsys, "--tau", "0.8", "--scale", "mean")
        (evaluation,) = rows_of(run / "eval.jsonl")
        assert len(evaluation["correct_counts"]) == 5
        report = tmp_path / "report.html"
        assert main(["report", str(run), "--out", str(report)]) == 0
        assert "<html" in report.read_text(encoding="utf-8")[:500]

    def test_a_method_of_ones_own_by_a_student_with_soft_caps(self, pairs: Path, tmp_path: Path) -> None:
        student, teacher, settings = IN_A_PROCESS["a method of one's own"]
        run = tmp_path / "run"
        given = options(pairs, student, teacher, settings)
        done = command(pairs, "train", str(pairs / "run.toml"), *given, "--run-dir", str(run))
        assert done.returncode == 0, done.stderr
        check_run(run, pairs / student)
        numbers = {(row["correct"], row["reinforce"], row["distill"]) for row in rows_of(run / "rollouts.jsonl")
                   if not row["masked"]}  # fmt: skip
        assert numbers == {(True, 0.0, 0.0), (False, 0.0, 0.5)}


@pytest.fixture(scope="module")
def trained(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Trains a run of ``RUNS`` once; gives (its folder, its metrics)."""
    root = tmp_path_factory.mktemp("runs")
    done: dict[str, tuple[Path, list[dict[str, Any]]]] = {}

    def run(name: str) -> tuple[Path, list[dict[str, Any]]]:
        if name not in done:
            student, teacher, settings = RUNS[name]
            folder = root / str(len(done))
            given = options(pairs, student, teacher, settings)
            assert main(["train", str(pairs / "run.toml"), *given, "--run-dir", str(folder)]) == 0
            done[name] = folder, check_run(folder, pairs / student)
        return done[name]

    return run


class TestEverySwitch:
    def test_the_runs_set_every_key_and_every_choice_of_objective_and_train(self) -> None:
        given: set[tuple[str, str]] = set()
        for _, _, settings in [*RUNS.values(), *IN_A_PROCESS.values()]:
            given |= {(key, value) for key, _, value in (setting.partition("=") for setting in [*COMMON, *settings])}
        choices = set()
        for table, model in (("objective", ObjectiveConfig), ("train", TrainConfig)):
            for name, field in model.model_fields.items():
                literal = [
                    kind for kind in (field.annotation, *get_args(field.annotation)) if get_origin(kind) is Literal
                ]
                values = get_args(literal[0]) if literal else method_names() if name == "method" else [None]
                choices |= {(f"{table}.{name}", value) for value in values}
        assert {("objective.preset", preset) for preset in PRESETS} <= choices
        chosen = {key for key, _ in given}
        assert {f"{key}={value}" for key, value in choices if value and (key, value) not in given} == set()
        assert {key for key, _ in choices} - chosen == set()

    @pytest.mark.parametrize("name", RUNS)
    def test_a_run_ends_with_a_sound_folder(self, name: str, trained: Any) -> None:
        trained(name)

    @pytest.mark.parametrize(
        ("name", "given"),
        [
            ("random weights, ends by a preset", ["--preset", "paper"]),
            ("released", ["--preset", "as_released"]),
            ("documented, against the flow",
             ["--preset", "as_documented", "--truncated", "ignore", "--scale", "sum", "--teacher-weight", "uniform"]),
            ("exact divergence, anchored", ["--tau", "0.5", "--student-weight", "uniform", "--teacher-weight", "ppl"]),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )  # fmt: skip
    def test_weights_reproduces_the_runs_of_scope(
        self, name: str, given: list[str], trained: Any, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder, _ = trained(name)
        check_weights(folder, capsys, *given)

    def test_random_weights_send_everything_down_the_teachers_path(self, trained: Any) -> None:
        _, rows = trained("random weights, ends by a preset")
        assert all(row["groups/all_wrong"] == 1.0 and row["ess/student"] is None for row in rows)
        assert all(row["teacher/scored_rollouts"] == PROMPTS * N for row in rows)

    def test_schedules_are_those_asked_for(self, trained: Any) -> None:
        _, cosine = trained("random weights, ends by a preset")
        assert [row["lr"] for row in cosine] == pytest.approx([1e-3, 1e-3, 1e-3 * (0.1 + 0.9 / 2)])
        _, linear = trained("documented, against the flow")
        assert [row["lr"] for row in linear] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])

    def test_bfloat16_weights_stay_so_in_the_export(self, trained: Any) -> None:
        folder, _ = trained("released")
        exported = load_file(folder / "export" / "model.safetensors")
        assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
        master, _ = trained("documented, against the flow")
        assert {tensor.dtype for tensor in load_file(master / "export" / "model.safetensors").values()} == {
            torch.float32
        }

    def test_several_updates_a_batch_count_as_policy_versions_and_are_clipped(self, trained: Any) -> None:
        _, rows = trained("grpo, updates clipped")
        assert [row["policy_version"] for row in rows] == [0, 2, 4]
        assert any(row["clip/share"] > 0 for row in rows)
        assert all(row["teacher/scored_rollouts"] == 0 for row in rows)

    def test_the_reference_holds_the_student_to_its_start(self, trained: Any) -> None:
        _, rows = trained("exact divergence, anchored")
        assert rows[0]["kl/reference"] == pytest.approx(0.0, abs=1e-6)
        assert rows[-1]["kl/reference"] > 0
        assert all(row["padding/share"] < 0.05 for row in rows)

    def test_opd_scores_all_and_grpo_none(self, trained: Any) -> None:
        for name, share in (("opd at two temperatures", 1), ("reward and distillation", 1), ("positive", 0)):
            folder, rows = trained(name)
            finished = sum(row["finish_reason"] == "stop" for row in rows_of(folder / "rollouts.jsonl"))
            expected = share * finished
            assert sum(row["teacher/scored_rollouts"] for row in rows) == expected

    def test_kd_trains_on_what_the_teacher_samples(self, trained: Any) -> None:
        folder, rows = trained("kd")
        # The random student would never find a box; the teacher, a guesser, does.
        texts = [row["text"] for row in rows_of(folder / "rollouts.jsonl")]
        assert sum(r"\boxed{" in text for text in texts) > len(texts) / 2
        assert all(row["mismatch/kl"] is None for row in rows)
        assert [row["policy_version"] for row in rows] == [0, 2, 4]

    def test_the_resolved_config_of_a_run_is_one_that_runs(self, trained: Any) -> None:
        folder, _ = trained("exact divergence, anchored")
        config = load_config(folder / "config.toml")
        assert (config.objective.distill, config.objective.reference_kl, config.train.threads) == ("full_kl", 0.05, 1)
