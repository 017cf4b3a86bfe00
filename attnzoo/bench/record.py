"""Records: one JSON line per measurement, under a strict schema."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from inspect import isabstract
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, model_validator

from attnzoo.tables import Cell

# 2 added the language model, 3 detection, 4 tasks; what they added has defaults: older lines are read
SCHEMA_VERSION = 4
RECORDS_FILE = "records.jsonl"
CONFIG_FILE = "records.yaml"  # the whole config, defaults and overrides included, beside the records

Phase = Literal["forward", "training", "prefill", "decode"]
Key = tuple[str, str, str, str, int, str]
Status = Literal["ok", "oom", "unsupported", "failed", "timeout"]
MIN_SAMPLES = 5  # windows, prompts, seeds or pairs of calls: of fewer no interval and no spread is shown
FINAL: frozenset[str] = frozenset({"ok", "oom", "unsupported"})  # not tried again when a run is resumed
Count = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Entry(BaseModel):
    """A part of a record: unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def bounds(low: float | None, high: float | None, n: int) -> tuple[float, float] | None:
    """The ends of an interval or a spread, as all pages show it; None of fewer than `MIN_SAMPLES` samples."""
    return None if low is None or high is None or n < MIN_SAMPLES else (low, high)


class Quantiles(Entry):
    """The 20th, 50th and 80th percentile of `n` samples."""

    p20: float
    p50: float
    p80: float
    n: Annotated[int, Field(ge=1)]

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The 20th and the 80th percentile, where there are samples enough."""
        return bounds(self.p20, self.p80, self.n)


class Gate(Entry):
    """The check that came before the clock.

    `max_abs_error` is the largest difference from the oracle in the worst tensor, `at`; `scale` is the largest
    magnitude of the oracle in that tensor; the gate passes where ``max_abs_error <= tolerance * scale`` everywhere.
    An error that is not finite is null and never passes. `cache_limit` and `cache_most` are of an eviction policy: the
    entries per key/value head that any layer may hold, and the most that one held after the prompt or any step.
    """

    oracle: str
    passed: bool
    max_abs_error: NonNegative | None
    scale: NonNegative | None
    tolerance: NonNegative
    at: str
    detail: str = ""
    cache_limit: Count | None = None
    cache_most: Count | None = None


class Shapes(Entry):
    """Shapes of the measurement: `tokens` without, `prefix` the class and register tokens; of a prompt, all tokens."""

    batch: Count
    tokens: Count
    prefix: Count
    dim: Count
    heads: Count
    depth: Count


class Memory(Entry):
    """Memory of one model in bytes; a figure that was not measured is null and `note` says why.

    The bytes of a cache are those after a prompt, or the largest of all steps after it; the peak holds them too.
    """

    parameter_bytes: Count
    activation_peak_bytes: Count | None
    allocator_peak_bytes: Count | None
    cache_held_bytes: Count | None = None
    cache_allocated_bytes: Count | None = None
    method: str
    note: str = ""


class Stage(Entry):
    """What one stage of a model costs; a stage may lie within another.

    `speedup` is against the same stage of the dense baseline; `share` is its part of the whole model's time.
    """

    name: str
    latency_ms: Quantiles
    speedup: Quantiles
    share: NonNegative
    flops: Count | None
    flops_note: str = ""
    parameters: Count
    activation_peak_bytes: Count | None = None
    allocator_peak_bytes: Count | None = None


class Side(Entry):
    """What one model costs, and each of its `stages` where these were told apart.

    Latency is in milliseconds per forward, prompt or token; throughput in images, prompt or new tokens per second.
    `flops` is None where an operator that multiplies matrices has no formula; `flops_note` then names it.
    """

    latency_ms: Quantiles
    throughput: NonNegative
    flops: Count | None
    flops_note: str = ""
    parameters: Count
    attention_parameters: Count
    memory: Memory
    stages: tuple[Stage, ...] = ()

    def stage(self, name: str) -> Stage | None:
        """The stage of this name."""
        return next((stage for stage in self.stages if stage.name == name), None)

    def most_speedup(self, part: str, whole: str) -> float | None:
        """Amdahl's bound: how much faster a stage becomes where a part of it takes no time at all."""
        inner, outer = self.stage(part), self.stage(whole)
        if inner is None or outer is None or inner.latency_ms.p50 >= outer.latency_ms.p50:
            return None
        return 1 / (1 - inner.latency_ms.p50 / outer.latency_ms.p50)


class Ratios(Entry):
    """The candidate against the dense baseline of the same process.

    `speedup` is dense time over candidate time, pair by pair: above 1 the candidate is faster. All others are
    candidate over dense: below 1 the candidate needs less.
    """

    speedup: Quantiles
    flops: NonNegative | None
    parameters: NonNegative
    attention_parameters: NonNegative | None
    activation_peak: NonNegative | None
    allocator_peak: NonNegative | None
    cache_held: NonNegative | None = None
    cache_allocated: NonNegative | None = None


class Cost(Entry):
    """A measurement of cost, of candidate and dense baseline side by side.

    `attention_share` is the part of the dense model's time that is spent in its attention layers; it bounds what any
    swap can gain (Amdahl 1967).
    """

    candidate: Side
    baseline: Side
    ratios: Ratios
    uncounted_ops: tuple[str, ...]
    freed_memory_kept: bool = False
    attention_share: Share | None = None


class Quality(Entry, ABC):
    """How well a row does its task, and what it keeps of the dense baseline's; each task has a class of its own.

    `ratio` is what is kept: above 1 the row is better than dense. It is null where there is no dense baseline, or none
    that can be divided by, its interval also for the baseline itself. `note` says what was done on what data.

    `METRIC` is what the figure is, as a table says it.
    """

    METRIC: ClassVar[str] = "quality"

    ratio: NonNegative | None = None
    ratio_low: NonNegative | None = None
    ratio_high: NonNegative | None = None
    note: str = ""

    @model_validator(mode="before")
    @classmethod
    def _of_a_task(cls, data: Any) -> Any:
        if isabstract(cls):
            raise ValueError("the records of this task hold no quality")
        return data

    @abstractmethod
    def against(self, dense: Self) -> Self:
        """The same with its ratio to the dense baseline's, and the ratio's interval where there is one."""

    def as_dense(self) -> Self:
        """The same as that of the dense baseline itself, whose ratio to itself is 1 where it can be divided by."""
        return self.model_copy(update={"ratio": None if self.against(self).ratio is None else 1.0})

    @property
    def points(self) -> float | None:
        """How far the figure is above the dense baseline's, in points, where a ratio would mean nothing; else None."""
        return None

    @property
    def is_control(self) -> bool:
        """Whether the row is what the others are compared with, besides the baseline, and no result of its method."""
        return False

    @property
    def brief(self) -> Self:
        """What rows of cost carry of it: all, but for what only the row of quality itself should hold."""
        return self

    @property
    @abstractmethod
    def figure(self) -> str:
        """The figure with its interval, as tables show it."""

    @property
    def interval(self) -> tuple[float, float] | None:
        """The figure's own interval, more being better; None where it has none."""
        return None

    @property
    def compared(self) -> int | None:
        """Samples that it was set against the dense baseline's by; None where that is not known."""
        return None

    @property
    def cache_ratio(self) -> float | None:
        """Bytes that a cache held while it was measured, over those of the dense baseline; None where there is none."""
        return None

    @property
    def details(self) -> Mapping[str, Cell | str]:
        """The columns of the table of quality, by their titles; those that are empty in every row are left out."""
        return {self.METRIC: self.figure}

    @property
    def remark(self) -> str:
        """A sentence above the table of quality, told once where several rows have it."""
        return ""


class Interval(Entry):
    """A mean of paired differences with its 95% interval over `n` pairs."""

    mean: float
    low: float
    high: float
    n: Count

    @property
    def bounds(self) -> tuple[float, float] | None:
        """Both ends, where there are samples enough."""
        return bounds(self.low, self.high, self.n)


class Environment(Entry):
    """Where a measurement was made; `compiler` says which made the kernels for CPUs, or why none did."""

    attnzoo: str
    python: str
    torch: str
    timm: str | None
    transformers: str | None = None
    system: str
    device: str
    threads: Count
    commit: str | None
    dirty: bool | None
    compiler: str = ""


class Row(Entry):
    """What a plan says of a row, and its record repeats: what is measured of which attention, in what.

    `part` names the rows that share a dense baseline. `kind` is ``cost`` or ``quality`` (one per attention and
    workload, with `tokens` 0; rows of cost carry that without a workload). `label` is what tables call it, `host` the
    model, as ``library:name``. `scope` says whether the whole model was run, or one attention layer alone. `workload`
    says in words what sets rows apart besides, such as ``batch 8`` or ``bfloat16``; it is empty where nothing does.
    """

    part: str
    kind: Literal["cost", "quality"]
    scope: Literal["model", "layer"] = "model"
    label: str
    attention: str | None
    options: Mapping[str, Any] = Field(default_factory=dict)
    is_baseline: bool
    host: str
    dtype: str
    tokens: Count = 0
    workload: str = ""


class Outcome(Entry):
    """How a measurement ended; what it did not get to is empty. `backends` are what ran."""

    status: Status
    message: str = ""
    shapes: Shapes | None = None
    gate: Gate | None = None
    baseline_gate: Gate | None = None
    backends: tuple[str, ...] = ()

    @property
    def failed_gates(self) -> dict[str, Gate]:
        """Those that did not pass, by their names: then nothing may be timed."""
        gates = {"gate": self.gate, "the baseline's gate": self.baseline_gate}
        return {name: gate for name, gate in gates.items() if gate is not None and not gate.passed}

    def refuse_ungated(self, cost: Any) -> Self:
        """Raise `ValueError` where there is a cost, and not the gates that it must have passed."""
        if cost and (self.gate is None or self.failed_gates):
            raise ValueError(f"a cost needs a gate that passed in the same process: {self.failed_gates or 'none ran'}")
        return self


class Envelope(Row, Outcome):
    """One row: an attention and what was measured of it. A task's own class gives `cost` and `quality` their types.

    `task` is the name of the task that measured it, `measured` stands for all that its figures depend on, empty in
    older records, where `config_hash` does. `phase` says what was run: one forward at each token count, one forward and
    backward (``training``), or the prefill of a language model's prompt of `tokens` tokens and the decoding after it.
    """

    schema_version: Literal[1, 2, 3, 4] = 4
    task: str = "suite"
    measured: Annotated[str, Field(pattern=r"^([0-9a-f]{16})?$")] = ""
    config_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    benchmark: str
    command: str
    part: str = "vision"
    phase: Phase = "forward"
    utc: str
    seconds: NonNegative
    environment: Environment
    cost: SerializeAsAny[Entry] | None
    quality: SerializeAsAny[Quality] | None
    quality_note: str

    @model_validator(mode="after")
    def _gate_before_clock(self) -> Self:
        return self.refuse_ungated(self.cost)

    @property
    def key(self) -> Key:
        """What makes two records stand for the same row; the later one counts."""
        return self.part, self.kind, self.phase, self.label, self.tokens, self.workload


class Record(Envelope):
    """A row whose cost is that of a candidate against the dense baseline."""

    cost: Cost | None
