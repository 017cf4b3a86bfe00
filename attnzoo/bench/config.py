"""The benchmark's config: its schema, and the registry's say on the attentions that it names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)

from attnzoo.bench.strict import RunConfig, Section, Seed, refuse_twins
from attnzoo.errors import AttnZooError, OptionError

Dtype = Literal["float32", "bfloat16", "float16"]
DatasetName = Literal["digits", "fashion_mnist"]
Tokens = Annotated[int, Field(ge=2)]


class HostConfig(Section):
    """A model of a library, given by what its own factory takes; the image size is the benchmark's to choose.

    `channels` and `classes` are those of the images whose cost is measured; a data set has its own.
    """

    library: Literal["timm"] = "timm"
    model: str = "vit_tiny_patch16_224"
    patch_size: PositiveInt = 16
    channels: PositiveInt = 3
    classes: PositiveInt = 1000
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _no_double_meaning(self) -> HostConfig:
        for key in ("img_size", "patch_size"):
            if key in self.options:
                where = "the token counts decide it" if key == "img_size" else "it is a key of the host itself"
                raise ValueError(f"options.{key} cannot be set here: {where}")
        return self


class AttentionConfig(Section):
    """One attention of the zoo: its registered name, its options and how tables call it.

    `fused` chooses another dense baseline for this row than the benchmark's: with the host's fused kernel or without.
    `tokens` are the token counts at which its cost is measured; all by default. `expect` says how it should end: a row
    that is unsupported makes the benchmark exit with 1, unless that is expected.
    """

    name: str
    options: dict[str, Any] = Field(default_factory=dict)
    label: Annotated[str, Field(min_length=1)] = ""
    expect: Literal["ok", "unsupported"] = "ok"
    fused: bool | None = None
    tokens: tuple[PositiveInt, ...] | None = None

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

    @model_serializer(mode="wrap")
    def _leave_out_what_is_expected(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = dump(self)
        _drop_defaults(content, {"expect": "ok"})
        return content


def refuse_vision_keys(attentions: Sequence[AttentionConfig]) -> None:
    """Raise `ValueError` where an attention of a language model has keys that mean something for images alone."""
    for index, attention in enumerate(attentions):
        for key in ("fused", "tokens"):
            if getattr(attention, key) is not None:
                raise ValueError(f"attentions.{index}.{key} is for vision models alone; leave it out")


def refuse_expect(attentions: Sequence[AttentionConfig]) -> None:
    """Raise `ValueError` where an attention says `expect`, and the task refuses what is unsupported before any work."""
    for index, attention in enumerate(attentions):
        if attention.expect != "ok":
            raise ValueError(f"attentions.{index}.expect has no meaning here: what is unsupported is refused at once")


class BaselineConfig(Section):
    """The dense baseline: the host's own attention, untouched, with or without its fused kernel."""

    fused: bool = True
    label: Annotated[str, Field(min_length=1)] = "dense"


class CostConfig(Section):
    """What is timed, on what inputs, for how long.

    `of` is the whole model, or its first attention layer alone, on the tokens that it gets in the model. With
    `gradient` a call is a forward and a backward. With `keep_freed_memory` the process keeps what is freed while it is
    timed, as with a caching allocator; otherwise CPUs have glibc's own ways. With `equal_parameters` the perceptrons
    of each row's model are made wider or narrower until it has as many parameters as the dense one.
    """

    of: Literal["model", "layer"] = "model"
    gradient: bool = False
    keep_freed_memory: bool = False
    equal_parameters: bool = False

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
        if isinstance(batch, int) and not isinstance(batch, bool):
            counts = tokens if isinstance(tokens, (list, tuple)) else [tokens]  # the schema says what is wrong with it
            data = {**data, "batch": {n: batch for n in counts if isinstance(n, int)}}
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
    With `equal_parameters` the perceptrons of each row's model are made wider or narrower until it has as many
    parameters as the dense one.
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
    equal_parameters: bool = False
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0,)
    threads: PositiveInt = 1
    workers: PositiveInt = 2
    timeout_seconds: PositiveFloat = 600.0

    @model_validator(mode="after")
    def _seeds_differ(self) -> QualityConfig:
        if len(set(self.seeds)) != len(self.seeds):
            raise ValueError(f"seeds: {list(self.seeds)} has a seed twice")
        return self


class LanguageCostConfig(Section):
    """What is timed of a language model: prompts of `prompt_tokens`, then `new_tokens` single steps after each.

    A latency of decoding is the mean of the steps after one prompt, so that evictions, which come once in a block, are
    in every one.
    """

    prompt_tokens: Tokens = 1024
    new_tokens: PositiveInt = 64
    batch: PositiveInt = 1
    repeats: Annotated[int, Field(ge=3)] = 3
    timeout_seconds: PositiveFloat = 300.0


class LanguageQualityConfig(Section):
    """Prose scored through the cache: `windows` of `tokens` tokens, each in one call; `workers` rows at a time.

    `canary` is an attention that must be worse than dense by `canary_nats` a token; else what is scored does not depend
    on the cache, and no row of the language model counts.
    """

    windows: Annotated[int, Field(ge=2)] = 8
    tokens: Tokens = 1024
    canary: AttentionConfig = AttentionConfig(name="streaming", options={"budget": 16, "block_size": 16}, label="tiny")
    canary_nats: float = 0.1
    threads: PositiveInt = 1
    workers: PositiveInt = 2
    timeout_seconds: PositiveFloat = 600.0


class LanguageConfig(Section):
    """A causal language model whose cache policies bound, beside the same model with transformers' own cache and SDPA.

    `model` and `text` are names as `load_model` and `load_text` of `attnzoo.tasks.decode` take them.
    """

    model: Annotated[str, Field(min_length=1)] = "smollm2_135m_instruct"
    text: Annotated[str, Field(min_length=1)] = "debian_handbook"
    dtype: Dtype = "float32"
    baseline: Annotated[str, Field(min_length=1, description="the dense baseline's label")] = "dense LLM"
    attentions: Annotated[tuple[AttentionConfig, ...], Field(min_length=1)]
    cost: LanguageCostConfig = LanguageCostConfig()
    quality: LanguageQualityConfig = LanguageQualityConfig()

    @model_validator(mode="after")
    def _labels_differ(self) -> LanguageConfig:
        refuse_vision_keys(self.attentions)
        refuse_twins([self.baseline, *(attention.label for attention in self.attentions)])
        return self

    @property
    def host(self) -> str:
        """What records and tables call the model."""
        return f"transformers:{self.model}"


class BenchConfig(RunConfig):
    """A whole benchmark."""

    seed: Seed = 0
    host: HostConfig = HostConfig()
    baseline: BaselineConfig = BaselineConfig()
    attentions: Annotated[tuple[AttentionConfig, ...], Field(min_length=1)]
    cost: CostConfig = Field(default_factory=lambda: CostConfig.model_validate({}))
    quality: QualityConfig | None = None
    language: LanguageConfig | None = None
    fresh: bool = False

    @model_validator(mode="after")
    def _labels_differ(self) -> BenchConfig:
        refuse_twins([self.baseline.label, *(attention.label for attention in self.attentions)])
        return self

    @property
    def unsupported(self) -> set[tuple[str, str]]:
        """Part and label of the attentions that are expected to be unsupported; both parts may have the same label."""
        parts = {"vision": self.attentions, "language": () if self.language is None else self.language.attentions}
        return {
            (part, attention.label)
            for part, attentions in parts.items()
            for attention in attentions
            if attention.expect == "unsupported"
        }

    def identity(self) -> dict[str, Any]:
        """All that is measured; keys that came later are left out where they say what was so before."""
        content = super().identity()
        if self.language is None:
            del content["language"]
        later = {"of": "model", "gradient": False, "keep_freed_memory": False, "equal_parameters": False}
        _drop_defaults(content["cost"], later)
        _drop_defaults(content["host"], {"channels": 3, "classes": 1000})
        if content["quality"] is not None:
            _drop_defaults(content["quality"], {"equal_parameters": False})
            _drop_defaults(content["quality"]["host"], {"channels": 3, "classes": 1000})
        for attention in [*content["attentions"], *((content.get("language") or {}).get("attentions", ()))]:
            attention.pop("expect", None)  # it changes nothing that is measured
        for attention in content["attentions"]:
            _drop_defaults(attention, {"fused": None, "tokens": None})
        return content

    @classmethod
    def problems(cls, data: Mapping[str, Any]) -> list[str]:
        """What the registry says of the attentions."""
        problems = attention_problems(data.get("attentions"), "attentions", vision_problems)
        language = data.get("language")
        if isinstance(language, Mapping):
            problems += attention_problems(language.get("attentions"), "language.attentions", language_problems)
            quality = language.get("quality")
            if isinstance(quality, Mapping) and "canary" in quality:
                problems += attention_problems([quality["canary"]], "language.quality.canary", language_problems)
            if not problems:
                problems += _block_problems(language)
        return problems


load_config, validate_config = BenchConfig.load, BenchConfig.check


def _drop_defaults(content: dict[str, Any], later: Mapping[str, Any]) -> None:
    """Take keys that came later out where they say what was so before, so that older benchmarks keep their identity."""
    for key, value in later.items():
        if content[key] == value:
            del content[key]


_Ask = Callable[[Any, Mapping[str, Any], str], list[str]]


def attention_problems(attentions: Any, where: str, ask: _Ask) -> list[str]:
    """Ask the registry for every attention named, even where the rest of the config is wrong."""
    import attnzoo

    problems: list[str] = []
    for index, entry in enumerate(attentions if isinstance(attentions, (list, tuple)) else []):
        entry = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            continue
        here = f"{where}.{index}" if where.endswith("attentions") else where
        try:
            info = attnzoo.describe(entry["name"])
        except AttnZooError as error:
            problems.append(f"{here}.name: {error}")
            continue
        options = entry.get("options") or {}
        problems += ask(info, options if isinstance(options, Mapping) else {}, here)
    return problems


def vision_problems(info: Any, options: Mapping[str, Any], where: str) -> list[str]:
    """A policy; unknown options, all of them; or, where all are known, the first value that the method refuses."""
    if info.kind == "eviction":
        return [
            f"{where}.name: {info.name!r} evicts a language model's cache, which this host has not; name it "
            "under language.attentions of a benchmark"
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


def language_problems(info: Any, options: Mapping[str, Any], where: str) -> list[str]:
    """A mixer, or the first option that the method refuses."""
    from attnzoo.registry import build_core, build_policy

    if info.kind == "mixer":
        return [f"{where}.name: {info.name!r} is a mixer, which cannot stand in a trained language model"]
    try:
        (build_policy if info.kind == "eviction" else build_core)(info, dict(options))
    except AttnZooError as error:
        return [f"{where}.options: {error}"]
    return []


def _block_problems(language: Mapping[str, Any]) -> list[str]:
    """Policies whose evictions the timed steps could all miss."""
    import attnzoo
    from attnzoo.registry import build_policy

    try:
        config = LanguageConfig.model_validate(language)
    except ValueError:
        return []  # told elsewhere
    problems = []
    for index, attention in enumerate(config.attentions):
        info = attnzoo.describe(attention.name)
        if info.kind != "eviction":
            continue
        block = build_policy(info, attention.options).block_size
        if config.cost.new_tokens % block:
            problems.append(
                f"language.attentions.{index}.options.block_size: {block} does not divide language.cost.new_tokens "
                f"{config.cost.new_tokens}, so the timed steps would hold too few evictions or too many"
            )
    return problems
