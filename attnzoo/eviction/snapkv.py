"""SnapKV: the attention of an observation window, pooled over neighbors so that what is kept comes in runs.

Paper: Li et al., SnapKV, https://arxiv.org/abs/2404.14469

    s_j = pool_k( sum over the last `window` queries i of A_ij )   for j before the window; the window itself is kept

Differs from the paper: evicts after each block, in decoding too (the paper once, after the prompt), so neighbors in
the pooling are neighbors in the cache, not always in the text; the window's attention is that over the entries still
there; query heads that share a key/value head are averaged (the paper repeats the keys). `window`, `kernel` and
`pooling` default to those of the paper's runs.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from attnzoo.checks import check_choice, check_int, check_odd
from attnzoo.eviction.policy import AttentionPolicy, CacheView

AS_PUBLISHED = {"schedule": "prompt"}


@dataclass(frozen=True, kw_only=True)
class SnapKV(AttentionPolicy):
    """Pooled attention of the last queries.

    Parameters
    ----------
    window
        Number of last queries that are asked; as many recent entries are kept by default.
    kernel
        Width of the pooling, odd.
    pooling
        ``max`` or ``avg``.
    """

    window: int = 32
    kernel: int = 7
    pooling: str = "max"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("window", self.window, minimum=1)
        check_odd("kernel", self.kernel)
        check_choice("pooling", self.pooling, ("max", "avg"))

    @property
    def queries_kept(self) -> int:
        """The window."""
        return self.window

    def default_recent(self, sink: int) -> int:
        """The window."""
        return self.window

    def attention_scores(self, view: CacheView) -> Tensor:
        """Sums over the window's queries, pooled before the window and plain inside it."""
        sums = view.attention_of_window()
        groups = sums.shape[1] // view.kv_heads
        before = view.before(self.window)
        before = before.repeat_interleave(groups, 1)
        earlier = sums.masked_fill(~before, 0.0)
        pool = F.max_pool1d if self.pooling == "max" else F.avg_pool1d
        pooled = pool(earlier, self.kernel, stride=1, padding=self.kernel // 2)
        return pooled.where(before, sums)
