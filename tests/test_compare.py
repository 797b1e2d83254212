"""``scope compare``: differences on the same problems, what is said of settings that differ, and its mistakes."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scope_opd.cli.main import main
from scope_opd.evaluate.compare import compare, load_evaluations
from scope_opd.evaluate.intervals import bootstrap_interval, sign_flip_p_value

N = 8


def results(counts: dict[str, list[int]], **sampling: Any) -> dict[str, Any]:
    """A results.json as far as comparisons read it."""
    return {
        "format": "scope-evaluation-1",
        "settings": {"source": {"model": "m"}, "sampling": {"n": N, "temperature": 0.6, **sampling}},
        "benchmarks": {
            name: {
                "data": {"content_sha256": f"hash-{name}", "partial": False},
                "metrics": {"n": N},
                "problems": [{"id": f"{name}-{i}", "n": N, "correct": c} for i, c in enumerate(each)],
            }
            for name, each in counts.items()
        },
    }


def write(folder: Path, value: dict[str, Any]) -> Path:
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(value))
    return folder


@pytest.fixture
def three(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    base = {name: rng.integers(0, N, size) for name, size in (("aime", 30), ("amc", 40))}
    better = {name: np.minimum(N, each + rng.integers(0, 3, each.size)) for name, each in base.items()}
    other = {name: rng.permutation(each) for name, each in base.items()}
    made = [("base", base), ("better", better), ("other", other)]
    return [write(tmp_path / name, results({k: v.tolist() for k, v in counts.items()})) for name, counts in made]


def test_differences_are_paired_by_problem_and_weigh_benchmarks_alike(three: list[Path]) -> None:
    found = compare(load_evaluations(three))
    tables = [json.loads((path / "results.json").read_text())["benchmarks"] for path in three]
    counts = [{name: np.array([p["correct"] for p in t[name]["problems"]]) for name in t} for t in tables]
    for name in ("aime", "amc"):
        difference = (counts[1][name] - counts[0][name]) / N
        shown = found["benchmarks"][name]["figures"]["avg@k"]["differences"]["better"]
        expected = bootstrap_interval(difference)
        assert (shown["value"], shown["ci95"]) == (expected.value, [expected.low, expected.high])
        assert shown["p"] == sign_flip_p_value([difference])
        won = found["benchmarks"][name]["by_problem"]["better"]
        assert (won["wins"], won["losses"]) == (int((difference > 0).sum()), 0)
        assert won["wins"] + won["losses"] + won["ties"] == difference.size
    macro = found["benchmarks"]["macro"]["figures"]["avg@k"]
    means = [(counts[1][name] - counts[0][name]).mean() / N for name in counts[0]]
    assert macro["differences"]["better"]["value"] == pytest.approx(np.mean(means))
    assert macro["differences"]["better"]["p"] < 0.001
    assert macro["differences"]["other"]["ci95"][0] < 0 < macro["differences"]["other"]["ci95"][1]


def test_several_comparisons_are_adjusted_and_two_evaluations_are_not(three: list[Path]) -> None:
    found = compare(load_evaluations(three))["benchmarks"]["aime"]["figures"]["avg@k"]["differences"]
    assert found["better"]["p_holm"] >= found["better"]["p"]
    alone = compare(load_evaluations(three[:2]))["benchmarks"]["aime"]["figures"]["avg@k"]["differences"]
    assert "p_holm" not in alone["better"]


def test_the_order_of_problems_does_not_matter(three: list[Path], tmp_path: Path) -> None:
    turned = json.loads((three[1] / "results.json").read_text())
    for entry in turned["benchmarks"].values():
        entry["problems"].reverse()
    again = write(tmp_path / "turned" / "better", turned)
    first, second = (compare(load_evaluations([three[0], path]))["benchmarks"] for path in (three[1], again))
    assert first == second


def test_an_evaluation_does_not_differ_from_itself(three: list[Path], tmp_path: Path) -> None:
    twin = write(tmp_path / "twin", json.loads((three[0] / "results.json").read_text()))
    found = compare(load_evaluations([three[0], twin]))["benchmarks"]["aime"]["figures"]["pass@8"]["differences"][
        "twin"
    ]
    assert (found["value"], found["ci95"], found["p"]) == (0.0, [0.0, 0.0], 1.0)


def test_the_command_writes_tables_and_curves_and_warns_of_other_settings(
    three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    warm = json.loads((three[2] / "results.json").read_text())
    warm["settings"]["sampling"] |= {"temperature": 1.0, "top_p": 0.5, "seed": 9}
    warm["benchmarks"]["aime"]["data"]["partial"] = True
    warm["benchmarks"]["amc"]["data"]["content_sha256"] = "other"
    (three[2] / "results.json").write_text(json.dumps(warm))
    paths = [str(three[0]), str(three[1] / "results.json"), str(three[2])]
    assert main(["compare", *paths, "--out", str(tmp_path / "out")]) == 0
    output = capsys.readouterr()
    assert "sampling.temperature differs: 0.6 (base), 1.0 (other)" in output.err
    assert "sampling.top_p differs: null (base), 0.5 (other)" in output.err
    assert "seed" not in output.err
    assert "Only the first problems of aime: not comparable with figures of the whole." in output.out
    assert 'amc: data content_sha256 differs: "hash-amc" (base), "other" (other)' in output.err
    assert "macro" in output.out
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert list(found["benchmarks"]) == ["aime", "amc", "macro"]
    assert (tmp_path / "out" / "passk.png").read_bytes()[:4] == b"\x89PNG"
    drawn = (tmp_path / "out" / "passk.svg").read_bytes()
    assert drawn.count(b"<svg") == 1
    table = (tmp_path / "out" / "comparison.md").read_text()
    assert "**Warning:**" in table
    assert "Only the first problems of aime" in table
    assert "| aime | Pass@8 | better |" in table
    assert main(["compare", *paths, "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "passk.svg").read_bytes() == drawn


def test_mistakes_are_one_line(three: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = json.loads((three[0] / "results.json").read_text())
    short, foreign, odd = copy.deepcopy(base), copy.deepcopy(base), copy.deepcopy(base)
    short["benchmarks"]["aime"]["problems"].pop()
    foreign["benchmarks"] = {"math": base["benchmarks"]["aime"]}
    odd["format"] = "other"
    hollow, wrong = {"format": base["format"]}, copy.deepcopy(base)
    wrong["benchmarks"]["aime"]["problems"][0]["correct"] = N + 1
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "results.json").write_text('{"format')
    cases = {
        write(tmp_path / "short", short): "aime: short lacks 1 problems of base and has 0 others ('aime-29' ...)",
        write(tmp_path / "foreign", foreign): "no benchmark that all have: base has aime, amc; foreign has math",
        write(tmp_path / "odd", odd): "format 'other'",
        write(tmp_path / "hollow", hollow): "no 'benchmarks'",
        write(tmp_path / "wrong", wrong): f"{N + 1} correct of {N}",
        tmp_path / "empty": "finish that evaluation first",
        tmp_path / "gone": "no results.json",
        tmp_path / "broken": "results of scope eval",
    }
    for path, message in cases.items():
        assert main(["compare", str(three[0]), str(path), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err.splitlines()
        assert len(error) == 1
        assert message in error[0]
    assert main(["compare", str(three[0]), "--out", str(tmp_path / "out")]) == 2
    assert "two or more" in capsys.readouterr().err


def test_labels_are_the_shortest_ends_of_paths_that_differ(tmp_path: Path) -> None:
    value = results({"aime": [1, 2]})
    paths = [write(tmp_path / "a" / "eval", value), write(tmp_path / "b" / "eval", value)]
    assert [each.label for each in load_evaluations(paths)] == ["a/eval", "b/eval"]
    assert [each.label for each in load_evaluations([paths[0], paths[0]])] == ["1:eval", "2:eval"]
