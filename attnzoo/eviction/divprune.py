"""DivPrune: keep entries whose keys are far apart, the greedy solution of the max-min diversity problem.

Paper: Alvar et al., DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models,
https://arxiv.org/abs/2503.02175

    first: argmax_i of min_{j != i} d(i, j)                      d(i, j) = 1 - cos(k_i, k_j)
    next:  argmax_i of min over those chosen so far of d(i, j)   until the budget is full

Protected entries are chosen first, and the first rule is used where there are none.

An eviction chooses entries one after the other, a small operation on all entries for each: expect it to be slower than
policies that score them all at once.

Differs from the paper: it prunes the tokens of an image once, before the language model, by their embeddings; here
keys, of whatever token, after each block. The most recent entries take half the budget by default, for that loses less;
``recent=0`` is the paper's rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from attnzoo.eviction.policy import CacheView, Policy, wide

AS_PUBLISHED = {"recent": 0, "schedule": "prompt"}
_CHUNK = 256  # entries whose distances to all others are held at a time


@dataclass(frozen=True, kw_only=True)
class DivPrune(Policy):
    """Distance of a key from those already chosen."""

    def default_recent(self, sink: int) -> int:
        """Half the budget."""
        return int(self.budget) // 2

    def score(self, view: CacheView) -> Tensor:
        """The order in which entries are chosen, the first the highest; 0 for those that are not."""
        assert isinstance(self.budget, int)
        protected = self.protects(view)
        left = self.budget - int(protected.sum(-1).min())
        return chosen_order(wide(view.keys), left, protected)


def chosen_order(vectors: Tensor, count: int, given: Tensor) -> Tensor:
    """Choose vectors one after the other, each the farthest from those chosen before.

    Parameters
    ----------
    vectors
        ``(..., S, D)``.
    count
        How many to choose.
    given
        ``(..., S)``, True for those that are chosen from the start: some in each set, or none in any.

    Returns
    -------
    Tensor
        ``(..., S)``: `count` for the first chosen down to 1 for the last, 0 for the rest. Of vectors at the same
        distance the later is chosen first.
    """
    units = F.normalize(vectors, dim=-1).flip(-2)  # so that the first of equal ones, which argmax gives, is the later
    given = given.flip(-1)
    some = bool(given.any())
    nearest = nearest_distance(units, given if some else torch.ones_like(given)).masked_fill(given, float("-inf"))
    order = torch.zeros_like(nearest)
    for step in range(count):
        choice = nearest.argmax(-1, keepdim=True)  # (..., 1)
        order.scatter_(-1, choice, float(count - step))
        unit = units.gather(-2, choice[..., None].expand(*choice.shape, units.shape[-1]))  # (..., 1, D)
        distance = 1 - (units @ unit.transpose(-1, -2)).squeeze(-1)
        nearest = distance if step == 0 and not some else nearest.minimum(distance)
        nearest.scatter_(-1, choice, float("-inf"))
    return order.flip(-1)


def nearest_distance(units: Tensor, among: Tensor) -> Tensor:
    """Cosine distance of each unit vector ``(..., S, D)`` from the nearest other one in `among` ``(..., S)``."""
    found = []
    for start in range(0, units.shape[-2], _CHUNK):
        some = units[..., start : start + _CHUNK, :]
        distances = (1 - some @ units.transpose(-1, -2)).masked_fill(~among[..., None, :], float("inf"))
        distances.diagonal(offset=start, dim1=-2, dim2=-1).fill_(float("inf"))
        found.append(distances.amin(-1))
    return torch.cat(found, -1)
