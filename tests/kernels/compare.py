"""Outputs and gradients of an op, against its reference in float64."""

import torch

TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def surrounded(tensor, device):
    """The same values as a slice of a larger tensor that is full of NaN, so that a read beyond them shows."""
    shape = [n + 4 for n in tensor.shape]
    big = torch.full(shape, float("nan"), dtype=tensor.dtype, device=device)
    inner = big[tuple(slice(2, 2 + n) for n in tensor.shape)]
    inner.copy_(tensor)
    return inner


def outputs_and_gradients(function, leaves, dtype):
    """The output, and the gradients of its product with random numbers of `dtype`, by every leaf that is one."""
    leaves = [None if t is None else t.detach().requires_grad_() for t in leaves]
    out = function(*leaves)
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    grads = torch.autograd.grad(out, [t for t in leaves if t is not None], cotangent.to(dtype).to(out))
    return out, *grads


def assert_as_the_reference(op, reference, leaves, dtype, device):
    """Compare, and see to it that every element was written with a number."""
    got = outputs_and_gradients(op, [None if t is None else surrounded(t.to(dtype), device) for t in leaves], dtype)
    want = outputs_and_gradients(reference, [None if t is None else t.to(dtype).double() for t in leaves], dtype)
    assert got[0].dtype == dtype
    for a, b in zip(got, want, strict=True):
        a = a.double().cpu()
        assert a.shape == b.shape
        if b.numel():
            assert a.isfinite().all()
            size = max(b.abs().max().item(), 0.1)  # sums of numbers of about 1 may cancel
            assert (a - b).abs().max() <= TOLERANCE[dtype] * size
