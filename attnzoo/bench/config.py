"""The benchmark's config: its schema, and the registry's say on the attentions that it names."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from attnzoo.bench.strict import Section, read_yaml, validated
from attnzoo.errors import AttnZooError, OptionError

CONFIG_VERSION = 1
NOT_HASHED = frozenset({"output", "fresh"})

Dtype = Literal["float32", "bfloat16", "float16"]
DatasetName = Literal["digits", "fashion_mnist"]


class HostConfig(Section):
    """A model of a library, given by what its own factory takes; the image size is the benchmark's to choose."""

    library: Literal["timm"] = "timm"
    model: str = "vit_tiny_patch16_224"
    patch_size: PositiveInt = 16
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _no_double_meaning(self) -> HostConfig:
        for key in ("img_size", "patch_size"):
            if key in self.options:
                where = "the token counts decide it" if key == "img_size" else "it is a key of the host itself"
                raise ValueError(f"options.{key} cannot be set here: {where}")
        return self


class AttentionConfig(Section):
    """One attention of the zoo: its registered name, its options and how tables call it."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    label: Annotated[str, Field(min_length=1)] = ""

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        if isinstance(data, str):
            data = {"name": data}
        if isinstance(data, Mapping) and isinstance(data.get("name"), str) and data.get("label") is None:
            options = data.get("options") or {}
            listed = [f"{key}={value}" for key, value in options.items()] if isinstance(options, Mapping) else []
            data = {**data, "label": " ".join([data["name"], *listed])}
        return data


class BaselineConfig(Section):
    """The dense baseline: the host's own attention, untouched, with or without its fused kernel."""

    fused: bool = True
    label: Annotated[str, Field(min_length=1)] = "dense"


class CostConfig(Section):
    """What is timed, on what inputs, for how long."""

    tokens: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (196, 784, 3136)
    batch: dict[int, PositiveInt] = Field(default_factory=dict, description="images per forward, for each token count")
    dtype: Dtype = "float32"
    repeats: Annotated[int, Field(ge=3)] = 7
    min_seconds: Annotated[float, Field(ge=0)] = 2.0
    warmup: Annotated[int, Field(ge=1)] = 2
    timeout_seconds: PositiveFloat = 120.0

    @model_validator(mode="before")
    @classmethod
    def _one_batch_for_all(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        tokens = data.get("tokens", cls.model_fields["tokens"].default)
        batch = data.get("batch", 1)
        if isinstance(batch, int) and not isinstance(batch, bool) and isinstance(tokens, (list, tuple)):
            data = {**data, "batch": {n: batch for n in tokens if isinstance(n, int)}}
        return data

    @model_validator(mode="after")
    def _tokens_and_batches_fit(self) -> CostConfig:
        problems = [
            f"tokens: {n} is not a square, and images are square" for n in self.tokens if math.isqrt(n) ** 2 != n
        ]
        if len(set(self.tokens)) != len(self.tokens):
            problems.append(f"tokens: {list(self.tokens)} has a count twice")
        missing = sorted(set(self.tokens) - set(self.batch))
        extra = sorted(set(self.batch) - set(self.tokens))
        if missing:
            problems.append(f"batch: no batch for token counts {missing}; give one number for all, or one for each")
        if extra:
            problems.append(f"batch: {extra} are not among the token counts {list(self.tokens)}")
        if problems:
            raise ValueError("; ".join(problems))
        return self


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

    `input_std` is the deviation that images are standardised to: the embedding of a patch of one pixel has weights of
    deviation 1, and pixels of deviation 1 would drown position embeddings that begin at 0.02. `workers` trainings run
    at a time, each in a process and with `threads` threads: their seconds are recorded, but are no benchmark.
    """

    dataset: DatasetName = "digits"
    host: HostConfig = HostConfig(
        model="vit_tiny_patch16_224",
        patch_size=1,
        options={"embed_dim": 48, "depth": 2, "num_heads": 3, "weight_init": "jax"},
    )
    recipe: RecipeConfig = RecipeConfig()
    input_std: PositiveFloat = 0.05
    train_images: PositiveInt | None = None
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    threads: PositiveInt = 1
    workers: PositiveInt = 2
    timeout_seconds: PositiveFloat = 600.0

    @model_validator(mode="after")
    def _seeds_differ(self) -> QualityConfig:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} has a seed twice")
        return self


class BenchConfig(Section):
    """A whole benchmark. `output` and `fresh` say where and how to write and are no part of its identity."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0)] = 0
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    threads: PositiveInt | None = None
    host: HostConfig = HostConfig()
    baseline: BaselineConfig = BaselineConfig()
    attentions: Annotated[tuple[AttentionConfig, ...], Field(min_length=1)]
    cost: CostConfig = Field(default_factory=lambda: CostConfig.model_validate({}))
    quality: QualityConfig | None = None
    output: Path | None = None
    fresh: bool = False

    @model_validator(mode="after")
    def _labels_differ(self) -> BenchConfig:
        labels = [self.baseline.label, *(attention.label for attention in self.attentions)]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"labels must differ, but {twice} stand for more than one row; set `label`")
        return self

    @property
    def folder(self) -> Path:
        """Where records and the page go."""
        return self.output if self.output is not None else Path("runs") / self.name

    @property
    def hash(self) -> str:
        """Identity of the benchmark: 16 hex digits over its full content, defaults and overrides included."""
        content = {"config_version": CONFIG_VERSION, **self.model_dump(mode="json", exclude=set(NOT_HASHED))}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The whole config, defaults and overrides included, as YAML that `load_config` reads back."""
        content = self.model_dump(mode="json", exclude=set(NOT_HASHED))
        return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> BenchConfig:
    """Read a YAML config, apply ``key=value`` overrides and check it.

    Parameters
    ----------
    path
        A YAML file.
    overrides
        ``dotted.key=value``, the value in YAML; numbers reach into lists, as in ``attentions.0.options.degree=3``.

    Raises
    ------
    ConfigError
        With every problem of file and overrides that could be found, one a line.
    """
    return validate_config(read_yaml(path, overrides), source=str(path))


def validate_config(data: Mapping[str, Any], source: str = "config") -> BenchConfig:
    """Check plain data against the schema and the registry of attentions.

    Raises
    ------
    ConfigError
        With every problem, one a line.
    """
    return validated(BenchConfig, data, _attention_problems(data.get("attentions")), source)


def _attention_problems(attentions: Any) -> list[str]:
    """Ask the registry for every attention named, even where the rest of the config is wrong."""
    import attnzoo

    problems: list[str] = []
    for index, entry in enumerate(attentions if isinstance(attentions, (list, tuple)) else []):
        entry = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            continue
        try:
            info = attnzoo.describe(entry["name"])
        except AttnZooError as error:
            problems.append(f"attentions.{index}.name: {error}")
            continue
        if info.kind == "eviction":
            problems.append(
                f"attentions.{index}.name: {info.name!r} evicts a language model's cache; not for this host"
            )
            continue
        options = entry.get("options") or {}
        if isinstance(options, Mapping):
            problems += _option_problems(info, options, f"attentions.{index}.options")
    return problems


def _option_problems(info: Any, options: Mapping[str, Any], where: str) -> list[str]:
    """Unknown options, all of them; or, where all are known, the first value that the method refuses."""
    unknown: list[str] = []
    for option in options:
        try:
            info.check_options([option])
        except AttnZooError as error:
            unknown.append(f"{where}.{option}: {error}")
    if unknown:
        return unknown
    import attnzoo

    try:
        attnzoo.create_attention(info.name, 64, 4, **options)
    except OptionError as error:
        return [f"{where}: {error}"]
    except AttnZooError:
        return []  # a matter of this trial's width, not of the option
    return []
