"""A config's models, and what samples and scores with them in this process.

Not covered: what a run does with them (``engines``), the checks of one against another (``checks``).
"""

from __future__ import annotations

import contextlib
import copy
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from scope_opd.config import Config
from scope_opd.models.head import HeadView
from scope_opd.models.loading import load_model
from scope_opd.models.packed_attention import enable
from scope_opd.models.rows import Rows, rows_logprobs
from scope_opd.ranks import Ranks
from scope_opd.rollout.local import LocalSampler
from scope_opd.teacher.ends import EndTokens
from scope_opd.teacher.local import LocalTeacher
from scope_opd.train.engines import TokenFunction

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def autocast_dtype(config: Config, device: torch.device) -> torch.dtype | None:
    """What the student computes in where it is not its weights' own: bfloat16 for float32 weights on a GPU."""
    return torch.bfloat16 if device.type == "cuda" and config.train.param_dtype == "float32" else None


def load_student(
    config: Config, device: torch.device, dtype: torch.dtype | None = None, *, in_files: bool = False
) -> PreTrainedModel:
    """The student in ``train.param_dtype`` on its device, without adapters.

    Args:
        config: the run.
        device: on which.
        dtype: another than ``train.param_dtype``.
        in_files: see ``load_model``.
    """
    model = config.model
    return load_model(
        model.path,
        revision=model.revision,
        dtype=dtype or getattr(torch, config.train.param_dtype),
        device=device,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        in_files=in_files,
    )


def load_trainee(config: Config, device: torch.device, ranks: Ranks) -> PreTrainedModel:
    """The student that is trained, without adapters. Weights of which a rank gets a share wait for that in their files.

    A frozen reference is a copy of the whole student, which is loaded as a whole then.
    """
    return load_student(config, device, in_files=ranks.world > 1 and config.objective.reference_kl == 0)


def plain_student(config: Config, device: torch.device) -> PreTrainedModel:
    """With several ranks: the copy that decodes and is published, in the dtype that the student computes in."""
    computes = autocast_dtype(config, device)
    if computes is None or (config.rollout.served and config.serving.student.dtype == "float32"):
        return load_student(config, device)
    return load_student(config, device, computes)


def load_teacher(config: Config, device: torch.device) -> PreTrainedModel:
    """The teacher, frozen, in ``teacher.dtype``."""
    teacher = config.teacher
    dtype = teacher.dtype if teacher.dtype != "auto" else "bfloat16" if device.type == "cuda" else "float32"
    loaded = load_model(
        teacher.path,
        revision=teacher.revision,
        dtype=getattr(torch, dtype),
        device=device,
        attn_implementation=teacher.attn_implementation,
        trust_remote_code=teacher.trust_remote_code,
    )
    loaded.requires_grad_(False)
    return loaded


def teacher_temperature(config: Config) -> float:
    """What the teacher's logits are divided by: the sampling temperature if ``matched``, else 1."""
    return config.rollout.temperature if config.objective.temperature == "matched" else 1.0


def student_temperature(config: Config) -> float:
    """What the student's logits are divided by in the objective."""
    return 1.0 if config.objective.temperature == "raw" else config.rollout.temperature


def local_teacher(config: Config, teacher: PreTrainedModel, ends: EndTokens | None) -> LocalTeacher:
    """The teacher that scores in this process."""
    return LocalTeacher(
        teacher,
        temperature=teacher_temperature(config),
        max_tokens_per_batch=config.teacher.max_tokens_per_batch,
        log_prob_floor=config.teacher.log_prob_floor,
        ends=ends,
        keep_bytes=0 if config.objective.distill == "sampled" else int(config.teacher.keep_hidden_gib * 2**30),
    )


def teacher_sampler(
    config: Config, teacher: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, student: PreTrainedModel
) -> LocalSampler:
    """Draws the teacher's responses, for ``kd``."""
    # A teacher's head may have more rows: what the student has no row for it could not be trained on.
    return LocalSampler(teacher, tokenizer, max_rows=config.rollout.max_rows, vocabulary=head_rows(student))


def eval_sampler(
    config: Config, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, autocast: torch.dtype | None
) -> LocalSampler:
    """Decodes no more rows at once than training does, so that what trains also evaluates in the same memory."""
    rows = config.rollout.max_rows or config.train.prompts_per_step * config.rollout.n
    return LocalSampler(model, tokenizer, max_rows=rows, autocast=autocast)


def frozen_reference(config: Config, student: PreTrainedModel, autocast: torch.dtype | None) -> TokenFunction:
    """Log-probs of the student as it was loaded: resuming loads the same weights before the checkpoint's."""
    view = HeadView(copy.deepcopy(student).requires_grad_(False))
    enable(view.model)  # it takes packs where the student does
    temperature = student_temperature(config)

    def logprobs(rows: Rows, positions: Tensor) -> Tensor:
        precision: Any = contextlib.nullcontext()
        if autocast is not None:
            precision = torch.autocast(rows.input_ids.device.type, dtype=autocast)
        with torch.no_grad(), precision:
            return rows_logprobs(view, rows, positions, temperature, entropy=False).logprobs

    return logprobs


def head_rows(model: PreTrainedModel) -> int:
    """Ids that a model can both read and predict."""
    head: Any = model.get_output_embeddings()
    return min(embedding_rows(model), int(head.weight.shape[0])) if head is not None else embedding_rows(model)


def embedding_rows(model: PreTrainedModel) -> int:
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.num_embeddings)
