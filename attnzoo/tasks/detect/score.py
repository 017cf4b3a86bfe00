"""COCO's metric of a trained detector, by pycocotools, and which images it did best and worst on."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from attnzoo.errors import ConfigError, DataError
from attnzoo.tasks.detect import data
from attnzoo.tasks.detect.branches import branches, summed
from attnzoo.tasks.detect.quality import Branch, Metric
from attnzoo.tasks.detect.run import last_checkpoint

STATS = tuple(Metric.model_fields)
IOU = 0.5  # of the matches that images are judged by
Box = tuple[float, ...]


@dataclass(frozen=True)
class Judged:
    """An image, what is true there, what was predicted with at least the threshold's score, and how well they agree.

    Boxes are ``(x, y, width, height, class)``, of predictions with their score, in pixels; `f1` is of the matches at an
    IoU of 0.5, and 1 where nothing is true and nothing predicted.
    """

    path: str
    true: tuple[Box, ...]
    predicted: tuple[Box, ...]
    f1: float


@dataclass(frozen=True)
class Scores:
    """The metric over all images, how many images and boxes there are, crowd regions left out, and every image judged.

    `threshold` is the score that gives the best F1 over all images; the best of `judged` come first.
    """

    metric: Metric
    images: int
    boxes: int
    threshold: float
    judged: tuple[Judged, ...]


class Answers(NamedTuple):
    """COCO files of what is true and of what was predicted, the file of each image by its number, and the classes.

    `branches` are those of the encoder's attention on these images.
    """

    true: Path
    predicted: Path
    files: Mapping[int, str]
    classes: Sequence[str]
    branches: tuple[Branch, ...]


def predict(config: Any, folder: Path) -> Answers:
    """Run the trained detector over the config's test images, by mmengine's Runner; predictions go into `folder`.

    Raises `AttnZooError` if the run is not trained to its end or on other classes, or its metric is not COCO's.
    """
    from mmengine.runner import Runner

    checkpoint = finished(config)
    folder.mkdir(parents=True, exist_ok=True)
    config = copy.deepcopy(config)
    config.load_from, config.resume, config.work_dir = None, False, str(folder)
    prefix = folder / "boxes"
    metrics = data.metrics(config.test_evaluator)
    metric = next((dict(one) for one in metrics if data.is_of(one, "CocoMetric")), None)
    if metric is None:
        raise ConfigError("test_evaluator names no CocoMetric, which hands the predictions to pycocotools")
    config.test_evaluator = {**metric, "format_only": True, "outfile_prefix": str(prefix)}
    runner = Runner.from_cfg(config)
    images = runner.test_dataloader.dataset
    load(runner, checkpoint, images.metainfo["classes"])
    with summed(getattr(runner.model, "module", runner.model)) as sums:  # several processes wrap it
        runner.test()
    told = metric.get("ann_file")
    true = Path(told) if told else prefix.with_name(prefix.name + ".gt.json")
    infos = (images.get_data_info(place) for place in range(len(images)))
    files = {info["img_id"]: info["img_path"] for info in infos}
    predicted = prefix.with_name(prefix.name + ".bbox.json")
    return Answers(true, predicted, files, images.metainfo["classes"], branches(sums))


def load(runner: Any, checkpoint: Path, classes: Sequence[str]) -> None:
    """Load a checkpoint into a Runner's model, every weight of it, or raise `AttnZooError` if it is of another."""
    from mmengine.runner.checkpoint import CheckpointLoader

    meta = CheckpointLoader.load_checkpoint(str(checkpoint), map_location="cpu").get("meta", {})
    data.same_classes((meta.get("dataset_meta") or {}).get("classes"), classes, checkpoint)
    try:
        runner.load_checkpoint(str(checkpoint), strict=True)
    except RuntimeError as error:
        raise ConfigError(f"{checkpoint} does not hold the weights of this config's model: {error}") from error


def finished(config: Any) -> Path:
    """Give the last checkpoint of a run that is trained to its end, or raise `ConfigError`."""
    found = last_checkpoint(config)
    if found is None:
        raise ConfigError(f"{config.work_dir} holds no trained run; train first, with train/detect.py and this config")
    epochs = config.train_cfg.get("max_epochs")
    done = found.stem.rpartition("_")[2]
    if epochs is not None and done.isdigit() and int(done) < epochs:
        raise ConfigError(f"{config.work_dir} is trained for {done} of {epochs} epochs; train/detect.py resumes it")
    return found


def scores(true: Path, predicted: Path, files: Mapping[int, str], classes: Sequence[str]) -> Scores:
    """Let pycocotools compare two COCO files, over the images of `files` and the boxes of `classes`.

    Raises `DataError` if there is no box to find.
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(str(true))
        found = json.loads(predicted.read_text(encoding="utf-8"))
        answers = truth.loadRes(found) if found else COCO()
        if not found:
            answers.dataset = {**truth.dataset, "annotations": []}
            answers.createIndex()
        evaluation = COCOeval(truth, answers, "bbox")
        evaluation.params.imgIds = sorted(files)
        evaluation.params.catIds = truth.getCatIds(catNms=list(classes))
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    if evaluation.stats[0] < 0:
        raise DataError(
            f"the {len(files)} test images have no box of the classes {', '.join(classes)}: nothing to find"
        )
    # pycocotools gives -1 where there is nothing to find
    stats = {name: None if at < 0 else float(at) for name, at in zip(STATS, evaluation.stats, strict=False)}
    images = _images(truth, answers, evaluation, files)
    threshold = _best_threshold(images)
    judged = sorted((_judged(one, threshold) for one in images), key=lambda j: (-j.f1, -len(j.true), j.path))
    boxes = sum(len(one.true) for one in judged)
    return Scores(Metric.model_validate(stats), len(files), boxes, threshold, tuple(judged))


class _Image(NamedTuple):
    """An image's boxes; of each prediction its box, and whether it is matched, or lies in a crowd region (None)."""

    path: str
    true: list[Box]
    predicted: list[tuple[Box, bool | None]]


def _images(truth: Any, answers: Any, evaluation: Any, files: Mapping[int, str]) -> list[_Image]:
    """Take out of the evaluation what was matched at the IoU images are judged by."""
    images = {number: _Image(path, [], []) for number, path in files.items()}
    names = {number: place for place, number in enumerate(evaluation.params.catIds)}
    at = int(np.argmin(np.abs(evaluation.params.iouThrs - IOU)))
    for found in evaluation.evalImgs:
        if found is None or list(found["aRng"]) != list(evaluation.params.areaRng[0]):  # that of all sizes
            continue
        image, name = images[found["image_id"]], names[found["category_id"]]
        for number, ignored in zip(found["gtIds"], found["gtIgnore"], strict=True):
            if not ignored:
                image.true.append((*truth.anns[number]["bbox"], name))
        for number, match, ignored in zip(found["dtIds"], found["dtMatches"][at], found["dtIgnore"][at], strict=True):
            box = (*answers.anns[number]["bbox"], name, answers.anns[number]["score"])
            image.predicted.append((box, None if ignored else bool(match)))
    return list(images.values())


def _judged(image: _Image, threshold: float) -> Judged:
    kept = [(box, hit) for box, hit in image.predicted if box[-1] >= threshold]
    counted = [hit for _, hit in kept if hit is not None]
    total = len(counted) + len(image.true)
    f1 = 2 * sum(counted) / total if total else 1.0
    return Judged(image.path, tuple(image.true), tuple(box for box, _ in kept), f1)


def _best_threshold(images: Sequence[_Image]) -> float:
    """The score at which F1 over all images is highest; 0.5 where nothing is matched at any."""
    rows = sorted(((box[-1], hit) for one in images for box, hit in one.predicted if hit is not None), reverse=True)
    true, hits, best = sum(len(one.true) for one in images), 0, (0.0, 0.5)
    for kept, (score, hit) in enumerate(rows, 1):
        hits += bool(hit)
        if kept == len(rows) or rows[kept][0] < score:  # boxes of one score stand or fall together
            best = max(best, (2 * hits / (kept + true), score))
    return float(best[1])


def curve(folder: Path) -> dict[str, Any]:
    """Epochs, AP and AP50 that mmengine's validation logged in a run's folder, over however many starts it took.

    And the mean of the training losses that it logged in the last tenth of the epochs; None if that is not finite.
    """
    found: dict[int, tuple[float, float]] = {}
    losses: dict[int, tuple[int, float]] = {}
    for log in sorted(folder.glob("*/vis_data/scalars.json")):
        for line in log.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError):  # a killed run may leave half a line
                told = json.loads(line)
                if "loss" in told and "epoch" in told:
                    losses[int(told["step"])] = int(told["epoch"]), float(told["loss"])
                if "coco/bbox_mAP" in told:
                    ap, ap50 = told["coco/bbox_mAP"], told["coco/bbox_mAP_50"]
                    found[int(told["step"])] = (max(0.0, ap), max(0.0, ap50))  # -1 where there is nothing to find
    each = [found[epoch] for epoch in sorted(found)]
    end = max((epoch for epoch, _ in losses.values()), default=0)
    last = [loss for epoch, loss in losses.values() if epoch > 0.9 * end]
    curves = {"epoch_ap": [ap for ap, _ in each], "epoch_ap50": [ap50 for _, ap50 in each]}
    loss = statistics.fmean(last) if last else math.nan
    return {"epochs": sorted(found), **curves, "loss": loss if math.isfinite(loss) else None}
