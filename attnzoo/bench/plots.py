"""The page's plots, as SVG to put inside HTML: text and axes take the page's own color."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from attnzoo.bench.colors import look
from attnzoo.bench.record import Quantiles, Record
from attnzoo.bench.summary import Group, Summary
from attnzoo.bench.words import activation_ratio
from attnzoo.extras import require
from attnzoo.units import MB

INK = "#010203"  # stands for the page's text color, which is put in afterwards
MOST_MARKED = 30  # places on a curve, for each to have its marker
KEYED, SHORT = 0.7, 17  # the right end of axes that have a key beside them with labels of so many characters at most
SHAPES = {"forward": "o", "training": "s", "prefill": "^", "decode": "v"}


def latency_plot(summary: Summary) -> str:
    """Latency against token count, both logarithmic."""

    def latency(record: Record) -> float | None:
        return record.cost.candidate.latency_ms.p50 / _batch(record) if record.cost else None

    return against_tokens(summary, latency, f"ms per {_one(summary)} (p50)")


def memory_plot(summary: Summary) -> str:
    """Peak activation memory against token count, both logarithmic."""

    def peak(record: Record) -> float | None:
        if record.cost is None:
            return None
        memory = record.cost.candidate.memory
        held = memory.activation_peak_bytes or memory.allocator_peak_bytes
        return held / MB / _batch(record) if held else None

    return against_tokens(summary, peak, f"peak activation memory, MB per {_one(summary)}")


def _one(summary: Summary) -> str:
    """What a figure is divided by, as `_batch` knows it."""
    return "image" if any(group.items == "images" for group in summary.groups) else "call"


def _batch(record: Record) -> int:
    return 1 if record.shapes is None else record.shapes.batch


class Spot(NamedTuple):
    """One marker: where it stands, its shape, and the ends of its horizontal bar."""

    x: float
    marker: str
    low: float
    high: float


class Trade(NamedTuple):
    """What one attention trades: the quality kept, and the spots of what it costs, all at that height."""

    label: str
    color: str
    kept: float
    low: float
    high: float
    spots: tuple[Spot, ...]


def speed_trade_plot(summary: Summary) -> str:
    """Quality kept against speed-up, of each part at its largest token count, in all phases."""
    largest = _largest(summary)

    def spot(group: Group, row: Record) -> Spot | None:
        if row.cost is None or group not in largest:
            return None
        q = row.cost.ratios.speedup
        return Spot(q.p50, SHAPES[group.phase], *(q.bounds or (q.p50, q.p50)))

    shapes = {SHAPES[group.phase]: f"{group.host}: {group.title}" for group in largest}
    return _trade(_trades(summary, spot), "speed-up over dense (right is faster)", shapes, "trade")


def memory_trade_plot(summary: Summary) -> str:
    """Quality kept against memory: the bytes that a cache holds after decoding or, without one, peak activations."""
    cached = {group.part for group in summary.groups if group.phase == "decode"}
    drawn = {g.part: g for g in reversed(_largest(summary)) if g.phase != "prefill"}  # the first of each part

    def spot(group: Group, row: Record) -> Spot | None:
        if row.cost is None or group is not drawn.get(group.part):
            return None
        x = row.cost.ratios.cache_held if group.part in cached else activation_ratio(row)
        return Spot(x, "s" if group.part in cached else "o", x, x) if x else None  # 0 has no place on a log axis

    shapes = {}
    for group in _largest(summary):
        what = "cache held" if group.part in cached else f"peak activation memory, {group.tokens:,} tokens"
        shapes["s" if group.part in cached else "o"] = f"{group.host}: {what}"
    return _trade(_trades(summary, spot), "memory, part of dense (left is less)", shapes, "memory-trade")


def _largest(summary: Summary) -> list[Group]:
    """The groups of each part at its largest token count; that of a language model is its prompt's."""
    drawn = [group for part in summary.parts for group in summary.drawn(part)]
    most = {part: max(group.tokens for group in drawn if group.part == part) for part in summary.parts}
    return [group for group in drawn if group.tokens == most[group.part]]


def _trades(summary: Summary, spot: Callable[[Group, Record], Spot | None]) -> list[Trade]:
    trades = []
    for part in summary.parts:
        for label in summary.labels[part]:
            quality = summary.quality_of(part, label)
            rows = [(group, row) for group in summary.drawn(part) for row in group.rows if row.label == label]
            spots = tuple(found for group, row in rows if (found := spot(group, row)) is not None)
            if quality is None or quality.ratio is None or not spots:
                continue
            low = quality.ratio if quality.ratio_low is None else quality.ratio_low
            high = quality.ratio if quality.ratio_high is None else quality.ratio_high
            color, _ = look(summary.labels[part], label)
            trades.append(Trade(label, color, quality.ratio, low, high, spots))
    return trades


def _trade(trades: list[Trade], title: str, shapes: dict[str, str], salt: str) -> str:
    """Draw trades; `shapes` say what a marker stands for, and the key at the side what a color does, the best first."""
    if not trades:
        return ""
    trades = sorted(trades, key=lambda trade: -trade.kept)
    height = max(4.6, 1.5 + 0.21 * len(trades))
    figure, axes = new_figure(height=height)
    figure.subplots_adjust(bottom=(0.62 + 0.2 * len(shapes)) / height)
    low, high = min(*(t.low for t in trades), 0.95), max(*(t.high for t in trades), 1.02)
    room = (high - low) * 0.06
    axes.set_ylim(low - room, high + room)
    axes.set_xscale("log")
    axes.axvline(1, color=INK, lw=0.8, alpha=0.4)
    axes.axhline(1, color=INK, lw=0.8, alpha=0.4)
    for trade in trades:
        xs = [spot.x for spot in trade.spots]
        axes.plot([min(xs), max(xs)], [trade.kept] * 2, color=trade.color, lw=0.8, alpha=0.8)
        for spot in trade.spots:
            axes.plot([spot.low, spot.high], [trade.kept] * 2, color=trade.color, lw=2)
            axes.plot([spot.x] * 2, [trade.low, trade.high], color=trade.color, lw=1, alpha=0.6)
            axes.plot([spot.x], [trade.kept], spot.marker, color=trade.color, ms=7)
        axes.plot([], [], "s", color=trade.color, label=trade.label, ms=7)
    reached = [x for t in trades for spot in t.spots for x in (spot.low, spot.high)]
    axes.set_xlim(min(*reached, 0.85) / 1.08, max(*reached, 1.15) * 1.08)
    plain_ticks(axes.xaxis, [*reached, 0.85, 1.15])
    axes.set_xlabel(title)
    axes.set_ylabel("quality kept, part of dense")
    add_key(axes)
    markers = [axes.plot([], [], marker, color=INK, label=name, ms=6)[0] for marker, name in shapes.items()]
    figure.legend(
        handles=markers, loc="lower center", bbox_to_anchor=(0.5, 0.0), frameon=False, labelcolor=INK, fontsize=9
    )
    return to_svg(figure, salt)


def against_tokens(
    summary: Summary,
    value: Callable[[Record], float | Quantiles | None],
    title: str,
    bound: Callable[[Record], float | None] = lambda row: None,
) -> str:
    """Draw a figure of each row against its token count, as SVG; empty where there is one token count alone.

    The first part that was measured without a cache is drawn, in its first phase: forward and training are not one
    line. `value` gives a row's figure, with its spread from p20 to p80 where it has one; `title` is that of its axis;
    `bound` gives a limit out of the dense row, dashed.
    """
    part = next((p for p in summary.parts if all(g.phase in ("forward", "training") for g in summary.of(p))), None)
    drawn_groups = [] if part is None else summary.drawn(part)
    groups = [group for group in drawn_groups if group.phase == drawn_groups[0].phase]
    if part is None or len({group.tokens for group in groups}) < 2:
        return ""
    figure, axes = new_figure()
    labels = summary.labels[part]
    drawn: list[float] = []
    for label in labels:
        rows = [(group.tokens, row) for group in groups for row in group.rows if row.label == label]
        points = [(tokens, y) for tokens, row in rows if (y := value(row)) is not None]
        if points:
            color, marker = look(labels, label)
            spreads = [(tokens, *y.bounds) for tokens, y in points if isinstance(y, Quantiles) and y.bounds]
            middle = [(tokens, y.p50 if isinstance(y, Quantiles) else y) for tokens, y in points]
            axes.plot(*zip(*middle, strict=True), marker=marker, color=color, label=label, lw=1.8, ms=6)
            for tokens, low, high in spreads:
                axes.vlines(tokens, low, high, color=color, lw=2, alpha=0.6)
            drawn += [y for _, y in middle] + [end for _, *ends in spreads for end in ends]
    if not drawn:
        return ""
    rows = [(group.tokens, row) for group in groups for row in group.rows if row.is_baseline]
    if limits := [(tokens, limit) for tokens, row in rows if (limit := bound(row)) is not None]:
        axes.plot(*zip(*limits, strict=True), color=INK, lw=1.2, ls="--", label="at most")
        drawn += [limit for _, limit in limits]
    axes.set_xscale("log")
    axes.set_yscale("log")
    counts = [group.tokens for group in groups]
    shown = [count for place, count in enumerate(counts) if place == 0 or count > 1.25 * counts[place - 1]]
    axes.set_xticks(shown, [f"{count:,}" for count in shown])
    axes.minorticks_off()
    plain_ticks(axes.yaxis, drawn)
    axes.set_xlabel("tokens")
    axes.set_ylabel(title)
    add_key(axes)
    return to_svg(figure, title.split()[0])


def curves(lines: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> str:
    """Draw a line per label, such as a loss by steps, as SVG; `x` and `y` name the axes. Empty without lines."""
    return mean_curves({label: [dict(points)] for label, points in lines.items()}, x, y)


def mean_curves(seeds: Mapping[str, Sequence[Mapping[float, float]]], x: str, y: str) -> str:
    """Draw a line per label, the mean of its seeds, shaded from the lowest to the highest, as SVG.

    Each seed gives figures by their places on the axis `x`, of which those that all seeds have are drawn. Labels
    without figures are left out; empty where none has any.
    """
    shown = {label: each for label, each in seeds.items() if each and all(each)}
    if not shown:
        return ""
    figure, axes = new_figure(height=max(4.2, 0.6 + 0.21 * len(shown)))
    for label, each in shown.items():
        places = sorted(set.intersection(*map(set, each)))
        values = [[one[place] for one in each] for place in places]
        color, marker = look(tuple(shown), label)
        if len(each) > 1:
            axes.fill_between(places, list(map(min, values)), list(map(max, values)), color=color, alpha=0.15, lw=0)
        means, marked = list(map(statistics.fmean, values)), marker if len(places) <= MOST_MARKED else None
        axes.plot(places, means, color=color, marker=marked, ms=5, label=label, lw=1.6)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    add_key(axes)
    return to_svg(figure, y)


def new_figure(height: float = 4.2) -> tuple[Any, Any]:
    """Give an empty figure and its axes, in the page's look; `height` in inches."""
    require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, height))
    axes = figure.add_subplot()
    figure.subplots_adjust(left=0.13, right=0.97, top=0.97, bottom=0.13)
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


def add_key(axes: Any) -> None:
    """Add the key of what was drawn with a label, outside the axes, at their right, which leave room for it."""
    longest = max(map(len, axes.get_legend_handles_labels()[1]), default=0)
    axes.figure.subplots_adjust(right=min(KEYED, KEYED - 0.0125 * (longest - SHORT)))
    axes.legend(
        loc="upper left", bbox_to_anchor=(1.02, 1.02), borderaxespad=0, frameon=False, labelcolor=INK, fontsize=9
    )


def name_rows(axes: Any, names: Sequence[str], least: float, fontsize: float = 10) -> None:
    """Name the rows of a plot at its left; the axes leave room for the longest name, and at least the part `least`."""
    axes.set_yticks(range(len(names)), names, fontsize=fontsize)
    longest = max(map(len, names), default=0)
    axes.figure.subplots_adjust(left=max(least, 0.03 + 0.0014 * fontsize * longest))


def to_svg(figure: Any, salt: str) -> str:
    """Give the figure as an ``<svg>`` element whose identifiers are its own."""
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :].replace(INK, "currentColor")
