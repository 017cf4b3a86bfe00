"""FlashAttention that can tell how much attention each key got: what eviction policies run on at any length.

Paper: Dao, FlashAttention-2, https://arxiv.org/abs/2307.08691

    O = softmax(scale * Q K^T + mask) V,    sums_j = sum of A_ij over the last queries i

Differs from the paper: the sums, which no FlashAttention kernel gives (see `attnzoo.kernels.scored_attention`). Where
nobody asks for them it is PyTorch's scaled dot-product attention, which is FlashAttention where it is available.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnzoo.cores.sdpa import Sdpa, refuse_softcap
from attnzoo.kernels.scored import Scored, scored_attention


@dataclass(frozen=True)
class FlashScored(Sdpa):
    """A core with ``scored(...)``, which a policy asks instead of a second look at queries and keys."""

    def scored(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        window: int | None = None,
        causal: bool = False,
        lengths: tuple[Tensor, Tensor] | None = None,
        scale: float | None = None,
        softcap: float | None = None,
    ) -> Scored:
        """Attend and sum; see `attnzoo.kernels.scored_attention`.

        Raises
        ------
        UnsupportedError
            If a soft cap is asked for, as when no sums are.
        """
        refuse_softcap(softcap)
        return scored_attention(q, k, v, window=window, causal=causal, lengths=lengths, scale=scale)
