"""``scope verify``: verdicts on answers in a JSONL file, by the very code that judges in training and evaluation.

A row is judged as soon as it is read, while later ones are read, and printed as soon as all before it are: memory does
not grow with the file, and a program at the other end of two pipes may wait for each verdict.

Not covered: sampling (``scope eval``), the zoo's own task and the comparison of boxes as text.
"""

from __future__ import annotations

import json
import math
import queue
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from scope_opd.cli.eval_settings import in_options, typed_tolerance
from scope_opd.errors import DataError
from scope_opd.words import counted

if TYPE_CHECKING:
    from scope_opd.config import VerifyConfig
    from scope_opd.types import Verdict
    from scope_opd.verify.answers import AnswerVerifier
    from scope_opd.verify.code.verifier import CodeVerifier

FIELDS = ("id", "prediction", "answer", "problem", "tolerance", "form", "kind", "expected")
"""Keys of a row that are read."""
MAX_WAITING = 512
"""Rows that are read and not printed yet, at most."""

EXAMPLES = """Examples:
  scope verify answers.jsonl
  scope verify answers.jsonl --summary > verdicts.jsonl
  scope verify answers.jsonl --map prediction=response --map answer=gold
  scope verify answers.jsonl --tolerance 1% --no-fallback
  zcat answers.jsonl.gz | scope verify - | jq -c 'select(.correct == null)'
  echo '{"prediction": "so \\\\boxed{1/2}", "answer": "0.5"}' | scope verify -
"""


def verify(
    file: Annotated[Path, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    map_: Annotated[list[str] | None, Parameter(name="--map", negative="")] = None,
    scope: Literal["after_think", "all"] | None = None,
    no_fallback: Annotated[bool, Parameter(negative="")] = False,
    tolerance: str | None = None,
    timeout_s: float | None = None,
    code_timeout_s: float | None = None,
    workers: int | None = None,
    allow_unsandboxed: Annotated[bool, Parameter(negative="")] = False,
    summary: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Judge the answers of a JSONL file.

    A row needs prediction, a text, and answer, the right one: a text, a
    number, {"any_of": [...]}, {"all_of": [...]}, or for code an object with
    a format (docs/judging.md). It may have id, problem, tolerance, form
    ("response", where the final answer must be found in a text, or "answer")
    and kind ("math" or "code"); other keys are left aside.

    Prints one JSON line a row, in input order: id (its line number where the
    row has none), correct (true, false, or null where no verdict was
    reached), extracted (the final answer found), reason. A row that is wrong
    ends the command with exit code 2, after the verdicts on those before it.
    Ctrl-C (exit code 130) leaves the verdicts that were printed before it.

    Parameters
    ----------
    file
        The JSONL file; - reads standard input.
    map_
        OURS=THEIRS: a key that the rows call otherwise; may be repeated.
    scope
        What may hold the answer: after_think (default), only what follows a closed thinking block; all.
    no_fallback
        Without a box there is no answer; by default "answer is ..." or the last number counts.
    tolerance
        For numbers: 0.01 is absolute, 1% relative. A row's own wins, and its answer's own over that.
    timeout_s
        CPU seconds a maths answer at most. Default 5.
    code_timeout_s
        Wall seconds a test of code at most. Default 10.
    workers
        Processes that judge. Default: one for each core.
    allow_unsandboxed
        Run code without bubblewrap: only where all of it is trusted.
    summary
        Counts on standard error; with agreement where rows have expected (true or false).
    """
    from scope_opd.data.mapping import parse_map
    from scope_opd.verify.answers import build_answer_verifier

    settings = _settings(
        {
            "scope": scope,
            "fallback": False if no_fallback else None,
            "tolerance": typed_tolerance(tolerance),
            "timeout_s": timeout_s,
            "code_timeout_s": code_timeout_s,
            "workers": workers,
            "allow_unsandboxed": allow_unsandboxed,
        }
    )
    columns = parse_map(map_ or [], FIELDS)
    judging = Judging(build_answer_verifier(settings), settings)
    try:
        with judging:
            for row in read_answers(file, columns):
                judging.submit(row)
            judging.finish()
    except KeyboardInterrupt:
        judged = counted(judging.counts.total(), "row")
        print(f"interrupted: {judged} judged; the output is partial", file=sys.stderr)
        return 130
    if summary:
        print(judging.summary(), file=sys.stderr)
    return 0


@dataclass(frozen=True, slots=True)
class AnswerRow:
    """A row to judge.

    Attributes:
        id: the row's own, as it was written, or its line number.
        prediction, answer, problem, form, tolerance: as in the row; tolerance is checked, None where it has none.
        kind: "math" or "code".
        expected: what the verdict should be, None where the row does not say.
        where: file and line, for complaints.
    """

    id: Any
    prediction: str
    answer: Any
    problem: str | None
    form: Literal["response", "answer"]
    tolerance: Any
    kind: Literal["math", "code"]
    expected: bool | None
    where: str


def read_answers(file: Path, columns: Mapping[str, str] | None = None) -> Iterator[AnswerRow]:
    """Rows, checked one by one.

    Args:
        file: JSON lines, or - for standard input.
        columns: keys that differ, from ``data.mapping.parse_map``.

    Raises:
        DataError: naming file, line and id.
    """
    from scope_opd.data.mapping import mapped_row
    from scope_opd.records import iter_jsonl

    is_stdin = str(file) == "-"
    name = "standard input" if is_stdin else str(file)
    source: Any = sys.stdin.buffer if is_stdin else file.expanduser()
    number = 0
    for number, row in iter_jsonl(source):
        where = f"{name} line {number}"
        yield answer_row(mapped_row(row, columns, FIELDS, where) if columns else row, number, where)
    if not number:
        raise DataError(f"{name} has no rows", "one JSON object a line", "check how it was written")


def answer_row(row: dict[str, Any], number: int, where: str) -> AnswerRow:
    """Check one row.

    Raises:
        DataError: a key that is missing or holds what it cannot.
    """
    from scope_opd.gold import answer_from_text, check_answer, is_code, parse_tolerance

    given = row.get("id")
    if given is not None:
        where = f"{where} (id {given!r})"
        if not isinstance(given, str | int | float) or given in (math.inf, -math.inf):
            raise DataError(f"{where}: the id is neither text nor number", "a text or a number", "mend the row")
    for key in ("prediction", "answer"):
        if row.get(key) is None:
            raise DataError(f"{where}: no {key!r}", "rows with prediction and answer", "add it to the row")
    rules: dict[str, tuple[str, Callable[[Any], bool]]] = {
        "prediction": ("a text", lambda value: isinstance(value, str)),
        "problem": ("a text", lambda value: isinstance(value, str)),
        "form": ("response or answer", lambda value: value in ("response", "answer")),
        "kind": ("math or code", lambda value: value in ("math", "code")),
        "expected": ("true or false", lambda value: isinstance(value, bool)),
    }
    for key, (expected, holds) in rules.items():
        if row.get(key) is not None and not holds(row[key]):
            raise DataError(f"{where}: {key} = {_short(row[key])}", expected, "mend the row")
    answer = answer_from_text(row["answer"])
    try:
        check_answer(answer)
        tolerance = None if row.get("tolerance") is None else parse_tolerance(row["tolerance"])
    except ValueError as error:
        raise DataError(f"{where}: {error}", remedy="mend the row") from None
    kind: Literal["math", "code"] = "code" if is_code(answer) else "math"
    if row.get("kind", kind) not in (kind, None):
        found = f"{where}: kind = {row['kind']!r} and an answer {'with' if kind == 'code' else 'without'} a format"
        raise DataError(found, "code with a format, maths without", "mend kind or answer")
    return AnswerRow(
        id=number if given is None else given,
        prediction=row["prediction"],
        answer=answer,
        problem=row.get("problem"),
        form=row.get("form") or "response",
        tolerance=tolerance,
        kind=kind,
        expected=row.get("expected"),
        where=where,
    )


class Judging:
    """Rows in, lines out, in order. A thread prints, so that neither reading nor judging waits for the other.

    Leaving the ``with`` block prints what was submitted before, whatever ended the block, except an interruption: then
    nothing more is printed.
    """

    def __init__(self, verifier: AnswerVerifier, settings: VerifyConfig) -> None:
        from scope_opd.verify.answers import math_settings

        self.verifier = verifier
        self.maths = math_settings(settings)
        self.counts: Counter[bool | None] = Counter()
        self.agreement: Counter[tuple[bool, bool | None]] = Counter()
        self._code_threads: ThreadPoolExecutor | None = None
        self._workers = settings.workers
        self._waiting: queue.Queue[tuple[AnswerRow, Future[Verdict]] | None] = queue.Queue(MAX_WAITING)
        self._error: BaseException | None = None
        self._stopped = threading.Event()
        self._printer = threading.Thread(target=self._print, name="printer", daemon=True)
        self._printer.start()

    def submit(self, row: AnswerRow) -> None:
        """Start to judge a row; waits while too many are under way.

        Raises:
            ScopeError: what judging an earlier row has met.
            BrokenPipeError: nobody reads the output any more.
        """
        if self._error is not None:
            raise self._error
        if row.kind == "code":
            from scope_opd.verify.workers import usable_cores

            code = self.verifier.code
            if self._code_threads is None:
                self._code_threads = ThreadPoolExecutor(self._workers or usable_cores())
            future = self._code_threads.submit(_judge_code, code, row)
        else:
            assert self.verifier.maths is not None
            settings = replace(self.maths, form=row.form, tolerance=row.tolerance or self.maths.tolerance)
            future = self.verifier.maths.submit(row.prediction, row.answer, row.problem, settings, where=row.where)
        self._waiting.put((row, future))

    def finish(self) -> None:
        """Wait until everything is printed.

        Raises:
            ScopeError, BrokenPipeError: as for ``submit``.
        """
        if self._printer.is_alive():
            self._waiting.put(None)
            self._printer.join()
        if self._error is not None:
            raise self._error

    def __enter__(self) -> Judging:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        try:
            if isinstance(error, Exception) and error is not self._error:
                self.finish()
            elif error is not None:
                # Before the verifier is closed: rows under way then end without a verdict, which is none on them.
                self._stopped.set()
        finally:
            self.verifier.close()
            if self._code_threads is not None:
                self._code_threads.shutdown(wait=False, cancel_futures=True)
            with suppress(queue.Full):
                self._waiting.put(None, timeout=1)
            if self._stopped.is_set():
                self._printer.join(1)  # so that ``counts`` says what was printed; a full pipe may hold it up

    def _print(self) -> None:
        while (item := self._waiting.get()) is not None:
            if self._error is not None or self._stopped.is_set():
                continue  # keep taking, so that nobody waits to put
            row, future = item
            try:
                verdict = future.result()
                if self._stopped.is_set():
                    continue
                self.counts[verdict.correct] += 1
                if row.expected is not None:
                    self.agreement[row.expected, verdict.correct] += 1
                line = {
                    "id": row.id,
                    "correct": verdict.correct,
                    "extracted": verdict.extracted,
                    "reason": verdict.reason,
                }
                sys.stdout.write(_encodable(line) + "\n")
                if self._waiting.empty():
                    sys.stdout.flush()
            except BaseException as error:  # it is the main thread's to raise
                self._error = error

    def summary(self) -> str:
        """The counts on one line, or two where rows said what was expected."""
        total = self.counts.total()
        lines = [
            f"{total} judged: {self.counts[True]} correct, {self.counts[False]} incorrect, "
            f"{self.counts[None]} without a verdict"
        ]
        if known := self.agreement.total():
            agreed = self.agreement[True, True] + self.agreement[False, False]
            lines.append(
                f"{agreed} of {known} as expected ({100 * agreed / known:.1f} %): "
                f"{self.agreement[False, True]} wrongly accepted, {self.agreement[True, False]} wrongly refused, "
                f"{self.agreement[True, None] + self.agreement[False, None]} without a verdict"
            )
        return "\n".join(lines)


def _judge_code(code: CodeVerifier, row: AnswerRow) -> Verdict:
    """A verdict on code; an answer whose tests cannot be read is complained of by its place."""
    try:
        return code.judge(row.prediction, row.answer, form=row.form)
    except DataError as error:
        raise DataError(f"{row.where}: {error.found}", error.expected, error.remedy or "mend the row") from None


def _settings(options: dict[str, Any]) -> VerifyConfig:
    """Options as a ``[verify]`` table, so that defaults and limits are those of training."""
    from scope_opd.config import validate_config
    from scope_opd.verify.answers import math_settings

    with in_options():
        settings = validate_config({"verify": {key: value for key, value in options.items() if value is not None}})
        math_settings(settings.verify)
    return settings.verify


def _encodable(line: dict[str, Any]) -> str:
    """A line of strict JSON. A lone surrogate, which UTF-8 has no place for, goes out as the escape it came in as."""
    from scope_opd.records import dumps

    text = dumps(line)
    try:
        text.encode()
    except UnicodeEncodeError:
        return json.dumps(line)
    return text


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."
