"""Checks of a pair, its data and its settings as ``Finding``s: training stops at a FAIL, ``scope doctor`` lists all.

Not covered: whether a run will learn anything.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from scope_opd.config import Config
from scope_opd.errors import ModelError
from scope_opd.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Level = Literal["ok", "warn", "FAIL"]
MAX_FULL_LR = 2e-5
LORA_LR = (1e-5, 1e-3)
"""Learning rates of adapters outside of which a run of a large model is warned."""
LARGE_MODEL = 100_000_000
"""Parameters above which a learning rate over ``MAX_FULL_LR`` is warned of."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One line of a diagnosis: what was looked at, how it stands, what was found, and what to do about it."""

    subject: str
    level: Level
    found: str
    remedy: str = ""

    def __str__(self) -> str:
        return f"{self.subject}: {self.found}" + (f"; {self.remedy}" if self.remedy else "")


def enforce(findings: Iterable[Finding]) -> list[str]:
    """The warnings, as lines.

    Raises:
        ModelError: the first FAIL.
    """
    listed = list(findings)
    for finding in listed:
        if finding.level == "FAIL":
            raise ModelError(f"{finding.subject}: {finding.found}", "a pair that fits together", finding.remedy)
    return [str(finding) for finding in listed if finding.level == "warn"]


def compare_tokenizers(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> Finding:
    """Student and teacher must mean the same token by every id that both have; ids of only one are a warning."""
    from scope_opd.models.loading import vocabulary_mismatch

    mismatch = vocabulary_mismatch(student, teacher)
    different = [(index, one, other) for index, one, other in mismatch if one is not None and other is not None]
    subject = "tokenizers"
    if different:
        index, one, other = different[0]
        return Finding(
            subject,
            "FAIL",
            f"{len(different)} ids mean different tokens; id {index} is {one!r} to the student and {other!r} to the "
            f"teacher",
            "choose a teacher with the student's vocabulary: its scores are taken by id",
        )
    if mismatch:
        ours = sum(other is None for _, _, other in mismatch)
        theirs = len(mismatch) - ours
        return Finding(
            subject,
            "warn",
            f"all common ids agree; {ours} only the student has, {theirs} only the teacher",
            "a teacher's score of a token that it does not know means little",
        )
    return Finding(subject, "ok", f"{len(student.get_vocab())} ids, all the same")


def unknown_tokenizer() -> Finding:
    """Scores are taken by id: nobody but its tokenizer can say whether a served teacher means the same by an id."""
    return Finding(
        "tokenizers",
        "warn",
        "the served teacher's tokenizer is not known",
        "set teacher.tokenizer to its folder or hub id, so that it can be compared with the student's",
    )


def common_vocabulary(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that mean the same token to both, in order: an exact KL is taken over these.

    Raises:
        ModelError: there are none.
    """
    theirs = teacher.get_vocab()
    common = tuple(sorted(index for token, index in student.get_vocab().items() if theirs.get(token) == index))
    if not common:
        raise ModelError(
            "tokenizers: no id means the same token to student and teacher", "a pair that fits together",
            "choose a teacher with the student's vocabulary",
        )  # fmt: skip
    return common


def vocabulary_rows(prompts: Sequence[Prompt], ends: Sequence[int], name: str, rows: int) -> Finding:
    """Every id of the prompts and every end token must have a row in the model."""
    largest = max(max(prompt.token_ids) for prompt in prompts)
    largest = max([largest, *ends])
    subject = f"{name} vocabulary"
    if largest >= rows:
        return Finding(
            subject, "FAIL", f"the prompts use id {largest} and the model has {rows} rows",
            "the tokenizer belongs to another model: check the folder",
        )  # fmt: skip
    return Finding(subject, "ok", f"{rows} rows, the largest prompt or end id is {largest}")


def learning_rate(config: Config, parameters: int) -> Finding:
    """A rate that was meant for pure bf16 trains far harder with float32 master weights, and for adapters is small."""
    lr, subject = config.train.lr, "learning rate"
    if config.model.lora.rank:
        if parameters <= LARGE_MODEL or LORA_LR[0] <= lr <= LORA_LR[1]:
            return Finding(
                subject, "ok", f"{lr:g}, {config.train.schedule}, of adapters of rank {config.model.lora.rank}"
            )
        return Finding(
            subject,
            "warn",
            f"train.lr = {lr:g} for adapters",
            "start at about 1e-4: adapters take ten times the rate of full fine-tuning and more",
        )
    if config.train.param_dtype == "float32" and parameters > LARGE_MODEL and lr > MAX_FULL_LR:
        return Finding(
            subject,
            "warn",
            f"train.lr = {lr:g} for full fine-tuning of {parameters / 1e6:.0f}M parameters with float32 weights",
            "start at about 2e-6 (the paper's 5e-5 was used with pure bfloat16 weights, where most updates round away)",
        )
    return Finding(subject, "ok", f"{lr:g}, {config.train.schedule}, {parameters / 1e6:.3g}M parameters")


def temperature(config: Config) -> Finding:
    """Log-probs at another temperature than the one that samples estimate no KL of the sampled policy."""
    convention, sampled = config.objective.temperature, config.rollout.temperature
    if convention == "raw" and sampled != 1.0:
        return Finding(
            "temperature",
            "warn",
            f"objective.temperature = 'raw' with samples at rollout.temperature = {sampled:g}",
            "log-probs at 1 estimate no KL at another temperature; use 'matched'",
        )
    return Finding("temperature", "ok", f"{convention}, samples at {sampled:g}")


def preset(config: Config) -> Finding:
    """The presets of the release are those of a method with two paths, their denominators above all."""
    name, method = config.objective.preset, config.objective.method
    if name is not None and name.startswith("as_") and method not in ("scope", "dual_path"):
        return Finding(
            "preset",
            "warn",
            f"objective.preset = {name!r} with objective.method = {method!r}: aggregation = "
            f"{config.objective.aggregation!r}, temperature = {config.objective.temperature!r} and truncated = "
            f"{config.objective.truncated!r} hold for it too",
            "the preset is meant for scope: leave it out, or set objective.aggregation beside it",
        )
    return Finding("preset", "ok", name or "none")


def teacher_samples(config: Config) -> Finding:
    """Where the teacher samples, its temperature and that of the student's log-probs should be one."""
    theirs = config.teacher.temperature or config.rollout.temperature
    ours = 1.0 if config.objective.temperature == "raw" else config.rollout.temperature
    if theirs != ours:
        return Finding(
            "teacher's samples",
            "warn",
            f"the teacher samples at {theirs:g}, the student's log-probs are taken at {ours:g}",
            f"at {ours:g} the student will imitate the teacher at {theirs:g}: its logits tend to {ours / theirs:.3g} "
            f"times the teacher's; for the same logits leave teacher.temperature out",
        )
    return Finding("teacher's samples", "ok", f"drawn and learnt at {ours:g}")


def overlap(train: Sequence[Prompt], held_out: Sequence[Prompt]) -> Finding:
    """Problems that are in both data sets, letter for letter."""
    problems = {prompt.problem.strip() for prompt in train}
    both = [prompt.id for prompt in held_out if prompt.problem.strip() in problems]
    if both:
        return Finding(
            "held-out data",
            "warn",
            f"{len(both)} of {len(held_out)} problems are in data.train too, the first {both[0]}",
            "remove them from one side: the evaluation would flatter",
        )
    return Finding("held-out data", "ok", f"{len(held_out)} problems, none of them in data.train")


def estimated_memory(
    config: Config, shapes: dict[str, tuple[int, Any]], tokens: int, *, gpu: bool = False
) -> tuple[int, str]:
    """Bytes that a step needs, roughly, and how they add up. Activations and Python itself come on top.

    Args:
        config: of the run.
        shapes: (parameters, model config) by "student" and, where it is loaded, "teacher".
        tokens: longest prompt plus response.
        gpu: whether the models are on one, where a teacher's dtype "auto" is bfloat16.
    """
    from scope_opd.models.head import CHUNK_LOGITS

    parameters, student = shapes["student"]
    width = 2 if config.train.param_dtype == "bfloat16" else 4
    moments = 1 if config.train.optimizer == "muon" else 2
    trained, each = parameters, width
    if config.model.lora.rank:
        from scope_opd.models.footprint import shape_of

        trained, each = shape_of(student, config.model.lora).adapters, 4
    state = 1 + 4 / 256 if config.train.optimizer == "adamw_8bit" else each
    if config.train.offload == "optimizer" and gpu:
        state = 0
    parts = {
        "weights": parameters * width,
        "gradients": trained * each,
        "optimiser": int(trained * state * moments),
        "logits chunk": 3 * CHUNK_LOGITS * 4 if student.vocab_size * 512 > CHUNK_LOGITS else 0,
        "decoding cache": _cache_bytes(config, student, tokens, width),
    }
    if "teacher" in shapes:
        halved = config.teacher.dtype == "bfloat16" or (gpu and config.teacher.dtype == "auto")
        parts["teacher"] = shapes["teacher"][0] * (2 if halved else 4)
    if config.objective.reference_kl > 0:
        parts["reference"] = parameters * width
    return sum(parts.values()), " + ".join(f"{name} {gigabytes(size)}" for name, size in parts.items() if size)


def _cache_bytes(config: Config, model: Any, tokens: int, width: int) -> int:
    """Keys and values of the sequences decoded at once."""
    heads = getattr(model, "num_key_value_heads", None) or model.num_attention_heads
    head = getattr(model, "head_dim", None) or model.hidden_size // model.num_attention_heads
    rows = config.train.prompts_per_step * config.rollout.n
    rows = min(rows, config.rollout.max_rows or rows)
    return int(rows * tokens * model.num_hidden_layers * 2 * heads * head * width)


def gigabytes(size: float) -> str:
    """ "1.2 GB", or megabytes below a tenth of that."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def free_memory() -> int | None:
    """Bytes of main memory that are available, None where the system does not say."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (OSError, ValueError):
        return None


def writable(folder: Path) -> bool:
    """Whether ``folder`` is, or could be made, a folder that this process may write."""
    place = folder.absolute()
    while not place.exists():
        place = place.parent
    return place.is_dir() and os.access(place, os.W_OK | os.X_OK)


def free_disk(path: Path) -> int:
    """Bytes free where ``path`` is or will be."""
    place = path.absolute()
    while not place.exists():
        place = place.parent
    return shutil.disk_usage(place).free
