"""``scope doctor`` for runs with servers: a visit to each teacher and each sampler, and what their log-probs are worth.

Every server is asked at the same time as the others and for itself, so that one which does not answer hides nothing of
the rest (``doctor_asks`` has the questions). Where the weights that a server should hold are in a folder here, and
small enough, its log-probs of a fixed text are compared with a forward pass in this process. Not covered: large models.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal

from scope_opd.addresses import parse_base_url
from scope_opd.cli.checks import Finding
from scope_opd.cli.doctor_asks import Place, examine, finding_of, score
from scope_opd.config import Config, RolloutConfig, ServerConfig, TeacherConfig
from scope_opd.errors import ModelError, ScopeError
from scope_opd.models.places import resolve_path
from scope_opd.serving.faults import Fault, RowRefused
from scope_opd.serving.http import HttpClient, LoopThread
from scope_opd.serving.pool import Endpoint, Names, Pool, PoolSettings
from scope_opd.serving.secrets import load_secret
from scope_opd.serving.vllm import ScoreRequest
from scope_opd.types import Prompt, Rollout, SamplingParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ANSWER_S = 120.0
"""How long a whole answer may take, where the config is more patient."""
SAME_PROMPTS, SAME_TOKENS = 4, 32
"""Prompts and response tokens on which a teacher that is the student is compared with it."""
PRECISION = 4.0
"""Tolerances by which a server may be off before it is another model for certain: it may compute in less precision."""
SAME_NATS = 1e-3
"""Mean log-ratio below which two models are one, for weights and precision alike."""


@dataclass(slots=True)
class Seen:
    """What the earlier checks of a config leave for the later ones.

    Attributes:
        tokens, eval_tokens: of the longest prompt and response, in training and in evaluation.
        rows, prompts: of ``data.train``.
        student, teacher: models whose weights were loaded.
        ends: the student's end tokens.
        to_start: which of [launch]'s "samplers" and "teachers" scope launch finds addresses for.
    """

    tokens: int
    eval_tokens: int = 0
    rows: list[Any] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    student: PreTrainedModel | None = None
    teacher: PreTrainedModel | None = None
    ends: tuple[int, ...] = ()
    to_start: frozenset[str] = frozenset()


class Visit:
    """A visit to all servers of a config; a context manager, which ends the clients.

    Args:
        config: with servers for teacher, rollouts or both.
        fixed: token ids that every server can score, at least two.
        teacher_tokens, sampler_tokens: see ``Place.tokens``.
        teacher_samples: the temperature at which teachers sample for the run; None where they score.
        teacher_folder: see ``Place.folder``; known only where there is one teacher.
        teacher_top_k: see ``Place.top_k``.

    Attributes:
        places: every server whose key could be read.
        findings: what was wrong before any server was asked.
    """

    def __init__(
        self,
        config: Config,
        fixed: Sequence[int],
        *,
        teacher_tokens: int,
        sampler_tokens: int,
        with_teacher: bool = True,
        teacher_samples: float | None = None,
        teacher_folder: str | None = None,
        teacher_top_k: int = 0,
    ) -> None:
        self._teacher_top_k = teacher_top_k
        self.config, self.fixed = config, ScoreRequest(tuple(fixed), 1)
        self.places: list[Place] = []
        self.findings: list[Finding] = []
        self._stack = ExitStack()
        teacher, rollout = config.teacher, config.rollout
        try:
            if with_teacher and teacher.served:
                tables: dict[str, ServerConfig] = {"": teacher} if teacher.base_urls else {}
                client = self._client(teacher, "teacher")
                for name, table in {**tables, **teacher.routes}.items():
                    setting = f"teacher.routes.{name}" if name else "teacher"
                    folder = teacher_folder if not teacher.routes else None
                    self._add(client, "teacher", name, setting, table, teacher, teacher_tokens, teacher_samples, folder)
            if rollout.served:
                client = self._client(rollout, "rollout")
                self._add(
                    client, "sampler", "", "rollout", rollout, rollout, sampler_tokens, rollout.temperature,
                    config.model.path,
                )  # fmt: skip
        except BaseException:
            self._stack.close()
            raise

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def examine(self) -> Iterator[Finding]:
        """Ask every server everything; their findings, in the config's order."""
        yield from self.findings
        running = [(place, place.pool.client.thread.submit(examine(place, self.fixed)))
                   for place in self.places]  # fmt: skip
        for _, future in running:
            yield from future.result()

    def score(self, place: Place, token_ids: Sequence[int], start: int) -> list[float]:
        """Log-probs of ``token_ids[start:]`` by one server.

        Raises:
            Fault, RowRefused, ScopeError: it gave none.
        """
        return place.pool.client.thread.run(score(place, ScoreRequest(tuple(token_ids), start)))

    def _client(self, table: TeacherConfig | RolloutConfig, name: str) -> HttpClient | None:
        thread = LoopThread(f"scope-doctor-{name}")
        try:
            client = HttpClient(
                thread,
                connect_timeout_s=table.connect_timeout_s,
                read_timeout_s=min(table.read_timeout_s, ANSWER_S),
                ca_bundle=table.ca_bundle,
            )
        except ScopeError as error:
            thread.close()
            self.findings.append(Finding(name, "FAIL", error.found, error.remedy))
            return None
        self._stack.callback(client.close)
        return client

    def _add(
        self,
        client: HttpClient | None,
        role: Literal["teacher", "sampler"],
        route: str,
        setting: str,
        table: ServerConfig,
        shared: TeacherConfig | RolloutConfig,
        tokens: int,
        temperature: float | None,
        folder: str | None,
    ) -> None:
        if client is None:
            return
        label = f"teacher {route}" if route else role
        try:
            key = load_secret(env=table.api_key_env, file=table.api_key_file, setting=f"{setting}.api_key")
        except ScopeError as error:
            self.findings.append(Finding(f"{label}: key", "FAIL", error.found, error.remedy))
            return
        source = f"{setting}.api_key_env"
        if table.api_key_env is not None:
            source = f"environment variable {table.api_key_env} ({setting}.api_key_env)"
        elif table.api_key_file is not None:
            source = f"file {table.api_key_file} ({setting}.api_key_file)"
        names = Names(
            f"{setting}.base_urls", f"{setting}.model", f"{setting}.api_key_env",
            "rollout.allow_unprotected_routes" if role == "sampler" else "teacher.allow_unprotected_routes",
        )  # fmt: skip
        model = table.model or self.config.teacher.model
        assert model is not None, "the config checks it"
        for url in table.base_urls:
            endpoint = Endpoint(parse_base_url(url), model, key, names)
            pool = Pool(client, [endpoint], PoolSettings(), _no_probe)
            self.places.append(
                Place(
                    role, label, route, endpoint, pool, source, shared.allow_unprotected_routes, tokens, temperature,
                    folder, top_k=self._teacher_top_k if role == "teacher" else 0,
                )
            )  # fmt: skip


async def _no_probe(endpoint: Endpoint) -> None:
    raise AssertionError("a visit asks each server directly")


def visit_servers(config: Config, seen: Seen) -> Iterator[Finding]:
    """All that concerns servers, and a teacher that is the student wherever it lives.

    Args:
        config: of the run.
        seen: ``student`` and ``teacher`` are compared with servers where they are loaded.
    """
    from scope_opd.cli import inputs, servers

    fixed, tokenizer, top_k = list(range(1, 9)), None, 0
    try:
        tokenizer = inputs.student_tokenizer(config)
        fixed = servers.fixed_tokens(tokenizer)[:64]
        top_k = servers.likeliest_tokens(config, tokenizer)
    except ScopeError:
        pass  # said already; what a server can be asked without it is asked
    with_teacher, samples = True, None
    try:
        method = inputs.build_configured_method(config)
        with_teacher = inputs.needs_teacher(config, method)
        if method.sampled_by == "teacher":
            samples = config.teacher.temperature or config.rollout.temperature
    except ScopeError:
        pass
    folder = _teacher_folder(config)
    visit = Visit(
        config,
        fixed,
        teacher_tokens=seen.tokens + 1,
        sampler_tokens=max(seen.tokens, seen.eval_tokens),
        with_teacher=with_teacher,
        teacher_samples=samples,
        teacher_folder=folder,
        teacher_top_k=top_k,
    )
    with visit:
        yield from visit.examine()
        yield from weights_agree(config, visit.places)
        yield from _numbers(config, visit, seen, fixed)
        if tokenizer is None or seen.student is None or not with_teacher or samples is not None:
            return
        if folder is not None and _same(folder, config.model.path):
            yield from _teacher_is_student(config, visit, seen, tokenizer)


def weights_agree(config: Config, places: Sequence[Place]) -> Iterator[Finding]:
    """Servers of one route must serve the same weights."""
    first: dict[tuple[str, str], Place] = {}
    for place in places:
        if place.scored is None:
            continue
        other = first.setdefault((place.role, place.route), place)
        assert other.scored is not None
        gap = _gap(place.scored, other.scored)
        if gap > _tolerance(config, place):
            yield finding_of(
                place, "weights", "FAIL",
                f"other weights than {other.url}: log-probs of a fixed text differ by {gap:.2g} nats a token",
                "serve the same weights everywhere",
            )  # fmt: skip


def _numbers(config: Config, visit: Visit, seen: Seen, fixed: Sequence[int]) -> Iterator[Finding]:
    """Servers against a forward pass of the weights that they should hold."""
    expected: dict[tuple[str, float], list[float] | None] = {}
    for place in visit.places:
        if place.scored is None or place.folder is None:
            continue
        temperature = config.teacher.served_temperature if place.role == "teacher" else 1.0
        case = (place.role, temperature)
        if case not in expected:
            model = seen.student if place.role == "sampler" else _small_teacher(config, seen)
            expected[case] = None if model is None else _forward(model, [_fixed(fixed)], temperature)
        own = expected[case]
        if own is None:
            continue
        gap, setting = _gap(place.scored, own), "teacher.path" if place.role == "teacher" else "model.path"
        at = "" if temperature == 1.0 else f" at temperature {temperature:g}"
        if gap <= _tolerance(config, place):
            found = f"{place.url} gives those of {place.folder}{at}, to {gap:.2g} nats a token"
            yield finding_of(place, "numbers", "ok", found)
            continue
        found = f"log-probs of a fixed text are not those of {place.folder}{at}: {gap:.2g} nats a token apart"
        if place.role == "sampler":
            remedy = "no harm if an earlier run left its weights there: the first sync replaces them; else serve it"
            yield finding_of(place, "numbers", "warn", found, remedy)
        elif gap <= PRECISION * _tolerance(config, place):
            remedy = "low precision can do that (bfloat16 against float32 here); else serve other weights"
            yield finding_of(place, "numbers", "warn", found, remedy)
        else:
            remedy = f"serve {setting}, at teacher.served_temperature (scope serve teacher CONFIG), or correct them"
            yield finding_of(place, "numbers", "FAIL", found, remedy)


def _teacher_is_student(
    config: Config, visit: Visit, seen: Seen, tokenizer: PreTrainedTokenizerBase
) -> Iterator[Finding]:
    """A teacher that is the student must find nothing to teach: log pi_S - log pi_T is 0 at every token."""
    from scope_opd.cli.models import student_temperature, teacher_temperature

    assert seen.student is not None
    subject = "teacher = student"
    ours, theirs = student_temperature(config), teacher_temperature(config)
    if ours != theirs:
        yield Finding(
            subject, "ok", f"not compared: objective.temperature = {config.objective.temperature!r} divides the "
            f"student's logits by {ours:g} and the teacher's by {theirs:g}",
        )  # fmt: skip
        return
    rollouts = asyncio.run(_drawn(config, seen, tokenizer))
    if not rollouts:
        return
    own = _forward(seen.student, rollouts, ours)
    assert own is not None, "the student can score what it drew"
    if not config.teacher.served:
        scored = None if seen.teacher is None else _forward(seen.teacher, rollouts, theirs)
        if scored is not None:
            yield _ratio(subject, own, scored)
        return
    for place in visit.places:
        if place.role == "teacher" and place.scored is not None:
            try:
                scores = [
                    visit.score(place, [*each.prompt_token_ids, *each.token_ids], len(each.prompt_token_ids))
                    for each in rollouts
                ]
            except (Fault, RowRefused, ScopeError) as error:
                yield finding_of(place, "= student", "FAIL", f"could not score the student's samples: {error}",
                                 "see the server's log")  # fmt: skip
                continue
            yield _ratio(f"{place.label} = student", own, [value for values in scores for value in values])


def _ratio(subject: str, student: Sequence[float], teacher: Sequence[float]) -> Finding:
    ratios = [a - b for a, b in zip(student, teacher, strict=True)]
    kl, gap = sum(ratios) / len(ratios), _gap(student, teacher)
    found = f"KL {kl:.1e} nats a token on {len(ratios)} tokens of the student's own"
    if gap <= SAME_NATS:
        return Finding(subject, "ok", f"the same folder: {found}")
    precise = f"{found}, and {gap:.1e} in the mean of |log pi_S - log pi_T|"
    remedy = "look for another precision (dtype), temperature or other weights: the run would distil this difference"
    return Finding(subject, "warn" if gap <= 0.05 else "FAIL", f"the same folder, and yet {precise}", remedy)


async def _drawn(config: Config, seen: Seen, tokenizer: PreTrainedTokenizerBase) -> list[Rollout]:
    from scope_opd.rollout.local import LocalSampler

    assert seen.student is not None
    params = SamplingParams(
        n=1, temperature=config.rollout.temperature, max_tokens=min(SAME_TOKENS, config.rollout.max_tokens),
        stop_token_ids=seen.ends, seed=config.run.seed,
    )  # fmt: skip
    sampler = LocalSampler(seen.student, tokenizer)
    stream = sampler.sample(seen.prompts[:SAME_PROMPTS], params, step=0, policy_version=0)
    return [rollout async for rollout in stream]


def _forward(model: PreTrainedModel, rollouts: Sequence[Rollout], temperature: float) -> list[float] | None:
    """Log-probs of all response tokens, joined, by a model in this process; None where it has no row for one."""
    from scope_opd.teacher.local import LocalTeacher

    joined: list[float] = []
    for each in asyncio.run(LocalTeacher(model, temperature=temperature, log_prob_floor=-1e4).score(rollouts)):
        if each.logprobs is None:
            return None
        joined += each.logprobs
    return joined


def _fixed(token_ids: Sequence[int]) -> Rollout:
    return Rollout("fixed", "fixed", [token_ids[0]], list(token_ids[1:]), [0.0] * (len(token_ids) - 1))


def _small_teacher(config: Config, seen: Seen) -> PreTrainedModel | None:
    """The served teacher's own weights, where they are here and small."""
    from scope_opd.cli.doctor import is_small
    from scope_opd.cli.models import load_teacher
    from scope_opd.models.loading import resolve_device

    if seen.teacher is None and is_small(config.teacher.path):
        try:
            seen.teacher = load_teacher(config, resolve_device(config.train.device))
        except ModelError:
            return None  # a folder with a tokenizer alone is no mistake here
    return seen.teacher


def _teacher_folder(config: Config) -> str | None:
    """``teacher.path``, where it is the teacher for certain: in process, or chosen beside servers of one teacher."""
    teacher = config.teacher
    chosen = teacher.path == teacher.tokenizer or teacher.path != type(teacher)().path
    return teacher.path if not teacher.served or (chosen and not teacher.routes) else None


def _same(one: str, other: str) -> bool:
    try:
        return Path(resolve_path(one)).resolve() == Path(resolve_path(other)).resolve()
    except ModelError:
        return False


def _tolerance(config: Config, place: Place) -> float:
    return config.teacher.fingerprint_tolerance if place.role == "teacher" else config.rollout.sync_tolerance


def _gap(left: Sequence[float], right: Sequence[float]) -> float:
    """Mean absolute difference."""
    return sum(abs(a - b) for a, b in zip(left, right, strict=True)) / len(left)
