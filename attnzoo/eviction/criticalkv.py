"""CriticalKV: what an entry adds to the layer's output is bounded by its attention times its projected value's norm.

Paper: Feng et al., Identify Critical KV Cache in LLM Inference from an Output Perturbation Perspective,
https://arxiv.org/abs/2502.03805

    first half of the budget: the entries with the highest scores S of a base
    the rest: s_j = (S_j + epsilon) * mean over the group's heads of ||W_O v_j||_1     (Alg. 1)

The norms are computed head by head: all together would take up as much as the entries times the model's width.

Differs from the paper: evicts after each block of `block_size` tokens, in decoding too; a base's scores are divided by
their sum, so that epsilon means the same for every base (the paper's are attention weights), and what a base itself
makes of the values is left out; protected entries count in the first half, as the observation window does in kvpress.
Over a base that chooses for a whole layer (``base="tova"``) the mean is over all heads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.checks import check_number
from attnzoo.eviction.policy import CacheView, by_group, combined, highest, wide
from attnzoo.eviction.wrapper import Wrapper

AS_PUBLISHED = {"base": "snapkv", "schedule": "prompt"}


@dataclass(frozen=True, kw_only=True)
class CriticalKV(Wrapper):
    """Scores times the norm of the projected value, for a part of the budget.

    Parameters
    ----------
    first_stage
        Share of the budget that the base's scores alone decide, from 0 to 1.
    epsilon
        Added to scores that sum to 1, so that the norm still counts where there is no attention.
    """

    first_stage: float = 0.5
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("first_stage", self.first_stage, minimum=0, maximum=1)
        check_number("epsilon", self.epsilon, minimum=0)

    @property
    def comparable(self) -> bool:
        """No: the first stage takes its share of each head's own budget."""
        return False

    def not_adaptive(self) -> str:
        """Say why not."""
        return "the first stage of CriticalKV takes a share of each head's own budget; use its base alone"

    @property
    def uses_output_weight(self) -> bool:
        """The projected values."""
        return True

    def score(self, view: CacheView) -> Tensor:
        """Infinite for the first stage, else scores times norms."""
        scores = wide(self.inner.aggregated(view))
        scores = scores / scores.sum(-1, keepdim=True).clamp_min(1e-30)
        norms = combined(by_group(projected_norms(view), view.kv_heads), "mean", self.scope)
        protected = scores.masked_fill(self.protects(view), float("inf"))
        products = (scores + self.epsilon) * norms
        count = int(int(self.budget) * self.first_stage)
        return products.scatter(-1, highest(protected, count), float("inf")) if count else products


def projected_norms(view: CacheView) -> Tensor:
    """The l1 norm of what each query head's part of the output projection makes of each value, ``(B, H, S)``."""
    values, weight = wide(view.values), view.output_weight()
    groups = len(weight) // view.kv_heads
    norms = [(values[:, h // groups] @ weight[h].to(values)).abs().sum(-1) for h in range(len(weight))]
    return torch.stack(norms, 1)
