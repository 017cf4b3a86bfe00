"""Images of any of PIL's modes as the 8-bit images that models are trained on, without clipping."""

from __future__ import annotations

from typing import Literal

import numpy as np
from PIL import Image

from attnzoo.errors import DataError

Mode = Literal["L", "RGB"]
BITS_PER_SAMPLE = 258  # a tag of TIFF
SIXTEEN_BITS = 2**16 - 1
# PIL gives 16-bit images of these formats as 32-bit integers, scaled to 16 bits
WIDENED = ("PNG", "PPM")
# PIL converts these to gray or color by way of another mode alone
BY_WAY_OF = {"La": "LA", "LAB": "RGB"}


def to_mode(image: Image.Image, mode: Mode) -> Image.Image:
    """Convert an image to 8-bit gray or color, keeping its range.

    PIL's own ``convert`` clips gray images of more than 8 bits: nearly every pixel of a 16-bit image becomes white.
    Here 16-bit images are divided by 257 (so that 65,535 becomes 255; 12-bit TIFFs by 4,095 / 255), and floating-point
    images from 0 to 1 are multiplied by 255. An alpha channel is dropped, as timm and torchvision do.

    Parameters
    ----------
    image
        Of any mode.
    mode
        ``"L"`` or ``"RGB"``.

    Raises
    ------
    DataError
        If the range of the pixels is not known: 32-bit integers, and floating-point pixels outside of 0 to 1.
    """
    if image.mode.startswith("I;16"):
        image = _scaled(np.asarray(image), _top(image))
    elif image.mode == "I" and image.format in WIDENED:
        image = _scaled(np.asarray(image), SIXTEEN_BITS)
    elif image.mode == "I":
        low, high = image.getextrema()
        raise DataError(
            f"its pixels are 32-bit integers (from {low} to {high}), whose range is not known; save it with 8 or 16 "
            "bits"
        )
    elif image.mode == "F":
        pixels = np.asarray(image)
        low, high = float(pixels.min()), float(pixels.max())
        if not (low >= 0 and high <= 1):  # NaN is not, either
            raise DataError(
                f"its pixels are floating-point numbers from {low:g} to {high:g}, and only those from 0 to 1 have a "
                "known range; save it with 8 or 16 bits, or scale it to 0 to 1"
            )
        image = _scaled(pixels, 1)
    elif isinstance(image.info.get("transparency"), bytes) and image.mode == "P":
        image = image.convert("RGBA")  # PIL warns of every such image otherwise
    elif image.mode in BY_WAY_OF:
        image = image.convert(BY_WAY_OF[image.mode])
    return image.convert(mode)


def _scaled(pixels: np.ndarray, top: int) -> Image.Image:
    """Pixels ``(H, W)`` from 0 to `top`, rounded to 0 to 255."""
    return Image.fromarray(np.rint(pixels.astype(np.float64) * (255 / top)).clip(0, 255).astype(np.uint8))


def _top(image: Image.Image) -> int:
    """The highest value that a pixel of a 16-bit image can have; TIFF has fewer bits, too."""
    tags = getattr(image, "tag_v2", None) or {}
    bits = tags.get(BITS_PER_SAMPLE, (16,))[0]
    return int(2**bits - 1)
