"""Image classification: small real data sets, timm models, one recipe and top-1 accuracy."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from attnzoo.errors import ConfigError, UnsupportedError
from attnzoo.extras import require

IMAGE_SIDE = {"digits": 8, "fashion_mnist": 28}
SPLIT_SEED = 0
NEARLY_EQUAL = 0.03  # parameters of two models
DIGITS_TEST_IMAGES = 597


@dataclass(frozen=True)
class Images:
    """A classification data set in memory.

    Attributes
    ----------
    train_x, test_x
        ``(N, channels, side, side)``, float32, standardized by the training images' mean and deviation, times `std`.
    train_y, test_y
        ``(N,)``, int64.
    classes
        Number of classes.
    """

    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: int

    @property
    def channels(self) -> int:
        """Channels of an image."""
        return self.train_x.shape[1]

    @property
    def side(self) -> int:
        """Height and width of an image, in pixels."""
        return self.train_x.shape[-1]


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained: AdamW, a cosine schedule with linear warm-up, label smoothing, clipped gradients."""

    epochs: int
    batch: int
    lr: float
    weight_decay: float
    warmup_epochs: int
    label_smoothing: float
    clip_grad_norm: float


@dataclass(frozen=True)
class Trained:
    """Mean training loss of each epoch, and the seconds that training took."""

    epoch_losses: tuple[float, ...]
    seconds: float


def load_images(dataset: str, folder: Path, *, train_images: int | None = None, std: float = 1.0) -> Images:
    """Read a data set that `attnzoo.assets.get` gave.

    Parameters
    ----------
    dataset
        ``digits`` (1,200 training and 597 test images of 8x8, a fixed stratified split) or ``fashion_mnist`` (60,000
        and 10,000 of 28x28, the authors' split).
    folder
        Where the asset is.
    train_images
        Keep that many training images, drawn with a fixed seed; all by default.
    std
        Deviation of the pixels of the training images that come back.

    Raises
    ------
    ConfigError
        If there is no such data set, it has fewer training images, or `std` is not above 0.
    """
    if not 0 < std < math.inf:
        raise ConfigError(f"std: the deviation of the pixels must be above 0 and finite, not {std}")
    readers = {"digits": _read_digits, "fashion_mnist": _read_fashion_mnist}
    if dataset not in readers:
        raise ConfigError(f"there is no data set {dataset!r}; known: {', '.join(readers)}")
    train_x, train_y, test_x, test_y = readers[dataset](folder)
    if train_images is not None:
        if train_images > len(train_x):
            raise ConfigError(f"{dataset} has {len(train_x)} training images, fewer than the {train_images} asked for")
        kept = torch.randperm(len(train_x), generator=torch.Generator().manual_seed(SPLIT_SEED))[:train_images]
        train_x, train_y = train_x[kept], train_y[kept]
    mean, unit = train_x.mean(), train_x.std() / std
    classes = int(torch.cat([train_y, test_y]).max()) + 1
    return Images((train_x - mean) / unit, train_y, (test_x - mean) / unit, test_y, classes)


def build_model(
    model: str,
    *,
    image_size: int,
    patch_size: int,
    channels: int,
    classes: int,
    options: Mapping[str, Any],
    seed: int,
) -> nn.Module:
    """Build a timm model, freshly initialized from `seed`.

    Raises
    ------
    MissingExtraError
        If timm is not installed.
    ConfigError
        If timm has no such model, or refuses an option.
    """
    check_model_name(model)
    import timm

    torch.manual_seed(seed)
    try:
        return timm.create_model(
            model,
            img_size=image_size,
            patch_size=patch_size,
            in_chans=channels,
            num_classes=classes,
            **options,
        )
    except (TypeError, AssertionError) as error:
        raise ConfigError(f"timm cannot build {model!r} with {dict(options)}: {error}") from error


def check_model_name(model: str) -> None:
    """Raise `ConfigError`, with the nearest names, unless timm has a model of this name."""
    require("timm")
    import difflib

    import timm

    if not timm.is_model(model):
        close = difflib.get_close_matches(model, timm.list_models(), n=3)
        raise ConfigError(f"timm has no model {model!r}" + (f"; did you mean {' or '.join(close)}?" if close else ""))


def equal_parameters(
    dense: Callable[[Mapping[str, Any]], nn.Module], swapped: Callable[[Mapping[str, Any]], nn.Module], label: str
) -> dict[str, Any]:
    """Find the width of the MLPs with which a swapped timm model has the parameters of the dense one, to 3%.

    Parameters
    ----------
    dense, swapped
        Build either model with further options.
    label
        What to call the swapped one in a message.

    Returns
    -------
    dict
        The option, ``mlp_ratio``: the width as a multiple of the model's.

    Raises
    ------
    UnsupportedError
        If the attention alone has too many parameters.
    """
    model: Any = dense({})
    wanted, width = sum(p.numel() for p in model.parameters()), model.embed_dim
    counts = [sum(p.numel() for p in swapped({"mlp_ratio": n / width}).parameters()) for n in (width, 2 * width)]
    hidden = round(width * (1 + (wanted - counts[0]) / (counts[1] - counts[0])))
    ratio = (hidden + 0.5) / width  # timm cuts the product to a whole number
    found = sum(p.numel() for p in swapped({"mlp_ratio": ratio}).parameters()) if hidden > 0 else 0
    if abs(found / wanted - 1) > NEARLY_EQUAL:
        raise UnsupportedError(
            f"no width of the MLPs gives {label} {wanted:,} parameters, those of the dense model: the attention "
            f"alone has too many (nearest: {found:,})"
        )
    return {"mlp_ratio": ratio}


def train(
    model: nn.Module,
    images: Images,
    recipe: Recipe,
    *,
    seed: int,
    device: torch.device | str = "cpu",
    on_epoch: Callable[[int, float], None] | None = None,
) -> Trained:
    """Train `model` in place on the training images.

    The order of the images depends on `seed` alone, so that every model of one seed sees the same batches.

    Parameters
    ----------
    model, images, recipe
        What, on what, how.
    seed
        Of the order of the images.
    device
        Where to train.
    on_epoch
        Called with the number of epochs done and the last one's mean loss.
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


def count_correct(model: nn.Module, images: Images, batch: int = 256, device: torch.device | str = "cpu") -> int:
    """Number of test images whose highest logit is their class's."""
    model.to(device).eval()
    correct = 0
    with torch.inference_mode():
        for x, y in zip(images.test_x.split(batch), images.test_y.split(batch), strict=True):
            correct += int((model(x.to(device)).argmax(-1) == y.to(device)).sum())
    return correct


def _read_digits(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require("sklearn")
    from sklearn.model_selection import train_test_split

    table = np.loadtxt(folder / "digits.csv.gz", delimiter=",", dtype=np.float32)
    x = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 8, 8) / 16
    y = torch.from_numpy(table[:, -1]).long()
    train, test = train_test_split(
        np.arange(len(y)), test_size=DIGITS_TEST_IMAGES, random_state=SPLIT_SEED, stratify=y.numpy()
    )
    return x[train], y[train], x[test], y[test]


def _read_fashion_mnist(folder: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    require("torchvision")
    from torchvision.datasets import FashionMNIST

    train, test = (FashionMNIST(str(folder), train=part, download=False) for part in (True, False))
    return train.data[:, None].float() / 255, train.targets, test.data[:, None].float() / 255, test.targets
