"""The page's plots, as SVG to put inside HTML: text and axes take the page's own colour."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from typing import Any

from attnzoo.bench.record import Record
from attnzoo.bench.summary import Summary, spread
from attnzoo.extras import require

INK = "#010203"  # stands for the page's text colour, which is put in afterwards
COLOURS = ("#808080", "#D55E00", "#0088CC", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#7B68EE")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def latency_plot(summary: Summary) -> str:
    """Latency against token count, both logarithmic."""
    return _against_tokens(summary, lambda r: r.cost.candidate.latency_ms.p50 if r.cost else None, "ms a forward (p50)")


def memory_plot(summary: Summary) -> str:
    """Peak activation memory against token count, both logarithmic."""

    def peak(record: Record) -> float | None:
        if record.cost is None:
            return None
        memory = record.cost.candidate.memory
        held = memory.activation_peak_bytes or memory.allocator_peak_bytes
        return held / 2**20 if held else None

    return _against_tokens(summary, peak, "peak activation memory, MB")


def trade_plot(summary: Summary) -> str:
    """Accuracy kept against speed-up at the largest token count, every point labelled at the side."""
    tokens = max(summary.cost)
    points = [
        (row.label, row.cost.ratios.speedup, row.quality.ratio)
        for row in summary.cost[tokens]
        if row.cost is not None and row.quality is not None and row.quality.ratio is not None
    ]
    if not points:
        return ""
    points.sort(key=lambda point: point[1].p50)
    figure, axes = new_figure(right=0.66)
    ys = [kept for _, _, kept in points]
    low, high = min(*ys, 0.95), max(*ys, 1.02)
    room = (high - low) * 0.12
    axes.set_ylim(low - room, high + room)
    axes.set_xscale("log")
    axes.axvline(1, color=INK, lw=0.8, alpha=0.4)
    axes.axhline(1, color=INK, lw=0.8, alpha=0.4)
    gap = (high - low + 2 * room) * 0.075
    for (label, speedup, kept), label_y in zip(points, spread(ys, gap), strict=True):
        colour, marker = _look(summary, label)
        axes.plot([speedup.p20, speedup.p80], [kept, kept], color=colour, lw=2)
        axes.plot([speedup.p50], [kept], marker, color=colour, ms=8)
        axes.annotate(
            label,
            (speedup.p50, kept),
            xytext=(1.05, label_y),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            color=INK,
            arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.8, "alpha": 0.8},
            annotation_clip=False,
        )
    _plain_ticks(axes.xaxis, [s for _, q, _ in points for s in (q.p20, q.p80)] + [1.0])
    axes.set_xlabel(f"speed-up over dense at {tokens:,} tokens (right is faster)")
    axes.set_ylabel("accuracy, part of dense")
    return to_svg(figure, "trade")


def training_plot(summary: Summary) -> str:
    """Mean training loss after each epoch, of the first seed."""
    rows = [row for row in summary.quality if row.quality is not None]
    if not rows:
        return ""
    figure, axes = new_figure()
    for row in rows:
        losses = row.quality.trainings[0].epoch_losses if row.quality is not None else ()
        colour, _ = _look(summary, row.label)
        axes.plot(range(1, len(losses) + 1), losses, color=colour, label=row.label, lw=1.8)
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")
    add_legend(axes)
    return to_svg(figure, "training")


def _against_tokens(summary: Summary, value: Callable[[Record], float | None], title: str) -> str:
    figure, axes = new_figure()
    drawn: list[float] = []
    for label in summary.labels:
        rows = ((tokens, summary.row(label, tokens)) for tokens in summary.cost)
        points = [(tokens, y) for tokens, row in rows if row is not None and (y := value(row)) is not None]
        if points:
            colour, marker = _look(summary, label)
            drawn += [y for _, y in points]
            axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=label, lw=1.8, ms=6)
    if not drawn:
        return ""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(list(summary.cost), [f"{tokens:,}" for tokens in summary.cost])
    axes.minorticks_off()
    _plain_ticks(axes.yaxis, drawn)
    axes.set_xlabel("tokens")
    axes.set_ylabel(title)
    add_legend(axes)
    return to_svg(figure, title.split()[0])


def _look(summary: Summary, label: str) -> tuple[str, str]:
    index = summary.labels.index(label)
    return COLOURS[index % len(COLOURS)], MARKERS[index % len(MARKERS)]


def new_figure(right: float = 0.97, height: float = 4.2) -> tuple[Any, Any]:
    """Give an empty figure and its axes, in the page's look; `height` in inches."""
    require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height))
    axes = figure.add_subplot()
    figure.subplots_adjust(left=0.13, right=right, top=0.97, bottom=0.13)
    axes.patch.set_alpha(0)
    axes.grid(True, color=INK, alpha=0.12, lw=0.7)
    axes.tick_params(colors=INK, which="both")
    for name, spine in axes.spines.items():
        spine.set_color(INK)
        spine.set_alpha(0.5)
        spine.set_visible(name in ("left", "bottom"))
    axes.xaxis.label.set_color(INK)
    axes.yaxis.label.set_color(INK)
    return figure, axes


def _plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks of a logarithmic axis at 1, 2, 5, 10 ..., written out, as many as the values span."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = (1, 2, 5) if high - low <= 3 else (1,)
    ticks = [step * 10.0**power for power in range(low - 1, high + 1) for step in steps]
    bottom, top = min(values) / 1.15, max(values) * 1.15
    shown = [tick for tick in ticks if bottom <= tick <= top]
    axis.set_ticks(shown, [f"{tick:,.10g}" for tick in shown])
    axis.set_ticks([], minor=True)


def add_legend(axes: Any) -> None:
    """Add the key of what was drawn with a label."""
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)


def to_svg(figure: Any, salt: str) -> str:
    """Give the figure as an ``<svg>`` element whose identifiers are its own."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
