"""Which runs belong together: one group for each method and setting, its seeds inside.

Runs with the same config up to the seed and the run folder are seeds of one group. Where a method occurs with several
settings, the settings that differ are part of its name ("SCOPE (tau = 0.5)"). Settings outside ``[objective]`` that
differ between methods are reported: then the methods did not meet the same conditions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from scope_opd.report.load import Route, Run

NAMES = {
    "scope": "SCOPE",
    "dual_path": "Dual path",
    "opd": "OPD",
    "grpo": "GRPO",
    "kd": "KD",
    "positive": "Positive",
    "reward_opd": "Reward + OPD",
}
EXPLAINED = {
    "scope": "correct rollouts reinforced, wrong ones distilled, both weighted by perplexity",
    "dual_path": "correct rollouts reinforced, wrong ones distilled, all weights equal",
    "opd": "every rollout distilled from the teacher",
    "grpo": "group-normalised reward, no teacher",
    "kd": "trained on the teacher’s own responses",
    "positive": "correct rollouts reinforced, wrong ones left out",
    "reward_opd": "group-normalised reward plus distillation",
}
SLOTS = {name: index for index, name in enumerate(NAMES)}
N_SLOTS = 10
"""Colours in report.css: --s0 .. --s9."""

SHOWN_CHARACTERS = 48
"""Of a setting's value in a label."""

_NOT_SETTINGS = ("run", "eval")
"""Tables in which runs of one group may differ: where a run is kept, and when it is evaluated."""


@dataclass(slots=True)
class Group:
    """Runs of one method and setting.

    Attributes:
        slot: its colour and dash, the same in every figure.
    """

    method: str
    label: str
    runs: list[Run]
    slot: int = 0
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def seeds(self) -> str:
        """ "seeds 0, 1" """
        seeds = [str(run.seed) if run.seed is not None else "?" for run in self.runs]
        return f"seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}"

    @property
    def explained(self) -> str:
        return EXPLAINED.get(self.method, "")

    def perplexity_of(self, path: Route) -> str:
        """Whose perplexity a path's rollouts have: the teacher's where it scored or (``kd``) sampled them."""
        return "teacher" if path == "teacher" or self.method == "kd" else "student"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def group_runs(runs: Sequence[Run]) -> tuple[list[Group], list[str]]:
    """Groups of the training runs in a fixed order (SCOPE first), and notes about unequal conditions."""
    found: dict[str, Group] = {}
    for run in runs:
        if run.kind != "training":
            continue
        settings = {key: value for key, value in flatten(run.config).items() if key.split(".")[0] not in _NOT_SETTINGS}
        key = json.dumps([run.method, run.label, settings], sort_keys=True, default=str)
        found.setdefault(key, Group(run.method, run.label or "", [], settings=settings)).runs.append(run)
    groups = sorted(found.values(), key=lambda group: (SLOTS.get(group.method, len(SLOTS)), group.method))
    for group in groups:
        group.runs.sort(key=lambda run: (run.seed is None, run.seed or 0, run.name))
    _name(groups)
    _colour(groups)
    return groups, _unequal_conditions(groups)


def _name(groups: Sequence[Group]) -> None:
    for method in {group.method for group in groups}:
        same = [group for group in groups if group.method == method]
        differing = _differing(group.settings for group in same)
        for group in same:
            if group.label:
                continue
            group.label = NAMES.get(method, method)
            if len(same) > 1:
                parts = [f"{key.split('.')[-1]} = {_show(group.settings.get(key))}" for key in differing[:3]]
                group.label += f" ({', '.join(parts) or group.runs[0].name})"
    labels = [group.label for group in groups]
    for group in groups:
        if labels.count(group.label) > 1:
            group.label += f" · {group.runs[0].name}"


def _colour(groups: Sequence[Group]) -> None:
    taken: set[int] = set()
    for group in groups:
        wanted = SLOTS.get(group.method)
        free = [slot for slot in [*range(len(SLOTS), N_SLOTS), *range(N_SLOTS)] if slot not in taken]
        group.slot = (
            wanted if wanted is not None and wanted not in taken else (free[0] if free else len(taken) % N_SLOTS)
        )
        taken.add(group.slot)


def _differing(settings: Iterable[Mapping[str, Any]]) -> list[str]:
    """Keys whose values are not the same everywhere."""
    listed = list(settings)
    keys = sorted({key for values in listed for key in values})
    return [key for key in keys if len({json.dumps(values.get(key), default=str) for values in listed}) > 1]


def _unequal_conditions(groups: Sequence[Group]) -> list[str]:
    differing = [key for key in _differing(group.settings for group in groups) if not key.startswith("objective.")]
    if not differing:
        return []
    parts = []
    for key in differing[:6]:
        values = [f"{group.label} {_show(group.settings.get(key))}" for group in groups]
        parts.append(f"{key} ({'; '.join(values)})")
    more = f" and {len(differing) - 6} more" if len(differing) > 6 else ""
    return [f"The methods were not run under identical settings: {', '.join(parts)}{more}."]


def _show(value: Any) -> str:
    if value is None:
        return "unset"
    text = " ".join(str(value).split())  # one line: labels stand beside bars and in menus
    if isinstance(value, str) and "/" in text and " " not in text:
        text = PurePath(text).name
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[: SHOWN_CHARACTERS - 1]}…"
