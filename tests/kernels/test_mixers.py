"""Mixers take the kernels where Triton works, and give the same."""

import pytest
import torch

from attnzoo import create_attention
from tests.kernels.conftest import DEVICE

GRID, PREFIX, DIM = (4, 5), 1, 8
N = PREFIX + GRID[0] * GRID[1]
PADRE = {
    "images": {},
    "sequences": {"token_mixing": "conv1d"},
    "causal": {"token_mixing": "causal_conv1d"},
    "dense": {"token_mixing": "dense", "tokens": N},
    "identity": {"token_mixing": "identity"},
    "sum": {"output": "sum"},
    "weights for each token": {"output": "element_sum", "tokens": N},
}
MIXERS = {
    **{f"padre, {name}": ("padre", {"degree": 3, "kernel_size": 3, **options}) for name, options in PADRE.items()},
    "conv2former": ("conv2former", {"kernel_size": 3}),
    "conv": ("conv", {"kernel_size": 3}),
    "hyena": ("hyena", {"order": 3}),
    "hyena, causal": ("hyena", {"bidirectional": False}),
    "mamba": ("mamba", {"state_size": 2}),
}


def outputs_and_gradients(mixer, x, mask):
    x = x.clone().requires_grad_()
    out = mixer(x, grid=GRID, prefix=PREFIX, mask=mask)
    return out, *torch.autograd.grad(out.square().sum(), [x, *mixer.parameters()])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(("name", "options"), MIXERS.values(), ids=MIXERS)
def test_a_mixer_gives_the_same_by_its_kernels(request, name, options, masked):
    torch.manual_seed(0)
    mixer = create_attention(name, DIM, 2, **options).double().to(DEVICE)
    x = torch.randn(2, N, DIM, dtype=torch.float64, device=DEVICE)
    mask = torch.rand(2, N, device=DEVICE) > 0.2 if masked else None
    without = outputs_and_gradients(mixer.cpu(), x.cpu(), None if mask is None else mask.cpu())
    paths = request.getfixturevalue("kernels")
    by_kernels = outputs_and_gradients(mixer.to(DEVICE), x, mask)
    assert paths
    assert {path for _, path in paths} == {"triton"}
    for a, b in zip(by_kernels, without, strict=True):
        torch.testing.assert_close(a.cpu(), b)


def test_padre_takes_one_pair_a_step_and_one_chain_for_its_sum(kernels):
    mixer = create_attention("padre", DIM, 1, degree=3, kernel_size=3, output="sum").to(DEVICE)
    mixer(torch.randn(1, 20, DIM, device=DEVICE), grid=GRID)
    assert dict(kernels) == {("depthwise_pair", "triton"): 3, ("hadamard_chain", "triton"): 1}
