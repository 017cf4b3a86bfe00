"""Kernels, one file an op: what it computes in plain PyTorch, what computes it faster and where, and its gradient."""
