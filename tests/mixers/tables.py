"""The table of docs/padre.md that sets PADRe's instances beside each other, made from the records."""

import math
from pathlib import Path

from attnzoo.bench.words import times
from attnzoo.tables import Column, Table
from attnzoo.tasks import read_records
from attnzoo.tasks.classify.page import qualities_of

DENSE, FUSED = "softmax", "timm (fused)"
ROWS = (DENSE, "conv", "padre degree=1", "padre degree=2", "padre degree=3")
TOKENS = (196, 784, 3136)


def instances_table(folder: Path) -> Table:
    """What each learned on three kinds of data, and how fast a layer of it is against timm's own fused attention."""
    images = [qualities_of(read_records(folder / f"{name}.jsonl")) for name in ("padre_starts", "fashion_mnist")]
    text = {record.label: record.quality for record in read_records(folder / "train_bytes.jsonl")}
    speed = {
        (record.label, record.tokens): times(record.cost.ratios.speedup)
        for record in read_records(folder / "mixers_cpu.jsonl")
        if record.cost is not None and record.phase == "forward"
    }
    head = (Column("attention", code=True), "CIFAR-10, top-1 %", "Fashion-MNIST, top-1 %", "text, bits per byte")
    table = Table(head + tuple(f"layer, {tokens:,} tokens" for tokens in TOKENS))
    for label in ROWS:
        read = text.get("dense" if label == DENSE else label)
        table.add(
            label,
            *(each[label].mean_of_seeds or each[label].each_seed for each in images),
            "-" if read is None else f"{read.nll / math.log(2):.2f}",
            *(speed[FUSED if label == DENSE else label, tokens] for tokens in TOKENS),
        )
    return table


INTERACTIONS = {
    "interactions": "two cells, 1 apart",
    "interactions_three": "three cells, 1 apart",
    "interactions_far": "two cells, 4 apart",
}


def interactions_table(folder: Path) -> Table:
    """Top-1 on each set of made images, where it was measured: the mean and the deviation of the seeds."""
    each = [qualities_of(read_records(folder / f"{name}.jsonl")) for name in INTERACTIONS]
    table = Table((Column("attention", code=True), "parameters", *INTERACTIONS.values()))
    for label, quality in each[0].items():
        shown = (one[label].mean_of_seeds if label in one else "-" for one in each)
        table.add(label, f"{quality.trainings[0].parameters or 0:,}", *shown)
    return table
