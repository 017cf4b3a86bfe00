"""The cost of one row, against the dense model in the same process, which has checked both before the clock."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.bench.attentions import AttentionConfig
from attnzoo.bench.cost import attention_paths
from attnzoo.bench.gate import gate_message
from attnzoo.bench.measure import Interleaved, quantiles
from attnzoo.bench.memory import Peak, keep_buffers, map_buffers
from attnzoo.bench.record import Gate, Memory
from attnzoo.errors import ConfigError, RunError
from attnzoo.eviction.size import CacheBytes
from attnzoo.tasks.decode import cost as language
from attnzoo.tasks.decode.config import DecodeConfig
from attnzoo.tasks.decode.record import BatchCost, Bytes, DecodeCost, Spread
from attnzoo.tasks.decode.text import Window
from attnzoo.tasks.decode.timings import BatchTimes, timings


class GateError(RunError):
    """What was to be timed does not match its oracle."""


def measure_cost(
    config: DecodeConfig, model: Any, attention: AttentionConfig | None, prompts: Sequence[Window]
) -> DecodeCost:
    """Time a swapped twin of `model` and `model` itself in turn; for None, dense against a second copy of itself.

    Before that both pass the gate of `attnzoo.tasks.decode.cost.check`. The canaries do not stand in for it: another
    process may have run them, of this run or of one that it resumes.

    Raises
    ------
    ConfigError
        If the config asks for no timings.
    GateError
        If the candidate or dense does not match its oracle; nothing is timed then.
    """
    if config.cost is None:
        raise ConfigError("this config asks for no timings")
    candidate = language.swapped_twin(model, attention)
    ids = torch.tensor([prompt.ids for prompt in prompts], device=model.device)
    map_buffers()
    try:
        gate, baseline_gate = _passed(model, attention, ids)
        found = timings(
            candidate,
            model,
            ids,
            new_tokens=config.cost.new_tokens,
            batches=config.cost.batches,
            repeats=config.cost.repeats,
            before_clock=keep_buffers,
        )
    finally:
        keep_buffers()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return DecodeCost(
        prompt_tokens=config.cost.prompt_tokens,
        new_tokens=config.cost.new_tokens,
        gate=gate,
        baseline_gate=baseline_gate,
        batches=tuple(_batch(times) for times in found.times),
        cache=Bytes.of(found.cache),
        cache_dense=Bytes.of(found.cache_dense),
        memory=_memory(found.peak, weights, found.cache),
        memory_dense=_memory(found.peak_dense, weights, found.cache_dense),
    )


@torch.inference_mode()
def _passed(model: Any, attention: AttentionConfig | None, prompts: Tensor) -> tuple[Gate, Gate]:
    """Give the gates of candidate and dense, both passed."""
    found = language.check(model, attention_paths(model), attention, prompts)
    label = "dense" if attention is None else attention.label
    for name, gate in zip((f"{label}: the gate", f"{label}: the baseline's gate"), found, strict=True):
        if not gate.passed:
            raise GateError(gate_message(name, gate))
    return found


def _batch(times: BatchTimes) -> BatchCost:
    first = first_dense = faster = None
    if times.prefill is not None:
        first, first_dense = quantiles(times.prefill.a), quantiles(times.prefill.b)
        faster = quantiles(times.prefill.ratios)
    return BatchCost(
        batch=times.batch,
        candidate=Spread(first_token=first, token=quantiles(times.step.a)),
        dense=Spread(first_token=first_dense, token=quantiles(times.step.b)),
        tokens_per_second=_throughput(times.batch, times.step),
        first_token_speedup=faster,
        token_speedup=quantiles(times.step.ratios),
    )


def _throughput(batch: int, step: Interleaved) -> float:
    return batch * len(step.a) / sum(step.a)


def _memory(peak: Peak, weights: int, cache: CacheBytes) -> Memory:
    return Memory(
        parameter_bytes=weights,
        activation_peak_bytes=peak.activation_bytes,
        allocator_peak_bytes=peak.allocator_bytes,
        cache_held_bytes=cache.held,
        cache_allocated_bytes=cache.allocated,
        method=peak.method,
        note=peak.note,
    )
