"""The report of trained classifiers: every seed's accuracy, links to what they cost, and the worst mistakes."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table

from attnzoo.bench.page import STYLE
from attnzoo.tasks.classify import wilson_interval
from attnzoo.training.images import Splits
from attnzoo.training.score import Scored

SHOWN_PIXELS = 96
MORE = """
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 12px; }
.mistakes img { width: 96px; height: 96px; object-fit: contain; image-rendering: pixelated; background: var(--card); }
.mistakes figcaption { font-size: .8rem; line-height: 1.3; }
"""
HEAD = ("attention", "top-1 %", "seeds", "top-5 %", "calibration error", "loss", "parameters", "ms a step, p50")


def rows(scored: Sequence[Scored]) -> list[list[str]]:
    """The table: a row an attention; where there are several seeds, their mean and standard deviation."""
    by_label: dict[str, list[Scored]] = {}
    for one in scored:
        by_label.setdefault(one.run.label, []).append(one)
    return [[label, *_cells(runs)] for label, runs in by_label.items()]


def _cells(runs: Sequence[Scored]) -> list[str]:
    def mean(key: str) -> float:
        return statistics.fmean(run.counted[key] for run in runs)

    top1 = [100 * run.counted["top1"] / run.counted["images"] for run in runs]
    if len(top1) > 1:
        spread = f"{statistics.fmean(top1):.2f} ± {statistics.stdev(top1):.2f}"
    else:
        low, high = wilson_interval(runs[0].counted["top1"], runs[0].counted["images"])
        spread = f"{top1[0]:.2f} ({100 * low:.2f}-{100 * high:.2f})"
    steps = [run.result["step_ms"]["p50"] for run in runs if "step_ms" in run.result]
    return [
        spread,
        ", ".join(f"{value:.2f}" for value in top1),
        f"{100 * sum(r.counted['top5'] for r in runs) / sum(r.counted['images'] for r in runs):.2f}",
        f"{mean('calibration_error'):.3f}",
        f"{mean('loss'):.3f}",
        f"{runs[0].result['parameters']:,}",
        f"{statistics.median(steps):.1f}" if steps else "-",
    ]


def how_to_read(scored: Sequence[Scored]) -> str:
    """What the columns mean."""
    images = scored[0].counted["images"]
    return (
        f"Top-1 on {images:,} test images: mean ± standard deviation of the seeds, or one seed with its 95% Wilson "
        "interval over images. Calibration error is the expected one in 15 bins. Steps were timed while training, not "
        "side by side: what an attention costs is in the records of cost."
    )


def console_table(scored: Sequence[Scored]) -> Table:
    """The table for a terminal."""
    table = Table()
    for name in HEAD:
        table.add_column(name, justify="left" if name == "attention" else "right")
    for row in rows(scored):
        table.add_row(*row)
    return table


def markdown_table(scored: Sequence[Scored]) -> str:
    """The table in Markdown."""
    lines = ["| " + " | ".join(HEAD) + " |", "| --- |" + " ---: |" * (len(HEAD) - 1)]
    return "\n".join(lines + ["| " + " | ".join([f"`{row[0]}`", *row[1:]]) + " |" for row in rows(scored)])


def html_page(scored: Sequence[Scored], splits: Splits, costs: Sequence[Path], config: str) -> str:
    """Give the page: one file that needs no other but the pages of cost that it links to.

    Parameters
    ----------
    scored
        All runs.
    splits
        Where their test images are.
    costs
        Folders of records of cost, each with a ``report.html``, beside the page.
    config
        The whole config, as YAML.
    """
    name = escape(scored[0].run.config.name)
    head = "".join(f"<th>{escape(cell)}</th>" for cell in HEAD)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in rows(scored))
    links = ", ".join(f'<a href="{escape(f.name)}/report.html">{escape(f.name)}</a>' for f in costs)
    shown, seen = "", set[str]()
    for one in scored:
        if one.run.label not in seen and one.mistakes:
            seen.add(one.run.label)
            shown += f"<h3>{escape(one.run.label)}, seed {one.run.seed}</h3>{_mistakes(one, splits)}"
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{name}</title><style>{STYLE}{MORE}</style></head><body><main>
<h1>{name}</h1>
<p class="soft">{escape(how_to_read(scored))}</p>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<p>{f"What they cost: {links}." if costs else "No cost was measured: the config lists none."}</p>
<h2>Most confidently got wrong</h2>
<p class="soft">Test images whose wrong answer was given the highest probability, of each attention's first seed.</p>
{shown}
<h2>Config</h2><pre>{escape(config)}</pre>
</main></body></html>
"""


def _mistakes(one: Scored, splits: Splits) -> str:
    figures = ""
    for mistake in one.mistakes:
        source: Any = splits.test
        try:
            picture, name = _picture(source.read(mistake["index"])[0]), source.name(mistake["index"])
        except (AttributeError, OSError):  # a stream has no places
            picture, name = "", f"image {mistake['index']}"
        target, answer = (_class(splits, mistake[key]) for key in ("target", "answer"))
        image = (
            f'<img src="data:image/png;base64,{picture}" alt="{escape(name)}" title="{escape(name)}">'
            if picture
            else ""
        )
        caption = f"{target}<br>taken for {answer}<br>{mistake['confidence']:.0%} sure"
        figures += f"<figure>{image}<figcaption>{caption}</figcaption></figure>\n"
    return f'<div class="mistakes">{figures}</div>'


def _class(splits: Splits, number: int) -> str:
    return escape(splits.names[number] if splits.names else str(number))


def _picture(image: Image.Image) -> str:
    image = image.copy()
    image.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    content = io.BytesIO()
    image.save(content, "PNG")
    return base64.b64encode(content.getvalue()).decode()
