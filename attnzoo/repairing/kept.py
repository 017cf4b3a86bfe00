"""What a repair changes of a model for a while, and puts back: modes, gradients, buffers, hooks."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.hosts.site import MixerLayer, original_of
from attnzoo.repairing.losses import first_tensor
from attnzoo.repairing.teacher import masks_of, uninterrupted
from attnzoo.swap import swapped_layers

RATES = "attnzoo_rates"  # on a module: dropout that is switched off for a while
Watched = dict[str, list[tuple[Tensor, Tensor | None]]]  # by layer, of each call: output, and which tokens are real


@contextlib.contextmanager
def watched_outputs(layers: Mapping[str, MixerLayer]) -> Iterator[Watched]:
    """Collect what layers give, with their graphs, and their masks."""
    found: Watched = {}
    with contextlib.ExitStack() as stack:
        for path, layer in layers.items():
            masks = stack.enter_context(masks_of(layer))

            def look(module: nn.Module, args: Any, out: Any, path: str = path, masks: list[Any] = masks) -> None:
                found.setdefault(path, []).append((first_tensor(out), masks[-1] if masks else None))

            stack.callback(layer.register_forward_hook(look).remove)
        yield found


@contextlib.contextmanager
def buffers_kept(model: nn.Module, changing: bool) -> Iterator[None]:
    """Put buffers, such as running statistics, back if a step breaks off."""
    before = {buffer: buffer.clone() for buffer in model.buffers()} if changing else {}
    try:
        yield
    except BaseException:
        with uninterrupted(), torch.no_grad():
            for buffer, value in before.items():
                buffer.copy_(value)
        raise


@contextlib.contextmanager
def modes_kept(model: nn.Module) -> Iterator[None]:
    """Put every module back into the mode that it was in."""
    originals = [original for layer in swapped_layers(model).values() if (original := original_of(layer)) is not None]
    modes = {module: module.training for root in [model, *originals] for module in root.modules()}
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
            vars(module).update(vars(module).pop(RATES, {}))


@contextlib.contextmanager
def only_trained(parameters: Iterable[nn.Parameter], model: nn.Module) -> Iterator[None]:
    """Within, these parameters alone have gradients; after, each requires one, and has it, as before."""
    before = {p: (p.requires_grad, p.grad) for p in [*model.parameters(), *parameters]}
    try:
        for p in before:
            p.requires_grad_(False)
        for p in parameters:
            p.requires_grad_(True)
        yield
    finally:
        with uninterrupted():
            for p, (required, grad) in before.items():
                p.requires_grad_(required)
                p.grad = grad


def recompute_without_dropout(module: nn.Module, asked: bool) -> None:
    """Put a module of transformers into training mode, in which alone it recomputes activations, or undo that.

    Its children stay in their mode, and its own rates of dropout are 0 meanwhile.
    """
    vars(module).update(vars(module).pop(RATES, {}))
    if not asked:
        return
    module.training = True
    own = vars(module).items()
    rates = {name: value for name, value in own if "drop" in name and isinstance(value, float) and 0 < value < 1}
    vars(module).update({**dict.fromkeys(rates, 0.0), RATES: rates})
