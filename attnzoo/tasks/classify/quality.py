"""The quality of classifiers: top-1 accuracy on held-out images."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

from attnzoo.bench import words
from attnzoo.bench.record import Count, Entry, NonNegative, Quality, Share
from attnzoo.bench.stats import ratio_of_shares, wilson_interval

FEW = 5  # classes; with so many or fewer, every class is among five answers


class Mistake(Entry):
    """A test image, its class, the class it was taken for, and the probability of that; its picture in base64."""

    name: str
    target: str
    answer: str
    confidence: Share
    picture: str = ""


class Training(Entry):
    """One training: seed, result, and after each epoch the mean loss in it and, where counted, the correct answers.

    `mistakes` are the test images most confidently got wrong, of an attention's first seed; only the row of quality
    has them.
    """

    seed: Count
    correct: Count
    images: Count
    final_loss: float
    seconds: NonNegative
    epoch_losses: tuple[float, ...]
    parameters: Count | None = None
    epoch_correct: tuple[Count, ...] = ()
    mistakes: tuple[Mistake, ...] = ()

    def percent(self, correct: int) -> float:
        """So many correct answers as a part of all."""
        return 100 * correct / self.images


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
    def compared(self) -> int:
        """Images."""
        return self.images

    @property
    def brief(self) -> Self:
        """The same without mistakes and their pictures."""
        trainings = tuple(training.model_copy(update={"mistakes": ()}) for training in self.trainings)
        return self.model_copy(update={"trainings": trainings})

    @property
    def seeds(self) -> list[float]:
        """Top-1 of each seed, in percent."""
        return [training.percent(training.correct) for training in self.trainings]

    @property
    def mean_of_seeds(self) -> str:
        """Mean and standard deviation of several seeds; empty for one."""
        several = len(self.trainings) > 1
        return f"{statistics.fmean(self.seeds):.2f} ± {statistics.stdev(self.seeds):.2f}" if several else ""

    @property
    def each_seed(self) -> str:
        """Top-1 of each seed."""
        return ", ".join(f"{value:.2f}" for value in self.seeds)

    @property
    def calibration(self) -> str:
        """The calibration error, or a dash where it was not looked at."""
        return "-" if self.calibration_error is None else f"{self.calibration_error:.3f}"

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
            "kept (95%)": words.quality_kept(self),
            "mean ± deviation of seeds": self.mean_of_seeds,
            "each seed": self.each_seed if self.mean_of_seeds else "",
            "right": f"{sum(t.correct for t in self.trainings)} of {self.images}",
            "top-5 %": "-" if self.top5 is None else f"{100 * self.top5:.1f}",
            "calibration error": self.calibration,
            "last epoch's loss": ", ".join(f"{t.final_loss:.3f}" for t in self.trainings),
            "training, s": ", ".join(f"{t.seconds:.0f}" for t in self.trainings),
        }


def accuracy_of(
    trainings: Sequence[Training], counted: Sequence[Mapping[str, Any]], classes: int | None, note: str
) -> Accuracy:
    """Put the trainings of an attention together, with what `Answers.counted` gives of each; the ratio is left open."""
    correct, images = sum(t.correct for t in trainings), sum(t.images for t in trainings)
    low, high = wilson_interval(correct, images)
    return Accuracy(
        accuracy=correct / images,
        low=low,
        high=high,
        images=images,
        trainings=tuple(trainings),
        note=note,
        top5=sum(one["top5"] for one in counted) / images if has_top5(classes) else None,
        calibration_error=sum(one["calibration_error"] for one in counted) / len(counted),
    )


def has_top5(classes: int | None) -> bool:
    """Whether there is a top-5 accuracy: with five classes or fewer every class is among five answers.

    `None`, where an earlier version wrote no number of classes, is taken for many.
    """
    return classes is None or classes > FEW


def listed(options: Mapping[str, Any]) -> str:
    """Options in words: ``depth=2, num_heads=3``."""
    return ", ".join(f"{key}={value}" for key, value in options.items())
