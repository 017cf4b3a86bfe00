"""DropKV: the square of CAOTE's output error, of each of the last queries, added up.

Paper: Zhang et al., DropKV, https://openreview.net/forum?id=MqfNzH3TVH; proposed to kvpress in
https://github.com/NVIDIA/kvpress/pull/285, from whose description this is written

    s_j = sum over the last `window` queries i of (p_ij / (1 - p_ij))^2 * ||v_j - o_i||_2^2,   o_i = sum_j p_ij v_j

Differs from the paper: evicts after each block of `block_size` tokens, in decoding too; the window's attention is that
over the entries still there; query heads that share a key/value head are added up, which is how far their concatenated
output moves; the window itself is kept.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.checks import check_int
from attnzoo.eviction.caote import output_error
from attnzoo.eviction.policy import CacheView, Policy

AS_PUBLISHED = {"schedule": "prompt"}


@dataclass(frozen=True, kw_only=True)
class DropKV(Policy):
    """Squared error of the attention output over the last queries.

    Parameters
    ----------
    window
        Number of last queries that are asked; as many recent entries are kept by default.
    """

    window: int = 32

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("window", self.window, minimum=1)

    @property
    def comparable(self) -> bool:
        """How far the output moves."""
        return True

    @property
    def queries_kept(self) -> int:
        """The window."""
        return self.window

    @property
    def sums_window(self) -> bool:
        """Squares need each weight."""
        return False

    def default_recent(self, sink: int) -> int:
        """The window."""
        return self.window

    def score(self, view: CacheView) -> Tensor:
        """Squared errors of the outputs that the eviction of each entry would make, added up."""
        attention = view.window_attention()  # (B, H, w, S)
        errors = [output_error(attention[:, :, i], view.values).square() for i in range(attention.shape[2])]
        return torch.stack(errors).sum(0)
