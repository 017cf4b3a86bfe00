"""The plots of decoding, as SVG to put inside HTML."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from attnzoo.bench import words
from attnzoo.bench.colors import look
from attnzoo.bench.plots import INK, add_key, name_rows, new_figure, to_svg
from attnzoo.bench.record import Interval, Record
from attnzoo.tasks.decode.quality import KIND_TITLES, Perplexity, Retrieval

DEPTHS = 5  # columns of a heat map
Row = tuple[Record, Any]  # a record of quality, and its quality


def plots(records: Sequence[Record]) -> list[tuple[str, str]]:
    """All plots of the quality of language models, each with its caption."""
    scored = [(row, row.quality) for row in records if row.kind == "quality" and isinstance(row.quality, Perplexity)]
    asked = [(row, row.quality) for row in records if row.kind == "quality" and isinstance(row.quality, Retrieval)]
    drawn = position_plots(scored)
    drawn.append(("NLL above dense, with 95% intervals", interval_plot(scored, "nll", _above_dense)))
    for kind, title in KIND_TITLES.items():
        rows = [(row, quality) for row, quality in asked if quality.kind == kind]
        if rows:
            drawn.append((f"Numbers found by depth: {title}", depth_plot(rows)))
            drawn.append((f"Numbers found, with 95% intervals: {title}", interval_plot(rows, kind, _recall)))
    return drawn


def position_plots(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """NLL above dense along the window, one plot per budget: caption and SVG."""
    drawn, labels = [], [row.label for row, _ in rows]
    curves = [(row, quality) for row, quality in rows if quality.curve]
    for budget in dict.fromkeys(row.options.get("budget") for row, _ in curves):
        figure, axes = new_figure()
        axes.axhline(0, color=INK, lw=0.8, alpha=0.5)
        for row, quality in curves:
            if row.options.get("budget") != budget:
                continue
            step = quality.tokens / len(quality.curve)
            places = [(index + 0.5) * step for index in range(len(quality.curve))]
            axes.plot(places, quality.curve, color=look(labels, row.label)[0], label=row.label, lw=1.5)
        axes.set_xlabel("position in the window, tokens")
        axes.set_ylabel("NLL above dense, nats per token")
        add_key(axes)
        what = "" if budget is None else f", budget {words.budget(budget)}"
        drawn.append((f"NLL above dense along the window{what}", to_svg(figure, f"position{budget}")))
    return drawn


def depth_plot(rows: Sequence[Row]) -> str:
    """Recall by depth of the needle, a row for each attention: a heat map of one kind of prompt."""
    figure, axes = _tall_figure(rows)
    shares = [depth_shares(quality) for _, quality in rows]
    blank = float("nan")
    painted = [[blank if share is None else share for share in row] for row in shares]
    axes.imshow(painted, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    for y, row in enumerate(shares):
        for x, share in enumerate(row):
            if share is not None:
                axes.text(x, y, f"{share * 100:.0f}", ha="center", va="center", color="w" if share < 0.6 else "k")
    axes.grid(False)
    axes.set_xticks(range(DEPTHS), [f"{100 * i // DEPTHS}-{100 * (i + 1) // DEPTHS}%" for i in range(DEPTHS)])
    axes.set_xlabel("depth of the needle (0% is the start); numbers are % found")
    return to_svg(figure, f"depth{rows[0][1].kind}")


def depth_shares(quality: Retrieval) -> list[float | None]:
    """Share of needles found in each of `DEPTHS` equal parts of the haystack; None where there was none."""
    shares: list[float | None] = []
    for part in range(DEPTHS):
        hits = [hit for depth, hit in quality.by_depth if min(int(depth * DEPTHS), DEPTHS - 1) == part]
        shares.append(sum(hits) / len(hits) if hits else None)
    return shares


def interval_plot(rows: Sequence[Row], salt: str, of: Callable[[Any], Interval | None]) -> str:
    """A figure with its interval, a line for each attention, and beside its name the part of dense's cache."""
    labels = [row.label for row, _ in rows]
    shown = [(row, quality, found) for row, quality in rows if (found := of(quality)) is not None]
    if not shown:
        return ""
    figure, axes = _tall_figure([(row, quality) for row, quality, _ in shown])
    axes.axvline(0, color=INK, lw=0.8, alpha=0.5)
    for y, (row, _, found) in enumerate(shown):
        color, _ = look(labels, row.label)
        axes.plot(found.bounds or [found.mean] * 2, [y] * 2, color=color, lw=2)
        axes.plot([found.mean], [y], "o", color=color, ms=6)
    axes.set_ylim(len(shown) - 0.5, -0.5)
    axes.set_xlabel("NLL above dense, nats per token" if salt == "nll" else "part of the numbers asked for")
    return to_svg(figure, f"interval{salt}")


def _tall_figure(rows: Sequence[Row]) -> tuple[Any, Any]:
    """Axes with a line for each row, named at the left, with the part of the dense cache that it held."""
    figure, axes = new_figure(height=1.1 + 0.27 * len(rows))
    held = [quality.cache_ratio for _, quality in rows]
    names = [row.label + (f" ({part:.2f}x)" if part else "") for (row, _), part in zip(rows, held, strict=True)]
    figure.subplots_adjust(bottom=0.6 / figure.get_figheight())
    name_rows(axes, names, least=0.34)
    return figure, axes


def _above_dense(quality: Perplexity) -> Interval | None:
    return quality.difference


def _recall(quality: Retrieval) -> Interval:
    return Interval(mean=quality.recall, low=quality.low, high=quality.high, n=len(quality.by_depth))
