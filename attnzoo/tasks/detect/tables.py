"""Tables of detection in Markdown, made from records alone."""

from __future__ import annotations

from collections.abc import Iterable

from attnzoo.bench import words
from attnzoo.bench.record import Record as Measured
from attnzoo.bench.record import Stage
from attnzoo.bench.summary import summarize
from attnzoo.errors import AttnZooError
from attnzoo.tables import Table
from attnzoo.tasks.detect.quality import Detection
from attnzoo.tasks.detect.stages import ATTENTION, ENCODER
from attnzoo.tasks.records import Record

ENCODER_HEAD = (
    "images",
    "tokens",
    "attention",
    "attention alone",
    "speed-up",
    "encoder",
    "speed-up",
    "at most",
    "detector",
)
QUALITY_HEAD = ("attention", "AP %", "each seed", "AP50 %", "AP75 %", "small %", "medium %", "large %", "AP kept")


def encoder_table(records: Iterable[Record]) -> str:
    """What attention costs in a detector's encoder, at each size: one line per attention.

    Speed-ups are over the detector's own attention; `at most` is Amdahl's bound for the encoder, were its attention to
    take no time.

    Raises
    ------
    AttnZooError
        If a row was not measured.
    """
    lines = []
    for group in summarize(records).of("detection"):
        for row in group.rows:
            attention, encoder = _stage(row, ATTENTION), _stage(row, ENCODER)
            assert row.cost is not None
            bound = row.cost.baseline.most_speedup(ATTENTION, ENCODER)
            size = row.host.rpartition(", ")[2].removesuffix(" pixels")
            lines.append(
                [
                    size,
                    f"{row.tokens:,}",
                    f"`{row.label}`",
                    words.milliseconds(attention.latency_ms) + " ms",
                    "" if row.is_baseline else words.times(attention.speedup),
                    words.milliseconds(encoder.latency_ms) + " ms",
                    "" if row.is_baseline else words.times(encoder.speedup),
                    "" if row.is_baseline or bound is None else f"{bound:.2f}x",
                    "" if row.is_baseline else words.times(row.cost.ratios.speedup),
                ]
            )
    return Table(ENCODER_HEAD, lines).markdown()


def _stage(row: Measured, name: str) -> Stage:
    found = None if row.cost is None else row.cost.candidate.stage(name)
    if found is None:
        raise AttnZooError(f"{row.label} at {row.tokens:,} tokens: {name} was not measured")
    return found


def quality_table(records: Iterable[Record]) -> str:
    """COCO's metric: one line per attention."""
    lines = []
    for row in records:
        if row.kind != "quality" or not isinstance(row.quality, Detection):
            continue
        q = row.quality
        parts = (q.ap50, q.ap75, q.ap_small, q.ap_medium, q.ap_large)
        figures = ["-" if value is None else f"{100 * value:.1f}" for value in parts]
        seeds = ", ".join(f"{100 * one.ap:.1f}" for one in q.trainings)
        lines.append([f"`{row.label}`", f"{100 * q.ap:.1f}", seeds, *figures, words.ratio(q.ratio)])
    return Table(QUALITY_HEAD, lines).markdown()
