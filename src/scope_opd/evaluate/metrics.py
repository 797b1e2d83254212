"""Avg@k and Pass@k from counts of correct samples, and the figures of a set of problems. numpy only.

A problem p has c_p correct samples among n_p. Every figure is a mean over problems of a per-problem value; its interval
(``intervals``) is over problems. The numbers of samples may differ by problem (stored responses): Avg@k is then the
mean over problems of c_p / n_p, and Pass@k is reported up to the smallest n_p, so that every figure speaks of all
problems.

Not covered: intervals and differences (``intervals``), macro averages over benchmarks (``results``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scope_opd.evaluate.intervals import (
    RESAMPLES,
    FloatArray,
    Interval,
    PairedDifference,
    SeedSpread,
    bootstrap_interval,
    by_problem,
    interval_ends,
    paired_difference,
    pooled_seed_spread,
    resampled_means,
    widened,
)

__all__ = [
    "Interval",
    "PairedDifference",
    "SeedSpread",
    "avg_at_k",
    "bootstrap_interval",
    "paired_difference",
    "pass_at_k",
    "pass_at_k_with_replacement",
    "pooled_seed_spread",
    "powers_of_two",
    "summarise",
]

IntArray = NDArray[np.int64]


def _counts(correct: ArrayLike, n: ArrayLike) -> tuple[IntArray, IntArray]:
    """Counts and numbers of samples as integers of one shape, checked."""
    counts, samples = np.asarray(correct), np.asarray(n)
    for array in (counts, samples):
        if array.size and not np.array_equal(array, array.astype(np.int64)):
            raise ValueError(f"counts of samples must be whole numbers, found {array.dtype}")
    counts, samples = counts.astype(np.int64), samples.astype(np.int64)
    if samples.size and samples.min() < 1:
        raise ValueError(f"n = {samples.min()}; expected at least one sample a problem")
    if samples.ndim and samples.shape != counts.shape:
        raise ValueError(
            f"{counts.shape} counts and {samples.shape} numbers of samples; expected one of each a problem"
        )
    samples = np.broadcast_to(samples, counts.shape)
    wrong = (counts < 0) | (counts > samples)
    if wrong.any():
        raise ValueError(f"{counts[wrong][0]} correct of {samples[wrong][0]}; expected 0 <= c <= n")
    return counts, samples


def avg_at_k(counts: ArrayLike, n: ArrayLike) -> float:
    """Avg@n: the mean over problems of c / n, the share of correct samples.

    Args:
        counts: I[P], correct samples of each problem.
        n: samples of each problem, one number or I[P].

    Returns:
        A share in [0, 1]. It equals the unbiased Pass@1.

    Raises:
        ValueError: no problems, n < 1, or a count outside 0..n.
    """
    values, samples = _counts(counts, n)
    if values.size == 0:
        raise ValueError("no problems; expected at least one count")
    return float((values / samples).mean())


def pass_at_k(c: ArrayLike, n: ArrayLike, k: int) -> FloatArray:
    """Unbiased Pass@k of each problem: the chance that k of the n samples, without replacement, hold a correct one.

    1 - C(n-c, k) / C(n, k)  =  1 - prod_{j = n-c+1}^{n} (1 - k/j),  and 1 where n - c < k. The product is summed as
    log1p and closed with expm1, so that no binomial is formed and small values keep their digits.

    Args:
        c: I[...], correct samples of each problem.
        n: samples of each problem, one number or an array of c's shape.
        k: 1 <= k <= the smallest n.

    Returns:
        F[...] of c's shape, values in [0, 1].

    Raises:
        ValueError: k outside 1..n, or a count outside 0..n.

    Source: Chen et al. 2021 (arXiv 2107.03374), section 2.1.
    """
    counts, samples = _counts(c, n)
    smallest = int(samples.min()) if samples.size else int(np.min(n))
    if not 1 <= k <= smallest:
        raise ValueError(f"k = {k}; expected 1 <= k <= n = {smallest}")
    values = np.zeros(counts.shape)
    for each in np.unique(samples):
        chosen = samples == each
        values[chosen] = _pass_at_k(counts[chosen], int(each), k)
    return values


def _pass_at_k(counts: IntArray, n: int, k: int) -> FloatArray:
    reachable = n - k  # the largest c for which k wrong samples exist
    logs = np.log1p(-k / np.arange(n, n - reachable, -1, dtype=np.float64))
    none_correct = np.concatenate([[0.0], np.cumsum(logs)])
    values = -np.expm1(none_correct[np.minimum(counts, reachable)])
    return np.where(counts > reachable, 1.0, values + 0.0)


def pass_at_k_with_replacement(c: ArrayLike, n: ArrayLike, k: int) -> FloatArray:
    """The biased Pass@k of the method's first release: 1 - (1 - c/n)^k, the limit of its bootstrap with replacement.

    Always at or below ``pass_at_k`` for k > 1 (one success in 32 gives 0.638 instead of 1 at k = 32). For comparison
    with published figures only; label it as such.
    """
    counts, samples = _counts(c, n)
    if k < 1:
        raise ValueError(f"k = {k}; expected k >= 1")
    return np.asarray(1.0 - (1.0 - counts / samples) ** k)


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4 ... up to n, and n itself: the k at which Pass@k is reported."""
    ks = [1 << i for i in range(n.bit_length()) if 1 << i <= n]
    return ks if ks[-1] == n else [*ks, n]


def figures(counts: ArrayLike, n: ArrayLike, ks: Sequence[int]) -> dict[str, FloatArray]:
    """The per-problem values behind "avg@k" and each "pass@k", by name."""
    correct, samples = _counts(counts, n)
    return {"avg@k": correct / samples, **{f"pass@{k}": pass_at_k(correct, samples, k) for k in ks}}


def summarise(
    correct_counts: Sequence[int],
    n: int | Sequence[int],
    *,
    ks: Sequence[int] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """The figures of one evaluation, as they stand in ``eval.jsonl`` and ``results.json``.

    Args:
        correct_counts: I[P], correct samples of each problem.
        n: samples of each problem, one number or one a problem.
        ks: where to report Pass@k; None: 1, 2, 4 .. the smallest n.
        seed, resamples: of the bootstrap.

    Returns:
        ``{"n", "problems", "avg@k", "pass@k": {"1": ..}, "pass@k_with_replacement": {"1": ..}, "ci95": {"avg@k": [lo,
        hi], "pass@1": [lo, hi], ..}, "correct_counts"}``; shares in [0, 1]. All intervals use the same resampled
        problems. "pass@k" is unbiased; "pass@k_with_replacement" is only for comparison with figures published so.
    """
    counts, samples = _counts(correct_counts, n)
    ks = powers_of_two(int(samples.min())) if ks is None else list(ks)
    named: Mapping[str, FloatArray] = figures(counts, samples, ks)
    table = by_problem(np.stack(list(named.values())))
    means = resampled_means(table, resamples, seed)
    intervals = {
        name: list(widened([table[row]], interval_ends([table[row]], means[row], 0.95, "bca"), 0.95))
        for row, name in enumerate(named)
    }  # nothing is clipped: a bootstrap mean of shares is a share
    return {
        "n": n if isinstance(n, int) else [int(each) for each in samples],
        "problems": int(counts.size),
        "avg@k": float(table[0].mean()),
        "pass@k": {str(k): float(named[f"pass@{k}"].mean()) for k in ks},
        "pass@k_with_replacement": {str(k): float(pass_at_k_with_replacement(counts, samples, k).mean()) for k in ks},
        "ci95": intervals,
        "correct_counts": [int(c) for c in counts],
    }
