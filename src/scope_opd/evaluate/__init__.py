"""Evaluation: drawing and judging held-out samples (run.py) and the statistics of their counts (metrics.py).

Not covered: benchmarks by name, stored responses, servers. Nothing here imports torch.
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
