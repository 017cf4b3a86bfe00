"""Where images come from: folders, assets, and the data sets that timm reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
from PIL import Image
from torch.utils.data import IterableDataset

from attnzoo import assets
from attnzoo.errors import ConfigError, DataError
from attnzoo.extras import require
from attnzoo.pixels import Mode, to_mode
from attnzoo.tasks.classify import interactions
from attnzoo.tasks.classify.config import FOLDERS, INTERACTIONS, DataConfig
from attnzoo.tasks.classify.folders import ImageFolder
from attnzoo.tasks.classify.randomness import SUBSET, seed_of

UNREADABLE_SHARE = 0.01  # more than that of a data set, and more than one image, stops a run
MOST_TOLD = 20  # images in a message
LOOKED_AT = 100  # images of each split, before any work
MOST_LOOKED_AT = 10  # of them that may be unreadable where there are more images: 1% of all would be about one
NO_CLASS = -1
SPLIT_SEED, DIGITS_TEST_IMAGES = 0, 597
ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what PIL raises for broken files


Names = tuple[str, ...] | None  # of classes
T = TypeVar("T")


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

    Raises `ConfigError` if there is no such folder or data set, the splits' classes differ, their number is not known
    or less than two, or images have pixels of an unknown range; `AssetError` if an asset cannot be fetched.

    `processes` will share the images.
    """
    train, test = open_split(data, training=True), open_split(data, training=False)
    if isinstance(test, IterableDataset) and processes > 1:
        raise ConfigError(
            f"data.test: {processes} processes would not count a stream's images once each ({data.name}); test with a "
            "reader that has an index, or in one process"
        )
    names, classes = _classes(data, getattr(train, "classes", None), getattr(test, "classes", None))
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
        train, images = _subset(train, np.sort(chosen), _mode(data)), data.train_images
    for split, source in ((data.train, train), (data.test, test)):
        if not isinstance(source, IterableDataset):
            left_out += _look(source, split)
    return Splits(train, test, classes, names, images, tuple(left_out))


def _classes(data: DataConfig, train: Names, test: Names) -> tuple[Names, int]:
    """The names of the classes, where they are known, and their number, out of those of the two splits."""
    if train and test and train != test:
        odd = sorted(set(train) ^ set(test))
        raise ConfigError(f"data: the classes of {data.train!r} and {data.test!r} differ: {', '.join(odd[:10])}")
    names = train or test or None
    if names and data.classes not in (None, len(names)):
        raise ConfigError(f"data.classes: {data.classes} asked for, but the data have {len(names)}")
    count = len(names) if names else data.classes
    if count is None:
        raise ConfigError("data.classes: must be given, for this reader does not tell how many there are")
    if count < 2:
        raise ConfigError(
            f"data: there is one class alone ({', '.join(names or ())}), and a classifier needs two or more. In "
            f"folders, each folder in {data.train!r} and {data.test!r} is a class"
        )
    return names, count


def most_unreadable(images: int) -> int:
    """How many of so many images may be unreadable."""
    return max(1, int(UNREADABLE_SHARE * images))


def _look(source: Source, split: str) -> list[str]:
    """Read some images all over a source, all of them where they are few, and name those that cannot be read.

    The source is refused if too many are broken, or more than 1% have no class or pixels of an unknown range: that
    is the way of a data set, and seldom the fault of one file.
    """
    images = len(source)
    looked = sorted({at * images // LOOKED_AT for at in range(LOOKED_AT)}) if images else []
    refused, broken = list[str](), list[str]()
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
    if len(unreadable) > min(most_unreadable(images), MOST_LOOKED_AT) or len(unreadable) == len(looked) > 0:
        listed = "; ".join(unreadable[:MOST_TOLD])
        raise ConfigError(
            f"data: of {len(looked)} images of {split!r}, {len(unreadable)} cannot be read, more than "
            f"{UNREADABLE_SHARE:.0%}. Mend or remove them: {listed}{'; ...' if len(unreadable) > MOST_TOLD else ''}"
        )
    return [f"{split}: cannot be read and is left out: {told}" for told in unreadable]


def open_split(data: DataConfig, *, training: bool) -> Source | IterableDataset[Any]:
    """Open one split of a config's data, the training images or the test images; see `open_splits`."""
    split = data.train if training else data.test
    if data.asset == "digits":
        return _digits(assets.get("digits", data.path), training)
    if data.name == INTERACTIONS:
        return _interactions(data, training)
    name, root = data.name, data.root
    if data.asset is not None:
        root = assets.get(data.asset, data.path)
        folders = (root / "train").is_dir()  # an archive of folders, one per class
        name, split = "" if folders else f"torch/{data.asset}", "test" if folders else "validation"
        split = "train" if training else split
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
    about = {"root": None if root is None else str(root), "split": split, "is_training": training}
    if reader != "torch":  # TensorFlow's reader decodes to 8 bits; what PIL reads for the others is converted here
        options["input_img_mode"] = mode if reader == "tfds" else ""
    try:
        found: Any = create_dataset(name, search_split=False, **about, **options)
    except Exception as error:  # readers of many libraries
        where = f" in {str(root)!r}" if root is not None else ""
        raise ConfigError(f"data: {name!r}{where}, split {split!r}: {type(error).__name__}: {error}") from error
    if isinstance(found, IterableDataset):
        return Stream(found, mode)
    return _of_reader(found.reader, mode) if hasattr(found, "reader") else _of_torchvision(found, mode)


def read_digits(folder: Path) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """scikit-learn's digits: images ``(N, 8, 8)`` with pixels from 0 to 16 and classes, to train with and to test.

    1,200 and 597, a fixed stratified split.
    """
    require("sklearn")
    from sklearn.model_selection import train_test_split

    table = np.loadtxt(folder / "digits.csv.gz", delimiter=",", dtype=np.float32)
    x, y = table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    parts = train_test_split(np.arange(len(y)), test_size=DIGITS_TEST_IMAGES, random_state=SPLIT_SEED, stratify=y)
    train, test = ((x[part], y[part]) for part in parts)
    return train, test


def _class_of(target: Any) -> int:
    """A label as a reader gives it; many data sets mark test images of unknown class by -1 or by nothing."""
    if target is None or int(target) < 0:
        raise DataError(f"it has no class (its label is {target})")
    return int(target)


@dataclass
class Indexed:
    """Images of another library by index: how many, how one is opened, in what mode, of what classes, and its name."""

    count: int
    open: Callable[[int], tuple[Image.Image, Any]]
    mode: Mode
    classes: Names
    name: Callable[[int], str] = "image {}".format

    def __len__(self) -> int:
        return self.count

    def read(self, index: int) -> tuple[Image.Image, int]:
        """Give an image and its class."""
        image, target = self.open(index)
        return to_mode(image, self.mode), _class_of(target)


Source = ImageFolder | Indexed
"""Images by index."""


def _of_reader(reader: Any, mode: Mode) -> Indexed:
    """A Hugging Face data set, through a reader of timm's."""
    by_index = getattr(reader, "class_to_idx", None)
    classes = tuple(map(str, sorted(by_index, key=by_index.__getitem__))) if by_index else None
    return Indexed(len(reader), partial(_read, reader), mode, classes, reader.filename)


def _read(reader: Any, index: int) -> tuple[Image.Image, Any]:
    handle, target, *_ = reader[index]
    with handle:
        image = Image.open(handle)
        image.load()
    return image, target


def _of_torchvision(dataset: Any, mode: Mode) -> Indexed:
    """A data set of torchvision's."""
    if hasattr(dataset, "loader"):
        dataset.loader = Image.open  # torchvision's own clips pixels of more than 8 bits
    # ImageNet has several names for a class
    names = [name if isinstance(name, str) else ", ".join(name) for name in getattr(dataset, "classes", None) or ()]
    return Indexed(len(dataset), dataset.__getitem__, mode, tuple(names) or None)


def _digits(folder: Path, training: bool) -> Indexed:
    x, y = read_digits(folder)[0 if training else 1]
    pixels = (x * (255 / 16)).round().astype(np.uint8)
    return Indexed(len(y), partial(_of_arrays, pixels, y), "L", tuple("0123456789"))


def _interactions(data: DataConfig, training: bool) -> Indexed:
    order, distance, images = interactions.options_of(_options(data, training), data.image_size)
    count = images if training else interactions.TEST_IMAGES
    pixels, classes = interactions.draw(data.image_size, order, distance, count, training)
    return Indexed(count, partial(_of_arrays, pixels, classes), _mode(data), interactions.CLASSES)


def _of_arrays(pixels: np.ndarray, classes: np.ndarray, index: int) -> tuple[Image.Image, Any]:
    return Image.fromarray(pixels[index]), classes[index]


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


def _subset(source: Source, chosen: np.ndarray, mode: Mode) -> Indexed:
    """Some images of a source."""
    read, name = partial(_at, source.read, chosen), partial(_at, source.name, chosen)
    return Indexed(len(chosen), read, mode, source.classes, name)


def _at(give: Callable[[int], T], places: np.ndarray, index: int) -> T:
    return give(int(places[index]))
