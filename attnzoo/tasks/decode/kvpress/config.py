"""What is compared with kvpress: the schema of a config, and the rows that follow from it."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from attnzoo.bench.config import Dtype, RunConfig, Section, refuse_twins
from attnzoo.bench.record import Entry
from attnzoo.errors import AttnZooError
from attnzoo.registry import build_policy, describe

DENSE = "dense"

Side = Literal["attnzoo", "kvpress"]
Setting = Literal["question_inside", "question_after"]
Attention = Literal["sdpa", "eager"]
Schedule = Literal["block", "prompt"]


class Ours(Section):
    """A policy of attnzoo; its budget follows from the share kept."""

    name: str
    options: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_a_policy(self) -> Ours:
        try:
            build_policy(describe(self.name), {**self.options, "budget": 1_000_000})
        except AttnZooError as error:
            raise ValueError(str(error)) from error
        return self


class Theirs(Section):
    """A press of kvpress; with `block_size`, inside its BlockPress. `attention` is what transformers computes with.

    With `base`, `press` is one that takes another, such as CriticalKVPress, and `options` are the base's.
    """

    press: Annotated[str, Field(pattern=r"^\w+Press$")]
    base: Annotated[str, Field(pattern=r"^\w+Press$")] | None = None
    options: dict[str, Any] = Field(default_factory=dict)
    block_size: PositiveInt | None = None
    attention: Attention = "sdpa"


class Policy(Section):
    """The same idea on both sides; `note` says where the two differ."""

    policy: str
    attnzoo: Ours
    kvpress: Annotated[tuple[Theirs, ...], Field(min_length=1)]
    note: str = ""


class Row(Entry):
    """A method of one side; `spec` is what its worker builds it from, None for the dense model."""

    side: Side
    policy: str
    method: str
    attention: Attention = "sdpa"
    spec: dict[str, Any] | None = None
    note: str = ""

    @property
    def label(self) -> str:
        """As tables name it."""
        press = f" {self.method}" if self.side == "kvpress" and self.spec is not None else ""
        return f"{self.policy} ({self.side}{press})"


class Comparison(RunConfig):
    """The config; kvpress is compared with on the CPU.

    `python` is the interpreter of an environment with kvpress, which is made where none is given; with `only`, no other
    policies are run for now. The first `timed` prompts are timed besides, beside the dense model in the same process.
    `schedule` is when attnzoo evicts: block by block while it reads the context, or once at its end, as kvpress does.
    """

    task: Literal["kvpress"] = "kvpress"
    device: Literal["cpu"] = "cpu"
    model: Annotated[str, Field(min_length=1)] = "smollm2_135m_instruct"
    dtype: Dtype = "float32"
    threads: PositiveInt = 1
    text: Annotated[str, Field(min_length=1)] = "debian_handbook"
    tokens: Annotated[int, Field(ge=2)] = 2000
    samples: PositiveInt = 24
    timed: Annotated[int, Field(ge=0)] = 5
    share: Annotated[float, Field(gt=0, lt=1)] = 0.25
    block_size: PositiveInt = 128
    schedule: Schedule = "block"
    settings: Annotated[tuple[Setting, ...], Field(min_length=1)] = ("question_inside", "question_after")
    policies: Annotated[tuple[Policy, ...], Field(min_length=1)]
    only: tuple[str, ...] | None = None
    python: str | None = None
    timeout_seconds: Annotated[PositiveFloat, Field(description="per prompt")] = 600.0

    @model_validator(mode="after")
    def _rows_differ(self) -> Comparison:
        known = [DENSE, *(policy.policy for policy in self.policies)]
        refuse_twins(known)
        if unknown := [name for name in self.only or () if name not in known]:
            raise ValueError(f"only: there is no policy {', '.join(unknown)}; policies: {', '.join(known)}")
        refuse_twins([row.label for row in self.rows])
        return self

    @property
    def rows(self) -> list[Row]:
        """The dense model of both sides, then each policy: attnzoo's first."""
        rows = [Row(side="attnzoo", policy=DENSE, method=DENSE), Row(side="kvpress", policy=DENSE, method=DENSE)]
        when: dict[str, Any] = {"block_size": self.block_size}
        if self.schedule != "block":  # which is the policies' own default
            when["schedule"] = self.schedule
        for entry in self.policies:
            ours = {"name": entry.attnzoo.name, "options": {**when, **entry.attnzoo.options}}
            alike: dict[str, Any] = {"policy": entry.policy, "note": entry.note}
            rows.append(Row(side="attnzoo", method=entry.attnzoo.name, spec=ours, **alike))
            for theirs in entry.kvpress:
                left_out = {"attention"} if theirs.base else {"attention", "base"}
                spec = {**theirs.model_dump(mode="json", exclude=left_out), "share": self.share}
                block, press = theirs.block_size, f"{theirs.press}({theirs.base})" if theirs.base else theirs.press
                method = press if block is None else f"BlockPress({press}, {block})"
                rows.append(Row(side="kvpress", method=method, spec=spec, attention=theirs.attention, **alike))
        return [row for row in rows if self.only is None or row.policy in (DENSE, *self.only)]
