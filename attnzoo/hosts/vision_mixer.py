"""A mixer in place of an image encoder's attention, in transformers: vision transformers on patches of one size.

The convolution that cuts the image into patches tells the grid of each call; the tokens before the patches are known
for each kind of model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.errors import ShapeError, UnsupportedError
from attnzoo.hosts.hooks import CallHook, Listening, take_off
from attnzoo.hosts.site import MixerLayer, ancestors

PREFIX: dict[str, Callable[[Any], int]] = {  # tokens before the patches, by the type of model
    "vit": lambda config: 1,
    "vit_msn": lambda config: 1,
    "deit": lambda config: 2,
    "dinov2": lambda config: 1,
    "dinov2_with_registers": lambda config: 1 + config.num_register_tokens,
    "clip_vision_model": lambda config: 1,
    "siglip_vision_model": lambda config: 0,
    "ijepa": lambda config: 0,
}
_OUTPUTS = ("o_proj", "out_proj")


class GridOfCall(CallHook):
    """The patch grid of the call under way, and whether its caller gave a mask: hooks write them, mixers read them."""

    def __init__(self) -> None:
        super().__init__()
        self.size = (0, 0)
        self.masked = False

    def __call__(self, convolution: Any, inputs: tuple[Any, ...]) -> None:
        """Read the grid from the image ``(B, C, H, W)`` that goes into the convolution."""
        if self.leave_unheard(convolution):
            return
        (height, width), (rows, columns) = inputs[0].shape[-2:], convolution.stride
        self.size = (height // rows, width // columns)

    def see_mask(self, encoder: Any, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """See whether a mask is among what goes into the encoder."""
        if not self.leave_unheard(encoder):
            self.masked = named.get("attention_mask") is not None


class VisionMixer(MixerLayer):
    """A mixer, called as an image encoder of transformers calls its attention."""

    def __init__(self, mixer: nn.Module, grid: GridOfCall, prefix: int) -> None:
        super().__init__(mixer)
        self.grid, self.prefix = grid, prefix
        self.listening: Listening | None = None

    def forward(
        self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        """Mix tokens ``(B, N, C)``.

        Raises
        ------
        UnsupportedError
            If the caller gives an attention mask.
        ShapeError
            If the tokens are not those of the image that the patch convolution saw last.
        """
        # while a model is exported, transformers makes a mask of nothing but ones where the caller gave none
        if attention_mask is not None and (self.grid.masked or not torch.compiler.is_exporting()):
            raise UnsupportedError("a mixer in an image encoder does not support attention_mask")
        height, width = self.grid.size
        if self.prefix + height * width != hidden_states.shape[1]:
            raise ShapeError(
                f"{hidden_states.shape[1]} tokens are not {self.prefix} prefix tokens and the {height} x {width} "
                "patches of the last image; a mixer takes the grid from the model's patches, so call the whole model"
            )
        return self.mix_tokens(hidden_states, grid=self.grid.size, prefix=self.prefix), None


@dataclass(frozen=True)
class Patches:
    """The convolution that cuts an encoder's images into patches, and the nearest module that holds both."""

    convolution: nn.Conv2d
    encoder: nn.Module

    def attach(self, layer: VisionMixer) -> None:
        """Have the convolution tell the grid of each call to `layer`, and the encoder whether there is a mask."""
        hook = next((h for h in self.convolution._forward_pre_hooks.values() if isinstance(h, GridOfCall)), None)
        if hook is None:
            hook = layer.grid
            self.convolution.register_forward_pre_hook(hook)
            self.encoder.register_forward_pre_hook(hook.see_mask, with_kwargs=True)
        layer.grid, layer.listening = hook, hook.listen()

    def detach(self) -> None:
        """Take the hook off, unless a mixer of the encoder still reads it."""
        if any(isinstance(module, VisionMixer) for module in self.encoder.modules()):
            return
        for module in (self.convolution, self.encoder):
            take_off(module, GridOfCall)


def patches_of(path: str, layers: Mapping[str, Any]) -> Patches | None:
    """Find what cuts the patches of the encoder that holds `path`; None if nothing does."""
    for ancestor in ancestors(path):
        for module in layers[ancestor].modules() if ancestor in layers else ():
            if isinstance(module, nn.Conv2d) and module.stride == module.kernel_size:
                return Patches(module, layers[ancestor])
    return None


def prefix_of(layer: Any) -> int:
    """Tokens before the patches, 0 in a kind of model that is not known here."""
    config = layer.config
    return PREFIX.get(getattr(config, "model_type", ""), lambda config: 0)(config)


def problem(layer: Any, patches: Patches | None) -> str | None:
    """Say why no mixer can replace `layer`, or give None."""
    kind = getattr(layer.config, "model_type", "")
    if kind not in PREFIX or patches is None:
        known = ", ".join(PREFIX)
        return f"transformers models of type {kind!r} support cores only; mixers are supported in {known} and decoders"
    if not any(isinstance(getattr(layer, name, None), nn.Linear) for name in _OUTPUTS):
        return "this version of transformers has its output projection in another module; a newer one has not"
    return None
