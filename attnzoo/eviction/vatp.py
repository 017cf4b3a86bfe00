"""VATP: attention alone does not tell what an entry adds to the output; its value's size counts too.

Paper: Guo et al., Attention Score is not All You Need for Token Importance Indicator in KV Cache Reduction: Value Also
Matters, https://arxiv.org/abs/2406.12335

    I_j = S_j * ||v_j||_1       with S the scores of a base; the first `sink` tokens, of large S and tiny v, always stay

Differs from the paper: the authors pin 20 sinks at budgets of half a prompt of 3,500 tokens or more; here as many as
that is of the budget, 1 in 100, for 20 of a small budget leave too little to choose from; and one at least, for without
it a base of short memory loses the first token, whose value is small. Sinks count in the budget.
The paper is for multi-head attention; here query heads that share a key/value head are averaged, over a base that
chooses for a whole layer (``base="tova"``) all of them. The authors compare over ``base="h2o"`` and over
scissorhands in the form ``base_options={"importance": "mean", "window": 400}``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnzoo.checks import check_choice
from attnzoo.eviction.policy import AGGREGATES, CacheView, by_group, combined, wide
from attnzoo.eviction.wrapper import Wrapper

SINK_SHARE = 100  # one sink in so many entries of the budget
AS_PUBLISHED = {"sink": 20, "base_options": {"normalize": False}, "schedule": "prompt", "block_size": 1}


@dataclass(frozen=True, kw_only=True)
class Vatp(Wrapper):
    """Attention times the norm of the value.

    Parameters
    ----------
    aggregate
        As of the attention policies: ``mean``, ``max`` or ``sum`` over the query heads that share a key/value head.
    """

    aggregate: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("aggregate", self.aggregate, AGGREGATES)

    def default_sink(self) -> int:
        """The authors' share of the budget, one at least."""
        return max(1, int(self.budget) // SINK_SHARE)

    def score(self, view: CacheView) -> Tensor:
        """The base's scores times the l1 norm of the values."""
        attention = by_group(self.inner.checked_attention_scores(view), view.kv_heads)  # (B, Hkv, G, S)
        norms = wide(view.values).abs().sum(-1)  # (B, Hkv, S)
        return combined(attention * norms[:, :, None], self.aggregate, self.scope)
