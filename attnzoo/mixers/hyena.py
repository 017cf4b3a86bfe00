"""Hyena: products of streams, each convolved with a filter as long as the sequence.

Paper: Poli et al., Hyena Hierarchy, ICML 2023, https://arxiv.org/abs/2302.10866

    x_0 .. x_{M-1}, v = DWConv_3(W X),   v <- h_i * (x_i . v) for i = M-1 .. 1,   O = W_o (x_0 . v)
    h_i[t] = MLP(t, cos, sin)[t] exp(-a_i t),   plus a weight for t = 0          (* convolution, . elementwise)

Given its filters, order M is PADRe of degree M+1 exactly, with C_1 = I and the long convolutions as C_2 .. C_M, and W_o
the map of the output.

Differs from the paper: by default the sequence has no direction (short filters are centered, and the filters of the MLP
have values for tokens after as well as before), for images have none and a class token stands first; the frequencies of
the positional features are not trained; a sequence longer than `length` is not cut, its filters go on.
``bidirectional=False`` is the authors' operator. Its transforms, as theirs, let a later token move an earlier output by
rounding: about 1e-7 of the largest value of the sequence in float32.
"""

from __future__ import annotations

import math
from typing import cast

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.checks import Grid, check_bool, check_int, check_odd, check_tokens
from attnzoo.kernels.depthwise_pair import depthwise_pair
from attnzoo.mixers.canvas import Canvas, real_tokens

SHORT = 3  # length of the short filters
FAST_DECAY, SLOW_DECAY, FLOOR = 0.3, 1.5, 0.01  # filters fall to FLOOR within these shares of `length`
INNER_LAYERS = 2


class Hyena(nn.Module):
    """The Hyena operator over the sequence of all tokens.

    Parameters
    ----------
    dim
        Width C of a token.
    num_heads
        Not used: there are no heads.
    order
        Number M of products, 2 and up.
    filter_order
        Width of the MLP that makes the filters.
    features
        Number of positional features that it is given, odd: time, and cosines and sines.
    length
        Number of tokens over which time goes from 0 to 1.
    bidirectional
        Let tokens see those after them.

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
        order: int = 2,
        filter_order: int = 64,
        features: int = 3,
        length: int = 1024,
        bidirectional: bool = True,
    ) -> None:
        super().__init__()
        self.dim = check_int("dim", dim, minimum=1)
        self.order = check_int("order", order, minimum=2)
        self.bidirectional = check_bool("bidirectional", bidirectional)
        self.in_proj = nn.Linear(dim, (order + 1) * dim)
        self.out_proj = nn.Linear(dim, dim)
        self.short_filter = nn.Conv1d((order + 1) * dim, (order + 1) * dim, SHORT, groups=(order + 1) * dim)
        self.filters = ImplicitFilter((order - 1) * dim, filter_order, features, length, bidirectional)

    @staticmethod
    def abilities(*, bidirectional: bool = True, **options: object) -> dict[str, bool]:
        """Say which capabilities depend on the options."""
        return {"causal": bidirectional is False}

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
        streams = self.in_proj(x).chunk(self.order + 1, dim=-1)
        short = self.short_filter.weight, cast(Tensor, self.short_filter.bias)
        *gates, last, v = zip(streams, *(t.chunk(self.order + 1) for t in short), strict=True)
        place = {**line.place, "causal": not self.bidirectional}
        product = depthwise_pair(*v, *last, **place).mT  # padding is 0 here and after each product below
        taps = rearrange(self.filters(x.shape[1]), "k (order c) n -> order k c n", c=self.dim)
        skips = self.filters.bias.chunk(self.order - 1)
        for gate, h, skip in zip(reversed(gates), taps, skips, strict=True):
            convolved = long_convolution(product, h) + skip.unsqueeze(-1) * product
            product = convolved * depthwise_pair(*gate, **place).mT
        return line.take(head, self.out_proj(product.mT))

    def inherit(self, weight: Tensor, bias: Tensor) -> None:
        """Begin as the affine map of attention's values: V = X W^T + b, all gates 1 and long filters 0.

        Parameters
        ----------
        weight, bias
            W ``(C, C)`` and b ``(C,)``.
        """
        tap = SHORT // 2 if self.bidirectional else SHORT - 1  # of the token itself
        short = self.short_filter
        assert short.bias is not None
        with torch.no_grad():
            self.in_proj.weight.zero_()[-self.dim :] = weight
            self.in_proj.bias.zero_()[-self.dim :] = bias
            short.bias.fill_(1)[-self.dim :] = 0
            short.weight[-self.dim :] = 0
            short.weight[-self.dim :, :, tap] = 1
            self.filters.last.weight.zero_()
            self.filters.bias.fill_(1)
        nn.init.eye_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def extra_repr(self) -> str:
        """Name the options."""
        return f"dim={self.dim}, order={self.order}, bidirectional={self.bidirectional}"


class ImplicitFilter(nn.Module):
    """Filters of any length, made by an MLP with sines for activations, that decay exponentially.

    Parameters
    ----------
    channels
        Number of filters.
    width
        Width of the MLP.
    features
        Number of positional features, odd.
    length
        Number of taps over which time goes from 0 to 1.
    bidirectional
        Make taps for tokens after, too.
    """

    def __init__(self, channels: int, width: int, features: int, length: int, bidirectional: bool) -> None:
        super().__init__()
        check_odd("features", check_int("features", features, minimum=3))  # time, and as many cosines as sines
        self.length, self.bands = check_int("length", length, minimum=2), (features - 1) // 2
        self.directions = 2 if bidirectional else 1
        check_int("filter_order", width, minimum=1)
        self.layers = nn.ModuleList(
            nn.Linear(inputs, width) for inputs in (features, *(width for _ in range(INNER_LAYERS)))
        )
        self.last = nn.Linear(width, self.directions * channels, bias=False)
        self.frequency = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.randn(channels))
        rates = -torch.linspace(math.log(FLOOR) / SLOW_DECAY, math.log(FLOOR) / FAST_DECAY, channels)
        self.decay: Tensor
        self.register_buffer("decay", rates, persistent=False)

    def forward(self, tokens: int) -> Tensor:
        """Taps ``(directions, channels, tokens)``: of tokens 0, 1, .. before and, if asked, after."""
        steps = torch.arange(tokens, device=self.bias.device, dtype=torch.promote_types(self.bias.dtype, torch.float32))
        time = steps[:, None] / (self.length - 1)
        bands = torch.linspace(1e-4, self.bands - 1, self.bands, device=steps.device, dtype=steps.dtype)
        angles = 2 * math.pi * steps[:, None] / self.length * bands
        h = torch.cat([time, angles.cos(), -angles.sin()], dim=1).to(self.bias.dtype)
        for layer in self.layers:
            h = torch.sin(self.frequency * layer(h))
        decay = torch.exp(-time * self.decay).to(h.dtype)
        return rearrange(self.last(h), "n (k c) -> k c n", k=self.directions) * decay.mT


def long_convolution(x: Tensor, taps: Tensor) -> Tensor:
    """Convolve ``(B, C, N)`` with filters ``(directions, C, N)`` by fast Fourier transform, in float32 at least.

    Tap t of direction 0 weighs the token t before, tap t of direction 1 that t after (its tap 0 is not read).
    """
    if x.numel() == 0:  # there is no transform of nothing
        return x * taps.sum()
    tokens, wide = x.shape[-1], torch.promote_types(x.dtype, torch.float32)
    size = 2 * tokens
    kernel = F.pad(taps[0].to(wide), (0, tokens))
    if len(taps) == 2:
        kernel = kernel + F.pad(taps[1].to(wide)[:, 1:].flip(-1), (tokens + 1, 0))
    spectrum = torch.fft.rfft(x.to(wide), n=size) * torch.fft.rfft(kernel, n=size)
    return torch.fft.irfft(spectrum, n=size)[..., :tokens].to(x.dtype)
