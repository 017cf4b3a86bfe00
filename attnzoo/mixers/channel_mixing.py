"""Channel mixing: the linear maps over channels that B and D of a polynomial can be.

Each maps ``(B, N, C)`` to ``(B, N, copies * C)``: all maps of one input are one module, so that they can be computed at
once. They start with the variance of the output that of the input, and biases at zero.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn

from attnzoo.errors import OptionError

CHANNEL_MIXINGS = ("dense", "grouped", "identity")


def make_channel_mixing(kind: str, dim: int, copies: int, groups: int) -> nn.Module:
    """Make the map of a kind: ``dense``, ``grouped`` (block-diagonal, `groups` blocks) or ``identity``.

    Raises
    ------
    OptionError
        If `groups` does not divide `dim`.
    """
    if kind == "grouped":
        return GroupedLinear(dim, copies, groups)
    return Copies(copies) if kind == "identity" else dense(dim, copies * dim)


def dense(inputs: int, outputs: int, bias: bool = True) -> nn.Linear:
    """A linear map that starts with variance ``1 / inputs``."""
    linear = nn.Linear(inputs, outputs, bias=bias)
    nn.init.trunc_normal_(linear.weight, std=inputs**-0.5)
    if bias:
        nn.init.zeros_(linear.bias)
    return linear


def become_identity(mixing: nn.Module) -> None:
    """Set the weights of a map of one copy so that channels stay as they are."""
    if isinstance(mixing, Copies):
        return
    assert isinstance(mixing, nn.Linear | GroupedLinear)
    with torch.no_grad():
        mixing.weight.copy_(torch.eye(mixing.weight.shape[-1]).expand_as(mixing.weight))
        mixing.bias.zero_()


def as_matrix(mixing: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """Write a map of tokens `like` ``(N, C)`` out as a matrix ``(copies * C, C)`` and a bias: for references only."""
    if isinstance(mixing, Copies):
        return torch.eye(like.shape[1]).to(like).repeat(mixing.copies, 1), like.new_zeros(mixing.copies * like.shape[1])
    assert isinstance(mixing, nn.Linear | GroupedLinear)
    if isinstance(mixing, nn.Linear):
        return mixing.weight, mixing.bias
    return torch.cat([torch.block_diag(*blocks) for blocks in mixing.weight]), mixing.bias


class GroupedLinear(nn.Module):
    """A block-diagonal matrix: each group of channels is mixed within itself.

    Parameters
    ----------
    dim
        Number of channels C.
    copies
        Number of maps.
    groups
        Number of blocks of each, a divisor of `dim`.
    """

    def __init__(self, dim: int, copies: int, groups: int) -> None:
        super().__init__()
        if dim % groups:
            raise OptionError(f"channel_mixing='grouped': {groups} groups (num_heads) do not divide {dim} channels")
        width = dim // groups
        self.weight = nn.Parameter(torch.empty(copies, groups, width, width))  # (copy, group, out, in)
        self.bias = nn.Parameter(torch.zeros(copies * dim))
        nn.init.trunc_normal_(self.weight, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, N, C)`` to ``(B, N, copies * C)``."""
        grouped = rearrange(x, "b n (g i) -> b n g i", g=self.weight.shape[1])
        out = torch.einsum("bngi,kgoi->bnkgo", grouped, self.weight)
        return rearrange(out, "b n k g o -> b n (k g o)") + self.bias


class Copies(nn.Module):
    """The identity, `copies` times."""

    def __init__(self, copies: int) -> None:
        super().__init__()
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        """Repeat the channels of ``(B, N, C)``."""
        return x.repeat(1, 1, self.copies)
