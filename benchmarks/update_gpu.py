"""The learner on one GPU: speed and memory of an update, log-probs, sampling, and one whole SCOPE step.

    python benchmarks/update_gpu.py                      # everything, under 10 minutes on a Hopper GPU; one JSON line
    python benchmarks/update_gpu.py --parts update-0.6b-16k step          # some of it
    python benchmarks/update_gpu.py --smoke              # the same code with tiny shapes on a CPU, less than a minute

Needs torch and transformers with what the package needs itself; no network, no vLLM, no checkpoint: weights are random.
Parts, in this order:

``update-*``: Qwen3-0.6B and Qwen2.5-1.5B, one sequence of 16,384 or 65,536 tokens (``-packed``: eight in one row) in
one micro-batch, every layer recomputed, float32 masters under bfloat16 autocast (``-bfloat16``: all in
bfloat16). Through ``Learner.update``, with clipping and fused AdamW. MFU
counts 6 FLOPs a weight and token and causal attention, recomputation not, against --peak-tflops. ``memory`` is torch's
largest allocation of a later update, beside what ``scope plan`` foretells.
``agreement``: log-probs and gradient of the zoo's student on this device against float32 on the CPU.
``logprobs-*``: naive log-probs, objective.chunked, and kernels of Liger and cut-cross-entropy where installed.
``sampler``: ours, ``generate`` and ``generate_batch`` (continuous batching) on the same prompts and numbers of tokens.
``step``: three SCOPE steps on a random 0.6B student with a random 1.7B teacher in the process; a coin is the verifier.

Parts run one after another in a process of their own each (--smoke: in one, which is replaced when it fails); one that
fails, hangs or runs out of memory leaves its error and the others go on. Exit code 1 if one failed. None is begun that
could not end within --limit-s. Each part's figures are told on stderr as soon as they are there.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import queue
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "src"))
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Sizes differ from micro-batch to micro-batch; without it the allocator keeps a segment for each of them.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

Figures = dict[str, Any]
TEMPERATURE = 0.6
# Published shapes: hidden, MLP, layers, heads, key-value heads, head size, vocabulary, tied.
SHAPES = {
    "0.6b": ("Qwen3", 1024, 3072, 28, 16, 8, 128, 151_936, True),
    "1.5b": ("Qwen2", 1536, 8960, 28, 12, 2, 128, 151_936, True),
    "1.7b": ("Qwen3", 2048, 6144, 28, 16, 8, 128, 151_936, True),
    "tiny": ("Qwen3", 64, 128, 2, 4, 2, 16, 4096, True),
    "tiny2": ("Qwen2", 48, 96, 2, 4, 2, 12, 4096, True),
}
# name -> model and tokens; the same with --smoke; sequences; dtype of the weights
UPDATES: dict[str, tuple[tuple[str, int], tuple[str, int], int, str]] = {
    "update-0.6b-16k": (("0.6b", 16_384), ("tiny", 256), 1, "float32"),
    "update-0.6b-64k": (("0.6b", 65_536), ("tiny", 512), 1, "float32"),
    "update-1.5b-16k": (("1.5b", 16_384), ("tiny2", 256), 1, "float32"),
    "update-1.5b-64k": (("1.5b", 65_536), ("tiny2", 512), 1, "float32"),
    "update-0.6b-16k-packed": (("0.6b", 16_384), ("tiny", 256), 8, "float32"),
    "update-0.6b-16k-bfloat16": (("0.6b", 16_384), ("tiny", 256), 1, "bfloat16"),
}
LOGPROBS = {"logprobs-4k": (4096, 64), "logprobs-16k": (16_384, 128)}
# Seconds that a part may take, start of its process included; most need a third of it.
LIMITS = {"update-1.5b-64k": 110.0, "step": 120.0}
LIMIT = 75.0
EARLY = [name for name in UPDATES if name.count("-") == 2]
PARTS = [*EARLY, "agreement", *LOGPROBS, "sampler", "step", *(name for name in UPDATES if name not in EARLY)]
FULL = {"prompts": 8, "n": 8, "max_tokens": 512, "sampler_tokens": 192, "microbatch": 16_384, "repeats": 3}
TINY = {"prompts": 3, "n": 2, "max_tokens": 12, "sampler_tokens": 6, "microbatch": 256, "repeats": 1}


def model_config(shape: str) -> Any:
    import transformers

    family, hidden, mlp, layers, heads, kv_heads, head_dim, vocabulary, tied = SHAPES[shape]
    own = {"head_dim": head_dim} if family == "Qwen3" else {}
    return getattr(transformers, f"{family}Config")(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=mlp, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, tie_word_embeddings=tied,
        max_position_embeddings=131_072, eos_token_id=1, bos_token_id=2, pad_token_id=0, **own,
    )  # fmt: skip


class Clock:
    """Times stretches of work on a device: both ends wait for it."""

    def __init__(self, device: Any) -> None:
        self.device = device

    def now(self) -> float:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def forget_peak(self) -> None:
        import torch

        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak_gib(self) -> float | None:
        import torch

        if self.device.type != "cuda":
            return None
        return round(torch.cuda.max_memory_allocated(self.device) / 2**30, 3)


def update(args: argparse.Namespace, device: Any, name: str) -> Figures:
    """One ``update-*`` part."""
    import torch
    from transformers import AutoModelForCausalLM

    from scope_opd.config import TrainConfig
    from scope_opd.models.footprint import forward_flops, shape_of
    from scope_opd.models.memory import Layout, Student, Updates
    from scope_opd.ranks import Ranks
    from scope_opd.train.batch import make_batch
    from scope_opd.train.engines import Follower, SurrogateSettings
    from scope_opd.train.step import Learner
    from scope_opd.types import Rollout

    full, tiny, sequences, dtype_name = UPDATES[name]
    shape, tokens = tiny if args.smoke else full
    length, dtype, clock = tokens // sequences, getattr(torch, dtype_name), Clock(device)
    config, numbers = model_config(shape), shape_of(model_config(shape))
    autocast = torch.bfloat16 if dtype == torch.float32 else None
    plan = Student(config, numbers, dtype=dtype, autocast=autocast, checkpointing="full", temperature=TEMPERATURE)
    began = time.perf_counter()
    planned = Updates(plan, Layout()).exactly(tokens)
    plan_s = time.perf_counter() - began
    torch.manual_seed(0)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    settings = TrainConfig(
        activation_checkpointing="full", param_dtype=dtype_name, max_tokens_per_microbatch=tokens, lr=1e-6
    )
    surrogate = SurrogateSettings(
        aggregation="token", student_temperature=TEMPERATURE, sampling_temperature=TEMPERATURE
    )
    learner = Learner(Follower(trained=model, surrogate=surrogate, ranks=Ranks(), model=model), settings)
    rollouts = []
    for index in range(sequences):
        ids = torch.randint(3, config.vocab_size, (length,)).tolist()
        made = Rollout(
            id=str(index), group=str(index), prompt_token_ids=ids[:1], token_ids=ids[1:],
            logprobs=[-11.9] * (length - 1), text="", finish_reason="stop", policy_version=0, sample=0, step=0,
        )  # fmt: skip
        made.reinforce, made.distill = (1.0, -1.0)[index % 2], 0.0
        rollouts.append(made)
    batch = make_batch(
        rollouts, aggregation="token", max_tokens=tokens, packed=learner.forward.packs,
        crossover=learner.forward.crossover,
    )  # fmt: skip
    assert len(batch.micro) == 1, f"{len(batch.micro)} micro-batches"
    assert batch.tokens == tokens - sequences
    times, stages, losses = [], dict[str, list[float]](), []
    marks: list[tuple[str, float]] = []
    for number in range(args.repeats + 2):  # the first makes the optimiser's states, the second settles the allocator
        marks.clear()
        if number == 1:
            clock.forget_peak()
        start = clock.now()
        outcome = learner.update(batch, 1e-6, on_phase=lambda phase: marks.append((phase, clock.now())))
        end = clock.now()
        assert outcome.finite
        assert outcome.updates == 1
        losses.append(outcome.loss)
        if number > 1:
            times.append(end - start)
            for (phase, at), after in zip(marks, [at for _, at in marks[1:]] + [end], strict=True):
                stages.setdefault(phase, []).append(after - at)
    seconds = statistics.median(times)
    flops = 3 * sequences * forward_flops(numbers, length)
    measured = clock.peak_gib()
    return {
        "model": shape, "parameters": numbers.parameters, "tokens": tokens, "sequences": sequences,
        "weights": dtype_name, "packed": learner.forward.packs, "seconds": round(seconds, 4),
        "spread_s": round(max(times) - min(times), 4),
        "stages_s": {phase: round(statistics.median(values), 4) for phase, values in stages.items()},
        "tokens_per_s": round(tokens / seconds, 1), "tflops": round(flops / seconds / 1e12, 2),
        "mfu": round(flops / seconds / 1e12 / args.peak_tflops, 4),
        "memory": {
            "peak_gib": measured, "planned_gib": round(planned.total / 2**30, 3), "planned_moment": planned.moment,
            "planned / peak": None if measured is None else round(planned.total / 2**30 / measured, 3),
            "plan_s": round(plan_s, 1),
        },
        "losses": losses,
    }  # fmt: skip


def agreement(args: argparse.Namespace, device: Any, name: str) -> Figures:
    """The zoo's student on the device against float32 on the CPU: a gradient of a step with both terms."""
    import random

    import torch

    from scope_opd.config import TrainConfig
    from scope_opd.models.loading import load_model
    from scope_opd.ranks import Ranks
    from scope_opd.train.batch import make_batch
    from scope_opd.train.engines import Follower, SurrogateSettings
    from scope_opd.train.step import Learner
    from scope_opd.types import Rollout

    draw = random.Random(0)
    rollouts = []
    for index in range(16):
        ids = [draw.randrange(3, 40) for _ in range(draw.randint(12, 60))]
        made = Rollout(
            id=str(index), group=str(index // 4), prompt_token_ids=ids[:8], token_ids=ids[8:],
            logprobs=[-3.0] * (len(ids) - 8), text="", finish_reason="stop", policy_version=0, sample=index, step=0,
        )  # fmt: skip
        made.teacher_logprobs = [-3.0 * draw.random() for _ in made.token_ids]
        made.reinforce, made.distill = float(index % 2), float(index % 2 == 0)
        rollouts.append(made)
    found = {}
    for place in ("cpu", device.type):
        model = load_model("zoo:student", device=place)
        surrogate = SurrogateSettings(student_temperature=TEMPERATURE, sampling_temperature=TEMPERATURE)
        learner = Learner(Follower(trained=model, surrogate=surrogate, ranks=Ranks(), model=model), TrainConfig())
        for packed in {False, learner.forward.packs}:
            batch = make_batch(rollouts, aggregation="prompt", max_tokens=2048, packed=packed)
            loss, gradients = learner.gradient(batch)
            flat = torch.cat([part.flatten().double().cpu() for part in gradients])
            found[f"{place}, {'packed' if packed else 'padded'}"] = loss, flat
    exact = found["cpu, padded"]
    return {
        key: {"loss": loss, "gradient_relative_l2": float((flat - exact[1]).norm() / exact[1].norm())}
        for key, (loss, flat) in found.items()
    }


def logprobs(args: argparse.Namespace, device: Any, name: str) -> Figures:
    """benchmarks/logprobs.py's measurement, in this process."""
    import logprobs as script
    import torch

    tokens = LOGPROBS[name][args.smoke]
    sizes = argparse.Namespace(
        hidden=64 if args.smoke else 1536, vocabulary=2000 if args.smoke else 151_936, device=device.type,
        threads=torch.get_num_threads(), cpu_time=False, passes=2,
    )  # fmt: skip
    ways = [*script.WAYS, *(script.KERNELS if device.type == "cuda" else ())]
    figures: Figures = {"tokens": tokens, "hidden": sizes.hidden, "vocabulary": sizes.vocabulary}
    for way in ways:
        try:
            figures[way] = script.measure(sizes, way, tokens)
        except Exception as error:  # naive may not fit, a kernel may not know this GPU
            figures[way] = {"error": _line(error)}
        _free(device)
    for tile in () if args.smoke else ((1024, 32_768), (4096, 8192), (4096, 32_768)):
        figures[f"chunked, tiles of {tile[0]} x {tile[1]}"] = script.measure(sizes, "chunked", tokens, list(tile))
        _free(device)
    naive = figures["naive"]
    if "seconds" in naive:
        figures["ratios"] = {
            way: {key: round(found[key] / max(naive[key], 1e-9), 3) for key in ("seconds", "peak_gb")}
            for way, found in figures.items()
            if isinstance(found, dict) and "seconds" in found
        }
    return figures


def save_folder(path: Path, shape: str, device: Any, seed: int, ends: int = 1) -> Path:
    """A random model in bfloat16, with the zoo's tokenizer and ``ends`` end tokens, in Hugging Face layout."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from scope_opd.models.loading import load_tokenizer

    config = model_config(shape)
    torch.manual_seed(seed)
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    # Ids beyond the tokenizer's, so that prompts hold none of them.
    stops = [1, *range(config.vocab_size - ends + 1, config.vocab_size)]
    model.generation_config = GenerationConfig(eos_token_id=stops, bos_token_id=2, pad_token_id=0)
    model.save_pretrained(path)
    load_tokenizer("zoo:student").save_pretrained(path)
    return path


def sampler(args: argparse.Namespace, device: Any, name: str) -> Figures:
    """Equal numbers of tokens without end tokens; medians over rounds after one, the ways in turn."""
    import asyncio
    import itertools

    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig

    from scope_opd.models.loading import load_tokenizer
    from scope_opd.rollout.local import LocalSampler
    from scope_opd.types import Prompt, SamplingParams
    from scope_opd.zoo.task import load_rows

    config, clock = model_config("tiny" if args.smoke else "0.6b"), Clock(device)
    tokenizer, tokens, seeds = load_tokenizer("zoo:student"), args.sampler_tokens, itertools.count()
    prompts = []
    for index, row in enumerate(load_rows("train")[: args.prompts]):
        chat = [{"role": "user", "content": row["problem"]}]
        ids = tokenizer(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)).input_ids
        prompts.append(Prompt(id=str(index), problem="", answer=None, token_ids=tuple(ids), text=""))
    width, rows = max(len(prompt.token_ids) for prompt in prompts), args.prompts * args.n
    ids = torch.tensor([[0] * (width - len(p.token_ids)) + list(p.token_ids) for p in prompts], device=device)
    lengths = torch.tensor([len(prompt.token_ids) for prompt in prompts], device=device)
    mask = (torch.arange(width, device=device) >= width - lengths[:, None]).long()
    ways: dict[str, Callable[[], int]] = {}
    for kind, dtype in (("autocast", torch.float32), ("bfloat16", torch.bfloat16)):
        torch.manual_seed(0)
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        model.config.eos_token_id = None
        model.generation_config = GenerationConfig(pad_token_id=0)
        autocast = torch.bfloat16 if dtype == torch.float32 else None
        drawing = LocalSampler(model, tokenizer, autocast=autocast)

        def ours(drawing: LocalSampler = drawing) -> int:
            params = SamplingParams(args.n, TEMPERATURE, tokens, stop_token_ids=(), seed=next(seeds))

            async def draw() -> int:
                stream = drawing.sample(prompts, params, step=0, policy_version=0)
                return sum([len(rollout.token_ids) async for rollout in stream])

            return asyncio.run(draw())

        def generate(model: Any = model, autocast: Any = autocast) -> int:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast is not None):
                output = model.generate(
                    ids, attention_mask=mask, do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0,
                    num_return_sequences=args.n, max_new_tokens=tokens, pad_token_id=0,
                )  # fmt: skip
            return (output.shape[1] - width) * output.shape[0]

        def continuous(model: Any = model) -> int:
            import transformers

            wanted = GenerationConfig(
                do_sample=True, temperature=TEMPERATURE, top_k=0, top_p=1.0, max_new_tokens=tokens, pad_token_id=0
            )
            # Blocks of 256 tokens, as many again as all rows need: the default takes nearly all free memory.
            blocks = 2 * rows * (1 + (width + tokens) // 256)
            known = getattr(transformers, "ContinuousBatchingConfig", None)  # not in every version
            bounds = {"continuous_batching_config": known(num_blocks=blocks)} if known else {}
            answers = model.generate_batch(
                [list(prompt.token_ids) for prompt in prompts for _ in range(args.n)], generation_config=wanted,
                progress_bar=False, **bounds,
            )  # fmt: skip
            return sum(len(answer.generated_tokens) for answer in answers.values())

        ways |= {f"ours, {kind}": ours, f"generate, {kind}": generate}
        if autocast is None:  # it runs in a thread of its own, where no autocast is
            ways[f"generate_batch, {kind}"] = continuous
    times: dict[str, list[float]] = {way: [] for way in ways}
    peaks: dict[str, float | None] = {}
    figures: Figures = {"rows": rows, "tokens_per_row": tokens, "prompt_width": width}
    for number in range(args.repeats + 1):
        for way, job in list(ways.items()):
            clock.forget_peak()
            start = clock.now()
            try:
                drawn = job()
                if drawn != rows * tokens:
                    raise RuntimeError(f"{drawn} tokens; expected {rows * tokens}")
            except Exception as error:  # the other ways' figures are worth having
                traceback.print_exc()
                figures[way] = {"error": _line(error)}
                del ways[way], times[way]
                continue
            if number:
                times[way].append(clock.now() - start)
                peaks[way] = clock.peak_gib()
    for way, values in times.items():
        seconds = statistics.median(values)
        spread = round(max(values) - min(values), 4)
        figures[way] = {"seconds": round(seconds, 4), "spread_s": spread, "peak_gib": peaks[way],
                        "tokens_per_s": round(rows * tokens / seconds, 1)}  # fmt: skip
    for kind in ("autocast", "bfloat16"):
        own = figures[f"ours, {kind}"].get("seconds")
        for other in ("generate", "generate_batch"):
            theirs = figures.get(f"{other}, {kind}", {}).get("seconds")
            if own and theirs:
                figures[f"ours / {other}, {kind}"] = round(own / theirs, 3)
    return figures


def step(args: argparse.Namespace, device: Any, name: str) -> Figures:
    """SCOPE through the loop of ``scope train``; times are medians without the first step."""
    from scope_opd.cli.engines import build_engines
    from scope_opd.config import validate_config
    from scope_opd.train.loop import train
    from scope_opd.types import Verdict

    class Coin:
        async def verify(self, rollout: Any, prompt: Any) -> Verdict:
            return Verdict(correct=rollout.sample % 2 == 0, reward=float(rollout.sample % 2 == 0), reason="a coin")

    student, teacher = ("tiny", "tiny") if args.smoke else ("0.6b", "1.7b")
    clock = Clock(device)
    with tempfile.TemporaryDirectory() as folder:
        # So many end tokens that about two thirds of the responses end before their limit.
        ends = max(2, SHAPES[student][7] // args.max_tokens)
        began = time.perf_counter()
        save_folder(Path(folder) / "student", student, device, 1, ends)
        save_folder(Path(folder) / "teacher", teacher, device, 2, ends)
        saved = time.perf_counter() - began
        config = validate_config(
            {
                "model": {"path": f"{folder}/student"},
                "teacher": {"path": f"{folder}/teacher", "max_tokens_per_batch": args.microbatch},
                "rollout": {"n": args.n, "temperature": TEMPERATURE, "max_tokens": args.max_tokens},
                "objective": {"truncated": "incorrect"},
                "train": {
                    "steps": 3, "prompts_per_step": args.prompts, "lr": 2e-6, "device": device.type,
                    "max_tokens_per_microbatch": args.microbatch, "activation_checkpointing": "full",
                },
                "run": {
                    "dir": f"{folder}/run", "export": False, "checkpoint_every": 0,
                    "alarms": {"truncation": "off", "uniform_weights": "off"},
                },
            }
        )  # fmt: skip
        engines = build_engines(config).engines
        engines.pipeline.verifier = Coin()  # type: ignore[attr-defined]
        clock.forget_peak()
        result = train(config, engines, progress=False)
        rows = [json.loads(line) for line in (result.folder / "metrics.jsonl").read_text().splitlines()]
        peak = clock.peak_gib()
    timed = rows[1:]
    seconds = {
        stage: statistics.median(row[f"time/{stage}_s"] for row in timed)
        for stage in ("generation", "verify", "teacher", "update", "step")
    }
    last = timed[-1]
    tokens = {"generation": last["length/mean"] * args.prompts * args.n, "teacher": last["teacher/scored_tokens"],
              "update": last["tokens/trained"]}  # fmt: skip
    return {
        "student": student, "teacher": teacher, "rollouts": args.prompts * args.n, "save_models_s": round(saved, 1),
        "first_step_s": round(rows[0]["time/step_s"], 3),
        "stages_s": {stage: round(value, 4) for stage, value in seconds.items()},
        "tokens_per_s": {stage: round(count / seconds[stage], 1) for stage, count in tokens.items() if seconds[stage]},
        "mean_length": last["length/mean"], "losses": [row["loss"] for row in rows],
        "mismatch_kl": last["mismatch/kl"], "capped_share": last["mismatch/capped_share"], "peak_gib": peak,
    }  # fmt: skip


JOBS: dict[str, Callable[[argparse.Namespace, Any, str], Figures]] = {
    "update": update, "agreement": agreement, "logprobs": logprobs, "sampler": sampler, "step": step,
}  # fmt: skip


def child(args: argparse.Namespace) -> int:
    """The parts, in this process: a JSON line as each is begun and as it ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    import torch

    device = torch.device("cpu" if args.smoke else "cuda", None if args.smoke else 0)
    for name in args.parts:
        out.write(json.dumps({"begun": name}) + "\n")
        started = time.perf_counter()
        try:
            found = JOBS[name.split("-")[0]](args, device, name)
        except Exception as error:
            traceback.print_exc()
            found = {"error": _line(error)}
        found["part_s"] = round(time.perf_counter() - started, 1)
        out.write(json.dumps({"part": name, "found": found}) + "\n")
        if "error" in found:
            return 1  # a GPU may be left unusable
        _free(device)
    return 0


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _free(device: Any) -> None:
    import torch

    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe(smoke: bool) -> Figures:
    """The device and the versions, asked for in a process of its own: this one never touches a GPU."""
    code = """if True:
        import json, platform, sys, torch, transformers
        gpu = torch.cuda.get_device_properties(0) if sys.argv[1] == "gpu" else None
        print(json.dumps({
            "device": gpu.name if gpu else platform.machine(), "memory_gb": gpu and round(gpu.total_memory / 1e9, 1),
            "capability": gpu and f"{gpu.major}.{gpu.minor}", "python": platform.python_version(),
            "torch": torch.__version__, "cuda": torch.version.cuda, "transformers": transformers.__version__,
        }))
    """
    done = subprocess.run(
        [sys.executable, "-c", code, "cpu" if smoke else "gpu"], capture_output=True, text=True, check=False
    )
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1] if done.stderr.strip() else "no GPU"}
    return json.loads(done.stdout.splitlines()[-1])


def run_children(args: argparse.Namespace, began: float) -> Figures:
    """Every part's figures, whatever becomes of the processes."""
    found: Figures = {}
    waiting = list(args.parts)
    while waiting:
        together = waiting if args.smoke else waiting[:1]
        left = args.limit_s - (time.perf_counter() - began)
        need = min(LIMITS.get(together[0], LIMIT), args.part_limit_s)
        if left < need / 2:
            found[waiting.pop(0)] = {"skipped": f"{left:.0f} s were left of --limit-s {args.limit_s:.0f}"}
            continue
        command = [sys.executable, __file__, "--child", "--parts", *together, "--peak-tflops", str(args.peak_tflops)]
        command += [word for key in FULL for word in (f"--{key.replace('_', '-')}", str(getattr(args, key)))]
        process = subprocess.Popen([*command, *(["--smoke"] if args.smoke else [])], stdout=subprocess.PIPE, text=True)
        lines: queue.Queue[str | None] = queue.Queue()
        reader = threading.Thread(target=_read, args=(process, lines), daemon=True)
        reader.start()
        begun, deadline, told = together[0], time.perf_counter() + min(need, left), set[str]()
        while True:
            try:
                line = lines.get(timeout=max(0.0, deadline - time.perf_counter()))
            except queue.Empty:
                process.kill()
                process.wait()
                found[begun] = {"error": f"not done within {min(need, left):g} s; killed"}
                told.add(begun)
                break
            if line is None:
                code = process.wait()
                if begun not in told:
                    found[begun] = {"error": f"its process ended with code {code}"}
                    told.add(begun)
                break
            said = json.loads(line)
            if "begun" in said:
                begun = said["begun"]
                need = min(LIMITS.get(begun, LIMIT), args.part_limit_s)
                deadline = time.perf_counter() + need
            else:
                found[said["part"]] = said["found"]
                told.add(said["part"])
                print(f"{said['part']}: {json.dumps(said['found'])}", file=sys.stderr, flush=True)
        reader.join()
        assert process.stdout is not None
        process.stdout.close()
        waiting = [name for name in waiting if name not in told]
    return found


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    with contextlib.suppress(ValueError):
        for line in process.stdout:
            lines.put(line)
    lines.put(None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU: does the script run?")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bfloat16; an H100 SXM and an H200: 989")
    parser.add_argument("--limit-s", type=float, default=570.0)
    parser.add_argument(
        "--part-limit-s", type=float, default=1e9, help="no part may take longer, whatever its own limit"
    )
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    for key, value in FULL.items():
        parser.add_argument(f"--{key.replace('_', '-')}", type=int, help=f"default {value}; --smoke: {TINY[key]}")
    args = parser.parse_args()
    for key, value in (TINY if args.smoke else FULL).items():
        if getattr(args, key) is None:
            setattr(args, key, value)
    if args.child:
        return child(args)
    began = time.perf_counter()
    machine = describe(args.smoke)
    if "error" in machine:
        parser.error(f"no GPU to be had ({machine['error']}); --smoke runs on a CPU")
    found = run_children(args, began)
    failed = [name for name, part in found.items() if "error" in part]
    report = {
        "benchmark": "update_gpu", **machine, "peak_tflops": args.peak_tflops, "smoke": args.smoke, "parts": found,
        "failed": failed, "seconds": round(time.perf_counter() - began, 1),
    }  # fmt: skip
    print(json.dumps(report))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
