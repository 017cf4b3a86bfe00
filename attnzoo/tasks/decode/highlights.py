"""What the results page shows of the records that are decoding's own."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

from attnzoo.bench import words
from attnzoo.bench.highlights import (
    CACHE,
    PEAK,
    QUALITY,
    SPEED,
    Figure,
    Highlight,
    Measure,
    bounds,
    measured,
    need,
    quality,
    speed,
)
from attnzoo.bench.record import Interval, Memory, Phase
from attnzoo.bench.stats import ratio_of_shares
from attnzoo.errors import AttnZooError
from attnzoo.tasks.decode.record import Bytes, DecodeRecord, read_records
from attnzoo.tasks.decode.report import KIND_TITLES

TASK = "decode"


def read_policies(path: Path) -> list[Highlight]:
    """Read the records of eviction policies: perplexity, pass keys and speed, each against the dense cache."""
    records = read_records(path)
    dense = next((record for record in records if record.is_baseline), None)
    if dense is None:
        raise AttnZooError(f"{path}: there is no record of the dense model")
    return [one for record in records if record.attention for one in _of(record, dense)]


def _of(record: DecodeRecord, dense: DecodeRecord) -> Iterator[Highlight]:
    def highlight(
        workload: str, tokens: int, figures: dict[Measure, Figure | None], phase: Phase | None = None
    ) -> Highlight:
        return Highlight(
            task=TASK,
            method=record.attention or "",
            label=record.label,
            host=record.model,
            workload=f"{workload}, {record.dtype}",
            machine=words.machine(record.environment, record.processes),
            options=record.options,
            utc=record.utc,
            tokens=tokens,
            phase=phase,
            figures=measured(figures),
        )

    nll = record.nll
    held = need(nll.cache_ratio.held if nll.cache_ratio else None)
    windows = f"perplexity: {nll.windows} window{'s' if nll.windows > 1 else ''} of {nll.tokens:,} tokens"
    yield highlight(f"{windows} of {record.text}", nll.tokens, {QUALITY: kept(nll.difference), CACHE: held})
    for result, base in zip(record.retrieval, dense.retrieval, strict=True):
        ratio = ratio_of_shares(result.hits, result.asked, base.hits, base.asked)
        asked = f"{KIND_TITLES[result.kind]}: {result.samples} prompts of {result.tokens:,} tokens of {record.text}"
        figures = {QUALITY: quality(*ratio), CACHE: _bytes(result.cache, base.cache)}
        yield highlight(asked, result.tokens, figures)
    if record.cost is None:
        return
    cost = record.cost
    needs = {PEAK: need(_peak(cost.memory, cost.memory_dense)), CACHE: _bytes(cost.cache, cost.cache_dense)}
    noise = {one.batch: one for one in dense.cost.batches} if dense.cost is not None else {}
    for one in cost.batches:
        still, after = noise.get(one.batch), f"{cost.prompt_tokens:,} tokens, batch {one.batch}"
        if one.first_token_speedup is not None:
            faster = speed(one.first_token_speedup, still.first_token_speedup if still else None)
            yield highlight(f"prefill, {after}", cost.prompt_tokens, {SPEED: faster, **needs}, "prefill")
            needs = {}  # they are of the first batch size
        faster = speed(one.token_speedup, still.token_speedup if still else None)
        yield highlight(f"decode, after {after}", cost.prompt_tokens, {SPEED: faster}, "decode")


def kept(difference: Interval | None) -> Figure | None:
    """Dense perplexity over this one, out of the paired differences of NLL."""
    if difference is None:
        return None
    low, high = bounds(difference)
    ends = (None if high is None else math.exp(-high), None if low is None else math.exp(-low))
    return quality(math.exp(-difference.mean), *ends)


def _bytes(cache: Bytes, dense: Bytes) -> Figure | None:
    return need(cache.held / dense.held if dense.held else None)


def _peak(memory: Memory, dense: Memory) -> float | None:
    held, base = (one.activation_peak_bytes or one.allocator_peak_bytes for one in (memory, dense))
    return held / base if held and base else None
