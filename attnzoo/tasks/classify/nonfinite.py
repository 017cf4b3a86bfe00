"""Where a NaN or an infinity arose: the first layer of a forward, or the parameters whose gradients are not finite."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def first_layer(model: nn.Module, forward: Callable[[], object]) -> str:
    """Run `forward` again and name the first layer of `model` that made values that are not finite.

    That is its path and class. For one whose parameters or inputs are already not finite, that is said.
    """
    found: list[str] = []

    def look(path: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if found or _finite(output):
                return
            what = "made values that are not finite"
            broken = [name for name, p in module.named_parameters(recurse=False) if not _finite(p)]
            if broken:
                what = f"has parameters that are not finite ({', '.join(broken)})"
            elif not _finite(inputs):
                what = "was given values that are not finite"
            found.append(f"{path or 'the model'} ({type(module).__name__}) {what}")

        return hook

    hooks = [module.register_forward_hook(look(path)) for path, module in model.named_modules()]
    try:
        with torch.no_grad():
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else "no layer: every output is finite, so the loss itself is where it arose"


def gradients(model: nn.Module) -> str:
    """Name the last layers of `model`, in its order, whose gradients are not finite: the backward met them first."""
    broken = [name for name, p in model.named_parameters() if p.grad is not None and not _finite(p.grad)]
    if not broken:
        return "every gradient is finite, but their norm is not"
    return f"the gradient of {broken[-1]}" + (f" and of {len(broken) - 1} parameters before it" if broken[1:] else "")


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, (tuple, list)):
        return all(map(_finite, value))
    if isinstance(value, dict):
        return all(map(_finite, value.values()))
    return True
