"""The table of trained classifiers that the docs show, made from their records."""

from collections.abc import Sequence

from attnzoo.bench import words
from attnzoo.bench.record import Record
from attnzoo.tables import Column, Table
from attnzoo.tasks.classify.page import qualities_of


def results_table(records: Sequence[Record]) -> Table:
    """A row per attention: its accuracy and, where that was measured, what a training step costs.

    Where there are several seeds, the mean and the standard deviation of their accuracies are given, else the 95%
    interval over the images. A step is a forward and a backward at the fewest tokens measured.
    """
    steps = [record for record in records if record.cost is not None and record.phase == "training"]
    fewest = min((record.tokens for record in steps), default=0)
    costs = {record.label: record for record in steps if record.tokens == fewest}
    head = (Column("attention", code=True), "top-1 %", "each seed", "top-5 %", "calibration error", "parameters")
    table = Table(head + (("training step", "speed-up", "its memory") if costs else ()))
    for label, quality in qualities_of(records).items():
        table.add(
            label,
            quality.mean_of_seeds or f"{quality.each_seed} ({100 * quality.low:.2f}-{100 * quality.high:.2f})",
            quality.each_seed,
            "-" if quality.top5 is None else f"{100 * quality.top5:.2f}",
            quality.calibration,
            f"{quality.trainings[0].parameters or 0:,}",
            *(_step(costs.get(label)) if costs else ()),
        )
    return table


def _step(record: Record | None) -> list[str]:
    if record is None or record.cost is None:
        return ["-"] * 3
    time = f"{record.cost.candidate.latency_ms.p50:.1f} ms"
    if record.is_baseline:
        return [time, "", ""]
    return [time, words.times(record.cost.ratios.speedup), words.ratio(words.activation_ratio(record))]
