"""The rollout viewer: what of the sampled rollouts goes into the page, and the data block that its script reads.

Text of rollouts is untrusted. It travels as JSON in an inert data block in which ``<``, ``>`` and ``&`` are written as
escapes, and the script puts it on the page as text nodes only.

Not everything fits: steps are thinned evenly (first and last kept) and long responses are cut in the middle until a
budget of tokens is met. What was left out is said on the page.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from typing import Any

from scope_opd.report.groups import Group
from scope_opd.report.load import RolloutPoint, Run, number, numbers, read_rollouts

TOKEN_BUDGET = 100_000
LONG_CUT, SHORT_CUT = (900, 300), (300, 100)
"""(first, last) tokens kept of a long response."""
ENOUGH_STEPS = 8
PROMPT_CHARACTERS = 4_000


def viewer_data(groups: Sequence[Group], *, budget: int = TOKEN_BUDGET) -> tuple[dict[str, Any] | None, list[str]]:
    """The data of the viewer and notes on what was left out; None when no run logged rollouts.

    ``{"vocabulary": [..], "runs": [{"name", "label", "seed", "scale", "steps": [{"step", "groups": [{"id", "prompt",
    "rollouts": [..]}]}]}]}``; tokens are indices into the vocabulary, ``scale`` is the run's 98th percentile of
    |advantage|, at which the colour is full.
    """
    runs = [(group, run) for group in groups for run in group.runs if run.rollouts]
    if not runs:
        return None, []
    vocabulary: dict[str, int] = {}
    chosen, cut, notes = _choose([run.rollouts for _, run in runs], budget)
    packed = [_pack_run(group, run, points, vocabulary, cut) for (group, run), points in zip(runs, chosen, strict=True)]
    return {"vocabulary": list(vocabulary), "runs": packed}, notes


def data_block(data: dict[str, Any]) -> str:
    """JSON that is safe inside ``<script type="application/json">``: no character of it can end the element."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _choose(
    runs: Sequence[Sequence[RolloutPoint]], budget: int
) -> tuple[list[list[RolloutPoint]], tuple[int, int], list[str]]:
    """Rollouts of every run at evenly spread steps (first and last kept), the cut of long responses, and notes.

    Whole steps if eight of them fit, else the first group of each step, else that with shorter responses.
    """
    steps = [_by_step(points) for points in runs]
    first = [{step: [p for p in points if p.group == points[0].group] for step, points in run.items()} for run in steps]
    most = max(map(len, steps))
    tiers = [(steps, LONG_CUT), (first, LONG_CUT), (first, SHORT_CUT)]
    for number_of_tier, (candidates, cut) in enumerate(tiers, start=1):
        keep = most
        while keep > 2 and sum(_cost(run, keep, cut) for run in candidates) > budget:
            keep = max(2, min(keep - 1, int(0.97 * keep)))
        if keep >= min(ENOUGH_STEPS, most) or number_of_tier == len(tiers):
            break
    chosen = [[point for step in _spread(sorted(run), keep) for point in run[step]] for run in candidates]
    notes = [f"at most {keep} of up to {most} logged steps a run"] if keep < most else []
    if candidates is first and first != steps:
        notes.append("the first group of each step")
    if any(point.tokens > sum(cut) for points in chosen for point in points):
        notes.append(f"of long responses the first {cut[0]} and the last {cut[1]} tokens")
    return chosen, cut, notes


def _by_step(points: Sequence[RolloutPoint]) -> dict[int, list[RolloutPoint]]:
    steps: dict[int, list[RolloutPoint]] = {}
    for point in points:
        steps.setdefault(point.step, []).append(point)
    return steps


def _cost(run: dict[int, list[RolloutPoint]], keep: int, cut: tuple[int, int]) -> int:
    """Tokens on the page when ``keep`` steps of a run are shown."""
    return sum(min(point.tokens, sum(cut)) for step in _spread(sorted(run), keep) for point in run[step])


def _spread(steps: Sequence[int], keep: int) -> list[int]:
    if keep >= len(steps):
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (keep - 1))] for i in range(keep)]


def _pack_run(
    group: Group, run: Run, points: Sequence[RolloutPoint], vocabulary: dict[str, int], cut: tuple[int, int]
) -> dict[str, Any]:
    steps: dict[int, dict[str, dict[str, Any]]] = {}
    sizes: list[float] = []
    for point, row in zip(points, read_rollouts(run, points), strict=True):
        advantages = _advantages(row)
        sizes += [abs(value) for value in advantages or [] if value]
        prompts = steps.setdefault(point.step, {})
        prompt = prompts.setdefault(point.group, {"id": point.group, "prompt": _prompt(row), "rollouts": []})
        prompt["rollouts"].append(_pack_rollout(group, row, point, advantages, vocabulary, cut))
    return {
        "name": run.name,
        "label": group.label,
        "seed": run.seed,
        "scale": _round(sorted(sizes)[int(0.98 * (len(sizes) - 1))]) if sizes else 1.0,
        "steps": [{"step": step, "groups": list(prompts.values())} for step, prompts in steps.items()],
    }


def _prompt(row: dict[str, Any]) -> str:
    text = row.get("prompt")
    if not isinstance(text, str):
        ids = row.get("prompt_token_ids")
        text = f"token ids {' '.join(map(str, ids))}" if isinstance(ids, list) and ids else ""
    return text if len(text) <= PROMPT_CHARACTERS else text[:PROMPT_CHARACTERS] + " … (prompt cut here)"


def _advantages(row: dict[str, Any]) -> list[float] | None:
    """Advantages as logged; else reinforce + distill (log pi_T - log pi_S) from the recorded log-probs."""
    logged = numbers(row.get("advantages"))
    tokens = row.get("token_ids")
    length = len(tokens) if isinstance(tokens, list) else 0
    if logged is not None and len(logged) == length:
        return logged
    reinforce, distill = number(row.get("reinforce")), number(row.get("distill"))
    if reinforce is None or distill is None:
        return None
    kept = numbers(row.get("loss_mask")) or [1.0] * length
    if len(kept) != length:
        return None
    if distill == 0.0:
        return [reinforce if keep else 0.0 for keep in kept]
    student, teacher = numbers(row.get("logprobs")), numbers(row.get("teacher_logprobs"))
    if student is None or teacher is None or not len(student) == len(teacher) == length:
        return None
    judged = numbers(row.get("teacher_mask")) or [1.0] * length
    if len(judged) != length:
        return None
    gaps = [(t - s) * flag for s, t, flag in zip(student, teacher, judged, strict=True)]
    return [reinforce + distill * gap if keep else 0.0 for gap, keep in zip(gaps, kept, strict=True)]


def _pack_rollout(
    group: Group,
    row: dict[str, Any],
    point: RolloutPoint,
    advantages: list[float] | None,
    vocabulary: dict[str, int],
    cut: tuple[int, int],
) -> dict[str, Any]:
    ids = row.get("token_ids")
    ids = ids if isinstance(ids, list) else []
    strings = row.get("tokens")
    if not isinstance(strings, list) or len(strings) != len(ids):
        strings = [f"‹{token}›" for token in ids]
    head, tail = cut
    left_out = max(0, len(ids) - head - tail)
    kept = list(range(len(ids))) if not left_out else [*range(head), *range(len(ids) - tail, len(ids))]
    packed = {
        "sample": row.get("sample") if isinstance(row.get("sample"), int) else None,
        "verdict": {True: "correct", False: "incorrect", None: "no verdict"}[point.correct],
        "masked": (str(row.get("mask_reason") or "yes")) if point.masked else None,
        "reinforce": _round(number(row.get("reinforce"))),
        "distill": _round(number(row.get("distill"))),
        "ppl": _round(point.ppl),
        "ppl_of": None if point.ppl is None else group.perplexity_of(point.path or "student"),
        "length": len(ids),
        "truncated": row.get("finish_reason") == "length",
        "extracted": str(row["extracted"])[:200] if row.get("extracted") is not None else None,
        "tokens": [vocabulary.setdefault(_readable(strings[place], ids[place]), len(vocabulary)) for place in kept],
        "advantages": _pack_advantages([advantages[place] for place in kept]) if advantages else None,
        "cut": {"after": head, "tokens": left_out} if left_out else None,
    }
    return {key: value for key, value in packed.items() if value is not None and value is not False}


def _readable(token: object, token_id: object) -> str:
    """Byte-level and sentencepiece marks of a leading space or a newline as the character they stand for.

    A token that is part of a character only (its bytes are no text, which decoding writes as U+FFFD) shows its id.
    """
    text = str(token)
    if len(text) > 1 or text in "ĠĊ▁":
        text = text.replace("Ċ", "\n")
        if text[:1] in ("Ġ", "▁"):
            text = " " + text[1:]
    return re.sub("\ufffd+", f"‹{token_id}›", text[:200])


def _pack_advantages(values: list[float]) -> float | list[float]:
    """One number where all tokens share it."""
    rounded = [_round(value) or 0.0 for value in values]
    return rounded[0] if rounded and len(set(rounded)) == 1 else rounded


def _round(value: float | None) -> float | None:
    """Three significant digits, as JSON writes them shortest."""
    return None if value is None else float(f"{value:.3g}")
