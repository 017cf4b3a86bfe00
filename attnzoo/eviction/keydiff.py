"""KeyDiff: keep keys that are unlike the mean key; only keys are looked at, so any fast attention will do.

Paper: Park et al., KeyDiff: Key Similarity-Based KV Cache Eviction, https://arxiv.org/abs/2504.15364

    s_j = -cos(mean_i k_i / |k_i|, k_j)        (Eq. 8; over all entries there are, old and new)

The most recent entries take a fifth of the budget by default: the paper's variant with a sliding window, which loses
less; ``recent=0`` is its base method.

Differs from the paper: its experiments take the mean of the raw keys, which it finds as good; that is ``anchor="raw"``,
and the default here is the equation's. The keys are those after rotary embedding, which the paper does not say.
Cosines are rounded to steps of a millionth, so that rounding does not choose between equal ones, as those of two
entries to their own mean are: the later entry stays.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

from attnzoo.checks import check_choice, renamed_choice
from attnzoo.eviction.policy import CacheView, Policy, wide

RECENT_SHARE = 5
STEPS = 2**20  # to each unit of the cosine
AS_PUBLISHED = {"anchor": "raw", "recent": 0}


@dataclass(frozen=True, kw_only=True)
class KeyDiff(Policy):
    """Dissimilarity from the mean key.

    Parameters
    ----------
    anchor
        Mean of the ``normalized`` or of the ``raw`` keys. The spelling ``normalised`` is deprecated.
    """

    anchor: str = "normalized"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "anchor", renamed_choice("anchor", self.anchor, "normalised", "normalized"))
        check_choice("anchor", self.anchor, ("normalized", "raw"))

    @property
    def comparable(self) -> bool:
        """Cosines are."""
        return True

    def default_recent(self, sink: int) -> int:
        """A fifth of the budget."""
        return int(self.budget) // RECENT_SHARE

    def score(self, view: CacheView) -> Tensor:
        """Minus the cosine with the anchor, in steps."""
        keys = wide(view.keys)
        directions = F.normalize(keys, dim=-1)
        anchor = (directions if self.anchor == "normalized" else keys).mean(2, keepdim=True)
        return -((directions * F.normalize(anchor, dim=-1)).sum(-1) * STEPS).round()
