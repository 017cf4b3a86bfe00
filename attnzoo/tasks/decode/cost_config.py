"""The benchmark's config of a language model: what is timed, and the prose that is scored through its cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from attnzoo.bench.attentions import AttentionConfig
from attnzoo.bench.config import Dtype, Section, refuse_twins
from attnzoo.errors import AttnZooError

Tokens = Annotated[int, Field(ge=2)]


def refuse_vision_keys(attentions: Sequence[AttentionConfig]) -> None:
    """Raise `ValueError` where an attention of a language model has keys that mean something for images alone."""
    for index, attention in enumerate(attentions):
        for key in ("fused", "tokens"):
            if getattr(attention, key) is not None:
                raise ValueError(f"attentions.{index}.{key} is for vision models alone; leave it out")


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
    """A causal language model whose cache policies bound, against the same model with transformers' own cache and SDPA.

    With ``quality: null`` nothing is scored, as for a model of random weights, whose canary proves nothing. `model` and
    `text` are names as `load_model` and `load_text` of `attnzoo.tasks.decode` take them.
    """

    model: Annotated[str, Field(min_length=1)] = "smollm2_135m_instruct"
    text: Annotated[str, Field(min_length=1)] = "debian_handbook"
    dtype: Dtype = "float32"
    baseline: Annotated[str, Field(min_length=1, description="the dense baseline's label")] = "dense LLM"
    attentions: Annotated[tuple[AttentionConfig, ...], Field(min_length=1)]
    cost: LanguageCostConfig = LanguageCostConfig()
    quality: LanguageQualityConfig | None = LanguageQualityConfig()

    @model_validator(mode="after")
    def _labels_differ(self) -> LanguageConfig:
        refuse_vision_keys(self.attentions)
        refuse_twins([self.baseline, *(attention.label for attention in self.attentions)])
        return self

    @property
    def host(self) -> str:
        """What records and tables call the model."""
        return f"transformers:{self.model}"


def block_problems(language: Mapping[str, Any]) -> list[str]:
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


def language_problems(info: Any, options: Mapping[str, Any], where: str) -> list[str]:
    """A mixer, or the first option that the method refuses."""
    from attnzoo.registry import build_core, build_policy

    if info.kind == "mixer":
        return [f"{where}.name: {info.name!r} is a mixer, which a trained language model does not support"]
    try:
        (build_policy if info.kind == "eviction" else build_core)(info, dict(options))
    except AttnZooError as error:
        return [f"{where}.options: {error}"]
    return []
