"""What the results page shows of the records that are decoding's own."""

from __future__ import annotations

import math
import re
from pathlib import Path

from attnzoo.bench import words
from attnzoo.bench.highlights import QUALITY, Figure, Highlight, bounds, measured, quality
from attnzoo.bench.jsonl import read_lines
from attnzoo.bench.record import Interval
from attnzoo.bench.stats import paired_difference
from attnzoo.errors import AttnZooError
from attnzoo.tasks.decode import byte_run
from attnzoo.tasks.decode.kvpress.record import first_line
from attnzoo.tasks.decode.kvpress.record import read_records as read_comparisons

TASK = "decode"


def kept(difference: Interval | None) -> Figure | None:
    """Dense perplexity over this one, out of the paired differences of NLL."""
    if difference is None:
        return None
    low, high = bounds(difference)
    ends = (None if high is None else math.exp(-high), None if low is None else math.exp(-low))
    return quality(math.exp(-difference.mean), *ends)


def read_trained(path: Path) -> list[Highlight]:
    """Read the records of language models of bytes trained from scratch; their labels are name and options."""
    records = read_lines(path, byte_run.TrainRecord, byte_run.SCHEMA)
    dense = next((record for record in records if record.label == byte_run.DENSE), None)
    if dense is None:
        raise AttnZooError(f"{path}: there is no record of the dense model")
    return [
        Highlight(
            task=TASK,
            method=record.label.partition(" ")[0],
            label=record.label,
            options={name: int(value) for name, value in re.findall(r"(\w+)=(\d+)", record.label)},
            host="a small Llama of bytes",
            workload=f"perplexity per byte: {record.losses[-1][0]} steps from scratch, {len(record.nats)} windows",
            machine=words.machine(record.environment),
            figures=measured({QUALITY: kept(paired_difference(record.nats, dense.nats))}),
        )
        for record in records
        if record is not dense
    ]


def read_comparison(path: Path) -> list[Highlight]:
    """Read a comparison with kvpress, whose times and pass keys are not set against the dense cache: no highlight."""
    first_line(read_comparisons(path), path)
    return []
