"""CAOTE: evict what changes the attention output least.

Paper: Goel et al., CAOTE: KV Cache Eviction for LLMs via Attention Output Error-Based Token Selection,
https://arxiv.org/abs/2504.14051

    h = scores of a base / their sum
    c_j = h_j / (1 - h_j) * ||h V - v_j||_2      (Thm 3.2: how far the output moves when j goes)
    fast: the mean of all values instead of h V

Differs from the paper: it does not say how query heads that share a key/value head combine. Here by the root of the
sum of squares, which is how far the concatenated output of the group moves, before the output projection; over a base
that chooses for a whole layer (``base="tova"``), that of all its heads. Nor does it say what becomes of the base's
protected entries: they stay protected. SnapKV's scores are pooled before they are normalized. Entries are scored
one by one, as in the paper: where many go at once, the single errors say less (tests/eviction/test_policies.py).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.checks import check_bool
from attnzoo.eviction.policy import CacheView, by_group, wide
from attnzoo.eviction.wrapper import Wrapper

AS_PUBLISHED = {"base_options": {"normalize": False}}


@dataclass(frozen=True, kw_only=True)
class Caote(Wrapper):
    """Error of the attention output.

    Parameters
    ----------
    fast
        FastCAOTE: measure from the mean value instead of from the output.
    """

    fast: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bool("fast", self.fast)

    def score(self, view: CacheView) -> Tensor:
        """Error of the output that the eviction of each entry would make."""
        scores = self.inner.checked_attention_scores(view)
        attention = scores / scores.sum(-1, keepdim=True).clamp_min(1e-30)
        errors = output_error(attention, view.values, fast=self.fast)
        if self.scope == "layer":
            return errors.norm(dim=1, keepdim=True).expand_as(errors)
        return errors


def output_error(attention: Tensor, values: Tensor, fast: bool = False) -> Tensor:
    """How far the attention output moves when one entry goes and the weights of the rest are scaled to sum to 1.

    Parameters
    ----------
    attention
        ``(B, H, S)``: weights that sum to 1 over S.
    values
        ``(B, Hkv, S, D)``, Hkv dividing H.
    fast
        Measure from the mean value, not from the output.

    Returns
    -------
    Tensor
        ``(B, Hkv, S)``: the l2 norm over the outputs of all query heads of a group together. Infinite for an entry that
        has all the weight of some head; of an entry that has nearly all, known to eps / (1 - weight).
    """
    values = wide(values)
    attention = by_group(attention.to(values), values.shape[1])
    factor = attention / (1 - attention)
    if fast:
        distance = (values.mean(2, keepdim=True) - values).norm(dim=-1).unsqueeze(2)
    else:
        distance = torch.cdist(attention @ values, values, compute_mode="donot_use_mm_for_euclid_dist")
    return (factor * distance).masked_fill(attention == 1, float("inf")).norm(dim=2)
