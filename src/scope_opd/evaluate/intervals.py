"""Intervals over problems, paired differences and their p-values. numpy only.

A benchmark is a draw of problems from more of the same kind: every interval here says how far a mean over problems
would move with other problems. It is a bootstrap over problems, bias-corrected and accelerated (BCa), with the normal
quantile replaced by sqrt(P / (P - 1)) t_{P-1}: a bootstrap resamples P problems whose own spread is too small by that
factor, which at 30 problems costs the plain BCa one to two points of coverage (docs/evaluation.md has the figures).

Shares that are all 0 or all 1 have no spread to resample. ``share_interval`` gives them the exact one-sided bound
1 - 0.025^(1/P) in place of an interval of no width: 0 of 30 solved excludes no more than a share above 11.6 %.

Several seeds answer the same problems. One resample of problems is drawn and used for all seeds (jointly), each seed's
figure is computed on it, and the seeds' figures are averaged. Resampling each seed on its own would treat the seeds as
having met unrelated problems, and would claim the shared difficulty of the problems to average out. Two methods are
compared in the same way, on the same resampled problems (paired).

The spread between seeds is another matter: training again gives another model, and no resampling of problems shows
that. It stands beside the interval as ``PairedDifference.seed_margin``, a t interval from the pooled variance of seeds
within methods, and a difference counts as resolved only where both exclude zero.

Not covered: differences without spread, whose interval is [x, x] and understates what is not known; the spread of the
samples of one problem apart from that of the problems (it is part of every interval, as the samples drew it).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

FloatArray = NDArray[np.float64]
BootstrapKind = Literal["bca", "percentile"]

RESAMPLES = 5_000
_CHUNK = 2_000_000
"""Resampled values held at once: about 16 MB."""
EXACT_SIGNS = 14
"""A sign-flip test enumerates all 2^m sign vectors up to this m; beyond, it draws ``SIGN_DRAWS`` of them."""
SIGN_DRAWS = 20_000
_NO_SPREAD = 1e-24


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
        kind: "bca" (bias-corrected, accelerated, widened for few problems) or "percentile" (plain).
        seed: the interval is a function of the values, ``resamples`` and this.

    Raises:
        ValueError: empty or non-finite values, or a level outside (0, 1).

    Source: Efron 1987, Better Bootstrap Confidence Intervals; Hesterberg 2015, What Teachers Should Know About the
        Bootstrap, section 3.6 (the expansion).
    """
    _check_level(level)
    sample = by_problem(values_per_problem).mean(axis=0)
    means = resampled_means(sample[None, :], resamples, seed)[0]
    return Interval(float(sample.mean()), *interval_ends([sample], means, level, kind))


def share_interval(shares: ArrayLike, *, level: float = 0.95, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """``bootstrap_interval`` of values in [0, 1], with an exact bound where all of them are 0 or all are 1."""
    values = by_problem(shares).mean(axis=0)
    found = bootstrap_interval(values, level=level, resamples=resamples, seed=seed)
    return Interval(found.value, *widened([values], (found.low, found.high), level))


def macro_interval(
    benchmarks: Sequence[ArrayLike],
    *,
    level: float = 0.95,
    resamples: int = RESAMPLES,
    seed: int = 0,
    shares: bool = False,
) -> Interval:
    """The mean over benchmarks of the mean over problems, each benchmark weighing the same, with its interval.

    Problems are resampled within their benchmark (stratified): the benchmarks themselves are fixed, so the interval
    speaks of other problems of these very benchmarks.

    Args:
        benchmarks: one F[P_b] a benchmark.
        level, resamples, seed: as for ``bootstrap_interval``.
        shares: the values lie in [0, 1]: see ``share_interval``.

    Raises:
        ValueError: no benchmark, or one with unusable values.
    """
    _check_level(level)
    strata = [by_problem(values).mean(axis=0) for values in benchmarks]
    if not strata:
        raise ValueError("no benchmarks; expected at least one")
    means = np.mean([resampled_means(s[None, :], resamples, seed, i)[0] for i, s in enumerate(strata)], axis=0)
    ends = interval_ends(strata, means, level, "bca")
    value = float(np.mean([stratum.mean() for stratum in strata]))
    return Interval(value, *(widened(strata, ends, level) if shares else ends))


def widened(strata: Sequence[FloatArray], ends: tuple[float, float], level: float) -> tuple[float, float]:
    """The ends of an interval of shares, moved to the exact bound where every value is 0 or every value is 1.

    If all P values are 1, then a share q of the problems that are solved for certain has q^P >= (1 - level) / 2 on the
    edge of the interval, and the mean is at least q. For several strata the strata's bounds are averaged.
    """
    bounds = np.mean([((1.0 - level) / 2.0) ** (1.0 / stratum.size) for stratum in strata])
    if all((stratum >= 1.0).all() for stratum in strata):
        return float(bounds), 1.0
    if all((stratum <= 0.0).all() for stratum in strata):
        return 0.0, float(1.0 - bounds)
    return ends


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
        seeds = by_problem(values).mean(axis=1)
        squares += float(((seeds - seeds.mean()) ** 2).sum())
        freedom += seeds.size - 1
    return SeedSpread(float(np.sqrt(squares / freedom)), freedom) if freedom else None


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
    left, right = by_problem(a), by_problem(b)
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


def sign_flip_p_value(differences: Sequence[ArrayLike], *, seed: int = 0) -> float:
    """Two-sided p-value of "the two models are exchangeable on every problem", by flipping the signs of differences.

    The statistic is the mean over benchmarks of the mean difference over problems. Up to ``EXACT_SIGNS`` differences
    that are not zero, all sign vectors are enumerated and the p-value is exact; beyond, ``SIGN_DRAWS`` are drawn and
    the observed one is counted among them, so that p is never 0.

    Args:
        differences: one F[P_b] a benchmark, paired by problem.
        seed: of the drawn sign vectors.
    """
    weighted = [by_problem(values).mean(axis=0) for values in differences]
    terms = np.concatenate([values / values.size for values in weighted])
    terms = terms[terms != 0.0]
    if terms.size == 0:
        return 1.0
    observed = abs(terms.sum()) * (1.0 - 1e-9)  # a sum in another order must still count as equal
    if terms.size <= EXACT_SIGNS:
        patterns = (np.arange(1 << terms.size)[:, None] >> np.arange(terms.size)) & 1
        return float((np.abs((1.0 - 2.0 * patterns) @ terms) >= observed).mean())
    rng = np.random.default_rng(np.random.SeedSequence([0x51C4, seed]))
    rows = max(1, _CHUNK // terms.size)
    extreme = 0
    for start in range(0, SIGN_DRAWS, rows):
        signs = rng.integers(0, 2, size=(min(rows, SIGN_DRAWS - start), terms.size), dtype=np.int8)
        extreme += int((np.abs((1.0 - 2.0 * signs) @ terms) >= observed).sum())
    return (extreme + 1) / (SIGN_DRAWS + 1)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: the smallest p times m, the next times m - 1 ..., never falling, at most 1."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        highest = max(highest, min(1.0, p_values[index] * (len(p_values) - rank)))
        adjusted[index] = highest
    return adjusted


# --- the machinery -----------------------------------------------------------


def by_problem(values_per_problem: ArrayLike) -> FloatArray:
    """F[P] or F[S, P] -> F[S, P], checked."""
    values = np.asarray(values_per_problem, dtype=np.float64)
    if values.ndim == 1:
        values = values[None, :]
    if values.ndim != 2 or values.size == 0:
        raise ValueError(f"values of shape {values.shape}; expected [problems] or [seeds, problems], not empty")
    if not np.isfinite(values).all():
        raise ValueError("values per problem must be finite")
    return values


def resampled_means(values: FloatArray, resamples: int, seed: int, stratum: int = 0) -> FloatArray:
    """Means of B joint resamples of the columns: F[M, P] -> F[M, B]; one draw of problems serves every row."""
    rng = np.random.default_rng(np.random.SeedSequence([0x5C0BE, seed, stratum] if stratum else [0x5C0BE, seed]))
    problems = values.shape[1]
    rows = max(1, _CHUNK // (problems * max(1, values.shape[0])))
    means = [
        values[:, rng.integers(0, problems, size=(min(rows, resamples - start), problems))].mean(axis=2)
        for start in range(0, resamples, rows)
    ]
    return np.concatenate(means, axis=1)


def interval_ends(
    strata: Sequence[FloatArray], means: FloatArray, level: float, kind: BootstrapKind
) -> tuple[float, float]:
    """Interval ends for the mean of the strata's means, given its resampled values F[B].

    BCa: the ends are the quantiles Phi(b + z / (1 - a z)), z = b -+ q, of the resampled means, with b the normal
    quantile of their share below the figure and a = sum u^3 / (6 (sum u^2)^1.5) from the values' influences
    u = (x - mean of its stratum) / P_b. q is a t quantile times the ratio of the unbiased to the resampled spread.
    """
    tail = (1.0 - level) / 2.0
    influences = [(stratum - stratum.mean()) / stratum.size for stratum in strata]
    spreads = [float((u**2).sum()) for u in influences]
    value = float(np.mean([stratum.mean() for stratum in strata]))
    total = sum(spreads)
    if total <= _NO_SPREAD:
        return value, value
    if kind == "percentile":
        low, high = np.quantile(means, [tail, 1.0 - tail])
        return float(low), float(high)
    normal = NormalDist()
    tolerance = 1e-12 * max(1.0, abs(value))
    below = float((means < value - tolerance).mean() + (means <= value + tolerance).mean()) / 2.0  # ties count half
    below = min(max(below, 1.0 / (2 * means.size)), 1.0 - 1.0 / (2 * means.size))
    bias = normal.inv_cdf(below)
    acceleration = float(sum((u**3).sum() for u in influences)) / (6.0 * total**1.5)
    unbiased = [
        spread * u.size / (u.size - 1) if u.size > 1 else 0.0 for spread, u in zip(spreads, influences, strict=True)
    ]
    freedom = sum(unbiased) ** 2 / sum(s**2 / (u.size - 1) for s, u in zip(unbiased, influences, strict=True) if s > 0)
    reach = float(np.sqrt(sum(unbiased) / total)) * t_quantile(1.0 - tail, freedom)

    def corrected(z: float) -> float:
        return normal.cdf(bias + (bias + z) / max(1.0 - acceleration * (bias + z), 1e-6))

    low, high = np.quantile(means, [corrected(-reach), corrected(reach)])
    return float(low), float(high)


def t_quantile(probability: float, freedom: float) -> float:
    """Student's t quantile by Fisher's series around the normal one; within 1 % from 5 degrees of freedom on."""
    z, v = NormalDist().inv_cdf(probability), freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    return z + first / v + second / v**2 + third / v**3


# 97.5 % quantiles of Student's t for 1..20 degrees of freedom (any table of statistics)
_T975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
         2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086)  # fmt: skip


def _t975(freedom: int) -> float:
    return _T975[freedom - 1] if freedom <= len(_T975) else 1.960 + 2.50 / freedom  # within 0.005 beyond the table


def _check_level(level: float) -> None:
    if not 0.0 < level < 1.0:
        raise ValueError(f"level = {level}; expected 0 < level < 1")
