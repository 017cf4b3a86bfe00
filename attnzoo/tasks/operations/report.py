"""The table and the page of a benchmark of operations."""

from __future__ import annotations

from collections.abc import Sequence

from attnzoo.bench.html import Section
from attnzoo.bench.plots import INK, name_rows, new_figure, plain_ticks, to_svg
from attnzoo.bench.words import milliseconds, one_line, speed_verdict, times
from attnzoo.tables import Column, Table
from attnzoo.tasks.operations.record import Record

HEADS = ("operation", "ms", Column("fastest rival", left=True), "its ms", "speed-up", "of bandwidth", "of arithmetic",
         Column("path", left=True), "error")  # fmt: skip
HOW_TO_READ = (
    "Speed-up is the rival's time over the operation's, round by round: p50 (p20-p80); above 1x the operation is "
    "faster. Shares are of what the device reached (below), by the fewest bytes and operations that the work takes. "
    "The error is the largest one from the definition in float64, as a part of its largest value; nothing was timed "
    "that did not pass."
)


def results_table(records: Sequence[Record]) -> Table:
    """A row per operation."""
    return Table(HEADS, [cells(record) for record in records])


def verdict(records: Sequence[Record]) -> str:
    """How many operations are faster than their fastest rival, in a sentence."""
    costs = [record.cost for record in records if record.cost is not None]
    found = [speed_verdict(cost.speedup) for cost in costs if cost.speedup is not None]
    if not found:
        return ""
    faster, slower = (found.count(which) or "none" for which in ("better", "worse"))
    few = sum(cost.speedup is not None and cost.speedup.bounds is None for cost in costs)
    untold = f", {few} timed too few times to tell" if few else ""
    return f"Of {len(found)} operations beside their fastest rival, {faster} faster, {slower} slower{untold}."


def cells(record: Record) -> list[str]:
    """One line of the table."""
    path, gate, cost = ", ".join(record.backends) or "-", record.gate, record.cost
    error = "-" if gate is None or gate.max_abs_error is None else f"{gate.max_abs_error / (gate.scale or 1):.1e}"
    if cost is None:
        return [record.label, record.status, one_line(record.message, 80), "", "", "", "", path, error]
    rival = next((r for r in cost.rivals if r.name == cost.fastest), None)
    shares = ["-" if x is None else f"{x:.0%}" for x in (cost.share_of_bandwidth, cost.share_of_arithmetic)]
    return [
        record.label,
        milliseconds(cost.latency_ms),
        rival.name if rival else "; ".join(f"{r.name}: {one_line(r.message, 40)}" for r in cost.rivals),
        milliseconds(rival.latency_ms) if rival and rival.latency_ms else "-",
        times(cost.speedup) if cost.speedup else "-",
        *shares,
        path,
        error,
    ]


def rivals_section(records: Sequence[Record]) -> list[Section]:
    """Every rival's time, and what the device reached."""
    table = Table(("operation", Column("rival", left=True), "ms"))
    reached = ""
    for record in records:
        for rival in record.cost.rivals if record.cost is not None else ():
            took = milliseconds(rival.latency_ms) if rival.latency_ms else one_line(rival.message, 100)
            table.add(record.label, rival.name, took)
        if record.cost is not None and record.cost.ceilings is not None:
            found = record.cost.ceilings
            reached = (
                f"The device reached {found.bytes_per_second / 1e9:,.0f} GB/s in a large copy and "
                f"{found.flops_per_second / 1e12:,.1f} TFLOP/s in a large product of matrices."
            )
    return [Section(table.html(), "Every rival", reached)] if table.rows else []


def speed_plot(records: Sequence[Record]) -> str:
    """Speed-ups with their spread, one operation per line; empty where nothing was measured."""
    found = [(record.label, record.cost.speedup) for record in reversed(records) if record.cost is not None]
    shown = [(label, speedup) for label, speedup in found if speedup is not None]
    if not shown:
        return ""
    height = 0.9 + 0.3 * len(shown)  # inches
    figure, axes = new_figure(height=height)
    figure.subplots_adjust(bottom=0.65 / height)
    spreads = [speedup.bounds or (speedup.p50, speedup.p50) for _, speedup in shown]
    for y, (spread, (_, speedup)) in enumerate(zip(spreads, shown, strict=True)):
        axes.plot(spread, [y, y], lw=3, color=INK, alpha=0.35)
        axes.plot([speedup.p50], [y], "o", color=INK)
    axes.axvline(1, color=INK, lw=0.8, ls=":")
    axes.set_xscale("log")
    plain_ticks(axes.xaxis, [1.0, *(end for spread in spreads for end in spread)])
    name_rows(axes, [label for label, _ in shown], least=0.45, fontsize=7)
    axes.set_xlabel("times as fast")
    return to_svg(figure, "operations")
