"""LagKV: an entry matters if its key and value stand out from those of the tokens that come after it.

Paper: Liang et al., LagKV: Lag-Relative Information of the KV Cache Tells Which Tokens Are Important,
https://arxiv.org/abs/2504.04704

    x_j  = (k_j - min of the next part) / (max - min of the next part), channel by channel
    s_j  = rank within its part of  softmax(std over channels of x)_j, of keys plus that of values

The entries behind the sink are cut into parts of `lag`, and each part is compared with the next one. The last whole
part, which has none to be compared with, and what is left behind it stay as long as the budget lets them. No attention
is looked at, so any fast attention will do.

Differs from the paper: it takes a share of each part once and leaves what was kept alone, so that its cache grows with
the text; here what was kept is cut into parts again at each eviction, and of entries of equal rank the later stays. The
parts are a third of a small budget, for with parts of 128 it would keep nothing but recent entries. A channel that is
the same throughout the next part is divided by the smallest step of the number format, not by 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.checks import check_int
from attnzoo.eviction.policy import CacheView, Policy, wide

LAG, LAG_SHARE = 128, 3  # the paper's; one part in so many of the budget
AS_PUBLISHED = {"sink": 16, "lag": 128, "schedule": "prompt"}


@dataclass(frozen=True, kw_only=True)
class LagKV(Policy):
    """Spread of keys and values relative to those of the next tokens.

    Parameters
    ----------
    lag
        Entries of a part, at least 2. None is 128, but at most a third of the budget.
    """

    lag: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lag is not None:
            check_int("lag", self.lag, minimum=2)

    @property
    def part(self) -> int:
        """Entries of a part, where the budget is a number of entries."""
        return max(2, min(LAG, int(self.budget) // LAG_SHARE)) if self.lag is None else self.lag

    def default_sink(self) -> int:
        """As in kvpress; the authors' code has 16."""
        return 4

    def default_recent(self, sink: int) -> int:
        """The last part."""
        return self.part

    def score(self, view: CacheView) -> Tensor:
        """Rank of each entry in its part, from 0 to 1; 1 for sinks and what has no part after it."""
        sink, _ = self.protected
        compared = max((view.keys.shape[2] - sink) // self.part - 1, 0)  # parts that have one after them
        keys, values = wide(view.keys), wide(view.values)
        scores = keys.new_ones(view.positions.shape)
        if compared:
            parts = slice(sink, sink + (compared + 1) * self.part)
            spread = _spread(keys[:, :, parts], self.part) + _spread(values[:, :, parts], self.part)
            order = spread.argsort(dim=-1, stable=True)  # (B, Hkv, compared, part), of equal ones the later higher
            scores[:, :, sink : sink + compared * self.part] = (order.argsort(-1) / self.part).to(scores).flatten(2)
        return scores


def _spread(states: Tensor, part: int) -> Tensor:
    """How far entries ``(B, Hkv, parts * part, D)`` stand out from the next part, ``(B, Hkv, parts - 1, part)``."""
    states = states.unflatten(2, (-1, part))
    reference = states[:, :, 1:]
    low, high = reference.amin(3, keepdim=True), reference.amax(3, keepdim=True)  # (B, Hkv, parts - 1, 1, D)
    relative = (states[:, :, :-1] - low) / (high - low).clamp_min(torch.finfo(states.dtype).eps)
    return relative.std(-1).softmax(-1)
