"""What is compared with kvpress: the schema of a config, and the rows that follow from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from attnzoo.bench.config import Dtype, RunConfig, Section, Seed
from attnzoo.bench.record import Entry
from attnzoo.errors import AttnZooError
from attnzoo.registry import build_policy, describe

DENSE = "dense"

Side = Literal["attnzoo", "kvpress"]
Setting = Literal["question_inside", "question_after"]
Key = tuple[Setting, str, str, int]


class Ours(Section):
    """A policy of attnzoo; its budget follows from the share kept."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def label(self) -> str:
        """As the table names it."""
        return self.name


class Theirs(Section):
    """A press of kvpress; with `block_size`, inside its BlockPress. `attention` is what transformers computes with."""

    press: Annotated[str, Field(pattern=r"^\w+Press$")]
    options: dict[str, Any] = Field(default_factory=dict)
    block_size: PositiveInt | None = None
    attention: Literal["sdpa", "eager"] = "sdpa"

    @property
    def label(self) -> str:
        """As the table names it."""
        return self.press if self.block_size is None else f"BlockPress({self.press}, {self.block_size})"


class Policy(Section):
    """The same idea on both sides; `note` says where the two differ."""

    policy: str
    attnzoo: Ours
    kvpress: Annotated[tuple[Theirs, ...], Field(min_length=1)]
    note: str = ""


class Comparison(RunConfig):
    """The config; kvpress is compared with on the CPU."""

    task: Literal["kvpress"] = "kvpress"
    device: Literal["cpu"] = "cpu"
    model: Annotated[str, Field(min_length=1)] = "smollm2_135m_instruct"
    dtype: Dtype = "float32"
    threads: PositiveInt = 1
    text: Annotated[str, Field(min_length=1)] = "debian_handbook"
    seed: Seed = 0
    tokens: Annotated[int, Field(ge=2)] = 2000
    samples: PositiveInt = 24
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    block_size: PositiveInt = 128
    settings: Annotated[tuple[Setting, ...], Field(min_length=1)] = ("question_inside", "question_after")
    policies: Annotated[tuple[Policy, ...], Field(min_length=1)]
    timeout_seconds: PositiveFloat = 600.0

    @model_validator(mode="after")
    def _rows_differ(self) -> Comparison:
        names = [DENSE, *(policy.policy for policy in self.policies)]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"policies must have names of their own, but {twice} stand for more than one")
        for policy in self.policies:
            labels = [theirs.label for theirs in policy.kvpress]
            if len(set(labels)) < len(labels):
                raise ValueError(f"{policy.policy}: a press appears twice among {labels}")
        return self

    def identity(self) -> dict[str, Any]:
        """Everything that the results depend on."""
        return self.model_dump(mode="json", exclude={"output", "device", "timeout_seconds"})

    @classmethod
    def problems(cls, data: Mapping[str, Any]) -> list[str]:
        """What the registry says of the policies."""
        problems: list[str] = []
        for index, entry in enumerate(data.get("policies") or []):
            ours = entry.get("attnzoo") if isinstance(entry, dict) else None
            if not isinstance(ours, dict) or not isinstance(ours.get("name"), str):
                continue  # the schema says what is wrong
            try:
                build_policy(describe(ours["name"]), {**(ours.get("options") or {}), "budget": 1_000_000})
            except AttnZooError as error:
                problems.append(f"policies.{index}.attnzoo: {error}")
        return problems


load_config = Comparison.load


class Row(Entry):
    """One row of the table: a method of one side, in one setting."""

    side: Side
    policy: str
    method: str
    attention: Literal["sdpa", "eager"]
    spec: dict[str, Any] | None

    def key(self, setting: Setting, sample: int) -> Key:
        """As `ResultLine.key`."""
        return setting, self.policy, f"{self.side} {self.method}", sample


def rows_of(config: Comparison) -> list[list[Row]]:
    """The rows, in groups that are run side by side: dense first, then each policy."""
    dense = [_row("attnzoo", DENSE, DENSE, None), _row("kvpress", DENSE, DENSE, None)]
    groups = [dense]
    for policy in config.policies:
        ours = {"name": policy.attnzoo.name, "options": {"block_size": config.block_size, **policy.attnzoo.options}}
        group = [_row("attnzoo", policy.policy, policy.attnzoo.label, ours)]
        for theirs in policy.kvpress:
            spec = {**theirs.model_dump(mode="json", exclude={"attention"}), "share": config.share}
            group.append(_row("kvpress", policy.policy, theirs.label, spec, theirs.attention))
        groups.append(group)
    return groups


def _row(
    side: Side, policy: str, method: str, spec: dict[str, Any] | None, attention: Literal["sdpa", "eager"] = "sdpa"
) -> Row:
    return Row(side=side, policy=policy, method=method, attention=attention, spec=spec)
