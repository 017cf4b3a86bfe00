"""An image classifier, scored by its top-1 accuracy, and by that of its exported program in ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.repairing.options import Loss
from attnzoo.tasks.distill.config import VisionConfig
from attnzoo.tasks.distill.images import Images
from attnzoo.tasks.distill.quality import Metric
from attnzoo.tasks.distill.subject import Score
from attnzoo.tasks.export import Precision, Session, export, quantize

BATCH = 64  # of the exported program: the last batch of a test set is filled up
CALIBRATION_IMAGES = 4 * BATCH


class Exported(nn.Module):
    """An ONNX file for batches of `BATCH` images, called as the model that it was: ``(B, C, H, W)`` to ``(B, K)``."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session

    def forward(self, x: Tensor) -> Tensor:
        """Run it."""
        parts = [self.session(F.pad(part, (0,) * 7 + (BATCH - len(part),))) for part in x.cpu().split(BATCH)]
        return torch.cat(parts)[: len(x)].to(x.device)


class Classifier(Images):
    """A classifier of timm's or transformers'."""

    metric: Metric = "top-1"
    loss: Loss | None = None

    def __init__(self, config: VisionConfig, batch: int, device: str) -> None:
        from accelerate import Accelerator

        super().__init__(config.data, config.augment, batch, device)
        self.config = config
        self.accelerator: Any = Accelerator(cpu=device == "cpu")

    def teacher(self) -> nn.Module:
        """The trained classifier."""
        return self._build(0, trained=True)

    def fresh(self, seed: int) -> nn.Module:
        """The same with random weights."""
        return self._build(seed, trained=False)

    def _build(self, seed: int, trained: bool) -> nn.Module:
        from attnzoo.tasks.classify.model import build

        return build(self.config.run(seed, trained), self.splits.classes)[0].to(self.device).eval()

    def score(self, model: nn.Module, whole: bool = True) -> Score:
        """Top-1 accuracy on the test images."""
        from attnzoo.tasks.classify.evaluate import evaluate

        found = evaluate(model, self.test, self.batch, self.data.workers, self.accelerator).counted()
        return Score(float(found["top1"]) / max(int(found["images"]), 1))

    def quantized(self, model: nn.Module, precisions: Sequence[Precision], threads: int) -> dict[str, float]:
        """Top-1 accuracy in ONNX Runtime, calibrated on training images that are transformed as test images are.

        The model is left in evaluation mode.
        """
        if not precisions:
            return {}
        images = self.as_tested(CALIBRATION_IMAGES)  # (B, C, H, W)
        found: dict[str, float] = {}
        with tempfile.TemporaryDirectory() as folder:
            path = export(model.cpu().eval(), tuple(images.shape[1:]), Path(folder) / "exact.onnx", BATCH)
            model.to(self.device)
            for precision in precisions:
                target = path
                if precision != "float32":
                    target = quantize(path, Path(folder) / "int8.onnx", images.split(BATCH), precision == "int8")
                found[precision] = self.score(Exported(Session(target, threads))).score
        return found
