"""``scope weights``: what a method makes of rollouts in a JSONL file, by the very code that training uses.

Not covered: scoring (rows bring their teacher log-probs), methods other than ``scope``.
"""

from __future__ import annotations

import io
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from scope_opd.errors import ConfigError, DataError

if TYPE_CHECKING:
    from scope_opd.config import ObjectiveConfig
    from scope_opd.objective.methods import Method
    from scope_opd.types import Rollout

REQUIRED = ("id", "group", "logprobs")
LOG_PROB_FLOOR = -100.0
MAX_NLL = 700.0
"""Beyond this exp() leaves the range of a float; no sampled response is as unlikely."""

EXAMPLES = """Examples:
  scope weights rollouts.jsonl
  scope weights runs/demo/scope-0/rollouts.jsonl --tau 0.5
  scope weights rollouts.jsonl --student-weight uniform --teacher-weight uniform
  scope weights rollouts.jsonl --preset as_released
  zcat rollouts.jsonl.gz | scope weights -
"""


def weights(
    file: Annotated[Path, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    tau: float | None = None,
    student_weight: Literal["ppl", "uniform", "inverse_ppl"] | None = None,
    teacher_weight: Literal["inverse_ppl", "uniform", "ppl"] | None = None,
    scale: Literal["sum", "mean"] | None = None,
    truncated: Literal["ignore", "incorrect"] | None = None,
    preset: Literal["paper", "as_released", "as_documented"] | None = None,
    reward_threshold: float | None = None,
    log_prob_floor: float = LOG_PROB_FLOOR,
) -> int:
    """Print the weights that SCOPE gives to the rollouts of a JSONL file.

    A row needs id, group, correct, logprobs (one for each response token)
    and, where it is wrong, teacher_logprobs. finish_reason ("stop" or
    "length"), reward, loss_mask and teacher_mask are read where present;
    other keys are left aside. The rollouts.jsonl of a run folder works as it
    is. Rows of a group need not stand together; rows with a step are grouped
    by step and group.

    Prints one JSON line a row, in input order: id, path ("student",
    "teacher", or null when the row is ignored), ppl (exp of the mean negative
    log-prob: the student's on the student path, the teacher's on the teacher
    path, null where it is not known), reinforce, distill, masked. A wrong row
    without teacher_logprobs stays on the teacher path, masked. Nothing is
    printed unless every row is sound.

    Parameters
    ----------
    file
        The JSONL file; - reads standard input.
    tau
        Temperature of the softmax over mean negative log-probs, > 0. Default 1.
    student_weight
        Which correct rollouts weigh more. Default ppl: those the student finds unlikely (Eq. 4).
    teacher_weight
        Which wrong rollouts weigh more. Default inverse_ppl: those the teacher finds likely (Eq. 5).
    scale
        sum: the weights of each path of a group add to 1 (default); mean: they average 1.
    truncated
        What a rollout without an end token is: ignore (default) or incorrect.
    preset
        paper, as_released or as_documented: a set of values for the options above, which still win over it.
    reward_threshold
        A row with a reward and without a verdict is correct from here on. Default 0.5.
    log_prob_floor
        Teacher log-probs below it are raised to it, as in training, and counted on stderr.
    """
    options: dict[str, Any] = {
        "tau": tau,
        "student_weight": student_weight,
        "teacher_weight": teacher_weight,
        "scale": scale,
        "truncated": truncated,
        "preset": preset,
        "reward_threshold": reward_threshold,
    }
    objective = _objective({key: value for key, value in options.items() if value is not None})
    if not log_prob_floor < 0:
        raise ConfigError(f"--log-prob-floor = {log_prob_floor}", "a number < 0", "leave it out for -100")
    rollouts = list(read_rollouts(file))
    floored = floor_teacher(rollouts, log_prob_floor)
    if floored:
        print(f"note: {floored} teacher log-probs below {log_prob_floor:g} were raised to it", file=sys.stderr)
    sys.stdout.write("".join(f"{line}\n" for line in weight_lines(rollouts, objective)))
    return 0


def read_rollouts(file: Path) -> Iterator[Rollout]:
    """Rows as records, checked, with ids that are unique.

    Raises:
        DataError: naming file, line and row id.
    """
    from scope_opd.records import iter_jsonl, rollout_from_dict

    is_stdin = str(file) == "-"
    name = "standard input" if is_stdin else str(file)
    stream = io.TextIOWrapper(sys.stdin.buffer, encoding="utf-8") if is_stdin else file.expanduser()
    seen: dict[str, int] = {}
    try:
        for number, row in iter_jsonl(stream):
            where = f"{name} line {number}"
            if "correct" not in row and row.get("reward") is None:
                row_id = f" (id {row['id']!r})" if "id" in row else ""
                raise DataError(
                    f"{where}{row_id}: no 'correct'", "true, false, or null for no verdict", "add it to the row"
                )
            rollout = rollout_from_dict(row, where=where, required=REQUIRED)
            if rollout.id in seen:
                raise DataError(
                    f"{where} (id {rollout.id!r}): the id was used before, on line {seen[rollout.id]}",
                    "ids that are unique",
                    "rename one of the rows",
                )
            seen[rollout.id] = number
            yield rollout
    except UnicodeDecodeError as error:
        raise DataError(f"{name}: byte {error.start} is not UTF-8", "UTF-8 text", "re-encode it") from None
    if not seen:
        raise DataError(f"{name} has no rows", "one JSON object a line", "check how it was written")


def floor_teacher(rollouts: list[Rollout], floor: float) -> int:
    """Raise teacher log-probs to the floor, in place; returns how many were below."""
    count = 0
    for rollout in rollouts:
        if rollout.teacher_logprobs is not None:
            count += sum(value < floor for value in rollout.teacher_logprobs)
            rollout.teacher_logprobs = [max(value, floor) for value in rollout.teacher_logprobs]
    return count


def weight_lines(rollouts: list[Rollout], objective: ObjectiveConfig) -> list[str]:
    """The output lines of rollouts, in order.

    Raises:
        DataError: a response so unlikely that its perplexity is no number.
    """
    from scope_opd.credit import assign_credit, student_nll, teacher_nll
    from scope_opd.objective.methods import build_method
    from scope_opd.records import dumps

    method: Method = build_method("scope", objective.model_dump())
    by_step: dict[int | None, list[int]] = {}
    for index, rollout in enumerate(rollouts):
        by_step.setdefault(rollout.step, []).append(index)
    verdicts: dict[int, bool | None] = {}
    for indices in by_step.values():
        given = assign_credit(
            [rollouts[index] for index in indices],
            method,
            truncated=objective.truncated,
            reward_threshold=objective.reward_threshold,
        )
        verdicts.update(zip(indices, given, strict=True))
    lines = []
    for index, rollout in enumerate(rollouts):
        verdict = verdicts[index]
        nll = None if verdict is None else student_nll(rollout) if verdict else teacher_nll(rollout)
        lines.append(
            dumps(
                {
                    "id": rollout.id,
                    "path": None if verdict is None else "student" if verdict else "teacher",
                    "ppl": _perplexity(nll, rollout.id),
                    "reinforce": rollout.reinforce,
                    "distill": rollout.distill,
                    "masked": rollout.masked,
                }
            )
        )
    return lines


def _perplexity(nll: float | None, rollout_id: str) -> float | None:
    if nll is None or math.isnan(nll):
        return None
    if nll > MAX_NLL:
        raise DataError(
            f"row {rollout_id!r}: a mean log-prob of {-nll:.6g} a token",
            f"at least {-MAX_NLL:g}",
            "floor log-probs that stand for -inf, for example at -100",
        )
    return math.exp(nll)


def _objective(options: dict[str, Any]) -> ObjectiveConfig:
    """Options as an ``[objective]`` table, so that defaults, presets and limits are those of training."""
    from scope_opd.config import validate_config

    try:
        return validate_config({"objective": options}).objective
    except ConfigError as error:
        parts = (error.found, error.expected, error.remedy)
        found, expected, remedy = (_as_options(part, options) for part in parts)
        raise ConfigError(found, expected, remedy) from None


def _as_options(text: str, options: dict[str, Any]) -> str:
    for name in options:
        text = text.replace(f"objective.{name}", f"--{name.replace('_', '-')}")
    return text
