"""Images whose class is a product of cells, so that whatever mixes the cells has to multiply.

An image is a grid of cells that are 1 or -1 (white or black), each by itself a fair coin. Each row is split into groups
of `order` cells, `distance` apart in even rows and 2 `distance` apart in odd rows. The product of every group is the
image's sign s, 1 or -1, in even rows and -s in odd rows; s is the class:

    x[r, c] x[r, c + distance] ... x[r, c + (order - 1) distance] = s      (r even)

Any `order` - 1 cells of a group are independent of the class. So a product of cells that does not contain a whole group
has the same mean in both classes, and of all polynomials of such products, whatever their weights at each place, none
has a lower cross-entropy than a constant, log 2: neither those of a lower degree than `order`, nor those that multiply
no cells as far apart as a group is wide. The classes may still differ in the spread of such a polynomial, which a
threshold can make use of; with the odd rows the sum of all cells has the same distribution in both classes.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnzoo.errors import ConfigError
from attnzoo.tasks.classify.config import INTERACTIONS

CLASSES = ("product -1", "product 1")
TEST_IMAGES = 2000
DEFAULTS = {"order": 2, "distance": 1, "images": 4000}
SEED = 0


def options_of(given: dict[str, Any], side: int) -> tuple[int, int, int]:
    """Order, distance and number of training images, out of a config's ``data.options``.

    Raises `ConfigError` for other keys, for values that are not whole numbers of at least 1 (of `order`, 2), and if
    groups do not fill a row of `side` cells.
    """
    unknown = sorted(set(given) - set(DEFAULTS))
    if unknown:
        raise ConfigError(f"data.options: {', '.join(unknown)}: {INTERACTIONS} takes only {', '.join(DEFAULTS)}")
    options = {**DEFAULTS, **given}
    for key, value in options.items():
        least = 2 if key == "order" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"data.options.{key}: a whole number of at least {least}, not {value!r}")
    order, distance, images = (options[key] for key in DEFAULTS)
    if side % (2 * order * distance):
        raise ConfigError(
            f"data.image_size: {side} is not a multiple of 2 x order {order} x distance {distance} = "
            f"{2 * order * distance}, so groups would not fill the rows"
        )
    return order, distance, images


def draw(side: int, order: int, distance: int, images: int, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """Give pixels ``(images, side, side)``, 0 or 255, and classes ``(images,)``; the same ones at every call."""
    drawn = np.random.default_rng([SEED, int(training)])
    classes = drawn.integers(0, 2, images, np.int8)
    cells = np.empty((images, side, side), np.int8)
    for first, apart, sign in ((0, distance, 1), (1, 2 * distance, -1)):
        # (images, rows, blocks, order, apart): a group is along `order`
        rows = 2 * drawn.integers(0, 2, (images, side // 2, side // (order * apart), order, apart), np.int8) - 1
        product = sign * (2 * classes - 1)[:, None, None, None]
        rows[..., -1, :] = product * rows[..., :-1, :].prod(axis=-2, dtype=np.int8)
        cells[:, first::2] = rows.reshape(images, side // 2, side)
    return np.where(cells > 0, np.uint8(255), np.uint8(0)), classes.astype(np.int64)
