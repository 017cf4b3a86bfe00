"""The small trainer of a suite: little real data sets in memory, one recipe, top-1 accuracy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from attnzoo.bench.attentions import AttentionConfig
from attnzoo.bench.task import OnProgress, Result
from attnzoo.errors import ConfigError
from attnzoo.extras import require
from attnzoo.tasks.classify.build import build_host, count_parameters, equal_parameters, swapped
from attnzoo.tasks.classify.cost_config import QualityConfig, RecipeConfig
from attnzoo.tasks.classify.evaluate import Answers, answers_of
from attnzoo.tasks.classify.quality import Training, accuracy_of, listed
from attnzoo.tasks.classify.sources import SPLIT_SEED, read_digits

IMAGE_SIDE = {"digits": 8, "fashion_mnist": 28}


@dataclass(frozen=True)
class Images:
    """A classification data set in memory.

    `train_x` and `test_x` are ``(N, channels, side, side)``, float32, standardized by the training images' mean and
    deviation, times `std`; `train_y` and `test_y` ``(N,)``, int64.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int


class Trained(NamedTuple):
    """Mean training loss of each epoch, and the seconds that training took."""

    epoch_losses: tuple[float, ...]
    seconds: float


def load_images(dataset: str, folder: Path, *, train_images: int | None = None, std: float = 1.0) -> Images:
    """Read a data set that `attnzoo.assets.get` gave: ``digits``, or ``fashion_mnist`` as its authors split it.

    `train_images` of its training images are kept, drawn with a fixed seed, all by default; `std` is the deviation of
    their pixels. Raises `ConfigError` if the data set has fewer training images.
    """
    read = {"digits": _read_digits, "fashion_mnist": _read_fashion_mnist}[dataset]
    train_x, train_y, test_x, test_y = read(folder)
    if train_images is not None:
        if train_images > len(train_x):
            raise ConfigError(f"{dataset} has {len(train_x)} training images, fewer than the {train_images} asked for")
        kept = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(SPLIT_SEED))[:train_images]
        train_x, train_y = train_x[kept], train_y[kept]
    mean, unit = train_x.mean(), train_x.std() / std
    classes = int(torch.cat([train_y, test_y]).max()) + 1
    return Images((train_x - mean) / unit, train_y, (test_x - mean) / unit, test_y, classes)


def train(
    model: nn.Module,
    images: Images,
    recipe: RecipeConfig,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train `model` in place on the training images, and tell `on_epoch` the epochs done and the last one's mean loss.

    The order of the images depends on `seed` alone, so that every model of one seed sees the same batches.
    """
    require("timm")
    from timm.optim import create_optimizer_v2
    from timm.scheduler import CosineLRScheduler

    model.to(device).train()
    optimizer = create_optimizer_v2(model, opt="adamw", lr=recipe.lr, weight_decay=recipe.weight_decay)
    steps = math.ceil(len(images.train_x) / recipe.batch)
    schedule = CosineLRScheduler(
        optimizer,
        t_initial=recipe.epochs * steps,
        lr_min=recipe.lr * 1e-2,
        warmup_t=recipe.warmup_epochs * steps,
        warmup_lr_init=recipe.lr * 1e-2,
        warmup_prefix=False,
        t_in_epochs=False,
    )
    schedule.step_update(0)
    loss_of = nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)
    order = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    start = time.perf_counter()
    done = 0
    for epoch in range(recipe.epochs):
        total = 0.0
        for chosen in torch.randperm(len(images.train_x), generator=order).split(recipe.batch):
            x, y = images.train_x[chosen].to(device), images.train_y[chosen].to(device)
            loss = loss_of(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_grad_norm)
            optimizer.step()
            done += 1
            schedule.step_update(done)
            total += loss.item() * len(chosen)
        losses.append(total / len(images.train_x))
        if on_epoch is not None:
            on_epoch(epoch + 1, losses[-1])
    return Trained(tuple(losses), time.perf_counter() - start)


def answers(model: nn.Module, images: Images, batch: int = 256, device: torch.device | str = "cpu") -> Answers:
    """What the model answers on the test images."""
    parts = images.test_x.split(batch), images.test_y.split(batch), torch.arange(len(images.test_y)).split(batch)
    return answers_of(model.to(device), zip(*parts, strict=True), device)


def measure_quality(
    quality: QualityConfig, spec: AttentionConfig | None, fused: bool, data: Path, device: str, say: OnProgress
) -> Result:
    """Train once per seed with the attention `spec`, None being the model's own, and test on the held-out images."""
    images = load_images(quality.dataset, data, train_images=quality.train_images, std=quality.input_std)
    _, channels, side, _ = images.train_x.shape
    host = quality.model.model_copy(update={"channels": channels, "classes": images.classes})
    recipe = quality.recipe
    trainings, counted = [], []
    for seed in quality.seeds:

        def build(more: Mapping[str, Any], seed: int = seed) -> nn.Module:
            return build_host(host, side, seed, fused, more)

        def tell(epoch: int, loss: float, seed: int = seed) -> None:
            say(f"train seed {seed}: epoch {epoch}/{recipe.epochs}, loss {loss:.3f}")

        more = equal_parameters(build, spec, seed) if quality.equal_parameters and spec is not None else {}
        model = swapped(build(more), spec, seed)
        trained = train(model, images, recipe, seed=seed, device=device, on_epoch=tell)
        if not all(map(math.isfinite, trained.epoch_losses)):
            return Result(status="failed", message=f"seed {seed}: the training loss became {trained.epoch_losses[-1]}")
        counted.append(answers(model, images, device=device).counted())
        trainings.append(
            Training(
                seed=seed,
                correct=counted[-1]["top1"],
                images=counted[-1]["images"],
                final_loss=trained.epoch_losses[-1],
                seconds=trained.seconds,
                epoch_losses=trained.epoch_losses,
                parameters=count_parameters(model),
            )
        )
    tokens = (side // host.patch_size) ** 2
    seeds = f"{len(trainings)} seed{'s' if len(trainings) > 1 else ''}"
    note = (
        f"{host.name} ({listed(host.options)}) from scratch on {quality.dataset}, {tokens} tokens, {recipe.epochs} "
        f"epochs, {seeds}, {trainings[0].images:,} test images"
    )
    return Result(status="ok", quality=accuracy_of(trainings, counted, images.classes, note))


def _read_digits(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (train_x, train_y), (test_x, test_y) = (map(torch.from_numpy, part) for part in read_digits(folder))
    return train_x[:, None] / 16, train_y, test_x[:, None] / 16, test_y


def _read_fashion_mnist(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require("torchvision")
    from torchvision.datasets import FashionMNIST

    train, test = (FashionMNIST(str(folder), train=part, download=False) for part in (True, False))
    return train.data[:, None].float() / 255, train.targets, test.data[:, None].float() / 255, test.targets
