"""Drawn boxes: an image that cannot be drawn does not cost the page, which is written after all is scored."""

import base64
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from attnzoo.tasks.detect import page
from attnzoo.tasks.detect.quality import Metric
from attnzoo.tasks.detect.score import Judged, Scores

BOX = (1.0, 1.0, 4.0, 4.0, 0.0)
WIDE = Image.fromarray(np.arange(800, dtype=np.int32).reshape(20, 40) * 90)
FLOAT = Image.fromarray(np.full((20, 40), 7, dtype=np.float32))
PLAIN = Image.new("RGB", (20, 10))


METRIC = Metric(ap=1, ap50=1, ap75=1, ap_small=None, ap_medium=None, ap_large=None)


def drawn(paths):
    folder = paths[0].parent
    judged = tuple(Judged(str(path), (BOX,), ((*BOX, 0.9),), 1.0) for path in paths)
    for label in ("dense", "other"):
        page.draw_boxes(folder, label, Scores(METRIC, 2, 2, 0.5, judged), ["cat", "dog"])
    (section,) = page.boxes([SimpleNamespace(label="dense", kind="quality")], folder)
    return section.body


@pytest.mark.parametrize(
    ("name", "image", "reason"),
    [
        ("wide.tif", WIDE, "its pixels are 32-bit integers (from 0 to 71910)"),
        ("float.tif", FLOAT, "its pixels are floating-point numbers from 7 to 7"),
        ("cut.png", None, "it cannot be read: cannot identify image file"),
        ("gone.png", False, "it cannot be read: [Errno 2] No such file or directory"),
    ],
)
def test_an_image_that_cannot_be_drawn_says_why_in_its_place(tmp_path, name, image, reason):
    PLAIN.save(tmp_path / "plain.png")
    if image is None:
        (tmp_path / name).write_bytes(b"cut")
    elif image:
        image.save(tmp_path / name)
    found = drawn([tmp_path / "plain.png", tmp_path / name])
    assert found.count("<figure>") == 2
    assert found.count("data:image/jpeg") == 1
    assert f"Not drawn: {reason}" in found
    assert f"<figcaption>{name}: 1 true, 1 predicted, F1 1.00<br>" in found


@pytest.mark.parametrize("size", [(1000, 1), (1, 1000), (3, 3)])
def test_images_of_any_shape_are_drawn(tmp_path, size):
    Image.new("L", size).save(tmp_path / "0.png")
    content = base64.b64decode(re.search(r"base64,([^\"]+)", drawn([tmp_path / "0.png"]))[1])
    assert max(Image.open(io.BytesIO(content)).size) == page.SHOWN_PIXELS
