"""Detectors as a task: train/detect.py trains them; this tests them side by side and measures what they cost.

mmengine's Runner owns the loops of training and testing, over any number of processes; of these the main one measures.
"""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, model_validator

from attnzoo import assets, processes
from attnzoo.bench.config import RunConfig, parse_override
from attnzoo.bench.task import Cell, OnProgress, Result, Task
from attnzoo.errors import AttnZooError, ConfigError
from attnzoo.tasks.detect import cost, data, mmcv_ext, page, run, score
from attnzoo.tasks.detect.config import config_of, load_config, plain, seeds_of
from attnzoo.tasks.detect.quality import Branch, Detecting, Detection, Metric, Record

FOLDER = "eval"
OWN = ("name", "imports", "output", "fresh")  # keys that are not mmengine's
SAME_IMAGES = ("data_root", "ann_file", "data_prefix", "indices")


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


class DetectConfig(RunConfig):
    """Detectors side by side, each of one attention.

    `configs` are the paths of mmengine's configs, `overrides` keys to set in all of them, such as
    ``train_cfg.max_epochs=40``. The first whose detector keeps its own attention is the dense baseline of quality. Cost
    is measured of the first one's detector, as its key `cost` says. The device is mmengine's choice, and so are seeds:
    all that were trained are tested.
    """

    task: Literal["detect"] = "detect"
    device: str = Field(default_factory=_device)
    configs: Annotated[tuple[Path, ...], Field(min_length=1)]
    overrides: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _as_mmengine_has_it(self) -> DetectConfig:
        if self.seed:
            raise ValueError("seed: that of a training is mmengine's randomness.seed; all that are there are tested")
        if self.device != _device():
            raise ValueError(f"device: mmengine works on {_device()} here; hide GPUs from it by CUDA_VISIBLE_DEVICES=")
        return self

    @classmethod
    def load(cls, path: str | Path, overrides: Sequence[str] = ()) -> DetectConfig:
        """Read a YAML config; or make one of mmengine's Python configs, of which `overrides` may name further ones."""
        if Path(path).suffix != ".py":
            return super().load(path, overrides)
        own = [word for word in overrides if word.partition("=")[0] in OWN]
        more = [word for word in overrides if "=" not in word and word.endswith(".py")]
        content = {key: value for (key,), value in map(parse_override, own)}
        rest = [word for word in overrides if word not in (*own, *more)]
        name = re.sub(r"[^A-Za-z0-9._-]", "-", f"detect-{Path(path).stem}")
        head = {"name": name, "configs": [str(path), *more], "overrides": rest}
        config = cls.check({**head, **content}, str(path))
        assert config.detectors  # what is wrong with them is said at once
        return config

    @cached_property
    def detectors(self) -> tuple[Any, ...]:
        """Mmengine's configs."""
        return tuple(load_config(path, self.overrides) for path in self.configs)

    @property
    def folder(self) -> Path:
        """Where records and the page go: by default beside the first config's runs."""
        return self.output if self.output is not None else Path(self.detectors[0].work_dir).parent / FOLDER

    @property
    def tested(self) -> list[int]:
        """Places of those of mmengine's configs that have test images."""
        return [place for place, one in enumerate(self.detectors) if one.get("data_root", "") is not None]

    @property
    def variants(self) -> list[cost.Variant]:
        """Attentions of which the cost is measured: not those of configs that say ``cost = None``."""
        asked = cost.read(self.detectors[0])
        timed = [one for one in self.detectors if one.get("cost", asked) is not None]
        return [] if asked is None else cost.variants(asked, [cost.variant_of(one) for one in timed])

    def identity(self) -> dict[str, Any]:
        """What mmengine's configs say, too."""
        return {**super().identity(), "detectors": [plain(one.to_dict()) for one in self.detectors]}

    def to_yaml(self) -> str:
        """The config as YAML; as comments what mmengine's configs say in full."""
        texts = [f"\n{path}\n\n{one.pretty_text}" for path, one in zip(self.configs, self.detectors, strict=True)]
        return super().to_yaml() + "".join(f"# {line}".rstrip() + "\n" for text in texts for line in text.splitlines())


def check(config: DetectConfig) -> None:
    """Refuse, before any work, what cannot be compared, data that are not there, and swaps that cannot be made."""
    tested, variants = [config.detectors[place] for place in config.tested], config.variants
    if not tested and not variants:
        raise ConfigError(f"{config.configs[0]} has neither test images (data_root) nor a cost to measure")
    _check_comparable(tested)
    for one in tested:
        data.prepare(one)
    dense = cost.dense_detector(config.detectors[0], initialized=False) if variants else torch.nn.Identity()
    for variant in variants:
        try:
            cost.swapped(dense, variant, 0)
        except AttnZooError as error:
            raise ConfigError(f"{variant.label}: {error}") from error


def _check_comparable(configs: Sequence[Any]) -> None:
    """Raise `ConfigError` unless all configs have labels of their own and are tested on the same images."""
    for config in configs:
        missing = [key for key in ("test_dataloader", "test_evaluator") if config.get(key) is None]
        if missing:
            raise ConfigError(f"a config tests nothing: it has no {', '.join(missing)}; see configs/detect")
    labels = [cost.variant_of(config).label for config in configs]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise ConfigError(f"two of the configs are called {twice!r}; give one of them another label: label=...")
    tested = {repr([config.test_dataloader.dataset.get(key) for key in SAME_IMAGES]) for config in configs}
    if len(tested) > 1:
        raise ConfigError(f"the configs are tested on different images and cannot be compared: {'; '.join(tested)}")


def plan(config: DetectConfig) -> list[Cell]:
    """A cell of quality per config that tests, of all its seeds; then one of cost per size of image and attention.

    Raises `ConfigError` if a run is not trained to its end, or by another config.
    """
    named = [cost.variant_of(one) for one in config.detectors]
    dense = next((one.label for one in named if one.attention is None), cost.DENSE)
    cells = []
    for place in config.tested:
        detector = config.detectors[place]
        what = {"depends_on": _tested(detector), "asks": {"detector": place}, "renewed": True}
        cells.append(_cell(named[place], dense, detector, kind="quality", stage="test", isolated=False, **what))
    first, asked = config.detectors[0], cost.read(config.detectors[0])
    if asked is None:
        return cells
    empty = cost.dense_detector(first, initialized=False).to("meta")
    shared = {"model": plain(cost.dense_model(first)), "seed": first.randomness.seed, "device": config.device}
    shared |= asked.model_dump(mode="json", exclude={"sizes", "attentions", "timeout_seconds"})
    for size in asked.sizes:
        tokens = cost.count_tokens(empty, size)
        for variant in config.variants:
            asks = {"size": size, "attention": plain(variant.attention)}
            what = {"depends_on": {**shared, **asks}, "asks": asks, "tokens": tokens, "weight": size[0] * size[1]}
            what |= {"workload": f"{size[0]} x {size[1]} pixels", "timeout": asked.timeout_seconds}
            cells.append(_cell(variant, dense, first, kind="cost", stage="cost", threads=asked.threads, **what))
    return cells


def _cell(variant: cost.Variant, dense: str, detector: Any, **more: Any) -> Cell:
    options = dict(variant.attention or {})
    return Cell(
        part="detection",
        label=variant.label,
        attention=options.pop("name", None),
        options=options,
        is_baseline=variant.label == dense,
        host=cost.host_name(detector),
        dtype="float32",
        **more,
    )


def _tested(detector: Any) -> dict[str, Any]:
    """What the scores of a config depend on: its trained weights, and how the test images are read and scored."""
    dataset = detector.test_dataloader.dataset
    found = {key: plain(detector.model.get(key)) for key in ("test_cfg", "data_preprocessor")}
    found |= {"dataset": plain(dataset), "metric": plain(detector.test_evaluator), "annotations": "", "weights": {}}
    for one in seeds_of(detector):
        changed = run.changes(one, run.FITTED)
        if changed:
            raise ConfigError(
                f"{one.work_dir} was trained by another config ({'; '.join(changed[:5])}); train this one first"
            )
        found["weights"][str(one.randomness.seed)] = assets.sha256_of(score.finished(one))
    annotations = data.annotations_of(dataset)
    return {**found, "annotations": assets.sha256_of(annotations)} if annotations.is_file() else found


def prepare(config: DetectConfig, cells: Sequence[Cell]) -> dict[str, Any]:
    """Tell the other processes what is to be tested, and give the first config's text to those that measure cost."""
    tests = processes.from_main([cell.asks["detector"] for cell in cells if cell.kind == "quality"])
    if not tests:
        processes.leave()
    return {"tests": tests, "detector": config.detectors[0].pretty_text}


def assist(config: DetectConfig) -> bool:
    """In a process that is not the main one, test what it tests, of each batch another part; False in the main one."""
    if run.is_main():
        return False
    check(config)
    for place in processes.from_main(list[int]()):
        for one in seeds_of(config.detectors[place]):
            score.predict(one, Path(one.work_dir) / FOLDER)
    return True


def measure(config: DetectConfig, cell: Cell, given: Mapping[str, Any], say: OnProgress) -> Result:
    """Test a trained detector, or measure what an attention costs in the first config's."""
    if cell.kind == "quality":
        return _quality(config, cell, given, say)
    detector = config_of(given["detector"])
    asked = cost.read(detector)
    assert asked is not None
    variant = cost.Variant(cell.label, cell.asks["attention"])
    height, width = cell.asks["size"]
    return cost.measure(detector, asked, variant, (height, width), config.device, say)


def _quality(config: DetectConfig, cell: Cell, given: Mapping[str, Any], say: OnProgress) -> Result:
    place = cell.asks["detector"]
    found = []
    try:
        for one in seeds_of(config.detectors[place]):
            say(f"test {one.work_dir}")
            answers = score.predict(one, Path(one.work_dir) / FOLDER)
            found.append(
                (one, answers.branches, score.scores(answers.true, answers.predicted, answers.files, answers.classes))
            )
    except Exception as error:
        # the others wait: whoever started them all ends them with this one
        if mmcv_ext.load("mmengine.dist").get_world_size() > 1:
            raise SystemExit(f"error: {error}") from error
        if isinstance(error, AttnZooError):
            return Result(status="failed", message=str(error))
        raise
    if place == given["tests"][-1]:
        processes.leave()
    page.draw_boxes(config.folder, cell.label, found[0][-1], answers.classes)
    return Result(status="ok", quality=_detection(config.detectors[place], found))


def _detection(detector: Any, found: Sequence[tuple[Any, tuple[Branch, ...], score.Scores]]) -> Detection:
    """The mean of all seeds."""
    trainings = tuple(
        Detecting.model_validate(
            {**dict(s.metric), "seed": one.randomness.seed, **score.curve(Path(one.work_dir)), "branches": branches}
        )
        for one, branches, s in found
    )
    means: dict[str, Any] = {}
    for name in Metric.model_fields:
        known = [value for one in trainings if (value := getattr(one, name)) is not None]
        means[name] = statistics.fmean(known) if known else None
    first, seeds = found[0][-1], ", ".join(str(one.seed) for one in trainings)
    note = (
        f"COCO's metric by pycocotools on {first.images} images of {detector.test_dataloader.dataset['ann_file']}, "
        f"{detector.train_cfg.get('max_epochs')} epochs, seeds {seeds}; no interval"
    )
    return Detection(**means, images=first.images, boxes=first.boxes, trainings=trainings, note=note)


TASK = Task(
    name="detect",
    ref="attnzoo.tasks.detect.task:TASK",
    config=DetectConfig,
    plan=plan,
    measure=measure,
    prepare=prepare,
    assist=assist,
    check=check,
    record=Record,
    preload=lambda config: cost.PRELOAD,
    plots=page.plots,
    attached=page.boxes,
)
