"""How images are trained and tested with: transformed, in what order, shared by processes; and unreadable ones."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from attnzoo.errors import TrainingError
from attnzoo.tasks.classify.config import AugmentConfig, DataConfig
from attnzoo.tasks.classify.randomness import AUGMENT, ORDER, reseed, seed_of
from attnzoo.tasks.classify.sources import ERRORS, MOST_TOLD, NO_CLASS, UNREADABLE_SHARE, Source, most_unreadable

MOST_TRIES = 100  # images that cannot be used, one after the other


class Draw(NamedTuple):
    """One image of one epoch; `copy` counts repeated augmentation."""

    epoch: int
    image: int
    copy: int = 0


def test_options(data: DataConfig, augment: AugmentConfig | None) -> dict[str, Any]:
    """What a test image goes through, as timm's ``create_transform`` takes it."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    gray = data.channels == 1
    return {
        "input_size": data.shape,
        "mean": data.mean or ((sum(IMAGENET_DEFAULT_MEAN) / 3,) if gray else IMAGENET_DEFAULT_MEAN),
        "std": data.std or ((sum(IMAGENET_DEFAULT_STD) / 3,) if gray else IMAGENET_DEFAULT_STD),
        "interpolation": "bicubic" if augment is None or augment.interpolation == "random" else augment.interpolation,
        "crop_pct": data.crop_pct,
    }


def transforms(data: DataConfig, augment: AugmentConfig | None) -> tuple[Any, Any]:
    """Give timm's transforms for training and for testing."""
    from timm.data import create_transform

    options = test_options(data, augment)
    test = create_transform(**options)
    shared = {key: options[key] for key in ("input_size", "mean", "std")}
    if augment is None:
        plain = {"no_aug": True, "interpolation": options["interpolation"]}
        return create_transform(**shared, is_training=True, **plain), test
    mixing = {"mixup", "cutmix", "mixup_prob", "mixup_switch_prob", "mixup_mode"}
    as_timm = augment.model_dump(exclude={"crop", "repeats", *mixing})
    return create_transform(**shared, is_training=True, train_crop_mode=augment.crop, **as_timm), test


def check_classes(targets: Tensor, classes: int) -> None:
    """Raise `TrainingError` where a class ``(B,)`` is none of those that there are."""
    wrong = targets[(targets < 0) | (targets >= classes)]
    if wrong.numel():
        raise TrainingError(
            f"an image has class {int(wrong[0])}, but there are {classes} classes, 0 to {classes - 1}: mend "
            "data.classes, or the labels"
        )


class TrainImages(Dataset[tuple[Tensor, int, int]]):
    """Augmented images: ``images[draw]`` is image, class, and the index of an image that could not be read, or -1.

    The next image that can be read stands in for such a one, so that batches keep their size.
    """

    def __init__(self, source: Source, transform: Any, seed: int) -> None:
        self.source, self.transform, self.seed = source, transform, seed

    def __getitem__(self, draw: Draw) -> tuple[Tensor, int, int]:
        reseed(self.seed, AUGMENT, *draw)
        unreadable = -1
        reason = ""
        for ahead in range(min(MOST_TRIES, len(self.source))):
            index = (draw.image + ahead) % len(self.source)
            try:
                image, target = self.source.read(index)
            except ERRORS as error:
                reason = reason or str(error)
                unreadable = draw.image if unreadable < 0 else unreadable
                continue
            return self.transform(image), target, unreadable
        raise TrainingError(f"{self.source.name(draw.image)} and those after it cannot be read: {reason}")


class TestImages(Dataset[tuple[Tensor, int, int]]):
    """Images as they are tested: image, class, index. Class -1, of index -1 and what cannot be read, does not count."""

    __test__ = False  # no test of pytest's

    def __init__(self, source: Source, transform: Any, shape: tuple[int, int, int]) -> None:
        self.source, self.transform, self.shape = source, transform, shape

    def __getitem__(self, index: int) -> tuple[Tensor, int, int]:
        read = None
        if index >= 0:
            with contextlib.suppress(*ERRORS):
                read = self.source.read(index)
        if read is not None:
            return self.transform(read[0]), read[1], index
        return torch.zeros(self.shape), NO_CLASS, index


class TestStream(IterableDataset[tuple[Tensor, int, int, str]]):
    """Images of a stream as they are tested, in its order: image, class, number, and why it cannot be used.

    Class -1, of what cannot be used, does not count.
    """

    __test__ = False

    def __init__(self, stream: Any, transform: Any, shape: tuple[int, int, int]) -> None:
        self.stream, self.transform, self.shape = stream, transform, shape

    def __iter__(self) -> Iterator[tuple[Tensor, int, int, str]]:
        for number, (image, target, reason) in enumerate(self.stream):
            yield torch.zeros(self.shape) if image is None else self.transform(image), target, number, reason


def test_images(data: DataConfig, augment: AugmentConfig | None, source: Any) -> TestImages | TestStream:
    """Images of a source, or of a stream, as they are tested."""
    kind = TestStream if isinstance(source, IterableDataset) else TestImages
    return kind(source, transforms(data, augment)[1], data.shape)


class StreamImages(IterableDataset[tuple[Tensor, int, int, str]]):
    """A `Stream`, augmented by keys that count its images: image, class, and number and reason of what it stands for.

    The number is -1, but where the image stands in for one that cannot be used, so that batches keep their size: the
    next that can be used does, at the stream's end the last.
    """

    def __init__(self, stream: Any, transform: Any, seed: int, rank: int, world: int = 1) -> None:
        self.stream, self.transform, self.seed, self.rank, self.world = stream, transform, seed, rank, world
        self.epoch = 0

    def __iter__(self) -> Iterator[tuple[Tensor, int, int, str]]:
        worker = torch.utils.data.get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        bad: list[tuple[int, str]] = []
        last: tuple[Image.Image, int] | None = None

        def augmented(image: Image.Image, target: int, count: int, reason: str) -> tuple[Tensor, int, int, str]:
            reseed(self.seed, AUGMENT, self.epoch, self.rank, number, count)
            place = (count * workers + number) * self.world + self.rank
            return self.transform(image), target, place if reason else -1, reason

        for count, (image, target, reason) in enumerate(self.stream):
            if image is None:
                bad.append((count, reason))
                if len(bad) == MOST_TRIES:
                    break
                continue
            last = image, target
            for place, why in (*bad, (count, "")):
                yield augmented(image, target, place, why)
            bad = []
        if bad and (last is None or len(bad) == MOST_TRIES):
            raise TrainingError(f"{len(bad)} images of the stream, one after the other, cannot be used: {bad[0][1]}")
        for place, why in bad:
            assert last is not None
            yield augmented(*last, place, why)


@dataclass(eq=False)
class Batches(Sampler[list[Draw]]):
    """Each step's draws for one process, from step `first` to the end of training, across epochs.

    An epoch draws as often as there are images; with `repeats`, fewer images that many times each. Every process takes
    every `world`-th draw of a batch, so that a batch is the same whatever the number of processes.
    """

    images: int
    batch: int
    epochs: int
    seed: int
    repeats: int = 1
    first: int = 0
    rank: int = 0
    world: int = 1

    @property
    def steps(self) -> int:
        """Steps an epoch; images that fill no whole batch are left out of it."""
        return self.images // self.batch

    def __len__(self) -> int:
        return self.steps * self.epochs - self.first

    def __iter__(self) -> Iterator[list[Draw]]:
        for epoch in range(self.first // self.steps, self.epochs):
            order = np.random.default_rng(seed_of(self.seed, ORDER, epoch)).permutation(self.images)
            for step in range(max(0, self.first - epoch * self.steps), self.steps):
                places = range(step * self.batch + self.rank, (step + 1) * self.batch, self.world)
                yield [Draw(epoch, int(order[at // self.repeats]), at % self.repeats) for at in places]


def share_of(
    images: TestImages | TestStream, batch: int, workers: int, rank: int = 0, world: int = 1
) -> DataLoader[Any]:
    """One process's share of the test images; shares are filled up with images that do not count, to equal length.

    A stream has one share, and one reader: many would not agree on who reads what.
    """
    if isinstance(images, TestStream):
        return DataLoader(images, batch_size=batch)
    count = len(images.source)
    share = list(range(rank, count, world))
    share += [-1] * (-(-count // world) - len(share))
    return DataLoader(images, batch_size=batch, sampler=cast(Any, share), num_workers=workers)


class Unreadable:
    """Images that could not be read: counted once each and listed; more than one, and more than 1% of all, end a run.

    Without `source` they are those of a stream, which tells the reasons itself.
    """

    def __init__(self, source: Source | None, images: int, kind: str = "image") -> None:
        self.source, self.images, self.kind, self.found = source, images, kind, set[int]()
        self.reasons: dict[int, str] = {}

    def note(self, indices: Iterable[int], reasons: Sequence[str] = ()) -> None:
        """Take note of some, and of the reasons where they are told; -1 stands for none.

        Raises `TrainingError` if they are too many.
        """
        indices = list(indices)
        self.reasons.update(zip(indices, reasons, strict=False))
        for index in sorted({index for index in indices if index >= 0} - self.found):
            self.found.add(index)
            warnings.warn(f"{self.kind} {self.name(index)} cannot be read: {self.reason(index)}", stacklevel=2)
        if len(self.found) > most_unreadable(self.images):
            found = sorted(self.found)
            raise TrainingError(
                f"{len(self.found)} of {self.images} {self.kind}s cannot be read, more than {UNREADABLE_SHARE:.0%}: "
                f"{', '.join(map(self.name, found[:MOST_TOLD]))}. Mend or remove them. The first: "
                f"{self.reason(found[0])}"
            )

    def reason(self, index: int) -> str:
        """Why one cannot be read: what was told, or found by reading it again."""
        if index in self.reasons:
            return self.reasons[index]
        try:
            if self.source is not None:
                self.source.read(index)
        except ERRORS as error:
            return str(error) or type(error).__name__
        return "no reason is known"

    def name(self, index: int) -> str:
        """What to call one."""
        return self.source.name(index) if self.source is not None else str(index)

    def names(self) -> list[str]:
        """All that were found."""
        return sorted(self.name(index) for index in self.found)
