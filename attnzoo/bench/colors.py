"""One color per method, on every page: dense is gray, and options of a method are shades of its color."""

from __future__ import annotations

import colorsys
import zlib
from collections.abc import Sequence

DENSE = "#808080"
METHODS = {
    "softmax": "#D55E00", "sdpa": "#0088CC", "flash": "#009E73", "flash_scored": "#7B68EE",
    "padre": "#C2185B", "conv2former": "#E69F00", "hyena": "#00695C", "sima": "#5E35B1", "linear_angular": "#8D6E63",
    "power": "#9E2A2B", "poly_attention": "#00796B",
    "mamba": "#2E7D32", "conv": "#0277BD", "mlp_mixer": "#AD8B00", "pooling": "#546E7A",
    "streaming": "#2F7F2F", "h2o": "#6A3D9A", "tova": "#17A2A2", "snapkv": "#B15928", "scissorhands": "#A6A000",
    "knorm": "#4682B4", "keydiff": "#1F78B4", "random": "#E6550D", "vatp": "#C71585", "caote": "#843C39",
    "auto": "#5E2B29", "dropkv": "#9C6B00", "zipcache": "#3F7CAC",
    "keyformer": "#7E57C2", "lagkv": "#00838F", "rkv": "#AD5C2B", "lsh": "#5D7A12",
    "expected_attention": "#B0356B",
    "criticalkv": "#6D4C41", "defensive": "#0D47A1", "divprune": "#558B2F", "qfilters": "#BF360C",
}  # fmt: skip
SHADES = (0.0, -0.17, 0.17, -0.3, 0.28)  # added to the lightness, in the order of a method's labels
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def method_of(label: str) -> str:
    """The method that a label stands for: its first word; empty for the dense baseline."""
    first = label.replace(",", " ").split()[0] if label.split() else ""
    return "" if first == "dense" else first


def look(labels: Sequence[str], label: str) -> tuple[str, str]:
    """Color and marker of a label beside others.

    A method that is not among `METHODS` has a color that follows from its name.
    """
    method = method_of(label)
    rank = [other for other in labels if method_of(other) == method].index(label)
    marker = MARKERS[list(labels).index(label) % len(MARKERS)]
    if not method:
        return DENSE, marker
    base = METHODS.get(method) or _hex(colorsys.hls_to_rgb(zlib.crc32(method.encode()) % 360 / 360, 0.42, 0.65))
    return _shaded(base, SHADES[rank % len(SHADES)]), marker


def _shaded(color: str, shade: float) -> str:
    red, green, blue = (int(color[at : at + 2], 16) / 255 for at in (1, 3, 5))
    hue, lightness, saturation = colorsys.rgb_to_hls(red, green, blue)
    return _hex(colorsys.hls_to_rgb(hue, min(max(lightness + shade, 0.18), 0.8), saturation))


def _hex(rgb: tuple[float, float, float]) -> str:
    return "#" + "".join(f"{round(255 * part):02X}" for part in rgb)
