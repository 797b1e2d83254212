"""Trains the zoo's teacher and student from nothing, on a CPU, in minutes, from one seed.

Both are real ``Qwen3ForCausalLM`` models with tied embeddings, trained on random-order demonstrations of freshly drawn
problems of the train split: short ones (2..6 items) for the first 30 % of the steps, the task's own lengths after.
Muon moves the 2-D matrices inside the layers, AdamW the embedding and the norms. Learning is a sharp transition, so the
student is checkpointed every few steps, training stops when it has become too good, and the checkpoint whose Avg at
T=0.6 is nearest to the target is shipped. The choice is made on train-split problems; the figures reported are those
of the held-out rows, which no choice of a checkpoint has seen. Avg swings by 5 to 10 points within ten steps, hence
the frequent looks; looks and held-out rows differ by about 2 points of sampling error.

The result is deterministic for a given thread count, torch version and processor. Not covered: GPUs, other tasks,
on-policy training (that is what the rest of the package is for).
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.utils import logging

from scope_opd.errors import RunFailed, RunFolderError
from scope_opd.zoo.task import (
    EASY,
    MAX_RESPONSE_TOKENS,
    SHIPPED_ROWS,
    SPLITS,
    check_work,
    demonstration,
    draw_problem,
    generate_rows,
    rows_to_jsonl,
)
from scope_opd.zoo.tokenizer import VOCABULARY_SIZE, build_tokenizer

Progress = Callable[[str], None]
IGNORED = -100
PAST_MARGIN = 10.0
"""Points above the acceptable that end a search for a target: looks are noisy, so the first one above does not."""


@dataclass(frozen=True)
class ModelSettings:
    """One model of the zoo and how it is trained.

    Attributes:
        hidden, layers, mlp, heads: sizes of the Qwen3 model (head size is hidden / heads).
        lr: peak learning rate of both optimisers.
        steps: length of the schedule.
        accept: lowest and highest Avg at T=0.6 that may be shipped, in per cent, as measured for the choice.
        target: Avg at T=0.6 wanted of the chosen checkpoint, in per cent; None takes the end of the schedule.
    """

    hidden: int
    layers: int
    mlp: int
    heads: int
    lr: float
    steps: int
    accept: tuple[float, float]
    target: float | None = None


@dataclass(frozen=True)
class ZooSettings:
    """Everything that decides what a build makes, apart from its seed. The defaults are what is shipped.

    Attributes:
        teacher, student: the two models.
        batch_size: demonstrations in a step.
        n_min, n_max: items of a problem, in the data and after the short ones.
        short_n, short_share: items of a problem in the first share of the steps.
        look_every: steps between two looks at a model with a target, once the short problems are over.
        look_problems, look_samples: train-split problems of a look, and responses to each.
        rows: rows of each data file.
        heldout_samples: responses to each held-out row for the figures reported.
        threads: torch threads while building; part of what makes the result reproducible.
    """

    teacher: ModelSettings = field(default_factory=lambda: ModelSettings(128, 3, 256, 4, 4e-3, 640, (93, 100)))
    student: ModelSettings = field(default_factory=lambda: ModelSettings(64, 2, 128, 4, 5e-3, 1000, (22, 30), 26))
    batch_size: int = 32
    n_min: int = EASY[0]
    n_max: int = EASY[1]
    short_n: tuple[int, int] = (2, 6)
    short_share: float = 0.3
    look_every: int = 5
    look_problems: int = 512
    look_samples: int = 4
    rows: dict[str, int] = field(default_factory=lambda: {str(split): SHIPPED_ROWS[split] for split in SPLITS})
    heldout_samples: int = 8
    threads: int = 1


@dataclass(frozen=True)
class Trained:
    """A model as chosen, the step and the Avg at T=0.6 (per cent, choosing problems) that chose it, and the time."""

    model: Qwen3ForCausalLM
    step: int
    avg: float
    seconds: float


def new_model(settings: ModelSettings, seed: int) -> Qwen3ForCausalLM:
    """An untrained Qwen3 with tied embeddings and vocabulary 64, in float32; a function of (settings, seed)."""
    tokenizer = build_tokenizer()
    config = Qwen3Config(
        vocab_size=VOCABULARY_SIZE,
        hidden_size=settings.hidden,
        num_hidden_layers=settings.layers,
        intermediate_size=settings.mlp,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        head_dim=settings.hidden // settings.heads,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        use_cache=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM(config).float()


def training_batch(
    tokenizer: PreTrainedTokenizerFast, count: int, n_min: int, n_max: int, rng: random.Random
) -> tuple[Tensor, Tensor]:
    """Demonstrations as tokens, padded on the right.

    Returns:
        (input_ids, labels), both [count, longest]; labels are ``IGNORED`` on prompt and padding. No attention mask is
        needed: with causal attention nothing that counts can see the padding.
    """
    rows = []
    for _ in range(count):
        problem = draw_problem("train", n_min, n_max, rng)
        prompt: list[int] = tokenizer(f"{problem} :")["input_ids"]
        response = [*tokenizer(demonstration(problem, rng))["input_ids"], tokenizer.eos_token_id]
        rows.append((prompt, response))
    longest = max(len(prompt) + len(response) for prompt, response in rows)
    input_ids = torch.full((count, longest), tokenizer.pad_token_id)
    labels = torch.full((count, longest), IGNORED)
    for index, (prompt, response) in enumerate(rows):
        end = len(prompt) + len(response)
        input_ids[index, :end] = torch.tensor(prompt + response)
        labels[index, len(prompt) : end] = torch.tensor(response)
    return input_ids, labels


def make_optimizers(model: Qwen3ForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the 2-D matrices inside the layers, AdamW for the (tied) embedding and the norms."""
    inside = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    outside = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    return [
        torch.optim.Muon(inside, lr=lr, weight_decay=0.0, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(outside, lr=lr, weight_decay=0.0, betas=(0.9, 0.99)),
    ]


def train_steps(
    model: Qwen3ForCausalLM, settings: ModelSettings, zoo: ZooSettings, *, seed: int, name: str
) -> Iterator[tuple[int, float]]:
    """Train in place; yields (steps done, loss in nats a token) after each step. The consumer may stop at any time.

    Step s sees demonstrations that are a function of (seed, name, s).
    """
    tokenizer = build_tokenizer()
    optimizers = make_optimizers(model, settings.lr)
    for step in range(settings.steps):
        rng = random.Random(f"zoo-build/{seed}/{name}/{step}")
        short = step < zoo.short_share * settings.steps
        sizes = zoo.short_n if short else (zoo.n_min, zoo.n_max)
        input_ids, labels = training_batch(tokenizer, zoo.batch_size, *sizes, rng)
        scale = _schedule(step, settings.steps)
        model.train()
        logits = model(input_ids=input_ids, use_cache=False).logits[:, :-1]
        loss = F.cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = settings.lr * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        yield step + 1, loss.item()


def _schedule(step: int, steps: int) -> float:
    """Share of the peak rate: up over 3 % of the steps, flat, then linearly down to a tenth over the last 40 %."""
    up = min(1.0, (step + 1) / max(1.0, 0.03 * steps))
    down = min(1.0, 0.1 + 0.9 * (steps - step) / (0.4 * steps))
    return up * down


@torch.no_grad()
def sample_responses(
    model: Qwen3ForCausalLM, problems: Sequence[str], *, samples: int, temperature: float, seed: int
) -> list[list[str]]:
    """Draw ``samples`` responses of at most ``MAX_RESPONSE_TOKENS`` tokens for each problem.

    Problems of equal length are drawn together, so that no prompt is padded.

    Returns:
        texts without special tokens, [problem][sample].
    """
    tokenizer = build_tokenizer()
    generator = torch.Generator().manual_seed(seed)
    model.eval()
    by_length: dict[int, list[int]] = {}
    for index, problem in enumerate(problems):
        by_length.setdefault(len(problem.split()), []).append(index)
    texts: list[list[str]] = [[] for _ in problems]
    for _, members in sorted(by_length.items()):
        prompts = tokenizer([f"{problems[index]} :" for index in members])["input_ids"]
        tokens = torch.tensor(prompts).repeat_interleave(samples, dim=0)
        drawn, cache = [], None
        done = torch.zeros(len(tokens), dtype=torch.bool)
        for _ in range(MAX_RESPONSE_TOKENS):
            output = model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = output.past_key_values
            probabilities = (output.logits[:, -1] / temperature).softmax(-1)
            tokens = torch.multinomial(probabilities, 1, generator=generator)
            drawn.append(torch.where(done, tokenizer.pad_token_id, tokens[:, 0]))
            done |= tokens[:, 0] == tokenizer.eos_token_id
            if done.all():
                break
        decoded = tokenizer.batch_decode(torch.stack(drawn, 1), skip_special_tokens=True)
        for row, index in enumerate(members):
            texts[index] = decoded[row * samples : (row + 1) * samples]
    return texts


def avg_percent(
    model: Qwen3ForCausalLM, rows: Sequence[dict[str, str]], *, samples: int, temperature: float, seed: int
) -> float:
    """Avg@samples: per cent of all sampled responses that are right, work and answer."""
    problems = [row["problem"] for row in rows]
    texts = sample_responses(model, problems, samples=samples, temperature=temperature, seed=seed)
    right = [
        check_work(row["problem"], row["answer"], text)[0]
        for row, many in zip(rows, texts, strict=True)
        for text in many
    ]
    return 100.0 * sum(right) / len(right)


def train_model(name: str, settings: ModelSettings, zoo: ZooSettings, *, seed: int, progress: Progress) -> Trained:
    """Train one model from nothing and choose the checkpoint to ship.

    Without a target that is the end of the schedule. With one, training stops when a look finds Avg at T=0.6 well above
    what is acceptable, and the look nearest to the target wins.

    Raises:
        RunFailed: the chosen checkpoint is outside ``settings.accept``.
    """
    started = time.perf_counter()
    model = new_model(settings, random.Random(f"zoo-init/{seed}/{name}").getrandbits(32))
    # Another seed than the data files: the choice is made on problems that training on them does not see.
    rows = generate_rows("train", zoo.look_problems, n_min=zoo.n_min, n_max=zoo.n_max, seed=seed + 1)
    chosen: tuple[float, int, dict[str, Tensor]] | None = None
    for step, loss in train_steps(model, settings, zoo, seed=seed, name=name):
        last = step == settings.steps
        if step % 50 == 0 or last:
            progress(f"{name}: step {step}/{settings.steps}, loss {loss:.3f}")
        due = settings.target is not None and step % zoo.look_every == 0 and step > zoo.short_share * settings.steps
        if not (due or last):
            continue
        avg = avg_percent(model, rows, samples=zoo.look_samples, temperature=0.6, seed=seed)
        progress(f"{name}: step {step}/{settings.steps}, Avg at T=0.6 {avg:.1f} %")
        if chosen is None or settings.target is None or abs(avg - settings.target) < abs(chosen[0] - settings.target):
            chosen = (avg, step, {key: value.detach().clone() for key, value in model.state_dict().items()})
        if settings.target is not None and avg > settings.accept[1] + PAST_MARGIN:
            break
    assert chosen is not None
    avg, step, state = chosen
    low, high = settings.accept
    if not low <= avg <= high:
        raise RunFailed(
            f"the zoo's {name} of seed {seed} reached Avg {avg:.1f} % at T=0.6", f"{low}..{high} %", "try another seed"
        )
    model.load_state_dict(state)
    return Trained(model, step, avg, time.perf_counter() - started)


def build(
    out_dir: str | Path,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    settings: ZooSettings | None = None,
) -> dict[str, Any]:
    """Recreate the whole zoo: data files, teacher, student, ``zoo.json``.

    Args:
        out_dir: a new or empty folder; gets data/, models/teacher, models/student and zoo.json.
        seed: decides initial weights, demonstrations and draws; the data files too (0 for those shipped).
        progress: called with one line of text now and then.
        settings: sizes and lengths; the shipped ones by default.

    Returns:
        What zoo.json holds: seed, versions, settings, seconds, and for each model its parameters, the step chosen, Avg
        on the choosing problems and Avg on the held-out rows at T=0.6 and T=1 (per cent).

    Raises:
        RunFolderError: ``out_dir`` is not empty.
        RunFailed: a model came out outside what its settings accept.
    """
    zoo, out = settings or ZooSettings(), Path(out_dir)
    report = progress or (lambda line: None)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunFolderError(f"{out} is not empty", "a new or empty folder", "choose another one or remove it")
    started, threads = time.perf_counter(), torch.get_num_threads()
    (out / "data").mkdir(parents=True)
    files = {
        split: generate_rows(split, zoo.rows[split], n_min=zoo.n_min, n_max=zoo.n_max, seed=seed) for split in SPLITS
    }
    for split, rows in files.items():
        (out / "data" / f"{split}.jsonl").write_text(rows_to_jsonl(rows), encoding="utf-8")
    models: dict[str, dict[str, Any]] = {}
    torch.set_num_threads(zoo.threads)
    try:
        for name, wanted in (("teacher", zoo.teacher), ("student", zoo.student)):
            trained = train_model(name, wanted, zoo, seed=seed, progress=report)
            heldout = {
                key: avg_percent(
                    trained.model, files["heldout"], samples=zoo.heldout_samples, temperature=temperature, seed=seed
                )
                for key, temperature in (("avg_t0.6", 0.6), ("avg_t1.0", 1.0))
            }
            models[name] = {
                "parameters": sum(p.numel() for p in trained.model.parameters()),
                "step": trained.step,
                "selection_avg_t0.6": round(trained.avg, 2),
                "heldout": {key: round(avg, 2) for key, avg in heldout.items()},
                "train_s": round(trained.seconds, 1),
            }
            report(f"{name}: held-out Avg {heldout['avg_t0.6']:.1f} % at T=0.6, {heldout['avg_t1.0']:.1f} % at T=1")
            _save(out / "models" / name, name, trained.model, models[name])
    finally:
        torch.set_num_threads(threads)
    record = {
        "seed": seed,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "settings": asdict(zoo),
        "models": models,
        "seconds": round(time.perf_counter() - started, 1),
    }
    (out / "zoo.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return record


def _save(folder: Path, name: str, model: Qwen3ForCausalLM, facts: dict[str, Any]) -> None:
    """One Hugging Face folder: config, generation config, weights, tokenizer and a model card."""
    tokenizer = build_tokenizer()
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model.save_pretrained(folder)
    finally:
        if bars:
            logging.enable_progress_bar()
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text(
        f"""# SCOPE zoo: {name}

A Qwen3 model of {facts["parameters"]} parameters, trained from nothing by `scope zoo build` on random-order
demonstrations of one task: a signed running sum modulo 23 (`scope_opd.zoo.task`). It knows nothing else.

Avg on the held-out rows, strict check of the work: {facts["heldout"]["avg_t0.6"]} % at T=0.6,
{facts["heldout"]["avg_t1.0"]} % at T=1, at step {facts["step"]} of its training.
Prompt `-2 +15 :`, response `+ 15 15 - 2 13 # 13`, at most {MAX_RESPONSE_TOKENS} tokens.
""",
        encoding="utf-8",
    )
