"""The page's plots, as SVG to put inside HTML."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from attnzoo.bench.colors import MARKERS
from attnzoo.bench.plots import INK, new_figure, to_svg
from attnzoo.tasks.decode.record import DecodeRecord, KindResult

DEPTHS = 5  # columns of a heat map
PALETTE = (
    *("#808080", "#D55E00", "#0088CC", "#009E73", "#CC79A7", "#B8860B", "#56B4E9", "#7B68EE"),
    *("#D62728", "#7CB342", "#8C564B", "#00B8A9"),
)
SIDE_BY_SIDE = 0.006  # of the dense cache: how far points of one budget are moved apart


def position_plots(records: Sequence[DecodeRecord]) -> list[tuple[str, str]]:
    """NLL above dense along the window, one plot per budget: caption and SVG."""
    plots = []
    for budget in _budgets(records):
        chosen = [r for r in records if not r.is_baseline and r.options.get("budget") == budget]
        figure, axes = new_figure(right=0.7)
        axes.axhline(0, color=INK, lw=0.8, alpha=0.5)
        for record in chosen:
            points = record.nll.curve
            step = record.nll.tokens / len(points)
            places = [(index + 0.5) * step for index in range(len(points))]
            color, _ = _look(records, record)
            axes.plot(places, points, color=color, label=record.label, lw=1.5)
        axes.set_xlabel("position in the window, tokens")
        axes.set_ylabel("NLL above dense, nats per token")
        _legend(axes)
        what = "" if budget is None else f", budget {budget:,}"
        plots.append((f"NLL above dense along the window{what}", to_svg(figure, f"position{budget}")))
    return plots


def depth_plot(records: Sequence[DecodeRecord], index: int) -> str:
    """Recall by depth of the needle, a row for each attention: a heat map of one kind of prompt."""
    results = [record.retrieval[index] for record in records]
    figure, axes = new_figure(height=0.6 + 0.27 * len(records) + 0.5)
    figure.subplots_adjust(left=0.34, bottom=0.6 / figure.get_figheight())
    shares = [depth_shares(result) for result in results]
    blank = float("nan")
    axes.imshow(
        [[blank if share is None else share for share in row] for row in shares],
        aspect="auto",
        cmap="viridis",
        vmin=0,
        vmax=1,
    )
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            if share is not None:
                axes.text(x, y, f"{share * 100:.0f}", ha="center", va="center", color="w" if share < 0.6 else "k")
    axes.grid(False)
    axes.set_yticks(range(len(records)), [record.label for record in records])
    axes.set_xticks(range(DEPTHS), [f"{100 * i // DEPTHS}-{100 * (i + 1) // DEPTHS}%" for i in range(DEPTHS)])
    axes.set_xlabel("depth of the needle (0% is the start); numbers are % found")
    return to_svg(figure, f"depth{index}")


def depth_shares(result: KindResult) -> list[float | None]:
    """Share of needles found in each of `DEPTHS` equal parts of the haystack; None where there was none."""
    shares: list[float | None] = []
    for part in range(DEPTHS):
        hits = [hit for depth, hit in result.by_depth if min(int(depth * DEPTHS), DEPTHS - 1) == part]
        shares.append(sum(hits) / len(hits) if hits else None)
    return shares


def trade_plot(records: Sequence[DecodeRecord]) -> str:
    """NLL above dense against cache bytes, with intervals."""
    figure, axes = new_figure(right=0.66, height=5.2)
    axes.axhline(0, color=INK, lw=0.8, alpha=0.5)
    for record in records:
        interval, ratio = record.nll.difference, record.nll.cache_ratio
        if interval is None or ratio is None:
            continue
        color, marker = _look(records, record)
        x = ratio.held + _aside(records, record)
        axes.plot([x] * 2, [interval.low, interval.high], color=color, lw=2)
        axes.plot([x], [interval.mean], marker, color=color, ms=6, label=record.label)
    axes.set_xlabel("cache held, part of dense; like sizes side by side")
    axes.set_ylabel("NLL above dense, nats per token")
    _legend(axes)
    return to_svg(figure, "trade")


def recall_trade_plot(records: Sequence[DecodeRecord], index: int) -> str:
    """Recall of one kind of prompt against cache bytes, with Wilson intervals."""
    figure, axes = new_figure(right=0.66, height=5.2)
    dense = records[0].retrieval[index]
    axes.axhline(dense.recall, color=INK, lw=0.8, alpha=0.5)
    for record in records:
        result = record.retrieval[index]
        ratio = result.cache.held / dense.cache.held if dense.cache.held else 1.0
        color, marker = _look(records, record)
        ratio += _aside(records, record)
        axes.plot([ratio] * 2, [result.low, result.high], color=color, lw=2)
        axes.plot([ratio], [result.recall], marker, color=color, ms=6, label=record.label)
    axes.set_ylim(-0.03, 1.03)
    axes.set_xlabel("cache held, part of dense; like sizes side by side")
    axes.set_ylabel("numbers found, part of those asked for")
    _legend(axes)
    return to_svg(figure, f"recall{index}")


def _budgets(records: Sequence[DecodeRecord]) -> list[Any]:
    return list(dict.fromkeys(record.options.get("budget") for record in records if not record.is_baseline))


def _legend(axes: Any) -> None:
    """Put the key at the right side, outside of the axes."""
    axes.legend(frameon=False, labelcolor=INK, fontsize=8, loc="center left", bbox_to_anchor=(1.01, 0.5))


def _aside(records: Sequence[DecodeRecord], record: DecodeRecord) -> float:
    """How far a point is moved so that those of one budget stand side by side."""
    same = [r.label for r in records if r.options.get("budget") == record.options.get("budget")]
    return (same.index(record.label) - (len(same) - 1) / 2) * SIDE_BY_SIDE


def _look(records: Sequence[DecodeRecord], record: DecodeRecord) -> tuple[str, str]:
    """One color per method, whatever its budget; one marker per budget."""
    methods = list(dict.fromkeys(_method(r) for r in records))
    budgets = [None, *_budgets(records)]
    color = PALETTE[methods.index(_method(record)) % len(PALETTE)]
    return color, MARKERS[budgets.index(record.options.get("budget")) % len(MARKERS)]


def _method(record: DecodeRecord) -> str:
    options = sorted((key, str(value)) for key, value in record.options.items() if key != "budget")
    return f"{record.attention} {options}"
