"""Images to train and test with: where they come from, in what order, and what becomes of unreadable ones."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler

from attnzoo import assets
from attnzoo.errors import ConfigError, DataError, TrainingError
from attnzoo.extras import require
from attnzoo.pixels import Mode, to_mode
from attnzoo.tasks.classify.config import FOLDERS, AugmentConfig, DataConfig
from attnzoo.tasks.classify.folders import ImageFolder
from attnzoo.tasks.classify.randomness import reseed, seed_of

UNREADABLE_SHARE = 0.01  # more than that of a data set, and more than one image, stops a run
MOST_TRIES = 100
MOST_TOLD = 20  # images in a message
LOOKED_AT = 100  # images of each split, before any work
MOST_LOOKED_AT = 10  # of them that may be unreadable where there are more images: 1% of all would be about one
NO_CLASS = -1
ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises for broken files
ORDER, AUGMENT, SUBSET = 1, 2, 3  # keys that keep the random numbers of different purposes apart
_ASSETS = {
    "fashion_mnist": ("torch/fashion_mnist", "train", "validation"),
    "cifar10": ("torch/cifar10", "train", "validation"),
}


class Draw(NamedTuple):
    """One image of one epoch; `copy` counts repeated augmentation."""

    epoch: int
    image: int
    copy: int = 0


class Source(Protocol):
    """Images by index."""

    classes: tuple[str, ...] | None

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Give an image and its class."""

    def name(self, index: int) -> str:
        """What to call an image in a message."""


@dataclass
class Splits:
    """What a config's data are: sources, or streams, which have an order of their own.

    `left_out` says, in lines that name the split, what is in its folder and is not read, or cannot be.
    """

    train: Source | IterableDataset[Any]
    test: Source | IterableDataset[Any]
    classes: int
    names: tuple[str, ...] | None
    train_images: int
    left_out: tuple[str, ...] = ()

    @property
    def streamed(self) -> bool:
        """Whether the training images come in an order that is not ours to choose."""
        return isinstance(self.train, IterableDataset)


def open_splits(data: DataConfig, processes: int = 1) -> Splits:
    """Open both splits of a config's data, and fetch them first where they are an asset.

    Parameters
    ----------
    data
        What to open.
    processes
        That will share the images.

    Raises
    ------
    ConfigError
        If there is no such folder or data set, the splits' classes differ, their number is not known or less than two,
        or images have pixels of an unknown range.
    AssetError
        If an asset cannot be fetched.
    """
    train, test = _open(data, data.train, training=True), _open(data, data.test, training=False)
    if isinstance(test, IterableDataset) and processes > 1:
        raise ConfigError(
            f"data.test: {processes} processes would not count a stream's images once each ({data.name}); test with a "
            "reader that has an index, or in one process"
        )
    known = (getattr(train, "classes", None), getattr(test, "classes", None))
    if all(known) and known[0] != known[1]:
        odd = sorted(set(known[0] or ()) ^ set(known[1] or ()))
        raise ConfigError(f"data: the classes of {data.train!r} and {data.test!r} differ: {', '.join(odd[:10])}")
    counts = {len(names) for names in known if names}
    if data.classes is not None:
        counts.add(data.classes)
    if len(counts) > 1:
        raise ConfigError(f"data.classes: {data.classes} asked for, but the data have {len(known[1] or ())}")
    if not counts:
        raise ConfigError("data.classes: must be given, for this reader does not tell how many there are")
    if max(counts) < 2:
        names = ", ".join(known[0] or known[1] or ())
        raise ConfigError(
            f"data: there is one class alone ({names}), and a classifier needs two or more. In folders, each folder in "
            f"{data.train!r} and {data.test!r} is a class"
        )
    left_out = [
        f"{split}: left out {source.left_out}"
        for split, source in ((data.train, train), (data.test, test))
        if isinstance(source, ImageFolder) and source.left_out.counts
    ]
    images = len(cast(Any, train))
    if data.train_images is not None:
        if isinstance(train, IterableDataset):
            raise ConfigError("data.train_images: a stream cannot be cut; leave it out")
        if data.train_images > images:
            raise ConfigError(f"data.train_images: {data.train_images} asked for, but there are {images}")
        chosen = np.random.default_rng(seed_of(SUBSET)).permutation(images)[: data.train_images]
        train, images = _Subset(train, np.sort(chosen)), data.train_images
    for split, source in ((data.train, train), (data.test, test)):
        if not isinstance(source, IterableDataset):
            left_out += _look(source, split)
    return Splits(train, test, counts.pop(), next(filter(None, known), None), images, tuple(left_out))


def _most_unreadable(images: int) -> int:
    """How many of so many images may be unreadable."""
    return max(1, int(UNREADABLE_SHARE * images))


def _look(source: Source, split: str) -> list[str]:
    """Read some images all over a source, all of them where they are few, and name those that cannot be read.

    The source is refused if too many are broken, or more than 1% have no class or pixels of an unknown range: that
    is the way of a data set, and seldom the fault of one file.
    """
    images = len(source)
    looked = sorted({at * images // LOOKED_AT for at in range(LOOKED_AT)}) if images else []
    refused: list[str] = []
    broken: list[str] = []
    for index in looked:
        try:
            source.read(index)
        except DataError as error:
            refused.append(f"{source.name(index)}: {error}")
        except ERRORS as error:
            broken.append(f"{source.name(index)}: {error or type(error).__name__}")
        except Exception as error:  # readers of many libraries
            raise ConfigError(
                f"data: {split!r}, image {index} cannot be read: {type(error).__name__}: {error}; see data.options"
            ) from error
    if len(refused) > UNREADABLE_SHARE * len(looked):
        raise ConfigError(f"data: of {len(looked)} images of {split!r}, {len(refused)} cannot be used. {refused[0]}")
    unreadable = refused + broken
    if len(unreadable) > min(_most_unreadable(images), MOST_LOOKED_AT) or len(unreadable) == len(looked) > 0:
        listed = "; ".join(unreadable[:MOST_TOLD])
        raise ConfigError(
            f"data: of {len(looked)} images of {split!r}, {len(unreadable)} cannot be read, more than "
            f"{UNREADABLE_SHARE:.0%}. Mend or remove them: {listed}{'; ...' if len(unreadable) > MOST_TOLD else ''}"
        )
    return [f"{split}: cannot be read and is left out: {told}" for told in unreadable]


def _open(data: DataConfig, split: str, training: bool) -> Source | IterableDataset[Any]:
    if data.asset == "digits":
        return _Digits(assets.get("digits", data.path), training)
    name, root = data.name, data.root
    if data.asset is not None:
        root = assets.get(data.asset, data.path)
        name, train, test = _ASSETS[data.asset]
        split = train if training else test
        if (root / "train").is_dir():  # an archive of folders, one per class
            name, split = "", "train" if training else "test"
    if name in FOLDERS and root is not None:
        if not root.is_dir():
            unpack = "; it is a file: unpack it" if root.exists() else ""
            raise ConfigError(f"data.root: there is no folder {str(root)!r}{unpack}")
        return _folder(_split_folder(root, split), training, data)
    return _from_timm(name, root, split, training, data)


def _folder(split: Path, training: bool, data: DataConfig) -> ImageFolder:
    require("timm", extra="train")
    from timm.data.readers.class_map import load_class_map

    options = _options(data, training)
    class_map, suffixes = options.pop("class_map", None), options.pop("input_key", None)
    if options:
        raise ConfigError(
            f"data.options: {', '.join(options)}: for a folder of images there are class_map and input_key alone"
        )
    try:
        numbers = load_class_map(class_map, str(split)) if class_map else None
    except Exception as error:  # timm asserts
        raise ConfigError(f"data.options.class_map: {class_map!r} cannot be read: {error}") from error
    chosen = None if suffixes is None else frozenset(str(suffixes).lower().split(";"))
    return ImageFolder(split, _mode(data), numbers, chosen)


def _mode(data: DataConfig) -> Mode:
    return "L" if data.channels == 1 else "RGB"


def _options(data: DataConfig, training: bool) -> dict[str, Any]:
    return dict(data.options if training or data.test_options is None else data.test_options)


def _split_folder(root: Path, split: str) -> Path:
    """A split's own folder; timm would take the whole of `root` for a split that is not there."""
    same = {"train": ("train",), "validation": ("validation", "val", "valid", "eval", "test")}.get(split, (split,))
    for name in same:
        if (root / name).is_dir():
            return root / name
    there = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    raise ConfigError(
        f"data: {str(root)!r} has no folder {' or '.join(map(repr, same))}; it has {there[:10] or 'none'}"
    )


def _from_timm(
    name: str, root: Path | None, split: str, training: bool, data: DataConfig
) -> Source | IterableDataset[Any]:
    require("timm", extra="train")
    from timm.data import create_dataset

    mode, reader = _mode(data), name.partition("/")[0].lower()
    options = _options(data, training)
    if (
        reader != "torch"
    ):  # TensorFlow's reader decodes to 8 bits; the others give what PIL reads, which is converted here
        options["input_img_mode"] = mode if reader == "tfds" else ""
    try:
        found: Any = create_dataset(
            name,
            root=None if root is None else str(root),
            split=split,
            is_training=training,
            search_split=False,
            **options,
        )
    except Exception as error:  # readers of many libraries
        where = f" in {str(root)!r}" if root is not None else ""
        raise ConfigError(
            f"data: {name or 'folder'!r}{where}, split {split!r}: {type(error).__name__}: {error}"
        ) from error
    if isinstance(found, IterableDataset):
        return Stream(found, mode)
    return _FromReader(found, mode) if hasattr(found, "reader") else _FromTorchvision(found, mode)


def _class_of(target: Any) -> int:
    """A label as a reader gives it; many data sets mark test images of unknown class by -1 or by nothing."""
    if target is None or int(target) < 0:
        raise DataError(f"it has no class (its label is {target})")
    return int(target)


class _FromReader:
    """A Hugging Face data set, through a reader of timm's."""

    def __init__(self, dataset: Any, mode: Mode) -> None:
        self.reader, self.mode = dataset.reader, mode
        by_index = getattr(self.reader, "class_to_idx", None)
        self.classes = tuple(map(str, sorted(by_index, key=by_index.__getitem__))) if by_index else None

    def __len__(self) -> int:
        return len(self.reader)

    def read(self, index: int) -> tuple[Image.Image, int]:
        handle, target, *_ = self.reader[index]
        with handle:
            return to_mode(Image.open(handle), self.mode), _class_of(target)

    def name(self, index: int) -> str:
        return str(self.reader.filename(index))


class _FromTorchvision:
    """A data set of torchvision's."""

    def __init__(self, dataset: Any, mode: Mode) -> None:
        self.dataset, self.mode = dataset, mode
        if hasattr(dataset, "loader"):
            dataset.loader = Image.open  # torchvision's own clips pixels of more than 8 bits
        # ImageNet has several names for a class
        names = [name if isinstance(name, str) else ", ".join(name) for name in getattr(dataset, "classes", None) or ()]
        self.classes = tuple(names) or None

    def __len__(self) -> int:
        return len(self.dataset)

    def read(self, index: int) -> tuple[Image.Image, int]:
        image, target = self.dataset[index]
        return to_mode(image, self.mode), _class_of(target)

    def name(self, index: int) -> str:
        return f"image {index}"


class Stream(IterableDataset[tuple[Image.Image | None, int, str]]):
    """A stream of timm's: image, class and "", or for an image that cannot be used None, -1 and the reason."""

    def __init__(self, dataset: Any, mode: Mode) -> None:
        self.dataset, self.mode = dataset, mode

    def __len__(self) -> int:
        return len(self.dataset)

    def __iter__(self) -> Iterator[tuple[Image.Image | None, int, str]]:
        for image, target in self.dataset:
            try:
                used = to_mode(image, self.mode), _class_of(target), ""
            except ERRORS as error:
                yield None, NO_CLASS, str(error) or type(error).__name__
            else:
                yield used

    def set_epoch(self, epoch: int) -> None:
        """As timm's streams have it: the epoch, by which they are shuffled."""
        self.dataset.set_epoch(epoch)

    def set_loader_cfg(self, num_workers: int) -> None:
        """As timm's streams have it: how many processes will read."""
        self.dataset.set_loader_cfg(num_workers=num_workers)


class _Digits:
    """scikit-learn's digits: 1,200 to train with and 597 to test, a fixed stratified split."""

    classes: tuple[str, ...] | None = tuple("0123456789")

    def __init__(self, folder: Path, training: bool) -> None:
        from attnzoo.tasks.classify.small import load_images

        images = load_images("digits", folder)
        x, y = (images.train_x, images.train_y) if training else (images.test_x, images.test_y)
        low, high = x.min(), x.max()
        self.pixels = ((x[:, 0] - low) / (high - low) * 255).round().byte().numpy()
        self.targets = y.tolist()

    def __len__(self) -> int:
        return len(self.targets)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self.pixels[index]), self.targets[index]

    def name(self, index: int) -> str:
        return f"image {index}"


class _Subset:
    """Some images of a source."""

    def __init__(self, source: Source, chosen: np.ndarray) -> None:
        self.source, self.chosen, self.classes = source, chosen, source.classes

    def __len__(self) -> int:
        return len(self.chosen)

    def read(self, index: int) -> tuple[Image.Image, int]:
        return self.source.read(int(self.chosen[index]))

    def name(self, index: int) -> str:
        return self.source.name(int(self.chosen[index]))


def test_options(data: DataConfig, augment: AugmentConfig | None) -> dict[str, Any]:
    """What a test image goes through, as timm's ``create_transform`` takes it."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    gray = data.channels == 1
    return {
        "input_size": (data.channels, data.image_size, data.image_size),
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
    train = create_transform(
        **shared,
        is_training=True,
        train_crop_mode=augment.crop,
        scale=augment.scale,
        ratio=augment.ratio,
        hflip=augment.hflip,
        vflip=augment.vflip,
        color_jitter=augment.color_jitter,
        auto_augment=augment.auto_augment,
        interpolation=augment.interpolation,
        re_prob=augment.re_prob,
        re_mode=augment.re_mode,
        re_count=augment.re_count,
    )
    return train, test


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


class Epoch(Sequence[Draw]):
    """The draws of an epoch: as many as there are images; with `repeats`, fewer images that many times each."""

    def __init__(self, images: int, epoch: int, seed: int, repeats: int = 1) -> None:
        self.images, self.epoch, self.repeats = images, epoch, repeats
        self.shuffled = np.random.default_rng(seed_of(seed, ORDER, epoch)).permutation(images)

    def __len__(self) -> int:
        return self.images

    @overload
    def __getitem__(self, at: int) -> Draw: ...

    @overload
    def __getitem__(self, at: slice) -> list[Draw]: ...

    def __getitem__(self, at: int | slice) -> Draw | list[Draw]:
        if isinstance(at, slice):
            return [self[place] for place in range(*at.indices(self.images))]
        if not 0 <= at < self.images:
            raise IndexError(at)
        return Draw(self.epoch, int(self.shuffled[at // self.repeats]), at % self.repeats)


class Batches(Sampler[list[Draw]]):
    """Each step's draws for one process, from step `first` to the end of training, across epochs.

    Every process takes every `world`-th draw of a batch, so that a batch is the same whatever the number of processes.
    """

    def __init__(
        self,
        images: int,
        batch: int,
        epochs: int,
        seed: int,
        repeats: int = 1,
        first: int = 0,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        self.images, self.batch, self.epochs, self.seed, self.repeats = images, batch, epochs, seed, repeats
        self.first, self.rank, self.world = first, rank, world

    @property
    def steps(self) -> int:
        """Steps an epoch; images that fill no whole batch are left out of it."""
        return self.images // self.batch

    def __len__(self) -> int:
        return self.steps * self.epochs - self.first

    def __iter__(self) -> Iterator[list[Draw]]:
        for epoch in range(self.first // self.steps, self.epochs):
            draws = Epoch(self.images, epoch, self.seed, self.repeats)
            for step in range(self.steps):
                if epoch * self.steps + step >= self.first:
                    yield draws[step * self.batch + self.rank : (step + 1) * self.batch : self.world]


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

        Raises
        ------
        TrainingError
            If they are too many.
        """
        indices = list(indices)
        self.reasons.update(zip(indices, reasons, strict=False))
        for index in sorted({index for index in indices if index >= 0} - self.found):
            self.found.add(index)
            warnings.warn(f"{self.kind} {self.name(index)} cannot be read: {self.reason(index)}", stacklevel=2)
        if len(self.found) > _most_unreadable(self.images):
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
