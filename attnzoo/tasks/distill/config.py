"""The keys of a distillation: a trained model, the mixers put into some of its layers, and the stages of the repair."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from hashlib import sha256
from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from attnzoo.bench.attentions import AttentionConfig, attention_problems, refuse_expect, refuse_vision_keys
from attnzoo.bench.config import RunConfig, Section, refuse_twins
from attnzoo.tasks.classify.config import AugmentConfig, ClassifyConfig, DataConfig, ModelConfig, Run, Seeds
from attnzoo.tasks.export import Precision

Share = Annotated[float, Field(gt=0, le=1)]
Order = Literal["cheapest", "first", "last", "random"]
SCRATCH = "from scratch"


class VisionConfig(Section):
    """A trained image classifier, and the images that it is repaired on: their classes are not looked at.

    The keys are those of train/classify.py: `weights` of `model` are its ``final/model.safetensors``.
    """

    model: ModelConfig
    data: DataConfig
    augment: AugmentConfig | None = None

    @model_validator(mode="after")
    def _trained(self) -> VisionConfig:
        if not self.model.pretrained and self.model.weights is None:
            raise ValueError("model: give weights or pretrained, for a model of random weights has nothing to repair")
        return self

    def run(self, seed: int, trained: bool = True) -> Run:
        """The training that the model is one of, or would be with random weights."""
        model = self.model if trained else self.model.model_copy(update={"pretrained": False, "weights": None})
        config = ClassifyConfig(name="distill", model=model, data=self.data, augment=self.augment)
        return Run(config, None, "teacher", seed)


class FeaturesConfig(Section):
    """An image encoder without a classifier, and the images that it is repaired on.

    Its features of an image, the class token or the mean of all tokens, are scored by their nearest neighbors: `bank`
    training images vote on the classes of `queries` test images, both drawn at random.
    """

    model: Annotated[
        str, Field(min_length=1, description="an asset, a folder, or a name of the hub, as AutoModel reads it")
    ] = "vit_s14"
    data: DataConfig
    augment: AugmentConfig | None = None
    pool: Literal["class", "mean"] = "class"
    bank: PositiveInt = 2000
    queries: PositiveInt = 1000
    neighbors: PositiveInt = 20

    @model_validator(mode="after")
    def _enough(self) -> FeaturesConfig:
        if self.neighbors > self.bank:
            raise ValueError(f"neighbors: {self.neighbors} cannot vote where bank has {self.bank} images")
        return self


class LanguageConfig(Section):
    """A causal language model, and the text that it is repaired on; the last windows of it are kept for scoring.

    With `needles`, so many prompts of `tokens` tokens are made of the same windows. Each hides a number in its first
    half, which the model is asked for at the end (``evictable`` in `attnzoo.tasks.decode.needles`).
    """

    model: Annotated[str, Field(min_length=1)] = "smollm2_135m_instruct"
    text: Annotated[str, Field(min_length=1)] = "debian_handbook"
    tokens: Annotated[int, Field(ge=2, description="of a sequence that is trained on, and of a window")] = 256
    windows: PositiveInt = 16
    needles: Annotated[int, Field(ge=0, description="prompts that are asked before and after the repair")] = 0


class Layers(Section):
    """Which layers are swapped: a `share` of them, in an `order`.

    ``cheapest`` takes those that `attnzoo.sensitivity` finds to cost least, ``first`` and ``last`` those nearest the
    input and the output, ``random`` others for each seed.
    """

    share: Share
    order: Order = "cheapest"

    @property
    def label(self) -> str:
        """What tables add to the attention's name."""
        return f"{self.share:.0%}" if self.order == "cheapest" or self.share == 1 else f"{self.share:.0%} {self.order}"


class StageConfig(Section):
    """One stage, as `attnzoo.repair` takes it. `samples` are images or sequences, each counted whenever it is seen."""

    objective: Literal["layer", "model"]
    samples: PositiveInt
    lr: PositiveFloat = 1e-3
    train: Literal["mixers", "all"] = "mixers"
    weight_decay: NonNegativeFloat = 0.0
    temperature: PositiveFloat = 1.0
    hidden: NonNegativeFloat = 0.0


class ScratchConfig(Section):
    """The control: the same swapped network from random weights, trained on the classes of as many images.

    There is one for every row, or for those whose share of layers is among `shares`.
    """

    lr: PositiveFloat = 1e-3
    weight_decay: NonNegativeFloat = 0.05
    shares: tuple[Share, ...] | None = None


class RepairedMixer(AttentionConfig):
    """A mixer, or in a language model an eviction policy as a control, which has nothing to repair.

    `init` is how a mixer begins, as `attnzoo.replace_attention` takes it. ``streaming`` with ``sink: 0`` is a sliding
    window. `layers`, `seeds` and `stages` stand in place of the config's.
    """

    init: Literal["random", "inherit"] = "random"
    layers: Annotated[tuple[Layers, ...], Field(min_length=1)] | None = None
    seeds: Seeds | None = None
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)] | None = None
    scratch: Annotated[bool, Field(description="whether the config's `scratch` is for its rows, too")] = True

    @property
    def is_mixer(self) -> bool:
        """Whether it has weights of its own, or may have them."""
        from attnzoo.registry import describe

        return describe(self.name).kind == "mixer"

    @property
    def swap(self) -> dict[str, Any]:
        """What `attnzoo.replace_attention` takes besides model, name and layers."""
        return self.options if self.init == "random" else {**self.options, "init": self.init}


class DistillConfig(RunConfig):
    """Every attention in every choice of layers, repaired in `stages`, and scored `points` times in each stage.

    `workers` rows are measured at a time, each in a process of its own. `autocast` is what repairs compute in. A
    control that is no mixer stands in the layers that are the cheapest of the first mixer among `attentions`. The
    teacher and the repaired model of each row's first seed, image classifiers alone, are also scored in `precisions` by
    ONNX Runtime. With `save_models` each model that this run repairs is saved in ``trials/NAME/model`` of its folder,
    for `attnzoo.load`; rows that were done before are not.
    """

    task: Literal["distill"] = "distill"
    vision: VisionConfig | None = None
    language: LanguageConfig | None = None
    features: FeaturesConfig | None = None
    baseline: Annotated[str, Field(min_length=1, description="the unswapped model's label")] = "teacher"
    attentions: Annotated[tuple[RepairedMixer, ...], Field(min_length=1)]
    layers: Annotated[tuple[Layers, ...], Field(min_length=1)] = (Layers(share=1.0),)
    sensitivity_steps: PositiveInt = 50
    stages: Annotated[tuple[StageConfig, ...], Field(min_length=1)]
    batch: PositiveInt = 64
    points: PositiveInt = 4
    seeds: Seeds = (0,)
    scratch: ScratchConfig | None = None
    precisions: tuple[Precision, ...] = ()
    autocast: Literal["bfloat16"] | None = None
    save_models: bool = False
    workers: PositiveInt = 1
    timeout_seconds: Annotated[PositiveFloat, Field(description="of a row, where several are measured at a time")] = (
        86400.0
    )

    @model_validator(mode="after")
    def _whole(self) -> DistillConfig:
        if sum(part is not None for part in (self.vision, self.language, self.features)) != 1:
            raise ValueError("give one of vision, language and features")
        if self.seed:
            raise ValueError(f"seed: {self.seed} would change nothing; give seeds")
        if self.vision is None and self.scratch is not None:
            raise ValueError("scratch trains on the classes of images; with language and features it is not offered")
        images, part = self.vision or self.features, "vision" if self.vision else "features"
        if images is not None and images.augment is not None and (images.augment.mixes or images.augment.repeats > 1):
            raise ValueError(f"{part}.augment: mixup, cutmix and repeats mean nothing to a repair; leave them out")
        if self.workers > 1 and images is not None and images.data.workers:
            raise ValueError(f"{part}.data.workers: each of several workers reads its images itself; give 0")
        if self.workers > 1 and self.threads is None:
            raise ValueError("threads: say how many each of several workers has; they share the machine")
        if self.precisions and self.vision is None:
            raise ValueError("precisions: image classifiers alone are exported; leave it out")
        if len(set(self.precisions)) < len(self.precisions):
            raise ValueError("precisions: one stands twice")
        refuse_expect(self.attentions)
        refuse_vision_keys(self.attentions)
        for index, attention in enumerate(self.attentions):
            if attention.where is not None:
                raise ValueError(f"attentions.{index}.where: `layers` says which layers are swapped")
        if not any(attention.is_mixer for attention in self.attentions):
            raise ValueError("attentions: there is no mixer among them, and nothing to repair")
        for index, attention in enumerate(self.attentions):
            if self.language is None and not attention.is_mixer:
                raise ValueError(
                    f"attentions.{index}.name: {attention.name!r} is no mixer: an image model has no cache"
                )
            if not attention.is_mixer and (attention.stages or attention.init != "random"):
                raise ValueError(f"attentions.{index}: {attention.name!r} is no mixer: stages and init are for mixers")
        owned = {f"attentions.{index}.stages": one.stages or () for index, one in enumerate(self.attentions)}
        for place, stages in ({"stages": self.stages} | owned).items():
            for index, stage in enumerate(stages):
                where = f"{place}.{index}"
                if stage.samples < self.batch:
                    raise ValueError(f"{where}.samples: {stage.samples} are fewer than a batch of {self.batch}")
                if stage.objective == "layer" and (stage.train == "all" or stage.hidden):
                    raise ValueError(f"{where}: train and hidden are for objective: model")
                if self.features is not None and stage.temperature != 1:
                    raise ValueError(f"{where}.temperature is for logits, which features are not")
        shares = {layers.share for one in self.attentions for layers in one.layers or self.layers}
        wanted = self.scratch.shares if self.scratch is not None else None
        if wanted is not None and not (wanted and set(wanted) <= shares):
            raise ValueError(f"scratch.shares: {list(wanted)} must be among those of layers, {sorted(shares)}")
        labels = [f"{one.label} {layers.label}" for one in self.attentions for layers in one.layers or self.layers]
        refuse_twins([self.baseline, *labels])
        return self

    @classmethod
    def problems(cls, data: Mapping[str, Any]) -> list[str]:
        """What the registry says of the attentions."""
        return attention_problems(data.get("attentions"), "attentions", _mixer_problems)

    @cached_property
    def inputs(self) -> dict[str, Any]:
        """The model, by its weights, and its data, as far as what is measured depends on them."""
        parts = [part for part in ("vision", "language", "features") if part != "features" or self.features is not None]
        how = self.model_dump(mode="json", include={*parts, "batch", "device"})
        for part, of_images in (("vision", self.vision), ("features", self.features)):
            if of_images is not None:
                how[part]["data"] = _data(of_images.data, how[part]["data"])
        if self.vision is not None:
            weights = self.vision.model.weights
            how["vision"]["model"]["weights"] = None if weights is None else sha256(weights.read_bytes()).hexdigest()
        from attnzoo.tasks.decode.cells import contents

        if self.language is not None:
            how["language"] |= {key: contents(getattr(self.language, key)) for key in ("model", "text")}
        if self.features is not None:
            how["features"]["model"] = contents(self.features.model)
        return how

    def seeds_of(self, attention: RepairedMixer) -> tuple[int, ...]:
        """Its own, or those of all."""
        return attention.seeds or self.seeds

    def stages_of(self, attention: RepairedMixer) -> tuple[StageConfig, ...]:
        """Its own, or those of all."""
        return attention.stages or self.stages

    def chosen_by(self, attention: RepairedMixer) -> RepairedMixer:
        """The mixer whose sensitivity chooses the cheapest layers: its own, or of a control that of the first mixer."""
        return attention if attention.is_mixer else next(one for one in self.attentions if one.is_mixer)


def _data(data: DataConfig, said: dict[str, Any]) -> dict[str, Any]:
    """Images, wherever they are: those that no hash stands for by their classes and how many there are."""
    kept = {key: value for key, value in said.items() if key not in ("workers", "path", "root")}
    if data.root is None and (data.path is None or not data.path.is_dir()):
        return kept
    from attnzoo.tasks.classify.sources import open_splits

    splits = open_splits(data)
    classes = splits.classes if splits.names is None else list(splits.names)
    images = [len(part) if hasattr(part, "__len__") else None for part in (splits.train, splits.test)]
    return {**kept, "classes": classes, "images": images}


def _mixer_problems(info: Any, options: Mapping[str, Any], where: str) -> list[str]:
    """A core changes nothing of what the model gives; and options that the method refuses."""
    from attnzoo.errors import AttnZooError

    if info.kind == "core":
        return [f"{where}.name: {info.name!r} is no mixer: it runs on the model's own weights, and needs no repair"]
    try:
        info.check_options({key: value for key, value in options.items() if key not in ("grid", "prefix")})
    except AttnZooError as error:
        return [f"{where}.options: {error}"]
    return []
