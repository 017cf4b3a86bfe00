"""Counting right answers on test images, over any number of processes, each image once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from attnzoo.training.images import NO_CLASS, TestImages, TestStream, share_of
from attnzoo.training.model import logits


@dataclass(frozen=True)
class Counted:
    """What a model got right: of `images` images, how many had their class first, and among the first five.

    `loss` is the mean cross-entropy in nats; `unreadable` images were not counted.
    """

    images: int
    top1: int
    top5: int
    loss: float
    unreadable: int


def evaluate(model: nn.Module, images: TestImages | TestStream, batch: int, workers: int, accelerator: Any) -> Counted:
    """Test `model` on `images`; its mode is as before afterwards.

    Parameters
    ----------
    model
        As Accelerate prepared it; its output is ``(B, classes)`` or has ``.logits``.
    images
        Of all processes: each takes its share.
    batch, workers
        Images at a time in one process, and its processes that read them.
    accelerator
        Accelerate's, for the device and the sum over processes.
    """
    loader = share_of(images, batch, workers, accelerator.process_index, accelerator.num_processes)
    training = model.training
    model.eval()
    total = torch.zeros(5, dtype=torch.float64)
    with torch.inference_mode():
        for x, y, index in loader:
            scores = logits(model, x.to(accelerator.device, non_blocking=True)).float()
            y = y.to(scores.device)
            real = y != NO_CLASS
            ranked = scores[real].topk(min(5, scores.shape[1])).indices
            right = ranked == y[real, None]
            loss = F.cross_entropy(scores[real], y[real], reduction="sum") if real.any() else scores.new_zeros(())
            lost = int((~real).sum()) - int((index < 0).sum())
            found = [int(real.sum()), int(right[:, :1].sum()), int(right.sum()), float(loss), lost]
            total += torch.tensor(found, dtype=torch.float64)
    model.train(training)
    total = accelerator.reduce(total.float() if accelerator.device.type == "mps" else total.to(accelerator.device))
    count, top1, top5, loss, lost = total.tolist()
    return Counted(int(count), int(top1), int(top5), loss / max(count, 1), int(lost))
