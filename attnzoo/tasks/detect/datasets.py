"""The named data sets of detection, as COCO has it: ``annotations/instances_SPLIT.json`` and one folder per split."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from attnzoo import files
from attnzoo.errors import DataError
from attnzoo.tasks.detect.voc import Converted, Photo, coco, convert, read_voc

TILE = 224  # pixels
KEPT = 0.5  # part of a crown that must be in a tile for it to be asked for there
TREES = {"train": "2019_YELL_2_528000_4978000_image_crop2", "val": "2019_YELL_2_541000_4977000_image_crop"}


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
                            crowd = inside.area < KEPT * box.area
                            tile.boxes.append(type(box)(**{**vars(inside), "crowd": crowd}))
                    opened.crop(window).save(folder / split / tile.file)
                    tiles.append(tile)
        files.write(folder / "annotations" / f"instances_{split}.json", json.dumps(coco(tiles, ["Tree"])))
