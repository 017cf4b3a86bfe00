"""The config of the decode evaluation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from attnzoo.bench.attentions import AttentionConfig, attention_problems, refuse_expect
from attnzoo.bench.config import Dtype, RunConfig, Section, Seed, refuse_twins
from attnzoo.tasks.decode.cost_config import language_problems, refuse_vision_keys
from attnzoo.tasks.decode.needles import KINDS, Kind

DENSE = "dense"
Tokens = Annotated[int, Field(ge=2)]


class NllConfig(Section):
    """Windows of the text, each scored in one call."""

    windows: PositiveInt = 20
    tokens: Tokens = 2000


class RetrievalConfig(Section):
    """Needle prompts: their length, and how many of each kind (`attnzoo.tasks.decode.needles`)."""

    tokens: Tokens = 2000
    samples: Annotated[dict[Kind, PositiveInt], Field(min_length=1)]

    @property
    def counts(self) -> list[tuple[Kind, int]]:
        """Kinds and how many of each, in one order whatever the config's."""
        return [(kind, self.samples[kind]) for kind in KINDS if kind in self.samples]


class DecodeCostConfig(Section):
    """Timings: prompts of `prompt_tokens`, then `new_tokens` single steps, for each batch size.

    Prompts are read at the first batch size; larger ones, multiples of it, decode on from its caches, rows repeated.
    """

    prompt_tokens: Tokens = 2000
    new_tokens: PositiveInt = 16
    batches: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1,)
    repeats: PositiveInt = 3

    @model_validator(mode="after")
    def _multiples(self) -> DecodeCostConfig:
        if any(batch % self.batches[0] for batch in self.batches):
            raise ValueError(f"batches: {list(self.batches)} must all be multiples of the first")
        return self


class CanaryConfig(Section):
    """Checks of the run itself, on the first `windows` windows.

    `tiny` must make the mean NLL worse than dense by `worse_by` nats or more; every attention, given a budget that
    nothing exceeds, must give the dense model's NLL.
    """

    windows: PositiveInt = 2
    tiny: AttentionConfig = AttentionConfig(
        name="streaming", options={"budget": 16, "block_size": 16}, label="streaming, tiny"
    )
    worse_by: PositiveFloat = 0.1


class DecodeConfig(RunConfig):
    """A whole evaluation.

    `threads` are those of each process. `attention` is transformers' own attention, which the dense model uses.
    """

    task: Literal["decode"] = "decode"
    model: Annotated[str, Field(min_length=1)] = "smollm2_135m_instruct"
    dtype: Dtype = "float32"
    attention: Literal["sdpa", "eager"] = "sdpa"
    text: Annotated[str, Field(min_length=1)] = "debian_handbook"
    seed: Seed = 0
    attentions: Annotated[tuple[AttentionConfig, ...], Field(min_length=1)]
    nll: NllConfig = NllConfig()
    retrieval: RetrievalConfig | None = None
    cost: DecodeCostConfig | None = None
    canary: CanaryConfig = CanaryConfig()
    fresh: bool = False

    @model_validator(mode="after")
    def _rows_and_windows_fit(self) -> DecodeConfig:
        refuse_vision_keys((*self.attentions, self.canary.tiny))
        refuse_expect((*self.attentions, self.canary.tiny))
        refuse_twins([DENSE, *(attention.label for attention in self.attentions)])
        if self.canary.windows > self.nll.windows:
            raise ValueError(
                f"canary.windows {self.canary.windows} are the first of nll.windows {self.nll.windows}, not more"
            )
        return self

    @classmethod
    def problems(cls, data: Mapping[str, Any]) -> list[str]:
        """What the registry says of the attentions."""
        problems = attention_problems(data.get("attentions"), "attentions", language_problems)
        canary = data.get("canary")
        if isinstance(canary, Mapping) and "tiny" in canary:
            problems += attention_problems([canary["tiny"]], "canary.tiny", language_problems)
        return problems


load_config, validate_config = DecodeConfig.load, DecodeConfig.check
