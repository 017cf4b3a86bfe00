"""Figures in words, and better told from worse."""

from __future__ import annotations

from collections.abc import Iterable

from attnzoo.bench.record import Cost, Environment, Interval, Quality, Quantiles, Record
from attnzoo.tables import Verdict

SAME = 0.01  # ratios nearer to 1 than this are called the same
SAME_MEMORY = 0.05
SAME_MEMORY_BYTES = 256 * 1024  # the kernel counts the resident set of each CPU in batches
DRIFT = 1.25  # dense's own time in one row over that in another, above which the machine was not the same for both
ALIKE = 1.5  # dense models whose peak memory differs by more are not one: a row may have a baseline of its own


def milliseconds(q: Quantiles) -> str:
    """A latency and its spread: ``12.3 (12.1-12.9)``."""
    return figures(q.p50) + (f" ({figures(q.p20)}-{figures(q.p80)})" if q.bounds else "")


def times(q: Quantiles) -> str:
    """A speed-up and its spread: ``1.52x (1.49-1.55)``."""
    return f"{q.p50:.2f}x" + (f" ({q.p20:.2f}-{q.p80:.2f})" if q.bounds else "")


def difference(interval: Interval | None, digits: int = 3) -> str:
    """A difference and its interval: ``+0.021 (+0.015 to +0.028)``; of too few samples, how many they are."""
    if interval is None:
        return "-"
    low, high = (f"{end:+.{digits}f}" for end in (interval.low, interval.high))
    few = f"{interval.n} sample{'s' if interval.n != 1 else ''}"
    return f"{interval.mean:+.{digits}f} ({f'{low} to {high}' if interval.bounds else few})"


def ratio(value: float | None, digits: int = 2) -> str:
    """A ratio to the dense baseline, or a dash where there is none."""
    return "-" if value is None else f"{value:.{digits}f}x"


def budget(value: float | str) -> str:
    """The budget of a policy: entries, a share of the tokens in percent, or bytes as they were given."""
    return value if isinstance(value, str) else f"{value:,}" if isinstance(value, int) else f"{value * 100:g}%"


def points(value: float) -> str:
    """A difference in points: ``-1.2 points``."""
    return f"{value:+.1f} points"


def absolute(quality: Quality | None) -> str:
    """A quality's figure with its interval, or a dash where there is none."""
    return "-" if quality is None else quality.figure


def quality_kept(quality: Quality | None, digits: int = 2) -> str:
    """Quality as a part of dense, with its interval: ``0.97x (0.96-0.99)``; points where there is no ratio."""
    if quality is not None and quality.points is not None:
        return points(quality.points)
    if quality is None or quality.ratio_low is None or quality.ratio_high is None:
        return ratio(None if quality is None else quality.ratio, digits)
    return f"{ratio(quality.ratio, digits)} ({quality.ratio_low:.{digits}f}-{quality.ratio_high:.{digits}f})"


def noise(rows: Iterable[Record]) -> Quantiles | None:
    """The speed-up of dense over a second copy of itself, where it was measured: what is not a difference."""
    return next((row.cost.ratios.speedup for row in rows if row.is_baseline and row.cost is not None), None)


def drift(rows: Iterable[Record]) -> float:
    """Dense's own time in rows that were measured alike: the largest p50 over the smallest; 1 where there is one."""
    dense = [row.cost.baseline for row in rows if isinstance(row.cost, Cost)]
    peaks = [side.memory.activation_peak_bytes or 0 for side in dense]
    alike = [max(peak, peaks[0]) <= ALIKE * min(peak, peaks[0]) for peak in peaks]  # as the first row's, dense itself
    times = [side.latency_ms.p50 for side, same in zip(dense, alike, strict=True) if same]
    return max(times, default=1.0) / min(times, default=1.0)


def speed_verdict(q: Quantiles, still: Quantiles | None = None) -> Verdict:
    """Faster or slower only where the whole spread is on one side of 1, and of the `noise` (`still`).

    Neither of too few samples for a spread.
    """
    if q.bounds is None:
        return "same"
    high = max(1 + SAME, still.p80 if still else 1.0)
    low = min(1 - SAME, still.p20 if still else 1.0)
    if q.p20 > high:
        return "better"
    return "worse" if q.p80 < low else "same"


def need_verdict(value: float | None) -> Verdict:
    """Judge a ratio of something of which less is better."""
    if value is None or abs(value - 1) <= SAME:
        return "same"
    return "better" if value < 1 else "worse"


def quality_verdict(quality: Quality | None, dense: Quality | None) -> Verdict:
    """Better or worse only where the ratio's interval leaves 1 out or, where it has none, the two intervals differ."""
    if quality is None or dense is None:
        return "same"
    if quality.ratio_low is not None and quality.ratio_high is not None:
        low, high = quality.ratio_low, quality.ratio_high
        return "better" if low > 1 else "worse" if high < 1 else "same"
    own, other = quality.interval, dense.interval
    if own is None or other is None:
        return "same"
    if own[0] > other[1]:
        return "better"
    return "worse" if own[1] < other[0] else "same"


def activation_ratio(record: Record) -> float | None:
    """Peak memory against the dense baseline: of the resident set, or of the allocator where that is not known."""
    if record.cost is None:
        return None
    ratios = record.cost.ratios
    return ratios.activation_peak if ratios.activation_peak is not None else ratios.allocator_peak


def size(record: Record) -> int | None:
    """Parameters of what was timed: of the whole model, or of its attention layers where one was timed alone."""
    if record.cost is None:
        return None
    side = record.cost.candidate
    return side.attention_parameters if record.scope == "layer" else side.parameters


def size_ratio(record: Record) -> float | None:
    """Parameters of what was timed against the dense baseline's."""
    if record.cost is None:
        return None
    ratios = record.cost.ratios
    return ratios.attention_parameters if record.scope == "layer" else ratios.parameters


def memory_verdict(record: Record) -> Verdict:
    """More or less only where it is more than the kernel's own inexactness."""
    value = activation_ratio(record)
    if record.cost is None or value is None:
        return "same"
    memory = record.cost.candidate.memory
    held = memory.activation_peak_bytes if memory.activation_peak_bytes is not None else memory.allocator_peak_bytes
    dense = record.cost.baseline.memory
    other = dense.activation_peak_bytes if memory.activation_peak_bytes is not None else dense.allocator_peak_bytes
    apart = None if held is None or other is None else abs(held - other)
    near = abs(value - 1) <= SAME_MEMORY or (apart is not None and apart <= SAME_MEMORY_BYTES)
    return "same" if near else need_verdict(value)


def machine(environment: Environment, processes: int = 1) -> str:
    """Device, threads and processes."""
    several = f"{processes} processes of " if processes > 1 else ""
    return f"{environment.device}, {several}{environment.threads} thread{'s' if environment.threads != 1 else ''}"


def one_line(text: str, limit: int = 600) -> str:
    """A message on one line, not too long."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def figures(value: float) -> str:
    """About three figures, never in powers of ten."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
