"""The benchmark's config: a strict schema, dotted overrides, and one error that lists everything wrong at once."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from attnzoo.errors import AttnZooError, ConfigError, OptionError

CONFIG_VERSION = 1
NOT_HASHED = frozenset({"output", "fresh"})

Dtype = Literal["float32", "bfloat16", "float16"]
DatasetName = Literal["digits", "fashion_mnist"]


class Section(BaseModel):
    """A part of the config: unknown keys are refused and values cannot change later."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class HostConfig(Section):
    """A model of a library, given by what its own factory takes; the image size is the benchmark's to choose."""

    library: Literal["timm"] = "timm"
    model: str = "vit_tiny_patch16_224"
    patch_size: PositiveInt = 16
    options: dict[str, Any] = {}

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
    options: dict[str, Any] = {}
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
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"config {str(path)!r} cannot be read: {error.strerror}") from error
    try:
        data = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values at the top, got {type(data).__name__}")
    for override in overrides:
        keys, value = parse_override(override)
        _set(data, keys, value, override)
    return validate_config(data, source=str(path))


def validate_config(data: Mapping[str, Any], source: str = "config") -> BenchConfig:
    """Check plain data against the schema and the registry of attentions.

    Raises
    ------
    ConfigError
        With every problem, one a line.
    """
    problems: list[str] = []
    config = None
    try:
        config = BenchConfig.model_validate(data)
    except ValidationError as error:
        problems += [_explain(detail) for detail in error.errors()]
    problems += _attention_problems(data.get("attentions"))
    if problems or config is None:
        count = f"{len(problems)} error{'s' if len(problems) > 1 else ''}"
        raise ConfigError("\n".join([f"{source}: {count}", *(f"  {problem}" for problem in problems)]))
    return config


def parse_override(text: str) -> tuple[list[str], Any]:
    """Split ``a.b=value`` into its keys and its value, read as YAML.

    Raises
    ------
    ConfigError
        If there is no ``=``, a key is empty, or the value is not YAML.
    """
    dotted, equals, raw = text.partition("=")
    keys = dotted.strip().split(".")
    if not equals or not all(keys):
        raise ConfigError(f"override {text!r} must read key=value, with dots between nested keys")
    try:
        return keys, yaml.load(raw, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {error}") from error


class _StrictLoader(yaml.SafeLoader):
    """YAML in which a key that stands twice is an error, not a silent overwrite."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if isinstance(key, (str, int, float)) and key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} stands twice", key_node.start_mark)
            if isinstance(key, (str, int, float)):
                seen.add(key)
        return super().construct_mapping(node, deep=deep)


def _set(data: dict[str, Any], keys: list[str], value: Any, override: str) -> None:
    """Put `value` at the path `keys`, making mappings on the way where there is nothing yet."""
    here: Any = data
    for depth, key in enumerate(keys):
        last = depth == len(keys) - 1
        if isinstance(here, list):
            if not key.isdigit() or int(key) >= len(here):
                path = ".".join(keys[:depth])
                raise ConfigError(f"override {override!r}: {path} is a list of {len(here)}; {key!r} is not an index")
            slot: Any = int(key)
        elif isinstance(here, dict):
            slot = next((known for known in here if str(known) == key), key)
        else:
            path = ".".join(keys[:depth])
            raise ConfigError(f"override {override!r}: {path} is {here!r} and has no keys inside")
        if last:
            here[slot] = value
            return
        if isinstance(here, dict) and here.get(slot) is None:
            here[slot] = {}
        here = here[slot]


def _explain(detail: Any) -> str:
    """One line for one of pydantic's error details."""
    location = [part for part in detail["loc"] if part != "[key]"]
    where = ".".join(map(str, location)) or "config"
    kind = detail["type"]
    if kind == "extra_forbidden":
        section = _section_at(location[:-1])
        known = list(section.model_fields) if section else []
        close = difflib.get_close_matches(str(location[-1]), known, n=1)
        return f"{where}: unknown key; " + (f"did you mean {close[0]!r}?" if close else f"known: {', '.join(known)}")
    if kind == "missing":
        return f"{where}: must be given"
    message = detail["msg"].removeprefix("Value error, ")
    if kind == "value_error":
        return f"{where}: {message}"
    shown = repr(detail["input"])
    return f"{where}: {shown if len(shown) <= 80 else shown[:77] + '...'} is not allowed; {_lower_first(message)}"


def _section_at(location: Iterable[str | int]) -> type[BaseModel] | None:
    """Find the section of the schema that a location of pydantic's points into."""
    here: Any = BenchConfig
    for part in location:
        if isinstance(part, int):
            continue
        if not (isinstance(here, type) and issubclass(here, BaseModel)) or part not in here.model_fields:
            return None
        here = _section_in(here.model_fields[part].annotation)
    return here if isinstance(here, type) and issubclass(here, BaseModel) else None


def _section_in(annotation: Any) -> Any:
    """Find the section class inside ``X | None`` or ``tuple[X, ...]``."""
    if get_origin(annotation) in (tuple, list, Union, UnionType, Annotated):
        return next((found for argument in get_args(annotation) if (found := _section_in(argument))), None)
    return annotation if isinstance(annotation, type) and issubclass(annotation, BaseModel) else None


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


def _lower_first(text: str) -> str:
    return text[:1].lower() + text[1:]
