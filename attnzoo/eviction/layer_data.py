"""What a host tells a policy of the layer that it stands in: facts, the rotary embedding, the output projection."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.errors import UnsupportedError


@dataclass(frozen=True)
class ModelIdentity:
    """Which model a layer belongs to.

    Attributes
    ----------
    name
        What the host calls the model: a name on the hub, a folder or a class. For messages, it is not compared.
    digest
        SHA-256 of what the config says of the shape of attention; the same for models that differ in weights alone.
    """

    name: str
    digest: str


@dataclass(frozen=True)
class Rotary:
    """A rotary embedding that depends on nothing but the position.

    Attributes
    ----------
    frequencies
        Radians per token of each pair of channels; empty where the layer does not rotate. Channels past the pairs
        stay as they are.
    scaling
        What rotated channels are multiplied by.
    interleaved
        Whether channels 2i and 2i + 1 are a pair, or i and i + half.
    """

    frequencies: tuple[float, ...]
    scaling: float = 1.0
    interleaved: bool = False

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """Rotate ``(..., S, D)`` to `positions`, which broadcast to ``(..., S)``, as the host does."""
        return self._turned(x, positions, self.scaling)

    def undo(self, x: Tensor, positions: Tensor) -> Tensor:
        """Revert `rotate`."""
        return self._turned(x, -positions, 1 / self.scaling)

    def mean_rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        """Mean of ``(..., D)`` rotated to each of `positions`, ``(N,)``."""
        angles = self._angles(positions)
        return self._paired(x, self.scaling * angles.cos().mean(0), self.scaling * angles.sin().mean(0))

    def _turned(self, x: Tensor, positions: Tensor, scaling: float) -> Tensor:
        angles = self._angles(positions)
        return self._paired(x, scaling * angles.cos(), scaling * angles.sin())

    def _angles(self, positions: Tensor) -> Tensor:
        frequencies = torch.tensor(self.frequencies, dtype=torch.float32, device=positions.device)
        return positions[..., None].float() * frequencies  # as hosts do, also for a model in float64

    def _paired(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        cos, sin, turning = cos.to(x), sin.to(x), 2 * len(self.frequencies)
        turned, rest = x[..., :turning], x[..., turning:]
        a, b = turned.unflatten(-1, (-1, 2)).unbind(-1) if self.interleaved else turned.chunk(2, -1)
        a, b = a * cos - b * sin, b * cos + a * sin
        turned = torch.stack([a, b], -1).flatten(-2) if self.interleaved else torch.cat([a, b], -1)
        return torch.cat([turned, rest.expand(*turned.shape[:-1], -1)], -1)


@dataclass(frozen=True)
class LayerData:
    """Facts about an attention layer, plain data: they are copied, pickled and moved with the model.

    Attributes
    ----------
    index
        Of the layer in its model.
    query_heads, kv_heads, head_width
        Numbers of heads, and width of a query or key.
    model
        Which model.
    output
        Name of the layer's child that projects the heads' outputs; None if no policy asked, or the host cannot tell.
    rotary
        The rotary embedding of queries and keys; None if no policy asked, or the host cannot tell.
    """

    index: int
    query_heads: int
    kv_heads: int
    head_width: int
    model: ModelIdentity
    output: str | None = None
    rotary: Rotary | None = None


class OutputProjection:
    """The output projection of a layer, read from the model whenever it is asked for, so that it follows every change.

    It does not keep the model alive, and a copy of it is itself. Read from a pickle, it has no model.

    Parameters
    ----------
    module
        The attention layer; None for none.
    name
        Of the child that projects.
    """

    def __init__(self, module: nn.Module | None = None, name: str = "") -> None:
        self._module = None if module is None else weakref.ref(module)
        self._name = name

    def __deepcopy__(self, memo: Any) -> OutputProjection:
        return self

    def __reduce__(self) -> tuple[type[OutputProjection], tuple[()]]:
        return OutputProjection, ()

    @torch.no_grad()
    def weight(self, heads: int, values: Tensor) -> Tensor:
        """The projection's matrix, ``(H, Dv, C)``: what each channel of each query head's output adds to a token.

        A plain linear layer's weight is given as it is; of any other (with an adapter, or quantized) it is what the
        layer makes of the unit vectors.

        Parameters
        ----------
        heads
            Number of query heads, H.
        values
            Values ``(..., Dv)``; of their device and dtype are the unit vectors.

        Raises
        ------
        UnsupportedError
            If there is no model to ask.
        """
        module = None if self._module is None else self._module()
        if module is None:
            raise UnsupportedError(
                "this policy reads the model's output projection, and the cache has no model: call the model with the "
                "cache first"
            )
        layer: Any = module.get_submodule(self._name)
        if type(layer) is nn.Linear and not layer.weight.is_meta:
            matrix = layer.weight.T
        else:
            units = torch.eye(heads * values.shape[-1], device=values.device, dtype=values.dtype)
            matrix = layer(units) - layer(torch.zeros_like(units[:1]))
        return matrix.unflatten(0, (heads, -1))
