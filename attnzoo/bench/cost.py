"""How figures become the cost part of a record: two sides, and their ratios."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

import attnzoo
from attnzoo.bench.measure import Interleaved, quantiles
from attnzoo.bench.memory import Peak
from attnzoo.bench.record import Cost, Memory, Quantiles, Ratios, Side
from attnzoo.bench.trace import Trace
from attnzoo.errors import AttnZooError
from attnzoo.eviction.size import CacheBytes


def attention_paths(model: nn.Module) -> list[str]:
    """Paths of the attention layers, as a swap would find them."""
    return [layer.path for layer in attnzoo.swap_report(model).layers]


def cost_of(
    models: Sequence[nn.Module],
    layers: Iterable[str],
    times: Interleaved,
    items: int,
    traces: Sequence[Trace],
    peaks: Sequence[Peak],
    caches: Sequence[CacheBytes | None] = (None, None),
    **more: Any,
) -> Cost:
    """Put together what a candidate and the dense model cost that were called in turn.

    `models`, `times`, `traces`, `peaks` and `caches` are of the candidate first, then of the dense model; `layers` are
    paths of the attention layers, `items` how many images or tokens a call works on, `more` further fields of `Cost`.
    """
    layers = list(layers)
    side, dense = (
        side_of(model, layers, quantiles(seconds, 1e3), items, traced, peak, cache)
        for model, seconds, traced, peak, cache in zip(models, (times.a, times.b), traces, peaks, caches, strict=True)
    )
    uncounted = tuple(sorted({op for traced in traces for op in traced.uncounted}))
    ratios = ratios_of(side, dense, quantiles(times.ratios))
    return Cost(candidate=side, baseline=dense, ratios=ratios, uncounted_ops=uncounted, **more)


def side_of(
    model: nn.Module,
    layers: Iterable[str],
    latency: Quantiles,
    items: int,
    traced: Trace,
    peak: Peak,
    cache: CacheBytes | None = None,
) -> Side:
    """Put together what one model costs; `items` is how many images or tokens a call works on."""
    parameters = list(model.parameters())
    attention = {id(p): p.numel() for path in layers for p in model.get_submodule(path).parameters()}
    memory = Memory(
        parameter_bytes=sum(p.numel() * p.element_size() for p in parameters),
        activation_peak_bytes=peak.activation_bytes,
        allocator_peak_bytes=peak.allocator_bytes,
        cache_held_bytes=None if cache is None else cache.held,
        cache_allocated_bytes=None if cache is None else cache.allocated,
        method=peak.method,
        note=peak.note,
    )
    return Side(
        latency_ms=latency,
        throughput=items / (latency.p50 / 1e3),
        flops=traced.flops,
        flops_note=traced.flops_note,
        parameters=sum(p.numel() for p in parameters),
        attention_parameters=sum(attention.values()),
        memory=memory,
    )


def ratios_of(candidate: Side, baseline: Side, speedup: Quantiles) -> Ratios:
    """Set the candidate's figures against the baseline's."""

    def over(a: int | None, b: int | None) -> float | None:
        return None if a is None or not b else a / b

    parameters = over(candidate.parameters, baseline.parameters)
    if parameters is None:
        raise AttnZooError("a host without parameters cannot be compared")
    return Ratios(
        speedup=speedup,
        flops=over(candidate.flops, baseline.flops),
        parameters=parameters,
        attention_parameters=over(candidate.attention_parameters, baseline.attention_parameters),
        activation_peak=over(candidate.memory.activation_peak_bytes, baseline.memory.activation_peak_bytes),
        allocator_peak=over(candidate.memory.allocator_peak_bytes, baseline.memory.allocator_peak_bytes),
        cache_held=over(candidate.memory.cache_held_bytes, baseline.memory.cache_held_bytes),
        cache_allocated=over(candidate.memory.cache_allocated_bytes, baseline.memory.cache_allocated_bytes),
    )
