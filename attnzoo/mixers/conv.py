"""A plain depthwise convolution: the control that has locality and nothing else.

Source: none; PADRe's token mixing alone (https://arxiv.org/abs/2407.11306): its degree 1 without channel mixing.

    O = DWConv_11(X)

Differs from the source: nothing.
"""

from __future__ import annotations

from torch import Tensor, nn

from attnzoo.checks import Grid, check_int, check_odd, check_tokens
from attnzoo.mixers.token_mixing import DepthwiseConv2d


class Conv(nn.Module):
    """One depthwise convolution over the grid.

    Parameters
    ----------
    dim
        Width C of a token.
    num_heads
        Not used: there are no heads.
    kernel_size
        Side of the kernels, in tokens; odd.
    mix_prefix
        Have weights for class and register tokens, as in `padre`.

    Raises
    ------
    OptionError
        For a value that an option cannot take.
    """

    def __init__(self, dim: int, num_heads: int = 1, *, kernel_size: int = 11, mix_prefix: bool = True) -> None:
        super().__init__()
        self.dim = check_int("dim", dim, minimum=1)
        check_odd("kernel_size", kernel_size)
        self.tokens = DepthwiseConv2d(dim, kernel_size=kernel_size, tokens=None, mix_prefix=mix_prefix)

    def forward(self, x: Tensor, grid: Grid | None = None, prefix: int = 0, mask: Tensor | None = None) -> Tensor:
        """Mix tokens ``(B, N, C)``; see `attnzoo.mixers` for grid, prefix and mask.

        Raises
        ------
        ShapeError
            If x, grid, prefix and mask do not fit together.
        """
        check_tokens(x, self.dim, mask)
        self.tokens.check_prefix(prefix)
        canvas = self.tokens.layout(x, grid, prefix, mask)
        return canvas.take(*self.tokens(*canvas.lay(x), canvas))

    def extra_repr(self) -> str:
        """Name the options."""
        return f"dim={self.dim}, kernel_size={self.tokens.kernel_size}"
