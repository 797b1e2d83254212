"""Reading run folders leniently: whatever a killed or unfinished run left behind can still be shown.

A line that cannot be read is left out and becomes a note for the reader of the report; nothing is guessed. Rows written
twice (a run that was killed and resumed) count once, the later one. Rollout files can be large, so they are read one
line at a time and only what plots need is kept; the viewer reads its few lines again by their offsets.

Not covered: checkpoints, exports, configs of a later version (they are shown as they are, never validated).
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from scope_opd.errors import RunFolderError
from scope_opd.report.spans import claimed
from scope_opd.spans import Span

Route = Literal["student", "teacher"]
RUN_FILES = ("run.json", "metrics.jsonl", "eval.jsonl")
Spans = dict[str, list[Span]]
"""When each stage was at work, in seconds from the step's begin."""

LONGEST_S = 1e7
"""Seconds beyond which (some four months) a time is no measurement."""


@dataclass(frozen=True, slots=True)
class RolloutPoint:
    """What plots need of one rollout: the path that training put it on, its perplexity there and the weight it got.

    Attributes:
        correct: the verdict as training took it (a truncated rollout may count as incorrect); where training took none,
            the verdict as recorded.
        path: "teacher" where the rollout is distilled, "student" where it is reinforced; None where neither is known.
        ppl: exp of the path's mean negative log-prob over the tokens in the loss: the teacher's log-probs on the
            teacher's path, the sampling log-probs on the student's.
        weight: the number that scales the path: ``distill`` or ``reinforce``.
    """

    id: str
    group: str
    step: int
    offset: int
    tokens: int
    correct: bool | None
    masked: bool
    path: Route | None
    ppl: float | None
    weight: float | None


@dataclass(frozen=True, slots=True)
class StepTime:
    """A step's row of timeline.jsonl: where it begins, the step's seconds, and those by stage (``spans.claimed``)."""

    step: int
    seconds: float
    offset: int
    claimed: dict[str, float]


@dataclass(slots=True)
class Run:
    """One run folder.

    Attributes:
        kind: "training", or "evaluation" (only eval.jsonl inside; ``label`` says whose).
        config, config_text: the resolved config as plain values and as written.
        notes: sentences about what is missing or could not be read.
    """

    path: Path
    name: str
    kind: str = "training"
    label: str | None = None
    info: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    metrics: list[dict[str, Any]] = field(default_factory=list)
    evals: list[dict[str, Any]] = field(default_factory=list)
    events: list[dict[str, Any]] = field(default_factory=list)
    status: dict[str, Any] = field(default_factory=dict)
    rollouts: list[RolloutPoint] = field(default_factory=list)
    timeline: list[StepTime] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def method(self) -> str:
        return str(self.info.get("method") or table(self.config, "objective").get("method") or "unknown")

    @property
    def seed(self) -> int | None:
        seed = self.info.get("seed", table(self.config, "run").get("seed"))
        return seed if isinstance(seed, int) else None

    @property
    def planned_steps(self) -> int | None:
        steps = table(self.config, "train").get("steps")
        return steps if isinstance(steps, int) else None


def table(values: dict[str, Any], name: str) -> dict[str, Any]:
    """A table of a config, or an empty one where it is missing or no table."""
    found = values.get(name)
    return found if isinstance(found, dict) else {}


def number(value: object) -> float | None:
    """A finite number, or None for anything else (null, NaN, text, true)."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) else None


def numbers(values: object) -> list[float] | None:
    """A list of finite numbers, or None when anything in it is not one."""
    if not isinstance(values, list):
        return None
    found = [number(value) for value in values]
    return None if any(value is None for value in found) else [value for value in found if value is not None]


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The run folders named, each once; a folder that only *holds* run folders stands for those inside it.

    Raises:
        RunFolderError: nothing named, no such folder, a file, or a folder that is no run and holds none.
    """
    if not paths:
        raise RunFolderError("no run folders were named", "at least one", "for example: scope report runs/demo")
    found: list[Path] = []
    for path in map(Path, paths):
        try:
            if not path.exists():
                raise RunFolderError(f"{path}: no such folder", "a run folder", "check the path")
            if not path.is_dir():
                raise RunFolderError(f"{path} is a file", "a run folder", "name the folder that holds it")
            inside = sorted(child for child in path.iterdir() if child.is_dir() and _is_run(child))
        except OSError as error:
            raise RunFolderError(f"{path}: {error.strerror}", "a readable run folder", "check permissions") from None
        if _is_run(path):
            found.append(path)
        elif inside:
            found += inside
        else:
            raise RunFolderError(
                f"{path} is not a run folder: it holds none of {', '.join(RUN_FILES)}",
                "a folder written by scope train",
                "check the path",
            )
    return list({path.resolve(): path for path in found}.values())


def _is_run(path: Path) -> bool:
    return any((path / name).is_file() for name in RUN_FILES)


def load_run(path: Path) -> Run:
    """Read one run folder; what cannot be read is in ``Run.notes``."""
    run = Run(path=path, name=path.resolve().name)
    run.info = _json_object(run, "run.json")
    run.kind = "evaluation" if run.info.get("kind") == "evaluation" else "training"
    label = run.info.get("label")
    run.label = label if isinstance(label, str) and label.strip() else None
    run.status = _json_object(run, "status.json", required=False)
    _read_config(run)
    run.metrics = _by_key(run, "metrics.jsonl", ("step",), required=run.kind == "training")
    run.evals = _by_key(run, "eval.jsonl", ("step", "temperature", "n"), required=False)
    run.events = [row for _, row in _rows(run, "events.jsonl") if isinstance(row.get("kind"), str)]
    run.rollouts = _read_rollouts(run)
    run.timeline = _read_timeline(run)
    if run.kind == "training":
        _note_unfinished(run)
    return run


def read_rollouts(run: Run, points: Sequence[RolloutPoint]) -> Iterator[dict[str, Any]]:
    """The full rows of some rollouts, by the offsets that ``load_run`` noted."""
    return _rows_at(run.path / "rollouts.jsonl", [point.offset for point in points])


def read_spans(run: Run, steps: Sequence[StepTime]) -> Iterator[Spans]:
    """The spans of some steps, likewise."""
    for row in _rows_at(run.path / "timeline.jsonl", [step.offset for step in steps]):
        spans = _spans(row)
        assert spans is not None, "load_run kept only rows with spans"
        yield spans


def _rows_at(path: Path, offsets: Sequence[int]) -> Iterator[dict[str, Any]]:
    with path.open("rb") as lines:
        for offset in offsets:
            lines.seek(offset)
            yield _parse(lines.readline())


def _parse(line: bytes) -> Any:
    return json.loads(line.decode("utf-8"), parse_constant=lambda name: None)


def _json_object(run: Run, name: str, *, required: bool = True) -> dict[str, Any]:
    try:
        value = _parse((run.path / name).read_bytes())
    except FileNotFoundError:
        if required:
            run.notes.append(f"{name} is missing: method, seed and model are taken from config.toml where it has them.")
        return {}
    except (OSError, ValueError, RecursionError):
        run.notes.append(f"{name} cannot be read and is left out.")
        return {}
    if not isinstance(value, dict):
        run.notes.append(f"{name} does not hold a JSON object and is left out.")
        return {}
    return value


def _read_config(run: Run) -> None:
    try:
        run.config_text = (run.path / "config.toml").read_text(encoding="utf-8")
        run.config = tomllib.loads(run.config_text)
    except FileNotFoundError:
        if run.kind == "training":
            run.notes.append("config.toml is missing: settings are not shown.")
    except (OSError, ValueError):
        run.notes.append("config.toml cannot be read: settings are not compared.")


def _rows(run: Run, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """(byte offset, object) of each line that is one; the others are noted, an unfinished last line as such."""
    bad: list[int] = []
    offset = line_number = 0
    unfinished = False
    try:
        with (run.path / name).open("rb") as lines:
            for line_number, line in enumerate(lines, start=1):
                start, offset = offset, offset + len(line)
                if not line.strip():
                    continue
                try:
                    row = _parse(line)
                except (ValueError, RecursionError):
                    unfinished = not line.endswith(b"\n")
                    if not unfinished:
                        bad.append(line_number)
                    continue
                if isinstance(row, dict):
                    yield start, row
                else:
                    bad.append(line_number)
    except FileNotFoundError:
        return
    except OSError as error:
        run.notes.append(f"{name} cannot be read ({error.strerror}).")
    if unfinished:
        run.notes.append(f"{name} ends in an unfinished line {line_number} (stopped while writing): left out.")
    if bad:
        listed = ", ".join(map(str, bad[:5])) + (" ..." if len(bad) > 5 else "")
        run.notes.append(f"{name} has {len(bad)} unreadable line{'s' * (len(bad) > 1)} ({listed}): left out.")


def _by_key(run: Run, name: str, keys: tuple[str, ...], *, required: bool) -> list[dict[str, Any]]:
    """Rows with all keys numeric, the last of each key, in order of the key."""
    if required and not (run.path / name).is_file():
        run.notes.append(f"{name} is missing: nothing to draw by step.")
    kept: dict[tuple[float, ...], dict[str, Any]] = {}
    for _, row in _rows(run, name):
        key = tuple(value for value in (number(row.get(key)) for key in keys) if value is not None)
        if len(key) == len(keys):
            kept[key] = {**row, "step": int(key[0])}
    return [kept[key] for key in sorted(kept)]


def _read_rollouts(run: Run) -> list[RolloutPoint]:
    points: dict[str, RolloutPoint] = {}
    for offset, row in _rows(run, "rollouts.jsonl"):
        step, name = number(row.get("step")), row.get("id")
        if step is None or not isinstance(name, str):
            continue
        routed = _verdict(row, table(run.config, "objective"))
        path = _route(row, routed)
        logprobs = numbers(row.get("teacher_logprobs" if path == "teacher" else "logprobs")) if path else None
        token_ids = row.get("token_ids")
        points[name] = RolloutPoint(
            id=name,
            group=str(row.get("group")),
            step=int(step),
            offset=offset,
            tokens=len(token_ids) if isinstance(token_ids, list) else 0,
            correct=row["correct"] if routed is None and isinstance(row.get("correct"), bool) else routed,
            masked=row.get("masked") is True,
            path=path,
            ppl=_perplexity(logprobs, row.get("loss_mask"), row.get("teacher_mask") if path == "teacher" else None),
            weight=number(row.get("distill" if path == "teacher" else "reinforce")) if path else None,
        )
    return sorted(points.values(), key=lambda point: (point.step, point.offset))


def _read_timeline(run: Run) -> list[StepTime]:
    steps: dict[int, StepTime] = {}
    without = 0
    for offset, row in _rows(run, "timeline.jsonl"):
        step, seconds = number(row.get("step")), number(row.get("seconds"))
        spans = _spans(row)
        if step is None or seconds is None or not 1e-6 <= seconds <= LONGEST_S or spans is None:
            without += 1
            continue
        steps[int(step)] = StepTime(int(step), seconds, offset, claimed(spans, seconds))
    if without:
        run.notes.append(f"timeline.jsonl has {without} row{'s' * (without > 1)} without readable spans: left out.")
    return [steps[step] for step in sorted(steps)]


def _spans(row: dict[str, Any]) -> Spans | None:
    """The spans of a row, None unless each is a pair (begin, end) of numbers in this order."""
    found: Spans = {}
    if not isinstance(row.get("spans"), dict):
        return None
    for stage, spans in row["spans"].items():
        pairs = [numbers(span) or [] for span in spans] if isinstance(spans, list) else [[]]
        if not all(len(pair) == 2 and -LONGEST_S <= pair[0] <= pair[1] <= LONGEST_S for pair in pairs):
            return None
        found[stage] = [(begin, end) for begin, end in pairs]
    return found


def _verdict(row: dict[str, Any], objective: dict[str, Any]) -> bool | None:
    """The verdict that training routed by, under the run's own settings (None: the rollout took no part)."""
    if row.get("finish_reason") == "length":
        return False if objective.get("truncated") == "incorrect" else None
    correct, reward = row.get("correct"), number(row.get("reward"))
    if isinstance(correct, bool):
        return correct
    threshold = number(objective.get("reward_threshold"))
    return None if reward is None else reward >= (0.5 if threshold is None else threshold)


def _route(row: dict[str, Any], verdict: bool | None) -> Route | None:
    """The path by the credit itself; where that is zero on both, by verdict (wrong and scored: the teacher's)."""
    if number(row.get("distill")):
        return "teacher"
    if number(row.get("reinforce")):
        return "student"
    if verdict is None:
        return None
    return "teacher" if not verdict and row.get("teacher_logprobs") is not None else "student"


def _perplexity(logprobs: list[float] | None, *masks: object) -> float | None:
    """Over the tokens that every mask keeps; a mask that is no list keeps all."""
    length = len(logprobs or ())
    listed = [mask for mask in masks if isinstance(mask, list)]
    if any(len(mask) != length for mask in listed):
        return None
    logprobs = [value for value, *keep in zip(logprobs or (), *listed, strict=True) if all(keep)]
    if not logprobs:
        return None
    nll = -sum(logprobs) / len(logprobs)
    return math.exp(nll) if nll < 500 else None


def _note_unfinished(run: Run) -> None:
    phase, planned = run.status.get("phase"), run.planned_steps
    if phase == "done":
        return
    reached = f"{len(run.metrics)}{f' of {planned}' if planned else ''} steps are on record"
    if isinstance(phase, str):
        run.notes.append(f"has not finished: {reached}, stopped in phase “{phase}”. What follows is up to there.")
    elif planned is not None and len(run.metrics) < planned:
        run.notes.append(f"has not finished: {reached}. What follows is up to there.")
