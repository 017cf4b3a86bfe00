"""Top-1 accuracy of a repaired classifier in int8: exported, calibrated on training images, run by ONNX Runtime."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

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


def quantized_scores(
    model: nn.Module,
    images: Tensor,
    precisions: Sequence[Precision],
    threads: int,
    score: Callable[[nn.Module], float],
) -> dict[str, float]:
    """Give `score` of a model in each precision, run by ONNX Runtime.

    Parameters
    ----------
    model
        An image classifier; it is left in evaluation mode.
    images
        Training images ``(B, C, H, W)`` to calibrate on, a multiple of `BATCH`.
    precisions
        See `attnzoo.tasks.export.ExportConfig`.
    threads
        Of ONNX Runtime.
    score
        Tests a model, which is called with batches of images.
    """
    found: dict[str, float] = {}
    images = images.cpu()
    device = next(model.parameters()).device
    with tempfile.TemporaryDirectory() as folder:
        path = export(model.cpu().eval(), tuple(images.shape[1:]), Path(folder) / "exact.onnx", BATCH)
        model.to(device)
        for precision in precisions:
            target = path
            if precision != "float32":
                target = quantize(path, Path(folder) / "int8.onnx", images.split(BATCH), precision == "int8")
            found[precision] = score(Exported(Session(target, threads)))
    return found
