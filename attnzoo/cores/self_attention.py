"""A stand-alone self-attention module round any core."""

from __future__ import annotations

from collections.abc import Callable

import torch
from einops import rearrange
from torch import Tensor, nn

from attnzoo.checks import Grid, check_grid, check_tokens
from attnzoo.errors import OptionError


class SelfAttention(nn.Module):
    """Multi-head self-attention: one projection to queries, keys and values, the core, one projection back.

    Parameters
    ----------
    dim
        Width C of a token.
    num_heads
        Number of heads; must divide `dim`.
    core
        Any core, called as `attnzoo.cores` says.

    Raises
    ------
    OptionError
        If `num_heads` does not divide `dim`.
    """

    def __init__(self, dim: int, num_heads: int, core: Callable[..., Tensor]) -> None:
        super().__init__()
        if dim % num_heads:
            raise OptionError(f"num_heads={num_heads} does not divide dim={dim}")
        self.dim, self.num_heads, self.core = dim, num_heads, core
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid | None = None, prefix: int = 0, mask: Tensor | None = None) -> Tensor:
        """Mix tokens ``(B, N, C)``; padding comes out as zeros. Shapes are those of `attnzoo.mixers`.

        `grid` and `prefix` matter only where `grid` is a tensor, one grid an image: what lies beyond is padding.

        Raises
        ------
        ShapeError
            If x, grid, prefix and mask do not fit together.
        """
        check_tokens(x, self.dim, mask)
        if grid is not None:
            check_grid(grid, x.shape[1], len(x), prefix)
        if isinstance(grid, Tensor):
            real = torch.arange(x.shape[1], device=x.device) < prefix + grid.prod(1, keepdim=True).to(x.device)
            mask = real if mask is None else real & mask
        x = x if mask is None else torch.where(mask.unsqueeze(-1), x, 0.0)
        q, k, v = rearrange(self.qkv(x), "b n (qkv h d) -> qkv b h n d", qkv=3, h=self.num_heads)
        out = self.core(q, k, v, mask=None if mask is None else mask[:, None, None, :])
        out = self.proj(rearrange(out, "b h n d -> b n (h d)"))
        return out if mask is None else torch.where(mask.unsqueeze(-1), out, 0.0)
