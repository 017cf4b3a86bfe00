"""A stand-alone self-attention module round any core."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from attnzoo.checks import Grid, check_tokens
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
        """Mix tokens ``(B, N, C)``; `grid` and `prefix` make no difference; tokens outside `mask` come out as zeros.

        Raises
        ------
        ShapeError
            If x is not ``(B, N, dim)`` or mask not boolean ``(B, N)``.
        """
        check_tokens(x, self.dim, mask)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        out = self.core(q, k, v, mask=None if mask is None else mask[:, None, None, :])
        out = self.proj(out.transpose(1, 2).flatten(2))
        return out if mask is None else out * mask.unsqueeze(-1)
