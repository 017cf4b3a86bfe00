"""Which path an op takes, and a record of the paths taken.

An op's Triton kernel runs where its tensors lie on a GPU on which Triton works: its driver is there and a small kernel
has been compiled, launched and found right on that very device. Anywhere else an op is computed by PyTorch, or by what
its file names. Nobody chooses, and the result is the same to rounding.
"""

# mypy: disable-error-code="no-untyped-def, no-untyped-call"
from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError
from attnzoo.kernels.language import AVAILABLE, interpreting, tl, triton

log = logging.getLogger("attnzoo")
OPTIONS = {"enable_fp_fusion": True}  # of the compiler: a multiply and an add are one instruction

_recorders: list[Counter[tuple[str, str]]] = []
_captures: list[list[Launch]] = []


@dataclass(frozen=True)
class Launch:
    """A kernel and what it was called with."""

    kernel: Any
    args: tuple[Any, ...]
    constants: dict[str, Any]

    def configs(self) -> list[Any]:
        """Give the configurations that may be chosen; [None] where there is no choice."""
        if not hasattr(self.kernel, "configs"):
            return [None]
        prune, configs = self.kernel.early_config_prune, list(self.kernel.configs)
        named = dict(zip(self.kernel.arg_names, self.args, strict=False)) | self.constants
        return list(prune(configs, named)) if prune else configs


@torch.compiler.assume_constant_result
def triton_works(device: torch.device) -> bool:
    """Whether Triton's kernels run on `device`."""
    if _captures:
        return True
    return device.type == "cuda" and AVAILABLE and not interpreting() and _probe(device.index or 0)


def need_triton(x: Tensor, function: str) -> None:
    """Raise `UnsupportedError` where an operator that is a kernel cannot run; `function` is what to call."""
    if not triton_works(x.device):
        raise UnsupportedError(
            f"attnzoo::{function} is a Triton kernel, and does not run on {x.device}; call {function}(...)"
        )


@contextmanager
def record_paths() -> Iterator[Counter[tuple[str, str]]]:
    """Count the calls of ops within, by op and path: ``{("depthwise_pair", "triton"): 12}``.

    In a compiled model only the ops that run as kernels are seen; what PyTorch computes was traced away.
    """
    taken: Counter[tuple[str, str]] = Counter()
    _recorders.append(taken)
    try:
        yield taken
    finally:
        _recorders.remove(taken)


@contextmanager
def capture_launches() -> Iterator[list[Launch]]:
    """Have ops take their kernels, on any device, and gather the launches instead of running them.

    What the ops give is memory that nobody wrote: this is for compiling kernels where they cannot run.
    """
    captured: list[Launch] = []
    _captures.append(captured)
    try:
        yield captured
    finally:
        _captures.remove(captured)


def note(op: str, path: str) -> None:
    """Tell whoever records that `op` takes `path`."""
    if torch.compiler.is_compiling():
        return
    for taken in _recorders:
        taken[op, path] += 1


def launch(kernel: Any, grid: Grid, device: torch.device, *args: Any, **constants: Any) -> None:
    """Run a kernel on `device`; `grid` as for Triton.

    Where it has a choice of configurations the fastest is found at the first call of each kind and kept on disk.
    Triton's interpreter, which has no clock worth the name, takes the first that may be taken.
    """
    if _captures:
        _captures[-1].append(Launch(kernel, args, constants))
        return
    where = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
    with where:
        if interpreting() and hasattr(kernel, "configs"):
            config = Launch(kernel, args, constants).configs()[0]
            kernel.fn[grid](*args, **constants, **config.kwargs)
        else:
            kernel[grid](*args, **constants, **OPTIONS)


Grid = tuple[int, ...] | Callable[[dict[str, Any]], tuple[int, ...]]


def wide(dtype: torch.dtype) -> Any:
    """The Triton type in which sums of `dtype` are made."""
    return tl.float64 if dtype == torch.float64 else tl.float32


def sums_dtype(dtype: torch.dtype) -> torch.dtype:
    """The same, as PyTorch names it."""
    return torch.float64 if dtype == torch.float64 else torch.float32


T = TypeVar("T", Tensor, Tensor | None)


def side_by_side(x: T) -> T:
    """`x` with the values of its last dimension side by side in memory."""
    return x if x is None or x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


@triton.jit
def _probe_kernel(x, out, SIZE: tl.constexpr):
    at = tl.arange(0, SIZE)
    tl.store(out + at, tl.load(x + at) * 2)


@cache
def _probe(index: int) -> bool:
    device = torch.device("cuda", index)
    x = torch.arange(16, device=device, dtype=torch.float32)
    out = torch.full_like(x, float("nan"))
    try:
        with torch.cuda.device(device):
            _probe_kernel[(1,)](x, out, SIZE=16)
        works = torch.equal(out, 2 * x)
    except Exception as error:  # whatever is missing: a driver, a compiler, a GPU that is new enough
        log.warning("Triton does not work on %s and kernels are computed by PyTorch, slower: %s", device, error)
        return False
    if not works:
        log.warning("Triton gives wrong results on %s; kernels are computed by PyTorch, slower", device)
    return works
