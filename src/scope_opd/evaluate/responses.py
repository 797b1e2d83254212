"""Stored responses: rows of a file judged without any model, through the same path as sampled ones.

Rows have ``prediction`` and ``answer`` (any gold form), and where they are there ``id``, ``problem_id`` (rows that
share it are samples of one problem; without it each row is a problem of its own), ``problem``, ``tolerance``,
``finish_reason`` and ``tokens`` (the response's length). In a csv file, which knows neither null nor numbers, an empty
field is absent and digits are a number.

Not covered: rows that hold several predictions.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scope_opd.data.files import file_records, suffix_of
from scope_opd.data.mapping import mapped_row
from scope_opd.data.rows import check_text
from scope_opd.errors import DataError
from scope_opd.evaluate.session import prompt_id
from scope_opd.gold import answer_from_text, check_answer, is_code, parse_math_gold, parse_tolerance
from scope_opd.types import Prompt, Rollout, SamplingParams

FIELDS = ("id", "problem_id", "prediction", "answer", "problem", "tolerance", "finish_reason", "tokens")


@dataclass(frozen=True, slots=True)
class Responses:
    """What a file holds.

    Attributes:
        prompts: its problems, in the order of their first rows; ids ``NAME/PROBLEM``.
        rollouts: the responses of each, by prompt id, in the order of the file.
        grouped: whether rows name their problem.
    """

    prompts: list[Prompt]
    rollouts: dict[str, list[Rollout]]
    grouped: bool


class StoredSampler:
    """Hands out stored responses; implements ``types.Sampler``. ``params`` say nothing here."""

    def __init__(self, rollouts: Mapping[str, Sequence[Rollout]]) -> None:
        self.rollouts = rollouts

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, step: int, policy_version: int
    ) -> AsyncIterator[Rollout]:
        """Yield every stored response of the prompts."""
        for prompt in prompts:
            for rollout in self.rollouts[prompt.id]:
                yield rollout


def read_responses(path: str | Path, columns: Mapping[str, str], *, name: str) -> Responses:
    """Read and check the rows of a JSONL, JSON, csv or parquet file.

    Args:
        path: the file.
        columns: names that differ, from ``data.mapping.parse_map``.
        name: of the benchmark that the results will call them.

    Raises:
        DataError: naming file and row.
    """
    source = str(path)
    is_csv = suffix_of(Path(path)) == ".csv"
    prompts: dict[str, Prompt] = {}
    rollouts: dict[str, list[Rollout]] = {}
    gold: dict[str, Any] = {}
    ids: dict[str, str] = {}
    grouped: bool | None = None
    for place, row in file_records(Path(path)):
        if isinstance(row, DataError):
            raise row
        where = f"{source}, {place}"
        values = mapped_row(row, columns, FIELDS, where, needed=("prediction", "answer"))
        if is_csv:
            values = _from_csv(values)
        check_text([value for value in values.values() if isinstance(value, str | dict)], where)
        has_problem = values["problem_id"] is not None
        grouped = has_problem if grouped is None else grouped
        if has_problem != grouped:
            raise DataError(
                f"{where}: {'a' if has_problem else 'no'} problem_id", "it in every row or in none", "mend it"
            )
        row_id = str(values["id"]) if values["id"] is not None else place.replace(" ", "-")
        if row_id in ids:
            raise DataError(f"{where}: the id {row_id!r} was used before, at {ids[row_id]}", "unique ids", "rename one")
        ids[row_id] = place
        problem = prompt_id(name, str(values["problem_id"]) if grouped else row_id)
        answer = _answer(values, where)
        if not isinstance(values["prediction"], str):
            found = f"{where}: prediction is {type(values['prediction']).__name__}"
            raise DataError(found, "a text, empty where there is no response", "convert the column")
        if problem not in prompts:
            text = values["problem"] if isinstance(values["problem"], str) else ""
            prompts[problem] = Prompt(problem, text, answer, ())
            rollouts[problem], gold[problem] = [], values["answer"]
        elif gold[problem] != values["answer"]:
            raise DataError(
                f"{where}: the answer {values['answer']!r} of a problem whose answer is {gold[problem]!r}",
                "one answer a problem",
                "check problem_id",
            )
        rollouts[problem].append(_rollout(values, row_id, problem, len(rollouts[problem]), where))
    if not prompts:
        raise DataError(f"{source} has no rows", "at least one response", "check how it was written")
    return Responses(list(prompts.values()), rollouts, bool(grouped))


def _from_csv(values: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of text as the types that other files have; what does not fit is left for the checks to name."""
    found: dict[str, Any] = {
        name: value if value != "" or name in ("prediction", "answer") else None for name, value in values.items()
    }
    for name, kind in (("tokens", int), ("tolerance", float)):
        if found[name] is not None:
            with suppress(ValueError):
                found[name] = kind(found[name])
    return found


def _answer(values: Mapping[str, Any], where: str) -> Any:
    answer = answer_from_text(values["answer"])
    try:
        check_answer(answer)
        if values["tolerance"] is None:
            return answer
        if is_code(answer):
            raise ValueError("a tolerance beside a code answer; expected none")
        parse_tolerance(values["tolerance"])
        gold = parse_math_gold(answer)
        if gold.tolerance is not None:
            return answer  # its own wins, as in scope verify
        forms = [list(parts) for parts in gold.alternatives]
        written = [parts[0] if len(parts) == 1 else {"all_of": parts} for parts in forms]
        return {"any_of": written, "tolerance": values["tolerance"]}
    except ValueError as error:
        raise DataError(f"{where}: {error}", remedy="mend the row") from None


def _rollout(values: Mapping[str, Any], row_id: str, problem: str, index: int, where: str) -> Rollout:
    finish, tokens = values["finish_reason"], values["tokens"]
    if finish not in (None, "stop", "length"):
        raise DataError(f"{where}: finish_reason = {finish!r}", "stop, length or null", "mend the row")
    if tokens is not None and (type(tokens) is not int or tokens < 0):
        raise DataError(f"{where}: tokens = {tokens!r}", "a number of tokens or null", "mend the row")
    known = {"finish_reason": finish, "tokens": tokens}
    return Rollout(row_id, problem, [], [], [], text=values["prediction"], sample=index, sampling=known)
