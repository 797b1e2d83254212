"""Laws of the evaluation figures: exact Pass@k, intervals that cover, counts that do not depend on arrival order."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import subprocess
import sys
from collections.abc import AsyncIterator, Sequence
from fractions import Fraction
from math import comb

import numpy as np
import pytest

from scope_opd.errors import DataError, RunFailed
from scope_opd.evaluate import (
    avg_at_k,
    bootstrap_interval,
    evaluate,
    evaluation_seed,
    paired_difference,
    pass_at_k,
    pass_at_k_with_replacement,
    pooled_seed_spread,
    powers_of_two,
    summarise,
)
from scope_opd.evaluate.intervals import holm, macro_interval, share_interval, sign_flip_p_value, t_quantile
from scope_opd.types import Prompt, Rollout, Sampler, SamplingParams, Verdict, Verifier

# --- figures -----------------------------------------------------------------


def test_pass_at_k_equals_exact_rational_arithmetic() -> None:
    worst = 0.0
    for n in range(1, 65):
        counts = np.arange(n + 1)
        for k in range(1, n + 1):
            every = comb(n, k)
            exact = [float(Fraction(every - comb(n - c, k), every)) for c in range(n + 1)]
            worst = max(worst, float(np.abs(pass_at_k(counts, n, k) - exact).max()))
    assert worst <= 1e-12


def test_pass_at_k_of_problems_with_different_n_is_each_problem_s_own() -> None:
    counts, ns = np.array([1, 0, 3, 2]), np.array([4, 8, 8, 2])
    for k in (1, 2):
        alone = [float(pass_at_k(int(c), int(n), k)) for c, n in zip(counts, ns, strict=True)]
        assert pass_at_k(counts, ns, k).tolist() == alone
    with pytest.raises(ValueError, match="k <= n = 2"):
        pass_at_k(counts, ns, 3)
    with pytest.raises(ValueError, match="one of each a problem"):
        pass_at_k(counts, ns[:3], 1)


def test_figures_with_different_n_go_up_to_the_smallest() -> None:
    row = summarise([1, 0, 3], [4, 8, 5])
    assert row["avg@k"] == pytest.approx((1 / 4 + 0 + 3 / 5) / 3)
    assert list(row["pass@k"]) == ["1", "2", "4"]
    assert row["n"] == [4, 8, 5]


def test_pass_at_k_stays_exact_at_large_n() -> None:
    n, k = 4096, 1024
    for c in (0, 1, 7, 3072, 3073, 4096):
        exact = float(1 - Fraction(comb(n - c, k), comb(n, k)))
        assert float(pass_at_k(c, n, k)) == pytest.approx(exact, rel=1e-12, abs=0.0 if c else 1e-300)


def test_pass_at_1_is_avg_and_pass_at_n_is_any_correct() -> None:
    counts = np.array([0, 1, 5, 8])
    assert np.allclose(pass_at_k(counts, 8, 1), counts / 8, atol=1e-15)
    assert pass_at_k(counts, 8, 8).tolist() == [0.0, 1.0, 1.0, 1.0]
    assert avg_at_k(counts, 8) == pytest.approx(14 / 32)


def test_with_replacement_estimator_scores_one_success_in_32_below_one() -> None:
    assert float(pass_at_k_with_replacement(1, 32, 32)) == pytest.approx(0.638, abs=5e-4)
    assert float(pass_at_k(1, 32, 32)) == 1.0


@pytest.mark.parametrize(("c", "n", "k"), [(5, 4, 1), (-1, 4, 1), (1, 4, 5), (1, 4, 0), (0, 0, 1)])
def test_impossible_counts_are_refused(c: int, n: int, k: int) -> None:
    with pytest.raises(ValueError, match="expected"):
        pass_at_k(c, n, k)


def test_fractional_counts_and_no_problems_are_refused() -> None:
    with pytest.raises(ValueError, match="whole numbers"):
        avg_at_k([0.5], 4)
    with pytest.raises(ValueError, match="no problems"):
        avg_at_k([], 4)


def test_reported_ks_are_powers_of_two_and_n() -> None:
    assert powers_of_two(32) == [1, 2, 4, 8, 16, 32]
    assert powers_of_two(6) == [1, 2, 4, 6]
    assert powers_of_two(1) == [1]


# --- intervals ---------------------------------------------------------------


def test_interval_is_a_function_of_values_and_seed() -> None:
    values = np.random.default_rng(0).random(40)
    assert bootstrap_interval(values, seed=3) == bootstrap_interval(values, seed=3)
    assert bootstrap_interval(values, seed=3) != bootstrap_interval(values, seed=4)


@pytest.mark.parametrize("kind", ["bca", "percentile"])
def test_interval_covers_the_true_mean_in_93_to_97_percent(kind: str) -> None:
    rng = np.random.default_rng(1)
    truth, hits, runs = 0.3, 0, 1000
    for run in range(runs):
        counts = rng.binomial(8, rng.beta(0.6, 1.4, size=80))  # mean 0.3, many problems near 0: as benchmarks are
        interval = bootstrap_interval(counts / 8, resamples=1000, kind=kind, seed=run)  # type: ignore[arg-type]
        hits += interval.low <= truth <= interval.high
    assert 0.93 <= hits / runs <= 0.97


# Problems, samples, k, and the beta distribution of difficulty: sizes of AIME, AMC and a larger benchmark
SETTINGS = [
    (30, 8, 1, (0.5, 1.5)), (30, 8, 8, (0.5, 1.5)), (30, 32, 1, (0.3, 0.7)), (30, 32, 8, (1.0, 3.0)),
    (40, 8, 1, (2.0, 1.0)), (40, 8, 4, (0.3, 0.7)), (40, 32, 32, (0.5, 1.5)),
    (200, 32, 32, (0.3, 0.7)),
]  # fmt: skip


@pytest.mark.parametrize(("problems", "n", "k", "difficulty"), SETTINGS)
def test_intervals_of_avg_and_pass_at_k_cover_in_93_to_97_percent(
    problems: int, n: int, k: int, difficulty: tuple[float, float]
) -> None:
    a, b = difficulty
    # 1 - E[(1 - p)^k] for p from a beta distribution, of which Pass@k is an unbiased estimate
    log_beta = [math.lgamma(a) + math.lgamma(x) - math.lgamma(a + x) for x in (b + k, b)]
    truth = 1.0 - math.exp(log_beta[0] - log_beta[1])
    rng = np.random.default_rng([problems, n, k])
    hits, runs = 0, 1000
    for run in range(runs):
        counts = rng.binomial(n, rng.beta(a, b, size=problems))
        interval = share_interval(pass_at_k(counts, n, k), resamples=1000, seed=run)
        hits += interval.low <= truth <= interval.high
    assert 0.93 <= hits / runs <= 0.97


def test_interval_of_a_macro_average_covers_in_93_to_97_percent() -> None:
    rng = np.random.default_rng(2)
    truth, hits, runs = (0.25 + 0.5) / 2, 0, 1000
    for run in range(runs):
        small = rng.binomial(8, rng.beta(0.5, 1.5, size=30)) / 8
        large = rng.binomial(8, rng.beta(0.5, 0.5, size=150)) / 8
        interval = macro_interval([small, large], resamples=1000, seed=run)
        hits += interval.low <= truth <= interval.high
    assert 0.93 <= hits / runs <= 0.97


def test_a_macro_average_weighs_benchmarks_alike_and_equals_its_only_one() -> None:
    small, large = np.array([1.0, 0.0]), np.zeros(100)
    assert macro_interval([small, large]).value == pytest.approx(0.25)
    values = np.random.default_rng(3).random(30)
    assert macro_interval([values]) == bootstrap_interval(values)


def test_shares_without_spread_have_the_exact_one_sided_bound() -> None:
    for problems in (1, 30, 500):
        none, every = share_interval(np.zeros(problems)), share_interval(np.ones(problems))
        # all 30 problems failed: a share above 1 - 0.025^(1/30) would do so in less than 2.5 % of the draws
        assert (none.low, none.high) == (0.0, pytest.approx(1 - 0.025 ** (1 / problems)))
        assert (every.low, every.high) == (pytest.approx(0.025 ** (1 / problems)), 1.0)
    assert macro_interval([np.zeros(30), np.zeros(30)], shares=True).high == pytest.approx(1 - 0.025 ** (1 / 30))


def test_t_quantiles_are_those_of_the_tables() -> None:
    for freedom, expected in ((5, 2.571), (10, 2.228), (29, 2.045), (199, 1.972)):
        assert t_quantile(0.975, freedom) == pytest.approx(expected, rel=0.01)


# --- p-values ----------------------------------------------------------------


def test_sign_flips_of_few_differences_are_enumerated() -> None:
    # of the 8 sign vectors of (1, 2, 4), only the two with equal signs reach |sum| = 7
    assert sign_flip_p_value([[1.0, 2.0, 4.0, 0.0]]) == 2 / 8
    assert sign_flip_p_value([[1.0, 1.0, -1.0]]) == 1.0
    assert sign_flip_p_value([np.zeros(5)]) == 1.0


def test_drawn_sign_flips_agree_with_the_enumeration() -> None:
    values = np.random.default_rng(0).normal(0.5, 1.0, size=14)
    exact = sign_flip_p_value([values])
    drawn = sign_flip_p_value([np.concatenate([values, [1e-12, -1e-12]])])
    assert drawn == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 20_000))


def test_sign_flips_reject_five_percent_of_equal_models() -> None:
    rng = np.random.default_rng(4)
    rejected, runs = 0, 400
    for _ in range(runs):
        p = rng.beta(0.5, 1.0, size=12)
        a, b = rng.binomial(16, p) / 16, rng.binomial(16, p) / 16
        rejected += sign_flip_p_value([a - b]) <= 0.05
    assert rejected / runs <= 0.05 + 3 * math.sqrt(0.05 * 0.95 / runs)


def test_holm_multiplies_the_smallest_by_the_number_of_comparisons() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_seeds_share_their_resampled_problems() -> None:
    values = np.random.default_rng(2).random(50)
    twice = bootstrap_interval(np.stack([values, values]), seed=0)
    once = bootstrap_interval(values, seed=0)
    # identical seeds add no information about other problems: the interval must not shrink
    assert (twice.value, twice.low, twice.high) == pytest.approx((once.value, once.low, once.high), abs=1e-12)


def test_pairing_removes_what_the_problems_have_in_common() -> None:
    rng = np.random.default_rng(3)
    difficulty = rng.random((1, 200))
    a, b = difficulty * 0.9 + 0.05, difficulty * 0.9
    difference = paired_difference(a, b)
    assert difference.value == pytest.approx(0.05)
    assert difference.high - difference.low < 0.01
    assert bootstrap_interval(a).high - bootstrap_interval(a).low > 0.05
    assert difference.resolved


def test_a_method_does_not_differ_from_itself() -> None:
    values = np.random.default_rng(4).random((2, 30))
    difference = paired_difference(values, values)
    assert (difference.value, difference.resolved) == (0.0, False)


def test_a_difference_within_the_spread_of_seeds_is_not_resolved() -> None:
    base = np.random.default_rng(5).random(400) * 0.1
    a = np.stack([base + 0.50, base + 0.48])
    b = np.stack([base + 0.47, base + 0.45])
    difference = paired_difference(a, b)
    assert difference.interval_excludes_zero  # the problems alone would say so
    assert difference.seed_margin == pytest.approx(4.303 * math.sqrt(0.0002) * 1.0, rel=1e-6)
    assert not difference.resolved


def test_more_methods_with_seeds_resolve_what_two_cannot() -> None:
    base = np.random.default_rng(5).random(400) * 0.1
    pairs = [np.stack([base + x, base + x - 0.02]) for x in (0.50, 0.45, 0.40, 0.30)]
    spread = pooled_seed_spread(pairs)
    assert spread is not None
    assert (spread.freedom, spread.deviation) == (4, pytest.approx(math.sqrt(0.0002)))
    assert not paired_difference(pairs[0], pairs[1]).resolved
    assert paired_difference(pairs[0], pairs[1], spread=spread).resolved


def test_seed_margin_covers_in_95_percent_when_methods_are_equal() -> None:
    rng = np.random.default_rng(6)
    false_alarms, runs = 0, 1000
    for _ in range(runs):
        methods = [np.repeat(rng.normal(0.5, 0.02, (2, 1)), 3, axis=1) for _ in range(4)]
        spread = pooled_seed_spread(methods)
        difference = paired_difference(methods[0], methods[1], spread=spread, resamples=10)
        assert difference.seed_margin is not None
        false_alarms += abs(difference.value) > difference.seed_margin
    assert 0.03 <= false_alarms / runs <= 0.07


def test_one_seed_a_method_leaves_the_seed_margin_open() -> None:
    assert paired_difference(np.ones(5), np.zeros(5)).seed_margin is None
    assert pooled_seed_spread([np.ones(5), np.zeros((1, 5))]) is None


def test_values_without_spread_have_an_interval_of_one_point() -> None:
    interval = bootstrap_interval(np.ones(20))
    assert (interval.value, interval.low, interval.high) == (1.0, 1.0, 1.0)


@pytest.mark.parametrize("values", [[], [[]], [float("nan"), 1.0], np.zeros((2, 2, 2))])
def test_unusable_values_are_refused(values: object) -> None:
    with pytest.raises(ValueError, match=r"expected|finite"):
        bootstrap_interval(values)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="same problems"):
        paired_difference(np.zeros(3), np.zeros(4))


def test_summary_has_the_shape_of_eval_jsonl() -> None:
    counts = [0, 1, 3, 8, 8, 2]
    row = summarise(counts, 8)
    assert set(row) == {"n", "problems", "avg@k", "pass@k", "pass@k_with_replacement", "ci95", "correct_counts"}
    assert list(row["pass@k"]) == ["1", "2", "4", "8"]
    biased = row["pass@k_with_replacement"]
    assert list(biased) == list(row["pass@k"])
    assert biased["1"] == pytest.approx(row["avg@k"])
    assert biased["8"] == pytest.approx(np.mean([1 - (1 - c / 8) ** 8 for c in counts]))
    assert biased["8"] < row["pass@k"]["8"]
    assert set(row["ci95"]) == {"avg@k", "pass@1", "pass@2", "pass@4", "pass@8"}
    assert row["avg@k"] == pytest.approx(row["pass@k"]["1"])
    assert row["ci95"]["avg@k"] == pytest.approx(row["ci95"]["pass@1"])
    for name, (low, high) in row["ci95"].items():
        value = row["avg@k"] if name == "avg@k" else row["pass@k"][name.removeprefix("pass@")]
        assert 0 <= low <= value <= high <= 1
    alone = bootstrap_interval(pass_at_k(counts, 8, 4))
    assert row["ci95"]["pass@4"] == pytest.approx([alone.low, alone.high], abs=0.05)
    json.dumps(row, allow_nan=False)


# --- evaluate ----------------------------------------------------------------

PROMPTS = [Prompt(id=f"p{i}", problem=f"{i}", answer=i, token_ids=(1, 2)) for i in range(5)]
PARAMS = SamplingParams(n=4, temperature=0.6, max_tokens=8, stop_token_ids=(0,), seed=evaluation_seed(0))


class CountingSampler:
    """Sample j of prompt i answers "i:j"; arrival order is shuffled by ``order``."""

    def __init__(self, order: int = 0, drop: int = 0, rename: bool = False) -> None:
        self.order, self.drop, self.rename = order, drop, rename

    async def sample(
        self, prompts: Sequence[Prompt], params: SamplingParams, *, step: int, policy_version: int
    ) -> AsyncIterator[Rollout]:
        rollouts = [
            Rollout(
                id=f"{prompt.id}/{step}/{j}",
                group="stranger" if self.rename else prompt.id,
                prompt_token_ids=list(prompt.token_ids),
                token_ids=[5] * (j + 1),
                logprobs=[-0.1 * (i + 1) / 3] * (j + 1),
                text=f"{prompt.id}:{j // 2}",
                finish_reason="length" if j == 3 else "stop",
                policy_version=policy_version,
                sample=j,
            )
            for i, prompt in enumerate(prompts)
            for j in range(params.n)
        ]
        for index in np.random.default_rng(self.order).permutation(len(rollouts))[self.drop :]:
            await asyncio.sleep(0)
            yield rollouts[index]


class IndexVerifier:
    """Prompt pi has its first i samples right; the last sample of p4 gets no verdict."""

    async def verify(self, rollout: Rollout, prompt: Prompt) -> Verdict:
        await asyncio.sleep(0.0001 * (rollout.sample % 2))
        if prompt.id == "p4" and rollout.sample == 3:
            return Verdict(correct=None, reward=None)
        right = rollout.sample < int(prompt.id[1:])
        return Verdict(correct=right, reward=float(right))


class BrokenVerifier:
    async def verify(self, rollout: Rollout, prompt: Prompt) -> Verdict:
        raise DataError("the verifier met a malformed problem")


def run(sampler: Sampler | None = None, verifier: Verifier | None = None, **kwargs: object) -> dict[str, object]:
    result = evaluate(
        sampler or CountingSampler(), verifier or IndexVerifier(), PROMPTS, PARAMS, step=7, policy_version=7, **kwargs
    )  # type: ignore[arg-type]
    return asyncio.run(result).to_json()


def test_evaluation_counts_what_the_verifier_says() -> None:
    row = run(distinct_key=lambda text: text)
    assert row["correct_counts"] == [0, 1, 2, 3, 3]
    assert row["problem_ids"] == ["p0", "p1", "p2", "p3", "p4"]
    assert row["avg@k"] == pytest.approx(9 / 20)
    assert (row["step"], row["temperature"], row["n"], row["problems"]) == (7, 0.6, 4, 5)
    assert row["truncated"] == pytest.approx(1 / 4)
    assert row["no_verdict"] == pytest.approx(1 / 20)
    assert row["mean_length"] == pytest.approx(2.5)
    assert row["distinct_solutions"] == pytest.approx((0 + 1 + 1 + 2 + 2) / 5)
    assert row["nll"] == pytest.approx(0.1)
    json.dumps(row, allow_nan=False)


def test_result_does_not_depend_on_the_order_of_arrival() -> None:
    assert run(CountingSampler(order=1)) == run(CountingSampler(order=2))


def test_no_distinct_count_without_a_key() -> None:
    assert run()["distinct_solutions"] is None


def test_lost_and_foreign_rollouts_fail_the_evaluation() -> None:
    with pytest.raises(RunFailed, match="samples; expected 4"):
        run(CountingSampler(drop=1))
    with pytest.raises(RunFailed, match="stranger"):
        run(CountingSampler(rename=True))


def test_what_a_verifier_raises_reaches_the_caller_unwrapped(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DataError, match="malformed problem"):
        run(verifier=BrokenVerifier())
    gc.collect()
    assert caplog.records == []  # asyncio complains here of tasks whose exception nobody took


def test_repeated_or_missing_prompts_are_refused() -> None:
    for prompts, message in (([], "no prompts"), ([PROMPTS[0], PROMPTS[0]], "'p0' occurs twice")):
        with pytest.raises(DataError, match=message):
            asyncio.run(evaluate(CountingSampler(), IndexVerifier(), prompts, PARAMS, step=0, policy_version=0))  # type: ignore[arg-type]


def test_evaluation_seed_is_another_stream_than_training() -> None:
    seeds = [evaluation_seed(seed) for seed in range(100)]
    assert len({*seeds, *range(100)}) == 200
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert evaluation_seed(0) == seeds[0]


def test_evaluation_and_report_rooms_load_no_torch() -> None:
    code = (
        "import sys, scope_opd.evaluate, scope_opd.report; sys.exit(bool({'torch', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_figures_are_finite_for_a_single_problem() -> None:
    row = summarise([3], 4)
    assert all(math.isfinite(x) for pair in row["ci95"].values() for x in pair)
