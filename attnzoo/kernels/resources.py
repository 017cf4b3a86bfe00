"""What a kernel takes of a GPU that need not be there: it is compiled, and the binary is read."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attnzoo.kernels.dispatch import OPTIONS, Launch
from attnzoo.kernels.language import triton

TYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int32: "i32",
    torch.uint8: "u8",
}
MATRIX_PRODUCTS = ("HMMA", "HGMMA", "WGMMA")  # instructions of tensor cores, half precision
ALIGNED = [["tt.divisibility", 16]]


@dataclass(frozen=True)
class Resources:
    """What a compiled kernel takes.

    Attributes
    ----------
    registers
        Of a thread.
    shared_bytes
        Of a program.
    spilled_bytes
        Of a thread: what found no register and went to memory.
    matrix_products
        Number of tensor-core instructions in the code.
    """

    registers: int
    shared_bytes: int
    spilled_bytes: int
    matrix_products: int


def compile_for(launch: Launch, config: Any, capability: int) -> Resources:
    """Compile a kernel for a compute capability (80, 90), as it would be for this launch.

    Parameters
    ----------
    launch
        What it is called with, of `capture_launches`.
    config
        One of ``launch.configs()``.
    capability
        Compute capability, times ten.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = launch.kernel.fn if hasattr(launch.kernel, "configs") else launch.kernel
    named = {**launch.constants, **(config.kwargs if config else {})}
    values = [*launch.args, *(named[p.name] for p in function.params[len(launch.args) :])]
    signature: dict[str, Any] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for i, (parameter, value) in enumerate(zip(function.params, values, strict=True)):
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[i,] = value
        else:
            signature[parameter.name] = _type(value)
            attributes |= _alignments((i,), value)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages} if config else {"num_warps": 4}
    options |= OPTIONS
    source = ASTSource(function, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    usage = _told_by(triton.knobs.nvidia.cuobjdump.path, ("--dump-resource-usage",), compiled.asm["cubin"])
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    counts: Counter[str] = Counter()
    if "mma" in compiled.asm["ptx"]:  # the assembler makes no tensor-core instruction of anything else
        code = _told_by(triton.knobs.nvidia.nvdisasm.path, ("-c", "--no-dataflow"), compiled.asm["cubin"])
        counts = Counter(re.findall(r"\b[A-Z][A-Z0-9]+\b", code))
    return Resources(
        registers=found["REG"],
        shared_bytes=compiled.metadata.shared,
        spilled_bytes=found["STACK"] + found["LOCAL"],
        matrix_products=sum(counts[name] for name in MATRIX_PRODUCTS),
    )


def _type(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(_type(part) for part in value)
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    return "fp32" if isinstance(value, float) else "i32"


def _alignments(at: tuple[int, ...], value: Any) -> dict[tuple[int, ...], Any]:
    """As Triton finds them: pointers and numbers that 16 divides."""
    if isinstance(value, tuple):
        return {k: v for i, part in enumerate(value) for k, v in _alignments((*at, i), part).items()}
    if isinstance(value, float):
        return {}
    return {at: ALIGNED} if isinstance(value, Tensor) or value % 16 == 0 else {}


@lru_cache(maxsize=256)  # several launches have one binary, and reading it takes longer than compiling it
def _told_by(tool: str, options: tuple[str, ...], binary: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(binary)
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout
