"""Avg@k, Pass@k and their intervals, from counts of correct samples. numpy only.

A problem p has c_p correct samples among n. Every figure here is a mean over problems of a per-problem value, and every
interval is a bootstrap over problems: it says how far the figure would move with other problems of the same kind.

Several seeds answer the same problems. One resample of problems is drawn and used for all seeds (jointly), each seed's
figure is computed on it, and the seeds' figures are averaged. Resampling each seed on its own would treat the seeds as
having met unrelated problems, and would claim the shared difficulty of the problems to average out. Two methods are
compared in the same way, on the same resampled problems (paired).

The spread between seeds is another matter: training again gives another model, and no resampling of problems shows
that. It stands beside the interval as ``PairedDifference.seed_margin``, a t interval from the pooled variance of seeds
within methods, and a difference counts as resolved only where both exclude zero.

Not covered: corrections for the number of comparisons. A figure without spread (every problem solved by every sample)
has the interval [x, x], which understates what is not known.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]
BootstrapKind = Literal["bca", "percentile"]

RESAMPLES = 5_000
_CHUNK = 2_000_000
"""Resampled values held at once: about 16 MB."""


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with the ends of its interval, in the unit of the values it came from."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class SeedSpread:
    """How far seeds of one method differ: the standard deviation pooled over methods, and its degrees of freedom."""

    deviation: float
    freedom: int


@dataclass(frozen=True, slots=True)
class PairedDifference:
    """Method a minus method b on the same problems.

    Attributes:
        value, low, high: the mean difference and its 95 % interval over problems, for these very models.
        seed_margin: half the width of the 95 % t interval over seeds, t s sqrt(1/S_a + 1/S_b): what training again with
            other seeds would move. None where no method has two seeds.
    """

    value: float
    low: float
    high: float
    seed_margin: float | None

    @property
    def interval_excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0

    @property
    def resolved(self) -> bool:
        """Both the problems and, where there are several, the seeds say that the difference is not zero.

        With one seed a method this speaks of the two models at hand, not of the methods that made them.
        """
        return self.interval_excludes_zero and (self.seed_margin is None or abs(self.value) > self.seed_margin)


def _counts(correct: ArrayLike, n: int) -> IntArray:
    counts = np.asarray(correct)
    if counts.size and not np.array_equal(counts, counts.astype(np.int64)):
        raise ValueError(f"counts of correct samples must be whole numbers, found {counts.dtype}")
    counts = counts.astype(np.int64)
    if n < 1:
        raise ValueError(f"n = {n}; expected at least one sample a problem")
    if counts.size and (counts.min() < 0 or counts.max() > n):
        raise ValueError(f"counts from {counts.min()} to {counts.max()}; expected 0 <= c <= n = {n}")
    return counts


def avg_at_k(counts: ArrayLike, n: int) -> float:
    """Avg@n: the mean over problems of c / n, the share of correct samples.

    Args:
        counts: I[P], correct samples of each problem.
        n: samples of each problem.

    Returns:
        A share in [0, 1]. It equals the unbiased Pass@1.

    Raises:
        ValueError: no problems, n < 1, or a count outside 0..n.
    """
    values = _counts(counts, n)
    if values.size == 0:
        raise ValueError("no problems; expected at least one count")
    return float(values.mean() / n)


def pass_at_k(c: ArrayLike, n: int, k: int) -> FloatArray:
    """Unbiased Pass@k of each problem: the chance that k of the n samples, without replacement, hold a correct one.

    1 - C(n-c, k) / C(n, k)  =  1 - prod_{j = n-c+1}^{n} (1 - k/j),  and 1 where n - c < k. The product is summed as
    log1p and closed with expm1, so that no binomial is formed and small values keep their digits.

    Args:
        c: I[...], correct samples of each problem.
        n: samples of each problem.
        k: 1 <= k <= n.

    Returns:
        F[...] of c's shape, values in [0, 1].

    Raises:
        ValueError: k outside 1..n, or a count outside 0..n.

    Source: Chen et al. 2021 (arXiv 2107.03374), section 2.1.
    """
    counts = _counts(c, n)
    if not 1 <= k <= n:
        raise ValueError(f"k = {k}; expected 1 <= k <= n = {n}")
    reachable = n - k  # the largest c for which k wrong samples exist
    logs = np.log1p(-k / np.arange(n, n - reachable, -1, dtype=np.float64))
    none_correct = np.concatenate([[0.0], np.cumsum(logs)])
    values = -np.expm1(none_correct[np.minimum(counts, reachable)])
    return np.where(counts > reachable, 1.0, values + 0.0)


def pass_at_k_with_replacement(c: ArrayLike, n: int, k: int) -> FloatArray:
    """The biased Pass@k of the method's first release: 1 - (1 - c/n)^k, the limit of its bootstrap with replacement.

    Always at or below ``pass_at_k`` for k > 1 (one success in 32 gives 0.638 instead of 1 at k = 32). For comparison
    with published figures only; label it as such.
    """
    counts = _counts(c, n)
    if k < 1:
        raise ValueError(f"k = {k}; expected k >= 1")
    return 1.0 - (1.0 - counts / n) ** k


def powers_of_two(n: int) -> list[int]:
    """1, 2, 4 ... up to n, and n itself: the k at which Pass@k is reported."""
    ks = [1 << i for i in range(n.bit_length()) if 1 << i <= n]
    return ks if ks[-1] == n else [*ks, n]


def _resampled_means(values: FloatArray, resamples: int, seed: int) -> FloatArray:
    """Means of B joint resamples of the columns: F[M, P] -> F[M, B]; one draw of problems serves every row."""
    rng = np.random.default_rng(np.random.SeedSequence([0x5C0BE, seed]))
    problems = values.shape[1]
    rows = max(1, _CHUNK // (problems * max(1, values.shape[0])))
    means = [
        values[:, rng.integers(0, problems, size=(min(rows, resamples - start), problems))].mean(axis=2)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(means, axis=1)


def _ends(sample: FloatArray, means: FloatArray, level: float, kind: BootstrapKind) -> tuple[float, float]:
    """Interval ends for the mean of ``sample`` F[P], given its resampled means F[B]."""
    tail = (1.0 - level) / 2.0
    centred = sample - sample.mean()
    spread = float((centred**2).sum())
    if spread <= 1e-24:
        return float(sample.mean()), float(sample.mean())
    if kind == "percentile":
        low, high = np.quantile(means, [tail, 1.0 - tail])
        return float(low), float(high)
    normal = NormalDist()
    value = float(sample.mean())
    tolerance = 1e-12 * max(1.0, abs(value))
    below = float((means < value - tolerance).mean() + (means <= value + tolerance).mean()) / 2.0  # ties count half
    below = min(max(below, 1.0 / (2 * means.size)), 1.0 - 1.0 / (2 * means.size))
    bias = normal.inv_cdf(below)
    acceleration = float((centred**3).sum()) / (6.0 * spread**1.5)

    def corrected(quantile: float) -> float:
        z = bias + normal.inv_cdf(quantile)
        return normal.cdf(bias + z / (1.0 - acceleration * z))

    low, high = np.quantile(means, [corrected(tail), corrected(1.0 - tail)])
    return float(low), float(high)


def _by_problem(values_per_problem: ArrayLike) -> FloatArray:
    """F[P] or F[S, P] -> F[S, P], checked."""
    values = np.asarray(values_per_problem, dtype=np.float64)
    if values.ndim == 1:
        values = values[None, :]
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"values of shape {values.shape}; expected [problems] or [seeds, problems], not empty")
    if not np.isfinite(values).all():
        raise ValueError("values per problem must be finite")
    return values


def bootstrap_interval(
    values_per_problem: ArrayLike,
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    kind: BootstrapKind = "bca",
    seed: int = 0,
) -> Interval:
    """The mean over problems (and seeds) with a bootstrap interval over problems.

    With several seeds the same resampled problems are used for each seed and the seeds' means are averaged, which is
    the bootstrap of the per-problem mean over seeds.

    Args:
        values_per_problem: F[P], or F[S, P] with one row a seed and the same problems in each column.
        level: coverage, 0.95.
        resamples: bootstrap draws.
        kind: "bca" (bias-corrected and accelerated) or "percentile".
        seed: the interval is a function of the values, ``resamples`` and this.

    Raises:
        ValueError: empty or non-finite values, or a level outside (0, 1).

    Source: Efron 1987, Better Bootstrap Confidence Intervals.
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level = {level}; expected 0 < level < 1")
    sample = _by_problem(values_per_problem).mean(axis=0)
    means = _resampled_means(sample[None, :], resamples, seed)[0]
    return Interval(float(sample.mean()), *_ends(sample, means, level, kind))


def pooled_seed_spread(methods: Sequence[ArrayLike]) -> SeedSpread | None:
    """s^2 = sum over methods and seeds of (x - mean of its method)^2 / (seeds - methods), of the seeds' mean values.

    Two seeds say next to nothing about a standard deviation (t = 12.7); pooled over the methods of a comparison, whose
    spreads are alike, they say enough (four methods with two seeds each: t = 2.8).

    Args:
        methods: one F[P] or F[S, P] a method.

    Returns:
        None when no method has two seeds.
    """
    squares, freedom = 0.0, 0
    for values in methods:
        seeds = _by_problem(values).mean(axis=1)
        squares += float(((seeds - seeds.mean()) ** 2).sum())
        freedom += seeds.size - 1
    return SeedSpread(float(np.sqrt(squares / freedom)), freedom) if freedom else None


# 97.5 % quantiles of Student's t for 1..20 degrees of freedom (any table of statistics)
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
         2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)  # fmt: skip


def _t975(freedom: int) -> float:
    return _T975[freedom - 1] if freedom <= len(_T975) else 1.960 + 2.50 / freedom  # within 0.005 beyond the table


def paired_difference(
    a: ArrayLike,
    b: ArrayLike,
    *,
    spread: SeedSpread | None = None,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    kind: BootstrapKind = "bca",
    seed: int = 0,
) -> PairedDifference:
    """Method a minus method b, paired by problem: the bootstrap of (mean of a's seeds) - (mean of b's seeds).

    Args:
        a, b: F[P] or F[S, P]; the numbers of seeds may differ, column p must be the same problem in both.
        spread: of seeds, pooled over all methods compared; None: pooled over a and b alone.

    Raises:
        ValueError: different numbers of problems, empty or non-finite values.
    """
    left, right = _by_problem(a), _by_problem(b)
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"{left.shape[1]} and {right.shape[1]} problems; a paired difference needs the same problems")
    interval = bootstrap_interval(
        left.mean(axis=0) - right.mean(axis=0), level=level, resamples=resamples, kind=kind, seed=seed
    )
    spread = spread or pooled_seed_spread([left, right])
    margin = None
    if spread is not None:
        margin = _t975(spread.freedom) * spread.deviation * float(np.sqrt(1 / len(left) + 1 / len(right)))
    return PairedDifference(interval.value, interval.low, interval.high, margin)


def summarise(
    correct_counts: Sequence[int],
    n: int,
    *,
    ks: Sequence[int] | None = None,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> dict[str, Any]:
    """The figures of one evaluation, as they stand in ``eval.jsonl``.

    Args:
        correct_counts: I[P], correct samples of each problem.
        n: samples of each problem.
        ks: where to report Pass@k; None: 1, 2, 4 .. n.
        seed, resamples: of the bootstrap.

    Returns:
        ``{"n", "problems", "avg@k", "pass@k": {"1": ..}, "pass@k_with_replacement": {"1": ..}, "ci95": {"avg@k": [lo,
        hi], "pass@1": [lo, hi], ..}, "correct_counts"}``; shares in [0, 1]. All intervals use the same resampled
        problems. "pass@k" is unbiased; "pass@k_with_replacement" is only for comparison with figures published so.
    """
    counts = _counts(correct_counts, n)
    ks = powers_of_two(n) if ks is None else list(ks)
    named: Mapping[str, FloatArray] = {
        "avg@k": counts / n,
        **{f"pass@{k}": pass_at_k(counts, n, k) for k in ks},
    }
    table = _by_problem(np.stack(list(named.values())))
    means = _resampled_means(table, resamples, seed)
    intervals = {
        name: list(_ends(table[row], means[row], 0.95, "bca")) for row, name in enumerate(named)
    }  # _ends clips nothing: a bootstrap mean of shares is a share
    return {
        "n": n,
        "problems": int(counts.size),
        "avg@k": float(table[0].mean()),
        "pass@k": {str(k): float(named[f"pass@{k}"].mean()) for k in ks},
        "pass@k_with_replacement": {str(k): float(pass_at_k_with_replacement(counts, n, k).mean()) for k in ks},
        "ci95": intervals,
        "correct_counts": [int(c) for c in counts],
    }
