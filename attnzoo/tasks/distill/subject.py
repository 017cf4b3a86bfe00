"""What is repaired: a model with its data, and how it is scored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from torch import nn

from attnzoo.repairing.options import Loss
from attnzoo.tasks.distill.config import DistillConfig
from attnzoo.tasks.distill.quality import Metric


class Score(NamedTuple):
    """What a test says; see `attnzoo.tasks.distill.quality.Point`."""

    score: float
    found: float | None = None
    error: float | None = None


class Subject(Protocol):
    """A model and its data. A higher score is better with every metric but the NLL."""

    metric: Metric

    @property
    def loss(self) -> Loss | None:
        """What compares two models' outputs where these are no logits."""

    def teacher(self) -> nn.Module:
        """Build it, with its trained weights."""

    def batches(self, first: int, seed: int) -> Iterator[tuple[Any, Any]]:
        """Give what the model takes, and the classes where there are any, from batch `first` on, without an end."""

    def score(self, model: nn.Module, whole: bool = True) -> Score:
        """Test it; not `whole` leaves out what takes long besides the score itself."""


def subject_of(config: DistillConfig) -> Subject:
    """What a config says is repaired.

    Raises `ConfigError` if data or model cannot be used.
    """
    if config.vision is not None:
        from attnzoo.tasks.distill.classifier import Classifier

        return Classifier(config.vision, config.batch, config.device)
    if config.features is not None:
        from attnzoo.tasks.distill.encoder import Encoder

        return Encoder(config.features, config.batch, config.device)
    from attnzoo.tasks.distill.language import Language

    assert config.language is not None
    return Language(config.language, config.batch, config.device)
