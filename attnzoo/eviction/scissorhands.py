"""Scissorhands: entries that mattered keep mattering; count how often each got more than its share of attention.

Paper: Liu et al., Scissorhands, https://arxiv.org/abs/2305.17118

    s_j = number of the last `window` queries i with A_ij > 1 / t_i      (t_i: entries that query i sees)

Differs from the paper: evicts after each block down to a fixed budget (the authors' code drops what was never counted);
the attention of the window is that over the entries still there. ``importance="mean"`` is the form that VATP's authors
compare with, the mean of A_ij over the window (theirs is 400 queries). Query heads that share a key/value head are
averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnzoo.checks import check_choice, check_int
from attnzoo.eviction.policy import AttentionPolicy, CacheView

AS_PUBLISHED = {"schedule": "prompt"}


@dataclass(frozen=True, kw_only=True)
class Scissorhands(AttentionPolicy):
    """Persistence of importance.

    Parameters
    ----------
    window
        Number of last queries that are asked.
    importance
        ``count`` of queries with more than an equal share, or ``mean`` of the attention.
    """

    window: int = 100
    importance: str = "count"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("window", self.window, minimum=1)
        check_choice("importance", self.importance, ("count", "mean"))

    @property
    def queries_kept(self) -> int:
        """The window."""
        return self.window

    @property
    def sums_window(self) -> bool:
        """For means; counts need each weight."""
        return self.importance == "mean"

    def default_recent(self, sink: int) -> int:
        """As in the authors' script."""
        return 10

    def attention_scores(self, view: CacheView) -> Tensor:
        """Counts or means over the window's queries."""
        if self.importance == "mean":
            return view.attention_of_window() / self.window
        weights = view.window_attention()
        assert view.query_positions is not None
        groups = weights.shape[1] // view.kv_heads
        seen = (view.positions[:, :, None, :] <= view.query_positions[:, None, :, None]).sum(-1, keepdim=True)
        share = 1.0 / seen.clamp(min=1).to(weights.dtype)
        return (weights > share.repeat_interleave(groups, 1)).to(weights.dtype).sum(2)
