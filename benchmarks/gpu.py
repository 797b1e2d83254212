"""SCOPE on one GPU: the zoo's run, a random 0.6B-shaped pair, and the sampler against ``model.generate``.

    python benchmarks/gpu.py                      # a few minutes on a large GPU
    python benchmarks/gpu.py --cpu                # the zoo's run on the CPU too, and how far the two agree
    python benchmarks/gpu.py --teacher 1.7b       # a larger teacher for the pair
    python benchmarks/gpu.py --tiny               # the same script scaled down to a CPU, less than a minute

``zoo``: configs/demo.toml on the device, evaluated before and after. ``pair``: two random Qwen3 models of published
shapes with the zoo's prompts and tokenizer under a head of 151,936 rows. They know nothing, so a coin stands in for the
verifier and sends a share of the finished responses down each path; so many end tokens are declared that about two
thirds of the responses end. ``sampler``: equal numbers of tokens without end tokens, ours and ``generate`` in turn,
under bfloat16 autocast (what training does) and with bfloat16 weights; ``ratio`` is ours / generate in time, below 1
when ours is faster. All of it runs on the engines and the loop of ``scope train``, in this process, with no network.

Prints one JSON line last on stdout (and each part on stderr as soon as it is done); exit code 1 if a part failed.
Needs, besides torch and transformers, what the package needs except cyclopts and matplotlib.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import inspect
import json
import os
import platform
import statistics
import sys
import tempfile
import time
import traceback
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

SOURCE = Path(__file__).resolve().parents[1] / "src"
sys.path.insert(0, str(SOURCE))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM  # noqa: E402

from scope_opd import __version__  # noqa: E402
from scope_opd.cli.engines import build_engines  # noqa: E402
from scope_opd.cli.inputs import load_data, render, student_tokenizer  # noqa: E402
from scope_opd.config import Config, load_config, validate_config  # noqa: E402
from scope_opd.errors import ScopeError  # noqa: E402
from scope_opd.models.loading import load_model, load_tokenizer, resolve_device  # noqa: E402
from scope_opd.rollout.local import LocalSampler  # noqa: E402
from scope_opd.train.batch import make_batch  # noqa: E402
from scope_opd.train.loop import train  # noqa: E402
from scope_opd.types import Prompt, Rollout, SamplingParams, Verdict, Verifier  # noqa: E402

Figures = dict[str, Any]
STAGES = ("generation", "verify", "teacher", "update", "step")
PARTS = ("zoo", "pair", "sampler")
TEMPERATURE = 0.6
# Qwen3's published shapes: hidden, MLP, layers, heads, key-value heads, head size, tied embeddings.
SHAPES = {
    "0.6b": (1024, 3072, 28, 16, 8, 128, True),
    "1.7b": (2048, 6144, 28, 16, 8, 128, True),
    "4b": (2560, 9728, 36, 32, 8, 128, True),
    "8b": (4096, 12288, 36, 32, 8, 128, False),
    "tiny": (64, 128, 2, 4, 2, 16, True),
}
FULL = {
    "device": "cuda", "student": "0.6b", "teacher": "0.6b", "vocabulary": 151_936, "zoo_steps": 50,
    "eval_problems": 200, "eval_n": 32, "steps": 3, "prompts": 8, "n": 8, "max_tokens": 512,
    "microbatch_tokens": 16_384, "sampler_tokens": 192, "repeats": 3,
}  # fmt: skip
TINY = {
    "device": "cpu", "student": "tiny", "teacher": "tiny", "vocabulary": 4096, "zoo_steps": 4,
    "eval_problems": 20, "eval_n": 4, "steps": 3, "prompts": 4, "n": 4, "max_tokens": 48,
    "microbatch_tokens": 512, "sampler_tokens": 32, "repeats": 3,
}  # fmt: skip


class Coin:
    """Implements ``types.Verifier`` for models that solve nothing: a verdict that depends on the rollout's id alone."""

    def __init__(self, share: float) -> None:
        self.share = share

    async def verify(self, rollout: Rollout, prompt: Prompt) -> Verdict:
        correct = zlib.crc32(rollout.id.encode()) < self.share * 2**32
        return Verdict(correct=correct, reward=float(correct), reason="a coin")


class Watched:
    """A pipeline that notes the largest GPU memory of each stage (nothing on a CPU) and keeps the last rollouts."""

    def __init__(self, pipeline: Any, device: torch.device) -> None:
        self.pipeline, self.device = pipeline, device
        self.timeline, self.close = pipeline.timeline, pipeline.close
        self.peaks_mb: dict[str, float] = {}
        self.rollouts: list[Rollout] = []

    def collect(self, prompts: Sequence[Prompt], params: SamplingParams, **more: Any) -> Any:
        self.note("update" if self.peaks_mb else "start")  # what has been since the last call
        stage, told = "generation", more.pop("on_phase", None)

        def on_phase(name: str) -> None:
            nonlocal stage
            if name != stage:
                self.note(stage)
                stage = name
            if told:
                told(name)

        collected = self.pipeline.collect(prompts, params, on_phase=on_phase, **more)
        self.note(stage)
        self.rollouts = collected.rollouts
        return collected

    def note(self, stage: str) -> None:
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device) / 2**20
            self.peaks_mb[stage] = round(max(peak, self.peaks_mb.get(stage, 0.0)), 1)
            torch.cuda.reset_peak_memory_stats(self.device)


def training_run(config: Config, verifier: Verifier | None = None) -> tuple[Figures, list[Figures]]:
    """A run of ``scope train`` in this process: its figures (those of time without the first step), its evaluations."""
    began = time.perf_counter()
    built = build_engines(config)
    engines, evaluations = built.engines, list[float]()
    device = next(engines.model.parameters()).device
    if verifier is not None:
        engines.pipeline.verifier = verifier  # type: ignore[attr-defined]
    watched = Watched(engines.pipeline, device)

    async def evaluator(step: int, policy_version: int) -> Any:
        start = time.perf_counter()
        assert engines.evaluator is not None
        rows = engines.evaluator(step, policy_version)
        rows = await rows if inspect.isawaitable(rows) else rows
        evaluations.append(round(time.perf_counter() - start, 3))
        return rows

    loaded = time.perf_counter() - began
    wrapped = replace(engines, pipeline=watched, evaluator=evaluator if engines.evaluator is not None else None)
    result = train(config, wrapped, progress=False)
    watched.note("update")
    rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
    timed, budget = rows[1:] or rows, config.train.max_tokens_per_microbatch

    def per_second(key: Callable[[Figures], float], stage: str) -> float | None:
        seconds = sum(row[f"time/{stage}_s"] for row in timed)
        return round(sum(map(key, timed)) / seconds, 1) if seconds else None

    rollouts = config.train.prompts_per_step * config.rollout.n
    seconds, steps_s = time.perf_counter() - began, sum(row["time/step_s"] for row in rows)
    return (
        {
            "parameters": sum(parameter.numel() for parameter in engines.model.parameters()),
            "steps": len(rows),
            "rollouts_per_step": rollouts,
            "seconds": round(seconds, 2),
            "load_s": round(loaded, 2),
            "save_and_rest_s": round(seconds - loaded - steps_s - sum(evaluations), 2),
            "evaluations_s": evaluations,
            "stages_s": {name: round(statistics.median(row[f"time/{name}_s"] for row in timed), 4) for name in STAGES},
            "first_step_s": round(rows[0]["time/step_s"], 3),
            "tokens_per_s": {
                "generation": per_second(lambda row: row["length/mean"] * rollouts, "generation"),
                "teacher": per_second(lambda row: row["teacher/scored_tokens"], "teacher"),
                "update": per_second(lambda row: row["tokens/trained"], "update"),
            },
            "peak_gpu_mb": watched.peaks_mb or None,
            "peak_rss_mb": round(rows[-1]["perf/peak_rss_mb"], 1),
            "mean_length": _mean(rows, "length/mean"),
            "padding_share": _mean(rows, "padding/share"),
            "microbatches": len(make_batch(watched.rollouts, aggregation="token", max_tokens=budget).micro),
            "scored_share": round(sum(row["teacher/scored_rollouts"] for row in rows) / (rollouts * len(rows)), 4),
            "mismatch_kl": _mean(rows, "mismatch/kl"),
            "mismatch_capped_share": _mean(rows, "mismatch/capped_share"),
            "losses": [row["loss"] for row in rows] if len(rows) <= 8 else [rows[0]["loss"], rows[-1]["loss"]],
        },
        [dict(row) for row in result.evaluations],
    )  # fmt: skip


def zoo_run(sizes: argparse.Namespace, folder: Path, device: str) -> Figures:
    """configs/demo.toml on a device, from the zoo's student, evaluated before and after."""
    overrides = [
        f"run.dir={folder}", f"train.device={device}", f"train.steps={sizes.zoo_steps}", "run.export=false",
        f"eval.problems={sizes.eval_problems}", f"eval.n={sizes.eval_n}", "eval.at_start=true", "eval.at_end=true",
    ]  # fmt: skip
    if device == "cpu":
        overrides.append(f"train.threads={sizes.cpu_threads}")
    figures, evaluations = training_run(load_config(SOURCE / "scope_opd" / "configs" / "demo.toml", overrides))
    for moment, step in (("before", 0), ("after", sizes.zoo_steps)):
        figures[moment] = {
            f"T={row['temperature']:g}": {
                f"avg@{row['n']}": round(100 * row["avg@k"], 2),
                "ci95": [round(100 * end, 2) for end in row["ci95"]["avg@k"]],
            }
            for row in evaluations
            if row["step"] == step
        }
    return figures


def agreement(one: Path, other: Path) -> Figures:
    """How far two runs from the same seed agree at their first step, where they still have the same weights."""

    def first_step(run: Path) -> dict[str, Figures]:
        rows = map(json.loads, (run / "rollouts.jsonl").read_text().splitlines())
        return {row["id"]: row for row in rows if row["step"] == 0}

    first, second = first_step(one), first_step(other)
    assert first.keys() == second.keys()
    differences, same = [0.0], 0
    for name, row in first.items():
        pairs = list(zip(row["token_ids"], second[name]["token_ids"], strict=False))
        common = next((place for place, (left, right) in enumerate(pairs) if left != right), len(pairs))
        same += row["token_ids"] == second[name]["token_ids"]
        both = zip(row["logprobs"][:common], second[name]["logprobs"][:common], strict=True)
        differences += [abs(left - right) for left, right in both]
    return {
        "rollouts": len(first),
        "same_tokens": same,
        "largest_logprob_difference": max(differences),
        "mean_logprob_difference": statistics.mean(differences),
    }


def make_folder(path: Path, shape: str, vocabulary: int, ends: int, device: torch.device, seed: int) -> Path:
    """A random Qwen3 with bfloat16 weights, the zoo's tokenizer, and ``ends`` end tokens, in Hugging Face layout."""
    hidden, mlp, layers, heads, kv_heads, head_dim, tied = SHAPES[shape]
    config = Qwen3Config(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim, tie_word_embeddings=tied,
        max_position_embeddings=40_960, eos_token_id=1, bos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    with device:
        model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    # Ids beyond the tokenizer's, so that prompts hold none of them.
    stops = [1, *range(vocabulary - ends, vocabulary)]
    model.generation_config = GenerationConfig(eos_token_id=stops, bos_token_id=2, pad_token_id=0)
    model.save_pretrained(path)
    load_tokenizer("zoo:student").save_pretrained(path)
    return path


def make_pair(sizes: argparse.Namespace, student: Path, teacher: Path, device: torch.device) -> Figures:
    start, ends = time.perf_counter(), max(1, round(sizes.vocabulary / sizes.max_tokens))
    make_folder(student, sizes.student, sizes.vocabulary, ends, device, seed=1)
    make_folder(teacher, sizes.teacher, sizes.vocabulary, ends, device, seed=2)
    return {"seconds": round(time.perf_counter() - start, 2), "end_tokens": ends + 1}


def pair_run(sizes: argparse.Namespace, student: Path, teacher: Path, run: Path) -> Figures:
    """SCOPE on the random pair."""
    tables: dict[str, dict[str, Any]] = {
        "model": {"path": str(student)},
        "teacher": {"path": str(teacher), "max_tokens_per_batch": sizes.microbatch_tokens},
        "rollout": {"n": sizes.n, "temperature": TEMPERATURE, "max_tokens": sizes.max_tokens},
        "objective": {"truncated": "incorrect"},
        "train": {
            "steps": sizes.steps, "prompts_per_step": sizes.prompts, "lr": 2e-6, "device": sizes.device,
            "max_tokens_per_microbatch": sizes.microbatch_tokens,
            "activation_checkpointing": sizes.activation_checkpointing,
        },
        "run": {"dir": str(run), "export": False, "alarms": {"truncation": "off", "uniform_weights": "off"}},
    }  # fmt: skip
    return training_run(validate_config(tables), Coin(sizes.correct_share))[0]


def sampler_against_generate(sizes: argparse.Namespace, student: Path, device: torch.device) -> Figures:
    """The same prompts, samples and number of tokens for both, in turn; medians over ``repeats`` rounds after one."""
    config = validate_config({"model": {"path": str(student)}, "data": {"max_rows": sizes.prompts}})
    tokenizer = student_tokenizer(config)
    prompts = render(config, load_data(config, "zoo", "train").rows, tokenizer, {}, max_tokens=0)
    width = max(len(prompt.token_ids) for prompt in prompts)
    rows = [[0] * (width - len(prompt.token_ids)) + list(prompt.token_ids) for prompt in prompts]
    ids = torch.tensor(rows, device=device)
    lengths = torch.tensor([len(prompt.token_ids) for prompt in prompts], device=device)
    mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
    tokens, seeds = sizes.sampler_tokens, iter(range(10**6))
    models: dict[str, tuple[Any, torch.dtype | None]] = {
        "autocast": (load_model(str(student), dtype=torch.float32, device=device), torch.bfloat16),
        "bfloat16": (load_model(str(student), dtype=torch.bfloat16, device=device), None),
    }
    work: dict[str, Callable[[], None]] = {}
    for name, (model, autocast) in models.items():
        model.config.eos_token_id = None
        model.generation_config = GenerationConfig(pad_token_id=0)
        sampler = LocalSampler(model, tokenizer, autocast=autocast)

        def ours(sampler: LocalSampler = sampler) -> None:
            params = SamplingParams(sizes.n, TEMPERATURE, tokens, stop_token_ids=(), seed=next(seeds))

            async def draw() -> int:
                stream = sampler.sample(prompts, params, step=0, policy_version=0)
                return sum([len(rollout.token_ids) async for rollout in stream])

            assert asyncio.run(draw()) == len(prompts) * sizes.n * tokens

        def generate(model: Any = model, autocast: torch.dtype | None = autocast) -> None:
            torch.manual_seed(next(seeds))
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast is not None):
                output = model.generate(
                    ids, attention_mask=mask, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0,
                    num_return_sequences=sizes.n, max_new_tokens=tokens, pad_token_id=0,
                )  # fmt: skip
            assert output.shape == (len(prompts) * sizes.n, width + tokens)

        work[f"ours_{name}"], work[f"generate_{name}"] = ours, generate
    times: dict[str, list[float]] = {name: [] for name in work}
    peaks: dict[str, float] = {}
    for number in range(sizes.repeats + 1):
        for name, job in work.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            start = time.perf_counter()
            job()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
                peaks[name] = round(torch.cuda.max_memory_allocated(device) / 2**20, 1)
            if number:
                times[name].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    return {
        "rows": len(prompts) * sizes.n,
        "tokens_per_row": tokens,
        "seconds": {name: round(value, 4) for name, value in seconds.items()},
        "spread_s": {name: round(max(values) - min(values), 4) for name, values in times.items()},
        "tokens_per_s": {name: round(len(prompts) * sizes.n * tokens / value, 1) for name, value in seconds.items()},
        "peak_gpu_mb": peaks or None,
        "ratio": {name: round(seconds[f"ours_{name}"] / seconds[f"generate_{name}"], 4) for name in models},
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a scaled-down shape on a CPU: does the script run?")
    parser.add_argument("--cpu", action="store_true", help="the zoo's run on the CPU too")
    parser.add_argument("--cpu-threads", type=int, default=1, help="torch threads of that run")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--correct-share", type=float, default=0.5, help="finished responses that the coin calls right")
    parser.add_argument("--activation-checkpointing", default="off", choices=["off", "full", "offload"])
    parser.add_argument("--limit-s", type=float, default=420, help="no part is begun later than this")
    parser.add_argument("--folder", help="where models and run folders go for the time being (10 GB and more)")
    for name, value in FULL.items():
        choices = sorted(SHAPES) if name in ("student", "teacher") else None
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=type(value), choices=choices, help=f"default {value}, tiny {TINY[name]}"
        )
    sizes = parser.parse_args()
    for name, value in (TINY if sizes.tiny else FULL).items():
        if getattr(sizes, name) is None:
            setattr(sizes, name, value)
    began = time.perf_counter()
    try:
        device = resolve_device(sizes.device)
    except ScopeError as error:
        parser.error(f"{error}; --tiny runs on a CPU")
    report: Figures = {"benchmark": "gpu", "device": describe(device), "versions": versions(), "settings": vars(sizes)}

    def part(name: str, job: Callable[[], Figures]) -> None:
        elapsed = time.perf_counter() - began
        if elapsed > sizes.limit_s:
            report[name] = {"skipped": f"{elapsed:.0f} s had passed, --limit-s is {sizes.limit_s:.0f}"}
            return
        try:
            report[name] = job()
        except Exception as error:  # the figures of the other parts are worth having
            traceback.print_exc()
            report[name] = {"error": f"{type(error).__name__}: {error}"}
        print(f"{name}: {json.dumps(report[name])}", file=sys.stderr, flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()

    with tempfile.TemporaryDirectory(dir=sizes.folder) as name, contextlib.redirect_stdout(sys.stderr):
        folder = Path(name)
        if "zoo" in sizes.parts:
            part("zoo", lambda: zoo_run(sizes, folder / "zoo", sizes.device))
        if {"pair", "sampler"} & set(sizes.parts):
            student, teacher = folder / "student", folder / "teacher"
            part("models", lambda: make_pair(sizes, student, teacher, device))
        if "pair" in sizes.parts:
            part("pair", lambda: pair_run(sizes, student, teacher, folder / "pair"))
        if "sampler" in sizes.parts:
            part("sampler", lambda: sampler_against_generate(sizes, student, device))
        if sizes.cpu and "zoo" in sizes.parts:
            part("zoo_cpu", lambda: zoo_run(sizes, folder / "zoo-cpu", "cpu"))
            if (folder / "zoo").exists() and (folder / "zoo-cpu").exists():
                part("agreement", lambda: agreement(folder / "zoo", folder / "zoo-cpu"))
    report["seconds"] = round(time.perf_counter() - began, 1)
    print(json.dumps(report, allow_nan=False))
    return 1 if any(isinstance(value, dict) and "error" in value for value in report.values()) else 0


def describe(device: torch.device) -> Figures:
    if device.type != "cuda":
        return {"name": platform.processor() or platform.machine(), "type": device.type}
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "type": device.type,
        "memory_gb": round(properties.total_memory / 1e9, 1),
        "capability": f"{properties.major}.{properties.minor}",
    }


def versions() -> dict[str, str | None]:
    return {
        "scope_opd": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "transformers": transformers.__version__,
    }


def _mean(rows: Sequence[Figures], key: str) -> float | None:
    found = [row[key] for row in rows if row[key] is not None]
    return float(f"{sum(found) / len(found):.4g}") if found else None


if __name__ == "__main__":
    sys.exit(main())
