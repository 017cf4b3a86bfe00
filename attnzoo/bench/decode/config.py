"""The config of the decode evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from attnzoo.bench.config import (
    NOT_HASHED,
    AttentionConfig,
    Dtype,
    refuse_expect,
    refuse_vision_keys,
    without_stale_labels,
)
from attnzoo.bench.strict import Section, read_yaml, validated
from attnzoo.errors import AttnZooError
from attnzoo.tasks.needles import KINDS, Kind

CONFIG_VERSION = 1
DENSE = "dense"
Tokens = Annotated[int, Field(ge=2)]


class NllConfig(Section):
    """Windows of the text, each scored in one call."""

    windows: PositiveInt = 20
    tokens: Tokens = 2000


class RetrievalConfig(Section):
    """Needle prompts: their length, and how many of each kind (`attnzoo.tasks.needles`)."""

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


class DecodeConfig(Section):
    """A whole evaluation. `output` and `fresh` say where and how to write and are no part of its identity.

    `threads` are those of each process. `attention` is transformers' own attention, which the dense model uses.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    model: Annotated[str, Field(min_length=1)] = "smollm2_135m_instruct"
    dtype: Dtype = "float32"
    attention: Literal["sdpa", "eager"] = "sdpa"
    device: Annotated[str, Field(pattern=r"^(cpu|cuda(:\d+)?)$")] = "cpu"
    threads: PositiveInt | None = None
    text: Annotated[str, Field(min_length=1)] = "debian_handbook"
    seed: Annotated[int, Field(ge=0)] = 0
    attentions: Annotated[tuple[AttentionConfig, ...], Field(min_length=1)]
    nll: NllConfig = NllConfig()
    retrieval: RetrievalConfig | None = None
    cost: DecodeCostConfig | None = None
    canary: CanaryConfig = CanaryConfig()
    output: Path | None = None
    fresh: bool = False

    @model_validator(mode="after")
    def _rows_and_windows_fit(self) -> DecodeConfig:
        refuse_vision_keys((*self.attentions, self.canary.tiny))
        refuse_expect((*self.attentions, self.canary.tiny))
        labels = [DENSE, *(attention.label for attention in self.attentions)]
        twice = sorted({label for label in labels if labels.count(label) > 1})
        if twice:
            raise ValueError(f"labels must differ, but {twice} stand for more than one row; set `label`")
        if self.canary.windows > self.nll.windows:
            raise ValueError(
                f"canary.windows {self.canary.windows} are the first of nll.windows {self.nll.windows}, not more"
            )
        return self

    @property
    def folder(self) -> Path:
        """Where samples, records and the page go."""
        return self.output if self.output is not None else Path("runs") / self.name

    @property
    def hash(self) -> str:
        """Identity of the evaluation: 16 hex digits over its full content, defaults and overrides included."""
        content = {"config_version": CONFIG_VERSION, **self.model_dump(mode="json", exclude=set(NOT_HASHED))}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]

    def to_yaml(self) -> str:
        """The whole config, defaults and overrides included, as YAML that `load_config` reads back."""
        content = self.model_dump(mode="json", exclude=set(NOT_HASHED))
        return str(yaml.safe_dump(content, sort_keys=False, allow_unicode=True))


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> DecodeConfig:
    """Read a YAML config, apply ``key=value`` overrides and check it.

    Raises
    ------
    ConfigError
        With every problem of file and overrides that could be found, one a line.
    """
    return validate_config(without_stale_labels(read_yaml(path, overrides), overrides), source=str(path))


def validate_config(data: Mapping[str, Any], source: str = "config") -> DecodeConfig:
    """Check plain data against the schema and the registry of attentions.

    Raises
    ------
    ConfigError
        With every problem, one a line.
    """
    problems = _attention_problems(data.get("attentions"), "attentions")
    canary = data.get("canary")
    if isinstance(canary, Mapping) and "tiny" in canary:
        problems += _attention_problems([canary["tiny"]], "canary.tiny")
    return validated(DecodeConfig, data, problems, source)


def _attention_problems(attentions: Any, where: str) -> list[str]:
    """Ask the registry for every attention named, even where the rest of the config is wrong."""
    import attnzoo
    from attnzoo.registry import build_core, build_policy

    problems: list[str] = []
    for index, entry in enumerate(attentions if isinstance(attentions, (list, tuple)) else []):
        entry = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(entry, Mapping) or not isinstance(entry.get("name"), str):
            continue
        here = f"{where}.{index}" if where == "attentions" else where
        try:
            info = attnzoo.describe(entry["name"])
        except AttnZooError as error:
            problems.append(f"{here}.name: {error}")
            continue
        options = entry.get("options") or {}
        if info.kind == "mixer":
            problems.append(f"{here}.name: {info.name!r} is a mixer, which cannot stand in a trained language model")
        elif isinstance(options, Mapping):
            try:
                (build_policy if info.kind == "eviction" else build_core)(info, dict(options))
            except AttnZooError as error:
                problems.append(f"{here}.options: {error}")
    return problems
