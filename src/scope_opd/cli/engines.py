"""From a config to engines: the only place that knows which class does which job.

``build_engines`` serves a training run, ``build_model_evaluator`` anything that only samples and judges. Whatever can
be checked cheaply is checked before weights are loaded.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch

from scope_opd.cli import checks, samplers, servers
from scope_opd.cli.early import eval_source
from scope_opd.cli.ends import judge_ends, served_ends
from scope_opd.cli.inputs import (
    build_configured_method,
    build_verifier,
    contexts,
    eval_max_tokens,
    load_data,
    needs_teacher,
    render,
    student_tokenizer,
    teacher_tokenizer,
)
from scope_opd.cli.models import (
    autocast_dtype,
    embedding_rows,
    eval_sampler,
    frozen_reference,
    head_rows,
    load_student,
    load_teacher,
    load_trainee,
    local_teacher,
    plain_student,
    student_temperature,
    teacher_sampler,
    teacher_temperature,
)
from scope_opd.cli.pipelines import build_pipeline, steps_ahead
from scope_opd.cli.ranks import EVALUATION, TRAIN, Facts, rank_device
from scope_opd.cli.templates import compare_prompts
from scope_opd.config import Config
from scope_opd.credit import assign_credit
from scope_opd.data.prompts import PromptSchedule
from scope_opd.errors import ConfigError
from scope_opd.evaluate.run import evaluate, evaluation_seed
from scope_opd.models.adapters import add_adapters
from scope_opd.models.checkpointing import check_setting
from scope_opd.models.fingerprint import weights_digest
from scope_opd.models.loading import end_token_ids, resolve_device
from scope_opd.models.watch import decoder_layers
from scope_opd.objective.methods import Method
from scope_opd.ranks import Ranks
from scope_opd.rollout.local import LocalSampler
from scope_opd.rollout.samplers import Samplers
from scope_opd.rollout.shared import SharedSampler
from scope_opd.teacher.local import LocalTeacher
from scope_opd.teacher.shared import SharedTeacher
from scope_opd.train.engines import Engines, SurrogateSettings
from scope_opd.types import Prompt, Sampler, SamplingParams, Teacher, Verifier


@dataclass(slots=True)
class Built:
    """What ``build_engines`` makes.

    Attributes:
        engines: everything the trainer is handed.
        method: the method.
        train_prompts, eval_prompts: rendered prompts; ``eval_prompts`` is empty where nothing is evaluated.
        verifier: what judges.
        teacher: what scores, None where nothing does.
        data: which data sets were read, "train" and perhaps "eval", as ``DataSet.about`` says it.
        warnings: lines worth showing before the run.
        sampling_servers: the client of servers that sample, where there are any.
    """

    engines: Engines
    method: Method
    train_prompts: list[Prompt]
    eval_prompts: list[Prompt]
    verifier: Verifier
    teacher: Teacher | None = None
    data: dict[str, dict[str, Any]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    sampling_servers: Samplers | None = None

    def close(self) -> None:
        """End the verifier's processes and the connections to servers, where there are any."""
        for part in (self.engines.publisher, self.sampling_servers, self.verifier, self.teacher):
            if close := getattr(part, "close", None):
                close()


def build_engines(config: Config, revisions: Mapping[str, str] | None = None, ranks: Ranks | None = None) -> Built:
    """Load everything that a training run needs.

    Args:
        config: the run.
        revisions: commits of hub data sets, "train" and "eval", that a resumed run began with.
        ranks: of which this process is the first; the others do ``followers.build_follower``. None: a world of one.

    Raises:
        ScopeError: anything that is wrong with data, models or settings.
    """
    with contextlib.ExitStack() as undo:  # what was opened is closed again if something is wrong
        built = _build_engines(config, revisions or {}, ranks or Ranks(), undo)
        undo.pop_all()
    return built


def _build_engines(config: Config, commits: Mapping[str, str], ranks: Ranks, undo: contextlib.ExitStack) -> Built:
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    device = rank_device(config, ranks)
    steps_ahead(config)
    method = build_configured_method(config)
    with_teacher = needs_teacher(config, method)
    held_out = eval_source(config)
    data = load_data(config, config.data.train, "train", commits.get("train"))
    held_out_data = load_data(config, held_out, "heldout", commits.get("eval")) if held_out else None
    eval_rows = held_out_data.rows[: config.eval.problems] if held_out_data else []
    warnings = [*data.warnings, *(held_out_data.warnings if held_out_data else [])]
    tokenizer = student_tokenizer(config)
    limits = contexts(config, with_teacher and not config.teacher.served)
    samplers.check_sampled_by(config, method)
    sampled = samplers.open_samplers(config, tokenizer) if config.rollout.served else None
    if sampled is not None:
        undo.callback(sampled.close)
        warnings += sampled.open()
        samplers.check_answers(config, sampled)
        limits[samplers.LIMIT_NAME] = sampled.context
    served = None
    if with_teacher and config.teacher.served:
        if method.needs_teacher(True) or method.needs_teacher(False):
            servers.check_temperature(config, teacher_temperature(config))
        served = servers.open_servers(config, tokenizer)
        undo.callback(served.close)
        warnings += served.open()
        limits["teacher"] = servers.context(served)
    train_prompts = render(
        config, data.rows, tokenizer, limits, max_tokens=config.rollout.max_tokens, warnings=warnings
    )
    limit = {name: limits[name] for name in ("student", samplers.LIMIT_NAME) if name in limits}
    eval_prompts = render(config, eval_rows, tokenizer, limit, max_tokens=eval_max_tokens(config), warnings=warnings)
    schedule = PromptSchedule(
        train_prompts, config.train.prompts_per_step, seed=config.run.seed, shuffle=config.data.shuffle
    )
    findings = [checks.temperature(config), checks.preset(config)]
    if method.sampled_by == "teacher":
        findings.append(checks.teacher_samples(config))
    if eval_prompts:
        findings.append(checks.overlap(train_prompts, eval_prompts))
    if served is not None:
        servers.check_routes(config, train_prompts)
    theirs = teacher_tokenizer(config) if with_teacher else None
    if theirs is not None:
        findings += [
            checks.compare_tokenizers(tokenizer, theirs),
            compare_prompts(config, data.rows, tokenizer, theirs),
        ]
    elif with_teacher:
        findings.append(checks.unknown_tokenizer())
    warnings += checks.enforce(findings)
    if held_out and len(eval_rows) < config.eval.problems:
        warnings.append(f"eval.problems = {config.eval.problems}: data.eval has {len(eval_rows)}, all are used")

    verifier, distinct_key = build_verifier(config, [*train_prompts, *eval_prompts])
    student = load_trainee(config, device, ranks)
    check_setting(config.train.activation_checkpointing, len(decoder_layers(student)))
    fingerprints: dict[str, Any] = {"student": {"weights": weights_digest(student)}}
    add_adapters(student, config.model.lora, seed=config.run.seed)  # before anything takes it apart
    ends = end_token_ids(student, tokenizer, config.chat.stop_token_ids)
    findings = [
        checks.vocabulary_rows([*train_prompts, *eval_prompts], ends, "student", embedding_rows(student)),
        checks.learning_rate(config, student.num_parameters()),
    ]
    autocast = autocast_dtype(config, device)
    sampling = SamplingParams(
        n=config.rollout.n,
        temperature=config.rollout.temperature,
        max_tokens=config.rollout.max_tokens,
        stop_token_ids=ends,
        seed=config.run.seed,
    )
    # With several ranks the student that is trained is sharded, and a plain copy decodes and is published, if anything.
    plain, plain_autocast = student, autocast
    if ranks.world > 1 and (method.sampled_by == "student" or eval_prompts):
        plain, plain_autocast = plain_student(config, device), None
    sampler: Sampler | None = None
    publisher = None
    if sampled is not None:
        sampler = samplers.served_sampler(sampled, tokenizer, head_rows(student))
        publisher = samplers.publisher(config, sampled, plain, tokenizer, plain_autocast)
        undo.callback(publisher.close)
    elif method.sampled_by == "student":
        sampler = _shared(
            LocalSampler(plain, tokenizer, max_rows=config.rollout.max_rows, autocast=plain_autocast), ranks, TRAIN
        )
    scorer: Teacher | None = None
    common = None
    if theirs is not None and config.objective.distill != "sampled":
        common = checks.common_vocabulary(tokenizer, theirs)
    if served is not None:
        finding, judged = judge_ends(config, ends, served_ends(config, theirs), tokenizer, theirs)
        if theirs is not None or finding.level == "FAIL":  # else it was said already that its tokenizer is not known
            findings.append(finding)
        scorer = servers.pool_teacher(config, served, judged)
        fingerprints["teacher"] = {"served": served.fingerprints()}
        if method.sampled_by == "teacher":
            sampler = servers.server_sampler(config, served, tokenizer, head_rows(student))
            temperature = config.teacher.temperature or sampling.temperature
            sampling = replace(sampling, temperature=temperature)
    elif with_teacher:
        assert theirs is not None
        teacher = load_teacher(config, device)
        fingerprints["teacher"] = {"weights": weights_digest(teacher)}
        teacher_ends = end_token_ids(teacher, theirs)
        finding, judged = judge_ends(config, ends, teacher_ends, tokenizer, theirs)
        findings += [
            finding,
            checks.vocabulary_rows(train_prompts, (), "teacher", embedding_rows(teacher)),
        ]
        if method.sampled_by == "teacher":
            sampler = _shared(teacher_sampler(config, teacher, tokenizer, student), ranks, TRAIN)
            sampling = replace(
                sampling,
                temperature=config.teacher.temperature or sampling.temperature,
                stop_token_ids=tuple(sorted({*ends, *teacher_ends})),
            )
        scorer = local_teacher(config, teacher, judged)
    assert sampler is not None, "where the student does not sample, a teacher does"
    warnings += checks.enforce(findings)
    shared = SharedTeacher(scorer, ranks) if isinstance(scorer, LocalTeacher) and ranks.world > 1 else scorer
    pipeline = build_pipeline(config, method, sampler, verifier, shared, schedule)
    evaluator = None
    if eval_prompts:
        judge = sampler
        if sampled is None:
            judge = _shared(eval_sampler(config, plain, tokenizer, plain_autocast), ranks, EVALUATION)
        evaluator = build_evaluator(config, judge, verifier, eval_prompts, ends, distinct_key)
    about = {"train": data.about()} | ({"eval": held_out_data.about()} if held_out_data else {})
    surrogate = surrogate_settings(config, method, sampling, common)
    judged_ends = scorer.ends if isinstance(scorer, LocalTeacher) else None
    ranks.meet(Facts(config.model_dump(mode="json"), surrogate, judged_ends))
    engines = Engines(
        model=plain,
        tokenizer=tokenizer,
        pipeline=pipeline,
        credit=partial(
            assign_credit,
            method=method,
            truncated=config.objective.truncated,
            reward_threshold=config.objective.reward_threshold,
        ),
        schedule=schedule,
        sampling=sampling,
        surrogate=surrogate,
        teacher_head=scorer if isinstance(scorer, LocalTeacher) and config.objective.distill != "sampled" else None,
        reference=frozen_reference(config, student, autocast) if config.objective.reference_kl > 0 else None,
        evaluator=evaluator,
        weights_use_tau=paths_weighted_by_perplexity(method),
        publisher=publisher,
        trainee=None if plain is student else student,
        ranks=ranks,
        data=about,
        fingerprints=fingerprints,
    )
    return Built(engines, method, train_prompts, eval_prompts, verifier, scorer, about, warnings, sampled)


def _shared(sampler: LocalSampler, ranks: Ranks, name: str) -> Sampler:
    return sampler if ranks.world == 1 else SharedSampler(sampler, ranks, name)


def surrogate_settings(
    config: Config, method: Method, sampling: SamplingParams, common_vocabulary: Sequence[int] | None
) -> SurrogateSettings:
    """The update's settings: the config's where given, else what the method was published with."""
    objective = config.objective
    return SurrogateSettings(
        aggregation=objective.aggregation or method.aggregation,
        clip=_bound(objective.clip, method.clip),
        dual_clip=_bound(objective.dual_clip, method.dual_clip),
        correction_cap=objective.sampler_correction_cap,
        sampling_temperature=sampling.temperature,
        student_temperature=student_temperature(config),
        sampled_by=method.sampled_by,
        distill=objective.distill,
        topk=objective.topk,
        reference_kl=objective.reference_kl,
        common_vocabulary=common_vocabulary,
    )


def _bound(given: float | Literal["off"] | None, own: float | None) -> float | None:
    """A clip of the config: its number, none for "off", the method's own where nothing is given."""
    return own if given is None else None if given == "off" else given


def paths_weighted_by_perplexity(method: Method) -> frozenset[str]:
    """The paths ("student", "teacher") on which tau means anything to the method as it is set."""
    if not hasattr(method, "tau"):
        return frozenset()
    return frozenset(p for p in ("student", "teacher") if getattr(method, f"{p}_weight", "uniform") != "uniform")


def build_evaluator(
    config: Config,
    sampler: Sampler,
    verifier: Verifier,
    prompts: Sequence[Prompt],
    ends: tuple[int, ...],
    distinct_key: Callable[[str], str] | None,
) -> Callable[[int, int], Any]:
    """``(step, policy_version) ->`` the rows of eval.jsonl, one for each of ``eval.temperatures``."""
    settings = config.eval

    async def rows(step: int, policy_version: int) -> list[dict[str, Any]]:
        found = []
        for temperature in settings.temperatures:
            params = SamplingParams(
                n=settings.n,
                temperature=temperature,
                max_tokens=eval_max_tokens(config),
                stop_token_ids=ends,
                seed=evaluation_seed(config.run.seed),
                top_p=settings.top_p,
                top_k=settings.top_k,
                repetition_penalty=settings.repetition_penalty,
            )
            result = await evaluate(
                sampler, verifier, prompts, params, step=step, policy_version=policy_version, distinct_key=distinct_key
            )
            found.append(result.to_json())
        return found

    return rows


def build_model_evaluator(config: Config) -> Callable[[int, int], Any]:
    """The evaluator of ``[model]`` as it is: no teacher, no training."""
    device = resolve_device(config.train.device)
    source = eval_source(config)
    if source is None:
        raise ConfigError("[eval] asks for no evaluation", "eval.at_end = true", "set it")
    tokenizer = student_tokenizer(config)
    rows = load_data(config, source, "heldout").rows[: config.eval.problems]
    prompts = render(config, rows, tokenizer, contexts(config, False), max_tokens=eval_max_tokens(config))
    model = load_student(config, device)
    verifier, distinct_key = build_verifier(config, prompts)
    ends = end_token_ids(model, tokenizer, config.chat.stop_token_ids)
    sampler = eval_sampler(config, model, tokenizer, autocast_dtype(config, device))
    return build_evaluator(config, sampler, verifier, prompts, ends, distinct_key)
