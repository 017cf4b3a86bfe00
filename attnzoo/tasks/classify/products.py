"""A ViT of attention alone: no normalization, no MLP, no activation.

With a mixer of degree d in each of L blocks its logits are polynomials of degree d^L in the pixels, so what it can
learn is what the mixer can. timm knows it as ``vit_products`` once this module is imported, which ``imports:`` in a
config does.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

DEFAULTS = {"patch_size": 1, "embed_dim": 32, "depth": 1, "num_heads": 4, "class_token": False, "global_pool": "avg"}
FIXED = ("norm_layer", "act_layer", "mlp_layer", "mlp_ratio")
OF_PRETRAINED = ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")


class Nothing(nn.Module):
    """Stands in for an MLP: zeros, which change nothing after the residual connection."""

    def __init__(self, **options: Any) -> None:
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        """Give zeros of the shape of `x`."""
        return torch.zeros_like(x)


@register_model
def vit_products(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """Build it, with the options of timm's ``VisionTransformer``; by default one block of width 32 on single pixels.

    Raises `ValueError` for what it does not have: pretrained weights, normalization, MLPs and activations.
    """
    if pretrained:
        raise ValueError("vit_products has no pretrained weights")
    without = sorted(set(FIXED) & set(options))
    if without:
        raise ValueError(f"vit_products has no normalization, MLP or activation, so no {', '.join(without)}")
    own = {key: value for key, value in options.items() if key not in OF_PRETRAINED}
    return VisionTransformer(**{**DEFAULTS, **own}, norm_layer=nn.Identity, mlp_layer=Nothing)
