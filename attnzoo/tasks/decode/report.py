"""What a reader sees: a table in the terminal, the same in Markdown, both out of the records alone."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from attnzoo.bench import words
from attnzoo.bench.record import Interval, Quantiles
from attnzoo.tables import Cell, Column, Table, Verdict
from attnzoo.tasks.decode.record import DecodeRecord, KindResult
from attnzoo.units import megabytes

KIND_TITLES = {"single": "pass key", "multi_key": "one of 4 keys", "multi_value": "3 values"}


def columns(records: Sequence[DecodeRecord]) -> list[str]:
    """Titles of the columns after the label."""
    titles = ["perplexity", "NLL to dense (95%)", "cache held", "cache allocated"]
    titles += [KIND_TITLES[result.kind] + ", % (95%)" for result in records[0].retrieval]
    if all(record.cost is not None for record in records):
        titles += ["TTFT", "speed-up", "TPOT", "speed-up", "peak memory"]
    return titles


def cells(record: DecodeRecord) -> list[tuple[str, Verdict]]:
    """The row's cells after the label, each with its verdict against dense."""
    nll = record.nll
    ratio = nll.cache_ratio
    found: list[tuple[str, Verdict]] = [
        (f"{nll.perplexity:.2f}", "same"),
        (difference(nll.difference), verdict(nll.difference, less_is_better=True)),
        (f"{megabytes(nll.cache.held)}{_share(ratio.held if ratio else None)}", "same"),
        (f"{megabytes(nll.cache.allocated)}{_share(ratio.allocated if ratio else None)}", "same"),
    ]
    found += [(recall(result), verdict(result.difference)) for result in record.retrieval]
    if record.cost is not None:
        one = record.cost.batches[0]
        memory, dense = record.cost.memory, record.cost.memory_dense
        held = memory.activation_peak_bytes or memory.allocator_peak_bytes
        base = dense.activation_peak_bytes or dense.allocator_peak_bytes
        first, faster = one.candidate.first_token, one.first_token_speedup
        found += [
            (f"{first.p50:.2f} s" if first else "-", "same"),
            (words.times(faster), _speed(faster)) if faster else ("-", "same"),
            (f"{one.candidate.token.p50 * 1e3:.1f} ms", "same"),
            (words.times(one.token_speedup), _speed(one.token_speedup)),
            (words.ratio(held / base if held and base else None), "same"),
        ]
    return found


def difference(interval: Interval | None) -> str:
    """A difference and its interval: ``+0.021 (+0.015 to +0.028)``; one sample has none."""
    if interval is None:
        return "-"
    if interval.n == 1:
        return f"{interval.mean:+.3f} (1 sample)"
    return f"{interval.mean:+.3f} ({interval.low:+.3f} to {interval.high:+.3f})"


def recall(result: KindResult) -> str:
    """Recall with its interval, in percent: ``88 (76-94)``."""
    return f"{result.recall * 100:.0f} ({result.low * 100:.0f}-{result.high * 100:.0f})"


def verdict(interval: Interval | None, less_is_better: bool = False) -> Verdict:
    """Better or worse only where the whole interval of paired differences is on one side of 0."""
    if interval is None or interval.n == 1 or interval.low <= 0 <= interval.high:
        return "same"
    return "better" if (interval.mean < 0) == less_is_better else "worse"


def results_table(records: Sequence[DecodeRecord]) -> Table:
    """A row per attention."""
    table = Table((Column("attention", code=True), *columns(records)))
    for record in records:
        table.add(record.label, *(Cell(text, verdict) for text, verdict in cells(record)), base=record.is_baseline)
    return table


def print_report(records: Sequence[DecodeRecord], console: Console) -> None:
    """Print the table."""
    console.print(results_table(records).rich(title(records)))
    one = records[0]
    console.print(f"[dim]{escape(machine(one))}; {one.utc[:16].replace('T', ' ')} UTC[/dim]", highlight=False)


def markdown_table(records: Sequence[DecodeRecord]) -> str:
    """Give the table for a page in Markdown."""
    return results_table(records).markdown()


def title(records: Sequence[DecodeRecord]) -> str:
    """What was run on what."""
    one = records[0]
    prompts = "".join(f", {kind.samples} prompts ({KIND_TITLES[kind.kind]})" for kind in one.retrieval)
    return f"{one.model}, {one.dtype}: {one.nll.windows} windows of {one.nll.tokens:,} tokens of {one.text}{prompts}"


def machine(record: DecodeRecord) -> str:
    """Device, threads and processes, in words."""
    return words.machine(record.environment, record.processes)


def _share(ratio: float | None) -> str:
    return "" if ratio is None else f" ({ratio:.2f}x)"


def _speed(q: Quantiles) -> Verdict:
    return words.speed_verdict(q)
