import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry

from attnzoo.bench.trace import missing_op, trace

pytestmark = pytest.mark.compat

B, H, N, D = 2, 3, 32, 16
ATTENTION_FLOPS = 2 * (2 * B * H * N * N * D)


def sdpa(backend, grad=False):
    q, k, v = (torch.randn(B, H, N, D, requires_grad=grad) for _ in range(3))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_every_backend_that_a_cpu_has_is_counted_in_full(backend, mode):
    with mode():
        traced = trace(lambda: sdpa(backend))
    assert traced.flops == ATTENTION_FLOPS


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("kind", [F.conv1d, F.conv2d, F.conv_transpose1d])
def test_gradients_of_grouped_convolutions_cost_what_convolutions_cost(kind, groups):
    """Of two gradients each has as many products as the convolution; torch's own formula forgets the groups."""
    size = (5,) if kind is F.conv2d else ()
    x = torch.randn(2, 8, 20, *(20 for _ in size), requires_grad=True)
    weight = torch.randn(8, 8 // groups, 5, *size, requires_grad=True)
    forward = trace(lambda: kind(x.detach(), weight.detach(), groups=groups)).flops
    assert forward > 0
    assert trace(lambda: kind(x, weight, groups=groups).sum().backward()).flops == 3 * forward


def test_every_fused_operator_of_every_device_has_a_formula():
    aten = torch.ops.aten
    for name in (
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    ):
        assert getattr(aten, name) in flop_registry


def test_the_backend_that_ran_is_named():
    with torch.inference_mode():
        flash, written_out = trace(lambda: sdpa(SDPBackend.FLASH_ATTENTION)), trace(lambda: sdpa(SDPBackend.MATH))
    assert missing_op(flash.backends, "flash") is None
    assert "no operator with 'flash'" in missing_op(written_out.backends, "flash")
    assert any("bmm" in op for op in written_out.backends)


def test_matrix_products_and_convolutions_are_counted_and_the_rest_is_named():
    x, weight, kernel = torch.randn(4, 8), torch.randn(8, 8), torch.randn(5, 1, 3, 3)
    image = torch.randn(1, 5, 6, 6)
    with torch.inference_mode():
        product = trace(lambda: F.gelu(F.linear(x, weight)))
        depthwise = trace(lambda: F.conv2d(image, kernel, padding=1, groups=5))
    assert product.flops == 2 * 4 * 8 * 8
    assert product.uncounted == ("aten.gelu",)
    assert depthwise.flops == 2 * 5 * 36 * 9


def test_views_and_copies_are_not_called_uncounted():
    with torch.inference_mode():
        traced = trace(lambda: torch.randn(4, 4).clone().transpose(0, 1)[1:])
    assert not [op for op in traced.uncounted if "clone" in op or "view" in op or "transpose" in op]
