"""What an attention layer does to a token that has nobody but itself to attend to: the map that a mixer can inherit.

    O = W_o (W_v x + b_v) + b_o = W x + b

Attention weights sum to one, so that a lone token's output is affine in it, whatever the queries and keys are. The
layer is asked by calls of single tokens, not by the names of its weights.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError
from attnzoo.hosts.site import Site

TOLERANCE = {torch.float64: 1e-9, torch.float32: 5e-3}  # of the norm, with room for TF32; of half precision HALF
HALF = 5e-2


@torch.no_grad()
def value_map(site: Site) -> tuple[Tensor, Tensor]:
    """Give W ``(C, C)`` and b ``(C,)`` of the host's layer at `site`.

    Raises
    ------
    UnsupportedError
        If the layer cannot be called with single tokens, or is not affine in one (a gate, a norm of the values).
    """
    module = site.module
    like = next(p for p in module.parameters() if p.is_floating_point())
    modes = {one: one.training for one in module.modules()}
    try:
        module.eval()
        probe = torch.cat([torch.zeros(1, site.dim), torch.eye(site.dim)]).to(like)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randn(4, site.dim, generator=generator).to(like)
        with torch.autocast(like.device.type, enabled=False):
            out = _called(site, torch.cat([probe, tokens]))
    finally:
        for one, mode in modes.items():
            one.training = mode
    bias, columns, found = out[0], out[1 : 1 + site.dim], out[1 + site.dim :]
    weight = (columns - bias).mT.contiguous()
    wanted = tokens @ weight.mT + bias
    tolerance = TOLERANCE.get(like.dtype, HALF)
    if not bool((found - wanted).norm() <= tolerance * found.norm()):
        raise UnsupportedError(
            f"{site.path}: init='inherit' needs a layer that is affine in a lone token, and {type(module).__name__} is "
            "not"
        )
    return weight, bias


def _called(site: Site, tokens: Tensor) -> Tensor:
    """Call the layer with each of the tokens ``(n, C)`` alone."""
    name = type(site.module).__name__
    try:
        out: Any = site.call_alone(tokens.unsqueeze(1))
    except Exception as error:  # whatever a module of somebody else's raises
        raise UnsupportedError(
            f"{site.path}: init='inherit' calls {name} with single tokens, which fails "
            f"({type(error).__name__}: {error})"
        ) from error
    if not isinstance(out, Tensor) or out.numel() != tokens.numel():
        raise UnsupportedError(f"{site.path}: init='inherit' needs {name} to give a token for a token")
    return out.reshape(tokens.shape)
