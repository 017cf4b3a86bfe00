"""SimA: attention without softmax, its queries and keys normalized over the tokens.

Paper: Koohpayegani and Pirsiavash, SimA, WACV 2024, https://arxiv.org/abs/2206.08898

    Q <- Q / |Q|_1,  K <- K / |K|_1  (each channel by its sum over tokens),   O = Q K^T V, in the cheaper order

Without the normalization an output is a polynomial of degree 3 exactly: the sum over n of (W_q x_m . W_k x_n) W_v x_n.
The normalization divides by sums of absolute values: no polynomial, nor smooth where a coordinate is 0; by scale, an
output of degree 1.

Differs from the paper: the local interaction block that its models add belongs to the host.
"""

from __future__ import annotations

from torch import Tensor, nn

from attnzoo.checks import Grid, check_tokens
from attnzoo.mixers.canvas import Canvas, real_tokens
from attnzoo.mixers.heads import check_heads, inherit_values, join_heads, split_heads, unit


class Sima(nn.Module):
    """Linear attention with l1-normalized queries and keys.

    Parameters
    ----------
    dim
        Width C of a token.
    num_heads
        Number of heads, a divisor of `dim`.

    Raises
    ------
    OptionError
        For a value that an option cannot take.
    """

    def __init__(self, dim: int, num_heads: int = 1) -> None:
        super().__init__()
        self.dim, self.num_heads = check_heads(dim, num_heads)
        self.qkv = nn.Linear(dim, 3 * dim)
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
        q, k = (unit(part, 1.0, -2) for part in (q, k))
        return line.take(head, self.proj(join_heads(product(q, k, v))))

    def inherit(self, weight: Tensor, bias: Tensor) -> None:
        """Begin with the values of attention, see `attnzoo.mixers.heads.inherit_values`."""
        inherit_values(self.qkv, self.proj, weight, bias)


def product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """``Q K^T V`` of ``(B, H, N, D)``, in the order that costs less."""
    return (q @ k.mT) @ v if q.shape[-2] < q.shape[-1] else q @ (k.mT @ v)
