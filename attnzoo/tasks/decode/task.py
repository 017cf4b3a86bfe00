"""A language model whose cache is bounded, as a task: prose, needles, time and memory, beside the dense model."""

from __future__ import annotations

from collections.abc import Sequence

from attnzoo.bench.html import Section
from attnzoo.bench.record import Record as Measured
from attnzoo.bench.task import Task
from attnzoo.tables import Cell, Column, Table
from attnzoo.tasks.decode import cells
from attnzoo.tasks.decode.config import DecodeConfig
from attnzoo.tasks.decode.pairs import pairs_table
from attnzoo.tasks.decode.plots import plots
from attnzoo.tasks.decode.quality import Perplexity, Retrieval


class Record(Measured):
    """A row of decoding, whose quality is that of prose or of numbers found."""

    quality: Perplexity | Retrieval | None


def canaries(records: Sequence[Record]) -> list[Section]:
    """The checks without which there would be no result."""
    table = Table((Column("attention"), Column("check", left=True), "nats", "limit", "passed"))
    texts: dict[str, None] = {}
    for record in records:
        quality = record.quality if record.kind == "quality" else None
        if not isinstance(quality, Perplexity):
            continue
        texts[quality.text_sha256] = None
        for check in quality.checks:
            table.add(record.label, *check.row, "yes" if check.passed else Cell("no", "worse"))
    note = f"Without these there would be no result. SHA-256 of the text: {', '.join(texts)}."
    return [Section(table.html(), "Canaries", note, folded=True)] if table.rows else []


TASK = Task(
    name="decode",
    ref="attnzoo.tasks.decode.task:TASK",
    config=DecodeConfig,
    plan=cells.plan,
    measure=cells.measure,
    prepare=cells.prepare,
    check=cells.check,
    record=Record,
    preload=lambda config: cells.PRELOAD,
    expected=lambda config: {(cells.PART, one.label) for one in config.attentions if one.expect == "unsupported"},
    plots=plots,
    sections=canaries,
    pairs=pairs_table,
)
