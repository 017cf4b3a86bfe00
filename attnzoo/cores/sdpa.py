"""PyTorch's scaled dot-product attention, on the backend that PyTorch picks.

Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html

    O = softmax(scale * Q K^T + mask) V

Differs from the source: causal attention lines up the ends of queries and keys when their numbers differ (torch lines
up the beginnings), combines with a mask, and a soft cap is refused because torch has none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.nn import functional as F
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import _disable_current_modes

from attnzoo.checks import check_mask, check_qkv
from attnzoo.cores.masks import with_causal
from attnzoo.errors import UnsupportedError


@dataclass(frozen=True)
class Sdpa:
    """`F.scaled_dot_product_attention` as a core."""

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        mask: Tensor | None = None,
        causal: bool = False,
        scale: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
    ) -> Tensor:
        """Attend; see `attnzoo.cores` for the shapes.

        Raises
        ------
        UnsupportedError
            If a soft cap is asked for.
        """
        check_qkv(q, k, v)
        check_mask(mask, q, k)
        refuse_softcap(softcap)
        return torch_sdpa(q, k, v, mask, causal, scale, dropout)


def refuse_softcap(softcap: float | None) -> None:
    """Raise `UnsupportedError` where there is one."""
    if softcap is not None:
        raise UnsupportedError("torch's attention cannot cap scores (softcap); use 'softmax'")


def torch_sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float | None, dropout: float
) -> Tensor:
    """Call torch with the cores' meaning of `causal` and `mask`."""
    queries, keys = q.shape[2], k.shape[2]
    if causal and queries == 1:
        causal = False  # the one query is the last: it sees every key
    if causal and mask is None and queries < keys and _flash_runs(q, k, v, dropout):
        with _disable_current_modes():  # under one, as of a FLOP counter, torch cannot make this object
            bias = causal_lower_right(queries, keys)  # FlashAttention lines up the ends by itself: no mask is made
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, dropout_p=dropout, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
        )
    if causal and (mask is not None or queries != keys):
        mask, causal = with_causal(mask, queries, keys, q.device), False
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and mask is not None and q.is_cuda:
        # with a mask, torch has no fused CUDA kernel for grouped queries
        k, v, groups = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1), 1
    if mask is not None and mask.is_floating_point():
        mask = mask.to(q.dtype)
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, dropout_p=dropout, is_causal=causal, scale=scale, enable_gqa=groups > 1
    )


def _flash_runs(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> bool:
    """Whether torch would run its FlashAttention on a GPU."""
    if not q.is_cuda or torch.compiler.is_compiling():
        return False
    return can_use_flash_attention(SDPAParams(q, k, v, None, dropout, False, q.shape[1] != k.shape[1]))
