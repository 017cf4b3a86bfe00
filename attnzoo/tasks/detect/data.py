"""The data that a detection config names: put in place and checked before any work.

What is wrong is an error that names the file, what is odd is counted; see `attnzoo.tasks.detect.coco`. What is scored
is the same as what is trained on: where a file holds boxes that are left out, the metric reads a copy without them. An
image of which the header cannot be read, that has another size than the file says, or that is turned by EXIF, is
refused; one that is damaged further on stops a run when it is its turn, with its name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from attnzoo import assets, files
from attnzoo.errors import ConfigError, DataError
from attnzoo.tasks.detect import coco, mmcv_ext
from attnzoo.tasks.detect.voc import image_size, listed

PARTS = ("train", "val", "test")
READERS = 8  # of headers, at a time


def innermost(config: Mapping[str, Any]) -> list[Any]:
    """Configs of the data sets inside all wrappers, such as RepeatDataset or ConcatDataset."""
    parts = config.get("datasets") or ([config["dataset"]] if config.get("dataset") is not None else [])
    return [one for part in parts for one in innermost(part)] if parts else [config]


def read_by(config: Any, part: str) -> list[Any]:
    """Configs of the data sets that a loader reads: that of ``train``, ``val`` or ``test``."""
    loader = config.get(f"{part}_dataloader")
    return [] if loader is None else innermost(loader.get("dataset") or {})


def metrics(evaluator: Any) -> list[Any]:
    """Configs of the metrics of an evaluator, which may be one of them, a list, or an ``Evaluator`` of several."""
    if isinstance(evaluator, (list, tuple)):
        return [one for part in evaluator for one in metrics(part)]
    if not isinstance(evaluator, Mapping):
        return []
    return metrics(evaluator["metrics"]) if "metrics" in evaluator else [evaluator]


def is_of(config: Mapping[str, Any], kind: str) -> bool:
    """Whether a config is of a registered class, which it names by itself or with a scope: ``mmdet.CocoMetric``."""
    named = config.get("type", kind)
    return getattr(named, "__name__", str(named)).rpartition(".")[2] == kind


def annotations_of(config: Mapping[str, Any]) -> Path:
    """The annotation file of a data set."""
    return Path(config.get("data_root") or "") / config.get("ann_file", "")


def prepare(config: Any) -> list[coco.Checked]:
    """Have the data in place, and check every annotation file of the config; what is wrong is an `AttnZooError`."""
    root = config.get("data_root")
    if root:
        _check_used(config, str(root))
    if root and not Path(root).exists():
        if config.get("asset") != Path(root).name:  # a link in any other place would stand for data of another name
            raise ConfigError(f"data_root={str(root)!r} does not exist; put the data there or set data_root=PATH/")
        link(assets.get(config.asset, config.get("asset_path")), Path(root))
    sets = {str(one): one for part in PARTS for one in read_by(config, part)}  # each once
    found = [checked for one in sets.values() for checked in dataset(one)]
    for part in ("val", "test"):
        check_metrics(config, part)
    head = config.model.get("bbox_head")
    for one in found:
        if isinstance(head, Mapping) and head.get("num_classes") not in (None, len(one.classes)):
            raise ConfigError(
                f"model.bbox_head.num_classes is {head['num_classes']}, but {one.file} is read for {len(one.classes)} "
                f"classes: {', '.join(one.classes)}"
            )
    return found


def _check_used(config: Any, root: str) -> None:
    """Refuse a `data_root` that no data set has: a config that inherits another must set that of each data set too."""
    roots = {os.path.normpath(p) for part in PARTS for one in read_by(config, part) if (p := one.get("data_root"))}
    if roots and not any(Path(one).is_relative_to(os.path.normpath(root)) for one in roots):
        raise ConfigError(
            f"data_root={root!r} is not that of any data set: they read {', '.join(sorted(roots))}; set data_root in "
            "the dataset of each dataloader too"
        )


def move(config: Any, before: str, now: str) -> None:
    """Have the data sets and metrics look under another root."""
    now = os.path.join(now, "")
    for part in PARTS:
        for one in read_by(config, part):
            if os.path.normpath(one.get("data_root") or "") == os.path.normpath(before):
                one["data_root"] = now
        for metric in metrics(config.get(f"{part}_evaluator")):
            if str(metric.get("ann_file", "")).startswith(before):
                metric["ann_file"] = now + metric["ann_file"].removeprefix(before)
    config.data_root = now


def link(folder: Path, place: Path) -> None:
    """Make `place` stand for `folder`; a link that leads nowhere any more is replaced."""
    place = Path(os.path.normpath(place))
    place.parent.mkdir(parents=True, exist_ok=True)
    try:
        if place.is_symlink() and not place.exists():
            place.unlink(missing_ok=True)
        place.symlink_to(folder, target_is_directory=True)
    except FileExistsError:  # another process was faster
        pass
    except OSError as error:
        raise ConfigError(f"{place} cannot be made a link to {folder}: {error}; set data_root={folder}/") from error
    if not place.is_dir():
        raise ConfigError(f"{place} is not a folder; remove it, or set data_root={folder}/")


def check_metrics(config: Any, part: str) -> None:
    """Refuse a metric that reads the annotations of other images; have COCO's read a copy without what is left out.

    Other metrics, and annotation files of other data sets than COCO's, such as LVIS, are left alone.
    """
    read = {annotations_of(one): is_of(one, "CocoDataset") for one in read_by(config, part)}
    scored_in, copies = Path(config.work_dir) / "scored", {}
    for file in read:
        name = hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:8]
        copies[file] = scored_in / f"{file.stem}-{name}.json"
    for metric in metrics(config.get(f"{part}_evaluator")):
        told = Path(metric.get("ann_file") or "")
        if told == Path("") or not read or told in copies.values():
            continue
        if told not in read:
            raise ConfigError(
                f"{part}_evaluator.ann_file={str(told)!r} is not what {part}_dataloader reads, "
                f"{', '.join(map(str, read))}; give that, or None"
            )
        if is_of(metric, "CocoMetric") and read[told]:
            content = coco.read(told)
            scored = coco.to_score(content)
            if scored["annotations"] != content["annotations"]:
                files.write_json(copies[told], scored)
                metric["ann_file"] = str(copies[told])


def dataset(config: Mapping[str, Any]) -> list[coco.Checked]:
    """Check the annotation files of an mmdet dataset's config; those of other datasets than COCO's are left alone.

    Raises `DataError` if a file or an image is missing, it is no COCO file, or has not the config's classes.
    """
    return [_checked(one) for one in innermost(config) if is_of(one, "CocoDataset") and "ann_file" in one]


def _checked(config: Mapping[str, Any]) -> coco.Checked:
    file = annotations_of(config)
    content = coco.read(file)
    names = [category["name"] for category in content["categories"]]
    own = mmcv_ext.load("mmdet.datasets").CocoDataset.METAINFO["classes"]  # what mmdet takes where none are named
    classes = tuple((config.get("metainfo") or {}).get("classes") or own)
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
    folder = Path(config.get("data_root") or ".") / (config.get("data_prefix") or {}).get("img", "")
    _check_images(content["images"], folder, file)
    found = coco.count(content, file, classes)
    if not found.trained and (config.get("filter_cfg") or {}).get("filter_empty_gt") and not config.get("test_mode"):
        raise DataError(f"{file} has no box to train on, and filter_cfg leaves out every image without one")
    return found


def _check_images(images: Iterable[Mapping[str, Any]], folder: Path, file: Path) -> None:
    """Refuse images that are not there, or of another size than the file says: their boxes would lie elsewhere.

    Headers alone are read. Images that are turned by EXIF are refused too: readers differ in whether they turn them.
    """
    images = list(images)
    there = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
    named = [image["file_name"] for image in images]
    missing = [name for name in named if name not in there and not (folder / name).is_file()]
    if missing:
        raise DataError(f"{len(missing)} of {len(images)} images of {file} are not in {folder}: {listed(missing)}")
    with ThreadPoolExecutor(READERS) as pool:
        sizes = list(pool.map(lambda name: image_size(folder / name), named))
    wrong = [
        f"{image['file_name']} is {found[0]} x {found[1]}, annotated as {image['width']} x {image['height']}"
        for image, found in zip(images, sizes, strict=True)
        if found != (image["width"], image["height"])
    ]
    if wrong:
        raise DataError(
            f"{len(wrong)} of {len(images)} images of {file} have another size than it says: {listed(wrong, '; ')}. "
            "Annotate the images as they are, or give those that were annotated"
        )


def same_classes(trained: Any, asked: Any, checkpoint: Path) -> None:
    """Raise `DataError` unless a checkpoint was trained on the classes that are asked for, in the same order."""
    if trained is not None and tuple(trained) != tuple(asked):
        raise DataError(
            f"{checkpoint} was trained on the classes {', '.join(trained)}, but the data has {', '.join(asked)}"
        )
