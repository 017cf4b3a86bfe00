"""An image classifier, scored by its top-1 accuracy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from attnzoo.repairing.options import Loss
from attnzoo.tasks.distill.config import VisionConfig
from attnzoo.tasks.distill.images import Images
from attnzoo.tasks.distill.quality import Metric
from attnzoo.tasks.distill.subject import Score
from attnzoo.tasks.export import Precision


class Classifier:
    """A classifier of timm's or transformers'."""

    metric: Metric = "top-1"
    loss: Loss | None = None

    def __init__(self, config: VisionConfig, batch: int, device: str) -> None:
        from accelerate import Accelerator

        self.config, self.batch, self.device = config, batch, device
        self.images = Images(config.data, config.augment, batch, device)
        self.accelerator: Any = Accelerator(cpu=device == "cpu")

    def teacher(self) -> nn.Module:
        """The trained classifier."""
        return self._build(0, trained=True)

    def fresh(self, seed: int) -> nn.Module:
        """The same with random weights."""
        return self._build(seed, trained=False)

    def _build(self, seed: int, trained: bool) -> nn.Module:
        from attnzoo.tasks.classify.model import build

        return build(self.config.run(seed, trained), self.images.splits.classes)[0].to(self.device).eval()

    def batches(self, first: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images ``(B, C, H, W)`` and their classes ``(B,)``."""
        return self.images.batches(first, seed)

    def score(self, model: nn.Module, whole: bool = True) -> Score:
        """Top-1 accuracy on the test images."""
        from attnzoo.tasks.classify.evaluate import evaluate

        workers = self.config.data.workers
        found = evaluate(model, self.images.test, self.batch, workers, self.accelerator).counted()
        return Score(float(found["top1"]) / max(int(found["images"]), 1))

    def quantized(self, model: nn.Module, precisions: Sequence[Precision], threads: int) -> dict[str, float]:
        """Top-1 accuracy in ONNX Runtime, calibrated on training images that are transformed as test images are."""
        if not precisions:
            return {}
        from attnzoo.tasks.distill.quantized import CALIBRATION_IMAGES, quantized_scores

        images = self.images.as_tested(CALIBRATION_IMAGES)  # (B, C, H, W)
        return quantized_scores(model, images, precisions, threads, lambda found: self.score(found).score)
