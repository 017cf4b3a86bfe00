"""Pooling: the mean of a window, the control that has no weights at all.

Paper: Yu et al., MetaFormer Is Actually What You Need for Vision (PoolFormer), CVPR 2022,
https://arxiv.org/abs/2111.11418

    O = AvgPool_3(X) - X

Differs from the paper: a prefix token, for which the paper has none, gets the mean of all tokens less itself, and
patches do not see it.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.checks import Grid, check_int, check_odd, check_tokens
from attnzoo.mixers.canvas import Canvas
from attnzoo.mixers.token_mixing import token_sum


class Pooling(nn.Module):
    """The mean over a window of the grid, less the token itself; what lies beyond the edges is not counted.

    Parameters
    ----------
    dim
        Width C of a token.
    num_heads
        Not used: there are no heads.
    pool_size
        Side of the window, in tokens; odd.

    Raises
    ------
    OptionError
        For a value that an option cannot take.
    """

    def __init__(self, dim: int, num_heads: int = 1, *, pool_size: int = 3) -> None:
        super().__init__()
        self.dim = check_int("dim", dim, minimum=1)
        self.pool_size = check_odd("pool_size", pool_size)

    def forward(self, x: Tensor, grid: Grid | None = None, prefix: int = 0, mask: Tensor | None = None) -> Tensor:
        """Mix tokens ``(B, N, C)``; see `attnzoo.mixers` for grid, prefix and mask.

        Raises
        ------
        ShapeError
            If x, grid, prefix and mask do not fit together.
        """
        check_tokens(x, self.dim, mask)
        canvas = Canvas.of(x, grid, prefix, mask)
        head, patches = canvas.lay(x)
        image = rearrange(patches, "b (h w) c -> b c h w", h=canvas.height)
        pooled = self._pool(image)
        if canvas.patch_mask is not None:  # the mean of those that are real
            real = rearrange(canvas.patch_mask, "b (h w) 1 -> b 1 h w", h=canvas.height).to(x.dtype)
            pooled = pooled / self._pool(real).clamp(min=torch.finfo(x.dtype).tiny)
        mixed = rearrange(pooled, "b c h w -> b (h w) c") - patches
        if not prefix:
            return canvas.take(head, mixed)
        head_sum, head_count = token_sum(head, canvas.prefix_mask)
        patch_sum, patch_count = token_sum(patches, canvas.patch_mask)
        mean = ((head_sum + patch_sum) / (head_count + patch_count).clamp(min=1)).to(x.dtype)
        return canvas.take(mean - head, mixed)

    def _pool(self, image: Tensor) -> Tensor:
        size = self.pool_size
        return F.avg_pool2d(image, size, stride=1, padding=size // 2, count_include_pad=False)

    def extra_repr(self) -> str:
        """Name the options."""
        return f"dim={self.dim}, pool_size={self.pool_size}"
