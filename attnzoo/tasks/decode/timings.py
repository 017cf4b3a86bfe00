"""What decoding costs, dense beside it: time to first token (TTFT), time per output token (TPOT), cache and memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from attnzoo.bench.measure import Clock, Interleaved, clock_for
from attnzoo.bench.memory import Peak, peak_memory
from attnzoo.eviction.size import CacheBytes, kv_bytes
from attnzoo.hosts.versions import cache_arguments, output_cache
from attnzoo.tasks.decode.lm import largest


@dataclass(frozen=True)
class BatchTimes:
    """Seconds of candidate (a) and dense (b) in turn: of prefills, the first token included, and of single steps.

    Only the first batch size has prefills: larger ones decode on from its caches, each row repeated.
    """

    batch: int
    prefill: Interleaved | None
    step: Interleaved


@dataclass(frozen=True)
class Timings:
    """Times by batch size; bytes of the caches (largest of all steps) and peak memory, both of the first batch size."""

    times: tuple[BatchTimes, ...]
    cache: CacheBytes
    cache_dense: CacheBytes
    peak: Peak
    peak_dense: Peak


def twin(model: Any) -> Any:
    """Give a second model that shares every parameter and buffer with `model`, to be swapped by itself."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared)


@torch.inference_mode()
def timings(
    candidate: Any,
    dense: Any,
    prompts: Tensor,
    *,
    new_tokens: int,
    batches: Sequence[int],
    repeats: int,
    before_clock: Callable[[], None] = lambda: None,
) -> Timings:
    """Time two models in turn: a prefill of one, of the other, then a token of one, of the other.

    A larger batch goes on from the caches of the first, its rows repeated, so that a long prompt need not be read as
    many times over.

    Parameters
    ----------
    candidate, dense
        Causal language models on the same device.
    prompts
        ``(B, N)`` token ids of at least as many rows as the first batch size.
    new_tokens
        Single steps after each prefill.
    batches
        Batch sizes, each a multiple of the first.
    repeats
        Prefills of each that are timed; one more of each comes first and is not.
    before_clock
        Called between the measurement of memory, which comes first, and that of time.

    Raises
    ------
    ValueError
        If there are too few prompts, or a batch size is no multiple of the first.
    """
    if batches[0] > len(prompts):
        raise ValueError(f"a batch of {batches[0]} needs as many prompts, got {len(prompts)}")
    if any(batch % batches[0] for batch in batches):
        raise ValueError(f"batch sizes {list(batches)} must be multiples of the first")
    first = prompts[: batches[0]]
    device = prompts.device
    peak, peak_dense = peak_memory([lambda: _read(candidate, first), lambda: _read(dense, first)], device)
    before_clock()
    clock = clock_for(device)
    caches = [CacheBytes(0, 0, 0), CacheBytes(0, 0, 0)]
    times = []
    for batch in batches:
        prefills: list[list[float]] = [[], []]
        steps: list[list[float]] = [[], []]
        for repeat in range(repeats + 1) if batch == batches[0] else (1,):
            runs = [_Run(model, first, clock) for model in (candidate, dense)]
            for which, run in enumerate(runs):
                seconds = run.read()
                if repeat:
                    prefills[which].append(seconds)
            if batch > batches[0]:
                for run in runs:
                    run.repeat_rows(batch // batches[0])
            for _ in range(new_tokens if repeat else min(new_tokens, 2)):
                for which, run in enumerate(runs):
                    seconds = run.step()
                    if repeat:
                        steps[which].append(seconds)
                    if batch == batches[0]:
                        caches[which] = largest(caches[which], run.cache_bytes())
        times.append(BatchTimes(batch, _pair(prefills) if batch == batches[0] else None, _pair(steps)))
    return Timings(tuple(times), caches[0], caches[1], peak, peak_dense)


class _Run:
    """One prefill and the greedy steps after it, each under the clock."""

    def __init__(self, model: Any, prompts: Tensor, clock: Clock) -> None:
        self.model, self.prompts, self.clock = model, prompts, clock
        self.out: Any = None

    def read(self) -> float:
        return self.clock(self._read)

    def step(self) -> float:
        return self.clock(self._step)

    def repeat_rows(self, times: int) -> None:
        output_cache(self.out).batch_repeat_interleave(times)
        self.out.logits = self.out.logits.repeat_interleave(times, 0)
        for _ in range(2):  # the first steps at a new size are slower
            self._step()

    def cache_bytes(self) -> CacheBytes:
        return kv_bytes(output_cache(self.out))

    def _read(self) -> None:
        self.out = _read(self.model, self.prompts)

    def _step(self) -> None:
        token = self.out.logits[:, -1:].argmax(-1)
        self.out = self.model(token, **cache_arguments(self.model, output_cache(self.out)), use_cache=True)


def _read(model: Any, prompts: Tensor) -> Any:
    return model(prompts, use_cache=True, logits_to_keep=1)


def _pair(samples: list[list[float]]) -> Interleaved:
    return Interleaved(tuple(samples[0]), tuple(samples[1]))
