"""The table and the page of a benchmark of operations."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from attnzoo.bench.html import Section, page
from attnzoo.bench.plots import INK, new_figure, plain_ticks, to_svg
from attnzoo.bench.summary import milliseconds, one_line, times
from attnzoo.tables import Column, Table
from attnzoo.tasks.operations.record import OperationRecord

HEADS = (
    "operation",
    "ms",
    Column("fastest rival", left=True),
    "its ms",
    "speed-up",
    "of bandwidth",
    "of arithmetic",
    Column("path", left=True),
    "error",
)
HOW = (
    "Speed-up is the rival's time over the operation's, round by round: p50 (p20-p80); above 1x the operation is "
    "faster. Shares are of the ceilings above, by the fewest bytes and operations that the work takes. The error is "
    "the largest one from the definition in float64, as a part of its largest value; nothing was timed that did not "
    "pass."
)


def results_table(records: Sequence[OperationRecord]) -> Table:
    """A row per operation."""
    return Table(HEADS, [cells(record) for record in records])


def print_report(records: Sequence[OperationRecord], console: Console) -> None:
    """Print the table."""
    title = f"{records[0].benchmark} on {records[0].environment.device}, {records[0].dtype}"
    console.print(results_table(records).rich(title))


def markdown_table(records: Sequence[OperationRecord]) -> str:
    """The table in Markdown."""
    return results_table(records).markdown()


def cells(record: OperationRecord) -> list[str]:
    """One line of the table."""
    path = ", ".join(record.paths) or "-"
    gate = record.gate
    error = "-" if gate is None or gate.max_abs_error is None else f"{gate.max_abs_error / (gate.scale or 1):.1e}"
    if record.status != "ok" or record.latency_ms is None:
        return [record.label, record.status, one_line(record.message, 80), "", "", "", "", path, error]
    rival = next((r for r in record.rivals if r.name == record.fastest), None)
    shares = ["-" if x is None else f"{x:.0%}" for x in (record.share_of_bandwidth, record.share_of_arithmetic)]
    return [
        record.label,
        milliseconds(record.latency_ms),
        rival.name if rival else "; ".join(f"{r.name}: {one_line(r.message, 40)}" for r in record.rivals),
        milliseconds(rival.latency_ms) if rival and rival.latency_ms else "-",
        times(record.speedup) if record.speedup else "-",
        *shares,
        path,
        error,
    ]


def html_page(records: Sequence[OperationRecord], config: str | None = None) -> str:
    """The page: what was run, the plot, the table, every rival."""
    one = records[0]
    facts = {
        "Machine": one.environment.device,
        "Versions": f"attnzoo {one.environment.attnzoo}, torch {one.environment.torch}, commit {one.environment.commit}"
        + (" with changes" if one.environment.dirty else ""),
        "Measured": one.utc,
        "Numbers": one.dtype,
        "Again": one.command,
    }
    if one.ceilings is not None:
        facts["Ceilings"] = (
            f"{one.ceilings.bytes_per_second / 1e9:,.0f} GB/s of a large copy, "
            f"{one.ceilings.flops_per_second / 1e12:,.1f} TFLOP/s of a large product of matrices"
        )
    rivals = Table(("operation", Column("rival", left=True), "ms"))
    for record in records:
        for rival in record.rivals:
            took = milliseconds(rival.latency_ms) if rival.latency_ms else one_line(rival.message, 100)
            rivals.add(record.label, rival.name, took)
    plot = speed_plot(records)
    return page(
        f"attnzoo operations: {one.benchmark}",
        [
            Section(plot, "Speed-up over the fastest rival", "" if plot else "Nothing was measured."),
            Section(results_table(records).html(), "Operations", HOW),
            Section(rivals.html(), "Every rival"),
        ],
        facts=facts,
        config=config,
    )


def speed_plot(records: Sequence[OperationRecord]) -> str:
    """Speed-ups with their spread, an operation a line; empty where nothing was measured."""
    shown = [record for record in reversed(records) if record.speedup is not None]
    if not shown:
        return ""
    height = 0.9 + 0.3 * len(shown)  # inches
    figure, axes = new_figure(height=height)
    figure.subplots_adjust(left=0.45, bottom=0.65 / height)
    for y, record in enumerate(shown):
        assert record.speedup is not None
        axes.plot([record.speedup.p20, record.speedup.p80], [y, y], lw=3, color=INK, alpha=0.35)
        axes.plot([record.speedup.p50], [y], "o", color=INK)
    axes.axvline(1, color=INK, lw=0.8, ls=":")
    axes.set_xscale("log")
    spreads = [record.speedup for record in shown if record.speedup is not None]
    plain_ticks(axes.xaxis, [1.0, *(s.p20 for s in spreads), *(s.p80 for s in spreads)])
    axes.set_yticks(range(len(shown)), [record.label for record in shown], fontsize=7)
    axes.set_xlabel("times as fast")
    return to_svg(figure, "operations")
