"""The quality of classifiers: top-1 accuracy on held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

from attnzoo.bench.record import Count, Entry, NonNegative, Quality, Record, Share
from attnzoo.bench.stats import ratio_of_shares, wilson_interval
from attnzoo.bench.words import quality_kept
from attnzoo.tasks.classify.cost_config import QualityConfig
from attnzoo.tasks.classify.small import IMAGE_SIDE


class Training(Entry):
    """One training: seed, result, and after each epoch the mean loss in it and, where counted, the correct answers."""

    seed: Count
    correct: Count
    images: Count
    final_loss: float
    seconds: NonNegative
    epoch_losses: tuple[float, ...]
    parameters: Count | None = None
    epoch_correct: tuple[Count, ...] = ()


class Accuracy(Quality):
    """Top-1 accuracy on held-out images, all seeds together, with its 95% Wilson interval.

    With several seeds `images` counts each image once per seed. `ratio` is accuracy over the dense baseline's, with its
    95% Katz interval. `top5` and the expected `calibration_error` are those of all
    seeds together, null where they were not looked at.
    """

    METRIC: ClassVar[str] = "top-1 %"

    accuracy: Share
    low: Share
    high: Share
    images: Count
    trainings: tuple[Training, ...]
    top5: Share | None = None
    calibration_error: Share | None = None

    def against(self, dense: Self) -> Self:
        """The same with its ratio to the dense baseline's accuracy."""
        right, right_dense = (sum(t.correct for t in quality.trainings) for quality in (self, dense))
        ratio, low, high = ratio_of_shares(right, self.images, right_dense, dense.images)
        return self.model_copy(update={"ratio": ratio, "ratio_low": low, "ratio_high": high})

    @property
    def figure(self) -> str:
        """Top-1 with its interval, in percent: ``95.1 (93.1-96.6)``."""
        return f"{self.accuracy * 100:.1f} ({self.low * 100:.1f}-{self.high * 100:.1f})"

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's."""
        return self.low, self.high

    @property
    def details(self) -> dict[str, str]:
        """Columns of the table of quality."""
        return {
            "top-1 % (95% Wilson)": self.figure,
            "kept (95%)": quality_kept(self),
            "right": f"{sum(t.correct for t in self.trainings)} of {self.images}",
            "top-5 %": "-" if self.top5 is None else f"{self.top5:.1%}"[:-1],
            "calibration error": "-" if self.calibration_error is None else f"{self.calibration_error:.3f}",
            "last epoch's loss": ", ".join(f"{t.final_loss:.3f}" for t in self.trainings),
            "training, s": ", ".join(f"{t.seconds:.0f}" for t in self.trainings),
        }


def accuracy_of(config: QualityConfig, trainings: Sequence[Training]) -> Accuracy:
    """Put the trainings of one attention together; the ratio to dense is left open."""
    correct, images = sum(t.correct for t in trainings), sum(t.images for t in trainings)
    low, high = wilson_interval(correct, images)
    tokens = (IMAGE_SIDE[config.dataset] // config.host.patch_size) ** 2
    options = ", ".join(f"{key}={value}" for key, value in config.host.options.items())
    seeds = f"{len(trainings)} seed{'s' if len(trainings) > 1 else ''}"
    note = (
        f"{config.host.model} ({options}) from scratch on {config.dataset}, {tokens} tokens, "
        f"{config.recipe.epochs} epochs, {seeds}, {trainings[0].images:,} test images"
    )
    return Accuracy(
        accuracy=correct / images,
        low=low,
        high=high,
        images=images,
        trainings=tuple(trainings),
        note=note,
    )


def training_plot(records: Sequence[Record]) -> str:
    """Mean training loss after each epoch, of the first seed, as SVG; empty where nothing was trained."""
    from attnzoo.bench.colors import look
    from attnzoo.bench.plots import KEYED, add_key, new_figure, to_svg

    trained = {row.label: row.quality for row in records if isinstance(row.quality, Accuracy)}
    if not trained:
        return ""
    figure, axes = new_figure(right=KEYED)
    labels = tuple(trained)
    for label, quality in trained.items():
        losses = quality.trainings[0].epoch_losses
        axes.plot(range(1, len(losses) + 1), losses, color=look(labels, label)[0], label=label, lw=1.8)
    axes.set_xlabel("epoch")
    axes.set_ylabel("training loss")
    add_key(axes)
    return to_svg(figure, "training")
