"""PADRe: polynomial attention as a drop-in replacement of softmax attention.

Paper: Letourneau et al., PADRe, ICLR 2025, https://arxiv.org/abs/2407.11306

    Y_i = A_i X B_i,   Z_1 = Y_1,   Z_{i+1} = (C_i Z_i D_i) * Y_{i+1}     (* elementwise, i = 1..d)
    output="last": O = Z_d          output="sum": O = sum_i W_i * Z_i + L

A_i, C_i mix tokens, B_i, D_i mix channels; what they may be is in `token_mixing` and `channel_mixing`. The paper's
module for images has pointwise maps and 11 x 11 convolutions (the defaults), that for sequences of voxels convolutions
of length 11 (``token_mixing="conv1d"``). Linear in the number of tokens; each output is a polynomial of degree d in the
input. The residual connection round the layer is the term of degree 1.

Differs from the paper: the paper does not say whether its convolutions are depthwise (here they are), whether terms
below Z_d are added (by default they are not: with a bias in every convolution Z_d holds all lower degrees already),
nor how it starts the weights (here, in the interior of a grid larger than the kernel, each Y_i has about the variance
of its input; at the edges, where zeros are convolved, less), nor what becomes of a class token (see `token_mixing`).
Pointwise comes before depthwise, and padding is zero before each convolution. The causal form is not in the paper.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.checks import Grid, check_bool, check_choice, check_int, check_odd, check_tokens
from attnzoo.errors import OptionError, ShapeError, UnsupportedError
from attnzoo.mixers.canvas import hide, real_tokens
from attnzoo.mixers.channel_mixing import CHANNEL_MIXINGS, as_matrix, make_channel_mixing
from attnzoo.mixers.token_mixing import TOKEN_MIXINGS, CausalConv1d, DepthwiseConv1d, PrefixMixing, TokenMixing

OUTPUTS = ("last", "sum", "element_sum")


class Padre(nn.Module):
    """PADRe, its parts chosen by name.

    Parameters
    ----------
    dim
        Width C of a token.
    num_heads
        Number of groups of ``channel_mixing="grouped"``; not used otherwise, for the paper found no gain from several
        heads.
    degree
        Degree d of the polynomial, 1 and up. 1 is linear.
    kernel_size
        Side or length of the depthwise kernels, in tokens; odd, but for ``causal_conv1d``.
    token_mixing
        What A and C are: ``conv2d`` over the grid, ``conv1d`` along the sequence of patches, ``causal_conv1d`` over a
        token and those before it, ``dense`` (a matrix over all tokens), or ``identity``.
    channel_mixing
        What B and D are: ``dense``, ``grouped`` (block-diagonal, a block a head) or ``identity``.
    output
        ``last``: Z_d. ``sum``: all Z_i, with a weight a channel, and a bias. ``element_sum``: with a weight for each
        token and channel, as the paper writes it.
    tokens
        Number of tokens, prefix included, for the parts that have weights for each of them (``dense``,
        ``element_sum``); such a module is for this number alone. All others take any number at any time.
    mix_prefix
        Have weights for class and register tokens. Say False where a model has no such tokens: the weights would get
        no gradient, which distributed training complains of. `replace_attention` sees to it by itself.

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
        degree: int = 3,
        kernel_size: int = 11,
        token_mixing: str = "conv2d",
        channel_mixing: str = "dense",
        output: str = "last",
        tokens: int | None = None,
        mix_prefix: bool = True,
    ) -> None:
        super().__init__()
        self.dim = check_int("dim", dim, minimum=1)
        self.degree = check_int("degree", degree, minimum=1)
        self.mix_prefix = check_bool("mix_prefix", mix_prefix)
        self.output = check_choice("output", output, OUTPUTS)
        kind = TOKEN_MIXINGS[check_choice("token_mixing", token_mixing, tuple(TOKEN_MIXINGS))]
        check_choice("channel_mixing", channel_mixing, CHANNEL_MIXINGS)
        if kind.causal:
            check_int("kernel_size", kernel_size, minimum=1)
        else:
            check_odd("kernel_size", kernel_size)
        if tokens is not None:
            check_int("tokens", tokens, minimum=1)
        check_int("num_heads", num_heads, minimum=1)

        def mixing(copies: int) -> tuple[nn.Module, TokenMixing]:
            over_channels = make_channel_mixing(channel_mixing, dim, copies, num_heads)
            return over_channels, kind(
                copies * dim, kernel_size=kernel_size, tokens=tokens, mix_prefix=mix_prefix, copies=copies
            )

        # all Y_i come from X, so their maps over channels are one matrix and their convolutions one convolution
        self.y_channels, self.y_tokens = mixing(degree)
        z = [mixing(1) for _ in range(degree - 1)]
        self.z_channels = nn.ModuleList(over_channels for over_channels, _ in z)
        self.z_tokens = nn.ModuleList(over_tokens for _, over_tokens in z)
        if output == "element_sum" and tokens is None:
            raise OptionError("output='element_sum' has weights for each token: say tokens=, prefix tokens included")
        if output != "last":
            each: tuple[int, ...] = (dim,) if tokens is None or output == "sum" else (tokens, dim)
            self.term_weights = nn.Parameter(torch.full((degree, *each), degree**-0.5))
            self.term_bias = nn.Parameter(torch.zeros(each))

    @staticmethod
    def abilities(*, token_mixing: str = "conv2d", output: str = "last", **options: object) -> dict[str, bool]:
        """Say which capabilities hang on the options."""
        kind = TOKEN_MIXINGS[check_choice("token_mixing", token_mixing, tuple(TOKEN_MIXINGS))]
        return {"causal": kind.causal, "grid": kind.needs_grid, "decode": kind.causal and output != "element_sum"}

    def forward(self, x: Tensor, grid: Grid | None = None, prefix: int = 0, mask: Tensor | None = None) -> Tensor:
        """Mix tokens ``(B, N, C)``; see `attnzoo.mixers` for grid, prefix and mask.

        Raises
        ------
        ShapeError
            If x, grid, prefix and mask do not fit together, or not this module.
        """
        check_tokens(x, self.dim, mask)
        self.y_tokens.check_prefix(prefix)
        self._check_count(x, grid)
        canvas = self.y_tokens.layout(x, grid, prefix, mask)
        head, patches = canvas.lay(x)
        heads, ys = self.y_tokens(self.y_channels(head), self.y_channels(patches), canvas)
        terms = [(heads[..., : self.dim], ys[..., : self.dim])]
        for i, (over_channels, over_tokens) in enumerate(zip(self.z_channels, self.z_tokens, strict=True), start=1):
            part = slice(i * self.dim, (i + 1) * self.dim)
            head, patches = terms[-1]
            head, patches = over_tokens(over_channels(head), over_channels(patches), canvas)
            terms.append((head * heads[..., part], patches * ys[..., part]))
        if self.output == "last":
            return canvas.take(*terms[-1])
        return self._sum([canvas.take(*term) for term in terms], real_tokens(x, grid, prefix, mask))

    def extend(
        self, x: Tensor, state: Sequence[Tensor] | None = None, mask: Tensor | None = None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Mix the tokens that come next, with ``token_mixing="causal_conv1d"``: for decoding.

        Parameters
        ----------
        x
            ``(B, N, C)``.
        state
            What the call before gave; None at the beginning.
        mask
            ``(B, N)``, True where a token is real. Padding leaves no trace in the state.

        Returns
        -------
        tuple
            The output ``(B, N, C)``, and the state: for each convolution, its last ``kernel_size - 1`` inputs
            ``(B, kernel_size - 1, channels)``.

        Raises
        ------
        UnsupportedError
            If this module is not causal, or has weights for each token.
        ShapeError
            If x and mask do not fit together, or the state is not of this module and as many rows.
        """
        if not isinstance(self.y_tokens, CausalConv1d) or self.output == "element_sum":
            raise UnsupportedError(
                "only a padre with token_mixing='causal_conv1d' and no weights for each token goes on from a state"
            )
        check_tokens(x, self.dim, mask)
        self._check_state(state, len(x))
        canvas = self.y_tokens.layout(x, None, 0, mask)
        head, patches = canvas.lay(x)
        count = None if mask is None else mask.sum(1)
        before = iter(state) if state is not None else None
        after: list[Tensor] = []

        def convolve(over_tokens: CausalConv1d, inputs: Tensor) -> Tensor:
            inputs = hide(inputs, canvas.patch_mask)
            length = over_tokens.kernel_size - 1
            line = F.pad(inputs, (0, 0, length, 0)) if before is None else torch.cat([next(before), inputs], dim=1)
            after.append(_last(line, length, count))
            return over_tokens.along(line)

        ys = convolve(self.y_tokens, self.y_channels(patches)).chunk(self.degree, dim=-1)
        terms = [ys[0]]
        for over_channels, over_tokens, y in zip(self.z_channels, self.z_tokens, ys[1:], strict=True):
            terms.append(convolve(cast(CausalConv1d, over_tokens), over_channels(terms[-1])) * y)
        if self.output == "last":
            return canvas.take(head, terms[-1]), tuple(after)
        return self._sum([canvas.take(head, term) for term in terms], mask), tuple(after)

    def reference(self, x: Tensor, grid: Grid | None = None, prefix: int = 0, mask: Tensor | None = None) -> Tensor:
        """Compute the same by the paper's equation, with every A_i and C_i as a dense matrix, image by image. Slow."""
        check_tokens(x, self.dim, mask)
        self.y_tokens.check_prefix(prefix)
        self._check_count(x, grid)
        real = real_tokens(x, grid, prefix, mask)
        out = torch.zeros_like(x)
        for b, image in enumerate(x):
            kept = torch.arange(len(image)) if real is None else real[b].nonzero().squeeze(1).cpu()
            width = 1 if grid is None else int(grid[b][1] if isinstance(grid, Tensor) else grid[1])
            terms = self._reference_terms(image[kept], self._places(kept.tolist(), prefix), width)
            if self.output == "last":
                out[b, kept] = terms[-1]
            else:
                weights = self.term_weights if self.output == "sum" else self.term_weights[:, kept]
                bias = self.term_bias if self.output == "sum" else self.term_bias[kept]
                out[b, kept] = sum((w * z for w, z in zip(weights, terms, strict=True)), bias)
        return out

    def _reference_terms(self, x: Tensor, places: list[int], width: int) -> list[Tensor]:
        """Z_1 to Z_d of one image, whose real tokens are `x`."""
        b, b_bias = (part.chunk(self.degree) for part in as_matrix(self.y_channels, x))
        a, a_bias = (part.chunk(self.degree) for part in _matrices(self.y_tokens, places, width, x))
        y = [torch.einsum("cnm,mc->nc", a[i], x @ b[i].T + b_bias[i]) + a_bias[i] for i in range(self.degree)]
        z = [y[0]]
        for i in range(self.degree - 1):
            d, d_bias = as_matrix(self.z_channels[i], x)
            c, c_bias = _matrices(cast(TokenMixing, self.z_tokens[i]), places, width, x)
            z.append((torch.einsum("cnm,mc->nc", c, z[-1] @ d.T + d_bias) + c_bias) * y[i + 1])
        return z

    def _places(self, kept: list[int], prefix: int) -> list[int]:
        """Where tokens lie for the token mixing: on the grid, in the sequence of real ones, or as they come."""
        if isinstance(self.y_tokens, DepthwiseConv1d):
            head = [k - prefix for k in kept if k < prefix]
            return [*head, *range(len(kept) - len(head))]
        return [k - prefix for k in kept] if isinstance(self.y_tokens, PrefixMixing) else kept

    def _sum(self, terms: list[Tensor], real: Tensor | None) -> Tensor:
        out = sum((w * z for w, z in zip(self.term_weights, terms, strict=True)), self.term_bias)
        return hide(cast(Tensor, out), None if real is None else real.unsqueeze(-1))

    def _check_count(self, x: Tensor, grid: Grid | None) -> None:
        if self.output == "element_sum" and (isinstance(grid, Tensor) or x.shape[1] != len(self.term_bias)):
            raise ShapeError(
                f"output='element_sum' has weights for {len(self.term_bias)} tokens, prefix included, on one grid "
                f"(h, w); it cannot take {x.shape[1]}{' on a grid an image' if isinstance(grid, Tensor) else ''}"
            )

    def _check_state(self, state: Sequence[Tensor] | None, rows: int) -> None:
        length = self.y_tokens.kernel_size - 1
        wanted = [(rows, length, self.degree * self.dim), *[(rows, length, self.dim)] * (self.degree - 1)]
        if state is not None and [tuple(part.shape) for part in state] != wanted:
            raise ShapeError(f"the state must be {wanted}, not {[tuple(part.shape) for part in state]}")

    def extra_repr(self) -> str:
        """Name the options."""
        return (
            f"dim={self.dim}, degree={self.degree}, kernel_size={self.y_tokens.kernel_size}, "
            f"mixing=({type(self.y_tokens).__name__}, {type(self.y_channels).__name__}), output={self.output!r}"
        )


def _last(line: Tensor, length: int, count: Tensor | None) -> Tensor:
    """The last `length` real ones of `length` tokens and those after them, of which `count` ``(B,)`` are real."""
    if count is None:
        return line[:, line.shape[1] - length :].clone()  # a view would keep the whole line
    columns = count[:, None] + torch.arange(length, device=line.device)
    return line.gather(1, columns.unsqueeze(-1).expand(-1, -1, line.shape[2]))


def _matrices(mixing: TokenMixing, places: list[int], width: int, like: Tensor) -> tuple[Tensor, Tensor]:
    matrices = mixing.matrices(places, width).to(like)
    bias = getattr(mixing, "bias", None)
    return matrices, matrices.new_zeros(len(matrices)) if bias is None else bias
