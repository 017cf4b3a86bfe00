import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnzoo.bench.measure import clock_for, interleave, quantiles, wall_clock

pytestmark = pytest.mark.serial

SAMPLES = st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=50)


@given(SAMPLES)
def test_percentiles_are_those_of_numpy(samples):
    q = quantiles(samples)
    assert (q.p20, q.p50, q.p80) == pytest.approx(np.percentile(samples, [20, 50, 80]))
    assert q.n == len(samples)


@given(SAMPLES, st.floats(1e-3, 1e3))
def test_percentiles_are_in_order_within_the_samples_and_scale(samples, scale):
    q = quantiles(samples, scale)
    slack = 1e-9 * max(samples) * scale
    assert min(samples) * scale - slack <= q.p20 <= q.p50 + slack <= q.p80 + 2 * slack
    assert q.p80 <= max(samples) * scale + slack


def test_no_sample_has_no_percentile():
    with pytest.raises(ValueError, match="no samples"):
        quantiles([])


def test_calls_alternate_and_warm_up_is_not_counted():
    calls = []
    result = interleave(
        lambda: calls.append("a"), lambda: calls.append("b"), wall_clock, warmup=2, repeats=3, min_seconds=0
    )
    assert calls == ["a", "b"] * 5
    assert len(result.a) == len(result.b) == 3


def test_timing_goes_on_for_the_time_asked():
    result = interleave(lambda: None, lambda: None, lambda run: 0.125, warmup=0, repeats=3, min_seconds=2)
    assert len(result.a) == 8


def test_ratios_are_pair_by_pair_so_that_a_drift_of_the_machine_cancels():
    slowness = iter(range(1, 100))
    state = {"factor": 1.0}

    def clock(run):
        kind = run()
        if kind == "a":
            state["factor"] = float(next(slowness))
        return state["factor"] * {"a": 1.0, "b": 3.0}[kind]

    result = interleave(lambda: "a", lambda: "b", clock, warmup=0, repeats=9, min_seconds=0)
    assert result.ratios == (3.0,) * 9
    assert quantiles(result.a).p80 > 2 * quantiles(result.a).p20


def test_the_clock_of_a_cpu_sees_sleep_in_seconds():
    import time

    assert 0.02 <= clock_for(torch.device("cpu"))(lambda: time.sleep(0.02)) < 2
