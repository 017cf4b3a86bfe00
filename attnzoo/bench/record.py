"""Records: one JSON line a measurement under a strict schema, written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from attnzoo import files
from attnzoo.bench.lines import append_line, read_lines
from attnzoo.errors import AttnZooError, ConfigError

SCHEMA_VERSION = 3  # 2 added the language model, 3 detection; what they added has defaults, so older lines are read
RECORDS_FILE = "records.jsonl"
CONFIG_FILE = "records.yaml"  # the whole config, defaults and overrides included, beside the records

Part = Literal["vision", "detection", "language"]
Phase = Literal["forward", "training", "prefill", "decode"]
Key = tuple[str, str, str, str, int]
Status = Literal["ok", "oom", "unsupported", "failed", "timeout"]
FINAL: frozenset[str] = frozenset({"ok", "oom", "unsupported"})  # not tried again when a run is resumed
Count = Annotated[int, Field(ge=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]


class Entry(BaseModel):
    """A part of a record: unknown keys, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class Quantiles(Entry):
    """The 20th, 50th and 80th percentile of `n` samples."""

    p20: float
    p50: float
    p80: float
    n: Annotated[int, Field(ge=1)]


class Gate(Entry):
    """The check that came before the clock.

    `max_abs_error` is the largest difference from the oracle in the worst tensor, `at`; `scale` is the largest
    magnitude of the oracle in that tensor; the gate passes where ``max_abs_error <= tolerance * scale`` everywhere.
    An error that is not finite is null and never passes. `cache_limit` and `cache_most` are of an eviction policy: the
    entries a key/value head that any layer may hold, and the most that one held after the prompt or any step.
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

    Latency is in milliseconds a forward, a prompt or a token; throughput in images, prompt or new tokens a second.
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


class Training(Entry):
    """One training: seed, result, and after each epoch the mean loss in it and, where counted, the correct answers."""

    seed: Count
    correct: Count
    images: Count
    final_loss: float
    seconds: NonNegative
    epoch_losses: tuple[float, ...]
    parameters: Count | None = None
    epoch_correct: tuple[Count, ...] = ()


class Quality(Entry):
    """Top-1 accuracy on held-out images, all seeds together, with its 95% Wilson interval.

    With several seeds `images` counts each image once a seed. `ratio` is accuracy over the dense baseline's, with its
    95% interval, which is null for the baseline itself. `top5` and the expected `calibration_error` are those of all
    seeds together, null where they were not looked at.
    """

    accuracy: Annotated[float, Field(ge=0, le=1)]
    low: Annotated[float, Field(ge=0, le=1)]
    high: Annotated[float, Field(ge=0, le=1)]
    images: Count
    ratio: NonNegative | None
    ratio_low: NonNegative | None = None
    ratio_high: NonNegative | None = None
    trainings: tuple[Training, ...]
    note: str
    top5: Annotated[float, Field(ge=0, le=1)] | None = None
    calibration_error: Annotated[float, Field(ge=0, le=1)] | None = None


class Detecting(Entry):
    """One detector's training: seed, COCO's metric on the test images, and AP and AP50 at the epochs it was tested."""

    seed: Count
    ap: Share
    ap50: Share
    ap75: Share
    ap_small: Share | None
    ap_medium: Share | None
    ap_large: Share | None
    epochs: tuple[Count, ...] = ()
    epoch_ap: tuple[Share, ...] = ()
    epoch_ap50: tuple[Share, ...] = ()


class Detection(Entry):
    """COCO's metric on held-out images, the mean of all seeds.

    `ratio` is AP over the dense baseline's, null where that is 0 or there is none; it has no interval.
    """

    ap: Share
    ap50: Share
    ap75: Share
    ap_small: Share | None
    ap_medium: Share | None
    ap_large: Share | None
    images: Count
    boxes: Count
    ratio: NonNegative | None
    ratio_low: None = None
    ratio_high: None = None
    trainings: tuple[Detecting, ...]
    note: str


class Interval(Entry):
    """A mean of paired differences with its 95% interval over `n` pairs."""

    mean: float
    low: float
    high: float
    n: Count


class Canary(Entry):
    """A check that what is scored depends on the cache: NLL of a tiny cache above dense, in nats a token."""

    label: str
    above_dense: float
    at_least: float

    @property
    def passed(self) -> bool:
        """Whether the tiny cache did harm enough."""
        return self.above_dense >= self.at_least


class Perplexity(Entry):
    """Prose scored through a language model's cache.

    `window_nll` is the mean NLL of each window in nats a token, `nll` their mean, `perplexity` its exponential.
    `difference` is NLL above dense, window by window. `ratio`, the quality kept, is dense perplexity over this one,
    with the interval of `difference`; both are null where there is no dense baseline, the interval also for the
    baseline itself. `canary` is the baseline's alone.
    """

    perplexity: NonNegative
    nll: NonNegative
    tokens: Count
    window_nll: tuple[NonNegative, ...]
    difference: Interval | None = None
    ratio: NonNegative | None
    ratio_low: NonNegative | None = None
    ratio_high: NonNegative | None = None
    canary: Canary | None = None
    note: str


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


class Record(Entry):
    """One row: an attention and what was measured of it.

    `part` says of what kind of host. `kind` is ``cost`` or ``quality`` (one an attention, with `tokens` 0). `scope` and
    `phase` say what was run: the whole model or one attention layer alone; one forward of a vision model at each token
    count, one forward and backward (``training``), or the prefill of a language model's prompt of `tokens` tokens and
    the decoding after it.
    """

    schema_version: Literal[1, 2, 3] = 3
    config_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    benchmark: str
    command: str
    part: Part = "vision"
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
    shapes: Shapes | None
    gate: Gate | None
    baseline_gate: Gate | None
    backends: tuple[str, ...]
    cost: Cost | None
    quality: Quality | Detection | Perplexity | None
    quality_note: str

    @property
    def key(self) -> Key:
        """What makes two records stand for the same row; the later one counts."""
        return self.part, self.kind, self.phase, self.label, self.tokens


def read_records(path: Path) -> list[Record]:
    """Read a records file: the latest record of each row, in the order in which rows first appear.

    A last line that a killed writer left torn is dropped with a warning.

    Raises
    ------
    AttnZooError
        If the file is missing or any other line is not a record of this schema.
    """
    try:
        records = read_lines(path, Record, SCHEMA_VERSION)
    except OSError as error:
        raise AttnZooError(f"records {str(path)!r} cannot be read: {error.strerror}") from error
    return latest(records)


def latest(records: Iterable[Record]) -> list[Record]:
    """Keep the last record of each row."""
    return list({record.key: record for record in records}.values())


class RecordStore:
    """A folder that one process at a time writes records into.

    Use it as a context manager: it takes a lock that the system lets go when the process ends, however it ends, and
    reads what an earlier run left.

    Parameters
    ----------
    folder
        Made if it is not there.
    config_hash
        Of the run that will write; a folder with another config's records is refused.
    fresh
        Set earlier records aside, as ``records.old.jsonl``.
    """

    def __init__(self, folder: Path, config_hash: str, fresh: bool = False) -> None:
        self.folder = folder
        self.path = folder / RECORDS_FILE
        self.config_hash = config_hash
        self.fresh = fresh
        self.records: dict[Key, Record] = {}
        self._lock = ExitStack()

    def __enter__(self) -> RecordStore:
        with ExitStack() as stack:
            stack.enter_context(files.locked(self.folder))
            self._load()
            self._lock = stack.pop_all()
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    def append(self, record: Record) -> None:
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
        records = read_lines(self.path, Record, SCHEMA_VERSION, mend=True, stacklevel=4)
        other = next((r.config_hash for r in records if r.config_hash != self.config_hash), None)
        if other is not None:
            raise ConfigError(
                f"{self.folder} holds records of another config ({other}, this one is {self.config_hash}). "
                "Give another folder with output=PATH, or set them aside with fresh=true."
            )
        self.records = {record.key: record for record in records}
