"""The report of trained classifiers: accuracy and what a step costs, how they learnt, and the worst mistakes."""

from __future__ import annotations

import base64
import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image
from rich.table import Table

from attnzoo.bench import summary as words
from attnzoo.bench.page import STYLE
from attnzoo.bench.record import Quality, Record
from attnzoo.training import curves
from attnzoo.training.images import Splits
from attnzoo.training.score import Scored

SHOWN_PIXELS = 96
MORE = """
.mistakes { display: grid; grid-template-columns: repeat(auto-fill, minmax(112px, 1fr)); gap: 12px; }
.mistakes img { width: 96px; height: 96px; object-fit: contain; image-rendering: pixelated; background: var(--card); }
.mistakes figcaption { font-size: .8rem; line-height: 1.3; }
"""
HEAD = ("attention", "top-1 %", "each seed", "top-5 %", "calibration error", "parameters")
COST = ("training step", "speed-up", "its memory")


def rows(qualities: Mapping[str, Quality], steps: Mapping[str, Record]) -> list[list[str]]:
    """The table: a row an attention.

    Parameters
    ----------
    qualities
        By label. Where there are several seeds, the mean and the standard deviation of their accuracies are given.
    steps
        Records of what a training step costs, by label; where there is none at all, those columns are left out.
    """
    return [
        [label, *_quality_cells(quality), *(_cost_cells(steps.get(label)) if steps else ())]
        for label, quality in qualities.items()
    ]


def _quality_cells(quality: Quality) -> list[str]:
    top1 = [100 * t.correct / t.images for t in quality.trainings]
    if len(top1) > 1:
        spread = f"{statistics.fmean(top1):.2f} ± {statistics.stdev(top1):.2f}"
    else:
        spread = f"{top1[0]:.2f} ({100 * quality.low:.2f}-{100 * quality.high:.2f})"
    return [
        spread,
        ", ".join(f"{value:.2f}" for value in top1),
        "-" if quality.top5 is None else f"{100 * quality.top5:.2f}",
        "-" if quality.calibration_error is None else f"{quality.calibration_error:.3f}",
        f"{quality.trainings[0].parameters or 0:,}",
    ]


def _cost_cells(record: Record | None) -> list[str]:
    if record is None or record.cost is None:
        return ["-"] * len(COST)
    speed = record.cost.ratios.speedup
    return [
        f"{record.cost.candidate.latency_ms.p50:.1f} ms",
        "" if record.is_baseline else words.times(speed),
        "" if record.is_baseline else words.ratio(words.activation_ratio(record)),
    ]


def heading(steps: Mapping[str, Record]) -> tuple[str, ...]:
    """What the columns are called."""
    return HEAD + COST if steps else HEAD


def step_costs(records: Iterable[Record]) -> dict[str, Record]:
    """What a training step costs, by label: the records of forwards and backwards at the fewest tokens measured."""
    found = [record for record in records if record.cost is not None and record.phase == "training"]
    fewest = min((record.tokens for record in found), default=0)
    return {record.label: record for record in found if record.tokens == fewest}


def how_to_read(qualities: Mapping[str, Quality], steps: Mapping[str, Record]) -> str:
    """What the columns mean."""
    images = next(iter(qualities.values())).trainings[0].images
    said = (
        f"Top-1 on {images:,} test images: mean ± standard deviation of the seeds, or one seed with its 95% Wilson "
        "interval over images. Calibration error is the expected one in 15 bins."
    )
    if steps:
        batch = next(record.shapes.batch for record in steps.values() if record.shapes)
        said += (
            f" A training step is a forward and a backward of {batch} images, measured beside the dense model's in one "
            "process: p50, the dense one's time over it (p50, p20-p80), and peak memory over the dense one's."
        )
    return said


def console_table(qualities: Mapping[str, Quality], steps: Mapping[str, Record]) -> Table:
    """The table for a terminal."""
    table = Table()
    for name in heading(steps):
        table.add_column(name, justify="left" if name == "attention" else "right")
    for row in rows(qualities, steps):
        table.add_row(*row)
    return table


def markdown_table(records: Sequence[Record]) -> str:
    """The table in Markdown, from a file of records of cost and quality."""
    qualities = {r.label: r.quality for r in records if r.kind == "quality" and isinstance(r.quality, Quality)}
    steps = step_costs(records)
    head = heading(steps)
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    lines += ["| " + " | ".join([f"`{row[0]}`", *row[1:]]) + " |" for row in rows(qualities, steps)]
    return "\n".join(lines)


def html_page(
    scored: Sequence[Scored],
    qualities: Mapping[str, Quality],
    steps: Mapping[str, Record],
    splits: Splits,
    costs: Sequence[Path],
) -> str:
    """Give the page: one file that needs no other but the pages of cost that it links to.

    Parameters
    ----------
    scored
        All runs of one config.
    qualities, steps
        As `rows` takes them.
    splits
        Where their test images are.
    costs
        Folders of records of cost, each with a ``report.html``, beside the page.
    """
    config = scored[0].run.config
    name = escape(config.name)
    head = "".join(f"<th>{escape(cell)}</th>" for cell in heading(steps))
    lines = rows(qualities, steps)
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>\n" for row in lines)
    plots = {
        "Test accuracy after each epoch": curves.learning_plot(qualities),
        "Training loss": curves.loss_plot(qualities),
        "Test accuracy: every seed a dot, their mean a stroke; one seed has its 95% interval": curves.accuracy_plot(
            qualities, config.baseline
        ),
    }
    figures = "".join(f"<figure><figcaption>{title}</figcaption>{svg}</figure>" for title, svg in plots.items() if svg)
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
<p class="soft">{escape(how_to_read(qualities, steps))}</p>
<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>
<p>{f"What they cost: {links}." if costs else "No cost was measured: the config lists none."}</p>
<h2>Plots</h2><div class="plots">{figures}</div>
<h2>Most confidently got wrong</h2>
<p class="soft">Test images whose wrong answer was given the highest probability, of each attention's first seed.</p>
{shown}
<h2>Config</h2><pre>{escape(config.to_yaml())}</pre>
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
