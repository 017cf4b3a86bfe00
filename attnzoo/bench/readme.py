"""The README's part of a benchmark: a compact table between two markers, and what a reader must know to read it."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from attnzoo import files
from attnzoo.bench import words
from attnzoo.bench.record import Record
from attnzoo.bench.summary import Summary, keeps_freed_memory, machine, summarize
from attnzoo.errors import AttnZooError
from attnzoo.tables import Table

COLUMNS = 7  # a reader of a README sees no more side by side
KEPT = "quality kept (95% interval)"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"


def markdown_table(records: Iterable[Any]) -> str:
    """Give the compact tables for a README: one per host, an attention per line, at most `COLUMNS` columns.

    There is a speed-up for every group: of a vision model at each token count, of a language model in prefill and
    decoding; of more than there is room for, those of the largest token counts. Memory, FLOPs and parameters are those
    at the largest token count at which half of the attentions or more were measured, or of the prefill; the cache is
    that after the last token. What there is no room for is on the page.
    """
    summary = summarize(records)
    return "\n\n".join(_part_table(summary, part) for part in summary.parts)


def _part_table(summary: Summary, part: str) -> str:
    """The table of one host: speed-ups, then as much of the rest as there is room for, the quality kept last."""
    groups, metric = summary.of(part), _metric(summary, part)
    whole = [g for g in groups if 2 * sum(row.cost is not None for row in g.rows) >= len(summary.labels[part])]
    needs, about = groups[0], "prefill"  # where memory, FLOPs and size are told
    if not _has_cache(summary, part):
        needs = (whole or groups)[-1]
        about = needs.title.replace(", ", " at ", 1).removesuffix(" tokens")
    timed = groups[-(COLUMNS - 2) :]  # beside the attention and something else than speed
    heads, lines = list[str](), list[list[str]]()
    for label in summary.labels[part]:
        rows = [next((row for row in group.rows if row.label == label), None) for group in groups]
        need, quality = rows[groups.index(needs)], summary.quality_of(part, label)
        ratios, held = (None if row is None or row.cost is None else row.cost.ratios for row in (need, rows[-1]))
        cells = {
            KEPT: words.quality_kept(quality),
            f"peak memory, {about}": words.ratio(None if need is None else words.activation_ratio(need)),
            "cache held, after decoding": words.ratio(held.cache_held if held else None),
            metric: words.absolute(quality).removeprefix("ppl ").removeprefix("AP "),
            f"FLOPs, {about}": words.ratio(ratios.flops if ratios else None),
            "parameters": words.ratio(None if need is None else words.size_ratio(need)),
        }
        if not _has_cache(summary, part):
            del cells["cache held, after decoding"]
        if all(row.quality is None for group in groups for row in group.rows):
            del cells[KEPT], cells[metric]
        shown = sorted(list(cells)[: COLUMNS - 1 - len(timed)], key=lambda name: name == KEPT)
        heads = ["attention", *(f"speed-up, {group.title}" for group in timed), *shown]
        lines.append([f"`{label}`", *map(_speed, rows[-len(timed) :]), *(cells[name] for name in shown)])
    return f"**{groups[0].host}**\n\n{Table(heads, lines).markdown()}"


def _speed(row: Record | None) -> str:
    if row is None:
        return "-"
    return row.status if row.cost is None else words.times(row.cost.ratios.speedup)


def _has_cache(summary: Summary, part: str) -> bool:
    """Whether a part's rows are of decoding with a cache."""
    return any(group.phase == "decode" for group in summary.of(part))


def _metric(summary: Summary, part: str) -> str:
    """What the quality of a part's rows is."""
    return next((r.quality.METRIC for r in summary.quality if r.part == part and r.quality is not None), "quality")


def markdown_section(records: Iterable[Any]) -> str:
    """Give the table with what a reader must know to read it, and the command that makes it."""
    records = list(records)
    summary = summarize(records)
    measured = any(row.quality is not None for row in summary.records)
    kept = "; quality kept is above 1x where it is better than dense" if measured else ""
    text = [
        markdown_table(records),
        "",
        f"On {machine(summary)}. Ratios are to the same host's own dense attention, timed in turn in the same "
        "process; in brackets the 20th to 80th percentile, of 5 pairs or more. Above 1x is faster; for memory, cache, "
        f"FLOPs and parameters, below 1x is less{kept}. A dense row is dense "
        "against a second copy of itself: the noise of the machine.",
    ]
    if keeps_freed_memory(summary):
        text[-1] += " While timed, the process keeps memory that is freed, as caching allocators do."
    for part in summary.parts:
        text += ["", f"{_host_words(summary, part)}."]
        quality = next((r.quality for r in summary.quality if r.part == part and r.quality is not None), None)
        if quality is not None:
            text[-1] += f" {quality.METRIC[0].upper()}{quality.METRIC[1:].removesuffix(' %')}: {quality.note}."
    return "\n".join([*text, "", "Made by", "", "```sh", summary.last.command, "```"])


def _host_words(summary: Summary, part: str) -> str:
    group = summary.of(part)[0]
    found = [row.shapes for g in summary.of(part) for row in g.rows if row.shapes is not None]
    shapes = ""
    if found:
        batches = list(dict.fromkeys(f"{s.batch} at {s.tokens:,} tokens" for s in found))
        batch = ", ".join(batches) if len({s.batch for s in found}) > 1 else str(found[0].batch)
        blocks = "1 block" if found[0].depth == 1 else f"{found[0].depth} blocks"
        shapes = f", {blocks} of width {found[0].dim}, batch {batch}"
    more = ""
    if _has_cache(summary, part):
        more = (
            "; dense is transformers' own attention and cache. Peak memory is of the prefill, with the cache; the "
            "cache is that after the last new token; quality kept is dense perplexity over this one"
        )
    methods = [row.options for row in group.rows if not row.is_baseline]
    shared = [
        f"{key}={value}"
        for key, value in (methods[0] if methods else {}).items()
        if all(o.get(key) == value for o in methods)
    ]
    same = f"; every row has {', '.join(shared)}" if shared else ""
    return f"`{group.rows[0].host}`{shapes}, {group.rows[0].dtype}{more}{same}"


def read_marked(path: Path) -> str:
    """Give the text of a Markdown file that holds both markers.

    Raises `AttnZooError` if the file is not there, or does not hold both markers once, in order.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise AttnZooError(f"{str(path)!r} cannot be read as text: {error}") from error
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise AttnZooError(f"{path} must hold {BEGIN} and, after it, {END}, once each")
    return text


def rewrite_readme(path: Path, records: Iterable[Any]) -> None:
    """Put the section between the two markers of a Markdown file.

    Raises `AttnZooError` if the file is not there, or does not hold both markers once, in order.
    """
    text = read_marked(path)
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    files.write(path, f"{before}\n{markdown_section(records)}\n{after}")
