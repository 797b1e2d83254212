"""The top of a report: the headline sentence, the result tables and the paired differences, as HTML."""

from __future__ import annotations

from html import escape

from scope_opd.evaluate.metrics import PairedDifference
from scope_opd.report.groups import Group
from scope_opd.report.load import number
from scope_opd.report.parts import colour_of, swatch, table
from scope_opd.report.results import Estimate, Line, Results, compare, main_line, start_of

PREFERRED_TEMPERATURE = 0.6


def headline(results: Results, groups: list[Group]) -> tuple[str, str]:
    """The finding in one sentence, and what qualifies it (interval, seeds), both as plain text."""
    line = main_line(results)
    temperature = _temperature(results, line)
    if line is None or temperature is None:
        return _headline_without_evaluation(groups)
    evaluated = line.by_temperature[temperature]
    end = evaluated.estimate(1)
    if end is None:
        return _headline_without_evaluation(groups)
    seeds = f"{len(end.per_seed)} seed{'s' * (len(end.per_seed) != 1)}"
    interval = f"95\u00a0% CI {span(end)}; " if end.low is not None and end.high is not None else ""
    problems = f"; {evaluated.counts.shape[1]} held-out problems" if evaluated.counts is not None else ""
    detail = f"{interval}{seeds}{problems}"
    figure = f"Avg@{evaluated.n} at T\u00a0=\u00a0{temperature:g}"
    start = start_of(line, results)
    begin = start.by_temperature[temperature].estimate(1) if start and temperature in start.by_temperature else None
    if start is None or begin is None:
        return f"{line.label} reaches {end.value:.1f}\u00a0% {figure}", detail
    change = compare(results, line, start, temperature, 1)
    if change is not None and not change.interval_excludes_zero:
        return (
            f"{line.label} leaves {figure} where it was: {begin.value:.1f} before, {end.value:.1f}\u00a0% after",
            detail,
        )
    verb = "lifts" if end.value >= begin.value else "lowers"
    return f"{line.label} {verb} {figure} from {begin.value:.1f} to {end.value:.1f}\u00a0%", detail


def _headline_without_evaluation(groups: list[Group]) -> tuple[str, str]:
    for group in groups:
        ends = []
        for run in group.runs:
            values = [value for row in run.metrics if (value := number(row.get("accuracy"))) is not None]
            if values:
                ends.append((values[0], values[-1]))
        if ends:
            first, last = (100 * sum(side) / len(ends) for side in zip(*ends, strict=True))
            text = f"{group.label}: training accuracy went from {first:.1f} to {last:.1f} %"
            return text, f"{group.seeds}; on sampled training prompts, no held-out evaluation of the trained model"
    return "No result yet", "these runs hold neither an evaluation of a trained model nor training accuracy"


def _temperature(results: Results, line: Line | None) -> float | None:
    found = sorted(line.by_temperature) if line else []
    return PREFERRED_TEMPERATURE if PREFERRED_TEMPERATURE in found else next(iter(found), None)


def lede(results: Results) -> str:
    """What the headline leaves open: against whom, how surely, how far from the teacher. Plain text, possibly none."""
    line = main_line(results)
    temperature = _temperature(results, line)
    if line is None or temperature is None:
        return ""
    sentences = []
    resolved: list[tuple[PairedDifference, str]] = []
    open_: list[tuple[PairedDifference, str]] = []
    for other in results.of("method"):
        difference = compare(results, line, other, temperature, 1) if other is not line else None
        if difference is not None:
            (resolved if difference.resolved else open_).append((difference, other.label))
    for sign, word in ((1, "above"), (-1, "below")):
        some = [f"{abs(d.value):.1f} points {word} {name}" for d, name in resolved if d.value * sign > 0]
        if some:
            each = "each resolved" if len(some) > 1 else "resolved"
            scope = " for these models, one seed each" if resolved[0][0].seed_margin is None else ""
            sentences.append(f"It ends {_and(some)} ({each}{scope}).")
    if open_:
        some = [f"{name} ({signed(d.value)} points)" for d, name in open_]
        subject, verb = ("differences", "are") if len(some) > 1 else ("difference", "is")
        sentences.append(f"The {subject} to {_and(some)} {verb} not resolved by these problems and seeds.")
    start, teacher = start_of(line, results), next(iter(results.of("teacher")), None)
    values = [
        estimate.value
        for who in (start, line, teacher)
        if who and temperature in who.by_temperature and (estimate := who.by_temperature[temperature].estimate(1))
    ]
    if len(values) == 3 and values[2] - values[0] > 1:
        share = 100 * (values[1] - values[0]) / (values[2] - values[0])
        sentences.append(f"The teacher stands at {values[2]:.1f}: {share:.0f} % of the way from start to teacher.")
    return " ".join(sentences)


def _and(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def signed(value: float) -> str:
    """+12.3 / −0.8 / 0.0, with a real minus sign."""
    text = f"{value:+.1f}".replace("-", "−")
    return "0.0" if text in ("+0.0", "−0.0") else text


def span(estimate: Estimate | PairedDifference) -> str:
    """ "61.2–66.8", or with "to" where a sign makes a dash unreadable."""
    if estimate.low is None or estimate.high is None:
        return ""
    if isinstance(estimate, PairedDifference):
        return f"{signed(estimate.low)} to {signed(estimate.high)}"
    return f"{estimate.low:.1f}–{estimate.high:.1f}"


def result_table(results: Results, temperature: float) -> str:
    """Start, methods and teacher at one temperature."""
    ks = results.ks(temperature)
    lines = [line for line in results.lines if temperature in line.by_temperature]
    ns = sorted({line.by_temperature[temperature].n for line in lines})
    avg = "Avg@" + "/".join(map(str, ns))
    head = "".join(f'<th scope="col" class="num">Pass@{k}</th>' for k in ks if k > 1)
    body = []
    for line in lines:
        evaluated = line.by_temperature[temperature]
        first = evaluated.estimate(1)
        cells = "".join(_cell(evaluated.estimate(k)) for k in ks if k > 1)
        seeds = ""
        if first is not None and line.role == "method":
            values = " · ".join(f"{value:.1f}" for value in first.per_seed)
            seeds = f"{line.seeds}: {values}" if line.seeds else ""
        body.append(
            f'<tr class="{line.role}"><th scope="row">{swatch(line.group, line.role)}'
            f'<span class="who">{escape(line.label)}<small>{escape(seeds)}</small></span></th>{_cell(first)}'
            f'<td class="bar">{_interval_bar(first, colour_of(line.group, line.role))}</td>{cells}</tr>'
        )
    axis = '<th scope="col" class="bar"><span class="axis"><i>0</i><i>50</i><i>100 %</i></span></th>'
    first_columns = f'<th></th><th scope="col" class="num">{avg}<small>= Pass@1</small></th>{axis}'
    columns = '<colgroup><col class="c-who"><col class="c-avg"><col class="c-bar"></colgroup>'
    return table("results", first_columns + head, body, caption=f"T = {temperature:g}", columns=columns)


def with_replacement_tables(results: Results) -> str:
    """The biased Pass@k beside the unbiased one, folded away: it serves comparison with published figures only."""
    tables = []
    for temperature in results.temperatures:
        ks = [k for k in results.ks(temperature) if k > 1]
        body = []
        for line in results.lines:
            evaluated = line.by_temperature.get(temperature)
            if evaluated is None:
                continue
            cells = ""
            for k in ks:
                biased, unbiased = evaluated.with_replacement(k), evaluated.estimate(k)
                beside = f"<small>unbiased {unbiased.value:.1f}</small>" if unbiased else ""
                cells += f'<td class="num">{"–" if biased is None else f"{biased:.1f}"}{beside}</td>'
            who = f'{swatch(line.group, line.role)}<span class="who">{escape(line.label)}</span>'
            body.append(f'<tr><th scope="row">{who}</th>{cells}</tr>')
        if ks and body:
            head = "<th></th>" + "".join(f'<th scope="col" class="num">Pass@{k}, with replacement</th>' for k in ks)
            tables.append(table("plain", head, body, caption=f"T = {temperature:g}"))
    if not tables:
        return ""
    return (
        "<details><summary>Pass@k with replacement <small>for comparison with published figures only</small></summary>"
        '<p class="how">The authors’ release draws k of the n samples with replacement, 1 − (1 − c/n)<sup>k</sup>, '
        "which is biased downwards; use it only to compare with figures published that way.</p>"
        f"{''.join(tables)}</details>"
    )


def _cell(estimate: Estimate | None) -> str:
    if estimate is None:
        return '<td class="num">–</td>'
    below = span(estimate)
    if estimate.low is not None and estimate.low == estimate.high:
        below = "no spread"
    return f'<td class="num">{estimate.value:.1f}<small>{below or "no interval"}</small></td>'


def _interval_bar(estimate: Estimate | None, colour: str) -> str:
    """The estimate and its interval on a line from 0 to 100 %, every seed as a tick."""
    if estimate is None:
        return ""
    parts = ['<path class="rail" d="M0 9H200"/>', '<path class="rail" d="M0 5V13M100 5V13M200 5V13"/>']
    if estimate.low is not None and estimate.high is not None:
        parts.append(
            f'<path d="M{2 * estimate.low:.1f} 9H{2 * estimate.high:.1f}" style="stroke:{colour}" class="ci"/>'
        )
    if len(estimate.per_seed) > 1:
        parts += [
            f'<path class="seed" d="M{2 * v:.1f} 1V4M{2 * v:.1f} 14V17" style="stroke:{colour}"/>'
            for v in estimate.per_seed
        ]
    parts.append(f'<circle cx="{2 * estimate.value:.1f}" cy="9" r="2.9" style="fill:{colour}"/>')
    return f'<svg viewBox="0 1 200 16" aria-hidden="true">{"".join(parts)}</svg>'


def difference_table(results: Results, temperature: float) -> str:
    """The main method minus each other method, paired by problem."""
    line = main_line(results)
    if line is None or temperature not in line.by_temperature:
        return ""
    ks = results.ks(temperature)
    body = []
    for other in results.of("method"):
        if other is line or temperature not in other.by_temperature:
            continue
        cells = "".join(_difference_cell(compare(results, line, other, temperature, k)) for k in ks)
        who = f'{swatch(other.group)}<span class="who">over {escape(other.label)}</span>'
        body.append(f'<tr><th scope="row">{who}</th>{cells}</tr>')
    if not body:
        return ""
    names = [f"Avg@{line.by_temperature[temperature].n}" if k == 1 else f"Pass@{k}" for k in ks]
    head = "<th></th>" + "".join(f'<th scope="col" class="num">{name}</th>' for name in names)
    return table("differences", head, body, caption=f"{escape(line.label)} minus the others, T = {temperature:g}")


def _difference_cell(difference: PairedDifference | None) -> str:
    if difference is None:
        return '<td class="num">–<small>not comparable</small></td>'
    spread, verdict = span(difference), '<b class="yes">resolved</b>'
    if difference.low == difference.high == 0:
        spread = "equal"
    if not difference.resolved:
        why = "seeds differ as much" if difference.interval_excludes_zero else "the interval holds 0"
        verdict = f'<b class="no" title="{why}">not resolved</b>'
    seeds = "" if difference.seed_margin is None else f"<br>seeds ±{difference.seed_margin:.1f}"
    return f'<td class="num">{signed(difference.value)}<small>{spread}{seeds}</small>{verdict}</td>'
