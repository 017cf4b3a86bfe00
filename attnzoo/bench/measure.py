"""Time: two functions called in turn, so that noise of the machine falls on both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from attnzoo.bench.record import Quantiles

Run = Callable[[], object]
Clock = Callable[[Run], float]


@dataclass(frozen=True)
class Interleaved:
    """Seconds of each call, in the order A B A B ...; `a[i]` and `b[i]` are neighbours in time."""

    a: tuple[float, ...]
    b: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """``b[i] / a[i]``: how many times faster A was, pair by pair."""
        return tuple(b / a for a, b in zip(self.a, self.b, strict=True))


def quantiles(samples: Sequence[float], scale: float = 1.0) -> Quantiles:
    """The 20th, 50th and 80th percentile, linear between neighbours, times `scale`.

    Raises
    ------
    ValueError
        If there is no sample.
    """
    if not samples:
        raise ValueError("no samples, no percentiles")
    scaled = [sample * scale for sample in samples]
    if len(scaled) == 1:
        return Quantiles(p20=scaled[0], p50=scaled[0], p80=scaled[0], n=1)
    cuts = statistics.quantiles(scaled, n=10, method="inclusive")
    return Quantiles(p20=cuts[1], p50=cuts[4], p80=cuts[7], n=len(scaled))


def wall_clock(run: Run) -> float:
    """Seconds of one call, by the monotonic clock."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cuda_clock(run: Run) -> float:
    """Seconds between two events on the current CUDA stream, before and after one call."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def clock_for(device: torch.device) -> Clock:
    """Pick the clock that sees the work of `device`."""
    return cuda_clock if device.type == "cuda" else wall_clock


def interleave(a: Run, b: Run, clock: Clock, *, warmup: int, repeats: int, min_seconds: float) -> Interleaved:
    """Time A and B in turn.

    Parameters
    ----------
    a, b
        What to time.
    clock
        Gives the seconds of one call.
    warmup
        Calls of each before the first that counts.
    repeats
        Pairs at least.
    min_seconds
        Goes on until the timed calls add up to this.
    """
    for _ in range(warmup):
        a()
        b()
    times_a: list[float] = []
    times_b: list[float] = []
    while len(times_a) < repeats or sum(times_a) + sum(times_b) < min_seconds:
        times_a.append(clock(a))
        times_b.append(clock(b))
    return Interleaved(tuple(times_a), tuple(times_b))
