"""StreamingLLM: the first few tokens, which draw attention whatever they say, and the last ones.

Paper: Xiao et al., Efficient Streaming Language Models with Attention Sinks, https://arxiv.org/abs/2309.17453

    keep = first `sink` tokens + last `budget - sink` tokens

Differs from the paper: positions stay those of the text; the paper renumbers them inside the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnzoo.eviction.policy import CacheView, Policy

AS_PUBLISHED = {"schedule": "step"}


@dataclass(frozen=True, kw_only=True)
class Streaming(Policy):
    """Attention sinks and a sliding window."""

    def default_sink(self) -> int:
        """As in the paper."""
        return 4

    def default_recent(self, sink: int) -> int:
        """All that is left."""
        return int(self.budget) - sink

    def score(self, view: CacheView) -> Tensor:
        """The later the better."""
        return view.positions.double()
