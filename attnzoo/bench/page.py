"""The report as one HTML file that needs nothing else: no script, no network, no other file."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from html import escape

from attnzoo.bench import plots
from attnzoo.bench import summary as words
from attnzoo.bench.record import Cost, Detection, Gate, Part, Perplexity, Quality, Quantiles, Record, Side, Stage
from attnzoo.bench.summary import Group, Qualities, Summary, Verdict, summarise
from attnzoo.units import megabytes

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d7dce1; --paper: #ffffff; --card: #f5f7f9;
        --better: #11702f; --worse: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --soft: #9aa5b1; --line: #38404a; --paper: #14181d; --card: #1d232a;
          --better: #5fd083; --worse: #ff8a80; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.5 system-ui, sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 24px 16px 64px; }
h1 { font-size: 1.7rem; margin: 0 0 4px; }
h2 { font-size: 1.2rem; margin: 36px 0 8px; }
p, dl { margin: 6px 0; max-width: 78ch; }
.soft, figcaption, dt { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .88rem; width: 100%; }
th, td { padding: 6px 7px; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child, td.text { text-align: left; }
td.text { white-space: normal; }
td small { color: var(--soft); font-size: .85em; }
tr.group td { padding-top: 22px; font-weight: 600; }
tr.group span { position: sticky; left: 8px; display: inline-block; max-width: calc(100vw - 48px); }
tr.group small { font-weight: 400; }
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

HEAD = (
    "attention",
    "ms<br><small>p50 (p20-p80)</small>",
    "speed-up<br><small>p50 (p20-p80)</small>",
    "FLOPs",
    "peak memory",
    "cache held<br><small>allocated</small>",
    "parameters",
    "quality<br><small>95% interval</small>",
    "quality kept<br><small>95% interval</small>",
)
TRAINED = (
    *("top-1 % (95% Wilson)", "kept (95%)", "right", "top-5 %", "calibration error"),
    *("last epoch's loss", "training, s"),
)
DETECTED = ("AP %", "kept", "AP50 %", "AP75 %", "small %", "medium %", "large %", "AP of each seed", "images", "boxes")
STAGED = ("stage", "ms<br><small>p50 (p20-p80)</small>", "speed-up<br><small>p50 (p20-p80)</small>", "part of the time",
          "FLOPs", "peak memory", "parameters")  # fmt: skip
SCORED = ("perplexity", "kept (95%)", "NLL, nats a token", "above dense (95%)", "windows of tokens")
A_CALL = {
    "forward": "ms a forward",
    "training": "ms a forward and backward",
    "prefill": "ms a prompt",
    "decode": "ms a token",
}
A_SECOND = {"forward": "images", "training": "images", "prefill": "tokens", "decode": "tokens"}


def html_page(records: Iterable[Record], config: str | None = None, sections: Sequence[str] = ()) -> str:
    """Give the page.

    Parameters
    ----------
    records
        Of one config.
    config
        The config as text, to be shown at the end.
    sections
        Further parts in HTML, each with a heading, to be shown before that.
    """
    summary = summarise(records)
    title = f"attnzoo benchmark: {summary.any.benchmark}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _what_was_run(summary),
        _table(summary),
        _how_to_read(),
        _all_plots(summary),
        _stages(summary),
        _quality_tables(summary),
        *sections,
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
    facts = {}
    for part in summary.parts:
        groups = summary.of(part)
        shapes = next((row.shapes for group in groups for row in group.rows if row.shapes is not None), None)
        row = groups[0].rows[0]
        hosts = len({group.host for group in groups})
        told = f"{row.host}{f' and {hosts - 1} more' if hosts > 1 else ''}, {row.dtype}"
        if shapes is not None:
            prefix = f", {shapes.prefix} prefix tokens" if shapes.prefix else ""
            told += f"; {shapes.depth} attention layers, width {shapes.dim}, {shapes.heads} heads{prefix}"
            told += f"; batch {_batches(groups)}"
        facts[part.capitalize()] = told
    facts |= {
        "Machine": words.machine(summary),
        "Versions": "; ".join(words.versions(summary)),
        "Measured": words.dates(summary),
        "Config": one.config_hash,
        "Again": one.command,
    }
    if words.keeps_freed_memory(summary):
        facts["Memory"] = "while timed, the process keeps what is freed, as with a caching allocator"
    warning = ""
    if len(words.versions(summary)) > 1:
        warning = '<p class="worse">These records were made by more than one version of the code or its libraries.</p>'
    cells = "".join(f"<dt>{name}</dt><dd>{escape(text)}</dd>" for name, text in facts.items())
    return f"<dl>{cells}</dl>{warning}"


def _batches(groups: Sequence[Group]) -> str:
    """Batch sizes: one for all, or one for each token count."""
    found = {g.tokens: row.shapes.batch for g in groups for row in g.rows if row.shapes is not None}
    if len(set(found.values())) == 1:
        return str(next(iter(found.values())))
    return ", ".join(f"{batch} at {tokens:,} tokens" for tokens, batch in found.items())


def _table(summary: Summary) -> str:
    """All rows of cost, in groups that were measured alike."""
    if not summary.groups:
        return ""
    head = "".join(f"<th>{name}</th>" for name in HEAD)
    body = ""
    for group in summary.groups:
        title = f"{escape(group.host)}: {group.title} <small>({A_CALL[group.phase]})</small>"
        body += f'<tr class="group"><td class="text" colspan="{len(HEAD)}"><span>{title}</span></td></tr>\n'
        body += "".join(_row(group, row) for row in group.rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(group: Group, row: Record) -> str:
    opening = '<tr class="base">' if row.is_baseline else "<tr>"
    opening += f"<td>{escape(row.label)}</td>"
    if row.cost is None:
        what = f'<span class="worse">{row.status}</span>: {escape(words.one_line(row.message))}'
        return f'{opening}<td class="text" colspan="{len(HEAD) - 1}">{what}</td></tr>\n'
    side, ratios, peak = row.cost.candidate, row.cost.ratios, words.activation_ratio(row)
    held = side.memory.activation_peak_bytes or side.memory.allocator_peak_bytes
    kept = words.quality_verdict(row.quality, next((r.quality for r in group.rows if r.is_baseline), None))
    cells = [
        _cell(words.milliseconds(side.latency_ms), small=f"{side.throughput:,.1f} {A_SECOND[group.phase]}/s"),
        _cell(words.times(ratios.speedup), words.speed_verdict(ratios.speedup, words.noise(group.rows))),
        _cell(words.ratio(ratios.flops), words.need_verdict(ratios.flops), _flops_small(row.cost)),
        _cell(words.ratio(peak), words.memory_verdict(row), megabytes(held) if held else ""),
        _cell(words.ratio(ratios.cache_held), words.need_verdict(ratios.cache_held), _cache_small(row.cost)),
        _cell(words.ratio(words.size_ratio(row)), words.need_verdict(words.size_ratio(row)), f"{words.size(row):,}"),
        _cell(words.absolute(row.quality), kept),
        _cell(words.kept(row.quality), kept),
    ]
    return opening + "".join(cells) + "</tr>\n"


def _cache_small(cost: Cost) -> str:
    memory = cost.candidate.memory
    if memory.cache_held_bytes is None:
        return ""
    held, allocated = megabytes(memory.cache_held_bytes), megabytes(memory.cache_allocated_bytes)
    return f"{held}\n{words.ratio(cost.ratios.cache_allocated)} {allocated}"


def _cell(text: str, verdict: Verdict = "same", small: str = "") -> str:
    inner = escape(text) if verdict == "same" else f'<span class="{verdict}">{escape(text)}</span>'
    lines = "".join(f"<br><small>{escape(line)}</small>" for line in small.splitlines())
    return f"<td>{inner}{lines}</td>"


def _how_to_read() -> str:
    return (
        '<p class="soft">Ratios are to the same host\'s own dense attention, measured in the same process. Speed-up is '
        "dense time over this one's, pair by pair, the two called in turn: above 1x is faster. For FLOPs, peak memory "
        "(of activations and of the cache, in one call), cache and parameters (of the model, or of the layer where it "
        "was timed alone) below 1x is less. Quality "
        "kept is accuracy or AP over the dense one's, or dense perplexity over perplexity: above 1x is better than "
        "dense. "
        '<span class="better">Green</span> is better than dense and <span class="worse">red</span> worse, for '
        "speed-ups only where the whole 20th to 80th percentile is on one side of 1x and of the dense row's spread, "
        "for quality only where its interval leaves 1x out (it is that of images or of windows of text, not that "
        "of seeds). "
        "The dense row is dense against a second copy of itself, so its spread is the noise of the machine. "
        "Milliseconds of two rows were not taken in turn: compare speed-ups. FLOPs are those of matrix products, "
        "convolutions and attention; element by element work is not counted. MB are 10<sup>6</sup> bytes.</p>"
    )


def _all_plots(summary: Summary) -> str:
    drawn = []
    if summary.groups:
        drawn = [
            ("Quality kept against speed-up; bars from p20 to p80, and 95%", plots.speed_trade_plot(summary)),
            ("Quality kept against memory; bars are 95%", plots.memory_trade_plot(summary)),
        ]
    if summary.cost:
        drawn += [
            ("Latency of a call against token count", plots.latency_plot(summary)),
            ("Peak memory of activations against token count", plots.memory_plot(summary)),
        ]
    drawn.append(("Training loss, first seed", plots.training_plot(summary)))
    figures = "".join(f"<figure><figcaption>{title}</figcaption>{svg}</figure>" for title, svg in drawn if svg)
    return f'<h2>Plots</h2><div class="plots">{figures}</div>' if figures else ""


def _quality_tables(summary: Summary) -> str:
    if not summary.quality:
        note = next((row.quality_note for group in summary.groups for row in group.rows), "")
        return f"<h2>Quality</h2><p>None measured: {escape(note)}.</p>"
    found = ""
    tables: dict[Part, tuple[tuple[str, ...], Callable[[Qualities], list[str]]]] = {
        "vision": (TRAINED, _trained_cells),
        "detection": (DETECTED, _detected_cells),
        "language": (SCORED, _scored_cells),
    }
    for part, (columns, cells) in tables.items():
        rows = [row for row in summary.quality if row.part == part]
        if not rows:
            continue
        note = next((row.quality.note for row in rows if row.quality is not None), "")
        body = ""
        for row in rows:
            body += f"<tr><td>{escape(row.label)}</td>"
            if row.quality is None:
                what = f'<span class="worse">{row.status}</span>: {escape(words.one_line(row.message))}'
                body += f'<td class="text" colspan="{len(columns)}">{what}</td></tr>\n'
                continue
            body += "".join(_cell(text) for text in cells(row.quality)) + "</tr>\n"
        head = "".join(f"<th>{name}</th>" for name in ("attention", *columns))
        found += f'<p>{escape(note)}{_canary(rows)}</p><div class="wide"><table><thead><tr>{head}</tr></thead>'
        found += f"<tbody>{body}</tbody></table></div>"
    return f"<h2>Quality</h2>{found}"


def _trained_cells(q: Qualities) -> list[str]:
    if not isinstance(q, Quality):
        return []
    right = f"{sum(t.correct for t in q.trainings)} of {q.images}"
    losses = ", ".join(f"{t.final_loss:.3f}" for t in q.trainings)
    top5 = "-" if q.top5 is None else f"{q.top5:.1%}"[:-1]
    calibration = "-" if q.calibration_error is None else f"{q.calibration_error:.3f}"
    seconds = ", ".join(f"{t.seconds:.0f}" for t in q.trainings)
    return [words.absolute(q), words.kept(q), right, top5, calibration, losses, seconds]


def _detected_cells(q: Qualities) -> list[str]:
    if not isinstance(q, Detection):
        return []
    parts = (q.ap50, q.ap75, q.ap_small, q.ap_medium, q.ap_large)
    figures = ["-" if value is None else f"{100 * value:.1f}" for value in parts]
    seeds = ", ".join(f"{100 * one.ap:.1f}" for one in q.trainings)
    return [f"{100 * q.ap:.1f}", words.kept(q), *figures, seeds, f"{q.images:,}", f"{q.boxes:,}"]


def _stages(summary: Summary) -> str:
    """What each stage of a model costs, where stages were told apart."""
    body = ""
    for group in summary.groups:
        rows = [row for row in group.rows if row.cost is not None and row.cost.candidate.stages]
        if not rows:
            continue
        title = f"{escape(group.host)}: {group.title}"
        body += f'<tr class="group"><td class="text" colspan="{len(STAGED) + 1}"><span>{title}</span></td></tr>\n'
        dense = next((row.cost.baseline for row in rows if row.cost is not None), None)
        for row in rows:
            body += "".join(_stage_row(row, stage, words.noise(rows), dense) for stage in _staged(row))
    if not body:
        return ""
    head = "".join(f"<th>{name}</th>" for name in ("attention", *STAGED))
    told = (
        "The encoder's attention is a part of the encoder. Times were taken within calls of the whole model; memory is "
        "that of the stage called alone. At most: Amdahl's bound, were the attention in that stage to take no time."
    )
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"
    return f'<h2>Stages</h2><p class="soft">{told}</p><div class="wide">{table}</div>'


def _giga(flops: int | None) -> str:
    return "-" if flops is None else f"{flops / 1e9:,.2f} G"


def _flops_small(cost: Cost) -> str:
    """The candidate's FLOPs; where there is no ratio, why."""
    return cost.candidate.flops_note or cost.baseline.flops_note or _giga(cost.candidate.flops)


def _staged(row: Record) -> tuple[Stage, ...]:
    return () if row.cost is None else row.cost.candidate.stages


def _stage_row(row: Record, stage: Stage, still: Quantiles | None, dense: Side | None) -> str:
    opening = '<tr class="base">' if row.is_baseline else "<tr>"
    held = stage.activation_peak_bytes or stage.allocator_peak_bytes
    bound = None if row.is_baseline or dense is None else dense.most_speedup(f"{stage.name}'s attention", stage.name)
    cells = [
        f"<td>{escape(row.label)}</td>",
        f"<td>{escape(stage.name)}</td>",
        _cell(words.milliseconds(stage.latency_ms)),
        _cell(
            words.times(stage.speedup),
            "same" if row.is_baseline else words.speed_verdict(stage.speedup, still),
            f"at most {bound:.2f}x" if bound is not None else "",
        ),
        _cell(f"{stage.share:.0%}"),
        _cell(_giga(stage.flops), small=stage.flops_note),
        _cell(megabytes(held) if held else "-"),
        _cell(f"{stage.parameters:,}"),
    ]
    return opening + "".join(cells) + "</tr>\n"


def _scored_cells(q: Qualities) -> list[str]:
    if not isinstance(q, Perplexity):
        return []
    d = q.difference
    difference = "-" if d is None else f"{d.mean:+.3f} ({d.low:+.3f} to {d.high:+.3f})"
    return [f"{q.perplexity:.2f}", words.kept(q), f"{q.nll:.3f}", difference, f"{len(q.window_nll)} of {q.tokens:,}"]


def _canary(rows: Iterable[Record]) -> str:
    canary = next((r.quality.canary for r in rows if isinstance(r.quality, Perplexity) and r.quality.canary), None)
    if canary is None:
        return ""
    told = f"{canary.label} is {canary.above_dense:+.2f} nats a token from dense, must be {canary.at_least:+g} or more"
    return f". Canary: {escape(told)}."


def _gates(summary: Summary) -> str:
    body = ""
    for group in summary.groups:
        if group.phase == "decode":
            continue  # the gate of the prefill
        for row in group.rows:
            ran = ", ".join(op.removeprefix("aten.") for op in row.backends) or "-"
            body += f"<tr><td>{escape(row.label)}</td><td>{group.tokens:,}</td>{gate_cells(row.gate)}"
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


def gate_cells(gate: Gate | None) -> str:
    """Table cells of a gate: whether it passed, its error, the error allowed, and the oracle."""
    if gate is None:
        return '<td>-</td><td>-</td><td>-</td><td class="text">not reached</td>'
    error = "not finite" if gate.max_abs_error is None else f"{gate.max_abs_error:.1e}"
    allowed = "-" if gate.scale is None else f"{gate.tolerance * gate.scale:.1e}"
    passed = "yes" if gate.passed else '<span class="worse">no</span>'
    detail = f" ({gate.detail})" if gate.detail else ""
    if gate.cache_limit is not None:
        detail += f"; its cache held at most {gate.cache_most} entries a head, {gate.cache_limit} allowed"
    return f'<td>{passed}</td>{_cell(error)}{_cell(allowed)}<td class="text">{escape(gate.oracle + detail)}</td>'
