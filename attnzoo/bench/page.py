"""The page of a benchmark's records: what was found, plots, tables, gates, config."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from attnzoo.bench import plots, words
from attnzoo.bench.html import Section, page
from attnzoo.bench.html import plots as figures
from attnzoo.bench.record import Gate, Record, Side, Stage
from attnzoo.bench.report import SPREAD, cost_table, giga, quality_table
from attnzoo.bench.summary import (
    Group,
    Summary,
    dates,
    drifted,
    keeps_freed_memory,
    machine,
    summarize,
    unsteady,
    verdict,
    versions,
)
from attnzoo.bench.task import Task
from attnzoo.tables import Cell, Column, Table
from attnzoo.units import megabytes

SIDE_BY_SIDE = 2  # workloads in one table of quality; more would not fit a page
STAGED = ("attention", Column("stage", left=True), Column("ms", SPREAD), Column("speed-up", SPREAD), "part of the time",
          "FLOPs", "peak memory", "parameters")  # fmt: skip
GATED = ("passed", "error", "allowed", Column("against", left=True))
HOW_TO_READ = (
    "Ratios are to the same host's own dense attention, measured in the same process. Speed-up is dense time over this "
    "one's, pair by pair, the two called in turn: above 1x is faster. For FLOPs, peak memory (of activations and of "
    "the cache, in one call), cache and parameters (of the model, or of the layer where it was timed alone) below 1x "
    "is less. Quality kept is accuracy or AP over the dense one's, or dense perplexity over perplexity: above 1x is "
    "better than dense. Green is better than dense and red worse, for speed-ups only where the whole 20th to 80th "
    "percentile is on one side of 1x and of the dense row's spread, for quality only where its interval leaves 1x out "
    "(it is that of images or of windows of text, not that of seeds). Of fewer than 5 pairs of calls or windows "
    "neither is shown. The dense row is dense against a second copy of itself, so its spread is the noise of the "
    "machine. Milliseconds and MB of two rows are not of one process, so compare ratios. FLOPs are those of matrix "
    "products, convolutions and attention; element-wise work is not counted. One MB is 10^6 bytes."
)
STAGES_NOTE = (
    "The encoder's attention is a part of the encoder. Times were taken within calls of the whole model; memory is "
    "that of the stage called alone. At most: Amdahl's bound, were the attention in that stage to take no time."
)
WORKLOADS_NOTE = (
    "What dense gets done per second in each workload, times a row's speed-up over dense in its own process, against "
    "the dense row of the first workload. The workloads are not of one process: small differences are the machine's."
)
GATES_NOTE = (
    "Nothing is timed before the same process has compared it with its oracle. The error is the largest, in the tensor "
    "that is worst."
)

PAIRS_NOTE = (
    "The first row's figure minus the second's, window by window or prompt by prompt, with the 95% interval of the "
    "bootstrap over these. Green where the first is better and red where it is worse, only where the whole interval "
    "says so."
)


def page_of(task: Task, records: Iterable[Any], config: str | None = None, folder: Path | None = None) -> str:
    """Give the page of the records of one config; what its task has of its own replaces the engine's, or follows it.

    `config`, as text, is its end; `folder` is where the records are, for what lies beside them.
    """
    records = list(records)
    summary = summarize(records)
    several = "These records were made by more than one version of the code or its libraries."
    mixed = any(len(each) > 1 for each in versions(summary).values())
    warnings = [several if mixed else "", drifted(summary), unsteady(summary)]
    if task.columns is None:
        table, how_to_read, found = cost_table(summary), HOW_TO_READ, verdict(summary)
        drawn, parts = _plots(summary), [_workloads(summary), _stages(summary)]
    else:
        table, how_to_read, found = task.columns(records), task.how_to_read, task.verdict(records)
        drawn, parts = [], []
    pairs = pairs_of(task, records, config)
    return page(
        f"attnzoo benchmark: {summary.records[0].benchmark}",
        [
            Section(figures([*drawn, *task.plots(records)])),
            Section(table.html(), "Cost", how_to_read) if summary.groups else None,
            *parts,
            *_quality(summary),
            None if pairs is None else Section(pairs.html(), "Pairs", PAIRS_NOTE),
            *task.sections(records),
            *(() if folder is None else task.attached(records, folder)),
            _gates(summary),
        ],
        verdict=found,
        facts=_what_was_run(summary),
        warning=" ".join(filter(None, warnings)),
        config=config,
    )


def pairs_of(task: Task, records: Sequence[Any], config: str | None) -> Table | None:
    """The rows that the config, as text, sets against each other."""
    content = yaml.safe_load(config) if config else None
    return task.pairs(records, content) if isinstance(content, dict) else None


def _what_was_run(summary: Summary) -> dict[str, str]:
    facts = {}
    for part in summary.parts:
        groups = summary.of(part)
        shapes = next((row.shapes for group in groups for row in group.rows if row.shapes is not None), None)
        row = groups[0].rows[0]
        hosts = len({group.host for group in groups})
        told = f"{row.host}{f' and {hosts - 1} more' if hosts > 1 else ''}, {row.dtype}"
        if shapes is not None:
            prefix = f", {shapes.prefix} prefix tokens" if shapes.prefix else ""
            told += f"; {shapes.depth} attention layers, width {shapes.dim}, {shapes.heads} heads{prefix}"
            told += f"; batch {_batches(groups)}"
        facts[part.capitalize()] = told
    facts |= {
        "Machine": machine(summary),
        "Versions": ", ".join(f"{name} {' or '.join(each)}".strip() for name, each in versions(summary).items()),
        "Measured": dates(summary),
        "Config": summary.last.config_hash,
        "Again": summary.last.command,
    }
    if keeps_freed_memory(summary):
        facts["Memory"] = "while timed, the process keeps what is freed, as with a caching allocator"
    return facts


def _batches(groups: Sequence[Group]) -> str:
    """Batch sizes: one for all, or one for each token count."""
    found = {group.size: row.shapes.batch for group in groups for row in group.rows if row.shapes is not None}
    if len(set(found.values())) == 1:
        return str(next(iter(found.values())))
    return ", ".join(f"{batch} at {about}" for about, batch in found.items())


def _plots(summary: Summary) -> list[tuple[str, str]]:
    """The plots that every task has, each with its caption."""
    if not summary.groups:
        return []
    return [
        ("Quality kept against speed-up; bars from p20 to p80, and 95%", plots.speed_trade_plot(summary)),
        ("Quality kept against memory; bars are 95%", plots.memory_trade_plot(summary)),
        ("Latency of a call against token count", plots.latency_plot(summary)),
        ("Peak memory of activations against token count", plots.memory_plot(summary)),
    ]


def _quality(summary: Summary) -> list[Section]:
    """A table of quality per part: its columns are those of the quality's own class."""
    if not summary.quality:
        note = next((row.quality_note for group in summary.groups for row in group.rows), "")
        return [Section("", "Quality", f"None measured: {note}.")] if note else []
    found: list[Section] = []
    for part in summary.scored:
        rows = [row for row in summary.quality if row.part == part]
        measured = [(row.workload, row.quality) for row in rows if row.quality is not None]
        notes = {about: f"{f'{about}: ' if about else ''}{quality.note}." for about, quality in reversed(measured)}
        remarks = dict.fromkeys(quality.remark for _, quality in measured if quality.remark)
        note, workloads = " ".join([*reversed(notes.values()), *remarks]), dict.fromkeys(row.workload for row in rows)
        apart = workloads if len(workloads) > SIDE_BY_SIDE else (None,)
        tables = "".join(quality_table(summary, part, one).html() for one in apart)
        found.append(Section(tables, "" if found else "Quality", note))
    return found


def _workloads(summary: Summary) -> Section | None:
    """How much each row gets done beside the dense row of its part's first workload; None where there is one alone."""
    table = Table(("attention", Column("workload", left=True), "per second", "of dense's"))
    for part in summary.parts:
        alike: dict[tuple[str, int, str, str], list[Group]] = {}
        for group in summary.of(part):  # a layer alone does not get done what the whole model does
            alike.setdefault((group.phase, group.tokens, group.rows[0].scope, group.host), []).append(group)
        for groups in alike.values():
            dense = next((row.cost for row in groups[0].rows if row.is_baseline), None)
            if len(groups) < 2 or dense is None:
                continue
            table.section(f"{groups[0].host}: {replace(groups[0], workload='').title}; dense at {_named(groups[0])}")
            for one in groups:
                own = next((row.cost.candidate.throughput for row in one.rows if row.is_baseline and row.cost), 0.0)
                for row in one.rows:
                    if row.cost is None or not own:
                        continue
                    done = own * (1.0 if row.is_baseline else row.cost.ratios.speedup.p50)
                    share = f"{done / dense.candidate.throughput:.2f}x"
                    table.add(row.label, _named(one), f"{done:,.4g} {one.items}", share, base=row.is_baseline)
    return Section(table.html(), "Workloads side by side", WORKLOADS_NOTE) if table.rows else None


def _named(group: Group) -> str:
    """Its workload; where it has none, as the first of several batches, its batch."""
    shapes = next((row.shapes for row in group.rows if row.shapes is not None), None)
    return group.workload or (f"batch {shapes.batch}" if shapes is not None else "as it is")


def _stages(summary: Summary) -> Section | None:
    """What each stage of a model costs, where stages were told apart."""
    table = Table(STAGED)
    for group in summary.groups:
        rows = [row for row in group.rows if row.cost is not None and row.cost.candidate.stages]
        if not rows:
            continue
        table.section(f"{group.host}: {group.title}")
        dense = next((row.cost.baseline for row in rows if row.cost is not None), None)
        for row in rows:
            for stage in row.cost.candidate.stages if row.cost is not None else ():
                table.add(row.label, *_stage_cells(row, stage, rows, dense), base=row.is_baseline)
    return Section(table.html(), "Stages", STAGES_NOTE) if table.rows else None


def _stage_cells(row: Record, stage: Stage, rows: Sequence[Record], dense: Side | None) -> list[Cell | str]:
    held = stage.activation_peak_bytes or stage.allocator_peak_bytes
    bound = None if row.is_baseline or dense is None else dense.most_speedup(f"{stage.name}'s attention", stage.name)
    verdict = "same" if row.is_baseline else words.speed_verdict(stage.speedup, words.noise(rows))
    return [
        stage.name,
        words.milliseconds(stage.latency_ms),
        Cell(words.times(stage.speedup), verdict, f"at most {bound:.2f}x" if bound is not None else ""),
        f"{stage.share:.0%}",
        Cell(giga(stage.flops), small=stage.flops_note),
        megabytes(held) if held else "-",
        f"{stage.parameters:,}",
    ]


def _gates(summary: Summary) -> Section | None:
    table = Table(("attention", "workload", *GATED, Column("what ran", left=True)))
    for group in summary.groups:
        if group.phase == "decode":
            continue  # the gate of the prefill
        for row in group.rows:
            ran = ", ".join(op.removeprefix("aten.") for op in row.backends) or "-"
            table.add(row.label, group.size, *gate_cells(row.gate), ran)
    return Section(table.html(), "Gates", GATES_NOTE, folded=True) if table.rows else None


def gate_cells(gate: Gate | None) -> list[Cell | str]:
    """Cells of a gate: whether it passed, its error, the error allowed, and the oracle."""
    if gate is None:
        return ["-", "-", "-", "not reached"]
    error = "not finite" if gate.max_abs_error is None else f"{gate.max_abs_error:.1e}"
    allowed = "-" if gate.scale is None else f"{gate.tolerance * gate.scale:.1e}"
    detail = f" ({gate.detail})" if gate.detail else ""
    if gate.cache_limit is not None:
        detail += f"; its cache held at most {gate.cache_most} entries per head, {gate.cache_limit} allowed"
    return ["yes" if gate.passed else Cell("no", "worse"), error, allowed, gate.oracle + detail]
