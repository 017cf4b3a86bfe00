"""What the record of an operation holds."""

from __future__ import annotations

from attnzoo.bench.record import Count, Entry, Envelope, NonNegative, Quantiles


class Ceilings(Entry):
    """What the device reached in the same run: bytes per second of a large copy, operations per second of a product."""

    bytes_per_second: NonNegative
    flops_per_second: NonNegative


class Rival(Entry):
    """A way in which PyTorch does the same work: its time, or why it has none."""

    name: str
    latency_ms: Quantiles | None
    graph: bool = False
    message: str = ""


class OperationCost(Entry):
    """What an operation costs beside every rival.

    `speedup` is the time of the fastest rival over the operation's, round by round. `bytes` and `flops` are the fewest
    that the work takes, each input read once and each output written once; the shares are those of the ceilings that
    the operation reached by them. `graph` says whether calls were replayed by a CUDA graph; where the operation's were
    and the fastest rival's were not, or the other way round, there is no speed-up. `sets` of inputs were gone round.
    """

    latency_ms: Quantiles
    graph: bool
    sets: Count
    rivals: tuple[Rival, ...]
    fastest: str | None
    speedup: Quantiles | None
    bytes: Count
    flops: Count | None
    ceilings: Ceilings | None
    share_of_bandwidth: NonNegative | None = None
    share_of_arithmetic: NonNegative | None = None


class Record(Envelope):
    """One operation: its options are those of the case, `backends` the paths that it took."""

    cost: OperationCost | None
