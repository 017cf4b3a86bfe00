"""Pascal VOC's annotations, a file of XML an image, as one COCO file.

VOC counts pixels from 1 and both ends of a box belong to it; COCO counts from 0, and a box is x, y, width and height.
So ``xmin=1, xmax=1`` is one pixel wide. A box past the edge of its image is clipped and counted; one that is inside
out or wholly outside is left out, counted and named; objects marked difficult become crowd regions, which COCO's
metric neither asks for nor counts against. A file that cannot be read, or an image that is missing or has another size
than its annotation says, is an error that names it.

python -m attnzoo.tasks.detect.voc ANNOTATIONS IMAGES OUTPUT.json [--list NAMES.txt]

The named data sets of detection are made here as well: ``annotations/instances_SPLIT.json`` and a folder per split.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from attnzoo import files
from attnzoo.command import run_script
from attnzoo.errors import DataError
from attnzoo.extras import require

UPRIGHT = 1  # EXIF's orientation of an image that is not turned
CORNERS = ("xmin", "ymin", "xmax", "ymax")
LISTED = 5  # names in a message
TILE = 224  # pixels
KEPT = 0.5  # part of a crown that must be in a tile for it to be asked for there
TREES = {"train": "2019_YELL_2_528000_4978000_image_crop2", "val": "2019_YELL_2_541000_4977000_image_crop"}


@dataclass(frozen=True)
class Box:
    """An object of an image: its class, its corners from 0 (the far ones outside it), and whether it is a crowd."""

    name: str
    left: float
    top: float
    right: float
    bottom: float
    crowd: bool = False

    @property
    def area(self) -> float:
        """Square pixels; 0 of a box that is inside out."""
        return max(0.0, self.right - self.left) * max(0.0, self.bottom - self.top)

    def within(self, left: float, top: float, right: float, bottom: float) -> Box:
        """The part inside a window, in the window's own coordinates."""
        ends = min(self.right, right) - left, min(self.bottom, bottom) - top
        return Box(self.name, max(self.left, left) - left, max(self.top, top) - top, *ends, self.crowd)


@dataclass
class Photo:
    """An image of a COCO file."""

    file: str
    width: int
    height: int
    boxes: list[Box]


@dataclass
class Converted:
    """What a conversion met: how many boxes were clipped, and those that were left out, each with its file."""

    clipped: int = 0
    left_out: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        told = f"{self.clipped} boxes past the edge clipped, {len(self.left_out)} boxes without any area left out"
        return "\n".join([told, *(f"  {one}" for one in self.left_out)])


def read_voc(annotation: Path, image: Path, found: Converted) -> Photo:
    """Read an image's annotation, or raise `DataError` if either file cannot be read or they differ in the size."""
    width, height = image_size(image)
    try:
        root = ElementTree.parse(annotation).getroot()
        said = [int(float(root.findtext(f"size/{side}") or 0)) for side in ("width", "height")]
        objects = [_box(thing) for thing in root.iter("object")]
    except (OSError, ElementTree.ParseError, ValueError, TypeError) as error:
        raise DataError(f"{annotation} is not an annotation of Pascal VOC: {error}") from error
    if min(said) < 0 or said not in ([0, 0], [width, height]):
        raise DataError(f"{annotation} is for an image of {said[0]} x {said[1]}, but {image} has {width} x {height}")
    photo = Photo(image.name, width, height, [])
    for box in objects:
        inside = box.within(0, 0, width, height)
        if inside.area:
            found.clipped += inside != box
            photo.boxes.append(inside)
        else:
            corners = f"{box.left:g},{box.top:g} to {box.right:g},{box.bottom:g}"
            found.left_out.append(f"{annotation.name}: {box.name} {corners}")
    return photo


def _box(thing: ElementTree.Element) -> Box:
    ends = {corner: float(thing.findtext(f"bndbox/{corner}") or "nothing") for corner in CORNERS}
    odd = next((corner for corner, value in ends.items() if not math.isfinite(value)), None)
    if odd is not None:
        raise ValueError(f"{odd} is {ends[odd]}")
    name = (thing.findtext("name") or "").strip()
    if not name:
        raise ValueError("an object without a name")
    difficult = (thing.findtext("difficult") or "0").strip()
    if difficult not in ("0", "1"):
        raise ValueError(f"difficult is {difficult!r}, not 0 or 1")
    return Box(name, ends["xmin"] - 1, ends["ymin"] - 1, ends["xmax"], ends["ymax"], difficult == "1")


def listed(names: Sequence[str], between: str = ", ") -> str:
    """The first few of many names."""
    return between.join(names[:LISTED]) + (f"{between}..." if len(names) > LISTED else "")


def image_size(image: Path) -> tuple[int, int]:
    """Width and height of an image file, out of its header.

    Raises `DataError` if it cannot be read, or is turned by EXIF: OpenCV turns such images and PIL does not, so that
    boxes would lie in one place in training and in another where they are drawn.
    """
    require("PIL", extra="detection")
    from PIL import ExifTags, Image

    try:
        with Image.open(image) as opened:
            size, turned = opened.size, opened.getexif().get(ExifTags.Base.Orientation, UPRIGHT)
    except (OSError, SyntaxError, ValueError) as error:
        raise DataError(f"{image} cannot be read as an image: {error}") from error
    if turned not in (0, UPRIGHT):
        raise DataError(
            f"{image} is turned by EXIF (orientation {turned}), which readers of images do or do not follow; write it "
            "upright, as PIL.ImageOps.exif_transpose does, and see that its boxes fit"
        )
    return size


def coco(photos: Iterable[Photo], names: Sequence[str]) -> dict[str, Any]:
    """Give COCO's annotations of photos, whose classes are `names`, numbered from 1; others raise `DataError`."""
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for number, photo in enumerate(photos, 1):
        images.append({"id": number, "file_name": photo.file, "width": photo.width, "height": photo.height})
        for box in photo.boxes:
            if box.name not in names:
                raise DataError(f"{photo.file} has a box of class {box.name!r}; classes: {', '.join(names)}")
            place = {"id": len(annotations) + 1, "image_id": number, "category_id": names.index(box.name) + 1}
            corner = [box.left, box.top, box.right - box.left, box.bottom - box.top]
            annotations.append({**place, "bbox": corner, "area": box.area, "iscrowd": int(box.crowd)})
    categories = [{"id": number, "name": name} for number, name in enumerate(names, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def convert(
    annotations: Path, images: Path, names: Sequence[str] | None = None, classes: Sequence[str] | None = None
) -> tuple[dict[str, Any], Converted]:
    """Convert a folder of annotations (XML) of a folder of images.

    `names`, without ending, are those to take, by default all that are annotated; `classes` are in their order, whether
    they occur or not, by default those that occur, in the alphabet's.

    Raises `DataError` if a file is missing or cannot be read, there is none, or a box is of another class.
    """
    chosen = sorted(path.stem for path in annotations.glob("*.xml")) if names is None else list(names)
    if not chosen:
        raise DataError(f"no annotation (*.xml) in {annotations}")
    by_name = {path.stem: path for path in images.iterdir() if path.is_file()} if images.is_dir() else {}
    missing = [name for name in chosen if name not in by_name]
    if missing:
        raise DataError(f"{len(missing)} images are not in {images}: {listed(missing)}")
    found = Converted()
    photos = [read_voc(annotations / f"{name}.xml", by_name[name], found) for name in chosen]
    return coco(photos, classes or sorted({box.name for photo in photos for box in photo.boxes})), found


def bccd(source: Path, folder: Path) -> None:
    """Convert BCCD, by its own lists of images for training, validation and test.

    Two of its 4,888 boxes have no area and are left out.
    """
    base = next((p.parent for p in sorted(source.rglob("ImageSets"))), None)
    if base is None:
        raise DataError(f"{source} holds no ImageSets folder, as BCCD has")
    for split in ("train", "val", "test"):
        names = (base / "ImageSets" / "Main" / f"{split}.txt").read_text(encoding="utf-8").split()
        content, _ = convert(base / "Annotations", base / "JPEGImages", names)
        files.write(folder / "annotations" / f"instances_{split}.json", json.dumps(content))
        (folder / split).mkdir()
        for image in content["images"]:
            shutil.copyfile(base / "JPEGImages" / image["file_name"], folder / split / image["file_name"])


def tree_crowns(source: Path, folder: Path) -> None:
    """Cut two photos of Yellowstone's forest into tiles of 224 pixels, one photo to train with and one to test.

    Tiles do not overlap, and what is left at the right and lower edge is left out. A crown of which less than half is
    in a tile is a crowd region there.
    """
    from PIL import Image

    data = source / "deepforest" / "data"
    for split, name in TREES.items():
        photo = read_voc(data / f"{name}.xml", data / f"{name}.png", Converted())
        (folder / split).mkdir()
        tiles = []
        with Image.open(data / f"{name}.png") as opened:
            for top in range(0, photo.height - TILE + 1, TILE):
                for left in range(0, photo.width - TILE + 1, TILE):
                    window = (left, top, left + TILE, top + TILE)
                    tile = Photo(f"{top:04d}_{left:04d}.png", TILE, TILE, [])
                    for box in photo.boxes:
                        inside = box.within(*window)
                        if inside.area:
                            tile.boxes.append(replace(inside, crowd=inside.area < KEPT * box.area))
                    opened.crop(window).save(folder / split / tile.file)
                    tiles.append(tile)
        files.write(folder / "annotations" / f"instances_{split}.json", json.dumps(coco(tiles, ["Tree"])))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; give the exit status, as in `attnzoo.command`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("annotations", type=Path, help="folder of the XML files")
    parser.add_argument("images", type=Path, help="folder of the images")
    parser.add_argument("output", type=Path, help="the COCO file to write")
    parser.add_argument("--list", type=Path, help="file of the names to take, one per line (ImageSets/Main/train.txt)")
    parser.add_argument("--classes", help="the classes in their order, with commas; splits must share them")
    parsed = parser.parse_args(arguments)
    classes = None if parsed.classes is None else [name.strip() for name in parsed.classes.split(",")]

    def body() -> None:
        try:
            names = None if parsed.list is None else parsed.list.read_text(encoding="utf-8").split()
        except OSError as error:
            raise DataError(f"the list {parsed.list} cannot be read: {error.strerror}") from error
        content, found = convert(parsed.annotations, parsed.images, names, classes)
        files.write(parsed.output, json.dumps(content))
        print(f"{len(content['images'])} images, {len(content['annotations'])} boxes; {found}")

    return run_script(body, resume="nothing was written")


if __name__ == "__main__":
    sys.exit(main())
