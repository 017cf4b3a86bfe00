"""Intervals and tests against what their papers say."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from attnzoo.bench.record import Interval
from attnzoo.bench.stats import MIN_SAMPLES, mcnemar, paired_difference, ratio_of_shares, wilson_interval

FLOATS = st.floats(-1e3, 1e3)


@given(st.lists(st.tuples(FLOATS, FLOATS), min_size=1, max_size=12))
def test_the_interval_holds_the_mean_and_repeats(pairs):
    a, b = zip(*pairs, strict=True)
    one = paired_difference(a, b, resamples=200)
    assert one.low <= one.mean <= one.high
    assert one == paired_difference(a, b, resamples=200)


def test_pairs_cancel_what_they_share():
    draw = random.Random(0)
    shared = [draw.gauss(0, 100) for _ in range(30)]
    a = [x + 1 + draw.gauss(0, 0.1) for x in shared]
    found = paired_difference(a, shared)
    assert found.mean == pytest.approx(1, abs=0.1)
    assert 0.9 < found.low < found.high < 1.1


def test_the_interval_covers_as_often_as_it_says():
    draw = random.Random(1)
    covered = 0
    for _ in range(150):
        found = paired_difference([draw.gauss(0.5, 1) for _ in range(40)], [0.0] * 40, resamples=400)
        covered += found.low <= 0.5 <= found.high
    assert covered / 150 > 0.88


def test_mcnemar_is_the_sign_test_of_pairs_that_differ():
    assert mcnemar([True] * 5, [True] * 5) == 1
    assert mcnemar([True] * 6 + [False], [False] * 6 + [False]) == pytest.approx(2 / 64)
    assert mcnemar([True, False], [False, True]) == 1
    with pytest.raises(ValueError, match="pairs"):
        mcnemar([True], [])


@pytest.mark.parametrize(("a", "b"), [([], []), ([1.0], []), ([float("nan")], [0.0])])
def test_what_is_no_pair_is_refused(a, b):
    with pytest.raises(ValueError, match=r"pairs|finite"):
        paired_difference(a, b)


def test_one_sample_has_no_interval_and_no_verdict():
    from attnzoo.tasks.decode.quality import told, verdict

    one = Interval(mean=0.5, low=0.5, high=0.5, n=1)
    assert told(one) == "+0.500 (1 sample)"
    assert verdict(one) == "same"
    few = one.model_copy(update={"n": MIN_SAMPLES - 1})
    assert told(few) == "+0.500 (4 samples)"
    assert verdict(few) == "same"
    several = one.model_copy(update={"n": MIN_SAMPLES})
    assert told(several) == "+0.500 (+0.500 to +0.500)"
    assert (verdict(several), verdict(several, less_is_better=True)) == ("better", "worse")


@given(st.integers(1, 10**6).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_the_interval_holds_the_accuracy_and_stays_between_0_and_1(pair):
    correct, images = pair
    low, high = wilson_interval(correct, images)
    assert 0 <= low <= correct / images <= high <= 1


def test_the_interval_is_wilsons():
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=1e-4)  # Newcombe 1998, table I
    assert wilson_interval(0, 20)[0] == 0
    assert wilson_interval(0, 20)[1] == pytest.approx(0.1611, abs=1e-4)
    with pytest.raises(ValueError, match="no share"):
        wilson_interval(3, 2)


def test_the_ratio_of_shares_is_katzs():
    """By the formula: the logarithm of the ratio has variance 1/a - 1/n + 1/b - 1/m."""
    ratio, low, high = ratio_of_shares(80, 100, 160, 180)
    error = 1.959963984540054 * math.sqrt(1 / 80 - 1 / 100 + 1 / 160 - 1 / 180)
    assert ratio == pytest.approx(0.8 / (160 / 180))
    assert (low, high) == pytest.approx((ratio * math.exp(-error), ratio * math.exp(error)))
    assert ratio_of_shares(0, 10, 5, 10) == (0.0, None, None)
    assert ratio_of_shares(3, 10, 0, 10) == (None, None, None)
    assert ratio_of_shares(10, 10, 10, 10) == pytest.approx((1, 1, 1))
