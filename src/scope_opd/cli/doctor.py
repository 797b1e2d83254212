"""``scope doctor``: everything that can be known of a run before it starts, as a table with remedies.

Models whose weights are under ``LOAD_LIMIT`` are loaded, larger ones are read by their config alone (on torch's meta
device, so that parameters are counted exactly without memory).

Not covered: speed, whether hub ids that are not in the local cache can be downloaded.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from scope_opd.errors import ScopeError
from scope_opd.words import counted

if TYPE_CHECKING:
    from scope_opd.cli.checks import Finding, Level
    from scope_opd.cli.doctor_servers import Seen
    from scope_opd.cli.launch_asks import Asked
    from scope_opd.config import Config
    from scope_opd.types import Prompt

LOAD_LIMIT = 2_000_000_000
"""Bytes of weight files up to which a model is loaded rather than only described."""

EXAMPLES = """Examples:
  scope doctor
  scope doctor my.toml
  scope doctor my.toml --set rollout.max_tokens=4096
"""


def doctor(
    config: Path | None = None,
    /,
    *,
    overrides: Annotated[list[str] | None, Parameter(name="--set", negative="")] = None,
) -> int:
    """Check environment, config, data and models before a run.

    Each line is ok, warn or FAIL with what to do. Exit code 1 if anything
    failed, 2 if the config itself is wrong. Without a config the embedded
    task is checked.

    Parameters
    ----------
    config
        The TOML file of a run.
    overrides
        TABLE.KEY=VALUE in place of what the file says; may be repeated.
    """
    from scope_opd.cli.launch_asks import asked_of
    from scope_opd.config import load_config

    asked = asked_of(config, overrides or [])
    settings = load_config(config, overrides or []) if asked is None else asked.config()
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    styles = {"ok": "green", "warn": "yellow", "FAIL": "bold red"}
    table = Table(title=f"scope doctor {config or '(the embedded task)'}", title_justify="left", expand=False)
    table.add_column("check", no_wrap=True)
    table.add_column("")
    table.add_column("found", overflow="fold")
    findings = []
    for finding in diagnose(settings, str(config or "defaults"), asked):
        findings.append(finding)
        found = Text(finding.found)
        if finding.remedy and finding.level != "ok":
            found.append(f"\n{finding.remedy}", style="italic")
        table.add_row(finding.subject, Text(finding.level, style=styles[finding.level]), found)
    console.print(table)
    failed = sum(finding.level == "FAIL" for finding in findings)
    warned = sum(finding.level == "warn" for finding in findings)
    console.print(f"{len(findings)} checks: {failed} failed, {warned} with a warning", highlight=False)
    return 1 if failed else 0


def diagnose(config: Config, name: str, asked: Asked | None = None) -> Iterator[Finding]:
    """All findings, in the order in which a run would meet them. A FAIL hides only what cannot be told without it.

    Args:
        config: of the run.
        name: to call it by.
        asked: what scope launch would start; its servers are not there yet, and are not visited.
    """
    from scope_opd.cli import launch_asks
    from scope_opd.cli.checks import Finding
    from scope_opd.cli.doctor_servers import Seen, visit_servers

    yield from environment(config)
    yield Finding("config", "ok", name)
    seen = Seen(config.data.max_prompt_tokens + config.rollout.max_tokens)
    if asked is not None:
        seen.to_start = asked.completed.invented
        yield from launch_asks.findings(asked)
    try:
        yield from settings_and_data(config, seen)
    except ScopeError as error:
        yield _failure("data", error)
    try:
        yield from pair(config, seen)
    except ScopeError as error:
        yield _failure("models", error)
    yield from visit_servers(launch_asks.without(config, seen.to_start), seen)


def environment(config: Config) -> Iterator[Finding]:
    """Versions, device, memory, disk, run folder."""
    import torch
    import transformers

    from scope_opd import __version__
    from scope_opd.cli.checks import Finding, free_disk, free_memory, gigabytes, writable
    from scope_opd.models.loading import resolve_device

    versions = f"scope-opd {__version__}, Python {platform.python_version()}, torch {torch.__version__}"
    yield Finding("environment", "ok", f"{versions}, transformers {transformers.__version__}")
    try:
        device = resolve_device(config.train.device)
        threads = config.train.threads or torch.get_num_threads()
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        shown = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{threads} threads on {cores} cores"
        level: Level = "warn" if device.type == "cpu" and threads > cores else "ok"
        yield Finding("device", level, f"{device}, {shown}", f"set train.threads = {cores}")
    except ScopeError as error:
        yield _failure("device", error)
    memory = free_memory()
    yield Finding("memory", "ok", f"{gigabytes(memory)} free" if memory is not None else "not known on this system")
    folder = Path(config.run.dir)
    disk = free_disk(folder)
    yield Finding("disk", "warn" if disk < 1e9 else "ok", f"{gigabytes(disk)} free for {folder}", "free some space")
    if folder.is_dir() and any(folder.iterdir()):
        yield Finding("run folder", "warn", f"{folder} is not empty", "use --resume, or another run.dir")
    elif not writable(folder):
        yield Finding("run folder", "FAIL", f"{folder} cannot be written", "choose another run.dir")
    else:
        yield Finding("run folder", "ok", f"{folder} is free")


def settings_and_data(config: Config, seen: Seen) -> Iterator[Finding]:
    """Method, data, prompts and their lengths; what later checks need goes into ``seen``."""
    from scope_opd.cli import checks, inputs
    from scope_opd.cli.checks import Finding
    from scope_opd.cli.early import eval_source

    method = inputs.build_configured_method(config)
    with_teacher = inputs.needs_teacher(config, method)
    about = "teacher samples" if method.sampled_by == "teacher" else "teacher scores" if with_teacher else "no teacher"
    yield Finding("method", "ok", f"{config.objective.method}, {about}")
    yield checks.temperature(config)
    yield checks.preset(config)
    if method.sampled_by == "teacher":
        yield checks.teacher_samples(config)
    data = inputs.load_data(config, config.data.train, "train")
    rows, warnings = data.rows, data.warnings
    characters = sorted(len(row.problem) for row in rows)
    middle = characters[len(characters) // 2]
    size = counted(len(rows), "row")
    yield Finding("data.train", "ok", f"{size}, {middle} characters at the median, {characters[-1]} at most")
    if len(rows) < config.train.prompts_per_step:
        yield Finding(
            "data.train", "FAIL", f"{size} and train.prompts_per_step = {config.train.prompts_per_step}",
            "add rows or lower it",
        )  # fmt: skip
    tokenizer = inputs.student_tokenizer(config)
    limits = inputs.contexts(config, with_teacher and not config.teacher.served)
    prompts = inputs.render(config, rows, tokenizer, limits, max_tokens=config.rollout.max_tokens, warnings=warnings)
    yield from (Finding("data.train", "warn", line) for line in warnings)
    lengths = sorted(len(prompt.token_ids) for prompt in prompts)
    needed = lengths[-1] + config.rollout.max_tokens
    seen.tokens, seen.rows, seen.prompts = needed, list(rows), list(prompts)
    shown = ", ".join(f"{name} {length or 'unlimited'}" for name, length in limits.items())
    span = f"prompts of {lengths[0]} to {lengths[-1]} tokens, with max_tokens up to {needed}"
    yield Finding("lengths", "ok", f"{span}; contexts: {shown}")
    yield Finding("first prompt", "ok", inputs.shown_prompt(prompts[0].text))
    judged = list(prompts)
    held_out = eval_source(config)
    if held_out is not None:
        eval_data = inputs.load_data(config, held_out, "heldout")
        eval_rows, warnings = eval_data.rows[: config.eval.problems], eval_data.warnings
        limit, max_tokens = {"student": limits["student"]}, inputs.eval_max_tokens(config)
        eval_prompts = inputs.render(config, eval_rows, tokenizer, limit, max_tokens=max_tokens, warnings=warnings)
        seen.eval_tokens = max(len(prompt.token_ids) for prompt in eval_prompts) + max_tokens
        yield from (Finding("data.eval", "warn", line) for line in warnings)
        yield checks.overlap(prompts, eval_prompts)
        judged += eval_prompts
    yield verifier(config, judged)


def verifier(config: Config, prompts: Sequence[Prompt]) -> Finding:
    """Whether the run's verifier refuses an answer, or lacks the sandbox that code needs."""
    from scope_opd.cli import inputs
    from scope_opd.cli.checks import Finding
    from scope_opd.gold import is_code

    try:
        built, _ = inputs.build_verifier(config, prompts)
    except ScopeError as error:
        return _failure("verifier", error)
    if close := getattr(built, "close", None):
        close()
    code = sum(is_code(prompt.answer) for prompt in prompts)
    return Finding("verifier", "ok", f"{config.data.verifier}; {code} of {len(prompts)} answers are code")


def pair(config: Config, seen: Seen) -> Iterator[Finding]:
    """Student and teacher: folders, tokenizers, end tokens, chat templates, memory for the longest sequences."""
    from scope_opd.cli import checks, inputs, models, servers
    from scope_opd.cli.checks import Finding, free_memory, gigabytes
    from scope_opd.cli.ends import judge_ends, served_ends
    from scope_opd.cli.templates import compare_prompts
    from scope_opd.models.checkpointing import check_setting
    from scope_opd.models.loading import end_token_ids, resolve_device
    from scope_opd.models.watch import decoder_layers

    method = inputs.build_configured_method(config)
    with_teacher = inputs.needs_teacher(config, method)
    device = resolve_device(config.train.device)
    student, loaded = _described(config.model, lambda: models.load_student(config, device))
    seen.student, note = (student if loaded else None), _note(loaded)
    parameters = sum(parameter.numel() for parameter in student.parameters())
    yield Finding("student", "ok", f"{config.model.path}: {_shape(student)}, {note}")
    yield checks.learning_rate(config, parameters)
    try:
        check_setting(config.train.activation_checkpointing, len(decoder_layers(student)))
    except ScopeError as error:
        yield _failure("checkpointing", error)
    tokenizer = inputs.student_tokenizer(config)
    ends = seen.ends = end_token_ids(student, tokenizer, config.chat.stop_token_ids)
    shapes: dict[str, tuple[int, Any]] = {"student": (parameters, student.config.get_text_config())}
    if with_teacher and config.teacher.served:
        urls = [*config.teacher.base_urls]
        urls += [url for route in config.teacher.routes.values() for url in route.base_urls]
        if "teachers" in seen.to_start:
            urls[: len(config.teacher.base_urls)] = [f"those that scope launch starts, of {config.teacher.path}"]
        yield Finding("teacher", "ok", f"behind servers: {', '.join(urls)}")
        if method.needs_teacher(True) or method.needs_teacher(False):
            servers.check_temperature(config, models.teacher_temperature(config))
        served = inputs.teacher_tokenizer(config)
        yield checks.unknown_tokenizer() if served is None else checks.compare_tokenizers(tokenizer, served)
        yield judge_ends(config, ends, served_ends(config, served), tokenizer, served)[0]
        if served is not None and seen.rows:
            yield compare_prompts(config, seen.rows, tokenizer, served)
    elif with_teacher:
        teacher, loaded = _described(config.teacher, lambda: models.load_teacher(config, device))
        seen.teacher = teacher if loaded else None
        yield Finding("teacher", "ok", f"{config.teacher.path}: {_shape(teacher)}, {_note(loaded)}")
        theirs = inputs.teacher_tokenizer(config)
        assert theirs is not None
        yield checks.compare_tokenizers(tokenizer, theirs)
        yield judge_ends(config, ends, end_token_ids(teacher, theirs), tokenizer, theirs)[0]
        if seen.rows:
            yield compare_prompts(config, seen.rows, tokenizer, theirs)
        shapes["teacher"] = (sum(p.numel() for p in teacher.parameters()), teacher.config.get_text_config())
    else:
        yield judge_ends(config, ends, ends, tokenizer, tokenizer)[0]
    size, parts = checks.estimated_memory(config, shapes, seen.tokens, gpu=device.type == "cuda")
    available = free_memory() if device.type == "cpu" else _gpu_memory(device)
    level: Level = "warn" if available is not None and size > 0.8 * available else "ok"
    there = f" of {gigabytes(available)} free" if available is not None else ""
    yield Finding(
        "memory estimate", level, f"about {gigabytes(size)}{there}: {parts} (activations not counted)",
        "lower rollout.max_rows or data.max_prompt_tokens, use param_dtype or teacher.dtype bfloat16, a smaller model",
    )  # fmt: skip


def _described(table: Any, load: Any) -> tuple[Any, bool]:
    """A model and whether it is loaded; where its weights are large it is built on the meta device from its config."""
    import torch
    from transformers import AutoModelForCausalLM

    from scope_opd.cli.inputs import model_config

    if is_small(table.path):
        return load(), True
    config = model_config(table.path, table.revision, table.trust_remote_code)
    if config is None:
        return load(), True
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=table.trust_remote_code)
    return model, False


def is_small(path: str) -> bool:
    """Whether a model is in a folder, with so few bytes of weights that loading it is no burden."""
    from scope_opd.models.places import resolve_path

    folder = Path(resolve_path(path))
    return folder.is_dir() and sum(file.stat().st_size for file in folder.glob("*.safetensors")) <= LOAD_LIMIT


def _note(loaded: bool) -> str:
    return "weights loaded" if loaded else "described by its config, weights not read"


def _shape(model: Any) -> str:
    from scope_opd.models.loading import context_length

    config = model.config.get_text_config()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    context = context_length(config) or "none stated"
    return f"{type(model).__name__}, {parameters / 1e6:.3g}M parameters, {config.vocab_size} rows, context {context}"


def _gpu_memory(device: Any) -> int | None:
    import torch

    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


def _failure(subject: str, error: ScopeError) -> Finding:
    from scope_opd.cli.checks import Finding

    found = error.found + (f"; expected {error.expected}" if error.expected else "")
    return Finding(subject, "FAIL", found, error.remedy)
