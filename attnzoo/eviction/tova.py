"""TOVA: the attention of the last query decides, averaged over all heads.

Paper: Oren et al., Transformers are Multi-State RNNs, https://arxiv.org/abs/2401.06104

    s_j = mean over heads of A_nj, with n the last query

All heads of a layer keep the same tokens, as in the authors' code; `vatp` and `caote` over it keep to that.

Differs from the paper: evicts after each block of `block_size` tokens, the paper at each step (`block_size=1`).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnzoo.eviction.policy import AttentionPolicy, CacheView, Scope

AS_PUBLISHED = {"schedule": "prompt", "block_size": 1}


@dataclass(frozen=True, kw_only=True)
class Tova(AttentionPolicy):
    """Attention of the last query."""

    @property
    def scope(self) -> Scope:
        """The layer."""
        return "layer"

    @property
    def queries_kept(self) -> int:
        """The last one."""
        return 1

    def attention_scores(self, view: CacheView) -> Tensor:
        """The last row of attention, a distribution over the entries."""
        return view.attention_of_window()
