import pytest
import timm
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import flop_registry

import attnzoo
from attnzoo.bench.trace import FORMULAS, MULTIPLIES, missing_op, trace

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
        for operator in (name, f"{name}_backward"):
            assert getattr(aten, operator) in {**flop_registry, **FORMULAS}


@pytest.mark.parametrize("backend", ["flash", "efficient", "cudnn"])
def test_grouped_queries_of_a_gpu_are_counted_as_all_heads(backend):
    """Which torch's own formulas refuse up to 2.11."""
    forward = getattr(torch.ops.aten, f"_scaled_dot_product_{backend}_attention")
    backward = getattr(torch.ops.aten, f"_scaled_dot_product_{backend}_attention_backward")
    q, k, v = (B, 6, N, D), (B, 2, 3 * N, D), (B, 2, 3 * N, 5)
    product = 2 * B * 6 * N * 3 * N
    assert FORMULAS[forward](q, k, v, None, out_val=None) == product * (D + 5)
    assert FORMULAS[backward](q, q, k, v, None, out_val=None) == product * (3 * D + 2 * 5)


def test_gradients_of_flash_attention_are_counted_by_hand():
    """Backward, the scores are computed again: five products of the size of each of the two of the forward."""
    flash = trace(lambda: sdpa(SDPBackend.FLASH_ATTENTION, grad=True).sum().backward())
    assert flash.flops == ATTENTION_FLOPS + 5 * (2 * B * H * N * N * D)
    written_out = trace(lambda: sdpa(SDPBackend.MATH, grad=True).sum().backward())
    assert written_out.flops == ATTENTION_FLOPS + 4 * (2 * B * H * N * N * D)


def test_keys_are_as_many_and_values_as_wide_as_they_are():
    q, k = torch.randn(1, 4, 7, 16), torch.randn(1, 2, 11, 16)
    products = 2 * 4 * 7 * 11 * (16 + 16)
    for enabled in (SDPBackend.MATH, SDPBackend.FLASH_ATTENTION):
        with torch.no_grad(), sdpa_kernel(enabled):
            traced = trace(lambda: F.scaled_dot_product_attention(q, k, k, enable_gqa=True))
        assert traced.flops == products, enabled


@pytest.mark.parametrize("host", ["vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"])
def test_every_core_does_the_work_of_dense_attention(host):
    def count(name):
        model = timm.create_model(host, depth=1, img_size=64).eval()
        if name is not None:
            attnzoo.replace_attention(model, name)
        with torch.no_grad():
            traced = trace(lambda: model(torch.zeros(1, 3, 64, 64)))
        assert traced.flops_note == ""
        return traced.flops

    dense = count(None)
    for name in ("softmax", "sdpa", "flash", "flash_scored"):
        assert count(name) == pytest.approx(dense, rel=0.01), name


@pytest.mark.parametrize(
    "call", [lambda: torch.mv(torch.ones(3, 4), torch.ones(4)), lambda: torch.dot(torch.ones(4), torch.ones(4))]
)
def test_without_a_formula_there_is_no_figure_but_a_reason(call):
    with torch.no_grad():
        traced = trace(lambda: (torch.ones(2, 2) @ torch.ones(2, 2), call()))
    assert traced.flops is None
    assert traced.flops_note.startswith("no formula for the FLOPs of ")
    assert traced.flops_note.rpartition(" ")[2] in traced.uncounted


@pytest.mark.parametrize(("mode", "products"), [("donot_use_mm_for_euclid_dist", 0), ("use_mm_for_euclid_dist", 1)])
def test_distances_cost_the_product_that_they_are_made_of(mode, products):
    a, b = torch.randn(2, 30, 8), torch.randn(2, 40, 8)
    with torch.no_grad():
        traced = trace(lambda: torch.cdist(a, b, compute_mode=mode))
    assert traced.flops == products * 2 * 2 * 30 * 40 * 8


@pytest.mark.compat
@pytest.mark.parametrize("mode", [None, 0, 1, 2])
@pytest.mark.parametrize(("rows", "columns"), [(5, 6), (25, 25), (26, 5), (5, 26)])
@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("operator", [torch.cdist, torch.ops.aten._cdist_forward])
def test_distances_count_a_product_where_torch_computes_one(operator, p, rows, columns, mode):
    """A product rounds where the differences of a point from its twin are exactly 0."""
    apart = torch.rand(max(rows, columns), 3, generator=torch.Generator().manual_seed(0)) + 1000
    a, b = apart[:rows], apart[:columns]
    modes = {1: "use_mm_for_euclid_dist", 2: "donot_use_mm_for_euclid_dist"}
    if operator is torch.cdist:
        mode = modes.get(mode, "use_mm_for_euclid_dist_if_necessary")
    with torch.no_grad():
        product = bool(operator(a, b, p, mode).diagonal().any())
        assert trace(lambda: operator(a, b, p, mode)).flops == product * 2 * rows * columns * 3
        assert product is (
            p == 2 and (mode in (1, modes[1]) or (mode not in (2, modes[2]) and max(rows, columns) > 25))
        )


@pytest.mark.parametrize(
    ("operator", "multiplies"),
    [
        ("mm", True), ("addmm", True), ("_int_mm", True), ("_grouped_mm", True), ("mv", True), ("dot", True),
        ("_scaled_dot_product_flash_attention", True), ("depthwise_pair_backward", True), ("conv2d", True),
        ("convolution_overrideable", True), ("_linear_pointwise", True), ("linear_backward", True), ("lstm", True),
        ("gamma", False), ("cummax", False), ("_convert_weight", False), ("upsample_bilinear2d", False),
        ("hadamard_chain", False), ("_softmax", False), ("mul", False), ("_fft_r2c", False),
    ],
)  # fmt: skip
def test_operators_that_multiply_matrices_are_known_by_name(operator, multiplies):
    assert bool(MULTIPLIES.search(operator)) is multiplies


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


WIDTH = 2 * D  # of two heads: an odd number keeps torch from its fast path
EVEN_FLOPS = 2 * (2 * B * N * N * WIDTH)


@pytest.mark.parametrize("padded", [False, True])
def test_an_encoder_on_torchs_fast_path_is_counted_as_on_the_ordinary_one(padded):
    """Whose layers are one operator each, into which no formula sees."""
    layer = torch.nn.TransformerEncoderLayer(WIDTH, 2, 2 * WIDTH, batch_first=True)
    encoder = torch.nn.TransformerEncoder(layer, 2).eval()
    x = torch.randn(B, N, WIDTH)
    mask = torch.zeros(B, N, dtype=torch.bool)
    mask[0, N - 1] = padded
    with torch.inference_mode():
        traced = trace(lambda: encoder(x, src_key_padding_mask=mask))
    assert "aten._transformer_encoder_layer_fwd" in traced.ops, "what ran, and is timed, is told as it is"
    linear = 2 * B * N * (WIDTH) ** 2 * (4 + 2 * 2)  # queries, keys, values, output; two of the MLP
    assert (traced.flops, traced.flops_note) == (2 * (linear + EVEN_FLOPS), "")
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("enabled", [False, True])
def test_attention_on_torchs_fast_path_is_counted_and_the_switch_left_as_it_was(enabled):
    attention = torch.nn.MultiheadAttention(WIDTH, 2, batch_first=True).eval()
    x = torch.randn(B, N, WIDTH)
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(enabled)
    try:
        with torch.inference_mode():
            traced = trace(lambda: attention(x, x, x, need_weights=False))
        assert torch.backends.mha.get_fastpath_enabled() == enabled
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert ("aten._native_multi_head_attention" in traced.ops) == enabled
    assert traced.flops == 2 * B * N * (WIDTH) ** 2 * 4 + EVEN_FLOPS
