"""The images that a model is repaired on."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from attnzoo.errors import ConfigError
from attnzoo.tasks.classify.config import AugmentConfig, DataConfig
from attnzoo.tasks.classify.loading import Batches, Draw, TrainImages, Unreadable, test_images, transforms
from attnzoo.tasks.classify.sources import open_splits


class Images:
    """Both splits of a config's data; the subjects that are trained on images build on it.

    Raises `ConfigError` if they cannot be read by index, or are too few for a batch.
    """

    def __init__(self, data: DataConfig, augment: AugmentConfig | None, batch: int, device: str) -> None:
        self.data, self.augment, self.batch, self.device = data, augment, batch, device
        self.splits = open_splits(data)
        if self.splits.streamed:
            raise ConfigError("a stream of images has no order to resume in; use a folder, an asset or an index")
        if self.splits.train_images < batch:
            raise ConfigError(f"batch: {batch} are more than the {self.splits.train_images} training images")
        self.test = test_images(data, augment, self.splits.test)

    def batches(self, first: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Training images ``(B, C, H, W)`` and their classes ``(B,)``, shuffled anew in each epoch."""
        source: Any = self.splits.train
        images = TrainImages(source, transforms(self.data, self.augment)[0], seed)
        unreadable = Unreadable(source, self.splits.train_images, "training image")
        epochs = first // (self.splits.train_images // self.batch) + 1
        while True:
            draws = Batches(self.splits.train_images, self.batch, epochs, seed, first=first)
            for x, y, lost in DataLoader(images, batch_sampler=draws, num_workers=self.data.workers):
                unreadable.note(lost.tolist())
                yield x.to(self.device), y.to(self.device)
            first, epochs = first + len(draws), epochs + 1

    def as_tested(self, count: int) -> Tensor:
        """So many training images ``(count, C, H, W)`` drawn at random, transformed as test images are."""
        source: Any = self.splits.train
        seen = TrainImages(source, transforms(self.data, self.augment)[1], 0)
        draw = random.Random(0).choices(range(self.splits.train_images), k=count)
        return torch.stack([seen[Draw(0, index)][0] for index in draw])
