"""Defensive aggregation: the worst that may come of an eviction counts, not the mean.

Paper: Feng et al., Taming the Fragility of KV Cache Eviction in LLM Inference (DefensiveKV),
https://arxiv.org/abs/2510.13334; the authors' code: https://github.com/FFY0/DefensiveKV

    w_j = max over the group's heads and the last `window` queries i of P_ij      (worst seen)
    s_j = max(w_j, mean over entries j of w_j)                                    (prior risk: what was not seen yet)

P is the attention A, average-pooled over neighbors before the window and scaled back to each query's sum; the window
itself is kept. The paper's DefensiveKV scores with CriticalKV over this, which is ``criticalkv`` with
``base="defensive"``, and shares out the budget by head. By itself it ranks entries below the mean by age alone, as
their scores are equal.

Differs from the paper: evicts after each block of `block_size` tokens, in decoding too; the window's attention is that
over the entries still there.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from attnzoo.checks import check_int, check_odd
from attnzoo.eviction.policy import AttentionPolicy, CacheView, by_group, combined

AS_PUBLISHED = {"schedule": "prompt"}


@dataclass(frozen=True, kw_only=True)
class Defensive(AttentionPolicy):
    """Largest pooled attention from one of the last queries, at least the mean.

    Parameters
    ----------
    aggregate
        Over the query heads that share a key/value head: ``max``, as over the queries, ``mean`` or ``sum``.
    window
        Number of last queries that are asked; as many recent entries are kept by default.
    kernel
        Width of the pooling, odd; 1 does not pool.
    """

    aggregate: str = "max"
    window: int = 32
    kernel: int = 5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("window", self.window, minimum=1)
        check_odd("kernel", self.kernel)

    @property
    def queries_kept(self) -> int:
        """The window."""
        return self.window

    @property
    def sums_window(self) -> bool:
        """A maximum needs each weight."""
        return False

    def default_recent(self, sink: int) -> int:
        """The window."""
        return self.window

    def attention_scores(self, view: CacheView) -> Tensor:
        """The worst of each query head, at least its mean."""
        worst = self._worst(view)
        return self._with_prior(worst, view, worst.shape[1] // view.kv_heads)

    def aggregated(self, view: CacheView) -> Tensor:
        """The worst of the query heads together, at least the mean."""
        worst = combined(by_group(self._worst(view), view.kv_heads), self.aggregate, self.scope)
        return self._with_prior(worst, view, 1)

    def _worst(self, view: CacheView) -> Tensor:
        """The largest pooled attention that each entry got from one query, ``(B, H, S)``; plain inside the window."""
        attention = view.window_attention()  # (B, H, w, S)
        before = self._before(view, attention.shape[1] // view.kv_heads)[:, :, None]
        earlier = attention.masked_fill(~before, 0.0)
        pooled = F.avg_pool1d(earlier.flatten(0, 2)[:, None], self.kernel, stride=1, padding=self.kernel // 2)
        pooled = pooled[:, 0].unflatten(0, attention.shape[:3]).masked_fill(~before, 0.0)
        pooled = pooled * (earlier.sum(-1, keepdim=True) / pooled.sum(-1, keepdim=True).clamp_min(1e-30))
        return pooled.where(before, attention).amax(2)

    def _with_prior(self, worst: Tensor, view: CacheView, groups: int) -> Tensor:
        """`worst`, of entries before the window at least their mean."""
        before = self._before(view, groups)
        count = before.sum(-1, keepdim=True).clamp(min=1)
        mean = worst.masked_fill(~before, 0.0).sum(-1, keepdim=True) / count
        return worst.maximum(mean).where(before, worst)

    def _before(self, view: CacheView, groups: int) -> Tensor:
        """Which entries came before the window, ``(B, Hkv * groups, S)``."""
        return view.before(self.window).repeat_interleave(groups, 1)
