"""The page's plots, as SVG to put inside HTML: text and axes take the page's own colour."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from attnzoo.bench.record import Part, Quality, Record
from attnzoo.bench.summary import Group, Summary, activation_ratio, spread
from attnzoo.extras import require
from attnzoo.units import MB

INK = "#010203"  # stands for the page's text colour, which is put in afterwards
COLOURS = ("#808080", "#D55E00", "#0088CC", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#7B68EE")
POLICY_COLOURS = ("#808080", "#843C39", "#6A3D9A", "#2F7F2F", "#E6550D", "#17A2A2", "#A6A000", "#C71585")
SHAPES = {"forward": "o", "training": "s", "prefill": "^", "decode": "v"}
NAMES: dict[Part, str] = {"vision": "mixers and cores", "detection": "detectors", "language": "policies"}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def latency_plot(summary: Summary) -> str:
    """Latency against token count, both logarithmic."""

    def latency(record: Record) -> float | None:
        return record.cost.candidate.latency_ms.p50 / _batch(record) if record.cost else None

    return _against_tokens(summary, latency, "ms an image (p50)")


def memory_plot(summary: Summary) -> str:
    """Peak activation memory against token count, both logarithmic."""

    def peak(record: Record) -> float | None:
        if record.cost is None:
            return None
        memory = record.cost.candidate.memory
        held = memory.activation_peak_bytes or memory.allocator_peak_bytes
        return held / MB / _batch(record) if held else None

    return _against_tokens(summary, peak, "peak activation memory, MB an image")


def _batch(record: Record) -> int:
    return 1 if record.shapes is None else record.shapes.batch


@dataclass(frozen=True)
class Spot:
    """One marker: where it stands, its shape, and the ends of its horizontal bar."""

    x: float
    marker: str
    low: float
    high: float


@dataclass(frozen=True)
class Trade:
    """What one attention trades: the quality kept, and the spots of what it costs, all at that height."""

    label: str
    colour: str
    kept: float
    low: float
    high: float
    spots: tuple[Spot, ...]


def speed_trade_plot(summary: Summary) -> str:
    """Quality kept against speed-up: vision models at the largest token count, language models in both phases."""
    tokens = _most_tokens(summary)

    def spot(group: Group, row: Record) -> Spot | None:
        if row.cost is None or group.tokens != tokens[group.part]:
            return None
        q = row.cost.ratios.speedup
        return Spot(q.p50, SHAPES[group.phase], q.p20, q.p80)

    def name(group: Group) -> str:
        if group.part == "language":
            return f"policies: {group.phase}"
        return f"{NAMES[group.part]}: {group.title.partition(',')[0]}, {tokens[group.part]:,} tokens"

    shapes = {SHAPES[group.phase]: name(group) for group in summary.groups}
    return _trade(_trades(summary, spot), "speed-up over dense (right is faster)", shapes, "trade")


def memory_trade_plot(summary: Summary) -> str:
    """Quality kept against memory: peak activations of vision models, bytes that the cache of language models holds."""
    tokens = _most_tokens(summary)

    def spot(group: Group, row: Record) -> Spot | None:
        vision = group.part != "language"
        if row.cost is None or group.phase == "prefill" or group.tokens != tokens[group.part]:
            return None
        x = activation_ratio(row) if vision else row.cost.ratios.cache_held
        return None if x is None else Spot(x, "o" if vision else "s", x, x)

    names = {
        part: "policies: cache held"
        if part == "language"
        else f"{NAMES[part]}: peak activation memory, {tokens[part]:,} tokens"
        for part in summary.parts
    }
    shapes = {"s" if part == "language" else "o": names[part] for part in summary.parts}
    return _trade(_trades(summary, spot), "memory, part of dense (left is less)", shapes, "memory-trade")


def _most_tokens(summary: Summary) -> dict[Part, int]:
    """The largest token count of each part; that of a language model is its prompt's."""
    return {part: max(group.tokens for group in summary.of(part)) for part in summary.parts}


def _trades(summary: Summary, spot: Callable[[Group, Record], Spot | None]) -> list[Trade]:
    trades = []
    for part in summary.parts:
        for label in summary.labels[part]:
            quality = summary.quality_of(part, label)
            rows = [(group, row) for group in summary.of(part) for row in group.rows if row.label == label]
            spots = tuple(found for group, row in rows if (found := spot(group, row)) is not None)
            if quality is None or quality.ratio is None or not spots:
                continue
            low = quality.ratio if quality.ratio_low is None else quality.ratio_low
            high = quality.ratio if quality.ratio_high is None else quality.ratio_high
            palette = POLICY_COLOURS if part == "language" else COLOURS
            colour = palette[summary.labels[part].index(label) % len(palette)]
            trades.append(Trade(label, colour, quality.ratio, low, high, spots))
    return trades


def _trade(trades: list[Trade], title: str, shapes: dict[str, str], salt: str) -> str:
    """Draw trades, every one labelled at the side; `shapes` say what a marker stands for."""
    if not trades:
        return ""
    trades = sorted(trades, key=lambda trade: max(spot.x for spot in trade.spots))
    height = max(4.6, 1.5 + 0.27 * len(trades))
    figure, axes = new_figure(right=0.72, height=height)
    bottom = (0.62 + 0.2 * len(shapes)) / height
    figure.subplots_adjust(bottom=bottom)
    low, high = min(*(t.low for t in trades), 0.95), max(*(t.high for t in trades), 1.02)
    room = (high - low) * 0.06
    axes.set_ylim(low - room, high + room)
    axes.set_xscale("log")
    axes.axvline(1, color=INK, lw=0.8, alpha=0.4)
    axes.axhline(1, color=INK, lw=0.8, alpha=0.4)
    gap = (high - low + 2 * room) * 0.21 / (height * (0.97 - bottom))
    places = spread([t.kept for t in trades], gap, within=(low - room, high + room))
    for trade, label_y in zip(trades, places, strict=True):
        xs = [spot.x for spot in trade.spots]
        axes.plot([min(xs), max(xs)], [trade.kept] * 2, color=trade.colour, lw=0.8, alpha=0.8)
        for spot in trade.spots:
            axes.plot([spot.low, spot.high], [trade.kept] * 2, color=trade.colour, lw=2)
            axes.plot([spot.x] * 2, [trade.low, trade.high], color=trade.colour, lw=1, alpha=0.6)
            axes.plot([spot.x], [trade.kept], spot.marker, color=trade.colour, ms=7)
        axes.annotate(
            trade.label,
            (max(xs), trade.kept),
            xytext=(1.05, label_y),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            color=INK,
            fontsize=9,
            arrowprops={"arrowstyle": "-", "color": trade.colour, "lw": 0.8, "alpha": 0.6},
            annotation_clip=False,
        )
    reached = [x for t in trades for spot in t.spots for x in (spot.low, spot.high)]
    axes.set_xlim(min(*reached, 0.85) / 1.08, max(*reached, 1.15) * 1.08)
    plain_ticks(axes.xaxis, [*reached, 0.85, 1.15])
    axes.set_xlabel(title)
    axes.set_ylabel("quality kept, part of dense")
    for marker, name in shapes.items():
        axes.plot([], [], marker, color=INK, label=name, ms=6)
    figure.legend(loc="lower center", bbox_to_anchor=(0.5, 0.0), frameon=False, labelcolor=INK, fontsize=9)
    return to_svg(figure, salt)


def training_plot(summary: Summary) -> str:
    """Mean training loss after each epoch, of the first seed."""
    trained = [(row.label, row.quality) for row in summary.quality if isinstance(row.quality, Quality)]
    if not trained:
        return ""
    figure, axes = new_figure()
    for label, quality in trained:
        losses = quality.trainings[0].epoch_losses
        colour, _ = _look(summary.labels["vision"], label)
        axes.plot(range(1, len(losses) + 1), losses, color=colour, label=label, lw=1.8)
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")
    add_legend(axes)
    return to_svg(figure, "training")


def _against_tokens(summary: Summary, value: Callable[[Record], float | None], title: str) -> str:
    figure, axes = new_figure()
    drawn: list[float] = []
    for label in summary.labels["vision"]:
        rows = ((tokens, summary.row(label, tokens)) for tokens in summary.cost)
        points = [(tokens, y) for tokens, row in rows if row is not None and (y := value(row)) is not None]
        if points:
            colour, marker = _look(summary.labels["vision"], label)
            drawn += [y for _, y in points]
            axes.plot(*zip(*points, strict=True), marker=marker, color=colour, label=label, lw=1.8, ms=6)
    if not drawn:
        return ""
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(list(summary.cost), [f"{tokens:,}" for tokens in summary.cost])
    axes.minorticks_off()
    plain_ticks(axes.yaxis, drawn)
    axes.set_xlabel("tokens")
    axes.set_ylabel(title)
    add_legend(axes)
    return to_svg(figure, title.split()[0])


def _look(labels: Sequence[str], label: str) -> tuple[str, str]:
    index = labels.index(label)
    turn = index // len(COLOURS)  # colours come round again with other markers
    return COLOURS[index % len(COLOURS)], MARKERS[(index + turn) % len(MARKERS)]


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


def plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """Ticks of a logarithmic axis at 1, 2, 5 ..., written out, as many as the values span; closer where few."""
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    steps = (1, 2, 5) if high - low <= 3 else (1,)
    ticks = [step * 10.0**power for power in range(low - 1, high + 1) for step in steps]
    bottom, top = min(values) / 1.15, max(values) * 1.15
    shown = [tick for tick in ticks if bottom <= tick <= top]
    if len(shown) < 3:
        from matplotlib.ticker import MaxNLocator

        shown = [float(tick) for tick in MaxNLocator(4).tick_values(bottom, top) if bottom <= tick <= top]
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
