"""What both sides of against_trl.py do: models, prompts, response lengths, and how a step is begun and timed.

Imported by our side and by TRL's, each in its own environment, so of scope_opd it needs the zoo's files and task alone.
Lengths are prescribed, so that both sides generate the same number of tokens and train on the same: an end token cannot
be drawn before its place and nothing else can be drawn there. Verdicts are a coin by the sample's number, for random
models solve nothing. Not covered: what is measured.
"""

from __future__ import annotations

import json
import os
import random
import resource
import sys
import time
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "src"))

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch

TEMPERATURE = 0.6
LR, BETAS, EPS, WEIGHT_DECAY, GRAD_CLIP, CLIP, DUAL_CLIP = 3e-5, (0.9, 0.99), 1e-8, 0.01, 1.0, 0.2, 3.0


@dataclass(frozen=True, slots=True)
class Shape:
    """Prompts and rollouts of a step, and the model (None: the zoo's pair).

    Attributes:
        low, high: response tokens, end token included; evenly spread over a step's rollouts.
        warm: the same of the step that warms up (both ends).
        model: fields of a Qwen3 config.
    """

    prompts: int
    samples: int
    low: int
    high: int
    warm: int
    model: dict[str, Any] | None = None

    @property
    def rows(self) -> int:
        return self.prompts * self.samples

    def lengths(self, warm: bool = False) -> list[int]:
        """Tokens of each rollout, prompt by prompt: the same for every step."""
        if warm:
            return [self.warm] * self.rows
        spread = [self.low + round(index * (self.high - self.low) / (self.rows - 1)) for index in range(self.rows)]
        random.Random(0).shuffle(spread)
        return spread


SHAPES = {
    "zoo": Shape(16, 8, 24, 48, 36),
    "real": Shape(
        4, 4, 64, 512, 8,
        {"vocab_size": 151_936, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8,
         "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64},
    ),
    "smoke": Shape(
        2, 2, 4, 10, 4,
        {"vocab_size": 2000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    ),
}  # fmt: skip


def shape_of(name: str, scale: float = 1.0) -> Shape:
    """A shape by name, its responses longer or shorter."""
    shape = SHAPES[name]
    return replace(shape, low=max(2, round(scale * shape.low)), high=max(3, round(scale * shape.high)))


def problems(shape: Shape, steps: int) -> list[str]:
    """The zoo's, in their order: ``shape.prompts`` a step."""
    from scope_opd.zoo.task import load_rows

    rows = load_rows("train")
    assert len(rows) >= steps * shape.prompts
    return [row["problem"] for row in rows[: steps * shape.prompts]]


def make_models(shape: Shape, folder: Path) -> tuple[str, str]:
    """Folders of student and teacher; random models have the zoo's tokenizer under a larger head."""
    from scope_opd.zoo import model_path

    if shape.model is None:
        return str(model_path("student")), str(model_path("teacher"))
    import torch
    from transformers import AutoTokenizer, GenerationConfig, Qwen3Config, Qwen3ForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(model_path("student"))
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    found = []
    for seed, name in enumerate(("student", "teacher")):
        torch.manual_seed(seed)
        config = Qwen3Config(**shape.model, max_position_embeddings=4096, tie_word_embeddings=True, **ids)
        model = Qwen3ForCausalLM(config)
        model.generation_config = GenerationConfig(**ids)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        found.append(str(folder / name))
    return found[0], found[1]


def prescribe(logits: torch.Tensor, drawn: int, lengths: Sequence[int], ends: Sequence[int]) -> torch.Tensor:
    """In place: rows F[R, V] that have ``drawn`` tokens end with the next one if it is their last, and else cannot."""
    import torch

    logits[:, list(ends)] = -torch.inf
    last = [row for row, length in enumerate(lengths) if length == drawn + 1]
    if last:
        logits[last] = -torch.inf
        logits[last, ends[0]] = 0.0
    return logits


def correct(sample: int) -> bool:
    """Half of every group, whatever was written."""
    return sample % 2 == 0


class Gate:
    """Holds a side at the start of every step until the other end of its standard input says go, and times the step.

    Standard output carries one JSON line at the first gate and one a step; everything else that a side prints goes to
    standard error. At the end of the input the side ends.
    """

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", buffering=1)
        os.dup2(2, 1)
        self._began: float | None = None
        self.stages: dict[str, float] = {}

    def next_step(self, **facts: Any) -> None:
        """The step before is over (``facts`` of it), the next one waits for its turn."""
        seconds = None if self._began is None else time.perf_counter() - self._began
        rss = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self._out.write(json.dumps({"seconds": seconds, "stages": self.stages, "peak_rss_mb": rss, **facts}) + "\n")
        if not sys.stdin.readline():
            raise SystemExit(0)
        self.stages = {}
        self._began = time.perf_counter()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Adds the time of a stretch to a stage."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.stages[name] = self.stages.get(name, 0.0) + time.perf_counter() - began

    def timed(self, owner: Any, method: str, name: str) -> None:
        """Every call of a method counts as a stage."""
        inner = getattr(owner, method)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            with self.stage(name):
                return inner(*args, **kwargs)

        setattr(owner, method, wrapped)
