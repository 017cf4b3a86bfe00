"""The report as one HTML file that needs nothing else: no script, no network, no other file."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from attnzoo.bench import plots
from attnzoo.bench import summary as words
from attnzoo.bench.record import Gate, Record
from attnzoo.bench.summary import Summary, Verdict, summarise

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d7dce1; --paper: #ffffff; --card: #f5f7f9;
        --better: #11702f; --worse: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #9aa5b1; --line: #38404a; --paper: #14181d; --card: #1d232a;
          --better: #5fd083; --worse: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.7rem; margin: 0 0 4px; }
h2 { font-size: 1.2rem; margin: 36px 0 8px; }
p, dl { margin: 6px 0; max-width: 78ch; }
.soft, figcaption, dt { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem; width: 100%; }
th, td { padding: 6px 8px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child, td.text { text-align: left; }
td.text { white-space: normal; }
td small { color: var(--soft); font-size: .85em; }
tr.base td { background: var(--card); }
.better { color: var(--better); font-weight: 600; }
.worse { color: var(--worse); font-weight: 600; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 480px), 1fr)); gap: 24px; }
figure { margin: 0; }
figure svg { width: 100%; height: auto; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 2px 16px; }
dd { margin: 0; overflow-wrap: anywhere; }
pre { background: var(--card); padding: 12px; overflow-x: auto; font-size: .85rem; }
code { background: var(--card); padding: 1px 4px; }
@media (max-width: 600px) { dl { grid-template-columns: 1fr; } dd { margin-bottom: 6px; } }
"""

COST_HEAD = (
    "attention",
    "ms a forward<br><small>p50 (p20-p80)</small>",
    "speed-up<br><small>p50 (p20-p80)</small>",
    "images/s",
    "FLOPs",
    "peak memory",
    "parameters",
    "top-1 %<br><small>95% interval</small>",
    "kept",
)


def html_page(records: Iterable[Record], config: str | None = None) -> str:
    """Give the page.

    Parameters
    ----------
    records
        Of one config.
    config
        The config as YAML, to be shown at the end.
    """
    summary = summarise(records)
    title = f"attnzoo benchmark: {summary.any.benchmark}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _what_was_run(summary),
        *(_cost_table(summary, tokens, rows) for tokens, rows in summary.cost.items()),
        _how_to_read(),
        _all_plots(summary),
        _quality_table(summary),
        _gates(summary),
        "" if config is None else f"<h2>Config</h2><pre>{escape(config)}</pre>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body><main>\n"
        + "\n".join(part for part in parts if part)
        + "\n</main></body></html>\n"
    )


def _what_was_run(summary: Summary) -> str:
    one = summary.any
    row = next((r for rows in summary.cost.values() for r in rows if r.shapes is not None), None)
    batches = ", ".join(
        f"{rows[0].shapes.batch} at {tokens:,} tokens" for tokens, rows in summary.cost.items() if rows[0].shapes
    )
    facts = {"Host": f"{one.host}, {one.dtype}"}
    if row is not None and row.shapes is not None:
        s = row.shapes
        facts["Shapes"] = (
            f"{s.depth} attention layers, width {s.dim}, {s.heads} heads, {s.prefix} prefix tokens; images a forward: "
            f"{batches}"
        )
    facts |= {
        "Machine": words.machine(summary),
        "Versions": "; ".join(words.versions(summary)),
        "Measured": words.dates(summary),
        "Config": one.config_hash,
        "Again": one.command,
    }
    warning = ""
    if len(words.versions(summary)) > 1:
        warning = '<p class="worse">These records were made by more than one version of the code or its libraries.</p>'
    cells = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f"<dl>{cells}</dl>{warning}"


def _cost_table(summary: Summary, tokens: int, rows: list[Record]) -> str:
    dense = next((row.quality for row in rows if row.is_baseline), None)
    still = words.noise(rows)
    head = "".join(f"<th>{name}</th>" for name in COST_HEAD)
    body = ""
    for row in rows:
        opening = '<tr class="base">' if row.is_baseline else "<tr>"
        body += f"{opening}<td>{escape(row.label)}</td>"
        if row.cost is None:
            what = f'<span class="worse">{row.status}</span>: {escape(words.one_line(row.message))}'
            body += f'<td class="text" colspan="{len(COST_HEAD) - 1}">{what}</td></tr>\n'
            continue
        side, ratios, peak = row.cost.candidate, row.cost.ratios, words.activation_ratio(row)
        held = side.memory.activation_peak_bytes or side.memory.allocator_peak_bytes
        cells = [
            _cell(words.milliseconds(side.latency_ms)),
            _cell(words.times(ratios.speedup), words.speed_verdict(ratios.speedup, still)),
            _cell(f"{side.throughput:,.1f}"),
            _cell(words.ratio(ratios.flops), words.need_verdict(ratios.flops), f"{side.flops / 1e9:,.2f} G"),
            _cell(words.ratio(peak), words.memory_verdict(row), words.megabytes(held)),
            _cell(words.ratio(ratios.parameters), words.need_verdict(ratios.parameters), f"{side.parameters:,}"),
            _cell(words.accuracy(row.quality), words.quality_verdict(row.quality, dense)),
            _cell(words.ratio(row.quality.ratio if row.quality is not None else None)),
        ]
        body += "".join(cells) + "</tr>\n"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>{tokens:,} tokens</h2><div class="wide">{table}</div>'


def _cell(text: str, verdict: Verdict = "same", small: str = "") -> str:
    inner = escape(text) if verdict == "same" else f'<span class="{verdict}">{escape(text)}</span>'
    return f"<td>{inner}{f'<br><small>{escape(small)}</small>' if small else ''}</td>"


def _how_to_read() -> str:
    return (
        '<p class="soft">Ratios are to the host\'s own dense attention, measured in the same process. Speed-up is '
        "dense time over this one's, pair by pair, the two called in turn: above 1x is faster. For FLOPs, peak memory "
        "(of activations, one forward) and parameters (of the model) below 1x is less. "
        '<span class="better">Green</span> is better than dense and <span class="worse">red</span> worse, for '
        "speed-ups only where the whole 20th to 80th percentile is on one side of 1x and of the dense row's spread, "
        "for accuracies only where the intervals do not meet (they hold the spread of images, not that of seeds). "
        "The dense row is dense against a second copy of itself, so its spread is the noise of the machine. "
        "Milliseconds of two rows were not taken in turn: compare speed-ups. FLOPs are those of matrix products, "
        "convolutions and attention; element by element work is not counted.</p>"
    )


def _all_plots(summary: Summary) -> str:
    drawn = []
    if summary.cost:
        drawn = [
            ("Latency against token count", plots.latency_plot(summary)),
            ("Peak memory of activations against token count", plots.memory_plot(summary)),
            ("Accuracy kept against speed-up; bars from p20 to p80", plots.trade_plot(summary)),
        ]
    drawn.append(("Training loss, first seed", plots.training_plot(summary)))
    figures = "".join(f"<figure><figcaption>{title}</figcaption>{svg}</figure>" for title, svg in drawn if svg)
    return f'<h2>Plots</h2><div class="plots">{figures}</div>' if figures else ""


def _quality_table(summary: Summary) -> str:
    if not summary.quality:
        note = next((row.quality_note for rows in summary.cost.values() for row in rows), "")
        return f"<h2>Quality</h2><p>None measured: {escape(note)}.</p>"
    note = next((row.quality.note for row in summary.quality if row.quality is not None), "")
    body = ""
    for row in summary.quality:
        body += f"<tr><td>{escape(row.label)}</td>"
        if row.quality is None:
            what = f'<span class="worse">{row.status}</span>: {escape(words.one_line(row.message))}'
            body += f'<td class="text" colspan="4">{what}</td></tr>\n'
            continue
        q = row.quality
        losses = ", ".join(f"{t.final_loss:.3f}" for t in q.trainings)
        seconds = ", ".join(f"{t.seconds:.0f}" for t in q.trainings)
        body += _cell(words.accuracy(q)) + _cell(f"{sum(t.correct for t in q.trainings)} of {q.images}")
        body += _cell(losses) + _cell(seconds) + "</tr>\n"
    head = "<th>attention</th><th>top-1 % (95% Wilson)</th><th>right</th><th>last epoch's loss</th><th>training, s</th>"
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>Quality</h2><p>{escape(note)}</p><div class="wide">{table}</div>'


def _gates(summary: Summary) -> str:
    body = ""
    for tokens, rows in summary.cost.items():
        for row in rows:
            ran = ", ".join(op.removeprefix("aten.") for op in row.backends) or "-"
            body += f"<tr><td>{escape(row.label)}</td><td>{tokens:,}</td>{_gate_cells(row.gate)}"
            body += f'<td class="text">{escape(ran)}</td></tr>\n'
    if not body:
        return ""
    head = "<th>attention</th><th>tokens</th><th>passed</th><th>error</th><th>allowed</th>"
    head += '<th style="text-align:left">against</th><th style="text-align:left">what ran</th>'
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return (
        "<h2>Gates</h2><p>Nothing is timed before the same process has compared it with its oracle. The error is the "
        f'largest, in the tensor that is worst.</p><div class="wide">{table}</div>'
    )


def _gate_cells(gate: Gate | None) -> str:
    if gate is None:
        return '<td>-</td><td>-</td><td>-</td><td class="text">not reached</td>'
    error = "not finite" if gate.max_abs_error is None else f"{gate.max_abs_error:.1e}"
    allowed = "-" if gate.scale is None else f"{gate.tolerance * gate.scale:.1e}"
    passed = "yes" if gate.passed else '<span class="worse">no</span>'
    detail = f" ({gate.detail})" if gate.detail else ""
    return f'<td>{passed}</td>{_cell(error)}{_cell(allowed)}<td class="text">{escape(gate.oracle + detail)}</td>'
