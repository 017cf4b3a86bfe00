"""A mixer in the encoder of a detector of transformers: DETR, Conditional DETR, RT-DETR and what is built like them.

Their self-attention is handed position apart from the tokens and, in DETR, a mask of the padding; see
`attnzoo.hosts.feature_map` for what a mixer gets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.hosts.feature_map import CROSS, NO_GRID, FeatureMapMixer, Teller
from attnzoo.hosts.site import ancestors


@dataclass(frozen=True)
class DetectorLayer:
    """An attention of a detector: why no mixer can stand there, or what tells a mixer its grid."""

    problem: str | None
    teller: Teller | None = None

    def attach(self, layer: DetectorMixer) -> None:
        """Have the detector tell `layer` its grid."""
        if self.teller is not None:
            self.teller.attach(layer)

    def detach(self) -> None:
        """Take the hook off a detector none of whose layers is a mixer."""
        if self.teller is not None:
            self.teller.detach()


class DetectorMixer(FeatureMapMixer):
    """A mixer, called as a detector of transformers calls the self-attention of its encoder."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_embeddings: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Mix tokens ``(B, N, C)``; `attention_mask` ``(B, 1, 1 or N, N)`` hides padding, from all tokens alike.

        It is made by the detector itself, out of its mask ``(B, h, w)``.
        """
        x = hidden_states
        if self.positions and position_embeddings is not None:
            x = x + position_embeddings
        return self.mix(x, None if attention_mask is None else _real(attention_mask)), None


def _real(mask: Tensor) -> Tensor:
    """Which tokens are real ``(B, N)``, from an attention mask that hides the same keys from all queries."""
    return (mask if mask.dtype == torch.bool else mask == 0)[:, 0, 0]


def layer_of(path: str, layers: Mapping[str, Any]) -> DetectorLayer | None:
    """Look at the attention at `path`; None if it is not a detector's."""
    parts = ancestors(path)
    holder = layers.get(parts[0])
    if not _in_detector(path, layers):
        return None
    if "CrossAttention" in type(layers[path]).__name__:
        return DetectorLayer(CROSS)
    if "Encoder" not in type(holder).__name__:
        return DetectorLayer(NO_GRID)
    teller = _teller(parts, layers)
    if teller is None:
        return DetectorLayer("nothing round it makes position embeddings (position_embedding), which tell its grid")
    return DetectorLayer(None, teller)


def _in_detector(path: str, layers: Mapping[str, Any]) -> bool:
    """Whether the layer's class is of a model of the DETR family, and not of a backbone of patches."""
    module = type(layers[path]).__module__.rpartition(".")[2]
    patches = any("ViT" in (kind := type(layers.get(a)).__name__) or "Dinov2" in kind for a in ancestors(path))
    return (module.endswith("detr") or "detr_" in module or module.endswith("d_fine")) and not patches


def _teller(parts: list[str], layers: Mapping[str, Any]) -> Teller | None:
    for ancestor in parts:
        module = layers.get(ancestor)
        if "AIFI" in type(module).__name__ and module is not None:
            return Teller(module, read_features, module)
        positions = getattr(module, "position_embedding", None)
        if isinstance(positions, nn.Module) and module is not None:
            return Teller(positions, read_shape, module)
    return None


def read_features(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[int, int]:
    """Read the size from features ``(B, C, h, w)``."""
    features = inputs[0] if inputs else named["hidden_states"]
    return int(features.shape[-2]), int(features.shape[-1])


def read_shape(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[int, int]:
    """Read the size from a shape ``(B, C, h, w)``, or a tensor that has it."""
    told = inputs[0] if inputs else named["shape"]
    shape = getattr(told, "shape", told)
    return int(shape[-2]), int(shape[-1])
