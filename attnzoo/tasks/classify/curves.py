"""Plots of trainings, as SVG: where each attention ends, and the loss and the test accuracy after each epoch."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

from attnzoo.bench.colors import DENSE, look
from attnzoo.bench.plots import INK, add_legend, new_figure, to_svg
from attnzoo.tasks.classify.quality import Accuracy, Training

OTHER = "#0088CC"
MOST_INSIDE, COLUMNS = 5, 3  # of the key's entries: inside the axes, and in a line below them
TOP1 = "top-1, % of the test images"


def accuracy_plot(qualities: Mapping[str, Accuracy], baseline: str) -> str:
    """Test accuracy of each attention, the best on top: a dot a seed, a stroke the mean, a dotted line the dense one's.

    One seed alone has its 95% interval over the test images.
    """
    seeds = {label: [_percent(one, one.correct) for one in found.trainings] for label, found in qualities.items()}
    order = sorted(seeds, key=lambda label: statistics.fmean(seeds[label]))
    height = 0.9 + 0.3 * len(order)
    figure, axes = new_figure(height=height)
    figure.subplots_adjust(left=0.38, bottom=0.6 / height)
    for place, label in enumerate(order):
        color, mean = DENSE if label == baseline else OTHER, statistics.fmean(seeds[label])
        if label == baseline:
            axes.axvline(mean, color=color, lw=1, ls=":")
        if len(seeds[label]) == 1:
            axes.hlines(place, 100 * qualities[label].low, 100 * qualities[label].high, color=color, alpha=0.6, lw=1.2)
        axes.plot(seeds[label], [place] * len(seeds[label]), "o", color=color, alpha=0.6, ms=6, mew=0)
        axes.plot([mean], [place], "|", color=color, ms=16, mew=2.2)
    axes.set_yticks(range(len(order)), order)
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.set_xlabel(TOP1)
    return to_svg(figure, "accuracy")


def loss_plot(qualities: Mapping[str, Accuracy]) -> str:
    """Mean training loss in each epoch."""
    return _curves({label: [t.epoch_losses for t in q.trainings] for label, q in qualities.items()}, "training loss")


def learning_plot(qualities: Mapping[str, Accuracy]) -> str:
    """Test accuracy after each epoch."""
    counted = {
        label: [[_percent(t, correct) for correct in t.epoch_correct] for t in q.trainings]
        for label, q in qualities.items()
    }
    return _curves(counted, TOP1)


def _curves(curves: Mapping[str, Sequence[Sequence[float]]], title: str) -> str:
    """One line per attention, the mean of its seeds, with their range shaded."""
    shown = {label: seeds for label, seeds in curves.items() if min(map(len, seeds))}
    if not shown:
        return ""
    below = 0.2 * math.ceil(len(shown) / COLUMNS) if len(shown) > MOST_INSIDE else 0.0  # inches for the key
    figure, axes = new_figure(height=4.2 + below)
    figure.subplots_adjust(bottom=(0.55 + below) / (4.2 + below))
    longest = 0
    for label, seeds in shown.items():
        each = list(zip(*seeds, strict=False))
        epochs = range(1, len(each) + 1)
        longest = max(longest, len(each))
        color, marker = look(list(shown), label)
        if len(seeds) > 1:
            axes.fill_between(
                epochs, *zip(*((min(v), max(v)) for v in each), strict=True), color=color, alpha=0.15, lw=0
            )
        means = [statistics.fmean(values) for values in each]
        axes.plot(epochs, means, color=color, marker=marker if longest <= 30 else None, ms=5, label=label, lw=1.6)
    if longest <= 12:
        axes.set_xticks(range(1, longest + 1))
    axes.set_xlabel("epoch")
    axes.set_ylabel(title)
    if below:
        figure.legend(loc="lower center", ncols=COLUMNS, frameon=False, labelcolor=INK, fontsize=8)
    else:
        add_legend(axes)
    return to_svg(figure, title)


def _percent(training: Training, correct: int) -> float:
    return 100 * correct / training.images
