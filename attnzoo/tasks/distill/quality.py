"""The quality of repaired models: what the teacher had, what the swap took, and what each stage gave back."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import ClassVar, Literal, Self

from pydantic import Field

from attnzoo.bench.record import Count, Entry, NonNegative, Quality, Share
from attnzoo.tasks.distill.config import SCRATCH

Metric = Literal["top-1", "k-NN top-1", "NLL"]


class Point(Entry):
    """One score: at the end of, or within, a stage; `samples` were seen by then, `seconds` spent on the repair.

    `found` is the share of the needles that were found, at the start and at the end of a stage; `error` the squared
    error of the test images' features relative to the teacher's, the mean over images.
    """

    stage: str
    samples: Count
    seconds: NonNegative
    score: float
    found: Share | None = None
    error: NonNegative | None = None


class Trial(Entry):
    """One seed: the layers that were swapped, and its scores, the first that of the swap untouched.

    `errors` are the mean errors of the swapped layers' outputs, relative to the originals', at the start and after
    each stage. `quantized` are scores of the repaired model in ONNX Runtime, by precision.
    """

    seed: Count
    layers: tuple[str, ...] = ()
    points: tuple[Point, ...]
    errors: tuple[NonNegative, ...] = ()
    quantized: Mapping[str, Share] = Field(default_factory=dict)

    @property
    def final(self) -> float:
        """The last score."""
        return self.points[-1].score

    def after(self, stage: str) -> Point | None:
        """The last score of a stage."""
        return next((point for point in reversed(self.points) if point.stage == stage), None)


class RepairedQuality(Quality):
    """Score of a repaired model, the mean of its trials, beside the teacher's on the same test images or text.

    `metric` is ``top-1`` or ``k-NN top-1``, a share of test images, or ``NLL``, in nats per token. A `control`
    was not repaired.
    """

    METRIC: ClassVar[str] = "score"

    metric: Metric
    trials: tuple[Trial, ...]
    teacher: float | None = None
    control: bool = False

    @property
    def is_control(self) -> bool:
        """Whether it was trained from scratch, or is no mixer."""
        return self.control or self.trials[0].points[-1].stage == SCRATCH  # older records do not say it otherwise

    @property
    def score(self) -> float:
        """The mean of the trials."""
        return statistics.fmean(trial.final for trial in self.trials)

    def against(self, dense: Self) -> Self:
        """The same with the teacher's score, and the ratio of accuracies or of perplexities."""
        ratio: float | None = math.exp(min(dense.score - self.score, 50.0))
        if self.metric != "NLL":
            ratio = self.score / dense.score if dense.score else None
        return self.model_copy(update={"ratio": ratio, "teacher": dense.score})

    def closed(self, trial: Trial, score: float) -> float | None:
        """Share of the gap between the swap untouched and the teacher that a score closes; None without a gap."""
        swapped = trial.points[0].score
        gap = None if self.teacher is None else self.teacher - swapped
        return None if not gap or len(trial.points) < 2 else (score - swapped) / gap

    @property
    def curves(self) -> list[dict[float, float]]:
        """Share of the gap closed, in percent, by samples seen, of each trial."""
        found = []
        for trial in self.trials:
            shares = {point.samples: self.closed(trial, point.score) for point in trial.points}
            found.append({float(seen): 100 * share for seen, share in shares.items() if share is not None})
        return found

    def said(self, scores: list[float]) -> str:
        """Scores of all trials as tables show them: the mean, and the standard deviation of several."""
        if self.metric != "NLL":
            scores = [100 * score for score in scores]
        digits = 3 if self.metric == "NLL" else 1
        spread = f" ± {statistics.stdev(scores):.{digits}f}" if len(scores) > 1 else ""
        return f"{statistics.fmean(scores):.{digits}f}{spread}"

    @property
    def figure(self) -> str:
        """The score at the end."""
        return self.said([trial.final for trial in self.trials])

    @property
    def details(self) -> dict[str, str]:
        """Columns of the table of quality."""
        first = self.trials[0]
        stages = list(dict.fromkeys(point.stage for point in first.points))
        title = "NLL, nats per token" if self.metric == "NLL" else f"{self.metric} %"
        found = {title: self.figure}
        for stage in stages if len(first.points) > 1 else ():
            if stage == SCRATCH:  # whose end is the score
                continue
            points = [point for trial in self.trials if (point := trial.after(stage)) is not None]
            found[stage] = self.said([point.score for point in points])
        for precision in first.quantized:
            found[f"{precision}, first seed"] = self.said([first.quantized[precision]])
        shares = [share for trial in self.trials if (share := self.closed(trial, trial.final)) is not None]
        for when, at in ((" at the start", 0), ("", -1)) if len(first.points) > 1 else (("", -1),):
            ends = [trial.points[at] for trial in self.trials]
            if asked := [end.found for end in ends if end.found is not None]:
                found[f"needles found{when}"] = f"{statistics.fmean(asked):.0%}"
            if errors := [end.error for end in ends if end.error is not None]:
                found[f"error of the features{when}"] = f"{statistics.fmean(errors):.3f}"
        found["gap closed"] = f"{statistics.fmean(shares):.0%}" if shares else ""
        found["samples seen"] = f"{first.points[-1].samples:,}" if len(first.points) > 1 else ""
        seconds = [trial.points[-1].seconds for trial in self.trials]
        found["repair, s"] = f"{statistics.fmean(seconds):.0f}" if any(seconds) else ""
        found["seeds"] = str(len(self.trials)) if len(first.points) > 1 else ""
        return found
