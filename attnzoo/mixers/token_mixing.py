"""Token mixing: the linear maps over tokens that A and C of a polynomial can be, one class per kind.

Patches (the tokens after the prefix) are mixed as the class says, each channel by weights of its own where there are
any. Prefix tokens (a class token, registers) take part linearly, so that a polynomial's degree stays exact: each
becomes ``own`` times itself plus ``to_prefix`` times the mean of all tokens, and ``to_patches`` times the mean of the
prefix is added to every patch, with one learned weight per channel. Where a kind mixes prefix and patches alike
(``causal_conv1d``, ``dense``) or nothing at all (``identity``) there are no such weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.checks import Grid, check_bool, check_int
from attnzoo.errors import OptionError, ShapeError
from attnzoo.kernels.depthwise_pair import depthwise_pair
from attnzoo.kernels.hadamard import hadamard_chain
from attnzoo.mixers.canvas import Canvas, fixed, hide, real_tokens

Parts = tuple[Tensor, Tensor]  # prefix tokens (B, P, C), and patches (B, height * width, C)


class TokenMixing(nn.Module, ABC):
    """A linear map over tokens.

    Parameters
    ----------
    channels
        Number of channels, each with weights of its own.
    kernel_size
        Length or side of a kernel, odd.
    tokens
        Number of tokens, prefix included, where the kind has weights for each.
    mix_prefix
        Have weights for prefix tokens, where the kind has such.
    """

    needs_grid: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    any_order: ClassVar[bool] = False

    def __init__(self, channels: int, *, kernel_size: int, tokens: int | None, mix_prefix: bool) -> None:
        super().__init__()
        self.channels, self.kernel_size, self.tokens = channels, kernel_size, tokens

    def check_prefix(self, prefix: int) -> None:
        """Raise `ShapeError` if there are prefix tokens and no weights for them."""

    @abstractmethod
    def layout(self, x: Tensor, grid: Grid | None, prefix: int, mask: Tensor | None) -> Canvas:
        """Lay ``(B, N, C)`` out as `forward` wants it.

        Raises
        ------
        ShapeError
            If grid, prefix and x do not fit together, or not this kind.
        """

    @abstractmethod
    def forward(self, head: Tensor, patches: Tensor, canvas: Canvas) -> Parts:
        """Mix prefix ``(B, P, C)`` and patches ``(B, height * width, C)``; what stands at padding means nothing."""

    def product(self, parts: Parts, other: TokenMixing | None, others: Parts, canvas: Canvas) -> Parts:
        """Mix `parts`, and `others` by a mixing of the same kind (None: as they are), and multiply what comes out."""
        head, patches = self(*parts, canvas)
        other_head, other_patches = others if other is None else other(*others, canvas)
        return head * other_head, hadamard_chain(products=[(patches, other_patches)])

    @abstractmethod
    def become_identity(self) -> None:
        """Set the weights so that tokens stay as they are."""

    @abstractmethod
    def become_mean(self) -> None:
        """Set the weights so that each token becomes the mean of all that reach it, with zeros beyond the edges."""

    @abstractmethod
    def matrices(self, places: Sequence[int], width: int) -> Tensor:
        """Write the map out (without bias) as matrices ``(channels, n, n)``, slowly: for references only.

        `places` says where the n tokens lie: the index on a canvas of that `width`, negative for prefix tokens.
        """


class PrefixMixing(TokenMixing):
    """Base of the convolutions that have weights for prefix tokens, and a bias; see the head of this file."""

    weight: nn.Parameter

    def __init__(self, channels: int, *, kernel_size: int, tokens: int | None, mix_prefix: bool) -> None:
        super().__init__(channels, kernel_size=kernel_size, tokens=tokens, mix_prefix=mix_prefix)
        self.bias = nn.Parameter(torch.zeros(channels))
        if check_bool("mix_prefix", mix_prefix):
            # A patch takes the mean of the prefix as one tap more; were it as strong as the whole kernel, a lone class
            # token would drown the patches, the more the higher the degree.
            self.own = nn.Parameter(torch.ones(channels))
            self.to_prefix = nn.Parameter(torch.ones(channels))
            self.to_patches = nn.Parameter(torch.full((channels,), 1 / kernel_size))

    @property
    def of_prefix(self) -> tuple[Tensor, Tensor, Tensor]:
        """The weights ``own``, ``to_prefix`` and ``to_patches``."""
        return self.own, self.to_prefix, self.to_patches

    def check_prefix(self, prefix: int) -> None:
        """Raise `ShapeError` if there are prefix tokens and no weights for them."""
        if prefix and not hasattr(self, "own"):
            raise ShapeError(f"this mixer was built with mix_prefix=False and cannot take {prefix} prefix tokens")

    def become_identity(self) -> None:
        """Only the middle tap, and of prefix tokens only their own weight, is 1."""
        nn.init.dirac_(self.weight, groups=self.channels)
        nn.init.zeros_(self.bias)
        if hasattr(self, "own"):
            nn.init.ones_(self.own)
            nn.init.zeros_(self.to_prefix)
            nn.init.zeros_(self.to_patches)

    def become_mean(self) -> None:
        """All taps are alike; a prefix token becomes the mean of all tokens."""
        tap = 1 / self.weight[0].numel()
        nn.init.constant_(self.weight, tap)
        nn.init.zeros_(self.bias)
        if hasattr(self, "own"):
            nn.init.zeros_(self.own)
            nn.init.ones_(self.to_prefix)
            nn.init.constant_(self.to_patches, tap)

    @abstractmethod
    def tap(self, to: int, source: int, width: int) -> Tensor | None:
        """Weight ``(channels,)`` with which place `source` reaches place `to`; None for 0."""

    def forward(self, head: Tensor, patches: Tensor, canvas: Canvas) -> Parts:
        """Mix the prefix, convolve the patches."""
        head, bias = self.prefix_parts(head, patches, canvas)
        return head, depthwise_pair(patches, self.weight, bias, **canvas.place)

    def product(self, parts: Parts, other: TokenMixing | None, others: Parts, canvas: Canvas) -> Parts:
        """Convolve and multiply in one operation."""
        head, bias = self.prefix_parts(*parts, canvas)
        factors = (parts[1], self.weight, bias)
        if other is None:
            return head * others[0], depthwise_pair(*factors, others[1], **canvas.place)
        assert isinstance(other, PrefixMixing)
        other_head, other_bias = other.prefix_parts(*others, canvas)
        patches = depthwise_pair(*factors, others[1], other.weight, other_bias, **canvas.place)
        return head * other_head, patches

    def prefix_parts(self, head: Tensor, patches: Tensor, canvas: Canvas) -> tuple[Tensor, Tensor]:
        """Give the prefix, mixed, and a bias ``(C,)`` or ``(B, C)`` for the patches, which the prefix takes part in."""
        head = hide(head, canvas.prefix_mask)
        if not canvas.prefix:
            return head, self.bias
        head_sum, head_count = token_sum(head, canvas.prefix_mask)
        patch_sum, patch_count = token_sum(hide(patches, canvas.patch_mask), canvas.patch_mask)
        head_mean = (head_sum / head_count.clamp(min=1)).to(head.dtype).squeeze(1)
        mean = ((head_sum + patch_sum) / (head_count + patch_count).clamp(min=1)).to(head.dtype)
        return self.own * head + self.to_prefix * mean + self.bias, self.bias + self.to_patches * head_mean

    def matrices(self, places: Sequence[int], width: int) -> Tensor:
        """Write the map out."""
        n, prefix = len(places), sum(place < 0 for place in places)
        a = self.bias.new_zeros(self.channels, n, n)
        for i, to in enumerate(places):
            for j, source in enumerate(places):
                if to < 0:
                    a[:, i, j] = self.to_prefix / n + (self.own if i == j else 0)
                elif source < 0:
                    a[:, i, j] = self.to_patches / prefix
                elif (tap := self.tap(to, source, width)) is not None:
                    a[:, i, j] = tap
        return a


class DepthwiseConv2d(PrefixMixing):
    """Depthwise convolution over the grid, ``kernel_size`` x ``kernel_size``, with zeros beyond the edges."""

    needs_grid = True

    def __init__(self, channels: int, *, kernel_size: int, tokens: int | None, mix_prefix: bool) -> None:
        super().__init__(channels, kernel_size=kernel_size, tokens=tokens, mix_prefix=mix_prefix)
        # the variance of a sum over all taps is that of the input
        self.weight = nn.Parameter(torch.randn(channels, 1, kernel_size, kernel_size) / kernel_size)

    def layout(self, x: Tensor, grid: Grid | None, prefix: int, mask: Tensor | None) -> Canvas:
        """On the grid."""
        return Canvas.of(x, grid, prefix, mask)

    def tap(self, to: int, source: int, width: int) -> Tensor | None:
        """Weight of one place for another."""
        half = self.kernel_size // 2
        row, column = source // width - to // width + half, source % width - to % width + half
        inside = 0 <= row < self.kernel_size and 0 <= column < self.kernel_size
        return self.weight[:, 0, row, column] if inside else None


class DepthwiseConv1d(PrefixMixing):
    """Depthwise convolution along the sequence of patches, with zeros beyond the ends."""

    def __init__(self, channels: int, *, kernel_size: int, tokens: int | None, mix_prefix: bool) -> None:
        super().__init__(channels, kernel_size=kernel_size, tokens=tokens, mix_prefix=mix_prefix)
        self.weight = nn.Parameter(torch.randn(channels, 1, kernel_size) * kernel_size**-0.5)

    def layout(self, x: Tensor, grid: Grid | None, prefix: int, mask: Tensor | None) -> Canvas:
        """In a line."""
        return Canvas.line(x, grid, prefix, mask)

    def tap(self, to: int, source: int, width: int) -> Tensor | None:
        """Weight of one place for another."""
        step = source - to + self.kernel_size // 2
        return self.weight[:, 0, step] if 0 <= step < self.kernel_size else None


class CausalConv1d(TokenMixing):
    """Depthwise convolution over a token and the ``kernel_size - 1`` before it, prefix tokens first."""

    causal = True

    def __init__(self, channels: int, *, kernel_size: int, tokens: int | None, mix_prefix: bool) -> None:
        super().__init__(channels, kernel_size=kernel_size, tokens=tokens, mix_prefix=mix_prefix)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.weight = nn.Parameter(torch.randn(channels, 1, kernel_size) * kernel_size**-0.5)

    def layout(self, x: Tensor, grid: Grid | None, prefix: int, mask: Tensor | None) -> Canvas:
        """In a line, prefix and all."""
        return Canvas.line(x, None, 0, real_tokens(x, grid, prefix, mask))

    def forward(self, head: Tensor, patches: Tensor, canvas: Canvas) -> Parts:
        """Convolve."""
        return head, depthwise_pair(patches, self.weight, self.bias, causal=True, **canvas.place)

    def product(self, parts: Parts, other: TokenMixing | None, others: Parts, canvas: Canvas) -> Parts:
        """Convolve and multiply in one operation."""
        assert other is None or isinstance(other, CausalConv1d)
        factors = (parts[1], self.weight, self.bias, others[1])
        more = () if other is None else (other.weight, other.bias)
        return parts[0] * others[0], depthwise_pair(*factors, *more, causal=True, **canvas.place)

    def become_identity(self) -> None:
        """Only the tap of the token itself, the last one, is 1."""
        with torch.no_grad():
            self.weight.zero_()[..., -1] = 1
        nn.init.zeros_(self.bias)

    def become_mean(self) -> None:
        """All taps are alike."""
        nn.init.constant_(self.weight, 1 / self.kernel_size)
        nn.init.zeros_(self.bias)

    def along(self, line: Tensor) -> Tensor:
        """Convolve all but the first ``kernel_size - 1`` tokens of ``(B, kernel_size - 1 + N, C)``."""
        if line.shape[1] < self.kernel_size:
            return line[:, :0]
        return F.conv1d(line.mT, self.weight, self.bias, groups=self.channels).mT

    def matrices(self, places: Sequence[int], width: int) -> Tensor:
        """Write the map out."""
        n = len(places)
        a = self.weight.new_zeros(self.channels, n, n)
        for i in range(n):
            for j in range(max(0, i - self.kernel_size + 1), i + 1):
                a[:, i, j] = self.weight[:, 0, j - i + self.kernel_size - 1]
        return a


class DenseTokens(TokenMixing):
    """A full matrix over `tokens` tokens, prefix included, the same for all channels: for one fixed grid."""

    def __init__(self, channels: int, *, kernel_size: int, tokens: int | None, mix_prefix: bool) -> None:
        super().__init__(channels, kernel_size=kernel_size, tokens=tokens, mix_prefix=mix_prefix)
        if tokens is None:
            raise OptionError("token_mixing='dense' has weights for each token: say tokens=, prefix tokens included")
        check_int("tokens", tokens, minimum=1)
        self.bias = nn.Parameter(torch.zeros(channels))
        self.weight = nn.Parameter(torch.randn(tokens, tokens) * tokens**-0.5)

    def layout(self, x: Tensor, grid: Grid | None, prefix: int, mask: Tensor | None) -> Canvas:
        """As the tokens come."""
        return fixed(x, grid, prefix, mask, self.tokens)

    def forward(self, head: Tensor, patches: Tensor, canvas: Canvas) -> Parts:
        """Multiply."""
        return head, self.weight @ hide(patches, canvas.patch_mask) + self.bias

    def become_identity(self) -> None:
        """The matrix is the identity."""
        nn.init.eye_(self.weight)
        nn.init.zeros_(self.bias)

    def become_mean(self) -> None:
        """All entries are alike."""
        nn.init.constant_(self.weight, 1 / len(self.weight))
        nn.init.zeros_(self.bias)

    def matrices(self, places: Sequence[int], width: int) -> Tensor:
        """Write the map out."""
        kept = torch.tensor(places, device=self.weight.device)
        return self.weight[kept][:, kept].expand(self.channels, -1, -1)


class NoTokenMixing(TokenMixing):
    """The identity."""

    any_order = True

    def layout(self, x: Tensor, grid: Grid | None, prefix: int, mask: Tensor | None) -> Canvas:
        """As the tokens come."""
        return Canvas.line(x, None, 0, real_tokens(x, grid, prefix, mask))

    def forward(self, head: Tensor, patches: Tensor, canvas: Canvas) -> Parts:
        """Give them back."""
        return head, patches

    def become_identity(self) -> None:
        """It is."""

    def become_mean(self) -> None:
        """No other token reaches one."""

    def matrices(self, places: Sequence[int], width: int) -> Tensor:
        """Write the map out."""
        return torch.eye(len(places)).expand(self.channels, -1, -1)


TOKEN_MIXINGS: dict[str, type[TokenMixing]] = {
    "conv2d": DepthwiseConv2d,
    "conv1d": DepthwiseConv1d,
    "causal_conv1d": CausalConv1d,
    "dense": DenseTokens,
    "identity": NoTokenMixing,
}


def token_sum(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum ``(B, 1, C)`` and number ``(B, 1, 1)`` of the real tokens of each image, wide enough for half precision."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    count = x.new_full((1, 1, 1), x.shape[1], dtype=wide) if mask is None else mask.sum(1, keepdim=True).to(wide)
    return x.sum(1, keepdim=True, dtype=wide), count
