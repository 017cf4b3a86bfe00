"""COCO files checked before any work: what is wrong is an error that names the file, what is odd is counted.

What happens to what is odd is mmdet's own doing: boxes past the edge are clipped for training where an image is
resized, and scored as they are annotated; boxes without area or under a pixel wide, and those of classes that are not
asked for, are left out; crowd regions and boxes to be ignored are neither trained on nor counted against; images
without a box are trained on unless the config filters them (``filter_empty_gt``). What is scored is the same: where the
file holds boxes that are left out, the metric reads a copy without them. An image of which the header cannot be read,
that has another size than the file says, or that is turned by EXIF, is refused; one that is damaged further on stops a
run when it is its turn, with its name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnzoo.errors import DataError
from attnzoo.tasks.detect import coco_file, mmcv_ext
from attnzoo.tasks.detect.voc import image_size

LISTED = 5
READERS = 8  # of headers, at a time


@dataclass
class Checked:
    """What an annotation file holds.

    Attributes
    ----------
    file
        The annotation file.
    images, boxes
        How many of them; crowd regions are boxes too.
    classes
        Those that are asked for, in the detector's order.
    trained
        How many boxes are trained on.
    odd
        How many images have no box, how many boxes are crowd regions, reach past the edge or are left out.
    """

    file: Path
    images: int
    boxes: int
    classes: tuple[str, ...] = ()
    trained: int = 0
    odd: Counter[str] = field(default_factory=Counter)

    def __str__(self) -> str:
        told = ", ".join(f"{count} {what}" for what, count in self.odd.items())
        return f"{self.file}: {self.images} images, {self.boxes} boxes" + (f" ({told})" if told else "")


def dataset(config: Mapping[str, Any]) -> list[Checked]:
    """Check the annotation files of an mmdet dataset's config; those of other datasets than COCO's are left alone.

    Raises
    ------
    DataError
        If a file or an image is missing, it is no COCO file, it has not the config's classes, or no image.
    """
    parts = _inner(config)
    if parts:
        return [one for part in parts for one in dataset(part)]
    if not is_of(config, "CocoDataset") or "ann_file" not in config:
        return []
    root = Path(config.get("data_root") or ".")
    file = annotations_of(config)
    content = read(file)
    names = [category["name"] for category in content["categories"]]
    classes = tuple((config.get("metainfo") or {}).get("classes") or _coco_classes())
    missing = [name for name in classes if name not in names]
    if missing:
        raise DataError(
            f"{file} has no category {', '.join(missing)}; it has {', '.join(names)}: name its classes in metainfo"
        )
    ordered = [name for name in names if name in classes]
    if ordered != list(classes):
        raise DataError(
            f"{file} lists the classes as {', '.join(ordered)}, and mmdet numbers them so; give metainfo's classes in "
            f"that order, not as {', '.join(classes)}"
        )
    folder = root / (config.get("data_prefix") or {}).get("img", "")
    _images_are_there(content, folder, file)
    _images_are_as_told(content, folder, file)
    found = count(content, file, classes)
    if not found.trained and (config.get("filter_cfg") or {}).get("filter_empty_gt") and not config.get("test_mode"):
        raise DataError(f"{file} has no box to train on, and filter_cfg leaves out every image without one")
    return [found]


def _inner(config: Mapping[str, Any]) -> list[Any]:
    """What a wrapper, such as RepeatDataset or ConcatDataset, holds."""
    return list(config.get("datasets") or ([config["dataset"]] if config.get("dataset") is not None else []))


def is_of(config: Mapping[str, Any], kind: str) -> bool:
    """Whether a config is of a registered class, which it names by itself or with a scope: ``mmdet.CocoMetric``."""
    named = config.get("type", kind)
    return getattr(named, "__name__", str(named)).rpartition(".")[2] == kind


def annotations_of(config: Mapping[str, Any]) -> Path:
    """The annotation file of a data set."""
    return Path(config.get("data_root") or "") / config.get("ann_file", "")


def metrics(evaluator: Any) -> list[Any]:
    """Configs of the metrics of an evaluator, which may be one of them, a list, or an ``Evaluator`` of several."""
    if isinstance(evaluator, (list, tuple)):
        return [one for part in evaluator for one in metrics(part)]
    if not isinstance(evaluator, Mapping):
        return []
    return metrics(evaluator["metrics"]) if "metrics" in evaluator else [evaluator]


def roots(config: Mapping[str, Any]) -> set[str]:
    """Folders that an mmdet dataset's config reads from."""
    return {str(one["data_root"]) for one in innermost(config) if one.get("data_root")}


def innermost(config: Any) -> list[Any]:
    """Configs of the data sets inside all wrappers."""
    parts = _inner(config)
    return [one for part in parts for one in innermost(part)] if parts else [config]


def _coco_classes() -> tuple[str, ...]:
    """What mmdet takes where a config names no classes."""
    found: tuple[str, ...] = mmcv_ext.load("mmdet.datasets").CocoDataset.METAINFO["classes"]
    return found


def read(file: Path) -> dict[str, Any]:
    """Read a COCO file.

    Raises
    ------
    DataError
        If it is missing, broken, not COCO's, or without any image.
    """
    try:
        content = coco_file.parse(file.read_bytes(), file)
    except OSError as error:
        raise DataError(f"annotations {file} cannot be read: {error.strerror}") from error
    if not content["images"]:
        raise DataError(f"{file} holds no image: there is nothing to train or test on")
    for kind in ("images", "annotations", "categories"):
        twice = [number for number, times in Counter(one["id"] for one in content[kind]).items() if times > 1]
        if twice:
            raise DataError(f"{file}: two of its {kind} have the id {twice[0]}")
    images = {image["id"] for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for one in content["annotations"]:
        if one["image_id"] not in images or one["category_id"] not in categories:
            raise DataError(f"{file}: annotation {one['id']} is of an image or a category that is not listed")
    return content


def _images_are_there(content: Mapping[str, Any], folder: Path, file: Path) -> None:
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    missing = [
        image["file_name"]
        for image in content["images"]
        if image["file_name"] not in there and not (folder / image["file_name"]).is_file()
    ]
    if missing:
        listed = ", ".join(missing[:LISTED]) + (", ..." if len(missing) > LISTED else "")
        raise DataError(f"{len(missing)} of {len(content['images'])} images of {file} are not in {folder}: {listed}")


def _images_are_as_told(content: Mapping[str, Any], folder: Path, file: Path) -> None:
    """Refuse images that have another size than the file says: their boxes would lie elsewhere. Headers alone are read.

    Images that are turned by EXIF are refused too, for readers differ in whether they turn them.
    """
    images = content["images"]
    with ThreadPoolExecutor(READERS) as pool:
        sizes = list(pool.map(lambda image: image_size(folder / image["file_name"]), images))
    wrong = [
        f"{image['file_name']} is {found[0]} x {found[1]}, annotated as {image['width']} x {image['height']}"
        for image, found in zip(images, sizes, strict=True)
        if found != (image["width"], image["height"])
    ]
    if wrong:
        listed = "; ".join(wrong[:LISTED]) + ("; ..." if len(wrong) > LISTED else "")
        raise DataError(
            f"{len(wrong)} of {len(images)} images of {file} have another size than it says: {listed}. Annotate the "
            "images as they are, or give those that were annotated"
        )


def left_out(annotation: Mapping[str, Any], size: tuple[int, int]) -> bool:
    """Whether mmdet leaves a box out: it has no area, is under a pixel wide or high, or lies outside its image."""
    x, y, width, height = annotation["bbox"]
    across, down = size
    inside = min(x + width, across) > max(x, 0) and min(y + height, down) > max(y, 0)
    return annotation["area"] <= 0 or width < 1 or height < 1 or not inside


def to_score(content: Mapping[str, Any]) -> dict[str, Any]:
    """Give the content of a COCO file as it is scored: without the boxes that are left out.

    Boxes to be ignored, which are not trained on, become crowd regions: neither asked for nor counted against.
    """
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    kept = [one for one in content["annotations"] if not left_out(one, sizes[one["image_id"]])]
    return {**content, "annotations": [{**one, "iscrowd": 1} if one.get("ignore") else one for one in kept]}


def count(content: Mapping[str, Any], file: Path, classes: tuple[str, ...]) -> Checked:
    """Count what a COCO file holds, and what is odd."""
    asked = {category["id"] for category in content["categories"] if category["name"] in classes}
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    found = Checked(file, len(sizes), len(content["annotations"]), classes)
    bare = set(sizes)
    for one in content["annotations"]:
        x, y, width, height = one["bbox"]
        across, down = sizes[one["image_id"]]
        if one["category_id"] not in asked:
            found.odd["boxes of other classes, left out"] += 1
            continue
        out, hidden = left_out(one, (across, down)), bool(one["iscrowd"] or one.get("ignore"))
        found.odd["crowd regions"] += bool(one["iscrowd"])
        found.odd["boxes to be ignored, scored as crowd regions"] += bool(one.get("ignore"))
        found.trained += not (out or hidden)
        if out:
            found.odd["boxes without area or outside, left out"] += 1
            continue
        bare.discard(one["image_id"])
        if x < 0 or y < 0 or x + width > across or y + height > down:
            found.odd["boxes past the edge"] += 1
    found.odd = +found.odd
    if bare:
        found.odd["images without a box"] = len(bare)
    return found


def same_classes(trained: Any, asked: Any, checkpoint: Path) -> None:
    """Raise `DataError` unless a checkpoint was trained on the classes that are asked for, in the same order."""
    if trained is not None and tuple(trained) != tuple(asked):
        raise DataError(
            f"{checkpoint} was trained on the classes {', '.join(trained)}, but the data has {', '.join(asked)}"
        )
