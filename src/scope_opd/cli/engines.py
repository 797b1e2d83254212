"""From a config to engines: the only place that knows which class does which job.

``build_engines`` serves a training run, ``build_model_evaluator`` anything that only samples and judges. Whatever can
be checked cheaply is checked before weights are loaded.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

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
from scope_opd.cli.pipelines import build_pipeline, steps_ahead
from scope_opd.cli.ranks import EVALUATION, TRAIN, Facts, rank_device
from scope_opd.cli.templates import compare_prompts
from scope_opd.config import Config
from scope_opd.credit import assign_credit
from scope_opd.data.prompts import PromptSchedule
from scope_opd.errors import ConfigError
from scope_opd.evaluate.run import evaluate, evaluation_seed
from scope_opd.models.adapters import add_adapters
from scope_opd.models.fingerprint import weights_digest
from scope_opd.models.head import HeadView
from scope_opd.models.loading import end_token_ids, load_model, resolve_device
from scope_opd.models.packed_attention import enable
from scope_opd.models.rows import Rows, rows_logprobs
from scope_opd.objective.methods import Method
from scope_opd.ranks import Ranks
from scope_opd.rollout.local import LocalSampler
from scope_opd.rollout.samplers import Samplers
from scope_opd.rollout.shared import SharedSampler
from scope_opd.teacher.ends import EndTokens
from scope_opd.teacher.local import LocalTeacher
from scope_opd.teacher.shared import SharedTeacher
from scope_opd.train.engines import Engines, SurrogateSettings, TokenFunction
from scope_opd.types import Prompt, Sampler, SamplingParams, Teacher, Verifier

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


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
    student = load_student(config, device)
    fingerprints: dict[str, Any] = {"student": {"weights": weights_digest(student)}}
    add_adapters(student, config.model.lora, seed=config.run.seed)  # before anything takes it apart
    ends = end_token_ids(student, tokenizer, config.chat.stop_token_ids)
    findings = [
        checks.vocabulary_rows([*train_prompts, *eval_prompts], ends, "student", _rows(student)),
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
    # With several ranks the student that is trained is sharded, and a plain copy decodes and is published.
    plain, plain_autocast = (student, autocast) if ranks.world == 1 else (plain_student(config, device), None)
    sampler: Sampler
    publisher = None
    if sampled is not None:
        sampler = samplers.served_sampler(sampled, tokenizer, _head_rows(student))
        publisher = samplers.publisher(config, sampled, plain, tokenizer, plain_autocast)
        undo.callback(publisher.close)
    else:
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
            sampler = servers.server_sampler(config, served, tokenizer, _head_rows(student))
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
            checks.vocabulary_rows(train_prompts, (), "teacher", _rows(teacher)),
        ]
        if method.sampled_by == "teacher":
            sampler = _shared(teacher_sampler(config, teacher, tokenizer, student), ranks, TRAIN)
            sampling = replace(
                sampling,
                temperature=config.teacher.temperature or sampling.temperature,
                stop_token_ids=tuple(sorted({*ends, *teacher_ends})),
            )
        scorer = local_teacher(config, teacher, judged)
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


def autocast_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """What the student computes in where it is not its weights' own: bfloat16 for float32 weights on a GPU."""
    return torch.bfloat16 if device.type == "cuda" and config.train.param_dtype == "float32" else None


def load_student(config: Config, device: torch.device, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The student in ``train.param_dtype`` on its device."""
    model = config.model
    return load_model(
        model.path,
        revision=model.revision,
        dtype=dtype or getattr(torch, config.train.param_dtype),
        device=device,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
    )


def plain_student(config: Config, device: torch.device) -> PreTrainedModel:
    """With several ranks: the copy that decodes and is published, in the dtype that the student computes in."""
    computes = autocast_dtype(config, device)
    if computes is None or (config.rollout.served and config.serving.student.dtype == "float32"):
        return load_student(config, device)
    return load_student(config, device, computes)


def local_teacher(config: Config, teacher: PreTrainedModel, ends: EndTokens | None) -> LocalTeacher:
    """The teacher that scores in this process."""
    return LocalTeacher(
        teacher,
        temperature=teacher_temperature(config),
        max_tokens_per_batch=config.teacher.max_tokens_per_batch,
        log_prob_floor=config.teacher.log_prob_floor,
        ends=ends,
    )


def teacher_sampler(
    config: Config, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, student: PreTrainedModel
) -> LocalSampler:
    """Draws the teacher's responses, for ``kd``."""
    # A teacher's head may have more rows: what the student has no row for it could not be trained on.
    return LocalSampler(teacher, tokenizer, max_rows=config.rollout.max_rows, vocabulary=_head_rows(student))


def _shared(sampler: LocalSampler, ranks: Ranks, name: str) -> Sampler:
    return sampler if ranks.world == 1 else SharedSampler(sampler, ranks, name)


def load_teacher(config: Config, device: torch.device) -> PreTrainedModel:
    """The teacher, frozen, in ``teacher.dtype``."""
    teacher = config.teacher
    dtype = teacher.dtype if teacher.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    loaded = load_model(
        teacher.path,
        revision=teacher.revision,
        dtype=getattr(torch, dtype),
        device=device,
        attn_implementation=teacher.attn_implementation,
        trust_remote_code=teacher.trust_remote_code,
    )
    loaded.requires_grad_(False)
    return loaded


def teacher_temperature(config: Config) -> float:
    """What the teacher's logits are divided by: the sampling temperature if ``matched``, else 1."""
    return config.rollout.temperature if config.objective.temperature == "matched" else 1.0


def student_temperature(config: Config) -> float:
    """What the student's logits are divided by in the objective."""
    return 1.0 if config.objective.temperature == "raw" else config.rollout.temperature


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


def frozen_reference(config: Config, student: PreTrainedModel, autocast: torch.dtype | None) -> TokenFunction:
    """Log-probs of the student as it was loaded: resuming loads the same weights before the checkpoint's."""
    view = HeadView(copy.deepcopy(student).requires_grad_(False))
    enable(view.model)  # it takes packs where the student does
    temperature = student_temperature(config)

    def logprobs(rows: Rows, positions: Tensor) -> Tensor:
        precision: Any = contextlib.nullcontext()
        if autocast is not None:
            precision = torch.autocast(rows.input_ids.device.type, dtype=autocast)
        with torch.no_grad(), precision:
            return rows_logprobs(view, rows, positions, temperature, entropy=False).logprobs

    return logprobs


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


def eval_sampler(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, autocast: torch.dtype | None
) -> LocalSampler:
    """Decodes no more rows at once than training does, so that what trains also evaluates in the same memory."""
    rows = config.rollout.max_rows or config.train.prompts_per_step * config.rollout.n
    return LocalSampler(model, tokenizer, max_rows=rows, autocast=autocast)


def _head_rows(model: PreTrainedModel) -> int:
    """Ids that a model can both read and predict."""
    head: Any = model.get_output_embeddings()
    return min(_rows(model), int(head.weight.shape[0])) if head is not None else _rows(model)


def _rows(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.num_embeddings)
