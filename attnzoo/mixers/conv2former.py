"""Conv2Former: a large convolution weighs the values.

Paper: Hou et al., Conv2Former, TPAMI 2024, https://arxiv.org/abs/2211.11943

    A = DWConv_11(GELU(W_1 X)),   V = W_2 X,   O = W_3 (A * V)     (* elementwise)

Without its GELU it is PADRe of degree 2: A_1 = DWConv, B_1 = W_1, A_2 = C_1 = D_1 = I, B_2 = W_2, with W_3 over the
output. With it, it is not a polynomial.

Differs from the paper: the norm before and the scale after belong to the host; weights start as PADRe's; prefix tokens,
for which the paper has none, as in `token_mixing`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.checks import Grid, check_choice, check_int, check_odd, check_tokens
from attnzoo.mixers.channel_mixing import dense
from attnzoo.mixers.token_mixing import DepthwiseConv2d


class Conv2Former(nn.Module):
    """Convolutional modulation.

    Parameters
    ----------
    dim
        Width C of a token.
    num_heads
        Not used: there are no heads.
    kernel_size
        Side of the depthwise kernels, in tokens; odd.
    activation
        ``gelu``, as in the authors' PyTorch code, or ``identity``, as in their Jittor code.
    mix_prefix
        Have weights for class and register tokens, as in `padre`.

    Raises
    ------
    OptionError
        For a value that an option cannot take.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 1,
        *,
        kernel_size: int = 11,
        activation: str = "gelu",
        mix_prefix: bool = True,
    ) -> None:
        super().__init__()
        self.dim = check_int("dim", dim, minimum=1)
        check_odd("kernel_size", kernel_size)
        self.activation = check_choice("activation", activation, ("gelu", "identity"))
        self.channels = dense(dim, 2 * dim)  # W_1 and W_2
        self.tokens = DepthwiseConv2d(dim, kernel_size=kernel_size, tokens=None, mix_prefix=mix_prefix)
        self.proj = dense(dim, dim)

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
        (a_head, v_head), (a, v) = (self.channels(part).chunk(2, dim=-1) for part in canvas.lay(x))
        head, patches = self.tokens.product((self._act(a_head), self._act(a)), None, (v_head, v), canvas)
        return canvas.take(self.proj(head), self.proj(patches))

    def inherit(self, weight: Tensor, bias: Tensor) -> None:
        """Begin as the affine map of attention's values: V = X W^T + b, modulated by 1 everywhere.

        Parameters
        ----------
        weight, bias
            W ``(C, C)`` and b ``(C,)``.
        """
        with torch.no_grad():
            self.channels.weight[self.dim :] = weight
            self.channels.bias[self.dim :] = bias
            for name, parameter in self.tokens.named_parameters():
                parameter.fill_(1 if name == "bias" else 0)
        nn.init.eye_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def _act(self, x: Tensor) -> Tensor:
        return F.gelu(x) if self.activation == "gelu" else x

    def extra_repr(self) -> str:
        """Name the options."""
        return f"dim={self.dim}, kernel_size={self.tokens.kernel_size}, activation={self.activation!r}"
