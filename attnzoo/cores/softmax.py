"""Softmax attention, written out: the oracle that every other core is held against.

Paper: Vaswani et al., Attention Is All You Need, https://arxiv.org/abs/1706.03762

    A = softmax(scale * Q K^T + mask)
    O = A V

Differs from the paper: scores, softmax and the product with V are computed in float32 (float64 for float64 input), also
under autocast; grouped queries and a soft cap on the scores are allowed; a query that may see no key gets zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from attnzoo.checks import check_qkv
from attnzoo.cores.masks import with_causal


@dataclass(frozen=True)
class Softmax:
    """Written-out softmax attention; memory grows with N x S."""

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
        """Attend; see `attnzoo.cores` for the shapes."""
        return self.with_weights(q, k, v, mask=mask, causal=causal, scale=scale, dropout=dropout, softcap=softcap)[0]

    def with_weights(
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
    ) -> tuple[Tensor, Tensor]:
        """Attend and also return the weights ``(B, H, N, S)``, after dropout, in the dtype of q."""
        check_qkv(q, k, v)
        with torch.autocast(q.device.type, enabled=False):
            return _attend(q, k, v, mask, causal, scale, dropout, softcap)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    causal: bool,
    scale: float | None,
    dropout: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    heads, kv_heads, dtype = q.shape[1], k.shape[1], q.dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if heads != kv_heads:
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
    scores = (q.to(wide) * scale) @ k.to(wide).transpose(-2, -1)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        mask = with_causal(mask, q.shape[2], k.shape[2], q.device)
    if mask is None:
        weights = scores.softmax(-1)
    else:
        hidden = ~mask if mask.dtype == torch.bool else torch.isneginf(mask)
        if mask.dtype != torch.bool:
            scores = scores + mask.to(wide)
        blind = hidden.all(-1, keepdim=True)  # queries that may see nothing: softmax would give them NaN
        scores = scores.masked_fill(hidden & ~blind, float("-inf"))
        scores = scores.masked_fill(blind, 0.0)
        weights = scores.softmax(-1).masked_fill(blind, 0.0)
    weights = torch.dropout(weights, dropout, train=dropout > 0)
    return (weights @ v.to(wide)).to(dtype), weights.to(dtype)
