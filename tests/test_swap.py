"""Contracts 2 to 4: atomic and reversible, no globals, causal; and what cannot be swapped is refused by name."""

import copy
import gc
import weakref
from typing import ClassVar

import pytest
import timm
import torch
import transformers
from timm.models.eva import EvaAttention
from torch import nn
from torch.nn.utils import parametrize
from torchvision.models import swin_t

import attnzoo
from attnzoo.errors import OptionError, SwapError, UnknownNameError, UnsupportedError
from attnzoo.swap import swapped_layers
from tests.zoo import HOSTS, LANGUAGE, RELATIVE, TIMM, TORCH, Host, images, seeded


def fingerprint(model: nn.Module) -> list:
    """What a refused swap must leave alone: modules, hooks, modes and weights, by identity."""
    return [
        (path, id(m), m.training, sorted(map(id, m._forward_pre_hooks.values())), [id(p) for p in m.parameters()])
        for path, m in model.named_modules()
    ] + [{k: v for k, v in vars(m).items() if isinstance(v, bool)} for m in model.modules()]


def vit(**options) -> nn.Module:
    return timm.create_model("vit_tiny_patch16_224", depth=2, img_size=64, num_classes=3, **options).eval()


# ---- reversible


@pytest.mark.parametrize("host", HOSTS, ids=str)
def test_restore_gives_the_very_same_modules(host: Host):
    model = seeded(host.build)
    before, out = fingerprint(model), host.call(model, host.inputs())
    for core in ("sdpa", "softmax"):  # the second swap replaces the first
        attnzoo.replace_attention(model, core)
    assert {r.attention for r in attnzoo.swap_report(model).swapped} == {"softmax"}
    attnzoo.restore_attention(model)
    assert fingerprint(model) == before
    assert torch.equal(host.call(model, host.inputs()), out)
    with pytest.raises(SwapError, match="nothing to restore"):
        attnzoo.restore_attention(model)


MIXER_HOSTS = [
    *((h, {}) for h in TIMM if "eva" not in h.name and "siglip" not in h.name),
    (TIMM[-1], {"where": "blocks.*"}),
    (TORCH[0], {}),
    (TORCH[1], {"grid": (4, 4)}),
]


@pytest.mark.parametrize(("host", "options"), MIXER_HOSTS, ids=lambda v: str(v) if isinstance(v, Host) else "")
def test_a_mixer_comes_and_goes(host: Host, options: dict):
    model = seeded(host.build)
    before, out = fingerprint(model), host.call(model, host.inputs())
    keys, n = list(model.state_dict()), sum(p.numel() for p in model.parameters())
    returned = attnzoo.replace_attention(model, "padre", degree=2, kernel_size=3, **options)
    assert returned is model
    report = attnzoo.swap_report(model)
    assert len(report.swapped) == 2
    assert report.reused == 0
    assert report.parameters_before == n
    assert report.parameters_after == sum(p.numel() for p in model.parameters())
    assert report.added == sum(p.numel() for k, p in model.named_parameters() if ".mixer." in k)
    assert not any("qkv" in k or "in_proj" in k for k in model.state_dict() if "pool" not in k)
    mixed = host.call(model, host.inputs())
    assert (mixed - out).abs().max() > 1e-3 * out.abs().max()
    mixed.sum().backward()
    for name, p in model.named_parameters():
        assert ".mixer." not in name or p.grad is not None, name
    attnzoo.replace_attention(model, "sdpa")  # from a mixer straight to a core
    assert not any(m._forward_pre_hooks for m in model.modules())  # nothing asks for a grid any more
    torch.testing.assert_close(host.call(model, host.inputs()), out, atol=1e-5, rtol=1e-5)
    attnzoo.restore_attention(model)
    assert fingerprint(model) == before
    assert list(model.state_dict()) == keys
    assert torch.equal(host.call(model, host.inputs()), out)


def test_the_original_is_outside_the_state_dict_but_follows():
    model = vit()
    original = model.blocks[0].attn
    attnzoo.replace_attention(model, "padre", kernel_size=3)
    assert not any(p is original.qkv.weight for p in model.parameters())
    model.double().train()
    assert original.qkv.weight.dtype == torch.float64
    twin = copy.deepcopy(model)
    assert attnzoo.restore_attention(twin).blocks[0].attn is not original
    assert twin.blocks[0].attn.qkv.weight.dtype == torch.float64
    assert len(swapped_layers(model)) == 2  # the copy's restore left the first alone
    assert attnzoo.restore_attention(model).blocks[0].attn is original
    assert original.training


def test_an_original_that_is_not_kept_is_freed():
    model = vit()
    original = weakref.ref(model.blocks[0].attn)
    attnzoo.replace_attention(model, "padre", keep_original=False, where="blocks.0.*")
    gc.collect()
    assert original() is None
    with pytest.raises(SwapError, match=r"keep_original=False.*blocks.0.attn"):
        attnzoo.restore_attention(model)
    before = fingerprint(model)
    with pytest.raises(UnsupportedError, match=r"blocks.0.attn: .*keep_original=False"):
        attnzoo.replace_attention(model, "sdpa")
    assert fingerprint(model) == before


def test_parameters_shared_by_two_layers_stay_shared():
    model = vit()
    model.blocks[1].attn = model.blocks[0].attn
    attnzoo.replace_attention(model, "padre", kernel_size=3)
    assert model.blocks[0].attn is model.blocks[1].attn
    assert len(attnzoo.swap_report(model).swapped) == 1
    attnzoo.restore_attention(model)
    assert model.blocks[0].attn is model.blocks[1].attn


def test_where_chooses_layers():
    model = vit()
    attnzoo.replace_attention(model, "padre", where="blocks.1")
    assert list(swapped_layers(model)) == ["blocks.1.attn"]
    attnzoo.replace_attention(model, "softmax", where=["blocks.0.*"])
    names = [r.attention for r in attnzoo.swap_report(model).layers]
    assert names == ["softmax", "padre"]
    assert "(its own)" not in str(attnzoo.swap_report(model))
    model(images())


def test_training_changes_survive_restore():
    """A core runs on the host's own weights: what it learned is there after restore."""
    model = vit()
    attnzoo.replace_attention(model, "softmax")
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(images()).square().sum().backward()
    optimizer.step()
    model.train()
    out = model.eval()(images())
    attnzoo.restore_attention(model)
    assert all(m.training is False for m in model.modules())
    torch.testing.assert_close(model(images()), out, atol=1e-4, rtol=1e-4)


# ---- no globals


def test_models_that_share_a_config_do_not_share_a_swap(zeros):
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64
    )
    a, b = transformers.LlamaForCausalLM(config).eval(), transformers.LlamaForCausalLM(config).eval()
    assert a.config is b.config
    ids = torch.arange(9)[None]
    before = b(ids).logits
    attnzoo.replace_attention(a, zeros)
    assert torch.equal(b(ids).logits, before)
    assert b.config._attn_implementation == a.config._attn_implementation == "sdpa"


def test_a_model_after_the_swap_is_untouched(zeros):
    attnzoo.replace_attention(seeded(TIMM[0].build), zeros)
    a, b = seeded(TIMM[0].build), seeded(TIMM[0].build)
    assert torch.equal(a(images()), b(images()))
    assert not swapped_layers(a)


# ---- causal


@pytest.mark.parametrize("core", ["softmax", "sdpa", "flash"])
@pytest.mark.parametrize("host", LANGUAGE, ids=str)
def test_later_tokens_change_no_earlier_output(host: Host, core: str):
    model = attnzoo.replace_attention(seeded(host.build), core)
    ids = host.inputs()["input_ids"][:1]
    base = model(ids).logits
    for t in (1, 8, 16):
        other = ids.clone()
        other[0, t] = (other[0, t] + 1) % 90 + 3
        out = model(other).logits
        torch.testing.assert_close(out[:, :t], base[:, :t], atol=1e-6, rtol=1e-5)
        assert (out[:, t:] - base[:, t:]).abs().max() > 1e-4


@pytest.mark.parametrize("core", ["softmax", "sdpa", "flash"])
@pytest.mark.parametrize("host", LANGUAGE, ids=str)
def test_generation_is_the_same(host: Host, core: str):
    model, inputs = seeded(host.build), host.inputs()
    options = {"max_new_tokens": 6, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}
    before = model.generate(**inputs, **options)
    after = attnzoo.replace_attention(model, core).generate(**inputs, **options)
    assert torch.equal(before.sequences, after.sequences)
    torch.testing.assert_close(torch.stack(before.logits), torch.stack(after.logits), atol=1e-5, rtol=1e-4)


def test_a_static_cache_works():
    model, ids = seeded(LANGUAGE[0].build), LANGUAGE[0].inputs()["input_ids"][:1]
    options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": "static", "disable_compile": True}
    before = model.generate(ids, **options)
    assert torch.equal(attnzoo.replace_attention(model, "softmax").generate(ids, **options), before)


def test_masks_follow_a_later_change_of_implementation():
    """After set_attn_implementation the model makes other masks: read right, or refused."""
    model, inputs = seeded(LANGUAGE[1].build), LANGUAGE[1].inputs()
    expected = model(**inputs).logits
    attnzoo.replace_attention(model, "softmax")
    model.set_attn_implementation("sdpa")
    ids = inputs["input_ids"][:1]  # no padding: an sdpa model leaves the mask out
    torch.testing.assert_close(model(ids).logits, expected[:1], atol=1e-5, rtol=1e-4)
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(UnsupportedError, match="set_attn_implementation"):
        model(ids)


# ---- refusals, each with the model untouched

SOFTCAPPED = transformers.Gemma2Config(
    vocab_size=50,
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    intermediate_size=64,
)


def t5() -> nn.Module:
    return transformers.T5Model(transformers.T5Config(vocab_size=50, d_model=32, d_ff=64, num_layers=1, num_heads=4))


def gpt_oss() -> nn.Module:
    config = transformers.GptOssConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        intermediate_size=32,
        num_local_experts=2,
        num_experts_per_tok=1,
        layer_types=["full_attention"],
    )
    return transformers.GptOssForCausalLM(config)


def deepseek() -> nn.Module:
    config = transformers.DeepseekV32Config(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        moe_intermediate_size=16,
        num_hidden_layers=1,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        index_topk=4,
        index_n_heads=2,
        index_head_dim=16,
    )
    return transformers.DeepseekV32ForCausalLM(config)


class Zed(timm.layers.Attention):
    def forward(self, x, attn_mask=None, is_causal=False):
        return x


def subclassed() -> nn.Module:
    model = vit()
    model.blocks[1].attn = Zed(192, 3)
    return model


def parametrized() -> nn.Module:
    model = mha()
    parametrize.register_parametrization(model[0], "in_proj_weight", nn.Identity())
    return model


def torch_layer(cls=nn.TransformerEncoderLayer, **options) -> nn.Module:
    return cls(32, 4, 64, batch_first=True, **options)


def mha(**options) -> nn.Module:
    return nn.ModuleList([nn.MultiheadAttention(32, 4, **options)])


REFUSALS = {
    "unknown name": (vit, "pader", {}, UnknownNameError, "did you mean 'padre'"),
    "no attention": (lambda: nn.Linear(4, 4), "sdpa", {}, SwapError, "found no attention"),
    "degree 0": (vit, "padre", {"degree": 0}, OptionError, "at least 1, not 0"),
    "degree three": (vit, "padre", {"degree": "three"}, OptionError, "not 'three'"),
    "unknown option": (vit, "padre", {"degre": 3}, OptionError, "did you mean 'degree'"),
    "where without a match": (vit, "padre", {"where": "layers.*"}, SwapError, "matches none of the 2"),
    "where of no pattern": (vit, "padre", {"where": []}, OptionError, "where must be"),
    "where of another type": (vit, "padre", {"where": [3]}, OptionError, "where must be"),
    "where a number": (vit, "padre", {"where": 3}, OptionError, "where must be"),
    "one pattern of two": (vit, "padre", {"where": ["blocks.0.*", "nope"]}, SwapError, "'nope' matches none"),
    "grid where it is known": (vit, "padre", {"grid": (4, 4)}, OptionError, "knows its own grid"),
    "a layer itself": (lambda: nn.MultiheadAttention(8, 2), "sdpa", {}, SwapError, "itself the attention layer"),
    "timm Swin": (
        lambda: timm.create_model("swin_tiny_patch4_window7_224"),
        "sdpa",
        {},
        UnsupportedError,
        r"layers.0.blocks.0.attn: WindowAttention: window shift and relative position bias",
    ),
    "torchvision Swin": (swin_t, "sdpa", {}, UnsupportedError, "window shift and relative position bias"),
    "BEiT": (lambda: timm.create_model("beit_base_patch16_224", depth=1), "sdpa", {}, UnsupportedError, "relative pos"),
    "CaiT": (lambda: timm.create_model("cait_xxs24_224", depth=1), "sdpa", {}, UnsupportedError, "talking heads"),
    "rotary and a mixer": (
        lambda: timm.create_model("eva02_tiny_patch14_224", depth=1),
        "padre",
        {},
        UnsupportedError,
        "rotary position embedding",
    ),
    "pooling and a mixer": (
        lambda: timm.create_model("vit_base_patch16_siglip_224", depth=2),
        "padre",
        {},
        UnsupportedError,
        r"attn_pool.*cross-attention(?s:.*)where='blocks\.\*'",
    ),
    "patch dropout and a grid": (
        lambda: vit(patch_drop_rate=0.5),
        "padre",
        {},
        UnsupportedError,
        "patch_drop_rate",
    ),
    "an encoder without a grid": (torch_layer, "padre", {}, UnsupportedError, "give grid="),
    "a grid that is none": (torch_layer, "padre", {"grid": 16}, OptionError, "two whole numbers"),
    "a prefix that is none": (torch_layer, "padre", {"grid": (4, 4), "prefix": -1}, OptionError, "at least 0"),
    "a decoder": (
        lambda: torch_layer(nn.TransformerDecoderLayer),
        "padre",
        {"grid": (4, 4)},
        UnsupportedError,
        r"self_attn.*causal(?s:.*)multihead_attn.*cross-attention",
    ),
    "keys of another width": (lambda: mha(kdim=8), "padre", {"grid": (4, 4)}, UnsupportedError, "cross-attention"),
    "an added key": (lambda: mha(add_zero_attn=True), "sdpa", {}, UnsupportedError, "add_zero_attn"),
    "added biases": (lambda: mha(add_bias_kv=True), "sdpa", {}, UnsupportedError, "add_bias_kv"),
    "causality": (
        LANGUAGE[0].build,
        "padre",
        {},
        UnsupportedError,
        r"layers.0.self_attn: LlamaAttention: causality",
    ),
    "a soft cap": (
        lambda: transformers.Gemma2ForCausalLM(SOFTCAPPED),
        "sdpa",
        {},
        UnsupportedError,
        "attn_logit_softcapping",
    ),
    "T5": (t5, "sdpa", {}, UnsupportedError, "relative position bias"),
    "learned sinks": (gpt_oss, "softmax", {}, UnsupportedError, "learned attention sinks"),
    "sparse attention": (deepseek, "softmax", {}, UnsupportedError, "sparse attention"),
    "a subclass of timm's": (lambda: subclassed(), "sdpa", {}, UnsupportedError, r"blocks.1.attn: Zed: no host"),
    "parametrized weights": (lambda: parametrized(), "sdpa", {}, UnsupportedError, "parametrized"),
    "channel attention": (lambda: timm.create_model("skresnet18"), "sdpa", {}, SwapError, "found no attention"),
    "an unknown class and a grid": (
        lambda: nn.Sequential(torch_layer(), MyAttention()),
        "padre",
        {"grid": (4, 4)},
        UnsupportedError,
        "1: MyAttention: no host",
    ),
    "another class": (
        lambda: nn.Sequential(torch_layer(), MyAttention()),
        "sdpa",
        {},
        UnsupportedError,
        r"1: MyAttention: no host(?s:.*)where='0\.\*'",
    ),
}


class MyAttention(nn.Module):
    def forward(self, x):
        return x


@pytest.mark.parametrize("case", REFUSALS)
def test_refused_clearly_and_untouched(case):
    build, name, options, error, said = REFUSALS[case]
    model = build()
    before = fingerprint(model)
    with pytest.raises(error, match=said) as caught:
        attnzoo.replace_attention(model, name, **options)
    assert isinstance(caught.value, attnzoo.AttnZooError)
    assert isinstance(caught.value, ValueError)
    assert fingerprint(model) == before


def test_the_hint_of_a_refusal_works():
    model = timm.create_model("vit_base_patch16_siglip_224", depth=1, embed_dim=48, num_heads=4, img_size=64).eval()
    attnzoo.replace_attention(model, "padre", where="blocks.*", kernel_size=3)
    assert model(images()).shape[0] == 2
    model = nn.Sequential(torch_layer(), MyAttention())
    attnzoo.replace_attention(model, "sdpa", where="0.*")


def test_a_soft_cap_is_honoured_by_the_core_that_can():
    model = transformers.Gemma2ForCausalLM(SOFTCAPPED).eval()
    ids = torch.arange(3, 20)[None]
    before = model(ids).logits
    torch.testing.assert_close(attnzoo.replace_attention(model, "softmax")(ids).logits, before, atol=1e-5, rtol=1e-4)


def test_a_forward_replaced_on_the_object_is_refused():
    model = vit()
    model.blocks[1].attn.forward = model.blocks[1].attn.forward
    with pytest.raises(UnsupportedError, match=r"blocks.1.attn.*on the object itself"):
        attnzoo.replace_attention(model, "sdpa")
    assert not swapped_layers(model)


def test_other_things_than_models_are_refused():
    with pytest.raises(SwapError, match=r"expected a torch.nn.Module, got dict"):
        attnzoo.replace_attention({}, "sdpa")


@pytest.mark.parametrize("model", [nn.Linear(4, 4), nn.Sequential()])
def test_a_report_of_nothing(model):
    report = attnzoo.swap_report(model)
    assert report.layers == ()
    assert "0 attention layers found" in str(report)


def test_the_report_reads():
    model = vit()
    attnzoo.replace_attention(model, "padre", degree=2, where="blocks.0.*")
    text = str(attnzoo.swap_report(model))
    assert "blocks.0.attn" in text
    assert "padre(degree=2)" in text
    assert "(its own)" in text
    assert "2 attention layers found, 1 swapped" in text


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
    """The bias comes as a mask that wants a gradient: refused in training, exact without."""
    model, x = seeded(RELATIVE.build), images()
    with torch.no_grad():
        expected = RELATIVE.call(model, x)
        attnzoo.replace_attention(model, "flash")
        torch.testing.assert_close(RELATIVE.call(model, x), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(UnsupportedError, match="wants a gradient"):
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
def test_a_mixer_in_torchs_encoder_honours_padding_and_refuses_the_rest(batch_first):
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
