"""A mixer in a detector's encoder, whose tokens are a feature map: its size differs from call to call.

A module of the detector that every call goes through before the encoder tells the size: a hook reads it there. What a
mixer gets is one input, where attention has position added to its queries and keys alone; see `FeatureMapMixer`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from attnzoo.errors import ShapeError
from attnzoo.hosts import hooks
from attnzoo.hosts.site import MixerLayer, refuse_unable

NO_GRID = "self-attention over object queries, which have no grid: mixers are supported in the encoder"
CROSS = "cross-attention, and a mixer has one input"

Read = Callable[[tuple[Any, ...], Mapping[str, Any]], tuple[int, int]]


class SizeOfCall(hooks.CallHook):
    """Height and width, in tokens, of the feature map of the call under way: a hook that writes what mixers read."""

    def __init__(self, read: Read) -> None:
        super().__init__()
        self.read = read
        self.size = (0, 0)

    def __call__(self, teller: nn.Module, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> None:
        """Read the size off what goes into the module that tells it."""
        if not self.leave_unheard(teller):
            self.size = self.read(inputs, named)


class FeatureMapMixer(MixerLayer):
    """A mixer over a feature map.

    Attention adds position to queries and keys and leaves it off values. A mixer has one input: tokens with position
    added, as queries have it (`positions`), or tokens alone, as values are. With position is the choice where the user
    makes none, for a mixer without convolutions would not know where a token is.
    """

    def __init__(self, mixer: nn.Module, positions: bool) -> None:
        super().__init__(mixer)
        self.positions = positions
        self.map: SizeOfCall | None = None
        self.listening: hooks.Listening | None = None

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Mix ``(B, h * w, C)``; `mask` ``(B, h * w)`` is True where a token is real, None where all are.

        Raises
        ------
        ShapeError
            If these are not the tokens of the feature map that the detector saw last.
        """
        height, width = (0, 0) if self.map is None else self.map.size
        if height * width != x.shape[1]:
            raise ShapeError(
                f"{x.shape[1]} tokens are not the {height} x {width} of the last feature map; a mixer takes their grid "
                "from the detector, so call the whole detector"
            )
        refuse_unable(self, mask=mask is not None)
        return self.mix_tokens(x, grid=(height, width), prefix=0, mask=mask)

    def extra_repr(self) -> str:
        """Say what the mixer gets."""
        return f"positions={self.positions}"


@dataclass(frozen=True)
class Teller:
    """The module whose calls tell the size of the feature map, how to read it there, and who holds its mixers."""

    module: nn.Module
    read: Read
    holder: nn.Module = field(repr=False)

    def attach(self, layer: FeatureMapMixer) -> None:
        """Have the module tell `layer` the size."""
        hook = next((h for h in self.module._forward_pre_hooks.values() if isinstance(h, SizeOfCall)), None)
        if hook is None:
            hook = SizeOfCall(self.read)
            self.module.register_forward_pre_hook(hook, with_kwargs=True)
        layer.map, layer.listening = hook, hook.listen()

    def detach(self) -> None:
        """Take the hook off, unless a mixer still reads it."""
        if any(isinstance(module, FeatureMapMixer) for module in self.holder.modules()):
            return
        hooks.take_off(self.module, SizeOfCall)
