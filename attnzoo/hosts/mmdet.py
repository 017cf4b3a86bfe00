"""Host mmdet: MMDetection's transformer detectors (DETR, Conditional DETR, DAB-DETR and what is built like them).

Plain attention in mmdet is torch's inside a wrapper of mmcv's, which adds position to queries and keys and, at the end,
the input; a swap takes the place of the inner one. Conditional attention, with projections of its own, takes cores.
Deformable attention samples points by itself and is refused.

A mixer stands in the encoder alone, over the feature map of each call: its size and its padding, where images of a
batch differ in size, are the detector's. What the mixer gets is `positions=True`, tokens with position added, or
`positions=False`, without; see `attnzoo.hosts.feature_map`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from mmcv.cnn.bricks.transformer import MultiheadAttention
from mmdet.models.layers.transformer.utils import ConditionalAttention
from torch import Tensor, nn

from attnzoo.errors import UnsupportedError
from attnzoo.hosts import torch as torch_host
from attnzoo.hosts.feature_map import CROSS, NO_GRID, FeatureMapMixer, Teller
from attnzoo.hosts.site import (
    Core,
    CoreLayer,
    HostOptions,
    RefusedSite,
    Site,
    ancestors,
    looks_like_attention,
    refuse_unable,
)
from attnzoo.hosts.torch import check_masks, merge, seen, seen_keys
from attnzoo.registry import AttentionInfo

ENCODERS = ("DetrTransformerEncoderLayer",)


def find(model: nn.Module, layers: Mapping[str, Any], options: HostOptions) -> list[Site]:
    """Find mmcv's wrappers of torch's attention, and conditional attention; see `attnzoo.hosts`."""
    sites: list[Site] = []
    for path, layer in layers.items():
        if isinstance(layer, nn.MultiheadAttention) and _wrapper(path, layers) is not None:
            reason = torch_host.refusal(layer)
            refused = RefusedSite(path, layer, "mmdet", reason) if reason else None
            sites.append(refused or _wrapped(path, layer, layers, options))
        elif isinstance(layer, ConditionalAttention):
            sites.append(_conditional(path, layer))
        elif looks_like_attention(layer) and "Deformable" in type(layer).__name__:
            reason = "deformable attention samples points of its own, which no core or mixer can do"
            sites.append(RefusedSite(path, layer, "mmdet", reason))
    return sites


def _wrapper(path: str, layers: Mapping[str, Any]) -> Any:
    """Mmcv's wrapper round the layer, or None."""
    parent = layers.get(ancestors(path)[0]) if path else None
    return parent if isinstance(parent, MultiheadAttention) else None


def _wrapped(path: str, layer: nn.MultiheadAttention, layers: Mapping[str, Any], options: HostOptions) -> Site:
    site = MmdetSite(path, layer, "mmdet", layer.embed_dim, layer.num_heads)
    site.positions = True if options.positions is None else options.positions
    site.teller = _teller(path, layers)
    name = path.split(".")[-2]
    holder = layers.get(ancestors(path)[1]) if path.count(".") > 1 else None
    if "cross" in name:
        site.needs["cross"] = "cross-attention"
        site.no_mixer = CROSS
    elif not any(base.__name__ in ENCODERS for base in type(holder).__mro__):
        site.no_mixer = NO_GRID
    elif site.teller is None:
        site.no_mixer = "no module round it makes position encodings (positional_encoding), which tell a mixer its grid"
    return site


def _teller(path: str, layers: Mapping[str, Any]) -> Teller | None:
    """The module that makes the position encodings of each call, in the detector that holds `path`."""
    for ancestor in ancestors(path):
        module = layers.get(ancestor)
        positions = getattr(module, "positional_encoding", None)
        if isinstance(positions, nn.Module) and module is not None:
            return Teller(positions, read_size, module)
    return None


def read_size(inputs: tuple[Any, ...], named: Mapping[str, Any]) -> tuple[int, int]:
    """Read the size from the padding mask ``(B, h, w)``, or from the features ``(B, C, h, w)`` where there is none."""
    given = dict(zip(("mask", "input"), inputs, strict=False)) | dict(named)
    told = given["mask"] if given.get("mask") is not None else given["input"]
    return int(told.shape[-2]), int(told.shape[-1])


def _conditional(path: str, layer: Any) -> Site:
    site = ConditionalSite(path, layer, "mmdet", layer.embed_dims, layer.num_heads)
    site.no_mixer = CROSS if layer.cross_attn else NO_GRID
    if layer.cross_attn:
        site.needs["cross"] = "cross-attention"
        site.needs["widths"] = "keys, with their positions concatenated, are twice as wide as values"
    return site


@dataclass
class MmdetSite(torch_host.TorchSite):
    """Torch's attention inside mmcv's wrapper."""

    positions: bool = True
    teller: Teller | None = None

    @property
    def accepted_options(self) -> frozenset[str]:
        """What mmdet adds at each layer, a mixer can do without."""
        return frozenset({"positions"})

    def mixer_problem(self, info: AttentionInfo) -> str | None:
        """Any mixer can stand where the grid of each call is known."""
        return None

    def put_core(self, core: Core) -> nn.Module:
        """Run `core` between the layer's own projections."""
        layer = MmdetCore.over(self.module, core)
        layer._qkv_same_embed_dim = False  # as in the host torch
        return layer

    def put_mixer(self, mixer: nn.Module) -> nn.Module:
        """Run `mixer` on the feature map."""
        return MmdetMixer(mixer, self.module, self.positions)

    def installed(self, layer: nn.Module) -> None:
        """Have the detector tell a mixer its grid."""
        if isinstance(layer, MmdetMixer) and self.teller is not None:
            self.teller.attach(layer)
        else:
            self.removed()

    def removed(self) -> None:
        """Take the hook off a detector none of whose layers is a mixer."""
        if self.teller is not None:
            self.teller.detach()


class MmdetCore(torch_host.TorchCore):
    """Torch's attention with another core, which is not asked for its weights: mmcv's wrapper throws them away."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, with torch's arguments."""
        return super().forward(
            query, key, value, key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal
        )


class MmdetMixer(FeatureMapMixer):
    """A mixer, called as mmcv's wrapper calls torch's attention."""

    def __init__(self, mixer: nn.Module, original: Any, positions: bool) -> None:
        super().__init__(mixer, positions)
        self.batch_first: bool = original.batch_first

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        """Mix tokens: `query`, which has position, or `value`, which has not; ``(N, B, C)``, or batch first.

        Raises
        ------
        UnsupportedError
            If the caller gives an attention mask, or key and query differ.
        """
        if attn_mask is not None:
            raise UnsupportedError("a mixer does not support attn_mask, only key_padding_mask")
        if key.shape != query.shape or value.shape != query.shape:
            raise UnsupportedError(CROSS)
        x = query if self.positions else value
        x = x if self.batch_first else x.transpose(0, 1)
        mask = None if key_padding_mask is None else key_padding_mask.to(torch.bool).logical_not()
        out = self.mix(x, mask)
        return out if self.batch_first else out.transpose(0, 1), None


@dataclass
class ConditionalSite(Site):
    """Conditional attention, of Conditional DETR's and DAB-DETR's decoders."""

    def core_problem(self, info: AttentionInfo, option: str = "") -> str | None:
        """A subclass may attend in another way."""
        if type(self.module).forward_attn is not ConditionalAttention.forward_attn:
            return "a subclass that computes attention in its own way"
        return super().core_problem(info, option)

    def put_core(self, core: Core) -> nn.Module:
        """Run `core` between the layer's own projections."""
        return ConditionalCore.over(self.module, core)


class ConditionalCore(CoreLayer, ConditionalAttention):
    """Conditional attention with another core."""

    def forward_attn(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, with mmdet's arguments; weights, averaged over heads, are None from a core that has none.

        `query` and `key` ``(B, N, E)`` and ``(B, S, E)`` may be wider than `value` ``(B, S, C)``.
        """
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.num_heads) for t in (query, key, value))
        key_padding_mask = _boolean(key_padding_mask)
        check_masks(self.num_heads, (len(q), q.shape[2], k.shape[2]), attn_mask, key_padding_mask)
        mask = merge(seen(attn_mask, self.num_heads), seen_keys(key_padding_mask), q.dtype)
        dropout = self.attn_drop.p if self.attn_drop.training else 0.0
        refuse_unable(self, mask=mask is not None, dropout=dropout > 0)
        weights = None
        if hasattr(self.core, "with_weights"):
            out, weights = self.core.with_weights(q, k, v, mask=mask, dropout=dropout)
            weights = weights.mean(1)
        else:
            out = self.core(q, k, v, mask=mask, dropout=dropout)
        return self.out_proj(rearrange(out, "b h n d -> b n (h d)")), weights


def _boolean(mask: Tensor | None) -> Tensor | None:
    """Mmdet's masks may be of whole numbers."""
    return mask if mask is None or mask.is_floating_point() else mask.to(torch.bool)
