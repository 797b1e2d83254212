"""Laws of the report: the answer is right, hostile text is inert, and broken runs give notes instead of tracebacks."""

from __future__ import annotations

import json
import os
import re
import select
import shutil
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fake_run
from scope_opd.errors import RunFolderError, ScopeError
from scope_opd.evaluate.metrics import bootstrap_interval, pass_at_k
from scope_opd.report import build_report
from scope_opd.report.groups import group_runs
from scope_opd.report.load import load_run
from scope_opd.report.plots import STAGES, stage_means, thinned
from scope_opd.report.spans import CLAIMS, claimed
from scope_opd.report.timeline import Axis, choices, lanes_of
from scope_opd.report.viewer import viewer_data
from scope_opd.spans import length, union, without

SMALL = {"steps": 4, "problems": 40, "n": 8}


class Page(HTMLParser):
    """What a browser would see: elements, the text outside scripts, and the viewer's data."""

    def __init__(self, path: Path) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[str] = []
        self.raw = path.read_text(encoding="utf-8")
        self._script = self._style = False
        self.feed(self.raw)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._script, self._style = tag == "script", tag == "style"
        if self._script:
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._script = self._style = False

    def handle_data(self, data: str) -> None:
        if self._script:
            self.scripts[-1] += data
        elif not self._style:
            self.words.append(data)

    def headline(self) -> str:
        found = re.search(r"<h1>(.*?)</h1>", self.raw, re.S)
        assert found is not None
        return re.sub(r"\s+", " ", re.sub("<[^>]*>", "", found[1])).strip()

    def data(self) -> dict[str, object]:
        return json.loads(self.scripts[0])


def report(tmp_path: Path, *runs: Path) -> Page:
    return Page(build_report(runs, tmp_path / "out" / "report.html"))


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    fake_run.write_demo(folder / "runs", timeline=True, **SMALL)
    return folder / "runs"


@pytest.fixture(scope="module")
def page(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(build_report([demo], tmp_path_factory.mktemp("report") / "report.html", title="Zoo"))


# --- the answer --------------------------------------------------------------


def test_headline_states_the_result_with_interval_and_seeds(page: Page, demo: Path) -> None:
    rows = [row for seed in (0, 1) for row in fake_run.read_jsonl(demo / f"scope-s{seed}" / "eval.jsonl")]
    start = np.array([row["correct_counts"] for row in rows if row["step"] == 0 and row["temperature"] == 0.6])
    end = np.array([row["correct_counts"] for row in rows if row["step"] == 4 and row["temperature"] == 0.6])
    interval = bootstrap_interval(100 * end / 8)
    expected = (
        f"SCOPE lifts Avg@8 at T = 0.6 from {100 * start.mean() / 8:.1f} to {interval.value:.1f} % "
        f"(95 % CI {interval.low:.1f}–{interval.high:.1f}; 2 seeds; 40 held-out problems)"
    )
    assert page.headline() == expected


def test_table_shows_every_line_and_k_that_the_samples_allow(page: Page, demo: Path) -> None:
    for words in ("Start", "SCOPE", "Dual path", "OPD", "GRPO", "Teacher", "T = 0.6", "T = 1", "Pass@4", "Pass@8"):
        assert words in page.text
    assert "Pass@32" not in page.text
    rows = fake_run.read_jsonl(demo / "teacher" / "eval.jsonl")
    value = 100 * pass_at_k(rows[1]["correct_counts"], 8, 4).mean()
    assert f"{value:.1f}" in page.text
    assert page.text.count("resolved") >= 3 * 2 * 3  # three rivals, two temperatures, three columns


def test_with_replacement_pass_at_k_is_folded_away_and_labelled(demo: Path, page: Page, tmp_path: Path) -> None:
    folded = re.findall(r"<details><summary>Pass@k with replacement.*?</details>", page.raw, re.S)
    assert len(folded) == 1
    counts = np.array(fake_run.read_jsonl(demo / "teacher" / "eval.jsonl")[1]["correct_counts"])
    value = 100 * (1 - (1 - counts / 8) ** 4).mean()
    unbiased = 100 * pass_at_k(counts, 8, 4).mean()
    assert f">{value:.1f}<small>unbiased {unbiased:.1f}</small>" in folded[0]
    assert "biased downwards" in folded[0]
    old = fake_run.write_run(tmp_path / "old", "scope", 0, **SMALL)
    rows = fake_run.read_jsonl(old / "eval.jsonl")
    for row in rows:
        del row["pass@k_with_replacement"]
    fake_run.write_jsonl(old / "eval.jsonl", rows)
    assert "with replacement" in report(tmp_path, old).text  # from the counts
    for row in rows:
        del row["correct_counts"]
    fake_run.write_jsonl(old / "eval.jsonl", rows)
    assert '<td class="num">–<small>unbiased' in report(tmp_path, old).raw


def test_methods_with_equal_figures_are_not_resolved(tmp_path: Path) -> None:
    runs = [fake_run.write_run(tmp_path / name, name, 0, **SMALL) for name in ("scope", "opd")]
    shutil.copy(runs[0] / "eval.jsonl", runs[1] / "eval.jsonl")
    page = report(tmp_path, *runs)
    assert ">not resolved<" in page.raw
    assert ">resolved<" not in page.raw
    assert "is not resolved by these problems and seeds" in page.text


def test_problems_are_paired_by_id_not_by_position(tmp_path: Path) -> None:
    runs = [fake_run.write_run(tmp_path / name, name, 0, **SMALL) for name in ("scope", "opd")]
    rows = fake_run.read_jsonl(runs[0] / "eval.jsonl")
    for row in rows:
        row["correct_counts"].reverse()
        row["problem_ids"].reverse()
    fake_run.write_jsonl(runs[1] / "eval.jsonl", rows)
    page = report(tmp_path, *runs)
    assert page.raw.count("<small>equal</small>") == 6  # the same counts in another order differ nowhere


def test_seeds_share_a_group_and_settings_split_one(tmp_path: Path) -> None:
    paths = [fake_run.write_run(tmp_path / f"s{seed}", "scope", seed, **SMALL) for seed in (1, 0)]
    paths.append(fake_run.write_run(tmp_path / "half", "scope", 0, objective={"tau": 0.5}, **SMALL))
    groups, notes = group_runs([load_run(path) for path in paths])
    assert [(group.label, group.seeds) for group in groups] == [
        ("SCOPE (tau = 1.0)", "seeds 0, 1"),
        ("SCOPE (tau = 0.5)", "seed 0"),
    ]
    assert len({group.slot for group in groups}) == 2
    assert notes == []


DOLLARS = ("Put it in $\\boxed{}$.", "$5 and $6", "two\nlines of $x^{$ and more than a label should hold of it")


def test_settings_with_dollar_signs_are_text_not_mathtext(tmp_path: Path) -> None:
    runs = [fake_run.write_run(tmp_path / f"r{i}", "scope", 0, **SMALL) for i in range(len(DOLLARS))]
    for run, suffix in zip(runs, DOLLARS, strict=True):
        with (run / "config.toml").open("a", encoding="utf-8") as config:
            config.write(f"[chat]\nsuffix = {json.dumps(suffix)}\n")
    page = report(tmp_path, *runs)
    bars = page.raw[page.raw.index('<section id="time">') :]
    for shown in ("(suffix = Put it in $\\boxed{}$.)", "(suffix = $5 and $6)", "(suffix = two lines of $x^{$ and more"):
        assert f">SCOPE {shown}" in bars[: bars.index("</svg>", bars.index("<figure"))]


def test_settings_alike_in_what_is_shown_still_have_their_own_label(tmp_path: Path) -> None:
    runs = [fake_run.write_run(tmp_path / name, "scope", 0, **SMALL) for name in ("a", "b")]
    for run in runs:
        with (run / "config.toml").open("a", encoding="utf-8") as config:
            config.write(f'[chat]\nsuffix = "{"long " * 20}{run.name}"\n')
    first, second = (group.label for group in group_runs([load_run(run) for run in runs])[0])
    assert first != second


def test_unequal_conditions_are_said(tmp_path: Path) -> None:
    runs = [fake_run.write_run(tmp_path / name, name, 0, **SMALL) for name in ("scope", "opd")]
    config = runs[1] / "config.toml"
    config.write_text(config.read_text().replace("lr = 0.0003", "lr = 0.001"))
    assert "not run under identical settings: train.lr (SCOPE 0.0003; OPD 0.001)" in report(tmp_path, *runs).text


def test_start_folder_takes_the_place_of_step_0_rows(tmp_path: Path) -> None:
    run = fake_run.write_run(tmp_path / "scope", "scope", 0, **SMALL)
    rows = fake_run.read_jsonl(run / "eval.jsonl")
    fake_run.write_jsonl(run / "eval.jsonl", [row for row in rows if row["step"]])
    without = report(tmp_path, run)
    assert "SCOPE reaches" in without.headline()
    assert "The start and the teacher were not evaluated in these runs." in without.text
    start = fake_run.write_evaluation(tmp_path / "start", "start", fake_run.START, problems=40, n=8)
    assert "SCOPE lifts" in report(tmp_path, run, start).headline()


def test_same_runs_give_the_same_file(demo: Path, page: Page, tmp_path: Path) -> None:
    assert build_report([demo], tmp_path / "again.html", title="Zoo").read_text(encoding="utf-8") == page.raw


# --- one file, safe ----------------------------------------------------------

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{css}} <!-- ]]> \u2028 & \" ' `"


@pytest.fixture(scope="module")
def attacked(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """Hostile text in every place where a run can hold text."""
    folder = tmp_path_factory.mktemp("hostile")
    run = fake_run.write_run(folder / 'a"><img src=x>', "scope", 0, timeline=True, **SMALL)
    info = json.loads((run / "run.json").read_text())
    info.update(dict.fromkeys(("model", "teacher", "device", "first_prompt", "label", "created"), HOSTILE))
    (run / "run.json").write_text(json.dumps(info))
    rows = fake_run.read_jsonl(run / "rollouts.jsonl")
    for row in rows:
        row.update(text=HOSTILE, prompt=HOSTILE, group=HOSTILE, extracted=HOSTILE, mask_reason=HOSTILE, masked=True)
        row["tokens"] = [HOSTILE] * len(row["tokens"])
    fake_run.write_jsonl(run / "rollouts.jsonl", rows)
    fake_run.write_jsonl(run / "events.jsonl", [{"step": 1, "kind": HOSTILE, "message": HOSTILE}])
    (run / "config.toml").write_text((run / "config.toml").read_text() + f"\n# {HOSTILE.replace(chr(0x2028), '')}\n")
    (run / "status.json").write_text(json.dumps({"phase": HOSTILE}))
    return Page(build_report([run], folder / "report.html", title=HOSTILE))


def test_text_of_a_run_never_becomes_markup(attacked: Page, page: Page) -> None:
    tags = [tag for tag, _ in attacked.elements]
    assert tags.count("script") == 2
    assert "img" not in tags
    assert not [name for _, attrs in attacked.elements for name in attrs if name.startswith("on")]
    assert attacked.scripts[1] == page.scripts[1]
    assert attacked.raw.count("<!--") == 0


def test_hostile_tokens_arrive_in_the_viewer_unchanged(attacked: Page) -> None:
    assert attacked.data()["vocabulary"] == [HOSTILE[:200]]


def test_page_is_self_contained(page: Page) -> None:
    namespaces = ("http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink")
    links = [url for url in re.findall(r"https?://[^\"'\s<)]+", page.raw) if url not in namespaces]
    assert links == []
    fetched = [attrs for tag, attrs in page.elements if tag in ("link", "iframe", "img") or "src" in attrs]
    assert fetched == []
    policy = next(
        attrs["content"] for _, attrs in page.elements if attrs.get("http-equiv") == "Content-Security-Policy"
    )
    assert policy is not None
    assert "default-src 'none'" in policy


def test_ids_are_unique_and_figures_are_described(page: Page) -> None:
    ids = [attrs["id"] for tag, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids))
    plots = [attrs for tag, attrs in page.elements if tag == "svg" and attrs.get("class") == "plot"]
    assert len(plots) >= 12
    assert all(attrs.get("aria-label") for attrs in plots)
    anchors = [attrs["href"] for tag, attrs in page.elements if tag == "a"]
    assert {anchor[1:] for anchor in anchors if anchor} <= set(ids)


def test_figures_follow_the_colour_scheme(page: Page) -> None:
    plots = "".join(re.findall(r'<svg class="plot".*?</svg>', page.raw, re.S))
    assert "currentColor" in plots
    assert re.findall(r"#[0-9a-f]{6}\b", plots) == []  # no colour that would be lost in dark mode
    assert "prefers-color-scheme: dark" in page.raw


def test_report_of_the_demo_stays_under_3_mb(tmp_path: Path) -> None:
    runs = [fake_run.write_run(tmp_path / f"opd-{seed}", "opd", seed, steps=50, problems=20, n=8) for seed in range(3)]
    runs += [fake_run.write_run(tmp_path / f"scope-{seed}", "scope", seed, problems=20, n=8) for seed in range(3)]
    out = build_report(runs, tmp_path / "report.html")
    assert out.stat().st_size < 3_000_000


def test_long_runs_do_not_grow_the_curves() -> None:
    steps, values = thinned(np.arange(7_000.0), np.linspace(0, 1, 7_000))
    assert steps.size == values.size <= 400
    assert values.mean() == pytest.approx(0.5)
    assert np.array_equal(thinned(np.arange(5.0), np.ones(5))[0], np.arange(5.0))


# --- viewer ------------------------------------------------------------------


def test_viewer_falls_back_to_ids_and_computes_advantages(tmp_path: Path) -> None:
    run = fake_run.write_run(tmp_path / "opd", "opd", 0, tokens=False, **SMALL)
    rows = fake_run.read_jsonl(run / "rollouts.jsonl")
    logged, _ = viewer_data(group_runs([load_run(run)])[0])
    for row in rows:
        del row["advantages"]
    fake_run.write_jsonl(run / "rollouts.jsonl", rows)
    computed, _ = viewer_data(group_runs([load_run(run)])[0])
    assert logged == computed
    assert logged is not None
    assert logged["vocabulary"][0] == f"‹{rows[0]['token_ids'][0]}›"


def test_viewer_thins_steps_and_cuts_long_responses_and_says_so(tmp_path: Path) -> None:
    run = fake_run.write_run(tmp_path / "grpo", "grpo", 0, steps=12, problems=5, n=2)
    rows = fake_run.read_jsonl(run / "rollouts.jsonl")
    for key in ("token_ids", "tokens", "logprobs", "advantages"):
        rows[0][key] = rows[0][key] * 200
    fake_run.write_jsonl(run / "rollouts.jsonl", rows)
    data, notes = viewer_data(group_runs([load_run(run)])[0], budget=2_000)
    assert data is not None
    steps = [step["step"] for step in data["runs"][0]["steps"]]
    assert (steps[0], steps[-1]) == (1, 12)
    assert len(steps) < 12
    assert notes[0] == f"at most {len(steps)} of up to 12 logged steps a run"
    assert "the first group of each step" in notes
    assert "of long responses the first 300 and the last 100 tokens" in notes
    longest = data["runs"][0]["steps"][0]["groups"][0]["rollouts"][0]
    assert longest["length"] == len(rows[0]["token_ids"])
    assert len(longest["tokens"]) + longest["cut"]["tokens"] == longest["length"]
    assert isinstance(longest["advantages"], float)  # grpo: one number for all tokens


def routed_run(folder: Path, truncated: str) -> Path:
    """One group: right, truncated with the right text, wrong, judged by its reward only; the last token is no text."""
    run = fake_run.write_run(folder / truncated, "scope", 0, objective={"truncated": truncated}, **SMALL)
    rows = fake_run.read_jsonl(run / "rollouts.jsonl")[:4]
    settings = [
        {"correct": True, "reinforce": 0.6, "distill": 0.0},
        {"correct": True, "reinforce": 0.0, "distill": 0.7, "finish_reason": "length"},
        {"correct": False, "reinforce": 0.0, "distill": 0.3},
        {"correct": None, "reward": 0.9, "reinforce": 0.4, "distill": 0.0},
    ]
    if truncated == "ignore":
        settings[1].update(distill=0.0, masked=True, mask_reason="truncated")
    for row, own in zip(rows, settings, strict=True):
        row.update(token_ids=[5, 6, 7, 8], tokens=["a", "b", " \ufffd\ufffd", "\ufffd"], group="g", step=1, **own)
        row.update(logprobs=[-1.0, -1.0, -9.0, -1.0], teacher_logprobs=[-2.0, -2.0, -9.0, -2.0])
        row["loss_mask"] = [1, 1, 0, 1]
        row["advantages"] = [0.0] * 4
    fake_run.write_jsonl(run / "rollouts.jsonl", rows)
    return run


def test_perplexities_follow_the_path_of_training_and_skip_tokens_outside_the_loss(tmp_path: Path) -> None:
    points = load_run(routed_run(tmp_path, "incorrect")).rollouts
    assert [point.path for point in points] == ["student", "teacher", "teacher", "student"]
    assert [point.correct for point in points] == [True, False, False, True]
    assert [point.weight for point in points] == [0.6, 0.7, 0.3, 0.4]
    student, teacher = float(np.exp(1.0)), float(np.exp(2.0))
    assert [point.ppl for point in points] == pytest.approx([student, teacher, teacher, student])
    ignored = load_run(routed_run(tmp_path, "ignore")).rollouts
    assert [point.path for point in ignored] == ["student", None, "teacher", "student"]
    assert (ignored[1].correct, ignored[1].masked, ignored[1].ppl) == (True, True, None)


def test_distilled_rollouts_are_on_the_teachers_path_whatever_their_verdict(tmp_path: Path) -> None:
    run = fake_run.write_run(tmp_path / "opd", "opd", 0, **SMALL)
    assert {(point.path, point.correct) for point in load_run(run).rollouts} == {("teacher", True), ("teacher", False)}
    assert "OPD, correct and incorrect rollouts" in report(tmp_path, run).text


def test_viewer_names_whose_perplexity_and_shows_parts_of_characters_by_id(tmp_path: Path) -> None:
    run = routed_run(tmp_path, "incorrect")
    data, _ = viewer_data(group_runs([load_run(run)])[0])
    assert data is not None
    members = data["runs"][0]["steps"][0]["groups"][0]["rollouts"]
    assert [member["ppl_of"] for member in members] == ["student", "teacher", "teacher", "student"]
    assert [member["verdict"] for member in members] == ["correct", "incorrect", "incorrect", "correct"]
    assert data["vocabulary"] == ["a", "b", " ‹7›", "‹8›"]
    page = report(tmp_path, run)
    assert "\ufffd" not in page.raw
    assert "‹123› stands for a token" in page.text


# --- one step in time ---------------------------------------------------------


def test_stretches_are_joined_and_subtracted_exactly() -> None:
    assert union([(4.0, 5.0), (0.0, 2.0), (1.0, 3.0), (3.0, 3.5)]) == [(0.0, 3.5), (4.0, 5.0)]
    assert without([(0.0, 10.0)], [(-1.0, 1.0), (2.0, 3.0), (9.0, 12.0)]) == [(1.0, 2.0), (3.0, 9.0)]
    assert without([(0.0, 1.0), (2.0, 3.0)], [(0.0, 5.0)]) == []
    assert without([(0.0, 1.0)], []) == [(0.0, 1.0)]


@pytest.mark.parametrize("seed", range(20))
def test_hidden_and_exposed_seconds_are_those_of_a_count_on_a_fine_grid(seed: int) -> None:
    rng = np.random.default_rng(seed)
    spans = {
        stage: [tuple(sorted(rng.integers(-20, 200, 2) / 10)) for _ in range(int(rng.integers(0, 6)))]
        for stage in ("generation", "verify", "teacher", "sync", "update")
    }
    lanes, alone = lanes_of(spans)
    middles = np.arange(-30, 210) / 10 + 0.05
    at_work = {
        stage: np.array([any(begin < middle < end for begin, end in found) for middle in middles])
        for stage, found in spans.items()
    }
    others = np.any([found for stage, found in at_work.items() if stage != "teacher"], axis=0)
    for stage, found in at_work.items():
        assert length(lanes[stage]) == pytest.approx(found.sum() / 10)
    assert length(alone) == pytest.approx((at_work["teacher"] & ~others).sum() / 10)
    seconds, inside, free = claimed(spans, 15.0), (middles > 0) & (middles < 15), np.ones_like(others)
    for stage in CLAIMS:
        assert seconds[stage] == pytest.approx((at_work[stage] & free & inside).sum() / 10, abs=1e-9)
        free &= ~at_work[stage]


@pytest.mark.parametrize("ends", [(0.0, 17.1), (-1.5, 642.0), (0.0, 1e-6), (-1e7, 1e7), (0.0, 6.0), (0.3, 0.9)])
def test_ticks_are_few_and_on_the_axis(ends: tuple[float, float]) -> None:
    axis = Axis(*ends)
    ticks = axis.ticks()
    assert 3 <= len(ticks) <= 8
    assert all(0 <= axis.at(tick) <= 1000 + 1e-6 for tick in ticks)


def test_a_step_in_time_is_drawn_with_the_hidden_share_and_a_choice_of_step(tmp_path: Path) -> None:
    run = fake_run.write_run(tmp_path / "scope", "scope", 0, timeline=True, **SMALL)
    loaded = load_run(run)
    picked = {name: time.step for name, time in choices(loaded).items()}
    assert picked == {"median": 1, "slowest": 2, "last": 4}
    page = report(tmp_path, run)
    assert page.raw.count('<input type="radio" name="timeline"') == 3
    assert (
        "The step took 17.1 s. The teacher was at work for 9.00 s, 89 % of it hidden: for 1.00 s it worked alone"
        in (page.text)
    )
    assert "The teacher was at work for 8.00 s, 0 % of it hidden: for 8.00 s it worked alone" in page.text
    assert "Teacher: at work for 9.00 s in 2 stretches between 3.00 s and 12.5 s" in page.raw.replace(
        "\N{NO-BREAK SPACE}", " "
    )
    assert "ran ahead" in page.text


def test_what_a_step_hid_behind_other_steps_is_taken_from_its_metrics(tmp_path: Path) -> None:
    run = fake_run.write_run(tmp_path / "scope", "scope", 0, timeline=True, **SMALL)
    rows = fake_run.read_jsonl(run / "metrics.jsonl")
    for row in rows:
        row.update({"time/teacher_exposed_s": 0.25, "perf/teacher_hidden_share": 0.9 + 0.01 * row["step"]})
    fake_run.write_jsonl(run / "metrics.jsonl", rows)
    page = report(tmp_path, run)
    assert "The teacher was at work for 9.00 s, 91 % of it hidden: for 0.25 s it worked alone" in page.text
    assert "Teacher hidden, all steps" in page.text
    assert '<td class="num">0.25\N{NO-BREAK SPACE}s</td><td class="num">92\N{NO-BREAK SPACE}%</td>' in page.raw


def test_time_by_stage_counts_every_second_once(tmp_path: Path) -> None:
    run = fake_run.write_run(tmp_path / "scope", "scope", 0, timeline=True, **SMALL)
    rows = fake_run.read_jsonl(run / "metrics.jsonl")
    for row in rows:
        row["time/teacher_s"] = 1e6  # the sum over calls that ran at once
    fake_run.write_jsonl(run / "metrics.jsonl", rows)
    (group,), _ = group_runs([load_run(run)])
    means = stage_means(group)
    assert means is not None
    stages, whole = means
    timeline = fake_run.read_jsonl(run / "timeline.jsonl")
    assert whole == pytest.approx(np.mean([row["seconds"] for row in timeline]))
    assert sum(stages) <= whole
    assert stages[[stage for stage, _, _ in STAGES].index("teacher")] == pytest.approx((1 + 8 + 1 + 1) / 4)


def test_one_step_needs_no_choice_and_a_step_without_teacher_says_so(tmp_path: Path) -> None:
    run = fake_run.write_run(tmp_path / "grpo", "grpo", 0, timeline=True, steps=1, problems=40, n=8)
    page = report(tmp_path, run)
    assert 'name="timeline"' not in page.raw
    assert "The teacher was not at work." in page.text


@pytest.mark.parametrize("content", [None, "", "\n"])
def test_without_a_timeline_there_is_no_such_section(tmp_path: Path, content: str | None) -> None:
    run = fake_run.write_run(tmp_path / "run", "scope", 0, **SMALL)
    if content is not None:
        (run / "timeline.jsonl").write_text(content)
    page = report(tmp_path, run)
    assert "One step in time" not in page.text
    assert 'id="timeline"' not in page.raw


BAD_ROWS: list[dict[str, Any]] = [
    {"step": 9},
    {"step": 9, "seconds": 0, "spans": {}},
    {"step": 9, "seconds": 1e300, "spans": {}},
    {"step": 9, "seconds": 5, "spans": [1, 2]},
    {"step": 9, "seconds": 5, "spans": {"teacher": 3}},
    {"step": 9, "seconds": 5, "spans": {"teacher": [[1, 2], None]}},
    {"step": 9, "seconds": 5, "spans": {"teacher": [[2, 1]]}},
    {"step": 9, "seconds": 5, "spans": {"teacher": [[1, 2, 3]]}},
    {"step": 9, "seconds": 5, "spans": {"teacher": [[0, 1e308]]}},
    {"step": 9, "seconds": 5, "spans": {"teacher": [["1", True]]}},
]


def test_rows_without_readable_spans_are_left_out_and_counted(tmp_path: Path) -> None:
    run = fake_run.write_run(tmp_path / "run", "scope", 0, timeline=True, **SMALL)
    good = fake_run.read_jsonl(run / "timeline.jsonl")
    odd = {"step": 5, "seconds": 3.0, "spans": {HOSTILE: [[0, 1]], "teacher": [], "update": [[1, 1]]}}
    fake_run.write_jsonl(run / "timeline.jsonl", [*BAD_ROWS, *good, odd])
    page = report(tmp_path, run)
    assert f"timeline.jsonl has {len(BAD_ROWS)} rows without readable spans: left out." in page.text
    assert [time.step for time in load_run(run).timeline] == [1, 2, 3, 4, 5]
    assert "alert(1)" not in page.raw


def test_many_short_stretches_do_not_grow_the_picture(tmp_path: Path) -> None:
    run = fake_run.write_run(tmp_path / "run", "scope", 0, timeline=True, **SMALL)
    without_many = len(report(tmp_path, run).raw)
    rows = fake_run.read_jsonl(run / "timeline.jsonl")
    for row in rows:
        row["spans"]["verify"] = [[i / 10_000, i / 10_000 + 5e-5] for i in range(100_000)]
    fake_run.write_jsonl(run / "timeline.jsonl", rows)
    assert len(report(tmp_path, run).raw) < without_many + 50_000


# --- broken and missing pieces -----------------------------------------------


def test_run_killed_midway_is_shown_up_to_there(tmp_path: Path) -> None:
    run = fake_run.write_run(tmp_path / "killed", "scope", 0, **SMALL)
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        text = (run / name).read_text()
        (run / name).write_text(text[: len(text) * 2 // 3])
    rows = fake_run.read_jsonl(run / "eval.jsonl")
    fake_run.write_jsonl(run / "eval.jsonl", [row for row in rows if row["step"] == 0])
    (run / "status.json").write_text('{"step": 3, "phase": "scoring", "pid": 1}')
    page = report(tmp_path, run)
    assert "killed: metrics.jsonl ends in an unfinished line 3" in page.text
    assert "killed: rollouts.jsonl ends in an unfinished line" in page.text
    assert "killed: has not finished: 2 of 4 steps are on record, stopped in phase “scoring”" in page.text
    assert "SCOPE: no evaluation after the start in killed" in page.text
    assert page.headline().startswith("SCOPE: training accuracy went from")


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("metrics.jsonl", "metrics.jsonl is missing"),
        ("config.toml", "config.toml is missing"),
        ("run.json", "run.json is missing"),
        ("eval.jsonl", "No evaluation in these runs"),
        ("rollouts.jsonl", "No rollouts.jsonl in these runs"),
        ("events.jsonl", "No alarm, warning or resume"),
        ("status.json", "SCOPE"),
    ],
)
@pytest.mark.parametrize("how", ["missing", "empty"])
def test_a_missing_or_empty_file_is_a_note(tmp_path: Path, name: str, says: str, how: str) -> None:
    run = fake_run.write_run(tmp_path / "run", "scope", 0, **SMALL)
    (run / name).unlink()
    if how == "empty":
        (run / name).write_text("")
        says = {"metrics.jsonl": "No metrics.jsonl with steps", "run.json": "run.json cannot be read"}.get(name, says)
        says = "SCOPE" if name == "config.toml" else says
    assert says in report(tmp_path, run).text


JUNK = [
    b"\xff\xfe\n",
    b"[1, 2]\n",
    b"null\n",
    b'{"step": "four"}\n',
    b'{"step": NaN, "accuracy": NaN}\n',
    b'{"step": 2, "accuracy": "high", "entropy": true, "time/step_s": null, "temperature": 0.6, "n": 0}\n',
    b'{"step": 2, "temperature": 0.6, "n": 8, "correct_counts": [9, "x"], "avg@k": null}\n',
    b'{"step": 3, "id": "x", "logprobs": "no", "token_ids": 7, "advantages": {}, "tokens": 1, "kind": 5}\n',
    b'{"step": 3, "id": "y", "correct": true, "reinforce": 1e999, "distill": 0, "logprobs": [-1e9], "kind": "alarm"}\n',
    b"[" * 100_000 + b"\n",
]


@pytest.mark.parametrize("name", ["metrics.jsonl", "eval.jsonl", "rollouts.jsonl", "events.jsonl", "timeline.jsonl"])
def test_junk_lines_never_stop_a_report(tmp_path: Path, name: str) -> None:
    run = fake_run.write_run(tmp_path / "run", "scope", 0, **SMALL)
    with (run / name).open("ab") as lines:
        lines.writelines(JUNK)
    page = report(tmp_path, run)
    assert f"{name} has" in page.text
    assert "unreadable lines" in page.text
    (run / name).write_bytes(b"".join(JUNK))
    report(tmp_path, run)


def test_rows_written_twice_count_once_the_later_one(tmp_path: Path) -> None:
    run = fake_run.write_run(tmp_path / "run", "scope", 0, **SMALL)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    again = {**json.loads(lines[2]), "accuracy": 0.123}
    (run / "metrics.jsonl").write_text("\n".join([*lines, json.dumps(again)]) + "\n")
    metrics = load_run(run).metrics
    assert [row["step"] for row in metrics] == [1, 2, 3, 4]
    assert metrics[2]["accuracy"] == 0.123


def test_seeds_with_different_problems_use_those_in_common(tmp_path: Path) -> None:
    runs = [fake_run.write_run(tmp_path / f"s{seed}", "scope", seed, **SMALL) for seed in (0, 1)]
    rows = fake_run.read_jsonl(runs[1] / "eval.jsonl")
    for row in rows:
        row["correct_counts"], row["problem_ids"] = row["correct_counts"][:30], row["problem_ids"][:30]
    fake_run.write_jsonl(runs[1] / "eval.jsonl", rows)
    page = report(tmp_path, *runs)
    assert "seeds answered different sets of problems; the 30 in common are used" in page.text


@pytest.mark.parametrize("case", ["none", "missing", "file", "empty", "out_is_folder", "out_below_file"])
def test_mistakes_are_one_line_without_traceback(tmp_path: Path, case: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("x")
    out = tmp_path / "report.html"
    runs = {"none": [], "missing": [tmp_path / "nowhere"], "file": [tmp_path / "file"], "empty": [tmp_path / "empty"]}
    if case.startswith("out"):
        runs[case] = [fake_run.write_run(tmp_path / "run", "scope", 0, **SMALL)]
        out = tmp_path / "empty" if case == "out_is_folder" else tmp_path / "file" / "report.html"
    with pytest.raises(RunFolderError) as caught:
        build_report(runs[case], out)
    assert isinstance(caught.value, ScopeError)
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)


# --- in a browser, where there is one ----------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
CHROMIUM_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--remote-debugging-pipe"),
]
LOOK = """JSON.stringify({
  width: document.documentElement.scrollWidth,
  tokens: document.querySelectorAll(".tokens span").length,
  prompt: (document.querySelector(".prompt pre") || {}).textContent,
  beyond: [...document.querySelectorAll("body *")].filter((element) =>
    element.getBoundingClientRect().right > innerWidth + 1 && !element.closest(".scroll, pre, svg, figure.wide"))
    .map((element) => `${element.tagName}#${element.id}.${element.className}`),
  images: document.querySelectorAll("img").length,
  injected: document.querySelectorAll("script").length,
  paper: getComputedStyle(document.body).backgroundColor,
  ink: getComputedStyle(document.body).color,
  unreadable: [...document.querySelectorAll(".prompt pre, .verdict, .tokens span, h1, td")].filter((element) => {
    const light = (css) => css.match(/[0-9.]+/g).slice(0, 3).reduce((sum, part) => sum + Number(part), 0) / 3;
    const [ink, paper] = [getComputedStyle(element).color, getComputedStyle(document.body).backgroundColor];
    return Math.abs(light(ink) - light(paper)) < 60;
  }).length,
})"""


class Browser:
    """A headless Chromium spoken to through its pipe: the page is opened as it is, its policy in force."""

    def __init__(self, profile: Path) -> None:
        to_child, self._write = os.pipe()
        self._read, from_child = os.pipe()
        # the pipe protocol wants descriptors 3 and 4; the shell moves ours there
        moved = f'exec "$@" 3<&{to_child} 4>&{from_child}'
        self._process = subprocess.Popen(
            ["bash", "-c", moved, "bash", str(CHROMIUM), *CHROMIUM_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(to_child, from_child),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_child)
        os.close(from_child)
        self._sent, self._rest, self._session = 0, b"", ""
        self.complaints: list[str] = []
        targets = self.call("Target.getTargets")["targetInfos"]
        target = next(one["targetId"] for one in targets if one["type"] == "page")
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        self._sent += 1
        message = {"id": self._sent, "method": method, "params": params}
        os.write(
            self._write, json.dumps({**message, **({"sessionId": self._session} if self._session else {})}).encode()
        )
        os.write(self._write, b"\0")
        while (answer := self._next()).get("id") != self._sent:
            self._note(answer)
        assert "error" not in answer, answer
        found: dict[str, Any] = answer["result"]
        return found

    def _next(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._read], [], [], 60)[0], "the browser did not answer within a minute"
            chunk = os.read(self._read, 1 << 16)
            assert chunk, "the browser went away"
            self._rest += chunk
        line, self._rest = self._rest.split(b"\0", 1)
        message: dict[str, Any] = json.loads(line)
        return message

    def _note(self, event: dict[str, Any]) -> None:
        name, what = event.get("method"), event.get("params", {})
        if name == "Runtime.exceptionThrown" or (name == "Log.entryAdded" and what["entry"]["level"] == "error"):
            self.complaints.append(json.dumps(what))
        if name == "Network.requestWillBeSent" and not what["request"]["url"].startswith(("file:", "about:", "data:")):
            self.complaints.append(what["request"]["url"])

    def look(self, page: Path, scheme: str, width: int) -> dict[str, Any]:
        """Open a page in a colour scheme and a window's width, and say what is to be seen."""
        self.complaints.clear()
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=False)
        self.call("Page.navigate", url=page.as_uri())
        ready = "new Promise((done) => document.readyState === 'complete' ? done(1) : addEventListener('load', done))"
        for expression in (ready, LOOK):
            seen = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        found: dict[str, Any] = json.loads(seen["result"]["value"])
        return found

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._read)
        os.close(self._write)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("no chromium here")
    found = Browser(tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("which", ["page", "attacked"])
def test_page_as_it_is_fits_its_window_and_draws_rollouts_in_both_schemes(
    which: str, scheme: str, browser: Browser, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    path = tmp_path / "report.html"
    path.write_text(request.getfixturevalue(which).raw, encoding="utf-8")
    for width in (1280, 400):
        seen = browser.look(path, scheme, width)
        assert seen["width"] <= width, seen["beyond"]
        assert seen["tokens"] > 100
        assert (seen["images"], seen["injected"]) == (0, 2)
        assert seen["unreadable"] == 0
        paper, ink = (
            np.mean([float(part) for part in re.findall(r"[\d.]+", seen[key])[:3]]) for key in ("paper", "ink")
        )
        assert (paper > 200 and ink < 80) if scheme == "light" else (paper < 60 and ink > 180)
        assert seen["prompt"] == HOSTILE if which == "attacked" else seen["prompt"].endswith(" :")
        assert browser.complaints == []
