"""Reports made from records alone: a table in the terminal, a table in Markdown, and the README's part."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

from rich.console import Console
from rich.markup import escape

from attnzoo.bench import words
from attnzoo.bench.record import Cost, Quality, Record
from attnzoo.bench.summary import Group, Summary, dates, drifted, machine, summarize, unsteady
from attnzoo.tables import Cell, Column, Table
from attnzoo.units import megabytes

SPREAD = "p50 (p20-p80)"
HEAD = (
    "attention",
    Column("ms", SPREAD),
    Column("speed-up", SPREAD),
    "FLOPs",
    "peak memory",
    Column("cache held", "allocated"),
    "parameters",
    Column("quality", "95% interval"),
    Column("quality kept", "95% interval"),
)
IN_BRACKETS = (
    "Speed-ups and other ratios are to dense in the same process, called in turn; ms and MB of two rows are not of one "
    "process: compare ratios. In brackets: p20 to p80, or the 95% interval; none of fewer than 5 pairs of calls or "
    "windows."
)
PER_CALL = {
    "forward": "ms per forward",
    "training": "ms per forward and backward",
    "prefill": "ms per prompt",
    "decode": "ms per token",
}


def print_report(
    records: Iterable[Any], console: Console, table: Table | None = None, pairs: Table | None = None
) -> None:
    """Print one table of all rows of cost, in groups that were measured alike, and why rows are missing.

    `table` takes the place of that table; `pairs` comes after the quality.
    """
    summary = summarize(records)
    if summary.groups:
        console.print((table or cost_table(summary)).rich())
    missing = [(group.title, row) for group in summary.groups for row in group.rows if row.cost is None]
    missing += [(f"quality, {row.workload}".strip(", "), row) for row in summary.quality if row.quality is None]
    for title, row in missing:
        why = f"{row.label} ({title}): {row.status}: {row.message}"
        console.print(f"[red]{escape(words.one_line(why))}[/red]", highlight=False, soft_wrap=True)
    for part in summary.scored:
        if part not in summary.parts or any(row.workload for row in summary.quality if row.part == part):
            console.print(quality_table(summary, part).rich())  # or the table of cost has it
    if pairs is not None:
        console.print(pairs.rich())
    for warning in filter(None, (drifted(summary), unsteady(summary))):
        console.print(f"[yellow]warning: {escape(warning)}[/yellow]", highlight=False, soft_wrap=True)
    if summary.groups and table is None:
        console.print(f"[dim]{IN_BRACKETS}[/dim]", highlight=False)
    console.print(f"[dim]{escape(machine(summary))}; {escape(dates(summary))}[/dim]", highlight=False)


def cost_table(summary: Summary) -> Table:
    """All rows of cost, in sections that were measured alike."""
    table = Table(HEAD)
    for group in summary.groups:
        table.section(f"{group.host}: {group.title}", PER_CALL[group.phase])
        dense = next((row.quality for row in group.rows if row.is_baseline), None)
        for row in group.rows:
            table.add(row.label, *_cost_cells(row, group, dense), base=row.is_baseline)
    return table.without_empty_columns()


def quality_table(summary: Summary, part: str, workload: str | None = None) -> Table:
    """The quality of a part's rows, of all workloads side by side: the columns are those of the quality's own class.

    A workload that failed in every row has one column, of its own name. With `workload`, of that one alone.
    """
    rows = [row for row in summary.quality if row.part == part and workload in (None, row.workload)]
    heads = {row.workload: [row.workload or "quality"] for row in rows}
    told: dict[str, list[list[str]]] = {}  # titles of each row, the longest list first
    for row in rows:
        if row.quality is not None:
            told.setdefault(row.workload, []).append(list(row.quality.details))
    heads |= {one: list(dict.fromkeys(chain(*sorted(each, key=len, reverse=True)))) for one, each in told.items()}
    table = Table((Column("attention", code=True), *chain(*heads.values())))
    for label in dict.fromkeys(row.label for row in rows):
        own = {row.workload: row for row in rows if row.label == label}
        found = [cell for workload, titles in heads.items() for cell in _quality_cells(own.get(workload), titles)]
        any_row = next(iter(own.values()))
        if len(heads) == 1 and any_row.quality is None:
            found = [failed(any_row)]  # with room for its reason
        table.add(label, *found, base=any_row.is_baseline)
    return table.without_empty_columns()


def _quality_cells(row: Record | None, titles: Sequence[str]) -> list[Cell | str]:
    if row is None or row.quality is None:
        return ["-" if row is None else failed(row), *["-"] * (len(titles) - 1)]
    return [row.quality.details.get(title, "-") for title in titles]


def _cost_cells(row: Record, group: Group, dense: Quality | None) -> list[Cell]:
    if row.cost is None:
        return [failed(row)]
    side, ratios, peak = row.cost.candidate, row.cost.ratios, words.activation_ratio(row)
    held = side.memory.activation_peak_bytes or side.memory.allocator_peak_bytes
    kept = words.quality_verdict(row.quality, dense)
    why = side.flops_note or row.cost.baseline.flops_note  # there is no ratio
    return [
        Cell(words.milliseconds(side.latency_ms), small=f"{side.throughput:,.1f} {group.items}/s"),
        Cell(words.times(ratios.speedup), words.speed_verdict(ratios.speedup, words.noise(group.rows))),
        Cell(words.ratio(ratios.flops), words.need_verdict(ratios.flops), why or giga(side.flops)),
        Cell(words.ratio(peak), words.memory_verdict(row), megabytes(held) if held else ""),
        Cell(words.ratio(ratios.cache_held), words.need_verdict(ratios.cache_held), _cache_small(row.cost)),
        Cell(words.ratio(words.size_ratio(row)), words.need_verdict(words.size_ratio(row)), f"{words.size(row):,}"),
        Cell(words.absolute(row.quality), kept),
        Cell(words.quality_kept(row.quality), kept),
    ]


def _cache_small(cost: Cost) -> str:
    memory = cost.candidate.memory
    if memory.cache_held_bytes is None:
        return ""
    held, allocated = megabytes(memory.cache_held_bytes), megabytes(memory.cache_allocated_bytes)
    return f"{held}\n{words.ratio(cost.ratios.cache_allocated)} {allocated}"


def giga(flops: int | None) -> str:
    """FLOPs in units of 10^9."""
    return "-" if flops is None else f"{flops / 1e9:,.2f} G"


def failed(row: Record) -> Cell:
    """What is shown where there are no figures."""
    return Cell(row.status, "worse", words.one_line(row.message))
