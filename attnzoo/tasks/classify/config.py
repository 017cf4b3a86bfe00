"""The config of a comparison of classifiers: one model, one data set, one recipe, and the attentions to train with."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from attnzoo import files
from attnzoo.bench.attentions import AttentionConfig, attention_problems, refuse_vision_keys
from attnzoo.bench.config import CONFIG_VERSION, RunConfig, Section, digest, refuse_twins
from attnzoo.tasks.classify.cost_config import CostConfig, vision_problems

# what timm and torchvision call a folder with a folder for each class, and prefixes of timm's other readers
FOLDERS = ("", "folder", "image_folder", "torch/folder", "torch/image_folder")
INTERACTIONS = "attnzoo/interactions"  # see `attnzoo.tasks.classify.interactions`
OF_FILES = ("root", "train", "test", "test_options", "crop_pct")  # what made images do not have
READERS = ("torch", "hfds", "hfids", "tfds", "wds")
IMAGE_SIZE = 224
FINAL, MANIFEST, RESULT, WEIGHTS = "final", "manifest.json", "result.json", "model.safetensors"  # of a trained run
HOW = frozenset({"only", "checkpoint_steps", "keep_checkpoints", "trackers", "resume", "test_batch"})  # no result's
MOST_STD = 10  # more than that is a deviation of pixels from 0 to 255

Share = Annotated[float, Field(ge=0, le=1)]
Pair = tuple[PositiveFloat, PositiveFloat]


def _no_seed_twice(seeds: tuple[int, ...]) -> tuple[int, ...]:
    if len(set(seeds)) < len(seeds):
        raise ValueError("a seed stands twice: the same training would count as two")
    return seeds


Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1), AfterValidator(_no_seed_twice)]


class ModelConfig(Section):
    """The model whose attention is swapped.

    `name` is a model of timm's, or a model type of transformers' (``vit``); with `pretrained`, transformers takes a
    folder or a name of the hub. `options` go to timm's factory, or into transformers' config. Training begins from
    random weights, from the library's own (`pretrained`), or from a file (`weights`: ``.safetensors``, or a state dict
    of PyTorch's, read as weights only). With `new_head` the classifier is left out of that file.
    """

    library: Literal["timm", "transformers"] = "timm"
    name: Annotated[str, Field(min_length=1)] = "vit_tiny_patch16_224"
    options: dict[str, Any] = Field(default_factory=dict)
    pretrained: bool = False
    weights: Path | None = None
    new_head: bool = False

    @model_validator(mode="after")
    def _one_beginning(self) -> ModelConfig:
        if self.pretrained and self.weights is not None:
            raise ValueError("weights and pretrained exclude one another: training begins from one of them")
        if self.new_head and self.weights is None:
            raise ValueError("new_head says what to leave out of a file of `weights`, and there is none")
        for key in ("img_size", "image_size", "in_chans", "num_channels", "num_classes", "num_labels", "pretrained"):
            if key in self.options:
                raise ValueError(f"options.{key} cannot be set here: the data, or a key of the model, decide it")
        if self.weights is not None and not self.weights.is_file():
            inside = " (a folder; give the file of weights in it)" if self.weights.is_dir() else ""
            here = "" if self.weights.is_absolute() or inside else f" in {Path.cwd()}"
            raise ValueError(f"weights: there is no file {str(self.weights)!r}{here}{inside}")
        return self


class DataConfig(Section):
    """Images and their classes.

    Give either the `asset` of this package, or a `root` that has a folder for each split, in it a folder for each class
    (see `attnzoo.tasks.classify.folders`), or what timm's ``create_dataset`` takes: a `name` (``torch/cifar100``,
    ``hfds/...``, ``hfids/...``, ``wds/...``) and `root`; or the `name` ``attnzoo/interactions``. `path` is where an
    asset is that was fetched by hand. `options` go to timm's factory, or say what is made (see
    `attnzoo.tasks.classify.interactions`); for the test images, `test_options` where given. `mean` and `std`
    standardize pixels, which run from 0 to 1; timm's for ImageNet by default.
    """

    asset: Literal["digits", "fashion_mnist", "cifar10"] | None = None
    path: Path | None = None
    name: str = ""
    root: Path | None = None
    train: Annotated[str, Field(min_length=1)] = "train"
    test: Annotated[str, Field(min_length=1)] = "validation"
    options: dict[str, Any] = Field(default_factory=dict)
    test_options: dict[str, Any] | None = None
    classes: Annotated[int, Field(ge=2)] | None = None
    image_size: PositiveInt = IMAGE_SIZE
    channels: Literal[1, 3] = 3
    mean: tuple[float, ...] | None = None
    std: tuple[PositiveFloat, ...] | None = None
    crop_pct: Annotated[float, Field(gt=0, le=1)] = 1.0
    train_images: PositiveInt | None = None
    workers: Annotated[int, Field(ge=0)] = 2

    @model_validator(mode="after")
    def _one_source(self) -> DataConfig:
        if self.asset is not None and (self.name or self.root is not None or self.options):
            raise ValueError("asset excludes name, root and options; an asset that you have lies at `path`")
        if self.asset is None and self.path is not None:
            raise ValueError("path is where an asset lies; a folder of images is `root`")
        if self.asset is None and not self.name and self.root is None:
            raise ValueError("give an asset, a root (a folder with one folder per class), or a name as timm takes it")
        if self.name in FOLDERS[1:] and self.root is None:
            raise ValueError(f"name {self.name!r} is a folder of images: give its root")
        if self.name == INTERACTIONS:
            odd = [key for key in OF_FILES if getattr(self, key) != type(self).model_fields[key].default]
            if odd:
                raise ValueError(f"{', '.join(odd)}: not for {INTERACTIONS}, whose images are made and not read")
        prefix, slash, _ = self.name.partition("/")
        if self.name not in (*FOLDERS, INTERACTIONS) and not (slash and prefix.lower() in READERS):
            raise ValueError(
                f"name {self.name!r} is none that timm takes: it begins with {'/, '.join(READERS)}/; leave it out for "
                f"a folder of images (root), or say {INTERACTIONS}"
            )
        return self

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.channels, self.image_size, self.image_size

    @model_validator(mode="after")
    def _scaled(self) -> DataConfig:
        problems = []
        for key in ("mean", "std"):
            value = getattr(self, key)
            if value is not None and len(value) != self.channels:
                problems.append(f"{key}: {len(value)} values for {self.channels} channels")
        mean, std = self.mean or (), self.std or ()
        if any(m > 1 for m in mean) or any(s > MOST_STD for s in std):
            given = {key: list(value) for key, value in (("mean", mean), ("std", std)) if value}
            by_255 = {key: [round(v / 255, 4) for v in value] for key, value in given.items()}
            told, meant = (", ".join(f"{key} {value}" for key, value in each.items()) for each in (given, by_255))
            problems.append(f"{told}: pixels run from 0 to 1, not to 255; over 255 that is {meant}")
        elif any(m < 0 for m in mean):
            problems.append(f"mean {list(mean)}: pixels run from 0 to 1, so no mean is negative")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class AugmentConfig(Section):
    """Augmentation, by the names and the meaning that timm's ``create_transform`` and ``Mixup`` give them."""

    crop: Literal["rrc", "rkrc", "rkrr"] = "rrc"
    scale: Pair = (0.08, 1.0)
    ratio: Pair = (3 / 4, 4 / 3)
    hflip: Share = 0.5
    vflip: Share = 0.0
    color_jitter: Annotated[float, Field(ge=0)] = 0.0
    auto_augment: str | None = None
    interpolation: Literal["bilinear", "bicubic", "random"] = "bicubic"
    re_prob: Share = 0.0
    re_mode: Literal["const", "rand", "pixel"] = "pixel"
    re_count: PositiveInt = 1
    mixup: Annotated[float, Field(ge=0)] = 0.0
    cutmix: Annotated[float, Field(ge=0)] = 0.0
    mixup_prob: Share = 1.0
    mixup_switch_prob: Share = 0.5
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    repeats: Annotated[PositiveInt, Field(description="copies of an image in a row, each augmented independently")] = 1

    @model_validator(mode="after")
    def _in_order(self) -> AugmentConfig:
        for key in ("scale", "ratio"):
            low, high = getattr(self, key)
            if low > high:
                raise ValueError(f"{key}: [{low}, {high}] must be [least, most]")
        if self.crop == "rrc" and self.scale[1] > 1:
            raise ValueError(f"scale: {list(self.scale)} are parts of the image's area, at most 1")
        return self

    @property
    def mixes(self) -> bool:
        """Whether images are mixed with one another."""
        return self.mixup > 0 or self.cutmix > 0


class RecipeConfig(Section):
    """How to train: an optimizer of timm's, a cosine schedule with linear warm-up.

    `batch` counts the images of one step over all processes and over the `accumulate` parts that each is cut into.
    `warmup_epochs` is 0 by default where there is one epoch alone.
    """

    epochs: PositiveInt = 10
    batch: PositiveInt = 64
    accumulate: PositiveInt = 1
    optimizer: Annotated[str, Field(min_length=1)] = "adamw"
    optimizer_options: dict[str, Any] = Field(default_factory=dict)
    lr: PositiveFloat = 1e-3
    min_lr: Annotated[float, Field(ge=0)] = 1e-5
    warmup_lr: Annotated[float, Field(ge=0)] = 1e-6
    warmup_epochs: Annotated[float, Field(ge=0)] = 1
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    clip_grad_norm: PositiveFloat | None = None
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _warm(cls, data: Any) -> Any:
        """A single epoch has no warm-up, unless one is asked for."""
        if isinstance(data, Mapping) and data.get("epochs") == 1:
            return {"warmup_epochs": 0, **data}
        return data

    @model_validator(mode="after")
    def _fits(self) -> RecipeConfig:
        problems = []
        if self.warmup_epochs >= self.epochs:
            problems.append(f"warmup_epochs {self.warmup_epochs} must be fewer than epochs {self.epochs}")
        if self.batch % self.accumulate:
            problems.append(f"accumulate {self.accumulate} does not divide batch {self.batch}")
        if problems:
            raise ValueError("; ".join(problems))
        return self


class TrainedAttention(AttentionConfig):
    """An attention to train with; `seeds` are its own where it is not trained with those of all."""

    seeds: Seeds | None = None


class ClassifyConfig(RunConfig):
    """A whole comparison. Where and how it is run is not part of its identity: see `Run.hash`.

    `costs` are timed of the models that are trained, with random weights; without sizes of their own, at the data's
    `image_size`, and with `equal_parameters` where the trained models have them. `test_batch` test images are evaluated
    at a time.
    """

    task: Literal["classify"] = "classify"
    model: ModelConfig = ModelConfig()
    data: DataConfig
    augment: AugmentConfig | None = None
    recipe: RecipeConfig = RecipeConfig()
    precision: Literal["no", "bf16", "fp16"] = "no"
    equal_parameters: bool = False
    baseline: Annotated[str, Field(min_length=1, description="the dense baseline's label")] = "dense"
    attentions: tuple[TrainedAttention, ...] = ()
    seeds: Seeds = (0,)
    costs: tuple[CostConfig, ...] = ()
    test_batch: PositiveInt = 256

    only: tuple[str, ...] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    checkpoint_steps: PositiveInt | None = None
    keep_checkpoints: Annotated[int, Field(ge=2)] = 2
    trackers: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    resume: Literal["auto", "never"] = "auto"

    @model_validator(mode="before")
    @classmethod
    def _sizes_of_costs(cls, data: Any) -> Any:
        """Fill in what costs take from the rest."""
        costs = data.get("costs") if isinstance(data, Mapping) else None
        if not isinstance(costs, (list, tuple)) or not all(isinstance(cost, Mapping) for cost in costs):
            return data
        images = data.get("data") if isinstance(data.get("data"), Mapping) else {}
        shared = {"equal_parameters": data.get("equal_parameters", False)}
        size = {"image_sizes": [images.get("image_size", IMAGE_SIZE)]}
        sized = [{**({} if "tokens" in cost or "image_sizes" in cost else size), **shared, **cost} for cost in costs]
        return {**data, "costs": sized}

    @model_validator(mode="after")
    def _fits(self) -> ClassifyConfig:
        labels = [self.baseline, *(attention.label for attention in self.attentions)]
        refuse_twins(labels)
        refuse_vision_keys(self.attentions)
        folders = [slug(label) for label in labels]
        twins = sorted({label for label in labels if folders.count(slug(label)) > 1})
        if twins:
            raise ValueError(f"labels {twins} would share a folder; set labels that differ in letters or digits")
        unknown = sorted(set(self.only or ()) - set(labels))
        if unknown:
            raise ValueError(f"only: {unknown} are not among the labels {labels}")
        if self.equal_parameters and (self.model.library != "timm" or self.model.pretrained or self.model.weights):
            raise ValueError(
                "equal_parameters changes the width of the MLPs: for timm models from random weights alone"
            )
        if self.costs and self.model.library != "timm":
            raise ValueError("costs are measured of timm models alone; leave them out")
        augment = self.augment
        if augment is not None and augment.auto_augment and self.data.channels == 1:
            raise ValueError("augment.auto_augment is for images of 3 channels")
        if augment is not None and self.data.name == INTERACTIONS:
            raise ValueError(f"augment would change the cells of {INTERACTIONS} that its classes are made of")
        if augment is not None and augment.mixes and self.recipe.batch // self.recipe.accumulate % 2:
            raise ValueError(f"augment.mixup and cutmix pair images, and a part of batch {self.recipe.batch} is odd")
        return self

    def runs(self) -> list[Run]:
        """All trainings, the dense baseline's first, but for those that `only` leaves out."""
        runs = [Run(self, None, self.baseline, seed) for seed in self.seeds]
        for attention in self.attentions:
            runs += [Run(self, attention, attention.label, seed) for seed in attention.seeds or self.seeds]
        return [run for run in runs if self.only is None or run.label in self.only]

    def identity(self) -> dict[str, Any]:
        """Everything that the results of an evaluation depend on, but for the weights that were trained."""
        return {key: value for key, value in super().identity().items() if key not in HOW}

    @property
    def used_device(self) -> str:
        """A CUDA device where there is one, unless `device` says something else."""
        return ("cuda" if torch.cuda.is_available() else "cpu") if self.device == "auto" else self.device

    @classmethod
    def problems(cls, data: Mapping[str, Any]) -> list[str]:
        """What the registry says of the attentions."""
        return attention_problems(data.get("attentions"), "attentions", vision_problems)


load_config, validate_config = ClassifyConfig.load, ClassifyConfig.check


@dataclass(frozen=True)
class Run:
    """One training: an attention (None: the model's own) and a seed."""

    config: ClassifyConfig
    attention: TrainedAttention | None
    label: str
    seed: int

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{slug(self.label)}-seed{self.seed}"

    @property
    def folder(self) -> Path:
        """Where its checkpoints and result go."""
        return self.config.folder / self.name

    @property
    def final(self) -> Path:
        """Where its weights and result are, once it is trained."""
        return self.folder / FINAL

    @property
    def result(self) -> dict[str, Any]:
        """What training wrote at its end."""
        return files.read_json(self.final / RESULT)

    @property
    def weights(self) -> str | None:
        """SHA-256 of the trained weights, as written beside them; None where it is not trained yet."""
        try:
            return str(files.read_json(self.final / MANIFEST)["files"][WEIGHTS][1])
        except (OSError, ValueError, KeyError, TypeError):
            return None

    @property
    def hash(self) -> str:
        """16 hex digits over the `identity`."""
        return digest(self.identity)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that the weights depend on; other attentions of the config are not in it."""
        config, spec = self.config, self.attention
        where = [spec.where] if spec is not None and spec.where is not None else []  # which came later
        content = {
            "version": CONFIG_VERSION,
            **config.model_dump(mode="json", include={"model", "data", "augment", "recipe", "precision"}),
            "equal_parameters": config.equal_parameters,
            "attention": None if spec is None else [spec.name, spec.options, *where],
            "seed": self.seed,
        }
        for key in ("workers", "path", "root"):
            del content["data"][key]
        return content


def slug(label: str) -> str:
    """A label as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-") or "x"
