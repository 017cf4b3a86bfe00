"""Reports made from records alone: a table in the terminal, a table in Markdown, and the README's part."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from attnzoo.bench import summary as words
from attnzoo.bench.record import Record
from attnzoo.bench.summary import Summary, Verdict, summarise
from attnzoo.errors import AttnZooError

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
STYLES: dict[Verdict, str] = {"better": "green", "worse": "red", "same": ""}


def print_report(records: Iterable[Record], console: Console) -> None:
    """Print one table a token count."""
    summary = summarise(records)
    for tokens, rows in summary.cost.items():
        console.print(_terminal_table(summary, tokens, rows))
    if not summary.cost:
        for record in summary.quality:
            console.print(f"{record.label}: {record.status}, top-1 {words.accuracy(record.quality)}", highlight=False)
    console.print(f"[dim]{escape(words.machine(summary))}; {escape(words.dates(summary))}[/dim]", highlight=False)


def markdown_table(records: Iterable[Record]) -> str:
    """Give the compact table for a README: an attention a line, a speed-up a token count, memory, size, accuracy."""
    summary = summarise(records)
    counts = list(summary.cost)
    largest = counts[-1] if counts else 0
    head = ["attention", *(f"speed-up at {n:,} tokens" for n in counts)]
    head += [f"{what} at {largest:,}" for what in ("peak memory", "FLOPs", "parameters")]
    head += ["top-1 % (95% interval)"]
    lines = [head, ["---", *["---:"] * (len(head) - 1)]]
    for label in summary.labels:
        rows = {tokens: summary.row(label, tokens) for tokens in counts}
        line = [f"`{label}`", *(_speed_cell(rows[tokens]) for tokens in counts)]
        last = rows.get(largest)
        cost = last.cost if last is not None else None
        line += [words.ratio(None if last is None else words.activation_ratio(last))]
        line += [
            words.ratio(cost.ratios.flops if cost else None),
            words.ratio(cost.ratios.parameters if cost else None),
        ]
        quality = next((r.quality for r in summary.quality if r.label == label), None)
        line += [words.accuracy(quality)]
        lines.append(line)
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def markdown_section(records: Iterable[Record]) -> str:
    """Give the table with what a reader must know to read it, and the command that makes it."""
    records = list(records)
    summary = summarise(records)
    one = summary.any
    quality = next((record.quality for record in summary.quality if record.quality is not None), None)
    shapes = next((row.shapes for rows in summary.cost.values() for row in rows if row.shapes is not None), None)
    blocks = f", {shapes.depth} blocks of width {shapes.dim}, batch {shapes.batch}" if shapes is not None else ""
    text = [
        markdown_table(records),
        "",
        f"`{one.host}`{blocks}, {one.dtype}, on {words.machine(summary)}. Ratios are to the host's own dense "
        "attention, timed in turn in the same process; in brackets the 20th to 80th percentile. Above 1x is faster; "
        "for memory, FLOPs and parameters, below 1x is less. The `dense` row is dense against a second copy of itself: "
        "the noise of the machine.",
    ]
    if quality is not None:
        text += ["", f"Top-1: {quality.note}."]
    return "\n".join([*text, "", "Made by", "", "```sh", command(summary), "```"])


def command(summary: Summary) -> str:
    """The command that made the records."""
    return summary.any.command


def read_marked(path: Path) -> str:
    """Give the text of a Markdown file that holds both markers.

    Raises
    ------
    AttnZooError
        If the file is not there, or does not hold both markers once, in order.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise AttnZooError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise AttnZooError(f"{path} must hold {BEGIN} and, after it, {END}, once each")
    return text


def rewrite_readme(path: Path, records: Iterable[Record]) -> None:
    """Put the section between the two markers of a Markdown file.

    Raises
    ------
    AttnZooError
        If the file is not there, or does not hold both markers once, in order.
    """
    text = read_marked(path)
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    path.write_text(f"{before}\n{markdown_section(records)}\n{after}", encoding="utf-8")


def _terminal_table(summary: Summary, tokens: int, rows: list[Record]) -> Table:
    table = Table(title=f"{tokens:,} tokens", title_justify="left", title_style="bold")
    table.add_column("attention")
    for name in ("ms, p50 (p20-p80)", "speed-up", "FLOPs", "memory", "params", "top-1 %", "kept"):
        table.add_column(name, justify="right")
    dense = next((row.quality for row in rows if row.is_baseline), None)
    still = words.noise(rows)
    for row in rows:
        if row.cost is None:
            table.add_row(escape(row.label), f"[red]{row.status}[/red]", escape(words.one_line(row.message, 300)))
            continue
        ratios, peak = row.cost.ratios, words.activation_ratio(row)
        table.add_row(
            escape(row.label),
            words.milliseconds(row.cost.candidate.latency_ms),
            _coloured(words.times(ratios.speedup), words.speed_verdict(ratios.speedup, still)),
            _coloured(words.ratio(ratios.flops), words.need_verdict(ratios.flops)),
            _coloured(words.ratio(peak), words.memory_verdict(row)),
            _coloured(words.ratio(ratios.parameters), words.need_verdict(ratios.parameters)),
            _coloured(words.accuracy(row.quality), words.quality_verdict(row.quality, dense)),
            words.ratio(row.quality.ratio if row.quality is not None else None),
        )
    return table


def _coloured(text: str, verdict: Verdict) -> str:
    style = STYLES[verdict]
    return f"[{style}]{text}[/{style}]" if style else text


def _speed_cell(row: Record | None) -> str:
    if row is None:
        return "-"
    return row.status if row.cost is None else words.times(row.cost.ratios.speedup)
