"""Unfused softmax attention: the oracle that every other core is held against.

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

from attnzoo.checks import check_mask, check_qkv
from attnzoo.cores.masks import with_causal

SCORES = 2**28  # computed at a time: 1 GiB in float32


@dataclass(frozen=True)
class Softmax:
    """Unfused softmax attention. Long sequences go a part of the queries at a time, to bound the memory."""

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
        check_qkv(q, k, v)
        check_mask(mask, q, k)
        if causal:
            mask = with_causal(mask, q.shape[2], k.shape[2], q.device)
        rows = max(q.shape[2], 1)
        if not torch.compiler.is_exporting():  # a program for any batch cannot be cut by the batch
            rows = max(1, SCORES // max(q.shape[0] * q.shape[1] * k.shape[2], 1))
        out = []
        with torch.autocast(q.device.type, enabled=False):
            for start in range(0, max(q.shape[2], 1), rows):
                part = slice(start, start + rows)
                seen = mask if mask is None or mask.dim() < 2 or mask.shape[-2] == 1 else mask[..., part, :]
                out.append(_attend(q[:, :, part], k, v, seen, False, scale, dropout, softcap)[0])
        return out[0] if len(out) == 1 else torch.cat(out, dim=2)

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
        check_mask(mask, q, k)
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
