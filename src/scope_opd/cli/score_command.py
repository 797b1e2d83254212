"""``scope score``: teacher log-probs for the rows of a JSONL file, from vLLM servers.

Rows are appended to the output as they are scored, so that nothing is lost when the command is stopped; the last act
puts them into the input's order. What the servers were asked is in OUT.teacher.jsonl, with the fingerprint by which a
later call knows the teacher again. Not covered: sampling, teachers in process.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from scope_opd.errors import ConfigError, DataError, RunFailed, ScopeError

if TYPE_CHECKING:
    from scope_opd.teacher.pool import Outcome, PoolTeacher
    from scope_opd.teacher.servers import Servers
    from scope_opd.types import Rollout

Key = tuple[str, str]
GIVE_UP_AFTER = 64
"""Rows in a row without an answer after which the servers are taken for dead."""
UNANSWERED = "no answer in "
"""How errors begin that another call may mend."""
PROGRESS_S = 5.0

EXAMPLES = """Examples:
  scope score rollouts.jsonl --out scored.jsonl --teacher-url http://localhost:8000/v1 --teacher-model teacher
  scope score in.jsonl --out out.jsonl --teacher-url http://a:8000/v1 --teacher-url http://b:8000/v1 \\
      --teacher-model Qwen/Qwen3-8B --api-key-env TEACHER_API_KEY
  scope score in.jsonl --out out.jsonl ...       the same again: goes on where it was stopped
  scope weights out.jsonl                        the weights that SCOPE gives to what was scored
"""


def score(
    file: Annotated[Path, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    out: Path,
    teacher_url: Annotated[list[str], Parameter(negative="")],
    teacher_model: str,
    api_key_env: str | None = None,
    api_key_file: Path | None = None,
    ca_bundle: Path | None = None,
    concurrency: int = 32,
    deadline_s: float = 600.0,
    connect_timeout_s: float = 10.0,
    read_timeout_s: float = 300.0,
    allow_unprotected_routes: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Score the responses of a JSONL file with a teacher behind vLLM servers.

    A row needs id, prompt_token_ids and token_ids; other keys are kept. It
    gains teacher_logprobs: one number for each of token_ids, at temperature 1
    of the served model; null, with "error", where it cannot be scored. Rows
    come out in the order in which they went in. Exit code 1 if any is null.

    Called again with the same files it goes on: a row that is in the output
    already is not sent again, unless it got no answer at all.

    Parameters
    ----------
    file
        The JSONL file.
    out
        Where rows go; OUT.teacher.jsonl beside it says who scored what.
    teacher_url
        Address of a server, such as http://host:8000/v1; may be repeated for
        servers of the same weights.
    teacher_model
        The name that they serve the model under.
    api_key_env
        Environment variable that holds the servers' key.
    api_key_file
        File that holds it, instead.
    ca_bundle
        Certificate authorities (PEM) for https.
    concurrency
        Requests under way at each server.
    deadline_s
        A row is tried again so long.
    connect_timeout_s
        For a connection to open.
    read_timeout_s
        For one whole answer.
    allow_unprotected_routes
        Accept a server on another machine whose development routes are open.
    """
    for name, value in (("concurrency", concurrency), ("deadline-s", deadline_s), ("read-timeout-s", read_timeout_s),
                        ("connect-timeout-s", connect_timeout_s)):  # fmt: skip
        if not 0 < value < 1e9:
            raise ConfigError(f"--{name} = {value}", "a number > 0", "change it")
    source = file.expanduser()
    if source.resolve() == out.expanduser().resolve():
        raise ConfigError(f"--out {out} is the input itself", "another file", "change --out")
    plan = make_plan(source, out.expanduser())
    if plan.todo:
        from scope_opd.serving.pool import PoolSettings
        from scope_opd.serving.route import ClientSettings

        servers = _servers(
            plan,
            teacher_url,
            teacher_model,
            api_key_env,
            api_key_file,
            ClientSettings(
                connect_timeout_s=connect_timeout_s,
                read_timeout_s=read_timeout_s,
                ca_bundle=None if ca_bundle is None else str(ca_bundle.expanduser()),
                allow_unprotected=allow_unprotected_routes,
            ),
            PoolSettings(deadline_s=deadline_s, max_concurrency=concurrency),
        )
        try:
            for warning in servers.open():
                print(f"warning: {warning}", file=sys.stderr)
            asyncio.run(_Scoring(plan, servers, 2 * concurrency * len(teacher_url)).run())
        finally:
            servers.close()
    nulls = _put_in_order(plan)
    print(plan.summary(nulls))
    return 1 if nulls else 0


@dataclass
class Plan:
    """What there is to do.

    Attributes:
        order: (id, hash of its tokens) of every row of the input.
        todo: those that are to be sent.
        fingerprint: token ids of the row whose largest id is smallest, the one that a teacher knows most surely.
    """

    source: Path
    out: Path
    order: list[Key] = field(default_factory=list)
    todo: set[Key] = field(default_factory=set)
    fingerprint: tuple[int, ...] = ()
    tokens: int = 0
    tries: int = 0
    scored: int = 0
    began: float = field(default_factory=time.monotonic)

    def summary(self, nulls: int) -> str:
        seconds = time.monotonic() - self.began
        before = len(self.order) - len(self.todo)
        return (
            f"{len(self.order) - nulls} of {len(self.order)} rows have scores, {nulls} could not be scored; "
            f"{len(self.todo)} were sent now ({before} were there before), {self.tokens} response tokens scored in "
            f"{seconds:.1f} s, {self.tries} requests: {self.out}"
        )


def make_plan(source: Path, out: Path) -> Plan:
    """Check every row of the input, and see what the output has of it already.

    Raises:
        DataError: a row is wrong, an id comes twice, or the output belongs to another input.
    """
    from scope_opd.records import cut_torn_line, iter_jsonl

    plan, seen, smallest = Plan(source, out), dict[str, int](), None
    for number, rollout, _ in _rollouts(source):
        if rollout.id in seen:
            found = f"{source} line {number} (id {rollout.id!r}): the id was used before, on line {seen[rollout.id]}"
            raise DataError(found, "ids that are unique", "rename one of the rows")
        seen[rollout.id] = number
        plan.order.append(_key(rollout))
        tokens = (*rollout.prompt_token_ids, *rollout.token_ids)
        if len(tokens) >= 2 and (smallest is None or max(tokens[:64]) < smallest):
            smallest, plan.fingerprint = max(tokens[:64]), tokens[:64]
    if not plan.order:
        raise DataError(f"{source} has no rows", "one JSON object a line", "check how it was written")
    if not plan.fingerprint:
        raise DataError(f"{source}: no row has two tokens", "prompts and responses as token ids", "check the file")
    known, done = set(plan.order), set()
    if out.exists():
        cut_torn_line(out)
        for number, row in iter_jsonl(out):
            key = _key_of(row)
            if row.get("id") not in seen and str(row.get("id")) not in seen:
                found = f"{out} line {number} has id {row.get('id')!r}, which {source} has not"
                raise DataError(found, "the output of the same input", "choose another --out")
            if key in known and _final(row):
                done.add(key)
    plan.todo = known - done
    return plan


def _rollouts(source: Path) -> Iterator[tuple[int, Rollout, dict[str, Any]]]:
    """(line, record, row as it stands); log-probs are not asked for."""
    from scope_opd.records import iter_jsonl, rollout_from_dict

    fields = ("id", "prompt_token_ids", "token_ids")
    for number, row in iter_jsonl(source):
        wanted = {name: row[name] for name in fields if name in row}
        length = len(row["token_ids"]) if isinstance(row.get("token_ids"), list) else 0
        # An empty response is one: it has no log-prob, and nothing is asked about it.
        record = {**wanted, "group": "", "logprobs": [0.0] * max(1, length)}
        if length == 0 and row.get("token_ids") == []:
            record["token_ids"] = [0]
        rollout = rollout_from_dict(record, where=f"{source} line {number}", required=fields)
        if length == 0:
            rollout.token_ids = []
        yield number, rollout, row


def _key(rollout: Rollout) -> Key:
    from scope_opd.serving.vllm import token_hash

    prompt = rollout.prompt_token_ids
    return rollout.id, f"{len(prompt)}:{token_hash([*prompt, *rollout.token_ids])}"


def _key_of(row: dict[str, Any]) -> Key:
    from scope_opd.serving.vllm import token_hash

    prompt, response = row.get("prompt_token_ids"), row.get("token_ids")
    if not isinstance(prompt, list) or not isinstance(response, list):
        return str(row.get("id")), "?"
    tokens = [token if type(token) is int else -1 for token in (*prompt, *response)]
    return str(row.get("id")), f"{len(prompt)}:{token_hash(tokens)}"


def _final(row: dict[str, Any]) -> bool:
    """Whether another call would change nothing about a row of the output."""
    values = row.get("teacher_logprobs")
    if isinstance(values, list):
        return len(values) == len(row["token_ids"])
    error = row.get("error")
    return isinstance(error, str) and not error.startswith(UNANSWERED)


def _servers(
    plan: Plan, urls: list[str], model: str, key_env: str | None, key_file: Path | None, client: Any, pool: Any
) -> Servers:
    from scope_opd.addresses import check_variable_name, parse_base_url
    from scope_opd.serving.pool import Names
    from scope_opd.serving.route import RouteSettings
    from scope_opd.serving.secrets import load_secret
    from scope_opd.teacher.ledger import Ledger, first_fingerprints
    from scope_opd.teacher.servers import Servers

    try:
        addresses = tuple(dict.fromkeys(parse_base_url(url) for url in urls))
        if key_env is not None:
            check_variable_name(key_env, "--api-key-env")
    except ValueError as error:
        raise ConfigError(str(error)) from None
    key = load_secret(env=key_env, file=None if key_file is None else str(key_file), setting="--api-key")
    names = Names("--teacher-url", "--teacher-model", "--api-key-env")
    path = plan.out.with_name(f"{plan.out.name}.teacher.jsonl")
    if len(plan.todo) == len(plan.order):  # begun anew, perhaps with another teacher
        path.unlink(missing_ok=True)
    references = first_fingerprints(path)
    ledger = Ledger(path)
    servers = Servers(
        {"": RouteSettings(addresses, model, key, names)}, plan.fingerprint,
        client=client, pool=pool, ledger=ledger, references=references,
    )  # fmt: skip
    return servers


class _Scoring:
    """Sends what is to be sent, a bounded number at a time, and appends what comes back."""

    def __init__(self, plan: Plan, servers: Servers, window: int) -> None:
        from scope_opd.teacher.pool import PoolTeacher

        self.plan, self.servers, self.window = plan, servers, window
        self.teacher: PoolTeacher = PoolTeacher(servers)
        self._unanswered = self._done = self._nulls = 0
        self._shown = time.monotonic()

    async def run(self) -> None:
        """Raises ``RunFailed`` if the servers are dead; what was scored is on disk in any case."""
        from scope_opd.serving.route import fatal_in_a_run

        running: dict[asyncio.Future[Outcome], dict[str, Any]] = {}
        try:
            self.servers.ledger.open()
            with self.plan.out.open("a", encoding="utf-8") as stream:
                for _, rollout, row in _rollouts(self.plan.source):
                    if _key(rollout) not in self.plan.todo:
                        continue
                    while len(running) >= self.window:
                        await self._take(running, stream)
                    future = self.servers.thread.submit(_one(self.teacher, rollout))
                    running[asyncio.wrap_future(future)] = row
                while running:
                    await self._take(running, stream)
        except ScopeError as error:
            raise fatal_in_a_run(error) from None
        finally:
            for waiting in running:
                waiting.cancel()

    async def _take(self, running: dict[asyncio.Future[Outcome], dict[str, Any]], stream: Any) -> None:
        from scope_opd.records import dumps

        done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
        for future in done:
            row, outcome = running.pop(future), future.result()
            row.pop("error", None)
            line = {**row, "teacher_logprobs": outcome.logprobs}
            if outcome.logprobs is None:
                line["error"] = outcome.error
            stream.write(f"{dumps(line)}\n")
            if outcome.row:
                self.servers.ledger.add(outcome.row)
            self._count(outcome)
        stream.flush()

    def _count(self, outcome: Outcome) -> None:
        plan = self.plan
        self._done += 1
        plan.tries += outcome.tries
        plan.tokens += len(outcome.logprobs or ())
        self._nulls += outcome.logprobs is None
        dead = outcome.error is not None and outcome.error.startswith(UNANSWERED)
        self._unanswered = self._unanswered + 1 if dead else 0
        if self._unanswered >= GIVE_UP_AFTER:
            raise RunFailed(
                f"{GIVE_UP_AFTER} rows one after another got no answer: {outcome.error}", "servers that answer",
                "see to them and call this again: what is scored is kept",
            )  # fmt: skip
        now = time.monotonic()
        if now - self._shown >= PROGRESS_S:
            self._shown = now
            rate = plan.tokens / (now - plan.began)
            print(
                f"{self._done} of {len(plan.todo)} rows, {self._nulls} without a score, {rate:.0f} tokens/s",
                file=sys.stderr, flush=True,
            )  # fmt: skip


async def _one(teacher: PoolTeacher, rollout: Rollout) -> Outcome:
    from scope_opd.teacher.pool import Outcome

    if rollout.token_ids and not rollout.prompt_token_ids:
        return Outcome(None, "no prompt: the first token's log-prob needs one before it", False, 0, {})
    return await teacher.request(rollout, rows_may_fail=True)


def _put_in_order(plan: Plan) -> int:
    """Rewrite the output in the input's order where it is not; returns how many rows have no score."""
    places: dict[Key, tuple[int, int, bool]] = {}
    sequence: list[Key] = []
    with plan.out.open("rb") as stream:
        while line := stream.readline():
            row = json.loads(line)
            key = _key_of(row)
            if key not in places or not places[key][2]:  # the first score of a row stands
                places[key] = (stream.tell() - len(line), len(line), isinstance(row.get("teacher_logprobs"), list))
            sequence.append(key)
        if sequence != plan.order:
            fresh = plan.out.with_name(f".{plan.out.name}.new")
            with fresh.open("wb") as target:
                for key in plan.order:
                    start, length, _ = places[key]
                    stream.seek(start)
                    target.write(stream.read(length))
                target.flush()
                os.fsync(target.fileno())
            fresh.replace(plan.out)
    return sum(not places[key][2] for key in plan.order)
