"""Compile every configuration of every Triton kernel for GPUs that need not be present, and report what each uses.

python eval/kernels.py [--output FILE] [--cases NAME ...] [--capabilities 80 90]

Each op is called, forward and backward, in the cases below, in half precision and float32; instead of being launched,
its kernels are compiled for each compute capability in every configuration that autotuning may choose. It fails if one
spills registers to memory, wants more shared memory than there is, or is to multiply matrices of half precision and has
no tensor-core instruction. Two processes; about eight minutes on two cores.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor

from attnzoo import files
from attnzoo.command import run_script
from attnzoo.tables import Column, Table

BATCH, SIDE, DIM, LENGTH = 2, 56, 384, 32768
TOKENS = SIDE * SIDE


def pair(size: int, *, kind: str = "2d", factors: int = 2) -> Callable[[torch.dtype], None]:
    """A fused pair of convolutions of kernel `size`."""
    from attnzoo.kernels.depthwise_pair import depthwise_pair

    def call(dtype: torch.dtype) -> None:
        taps = (DIM, 1, size, size) if kind == "2d" else (DIM, 1, size)
        x_a, x_b = (leaf(dtype, BATCH, TOKENS, DIM) for _ in range(2))
        second = (x_b, leaf(dtype, *taps), leaf(dtype, DIM)) if factors == 2 else ()
        grid = (SIDE, SIDE) if kind == "2d" else (1, TOKENS)
        first = (x_a, leaf(dtype, *taps), leaf(dtype, DIM))
        depthwise_pair(*first, *second, grid=grid, causal=kind == "causal").sum().backward()

    return call


def chain(plain: int, products: int, *, weighted: bool, batch: int = BATCH) -> Callable[[torch.dtype], None]:
    """A Hadamard chain."""
    from attnzoo.kernels.hadamard import hadamard_chain

    def call(dtype: torch.dtype) -> None:
        terms = [leaf(dtype, batch, TOKENS, DIM) for _ in range(plain + 2 * products)]
        factors = zip(terms[plain : plain + products], terms[plain + products :], strict=True)
        extras = (leaf(dtype, plain + products, DIM), leaf(dtype, DIM)) if weighted else (None, None)
        hadamard_chain(terms[:plain], list(factors), *extras).sum().backward()

    return call


def second_pass(width: int, *, causal: bool, window: int) -> Callable[[torch.dtype], None]:
    """Sums of attention from its log-sum-exp, in half precision alone."""
    from attnzoo.kernels.scored import sums_from_lse

    def call(dtype: torch.dtype) -> None:
        if dtype != torch.float32:
            q, k = torch.empty(1, 6, LENGTH, width, dtype=dtype), torch.empty(1, 2, LENGTH, width, dtype=dtype)
            sums_from_lse(q, k, torch.empty(1, 6, LENGTH), window, causal, width**-0.5)

    return call


def one_query(
    width: int, *, ragged: bool, softcap: float | None = None, groups: int = 3
) -> Callable[[torch.dtype], None]:
    """Scored attention of one query, as in decoding."""
    from attnzoo.kernels.scored import scored_attention

    def call(dtype: torch.dtype) -> None:
        q, k = torch.empty(2, 2 * groups, 1, width, dtype=dtype), torch.empty(2, 2, LENGTH, width, dtype=dtype)
        lengths = (torch.ones(2, dtype=torch.int32), torch.full((2,), LENGTH, dtype=torch.int32)) if ragged else None
        scored_attention(q, k, k, lengths=lengths, softcap=softcap)

    return call


def leaf(dtype: torch.dtype, *shape: int) -> Tensor:
    """A tensor without values, of which a gradient is wanted."""
    return torch.empty(shape, dtype=dtype, requires_grad=True)


SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # that a program can have
OF_MATRICES = ("scored.sums_kernel", "scored.decode_kernel")
CASES: dict[str, Callable[[torch.dtype], None]] = {
    "pair 3x3": pair(3),
    "pair 11x11": pair(11),
    "pair 31x31": pair(31),
    "one 11x11": pair(11, factors=1),
    "pair of length 11": pair(11, kind="1d"),
    "causal pair of length 4": pair(4, kind="causal"),
    "product": chain(0, 1, weighted=False),
    "weighted sum of 3": chain(2, 1, weighted=True),
    "weighted sum of 3, many images": chain(2, 1, weighted=True, batch=16),
    "second pass": second_pass(64, causal=False, window=LENGTH),
    "second pass, causal": second_pass(64, causal=True, window=LENGTH),
    "second pass, last 128, head 128": second_pass(128, causal=True, window=128),
    "second pass, head 256": second_pass(256, causal=True, window=LENGTH),
    "one query": one_query(64, ragged=False),
    "one query, ragged, head 128, soft cap": one_query(128, ragged=True, softcap=50.0),
    "one query, head 256": one_query(256, ragged=False),
    "one query, 16 heads a key head of 128": one_query(128, ragged=False, groups=16),
}


def compiled(task: tuple[str, int]) -> list[dict[str, Any]]:
    """Compile all kernels of a case for a compute capability."""
    from attnzoo.kernels.dispatch import capture_launches
    from attnzoo.kernels.resources import compile_for

    case, capability = task
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        with capture_launches() as launches:
            CASES[case](dtype)
        seen = set()
        for launch in launches:
            function = getattr(launch.kernel, "fn", launch.kernel)
            for config in launch.configs():
                found = compile_for(launch, config, capability)
                row = {
                    "kernel": f"{function.__module__.rpartition('.')[2]}.{function.__name__.strip('_')}",
                    "case": case,
                    "dtype": str(dtype).removeprefix("torch."),
                    "capability": capability,
                    "configuration": described(config),
                    **vars(found),
                }
                if (key := json.dumps(row)) not in seen:  # the two inputs' gradients are one kernel
                    seen.add(key)
                    rows.append(row)
    return rows


def described(config: Any) -> dict[str, int]:
    """A configuration, as plain data."""
    return (
        {"warps": 4} if config is None else {**{k: int(v) for k, v in config.kwargs.items()}, "warps": config.num_warps}
    )


def problems(rows: Iterable[dict[str, Any]]) -> list[str]:
    """What must not be."""
    found = []
    for row in rows:
        if row["spilled_bytes"]:
            found.append(f"spills {row['spilled_bytes']} bytes: {row}")
        if row["shared_bytes"] > SHARED_BYTES.get(row["capability"], math.inf):
            found.append(f"more shared memory than there is: {row}")
        of_matrices = row["configuration"].get("BANDED") or row["kernel"] in OF_MATRICES
        if of_matrices and row["dtype"] != "float32" and not row["matrix_products"]:
            found.append(f"no tensor-core instruction: {row}")
    return found


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each kernel and configuration, the largest figure of all its cases."""
    configuration, cores = (Column(head, left=True) for head in ("configuration", "tensor cores in half precision"))
    table = Table(("kernel", configuration, "most registers", "most shared bytes", "spilled", cores))
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        shape = ", ".join(f"{name.lower()} {value}" for name, value in row["configuration"].items())
        groups.setdefault((row["kernel"], shape), []).append(row)
    for (kernel, shape), group in groups.items():
        most = {key: max(row[key] for row in group) for key in ("registers", "shared_bytes", "spilled_bytes")}
        halves = [row["matrix_products"] for row in group if row["dtype"] != "float32"]
        figures = (str(most["registers"]), f"{most['shared_bytes']:,}", str(most["spilled_bytes"]))
        table.add(f"`{kernel}`", shape, *figures, "yes" if halves and all(halves) else "no")
    return table.markdown()


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--output", type=Path, help="file of JSON lines to write")
    made.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), help="by default all")
    made.add_argument("--capabilities", nargs="+", type=int, default=[80, 90], help="compute capability, times ten")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parsed = parser().parse_args(arguments)
    return run_script(lambda: compile_all(parsed), resume="nothing was written")


def compile_all(parsed: argparse.Namespace) -> int:
    """Compile the cases, write and print what was found, and give the exit status."""
    console = Console()
    if os.environ.get("TRITON_INTERPRET") == "1":
        console.print("[red]unset TRITON_INTERPRET: under the interpreter nothing is compiled[/red]")
        return 2
    if parsed.output is not None:
        files.check_folder(parsed.output.parent, "--output")
    import triton

    tasks = [(case, capability) for case in parsed.cases for capability in parsed.capabilities]
    with ProcessPoolExecutor(2) as pool:
        parts = track(pool.map(compiled, tasks), "compiling", len(tasks), console=console)
        rows = [{**row, "triton": triton.__version__} for part in parts for row in part]
    if parsed.output is not None:
        files.write(parsed.output, "".join(json.dumps(row) + "\n" for row in rows))
    print(markdown(rows))
    found = problems(rows)
    for problem in found:
        console.print(f"[red]{problem}[/red]")
    console.print(f"{len(rows)} kernels compiled, {len(found)} problems")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
