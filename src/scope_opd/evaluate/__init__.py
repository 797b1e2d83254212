"""Evaluation: what is drawn and judged (run, session, responses), kept (store), counted and compared.

Benchmarks by name stand in ``benchmarks`` (rows by ``adapters``, reading by ``loading``); figures in ``metrics`` and
``intervals``; results.json in ``results`` and ``tables``; comparisons in ``compare`` and ``plots``.

Not covered: engines, which arrive as Protocols; servers. Nothing here imports torch.
"""

from scope_opd.evaluate.metrics import (
    Interval,
    PairedDifference,
    SeedSpread,
    avg_at_k,
    bootstrap_interval,
    paired_difference,
    pass_at_k,
    pass_at_k_with_replacement,
    pooled_seed_spread,
    powers_of_two,
    summarise,
)
from scope_opd.evaluate.run import EvalResult, evaluate, evaluation_seed

__all__ = [
    "EvalResult",
    "Interval",
    "PairedDifference",
    "SeedSpread",
    "avg_at_k",
    "bootstrap_interval",
    "evaluate",
    "evaluation_seed",
    "paired_difference",
    "pass_at_k",
    "pass_at_k_with_replacement",
    "pooled_seed_spread",
    "powers_of_two",
    "summarise",
]
