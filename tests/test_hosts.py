"""What a swapped layer does when its host calls it: as the host's own would, or a refusal by name."""

import copy
from typing import ClassVar

import pytest
import timm
import torch
import transformers
from timm.models.eva import EvaAttention
from torch import nn

import attnzoo
from attnzoo.errors import UnsupportedError
from tests.zoo import LANGUAGE, RELATIVE, TIMM, TORCH, fingerprint, images, mha, seeded, torch_layer, vit

# ---- what a method is not capable of is refused when a call asks for it


class Spy(nn.Module):
    """A core that is a module without weights, and keeps what it was asked."""

    asked: ClassVar[list[dict]] = []

    def forward(self, q, k, v, **options):
        Spy.asked.append(options)
        return q[..., : v.shape[-1]]


@pytest.fixture
def spy():
    attnzoo.register_attention("spy", "core", Spy, capabilities=dict.fromkeys(("causal", "cross", "gqa"), True))
    attnzoo.register_attention(
        "able", "core", Spy, capabilities=dict.fromkeys(("causal", "mask", "cross", "gqa", "dropout"), True)
    )
    Spy.asked.clear()
    yield Spy.asked
    attnzoo.unregister_attention("spy")
    attnzoo.unregister_attention("able")


def test_a_core_without_masks_is_not_given_one(spy):
    host = TORCH[1]
    model = attnzoo.replace_attention(seeded(host.build), "spy")
    model(host.inputs()[0])
    with pytest.raises(UnsupportedError, match=r"'mask', which 'spy'"):
        host.call(model, host.inputs())
    model = attnzoo.replace_attention(vit(), "spy")
    with pytest.raises(UnsupportedError, match=r"'mask', which 'spy'"):
        model.blocks[0].attn(torch.randn(1, 17, 192), attn_mask=torch.ones(17, 17, dtype=torch.bool))
    model = attnzoo.replace_attention(seeded(LANGUAGE[0].build), "spy")
    with pytest.raises(UnsupportedError, match=r"'mask', which 'spy'"):
        model(**LANGUAGE[0].inputs())


def test_a_mixer_without_masks_is_not_given_padding():
    class Mean(nn.Module):
        def __init__(self, dim, num_heads):
            super().__init__()

        def forward(self, x, grid=None, prefix=0, mask=None):
            return x.mean(1, keepdim=True).expand_as(x)

    attnzoo.register_attention("maskless", "mixer", Mean)
    try:
        model = attnzoo.replace_attention(seeded(TORCH[1].build), "maskless")
        model(TORCH[1].inputs()[0])
        with pytest.raises(UnsupportedError, match=r"'mask', which 'maskless'"):
            TORCH[1].call(model, TORCH[1].inputs())
    finally:
        attnzoo.unregister_attention("maskless")


def test_the_hosts_dropout_reaches_the_core_in_training_alone(spy):
    llama = transformers.LlamaConfig(
        vocab_size=101, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64,
        attention_dropout=0.25,
    )  # fmt: skip
    cases = [
        (vit(attn_drop_rate=0.25), images()),
        (nn.TransformerEncoder(torch_layer(dropout=0.25), 1), torch.randn(2, 5, 32)),
        (transformers.LlamaForCausalLM(llama), torch.arange(9)[None]),
    ]
    for model, inputs in cases:
        attnzoo.replace_attention(model, "able")
        for training in (True, False):
            spy.clear()
            model.train(training)(inputs)
            assert {options["dropout"] for options in spy} == {0.25 if training else 0.0}
    with pytest.raises(UnsupportedError, match=r"'dropout', which 'flash'"):
        attnzoo.replace_attention(cases[0][0].train(), "flash")(images())


def test_a_core_that_is_a_module_leaves_nothing_behind(spy):
    model = vit()
    before, keys = fingerprint(model), list(model.state_dict())
    attnzoo.replace_attention(model, "able")
    assert list(model.state_dict()) == keys
    attnzoo.replace_attention(model, "sdpa")
    attnzoo.restore_attention(model)
    assert fingerprint(model) == before
    assert "core" not in dict(model.blocks[0].attn.named_children())


def test_a_core_with_weights_is_refused():
    class Weighted(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)

    attnzoo.register_attention("weighted", "core", Weighted)
    try:
        with pytest.raises(attnzoo.AttnZooError, match="register it as a mixer"):
            attnzoo.replace_attention(vit(), "weighted")
    finally:
        attnzoo.unregister_attention("weighted")


# ---- the calls of each host


def test_flash_and_a_learned_position_bias():
    """The bias comes as a mask that requires a gradient: refused in training, exact without."""
    model, x = seeded(RELATIVE.build), images()
    with torch.no_grad():
        expected = RELATIVE.call(model, x)
        attnzoo.replace_attention(model, "flash")
        torch.testing.assert_close(RELATIVE.call(model, x), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(UnsupportedError, match="requires a gradient"):
        RELATIVE.call(model, x)


def test_is_causal_alone_is_refused_as_torch_does():
    holder = attnzoo.replace_attention(mha(batch_first=True), "sdpa")
    x = torch.randn(1, 5, 32)
    with pytest.raises(UnsupportedError, match="give the attn_mask too"):
        holder[0](x, x, x, is_causal=True)


def test_a_mixer_takes_additive_padding_masks_of_any_depth():
    encoder = attnzoo.replace_attention(seeded(TORCH[1].build), "padre", grid=(4, 4), kernel_size=3)
    x, hidden = TORCH[1].inputs()
    expected = encoder(x, src_key_padding_mask=hidden)
    for low in (float("-inf"), -1e9):
        mask = torch.zeros(hidden.shape).masked_fill(hidden, low)
        torch.testing.assert_close(encoder(x, src_key_padding_mask=mask)[~hidden], expected[~hidden])


def test_eva_without_rotary_embedding_takes_a_mixer():
    model = timm.create_model("eva_large_patch14_196", depth=1, embed_dim=48, num_heads=4, img_size=56).eval()
    assert attnzoo.replace_attention(model, "padre", kernel_size=3)(images(56)).isfinite().all()
    with pytest.raises(UnsupportedError, match="rope"):
        model.blocks[0].attn(torch.randn(1, 17, 48), rope=torch.randn(16, 24))


def test_a_mixer_takes_the_dtype_and_device_of_its_layer():
    model = attnzoo.replace_attention(vit().double(), "padre", kernel_size=3)
    assert model(images().double()).dtype == torch.float64
    with torch.device("meta"):
        model = vit()
    attnzoo.replace_attention(model, "padre", kernel_size=3)
    assert {p.device.type for p in model.parameters()} == {"meta"}


class Holder(nn.Module):
    def __init__(self, attention: nn.Module):
        super().__init__()
        self.attention = attention
        for p in self.parameters():
            nn.init.normal_(p, std=0.3)
        self.eval()


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(
    "attention",
    [
        lambda: timm.layers.Attention(32, 4, qk_norm=True, scale_norm=True, gated=True, norm_layer=nn.LayerNorm),
        lambda: timm.layers.AttentionRope(32, 4, rotate_half=True, gated=True),
        lambda: timm.layers.AttentionRope(32, 4, qkv_fused=False, num_kv_heads=2, num_prefix_tokens=2),
        lambda: timm.layers.AttentionPoolLatent(
            32, num_heads=4, pos_embed="abs", feat_size=9, pool_type="avg", latent_len=2
        ),
        lambda: timm.layers.AttentionPoolLatent(32, num_heads=4, pool_type="", latent_len=3, qk_norm=True),
        lambda: EvaAttention(32, 4, qkv_bias_separate=True, scale_norm=False, rotate_half=True),
    ],
)  # fmt: skip
def test_timms_attention_layers_one_by_one(attention, fused):
    torch.manual_seed(0)
    holder = Holder(attention())
    holder.attention.fused_attn = fused
    calls = [{}]
    if hasattr(holder.attention, "num_prefix_tokens"):
        calls.append({"rope": torch.randn(9 - holder.attention.num_prefix_tokens, 16)})
    x = torch.randn(2, 9, 32)
    expected = [holder.attention(x, **call) for call in calls]
    for core in ("softmax", "flash"):
        attnzoo.replace_attention(holder, core)
        for call, want in zip(calls, expected, strict=True):
            torch.testing.assert_close(holder.attention(x, **call), want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kdim", [None, 24])
@pytest.mark.parametrize("bias", [True, False])
def test_multihead_attention_call_by_call(batch_first, kdim, bias):
    """Cross-attention, every kind of mask, weights, unbatched input: as torch's own."""
    torch.manual_seed(0)
    holder = nn.ModuleList([nn.MultiheadAttention(32, 4, bias=bias, kdim=kdim, vdim=kdim, batch_first=batch_first)])
    own = copy.deepcopy(holder).eval()
    holder.eval()
    q, k = torch.randn(2, 5, 32), torch.randn(2, 7, kdim or 32)
    float_mask = torch.randn(5, 7)
    hidden = torch.zeros(2, 7, dtype=torch.bool)
    hidden[1, 4:] = True
    cases = [
        {},
        {"key_padding_mask": hidden},
        {"attn_mask": float_mask},
        {"attn_mask": float_mask > 0.8},
        {"attn_mask": float_mask.expand(8, 5, 7) + torch.arange(8.0)[:, None, None], "key_padding_mask": hidden},
        {"attn_mask": (float_mask > 0.8), "key_padding_mask": hidden},
    ]
    for name in ("softmax", "sdpa"):
        attnzoo.replace_attention(holder, name)
        for case in cases:
            args = (q, k, k) if batch_first else (q.transpose(0, 1), k.transpose(0, 1), k.transpose(0, 1))
            for average in (True, False):
                expected, weights = own[0](*args, **case, average_attn_weights=average)
                out, found = holder[0](*args, **case, average_attn_weights=average)
                torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
                if name == "softmax":
                    torch.testing.assert_close(found, weights, atol=1e-5, rtol=1e-5)
                else:
                    assert found is None
        expected, _ = own[0](q[0], k[0], k[0], attn_mask=float_mask)
        torch.testing.assert_close(holder[0](q[0], k[0], k[0], attn_mask=float_mask)[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("batch_first", [True, False])
def test_a_mixer_in_torchs_encoder_honors_padding_and_refuses_the_rest(batch_first):
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=batch_first), 2).eval()
    attnzoo.replace_attention(encoder, "padre", grid=(3, 4), prefix=1, kernel_size=3)
    x = torch.randn(2, 13, 16)
    hidden = torch.zeros(2, 13, dtype=torch.bool)
    hidden[1, 7:] = True
    dirty = torch.where(hidden.unsqueeze(-1), 99.0, x)

    def run(tokens, **options):
        out = encoder(tokens if batch_first else tokens.transpose(0, 1), **options)
        return out if batch_first else out.transpose(0, 1)

    with torch.no_grad():  # where torch would take its fast path
        a, b = (run(t, src_key_padding_mask=hidden) for t in (x, dirty))
    torch.testing.assert_close(a[~hidden], b[~hidden])
    assert (run(x)[1] - a[1]).abs().max() > 1e-3
    layer = encoder.layers[0].self_attn
    with pytest.raises(UnsupportedError, match="attn_mask"):
        run(x, mask=torch.zeros(13, 13))
    with pytest.raises(UnsupportedError, match="cross-attention"):
        layer(x, x.clone(), x)
    one = x[0]  # unbatched
    torch.testing.assert_close(layer(one, one, one)[0], layer.mixer(x[:1], grid=(3, 4), prefix=1)[0])


def test_torch_goes_back_to_nested_tensors():
    encoder = seeded(TORCH[1].build)
    assert encoder.use_nested_tensor
    attnzoo.replace_attention(encoder, "sdpa", where="layers.1.*")
    assert not encoder.use_nested_tensor
    twin = copy.deepcopy(encoder)
    for model in (encoder, twin):
        attnzoo.restore_attention(model)
        assert model.use_nested_tensor


def test_weights_in_transformers():
    model = seeded(LANGUAGE[1].build)
    inputs = LANGUAGE[1].inputs()
    expected = model(**inputs, output_attentions=True).attentions
    found = attnzoo.replace_attention(model, "softmax")(**inputs, output_attentions=True).attentions
    real = inputs["attention_mask"].bool()
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.transpose(1, 2)[real], b.transpose(1, 2)[real], atol=1e-5, rtol=1e-4)


def test_timm_attention_masks_and_causality():
    model = seeded(TIMM[0].build)
    tokens = torch.randn(2, 17, 192)
    attention = model.blocks[0].attn
    mask = torch.rand(2, 1, 17, 17) > 0.3
    cases = [{"attn_mask": mask}, {"attn_mask": torch.randn(17, 17)}, {"is_causal": True}]
    expected = [attention(tokens, **case) for case in cases]
    for name in ("softmax", "sdpa", "flash"):
        attnzoo.replace_attention(model, name)
        for case, want in zip(cases, expected, strict=True):
            torch.testing.assert_close(model.blocks[0].attn(tokens, **case), want, atol=1e-5, rtol=1e-4)
    attnzoo.replace_attention(model, "padre")
    for case in cases:
        with pytest.raises(UnsupportedError, match="attn_mask"):
            model.blocks[0].attn(tokens, **case)


@pytest.mark.parametrize("options", [{"fused_attn": False}, {"qk_norm": True, "scale_attn_norm": True}])
def test_timms_variants(options):
    torch.manual_seed(0)
    fused = options.pop("fused_attn", True)
    model = vit(**options)
    for block in model.blocks:
        block.attn.fused_attn = fused
    before = model(images())
    torch.testing.assert_close(attnzoo.replace_attention(model, "softmax")(images()), before, atol=1e-5, rtol=1e-4)


def test_a_mixer_reads_the_grid_of_each_call():
    torch.manual_seed(0)
    model = vit(dynamic_img_size=True)
    attnzoo.replace_attention(model, "padre", kernel_size=3)
    wide, tall = torch.randn(1, 3, 32, 96), torch.randn(1, 3, 96, 32)
    assert model.blocks[0].attn.grid is model.blocks[1].attn.grid
    for x, grid in ((wide, (2, 6)), (tall, (6, 2)), (wide, (2, 6))):
        model(x)
        assert model.blocks[0].attn.grid.size == grid
    with pytest.raises(attnzoo.errors.ShapeError, match="call the whole model"):
        model.blocks[0](torch.randn(1, 5, 192))


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "deit_tiny_distilled_patch16_224"]
)
def test_patches_reach_the_class_token_in_a_real_model(name):
    torch.manual_seed(0)
    model = timm.create_model(name, depth=1, img_size=112, num_classes=3).eval()
    attnzoo.replace_attention(model, "padre", kernel_size=3)
    x = torch.randn(1, 3, 112, 112, requires_grad=True)
    (model.forward_features(x)[0, 0] * torch.randn(model.embed_dim)).sum().backward()
    patches = x.grad[0].abs().sum(0).unfold(0, 14, 14).unfold(1, 14, 14).sum((-1, -2))
    assert (patches > 0).all()
