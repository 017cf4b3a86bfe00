"""Linear angular attention: the angle between query and key, to first order.

Paper: You et al., Castling-ViT, CVPR 2023, https://arxiv.org/abs/2211.10526

    Q <- Q / |Q|_2,  K <- K / |K|_2  (each token of a head),   Y = V / 2 + Q K^T V / pi,   O = Y / |Y|_2 + DWConv_9(V)
    while training, if asked: Y + M V, M the softmax attention where it is above 0.02

Without the normalizations V / 2 + Q K^T V / pi is a polynomial of degree 3 exactly. Those of Q and K break it: they are
algebraic, quotients by square roots of squares, and so is that of Y.

Differs from the paper: a vector of norm 0 stays 0 (the authors' code divides by 0); M is used in training only, as the
paper has it (the authors' code uses it at inference too).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from attnzoo.checks import Grid, check_bool, check_odd, check_tokens
from attnzoo.mixers.canvas import Canvas, hide, real_tokens
from attnzoo.mixers.heads import check_heads, inherit_values, join_heads, split_heads, unit

THRESHOLD = 0.02


class LinearAngular(nn.Module):
    """Linear angular attention.

    Parameters
    ----------
    dim
        Width C of a token.
    num_heads
        Number of heads, a divisor of `dim`.
    kernel_size
        Length of the convolution of V over tokens, one kernel per head; odd.
    auxiliary
        While training, add the softmax attention above a threshold: quadratic in the number of tokens.

    Raises
    ------
    OptionError
        For a value that an option cannot take.
    """

    def __init__(self, dim: int, num_heads: int = 1, *, kernel_size: int = 9, auxiliary: bool = False) -> None:
        super().__init__()
        self.dim, self.num_heads = check_heads(dim, num_heads)
        check_odd("kernel_size", kernel_size)
        self.kernel_size, self.auxiliary = kernel_size, check_bool("auxiliary", auxiliary)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.dconv = nn.Conv2d(
            num_heads, num_heads, (kernel_size, 1), padding=(kernel_size // 2, 0), bias=False, groups=num_heads
        )
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: Grid | None = None, prefix: int = 0, mask: Tensor | None = None) -> Tensor:
        """Mix tokens ``(B, N, C)``; see `attnzoo.mixers` for grid, prefix and mask.

        Raises
        ------
        ShapeError
            If x, grid, prefix and mask do not fit together.
        """
        check_tokens(x, self.dim, mask)
        line = Canvas.line(x, None, 0, real_tokens(x, grid, prefix, mask))
        head, x = line.lay(x)
        q, k, v = split_heads(self.qkv(x), self.num_heads, line.patch_mask)
        y = angular(unit(q, 2.0, -1), unit(k, 2.0, -1), v)
        if self.auxiliary and self.training:
            y = y + above_threshold(q, k, line.patch_mask) @ v
        out = unit(y, 2.0, -1) + (self.dconv(v) if v.shape[-2] else v)  # a convolution needs a token
        return line.take(head, self.proj(join_heads(out)))

    def inherit(self, weight: Tensor, bias: Tensor) -> None:
        """Begin with the values of attention, see `attnzoo.mixers.heads.inherit_values`."""
        inherit_values(self.qkv, self.proj, weight, bias)
        nn.init.dirac_(self.dconv.weight, groups=self.num_heads)

    def extra_repr(self) -> str:
        """Name the options."""
        return f"dim={self.dim}, num_heads={self.num_heads}, auxiliary={self.auxiliary}"


def angular(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``V / 2 + Q K^T V / pi`` of ``(B, H, N, D)``."""
    return 0.5 * v + q @ (k.mT @ v) / math.pi


def above_threshold(q: Tensor, k: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention ``(B, H, N, N)`` where it is above 0.02, else 0; `mask` ``(B, N, 1)``: which keys are real."""
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask.mT[:, None], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1)
    return hide(weights, weights > THRESHOLD)
