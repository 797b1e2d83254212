"""From a config to the memory of its ranks and servers and the cost of a step. Nothing is loaded, nothing computed.

Not covered: time, apart from FLOPs; host memory; a run in which the teacher samples (``kd``); the
teacher's part in the update (``objective.distill`` other than "sampled").
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from scope_opd.config import Config
from scope_opd.errors import ConfigError

if TYPE_CHECKING:
    from scope_opd.models.footprint import Shape
    from scope_opd.models.memory import Layout, Server, Stage, Student, Updates

CEILING = 1 << 20
"""Tokens beyond which no micro-batch is looked for."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What is there.

    Attributes:
        ranks: GPUs that train.
        memory: bytes of one.
        reserve: bytes of it that hold no tensor: CUDA's context, workspaces, NCCL, an allocator's slack.
        machine: GPUs of one machine, among which train.shard = "hybrid" deals the state.
    """

    ranks: int
    memory: int
    reserve: int
    machine: int = 8

    def layout(self, config: Config) -> Layout:
        """How the ranks of a run lie on it."""
        from scope_opd.models.memory import Layout

        return Layout(self.ranks, min(self.ranks, self.machine) if config.train.shard == "hybrid" else self.ranks)


@dataclass(slots=True)
class Plan:
    """What ``plan`` finds.

    Attributes:
        stages: of a step, on one rank.
        servers: by name: how many, GPUs each, memory.
        updates: the update by micro-batch.
        microbatch: tokens of the largest micro-batch of this config: the budget, or its longest sequence.
        largest_microbatch, largest_response: tokens that would fit; ``bound`` says what limits the response.
        tokens, flops: of a step.
        failures, warnings: lines.
    """

    stages: list[Stage] = field(default_factory=list)
    servers: dict[str, tuple[int, int, Server]] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    microbatch: int = 0
    largest_microbatch: int = 0
    largest_response: int = 0
    bound: str = ""
    tokens: dict[str, int] = field(default_factory=dict)
    flops: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def largest(self) -> Stage:
        """The stage that needs most of a rank."""
        return max(self.stages, key=lambda stage: stage.total)


def plan(config: Config, machine: Machine, *, mean_response: int | None = None) -> Plan:
    """Plan a run.

    Args:
        config: of the run.
        machine: what it shall run on.
        mean_response: tokens of a response for the cost of a step; None: all of full length.

    Raises:
        ConfigError: a model's config cannot be found.
    """
    from scope_opd.cli.inputs import build_configured_method, needs_teacher
    from scope_opd.cli.plan_servers import plan_servers
    from scope_opd.models.checkpointing import check_setting
    from scope_opd.models.footprint import shape_of
    from scope_opd.models.loading import context_length
    from scope_opd.models.memory import Updates

    found = Plan()
    layout = machine.layout(config)
    student = _student(config, layout.shards)
    found.shapes["student"] = student.shape
    check_setting(config.train.activation_checkpointing, student.shape.layers)
    method = build_configured_method(config)
    teacher = _teacher_config(config, found) if needs_teacher(config, method) else None
    if teacher is not None:
        found.shapes["teacher"] = shape_of(teacher)
    if method.sampled_by == "teacher":
        found.warnings.append(f"objective.method = {config.objective.method!r}: sampling by the teacher is not planned")
    if config.objective.distill != "sampled":
        found.warnings.append(
            f"objective.distill = {config.objective.distill!r}: the teacher's part in the update is not planned"
        )
    if (config.model.attn_implementation or "sdpa") == "eager":
        found.warnings.append("model.attn_implementation = 'eager' keeps attention scores, which are not planned")
    local = teacher is not None and not config.teacher.served
    frozen: dict[str, int] = {}
    if local:
        frozen["teacher's weights"] = found.shapes["teacher"].parameters * _teacher_dtype(config).itemsize
    if config.objective.reference_kl > 0:
        frozen["reference's weights"] = student.weights

    limits = {"student's context": context_length(student.config)}
    if teacher is not None:
        limits["teacher's context"] = context_length(teacher)
    config = _within(config, found, limits)
    longest = config.data.max_prompt_tokens + config.rollout.max_tokens
    budget = config.train.max_tokens_per_microbatch
    prompts = -(-config.train.prompts_per_step // config.train.minibatches)
    share = -(-prompts * config.rollout.n * longest // machine.ranks)
    found.microbatch = min(max(budget, longest), max(share, longest))
    if budget < longest:
        found.warnings.append(
            f"train.max_tokens_per_microbatch = {budget} is below the longest sequence of {longest} tokens: such a one "
            f"is a micro-batch of its own, and that is what is planned"
        )
    updates = Updates(student, layout, frozen, reference=config.objective.reference_kl > 0)
    _stages(config, machine, found, student, layout, teacher, frozen, updates)
    plan_servers(config, machine, found, student, teacher)
    room = machine.memory - machine.reserve
    for stage in found.stages:
        if stage.total > room:
            found.failures.append(
                f"{stage.name} needs {gb(stage.total)} of a rank's {gb(room)} ({gb(machine.memory)} less a reserve of "
                f"{gb(machine.reserve)})"
            )
    _largest(config, machine, found, student, layout, frozen, updates, limits)
    _cost(config, found, student, teacher is not None, mean_response or config.rollout.max_tokens)
    return found


def _within(config: Config, found: Plan, limits: dict[str, int | None]) -> Config:
    """The config with prompts no longer than the contexts leave room for: a run refuses longer ones."""
    response, prompt = config.rollout.max_tokens, config.data.max_prompt_tokens
    for name, limit in limits.items():
        if limit is None or prompt + response <= limit:
            continue
        if response >= limit:
            found.failures.append(f"rollout.max_tokens = {response} and the {name} has {limit} tokens")
            continue
        prompt = limit - response
        found.warnings.append(
            f"data.max_prompt_tokens = {config.data.max_prompt_tokens} with responses of {response} is beyond the "
            f"{name} of {limit}: planned with prompts of {prompt}"
        )
    return config.model_copy(update={"data": config.data.model_copy(update={"max_prompt_tokens": prompt})})


def gb(size: float) -> str:
    """Bytes as GB of 1e9."""
    return f"{size / 1e9:.1f} GB"


def read_config(path: str, revision: str | None, trust_remote_code: bool, setting: str) -> Any:
    """A model's config: of a folder (config.json is enough), of the local cache, as published, or from the hub.

    Raises:
        ConfigError: none of these.
    """
    from pathlib import Path

    from transformers import AutoConfig

    from scope_opd.models.places import resolve_path
    from scope_opd.models.shapes import published_config

    target = resolve_path(path)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if not Path(target).is_dir():
        options["revision"] = revision
    for attempt in (
        partial(AutoConfig.from_pretrained, target, local_files_only=True, **options),
        partial(published_config, path),
        partial(AutoConfig.from_pretrained, target, **options),
    ):
        try:
            config = attempt()
        except (OSError, ValueError, KeyError):
            continue
        if config is not None:
            return config
    raise ConfigError(
        f"{setting} = {path!r}: no such folder here, and no config.json of that name from cache or hub",
        "a folder with config.json, or a hub id",
        f"fetch that one file (hf download {path} config.json --local-dir DIR) and add --set {setting}=DIR",
    )  # fmt: skip


def _student(config: Config, shards: int = 1) -> Student:
    import torch

    from scope_opd.models.footprint import shape_of
    from scope_opd.models.memory import Student

    model, train = config.model, config.train
    described = read_config(model.path, model.revision, model.trust_remote_code, "model.path")
    gpu = train.device != "cpu"
    raw = config.objective.temperature == "raw"
    sampled = config.rollout.temperature
    return Student(
        described,
        shape_of(described, model.lora, shards),
        dtype=getattr(torch, train.param_dtype),
        autocast=torch.bfloat16 if gpu and train.param_dtype == "float32" else None,
        optimizer=train.optimizer,
        # On a CPU nothing is anywhere else.
        offload=train.offload if gpu else "off",
        lora=model.lora,
        checkpointing="full"
        if train.activation_checkpointing == "offload" and not gpu
        else train.activation_checkpointing,
        packed=train.packing and model.attn_implementation != "eager",
        temperature=1.0 if raw else sampled,
        extra_temperature=sampled if raw and sampled != 1.0 else None,
    )


def _teacher_config(config: Config, found: Plan) -> Any:
    from scope_opd.cli.inputs import served_teacher_folder

    teacher = config.teacher
    path = served_teacher_folder(config) if teacher.served else teacher.path
    if teacher.served and teacher.path != type(teacher)().path:
        path = teacher.path
    if path is None:
        found.warnings.append("the served teacher's model is not known: set teacher.path to plan its servers")
        return None
    return read_config(path, teacher.revision, teacher.trust_remote_code, "teacher.path")


def _teacher_dtype(config: Config) -> Any:
    import torch

    name = config.teacher.dtype
    return getattr(torch, name if name != "auto" else "float32" if config.train.device == "cpu" else "bfloat16")


def _stages(
    config: Config,
    machine: Machine,
    found: Plan,
    student: Student,
    layout: Layout,
    teacher: Any,
    frozen: dict[str, int],
    updates: Updates,
) -> None:
    from scope_opd.models.memory import scoring_stage

    if not config.rollout.served:
        found.stages.append(_generation(config, machine, student, layout, frozen, config.rollout.max_tokens))
    if teacher is not None and not config.teacher.served:
        longest = config.data.max_prompt_tokens + config.rollout.max_tokens
        tokens = max(config.teacher.max_tokens_per_batch, longest)
        found.stages.append(scoring_stage(student, layout, teacher, _teacher_dtype(config), tokens, frozen))
    found.stages.append(updates.stage(found.microbatch))


def _generation(
    config: Config, machine: Machine, student: Student, layout: Layout, frozen: dict[str, int], max_tokens: int
) -> Stage:
    from scope_opd.models.memory import generation_stage, prefill_bytes

    n, length = config.rollout.n, config.data.max_prompt_tokens
    rows = -(-config.train.prompts_per_step * n // machine.ranks)
    rows = min(rows, config.rollout.max_rows or rows)
    prompts = -(-rows // n)
    return generation_stage(
        student, layout, rows=rows, prompts=prompts, prompt_tokens=length, max_tokens=max_tokens,
        reading=prefill_bytes(student, prompts, length), frozen=frozen,
    )  # fmt: skip


def _largest(
    config: Config,
    machine: Machine,
    found: Plan,
    student: Student,
    layout: Layout,
    frozen: dict[str, int],
    updates: Updates,
    limits: dict[str, int | None],
) -> None:
    from scope_opd.models.memory import largest

    room = machine.memory - machine.reserve
    found.largest_microbatch = largest(
        lambda tokens: updates.stage(tokens).total, room, CEILING, start=found.microbatch
    )
    prompt = config.data.max_prompt_tokens
    responses = {"the update": found.largest_microbatch - prompt}
    responses |= {f"the {name}": limit - prompt for name, limit in limits.items() if limit is not None}
    if not config.rollout.served:
        ceiling = max(min(responses.values()), 0)
        shortest = _generation(config, machine, student, layout, frozen, 1).total
        longer = _generation(config, machine, student, layout, frozen, 1 + ceiling).total
        if longer > room:
            slope = max((longer - shortest) / max(ceiling, 1), 1e-9)
            responses["generation"] = int((room - shortest) // slope) if shortest <= room else 0
    for name, (_, _, server) in found.servers.items():
        per_token = server.sequence / (prompt + config.rollout.max_tokens + 1)
        responses[f"the {name} server's cache"] = int(max(server.room, 0) / per_token) - prompt - 1
    found.bound, least = min(responses.items(), key=lambda item: item[1])
    found.largest_response = max(least, 0)


def _cost(config: Config, found: Plan, student: Student, taught: bool, response: int) -> None:
    from scope_opd.models.checkpointing import recomputed_share
    from scope_opd.models.footprint import forward_flops

    rollouts = config.train.prompts_per_step * config.rollout.n
    length = config.data.max_prompt_tokens + response
    found.tokens = {
        "generated": rollouts * response,
        "scored": rollouts * response if taught else 0,
        "trained": rollouts * response,
        "with prompts": rollouts * length,
    }
    passes = config.train.updates_per_batch
    recorded = rollouts * forward_flops(student.shape, length) if passes * config.train.minibatches > 1 else 0.0
    once = rollouts * forward_flops(student.shape, length)
    found.flops = {
        "generation": once,
        "scoring": rollouts * forward_flops(found.shapes["teacher"], length) if taught else 0.0,
        # Frozen weights need no gradient: of a backward pass's two products one is left.
        "update": (2 if student.shape.adapters else 3) * passes * once + recorded,
        "recomputation": passes * once * recomputed_share(student.shape.layers, student.checkpointing),
    }


def hours(found: Plan, ranks: int, tflops: float, utilisation: float) -> dict[str, float]:
    """Hours of a step's scoring and update at a share of the GPUs' arithmetic; generation is bound by memory."""
    count, each, _ = found.servers.get("teacher", (ranks, 1, None))
    gpus = {"scoring": count * each, "update": ranks}
    work = {"scoring": found.flops["scoring"], "update": found.flops["update"] + found.flops["recomputation"]}
    return {name: work[name] / (gpus[name] * tflops * 1e12 * utilisation) / 3600 for name in work}
