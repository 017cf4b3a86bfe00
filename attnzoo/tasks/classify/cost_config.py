"""The benchmark's config of a vision model: the host, what is timed, and the classifier that is trained per row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import permutations
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from attnzoo.bench.config import Dtype, Section, renamed
from attnzoo.checks import not_square
from attnzoo.errors import AttnZooError, ConfigError, OptionError

DatasetName = Literal["digits", "fashion_mnist"]


class HostConfig(Section):
    """A model of a library, given by what its own factory takes; the image size is the benchmark's to choose.

    `channels` and `classes` are those of the images whose cost is measured; a data set has its own.
    """

    library: Literal["timm"] = "timm"
    name: str = "vit_tiny_patch16_224"
    patch_size: PositiveInt = 16
    channels: PositiveInt = 3
    classes: PositiveInt = 1000
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _before(cls, data: Any) -> Any:
        return renamed(data, model="name")

    @model_validator(mode="after")
    def _no_double_meaning(self) -> HostConfig:
        for key in ("img_size", "patch_size"):
            if key in self.options:
                where = "the token counts decide it" if key == "img_size" else "it is a key of the model itself"
                raise ValueError(f"options.{key} cannot be set here: {where}")
        return self


class BaselineConfig(Section):
    """The dense baseline: the host's own attention, untouched, with or without its fused kernel."""

    fused: bool = True
    label: Annotated[str, Field(min_length=1)] = "dense"


class Size(NamedTuple):
    """Images of a size: how many tokens each gives, its height and width in pixels, and how many are in a batch."""

    tokens: int
    pixels: tuple[int, int]
    batch: int


class CostConfig(Section):
    """What is timed, on what inputs, for how long.

    `of` is the whole model, or its first attention layer alone, on the tokens that it gets in the model. With
    `gradient` a call is a forward and a backward. With `keep_freed_memory` the process keeps what is freed while it is
    timed, as with a caching allocator; otherwise CPUs have glibc's own ways. With `equal_parameters` the MLPs
    of each row's model are made wider or narrower until it has as many parameters as the dense one. Give the sizes of
    images either as `tokens`, for square ones, or as `image_sizes` in pixels: 224, or [height, width]. Without either,
    a suite takes 196, 784 and 3,136 tokens, and trained classifiers are timed at the size of their data.
    """

    of: Literal["model", "layer"] = "model"
    gradient: bool = False
    keep_freed_memory: bool = False
    equal_parameters: bool = False

    tokens: tuple[PositiveInt, ...] = ()
    image_sizes: tuple[PositiveInt | tuple[PositiveInt, PositiveInt], ...] = ()
    batch: PositiveInt | dict[int, PositiveInt] = Field(
        default=1, description="images per call; with `tokens`, perhaps a number for each token count"
    )
    dtype: Dtype = "float32"
    repeats: Annotated[int, Field(ge=3)] = 7
    min_seconds: Annotated[float, Field(ge=0)] = 2.0
    warmup: Annotated[int, Field(ge=1)] = 2
    timeout_seconds: PositiveFloat = 120.0

    @model_validator(mode="before")
    @classmethod
    def _one_batch_for_all(cls, data: Any) -> Any:
        if not isinstance(data, Mapping) or not data.get("tokens"):
            return data
        tokens, batch = data["tokens"], data.get("batch", 1)
        if isinstance(batch, int) and not isinstance(batch, bool):
            counts = tokens if isinstance(tokens, (list, tuple)) else [tokens]  # the schema says what is wrong with it
            data = {**data, "batch": {n: batch for n in counts if isinstance(n, int)}}
        return data

    @model_validator(mode="after")
    def _sizes_and_batches_fit(self) -> CostConfig:
        sizes: tuple[Any, ...] = self.tokens or self.image_sizes
        problems = [
            f"tokens: {not_square(n)}, as images given by their tokens are; a config gives those that are not as "
            "image_sizes, in pixels"
            for n in self.tokens
            if math.isqrt(n) ** 2 != n
        ]
        if bool(self.tokens) == bool(self.image_sizes):
            problems.append("give either tokens, or image_sizes in pixels")
        if len(set(sizes)) != len(sizes):
            problems.append(f"{'tokens' if self.tokens else 'image_sizes'}: {list(sizes)} has a size twice")
        if isinstance(self.batch, dict):
            missing, extra = (sorted(a - b) for a, b in permutations((set(self.tokens), set(self.batch))))
            if missing:
                problems.append(f"batch: no batch for token counts {missing}; give one number for all, or one for each")
            if extra:
                problems.append(f"batch: {extra} are not among the token counts {list(self.tokens)}")
        if problems:
            raise ValueError("; ".join(problems))
        return self

    def sizes(self, patch: int) -> list[Size]:
        """All sizes, for a model with patches of `patch` pixels.

        Raises `ConfigError` if the patches do not divide an image.
        """
        sides = [(math.isqrt(n) * patch,) * 2 for n in self.tokens]
        sides += [size if isinstance(size, tuple) else (size, size) for size in self.image_sizes]
        odd = [size for size in self.image_sizes if any(side % patch for side in sides[self.image_sizes.index(size)])]
        if odd:
            raise ConfigError(f"images of {odd} pixels are not divided by patches of {patch}")
        counts = [(height // patch) * (width // patch) for height, width in sides]
        each = self.batch if isinstance(self.batch, dict) else dict.fromkeys(counts, self.batch)
        return [Size(tokens, pixels, each[tokens]) for tokens, pixels in zip(counts, sides, strict=True)]


class RecipeConfig(Section):
    """How a classifier is trained: AdamW, a cosine schedule with warm-up, label smoothing. The same for every row."""

    epochs: PositiveInt = 10
    batch: PositiveInt = 32
    lr: PositiveFloat = 3e-3
    weight_decay: Annotated[float, Field(ge=0)] = 0.05
    warmup_epochs: Annotated[int, Field(ge=0)] = 2
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.05
    clip_grad_norm: PositiveFloat = 1.0

    @model_validator(mode="after")
    def _warm_up_ends(self) -> RecipeConfig:
        if self.warmup_epochs >= self.epochs:
            raise ValueError(f"warmup_epochs {self.warmup_epochs} must be fewer than epochs {self.epochs}")
        return self


class QualityConfig(Section):
    """The classifier that is trained once per attention and seed, and the data it sees.

    `input_std` is the deviation that images are standardized to: the embedding of a patch of one pixel has weights of
    deviation 1, and pixels of deviation 1 would drown position embeddings that begin at 0.02. `workers` trainings run
    at a time, each in a process and with `threads` threads: their seconds are recorded, but are no benchmark.
    With `equal_parameters` the MLPs of each row's model are made wider or narrower until it has as many
    parameters as the dense one.
    """

    dataset: DatasetName = "digits"
    model: HostConfig = HostConfig(
        name="vit_tiny_patch16_224",
        patch_size=1,
        options={"embed_dim": 48, "depth": 2, "num_heads": 3, "weight_init": "jax"},
    )
    recipe: RecipeConfig = RecipeConfig()
    input_std: PositiveFloat = 0.05
    train_images: PositiveInt | None = None
    equal_parameters: bool = False
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    threads: PositiveInt = 1
    workers: PositiveInt = 2
    timeout_seconds: PositiveFloat = 600.0

    @model_validator(mode="before")
    @classmethod
    def _before(cls, data: Any) -> Any:
        return renamed(data, host="model")

    @model_validator(mode="after")
    def _seeds_differ(self) -> QualityConfig:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} has a seed twice")
        return self


def vision_problems(info: Any, options: Mapping[str, Any], where: str) -> list[str]:
    """A policy; unknown options, all of them; or, where all are known, the first value that the method refuses."""
    if info.kind == "eviction":
        return [
            f"{where}.name: {info.name!r} evicts a language model's cache, and here models are called once, without "
            "one: attnzoo measure transformers:NAME, or a folder of save_pretrained, of a model or of its config "
            "alone; or language.attentions of a benchmark"
        ]
    unknown: list[str] = []
    for option in options:
        try:
            info.check_options([option])
        except AttnZooError as error:
            unknown.append(f"{where}.options.{option}: {error}")
    if unknown:
        return unknown
    import attnzoo

    try:
        attnzoo.create_attention(info.name, 64, 4, **options)
    except OptionError as error:
        return [f"{where}.options: {error}"]
    except AttnZooError:
        return []  # a matter of this trial's width, not of the option
    return []
