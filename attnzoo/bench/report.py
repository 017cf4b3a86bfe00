"""Reports made from records alone: a table in the terminal, a table in Markdown, and the README's part."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from attnzoo.bench import summary as words
from attnzoo.bench.record import Cost, Part, Record
from attnzoo.bench.summary import Group, Qualities, Summary, summarise
from attnzoo.errors import AttnZooError
from attnzoo.tables import Cell, Column, Table
from attnzoo.units import megabytes

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
SPREAD = "p50 (p20-p80)"
HEAD = (
    "attention",
    Column("ms", SPREAD),
    Column("speed-up", SPREAD),
    "FLOPs",
    "peak memory",
    Column("cache held", "allocated"),
    "parameters",
    Column("quality", "95% interval"),
    Column("quality kept", "95% interval"),
)
PER_CALL = {
    "forward": "ms per forward",
    "training": "ms per forward and backward",
    "prefill": "ms per prompt",
    "decode": "ms per token",
}
PER_SECOND = {"forward": "images", "training": "images", "prefill": "tokens", "decode": "tokens"}


def print_report(records: Iterable[Record], console: Console) -> None:
    """Print one table of all rows of cost, in groups that were measured alike, and why rows are missing."""
    summary = summarise(records)
    if summary.groups:
        console.print(cost_table(summary).rich())
    for record in (row for group in summary.groups for row in group.rows if row.cost is None):
        why = f"{record.label} ({record.phase}, {record.tokens:,} tokens): {record.status}: {record.message}"
        console.print(f"[red]{escape(words.one_line(why))}[/red]", highlight=False, soft_wrap=True)
    if not summary.groups:
        for record in summary.quality:
            console.print(f"{record.label}: {record.status}, {words.absolute(record.quality)}", highlight=False)
    console.print(f"[dim]{escape(words.machine(summary))}; {escape(words.dates(summary))}[/dim]", highlight=False)


def cost_table(summary: Summary) -> Table:
    """All rows of cost, in sections that were measured alike."""
    table = Table(HEAD)
    for group in summary.groups:
        table.section(f"{group.host}: {group.title}", PER_CALL[group.phase])
        dense = next((row.quality for row in group.rows if row.is_baseline), None)
        for row in group.rows:
            table.add(row.label, *_cost_cells(row, group, dense), base=row.is_baseline)
    return table.without_empty_columns()


def _cost_cells(row: Record, group: Group, dense: Qualities | None) -> list[Cell]:
    if row.cost is None:
        return [failed(row)]
    side, ratios, peak = row.cost.candidate, row.cost.ratios, words.activation_ratio(row)
    held = side.memory.activation_peak_bytes or side.memory.allocator_peak_bytes
    kept = words.quality_verdict(row.quality, dense)
    return [
        Cell(words.milliseconds(side.latency_ms), small=f"{side.throughput:,.1f} {PER_SECOND[group.phase]}/s"),
        Cell(words.times(ratios.speedup), words.speed_verdict(ratios.speedup, words.noise(group.rows))),
        Cell(words.ratio(ratios.flops), words.need_verdict(ratios.flops), _flops_small(row.cost)),
        Cell(words.ratio(peak), words.memory_verdict(row), megabytes(held) if held else ""),
        Cell(words.ratio(ratios.cache_held), words.need_verdict(ratios.cache_held), _cache_small(row.cost)),
        Cell(words.ratio(words.size_ratio(row)), words.need_verdict(words.size_ratio(row)), f"{words.size(row):,}"),
        Cell(words.absolute(row.quality), kept),
        Cell(words.kept(row.quality), kept),
    ]


def _cache_small(cost: Cost) -> str:
    memory = cost.candidate.memory
    if memory.cache_held_bytes is None:
        return ""
    held, allocated = megabytes(memory.cache_held_bytes), megabytes(memory.cache_allocated_bytes)
    return f"{held}\n{words.ratio(cost.ratios.cache_allocated)} {allocated}"


def _flops_small(cost: Cost) -> str:
    """The candidate's FLOPs; where there is no ratio, why."""
    return cost.candidate.flops_note or cost.baseline.flops_note or giga(cost.candidate.flops)


def giga(flops: int | None) -> str:
    """FLOPs in units of 10^9."""
    return "-" if flops is None else f"{flops / 1e9:,.2f} G"


def failed(row: Record) -> Cell:
    """What stands in the place of figures that there are none of."""
    return Cell(row.status, "worse", words.one_line(row.message))


def markdown_table(records: Iterable[Record]) -> str:
    """Give the compact table for a README: an attention a line, under a line for its host.

    A host's line says what its speed-ups are of: of a vision model at each token count, of a language model in prefill
    and decoding. Memory, FLOPs and size are those at the largest token count at which half of the attentions or more
    were measured, or of the prefill; the cache is that after the last token.
    """
    summary = summarise(records)
    speeds = max((len(summary.of(part)) for part in summary.parts), default=0)
    caches = ["cache held", "cache allocated"] if "language" in summary.parts else []
    head = ["attention", *["speed-up"] * speeds, "peak memory", "FLOPs", "parameters", *caches]
    qualities = any(row.quality is not None for row in summary.records)
    head += ["quality (95% interval)", "quality kept (95% interval)"] if qualities else []
    table = Table(head)
    for part in summary.parts:
        vision, groups = part != "language", summary.of(part)
        needs = _needs_group(summary, part).title.replace(", ", " at ").removesuffix(" tokens") if vision else "prefill"
        title = [f"**{groups[0].host}**", *_padded([group.title for group in groups], speeds), *[needs] * 3]
        title += ["" if vision else "after decoding"] * len(caches)
        table.add(*title, *([words.METRIC[part], ""] if qualities else []))
        for label in summary.labels[part]:
            quality = summary.quality_of(part, label)
            kept = (
                [words.absolute(quality).removeprefix("ppl ").removeprefix("AP "), words.kept(quality)]
                if qualities
                else []
            )
            table.add(*_markdown_line(summary, part, label, speeds, bool(caches)), *kept)
    return table.markdown()


def _markdown_line(summary: Summary, part: Part, label: str, speeds: int, caches: bool) -> list[str]:
    groups = summary.of(part)
    rows = [next((row for row in group.rows if row.label == label), None) for group in groups]
    needs = rows[groups.index(_needs_group(summary, part))]
    held = rows[-1].cost.ratios if rows[-1] is not None and rows[-1].cost is not None else None
    ratios = needs.cost.ratios if needs is not None and needs.cost is not None else None
    line = [
        f"`{label}`",
        *_padded([_speed_cell(row) for row in rows], speeds),
        words.ratio(None if needs is None else words.activation_ratio(needs)),
        words.ratio(ratios.flops if ratios else None),
        words.ratio(words.size_ratio(needs) if needs is not None else None),
    ]
    if caches:
        line += [words.ratio(held.cache_held if held else None), words.ratio(held.cache_allocated if held else None)]
    return line


def _needs_group(summary: Summary, part: Part) -> words.Group:
    """The group of which memory, FLOPs and size are told."""
    groups = summary.of(part)
    if part == "language":
        return groups[0]
    whole = [g for g in groups if 2 * sum(row.cost is not None for row in g.rows) >= len(summary.labels[part])]
    return (whole or groups)[-1]


def _padded(cells: list[str], count: int) -> list[str]:
    return [*cells, *[""] * (count - len(cells))]


def markdown_section(records: Iterable[Record]) -> str:
    """Give the table with what a reader must know to read it, and the command that makes it."""
    records = list(records)
    summary = summarise(records)
    measured = any(row.quality is not None for row in summary.records)
    kept = "; quality kept is above 1x where it is better than dense" if measured else ""
    text = [
        markdown_table(records),
        "",
        f"On {words.machine(summary)}. Ratios are to the same host's own dense attention, timed in turn in the same "
        "process; in brackets the 20th to 80th percentile. Above 1x is faster; for memory, cache, FLOPs and "
        f"parameters, below 1x is less{kept}. A dense row is dense "
        "against a second copy of itself: the noise of the machine.",
    ]
    if words.keeps_freed_memory(summary):
        text[-1] += " While timed, the process keeps memory that is freed, as caching allocators do."
    for part in summary.parts:
        text += ["", f"{_host_words(summary, part)}."]
        quality = next((r.quality for r in summary.quality if r.part == part and r.quality is not None), None)
        if quality is not None:
            text[-1] += f" {words.METRIC[part].removesuffix(' %').capitalize()}: {quality.note}."
    return "\n".join([*text, "", "Made by", "", "```sh", command(summary), "```"])


def _host_words(summary: Summary, part: Part) -> str:
    group = summary.of(part)[0]
    found = [row.shapes for g in summary.of(part) for row in g.rows if row.shapes is not None]
    shapes = ""
    if found:
        batches = list(dict.fromkeys(f"{s.batch} at {s.tokens:,} tokens" for s in found))
        batch = ", ".join(batches) if len({s.batch for s in found}) > 1 else str(found[0].batch)
        blocks = "1 block" if found[0].depth == 1 else f"{found[0].depth} blocks"
        shapes = f", {blocks} of width {found[0].dim}, batch {batch}"
    more = ""
    if part == "language":
        more = (
            "; dense is transformers' own attention and cache. Peak memory is of the prefill, with the cache; the "
            "cache is that after the last new token; quality kept is dense perplexity over this one"
        )
    return f"`{group.rows[0].host}`{shapes}, {group.rows[0].dtype}{more}"


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
    except (OSError, UnicodeDecodeError) as error:
        raise AttnZooError(f"{str(path)!r} cannot be read as text: {error}") from error
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


def _speed_cell(row: Record | None) -> str:
    if row is None:
        return "-"
    return row.status if row.cost is None else words.times(row.cost.ratios.speedup)
