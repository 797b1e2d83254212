"""``scope export``: any checkpoint as a folder that transformers loads, without the optimiser and the run's ranks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from scope_opd.cli.main import main
from scope_opd.config import load_config
from scope_opd.train.loop import train
from tiny import save_pair, tiny_tokenizer
from train_kit import make_config, make_engines


def scores(step: int, policy_version: int) -> list[dict[str, Any]]:
    """The second evaluation is the best."""
    value = {2: 0.2, 4: 0.7, 6: 0.4}[step]
    return [{"temperature": 0.6, "n": 1, "problems": 1, "avg@k": value, "pass@k": {"1": value}}]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, dict[str, torch.Tensor]]]:
    """A run of six steps that keeps its last and its best checkpoint, and the weights at each evaluation."""
    root = tmp_path_factory.mktemp("export")
    save_pair(root / "student", seed=1)
    config = make_config(
        root / "run",
        model={"path": str(root / "student")},
        train={"steps": 6},
        eval={"every": 2, "temperatures": [0.6], "n": 1},
        run={"keep_last": 1, "keep_best": True, "export": True, "dir": str(root / "run"), "checkpoint_every": 3},
    )
    made = make_engines(config, tokenizer=tiny_tokenizer())
    seen: dict[int, dict[str, torch.Tensor]] = {}

    def evaluate(step: int, policy_version: int) -> list[dict[str, Any]]:
        seen[step] = {name: weight.detach().clone() for name, weight in made.model.state_dict().items()}
        return scores(step, policy_version)

    made.evaluator = evaluate
    train(config, made, progress=False)
    return root / "run", seen


def same(folder: Path, weights: dict[str, torch.Tensor]) -> bool:
    loaded = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    return loaded.keys() == weights.keys() and all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_the_best_checkpoint_is_kept_named_and_exported(run: Any, tmp_path: Path, capsys: Any) -> None:
    folder, seen = run
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    about = json.loads((folder / "run.json").read_text())
    assert about["best"] == {"step": 4, "figure": "T0.6/avg@k", "value": 0.7}
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    assert [row["step"] for row in events if row["kind"] == "best"] == [2, 4]
    assert main(["export", str(folder), "--best", "--out", str(tmp_path / "best")]) == 0
    assert "step 4" in capsys.readouterr().out
    assert same(tmp_path / "best", seen[4])
    assert not same(tmp_path / "best", seen[6])
    assert AutoTokenizer.from_pretrained(tmp_path / "best")("a") == tiny_tokenizer()("a")


def test_the_newest_is_exported_as_the_run_itself_did(run: Any, tmp_path: Path) -> None:
    folder, seen = run
    assert main(["export", str(folder), "--out", str(tmp_path / "last")]) == 0
    checkpoint = folder / "checkpoints" / "step-000006"
    assert main(["export", str(checkpoint), "--out", str(tmp_path / "same")]) == 0
    assert same(tmp_path / "last", seen[6])
    own = load_file(folder / "export" / "model.safetensors")
    for name in ("last", "same"):
        found = load_file(tmp_path / name / "model.safetensors")
        assert found.keys() == own.keys()
        assert all(torch.equal(found[key], own[key]) for key in own)
        for file in ("config.json", "generation_config.json", "README.md"):
            assert (tmp_path / name / file).read_text() == (folder / "export" / file).read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["{run}", "--step", "5"], "no checkpoint step-000005; expected one of 4, 6"),
        (["{run}", "--step", "4", "--best"], "--best and --step 4"),
        (["{tmp}"], "has no checkpoint"),
        (["{run}/checkpoints/step-000004", "--best"], "is a checkpoint"),
        (["{run}", "--out", "{run}"], "is not empty"),
        (["{run}", "--out", "{run}/run.json"], "run.json is a file; expected a folder that does not exist yet"),
        (["{run}", "--step", "-1"], "--step -1; expected a number from 0; name the step of a checkpoint"),
    ],
)
def test_what_cannot_be_exported_is_one_line(
    words: list[str], said: str, run: Any, tmp_path: Path, capsys: Any
) -> None:
    given = [word.format(run=run[0], tmp=tmp_path) for word in words]
    given += [] if "--out" in words else ["--out", str(tmp_path / "out")]
    assert main(["export", *given]) == 2
    line = capsys.readouterr().err
    assert said in line
    assert line.count("\n") == 1


def test_a_run_without_a_best_says_so(run: Any, tmp_path: Path, capsys: Any) -> None:
    values = load_config(run[0] / "config.toml").model_dump(mode="json", exclude_none=True)
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    (tmp_path / "config.toml").write_text(tomli_w.dumps(values))
    assert main(["export", str(tmp_path), "--best", "--out", str(tmp_path / "out")]) == 2
    assert "has no best checkpoint" in capsys.readouterr().err
