"""COCO files of detection: their schema, what is odd about them, and what of them is scored.

What happens to what is odd is mmdet's own doing: boxes past the edge are clipped for training where an image is
resized, and scored as they are annotated; boxes without area or under a pixel wide, and those of classes that are not
asked for, are left out; crowd regions and boxes to be ignored are neither trained on nor counted against; images
without a box are trained on unless the config filters them (``filter_empty_gt``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import ConfigDict, Field, FiniteFloat, PositiveInt, TypeAdapter, ValidationError, with_config
from typing_extensions import TypedDict

from attnzoo.errors import DataError, short

_STRICT = ConfigDict(strict=True, extra="allow")  # "iscrowd": "0" fails late in other libraries, or changes what counts
Flag = Literal[0, 1]
Text = Annotated[str, Field(min_length=1)]


@with_config(_STRICT)
class Image(TypedDict):
    """An image: its number, file and size in pixels."""

    id: int
    file_name: Text
    width: PositiveInt
    height: PositiveInt


@with_config(_STRICT)
class Annotation(TypedDict):
    """A box: x, y, width and height in pixels from 0, its area, and whether it is a crowd region or to be ignored."""

    id: PositiveInt
    image_id: int
    category_id: int
    bbox: Annotated[list[FiniteFloat], Field(min_length=4, max_length=4)]
    area: FiniteFloat
    iscrowd: Flag
    ignore: NotRequired[Flag | bool]


@with_config(_STRICT)
class Category(TypedDict):
    """A class of boxes."""

    id: int
    name: Text


@with_config(_STRICT)
class CocoFile(TypedDict):
    """The file."""

    images: list[Image]
    annotations: list[Annotation]
    categories: list[Category]


@cache
def _schema() -> TypeAdapter[CocoFile]:
    return TypeAdapter(CocoFile)


def read(file: Path) -> dict[str, Any]:
    """Read a COCO file, or raise `DataError` that names the place of the first value that does not fit."""
    try:
        content: dict[str, Any] = dict(_schema().validate_json(file.read_bytes()))
    except OSError as error:
        raise DataError(f"annotations {file} cannot be read: {error.strerror}") from error
    except ValidationError as error:
        raise DataError(_explained(error, file)) from error
    if not content["images"]:
        raise DataError(f"{file} holds no image: there is nothing to train or test on")
    ids = {kind: Counter(one["id"] for one in content[kind]) for kind in ("images", "annotations", "categories")}
    for kind, counts in ids.items():
        twice = next((number for number, times in counts.items() if times > 1), None)
        if twice is not None:
            raise DataError(f"{file}: two of its {kind} have the id {twice}")
    for one in content["annotations"]:
        if one["image_id"] not in ids["images"] or one["category_id"] not in ids["categories"]:
            raise DataError(f"{file}: annotation {one['id']} is of an image or a category that is not listed")
    return content


def _explained(error: ValidationError, file: Path) -> str:
    found = error.errors(include_url=False)
    first, place = found[0], ".".join(map(str, found[0]["loc"]))
    if first["type"] == "json_invalid":
        return f"annotations {file} are broken: {first['msg']}"
    if len(first["loc"]) < 2:
        return f"{file} is not a COCO file: it has no list {place or 'images'!r}"
    value = "" if first["type"] == "missing" else f", not {short(first['input'])}"
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    zero = "; pycocotools takes the id 0 for none" if first["loc"][-1] == "id" and first["input"] == 0 else ""
    return f"{file}: {place}: {first['msg'][:1].lower()}{first['msg'][1:]}{value}{zero}{more}"


@dataclass
class Checked:
    """How many images and boxes an annotation file holds, crowd regions included, and how many boxes are trained on.

    `classes` are those that are asked for, in the detector's order; `odd` counts images without a box, and boxes that
    are crowd regions, reach past the edge or are left out.
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


def count(content: Mapping[str, Any], file: Path, classes: tuple[str, ...]) -> Checked:
    """Count what a COCO file holds, and what is odd."""
    asked = {category["id"] for category in content["categories"] if category["name"] in classes}
    sizes = _sizes(content)
    found = Checked(file, len(sizes), len(content["annotations"]), classes)
    bare = set(sizes)
    for one in content["annotations"]:
        x, y, width, height = one["bbox"]
        across, down = sizes[one["image_id"]]
        if one["category_id"] not in asked:
            found.odd["boxes of other classes, left out"] += 1
            continue
        out, hidden = _left_out(one, (across, down)), bool(one["iscrowd"] or one.get("ignore"))
        found.odd["crowd regions"] += bool(one["iscrowd"])
        found.odd["boxes to be ignored, scored as crowd regions"] += bool(one.get("ignore"))
        found.odd["boxes past the edge"] += not out and (x < 0 or y < 0 or x + width > across or y + height > down)
        found.odd["boxes without area or outside, left out"] += out
        found.trained += not (out or hidden)
        if not out:
            bare.discard(one["image_id"])
    found.odd["images without a box"] = len(bare)
    found.odd = +found.odd
    return found


def to_score(content: Mapping[str, Any]) -> dict[str, Any]:
    """Give the content of a COCO file as it is scored: without the boxes that are left out.

    Boxes to be ignored, which are not trained on, become crowd regions: neither asked for nor counted against.
    """
    sizes = _sizes(content)
    kept = [one for one in content["annotations"] if not _left_out(one, sizes[one["image_id"]])]
    return {**content, "annotations": [{**one, "iscrowd": 1} if one.get("ignore") else one for one in kept]}


def _sizes(content: Mapping[str, Any]) -> dict[int, tuple[int, int]]:
    return {image["id"]: (image["width"], image["height"]) for image in content["images"]}


def _left_out(annotation: Mapping[str, Any], size: tuple[int, int]) -> bool:
    """Whether mmdet leaves a box out: it has no area, is under a pixel wide or high, or lies outside its image."""
    x, y, width, height = annotation["bbox"]
    across, down = size
    inside = min(x + width, across) > max(x, 0) and min(y + height, down) > max(y, 0)
    return annotation["area"] <= 0 or width < 1 or height < 1 or not inside
