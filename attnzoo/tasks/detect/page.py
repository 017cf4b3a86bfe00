"""What detection adds to the page: speed-up at each size of image, AP after each epoch, drawn boxes."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

from attnzoo import files
from attnzoo.bench.html import Section, pictures
from attnzoo.bench.plots import against_tokens, mean_curves
from attnzoo.bench.record import Quantiles
from attnzoo.bench.record import Record as Measured
from attnzoo.bench.summary import summarize
from attnzoo.errors import DataError
from attnzoo.tasks.detect.quality import Record
from attnzoo.tasks.detect.score import Judged, Scores
from attnzoo.tasks.detect.stages import ATTENTION, ENCODER

BOXES_FILE = "boxes.json"  # drawn images beside the records, by label
SHOWN = 4  # images of each kind
SHOWN_PIXELS = 320
COLUMN = 240
TRUE, PREDICTED = "#00b050", "#ff8c00"
KEY = (
    f'<p><span class="key" style="border-color:{TRUE}"></span> true, '
    f'<span class="key" style="border-color:{PREDICTED}"></span> predicted</p>'
)
BOXES_NOTE = (
    "Predicted boxes are those of the score that gives the best F1 over all images; images are put in order by their "
    "own F1 at an IoU of 0.5."
)


def plots(records: Sequence[Record]) -> list[tuple[str, str]]:
    """Captions and pictures: speed-up of the encoder and of its attention where several sizes were measured, and AP."""
    summary = summarize(records)
    alone = against_tokens(summary, partial(_speedup, ATTENTION), "speed-up of the attention")
    whole = against_tokens(summary, partial(_speedup, ENCODER), "encoder's speed-up", _bound)
    return [
        ("The encoder's attention alone: speed-up over the detector's own; bars from p20 to p80", alone),
        ("The whole encoder; dashed: Amdahl's bound, were its attention to take no time", whole),
        ("AP50 after each epoch; the mean of the seeds, shaded from the lowest to the highest", curves(records)),
    ]


def _speedup(stage: str, record: Measured) -> Quantiles | None:
    found = None if record.cost is None else record.cost.candidate.stage(stage)
    return None if found is None else found.speedup


def _bound(dense: Measured) -> float | None:
    return None if dense.cost is None else dense.cost.baseline.most_speedup(ATTENTION, ENCODER)


def curves(records: Sequence[Record]) -> str:
    """AP50 on the test images after each epoch, a line per attention; empty where none was tested on the way."""
    found = {one.label: one.quality for one in records if one.kind == "quality" and one.quality is not None}
    told = {
        label: [
            {float(epoch): 100 * ap for epoch, ap in zip(one.epochs, one.epoch_ap50, strict=True)}
            for one in quality.trainings
            if one.epochs
        ]
        for label, quality in found.items()
    }
    return mean_curves(told, "epoch", "AP50, % of the test images")


def draw_boxes(folder: Path, label: str, found: Scores, names: Sequence[str]) -> None:
    """Draw the images on which a detector did best and worst into a file that the page of the records is made of."""
    judged = found.judged
    best, worst = judged[:SHOWN], judged[max(SHOWN, len(judged) - SHOWN) :][::-1]
    drawn = {
        f"{title} of {len(judged)} images (score of {found.threshold:.2f} or more)": [
            _picture(one, names) for one in images
        ]
        for title, images in (("best", best), ("worst", worst))
        if images
    }
    files.write_json(folder / BOXES_FILE, {**_drawn(folder), label: drawn})


def _drawn(folder: Path) -> dict[str, Any]:
    """By label and heading: name, JPEG in base64, and caption of each image."""
    path = folder / BOXES_FILE
    return files.read_json(path) if path.is_file() else {}


def boxes(records: Sequence[Record], folder: Path) -> list[Section | None]:
    """Images with their boxes, the best and the worst of each attention's first seed, as `draw_boxes` left them."""
    drawn, body = _drawn(folder), ""
    for label in dict.fromkeys(one.label for one in records if one.kind == "quality"):
        for title, images in drawn.get(label, {}).items():
            shown = [(name, base64.b64decode(content), told) for name, content, told in images]
            body += f"<h3>{escape(label)}: {escape(title)}</h3>{pictures(shown, COLUMN)}"
    return [Section(KEY + body, "Drawn boxes", BOXES_NOTE) if body else None]


def _picture(one: Judged, names: Sequence[str]) -> tuple[str, str, str]:
    """Name, JPEG in base64 and caption of an image with its boxes, and with their names where there are several."""
    from PIL import Image, ImageDraw

    from attnzoo.pixels import to_mode

    name = one.path.rsplit("/", 1)[-1]
    told = f"{name}: {len(one.true)} true, {len(one.predicted)} predicted, F1 {one.f1:.2f}"
    try:
        with Image.open(one.path) as opened:
            image = to_mode(opened, "RGB")
    except DataError as error:  # by now all is scored: one image must not cost the page
        return name, "", f"{told}\nNot drawn: {error}"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        return name, "", f"{told}\nNot drawn: it cannot be read: {error}"
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
    return name, base64.b64encode(content.getvalue()).decode(), told
