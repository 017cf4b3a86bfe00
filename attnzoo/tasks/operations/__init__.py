"""Single operations of `attnzoo.kernels`, and layers, beside the fastest that PyTorch has for the same work."""
