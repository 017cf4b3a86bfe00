"""Blocks of set attention over sparse voxels, in plain PyTorch: what configs/bench/voxels.yaml swaps and measures.

Source: DSVT, https://arxiv.org/abs/2301.06051, sections 3.1 and 3.2. Voxels of a bird's-eye view are put into windows,
and those of a window into sets of equal size, along x in one layer and along y in the next. Attention is within a set,
its position added to queries and keys alone.

Differs from the source: windows are not shifted between blocks, nothing is added and normalized round a block, and
positions are coordinates within the window, mapped by one MLP for all layers.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn

WIDTH, HEADS, BLOCKS = 128, 8, 2
WINDOW, SET = 12, 36  # sides of a window, and voxels of a set, as DSVT has them for pillars
FILLED = 4  # one of so many cells has a voxel: a set in most windows


def sets_of(places: Tensor, axis: int, window: int = WINDOW, size: int = SET) -> tuple[Tensor, Tensor]:
    """Share voxels at `places` ``(V, 2)`` out to sets: their numbers ``(S, size)``, and which of them are repeats.

    A window of n voxels has ceil(n / size) sets; where they do not come out even, voxels are repeated. In a window
    voxels are in the order of `axis`, then of the other one.
    """
    cells = places.div(window, rounding_mode="floor")  # (V, 2)
    width = int(places.max()) + 1
    number = cells[:, 0] * width + cells[:, 1]  # of the window, (V,)
    within = places[:, axis] * width + places[:, 1 - axis]
    order = (number * width**2 + within).argsort()  # (V,)
    counts = number[order].unique_consecutive(return_counts=True)[1]  # voxels of each window, (W,)
    sets = (counts + size - 1).div(size, rounding_mode="floor")  # of each window, (W,)
    window_of = torch.arange(len(counts), device=places.device).repeat_interleave(sets)  # (S,)
    first = torch.arange(len(window_of), device=places.device) - (sets.cumsum(0) - sets)[window_of]
    slots = first[:, None] * size + torch.arange(size, device=places.device)  # of the window's, (S, size)
    chosen = (slots * counts[window_of, None]).div(sets[window_of, None] * size, rounding_mode="floor")
    found = order[chosen + (counts.cumsum(0) - counts)[window_of, None]]
    repeats = torch.zeros_like(found, dtype=torch.bool)
    repeats[:, 1:] = chosen[:, 1:] == chosen[:, :-1]
    return found, repeats


class SetLayer(nn.Module):
    """Attention within sets, and an MLP; normalized after each sum."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, position: Tensor, sets: Tensor, repeats: Tensor) -> Tensor:
        """Mix voxels ``(V, C)``; see `sets_of`."""
        value = x[sets]  # (S, size, C)
        key = value + position[sets]
        out = self.attention(key, key, value, key_padding_mask=repeats, need_weights=False)[0]
        real = ~repeats
        mixed = torch.zeros_like(x).index_put((sets[real],), out[real])
        x = self.norm1(x + mixed)
        return self.norm2(x + self.mlp(x))


class SetBlocks(nn.Module):
    """Blocks of two layers, whose sets lie along x and along y."""

    def __init__(self, width: int = WIDTH, heads: int = HEADS, blocks: int = BLOCKS) -> None:
        super().__init__()
        self.position = nn.Sequential(nn.Linear(2, width), nn.ReLU(), nn.Linear(width, width))
        self.layers = nn.ModuleList(SetLayer(width, heads) for _ in range(2 * blocks))

    def forward(self, x: Tensor, places: Tensor) -> Tensor:
        """Features ``(V, C)`` of voxels at `places` ``(V, 2)``."""
        position = self.position((places % WINDOW).to(x.dtype) / WINDOW - 0.5)
        ways = [sets_of(places, axis) for axis in (0, 1)]
        for number, layer in enumerate(self.layers):
            x = layer(x, position, *ways[number % 2])
        return x


def example(voxels: int) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """Give the blocks, and that many voxels at places drawn from a square field, without repetition."""
    side = math.isqrt(FILLED * voxels)
    cells = torch.randperm(side**2)[:voxels]
    places = torch.stack([cells.div(side, rounding_mode="floor"), cells % side], 1)
    return SetBlocks(), (torch.randn(voxels, WIDTH), places)


at_1000, at_10000, at_30000, at_100000 = (partial(example, voxels) for voxels in (1_000, 10_000, 30_000, 100_000))
