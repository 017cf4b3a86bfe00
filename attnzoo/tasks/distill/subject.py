"""What is repaired: a model with its data, and how it is scored."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from attnzoo.errors import ConfigError
from attnzoo.tasks.distill.config import DistillConfig, LanguageConfig, VisionConfig
from attnzoo.tasks.distill.quality import Metric
from attnzoo.tasks.export import Precision

if TYPE_CHECKING:
    from attnzoo.tasks.classify.loading import TestImages, TestStream
    from attnzoo.tasks.decode.needles import Sample


class Subject(Protocol):
    """A model and its data. Higher is better of every `score` but the NLL."""

    metric: Metric
    host: str

    def teacher(self) -> nn.Module:
        """Build it, with its trained weights."""

    def batches(self, first: int, seed: int) -> Iterator[tuple[Any, Any]]:
        """Give what the model takes, and the classes where there are any, from batch `first` on, without an end."""

    def score(self, model: nn.Module) -> float:
        """Test it."""

    def found(self, model: nn.Module) -> float | None:
        """Share of the needles that it finds; None where it is asked for none."""

    def quantized(self, model: nn.Module, precisions: Sequence[Precision], threads: int) -> dict[str, float]:
        """Test it in each precision."""


class Images:
    """An image classifier."""

    metric: Metric = "top-1"

    def __init__(self, config: VisionConfig, batch: int, device: str) -> None:
        from accelerate import Accelerator

        from attnzoo.tasks.classify.loading import test_images
        from attnzoo.tasks.classify.sources import open_splits

        self.config, self.batch, self.device = config, batch, device
        self.host = f"{config.model.library}:{config.model.name}"
        self.splits = open_splits(config.data)
        if self.splits.streamed:
            raise ConfigError("vision.data: a stream has no order to resume in; use a folder, an asset or an index")
        if self.splits.train_images < batch:
            raise ConfigError(f"batch: {batch} are more than the {self.splits.train_images} training images")
        self.accelerator: Any = Accelerator(cpu=device == "cpu")
        self.test: TestImages | TestStream = test_images(config.data, config.augment, self.splits.test)

    def teacher(self) -> nn.Module:
        """The trained classifier."""
        from attnzoo.tasks.classify.model import build

        return build(self.config.run(0), self.splits.classes)[0].to(self.device).eval()

    def fresh(self, seed: int) -> nn.Module:
        """The same with random weights."""
        from attnzoo.tasks.classify.model import build

        run = self.config.run(seed, trained=False)
        return build(run, self.splits.classes)[0].to(self.device).eval()

    def batches(self, first: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images ``(B, C, H, W)`` and their classes ``(B,)``, shuffled anew in each epoch."""
        from attnzoo.tasks.classify.loading import Batches, TrainImages, Unreadable, transforms

        source: Any = self.splits.train
        images = TrainImages(source, transforms(self.config.data, self.config.augment)[0], seed)
        unreadable = Unreadable(source, self.splits.train_images, "training image")
        epochs = first // (self.splits.train_images // self.batch) + 1
        while True:
            draws = Batches(self.splits.train_images, self.batch, epochs, seed, first=first)
            for x, y, lost in DataLoader(images, batch_sampler=draws, num_workers=self.config.data.workers):
                unreadable.note(lost.tolist())
                yield x.to(self.device), y.to(self.device)
            first, epochs = first + len(draws), epochs + 1

    def score(self, model: nn.Module) -> float:
        """Top-1 accuracy on the test images."""
        from attnzoo.tasks.classify.evaluate import evaluate

        found = evaluate(model, self.test, self.batch, self.config.data.workers, self.accelerator).counted()
        return float(found["top1"]) / max(int(found["images"]), 1)

    def found(self, model: nn.Module) -> None:
        """Nothing: images hide no needles."""

    def quantized(self, model: nn.Module, precisions: Sequence[Precision], threads: int) -> dict[str, float]:
        """Top-1 accuracy in ONNX Runtime, calibrated on training images that are transformed as test images are."""
        if not precisions:
            return {}
        from attnzoo.tasks.classify.loading import Draw, TrainImages, transforms
        from attnzoo.tasks.distill.quantized import CALIBRATION_IMAGES, quantized_scores

        source: Any = self.splits.train
        seen = TrainImages(source, transforms(self.config.data, self.config.augment)[1], 0)
        draw = random.Random(0).choices(range(self.splits.train_images), k=CALIBRATION_IMAGES)
        images = torch.stack([seen[Draw(0, index)][0] for index in draw])  # (B, C, H, W)
        return quantized_scores(model, images, precisions, threads, self.score)


class Text:
    """A causal language model."""

    metric: Metric = "NLL"

    def __init__(self, config: LanguageConfig, batch: int, device: str) -> None:
        from attnzoo.tasks.decode.lm import load_tokenizer
        from attnzoo.tasks.decode.needles import make_samples
        from attnzoo.tasks.decode.text import load_text

        self.config, self.batch, self.device = config, batch, device
        self.host = f"transformers:{config.model}"
        self.tokenizer, text = load_tokenizer(config.model), load_text(config.text)
        ids = self.tokenizer(text.text, add_special_tokens=False)["input_ids"]
        kept = config.windows * config.tokens
        if len(ids) < kept + 10 * config.tokens:
            raise ConfigError(
                f"language.text: {config.text} has {len(ids):,} tokens: too few to keep {config.windows} windows of "
                f"{config.tokens} for scoring"
            )
        self.ids = torch.tensor(ids[:-kept])
        self.windows = torch.tensor(ids[-kept:]).view(config.windows, config.tokens)
        self.prompts: list[Sample] = []
        if config.needles:
            held_out = replace(text, text=self.tokenizer.decode(ids[-kept:]))
            about: Any = {"kind": "evictable", "count": config.needles, "tokens": config.tokens, "seed": 0}
            self.prompts = make_samples(held_out, self.tokenizer, **about)

    def teacher(self) -> nn.Module:
        """The language model."""
        from attnzoo.tasks.decode.lm import load_model

        model: nn.Module = load_model(self.config.model, device=self.device)
        return model

    def batches(self, first: int, seed: int) -> Iterator[tuple[dict[str, Tensor], None]]:
        """Pieces of the text from random places, ``(B, N)``."""
        while True:
            draw = torch.Generator().manual_seed(1_000_003 * seed + first)
            places = torch.randint(len(self.ids) - self.config.tokens, (self.batch,), generator=draw)
            ids = self.ids[places[:, None] + torch.arange(self.config.tokens)]  # (B, N)
            yield {"input_ids": ids.to(self.device)}, None
            first += 1

    def score(self, model: nn.Module) -> float:
        """Mean NLL of the held-out windows, in nats per token, through the model's cache."""
        from attnzoo.tasks.decode.lm import nll

        with _evaluated(model):
            scores = [nll(model, window).nll for window in self.windows]
        return math.fsum(map(math.fsum, scores)) / sum(map(len, scores))

    def found(self, model: nn.Module) -> float | None:
        """Share of the numbers hidden in prompts that the model says when it is asked."""
        from attnzoo.tasks.decode.lm import retrieve

        with _evaluated(model):
            hits = [hit for prompt in self.prompts for hit in retrieve(model, self.tokenizer, prompt).hits]
        return sum(hits) / len(hits) if hits else None

    def quantized(self, model: nn.Module, precisions: Sequence[Precision], threads: int) -> dict[str, float]:
        """Nothing: language models are not exported."""
        return {}


@contextmanager
def _evaluated(model: nn.Module) -> Iterator[None]:
    """Within, the model is in evaluation mode."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def subject_of(config: DistillConfig) -> Subject:
    """What a config says is repaired.

    Raises `ConfigError` if data or model cannot be used.
    """
    if config.vision is not None:
        return Images(config.vision, config.batch, config.device)
    assert config.language is not None
    return Text(config.language, config.batch, config.device)
