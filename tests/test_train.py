"""Whole runs in miniature: every method through the same trainer, and what a run folder holds afterwards."""

from __future__ import annotations

import ast
import json
import math
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import scope_opd.train
from scope_opd.config import load_config
from scope_opd.errors import DataError, RunFailed, RunFolderError
from scope_opd.objective.methods import method_names
from scope_opd.records import iter_jsonl, rollout_from_dict
from scope_opd.train import train
from scope_opd.train.export import export_model
from scope_opd.train.metrics import METRIC_KEYS, _perplexity, _strict
from scope_opd.types import Rollout
from tiny import tiny_model
from train_kit import fake_evaluator, files_limited_to, lasting, make_config, make_engines, weights_of


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [row for _, row in iter_jsonl(folder / f"{name}.jsonl")]


@pytest.mark.parametrize("switches", [False, True], ids=["plain", "all_switches"])
@pytest.mark.parametrize("method", method_names())
def test_every_registered_method_trains_through_the_same_code(method: str, switches: bool, tmp_path: Path) -> None:
    distils = method in ("scope", "dual_path", "opd", "reward_opd")
    config = make_config(
        tmp_path / "run",
        objective={
            "method": method,
            "distill": "full_kl" if switches and distils else "sampled",
            "reference_kl": 0.01 if switches else 0.0,
        },
        train={"steps": 2, "updates_per_batch": 2 if switches else 1},
    )
    engines = make_engines(config)
    before = weights_of(engines.model)
    result = train(config, engines, progress=False)
    assert result.steps == 2
    assert any(not torch.equal(before[name], value) for name, value in engines.model.state_dict().items())
    metrics = rows(result.folder, "metrics")
    assert [row["step"] for row in metrics] == [0, 1]
    assert all(math.isfinite(row["loss"]) for row in metrics)
    assert metrics[1]["policy_version"] == (2 if switches else 1)


def test_the_trainer_names_no_method_and_imports_no_engine() -> None:
    folder = Path(scope_opd.train.__file__).parent
    for source in folder.glob("*.py"):
        tree = ast.parse(source.read_text())
        texts = {
            node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)
        }
        assert not texts & set(method_names()), source.name
        for node in ast.walk(tree):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            assert not (module or "").startswith(
                tuple(f"scope_opd.{room}" for room in ("rollout", "teacher", "verify", "data", "zoo", "cli"))
            )


def test_a_run_folder_tells_the_whole_run(tmp_path: Path) -> None:
    config = make_config(
        tmp_path / "run", eval={"every": 2, "at_start": True, "at_end": True}, run={"export": True}
    )  # fmt: skip

    async def evaluator(step: int, policy_version: int) -> list[dict[str, Any]]:
        return fake_evaluator(step, policy_version)

    engines = make_engines(config, evaluator=evaluator)
    result = train(config, engines, progress=False)
    folder = result.folder

    assert load_config(folder / "config.toml") == config
    info = json.loads((folder / "run.json").read_text())
    wanted = {
        "run_id", "scope_version", "created", "method", "seed", "model", "teacher", "python", "torch", "transformers",
        "device", "first_prompt",
    }  # fmt: skip
    assert wanted <= info.keys()
    assert info["first_prompt"] == "add the numbers 0 and 1"
    assert json.loads((folder / "status.json").read_text())["phase"] == "done"

    metrics = rows(folder, "metrics")
    assert len(metrics) == 4
    assert all(list(row) == list(METRIC_KEYS) for row in metrics)
    assert result.metrics == metrics[-1]
    assert [row["step"] for row in rows(folder, "eval")] == [0, 2, 4]
    assert list(result.evaluations) == rows(folder, "eval")
    assert [row["step"] for row in rows(folder, "events") if row["kind"] == "checkpoint"] == [2, 4]

    dumped = rows(folder, "rollouts")
    assert len(dumped) == 4 * 8  # two whole groups of four a step
    for number, row in enumerate(dumped):
        rollout = rollout_from_dict(row, where=f"line {number}")
        assert row["step"] == number // 8
        assert len(row["tokens"]) == len(row["advantages"]) == len(rollout.token_ids)
        assert "".join(row["tokens"]) != ""
        if row["masked"]:
            assert not any(row["advantages"])

    model = AutoModelForCausalLM.from_pretrained(folder / "export")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), engines.model.parameters(), strict=True))
    assert (
        AutoTokenizer.from_pretrained(folder / "export")("3 + 4")["input_ids"]
        == engines.tokenizer("3 + 4")["input_ids"]
    )
    card = (folder / "export" / "README.md").read_text()
    assert card.startswith("---\n")
    assert all(text in card for text in ("`scope`", "`objective.tau` | 1.0", "zoo:teacher", "| 4 | 0.6 |"))


def test_figures_of_a_row_are_those_of_its_rollouts(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", train={"steps": 1}, run={"rollouts_logged": 1000})
    folder = train(config, make_engines(config), progress=False).folder
    (metrics,), dumped = rows(folder, "metrics"), rows(folder, "rollouts")
    rollouts = [rollout_from_dict(row, where="dump") for row in dumped]
    assert len(rollouts) == 12

    def mean(values: list[float]) -> float:
        return sum(values) / len(values)

    ended = [r for r in rollouts if r.finish_reason == "stop"]
    right = [r for r in ended if r.correct]
    wrong = [r for r in rollouts if r not in right]
    assert metrics["accuracy"] == pytest.approx(mean([bool(r.correct) for r in rollouts]))
    assert metrics["reward/mean"] == pytest.approx(mean([r.reward or 0.0 for r in rollouts]))
    assert metrics["truncated/share"] == pytest.approx(1 - len(ended) / 12)
    assert metrics["length/mean"] == pytest.approx(mean([len(r.token_ids) for r in rollouts]))
    assert metrics["teacher/scored_rollouts"] == len(wrong)
    assert metrics["teacher/scored_tokens"] == sum(len(r.token_ids) for r in wrong) < metrics["tokens/trained"]
    ppl = [math.exp(-mean(r.logprobs)) for r in right]
    assert metrics["ppl/student_mean"] == pytest.approx(mean(ppl))
    gaps = [t - s for r in wrong for t, s in zip(r.teacher_logprobs or [], r.logprobs, strict=True)]
    assert metrics["logratio/incorrect"] == pytest.approx(mean(gaps), abs=1e-5)
    sizes = []
    for group in {r.group for r in rollouts}:
        weights = [r.distill or 0.0 for r in wrong if r.group == group]
        if len(weights) > 1:
            sizes.append(sum(weights) ** 2 / (len(weights) * sum(w * w for w in weights)))
    assert metrics["ess/teacher"] == pytest.approx(mean(sizes))
    tokens = {id(r): len(r.token_ids) for r in rollouts}
    mass = [((r.reinforce or 0) + (r.distill or 0)) * tokens[id(r)] for r in rollouts]
    cut = [m for m, r in zip(mass, rollouts, strict=True) if r.finish_reason == "length"]
    assert metrics["truncated/weight_share"] == pytest.approx(sum(cut) / sum(mass))
    for row, rollout in zip(dumped, rollouts, strict=True):
        teacher = rollout.teacher_logprobs or [0.0] * len(rollout.token_ids)
        expected = [
            (rollout.reinforce or 0) + (rollout.distill or 0) * (t - s)
            for t, s in zip(teacher, rollout.logprobs, strict=True)
        ]
        assert row["advantages"] == pytest.approx(expected, abs=1e-4)


def test_a_step_with_every_rollout_masked_is_counted_and_changes_nothing(tmp_path: Path) -> None:
    config = make_config(
        tmp_path / "run", objective={"truncated": "ignore"}, rollout={"max_tokens": 1}, train={"steps": 2}
    )  # fmt: skip
    engines = make_engines(config)
    engines.sampling = type(engines.sampling)(
        n=4, temperature=0.7, max_tokens=1, stop_token_ids=(), seed=0
    )  # fmt: skip
    before = weights_of(engines.model)
    metrics = rows(train(config, engines, progress=False).folder, "metrics")
    assert [row["update/skipped"] for row in metrics] == [1, 1]
    assert [row["masked/truncated"] for row in metrics] == [12, 12]
    assert [row["policy_version"] for row in metrics] == [0, 0]
    assert metrics[0]["entropy"] is None
    assert all(torch.equal(before[name], value) for name, value in engines.model.state_dict().items())


def poisoned(engines: Any, at: int, rollout: int = 0) -> Any:
    """Credit of one rollout that turns infinite from step ``at`` on."""
    credit = engines.credit

    def poison(rollouts: list[Rollout]) -> list[bool | None]:
        verdicts = credit(rollouts)
        if (rollouts[0].step or 0) >= at:
            rollouts[rollout].reinforce = math.inf
        return verdicts

    engines.credit = poison
    return engines


def test_nan_stops_the_run_with_the_weights_before_it_saved(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", run={"checkpoint_every": 0})
    engines = poisoned(make_engines(config), at=1, rollout=7)
    named = "alarm nan at step 1: the loss of rollout '(.*)' is not finite; the update was left out"
    with pytest.raises(RunFailed, match=named) as failure:
        train(config, engines, progress=False)
    culprit = next(row for row in rows(tmp_path / "run", "events") if row.get("name") == "nan")["rollout"]
    assert repr(culprit) in str(failure.value)
    assert culprit.endswith("3")  # the last of the second group of four
    assert failure.value.exit_code == 1
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    metrics = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert metrics[1]["loss"] is None
    assert metrics[1]["update/not_finite"] == 1
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000002"]
    assert all(bool(torch.isfinite(parameter).all()) for parameter in engines.model.parameters())


def test_a_gradient_alone_that_is_not_finite_is_said_to_be_that(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", train={"steps": 1})
    engines = make_engines(config)
    engines.model.get_input_embeddings().weight.register_hook(lambda gradient: gradient * math.nan)
    with pytest.raises(RunFailed, match="the gradient is not finite, though every loss is; the update was left out"):
        train(config, engines, progress=False)


def test_wrong_data_met_while_training_fails_the_run_and_saves_it(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", run={"checkpoint_every": 0})
    engines = make_engines(config)
    credit = engines.credit

    def refuse(rollouts: Sequence[Rollout]) -> Sequence[bool | None]:
        if rollouts[0].step == 2:
            raise DataError("answer of problem 'p2' is empty", "a number", "mend the row")
        return credit(rollouts)

    engines.credit = refuse
    with pytest.raises(
        RunFailed, match=r"^answer of problem 'p2' is empty; expected a number; mend the row$"
    ) as failure:
        train(config, engines, progress=False)
    assert failure.value.exit_code == 1
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-000002"]


def test_a_perplexity_beyond_a_float_is_null() -> None:
    assert _perplexity(0.0) == 1.0
    assert _strict(_perplexity(701.0)) is None
    assert _strict(_perplexity(1e9)) is None


def test_an_export_fails_in_one_line_only_where_the_disk_is_at_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(tmp_path / "run")
    engines = make_engines(config)
    tokenizers_own = Exception("No space left on device (os error 28)")
    for error, raised in ((OSError("full"), RunFailed), (tokenizers_own, RunFailed), (TypeError("a bug"), TypeError)):

        def fail(folder: Path, error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(engines.tokenizer, "save_pretrained", fail)
        with pytest.raises(raised):
            export_model(
                tmp_path / "export", engines.model, engines.tokenizer, config=config, steps=1, metrics={},
                evaluations=[],
            )  # fmt: skip
        assert not list(tmp_path.iterdir())


def test_nan_set_to_warn_leaves_the_update_out_and_goes_on(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", train={"steps": 3}, run={"alarms": {"nan": "warn"}})
    metrics = rows(train(config, poisoned(make_engines(config), at=1), progress=False).folder, "metrics")
    assert [row["policy_version"] for row in metrics] == [0, 1, 1]
    assert [row["update/not_finite"] for row in metrics] == [0, 1, 1]


def test_uniform_weights_are_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    config = make_config(tmp_path / "run", objective={"tau": 1e6}, train={"steps": 3}, rollout={"n": 8})
    train(config, make_engines(config), progress=False)
    alarms = [row for row in rows(tmp_path / "run", "events") if row.get("name") == "uniform_weights"]
    assert 1 <= len(alarms) <= 2
    assert "tau does nothing here" in alarms[0]["message"]
    assert capfd.readouterr().err.count("tau does nothing here") == len(alarms)


def test_an_occupied_folder_is_refused_without_resume(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(RunFolderError, match=r"is not empty \(notes\.txt .*--resume"):
        train(config, make_engines(config), progress=False)
    with pytest.raises(RunFolderError, match="holds no run"):
        train(config, make_engines(config), resume=True, progress=False)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = make_config(tmp_path / "file" / "run")
    with pytest.raises(RunFolderError, match="Not a directory"):
        train(config, make_engines(config), progress=False)


def test_a_full_disk_ends_the_run_with_one_line_and_it_resumes(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", run={"checkpoint_every": 0})
    with files_limited_to(12_000), pytest.raises(RunFailed, match=r"rollouts\.jsonl could not be written: ") as failure:
        train(config, make_engines(config), progress=False)
    assert failure.value.exit_code == 1
    assert train(config, make_engines(config), resume=True, progress=False).steps == 4
    assert [row["step"] for row in rows(tmp_path / "run", "metrics")] == [0, 1, 2, 3]


def test_config_on_record_leaves_out_what_is_none(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", train={"steps": 1})
    train(config, make_engines(config), progress=False)
    table = tomllib.loads((tmp_path / "run" / "config.toml").read_text())
    assert "revision" not in table["model"]
    assert table["train"]["betas"] == [0.9, 0.99]


def test_plain_progress_is_lines_and_a_live_one_closes_cleanly(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for live in (False, True):
        config = make_config(tmp_path / str(live), train={"steps": 2})
        train(config, make_engines(config), progress=live)
        output = capfd.readouterr()
        assert "2/2" in output.err
        assert output.out == ""
        if not live:
            assert "step 2/2  loss" in output.err
            assert "\x1b" not in output.err


def test_a_run_is_the_same_whatever_the_micro_batch_budget_and_twice_bit_for_bit(tmp_path: Path) -> None:
    results = []
    for name, budget in (("a", 256), ("b", 256), ("c", 64)):
        config = make_config(tmp_path / name, train={"max_tokens_per_microbatch": budget, "lr": 1e-4})
        engines = make_engines(config)
        train(config, engines, progress=False)
        results.append((lasting(rows(tmp_path / name, "metrics")), weights_of(engines.model)))
    assert results[0][0] == results[1][0]
    assert all(torch.equal(results[0][1][name], value) for name, value in results[1][1].items())
    assert results[2][0][0]["loss"] == pytest.approx(results[0][0][0]["loss"], rel=1e-5)


def test_missing_parts_of_the_engines_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", objective={"distill": "full_kl"})
    with pytest.raises(ValueError, match="without teacher_head"):
        train(config, make_engines(config, teacher_head=None), progress=False)
    config = make_config(tmp_path / "run", objective={"reference_kl": 0.1})
    with pytest.raises(ValueError, match="without a reference"):
        train(config, make_engines(config, reference=None), progress=False)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["llama", "gemma2", "gpt_neox"])
def test_other_architectures_train_save_and_export(kind: str, tmp_path: Path) -> None:
    config = make_config(tmp_path / "run", train={"steps": 1, "optimizer": "muon"}, run={"export": True})
    engines = make_engines(config)
    engines.model = tiny_model(kind, seed=3)
    engines.pipeline.sampler.model = engines.model  # type: ignore[attr-defined]
    result = train(config, engines, progress=False)
    assert abs(result.metrics["mismatch/kl"]) < 1e-5
    assert result.export is not None
    AutoModelForCausalLM.from_pretrained(result.export)
