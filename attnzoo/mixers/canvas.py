"""Tokens on a grid or in a line: every image of a batch laid on one canvas, and back.

Mixers work on a `Canvas`; whether images had one grid, grids of their own, or padding that a mask marks, is settled
here once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.checks import Grid, check_grid, check_prefix
from attnzoo.errors import ShapeError


@dataclass(frozen=True)
class Canvas:
    """Where the tokens of a batch lie.

    Attributes
    ----------
    height, width
        Size of the canvas, in tokens.
    prefix
        Number of tokens before the grid.
    tokens
        Number of tokens N of the sequence, prefix included.
    patch_mask, prefix_mask
        ``(B, height * width, 1)`` and ``(B, prefix, 1)``, True where a token is real; None where all are.
    slots
        ``(B, N - prefix, 1)``: the place on the canvas of each token; None where the order is the canvas's own.
    """

    height: int
    width: int
    prefix: int
    tokens: int
    patch_mask: Tensor | None = None
    prefix_mask: Tensor | None = None
    slots: Tensor | None = None

    @classmethod
    def of(cls, x: Tensor, grid: Grid | None, prefix: int, mask: Tensor | None) -> Canvas:
        """Lay out `x` ``(B, N, C)``.

        Raises
        ------
        ShapeError
            If grid, prefix and x do not fit together.
        """
        batch, tokens = x.shape[:2]
        check_grid(grid, tokens, batch, prefix)
        prefix_mask = None if mask is None or not prefix else mask[:, :prefix, None]
        patch_mask = None if mask is None else mask[:, prefix:, None]
        if not isinstance(grid, Tensor):
            assert grid is not None
            return cls(grid[0], grid[1], prefix, tokens, patch_mask, prefix_mask)
        real, slots, height, width = _own_grids(grid.to(x.device), tokens - prefix)
        real = real if patch_mask is None else real & patch_mask
        # padding is thrown to one slot past the end of the canvas, which nothing reads
        slots = torch.where(real, slots, height * width)
        on_canvas = torch.zeros(batch, height * width + 1, 1, dtype=torch.bool, device=x.device)
        on_canvas = on_canvas.scatter(1, slots, torch.ones_like(real))[:, :-1]
        return cls(height, width, prefix, tokens, on_canvas, prefix_mask, slots)

    @classmethod
    def line(cls, x: Tensor, grid: Grid | None, prefix: int, mask: Tensor | None) -> Canvas:
        """Lay out `x` ``(B, N, C)`` as a line: the real tokens after the prefix, one after the other, without gaps.

        A grid need not be given; one that is must fit.

        Raises
        ------
        ShapeError
            If grid, prefix and x do not fit together.
        """
        real = real_tokens(x, grid, prefix, mask)
        patches = x.shape[1] - prefix
        if real is None:
            return cls(1, patches, prefix, x.shape[1])
        head, real = real[:, :prefix], real[:, prefix:]
        slots = torch.where(real, real.cumsum(1) - 1, patches)  # padding as in `of`
        on_line = torch.arange(patches, device=x.device) < real.sum(1, keepdim=True)
        prefix_mask = head.unsqueeze(-1) if prefix else None
        return cls(1, patches, prefix, x.shape[1], on_line.unsqueeze(-1), prefix_mask, slots.unsqueeze(-1))

    @property
    def place(self) -> dict[str, Any]:
        """Where patches lie, as `depthwise_pair` wants it: the grid, and a mask ``(B, height * width)`` or None."""
        mask = None if self.patch_mask is None else self.patch_mask.squeeze(-1)
        return {"grid": (self.height, self.width), "mask": mask}

    def lay(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split ``(B, N, C)`` into prefix ``(B, prefix, C)`` and patches ``(B, height * width, C)``; padding is 0."""
        head, patches = x[:, : self.prefix], x[:, self.prefix :]
        if self.slots is not None:
            canvas = x.new_zeros(x.shape[0], self.height * self.width + 1, x.shape[2])
            patches = canvas.scatter(1, self.slots.expand_as(patches), patches)[:, :-1]
        return hide(head, self.prefix_mask), hide(patches, self.patch_mask)

    def take(self, head: Tensor, patches: Tensor) -> Tensor:
        """Undo `lay`: back to ``(B, N, C)``, with zeros instead of padding."""
        head, patches = hide(head, self.prefix_mask), hide(patches, self.patch_mask)
        if self.slots is not None:
            nothing = patches.new_zeros(patches.shape[0], 1, patches.shape[2])
            patches = torch.cat([patches, nothing], dim=1)
            patches = patches.gather(1, self.slots.expand(-1, -1, patches.shape[2]))
        return torch.cat([head, patches], dim=1) if self.prefix else patches


def real_tokens(x: Tensor, grid: Grid | None, prefix: int, mask: Tensor | None) -> Tensor | None:
    """Which tokens of `x` ``(B, N, C)`` are real, ``(B, N)``; None if all are. A grid need not be given.

    Raises
    ------
    ShapeError
        If grid, prefix and x do not fit together.
    """
    batch, tokens = x.shape[:2]
    check_prefix(prefix, tokens)
    if grid is not None:
        check_grid(grid, tokens, batch, prefix)
    if not isinstance(grid, Tensor):
        return mask
    real = torch.arange(tokens, device=x.device) < prefix + grid.to(x.device).prod(1, keepdim=True)
    return real if mask is None else real & mask


def fixed(x: Tensor, grid: Grid | None, prefix: int, mask: Tensor | None, tokens: int | None) -> Canvas:
    """Lay ``(B, N, C)`` out as it comes, prefix and all, for weights that belong to each of `tokens` tokens.

    Raises
    ------
    ShapeError
        If there is another number of tokens, or each image has a grid of its own.
    """
    if isinstance(grid, Tensor):
        raise ShapeError("weights that belong to each token are for one fixed grid (h, w), not for a grid an image")
    mask = real_tokens(x, grid, prefix, mask)
    if x.shape[1] != tokens:
        raise ShapeError(f"this module has weights for {tokens} tokens, prefix included, and cannot take {x.shape[1]}")
    return Canvas(1, x.shape[1], 0, x.shape[1], None if mask is None else mask.unsqueeze(-1))


def hide(x: Tensor, mask: Tensor | None) -> Tensor:
    """Put zeros where `mask` is False, whatever stood there (NaN included)."""
    return x if mask is None else torch.where(mask, x, 0.0)


def _own_grids(grid: Tensor, patches: int) -> tuple[Tensor, Tensor, int, int]:
    """Which of the `patches` tokens of each image are real, and their slots on a canvas that holds every grid."""
    height, width = (int(n) for n in grid.amax(0))
    rows, columns = grid[:, :1], grid[:, 1:]
    index = torch.arange(patches, device=grid.device).expand(len(grid), -1)
    real = index < rows * columns
    slots = index // columns * width + index % columns
    return real.unsqueeze(-1), slots.unsqueeze(-1), height, width
