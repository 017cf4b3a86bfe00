"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence

from attnzoo.bench import words
from attnzoo.bench.html import Section, page
from attnzoo.bench.html import plots as figures
from attnzoo.bench.page import GATED, GATES_NOTE, gate_cells
from attnzoo.tables import Cell, Column, Table
from attnzoo.tasks.decode import plots
from attnzoo.tasks.decode.record import DecodeRecord
from attnzoo.tasks.decode.report import KIND_TITLES, difference, machine, results_table, title


def html_page(records: Sequence[DecodeRecord], config: str | None = None) -> str:
    """Give the page of the records of one run; `config` is shown at its end."""
    return page(
        f"attnzoo decode evaluation: {records[0].benchmark}",
        [
            Section(_plots(records)),
            Section(results_table(records).html(), title(records), _how_to_read(records)),
            _pairs(records),
            _batches(records),
            _gates(records),
            _canaries(records[0]),
        ],
        facts=_facts(records),
        config=config,
    )


def _facts(records: Sequence[DecodeRecord]) -> dict[str, str]:
    one, e = records[0], records[0].environment
    commit = "outside git" if e.commit is None else e.commit[:12] + (" with uncommitted changes" if e.dirty else "")
    libraries = f"torch {e.torch}, transformers {e.transformers}, Python {e.python}"
    return {
        "Model": f"{one.model}, {one.dtype}",
        "Text": f"{one.text}, SHA-256 {one.text_sha256}, seed {one.seed}",
        "Machine": machine(one),
        "Versions": f"attnzoo {e.attnzoo} ({commit}), {libraries}",
        "Finished": one.utc.replace("T", " "),
        "Config": one.config_hash,
        "Again": one.command,
    }


def _how_to_read(records: Sequence[DecodeRecord]) -> str:
    text = (
        "Every row reads the same windows and prompts through its own cache, which evicts while it reads. NLL to dense "
        "is in nats per token: the mean over windows of the difference to the dense model on the same window, with its "
        "95% bootstrap interval. Bytes are the largest over windows: held counts keys, values, positions and what "
        "a policy keeps; allocated counts empty places too. One MB is 10^6 bytes. Green is better than dense and red "
        "worse, only where the whole interval of paired differences is on one side of 0. "
    )
    if records[0].retrieval:
        text += "Numbers found come with their 95% Wilson interval. "
    if records[0].cost is not None:
        text += (
            "Times were taken in turn with the dense model in the same process; speed-ups are dense time over this "
            "one's, with the 20th and 80th percentile; the dense row is dense against a second copy of itself, so its "
            "spread is the noise of the machine. Peak memory is of activations and cache in one prefill, against dense."
        )
    return text


def _plots(records: Sequence[DecodeRecord]) -> str:
    drawn = [*plots.position_plots(records), ("NLL above dense against cache bytes", plots.trade_plot(records))]
    for index, result in enumerate(records[0].retrieval):
        kind = KIND_TITLES[result.kind]
        drawn.append((f"Numbers found by depth: {kind}", plots.depth_plot(records, index)))
        drawn.append((f"Numbers found against cache bytes: {kind}", plots.recall_trade_plot(records, index)))
    return figures(drawn)


def _pairs(records: Sequence[DecodeRecord]) -> Section | None:
    """Paired differences of retrieval, which the first table has no room for."""
    if not records[0].retrieval:
        return None
    table = Table(("attention", "prompt", "found", "recall less dense (95%)", "p (McNemar)"))
    for record in records:
        for result in record.retrieval:
            p_value = "-" if result.p_value is None else f"{result.p_value:.3f}"
            found = f"{result.hits} of {result.asked}"
            table.add(record.label, KIND_TITLES[result.kind], found, difference(result.difference), p_value)
    return Section(table.html(), "Retrieval, prompt by prompt")


def _batches(records: Sequence[DecodeRecord]) -> Section | None:
    cost = records[0].cost
    if cost is None:
        return None
    heads = ("attention", "batch", "speed-up, TTFT", "speed-up, TPOT", "TPOT in ms, p50 (p20-p80)", "tokens/s")
    table = Table(heads)
    for record in records:
        for one in record.cost.batches if record.cost is not None else ():
            first = words.times(one.first_token_speedup) if one.first_token_speedup else "-"
            spread = one.candidate.token
            per_token = f"{spread.p50 * 1e3:.1f} ({spread.p20 * 1e3:.1f}-{spread.p80 * 1e3:.1f})"
            speeds = (first, words.times(one.token_speedup))
            table.add(record.label, str(one.batch), *speeds, per_token, f"{one.tokens_per_second:,.1f}")
    asked = (
        f"After prompts of {cost.prompt_tokens:,} tokens, {cost.new_tokens} tokens each. Prompts are read at the first "
        "batch size; larger ones decode on from its caches, rows repeated. TTFT is the time to first token, TPOT "
        "the time per output token after it."
    )
    return Section(table.html(), "Speed by batch size", asked)


def _gates(records: Sequence[DecodeRecord]) -> Section | None:
    table = Table(("attention", *GATED))
    for record in records:
        if record.cost is not None and record.cost.gate is not None:
            table.add(record.label, *gate_cells(record.cost.gate))
    return Section(table.html(), "Gates", GATES_NOTE, folded=True) if table.rows else None


def _canaries(record: DecodeRecord) -> Section:
    table = Table((Column("check"), "figure, nats", "limit", "passed"))
    for result in record.canaries:
        limit = f"{'at least' if result.at_least else 'at most'} {result.limit:g}"
        passed = "yes" if result.passed else Cell("no", "worse")
        table.add(result.name, f"{result.figure:.2g}", limit, passed)
    return Section(table.html(), "Canaries", "Without these there would be no result.", folded=True)
