"""Heads: the channels of queries, keys and values, split and joined."""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.checks import check_int
from attnzoo.errors import OptionError
from attnzoo.mixers.canvas import hide


def check_heads(dim: int, num_heads: int) -> tuple[int, int]:
    """Give both back if `num_heads` divides `dim`, else raise `OptionError`."""
    check_int("dim", dim, minimum=1)
    if dim % check_int("num_heads", num_heads, minimum=1):
        raise OptionError(f"{num_heads} heads (num_heads) do not divide {dim} channels (dim)")
    return dim, num_heads


def split_heads(qkv: Tensor, num_heads: int, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Split ``(B, N, 3 * C)`` into three ``(B, H, N, D)``; where `mask` ``(B, N, 1)`` is False they are 0."""
    q, k, v = rearrange(hide(qkv, mask), "b n (qkv h d) -> qkv b h n d", qkv=3, h=num_heads)
    return q, k, v


def join_heads(x: Tensor) -> Tensor:
    """Join ``(B, H, N, D)`` to ``(B, N, H * D)``."""
    return rearrange(x, "b h n d -> b n (h d)")


def inherit_values(qkv: nn.Linear, proj: nn.Linear, weight: Tensor, bias: Tensor) -> None:
    """Have the values be attention's own, projected, ``X W^T + b``; queries and keys stay random.

    Parameters
    ----------
    qkv, proj
        Maps of ``C`` to ``3 * C`` channels and of the output.
    weight, bias
        W ``(C, C)`` and b ``(C,)``.
    """
    with torch.no_grad():
        qkv.weight[2 * len(weight) :] = weight
        qkv.bias[2 * len(weight) :] = bias
    nn.init.eye_(proj.weight)
    nn.init.zeros_(proj.bias)


def unit(x: Tensor, p: float, dim: int) -> Tensor:
    """Divide by the lp norm over `dim`; 0 stays 0. In float32 at least: half precision has no room for the sums."""
    return F.normalize(x.to(torch.promote_types(x.dtype, torch.float32)), p=p, dim=dim).to(x.dtype)
