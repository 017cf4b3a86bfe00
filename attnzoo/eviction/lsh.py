"""HashEvict: locality-sensitive hashing tells which keys are unlike the last query, without computing attention.

Paper: Liu et al., HashEvict: A Pre-Attention KV Cache Eviction Strategy using Locality-sensitive Hashing,
https://arxiv.org/abs/2412.16187

    code(x) = signs of `bits` Gaussian projections of x
    s_j     = -(number of bits in which code(k_j) and code(q_n) differ), with n the last query

Differs from the paper, of which only the abstract and notes on it could be read: it evicts at every decoding step,
before attention; here after each block of `block_size` tokens (``schedule="step"`` is nearest to it). Query heads that
share a key/value head are averaged. Each layer and key/value head has projections of its own, drawn by `seed`. Codes
are made anew at an eviction instead of being kept. Few bits make many equal scores: of these the later entry stays.
By default the first 4 entries and half the budget of recent ones stay, without which it loses several times as much;
whether the paper protects any is not known.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.checks import check_int
from attnzoo.eviction.noise import normal
from attnzoo.eviction.policy import CacheView, Policy, by_group, wide

AS_PUBLISHED = {"schedule": "step"}


@dataclass(frozen=True, kw_only=True)
class Lsh(Policy):
    """Hamming distance to the last query.

    Parameters
    ----------
    bits
        Length of the codes.
    seed
        Another seed draws other projections.
    """

    bits: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("bits", self.bits, minimum=1)
        check_int("seed", self.seed, minimum=0)

    @property
    def queries_kept(self) -> int:
        """The last one."""
        return 1

    @property
    def sums_window(self) -> bool:
        """The query itself is needed, not its attention."""
        return False

    def default_sink(self) -> int:
        """As of `streaming`."""
        return 4

    def default_recent(self, sink: int) -> int:
        """Half the budget."""
        return int(self.budget) // 2

    def score(self, view: CacheView) -> Tensor:
        """Minus the Hamming distance."""
        assert view.queries is not None
        keys = wide(view.keys)
        queries = by_group(view.queries[:, :, -1].to(keys), view.kv_heads)  # (B, Hkv, G, D)
        planes = self.projections(view).to(keys)
        ours, theirs = _signs(queries @ planes), _signs(keys @ planes)  # (B, Hkv, G, bits), (B, Hkv, S, bits)
        agreeing = theirs @ ours.transpose(-2, -1)  # (B, Hkv, S, G): bits that agree less those that do not
        return (agreeing.mean(-1) - self.bits) / 2

    def projections(self, view: CacheView) -> Tensor:
        """The projections of a layer, ``(Hkv, D, bits)``, float64."""
        device = view.keys.device
        layer = torch.tensor(view.layer, device=device)
        heads = torch.arange(view.first_head, view.first_head + view.kv_heads, device=device)[:, None, None]
        channels = torch.arange(view.keys.shape[3], device=device)[:, None]
        return normal(self.seed, layer, heads, channels, torch.arange(self.bits, device=device))


def _signs(x: Tensor) -> Tensor:
    """1 where x is at least 0, else -1."""
    return 2 * (x >= 0).to(x) - 1
