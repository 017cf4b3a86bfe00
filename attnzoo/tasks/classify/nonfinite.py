"""Where a NaN or an infinity arose: the first layer of a forward, or the parameters whose gradients are not finite."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn

from attnzoo.models import tensors


def first_layer(model: nn.Module, forward: Callable[[], object]) -> str:
    """Run `forward` again and name the first layer of `model` that made values that are not finite.

    That is its path and class. For one whose parameters or inputs are already not finite, that is said.
    """
    found: list[str] = []

    def look(path: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if found or _finite(output):
            return
        what = "made values that are not finite"
        broken = [name for name, p in module.named_parameters(recurse=False) if not _finite(p)]
        if broken:
            what = f"has parameters that are not finite ({', '.join(broken)})"
        elif not _finite(inputs):
            what = "was given values that are not finite"
        found.append(f"{path or 'the model'} ({type(module).__name__}) {what}")

    with ExitStack() as hooks, torch.no_grad():
        for path, module in model.named_modules():
            hooks.enter_context(module.register_forward_hook(partial(look, path)))
        forward()
    return found[0] if found else "no layer: every output is finite, so the loss itself is where it arose"


def gradients(model: nn.Module) -> str:
    """Name the last layers of `model`, in its order, whose gradients are not finite: the backward met them first."""
    broken = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    if not broken:
        return "every gradient is finite, but their norm is not"
    return f"the gradient of {broken[-1]}" + (f" and of {len(broken) - 1} parameters before it" if broken[1:] else "")


def _finite(value: Any) -> bool:
    return all(bool(x.isfinite().all()) for x in tensors(value) if x.is_floating_point())
