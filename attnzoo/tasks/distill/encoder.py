"""An image encoder without a classifier, scored by the nearest neighbors of its features.

The classifier by neighbors is DINO's (https://arxiv.org/abs/2104.14294, appendix F): each of the k training images
whose features have the largest cosine to a test image's votes for its class with weight exp(cosine / 0.07). Features of
training images are the same model's.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from attnzoo.assets import model_folder
from attnzoo.errors import ConfigError, TrainingError
from attnzoo.extras import require
from attnzoo.repairing.losses import normalized_error
from attnzoo.tasks.classify.loading import TestImages, Unreadable, transforms
from attnzoo.tasks.classify.sources import NO_CLASS, Source
from attnzoo.tasks.distill.config import FeaturesConfig
from attnzoo.tasks.distill.images import Images
from attnzoo.tasks.distill.quality import Metric
from attnzoo.tasks.distill.subject import Score

TEMPERATURE = 0.07


class Encoder(Images):
    """An image encoder of transformers'."""

    metric: Metric = "k-NN top-1"

    def __init__(self, config: FeaturesConfig, batch: int, device: str) -> None:
        super().__init__(config.data, config.augment, batch, device)
        self.config = config
        splits: Any = self.splits
        for key, wanted, source in (("bank", config.bank, splits.train), ("queries", config.queries, splits.test)):
            if wanted > len(source):
                raise ConfigError(f"features.{key}: {wanted} images asked for, but there are {len(source)}")

    def teacher(self) -> nn.Module:
        """The encoder."""
        require("transformers", extra="llm")
        from transformers import AutoModel

        name = self.config.model
        try:
            model = AutoModel.from_pretrained(str(model_folder(name) or name), dtype=torch.float32)
            model = model.to(self.device).eval()
            with torch.inference_mode():
                given = model(torch.zeros(1, *self.config.data.shape, device=self.device)).last_hidden_state
        except Exception as error:  # of the hub, or of a model that takes no images
            raise ConfigError(
                f"features.model: {name!r} is no image encoder that transformers loads: {type(error).__name__}: {error}"
            ) from error
        size, patch = self.config.data.image_size, getattr(model.config, "patch_size", None)
        if given.ndim != 3 or not isinstance(patch, int) or size % patch:
            raise ConfigError(
                f"features.model: {name!r} gives {tuple(given.shape)} of an image of {size} pixels; an encoder with "
                f"tokens is needed, whose square patches ({patch} pixels) divide features.data.image_size"
            )
        if self.config.pool == "class" and given.shape[1] <= (size // patch) ** 2:
            raise ConfigError(f"features.pool: {name!r} has no class token, its tokens are all patches; say pool: mean")
        return model

    def loss(self, mine: Any, theirs: Any) -> Tensor:
        """Squared error of the tokens' features relative to the original's."""
        return normalized_error(mine.last_hidden_state, theirs.last_hidden_state)

    def score(self, model: nn.Module, whole: bool = True) -> Score:
        """Share of the test images whose nearest neighbors are of their class, and the error of their features."""
        splits: Any = self.splits
        known, classes = self._features(model, splits.train, self.config.bank)
        asked, wanted = self._features(model, splits.test, self.config.queries)
        if not (known.isfinite().all() and asked.isfinite().all()):
            raise TrainingError("the model's features are not finite; try a lower rate, or other options of the mixer")
        answers = neighbors(known, classes, asked, min(self.config.neighbors, len(known)))  # some may be unreadable
        error = float(normalized_error(asked[:, None], self._originals[:, None]))
        return Score(float((answers == wanted).float().mean()), error=error)

    @cached_property
    def _originals(self) -> Tensor:
        """The teacher's features of the test images."""
        test: Any = self.splits.test
        return self._features(self.teacher(), test, self.config.queries)[0]

    def _features(self, model: nn.Module, source: Source, count: int) -> tuple[Tensor, Tensor]:
        """Features ``(count, C)`` of images drawn at random, the same each time, and their classes ``(count,)``."""
        images = TestImages(source, transforms(self.data, self.augment)[1], self.data.shape)
        drawn: Any = np.random.default_rng(0).permutation(len(source))[:count].tolist()
        features, classes = [], []
        unreadable = Unreadable(source, count)
        training = model.training
        model.eval()
        with torch.inference_mode():
            for x, y, index in DataLoader(images, batch_size=self.batch, sampler=drawn, num_workers=self.data.workers):
                unreadable.note(index[y == NO_CLASS].tolist())
                tokens = model(x.to(self.device)).last_hidden_state  # (B, N, C)
                features.append((tokens[:, 0] if self.config.pool == "class" else tokens.mean(1)).float().cpu())
                classes.append(y)
        model.train(training)
        read = (targets := torch.cat(classes)) != NO_CLASS
        return torch.cat(features)[read], targets[read]


def neighbors(known: Tensor, classes: Tensor, asked: Tensor, count: int) -> Tensor:
    """Give the class ``(Q,)`` for which the `count` nearest of the known features vote.

    `known` and `asked` are features ``(M, C)`` and ``(Q, C)``, `classes` ``(M,)`` those of the known ones.
    """
    cosines = nn.functional.normalize(asked, dim=-1) @ nn.functional.normalize(known, dim=-1).T  # (Q, M)
    nearest = cosines.topk(count)
    votes = torch.zeros(len(asked), int(classes.max()) + 1)
    votes.scatter_add_(1, classes[nearest.indices], (nearest.values / TEMPERATURE).exp())
    return votes.argmax(-1)
