"""The report as one HTML file that needs nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from attnzoo.bench import summary as words
from attnzoo.bench.decode import plots
from attnzoo.bench.decode.record import DecodeRecord
from attnzoo.bench.decode.report import KIND_TITLES, cells, columns, difference, machine, title
from attnzoo.bench.page import STYLE, gate_cells


def html_page(records: Sequence[DecodeRecord], config: str | None = None) -> str:
    """Give the page of the records of one run; `config` is shown at its end."""
    name = f"attnzoo decode evaluation: {records[0].benchmark}"
    parts = [
        f"<h1>{escape(name)}</h1>",
        _facts(records),
        f"<h2>{escape(title(records))}</h2>",
        _table(records),
        _how_to_read(records),
        _plots(records),
        _pairs(records),
        _batches(records),
        _gates(records),
        _canaries(records[0]),
        "" if config is None else f"<h2>Config</h2><pre>{escape(config)}</pre>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(name)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _facts(records: Sequence[DecodeRecord]) -> str:
    one, e = records[0], records[0].environment
    commit = "outside git" if e.commit is None else e.commit[:12] + (" with uncommitted changes" if e.dirty else "")
    libraries = f"torch {e.torch}, transformers {e.transformers}, Python {e.python}"
    facts = {
        "Model": f"{one.model}, {one.dtype}",
        "Text": f"{one.text}, SHA-256 {one.text_sha256}, seed {one.seed}",
        "Machine": machine(one),
        "Versions": f"attnzoo {e.attnzoo} ({commit}), {libraries}",
        "Finished": one.utc.replace("T", " "),
        "Config": one.config_hash,
        "Again": one.command,
    }
    return "<dl>" + "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items()) + "</dl>"


def _table(records: Sequence[DecodeRecord]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in ("attention", *columns(records)))
    body = ""
    for record in records:
        opening = '<tr class="base">' if record.is_baseline else "<tr>"
        inner = "".join(
            f"<td>{escape(text) if verdict == 'same' else f'<span class={verdict}>{escape(text)}</span>'}</td>"
            for text, verdict in cells(record)
        )
        body += f"{opening}<td>{escape(record.label)}</td>{inner}</tr>\n"
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _how_to_read(records: Sequence[DecodeRecord]) -> str:
    text = (
        "Every row reads the same windows and prompts through its own cache, which evicts while it reads. NLL to dense "
        "is in nats a token: the mean over windows of the difference to the dense model on the same window, with its "
        "95% bootstrap interval. Bytes are the largest over windows: held counts keys, values, positions and what "
        "a policy keeps; allocated counts empty places too. MB are 10<sup>6</sup> bytes. "
        '<span class="better">Green</span> is better than dense and <span class="worse">red</span> worse, only where '
        "the whole interval of paired differences is on one side of 0. "
    )
    if records[0].retrieval:
        text += "Numbers found come with their 95% Wilson interval. "
    if records[0].cost is not None:
        text += (
            "Times were taken in turn with the dense model in the same process; speed-ups are dense time over this "
            "one's, with the 20th and 80th percentile; the dense row is dense against a second copy of itself, so its "
            "spread is the noise of the machine. Peak memory is of activations and cache in one prefill, against dense."
        )
    return f'<p class="soft">{text}</p>'


def _plots(records: Sequence[DecodeRecord]) -> str:
    drawn = [*plots.position_plots(records), ("NLL above dense against cache bytes", plots.trade_plot(records))]
    for index, result in enumerate(records[0].retrieval):
        kind = KIND_TITLES[result.kind]
        drawn.append((f"Numbers found by depth: {kind}", plots.depth_plot(records, index)))
        drawn.append((f"Numbers found against cache bytes: {kind}", plots.recall_trade_plot(records, index)))
    figures = "".join(f"<figure><figcaption>{escape(t)}</figcaption>{svg}</figure>" for t, svg in drawn)
    return f'<h2>Plots</h2><div class="plots">{figures}</div>'


def _pairs(records: Sequence[DecodeRecord]) -> str:
    """Paired differences of retrieval, which the first table has no room for."""
    if not records[0].retrieval:
        return ""
    body = ""
    for record in records:
        for result in record.retrieval:
            p_value = "-" if result.p_value is None else f"{result.p_value:.3f}"
            row = [record.label, KIND_TITLES[result.kind], f"{result.hits} of {result.asked}"]
            row += [difference(result.difference), p_value]
            body += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n"
    head = "<th>attention</th><th>prompt</th><th>found</th><th>recall less dense (95%)</th><th>p (McNemar)</th>"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>Retrieval, prompt by prompt</h2><div class="wide">{table}</div>'


def _batches(records: Sequence[DecodeRecord]) -> str:
    if records[0].cost is None:
        return ""
    body = ""
    for record in records:
        for one in record.cost.batches if record.cost is not None else ():
            first = words.times(one.first_token_speedup) if one.first_token_speedup else "-"
            row = [record.label, str(one.batch), first, words.times(one.token_speedup)]
            spread = one.candidate.token
            row += [f"{spread.p50 * 1e3:.1f} ({spread.p20 * 1e3:.1f}-{spread.p80 * 1e3:.1f})"]
            row += [f"{one.tokens_per_second:,.1f}"]
            body += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n"
    head = "<th>attention</th><th>batch</th><th>speed-up, first token</th><th>speed-up, a token</th>"
    head += "<th>ms a token, p50 (p20-p80)</th><th>tokens/s</th>"
    cost = records[0].cost
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    asked = (
        f"After prompts of {cost.prompt_tokens:,} tokens, {cost.new_tokens} tokens each. Prompts are read at the first "
    )
    asked += "batch size; larger ones decode on from its caches, rows repeated."
    return f'<h2>Speed by batch size</h2><p>{asked}</p><div class="wide">{table}</div>'


def _gates(records: Sequence[DecodeRecord]) -> str:
    body = ""
    for record in records:
        if record.cost is not None and record.cost.gate is not None:
            body += f"<tr><td>{escape(record.label)}</td>{gate_cells(record.cost.gate)}</tr>\n"
    if not body:
        return ""
    head = "<th>attention</th><th>passed</th><th>error</th><th>allowed</th><th>against</th>"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return (
        "<h2>Gates</h2><p>Nothing is timed before the same process has compared it with its oracle. The error is the "
        f'largest, in the tensor that is worst.</p><div class="wide">{table}</div>'
    )


def _canaries(record: DecodeRecord) -> str:
    body = ""
    for result in record.canaries:
        row = [result.name, f"{result.figure:.2g}", f"{'at least' if result.at_least else 'at most'} {result.limit:g}"]
        row.append("yes" if result.passed else "no")
        body += "<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n"
    head = "<th>check</th><th>figure, nats</th><th>limit</th><th>passed</th>"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>Canaries</h2><p>Without these there would be no result.</p><div class="wide">{table}</div>'
