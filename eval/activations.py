"""Measure how large PADRe's activations are at initialization, by degree, dtype and output, and draw them.

python eval/activations.py [--output FOLDER]    activations.jsonl and activations.svg there; by default in docs/records

A residual stream of tokens drawn from a normal distribution goes through layers with a norm before each, as in a vision
transformer without its MLPs. Of what each layer adds: root mean square and largest magnitude.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

from attnzoo import files
from attnzoo.command import run_script
from attnzoo.extras import require
from attnzoo.mixers.padre import Padre

DIM, SIDE, LAYERS, BATCH, SEED = 192, 14, 12, 8, 0
DEGREES = (1, 2, 3, 4, 5, 6)
DTYPES = ("float32", "bfloat16")
OUTPUTS = ("last", "sum")


@torch.inference_mode()
def measure(degree: int, dtype: str, output: str) -> dict[str, Any]:
    """Root mean squares and largest magnitudes of what the layers add."""
    torch.manual_seed(SEED)
    stream = torch.randn(BATCH, SIDE * SIDE, DIM).to(getattr(torch, dtype))
    sizes, largest = [], []
    for _ in range(LAYERS):
        layer = Padre(DIM, degree=degree, output=output, mix_prefix=False).to(stream.dtype)
        added = layer(F.layer_norm(stream, (DIM,)), grid=(SIDE, SIDE))
        sizes.append(round(added.float().square().mean().sqrt().item(), 4))
        largest.append(round(added.float().abs().max().item(), 2))
        stream = stream + added
    return {"degree": degree, "dtype": dtype, "output": output, "rms": sizes, "largest": largest}


COLORS = ("#808080", "#D55E00", "#0088CC", "#009E73")  # by number type and output


def draw(rows: Sequence[dict[str, Any]]) -> str:
    """Root mean square and largest magnitude by degree: the range over the layers, as SVG."""
    from attnzoo.bench.plots import INK, new_figure, to_svg

    figure, axes = new_figure()
    for index, (dtype, output) in enumerate((d, o) for o in OUTPUTS for d in DTYPES):
        chosen = [row for row in rows if (row["dtype"], row["output"]) == (dtype, output)]
        for values, style in (("rms", "-"), ("largest", "--")):
            degrees = [row["degree"] + 0.06 * (index - 1.5) for row in chosen]
            low, high = ([end(row[values]) for row in chosen] for end in (min, max))
            axes.vlines(degrees, low, high, color=COLORS[index], lw=3, alpha=0.5)
            middle = [sorted(row[values])[LAYERS // 2] for row in chosen]
            label = f'{dtype}, output="{output}"' if style == "-" else None
            axes.plot(degrees, middle, style, color=COLORS[index], label=label, lw=1.5)
    for style, what in (("-", "root mean square"), ("--", "largest magnitude")):
        axes.plot([], [], style, color=INK, label=what)
    axes.set_yscale("log")
    axes.set_xticks(DEGREES)
    axes.set_xlabel("degree")
    axes.set_ylabel(f"what a layer adds: {LAYERS} layers")
    axes.legend(frameon=False, labelcolor=INK, fontsize=9)
    return to_svg(figure, "activations").replace("currentColor", "#777777")  # an image of its own has no page's color


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/records"), help="where both files go")
    parsed = parser.parse_args(arguments)
    return run_script(lambda: measure_all(parsed.output), resume="nothing was written")


def measure_all(folder: Path) -> None:
    """Measure every case, write both files and print the table."""
    require("matplotlib")
    files.check_folder(folder, "--output")
    rows = [measure(degree, dtype, output) for output in OUTPUTS for dtype in DTYPES for degree in DEGREES]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name, content in (("activations.jsonl", lines), ("activations.svg", draw(rows))):
        files.write(folder / name, content)
    print(f"degree {'dtype':9} {'output':5} root mean square   largest, of {LAYERS} layers")
    for row in rows:
        small, large = (f"{min(row[key]):8.2f} to {max(row[key]):8.2f}" for key in ("rms", "largest"))
        print(f"{row['degree']:6} {row['dtype']:9} {row['output']:5} {small} {large}")


if __name__ == "__main__":
    sys.exit(main())
