"""Host timm: the plain ViT family, its rotary relatives and its attention pooling.

Cores stand in `Attention`, `AttentionRope`, `EvaAttention` and `AttentionPoolLatent`, with the same projections, norms,
rotary embedding and gates of the layer. Mixers stand in self-attention without rotary embedding, in models whose
patch embedding tells the grid of each call.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from timm.layers import Attention, AttentionPoolLatent, AttentionRope, apply_rot_embed_cat
from timm.models import register_notrace_module
from timm.models.eva import EvaAttention
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.errors import ShapeError, UnsupportedError
from attnzoo.hosts.hooks import CallHook, Listening, take_off
from attnzoo.hosts.site import (
    NOBODY,
    Core,
    CoreLayer,
    HostOptions,
    MixerLayer,
    RefusedSite,
    Site,
    ancestors,
    comes_from,
    looks_like_attention,
    refuse_unable,
)
from attnzoo.registry import AttentionInfo

_REFUSED = {
    "Attention2d": "convolutional attention over 2-D maps",
    "BottleneckAttn": "relative position bias",
    "ClassAttention": "class attention: one query, cross-attention to the patches",
    "ClassAttn": "class attention: one query, cross-attention to the patches",
    "CrossAttention": "cross-attention",
    "DiffAttention": "differential attention: the difference of two softmaxes",
    "HaloAttn": "windows with relative position bias",
    "MaskUnitAttention": "attention inside mask units, with pooled queries",
    "MultiScaleAttention": "pooled queries and keys with relative position bias",
    "OutlookAttention": "outlook attention: the weights of a window come from its middle, without keys",
    "PartitionAttention2d": "windows with relative position bias",
    "PartitionAttentionCl": "windows with relative position bias",
    "RelPosAttention": "relative position bias",
    "TalkingHeadAttn": "talking heads: weights are mixed across heads",
    "XCA": "cross-covariance attention: channels attend to channels",
    "WindowMultiHeadAttention": "window shift and relative position bias",
}


def find(model: nn.Module, layers: Mapping[str, Any], options: HostOptions) -> list[Site]:
    """Find timm's attention layers; see `attnzoo.hosts`."""
    sites: list[Site] = []
    for path, layer in layers.items():
        forward = type(layer).forward
        if forward in (Attention.forward, AttentionRope.forward, EvaAttention.forward):
            sites.append(_self_attention(path, layer, layers))
        elif forward is AttentionPoolLatent.forward:
            why = "attention pooling is cross-attention from a learned query, and a mixer has one input"
            site = TimmSite(path, layer, "timm", layer.kv.in_features, layer.num_heads, _needs(layer, cross=True), why)
            sites.append(site)
        elif _is_other_attention(layer):
            reason = _REFUSED.get(type(layer).__name__) or _bias(layer) or NOBODY
            if type(layer).__name__ == "WindowAttention":
                reason = "window shift and relative position bias" if _bias(layer) else "attention inside windows"
            sites.append(RefusedSite(path, layer, "timm", reason))
    return _without_wrappers(sites)


def _without_wrappers(sites: list[Site]) -> list[Site]:
    """Leave out blocks named ...Attn that only hold another layer, whose own reason tells more.

    A refused layer that has a reason of its own stands for what it holds, unless that is a layer that can be swapped.
    """
    able = [site for site in sites if not isinstance(site, RefusedSite)]
    told = [site for site in sites if isinstance(site, RefusedSite) and site.reason != NOBODY]
    kept = []
    for site in sites:
        holds = told if isinstance(site, RefusedSite) and site.reason == NOBODY else []
        wraps = any(inner.path.startswith(f"{site.path}.") for inner in [*able, *holds])
        inside = any(site.path.startswith(f"{outer.path}.") for outer in told)
        if not isinstance(site, RefusedSite) or not (wraps or inside):
            kept.append(site)
    return kept


def _is_other_attention(layer: nn.Module) -> bool:
    return comes_from(layer, "timm") and (looks_like_attention(layer) or hasattr(layer, "fused_attn"))


def _bias(layer: nn.Module) -> str | None:
    names = ("relative_position_bias_table", "attention_biases", "rel_pos", "rel_pos_h", "attention_bias_idxs")
    return "relative position bias" if any(getattr(layer, name, None) is not None for name in names) else None


def _needs(layer: nn.Module, *, cross: bool = False) -> dict[str, str]:
    needs = {"cross": "queries come from elsewhere than keys"} if cross else {}
    if getattr(layer, "num_kv_groups", 1) > 1:
        needs["gqa"] = "key and value heads are shared"
    return needs


def _self_attention(path: str, layer: Any, layers: Mapping[str, Any]) -> Site:
    linear = layer.q_proj if getattr(layer, "qkv", None) is None else layer.qkv
    owner = next((m for a in ancestors(path) if _knows_grid(m := layers[a])), None)
    no_mixer = None
    if owner is not None and getattr(owner, "rope", None) is not None:
        no_mixer = "rotary position embedding, and a mixer has no queries and keys to rotate"
    elif layer.proj.out_features != linear.in_features:
        no_mixer = f"it maps width {linear.in_features} to {layer.proj.out_features}, and a mixer keeps the width"
    site = TimmSite(path, layer, "timm", linear.in_features, layer.num_heads, _needs(layer), no_mixer)
    if owner is not None:
        site.owner = owner
        site.prefix = owner.num_prefix_tokens
        site.grid = _grid_of(owner)
        embed = owner.patch_embed
        if getattr(embed, "strict_img_size", False) and embed.grid_size:  # or images of any size are taken
            site.tokens = site.prefix + math.prod(embed.grid_size)
    return site


def _knows_grid(module: nn.Module) -> bool:
    return hasattr(module, "num_prefix_tokens") and hasattr(getattr(module, "patch_embed", None), "dynamic_feat_size")


class GridOfCall(CallHook):
    """The token grid of the call under way: a hook on the patch embedding writes it, mixers read it.

    It is one for the model. So where images of several sizes go through a model: with gradient checkpointing, run the
    backward pass of a batch before the forward pass of one of another size, for checkpointed layers recompute with the
    latest grid; and call one copy of the model from one thread at a time.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def __call__(self, patch_embed: Any, inputs: tuple[Any, ...]) -> None:
        """Read the grid from the image ``(B, C, H, W)`` that goes in; torch.fx traces for the model's own size."""
        if isinstance(inputs[0], torch.fx.Proxy):
            self.size = tuple(patch_embed.grid_size)
            return
        if self.leave_unheard(patch_embed):
            return
        height, width = patch_embed.dynamic_feat_size(tuple(inputs[0].shape[-2:]))
        self.size = (height, width)


def _hook_of(patch_embed: Any) -> GridOfCall | None:
    return next((h for h in patch_embed._forward_pre_hooks.values() if isinstance(h, GridOfCall)), None)


def _grid_of(owner: Any) -> GridOfCall:
    return _hook_of(owner.patch_embed) or GridOfCall(tuple(owner.patch_embed.grid_size or (0, 0)))


@dataclass
class TimmSite(Site):
    """An attention layer of timm."""

    owner: Any = None
    grid: GridOfCall | None = None

    def mixer_problem(self, info: AttentionInfo) -> str | None:
        """Mixers over a grid need a model that tells the grid; those that read the order of tokens, all of them."""
        if info.capabilities.grid and self.owner is None:
            return "no module round it tells the grid of the tokens (patch_embed.dynamic_feat_size)"
        drop = getattr(self.owner, "patch_drop", None)
        if getattr(drop, "prob", 0.0) > 0 and not info.capabilities.any_order:
            return (
                "patches are dropped in training (patch_drop_rate), so that what is left has no grid and no order; "
                "build the model with patch_drop_rate=0"
            )
        return None

    def put_core(self, core: Core) -> nn.Module:
        """Run `core` between the layer's own projections."""
        pool = isinstance(self.module, AttentionPoolLatent)
        return (TimmPoolCore if pool else TimmCore).over(self.module, core)

    def put_mixer(self, mixer: nn.Module) -> nn.Module:
        """Run `mixer` on the tokens, with the grid of the call."""
        return TimmMixer(mixer, self.grid, self.prefix)

    def installed(self, layer: nn.Module) -> None:
        """Have the patch embedding tell the grid of each call to the mixers, as long as there are any."""
        if self.owner is None:
            return
        if isinstance(layer, TimmMixer):
            hook = _hook_of(self.owner.patch_embed)
            if hook is None:
                hook = layer.grid
                self.owner.patch_embed.register_forward_pre_hook(hook)
            layer.grid = hook
            layer.listening = None if hook is None else hook.listen()
        elif not any(isinstance(m, TimmMixer) for m in self.owner.modules()):
            self.removed()

    def removed(self) -> None:
        """Take the hook off the patch embedding."""
        if self.owner is not None:
            take_off(self.owner.patch_embed, GridOfCall)


@register_notrace_module  # torch.fx, as in timm's extractors, takes it as it is
class TimmCore(CoreLayer):
    """timm's self-attention with another core."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Attend over tokens ``(B, N, C)``, as timm's `Attention`, `AttentionRope` and `EvaAttention` do."""
        gate = getattr(self, "gate", None)
        q, k, v = self._project(x)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = self._rotate(q, rope).type_as(v), self._rotate(k, rope).type_as(v)
        mask = None if is_causal else attn_mask
        dropout = self.attn_drop.p if self.training else 0.0
        refuse_unable(self, mask=mask is not None, causal=is_causal, dropout=dropout > 0)
        out = self.core(q, k, v, mask=mask, causal=is_causal, dropout=dropout)
        out = rearrange(out, "b h n d -> b n (h d)")
        out = self.norm(out) if hasattr(self, "norm") else out
        if gate is not None:
            out = out * gate(x).sigmoid()
        return self.proj_drop(self.proj(out))

    def _project(self, x: Tensor) -> tuple[Tensor, ...]:
        if self.qkv is not None:
            q_bias = getattr(self, "q_bias", None)
            if q_bias is None:
                qkv = self.qkv(x)
            elif self.qkv_bias_separate:
                qkv = self.qkv(x) + torch.cat((q_bias, self.k_bias, self.v_bias))
            else:
                qkv = F.linear(x, self.qkv.weight, torch.cat((q_bias, self.k_bias, self.v_bias)))
            return tuple(rearrange(qkv, "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.num_heads))
        projections = (self.q_proj, self.k_proj, self.v_proj)
        return tuple(rearrange(p(x), "b n (h d) -> b h n d", d=self.head_dim) for p in projections)

    def _rotate(self, x: Tensor, rope: Tensor) -> Tensor:
        head, patches = x[:, :, : self.num_prefix_tokens], x[:, :, self.num_prefix_tokens :]
        half = getattr(self, "rotate_half", False)
        return torch.cat([head, apply_rot_embed_cat(patches, rope, half=half)], dim=2)


@register_notrace_module  # torch.fx, as in timm's extractors, takes it as it is
class TimmPoolCore(CoreLayer):
    """timm's attention pooling (`AttentionPoolLatent`) with another core."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        """Pool tokens ``(B, N, C)`` into ``(B, C)``, or ``(B, latents, C)`` where the layer keeps them."""
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        q = rearrange(self.q(self.latent.expand(x.shape[0], -1, -1)), "b n (h d) -> b h n d", h=self.num_heads)
        k, v = rearrange(self.kv(x), "b n (kv h d) -> kv b h n d", kv=2, h=self.num_heads)
        refuse_unable(self, mask=attn_mask is not None)
        out = self.core(self.q_norm(q), self.k_norm(k), v, mask=attn_mask)
        out = self.proj_drop(self.proj(rearrange(out, "b h n d -> b n (h d)")))
        if self.mlp is not None:
            out = out + self.mlp(self.norm(out))
        if self.pool == "token":
            return out[:, 0]
        return out.mean(1) if self.pool == "avg" else out


@register_notrace_module  # torch.fx, as in timm's extractors, takes it as it is
class TimmMixer(MixerLayer):
    """A mixer where timm had self-attention."""

    def __init__(self, mixer: nn.Module, grid: GridOfCall | None, prefix: int) -> None:
        super().__init__(mixer)
        self.grid, self.prefix = grid, prefix
        self.listening: Listening | None = None

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        """Mix tokens ``(B, N, C)``.

        Raises
        ------
        UnsupportedError
            If the caller asks for rotary embedding, an attention mask or causality.
        ShapeError
            If the tokens are not those of the image that the patch embedding saw last.
        """
        if attn_mask is not None or is_causal:
            raise UnsupportedError("a mixer in a timm model does not support attn_mask or is_causal")
        if rope is not None:
            raise UnsupportedError("a mixer has no queries and keys to rotate, and this call gives rope")
        layer: Any = self
        any_order = layer.attnzoo_swap.info.capabilities.any_order  # of as many tokens as there are
        size = None if self.grid is None or any_order else self.grid.size
        if size is not None and self.prefix + size[0] * size[1] != x.shape[1]:
            raise ShapeError(
                f"{x.shape[1]} tokens are not {self.prefix} prefix tokens and the {size[0]} x {size[1]} patches of the "
                "last image; a mixer takes the grid from the model's own patch embedding, so call the whole model"
            )
        return self.mix_tokens(x, grid=size, prefix=self.prefix)
