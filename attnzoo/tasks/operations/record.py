"""One JSON line an operation, under a strict schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from attnzoo.bench.lines import read_lines
from attnzoo.bench.record import Count, Entry, Environment, Gate, NonNegative, Quantiles, Status
from attnzoo.errors import AttnZooError

SCHEMA_VERSION = 1


class Ceilings(Entry):
    """What the device reached in the same run: bytes a second of a large copy, operations a second of a product."""

    bytes_per_second: NonNegative
    flops_per_second: NonNegative


class Rival(Entry):
    """A way in which PyTorch does the same work: its time, or why it has none."""

    name: str
    latency_ms: Quantiles | None
    graph: bool = False
    message: str = ""


class OperationRecord(Entry):
    """One operation.

    `speedup` is the time of the fastest rival over the operation's, round by round. `bytes` and `flops` are the fewest
    that the work takes, each input read once and each output written once; the shares are those of the ceilings that
    the operation reached by them. `graph` says whether calls were replayed by a CUDA graph; where the operation's were
    and the fastest rival's were not, or the other way round, there is no speed-up.
    """

    schema_version: Literal[1] = 1
    config_hash: Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]
    benchmark: str
    command: str
    label: str
    case: dict[str, Any]
    status: Status
    message: str
    utc: str
    seconds: NonNegative
    environment: Environment
    dtype: str
    paths: dict[str, Count]
    gate: Gate | None
    graph: bool
    sets: Count
    latency_ms: Quantiles | None
    rivals: tuple[Rival, ...]
    fastest: str | None
    speedup: Quantiles | None
    bytes: Count
    flops: Count | None
    ceilings: Ceilings | None
    share_of_bandwidth: NonNegative | None
    share_of_arithmetic: NonNegative | None


def read_records(path: Path, mend: bool = False) -> list[OperationRecord]:
    """Read a records file: the latest record of each operation.

    Raises
    ------
    AttnZooError
        If the file cannot be read or holds anything else.
    """
    try:
        records = read_lines(path, OperationRecord, SCHEMA_VERSION, mend=mend)
    except OSError as error:
        raise AttnZooError(f"records {str(path)!r} cannot be read: {error.strerror}") from error
    return list({record.label: record for record in records}.values())
