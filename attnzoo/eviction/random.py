"""Random eviction: the control that every other policy should beat.

    s_j = hash(seed, layer, head, position of j), evenly spread over [0, 1)

The hash is the finalizer of SplitMix64 (Steele et al., https://doi.org/10.1145/2660193.2660195). Since the number of an
entry never changes, what is left after any number of evictions is a fair sample of all tokens so far.

Differs from the paper: there is none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.checks import check_int
from attnzoo.eviction.policy import CacheView, Policy


@dataclass(frozen=True, kw_only=True)
class Random(Policy):
    """Scores by chance, the same for the same seed, layer, head and position.

    Parameters
    ----------
    seed
        Another seed is another sample.
    """

    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("seed", self.seed, minimum=0)

    def score(self, view: CacheView) -> Tensor:
        """A number in [0, 1) for each entry."""
        device = view.positions.device
        heads = torch.arange(view.first_head, view.first_head + view.kv_heads, device=device)[:, None]
        key = torch.tensor(_signed(self.seed % 2**64), device=device)
        for part in (torch.tensor(view.layer, device=device), heads, view.positions.long()):
            key = _mix(_mix(key) ^ part)
        return (key & (2**53 - 1)).double() / 2**53


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
