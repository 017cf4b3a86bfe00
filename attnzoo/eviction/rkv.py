"""R-KV: keep entries that the last queries attend to and whose keys are not like those of later entries.

Paper: Cai et al., R-KV: Redundancy-aware KV Cache Compression for Reasoning Models, https://arxiv.org/abs/2505.24133

    I_j = max-pool over neighbors of  mean over the last `window` queries i of softmax_j(max over the group of q_i k_j)
    R_j = softmax_j(mean over i of cos(k_i, k_j)), where for each i the newest j with a cosine above `threshold` is 0
    s_j = weight * I_j - (1 - weight) * R_j        (the softmax of I is over the entries before the window, which stays)

Differs from the paper: evicts after each block of `block_size` tokens, in the prompt too; neighbors in the pooling are
neighbors in the cache. For an i with no similar key nothing is set to 0; the authors' code sets the first entry's. Half
the budget is kept for recent entries by default, for that loses less; the paper keeps the window.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.checks import check_int, check_number, check_odd
from attnzoo.eviction.policy import CacheView, Policy, wide
from attnzoo.eviction.weights import attention_logits, visible_softmax

ROWS = 256  # of the matrix of cosines, made at a time
AS_PUBLISHED = {"recent": 8, "schedule": "prompt"}


@dataclass(frozen=True, kw_only=True)
class RKV(Policy):
    """Importance less redundancy.

    Parameters
    ----------
    window
        Number of last queries that are asked; as many recent entries have the highest score.
    kernel
        Width of the max-pooling, odd.
    weight
        Weight of the importance, from 0 to 1; the redundancy has the rest.
    threshold
        Cosine above which two keys are similar, from -1 to 1.
    """

    window: int = 8
    kernel: int = 7
    weight: float = 0.1
    threshold: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("window", self.window, minimum=1)
        check_odd("kernel", self.kernel)
        check_number("weight", self.weight, minimum=0, maximum=1)
        check_number("threshold", self.threshold, minimum=-1, maximum=1)

    @property
    def queries_kept(self) -> int:
        """The window."""
        return self.window

    @property
    def sums_window(self) -> bool:
        """The softmax leaves out the window, which a core's sums do not."""
        return False

    def default_recent(self, sink: int) -> int:
        """Half the budget, or the window if that is more."""
        return max(int(self.budget) // 2, self.window)

    def score(self, view: CacheView) -> Tensor:
        """Importance less redundancy, weighted; as high as can be inside the window."""
        assert view.queries is not None
        before = view.before(self.window)  # (B, Hkv, S)
        logits = attention_logits(view.queries, view.keys, view.scale, view.softcap)  # (B, H, w, S)
        logits = logits.unflatten(1, (view.kv_heads, -1)).amax(2)  # (B, Hkv, w, S)
        importance = visible_softmax(logits, before[:, :, None].expand_as(logits)).mean(2)
        importance = F.max_pool1d(importance, self.kernel, stride=1, padding=self.kernel // 2)
        scores = self.weight * importance - (1 - self.weight) * redundancy(view.keys, self.threshold)
        return scores.masked_fill(~before, torch.finfo(scores.dtype).max)


def redundancy(keys: Tensor, threshold: float) -> Tensor:
    """How much each key is like the others: of keys ``(B, Hkv, S, D)`` shares ``(B, Hkv, S)`` that sum to 1.

    For each key, the newest of those whose cosine with it is above `threshold` is let off.
    """
    directions = F.normalize(wide(keys), dim=-1)
    order = torch.arange(keys.shape[2], device=keys.device)
    sums = directions.new_zeros(keys.shape[:3])
    for rows in order.split(ROWS):
        cosines = directions[:, :, rows] @ directions.transpose(-2, -1)  # (B, Hkv, rows, S)
        cosines = cosines.masked_fill(rows[:, None] == order, 0.0)
        similar = cosines > threshold
        newest = order.where(similar, -1).amax(-1, keepdim=True)
        sums += cosines.masked_fill(similar & (order == newest), 0.0).sum(2)
    return (sums / len(order)).softmax(-1)
