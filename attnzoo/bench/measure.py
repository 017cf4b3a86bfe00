"""Time: two functions called in turn, so that noise of the machine falls on both alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from attnzoo.bench.record import Quantiles

Forward = Callable[..., Any]
Run = Callable[[], object]
Clock = Callable[[Run], float]


@dataclass(frozen=True)
class Interleaved:
    """Seconds of each call, in the order A B A B ...; `a[i]` and `b[i]` are neighbors in time."""

    a: tuple[float, ...]
    b: tuple[float, ...]

    @property
    def ratios(self) -> tuple[float, ...]:
        """``b[i] / a[i]``: how many times faster A was, pair by pair."""
        return tuple(b / a for a, b in zip(self.a, self.b, strict=True))


def quantiles(samples: Sequence[float], scale: float = 1.0) -> Quantiles:
    """The 20th, 50th and 80th percentile, linear between neighbors, times `scale`.

    Raises `ValueError` if there is no sample.
    """
    if not samples:
        raise ValueError("no samples, no percentiles")
    p20, p50, p80 = (float(value) for value in np.quantile(samples, (0.2, 0.5, 0.8)) * scale)
    return Quantiles(p20=p20, p50=p50, p80=p80, n=len(samples))


def wall_clock(run: Run) -> float:
    """Seconds of one call, by the monotonic clock."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def clock_for(device: torch.device) -> Clock:
    """Pick the clock that sees the work of `device`: on CUDA by events of its stream, before and after a call."""
    return (lambda run: clock_parts(device, {}, run)[0]) if device.type == "cuda" else wall_clock


def interleave(a: Run, b: Run, clock: Clock, *, warmup: int, repeats: int, min_seconds: float) -> Interleaved:
    """Time A and B in turn by `clock`, which gives the seconds of one call.

    After `warmup` calls of each come `repeats` pairs at least, and more until the timed calls add up to `min_seconds`.
    """
    return Interleaved(*in_turn((a, b), clock, warmup=warmup, repeats=repeats, min_seconds=min_seconds))


def in_turn(
    calls: Sequence[Run], clock: Clock, *, warmup: int, repeats: int, min_seconds: float
) -> list[tuple[float, ...]]:
    """Seconds of each of several calls, in the order A B C A B C ...; see `interleave`."""
    for _ in range(warmup):
        for call in calls:
            call()
    times: list[list[float]] = [[] for _ in calls]
    while len(times[0]) < repeats or sum(map(sum, times)) < min_seconds:
        for call, kept in zip(calls, times, strict=True):
            kept.append(clock(call))
    return [tuple(kept) for kept in times]


@contextmanager
def around(modules: Mapping[nn.Module, Callable[[Forward], Forward]]) -> Iterator[None]:
    """Put functions round the `forward` of modules, which some libraries call directly, where it goes round hooks."""
    for module, wrap in modules.items():
        module.__dict__["forward"] = wrap(module.forward)
    try:
        yield
    finally:
        for module in modules:
            del module.__dict__["forward"]


def clock_parts(
    device: torch.device, parts: Mapping[str, Sequence[nn.Module]], run: Run
) -> tuple[float, dict[str, float]]:
    """Seconds of one call, and of that in the forwards of the modules of each part."""
    spans: list[tuple[str, Any, Any]] = []

    def timing(part: str) -> Callable[[Forward], Forward]:
        def wrap(forward: Forward) -> Forward:
            def timed(*inputs: Any, **named: Any) -> Any:
                start = _now(device)
                output = forward(*inputs, **named)
                spans.append((part, start, _now(device)))
                return output

            return timed

        return wrap

    with around({module: timing(part) for part, modules in parts.items() for module in modules}):
        first = _now(device)
        run()
        last = _now(device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    total = dict.fromkeys(parts, 0.0)
    for part, start, stop in spans:
        total[part] += _between(start, stop)
    return _between(first, last), total


def share_of(device: torch.device, modules: Sequence[nn.Module], run: Run, repeats: int) -> float:
    """What part of a call's time is spent in the forwards of some of its modules: the median of `repeats` calls."""
    found = [clock_parts(device, {"part": modules}, run) for _ in range(repeats)]
    return statistics.median(parts["part"] / whole for whole, parts in found)


def _now(device: torch.device) -> Any:
    """Give this moment, of the host or in the device's own order of work."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, stop: Any) -> float:
    return float(stop - start) if isinstance(start, float) else start.elapsed_time(stop) / 1e3
