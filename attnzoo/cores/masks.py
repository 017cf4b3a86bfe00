"""Masks that the cores share."""

from __future__ import annotations

import torch
from torch import Tensor


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Boolean ``(queries, keys)``: query i may see keys up to ``i + keys - queries``."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Give `mask` as something to add to scores: 0 where a boolean mask is True, -inf where it is False."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, float("-inf"))


def with_causal(mask: Tensor | None, queries: int, keys: int, device: torch.device) -> Tensor:
    """Combine `mask` (boolean or additive) with the causal mask; the result is of the same sort."""
    causal = causal_mask(queries, keys, device)
    if mask is None:
        return causal
    if mask.dtype == torch.bool:
        return mask & causal
    return mask.masked_fill(~causal, float("-inf"))


def without_tokens(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention where there is no row, no query or no key: zeros ``(B, H, N, Dv)`` with gradients of zero."""
    groups = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(groups, dim=1) for t in (k, v))
    return (q @ k.mT) @ v  # sums over nothing
