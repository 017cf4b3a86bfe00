"""The network that a swapped model was: each swapped layer holds its original, so that no second model is needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.hosts.site import MixerLayer, original_of
from attnzoo.repairing.losses import first_tensor, normalized_error

Seen = Callable[[str, "Visit"], None]
KEPT = "attnzoo_teacher"  # on a model: weights of the teacher, by name, that a repair trained
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
        return normalized_error(out, self.target, masks[-1] if masks else None)


@contextmanager
def as_teacher(model: nn.Module, layers: Mapping[str, MixerLayer], seen: Seen | None = None) -> Iterator[None]:
    """Within, `layers` give what their originals give, and all else of the model stays as it is.

    A language model makes no cache unless a call asks for one: what mixers keep is not what attention keeps.

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

    cached = getattr(getattr(model, "config", None), "use_cache", None)
    try:
        if cached:
            model.config.use_cache = False  # type: ignore[union-attr]
        for path, layer in layers.items():
            layer.__dict__["forward"] = forward(path, layer)
        yield
    finally:
        for layer in layers.values():
            layer.__dict__.pop("forward", None)
        if cached:
            model.config.use_cache = cached  # type: ignore[union-attr]


def teacher_values(model: nn.Module, layers: Mapping[str, MixerLayer], keep: bool) -> dict[Tensor, Tensor]:
    """Parameters and buffers of a swapped model that a repair trained, or will, with the values that the teacher has.

    They are kept on the model from the first repair on that asks to `keep` them: of all but the mixers of `layers`.
    """
    mixers = {id(p) for layer in layers.values() for p in layer.mixer.parameters()}
    now = {
        name: tensor
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.is_floating_point() and id(tensor) not in mixers
    }
    kept: dict[str, Tensor] | None = vars(model).get(KEPT)
    if kept is None and keep:
        kept = vars(model)[KEPT] = {name: tensor.detach().clone() for name, tensor in now.items()}
    return {now[name]: value.to(now[name]) for name, value in (kept or {}).items() if name in now}


def put_back(model: nn.Module) -> None:
    """Undo what a repair with ``train="all"`` did to weights that are not a mixer's."""
    kept = vars(model).pop(KEPT, {})
    now = dict((*model.named_parameters(), *model.named_buffers()))
    with torch.no_grad():
        for name, value in kept.items():
            if name in now:
                now[name].copy_(value)


@contextmanager
def own_values(values: Mapping[Tensor, Tensor]) -> Iterator[None]:
    """Within, parameters and buffers have other values: the teacher's, where training changes more than mixers."""
    now = {tensor: tensor.data for tensor in values}
    try:
        for tensor, value in values.items():
            tensor.data = value
        yield
    finally:
        for tensor, value in now.items():
            tensor.data = value


@contextmanager
def masks_of(layer: MixerLayer) -> Iterator[list[Tensor | None]]:
    """Collect which tokens are real ``(B, N)`` at each call of a layer's mixer, in the layer's own order of axes."""
    masks: list[Tensor | None] = []

    def look(mixer: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        mask = kwargs.get("mask")
        masks.append(mask if mask is None or getattr(layer, "batch_first", True) else mask.mT)

    hook = layer.mixer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        yield masks
    finally:
        hook.remove()
