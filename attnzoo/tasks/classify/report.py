"""The report of trained classifiers: accuracy and what a step costs, how they learned, and the worst mistakes."""

from __future__ import annotations

import io
import statistics
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from attnzoo.bench import words
from attnzoo.bench.html import Section, page, pictures, plots
from attnzoo.bench.record import Record
from attnzoo.errors import DataError
from attnzoo.tables import Column, Table
from attnzoo.tasks.classify import curves
from attnzoo.tasks.classify.images import Splits
from attnzoo.tasks.classify.quality import Accuracy
from attnzoo.tasks.classify.score import Scored

SHOWN_PIXELS = 96
HEAD = (Column("attention", code=True), "top-1 %", "each seed", "top-5 %", "calibration error", "parameters")
COST = ("training step", "speed-up", "its memory")


def rows(qualities: Mapping[str, Accuracy], steps: Mapping[str, Record]) -> list[list[str]]:
    """The table: one row per attention.

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


def _quality_cells(quality: Accuracy) -> list[str]:
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


def heading(steps: Mapping[str, Record]) -> tuple[Column | str, ...]:
    """What the columns are called."""
    return HEAD + COST if steps else HEAD


def step_costs(records: Iterable[Record]) -> dict[str, Record]:
    """What a training step costs, by label: the records of forwards and backwards at the fewest tokens measured."""
    found = [record for record in records if record.cost is not None and record.phase == "training"]
    fewest = min((record.tokens for record in found), default=0)
    return {record.label: record for record in found if record.tokens == fewest}


def how_to_read(qualities: Mapping[str, Accuracy], steps: Mapping[str, Record]) -> str:
    """What the columns mean."""
    images = next(iter(qualities.values())).trainings[0].images
    said = (
        f"Top-1 on {images:,} test images: mean ± standard deviation of the seeds, or one seed with its 95% Wilson "
        "interval over images. Calibration error is the expected one in 15 bins."
    )
    if steps:
        batch = next(record.shapes.batch for record in steps.values() if record.shapes)
        said += (
            f" A training step is a forward and a backward of {batch} images, measured against the dense model's in "
            "one process: p50, the dense one's time over it (p50, p20-p80), and peak memory over the dense one's."
        )
    return said


def results_table(qualities: Mapping[str, Accuracy], steps: Mapping[str, Record]) -> Table:
    """A row per attention; arguments as those of `rows`."""
    return Table(heading(steps), rows(qualities, steps))


def markdown_table(records: Sequence[Record]) -> str:
    """The table in Markdown, from a file of records of cost and quality."""
    qualities = {r.label: r.quality for r in records if r.kind == "quality" and isinstance(r.quality, Accuracy)}
    return results_table(qualities, step_costs(records)).markdown()


def html_page(
    scored: Sequence[Scored],
    qualities: Mapping[str, Accuracy],
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
    drawn = (
        ("Test accuracy after each epoch", curves.learning_plot(qualities)),
        ("Training loss", curves.loss_plot(qualities)),
        (
            "Test accuracy: every seed a dot, their mean a stroke; one seed has its 95% interval",
            curves.accuracy_plot(qualities, config.baseline),
        ),
    )
    links = ", ".join(f'<a href="{escape(f.name)}/report.html">{escape(f.name)}</a>' for f in costs)
    shown, seen = "", set[str]()
    for one in scored:
        if one.run.label not in seen and one.mistakes:
            seen.add(one.run.label)
            shown += f"<h3>{escape(one.run.label)}, seed {one.run.seed}</h3>{_mistakes(one, splits)}"
    return page(
        config.name,
        [
            Section(plots(drawn)),
            Section(results_table(qualities, steps).html(), "Results", how_to_read(qualities, steps)),
            Section(links, "Cost", "" if costs else "No cost was measured: the config lists none."),
            Section(
                shown,
                "Most confidently got wrong",
                "Test images whose wrong answer was given the highest probability, of each attention's first seed.",
            ),
        ],
        config=config.to_yaml(),
    )


def _mistakes(one: Scored, splits: Splits) -> str:
    shown = []
    for mistake in one.mistakes:
        source: Any = splits.test
        try:
            picture, name = _picture(source.read(mistake["index"])[0]), source.name(mistake["index"])
        except (AttributeError, OSError, DataError):  # a stream has no places; a file may have changed since
            picture, name = b"", f"image {mistake['index']}"
        target, answer = (_class(splits, mistake[key]) for key in ("target", "answer"))
        shown.append((name, picture, f"{target}\ntaken for {answer}\n{mistake['confidence']:.0%} sure"))
    return pictures(shown, SHOWN_PIXELS)


def _class(splits: Splits, number: int) -> str:
    return splits.names[number] if splits.names else str(number)


def _picture(image: Image.Image) -> bytes:
    image = image.copy()
    image.thumbnail((SHOWN_PIXELS, SHOWN_PIXELS))
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()
