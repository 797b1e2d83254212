"""The sections of a report below its headline, each a title, an anchor and HTML with every text escaped."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from html import escape
from typing import Any

from scope_opd.report import plots
from scope_opd.report.answer import difference_table, result_table, with_replacement_tables
from scope_opd.report.groups import Group
from scope_opd.report.load import Route, Run, number
from scope_opd.report.parts import Section, figure, figures, legend, missing, section, swatch, table
from scope_opd.report.results import Results

EVENTS_SHOWN = 5
PATHS: tuple[Route, ...] = ("student", "teacher")


def result(results: Results) -> Section:
    """Tables of figures and differences, and Pass@k curves."""
    title = "Result"
    if not results.temperatures:
        return section(
            "result",
            title,
            "",
            missing("No evaluation in these runs: set eval.at_start and eval.at_end to record one."),
        )
    several = any(line.group is not None and len(line.group.runs) > 1 for line in results.lines)
    how = (
        "Avg@n is the mean share of correct samples, which is Pass@1; Pass@k is the unbiased 1 − C(n−c, k) ÷ C(n, k) "
        "of c correct samples among n. Intervals are a bootstrap (BCa) over problems."
    )
    absent = [role for role in ("start", "teacher") if not any(line.by_temperature for line in results.of(role))]
    if absent:
        how += f" The {' and the '.join(absent)} {'were' if len(absent) > 1 else 'was'} not evaluated in these runs."
    if several:
        how += (
            " With several seeds the same resampled problems serve all seeds and the seeds’ figures are averaged; "
            "short ticks are single seeds, whose spread is not part of these intervals."
        )
    tables = "".join(result_table(results, temperature) for temperature in results.temperatures)
    differences = "".join(difference_table(results, temperature) for temperature in results.temperatures)
    explained = (
        "Differences are in percentage points and paired by problem, below them the 95 % interval over problems. "
        "“Seeds ±” is what training again with other seeds may change: the 95 % t interval from the variance of seeds, "
        "pooled over the methods. <b>Resolved</b> means clear of zero by both; otherwise these runs cannot tell the "
        "two apart. With one seed a method it speaks of these models only. Nothing is corrected for the number of "
        "comparisons."
    )
    tables += f'<p class="how">{how}</p>'
    differences += f'<p class="how">{explained}</p>' if differences else ""
    differences += with_replacement_tables(results)
    curves = [
        figure(
            f"Pass@k at T = {temperature:g}",
            plots.pass_at_k_curves(results, temperature, f"passk{index}"),
            "Chance that at least one of k samples is right (unbiased estimator, mean over problems and seeds). A "
            "method that gains at k = 1 and loses at large k has given up variety.",
        )
        for index, temperature in enumerate(results.temperatures)
    ]
    groups = [line.group for line in results.lines if line.group is not None and line.by_temperature]
    intro = "On held-out problems, in percent; below each figure its 95 % interval."
    drawn = [legend(groups, results), figures(*curves)] if any(curves) else []
    return section("result", title, intro, tables, differences, *drawn)


def learning(groups: Sequence[Group], results: Results) -> Section:
    """Curves by step."""
    title = "Learning"
    steps = max((len(run.metrics) for group in groups for run in group.runs), default=0)
    if not steps:
        return section("learning", title, "", missing("No metrics.jsonl with steps in these runs: no curves to draw."))
    window = plots.smoothing_window(steps)
    smoothing = (
        f"their mean, as a centred moving average over {window} steps, is bold" if window > 1 else "their mean is bold"
    )
    rewards_differ = any(
        abs((number(row.get("reward/mean")) or 0.0) - (number(row.get("accuracy")) or 0.0)) > 1e-9
        for group in groups
        for run in group.runs
        for row in run.metrics
        if number(row.get("reward/mean")) is not None
    )
    curve = plots.curves
    found = [
        figure(
            "Training accuracy",
            curve(groups, "accuracy", "accuracy", "Training accuracy", percent=True, zero=True),
            "Share of the step’s judged rollouts that are correct, on training prompts at the sampling temperature."
            + ("" if rewards_differ else " The mean reward is the same number."),
        ),
        figure(
            "Prompts with a correct rollout",
            curve(groups, "pass@n", "passn", "Share of groups with a correct rollout", percent=True),
            "Share of the step’s groups in which at least one rollout is correct (Pass@n of the batch).",
        ),
        figure(
            "Mean reward",
            curve(groups, "reward/mean", "reward", "Mean reward") if rewards_differ else None,
            "Mean reward of the step’s judged rollouts.",
        ),
        *(
            figure(
                f"Held-out Avg@n at T = {temperature:g}",
                plots.heldout_curve(groups, temperature, f"heldout{index}"),
                "In-training evaluations on the same held-out problems; one dot an evaluation.",
            )
            for index, temperature in enumerate(results.temperatures)
        ),
        figure(
            "Entropy",
            curve(groups, "entropy", "entropy", "Entropy"),
            "Mean entropy of the student’s next-token distribution on its own rollouts, in nats a token. A steep fall "
            "means that variety is being lost.",
        ),
        figure(
            "Response length",
            curve(groups, "length/mean", "length", "Mean response length"),
            "Mean tokens of a rollout, end token included.",
        ),
        figure(
            "Truncated rollouts",
            curve(groups, "truncated/share", "truncated", "Share of truncated rollouts", percent=True, zero=True)
            if _any_above(groups, "truncated/share", 0.005)
            else None,
            "Share of the step’s rollouts that reached the token limit.",
        ),
    ]
    return section(
        "learning",
        title,
        f"By training step. Every seed is a thin line; {smoothing}. Colours and dashes are the same in all figures.",
        legend(groups),
        figures(*found),
    )


def _any_above(groups: Sequence[Group], key: str, limit: float) -> bool:
    return any((number(row.get(key)) or 0.0) > limit for group in groups for run in group.runs for row in run.metrics)


def weights(groups: Sequence[Group]) -> Section:
    """Effective sample sizes, perplexities and weights."""
    ess = figures(
        *(
            figure(
                f"Effective sample size, {path} path",
                plots.curves(groups, f"ess/{key}", f"ess-{key}", f"Effective sample size of the {path} path"),
                f"(Σw)² ÷ (n Σw²) of the weights of {which}, mean over groups with at least two of them. 1 means that "
                "all weigh the same, 1/n that one rollout decides alone.",
            )
            for key, path, which in (
                ("student", "student", "correct rollouts"),
                ("teacher", "teacher", "incorrect rollouts"),
            )
        )
    )
    pictures = []
    for index, group in enumerate(groups):
        pair = figures(
            *(
                figure(
                    f"{group.label}, {plots.rollouts_of(plots.relative_weights(group.runs, path=path))}",
                    plots.perplexity(group, f"ppl-{index}-{path}", path=path),
                    _perplexity_caption(group, path),
                )
                for path in PATHS
            )
        )
        if pair:
            pictures.append((group, pair))
    parts = [legend(groups), ess] if ess else [missing("No effective sample sizes in metrics.jsonl.")]
    if pictures:
        first, *rest = pictures
        parts.append(f'<div class="more">{first[1]}</div>')
        parts += [
            f"<details><summary>The same for {escape(group.label)}</summary>{pair}</details>" for group, pair in rest
        ]
    else:
        parts.append(
            missing("No logged rollouts with weights and log-probs (rollouts.jsonl): no perplexities to draw.")
        )
    intro = (
        "Which rollouts a method listens to. In SCOPE a correct rollout weighs more the less likely the student found "
        "it, an incorrect one more the more likely the teacher finds it. Where all weights are equal, tau does nothing."
    )
    return section("weights", "Weights", intro, *parts)


def _perplexity_caption(group: Group, path: Route) -> str:
    found = plots.relative_weights(group.runs, path=path)
    if not found:
        return ""
    shown = min(len(found), plots.MAX_POINTS)
    dots = f"{shown} of them as dots" if shown < len(found) else "each a dot below"
    who = f"{group.perplexity_of(path)}’s {'sampling ' if path == 'student' else ''}log-probs"
    return (
        f"Above: exp of the mean negative log-prob a token, from the {who}, of {len(found)} logged rollouts. Below "
        f"({dots}): the weight divided by the mean weight of its path in its group. Perplexities beyond the 99th "
        "percentile stand at the edge."
    )


def timing(groups: Sequence[Group]) -> Section:
    """Seconds a step by stage, and totals."""
    svg = plots.time_by_stage(groups, "time")
    if svg is None:
        return section("time", "Time", "", missing("No time/ figures in metrics.jsonl."))
    found = [(group, means) for group in groups if (means := plots.stage_means(group)) is not None]
    shown = [
        (name, colour)
        for index, (_, name, colour) in enumerate(plots.STAGES)
        if any(stages[index] > 0 for _, (stages, _) in found)
    ]
    keys = "".join(
        f'<li><span class="key" style="background:var(--t{colour})"></span>{name}</li>'
        for name, colour in [*shown, ("Other", plots.OTHER)]
    )
    caption = (
        "Mean over all steps and seeds; the number is the whole step. “Other” is what no stage claims. A second in "
        "which several stages were at work counts once: for generation, else update, else verification, else weights; "
        "the teacher’s part is what it adds to a step."
    )
    if any(run.metrics and not run.timeline for group in groups for run in group.runs):
        caption += " Without timeline.jsonl stages that overlap can add up to more than the step."
    rows = []
    for group, (_, whole) in found:
        total = [float(plots.series(run, "time/step_s")[1].sum()) for run in group.runs]
        speed = [value for run in group.runs for value in plots.series(run, "perf/tokens_per_s")[1]]
        memory = [value for run in group.runs for value in plots.series(run, "perf/peak_rss_mb")[1]]
        rows.append(
            f'<tr><th scope="row">{swatch(group)}{escape(group.label)}</th>'
            f'<td class="num">{whole:.2f} s</td>'
            f'<td class="num">{_duration(sum(total) / len(total)) if any(total) else "–"}</td>'
            f'<td class="num">{_count(sum(speed) / len(speed)) if speed else "–"}</td>'
            f'<td class="num">{f"{max(memory):,.0f} MB" if memory else "–"}</td></tr>'
        )
    head = "".join(
        f'<th scope="col" class="num">{t}</th>' for t in ("A step", "A run", "Tokens a second", "Peak memory")
    )
    drawn = figures(figure("Time a step by stage", svg, caption, wide=True))
    return section(
        "time", "Time", "", f'<ul class="legend">{keys}</ul>', drawn, table("plain", f"<th></th>{head}", rows)
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _count(value: float) -> str:
    return f"{value:,.0f}"


def events(runs: Sequence[Run]) -> Section:
    """Alarms, warnings and resumes; checkpoints only as a count."""
    training = [run for run in runs if run.kind == "training"]
    rows = [row for run in training for row in _event_rows(run)]
    if not rows:
        count = f"{len(training)} run{'s' * (len(training) != 1)}"
        return section("events", "Events", "", missing(f"No alarm, warning or resume in {count}."))
    quiet = [run.name for run in training if not _event_rows(run)]
    head = '<th>Run</th><th class="num">Step</th><th>Kind</th><th>What</th>'
    intro = f"Nothing to report: {escape(', '.join(quiet))}." if quiet else ""
    return section("events", "Events", intro, table("events", head, rows))


def _event_rows(run: Run) -> list[str]:
    """The rows of one run, none when only checkpoints happened; many events of one kind are cut short."""
    told = [event for event in run.events if event["kind"] != "checkpoint"]
    rows = []
    for kind in dict.fromkeys(event["kind"] for event in told):
        same = [event for event in told if event["kind"] == kind]
        colour = kind if kind in ("alarm", "warning") else ""
        badge = f'<span class="kind {colour}">{escape(kind)}</span>'
        for event in same[:EVENTS_SHOWN]:
            step = number(event.get("step"))
            rows.append(_row(run.name, "–" if step is None else f"{step:g}", badge, str(event.get("message", ""))))
        if len(same) > EVENTS_SHOWN:
            rows.append(_row(run.name, "", badge, f"and {len(same) - EVENTS_SHOWN} more"))
    saved = len(run.events) - len(told)
    if told and saved:
        rows.append(_row(run.name, "", "", f"{saved} checkpoint{'s' * (saved != 1)} saved"))
    return rows


def _row(name: str, step: str, badge: str, what: str) -> str:
    return f'<tr><td>{escape(name)}</td><td class="num">{step}</td><td>{badge}</td><td>{escape(what)}</td></tr>'


def rollouts(data: dict[str, Any] | None, notes: Sequence[str]) -> Section:
    """The frame of the viewer; its script fills it."""
    title = "Rollouts"
    if data is None:
        return section(
            "rollouts", title, "", missing("No rollouts.jsonl in these runs: set run.rollouts_logged above 0.")
        )
    intro = (
        "Sampled rollouts with the credit they got. A token’s colour is its advantage, A = reinforce + distill × "
        "(log π<sub>teacher</sub> − log π<sub>student</sub>): blue makes it more likely, orange and dotted less."
    )
    if any(re.search(r"‹\d+›", token) for token in data["vocabulary"]):
        intro += " ‹123› stands for a token, by its id, that is no text of its own, such as part of a character."
    controls = (
        '<div class="controls" id="viewer-controls" hidden>'
        '<label>Method <select id="viewer-method"></select></label>'
        '<label>Seed <select id="viewer-seed"></select></label>'
        '<label>Show <select id="viewer-only"><option value="all">all verdicts</option><option value="correct">correct'
        '</option><option value="incorrect">incorrect</option></select></label>'
        '<label><button id="viewer-back" type="button" aria-label="earlier step">←</button>'
        '<input id="viewer-step" type="range" min="0" step="1" aria-label="step">'
        '<button id="viewer-next" type="button" aria-label="later step">→</button>'
        '<output id="viewer-at" for="viewer-step"></output></label>'
        '<span class="scale"><span id="viewer-low"></span><span class="ramp" role="img" aria-label="colour scale of '
        'advantages: orange negative, blue positive"></span><span id="viewer-high"></span></span></div>'
    )
    frame = (
        '<p class="readout" id="viewer-readout" aria-live="polite"></p><div id="viewer"></div>'
        "<noscript><p class=missing>The rollout viewer needs JavaScript; everything above does not.</p></noscript>"
    )
    thinned = ""
    if notes:
        thinned = (
            f"<p><small>To keep this file small it holds part of the rollouts ({escape('; '.join(notes))}).</small></p>"
        )
    return section("rollouts", title, intro, thinned, controls, frame)


def settings(runs: Sequence[Run]) -> Section:
    """Every run's settings and how to repeat it."""
    items = []
    for run in runs:
        facts = [("folder", str(run.path))]
        for key in (
            "method",
            "seed",
            "created",
            "model",
            "teacher",
            "scope_version",
            "python",
            "torch",
            "transformers",
            "device",
        ):
            value = run.info.get(key)
            if value is not None and value != "":
                facts.append((key.replace("_", " "), str(value)))
        listed = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in facts)
        parts = [f"<dl>{listed}</dl>"]
        if run.config_text:
            command = f"scope train {shlex.quote(str(run.path / 'config.toml'))} --set run.dir=runs/again"
            parts.append(f"<h3>Repeat it</h3><pre>{escape(command)}</pre>")
            parts.append(f"<h3>config.toml</h3><pre>{escape(run.config_text.strip())}</pre>")
        prompt = run.info.get("first_prompt")
        if isinstance(prompt, str) and prompt:
            parts.append(f"<h3>First prompt as the student saw it</h3><pre>{escape(prompt[:4000])}</pre>")
        what = run.label or (f"{run.method}, seed {run.seed}" if run.kind == "training" else "evaluation")
        items.append(
            f"<details><summary>{escape(run.name)} <small>{escape(what)}</small></summary>{''.join(parts)}</details>"
        )
    return section("settings", "Settings", "What each run was given, and the command that repeats it.", *items)
