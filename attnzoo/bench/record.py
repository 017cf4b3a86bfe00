"""Records: one JSON line per measurement under a strict schema, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, ClassVar, Generic, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, model_validator

from attnzoo import files
from attnzoo.bench.jsonl import append_line, read_lines
from attnzoo.errors import AttnZooError, ConfigError
from attnzoo.tables import Cell

SCHEMA_VERSION = (
    4  # 2 added the language model, 3 detection, 4 tasks; what they added has defaults: older lines are read
)
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


class Quality(Entry):
    """How well a row does its task, and what it keeps of the dense baseline's; each task has a class of its own.

    `ratio` is what is kept: above 1 the row is better than dense. It is null where there is no dense baseline, or none
    that can be divided by, its interval also for the baseline itself. `note` says what was done on what data.

    Attributes
    ----------
    METRIC
        What the figure is, as a table says it.
    """

    METRIC: ClassVar[str] = "quality"

    ratio: NonNegative | None = None
    ratio_low: NonNegative | None = None
    ratio_high: NonNegative | None = None
    note: str = ""

    def against(self, dense: Self) -> Self:
        """The same with its ratio to the dense baseline's, and the ratio's interval where there is one."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is set against dense")

    def as_dense(self) -> Self:
        """The same as that of the dense baseline itself, whose ratio to itself is 1 where it can be divided by."""
        return self.model_copy(update={"ratio": None if self.against(self).ratio is None else 1.0})

    @property
    def points(self) -> float | None:
        """How far the figure is above the dense baseline's, in points, where a ratio would mean nothing; else None."""
        return None

    @property
    def brief(self) -> Self:
        """What rows of cost carry of it: all, but for what only the row of quality itself should hold."""
        return self

    @property
    def figure(self) -> str:
        """The figure with its interval, as tables show it."""
        raise NotImplementedError(f"{type(self).__name__} does not say how it is shown")

    @property
    def interval(self) -> tuple[float, float] | None:
        """The figure's own interval, more being better; None where it has none."""
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


class Envelope(Entry):
    """One row: an attention and what was measured of it. A task's own class gives `cost` and `quality` their types.

    `task` is the name of the task that measured it, `measured` stands for all that its figures depend on, empty in
    older records, where `config_hash` does. `part` names the rows that share a dense baseline. `kind` is ``cost`` or
    ``quality`` (one per attention and workload, with `tokens` 0; rows of cost carry that without a workload). `scope`
    and `phase` say what was run: the whole model or one attention layer alone; one forward at each token count, one
    forward and backward (``training``), or the prefill of a language model's prompt of `tokens` tokens and the
    decoding after it. `workload` says in words what sets rows apart besides, such as ``batch 8`` or ``bfloat16``; it is
    empty where nothing does.
    """

    schema_version: Literal[1, 2, 3, 4] = 4
    task: str = "suite"
    measured: Annotated[str, Field(pattern=r"^([0-9a-f]{16})?$")] = ""
    config_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    benchmark: str
    command: str
    part: str = "vision"
    kind: Literal["cost", "quality"]
    scope: Literal["model", "layer"] = "model"
    phase: Phase = "forward"
    label: str
    attention: str | None
    options: dict[str, Any]
    is_baseline: bool
    status: Status
    message: str
    utc: str
    seconds: NonNegative
    environment: Environment
    host: str
    dtype: str
    tokens: Count
    workload: str = ""
    shapes: Shapes | None
    gate: Gate | None
    baseline_gate: Gate | None
    backends: tuple[str, ...]
    cost: SerializeAsAny[Entry] | None
    quality: SerializeAsAny[Quality] | None
    quality_note: str

    @model_validator(mode="after")
    def _gate_before_clock(self) -> Self:
        if self.cost is None:
            return self
        if (
            self.gate is None
            or not self.gate.passed
            or (self.baseline_gate is not None and not self.baseline_gate.passed)
        ):
            raise ValueError("a cost needs a gate that passed in the same process")
        return self

    @property
    def key(self) -> Key:
        """What makes two records stand for the same row; the later one counts."""
        return self.part, self.kind, self.phase, self.label, self.tokens, self.workload


class Record(Envelope):
    """A row whose cost is that of a candidate against the dense baseline."""

    cost: Cost | None


R = TypeVar("R", bound=Envelope)


def read_records(path: Path, model: type[R]) -> list[R]:
    """Read a records file: the latest record of each row, in the order in which rows first appear.

    A last line that a killed writer left torn is dropped with a warning.

    Raises
    ------
    AttnZooError
        If the file is missing or any other line is not a record of this schema.
    """
    try:
        records = read_lines(path, model, SCHEMA_VERSION)
    except OSError as error:
        raise AttnZooError(f"records {str(path)!r} cannot be read: {error.strerror}") from error
    return latest(records)


def latest(records: Iterable[R]) -> list[R]:
    """Keep the last record of each row."""
    return list({record.key: record for record in records}.values())


class RecordStore(Generic[R]):
    """A folder that one process at a time writes records into.

    Use it as a context manager: it takes a lock that the system lets go when the process ends, however it ends, and
    reads what an earlier run left.

    Parameters
    ----------
    folder
        Made if it is not there.
    model
        The class of the records.
    config_hash
        Of the run that will write.
    measured
        By the key of each row that will be asked for, what stands for all that its figures depend on. Records stay
        where theirs is the same, or the row is not asked for; any other makes the folder refused.
    fresh
        Set earlier records aside, as ``records.old.jsonl``.
    changed
        Names the keys of the config that differ from the folder's, for the message.
    renewed
        Rows that are measured again, rather than refused, where what they depend on is not the same any more.
    """

    def __init__(
        self,
        folder: Path,
        model: type[R],
        config_hash: str,
        measured: Mapping[Key, str] | None = None,
        *,
        fresh: bool = False,
        changed: Callable[[], str] = lambda: "",
        renewed: Collection[Key] = (),
    ) -> None:
        self.folder, self.model, self.config_hash = folder, model, config_hash
        self.path = folder / RECORDS_FILE
        self.measured: Mapping[Key, str] = measured or {}
        self.fresh, self.changed, self.renewed = fresh, changed, renewed
        self.records: dict[Key, R] = {}
        self._lock = ExitStack()

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            stack.enter_context(files.locked(self.folder))
            self._load()
            self._lock = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    def append(self, record: R) -> None:
        """Put one record on disk, whole, before returning."""
        append_line(self.path, record)
        self.records[record.key] = record

    def done(self, key: Key) -> bool:
        """Whether a row needs no new measurement."""
        return key in self.records and self.records[key].status in FINAL

    def _load(self) -> None:
        if self.fresh and self.path.exists():
            os.replace(self.path, self.folder / "records.old.jsonl")
        if not self.path.exists():
            return
        records = latest(read_lines(self.path, self.model, SCHEMA_VERSION, mend=True, stacklevel=4))
        records = [r for r in records if r.key not in self.renewed or r.measured == self.measured.get(r.key)]
        records = [r for r in records if r.status in FINAL or self._valid(r)]  # others have no figures to lose
        other = next((record for record in records if not self._valid(record)), None)
        if other is not None:
            hashes = f"{other.config_hash}, this one is {self.config_hash}"
            told = f"of another config ({hashes}): {other.label} was measured by it{self.changed()}"
            if other.config_hash == self.config_hash:
                told = f"of this config, but {other.label} was measured when a file that it names held something else"
            raise ConfigError(
                f"{self.folder} holds records {told}. Give another folder with output=PATH, or set them aside with "
                "fresh=true."
            )
        self.records = {record.key: record for record in records}

    def _valid(self, record: R) -> bool:
        """Whether a record may stand beside those that this run will write."""
        asked = self.measured.get(record.key)
        if record.measured and asked is not None:
            return record.measured == asked
        return bool(record.measured) or record.config_hash == self.config_hash
