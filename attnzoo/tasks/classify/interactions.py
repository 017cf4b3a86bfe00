"""Images whose class is a product of cells: no sum over cells tells it, so whatever mixes them has to multiply.

An image is a grid of cells that are 1 or -1 (white or black), each by itself a fair coin. Each row is parted into
groups of `order` cells, in the rows 0, 2, ... `distance` from one to the next, and twice that in the rows 1, 3, ....
The product of every group is the class in the former, its opposite in the latter:

    x[r, c] x[r, c + distance] ... x[r, c + (order - 1) distance] = 1 in class 1, -1 in class 0      (r even)

All but one of a group's cells are independent of the class, and so is the sum of all cells, thanks to the odd rows: of
their distance nothing is to be learned that the smaller one does not tell. So a polynomial of the cells of a degree
below `order`, the same at every place and summed over the grid, is right by chance alone (exactly of degree 1, nearly
of others), and so is one of any degree that does not reach `distance` far.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from attnzoo.errors import ConfigError
from attnzoo.tasks.classify.config import MADE

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
        raise ConfigError(f"data.options: {', '.join(unknown)}: {MADE} takes {', '.join(DEFAULTS)} alone")
    options = {**DEFAULTS, **given}
    for key, value in options.items():
        least = 2 if key == "order" else 1
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"data.options.{key}: a whole number of at least {least}, not {value!r}")
    order, distance, images = options.values()
    if side % (2 * order * distance):
        raise ConfigError(
            f"data.image_size: {side} cells are no multiple of 2 x order {order} x distance {distance} = "
            f"{2 * order * distance}, so that groups would not fill the rows"
        )
    return order, distance, images


def draw(side: int, order: int, distance: int, images: int, training: bool) -> tuple[np.ndarray, np.ndarray]:
    """Give pixels ``(images, side, side)``, 0 or 255, and classes ``(images,)``; the same ones at every call."""
    drawn = np.random.default_rng([SEED, int(training)])
    classes = drawn.integers(0, 2, images)
    cells = np.empty((images, side, side), np.int8)
    for first, apart, sign in ((0, distance, 1), (1, 2 * distance, -1)):
        # (images, rows, blocks, order, apart): a group is along `order`
        rows = 2 * drawn.integers(0, 2, (images, side // 2, side // (order * apart), order, apart)) - 1
        product = sign * (2 * classes - 1)[:, None, None, None]
        rows[..., -1, :] = product * rows[..., :-1, :].prod(axis=-2)
        cells[:, first::2] = rows.reshape(images, side // 2, side)
    return np.where(cells > 0, np.uint8(255), np.uint8(0)), classes
