"""``scope eval --model``: from a config and benchmark names to prompts, a verifier and a sampler, in this process or
behind servers.

Order: benchmarks, verifiers, tokenizer and prompts, and only where samples are missing the weights or the servers.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from scope_opd.cli.eval_command import Prepared
from scope_opd.cli.eval_servers import Served, open_served_sampler
from scope_opd.cli.eval_settings import verify_options
from scope_opd.cli.identity import model_identity, served_identity, template_sha256
from scope_opd.cli.inputs import model_config, shown_prompt, student_tokenizer
from scope_opd.config import Config
from scope_opd.data.prompts import render_prompts
from scope_opd.data.rows import Columns, Row
from scope_opd.errors import DataError, RunFailed
from scope_opd.evaluate.benchmarks import CODE_SUFFIX, Benchmark
from scope_opd.evaluate.loading import Loaded, load_benchmark
from scope_opd.evaluate.run import evaluation_seed
from scope_opd.evaluate.session import Task, prompt_id
from scope_opd.gold import is_code
from scope_opd.models.loading import context_length, end_token_ids, load_model, resolve_device
from scope_opd.rollout.local import LocalSampler
from scope_opd.types import Prompt, Sampler, SamplingParams, Verifier
from scope_opd.verify.answers import AnswerVerifier, build_answer_verifier
from scope_opd.words import counted
from scope_opd.zoo.verifier import RunningSumVerifier

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NO_LIMIT = 1 << 30


def from_model(
    config: Config,
    named: Sequence[tuple[Benchmark, str | None]],
    *,
    suffix: str | None,
    preset: str | None,
    dtype: str,
    lower_max_tokens: bool = False,
    fix_double_braces: bool = False,
    columns: Columns | None = None,
    served: Served | None = None,
) -> Prepared:
    """Everything that an evaluation of ``config.model`` needs, without its weights.

    Args:
        config: the model, its prompts, sampling and judging.
        named: benchmarks and their places, from ``parse_benchmarks``.
        suffix: behind each problem; None: the benchmark's own.
        preset: recorded.
        dtype: of the weights, or "auto".
        lower_max_tokens: lower ``max_tokens`` to what the model's context leaves, and say so, in place of an error.
        fix_double_braces: mend ``\\boxed{{}}`` in prompts.
        columns: what sets of the user's own call problem, answer and id.
        served: servers that sample; of ``config.model`` only the tokenizer is read then.

    Raises:
        ScopeError: anything that is wrong with benchmarks, data, prompts or settings.
    """
    limit = config.eval.problems if "problems" in config.eval.model_fields_set else None
    loaded = [
        load_benchmark(*each, problems=limit, fix_double_braces=fix_double_braces, columns=columns) for each in named
    ]
    device = resolve_device(config.train.device)
    weights = dtype if dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    identity = served_identity(config) if served is not None else model_identity(config)
    tokenizer = student_tokenizer(config)
    found = model_config(config.model.path, config.model.revision, config.model.trust_remote_code)
    context = None if found is None else context_length(found)
    answers = None
    if any(each.benchmark.verifier == "answers" for each in loaded):
        answers = build_answer_verifier(config.verify)
    try:
        tasks = [_task(config, each, tokenizer, context, answers, suffix, lower_max_tokens) for each in loaded]
        if answers is not None:
            answers.prepare(prompt for task in tasks if task.verifier is answers for prompt in task.prompts)
    except BaseException:
        if answers is not None:
            answers.close()
        raise
    sampling = {
        "n": config.eval.n,
        "temperature": config.eval.temperatures[0],
        "top_p": config.eval.top_p,
        "top_k": config.eval.top_k,
        "repetition_penalty": config.eval.repetition_penalty,
        "seed": config.run.seed,
    }
    settings = {
        "source": _source(config, served) | identity,
        "preset": preset,
        "sampling": sampling,
        "prompt": {
            "template": config.chat.template,
            "template_sha256": template_sha256(config),
            "system": config.chat.system,
            "kwargs": config.chat.kwargs,
            "stop_token_ids": config.chat.stop_token_ids,
        },
        "verifier": verify_options(config.verify),
        "engine": {"kind": "servers", "max_rows": config.rollout.max_rows}
        if served is not None
        else {
            "kind": "in-process",
            "device": device.type,
            "dtype": weights,
            "max_rows": config.rollout.max_rows,
            "attn_implementation": config.model.attn_implementation,
        },
        "benchmarks": {
            each.benchmark.name: {
                **{key: each.data[key] for key in ("source", "sha256", "revision", "content_sha256")},
                "problems": len(each.rows),
                "suffix": _suffix(each, suffix),
                "max_tokens": task.params.max_tokens,
                "verifier": each.benchmark.verifier,
            }
            for each, task in zip(loaded, tasks, strict=True)
        },
    }
    lines = [_described(each) for each in loaded]
    lines += [f"note: {note}" for each in loaded for note in each.notes]
    lines += [
        f"note: {task.name}: at most {task.params.max_tokens} response tokens in place of {config.eval.max_tokens}, "
        f"all that the context of {config.model.path} ({context}) leaves behind the longest prompt"
        for task in tasks
        if config.eval.max_tokens is not None and task.params.max_tokens < config.eval.max_tokens
    ]
    lines.append(f"first prompt: {shown_prompt(tasks[0].prompts[0].text)}")

    opened = contextlib.ExitStack()
    if answers is not None:
        opened.callback(answers.close)

    def open_sampler() -> Sampler:
        if served is None:
            return _open_sampler(config, tasks, tokenizer, weights, device)
        sampler = open_served_sampler(config, served, tokenizer)
        opened.callback(sampler.close)
        return sampler

    return Prepared(
        tasks, settings, {each.benchmark.name: each.data for each in loaded}, open_sampler, opened.close, lines
    )


def _source(config: Config, served: Served | None) -> dict[str, Any]:
    model = config.model
    if served is None:
        return {"kind": "model", "model": model.path, "revision": model.revision}
    return {
        "kind": "servers", "model": served.model, "tokenizer": model.tokenizer or model.path,
        "revision": model.revision,
    }  # fmt: skip


def _task(
    config: Config,
    loaded: Loaded,
    tokenizer: PreTrainedTokenizerBase,
    context: int | None,
    answers: AnswerVerifier | None,
    suffix: str | None,
    lower_max_tokens: bool,
) -> Task:
    benchmark = loaded.benchmark
    chat = config.chat.model_copy(update={"suffix": _suffix(loaded, suffix)})
    max_tokens = config.eval.max_tokens or benchmark.max_tokens
    prompts = render_prompts(loaded.rows, tokenizer, chat, max_prompt_tokens=_NO_LIMIT)
    if context is not None:
        longest = max(len(prompt.token_ids) for prompt in prompts)
        if lower_max_tokens and longest < context:
            max_tokens = min(max_tokens, context - longest)
        _check_room(prompts, loaded.rows, max_tokens, context, config.model.path)
    named = [
        Prompt(prompt_id(benchmark.name, p.id), p.problem, p.answer, p.token_ids, p.text, p.fields) for p in prompts
    ]
    params = SamplingParams(
        n=config.eval.n,
        temperature=config.eval.temperatures[0],
        max_tokens=max_tokens,
        stop_token_ids=(),
        seed=evaluation_seed(config.run.seed),
        top_p=config.eval.top_p,
        top_k=config.eval.top_k,
        repetition_penalty=config.eval.repetition_penalty,
    )
    verifier: Verifier = RunningSumVerifier() if benchmark.verifier == "zoo" else _given(answers)
    counts = {prompt.id: config.eval.n for prompt in named}
    rows = config.rollout.max_rows or 1
    return Task(benchmark.name, named, counts, params, verifier, batch_problems=max(1, rows // config.eval.n))


def _check_room(prompts: Sequence[Prompt], rows: Sequence[Row], max_tokens: int, context: int, model: str) -> None:
    longest, row = max(zip(prompts, rows, strict=True), key=lambda pair: len(pair[0].token_ids))
    length = len(longest.token_ids)
    if length + max_tokens <= context:
        return
    raise DataError(
        f"{row.where} (id {row.id!r}): a prompt of {length} tokens and --max-tokens = {max_tokens}",
        f"together at most {context}, the context of {model}",
        f"give --max-tokens {context - length}" if length < context else "drop the problem, or take another model",
    )


def _suffix(loaded: Loaded, given: str | None) -> str:
    """What was asked for, else the benchmark's own; nothing behind messages, which bring their instructions."""
    if given is not None:
        return given
    if any(row.messages for row in loaded.rows):
        return ""
    return CODE_SUFFIX if all(is_code(row.answer) for row in loaded.rows) else loaded.benchmark.suffix


def _described(loaded: Loaded) -> str:
    data = loaded.data
    line = f"{loaded.benchmark.name}: {counted(len(loaded.rows), 'problem')} from {data['source']}"
    if data["partial"]:
        line += f", the first of {data['rows'] - data['left_out']}"
    return line + (f"; {data['left_out']} left out, which outputs alone cannot judge" if data["left_out"] else "")


def _open_sampler(
    config: Config, tasks: Sequence[Task], tokenizer: PreTrainedTokenizerBase, dtype: str, device: torch.device
) -> LocalSampler:
    print("loading the model ...", file=sys.stderr, flush=True)
    try:
        model = load_model(
            config.model.path,
            revision=config.model.revision,
            dtype=getattr(torch, dtype),
            device=device,
            attn_implementation=config.model.attn_implementation,
            trust_remote_code=config.model.trust_remote_code,
        )
    except (MemoryError, torch.OutOfMemoryError) as error:
        raise _out_of_memory(error) from None
    ends = end_token_ids(model, tokenizer, config.chat.stop_token_ids)
    return BoundedSampler(model, tokenizer, ends, max_rows=config.rollout.max_rows)


class BoundedSampler(LocalSampler):
    """``LocalSampler`` that knows the model's end tokens, and says in one line when memory runs out."""

    def __init__(
        self, model: Any, tokenizer: PreTrainedTokenizerBase, ends: tuple[int, ...], *, max_rows: int | None
    ) -> None:
        super().__init__(model, tokenizer, max_rows=max_rows)
        self.ends = ends

    async def sample(self, prompts: Any, params: SamplingParams, *, step: int, policy_version: int) -> Any:
        from dataclasses import replace

        source: Any = super().sample(
            prompts, replace(params, stop_token_ids=self.ends), step=step, policy_version=policy_version
        )
        try:
            async for rollout in source:
                yield rollout
        except (MemoryError, torch.OutOfMemoryError) as error:
            raise _out_of_memory(error) from None
        finally:
            await source.aclose()


def _out_of_memory(error: BaseException) -> RunFailed:
    text = " ".join(str(error).split())
    return RunFailed(
        f"out of memory: {text[:160] or type(error).__name__}",
        "an evaluation that fits",
        "lower --max-rows or --max-tokens, with another --out",
    )


def _given(answers: AnswerVerifier | None) -> AnswerVerifier:
    assert answers is not None
    return answers
