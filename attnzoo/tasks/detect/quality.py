"""The quality of detectors: COCO's metric on held-out images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

from attnzoo.bench.record import Count, Entry, NonNegative, Quality, Share
from attnzoo.bench.record import Record as Measured
from attnzoo.bench.words import quality_kept

CHANCE = 0.05
"""The AP up to which a detector may be one that found nothing: right boxes on the wrong images stay below it."""


class Metric(Entry):
    """COCO's metric: average precision over IoUs of 0.5 to 0.95, at 0.5 and at 0.75, and by the size of boxes.

    Small boxes are under 32 x 32 pixels, medium ones up to 96 x 96; null where there are none.
    """

    ap: Share
    ap50: Share
    ap75: Share
    ap_small: Share | None
    ap_medium: Share | None
    ap_large: Share | None


class Branch(Entry):
    """An attention layer over all test images: root mean square of what it adds over that of the residual stream.

    `kurtosis` is that of what it adds: 3 for a normal distribution, more where few values are much larger than most.
    Null where a figure is not finite. Images that several processes test twice, to have equal shares, count twice.
    """

    layer: str
    ratio: NonNegative | None
    kurtosis: NonNegative | None


class Detecting(Metric):
    """One detector's training: seed, COCO's metric on the test images, and AP and AP50 at the epochs it was tested.

    `loss` is the mean training loss in the last tenth of the epochs; `branches` are those of the encoder's attention
    layers, on the test images.
    """

    seed: Count
    epochs: tuple[Count, ...] = ()
    epoch_ap: tuple[Share, ...] = ()
    epoch_ap50: tuple[Share, ...] = ()
    loss: float | None = None
    branches: tuple[Branch, ...] = ()


class Detection(Quality, Metric):
    """COCO's metric on held-out images, the mean of all seeds.

    `ratio` is AP over the dense baseline's where that is above `CHANCE`, and else null; it has no interval.
    `difference` is AP less the dense baseline's.
    """

    METRIC: ClassVar[str] = "AP %"

    images: Count
    boxes: Count
    trainings: tuple[Detecting, ...]
    difference: float | None = None

    def against(self, dense: Self) -> Self:
        """The same with its ratio to the dense baseline's AP, or the difference alone."""
        ratio = self.ap / dense.ap if dense.ap > CHANCE else None
        return self.model_copy(update={"ratio": ratio, "difference": self.ap - dense.ap})

    def as_dense(self) -> Self:
        """The same with its ratio to itself, where it is above chance."""
        return self.model_copy(update={"ratio": 1.0 if self.ap > CHANCE else None})

    @property
    def brief(self) -> Self:
        """The same without the branches of each training."""
        return self.model_copy(
            update={"trainings": tuple(one.model_copy(update={"branches": ()}) for one in self.trainings)}
        )

    @property
    def points(self) -> float | None:
        """AP less dense's in percent, where dense is no better than chance."""
        return None if self.ratio is not None or self.difference is None else 100 * self.difference

    @property
    def figure(self) -> str:
        """``AP 41.2``."""
        return f"AP {self.ap * 100:.1f}"

    @property
    def details(self) -> dict[str, str]:
        """Columns of the table of quality."""
        branches = [branch for one in self.trainings for branch in one.branches]
        losses = [one.loss for one in self.trainings if one.loss is not None]
        parts = {"AP50 %": self.ap50, "AP75 %": self.ap75, "small %": self.ap_small, "medium %": self.ap_medium,
                 "large %": self.ap_large}  # fmt: skip
        return {
            "AP %": f"{100 * self.ap:.1f}",
            "kept": quality_kept(self),
            **{name: "-" if value is None else f"{100 * value:.1f}" for name, value in parts.items()},
            "AP of each seed": ", ".join(f"{100 * one.ap:.1f}" for one in self.trainings),
            "training loss of each": ", ".join(f"{loss:.2f}" for loss in losses) or "-",
            "rms of attention over residual, lowest to highest": _range([b.ratio for b in branches], 2),
            "its kurtosis": _range([b.kurtosis for b in branches], 0),
            "images": f"{self.images:,}",
            "boxes": f"{self.boxes:,}",
        }

    @property
    def remark(self) -> str:
        """Why there are no ratios."""
        if self.points is None:
            return ""
        return f"Dense's AP is not above {CHANCE:.0%}, so it may have found nothing: differences in points, not ratios."


def _range(values: Sequence[float | None], digits: int) -> str:
    """``0.42 to 1.80``: the lowest and the highest that are known."""
    known = [value for value in values if value is not None]
    return " to ".join(dict.fromkeys(f"{end:,.{digits}f}" for end in (min(known), max(known)))) if known else "-"


class Record(Measured):
    """A row of detection."""

    quality: Detection | None
