"""What the results page shows of a record: each figure as a ratio to the dense baseline of the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from attnzoo.bench import words
from attnzoo.bench.publish import page_beside
from attnzoo.bench.record import Envelope, Phase, Quality, Quantiles, Record
from attnzoo.bench.summary import Group, summarize
from attnzoo.tables import Verdict
from attnzoo.units import megabytes


@dataclass(frozen=True)
class Measure:
    """A column of figures; its bounds are None where its figures have no interval."""

    name: str
    unit: str
    low: str | None = None
    high: str | None = None


QUALITY = Measure("quality kept", "ratio to dense", "95% low", "95% high")
SPEED = Measure("speed-up", "p50 of baseline time / own time", "p20", "p80")
PEAK = Measure("peak memory", "ratio to dense")
CACHE = Measure("cache held", "ratio to dense")
MEASURES = (QUALITY, SPEED, PEAK, CACHE)


@dataclass(frozen=True)
class Figure:
    """A ratio to dense with its interval, or a difference from it in points; and whether it is better than dense.

    `absolute` is the figure itself, in words.
    """

    value: float
    low: float | None = None
    high: float | None = None
    verdict: Verdict = "same"
    points: bool = False
    absolute: str = ""

    @property
    def text(self) -> str:
        """``0.97x (0.96-0.99)``, with a third digit where better or worse would end at a rounded 1; or points."""
        if self.points:
            return words.points(self.value)
        ends = [end for end in (self.value, self.low, self.high) if end is not None]
        digits = 3 if self.verdict != "same" and any(f"{end:.2f}" == "1.00" for end in ends) else 2
        spread = "" if self.low is None or self.high is None else f" ({self.low:.{digits}f}-{self.high:.{digits}f})"
        return f"{self.value:.{digits}f}x{spread}"


@dataclass(frozen=True)
class Highlight:
    """One workload of one method, out of one line of a records file.

    `task` is that whose column it stands in; `workload` what was run on the host: phase, tokens and batch, or what a
    quality is, a colon, and data and training. By `tokens` workloads are compared; they are 0 where it has none.
    `phase` is of a cost alone. It is `typical` where it is of a whole model against its usual baseline: what a reader
    wants to see before a layer alone. There are `figures` only where `status` is ``ok``, and only those measured.
    `record` and `page` are links to its file and that file's page, on the results page.
    """

    task: str
    method: str
    label: str
    host: str
    workload: str
    machine: str
    options: Mapping[str, Any] = field(default_factory=dict)
    utc: str = ""
    tokens: int = 0
    phase: Phase | None = None
    typical: bool = True
    status: str = "ok"
    message: str = ""
    figures: Mapping[Measure, Figure] = field(default_factory=dict)
    record: str = ""
    page: str = ""

    @property
    def budget(self) -> float | str | None:
        """Entries per head that a policy keeps, a share or bytes, as it takes them; None of all others."""
        budget = self.options.get("budget")
        return budget if isinstance(budget, (int, float, str)) else None

    @property
    def kept(self) -> str:
        """What the quality kept is called: ``perplexity kept``."""
        name, colon, _ = self.workload.partition(":")
        return f"{name if colon else 'quality'} kept"


@dataclass(frozen=True)
class Source:
    """A file of records: its highlights, and in words what else it holds."""

    path: Path
    highlights: tuple[Highlight, ...] = ()
    others: str = ""

    @property
    def page(self) -> Path:
        """What a reader is sent to: the page of the records, else the file itself."""
        page = page_beside(self.path)
        return page if page.is_file() else self.path


def of_records(records: Sequence[Record], column: Callable[[Record], str]) -> list[Highlight]:
    """Give the highlights of a file's records that have the engine's own cost and quality, of dense baselines none.

    `column` gives the task that a record is shown under.
    """
    summary = summarize(records)
    dense = {(row.part, row.workload): row.quality for row in summary.quality if row.is_baseline}
    rows = [row for row in summary.quality if row.attention]
    found = [_of_quality(row, column(row), dense.get((row.part, row.workload))) for row in rows]
    for group in summary.groups:
        found += [_of_cost(row, column(row), group) for row in group.rows if row.attention]
    return found


def speed(ratio: Quantiles, still: Quantiles | None = None, absolute: str = "") -> Figure:
    """The figure of a speed-up; `still` is that of dense over itself."""
    low, high = ratio.bounds or (None, None)
    return Figure(ratio.p50, low, high, words.speed_verdict(ratio, still), absolute=absolute)


def _need(ratio: float | None, verdict: Verdict, size: int | None) -> Figure | None:
    """The figure of something of which less is better, in bytes; None where there is none."""
    return None if ratio is None else Figure(ratio, verdict=verdict, absolute=megabytes(size) if size else "")


def _of_quality(row: Record, task: str, dense: Quality | None) -> Highlight:
    found, figures = row.quality, dict[Measure, Figure | None]()
    if found is not None:
        kept = None if found.ratio is None else Figure(found.ratio, found.ratio_low, found.ratio_high)
        kept = kept if found.points is None else Figure(found.points, points=True)
        verdict = "same" if found.points is not None else words.quality_verdict(found, dense)
        figures[QUALITY] = kept and replace(kept, verdict=verdict, absolute=found.figure)
        figures[CACHE] = _need(found.cache_ratio, words.need_verdict(found.cache_ratio), None)
    metric = row.workload or ("" if found is None else found.METRIC.removesuffix(" %"))
    note = (row.quality_note if found is None else found.note).removeprefix(_model(row)).strip()
    about = ": ".join(filter(None, (metric, note)))
    return highlight(row, task, about, figures, phase=None, tokens=row.tokens or getattr(found, "tokens", 0))


def _of_cost(row: Record, task: str, group: Group) -> Highlight:
    figures = dict[Measure, Figure | None]()
    if row.cost is not None:
        ratios, side = row.cost.ratios, row.cost.candidate
        peak = side.memory.activation_peak_bytes or side.memory.allocator_peak_bytes
        held, less = side.memory.cache_held_bytes, words.need_verdict(ratios.cache_held)
        figures = {
            SPEED: speed(ratios.speedup, words.noise(group.rows), f"{words.figures(side.latency_ms.p50)} ms"),
            PEAK: _need(words.activation_ratio(row), words.memory_verdict(row), peak),
            CACHE: _need(ratios.cache_held, less, held),
        }
    about = ["" if row.shapes is None else f"batch {row.shapes.batch}", row.dtype]
    told = ", ".join([group.title, *(word for word in about if word and word not in group.workload.split(", "))])
    return highlight(row, task, told, figures)


def highlight(
    row: Envelope, task: str, workload: str, figures: Mapping[Measure, Figure | None], **other: Any
) -> Highlight:
    """Give the highlight of a record; `other` fields take the place of what it says itself."""
    said: dict[str, Any] = {name: getattr(row, name) for name in ("label", "utc", "status", "message")}
    said |= {"method": row.attention, "host": _model(row), "machine": words.machine(row.environment)}
    said |= {"options": row.options, "tokens": row.tokens, "phase": row.phase, "typical": row.scope == "model"}
    measured = {measure: figure for measure, figure in figures.items() if figure is not None}
    return Highlight(task=task, workload=workload, figures=measured, **{**said, **other})


def _model(row: Envelope) -> str:
    """The host without its library."""
    return row.host.partition(":")[2] or row.host
