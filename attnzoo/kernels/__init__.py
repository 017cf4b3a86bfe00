"""Kernels, one file an op: what it computes in plain PyTorch, what computes it faster and where, and its gradient."""

from attnzoo.kernels.scored import Scored, scored_attention

__all__ = ["Scored", "scored_attention"]
