"""H2O: heavy hitters, the entries that got most attention so far, and recent ones.

Paper: Zhang et al., H2O: Heavy-Hitter Oracle, https://arxiv.org/abs/2306.14048

    s_j = sum over all queries i since j came of A_ij

Differs from the paper: evicts after each block of `block_size` tokens, in the prompt too (the authors' code evicts once
after the prompt and then at each step); recent entries have half the budget by default, as in the authors' code, where
both shares are equal; query heads that share a key/value head are averaged (the paper has none).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnzoo.eviction.policy import AttentionPolicy, CacheView


@dataclass(frozen=True, kw_only=True)
class H2O(AttentionPolicy):
    """Accumulated attention."""

    @property
    def accumulates(self) -> bool:
        """The sums."""
        return True

    def default_recent(self, sink: int) -> int:
        """Half the budget."""
        return self.budget // 2

    def attention_scores(self, view: CacheView) -> Tensor:
        """The accumulated sums."""
        assert view.sums is not None
        return view.sums
