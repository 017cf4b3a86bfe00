"""H2O: heavy hitters, the entries that got most attention so far, and recent ones.

Paper: Zhang et al., H2O: Heavy-Hitter Oracle, https://arxiv.org/abs/2306.14048

    s_j = sum over all queries i since j came of A_ij
    normalize: s_j / number of those queries

Differs from the paper: evicts after each block of `block_size` tokens, in the prompt too (the authors' code evicts once
after the prompt and then at each step); recent entries have half the budget by default, as in the authors' code, where
both shares are equal; query heads that share a key/value head are averaged (the paper has none). The paper's sums
favor old entries, which more queries have seen; the default divides by their number, as kvpress does;
``normalize=False`` is the paper's form.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnzoo.checks import check_bool
from attnzoo.eviction.policy import AttentionPolicy, CacheView

AS_PUBLISHED = {"normalize": False, "schedule": "prompt", "block_size": 1}


@dataclass(frozen=True, kw_only=True)
class H2O(AttentionPolicy):
    """Accumulated attention.

    Parameters
    ----------
    normalize
        Divide what an entry got by the number of queries that have seen it.
    """

    normalize: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bool("normalize", self.normalize)

    @property
    def accumulates(self) -> bool:
        """The sums."""
        return True

    def default_recent(self, sink: int) -> int:
        """Half the budget."""
        return int(self.budget) // 2

    def attention_scores(self, view: CacheView) -> Tensor:
        """The accumulated sums, or what an entry got per query."""
        assert view.sums is not None
        if not self.normalize:
            return view.sums
        seen = (view.counts[:, None, None] - view.positions).to(view.sums.dtype)  # (B, Hkv, S)
        return view.sums / seen.repeat_interleave(view.sums.shape[1] // view.kv_heads, 1)
