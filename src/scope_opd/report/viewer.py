"""The rollout viewer: what of the sampled rollouts goes into the page, and the data block that its script reads.

Text of rollouts is untrusted. It travels as JSON in an inert data block in which ``<``, ``>`` and ``&`` are written as
escapes, and the script puts it on the page as text nodes only.

Not everything fits: steps are thinned evenly (first and last kept) and long responses are cut in the middle until a
budget of tokens is met. What was left out is said on the page.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from scope_opd.report.groups import Group
from scope_opd.report.load import RolloutPoint, Run, number, numbers, read_rollouts

TOKEN_BUDGET = 100_000
HEAD_TOKENS, TAIL_TOKENS = 900, 300
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
    chosen, notes = _choose([run.rollouts for _, run in runs], budget)
    packed = [_pack_run(group, run, points, vocabulary) for (group, run), points in zip(runs, chosen, strict=True)]
    return {"vocabulary": list(vocabulary), "runs": packed}, notes


def data_block(data: dict[str, Any]) -> str:
    """JSON that is safe inside ``<script type="application/json">``: no character of it can end the element."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _shown(point: RolloutPoint) -> int:
    return min(point.tokens, HEAD_TOKENS + TAIL_TOKENS)


def _choose(runs: Sequence[Sequence[RolloutPoint]], budget: int) -> tuple[list[list[RolloutPoint]], list[str]]:
    """As many whole steps of every run, evenly spread with first and last, as fit; at worst one group of each step."""
    by_step: list[dict[int, list[RolloutPoint]]] = [{} for _ in runs]
    for points, steps in zip(runs, by_step, strict=True):
        for point in points:
            steps.setdefault(point.step, []).append(point)
    cost = [{step: sum(map(_shown, points)) for step, points in steps.items()} for steps in by_step]
    most = keep = max(map(len, by_step))
    while keep > 2 and sum(sum(costs[step] for step in _spread(sorted(costs), keep)) for costs in cost) > budget:
        keep -= 1
    chosen = [[point for step in _spread(sorted(steps), keep) for point in steps[step]] for steps in by_step]
    notes = [f"at most {keep} of up to {most} logged steps a run"] if keep < most else []
    if sum(_shown(point) for points in chosen for point in points) > budget:
        first = [{step: points[0].group for step, points in steps.items()} for steps in by_step]
        chosen = [[p for p in points if p.group == names[p.step]] for points, names in zip(chosen, first, strict=True)]
        notes.append("the first group of each step")
    return chosen, notes


def _spread(steps: Sequence[int], keep: int) -> list[int]:
    if keep >= len(steps):
        return list(steps)
    return [steps[round(i * (len(steps) - 1) / (keep - 1))] for i in range(keep)]


def _pack_run(group: Group, run: Run, points: Sequence[RolloutPoint], vocabulary: dict[str, int]) -> dict[str, Any]:
    steps: dict[int, dict[str, dict[str, Any]]] = {}
    sizes: list[float] = []
    for point, row in zip(points, read_rollouts(run, points), strict=True):
        advantages = _advantages(row)
        sizes += [abs(value) for value in advantages or [] if value]
        prompts = steps.setdefault(point.step, {})
        prompt = prompts.setdefault(point.group, {"id": point.group, "prompt": _prompt(row), "rollouts": []})
        prompt["rollouts"].append(_pack_rollout(row, point, advantages, vocabulary))
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
    if distill == 0.0:
        return [reinforce] * length
    student, teacher = numbers(row.get("logprobs")), numbers(row.get("teacher_logprobs"))
    if student is None or teacher is None or not len(student) == len(teacher) == length:
        return None
    return [reinforce + distill * (t - s) for s, t in zip(student, teacher, strict=True)]


def _pack_rollout(
    row: dict[str, Any], point: RolloutPoint, advantages: list[float] | None, vocabulary: dict[str, int]
) -> dict[str, Any]:
    ids = row.get("token_ids")
    ids = ids if isinstance(ids, list) else []
    strings = row.get("tokens")
    if not isinstance(strings, list) or len(strings) != len(ids):
        strings = [f"‹{token}›" for token in ids]
    cut = len(ids) - HEAD_TOKENS - TAIL_TOKENS
    kept = list(range(len(ids))) if cut <= 0 else [*range(HEAD_TOKENS), *range(len(ids) - TAIL_TOKENS, len(ids))]
    packed = {
        "sample": row.get("sample") if isinstance(row.get("sample"), int) else None,
        "verdict": {True: "correct", False: "incorrect", None: "no verdict"}[point.correct],
        "masked": (str(row.get("mask_reason") or "yes")) if point.masked else None,
        "reinforce": _round(number(row.get("reinforce"))),
        "distill": _round(number(row.get("distill"))),
        "ppl": _round(point.ppl),
        "length": len(ids),
        "truncated": row.get("finish_reason") == "length",
        "extracted": str(row["extracted"])[:200] if row.get("extracted") is not None else None,
        "tokens": [vocabulary.setdefault(_readable(strings[place]), len(vocabulary)) for place in kept],
        "advantages": _pack_advantages([advantages[place] for place in kept]) if advantages else None,
        "cut": {"after": HEAD_TOKENS, "tokens": cut} if cut > 0 else None,
    }
    return {key: value for key, value in packed.items() if value is not None and value is not False}


def _readable(token: object) -> str:
    """Byte-level and sentencepiece marks of a leading space or a newline as the character they stand for."""
    text = str(token)
    if len(text) > 1 or text in "ĠĊ▁":
        text = text.replace("Ċ", "\n")
        if text[:1] in ("Ġ", "▁"):
            text = " " + text[1:]
    return text[:200]


def _pack_advantages(values: list[float]) -> float | list[float]:
    """One number where all tokens share it."""
    rounded = [_round(value) or 0.0 for value in values]
    return rounded[0] if rounded and len(set(rounded)) == 1 else rounded


def _round(value: float | None) -> float | None:
    """Three significant digits, as JSON writes them shortest."""
    return None if value is None else float(f"{value:.3g}")
