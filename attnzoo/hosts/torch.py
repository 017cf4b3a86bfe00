"""Host torch: `nn.MultiheadAttention`, and what is built on it (`nn.TransformerEncoder`, torchvision's ViT).

torch's encoder layers have a fast path that reads the weights of their attention and never calls it; a swapped layer
says of itself what makes them take the ordinary path (``_qkv_same_embed_dim = False``). For that path
`nn.TransformerEncoder` would turn a padded batch into a nested tensor, so a swap switches its ``use_nested_tensor``
off and `restore_attention` puts it back.

A caller who asks for attention weights (``need_weights=True``, torch's default) gets them from cores that have them
(`softmax`), and None from every other core and mixer, in the place where torch gives None for ``need_weights=False``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.cores.masks import additive
from attnzoo.errors import ShapeError, UnsupportedError
from attnzoo.hosts.hooks import holds_swapped, take_off
from attnzoo.hosts.site import (
    Core,
    CoreLayer,
    HostOptions,
    MixerLayer,
    RefusedSite,
    Site,
    ancestors,
    looks_like_attention,
    refuse_unable,
)
from attnzoo.registry import AttentionInfo

_NESTED = "attnzoo_use_nested_tensor"


def find(model: nn.Module, layers: Mapping[str, Any], options: HostOptions) -> list[Site]:
    """Find `nn.MultiheadAttention`; see `attnzoo.hosts`."""
    sites: list[Site] = []
    for path, layer in layers.items():
        if not isinstance(layer, nn.MultiheadAttention):
            if type(layer).__module__.startswith("torchvision.") and looks_like_attention(layer):
                reason = "window shift and relative position bias" if "Window" in type(layer).__name__ else ""
                sites.append(RefusedSite(path, layer, "torch", reason or "attnzoo does not know this class"))
        else:
            reason = refusal(layer)
            sites.append(RefusedSite(path, layer, "torch", reason) if reason else _site(path, layer, layers, options))
    return sites


def refusal(layer: nn.MultiheadAttention) -> str:
    """Say why nothing can replace `layer`; empty if something can."""
    if type(layer).forward is not nn.MultiheadAttention.forward:
        return "a subclass with its own forward"
    if layer.bias_k is not None or layer.add_zero_attn:
        return f"{'add_bias_kv' if layer.bias_k is not None else 'add_zero_attn'}=True adds a key of its own"
    return ""


def _site(path: str, layer: nn.MultiheadAttention, layers: Mapping[str, Any], options: HostOptions) -> Site:
    parent = layers[ancestors(path)[0]] if path else layer
    kind = type(parent).__name__
    site = TorchSite(path, layer, "torch", layer.embed_dim, layer.num_heads)
    if kind == "TransformerDecoderLayer" and path.endswith("multihead_attn"):
        site.needs["cross"] = "cross-attention"
        site.no_mixer = "cross-attention, and a mixer has one input"
    elif kind == "TransformerDecoderLayer":
        site.no_mixer = "self-attention of a decoder, which may be causal: a mixer would see later tokens"
    elif kind.endswith("PoolingHead"):
        site.needs["cross"] = "attention pooling is cross-attention from a learned query"
        site.no_mixer = "attention pooling is cross-attention from a learned query, and a mixer has one input"
    elif layer.kdim != layer.embed_dim or layer.vdim != layer.embed_dim:
        site.no_mixer = "cross-attention (keys or values of another width), and a mixer has one input"
    site.encoder = next((m for a in ancestors(path) if isinstance(m := layers[a], nn.TransformerEncoder)), None)
    site.one_tensor = isinstance(parent, nn.TransformerEncoderLayer)
    site.grid, site.prefix, site.positions = options.grid, options.prefix or 0, options.positions
    if options.grid is None:
        vit = next((m for a in ancestors(path) if _is_torchvision_vit(m := layers[a])), None)
        if vit is not None:
            site.one_tensor = True
            side = vit.image_size // vit.patch_size
            site.grid, site.prefix = (side, side), 1
    if site.grid is not None:
        site.tokens = site.prefix + math.prod(site.grid)
    return site


def _is_torchvision_vit(module: Any) -> bool:
    return any(c.__module__ == "torchvision.models.vision_transformer" for c in type(module).__mro__) and hasattr(
        module, "class_token"
    )


@dataclass
class TorchSite(Site):
    """An `nn.MultiheadAttention`."""

    grid: tuple[int, int] | None = None
    positions: bool | None = None
    one_tensor: bool = False  # whether its caller is known to give it one tensor three times
    encoder: nn.TransformerEncoder | None = None

    @property
    def accepted_options(self) -> frozenset[str]:
        """A user tells what torch does not know."""
        return frozenset({"grid", "prefix"} if self.one_tensor else {"grid", "prefix", "positions"})

    def mixer_problem(self, info: AttentionInfo) -> str | None:
        """Mixers over a grid need to be told it."""
        if info.capabilities.grid and self.grid is None:
            return "torch's encoders do not know the token grid: give grid=(h, w), and prefix= for tokens before it"
        return None

    def put_core(self, core: Core) -> nn.Module:
        """Run `core` between the layer's own projections."""
        layer = TorchCore.over(self.module, core)
        layer._qkv_same_embed_dim = False  # see the head of this file
        return layer

    def put_mixer(self, mixer: nn.Module) -> nn.Module:
        """Run `mixer` on the tokens."""
        return TorchMixer(mixer, self.module, self.grid, self.prefix, self.positions)

    def call_alone(self, x: Tensor) -> Tensor:
        """Attend, with torch's arguments."""
        x = x if self.module.batch_first else x.transpose(0, 1)
        out: Tensor = self.module(x, x, x, need_weights=False)[0]
        return out if self.module.batch_first else out.transpose(0, 1)

    def installed(self, layer: nn.Module) -> None:
        """Keep the encoder from making nested tensors, and remember whether it did."""
        if self.encoder is not None and not hasattr(self.encoder, _NESTED):
            setattr(self.encoder, _NESTED, self.encoder.use_nested_tensor)
            self.encoder.use_nested_tensor = False
            self.encoder.register_forward_pre_hook(NestedTensors())

    def removed(self) -> None:
        """Let the encoder do as before."""
        if self.encoder is not None:
            NestedTensors.allow(self.encoder)


class NestedTensors:
    """A hook that lets an encoder make nested tensors again once none of its layers is swapped."""

    def __call__(self, encoder: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Look whether a swapped layer is left."""
        if not torch.compiler.is_compiling() and not holds_swapped(encoder):
            self.allow(encoder)

    @staticmethod
    def allow(encoder: nn.Module) -> None:
        """Let `encoder` do as before the swap."""
        if hasattr(encoder, _NESTED):
            encoder.use_nested_tensor = getattr(encoder, _NESTED)
            delattr(encoder, _NESTED)
            take_off(encoder, NestedTensors)


class TorchCore(CoreLayer, nn.MultiheadAttention):
    """`nn.MultiheadAttention` with another core."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, with the arguments and results of `nn.MultiheadAttention`; for weights see the head of this file."""
        if is_causal and attn_mask is None:
            raise UnsupportedError("is_causal=True is a hint that attn_mask is causal: give the attn_mask too")
        batched = query.dim() == 3
        check_masks(self.num_heads, sizes(self, query, key), attn_mask, key_padding_mask, batched)
        if not batched:
            query, key, value = (t.unsqueeze(0 if self.batch_first else 1) for t in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        if not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        q, k, v = (rearrange(t, "b n (h d) -> b h n d", h=self.num_heads) for t in self._project(query, key, value))
        mask = merge(seen(attn_mask, self.num_heads), seen_keys(key_padding_mask), q.dtype)
        dropout = self.dropout if self.training else 0.0
        refuse_unable(self, mask=mask is not None, dropout=dropout > 0)
        options = {"mask": mask, "dropout": dropout}
        weights = None
        if need_weights and hasattr(self.core, "with_weights"):
            out, weights = self.core.with_weights(q, k, v, **options)
            weights = weights.mean(1) if average_attn_weights else weights
            weights = weights if batched else weights.squeeze(0)
        else:
            out = self.core(q, k, v, **options)
        out = rearrange(out, "b h n d -> b n (h d)")
        out = F.linear(out, self.out_proj.weight, self.out_proj.bias)  # as torch does
        out = out if self.batch_first else out.transpose(0, 1)
        return out if batched else out.squeeze(0 if self.batch_first else 1), weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        if self.in_proj_weight is None:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        elif query is key and key is value:
            return list(F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1))
        else:
            weights = list(self.in_proj_weight.chunk(3))
        biases = [None] * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        return [F.linear(t, w, b) for t, w, b in zip((query, key, value), weights, biases, strict=True)]


class TorchMixer(MixerLayer):
    """A mixer where torch had self-attention.

    A caller that adds position to queries and keys, as blocks of point clouds do, gives three tensors. Whether they
    are one sequence cannot be seen, so the user says it: `positions` True mixes the query, False the value. The
    attributes that torch's encoder layers read off their attention are here too.
    """

    _qkv_same_embed_dim = False  # keeps torch's encoder layers off their fast path
    in_proj_weight = in_proj_bias = None
    positions: bool | None = None

    def __init__(
        self, mixer: nn.Module, original: Any, grid: tuple[int, int] | None, prefix: int, positions: bool | None
    ) -> None:
        super().__init__(mixer)
        self.grid, self.prefix = grid, prefix
        if positions is not None:
            self.positions = positions
        self.batch_first: bool = original.batch_first
        self.embed_dim: int = original.embed_dim
        self.num_heads: int = original.num_heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Mix tokens, with the arguments of `nn.MultiheadAttention`; the weights are always None.

        Raises
        ------
        UnsupportedError
            If query, key and value are not one tensor and `positions` is None, or differ in shape; or if the caller
            asks for an attention mask or for causality.
        """
        if self.positions is None and not (query is key and key is value):
            raise UnsupportedError(
                "cross-attention: a mixer has one input, but query, key and value are not one tensor. Where they are "
                "one sequence, with position added to query and key, swap with positions=True to mix the query or "
                "positions=False to mix the value"
            )
        if not query.shape == key.shape == value.shape:
            raise UnsupportedError("cross-attention: a mixer has one input, but query, key and value differ in shape")
        if attn_mask is not None or is_causal:
            raise UnsupportedError("a mixer does not support attn_mask or is_causal, only key_padding_mask")
        batched = query.dim() == 3
        check_masks(self.num_heads, sizes(self, query, key), None, key_padding_mask, batched)
        x = value if self.positions is False else query
        x = x if batched else x.unsqueeze(0 if self.batch_first else 1)
        x = x if self.batch_first else x.transpose(0, 1)
        mask = seen_keys(key_padding_mask if batched or key_padding_mask is None else key_padding_mask.unsqueeze(0))
        refuse_unable(self, mask=mask is not None)
        if mask is not None:
            mask = (mask if mask.dtype == torch.bool else mask == 0).flatten(1)  # whatever is lowered is padding
        out = self.mix_tokens(x, grid=self.grid, prefix=self.prefix, mask=mask)
        out = out if self.batch_first else out.transpose(0, 1)
        return out if batched else out.squeeze(0 if self.batch_first else 1), None


def sizes(layer: Any, query: Tensor, key: Tensor) -> tuple[int, int, int]:
    """Rows, queries and keys of a call of `nn.MultiheadAttention`; a call without a batch has one row."""
    if query.dim() == 2:
        return 1, len(query), len(key)
    at = 1 if layer.batch_first else 0
    return query.shape[1 - at], query.shape[at], key.shape[at]


def check_masks(
    heads: int,
    size: tuple[int, int, int],
    attn_mask: Tensor | None,
    key_padding_mask: Tensor | None,
    batched: bool = True,
) -> None:
    """Refuse the masks that `nn.MultiheadAttention` refuses.

    Parameters
    ----------
    heads, size
        Number of heads H; rows B, queries N and keys S.
    attn_mask, key_padding_mask
        As the caller gave them.
    batched
        Whether the call has a batch.

    Raises
    ------
    ShapeError
        Unless both are boolean or floating, `attn_mask` is ``(N, S)`` or ``(B * H, N, S)``, and `key_padding_mask` is
        ``(B, S)``, or ``(S,)`` where the call has no batch.
    """
    batch, queries, keys = size
    wanted: dict[str, tuple[Tensor | None, list[tuple[int, ...]]]] = {
        "attn_mask": (attn_mask, [(queries, keys), (batch * heads, queries, keys)]),
        "key_padding_mask": (key_padding_mask, [(batch, keys) if batched else (keys,)]),
    }
    for name, (mask, shapes) in wanted.items():
        if mask is None:
            continue
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ShapeError(f"{name} must be boolean (True where hidden) or floating, not {mask.dtype}")
        if tuple(mask.shape) not in shapes:
            said = " or ".join(map(str, shapes))
            raise ShapeError(
                f"{name} must be {said} (attn_mask: one for all or one for each head of each row; "
                f"key_padding_mask: one for each row), not {tuple(mask.shape)}"
            )


def seen(attn_mask: Tensor | None, heads: int) -> Tensor | None:
    """Torch's attn_mask, True where hidden, ``(N, S)`` or ``(B * H, N, S)``, as a core's mask."""
    if attn_mask is None:
        return None
    mask = attn_mask if attn_mask.dim() == 2 else attn_mask.unflatten(0, (-1, heads))
    return ~mask if mask.dtype == torch.bool else mask


def seen_keys(key_padding_mask: Tensor | None) -> Tensor | None:
    """Torch's key_padding_mask ``(B, S)``, True where hidden, as a core's mask ``(B, 1, 1, S)``."""
    if key_padding_mask is None:
        return None
    mask = key_padding_mask[:, None, None, :]
    return ~mask if mask.dtype == torch.bool else mask


def merge(a: Tensor | None, b: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """Join two masks of a core; `dtype` is that of an additive one."""
    if a is None or b is None:
        return b if a is None else a
    if a.dtype == torch.bool and b.dtype == torch.bool:
        return a & b
    return additive(a, dtype) + additive(b, dtype)
