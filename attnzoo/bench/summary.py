"""What all reports share: records put in order, figures put in words, and better told from worse."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from attnzoo.bench.record import Quality, Quantiles, Record
from attnzoo.errors import AttnZooError

Verdict = Literal["better", "worse", "same"]
SAME = 0.01  # ratios nearer to 1 than this are called the same
SAME_MEMORY = 0.05
SAME_MEMORY_BYTES = 256 * 1024  # the kernel counts the resident set of each CPU in batches


@dataclass(frozen=True)
class Summary:
    """The records of one benchmark, in the order of first appearance.

    Attributes
    ----------
    cost
        Rows of cost of each token count, ascending.
    quality
        Rows of quality, one an attention.
    labels
        Attentions, the dense baseline first.
    """

    cost: dict[int, list[Record]]
    quality: list[Record]
    labels: tuple[str, ...]

    @property
    def any(self) -> Record:
        """Some record, for what all have in common."""
        return next((row for rows in self.cost.values() for row in rows), None) or self.quality[0]

    @property
    def records(self) -> list[Record]:
        """All records."""
        return [row for rows in self.cost.values() for row in rows] + self.quality

    def row(self, label: str, tokens: int) -> Record | None:
        """The row of cost of an attention at a token count."""
        return next((row for row in self.cost.get(tokens, []) if row.label == label), None)


def summarise(records: Iterable[Record]) -> Summary:
    """Put records in order.

    Raises
    ------
    AttnZooError
        If there is none, or they are of more than one config.
    """
    records = list(records)
    if not records:
        raise AttnZooError("there are no records to report")
    hashes = sorted({record.config_hash for record in records})
    if len(hashes) > 1:
        raise AttnZooError(f"records of {len(hashes)} configs in one file: {', '.join(hashes)}")
    found = dict.fromkeys(record.label for record in sorted(records, key=lambda record: not record.is_baseline))
    labels = tuple(found)
    cost: dict[int, list[Record]] = {}
    for record in sorted(records, key=lambda record: (record.tokens, labels.index(record.label))):
        if record.kind == "cost":
            cost.setdefault(record.tokens, []).append(record)
    quality = sorted((r for r in records if r.kind == "quality"), key=lambda record: labels.index(record.label))
    return Summary(cost, quality, labels)


def machine(summary: Summary) -> str:
    """The machines and thread counts of the timings, in words."""
    rows = [row for rows in summary.cost.values() for row in rows] or summary.quality
    threads = dict.fromkeys((row.environment.device, row.environment.threads) for row in rows)
    return "; ".join(f"{device}, {count} thread{'s' if count != 1 else ''}" for device, count in threads)


def versions(summary: Summary) -> list[str]:
    """Software versions, one line for each set of them that measured something."""
    lines: dict[str, None] = {}
    for record in summary.records:
        e = record.environment
        commit = "outside git" if e.commit is None else e.commit[:12] + (" with uncommitted changes" if e.dirty else "")
        lines[f"attnzoo {e.attnzoo} ({commit}), torch {e.torch}, timm {e.timm}, Python {e.python}, {e.system}"] = None
    return list(lines)


def dates(summary: Summary) -> str:
    """First and last time of measurement."""
    times = sorted(record.utc for record in summary.records)
    first, last = times[0][:16].replace("T", " "), times[-1][:16].replace("T", " ")
    return f"{first} UTC" if first == last else f"{first} to {last} UTC"


def milliseconds(q: Quantiles) -> str:
    """A latency and its spread: ``12.3 (12.1-12.9)``."""
    return f"{_figures(q.p50)} ({_figures(q.p20)}-{_figures(q.p80)})"


def times(q: Quantiles) -> str:
    """A speed-up and its spread: ``1.52x (1.49-1.55)``."""
    return f"{q.p50:.2f}x ({q.p20:.2f}-{q.p80:.2f})"


def ratio(value: float | None) -> str:
    """A ratio to the dense baseline, or a dash where there is none."""
    return "-" if value is None else f"{value:.2f}x"


def megabytes(value: int | None) -> str:
    """Bytes as MB of 2**20."""
    return "-" if value is None else f"{_figures(value / 2**20)} MB"


def accuracy(quality: Quality | None) -> str:
    """Top-1 with its interval, in percent: ``95.1 (93.1-96.6)``."""
    if quality is None:
        return "-"
    return f"{quality.accuracy * 100:.1f} ({quality.low * 100:.1f}-{quality.high * 100:.1f})"


def noise(rows: Iterable[Record]) -> Quantiles | None:
    """The speed-up of dense over a second copy of itself, where it was measured: what is not a difference."""
    return next((row.cost.ratios.speedup for row in rows if row.is_baseline and row.cost is not None), None)


def speed_verdict(q: Quantiles, still: Quantiles | None = None) -> Verdict:
    """Faster or slower only where the whole spread is on one side of 1, and of the `noise` (`still`)."""
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
    """Better or worse only where the two intervals do not meet."""
    if quality is None or dense is None:
        return "same"
    if quality.low > dense.high:
        return "better"
    return "worse" if quality.high < dense.low else "same"


def activation_ratio(record: Record) -> float | None:
    """Peak memory against the dense baseline: of the resident set, or of the allocator where that is not known."""
    if record.cost is None:
        return None
    ratios = record.cost.ratios
    return ratios.activation_peak if ratios.activation_peak is not None else ratios.allocator_peak


def memory_verdict(record: Record) -> Verdict:
    """More or less only where it is more than the kernel's own inexactness."""
    value = activation_ratio(record)
    if record.cost is None or value is None:
        return "same"
    memory = record.cost.candidate.memory
    held = memory.activation_peak_bytes if memory.activation_peak_bytes is not None else memory.allocator_peak_bytes
    near = abs(value - 1) <= SAME_MEMORY or (held is not None and abs(held - held / value) <= SAME_MEMORY_BYTES)
    return "same" if near else need_verdict(value)


def one_line(text: str, limit: int = 600) -> str:
    """A message on one line, not too long."""
    line = " ".join(text.split())
    return line if len(line) <= limit else line[: limit - 3] + "..."


def spread(values: Sequence[float], gap: float) -> list[float]:
    """Move values apart, as little as needed for neighbours to be `gap` apart; their order stays."""
    order = sorted(range(len(values)), key=lambda index: values[index])
    groups: list[list[int]] = []
    centres: list[float] = []
    for index in order:
        groups.append([index])
        centres.append(values[index])
        while len(groups) > 1 and centres[-1] - centres[-2] < gap * (len(groups[-1]) + len(groups[-2])) / 2:
            merged = groups[-2] + groups[-1]
            groups[-2:] = [merged]
            centres[-2:] = [sum(values[i] for i in merged) / len(merged)]
    placed = [0.0] * len(values)
    for group, centre in zip(groups, centres, strict=True):
        for rank, index in enumerate(group):
            placed[index] = centre + gap * (rank - (len(group) - 1) / 2)
    return placed


def _figures(value: float) -> str:
    """About three figures, never in powers of ten."""
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if value >= 10 else f"{value:.2f}"
