"""What a classifier answers on test images, over any number of processes, each image once; and what to make of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.tasks.classify.build import logits
from attnzoo.tasks.classify.loading import TestImages, TestStream, Unreadable, check_classes, share_of
from attnzoo.tasks.classify.sources import NO_CLASS

BINS = 15  # of the calibration error


@dataclass(frozen=True)
class Answers:
    """A classifier's answers, image by image, in the order of the images; all arrays are ``(N,)``.

    `index`, `target` and `answer` are an image's place in the data set, its class, and the class given to it;
    `confidence` is the probability of the answer, `loss` the cross-entropy in nats, `among_five` whether the class is
    among the first five answers. `unreadable` are places of further images that could not be read and are not in these,
    `reasons` why, by their places, where it was told.
    """

    index: np.ndarray
    target: np.ndarray
    answer: np.ndarray
    confidence: np.ndarray
    loss: np.ndarray
    among_five: np.ndarray
    unreadable: np.ndarray
    reasons: Mapping[int, str] = field(default_factory=dict)

    def counted(self) -> dict[str, Any]:
        """Sum up: how many images, how many right at first and among five, mean loss, calibration error."""
        images = len(self.index)
        return {
            "images": images,
            "top1": int((self.answer == self.target).sum()),
            "top5": int(self.among_five.sum()),
            "loss": float(self.loss.mean()) if images else 0.0,
            "calibration_error": self.calibration_error(),
            "unreadable": len(self.unreadable),
        }

    def calibration_error(self) -> float:
        """Expected calibration error: of confidence and accuracy in 15 bins of equal width, weighted by their images.

        Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, equation 5.
        """
        if not len(self.index):
            return 0.0
        bins = np.clip(np.ceil(self.confidence * BINS).astype(int) - 1, 0, BINS - 1)
        gap = np.bincount(bins, weights=(self.answer == self.target) - self.confidence, minlength=BINS)
        return float(np.abs(gap).sum() / len(self.index))

    def most_confidently_wrong(self, count: int) -> np.ndarray:
        """Places in these arrays of the images with a wrong answer, the most confident first."""
        wrong = np.flatnonzero(self.answer != self.target)
        return wrong[np.argsort(-self.confidence[wrong], kind="stable")][:count]


def answers_of(
    model: nn.Module,
    batches: Iterable[tuple[Any, ...]],
    device: torch.device | str,
    gather: Callable[[Tensor], Tensor] = lambda found: found,
) -> Answers:
    """Ask `model` for the classes of images; its mode is as before afterwards.

    Its output is ``(B, classes)`` or has ``.logits``. Batches are images ``(B, C, H, W)``, classes ``(B,)`` and places
    ``(B,)``, as `TestImages` gives them, and perhaps the reasons why images cannot be used. `gather` puts the rows
    ``(B, 6)`` of all processes together.
    """
    training = model.training
    model.eval()
    rows, reasons = [], dict[int, str]()
    with torch.inference_mode():
        for x, y, index, *told in batches:
            scores = logits(model, x.to(device, non_blocking=True)).float()
            check_classes(y[y != NO_CLASS], scores.shape[1])
            reasons.update(zip(index.tolist(), *told, strict=True) if told else ())
            y, index = y.to(device), index.to(device)
            confidence, answer = scores.softmax(-1).max(-1)
            among = (scores.topk(min(5, scores.shape[1])).indices == y[:, None]).any(-1)
            loss = F.cross_entropy(scores, y.clamp(min=0), reduction="none")
            rows.append(gather(torch.stack([t.float() for t in (index, y, answer, confidence, loss, among)], 1)).cpu())
    model.train(training)
    table = torch.cat(rows).double().numpy() if rows else np.zeros((0, 6))
    table = table[table[:, 0] >= 0]  # without those that only fill a share up
    table = table[np.argsort(table[:, 0], kind="stable")]
    read, lost = table[table[:, 1] != NO_CLASS], table[table[:, 1] == NO_CLASS][:, 0].astype(np.int64)
    index, target, answer = (read[:, column].astype(np.int64) for column in range(3))
    return Answers(index, target, answer, read[:, 3], read[:, 4], read[:, 5] > 0, lost, reasons)


def evaluate(model: nn.Module, images: TestImages | TestStream, batch: int, workers: int, accelerator: Any) -> Answers:
    """Test `model`, as Accelerate prepared it, on `images`, of which each of its processes takes a share.

    Each process reads `batch` images at a time. Raises `TrainingError` if more than 1% of the images cannot be read, or
    one is of a class that the model does not have.
    """
    loader = share_of(images, batch, workers, accelerator.process_index, accelerator.num_processes)
    found = answers_of(model, loader, accelerator.device, accelerator.gather)
    lost = found.unreadable.tolist()
    Unreadable(getattr(images, "source", None), len(found.index) + len(lost), "test image").note(
        lost, [found.reasons.get(at, "") for at in lost] if found.reasons else []
    )
    return found
