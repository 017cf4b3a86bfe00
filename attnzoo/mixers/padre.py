"""PADRe: polynomial attention as a drop-in replacement of softmax attention.

Paper: Letourneau et al., PADRe, ICLR 2025, https://arxiv.org/abs/2407.11306

    Y_i = A_i X B_i,   Z_1 = Y_1,   Z_{i+1} = (C_i Z_i D_i) * Y_{i+1},   O = Z_d     (* elementwise, i = 1..d)

B_i, D_i mix channels (pointwise); A_i, C_i mix tokens (11 x 11 depthwise convolution). Linear in the number of
tokens; each output is a polynomial of degree d in the input. The residual connection round the layer is the term of
degree 1.

Differs from the paper: the paper does not say whether its convolutions are depthwise (here they are), whether terms
below Z_d are added (here they are not: with a bias in every convolution Z_d holds all lower degrees already), nor how
it starts the weights (here, in the interior of a grid larger than the kernel, each Y_i has about the variance of its
input; at the edges, where zeros are convolved, less), nor what becomes of a class token. Here prefix tokens take part
in A_i and C_i linearly, so the degree stays exact: each receives the mean of all tokens, and every patch the mean of
the prefix, with a learned weight a channel. Pointwise comes before depthwise, and padding is zero before each
convolution.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.checks import Grid, check_bool, check_int, check_tokens
from attnzoo.errors import OptionError, ShapeError
from attnzoo.mixers.canvas import Canvas, hide


class Padre(nn.Module):
    """PADRe for images: pointwise, then depthwise convolutions, multiplied elementwise.

    Parameters
    ----------
    dim
        Width C of a token.
    num_heads
        Taken because every attention is built with it, and not used: the paper found no gain from several heads.
    degree
        Degree d of the polynomial, 1 and up. 1 is a plain convolution.
    kernel_size
        Side of the depthwise kernels, in tokens; odd.
    mix_prefix
        Have weights for class and register tokens. Say False where a model has no such tokens: the weights would get
        no gradient, which distributed training complains of. `replace_attention` sees to it by itself.

    Raises
    ------
    OptionError
        For a value that an option cannot take.
    """

    def __init__(
        self, dim: int, num_heads: int = 1, *, degree: int = 3, kernel_size: int = 11, mix_prefix: bool = True
    ) -> None:
        super().__init__()
        self.dim = check_int("dim", dim, minimum=1)
        self.degree = check_int("degree", degree, minimum=1)
        self.mix_prefix = check_bool("mix_prefix", mix_prefix)
        if check_int("kernel_size", kernel_size, minimum=1) % 2 == 0:
            raise OptionError(f"kernel_size must be odd, so that a kernel has a middle, not {kernel_size}")
        # all Y_i come from X, so their pointwise maps are one matrix and their convolutions one convolution
        self.y_channels = nn.Linear(dim, degree * dim)
        self.y_tokens = TokenMixing(degree * dim, kernel_size, mix_prefix)
        self.z_channels = nn.ModuleList(nn.Linear(dim, dim) for _ in range(degree - 1))
        self.z_tokens = nn.ModuleList(TokenMixing(dim, kernel_size, mix_prefix) for _ in range(degree - 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start channel mixing with variance 1 / C and biases at zero; `TokenMixing` starts itself."""
        for linear in (self.y_channels, *self.z_channels):
            nn.init.trunc_normal_(linear.weight, std=self.dim**-0.5)
            nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor, grid: Grid | None = None, prefix: int = 0, mask: Tensor | None = None) -> Tensor:
        """Mix tokens ``(B, N, C)``; see `attnzoo.mixers` for grid, prefix and mask.

        Raises
        ------
        ShapeError
            If x, grid, prefix and mask do not fit together.
        """
        check_tokens(x, self.dim, mask)
        self._check_prefix(prefix)
        canvas = Canvas.of(x, grid, prefix, mask)
        head, patches = canvas.lay(x)
        y_head, y_patches = self.y_tokens(self.y_channels(head), self.y_channels(patches), canvas)
        y = list(zip(y_head.chunk(self.degree, dim=-1), y_patches.chunk(self.degree, dim=-1), strict=True))
        z_head, z_patches = y[0]
        for channels, tokens, (y_head, y_patches) in zip(self.z_channels, self.z_tokens, y[1:], strict=True):
            z_head, z_patches = tokens(channels(z_head), channels(z_patches), canvas)
            z_head, z_patches = z_head * y_head, z_patches * y_patches
        return canvas.take(z_head, z_patches)

    def reference(self, x: Tensor, grid: Grid | None = None, prefix: int = 0, mask: Tensor | None = None) -> Tensor:
        """Compute the same by the paper's equation, with every A_i and C_i as a dense matrix, image by image. Slow."""
        check_tokens(x, self.dim, mask)
        self._check_prefix(prefix)
        check_canvas = Canvas.of(x, grid, prefix, mask)
        out = torch.zeros_like(x)
        for b, tokens in enumerate(x):
            size = grid[b].tolist() if isinstance(grid, Tensor) else (check_canvas.height, check_canvas.width)
            real = torch.zeros(len(tokens), dtype=torch.bool, device=x.device)
            real[: prefix + size[0] * size[1]] = True
            if mask is not None:
                real &= mask[b]
            kept = real.nonzero().squeeze(1)
            out[b, kept] = self._reference_one(tokens[kept], [int(k) - prefix for k in kept], int(size[1]))
        return out

    def _reference_one(self, x: Tensor, places: list[int], width: int) -> Tensor:
        """One image: `x` holds its real tokens, `places` their index on the grid (negative: a prefix token)."""
        b = self.y_channels
        weights, biases = b.weight.chunk(self.degree), b.bias.chunk(self.degree)
        a = self.y_tokens.matrices(places, width).chunk(self.degree)
        a_bias = self.y_tokens.bias.chunk(self.degree)
        y = [torch.einsum("cnm,mc->nc", a[i], x @ weights[i].T + biases[i]) + a_bias[i] for i in range(self.degree)]
        z = y[0]
        for i in range(self.degree - 1):
            d, c = cast(nn.Linear, self.z_channels[i]), cast(TokenMixing, self.z_tokens[i])
            z = torch.einsum("cnm,mc->nc", c.matrices(places, width), z @ d.weight.T + d.bias) + c.bias
            z = z * y[i + 1]
        return z

    def _check_prefix(self, prefix: int) -> None:
        if prefix and not self.mix_prefix:
            raise ShapeError(f"this padre was built with mix_prefix=False and cannot take {prefix} prefix tokens")

    def extra_repr(self) -> str:
        """Name the options."""
        return f"dim={self.dim}, degree={self.degree}, kernel_size={self.y_tokens.kernel_size}"


class TokenMixing(nn.Module):
    """A_i and C_i: a linear map over tokens, one a channel.

    Patches: depthwise convolution over the grid, plus ``to_patches`` times the mean of the prefix. Prefix: ``own``
    times the token itself, plus ``to_prefix`` times the mean of all tokens. Both: plus a bias.

    Parameters
    ----------
    channels
        Number of channels, each with a kernel of its own.
    kernel_size
        Side of the kernel, odd.
    mix_prefix
        Have weights for prefix tokens.
    """

    def __init__(self, channels: int, kernel_size: int, mix_prefix: bool) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, kernel_size))
        self.bias = nn.Parameter(torch.empty(channels))
        if mix_prefix:
            self.own = nn.Parameter(torch.empty(channels))
            self.to_prefix = nn.Parameter(torch.empty(channels))
            self.to_patches = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start every tap of a kernel with variance ``1 / kernel_size ** 2``, biases at zero.

        A patch takes the mean of the prefix as one tap more; were it as strong as the whole kernel, a lone class token
        would drown the patches, the more the higher the degree.
        """
        nn.init.normal_(self.weight, std=1 / self.kernel_size)
        nn.init.zeros_(self.bias)
        if hasattr(self, "own"):
            nn.init.ones_(self.own)
            nn.init.ones_(self.to_prefix)
            nn.init.constant_(self.to_patches, 1 / self.kernel_size)

    def forward(self, head: Tensor, patches: Tensor, canvas: Canvas) -> tuple[Tensor, Tensor]:
        """Mix prefix ``(B, P, C)`` and patches ``(B, height * width, C)``."""
        head, patches = hide(head, canvas.prefix_mask), hide(patches, canvas.patch_mask)
        image = patches.unflatten(1, (canvas.height, canvas.width)).permute(0, 3, 1, 2)  # channels-last in memory
        image = F.conv2d(image, self.weight, self.bias, padding=self.kernel_size // 2, groups=image.shape[1])
        mixed = image.permute(0, 2, 3, 1).flatten(1, 2)
        if not canvas.prefix:
            return head, mixed
        head_sum, head_count = _sum(head, canvas.prefix_mask)
        patch_sum, patch_count = _sum(patches, canvas.patch_mask)
        head_mean = (head_sum / head_count.clamp(min=1)).to(mixed.dtype)
        mean = ((head_sum + patch_sum) / (head_count + patch_count).clamp(min=1)).to(mixed.dtype)
        return self.own * head + self.to_prefix * mean + self.bias, mixed + self.to_patches * head_mean

    def matrices(self, places: list[int], width: int) -> Tensor:
        """Write the map out (without bias) as dense matrices ``(channels, n, n)``: for the reference only."""
        n, half = len(places), self.kernel_size // 2
        prefix = [i for i, p in enumerate(places) if p < 0]
        a = self.weight.new_zeros(len(self.weight), n, n)
        for i, to in enumerate(places):
            for j, source in enumerate(places):
                if to < 0:
                    a[:, i, j] = self.to_prefix / n + (self.own if i == j else 0)
                elif source < 0:
                    a[:, i, j] = self.to_patches / len(prefix)
                else:
                    row, column = source // width - to // width + half, source % width - to % width + half
                    if 0 <= row < self.kernel_size and 0 <= column < self.kernel_size:
                        a[:, i, j] = self.weight[:, 0, row, column]
        return a


def _sum(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Sum ``(B, 1, C)`` and number ``(B, 1, 1)`` of the real tokens of each image, wide enough for half precision."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    count = x.new_full((1, 1, 1), x.shape[1], dtype=wide) if mask is None else mask.sum(1, keepdim=True).to(wide)
    return x.sum(1, keepdim=True, dtype=wide), count
