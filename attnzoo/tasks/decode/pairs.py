"""Rows set against each other, on the same windows and prompts: a wrapper and its base, a policy and another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from attnzoo.bench.words import difference
from attnzoo.tables import Cell, Column, Table
from attnzoo.tasks.decode.config import paired_labels
from attnzoo.tasks.decode.quality import Differences, Perplexity, Retrieval

MOST_COLUMNS = 6  # of differences; more would not fit a page, and come one below the other


def pairs_table(records: Sequence[Any], config: Mapping[str, Any]) -> Table | None:
    """Give a row for each of a config's `pairs`: the first row's figures minus the second's, window by window.

    `config` is plain data; all figures come from the records of the run alone.
    """
    quality: dict[tuple[str, str], Any] = {
        (record.label, record.workload): record.quality
        for record in records
        if record.kind == "quality" and isinstance(record.quality, (Perplexity, Retrieval))
    }
    labels, workloads = ([*dict.fromkeys(names)] for names in zip(*quality, strict=True)) if quality else ([], [])
    pairs: Iterable[Sequence[str]] = config.get("pairs") or ()
    rows: dict[str, Differences] = {}
    for first, second in paired_labels(pairs, labels):
        found = [(quality.get((first, about)), quality.get((second, about))) for about in workloads]
        minus = [one.minus(other) for one, other in found if one and other and type(one) is type(other)]
        rows[f"{first} - {second}"] = {name: cell for one in minus for name, cell in one.items()}
    heads = list(dict.fromkeys(name for row in rows.values() for name in row))
    if not heads:
        return None
    if len(heads) > MOST_COLUMNS:
        table = Table((Column("pair", code=True), "difference (95%)"))
        for head in heads:
            table.section(head)
            for pair, row in rows.items():
                table.add(pair, Cell(difference(row[head][0]), row[head][1]) if head in row else "-")
        return table
    table = Table((Column("pair", code=True), *(f"{head} (95%)" for head in heads)))
    for pair, row in rows.items():
        cells = [Cell(difference(row[head][0]), row[head][1]) if head in row else "-" for head in heads]
        table.add(pair, *cells)
    return table
