"""What a swapped layer is given and must check as the host's own does: masks, empty batches, shuffled tokens."""

import subprocess
import sys

import pytest
import timm
import torch
from torch import nn

import attnzoo
from attnzoo.errors import ShapeError, UnsupportedError
from attnzoo.registry import build_core, describe

CORES = ("softmax", "sdpa", "flash", "flash_scored")
B, N, S, WIDTH, HEADS = 2, 5, 5, 8, 2


def attention(name, **options):
    torch.manual_seed(0)
    dense = nn.Sequential(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)).eval()
    swapped = nn.Sequential(nn.MultiheadAttention(WIDTH, HEADS, batch_first=True, **options)).eval()
    swapped.load_state_dict(dense.state_dict())
    return dense[0], attnzoo.replace_attention(swapped, name)[0]


MASKS = {
    "one for each row": {"attn_mask": torch.ones(B, N, S, dtype=torch.bool).triu(1)},
    "one for each row, additive": {"attn_mask": torch.ones(B, N, S).triu(1)},
    "one for all rows": {"attn_mask": torch.zeros(1, N, S)},
    "one query": {"attn_mask": torch.zeros(1, S)},
    "one row of padding": {"key_padding_mask": torch.zeros(1, S, dtype=torch.bool)},
    "padding of no batch": {"key_padding_mask": torch.zeros(S, dtype=torch.bool)},
    "whole numbers": {"attn_mask": torch.ones(N, S, dtype=torch.long).triu(1)},
    "bytes of padding": {"key_padding_mask": torch.tensor([[0, 0, 0, 1, 1]] * B, dtype=torch.uint8)},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", CORES)
def test_masks_that_torchs_attention_refuses_are_refused(name, mask):
    """With as many rows as heads a mask of one for each row would pass for one of one for each head."""
    dense, swapped = attention(name)
    x = torch.randn(B, N, WIDTH)
    assert B == HEADS
    with pytest.raises((RuntimeError, AssertionError)):
        dense(x, x, x, **MASKS[mask])
    with pytest.raises(ShapeError, match=r"must be .*, not"):
        swapped(x, x, x, **MASKS[mask])


@pytest.mark.parametrize("name", CORES)
def test_masks_that_it_takes_give_what_it_gives(name):
    dense, swapped = attention(name)
    x = torch.randn(B, N, WIDTH)
    hidden = torch.ones(N, S, dtype=torch.bool).triu(1)
    padding = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    for masks in (
        {"attn_mask": hidden},
        {"attn_mask": hidden.expand(B * HEADS, N, S), "key_padding_mask": padding},
        {"attn_mask": torch.randn(B * HEADS, N, S)},
        {"key_padding_mask": torch.zeros(B, S).masked_fill(padding, float("-inf"))},
    ):
        torch.testing.assert_close(swapped(x, x, x, **masks)[0], dense(x, x, x, **masks)[0])
    alone = {"attn_mask": hidden, "key_padding_mask": padding[1]}
    torch.testing.assert_close(swapped(x[1], x[1], x[1], **alone)[0], dense(x[1], x[1], x[1], **alone)[0])


@pytest.mark.parametrize("kind", ["core", "mixer"])
@pytest.mark.parametrize("padding", [torch.zeros(1, 9, dtype=torch.bool), torch.ones(2, 9, dtype=torch.long)], ids=str)
def test_padding_that_an_encoder_refuses_is_refused(kind, padding):
    encoder = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1, enable_nested_tensor=False
    )
    x = torch.randn(2, 9, 8)
    with pytest.raises((RuntimeError, AssertionError)):
        encoder(x, src_key_padding_mask=padding)
    options = {"grid": (3, 3), "kernel_size": 3} if kind == "mixer" else {}
    attnzoo.replace_attention(encoder, "padre" if kind == "mixer" else "softmax", **options)
    with pytest.raises((RuntimeError, AssertionError, ShapeError)):
        encoder(x, src_key_padding_mask=padding)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32])
@pytest.mark.parametrize("name", CORES)
def test_masks_of_whole_numbers_are_refused_in_every_host(name, dtype):
    model = timm.create_model("vit_tiny_patch16_224", depth=1, img_size=32)
    layer = attnzoo.replace_attention(model, name).blocks[0].attn
    with pytest.raises(ShapeError, match=r"not torch\.\w+; call mask\.bool\(\)"):
        layer(torch.randn(1, 4, 192), attn_mask=torch.ones(4, 4, dtype=dtype))
    with pytest.raises(ShapeError, match=r"must broadcast to \(B, H, N, S\) = \(1, 3, 4, 4\), got \(2, 4, 4\)"):
        layer(torch.randn(1, 4, 192), attn_mask=torch.ones(2, 4, 4, dtype=torch.bool))


# ---- nothing to attend to

EMPTY = [
    ((2, 4, 0, 8), (2, 4, 0, 8)),
    ((2, 4, 3, 8), (2, 4, 0, 8)),
    ((2, 4, 0, 8), (2, 2, 5, 8)),
    ((0, 4, 3, 8), (0, 2, 5, 8)),
]
ATTEND = """
import sys, torch, attnzoo
from attnzoo.registry import build_core, describe
from attnzoo.kernels.scored import scored_attention
for name in {cores}:
    core = build_core(describe(name), {{}})
    for q, k in {shapes}:
        q, k, v = (torch.randn(*shape, requires_grad=True) for shape in (q, k, k))
        out = core(q, k, v)
        out.sum().backward()
        assert out.shape == q.shape and not out.any() and not any(t.grad.any() for t in (q, k, v)), (name, q.shape)
        out = core(q, k, v, mask=torch.ones(q.shape[2], k.shape[2], dtype=torch.bool), causal=True)
        assert out.shape == q.shape
for name, options in {modules}:
    layer = attnzoo.create_attention(name, 16, 4, **options)
    for shape in ((2, 0, 16), (0, 4, 16), (0, 0, 16)):
        if shape[1] == 0 and describe(name).capabilities.grid:
            continue  # there is no grid of nothing
        x = torch.randn(*shape, requires_grad=True)
        out = layer(x, grid=(2, 2)) if shape[1] else layer(x)
        assert out.shape == x.shape, (name, shape)
        out.sum().backward()
        assert x.grad.shape == x.shape
print("all")
"""


def test_nothing_to_attend_to_is_no_crash():
    """In a process of its own, for a division by zero within a kernel would take this one with it."""
    mixers = [(name, {}) for name in ("softmax", "sdpa", "flash", "padre", "sima", "hyena", "mamba", "linear_angular")]
    mixers += [("conv2former", {}), ("conv", {}), ("pooling", {}), ("hyena", {"bidirectional": False})]
    code = ATTEND.format(cores=CORES, shapes=EMPTY, modules=mixers)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "all"


@pytest.mark.parametrize("name", CORES)
def test_cross_attention_to_no_keys_gives_what_torch_gives(name):
    core = build_core(describe(name), {})
    q, k = torch.randn(2, 4, 3, 8), torch.randn(2, 4, 0, 8)
    torch.testing.assert_close(core(q, k, k), nn.functional.scaled_dot_product_attention(q, k, k))


@pytest.mark.parametrize("name", CORES)
@pytest.mark.parametrize("shape", [(2, 4, 3, 0), (2, 0, 3, 8)], ids=str)
def test_no_width_and_no_head_are_refused(name, shape):
    x = torch.randn(*shape)
    with pytest.raises(ShapeError, match="at least one head and a width of at least 1"):
        build_core(describe(name), {})(x, x, x)


# ---- dropped patches, and linear maps that are not torch's own


@pytest.mark.parametrize(("name", "options"), [("sima", {}), ("padre", {"token_mixing": "identity"})], ids=str)
def test_a_mixer_of_any_order_trains_with_dropped_patches(name, options):
    model = timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, patch_drop_rate=0.5, num_classes=3)
    attnzoo.replace_attention(model, name, **options).train()
    model(torch.randn(2, 3, 64, 64)).sum().backward()
    assert model.eval()(torch.randn(2, 3, 64, 64)).shape == (2, 3)


@pytest.mark.parametrize("name", ["padre", "mamba", "hyena", "linear_angular"])
@pytest.mark.parametrize("host", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_a_mixer_that_reads_the_order_is_refused_where_patches_are_dropped(name, host):
    options = {"use_rot_pos_emb": False} if "eva" in host else {}
    model = timm.create_model(host, depth=1, patch_drop_rate=0.5, num_classes=3, **options)
    with pytest.raises(UnsupportedError, match=r"patches are dropped in training \(patch_drop_rate\)"):
        attnzoo.replace_attention(model, name)
    attnzoo.replace_attention(timm.create_model(host, depth=1, num_classes=3, **options), name)


@pytest.mark.parametrize("bidirectional", [True, False])
def test_mamba_runs_with_quantized_linear_maps(bidirectional):
    torch.manual_seed(0)
    layer = attnzoo.create_attention("mamba", 16, 1, bidirectional=bidirectional).eval()
    x = torch.randn(2, 6, 16)
    expected = layer(x)
    quantized = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    assert (quantized(x) - expected).abs().max() < 0.1 * expected.abs().max()


def test_mamba_reads_what_stands_in_the_place_of_a_linear_map():
    class Doubled(nn.Linear):
        def forward(self, x):
            return super().forward(x) + 4.0

    torch.manual_seed(0)
    layer = attnzoo.create_attention("mamba", 16, 1, bidirectional=False).eval()
    x, own = torch.randn(2, 6, 16), layer.directions[0].dt_proj
    expected = layer(x)
    adapter = Doubled(own.in_features, own.out_features)
    adapter.load_state_dict(own.state_dict())
    layer.directions[0].dt_proj = adapter
    assert (layer(x) - expected).abs().max() > 1e-3
    with torch.no_grad():
        adapter.bias -= 4.0
    torch.testing.assert_close(layer(x), expected)
