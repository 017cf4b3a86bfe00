"""The parts of the report that detection adds: speed-up at each size of image, AP after each epoch, drawn boxes."""

from __future__ import annotations

import io
import statistics
from collections.abc import Mapping, Sequence
from html import escape

from attnzoo.bench.colors import look
from attnzoo.bench.html import Section, pictures, plots
from attnzoo.bench.plots import INK, add_legend, new_figure, plain_ticks, to_svg
from attnzoo.bench.record import Stage
from attnzoo.errors import DataError
from attnzoo.tasks.detect.quality import Detection
from attnzoo.tasks.detect.score import Judged, Scores
from attnzoo.tasks.detect.stages import ATTENTION, ENCODER
from attnzoo.tasks.records import Record

SHOWN = 4  # images of each kind
SHOWN_PIXELS = 320
COLUMN = 240
TRUE, PREDICTED = "#00b050", "#ff8c00"


def sizes(records: Sequence[Record]) -> Section | None:
    """Speed-up of the encoder and of its attention alone against token count, where several were measured."""
    measured = [one for one in records if one.cost is not None and one.cost.candidate.stage(ENCODER) is not None]
    if len({one.tokens for one in measured}) < 2:
        return None
    drawn = plots(
        (caption, _speed_plot(measured, stage))
        for stage, caption in (
            (ATTENTION, "The encoder's attention alone: speed-up over the detector's own; bars from p20 to p80"),
            (ENCODER, "The whole encoder; dashed: Amdahl's bound, were its attention to take no time"),
        )
    )
    return Section(drawn, "Speed-up against size")


def _speed_plot(records: Sequence[Record], stage: str) -> str:
    figure, axes = new_figure()
    tokens = sorted({one.tokens for one in records})
    reached = [1.0]
    labels = list(dict.fromkeys(one.label for one in records))
    for label in labels:
        color, marker = look(labels, label)
        own = sorted((one for one in records if one.label == label), key=lambda one: one.tokens)
        points = [(one.tokens, found.speedup) for one in own if (found := _stage(one, stage)) is not None]
        x, y = [at for at, _ in points], [speedup.p50 for _, speedup in points]
        axes.plot(x, y, color=color, marker=marker, ms=6, lw=1.8, label=label)
        spreads = [speedup.bounds or (speedup.p50, speedup.p50) for _, speedup in points]
        axes.vlines(x, *zip(*spreads, strict=True), color=color, lw=2, alpha=0.6)
        reached += [value for spread in spreads for value in spread]
    if stage == ENCODER:
        bounds = [(one.tokens, one.cost.baseline.most_speedup(ATTENTION, ENCODER)) for one in records if one.cost]
        known = sorted({(at, bound) for at, bound in bounds if bound is not None})
        axes.plot(*zip(*known, strict=True), color=INK, lw=1.2, ls="--", label="at most")
        reached += [bound for _, bound in known]
    axes.set_xscale("log")
    axes.set_yscale("log")
    ticks = [at for number, at in enumerate(tokens) if number == 0 or at > 1.25 * tokens[number - 1]]
    axes.set_xticks(ticks, [f"{at:,}" for at in ticks])
    axes.minorticks_off()
    plain_ticks(axes.yaxis, reached)
    axes.set_xlabel("tokens")
    axes.set_ylabel("speed-up")
    add_legend(axes)
    return to_svg(figure, f"sizes-{stage}")


def _stage(record: Record, name: str) -> Stage | None:
    return None if record.cost is None else record.cost.candidate.stage(name)


def curves(qualities: Mapping[str, Detection]) -> Section | None:
    """AP50 on the test images after each epoch: one line per attention, the mean of its seeds, their range shaded."""
    shown = {
        label: [(one.epochs, one.epoch_ap50) for one in found.trainings if one.epochs]
        for label, found in qualities.items()
    }
    shown = {label: seeds for label, seeds in shown.items() if seeds}
    if not shown:
        return None
    figure, axes = new_figure()
    for label, seeds in shown.items():
        color, marker = look(list(shown), label)
        epochs = sorted(set.intersection(*(set(times) for times, _ in seeds)))
        each = [[100 * dict(zip(times, values, strict=True))[e] for times, values in seeds] for e in epochs]
        if len(seeds) > 1:
            axes.fill_between(epochs, [min(v) for v in each], [max(v) for v in each], color=color, alpha=0.15, lw=0)
        marked = marker if len(epochs) <= 30 else None
        axes.plot(epochs, [statistics.fmean(v) for v in each], color=color, marker=marked, ms=5, label=label, lw=1.6)
    axes.set_xlabel("epoch")
    axes.set_ylabel("AP50, % of the test images")
    add_legend(axes)
    caption = "AP50 after each epoch; the mean of the seeds, shaded from the lowest to the highest"
    return Section(plots([(caption, to_svg(figure, "ap-curves"))]), "Learning")


def drawn(scores: Mapping[str, Scores], names: Sequence[str]) -> Section:
    """Images with their boxes, the best and the worst of each attention's first seed."""
    body = (
        f'<p><span class="key" style="border-color:{TRUE}"></span> true, '
        f'<span class="key" style="border-color:{PREDICTED}"></span> predicted</p>'
    )
    for label, found in scores.items():
        judged = found.judged
        best, worst = judged[:SHOWN], judged[max(SHOWN, len(judged) - SHOWN) :][::-1]
        for title, images in (("best", best), ("worst", worst)):
            if images:
                head = f"{escape(label)}: {title} of {len(judged)} images (score of {found.threshold:.2f} or more)"
                body += f"<h3>{head}</h3>" + pictures((_picture(one, names) for one in images), COLUMN)
    return Section(
        body,
        "Drawn boxes",
        "Predicted boxes are those of the score that gives the best F1 over all images; images are put in order by "
        "their own F1 at an IoU of 0.5.",
    )


def _picture(one: Judged, names: Sequence[str]) -> tuple[str, bytes, str]:
    name = one.path.rsplit("/", 1)[-1]
    told = f"{name}: {len(one.true)} true, {len(one.predicted)} predicted, F1 {one.f1:.2f}"
    try:
        return name, picture_of(one, names), told
    except DataError as error:  # by now all is scored: one image must not cost the page
        return name, b"", f"{told}\nNot drawn: {error}"


def picture_of(one: Judged, names: Sequence[str]) -> bytes:
    """Draw an image's boxes; gives a JPEG.

    Where there are several classes, the name of each stands at its boxes.

    Raises
    ------
    DataError
        If the image cannot be read, or has pixels of an unknown range; see `attnzoo.pixels.to_mode`.
    """
    from PIL import Image, ImageDraw

    from attnzoo.pixels import to_mode

    try:
        with Image.open(one.path) as opened:
            image = to_mode(opened, "RGB")
    except DataError:
        raise
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"it cannot be read: {error}") from error
    scale = SHOWN_PIXELS / max(image.size)
    image = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    draw = ImageDraw.Draw(image)
    for color, line, boxes in ((TRUE, 4, one.true), (PREDICTED, 2, one.predicted)):
        for box in boxes:
            x, y, width, height = (value * scale for value in box[:4])
            draw.rectangle((x, y, x + width, y + height), outline=color, width=line)
            if len(names) > 1:
                draw.text((x + 3, y + (1 if color == TRUE else 11)), names[int(box[4])], fill=color)
    content = io.BytesIO()
    image.save(content, "JPEG", quality=80)
    return content.getvalue()
