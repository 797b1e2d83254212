"""A whole run in miniature for the trainer's tests: tiny real student, teacher, sampler, pipeline and wiring.

The student and the teacher are random Qwen3 models of two layers. One token in five ends a response, so that lengths
differ, and a response counts as correct when the sum of its token ids is even, so that groups hold both kinds. Run as
a program it trains by a config file (the kill and signal tests start it that way).
"""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from scope_opd.cli.engines import paths_weighted_by_perplexity, surrogate_settings
from scope_opd.cli.inputs import build_configured_method
from scope_opd.cli.models import teacher_temperature
from scope_opd.config import Config, load_config, validate_config
from scope_opd.credit import assign_credit
from scope_opd.models.adapters import add_adapters
from scope_opd.models.packed_attention import enable
from scope_opd.models.rows import Rows, rows_logprobs
from scope_opd.pipeline import Pipeline
from scope_opd.rollout.local import LocalSampler
from scope_opd.teacher.local import LocalTeacher
from scope_opd.train import Engines, train
from scope_opd.types import Prompt, Rollout, SamplingParams, Verdict
from tiny import VOCABULARY_SIZE, tiny_model, tiny_tokenizer

TEMPERATURE = 0.7


class EvenSum:
    """Correct when the response's token ids add up to an even number."""

    async def verify(self, rollout: Rollout, prompt: Prompt) -> Verdict:
        correct = sum(rollout.token_ids) % 2 == 0
        return Verdict(correct, float(correct), str(sum(rollout.token_ids)))


class Rounds:
    """Prompts in a fixed round."""

    def __init__(self, prompts: list[Prompt], size: int) -> None:
        self.prompts, self.size = prompts, size

    def batch(self, step: int) -> list[Prompt]:
        return [self.prompts[(step * self.size + i) % len(self.prompts)] for i in range(self.size)]


def make_prompts(tokenizer: Any, count: int = 7) -> list[Prompt]:
    texts = [f"add the numbers {i} and {'1' * (i % 4 + 1)}" for i in range(count)]
    return [
        Prompt(id=f"p{i}", problem=text, answer=None, token_ids=tuple(tokenizer(text)["input_ids"]), text=text)
        for i, text in enumerate(texts)
    ]


def make_config(folder: Path, **tables: dict[str, Any]) -> Config:
    values: dict[str, Any] = {
        "rollout": {"n": 4, "temperature": TEMPERATURE, "max_tokens": 6},
        "objective": {"truncated": "incorrect"},
        "train": {"steps": 4, "prompts_per_step": 3, "lr": 1e-3, "max_tokens_per_microbatch": 256, "threads": 1},
        "run": {"dir": str(folder), "checkpoint_every": 2, "rollouts_logged": 8, "export": False},
    }
    for table, more in tables.items():
        values[table] = {**values.get(table, {}), **more}
    return validate_config(values)


def make_engines(config: Config, *, dtype: torch.dtype = torch.float32, **changes: Any) -> Engines:
    """Engines for a config; ``changes`` replace fields of ``Engines``."""
    tokenizer = tiny_tokenizer()
    student, teacher = tiny_model("qwen3", seed=1, dtype=dtype), tiny_model("qwen3", seed=2, dtype=dtype)
    add_adapters(student, config.model.lora, seed=config.run.seed)
    objective, temperature = config.objective, config.rollout.temperature
    method = build_configured_method(config)
    scorer = LocalTeacher(
        teacher,
        temperature=teacher_temperature(config),
        max_tokens_per_batch=config.teacher.max_tokens_per_batch,
        log_prob_floor=config.teacher.log_prob_floor,
    )
    pipeline = Pipeline(
        LocalSampler(teacher if method.sampled_by == "teacher" else student, tokenizer),
        EvenSum(),
        scorer,
        method.needs_teacher,
        truncated=objective.truncated,
        reward_threshold=objective.reward_threshold,
    )
    sampling = SamplingParams(
        n=config.rollout.n, temperature=temperature, max_tokens=config.rollout.max_tokens,
        stop_token_ids=tuple(range(0, VOCABULARY_SIZE, 5)), seed=config.run.seed,
    )  # fmt: skip

    def anchor(rows: Rows, positions: torch.Tensor) -> torch.Tensor:
        enable(scorer.view.model)
        return rows_logprobs(scorer.view, rows, positions, temperature).logprobs

    values: dict[str, Any] = {
        "model": student,
        "tokenizer": tokenizer,
        "pipeline": pipeline,
        "credit": partial(
            assign_credit, method=method, truncated=objective.truncated, reward_threshold=objective.reward_threshold
        ),
        "schedule": Rounds(make_prompts(tokenizer), config.train.prompts_per_step),
        "sampling": sampling,
        "surrogate": surrogate_settings(config, method, sampling, None),
        "teacher_head": scorer,
        "reference": anchor if objective.reference_kl > 0 else None,
        "weights_use_tau": paths_weighted_by_perplexity(method),
    }
    return Engines(**{**values, **changes})


def fake_evaluator(step: int, policy_version: int) -> list[dict[str, Any]]:
    return [{"temperature": 0.6, "n": 1, "problems": 1, "avg@k": float(policy_version), "pass@k": {"1": 0.5}}]


def lasting(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what may differ between two runs of the same thing."""
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


def weights_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same_weights(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


@contextmanager
def files_limited_to(size: int) -> Iterator[None]:
    """A file system that takes no more: writes beyond ``size`` bytes fail as on a full disk (EFBIG for ENOSPC)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def main(folder: str, pause_in: str, resume: str) -> int:
    """Train in a process of its own; print each phase, and sleep at the first ``pause_in`` ("phase:step").

    "writing:step" is the thread that writes a checkpoint; it sleeps for two seconds only.
    """
    import time

    from scope_opd.errors import ScopeError
    from scope_opd.train.runfolder import RunFolder
    from scope_opd.train.shards import Shards

    config = load_config(Path(folder).with_suffix(".toml"))
    told: Callable[[RunFolder, int, str], None] = RunFolder.phase

    def phase(self: RunFolder, step: int, name: str) -> None:
        told(self, step, name)
        print(f"{name}:{step}", flush=True)
        if f"{name}:{step}" == pause_in:
            time.sleep(60)

    written = Shards.write

    def write(self: Shards) -> Any:
        name = f"writing:{int(self._folder.name[-6:])}"
        print(name, flush=True)
        if name == pause_in:
            time.sleep(2)
        return written(self)

    RunFolder.phase, Shards.write = phase, write  # type: ignore[method-assign]
    try:
        train(config, make_engines(config, evaluator=fake_evaluator), resume=resume == "resume", progress=False)
    except ScopeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
