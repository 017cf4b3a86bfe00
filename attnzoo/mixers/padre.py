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
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.checks import Grid, check_bool, check_choice, check_int, check_number, check_odd, check_tokens
from attnzoo.errors import OptionError, ShapeError, UnsupportedError
from attnzoo.kernels import padre as fused
from attnzoo.kernels.hadamard import hadamard_chain
from attnzoo.mixers.canvas import Canvas, hide, real_tokens
from attnzoo.mixers.channel_mixing import (
    CHANNEL_MIXINGS,
    GroupedLinear,
    as_matrix,
    become_identity,
    dense,
    make_channel_mixing,
)
from attnzoo.mixers.token_mixing import (
    TOKEN_MIXINGS,
    CausalConv1d,
    DepthwiseConv1d,
    DepthwiseConv2d,
    Parts,
    PrefixMixing,
    TokenMixing,
)

OUTPUTS = ("last", "sum", "element_sum")
STARTS = ("random", "identity")
Z_MIXINGS = ("full", "identity")
NEAR = 0.3  # with start="identity" the weights of all factors but the first, whose biases are 1, are scaled by this


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
        What B and D are: ``dense``, ``grouped`` (block-diagonal, one block per head) or ``identity``.
    output
        ``last``: Z_d. ``sum``: all Z_i, with one weight per channel, and a bias. ``element_sum``: with one weight for
        each token and channel, as the paper writes it.
    start
        How the weights begin. ``random``: those of all factors alike. ``identity``: all factors but the first near 1,
        and C and D the identity, so that Z_d begins near Z_1.
    z_mixing
        What C and D are: ``full``, as A and B, or the ``identity``, which leaves d maps over tokens and channels of
        2 d - 1.
    products
        False adds the factors instead of multiplying them, Z_{i+1} = (C_i Z_i D_i + Y_{i+1}) / sqrt(2): a control of
        the same size that starts in the same range and is linear in its input. With degree 1 it changes nothing.
    out_proj
        Map the channels of the output once more.
    out_norm
        Normalize each token's output by its root mean square over the channels, before `gain`. It is no polynomial
        then, and cannot outgrow the residual stream: for hosts that normalize after the sum, such as DETR's encoder.
    gain
        A learned factor per channel on the output, which begins at this value; None for none.
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
        start: str = "random",
        z_mixing: str = "full",
        products: bool = True,
        out_proj: bool = False,
        out_norm: bool = False,
        gain: float | None = None,
        tokens: int | None = None,
        mix_prefix: bool = True,
    ) -> None:
        super().__init__()
        self.dim = check_int("dim", dim, minimum=1)
        self.degree = check_int("degree", degree, minimum=1)
        self.mix_prefix = check_bool("mix_prefix", mix_prefix)
        self.output = check_choice("output", output, OUTPUTS)
        check_choice("start", start, STARTS)
        self.products = check_bool("products", products)
        if start == "identity" and not products:
            raise OptionError("start='identity' begins with factors near 1, which change nothing only in a product")
        between = degree - 1 if check_choice("z_mixing", z_mixing, Z_MIXINGS) == "full" else 0
        check_bool("out_proj", out_proj)
        self.out_norm = check_bool("out_norm", out_norm)
        if gain is not None:
            check_number("gain", gain, minimum=0)
        kind = TOKEN_MIXINGS[check_choice("token_mixing", token_mixing, tuple(TOKEN_MIXINGS))]
        check_choice("channel_mixing", channel_mixing, CHANNEL_MIXINGS)
        if kind.causal:
            check_int("kernel_size", kernel_size, minimum=1)
        else:
            check_odd("kernel_size", kernel_size)
        if tokens is not None:
            check_int("tokens", tokens, minimum=1)
            if token_mixing != "dense" and output != "element_sum":
                raise OptionError(
                    "tokens= is for token_mixing='dense' or output='element_sum', which have weights for each token"
                )
        check_int("num_heads", num_heads, minimum=1)

        def over_channels(copies: int) -> nn.Module:
            return make_channel_mixing(channel_mixing, dim, copies, num_heads)

        def over_tokens(count: int) -> nn.ModuleList:
            return nn.ModuleList(
                kind(dim, kernel_size=kernel_size, tokens=tokens, mix_prefix=mix_prefix) for _ in range(count)
            )

        # all Y_i come from X, so their maps over channels are one matrix
        self.y_channels, self.y_tokens = over_channels(degree), over_tokens(degree)
        self.z_channels = nn.ModuleList(over_channels(1) for _ in range(between))
        self.z_tokens = over_tokens(between)
        if output == "element_sum" and tokens is None:
            raise OptionError("output='element_sum' has weights for each token: say tokens=, prefix tokens included")
        if output != "last":
            each: tuple[int, ...] = (dim,) if tokens is None or output == "sum" else (tokens, dim)
            self.term_weights = nn.Parameter(torch.full((degree, *each), degree**-0.5))
            self.term_bias = nn.Parameter(torch.zeros(each))
        self.out_proj = dense(dim, dim) if out_proj else None
        self.gain = None if gain is None else nn.Parameter(torch.full((dim,), float(gain)))
        if start == "identity":
            self._start_near_identity()

    causal_form = "token_mixing='causal_conv1d'"  # what messages tell where a causal mixer is needed

    @staticmethod
    def abilities(
        *,
        token_mixing: str = "conv2d",
        channel_mixing: str = "dense",
        output: str = "last",
        products: bool = True,
        out_norm: bool = False,
        **options: object,
    ) -> dict[str, bool]:
        """Say which capabilities depend on the options."""
        kind = TOKEN_MIXINGS[check_choice("token_mixing", token_mixing, tuple(TOKEN_MIXINGS))]
        alike = output != "element_sum"  # which has weights for each token
        return {
            "causal": kind.causal,
            "grid": kind.needs_grid,
            "any_order": kind.any_order and alike,
            "decode": kind.causal and alike,
            "inherit": channel_mixing == "dense" and products and not out_norm,
        }

    def forward(self, x: Tensor, grid: Grid | None = None, prefix: int = 0, mask: Tensor | None = None) -> Tensor:
        """Mix tokens ``(B, N, C)``; see `attnzoo.mixers` for grid, prefix and mask.

        Raises
        ------
        ShapeError
            If x, grid, prefix and mask do not fit together, or not this module.
        """
        check_tokens(x, self.dim, mask)
        self._mixing.check_prefix(prefix)
        self._check_count(x, grid)
        canvas = self._mixing.layout(x, grid, prefix, mask)
        if (weights := self._fused_weights(canvas)) is not None and fused.fits(x, weights):
            return self._after(fused.padre(x, weights, canvas.height, canvas.width))
        terms = self._terms(canvas.lay(x), _AtOnce(canvas))
        return self._output(terms, canvas, real_tokens(x, grid, prefix, mask))

    def inherit(self, weight: Tensor, bias: Tensor) -> None:
        """Begin as attention whose weights are all alike: Z_1 = A X W^T + b, all further factors Y_i = 1.

        This stands in place of `start` and of the value at which `gain` begins. A is the mean over the tokens that the
        mixing reaches, the one tap of ``token_mixing="identity"``.

        Parameters
        ----------
        weight, bias
            W ``(C, C)`` and b ``(C,)``.

        Raises
        ------
        OptionError
            Unless ``channel_mixing="dense"``, and with ``products=False`` or ``out_norm=True``.
        """
        if self.out_norm:
            raise OptionError("init='inherit' begins as a linear map, which out_norm=True is not")
        if not self.products:
            raise OptionError("init='inherit' begins with factors of 1, which change nothing only in a product")
        if not isinstance(self.y_channels, nn.Linear):
            raise OptionError("init='inherit' needs channel_mixing='dense', which can hold any matrix over channels")
        y_tokens = cast(Sequence[TokenMixing], self.y_tokens)
        with torch.no_grad():
            self.y_channels.weight.zero_()[: self.dim] = weight
            self.y_channels.bias.zero_()
            y_tokens[0].become_mean()
            for index, mixing in enumerate(y_tokens):  # after the first, of zeros: what it gives is its bias
                there = getattr(mixing, "bias", self._of_factor(index, "bias"))
                there.copy_(torch.ones_like(bias) if index else bias)
            if self.output != "last":
                self.term_weights.zero_()[0] = 1
            if self.gain is not None:
                self.gain.fill_(1.0)
        self._keep_between_factors()
        if self.out_proj is not None:
            become_identity(self.out_proj)

    def _start_near_identity(self) -> None:
        """Set all factors but the first to 1 and a little, and the maps between them to the identity."""
        with torch.no_grad():
            if self.output != "last":  # the mean of terms that are all near Z_1
                self.term_weights.fill_(1 / self.degree)
            for index, mixing in enumerate(self.y_tokens):
                if index == 0:
                    continue
                for name, weight in mixing.named_parameters():
                    weight.mul_(NEAR) if name != "bias" else weight.fill_(1.0)
                if not hasattr(mixing, "bias"):  # and no weights
                    self._of_factor(index, "weight").mul_(NEAR)
                    self._of_factor(index, "bias").fill_(1.0)
        self._keep_between_factors()

    def _keep_between_factors(self) -> None:
        for linear in self.z_channels:
            become_identity(linear)
        for mixing in cast(Sequence[TokenMixing], self.z_tokens):
            mixing.become_identity()

    def _of_factor(self, index: int, name: str) -> Tensor:
        """The part of weight or bias of the maps over channels that is factor `index`'s, as one row."""
        if not isinstance(self.y_channels, nn.Linear | GroupedLinear):
            raise OptionError("this start needs a bias: token_mixing and channel_mixing cannot both be 'identity'")
        return getattr(self.y_channels, name).view(self.degree, -1)[index]

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
        if not isinstance(self._mixing, CausalConv1d) or self.output == "element_sum":
            raise UnsupportedError(
                "only a padre with token_mixing='causal_conv1d' and no weights for each token can decode from a state"
            )
        check_tokens(x, self.dim, mask)
        self._check_state(state, x.shape[0])
        canvas = self._mixing.layout(x, None, 0, mask)
        ahead = _FromState(canvas, state, None if mask is None else mask.sum(1))
        terms = self._terms(canvas.lay(x), ahead)
        return self._output(terms, canvas, mask), tuple(ahead.state)

    def _terms(self, x: Parts, way: _AtOnce | _FromState) -> list[Parts]:
        """Z_d, or Z_1 to Z_d where the output needs them, by one `way` of mixing tokens."""
        ys = list(zip(*(self.y_channels(part).chunk(self.degree, dim=-1) for part in x), strict=True))
        y_tokens = cast(Sequence[TokenMixing], self.y_tokens)
        combine = way.product if self.products else partial(_sum, way)
        terms = [way.mix(y_tokens[0], ys[0])]
        for i in range(1, self.degree):
            if len(self.z_tokens):
                over_channels, over_tokens = self.z_channels[i - 1], cast(TokenMixing, self.z_tokens[i - 1])
                head, patches = terms[-1]
                inputs = over_channels(head), over_channels(patches)
                term = combine(over_tokens, inputs, y_tokens[i], ys[i])
            else:
                term = combine(y_tokens[i], ys[i], None, terms[-1])
            terms = [term] if self.output == "last" else [*terms, term]
        return terms

    def _fused_weights(self, canvas: Canvas) -> fused.Weights | None:
        """The weights where one kernel can compute Z_d: pointwise maps, 2-D convolutions, no padding."""
        plain = canvas.patch_mask is None and canvas.prefix_mask is None and canvas.slots is None
        if not plain or not self.products or self.output != "last":
            return None
        if not all(_is_plain(m, DepthwiseConv2d) for m in (*self.y_tokens, *self.z_tokens)):
            return None
        if not all(_is_plain(m, nn.Linear) for m in (self.y_channels, *self.z_channels)):
            return None
        b, d = cast(nn.Linear, self.y_channels), cast(Sequence[nn.Linear], self.z_channels)
        a, c = cast(Sequence[DepthwiseConv2d], self.y_tokens), cast(Sequence[DepthwiseConv2d], self.z_tokens)
        prefix = [[t for m in mixings for t in m.of_prefix] if canvas.prefix else [] for mixings in (a, c)]
        return fused.Weights(b.weight, b.bias, *_weights(a), *_weights(d), *_weights(c), *prefix)

    def _output(self, terms: list[Parts], canvas: Canvas, real: Tensor | None) -> Tensor:
        if self.output == "last":
            out = canvas.take(*terms[-1])
        else:
            out = hadamard_chain([canvas.take(*z) for z in terms], weights=self.term_weights, bias=self.term_bias)
        out = self._after(out)
        biased = self.output != "last" or self.out_proj is not None
        return hide(out, real.unsqueeze(-1)) if biased and real is not None else out

    def _after(self, out: Tensor) -> Tensor:
        """The output map, the norm and the gain."""
        out = out if self.out_proj is None else self.out_proj(out)
        out = F.rms_norm(out, (self.dim,)) if self.out_norm else out
        return out if self.gain is None else out * self.gain

    def reference(self, x: Tensor, grid: Grid | None = None, prefix: int = 0, mask: Tensor | None = None) -> Tensor:
        """Compute the same by the paper's equation, with every A_i and C_i as a dense matrix, image by image. Slow."""
        check_tokens(x, self.dim, mask)
        self._mixing.check_prefix(prefix)
        self._check_count(x, grid)
        real = real_tokens(x, grid, prefix, mask)
        out = torch.zeros_like(x)
        for b, image in enumerate(x):
            kept = torch.arange(len(image)) if real is None else real[b].nonzero().squeeze(1).cpu()
            width = 1 if grid is None else int(grid[b][1] if isinstance(grid, Tensor) else grid[1])
            terms = self._reference_terms(image[kept], self._places(kept.tolist(), prefix), width)
            if self.output == "last":
                polynomial = terms[-1]
            else:
                weights = self.term_weights if self.output == "sum" else self.term_weights[:, kept]
                bias = self.term_bias if self.output == "sum" else self.term_bias[kept]
                polynomial = sum((w * z for w, z in zip(weights, terms, strict=True)), bias)
            out[b, kept] = self._after(polynomial)
        return out

    def _reference_terms(self, x: Tensor, places: list[int], width: int) -> list[Tensor]:
        """Z_1 to Z_d of one image, whose real tokens are `x`."""
        b, b_bias = (part.chunk(self.degree) for part in as_matrix(self.y_channels, x))
        y = []
        for i in range(self.degree):
            a, a_bias = _matrices(cast(TokenMixing, self.y_tokens[i]), places, width, x)
            y.append(torch.einsum("cnm,mc->nc", a, x @ b[i].T + b_bias[i]) + a_bias)
        z = [y[0]]
        for i in range(self.degree - 1):
            last = z[-1]
            if len(self.z_tokens):
                d, d_bias = as_matrix(self.z_channels[i], x)
                c, c_bias = _matrices(cast(TokenMixing, self.z_tokens[i]), places, width, x)
                last = torch.einsum("cnm,mc->nc", c, last @ d.T + d_bias) + c_bias
            z.append(last * y[i + 1] if self.products else (last + y[i + 1]) * 0.5**0.5)
        return z

    def _places(self, kept: list[int], prefix: int) -> list[int]:
        """Where tokens lie for the token mixing: on the grid, in the sequence of real ones, or as they come."""
        if isinstance(self._mixing, DepthwiseConv1d):
            head = [k - prefix for k in kept if k < prefix]
            return [*head, *range(len(kept) - len(head))]
        return [k - prefix for k in kept] if isinstance(self._mixing, PrefixMixing) else kept

    @property
    def _mixing(self) -> TokenMixing:
        """One of the token mixings, which are all of a kind."""
        return cast(TokenMixing, self.y_tokens[0])

    def _check_count(self, x: Tensor, grid: Grid | None) -> None:
        if self.output == "element_sum" and (isinstance(grid, Tensor) or x.shape[1] != len(self.term_bias)):
            raise ShapeError(
                f"output='element_sum' has weights for {len(self.term_bias)} tokens, prefix included, on one grid "
                f"(h, w); it cannot take {x.shape[1]}{' on a grid an image' if isinstance(grid, Tensor) else ''}"
            )

    def _check_state(self, state: Sequence[Tensor] | None, rows: int) -> None:
        wanted = [(rows, self._mixing.kernel_size - 1, self.dim)] * (len(self.y_tokens) + len(self.z_tokens))
        if state is not None and [tuple(part.shape) for part in state] != wanted:
            raise ShapeError(f"the state must be {wanted}, not {[tuple(part.shape) for part in state]}")

    def extra_repr(self) -> str:
        """Name the options."""
        return (
            f"dim={self.dim}, degree={self.degree}, kernel_size={self._mixing.kernel_size}, "
            f"mixing=({type(self._mixing).__name__}, {type(self.y_channels).__name__}), output={self.output!r}"
            + ("" if self.products else ", products=False")
            + (", out_norm=True" if self.out_norm else "")
        )


class _AtOnce:
    """Token mixing of a whole sequence."""

    def __init__(self, canvas: Canvas) -> None:
        self.canvas = canvas

    def mix(self, mixing: TokenMixing, parts: Parts) -> Parts:
        return cast(Parts, mixing(*parts, self.canvas))

    def product(self, mixing: TokenMixing, parts: Parts, other: TokenMixing | None, others: Parts) -> Parts:
        return mixing.product(parts, other, others, self.canvas)


class _FromState:
    """Causal token mixing of the tokens that come next.

    `state` fills up with the last ``kernel_size - 1`` inputs of each convolution, in the order of their calls; so must
    stand what is given `before`. Of row b the first ``count[b]`` tokens are real, all where it is None.
    """

    def __init__(self, canvas: Canvas, before: Sequence[Tensor] | None, count: Tensor | None) -> None:
        self.canvas, self.count, self.state = canvas, count, list[Tensor]()
        self._before = None if before is None else iter(before)

    def mix(self, mixing: TokenMixing, parts: Parts) -> Parts:
        assert isinstance(mixing, CausalConv1d)
        head, inputs = parts[0], hide(parts[1], self.canvas.patch_mask)
        length = mixing.kernel_size - 1
        line = F.pad(inputs, (0, 0, length, 0)) if self._before is None else torch.cat([next(self._before), inputs], 1)
        self.state.append(_last(line, length, self.count))
        return head, mixing.along(line)

    def product(self, mixing: TokenMixing, parts: Parts, other: TokenMixing | None, others: Parts) -> Parts:
        (head, patches), (other_head, other_patches) = _both(self, mixing, parts, other, others)
        return head * other_head, patches * other_patches


def _both(
    way: _AtOnce | _FromState, mixing: TokenMixing, parts: Parts, other: TokenMixing | None, others: Parts
) -> tuple[Parts, Parts]:
    """Mix the tokens of both; `others` stay as they are where there is no `other` mixing."""
    return way.mix(mixing, parts), others if other is None else way.mix(other, others)


def _sum(
    way: _AtOnce | _FromState, mixing: TokenMixing, parts: Parts, other: TokenMixing | None, others: Parts
) -> Parts:
    """Mix both inputs and add the results, so that the variance stays."""
    (head, patches), (other_head, other_patches) = _both(way, mixing, parts, other, others)
    return (head + other_head) * 0.5**0.5, (patches + other_patches) * 0.5**0.5


def _weights(modules: Sequence[nn.Linear] | Sequence[DepthwiseConv2d]) -> tuple[list[Tensor], list[Tensor]]:
    return [m.weight for m in modules], [m.bias for m in modules]


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module computes what its class says: nothing put over it (adapters, quantization) or hooked in.

    Hooks on all modules, which torch's own FLOP counter has, are called for the layer and not for its parts.
    """
    hooked = module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module)
    return type(module) is kind and not hooked and module.bias is not None


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
