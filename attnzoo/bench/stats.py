"""Intervals and tests: of shares, of their ratios, and of two methods on the same samples."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from scipy import stats

from attnzoo.bench.record import Interval, bounds

RESAMPLES = 10_000
COVERAGE = 0.95
BOOTSTRAP_SEED = 0


def wilson_interval(hits: int, n: int) -> tuple[float, float]:
    """95% interval of a share of `n` independent samples (Wilson 1927), both ends between 0 and 1.

    Raises `ValueError` unless ``0 <= hits <= n`` and there are samples.
    """
    if not 0 <= hits <= n or n == 0:
        raise ValueError(f"{hits} hits of {n} samples are no share")
    found = stats.binomtest(hits, n).proportion_ci(COVERAGE, method="wilson")
    return min(float(found.low), hits / n), max(float(found.high), hits / n)  # rounding put aside


def ratio_of_shares(
    hits: int, n: int, dense_hits: int, dense_n: int
) -> tuple[float | None, float | None, float | None]:
    """Ratio of two shares of independent samples with its 95% interval (Katz et al. 1978).

    The interval is None where there is no hit, or fewer samples than `MIN_SAMPLES`; all are None where the dense share
    is 0.
    """
    if not dense_hits:
        return None, None, None
    if not hits:
        return 0.0, None, None
    found = stats.contingency.relative_risk(hits, n, dense_hits, dense_n)
    interval = found.confidence_interval(COVERAGE)
    low, high = bounds(float(interval.low), float(interval.high), min(n, dense_n)) or (None, None)
    return float(found.relative_risk), low, high


def paired_difference(a: Sequence[float], b: Sequence[float], resamples: int = RESAMPLES) -> Interval:
    """Mean of ``a[i] - b[i]`` and its 95% interval: the percentile bootstrap over samples, with a fixed seed.

    The samples' own difficulty cancels, so small differences show. The percentile bootstrap (Efron 1979) is somewhat
    narrow for fewer than about 10 samples. Of one sample the interval is the mean itself, which says nothing.

    Raises `ValueError` if the two differ in length, there is no sample, or a value is not finite.
    """
    if len(a) != len(b) or not a:
        raise ValueError(f"pairs are needed, got {len(a)} and {len(b)} samples")
    differences = np.subtract(a, b)
    if not np.isfinite(differences).all():
        raise ValueError("a sample is not finite")
    mean = math.fsum(differences) / len(differences)
    if len(differences) == 1:
        return Interval(mean=mean, low=mean, high=mean, n=1)
    found = stats.bootstrap(
        (differences,),
        np.mean,
        n_resamples=resamples,
        confidence_level=COVERAGE,
        method="percentile",
        rng=np.random.default_rng(BOOTSTRAP_SEED),
    ).confidence_interval
    return Interval(mean=mean, low=min(float(found.low), mean), high=max(float(found.high), mean), n=len(differences))


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> float:
    """Two-sided exact p-value that A and B hit equally often (McNemar 1947): a sign test of the pairs that differ.

    Raises `ValueError` if the two differ in length.
    """
    if len(a) != len(b):
        raise ValueError(f"pairs are needed, got {len(a)} and {len(b)} samples")
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    if only_a + only_b == 0:
        return 1.0
    return float(stats.binomtest(only_a, only_a + only_b).pvalue)
