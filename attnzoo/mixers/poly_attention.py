"""Poly-attention along a path: attention from a token to a second, and from there to a third, in quadratic time.

Paper: Chakrabarti, Pitassi and Alman, Poly-attention: a general scheme for higher-order self-attention, ICLR 2026,
https://arxiv.org/abs/2602.02422

    O_i = sum over j_2 .. j_s of w (V2_j2 * .. * Vs_js) / sum of w,   w = exp(h(Q1_i, Q2_j2, .., Qs_js) / sqrt(D))
    h(x_1, .., x_s) = <x_1, x_2> + <x_2, x_3> + .. + <x_{s-1}, x_s>      (* elementwise)

h is a path, the simplest of the trees for which the paper has quadratic time: the sums are nested, from the last one
on, each an attention whose scores have the logarithm of the next one's sum added. Order s = 2 is softmax attention;
3 composes two functions, which one layer of attention cannot. The exponentials are no polynomials; given its weights an
output is a mean over tokens of products of s - 1 values, and of that degree in them.

Differs from the paper: scores are divided by sqrt(D), as those of attention, not by D.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from attnzoo.checks import Grid, check_int, check_tokens
from attnzoo.mixers.canvas import Canvas, hide, real_tokens
from attnzoo.mixers.heads import check_heads, join_heads


class PolyAttention(nn.Module):
    """Poly-attention whose polynomial is a path.

    Parameters
    ----------
    dim
        Width C of a token.
    num_heads
        Number of heads, a divisor of `dim`.
    order
        Number s of tokens that a weight is of, 2 and up.

    Raises
    ------
    OptionError
        For a value that an option cannot take.
    """

    def __init__(self, dim: int, num_heads: int = 1, *, order: int = 3) -> None:
        super().__init__()
        self.dim, self.num_heads = check_heads(dim, num_heads)
        self.order = check_int("order", order, minimum=2)
        self.queries = nn.Linear(dim, order * dim)
        self.values = nn.Linear(dim, (order - 1) * dim)
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
        queries, values = self._split(self.queries(x)), self._split(hide(self.values(x), line.patch_mask))
        real = None if line.patch_mask is None else line.patch_mask.mT.unsqueeze(1)  # (B, 1, 1, N)
        out, weight = values[-1], None
        for place in range(self.order - 2, -1, -1):
            out, weight = attend(queries[place], queries[place + 1], out, weight, real)
            out = out * values[place - 1] if place else out
        return line.take(head, self.proj(join_heads(out)))

    def inherit(self, weight: Tensor, bias: Tensor) -> None:
        """Begin as softmax attention of random weights over the values ``X W^T + b``; all other values are 1."""
        with torch.no_grad():
            self.values.weight.zero_()
            self.values.bias.fill_(1.0)
            self.values.weight[: self.dim], self.values.bias[: self.dim] = weight, bias
        nn.init.eye_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def extra_repr(self) -> str:
        """Name the options."""
        return f"dim={self.dim}, num_heads={self.num_heads}, order={self.order}"

    def _split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b n (s h d) -> s b h n d", h=self.num_heads, d=self.dim // self.num_heads)


def attend(
    q: Tensor, k: Tensor, v: Tensor, weight: Tensor | None = None, real: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Softmax attention over tokens that have weights of their own, and the weight of all that each query sees.

    Parameters
    ----------
    q, k, v
        ``(B, H, N, D)``.
    weight
        Logarithms of the keys' weights, ``(B, H, N)``, in float32 at least.
    real
        ``(B, 1, 1, N)``, False for padding.

    Returns
    -------
    tuple
        The output ``(B, H, N, D)``, and the logarithms of the sums of weights ``(B, H, N)``.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.mT
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if weight is not None:
        scores = scores + weight.unsqueeze(2)
    if real is not None:
        scores = scores.masked_fill(~real, torch.finfo(scores.dtype).min)
    total = scores.logsumexp(-1)
    return (scores - total.unsqueeze(-1)).exp().to(v.dtype) @ v, total
