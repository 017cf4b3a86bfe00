"""VATP: attention alone does not tell what an entry adds to the output; its value's size counts too.

Paper: Guo et al., Attention Score is not All You Need for Token Importance Indicator in KV Cache Reduction: Value Also
Matters, https://arxiv.org/abs/2406.12335

    I_j = S_j * ||v_j||_1       with S the scores of a base; the first `sink` tokens, of large S and tiny v, always stay

Differs from the paper: sinks are 20, as in the authors' command, and count in the budget; the paper is for multi-head
attention, here query heads that share a key/value head are averaged (over
``base="tova"`` too, so that heads then differ). The authors compare over ``base="h2o"`` and over
scissorhands in the form ``base_options={"importance": "mean", "window": 400}``.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnzoo.eviction.policy import CacheView, by_group, wide
from attnzoo.eviction.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class Vatp(Wrapper):
    """Attention times the norm of the value."""

    def default_sink(self) -> int:
        """As in the authors' command."""
        return 20

    def score(self, view: CacheView) -> Tensor:
        """The base's scores times the l1 norm of the values."""
        attention = by_group(self.inner.checked_attention_scores(view), view.kv_heads).mean(2)
        return attention * wide(view.values).abs().sum(-1)
