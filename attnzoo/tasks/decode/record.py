"""What the decode evaluation writes: one line per row and sample while it runs, one record per row at the end."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from attnzoo import files
from attnzoo.bench.jsonl import read_lines
from attnzoo.bench.record import Count, Entry, Environment, Gate, Interval, Memory, NonNegative, Quantiles
from attnzoo.errors import AttnZooError
from attnzoo.eviction.size import CacheBytes

SCHEMA_VERSION = 1
RECORDS_FILE = "records.jsonl"
CONFIG_FILE = "records.yaml"
SAMPLES = "samples.{}.jsonl"  # of each process

Task = Literal["canary", "nll", "retrieval", "cost"]
Key = tuple[str, str, int, str]


class Bytes(Entry):
    """Bytes of a cache: keys and values alone, everything held, and everything allocated."""

    entries: Count
    held: Count
    allocated: Count

    @classmethod
    def of(cls, size: CacheBytes) -> Bytes:
        """The same, out of what `attnzoo.kv_bytes` gives."""
        return cls(entries=size.entries, held=size.held, allocated=size.allocated)


class Spread(Entry):
    """Seconds of one model: a prefill with its first token (of the first batch size alone), and one token after it."""

    first_token: Quantiles | None
    token: Quantiles


class BatchCost(Entry):
    """Times at one batch size. `tokens_per_second` is of decoding; speed-ups are dense over candidate, pair by pair."""

    batch: Count
    candidate: Spread
    dense: Spread
    tokens_per_second: NonNegative
    first_token_speedup: Quantiles | None
    token_speedup: Quantiles


class DecodeCost(Entry):
    """What decoding costs, against the dense model in the same process; cache and memory at the first batch size.

    `gate` and `baseline_gate` are the checks of candidate and dense that this process made before the clock; null in
    records that are older than these fields.
    """

    prompt_tokens: Count
    new_tokens: Count
    gate: Gate | None = None
    baseline_gate: Gate | None = None
    batches: tuple[BatchCost, ...]
    cache: Bytes
    cache_dense: Bytes
    memory: Memory
    memory_dense: Memory


class SampleLine(Entry):
    """One row on one sample.

    `kind` is that of a needle prompt, else empty. Of a window, `start` is its first token in the text and `nll` has an
    entry for each token but the first. Of a prompt, `hits` says of each of `expected` whether it was found.
    """

    schema_version: Literal[1] = 1
    config_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    text_sha256: str
    task: Task
    kind: str = ""
    sample: Count
    label: str
    seconds: NonNegative
    nll: tuple[float, ...] = ()
    start: Count | None = None
    answer: str = ""
    expected: tuple[str, ...] = ()
    hits: tuple[bool, ...] = ()
    depths: tuple[float, ...] = ()
    cache: Bytes | None = None
    cost: DecodeCost | None = None

    @property
    def key(self) -> Key:
        """What makes two lines stand for the same work."""
        return self.task, self.kind, self.sample, self.label


class Ratios(Entry):
    """Bytes of a cache over those of the dense one."""

    entries: NonNegative
    held: NonNegative
    allocated: NonNegative


class NllResult(Entry):
    """Mean NLL a token in nats; `curve` is the mean difference to dense in equal parts of the window, in order."""

    windows: Count
    tokens: Count
    mean: float
    perplexity: NonNegative
    difference: Interval | None
    curve: tuple[float, ...]
    cache: Bytes
    cache_ratio: Ratios | None


class KindResult(Entry):
    """Needle prompts of one kind.

    `hits` of `asked` numbers were found; `low` and `high` are the 95% Wilson interval, which takes the numbers of one
    prompt for independent. `difference` is in recall, prompt by prompt; `p_value` that of McNemar's exact test over
    the numbers asked for. `by_depth` lists depth and whether the number there was found.
    """

    kind: str
    samples: Count
    tokens: Count
    hits: Count
    asked: Count
    recall: Annotated[float, Field(ge=0, le=1)]
    low: Annotated[float, Field(ge=0, le=1)]
    high: Annotated[float, Field(ge=0, le=1)]
    difference: Interval | None
    p_value: Annotated[float, Field(ge=0, le=1)] | None
    by_depth: tuple[tuple[float, bool], ...]
    cache: Bytes


class CanaryResult(Entry):
    """A check of the run itself: `figure` had to be at least (or at most) `limit`."""

    name: str
    figure: float
    limit: float
    at_least: bool
    passed: bool


class DecodeRecord(Entry):
    """One row."""

    schema_version: Literal[1] = 1
    config_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    benchmark: str
    command: str
    label: str
    attention: str | None
    options: dict[str, Any]
    is_baseline: bool
    utc: str
    seconds: NonNegative
    processes: Count
    environment: Environment
    model: str
    dtype: str
    seed: Count
    text: str
    text_sha256: str
    nll: NllResult
    retrieval: tuple[KindResult, ...]
    cost: DecodeCost | None
    canaries: tuple[CanaryResult, ...]


def read_samples(folder: Path, mend: bool = False) -> list[SampleLine]:
    """Read the lines that all processes of all runs have left in a folder; of two for the same work the first counts.

    Timings without the gate of the process that made them are left out: they are made again.

    Raises
    ------
    AttnZooError
        If a line that is not a torn last one is not of this schema.
    """
    found: dict[Key, SampleLine] = {}
    for path in sorted(folder.glob(SAMPLES.format("*"))):
        for line in read_lines(path, SampleLine, SCHEMA_VERSION, mend=mend):
            if line.cost is None or line.cost.gate is not None:
                found.setdefault(line.key, line)
    return list(found.values())


def write_records(folder: Path, records: list[DecodeRecord]) -> Path:
    """Put all records of a folder in place in one step."""
    path = folder / RECORDS_FILE
    files.write(path, "".join(record.model_dump_json() + "\n" for record in records))
    return path


def read_records(path: Path) -> list[DecodeRecord]:
    """Read a records file.

    Raises
    ------
    AttnZooError
        If the file is missing, empty, or not of this schema.
    """
    try:
        records = read_lines(path, DecodeRecord, SCHEMA_VERSION)
    except OSError as error:
        raise AttnZooError(f"records {str(path)!r} cannot be read: {error.strerror}") from error
    if not records:
        raise AttnZooError(f"there are no records in {path}")
    return records
