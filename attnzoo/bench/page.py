"""The page of a benchmark's records: what was found, plots, tables, gates, config."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from attnzoo.bench import plots
from attnzoo.bench import summary as words
from attnzoo.bench.html import Section, page
from attnzoo.bench.html import plots as figures
from attnzoo.bench.record import Detection, Gate, Part, Perplexity, Quality, Record, Side, Stage
from attnzoo.bench.report import SPREAD, cost_table, failed, giga
from attnzoo.bench.summary import Group, Qualities, Summary, summarise
from attnzoo.tables import Cell, Column, Table
from attnzoo.units import megabytes

TRAINED = ("top-1 % (95% Wilson)", "kept (95%)", "right", "top-5 %", "calibration error", "last epoch's loss",
           "training, s")  # fmt: skip
DETECTED = ("AP %", "kept", "AP50 %", "AP75 %", "small %", "medium %", "large %", "AP of each seed", "images", "boxes")
STAGED = ("attention", Column("stage", left=True), Column("ms", SPREAD), Column("speed-up", SPREAD), "part of the time",
          "FLOPs", "peak memory", "parameters")  # fmt: skip
SCORED = ("perplexity", "kept (95%)", "NLL, nats per token", "above dense (95%)", "windows of tokens")
GATED = ("passed", "error", "allowed", Column("against", left=True))
HOW_TO_READ = (
    "Ratios are to the same host's own dense attention, measured in the same process. Speed-up is dense time over this "
    "one's, pair by pair, the two called in turn: above 1x is faster. For FLOPs, peak memory (of activations and of "
    "the cache, in one call), cache and parameters (of the model, or of the layer where it was timed alone) below 1x "
    "is less. Quality kept is accuracy or AP over the dense one's, or dense perplexity over perplexity: above 1x is "
    "better than dense. Green is better than dense and red worse, for speed-ups only where the whole 20th to 80th "
    "percentile is on one side of 1x and of the dense row's spread, for quality only where its interval leaves 1x out "
    "(it is that of images or of windows of text, not that of seeds). The dense row is dense against a second copy of "
    "itself, so its spread is the noise of the machine. Milliseconds of two rows were not taken in turn: compare "
    "speed-ups. FLOPs are those of matrix products, convolutions and attention; element-wise work is not counted. One "
    "MB is 10^6 bytes."
)
STAGES_NOTE = (
    "The encoder's attention is a part of the encoder. Times were taken within calls of the whole model; memory is "
    "that of the stage called alone. At most: Amdahl's bound, were the attention in that stage to take no time."
)
GATES_NOTE = (
    "Nothing is timed before the same process has compared it with its oracle. The error is the largest, in the tensor "
    "that is worst."
)


def html_page(records: Iterable[Record], config: str | None = None, sections: Sequence[Section | None] = ()) -> str:
    """Give the page.

    Parameters
    ----------
    records
        Of one config.
    config
        The config as text, to be shown at the end.
    sections
        Further parts, to be shown before gates and config.
    """
    summary = summarise(records)
    several = len(words.versions(summary)) > 1
    return page(
        f"attnzoo benchmark: {summary.any.benchmark}",
        [
            Section(_all_plots(summary)),
            Section(cost_table(summary).html(), "Cost", HOW_TO_READ) if summary.groups else None,
            Section(stages.html(), "Stages", STAGES_NOTE) if (stages := _stages(summary)).rows else None,
            *_quality(summary),
            *sections,
            Section(gates.html(), "Gates", GATES_NOTE, folded=True) if (gates := _gates(summary)).rows else None,
        ],
        verdict=words.verdict(summary),
        facts=_what_was_run(summary),
        warning="These records were made by more than one version of the code or its libraries." if several else "",
        config=config,
    )


def _what_was_run(summary: Summary) -> dict[str, str]:
    one = summary.any
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
        "Machine": words.machine(summary),
        "Versions": "; ".join(words.versions(summary)),
        "Measured": words.dates(summary),
        "Config": one.config_hash,
        "Again": one.command,
    }
    if words.keeps_freed_memory(summary):
        facts["Memory"] = "while timed, the process keeps what is freed, as with a caching allocator"
    return facts


def _batches(groups: Sequence[Group]) -> str:
    """Batch sizes: one for all, or one for each token count."""
    found = {g.tokens: row.shapes.batch for g in groups for row in g.rows if row.shapes is not None}
    if len(set(found.values())) == 1:
        return str(next(iter(found.values())))
    return ", ".join(f"{batch} at {tokens:,} tokens" for tokens, batch in found.items())


def _all_plots(summary: Summary) -> str:
    drawn = []
    if summary.groups:
        drawn = [
            ("Quality kept against speed-up; bars from p20 to p80, and 95%", plots.speed_trade_plot(summary)),
            ("Quality kept against memory; bars are 95%", plots.memory_trade_plot(summary)),
        ]
    if summary.cost:
        drawn += [
            ("Latency of a call against token count", plots.latency_plot(summary)),
            ("Peak memory of activations against token count", plots.memory_plot(summary)),
        ]
    return figures([*drawn, ("Training loss, first seed", plots.training_plot(summary))])


def _quality(summary: Summary) -> list[Section]:
    if not summary.quality:
        note = next((row.quality_note for group in summary.groups for row in group.rows), "")
        return [Section("", "Quality", f"None measured: {note}.")]
    found: list[Section] = []
    tables: dict[Part, tuple[tuple[str, ...], Callable[[Qualities], list[str]]]] = {
        "vision": (TRAINED, _trained_cells),
        "detection": (DETECTED, _detected_cells),
        "language": (SCORED, _scored_cells),
    }
    for part, (columns, cells) in tables.items():
        rows = [row for row in summary.quality if row.part == part]
        if not rows:
            continue
        note = next((row.quality.note for row in rows if row.quality is not None), "")
        table = Table(("attention", *columns))
        for row in rows:
            shown = [failed(row)] if row.quality is None else cells(row.quality)
            table.add(row.label, *shown, base=row.is_baseline)
        body = table.without_empty_columns().html()
        found.append(Section(body, "" if found else "Quality", f"{note}.{_canary(rows)}" if note else ""))
    return found


def _trained_cells(q: Qualities) -> list[str]:
    if not isinstance(q, Quality):
        return []
    right = f"{sum(t.correct for t in q.trainings)} of {q.images}"
    losses = ", ".join(f"{t.final_loss:.3f}" for t in q.trainings)
    top5 = "-" if q.top5 is None else f"{q.top5:.1%}"[:-1]
    calibration = "-" if q.calibration_error is None else f"{q.calibration_error:.3f}"
    seconds = ", ".join(f"{t.seconds:.0f}" for t in q.trainings)
    return [words.absolute(q), words.kept(q), right, top5, calibration, losses, seconds]


def _detected_cells(q: Qualities) -> list[str]:
    if not isinstance(q, Detection):
        return []
    parts = (q.ap50, q.ap75, q.ap_small, q.ap_medium, q.ap_large)
    figures = ["-" if value is None else f"{100 * value:.1f}" for value in parts]
    seeds = ", ".join(f"{100 * one.ap:.1f}" for one in q.trainings)
    return [f"{100 * q.ap:.1f}", words.kept(q), *figures, seeds, f"{q.images:,}", f"{q.boxes:,}"]


def _scored_cells(q: Qualities) -> list[str]:
    if not isinstance(q, Perplexity):
        return []
    d = q.difference
    difference = "-" if d is None else f"{d.mean:+.3f} ({d.low:+.3f} to {d.high:+.3f})"
    return [f"{q.perplexity:.2f}", words.kept(q), f"{q.nll:.3f}", difference, f"{len(q.window_nll)} of {q.tokens:,}"]


def _canary(rows: Iterable[Record]) -> str:
    canary = next((r.quality.canary for r in rows if isinstance(r.quality, Perplexity) and r.quality.canary), None)
    if canary is None:
        return ""
    return (
        f" Canary: {canary.label} is {canary.above_dense:+.2f} nats per token from dense, must be "
        f"{canary.at_least:+g} or more."
    )


def _stages(summary: Summary) -> Table:
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
    return table


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


def _gates(summary: Summary) -> Table:
    table = Table(("attention", "tokens", *GATED, Column("what ran", left=True)))
    for group in summary.groups:
        if group.phase == "decode":
            continue  # the gate of the prefill
        for row in group.rows:
            ran = ", ".join(op.removeprefix("aten.") for op in row.backends) or "-"
            table.add(row.label, f"{group.tokens:,}", *gate_cells(row.gate), ran)
    return table


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
