"""What pages of trained classifiers show: how they learned, and the worst mistakes."""

from __future__ import annotations

import base64
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from attnzoo.bench.colors import DENSE
from attnzoo.bench.html import Section, pictures
from attnzoo.bench.plots import mean_curves, name_rows, new_figure, to_svg
from attnzoo.bench.record import Record
from attnzoo.tasks.classify.quality import Accuracy

SHOWN_PIXELS = 96
OTHER = "#0088CC"
TOP1 = "top-1, % of the test images"


def qualities_of(records: Sequence[Record]) -> dict[str, Accuracy]:
    """The accuracy of each attention, by its label."""
    return {r.label: r.quality for r in records if r.kind == "quality" and isinstance(r.quality, Accuracy)}


def plots(records: Sequence[Record]) -> list[tuple[str, str]]:
    """How the classifiers of some records learned, each plot with its caption; those without data are empty."""
    qualities = qualities_of(records)
    baseline = next((record.label for record in records if record.is_baseline), "")
    return [
        ("Test accuracy after each epoch", learning_plot(qualities)),
        ("Training loss", loss_plot(qualities)),
        (
            "Test accuracy: every seed a dot, their mean a stroke; one seed has its 95% interval",
            accuracy_plot(qualities, baseline),
        ),
    ]


def mistakes(records: Sequence[Record]) -> Section | None:
    """The test images that each attention's first seed got wrong most confidently."""
    shown = ""
    for label, quality in qualities_of(records).items():
        first = quality.trainings[0]
        each = [
            (m.name, base64.b64decode(m.picture), f"{m.target}\ntaken for {m.answer}\n{m.confidence:.0%} sure")
            for m in first.mistakes
        ]
        shown += f"<h3>{escape(label)}, seed {first.seed}</h3>{pictures(each, SHOWN_PIXELS)}" if each else ""
    note = "Test images whose wrong answer was given the highest probability, of each attention's first seed."
    return Section(shown, "Most confidently got wrong", note) if shown else None


def accuracy_plot(qualities: Mapping[str, Accuracy], baseline: str) -> str:
    """Test accuracy of each attention, the best on top: a dot a seed, a stroke the mean, a dotted line the dense one's.

    One seed alone has its 95% interval over the test images.
    """
    if not qualities:
        return ""
    seeds = {label: found.seeds for label, found in qualities.items()}
    order = sorted(seeds, key=lambda label: statistics.fmean(seeds[label]))
    height = 0.9 + 0.3 * len(order)
    figure, axes = new_figure(height=height)
    figure.subplots_adjust(bottom=0.6 / height)
    for place, label in enumerate(order):
        color, mean = DENSE if label == baseline else OTHER, statistics.fmean(seeds[label])
        if label == baseline:
            axes.axvline(mean, color=color, lw=1, ls=":")
        if len(seeds[label]) == 1:
            axes.hlines(place, 100 * qualities[label].low, 100 * qualities[label].high, color=color, alpha=0.6, lw=1.2)
        axes.plot(seeds[label], [place] * len(seeds[label]), "o", color=color, alpha=0.6, ms=6, mew=0)
        axes.plot([mean], [place], "|", color=color, ms=16, mew=2.2)
    name_rows(axes, order, least=0.38)
    axes.set_ylim(-0.6, len(order) - 0.4)
    axes.set_xlabel(TOP1)
    return to_svg(figure, "accuracy")


def loss_plot(qualities: Mapping[str, Accuracy]) -> str:
    """Mean training loss in each epoch."""
    losses = {label: [_by_epoch(t.epoch_losses) for t in q.trainings] for label, q in qualities.items()}
    return mean_curves(losses, "epoch", "training loss")


def learning_plot(qualities: Mapping[str, Accuracy]) -> str:
    """Test accuracy after each epoch."""
    counted = {
        label: [_by_epoch(map(t.percent, t.epoch_correct)) for t in q.trainings] for label, q in qualities.items()
    }
    return mean_curves(counted, "epoch", TOP1)


def _by_epoch(values: Iterable[float]) -> dict[float, float]:
    return dict(enumerate(values, 1))
