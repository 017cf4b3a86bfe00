"""The gate before the clock: what is about to be timed must match its oracle, layer by layer.

A whole model's output says little about its attention, for the residual stream carries most of it. So a gate compares
the output of every attention layer as well as the model's, each against the largest magnitude of the oracle there.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from attnzoo.bench.record import Gate

TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""Largest error allowed, as a part of the oracle's largest magnitude, by the dtype that is timed."""

ODD_GRID = (3, 5)
OUTPUT = "model output"


class OracleError(RuntimeError):
    """The oracle could not be computed, so nothing could be checked."""


@contextmanager
def noted(model: nn.Module, layers: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Note, of every call of `model` inside the block, its output and those of the modules at the paths `layers`."""
    found: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        found[name] = _tensor(output)

    modules = {path: model.get_submodule(path) for path in layers} | {OUTPUT: model}
    with ExitStack() as hooks:
        for name, module in modules.items():
            hooks.enter_context(module.register_forward_hook(partial(note, name)))
        yield found


def compare(got: Mapping[str, Tensor], oracle: Mapping[str, Tensor], name: str, tolerance: float) -> Gate:
    """Compare tensors of the same names; the gate's figures are those of the tensor that is worst.

    A tensor passes where its largest error is at most `tolerance` times the oracle's largest magnitude. An oracle that
    is zero everywhere proves nothing and does not pass.
    """
    found: list[tuple[float, Gate]] = []
    for at, expected in oracle.items():
        if got[at].shape != expected.shape:
            raise ValueError(f"shapes differ: {tuple(got[at].shape)} and {tuple(expected.shape)}")
        error = (got[at].double() - expected.double()).abs().max().item()
        scale = expected.double().abs().max().item()
        finite = math.isfinite(error) and math.isfinite(scale)
        part = error / scale if finite and scale > 0 else math.inf
        detail = "" if finite and scale > 0 else "the oracle is zero everywhere, which proves nothing"
        gate = Gate(
            oracle=name,
            passed=part <= tolerance,
            max_abs_error=error if math.isfinite(error) else None,
            scale=scale if math.isfinite(scale) else None,
            tolerance=tolerance,
            at=at,
            detail=detail if finite else "not finite",
        )
        found.append((part, gate))
    if not found:
        raise ValueError("nothing to compare")
    return max(found, key=lambda one: one[0])[1]


def mixer_gate(mixers: Mapping[str, nn.Module], dim: int, prefix: int, like: Tensor, seed: int) -> Gate:
    """Compare every mixer with its paper's equation in float64, on a small grid with odd sides.

    `mixers` are by the path of their layer and called ``mixer(x, grid=, prefix=, mask=None)``, with inputs of `seed` of
    width `dim` with `prefix` tokens, in the dtype and on the device of `like`.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, prefix + math.prod(ODD_GRID), dim, generator=generator).to(like)
    got: dict[str, Tensor] = {}
    expected: dict[str, Tensor] = {}
    independent = True
    for path, mixer in mixers.items():
        got[path] = mixer(x, grid=ODD_GRID, prefix=prefix, mask=None)
        double = copy.deepcopy(mixer).double()
        independent = independent and hasattr(double, "reference")
        ask: Any = getattr(double, "reference", double)
        expected[path] = ask(x.double(), grid=ODD_GRID, prefix=prefix, mask=None)
    oracle = "the method's written-out reference in float64" if independent else "itself in float64 (no reference)"
    return compare(got, expected, f"{oracle}, {ODD_GRID[0]}x{ODD_GRID[1]} grid", TOLERANCE[like.dtype])


def finite(gate: Gate, output: Tensor) -> Gate:
    """Fail `gate` where the output at the timed shape is not finite."""
    return refuse(gate, None if output.isfinite().all() else "the output at the timed shape is not finite")


def refuse(gate: Gate, problem: str | None) -> Gate:
    """Fail `gate` for `problem`, if there is one."""
    return gate if problem is None else gate.model_copy(update={"passed": False, "detail": problem})


def gate_message(name: str, gate: Gate) -> str:
    """Say why nothing was timed."""
    error = "not finite" if gate.max_abs_error is None else f"{gate.max_abs_error:.3g}"
    allowed = "?" if gate.scale is None else f"{gate.tolerance * gate.scale:.3g}"
    detail = f" ({gate.detail})" if gate.detail else ""
    return f"{name} did not pass, so nothing was timed: error {error}, allowed {allowed}, at {gate.at}{detail}"


def _tensor(output: Any) -> Tensor:
    """The first tensor of floating point in what a module gave; of a language model its logits."""
    leaves = tree_leaves(getattr(output, "logits", output))
    first = next((leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()), None)
    if first is None:
        raise TypeError(f"expected a tensor of floating point, got {type(output).__name__}")
    return first
