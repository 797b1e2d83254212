"""What ``scope train`` builds on the ranks that follow: models, and a sampler and a teacher where they work in process.

Rank 0 builds the run's engines (``engines``). What depends on data and tokenizers it tells the others, so that all
agree. Not covered: what a follower then does (``train.loop.follow``).
"""

from __future__ import annotations

from scope_opd.cli.early import eval_source
from scope_opd.cli.inputs import build_configured_method, needs_teacher, student_tokenizer
from scope_opd.cli.models import (
    autocast_dtype,
    eval_sampler,
    frozen_reference,
    load_teacher,
    load_trainee,
    local_teacher,
    plain_student,
    teacher_sampler,
)
from scope_opd.cli.ranks import EVALUATION, TRAIN, Facts, rank_device
from scope_opd.config import Config
from scope_opd.errors import ConfigError
from scope_opd.models.adapters import add_adapters
from scope_opd.ranks import Ranks
from scope_opd.rollout.local import LocalSampler
from scope_opd.rollout.shared import SharedSampler
from scope_opd.teacher.shared import SharedTeacher
from scope_opd.train.engines import Follower


def build_follower(config: Config, ranks: Ranks) -> Follower:
    """Load what a rank that follows needs, and register its share of sampling and scoring.

    Raises:
        ScopeError: models or settings are wrong, or rank 0 has another config.
        RunFailed: another rank failed meanwhile.
    """
    device = rank_device(config, ranks)
    method = build_configured_method(config)
    trained = load_trainee(config, device, ranks)
    add_adapters(trained, config.model.lora, seed=config.run.seed)
    autocast = autocast_dtype(config, device)
    reference = frozen_reference(config, trained, autocast) if config.objective.reference_kl > 0 else None
    by_student, evaluated = method.sampled_by == "student", eval_source(config) is not None
    plain = None
    if not config.rollout.served and (by_student or evaluated):
        plain = plain_student(config, device)
    teacher = None
    if needs_teacher(config, method) and not config.teacher.served:
        teacher = load_teacher(config, device)
    facts: Facts = ranks.meet()
    if (own := config.model_dump(mode="json")) != facts.config:
        odd = sorted(table for table in own if own[table] != facts.config.get(table))
        raise ConfigError(
            f"rank {ranks.rank} was given another [{'], ['.join(odd)}] than rank 0",
            "one config for all ranks",
            "give every rank the same file and --set",
        )
    if plain is not None:
        tokenizer = student_tokenizer(config)
        if by_student:
            SharedSampler(LocalSampler(plain, tokenizer, max_rows=config.rollout.max_rows), ranks, TRAIN)
        if evaluated:
            SharedSampler(eval_sampler(config, plain, tokenizer, None), ranks, EVALUATION)
    scorer = None
    if teacher is not None:
        scorer = local_teacher(config, teacher, facts.ends)
        SharedTeacher(scorer, ranks)
        if not by_student:
            sampler = teacher_sampler(config, teacher, student_tokenizer(config), trained)
            SharedSampler(sampler, ranks, TRAIN)
    return Follower(
        trained=trained,
        surrogate=facts.surrogate,
        ranks=ranks,
        model=plain,
        teacher_head=scorer if config.objective.distill != "sampled" else None,
        reference=reference,
    )
