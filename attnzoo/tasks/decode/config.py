"""The keys of a language model: the text that it reads, and what is measured of the policies that bound its cache."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, ValidationError, model_validator

from attnzoo.bench.attentions import AttentionConfig, attention_problems, refuse_vision_keys
from attnzoo.bench.config import Dtype, RunConfig, Section, refuse_twins
from attnzoo.errors import AttnZooError
from attnzoo.tasks.decode.needles import KINDS, Kind

Tokens = Annotated[int, Field(ge=2)]
OLD_NAMES = {
    "quality": "quality is now nll (windows, tokens, timeout_seconds) and canary (quality.canary: canary.tiny, "
    "quality.canary_nats: canary.worse_by), with threads and workers beside them",
    "cost.batch": "cost.batch is now cost.batches, a list",
}


class NllConfig(Section):
    """Windows of the text, each scored through the cache in one call.

    With `scored` the last so many tokens alone count: those before are read first, as a prompt, and then evicted where
    a policy waits for its end (``schedule: prompt``), which needs this. With `step` they are put in so many at a time:
    1 decodes them through the cache, one call per token, as the text has them. `kl` measures how far each policy's
    predictions are from dense's, too, for which the dense model reads every window once more beside each policy.
    """

    windows: PositiveInt = 20
    tokens: Tokens = 2000
    scored: PositiveInt | None = None
    step: PositiveInt | None = Field(default=None, description="all in one call if null")
    kl: bool = False
    timeout_seconds: PositiveFloat = 7200.0


class RetrievalConfig(Section):
    """Needle prompts: their length, and how many of each kind (`TASKS` of `attnzoo.tasks.decode.needles`)."""

    tokens: Tokens = 2000
    samples: Annotated[dict[Kind, PositiveInt], Field(min_length=1)]
    timeout_seconds: PositiveFloat = 7200.0

    @property
    def counts(self) -> list[tuple[Kind, int]]:
        """Kinds and how many of each, in one order whatever the config's."""
        return [(kind, self.samples[kind]) for kind in KINDS if kind in self.samples]


class DecodeCostConfig(Section):
    """What is timed: prompts of each length, then `new_tokens` single steps after each, for each batch size.

    A latency of decoding is the mean of the steps after one prompt, so that evictions, which come once in a block, are
    in every one. Prompts are read at the first batch size; larger ones, multiples of it, decode on from its caches,
    each row repeated, so that a long prompt need not be read as many times over.
    """

    prompt_tokens: Tokens | Annotated[tuple[Tokens, ...], Field(min_length=1)] = 1024
    new_tokens: PositiveInt = 128
    batches: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1,)
    repeats: Annotated[int, Field(ge=3)] = 3
    timeout_seconds: PositiveFloat = 3600.0

    @model_validator(mode="after")
    def _multiples(self) -> DecodeCostConfig:
        if any(batch % self.batches[0] for batch in self.batches):
            raise ValueError(f"batches: {list(self.batches)} must all be multiples of the first")
        if len(set(self.lengths)) != len(self.lengths):
            raise ValueError(f"prompt_tokens: {list(self.lengths)} has a length twice")
        return self

    @property
    def lengths(self) -> tuple[int, ...]:
        """Of the prompts, one or several."""
        return self.prompt_tokens if isinstance(self.prompt_tokens, tuple) else (self.prompt_tokens,)


class CanaryConfig(Section):
    """Checks on the first `windows` windows, without which no row of the language model counts.

    The attention `tiny` must make the mean NLL worse than dense by `worse_by` nats per token or more, or what is scored
    does not depend on the cache; every attention, given a budget that nothing exceeds, must give the dense model's NLL.
    """

    windows: PositiveInt = 2
    tiny: AttentionConfig = AttentionConfig(
        name="streaming", options={"budget": 16, "block_size": 16}, label="streaming, tiny"
    )
    worse_by: float = 0.1


class Setting(Section):
    """Options that are given to every attention, and what they add to its label."""

    label: Annotated[str, Field(min_length=1)]
    options: dict[str, Any]


class LanguageConfig(Section):
    """A causal language model whose cache policies bound, against the same model with transformers' own cache.

    With a `grid` of settings every attention is measured once in each of them. `pairs` are rows that are set against
    each other on the same windows and prompts, by their labels: ``[caote, h2o]`` stands for these two rows, and for all
    that begin so and end alike, such as ``caote 512`` and ``h2o 512``.
    """

    model: Annotated[str, Field(min_length=1)] = "smollm2_135m_instruct"
    dtype: Dtype = "float32"
    attention: Literal["sdpa", "eager"] = "sdpa"
    text: Annotated[str, Field(min_length=1)] | None = "debian_handbook"
    baseline: Annotated[str, Field(min_length=1, description="the dense baseline's label")] = "dense"
    attentions: Annotated[tuple[AttentionConfig, ...], Field(min_length=1)]
    grid: tuple[Setting, ...] = Field(default=(), exclude=True)  # in `attentions`, once it is read
    nll: NllConfig | None = NllConfig()
    retrieval: RetrievalConfig | None = None
    cost: DecodeCostConfig | None = None
    canary: CanaryConfig = CanaryConfig()
    pairs: tuple[tuple[str, str], ...] = ()
    workers: PositiveInt = 1

    @model_validator(mode="before")
    @classmethod
    def _names_of_today(cls, data: Any) -> Any:
        cost = data.get("cost") if isinstance(data, Mapping) else None
        found = {*(data if isinstance(data, Mapping) else ()), *(f"cost.{key}" for key in cost or {})}
        if old := [told for name, told in OLD_NAMES.items() if name in found]:
            raise ValueError("; ".join(old))
        return {**data, "attentions": in_each_setting(data)} if isinstance(data, Mapping) and data.get("grid") else data

    @model_validator(mode="after")
    def _rows_and_windows_fit(self) -> LanguageConfig:
        refuse_vision_keys((*self.attentions, self.canary.tiny))
        labels = [self.baseline, *(attention.label for attention in self.attentions)]
        refuse_twins(labels)
        for index, pair in enumerate(self.pairs):
            if pair[0] == pair[1] or not paired_labels([pair], labels):
                told = f"pairs.{index}: no two rows are {pair[0]!r} and {pair[1]!r}, or begin so and end alike"
                raise ValueError(f"{told}; rows: {', '.join(labels)}")
        if self.text is None and self.nll is not None:
            raise ValueError("text must be given for nll; where only the cost is measured, set nll to null")
        if self.nll is None and self.retrieval is not None:
            raise ValueError("retrieval needs nll, on whose windows the canary is tried")
        if self.nll is not None and self.canary.windows > self.nll.windows:
            told = f"canary.windows {self.canary.windows} are the first of nll.windows {self.nll.windows}"
            raise ValueError(f"{told}, not more")
        if self.nll is not None and self.nll.scored is None:
            for index, attention in enumerate(self.attentions):
                if attention.options.get("schedule") == "prompt":
                    where = f"attentions.{index}.options.schedule: prompt"
                    raise ValueError(f"{where} evicts after a prompt, and a window is one; set nll.scored to end it")
        if self.nll is not None and self.nll.scored is None and self.nll.step is not None:
            raise ValueError("nll.step cuts what is scored after a prompt into calls; set nll.scored to end the prompt")
        if self.nll is not None and self.nll.scored is not None and self.nll.scored >= self.nll.tokens:
            raise ValueError(f"nll.scored {self.nll.scored} must be fewer than nll.tokens {self.nll.tokens}")
        for index, attention in enumerate(self.attentions):
            if self.cost is not None and self.cost.new_tokens % (block := _block_size(attention)):
                raise ValueError(
                    f"attentions.{index}.options.block_size: {block} does not divide cost.new_tokens "
                    f"{self.cost.new_tokens}, so the timed steps would hold too few evictions or too many"
                )
        return self

    @property
    def host(self) -> str:
        """What records and tables call the model."""
        return f"transformers:{self.model}"


class DecodeConfig(LanguageConfig, RunConfig):
    """Cost and quality of a language model whose cache is bounded.

    `threads` are those of each process. `model` and `text` are names as `attnzoo.tasks.decode.lm.load_model` and
    `attnzoo.tasks.decode.text.load_text` take them; `attention` is transformers' own, which the dense model uses.
    `workers` rows are scored at a time, each in a process of its own and, with ``device: cuda``, on a GPU of its
    own where there are several; timings are made one after another. With ``nll: null`` nothing is scored, as for a
    model of random weights, whose canary proves nothing; with ``text: null`` besides, the prompts that are timed
    are random tokens.
    """

    task: Literal["decode"] = "decode"

    @classmethod
    def problems(cls, data: Mapping[str, Any]) -> list[str]:
        """What the registry says of the attentions."""
        return language_problems(data)


def paired_labels(pairs: Iterable[Sequence[str]], labels: Sequence[str]) -> list[tuple[str, str]]:
    """Give the labels of the rows that `pairs` set against each other; see `LanguageConfig`."""
    found = [
        (label, second + label.removeprefix(first))
        for first, second in pairs
        for label in labels
        if label == first or label.startswith(f"{first} ")
    ]
    return [(one, other) for one, other in found if other in labels]


load_config, validate_config = DecodeConfig.load, DecodeConfig.check


def in_each_setting(data: Mapping[str, Any]) -> Any:
    """The attentions of a config as written, each in every setting of its grid; as they are where either is wrong."""
    attentions, grid = data.get("attentions"), data.get("grid")
    try:
        named = [AttentionConfig.model_validate(attention) for attention in attentions or ()]
        settings = [Setting.model_validate(setting) for setting in grid or ()]
    except ValidationError:
        return attentions
    return [_set(attention, setting) for setting in settings for attention in named] if settings else attentions


def _set(attention: AttentionConfig, setting: Setting) -> dict[str, Any]:
    changed = {"label": f"{attention.label} {setting.label}", "options": {**setting.options, **attention.options}}
    return attention.model_copy(update=changed).model_dump()


def language_problems(data: Mapping[str, Any], prefix: str = "") -> list[str]:
    """What the registry says of the attentions of a language model; `prefix` comes before the keys that are named."""
    problems = attention_problems(in_each_setting(data), f"{prefix}attentions", _option_problems)
    canary = data.get("canary")
    if isinstance(canary, Mapping) and "tiny" in canary:
        problems += attention_problems([canary["tiny"]], f"{prefix}canary.tiny", _option_problems)
    return problems


def _option_problems(info: Any, options: Mapping[str, Any], where: str) -> list[str]:
    """A mixer, or the first option that the method refuses."""
    from attnzoo.registry import build_core, build_policy

    if info.kind == "mixer":
        return [f"{where}.name: {info.name!r} is a mixer; a language model is measured with cores and policies only"]
    try:
        (build_policy if info.kind == "eviction" else build_core)(info, dict(options))
    except AttnZooError as error:
        return [f"{where}.options: {error}"]
    return []


def _block_size(attention: AttentionConfig) -> int:
    """Tokens between evictions; 1 where there are none, or it cannot be told."""
    import attnzoo
    from attnzoo.registry import build_policy

    try:
        info = attnzoo.describe(attention.name)
        return build_policy(info, attention.options).every if info.kind == "eviction" else 1
    except AttnZooError:
        return 1  # which is told elsewhere
