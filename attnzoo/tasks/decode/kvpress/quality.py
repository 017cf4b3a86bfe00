"""Pass keys found by the rows of a comparison with kvpress, and the two sides beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Self

from attnzoo.bench import words
from attnzoo.bench.html import Section
from attnzoo.bench.record import Count, Entry, Interval, NonNegative, Quality, bounds
from attnzoo.bench.record import Record as Measured
from attnzoo.bench.stats import paired_difference, ratio_of_shares, wilson_interval
from attnzoo.bench.words import quality_kept
from attnzoo.tables import Cell, Column, Table
from attnzoo.tasks.decode.kvpress.config import Row
from attnzoo.tasks.decode.quality import verdict
from attnzoo.units import megabytes


class Answered(Entry):
    """One prompt through one row.

    `kept` is the least and the most entries per head that any layer holds after the context. `cache_peak_bytes` is the
    largest size of the cache, all layers together, seen after any layer's attention: everything allocated;
    `entries_peak_bytes` counts keys and values in use alone.
    """

    context_tokens: Count
    kept: tuple[Count, Count]
    answer: str
    expected: tuple[str, ...]
    hits: tuple[bool, ...]
    depth: NonNegative
    cache_peak_bytes: Count
    entries_peak_bytes: Count


class PassKeys(Quality):
    """Pass keys found in a row's answers.

    `difference` is the share found above dense, prompt by prompt; `versions` are those of the packages of its side.
    """

    METRIC: ClassVar[str] = "pass key"

    row: Row
    prompts: tuple[Answered, ...]
    versions: dict[str, str]
    text_sha256: str
    difference: Interval | None = None

    @property
    def found(self) -> list[int]:
        """Of each prompt 1 where its pass key was found, else 0."""
        return [int(all(prompt.hits)) for prompt in self.prompts]

    @property
    def cache_peak(self) -> int:
        """The largest cache of all prompts, in bytes."""
        return max(prompt.cache_peak_bytes for prompt in self.prompts)

    def against(self, dense: Self) -> Self:
        """The same with its difference and its ratio to dense."""
        own, base = self.found, dense.found
        ratio, low, high = ratio_of_shares(sum(own), len(own), sum(base), len(base))
        update = {"ratio": ratio, "ratio_low": low, "ratio_high": high, "difference": paired_difference(own, base)}
        return self.model_copy(update=update)

    @property
    def compared(self) -> int | None:
        """Prompts that both were asked."""
        return None if self.difference is None else self.difference.n

    @property
    def figure(self) -> str:
        """``7 of 24 (15% to 49%)``; of few prompts without the interval."""
        ends = bounds(*self.interval, len(self.found))
        return f"{sum(self.found)} of {len(self.found)}" + (f" ({ends[0]:.0%} to {ends[1]:.0%})" if ends else "")

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's."""
        return wilson_interval(sum(self.found), len(self.found))

    @property
    def details(self) -> dict[str, str]:
        """Columns of the table of quality."""
        kept = sorted({count for prompt in self.prompts for count in prompt.kept})
        return {
            "entries kept": f"{kept[0]:,}" if len(kept) == 1 else f"{kept[0]:,} to {kept[-1]:,}",
            "found (95% Wilson)": self.figure,
            "above dense (95%)": words.difference(self.difference, digits=2),
            "quality kept (95%)": quality_kept(self),
            "peak cache": megabytes(self.cache_peak),
        }

    @property
    def remark(self) -> str:
        """Of the dense models what ran them, of a policy what differs between the sides."""
        row = self.row
        if row.spec is None:
            return f"{row.side}: {', '.join(f'{name} {version}' for name, version in self.versions.items())}."
        return f"{row.policy}: {row.note}" if row.note and row.side == "attnzoo" else ""


class Record(Measured):
    """A row of either side."""

    quality: PassKeys | None


PROTOCOL = {
    "block": "attnzoo reads the context in blocks, evicts at the end of each and at the end of the context "
    "(cache.flush()), and goes on to hold its budget; kvpress compresses once, after full attention over the context, "
    "and its cache grows with question and answer. Where the question is inside, the first token of its answer comes "
    "out of that full attention, attnzoo's out of the bounded cache.",
    "prompt": 'Both read the context with full attention and evict once, at its end (attnzoo with schedule="prompt"). '
    "kvpress is told that the context ends, and compresses each layer right after its forward; attnzoo learns it by "
    "the next call, and holds the whole context in every layer until then. After that, kvpress's cache grows with "
    "question and answer, attnzoo's until a block ends. Where the question is inside, the first token of its answer "
    "comes out of the full attention on both sides.",
}
HOW_TO_READ = (
    "Prompts, weights, precision, threads and the rule that ends an answer are the same. {protocol} attnzoo's less "
    "kvpress's: of the share found, over the same prompts, with the 95% interval of a paired bootstrap. Peak cache: "
    "the largest size of all that is allocated, seen after every layer's attention, before kvpress compresses that "
    "layer; attnzoo's has {room}positions, and what a policy keeps. Green where attnzoo is ahead, red where kvpress is."
)
ROOM = {"block": "room for a block beyond the budget in every layer, ", "prompt": ""}


def beside(records: Sequence[Record]) -> Table:
    """Each press of kvpress beside the same policy of attnzoo, by setting."""
    heads = ("found by attnzoo", "by kvpress", "attnzoo's less kvpress's (95%)", "same answers")
    table = Table(("policy", Column("press", left=True), *heads, "attnzoo's peak cache", "kvpress's"))
    for part in dict.fromkeys(record.part for record in records):
        rows = [r.quality for r in records if r.part == part and r.kind == "quality" and r.quality is not None]
        ours = {quality.row.policy: quality for quality in rows if quality.row.side == "attnzoo"}
        table.section(part)
        for press in rows:
            if press.row.side == "attnzoo" or press.row.policy not in ours:
                continue
            own = ours[press.row.policy]
            d, less = paired_difference(own.found, press.found), own.cache_peak <= press.cache_peak
            same = sum(a.answer == b.answer for a, b in zip(own.prompts, press.prompts, strict=True))
            table.add(
                press.row.policy,
                press.row.method,
                *(f"{sum(quality.found)} of {len(quality.found)}" for quality in (own, press)),
                Cell(words.difference(d, digits=2), verdict(d)),
                f"{same} of {len(press.prompts)}",
                Cell(megabytes(own.cache_peak), "same" if less else "worse"),
                megabytes(press.cache_peak),
            )
    return table


def sections(records: Sequence[Record]) -> list[Section]:
    """The two sides beside each other."""
    specs = [record.quality.row.spec for record in records if record.quality is not None and record.attention]
    schedule = next((spec["options"].get("schedule", "block") for spec in specs if spec), "block")
    told = HOW_TO_READ.format(protocol=PROTOCOL[schedule], room=ROOM[schedule])
    return [Section(beside(records).html(), "attnzoo and kvpress side by side", told)]
