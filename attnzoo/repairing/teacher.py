"""The network that a swapped model was: each swapped layer holds its original, so that no second model is needed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.hosts.site import MixerLayer, original_of
from attnzoo.repairing.losses import first_tensor, normalized_error

Seen = Callable[[str, "Visit"], None]
KEPT = "attnzoo_teacher"  # on a module: its own parameters and buffers as the teacher has them, by name
OWN = "attnzoo_"  # keyword arguments of this beginning are for swapped layers alone


class Visit:
    """One call of a swapped layer, with what the original gave.

    Attributes
    ----------
    layer
        The swapped layer.
    args, kwargs
        What its model called it with.
    target
        What the original gave: of shape ``(B, N, C)``, or as the host has it.
    """

    def __init__(self, layer: MixerLayer, args: tuple[Any, ...], kwargs: dict[str, Any], target: Tensor) -> None:
        self.layer, self.args, self.kwargs, self.target = layer, args, kwargs, target

    def error(self) -> Tensor:
        """Call the mixer on the same input; see `normalized_error`. Padding does not count."""
        with masks_of(self.layer) as masks:
            out = first_tensor(type(self.layer).forward(self.layer, *self.args, **self.kwargs))
        return layer_error(self.layer, out, self.target, masks[-1] if masks else None)


def layer_error(layer: nn.Module, out: Tensor, target: Tensor, mask: Tensor | None) -> Tensor:
    """Error of a layer's output, in the layer's own order of axes; `mask` is ``(B, N)``. See `normalized_error`."""
    if not getattr(layer, "batch_first", True):
        out, target = out.transpose(0, 1), target.transpose(0, 1)
    return normalized_error(out, target, mask)


@contextmanager
def as_teacher(model: nn.Module, layers: Mapping[str, MixerLayer], seen: Seen | None = None) -> Iterator[None]:
    """Within, `layers` give what their originals give, and all else of the model stays as it is.

    Language models make no cache unless a call asks for one: what mixers keep is not what attention keeps.

    Parameters
    ----------
    model, layers
        A model, and its swapped layers by path.
    seen
        Called with the path and the `Visit` at each call of one of them.
    """

    def forward(path: str, layer: MixerLayer) -> Callable[..., Any]:
        original: Any = original_of(layer)

        def run(*args: Any, **kwargs: Any) -> Any:
            given = {name: value for name, value in kwargs.items() if not name.startswith(OWN)}
            out = original(*args, **given)
            if seen is not None:
                seen(path, Visit(layer, args, kwargs, first_tensor(out)))
            return out

        return run

    before = {path: layer.__dict__.get("forward") for path, layer in layers.items()}
    caching = _caching_configs(model)
    try:
        for config in caching:
            config.use_cache = False
        for path, layer in layers.items():
            layer.__dict__["forward"] = forward(path, layer)
        yield
    finally:
        with uninterrupted():
            for path, layer in layers.items():
                layer.__dict__.pop("forward", None)
                if before[path] is not None:
                    layer.__dict__["forward"] = before[path]
            for config in caching:
                config.use_cache = True


def _caching_configs(model: nn.Module) -> list[Any]:
    """Configs of transformers in a model, those of its parts included, by which a call makes a cache."""
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        parts = vars(config).values() if hasattr(config, "__dict__") else ()
        found |= {id(one): one for one in (config, *parts) if getattr(one, "use_cache", None) is True}
    return list(found.values())


def teacher_values(model: nn.Module, layers: Mapping[str, MixerLayer], keep: bool) -> dict[str, tuple[Tensor, Tensor]]:
    """Parameters and buffers of a swapped model that a repair trained, or will, with the teacher's values, by name.

    From the first repair on that asks to `keep` them they are kept on the modules that own them, but for the mixers of
    `layers`, so that a layer which is swapped later takes those of its own along.
    """
    mixers = {id(module) for layer in layers.values() for module in layer.mixer.modules()}
    if keep:
        copies: dict[Tensor, Tensor] = {}  # one of weights that several modules share
        for module in model.modules():
            if id(module) not in mixers and KEPT not in vars(module):
                named = dict(_own_tensors(module))
                copies |= {tensor: tensor.detach().clone() for tensor in named.values() if tensor not in copies}
                vars(module)[KEPT] = {name: copies[tensor] for name, tensor in named.items()}
    roots = {"": model} | {path: original for path, layer in layers.items() if (original := original_of(layer))}
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for root, whole in roots.items():
        for path, module in whole.named_modules(prefix=root):
            kept = vars(module).get(KEPT, {})
            own = [(name, tensor) for name, tensor in _own_tensors(module) if name in kept]
            found |= {f"{path}.{name}".lstrip("."): (tensor, kept[name].to(tensor)) for name, tensor in own}
    return found


def put_back(model: nn.Module) -> None:
    """Undo what a repair with ``train="all"`` did to parameters and buffers that are not a mixer's."""
    with torch.no_grad():
        for module in model.modules():
            kept = vars(module).pop(KEPT, {})
            for name, tensor in _own_tensors(module):
                if name in kept:
                    tensor.copy_(kept[name])


def _own_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]


@contextmanager
def own_values(values: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[None]:
    """Within, parameters and buffers have other values: the teacher's, as `teacher_values` gives them."""
    now = {tensor: tensor.data for tensor, _ in values.values()}
    try:
        _have(dict(values.values()))
        yield
    finally:
        _have(now)


def _have(values: Mapping[Tensor, Tensor]) -> None:
    """Give tensors other values. Autocast, which knows tensors by identity, forgets what it cast of those before."""
    with uninterrupted():
        for tensor, value in values.items():
            tensor.data = value
        if values:
            torch.clear_autocast_cache()


@contextmanager
def masks_of(layer: MixerLayer) -> Iterator[list[Tensor | None]]:
    """Collect which tokens are real ``(B, N)``, or None, at each call of a layer's mixer."""
    masks: list[Tensor | None] = []

    def look(mixer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        masks.append(kwargs.get("mask"))

    hook = layer.mixer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield masks
    finally:
        hook.remove()


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Hold Ctrl-C back until the end, so that nothing is half done; where Python does not handle it, it is not held."""
    before = signal.getsignal(signal.SIGINT)
    if before is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    came: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if came and before != signal.SIG_IGN:
            os.kill(os.getpid(), signal.SIGINT)
