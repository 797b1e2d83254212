"""``scope eval``: a model, or stored responses, on benchmarks; figures that can be computed again from what is kept.

The engine stands behind the Sampler Protocol (``types``): a model in this process, one behind servers, or stored
responses. Whatever can be checked without weights is checked before they are loaded.

Not covered: several GPUs in this process.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from scope_opd.cli.eval_servers import served_options
from scope_opd.cli.eval_settings import (
    MAX_ROWS,
    build_config,
    chat_kwargs,
    in_options,
    sampling_options,
    typed_tolerance,
)
from scope_opd.errors import ConfigError

if TYPE_CHECKING:
    from scope_opd.data.rows import Columns
    from scope_opd.evaluate.benchmarks import Benchmark
    from scope_opd.evaluate.session import Task
    from scope_opd.types import Sampler

EXAMPLES = """Examples:
  scope eval --model zoo:student --benchmark zoo --out runs/eval-zoo
  scope eval --model Qwen/Qwen3-1.7B-Base --preset paper --benchmark aime24 \\
      --benchmark math500 --out runs/eval-qwen
  scope eval --model runs/mine/export --benchmark mine=problems.jsonl \\
      --n 8 --max-tokens 8192 --out runs/eval-mine
  scope eval --base-url http://127.0.0.1:8000/v1 --served-model student \\
      --tokenizer Qwen/Qwen3-1.7B-Base --benchmark aime24 --out runs/eval-served
  scope eval --responses outputs.jsonl --map answer=gold --out runs/judged
"""


def evaluate(
    *,
    out: Path,
    model: str | None = None,
    responses: Path | None = None,
    benchmark: Annotated[list[str] | None, Parameter(negative="")] = None,
    map_: Annotated[list[str] | None, Parameter(name="--map", negative="")] = None,
    preset: Literal["paper"] | None = None,
    n: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
    repetition_penalty: float | None = None,
    max_tokens: int | None = None,
    seed: int | None = None,
    problems: int | None = None,
    fix_double_braces: Annotated[bool, Parameter(negative="")] = False,
    template: str | None = None,
    system: str | None = None,
    suffix: str | None = None,
    chat: Annotated[list[str] | None, Parameter(negative="")] = None,
    stop_token_id: Annotated[list[int] | None, Parameter(negative="")] = None,
    revision: str | None = None,
    trust_remote_code: Annotated[bool, Parameter(negative="")] = False,
    attn: str | None = None,
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto",
    device: str = "auto",
    max_rows: int = MAX_ROWS,
    base_url: Annotated[list[str] | None, Parameter(negative="")] = None,
    served_model: str | None = None,
    tokenizer: str | None = None,
    api_key_env: str | None = None,
    api_key_file: Path | None = None,
    ca_bundle: Path | None = None,
    allow_unprotected_routes: Annotated[bool, Parameter(negative="")] = False,
    scope: Literal["after_think", "all"] | None = None,
    no_fallback: Annotated[bool, Parameter(negative="")] = False,
    tolerance: str | None = None,
    timeout_s: float | None = None,
    code_timeout_s: float | None = None,
    workers: int | None = None,
    allow_unsandboxed: Annotated[bool, Parameter(negative="")] = False,
) -> int:
    """Evaluate a model, or judge stored responses.

    Draws n samples of every problem, judges each, and reports Avg@k, the
    unbiased Pass@k, 95 % intervals over problems, truncation and no-verdict
    rates, length and distinct answers. Samples are kept as they end: the same
    command goes on where an interrupted one stopped, and ends with the same
    results.json. docs/evaluation.md says how to read the numbers.

    Benchmarks by name: zoo, aime24, aime25, amc23, math500, minerva,
    olympiadbench, gsm8k, humaneval, livecodebench, codeforces. Any other
    NAME=PATH is your own: columns problem, answer and perhaps id (--map).

    Parameters
    ----------
    out
        Folder for results.json, results.md, samples.jsonl: new, or of this evaluation begun before.
    model
        A Hugging Face folder, a hub id, zoo:student or zoo:teacher.
    responses
        A file of responses to judge without any model: rows with prediction, answer and perhaps problem_id.
    benchmark
        NAME, or NAME=PATH for a file or hf:OWNER/NAME; may be repeated. With --responses the NAME that the results
        call them, for scope compare; default: the file's.
    map_
        OURS=THEIRS: a column of the responses, or of benchmarks of your own, that has another name; may be repeated.
    preset
        paper: n 32, temperature 0.6, top-p 0.95, top-k 20, 32768 tokens or what the model's context leaves. Options
        win over it.
    n
        Samples a problem. Default 8.
    temperature
        Sampling temperature, > 0. Default 0.6.
    top_p
        Default 1, off.
    top_k
        Default 0, off.
    repetition_penalty
        Default 1, off.
    max_tokens
        Response tokens at most. Default 4096; 64 for the zoo.
    seed
        Of the samples. Default 0.
    problems
        Take the first N problems of each benchmark only; the results say so.
    fix_double_braces
        Mend a literal \\boxed{{}} in problems, as data.fix_double_braces does in training.
    template
        none for the bare problem, or a Jinja file; default: the tokenizer's own chat template.
    system
        A system message.
    suffix
        Appended to each problem. Default: a request for a boxed answer, or for a block of code.
    chat
        NAME=VALUE for the chat template, such as enable_thinking=false; may be repeated.
    stop_token_id
        One more token that ends a response; may be repeated.
    revision
        The model's revision on the hub.
    trust_remote_code
        Run the code that a model brings.
    attn
        Attention implementation of transformers.
    dtype
        Of the weights; auto: bfloat16 on a GPU, float32 on a CPU.
    device
        auto, cpu, cuda or cuda:N.
    max_rows
        Sequences decoded at once, or under way at each server. Lower it where memory runs out.
    base_url
        Address of a vLLM server that samples in place of a model in this process, such as http://host:8000/v1; may be
        repeated for servers of the same weights. --model or --tokenizer then names the tokenizer alone.
    served_model
        The name that the servers serve the model under.
    tokenizer
        With --base-url: a folder or hub id with the served model's tokenizer. Default: --model.
    api_key_env
        Environment variable that holds the servers' key.
    api_key_file
        File that holds it, instead.
    ca_bundle
        Certificate authorities (PEM) for https.
    allow_unprotected_routes
        Accept a server on another machine whose development routes are open.
    scope
        Where the answer may stand: after_think (default), behind the thinking block; or all.
    no_fallback
        Without a box there is no answer: do not look for "answer is" or the last number.
    tolerance
        For numbers: absolute (0.01) or relative (1%). A problem's own wins.
    timeout_s
        CPU seconds a maths answer at most. Default 5.
    code_timeout_s
        Wall seconds a test of code at most. Default 10.
    workers
        Judging processes. Default: one for each core.
    allow_unsandboxed
        Run code without bubblewrap: only where all of it is trusted.
    """
    served = served_options(
        base_url or [], served_model, api_key_env, api_key_file, ca_bundle, allow_unprotected_routes,
        responses=responses, attn=attn, dtype=None if dtype == "auto" else dtype,
        device=None if device == "auto" else device,
    )  # fmt: skip
    if tokenizer is not None and served is None:
        raise ConfigError("--tokenizer without --base-url", "servers", "leave it out: a model brings its own")
    model = model or tokenizer
    if served is not None and model is None:
        raise ConfigError("--base-url without a tokenizer", "that of the served model", "give --tokenizer or --model")
    if (model is None) == (responses is None):
        raise ConfigError("--model and --responses " + ("both" if model else "missing"), "one of them", "give one")
    verify = {
        "scope": scope,
        "fallback": False if no_fallback else None,
        "tolerance": typed_tolerance(tolerance),
        "timeout_s": timeout_s,
        "code_timeout_s": code_timeout_s,
        "workers": workers,
        "allow_unsandboxed": allow_unsandboxed or None,
    }
    given = {
        "n": n,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "repetition_penalty": repetition_penalty,
        "max_tokens": max_tokens,
        "seed": seed,
        "problems": problems,
    }
    if responses is not None:
        idle = {**given, "preset": preset, "template": template, "system": system,
                "suffix": suffix, "chat": chat, "stop_token_id": stop_token_id, "revision": revision, "attn": attn,
                "trust_remote_code": trust_remote_code or None, "fix_double_braces": fix_double_braces or None,
                "dtype": None if dtype == "auto" else dtype, "device": None if device == "auto" else device,
                "max_rows": None if max_rows == MAX_ROWS else max_rows}  # fmt: skip
        for name, value in idle.items():
            if value is not None:
                option = "--" + name.replace("_", "-")
                raise ConfigError(f"{option} with --responses", "options of judging alone", f"leave {option} out")
        config = build_config("zoo:student", None, {}, {}, verify=verify)
        from scope_opd.cli.eval_responses import from_responses, responses_name

        name = responses_name(responses, benchmark or [])
        return run(out, lambda: from_responses(responses, name, map_ or [], config))
    if not benchmark:
        raise ConfigError("no --benchmark", "at least one", "for example --benchmark aime24, or NAME=PATH")
    assert model is not None
    prompting = {
        "template": template,
        "system": system,
        "kwargs": chat_kwargs(chat or []),
        "stop_token_ids": stop_token_id,
    }
    config = build_config(
        model,
        revision,
        sampling_options(preset, model, given),
        prompting,
        verify=verify,
        rollout={"max_rows": max_rows},
        train={"device": device},
    )
    config = config.model_copy(
        update={
            "model": config.model.model_copy(
                update={"trust_remote_code": trust_remote_code, "attn_implementation": attn, "tokenizer": tokenizer}
            )
        }
    )

    def prepare() -> Prepared:
        from scope_opd.cli.early import check_early
        from scope_opd.evaluate.loading import parse_benchmarks

        named = parse_benchmarks(benchmark)
        columns = _own_columns(map_ or [], named)
        check_early(config, [place for _, place in named])
        print("loading torch, benchmarks and the tokenizer ...", file=sys.stderr, flush=True)
        from scope_opd.cli.eval_model import from_model

        return from_model(
            config,
            named,
            suffix=suffix,
            preset=preset,
            dtype=dtype,
            lower_max_tokens=preset is not None and max_tokens is None,
            fix_double_braces=fix_double_braces,
            columns=columns,
            served=served,
        )

    return run(out, prepare)


@dataclass(slots=True)
class Prepared:
    """An evaluation ready to run.

    Attributes:
        tasks: its benchmarks.
        settings: what settings.json holds: everything that a sample or a verdict depends on.
        data: what is recorded of each benchmark's data.
        open_sampler: loads the engine; called only where samples are missing.
        close: ends the verifiers' processes.
        lines: worth showing before it starts.
    """

    tasks: Sequence[Task]
    settings: Mapping[str, Any]
    data: Mapping[str, Mapping[str, Any]]
    open_sampler: Callable[[], Sampler]
    close: Callable[[], None]
    lines: Sequence[str] = ()


def run(out: Path, prepare: Callable[[], Prepared]) -> int:
    """Prepare, draw and judge what is missing, and write the results."""
    from scope_opd.cli.eval_progress import Meter, open_progress
    from scope_opd.evaluate.results import build_results
    from scope_opd.evaluate.session import pending_batches, run_batches
    from scope_opd.evaluate.store import SampleStore

    with in_options():
        prepared = prepare()
        store = None
        meter = Meter()
        total = 0
        try:
            store = SampleStore.open(out.expanduser(), prepared.settings)
            for line in prepared.lines:
                print(line, file=sys.stderr, flush=True)
            total = sum(sum(task.counts.values()) for task in prepared.tasks)
            pending = pending_batches(prepared.tasks, store)
            began = time.time()
            if pending:
                doing = "judging" if prepared.settings["source"]["kind"] == "responses" else "decoding"
                run_batches(pending, prepared.open_sampler(), store, open_progress(meter, doing), total=total)
            elif store.samples:
                print(f"all {total} samples are there already", file=sys.stderr)
            results = build_results(prepared.tasks, store, prepared.settings, prepared.data)
            _finish(store, results, meter, began)
        except KeyboardInterrupt:
            kept = 0 if store is None else len(store.samples)
            print(
                f"interrupted: {kept} of {total} samples are kept in {out}; give the same command again to go on",
                file=sys.stderr,
            )
            return 130
        finally:
            prepared.close()
            if store is not None:
                store.close()
    return 0


def _finish(store: Any, results: Mapping[str, Any], meter: Any, began: float) -> None:
    """results.json, results.md, a line in run.json about this process, and the table on the terminal."""
    from scope_opd.cli.show import show_table
    from scope_opd.evaluate.store import RESULTS
    from scope_opd.evaluate.tables import TERMINAL_KS, notes, result_table, results_markdown

    store.write_json(RESULTS, results)
    store.write("results.md", results_markdown(results))
    _record_run(store, meter, began)
    show_table(*result_table(results, most_ks=TERMINAL_KS))
    print("\n".join(notes(results)))
    print(f"results: {store.path / RESULTS}")


def _record_run(store: Any, meter: Any, began: float) -> None:
    """Times, versions and the machine, which results.json must not hold."""
    import json
    import platform
    from datetime import UTC, datetime
    from importlib.metadata import version

    from scope_opd import __version__
    from scope_opd.evaluate.store import RUN

    try:
        former = json.loads((store.path / RUN).read_text(encoding="utf-8"))["runs"]
    except (OSError, ValueError, KeyError, TypeError):
        former = []
    seconds = time.time() - began
    entry = {
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "seconds": round(seconds, 3),
        "samples": meter.new,
        "tokens": meter.tokens,
        "tokens_per_s": round(meter.tokens / seconds, 1) if meter.tokens and seconds > 0 else None,
        "scope_version": __version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {name: version(name) for name in ("torch", "transformers", "math-verify", "numpy")},
    }
    store.write_json(RUN, {"runs": [*former, entry]})


def _own_columns(mapped: Sequence[str], named: Sequence[tuple[Benchmark, str | None]]) -> Columns | None:
    """What --map says of benchmarks of the user's own."""
    from scope_opd.data.mapping import parse_map
    from scope_opd.data.rows import Columns
    from scope_opd.evaluate.benchmarks import is_own

    if not mapped:
        return None
    found = parse_map(mapped, ("problem", "answer", "id"))
    if not any(is_own(benchmark) for benchmark, _ in named):
        names = ", ".join(benchmark.name for benchmark, _ in named)
        raise ConfigError(
            f"--map with {names} alone", "a benchmark of your own (NAME=PATH)", "leave it out: their columns are known"
        )
    plain = Columns()
    return Columns(found.get("problem", plain.problem), found.get("answer", plain.answer), found.get("id", plain.id))
