"""Attention weights, computed unfused, for policies that score entries by them."""

from __future__ import annotations

import torch
from torch import Tensor


def attention_weights(
    q: Tensor, k: Tensor, scale: float | None, softcap: float | None = None, visible: Tensor | None = None
) -> Tensor:
    """Softmax attention weights, in float32 (float64 for float64 input).

    Parameters
    ----------
    q, k
        ``(B, H, N, D)`` and ``(B, Hkv, S, D)``, Hkv dividing H.
    scale, softcap
        As for a core; see `attnzoo.cores`.
    visible
        Boolean, True where a query sees a key; broadcasts to ``(B, H, N, S)``.

    Returns
    -------
    Tensor
        ``(B, H, N, S)``; zeros for a query that sees no key.
    """
    logits = attention_logits(q, k, scale, softcap)
    return logits.softmax(-1) if visible is None else visible_softmax(logits, visible)


def attention_logits(q: Tensor, k: Tensor, scale: float | None, softcap: float | None = None) -> Tensor:
    """What `attention_weights` takes the softmax of, ``(B, H, N, S)``."""
    heads, kv_heads = q.shape[1], k.shape[1]
    wide = score_dtype(q.dtype)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast(q.device.type, enabled=False):
        grouped = (q.to(wide) * scale).unflatten(1, (kv_heads, heads // kv_heads)).flatten(2, 3)
        logits = grouped @ k.to(wide).transpose(-2, -1)
        logits = logits.unflatten(2, (heads // kv_heads, q.shape[2])).flatten(1, 2)
        return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def score_dtype(dtype: torch.dtype) -> torch.dtype:
    """What scores of tensors of `dtype` are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def visible_softmax(logits: Tensor, visible: Tensor) -> Tensor:
    """Softmax over the last dimension of what is visible; zeros elsewhere, and where nothing is visible."""
    blind = ~visible.any(-1, keepdim=True)
    weights = logits.masked_fill(~(visible | blind), float("-inf")).softmax(-1)
    return weights.masked_fill(blind, 0.0)


def attention_sums(
    q: Tensor, k: Tensor, lengths: tuple[Tensor, Tensor] | None, scale: float | None, softcap: float | None = None
) -> Tensor:
    """Sum of the attention that each key gets from all queries, causal, ``(B, H, S)``; see `scored_attention`."""
    from attnzoo.kernels.scored import scored_attention

    with torch.autocast(q.device.type, enabled=False):
        return scored_attention(q, k, k[..., :0], causal=True, lengths=lengths, scale=scale, softcap=softcap).sums
