"""Knorm: keys of a small norm draw attention; keep them.

Paper: Devoto et al., A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression,
https://arxiv.org/abs/2406.11430

    s_j = -||k_j||_2

Differs from the paper: all layers are bounded; the authors' code leaves the first two alone (``where=`` does that).
Norms are rounded to steps of 0.07%, and of equal ones the later entry stays: in the first layer every occurrence of a
token has a key of the same norm, and float32's rounding should not choose between them (bfloat16's still does).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnzoo.eviction.policy import CacheView, Policy, wide

STEPS = 1024  # to each doubling of the norm
AS_PUBLISHED = {"schedule": "prompt"}


@dataclass(frozen=True, kw_only=True)
class Knorm(Policy):
    """Norm of the key."""

    def score(self, view: CacheView) -> Tensor:
        """The smaller the norm, the better."""
        return -(wide(view.keys).norm(dim=-1).log2() * STEPS).round()
