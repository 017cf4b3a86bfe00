"""What decoding costs, dense beside it: time to first token (TTFT), time per output token (TPOT), cache and memory."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from attnzoo.bench import gate as gates
from attnzoo.bench.measure import Clock, Interleaved, clock_for, interleave
from attnzoo.bench.memory import Peak, peak_memory
from attnzoo.bench.record import Gate
from attnzoo.eviction.policy import Policy
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
        If there are too few prompts, or a batch size is not a multiple of the first.
    """
    if batches[0] > len(prompts):
        raise ValueError(f"a batch of {batches[0]} needs as many prompts, got {len(prompts)}")
    if any(batch % batches[0] for batch in batches):
        raise ValueError(f"batch sizes {list(batches)} must be multiples of the first")
    first = prompts[: batches[0]]
    device = prompts.device
    peak, peak_dense = peak_memory([lambda: read(candidate, first), lambda: read(dense, first)], device)
    before_clock()
    clock = clock_for(device)
    sizes = (CacheBytes(0, 0, 0), CacheBytes(0, 0, 0))
    times = []
    for batch in batches:
        rows = batch // batches[0]
        prefills: tuple[list[float], list[float]] = ([], [])
        steps: tuple[list[float], list[float]] = ([], [])
        for repeat in range(repeats + 1) if rows == 1 else (1,):  # the first of the first batch size is not counted
            runs = Decoder(candidate, first), Decoder(dense, first)
            once, then = decode_in_turn(*runs, new_tokens if repeat else min(new_tokens, 2), clock, rows)
            if rows == 1:
                sizes = (largest(sizes[0], runs[0].step_bytes), largest(sizes[1], runs[1].step_bytes))
            if repeat:
                for kept, seconds in zip((*prefills, *steps), (once.a, once.b, then.a, then.b), strict=True):
                    kept += seconds
        read_times = Interleaved(*map(tuple, prefills)) if rows == 1 else None
        times.append(BatchTimes(batch, read_times, Interleaved(*map(tuple, steps))))
    return Timings(tuple(times), *sizes, peak, peak_dense)


def decode_in_turn(
    run: Decoder, dense: Decoder, steps: int, clock: Clock, rows: int = 1
) -> tuple[Interleaved, Interleaved]:
    """Seconds of a prefill of each, then of single steps of each, in turn; `rows` repeats every row in between."""
    run.forget()
    dense.forget()
    once = interleave(run.read, dense.read, clock, warmup=0, repeats=1, min_seconds=0)
    run.look()
    dense.look()
    if rows > 1:
        run.repeat_rows(rows)
        dense.repeat_rows(rows)

    def looked(call: Any) -> float:
        seconds = clock(call)
        (run if call == run.step else dense).look()
        return seconds

    return once, interleave(run.step, dense.step, looked, warmup=0, repeats=steps, min_seconds=0)


def read(model: Any, prompts: Tensor) -> Any:
    """A prefill: the prompts into a new cache, and the logits of the first new token."""
    return model(prompts, use_cache=True, logits_to_keep=1)


class Decoder:
    """A model at work on prompts: `read` them, then `step` greedily. After each the cache's bound is checked.

    Attributes
    ----------
    read_bytes, step_bytes
        Of the cache after a prompt, and the largest after any step.
    """

    def __init__(self, model: Any, prompts: Tensor, policy: Policy | None = None) -> None:
        self.model, self.prompts, self.policy = model, prompts, policy
        self.read_bytes = self.step_bytes = CacheBytes(0, 0, 0)
        self.most = 0
        self.broken = ""
        self._out: Any = None

    def forget(self) -> None:
        """Let the cache go."""
        self._out = None

    def read(self) -> None:
        """Read the prompts into a new cache."""
        self._out = read(self.model, self.prompts)

    def step(self) -> None:
        """Take the likeliest token and put it in."""
        token = self._out.logits[:, -1:].argmax(-1)
        self._out = self.model(token, **cache_arguments(self.model, output_cache(self._out)), use_cache=True)

    def repeat_rows(self, times: int) -> None:
        """Go on with every row so many times, and take two steps: the first at a new size are slower."""
        output_cache(self._out).batch_repeat_interleave(times)
        self._out.logits = self._out.logits.repeat_interleave(times, 0)
        for _ in range(2):
            self.step()

    def look(self) -> None:
        """Take the cache's measures, and note where it holds more than it may."""
        cache = output_cache(self._out)
        seen, size = cache.get_seq_length(), kv_bytes(cache)
        if seen == self.prompts.shape[1]:
            self.read_bytes = largest(self.read_bytes, size)
        else:
            self.step_bytes = largest(self.step_bytes, size)
        if self.policy is None:
            return
        held = max(layer.keys.shape[-2] for layer in cache.own)
        self.most = max(self.most, held)
        allowed = self.policy.budget + (self.policy.block_size - 1 if seen % self.policy.block_size else 0)
        if held > allowed and not self.broken:
            self.broken = f"a layer held {held} entries after {seen} tokens, {allowed} are allowed"

    def bounded(self, gate: Gate) -> Gate:
        """Put the bound into a gate, which fails where it was broken."""
        if self.policy is None:
            return gate
        limit = self.policy.budget + self.policy.block_size - 1
        gate = gate.model_copy(update={"cache_limit": limit, "cache_most": self.most})
        return gates.refuse(gate, self.broken or None)
