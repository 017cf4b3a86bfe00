"""The table of detectors trained with several seeds that the docs show, made from their records."""

import statistics
from collections.abc import Sequence

from attnzoo.tables import Column, Table
from attnzoo.tasks.detect.quality import Detecting, Record

HALF_WAY = 24  # the epoch


def seeds_table(records: Sequence[Record]) -> Table:
    """A row per attention: AP of its seeds, half-way and in the end, training loss, what the encoder adds."""
    head = ("seeds", "AP %", "each seed", f"at epoch {HALF_WAY}", "training loss", "added, to residual")
    table = Table((Column("encoder's attention", code=True), *head))
    for record in (one for one in records if one.kind == "quality" and one.quality is not None):
        trained = record.quality.trainings
        aps = [100 * one.ap for one in trained]
        spread = f" ± {statistics.stdev(aps):.1f}" if len(aps) > 1 else ""
        table.add(
            record.label,
            str(len(aps)),
            f"{statistics.fmean(aps):.1f}{spread}",
            ", ".join(f"{ap:.1f}" for ap in aps),
            span([100 * ap_at(one, HALF_WAY) for one in trained], 1),
            span([one.loss for one in trained], 2),
            span([branch.ratio for one in trained for branch in one.branches], 1),
        )
    return table


def ap_at(training: Detecting, epoch: int) -> float:
    """AP after an epoch."""
    return dict(zip(training.epochs, training.epoch_ap, strict=True))[epoch]


def span(values: Sequence[float], digits: int) -> str:
    """``0.4 to 1.8``: the lowest and the highest."""
    return " to ".join(dict.fromkeys(f"{end:.{digits}f}" for end in (min(values), max(values)))) if values else "-"
