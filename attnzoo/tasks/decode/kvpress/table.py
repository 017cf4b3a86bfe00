"""The table of a comparison with kvpress, in Markdown: whoever is ahead."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from attnzoo import files
from attnzoo.bench import words
from attnzoo.bench.measure import quantiles
from attnzoo.bench.record import bounds
from attnzoo.bench.stats import paired_difference, wilson_interval
from attnzoo.tables import Column, Table
from attnzoo.tasks.decode.kvpress.config import DENSE, Key, Row, Setting, rows_of
from attnzoo.tasks.decode.kvpress.environment import KVPRESS
from attnzoo.tasks.decode.kvpress.record import AnyLine, ResultLine, RunLine, VersionsLine, first_line, read_records
from attnzoo.tasks.decode.kvpress.run import RECORDS
from attnzoo.units import megabytes

TABLE = "table.md"
TITLES: dict[Setting, str] = {
    "question_inside": "The question is the end of what is compressed",
    "question_after": "The context is compressed without the question, which comes after",
}

HEAD = (
    "policy",
    Column("method", left=True),
    "kept",
    "pass keys found",
    "attnzoo's less this one's",
    "TTFT, s: p20 / **p50** / p80",
    "over attnzoo's",
    "peak cache",
    "peak memory",
)


def table(lines: Sequence[AnyLine], path: Path) -> str:
    """The results in Markdown, whoever is ahead."""
    begun = first_line(lines, path)
    config = begun.config
    results = {line.key: line for line in lines if isinstance(line, ResultLine)}
    parts = [_opening(begun, lines)]
    for setting in config.settings:
        rows, ahead = Table(HEAD), []
        for group in rows_of(config):
            ours = _results_of(group[0], setting, results, config.samples)
            for row in group:
                these = _results_of(row, setting, results, config.samples)
                if these:
                    rows.add(*_table_row(row, these, ours))
                    ahead += [] if row is group[0] else _ahead(row, these, ours)
        if not rows.rows:
            continue
        said = [f"- {line}" for line in ahead] or ["- nowhere"]
        parts.append(
            "\n".join([f"## {TITLES[setting]}", "", rows.markdown(), "", "Where kvpress is ahead:", "", *said])
        )
    notes = [f"- {policy.policy}: {policy.note}" for policy in config.policies if policy.note]
    parts.append("\n".join(["## How to read it", "", *READING, *notes]))
    return "\n\n".join(parts) + "\n"


def found(lines: Sequence[AnyLine], path: Path) -> str:
    """Pass keys found by each method, in Markdown: one line per policy and method, one column per setting."""
    config = first_line(lines, path).config
    results = {line.key: line for line in lines if isinstance(line, ResultLine)}
    heads = [setting.replace("_", " ") for setting in config.settings]
    rows = Table(("policy", Column("method", left=True), *heads))
    for group in rows_of(config):
        for row in group:
            cells = []
            for setting in config.settings:
                these = _results_of(row, setting, results, config.samples)
                cells.append(f"{sum(all(line.hits) for line in these.values())} of {len(these)}")
            rows.add(row.policy, f"{row.side} `{row.method}`", *cells)
    return rows.markdown()


READING = (
    "- Each prompt went through the rows of a policy in turn, one process per row, one running at a time. Prompts, "
    "weights, precision, threads and the rule that ends an answer are the same.",
    "- found: with its 95% Wilson interval. attnzoo's less this one's: mean over the same prompts, with the 95% "
    "interval of a paired bootstrap; above 0 attnzoo finds more. over attnzoo's: the times, prompt by prompt, the "
    "median; above 1 kvpress is slower.",
    "- kept: entries per head after the context. attnzoo reads the context in blocks, evicting at the end of each, and "
    "evicts what is pending at the end of the context (`cache.flush()`), so that both sides keep the same share. Its "
    "budget goes on to hold at the end of every block; kvpress evicts no more, and its cache grows with question and "
    "answer.",
    "- Where the question is inside, the first token of kvpress's answer comes out of full attention over the prompt, "
    "before anything is evicted; attnzoo's comes out of the bounded cache.",
    "- peak cache: the largest size of all that the cache has allocated, seen after every layer's attention (kvpress: "
    "before its hook compresses that layer, so one layer is whole). attnzoo's has room for a block beyond the budget "
    "in every layer, positions, and what a policy keeps. Keys and values that are on their way into the cache count "
    "in neither, nor do copies that live for a moment; all of them do in peak memory.",
    "- peak memory: of the resident set, above that of the loaded model. MB are 10^6 bytes.",
    "- Options are the same on both sides where both have them; what else differs:",
)


def _opening(begun: RunLine, lines: Sequence[AnyLine]) -> str:
    config, where = begun.config, begun.environment
    versions = [
        f"- {line.side}: " + ", ".join(f"{name} {version}" for name, version in line.versions.items())
        for line in lines
        if isinstance(line, VersionsLine)
    ]
    same = _same_answers(lines)
    threads = "1 thread" if config.threads == 1 else f"{config.threads} threads"
    about = (
        f"{config.model} in {config.dtype}, {config.samples} prompts of {config.tokens:,} tokens, each with a pass key "
        f"in prose ({config.text}, SHA-256 {begun.text_sha256[:16]}, seed {config.seed}); {config.share:.0%} of the "
        f"cache kept, blocks of {config.block_size}; {threads} on {where.device}; config {begun.config_hash}, commit "
        f"{(where.commit or 'unknown')[:12]}{' with changes' if where.dirty else ''}."
    )
    title = f"# attnzoo and kvpress {KVPRESS}, side by side"
    return "\n".join([title, "", f"`{begun.command}`", "", about, "", *versions, *([same] if same else [])])


def _same_answers(lines: Sequence[AnyLine]) -> str:
    """Whether the dense models of both environments say the same: they must, or nothing can be compared."""
    dense: dict[tuple[str, int], list[str]] = {}
    for line in lines:
        if isinstance(line, ResultLine) and line.policy == DENSE:
            dense.setdefault((line.setting, line.sample), []).append(line.answer)
    pairs = [answers for answers in dense.values() if len(answers) == 2]
    equal = sum(a == b for a, b in pairs)
    return (
        f"- without eviction both environments gave the same answer to {equal} of {len(pairs)} prompts" if pairs else ""
    )


def _results_of(row: Row, setting: Setting, results: dict[Key, ResultLine], samples: int) -> dict[int, ResultLine]:
    found_here = ((sample, results.get(row.key(setting, sample))) for sample in range(samples))
    return {sample: line for sample, line in found_here if line is not None}


def _recall(line: ResultLine) -> float:
    return sum(line.hits) / len(line.hits)


def _pairs(ours: dict[int, ResultLine], these: dict[int, ResultLine]) -> list[tuple[ResultLine, ResultLine]]:
    return [(ours[sample], these[sample]) for sample in sorted(ours.keys() & these.keys())]


def _time_ratio(pairs: Sequence[tuple[ResultLine, ResultLine]]) -> float:
    return quantiles([b.first_token_seconds / a.first_token_seconds for a, b in pairs]).p50


def _table_row(row: Row, these: dict[int, ResultLine], ours: dict[int, ResultLine]) -> list[str]:
    lines = list(these.values())
    hits, n = sum(all(line.hits) for line in lines), len(lines)
    low, high = wilson_interval(hits, n)
    times = quantiles([line.first_token_seconds for line in lines])
    difference = ratio = ""
    pairs = _pairs(ours, these)
    if row.side == "kvpress" and pairs:
        d = paired_difference([_recall(a) for a, _ in pairs], [_recall(b) for _, b in pairs])
        difference = words.difference(d, digits=2)
        ratio = f"{_time_ratio(pairs):.2f}"
    memory = [line.memory_peak_bytes for line in lines if line.memory_peak_bytes is not None]
    kept = sorted({n for line in lines for n in line.kept})
    return [
        row.policy,
        f"{row.side} `{row.method}`",
        f"{kept[0]:,}" if len(kept) == 1 else f"{kept[0]:,} to {kept[-1]:,}",
        f"{hits} of {n}" + (f" ({low:.0%} to {high:.0%})" if bounds(low, high, n) else ""),
        difference,
        f"{times.p20:.2f} / **{times.p50:.2f}** / {times.p80:.2f}" if times.bounds else f"**{times.p50:.2f}**",
        ratio,
        megabytes(max(line.cache_peak_bytes for line in lines)),
        megabytes(max(memory)) if memory else "not known",
    ]


def _ahead(row: Row, these: dict[int, ResultLine], ours: dict[int, ResultLine]) -> list[str]:
    """In what this row of kvpress is ahead of attnzoo's, interval or not."""
    pairs = _pairs(ours, these)
    if not pairs or row.policy == DENSE:
        return []
    found_ours, found_these = (sum(all(line.hits) for line in side) for side in zip(*pairs, strict=True))
    said = []
    if found_these > found_ours:
        d = paired_difference([_recall(a) for a, _ in pairs], [_recall(b) for _, b in pairs])
        doubt = "" if d.bounds and d.high < 0 else ", which may be chance"
        said.append(f"finds {found_these} pass keys, attnzoo {found_ours} of {len(pairs)}{doubt}")
    if (ratio := _time_ratio(pairs)) < 1:
        said.append(f"TTFT is {ratio:.2f} of attnzoo's time")
    cache = [max(line.cache_peak_bytes for line in side) for side in zip(*pairs, strict=True)]
    if cache[1] < cache[0]:
        said.append(f"peak cache {megabytes(cache[1])}, attnzoo {megabytes(cache[0])}")
    memory = [[line.memory_peak_bytes or 0 for line in side] for side in zip(*pairs, strict=True)]
    if 0 < max(memory[1]) < max(memory[0]):
        said.append(f"peak memory {megabytes(max(memory[1]))}, attnzoo {megabytes(max(memory[0]))}")
    return [f"{row.policy}, `{row.method}`: {'; '.join(said)}"] if said else []


def report(path: Path) -> str:
    """Write the table beside the records, and give it."""
    text = table(read_records(path), path)
    target = path.with_name(TABLE) if path.name == RECORDS else path.with_suffix(".md")
    files.write(target, text)
    return text
