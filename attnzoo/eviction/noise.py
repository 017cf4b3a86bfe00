"""Random numbers that depend on nothing but a seed and what they are for: layer, head, position and the like.

They are a hash, the finalizer of SplitMix64 (Steele et al., https://doi.org/10.1145/2660193.2660195), so they are the
same on every device, in every batch and however a text is cut into calls.
"""

from __future__ import annotations

import torch
from torch import Tensor


def hashed(seed: int, *parts: Tensor) -> Tensor:
    """Hash of a seed and integers, int64 with all 64 bits used, of the shape that `parts` broadcast to."""
    key = torch.tensor(_signed(seed % 2**64), device=parts[-1].device)
    for part in parts:
        key = _mix(_mix(key) ^ part.long())
    return key


def uniform(seed: int, *parts: Tensor) -> Tensor:
    """A number evenly spread over [0, 1), float64."""
    return (hashed(seed, *parts) & (2**53 - 1)).double() / 2**53


def gumbel(seed: int, *parts: Tensor) -> Tensor:
    """A number of the standard Gumbel distribution, float64."""
    return -(-_inside(seed, *parts).log()).log()


def normal(seed: int, *parts: Tensor) -> Tensor:
    """A number of the standard normal distribution, float64."""
    return 2**0.5 * (2 * _inside(seed, *parts) - 1).erfinv()


def _inside(seed: int, *parts: Tensor) -> Tensor:
    """A number evenly spread over (0, 1): never an end, where the logarithm is infinite."""
    return ((hashed(seed, *parts) & (2**52 - 1)).double() + 0.5) / 2**52


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's step and finalizer on int64, which wraps round like the unsigned integers of the original."""
    x = x + _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shift(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31)


def _signed(constant: int) -> int:
    return constant - 2**64 if constant >= 2**63 else constant


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right without the sign."""
    return (x >> bits) & (2 ** (64 - bits) - 1)
