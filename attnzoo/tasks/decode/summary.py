"""From samples to one record per row: means, intervals and differences to dense, sample by sample."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

from attnzoo.bench.record import Environment, Interval
from attnzoo.bench.stats import mcnemar, paired_difference, wilson_interval
from attnzoo.errors import AttnZooError
from attnzoo.tasks.decode.config import DENSE, DecodeConfig
from attnzoo.tasks.decode.plan import Row, rows
from attnzoo.tasks.decode.record import (
    Bytes,
    CanaryResult,
    DecodeRecord,
    KindResult,
    NllResult,
    Ratios,
    SampleLine,
)
from attnzoo.tasks.decode.text import Text

CURVE_POINTS = 20
Found = Mapping[tuple[str, str, int, str], SampleLine]


def summarize(
    config: DecodeConfig,
    lines: Iterable[SampleLine],
    *,
    command: str,
    text: Text,
    canaries: Sequence[CanaryResult],
    processes: int,
    where: Environment,
) -> list[DecodeRecord]:
    """Give the records of a run, dense first: of the samples that every row has been run on, which may be a part.

    Raises
    ------
    AttnZooError
        If there is no such window yet.
    """
    found = {line.key: line for line in lines}
    dense_nll = _windows(found, config, DENSE)
    if not dense_nll:
        raise AttnZooError("no window has been read by every row yet, so there is nothing to report; let it run on")
    records = []
    for row in rows(config):
        cost = found.get(("cost", "", 0, row.label))
        records.append(
            DecodeRecord(
                config_hash=config.hash,
                benchmark=config.name,
                command=command,
                label=row.label,
                attention=row.attention.name if row.attention is not None else None,
                options=row.attention.swap if row.attention is not None else {},
                is_baseline=row.attention is None,
                utc=datetime.now(UTC).isoformat(timespec="seconds"),
                seconds=round(sum(line.seconds for line in found.values() if line.label == row.label), 3),
                processes=processes,
                environment=where,
                model=config.model,
                dtype=config.dtype,
                seed=config.seed,
                text=text.name,
                text_sha256=text.sha256,
                nll=_nll(_windows(found, config, row.label), dense_nll, config.nll.tokens, row),
                retrieval=_retrieval(found, config, row),
                cost=cost.cost if cost is not None else None,
                canaries=tuple(canaries),
            )
        )
    return records


def curve(differences: Sequence[Sequence[float]], points: int = CURVE_POINTS) -> tuple[float, ...]:
    """Mean over windows of differences by token, in `points` equal parts of the window (fewer where it is shorter)."""
    length = len(differences[0])
    parts = min(points, length)
    edges = [round(part * length / parts) for part in range(parts + 1)]
    return tuple(
        round(math.fsum(value for row in differences for value in row[a:b]) / ((b - a) * len(differences)), 6)
        for a, b in itertools.pairwise(edges)
    )


def _windows(found: Found, config: DecodeConfig, label: str) -> list[SampleLine]:
    return [found["nll", "", index, label] for index in _complete(found, config, "nll", "", config.nll.windows)]


def _complete(found: Found, config: DecodeConfig, task: str, kind: str, count: int) -> list[int]:
    """Give the samples that every row has been run on."""
    labels = [row.label for row in rows(config)]
    return [index for index in range(count) if all((task, kind, index, label) in found for label in labels)]


def _nll(lines: list[SampleLine], dense: list[SampleLine], tokens: int, row: Row) -> NllResult:
    means = [math.fsum(line.nll) / len(line.nll) for line in lines]
    mean = math.fsum(means) / len(means)
    cache, cache_dense = _largest(lines), _largest(dense)
    difference: Interval | None = None
    drawn: tuple[float, ...] = ()
    if row.attention is not None:
        difference = paired_difference(means, [math.fsum(line.nll) / len(line.nll) for line in dense])
        drawn = curve([[a - b for a, b in zip(x.nll, y.nll, strict=True)] for x, y in zip(lines, dense, strict=True)])
    return NllResult(
        windows=len(lines),
        tokens=tokens,
        mean=mean,
        perplexity=math.exp(mean),
        difference=difference,
        curve=drawn,
        cache=cache,
        cache_ratio=_ratios(cache, cache_dense) if row.attention is not None else None,
    )


def _retrieval(found: Found, config: DecodeConfig, row: Row) -> tuple[KindResult, ...]:
    if config.retrieval is None:
        return ()
    results = []
    for kind, count in config.retrieval.counts:
        done = _complete(found, config, "retrieval", kind, count)
        if not done:
            continue
        lines = [found["retrieval", kind, index, row.label] for index in done]
        dense = [found["retrieval", kind, index, DENSE] for index in done]
        hits = [hit for line in lines for hit in line.hits]
        depths = [depth for line in lines for depth in line.depths]
        low, high = wilson_interval(sum(hits), len(hits))
        candidate = row.attention is not None
        results.append(
            KindResult(
                kind=kind,
                samples=len(done),
                tokens=config.retrieval.tokens,
                hits=sum(hits),
                asked=len(hits),
                recall=sum(hits) / len(hits),
                low=low,
                high=high,
                difference=paired_difference(_recalls(lines), _recalls(dense)) if candidate else None,
                p_value=mcnemar(hits, [hit for line in dense for hit in line.hits]) if candidate else None,
                by_depth=tuple(zip(depths, hits, strict=True)),
                cache=_largest(lines),
            )
        )
    return tuple(results)


def _recalls(lines: Sequence[SampleLine]) -> list[float]:
    return [sum(line.hits) / len(line.hits) for line in lines]


def _largest(lines: Sequence[SampleLine]) -> Bytes:
    sizes = [line.cache for line in lines if line.cache is not None]
    return Bytes(
        entries=max(size.entries for size in sizes),
        held=max(size.held for size in sizes),
        allocated=max(size.allocated for size in sizes),
    )


def _ratios(a: Bytes, b: Bytes) -> Ratios | None:
    if not (b.entries and b.held and b.allocated):
        return None
    return Ratios(entries=a.entries / b.entries, held=a.held / b.held, allocated=a.allocated / b.allocated)
