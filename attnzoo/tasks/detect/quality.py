"""The quality of detectors: COCO's metric on held-out images."""

from __future__ import annotations

from typing import ClassVar, Self

from attnzoo.bench.record import Count, Entry, Quality, Share
from attnzoo.bench.words import quality_kept


class Detecting(Entry):
    """One detector's training: seed, COCO's metric on the test images, and AP and AP50 at the epochs it was tested."""

    seed: Count
    ap: Share
    ap50: Share
    ap75: Share
    ap_small: Share | None
    ap_medium: Share | None
    ap_large: Share | None
    epochs: tuple[Count, ...] = ()
    epoch_ap: tuple[Share, ...] = ()
    epoch_ap50: tuple[Share, ...] = ()


class Detection(Quality):
    """COCO's metric on held-out images, the mean of all seeds.

    `ratio` is AP over the dense baseline's, null where that is 0 or there is none; it has no interval.
    """

    METRIC: ClassVar[str] = "AP %"

    ap: Share
    ap50: Share
    ap75: Share
    ap_small: Share | None
    ap_medium: Share | None
    ap_large: Share | None
    images: Count
    boxes: Count
    trainings: tuple[Detecting, ...]

    def against(self, dense: Self) -> Self:
        """The same with its ratio to the dense baseline's AP."""
        return self.model_copy(update={"ratio": self.ap / dense.ap if dense.ap else None})

    @property
    def figure(self) -> str:
        """``AP 41.2``."""
        return f"AP {self.ap * 100:.1f}"

    @property
    def details(self) -> dict[str, str]:
        """Columns of the table of quality."""
        parts = {"AP50 %": self.ap50, "AP75 %": self.ap75, "small %": self.ap_small, "medium %": self.ap_medium,
                 "large %": self.ap_large}  # fmt: skip
        return {
            "AP %": f"{100 * self.ap:.1f}",
            "kept": quality_kept(self),
            **{name: "-" if value is None else f"{100 * value:.1f}" for name, value in parts.items()},
            "AP of each seed": ", ".join(f"{100 * one.ap:.1f}" for one in self.trainings),
            "images": f"{self.images:,}",
            "boxes": f"{self.boxes:,}",
        }
