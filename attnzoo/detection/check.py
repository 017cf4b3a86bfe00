"""COCO files checked before any work: what is wrong is an error that names the file, what is odd is counted.

What happens to what is odd is mmdet's own doing: boxes past the edge are clipped for training where an image is
resized, and scored as they are annotated; boxes without area or under a pixel wide, and those of classes that are not
asked for, are left out; crowd regions are neither trained on nor counted against; images without a box are trained on
unless the config filters them (``filter_empty_gt``). An image that cannot be read stops a run when it is its turn, with
its name.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnzoo.detection import mmcv_ext
from attnzoo.errors import DataError

LISTED = 5


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
    if config.get("type", "CocoDataset") != "CocoDataset" or "ann_file" not in config:
        return []
    root = Path(config.get("data_root") or ".")
    file = root / config["ann_file"]
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
    _images_are_there(content, root / (config.get("data_prefix") or {}).get("img", ""), file)
    found = count(content, file, classes)
    if not found.trained and (config.get("filter_cfg") or {}).get("filter_empty_gt") and not config.get("test_mode"):
        raise DataError(f"{file} has no box to train on, and filter_cfg leaves out every image without one")
    return [found]


def _inner(config: Mapping[str, Any]) -> list[Any]:
    """What a wrapper, such as RepeatDataset or ConcatDataset, holds."""
    return list(config.get("datasets") or ([config["dataset"]] if config.get("dataset") is not None else []))


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
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"annotations {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"annotations {file} are broken: {error}") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{file} is no COCO file: it has no list {key!r}")
    if not content["images"]:
        raise DataError(f"{file} holds no image: there is nothing to train or test on")
    for kind, keys in (("images", ("id", "file_name", "width", "height")), ("categories", ("id", "name"))):
        for one in content[kind]:
            lacking = [key for key in keys if key not in one]
            if lacking:
                raise DataError(f"{file}: one of its {kind} has no {', '.join(lacking)}: {one}")
    for kind in ("images", "annotations", "categories"):
        twice = [number for number, times in Counter(one.get("id") for one in content[kind]).items() if times > 1]
        if twice:
            raise DataError(f"{file}: two of its {kind} have the id {twice[0]}")
    images = {image["id"] for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for place, one in enumerate(content["annotations"]):
        box = one.get("bbox")
        if not (isinstance(box, list) and len(box) == 4 and all(isinstance(n, (int, float)) for n in box)):
            raise DataError(f"{file}: annotation {one.get('id', place)} has no bbox of four numbers: {box!r}")
        if one.get("image_id") not in images or one.get("category_id") not in categories:
            raise DataError(
                f"{file}: annotation {one.get('id', place)} is of an image or a category that is not listed"
            )
        if one.get("id") == 0:
            raise DataError(f"{file}: an annotation has the id 0, which pycocotools takes for none; count from 1")
        for key in ("area", "iscrowd"):
            if key not in one:
                raise DataError(f"{file}: annotation {one.get('id', place)} has no {key!r}, which COCO's metric needs")
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


def count(content: Mapping[str, Any], file: Path, classes: tuple[str, ...]) -> Checked:
    """Count what a COCO file holds, and what is odd."""
    asked = {category["id"] for category in content["categories"] if category["name"] in classes}
    sizes = {image["id"]: (image["width"], image["height"]) for image in content["images"]}
    found = Checked(file, len(sizes), len(content["annotations"]), classes)
    for one in content["annotations"]:
        x, y, width, height = one["bbox"]
        across, down = sizes[one["image_id"]]
        inside = min(x + width, across) > max(x, 0) and min(y + height, down) > max(y, 0)
        if one["category_id"] not in asked:
            found.odd["boxes of other classes, left out"] += 1
            continue
        if one["iscrowd"]:
            found.odd["crowd regions"] += 1
        found.trained += not one["iscrowd"] and one["area"] > 0 and width >= 1 and height >= 1 and inside
        if one["area"] <= 0 or width < 1 or height < 1 or not inside:
            found.odd["boxes without area or outside, left out"] += 1
        elif x < 0 or y < 0 or x + width > across or y + height > down:
            found.odd["boxes past the edge"] += 1
    bare = len(sizes) - len({one["image_id"] for one in content["annotations"]})
    if bare:
        found.odd["images without a box"] += bare
    return found


def same_classes(trained: Any, asked: Any, checkpoint: Path) -> None:
    """Raise `DataError` unless a checkpoint was trained on the classes that are asked for, in the same order."""
    if trained is not None and tuple(trained) != tuple(asked):
        raise DataError(
            f"{checkpoint} was trained on the classes {', '.join(trained)}, but the data has {', '.join(asked)}"
        )
