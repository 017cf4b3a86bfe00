"""Contracts 2 to 4: atomic and reversible, no globals, causal; and what cannot be swapped is refused by name."""

import copy
import functools
import gc
import warnings
import weakref
from types import SimpleNamespace

import pytest
import timm
import torch
import transformers
from torch import nn
from torch.nn.utils import parametrize
from torchvision.models import VisionTransformer, swin_t

import attnzoo
from attnzoo.errors import OptionError, ShapeError, SwapError, UnknownNameError, UnsupportedError
from attnzoo.hosts.standing import attends
from attnzoo.hosts.torch import NestedTensors
from attnzoo.swap import _pattern, swapped_layers
from tests.zoo import HOSTS, LANGUAGE, TIMM, TORCH, Host, fingerprint, images, mha, seeded, torch_layer, vit

pytestmark = pytest.mark.compat

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
    assert report.parameters_before - report.removed + report.added == report.parameters_after
    assert f"(reused 0, removed {report.removed:,}, added {report.added:,})" in str(report)
    assert not any("qkv" in k or "in_proj" in k for k in model.state_dict() if "pool" not in k)
    mixed = host.call(model, host.inputs())
    assert (mixed - out).abs().max() > 1e-3 * out.abs().max()
    mixed.sum().backward()
    for name, p in model.named_parameters():
        assert ".mixer." not in name or p.grad is not None, name
    attnzoo.replace_attention(model, "sdpa")  # from a mixer straight to a core
    hooks = {type(hook) for m in model.modules() for hook in m._forward_pre_hooks.values()}
    assert hooks <= {NestedTensors}  # nothing asks for a grid any more
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
    "weights for other tokens": (
        vit,
        "padre",
        {"token_mixing": "dense", "tokens": 16},
        UnsupportedError,
        r"it has 17 tokens, 1 of them before the grid, and the mixer would be made for 16: give tokens=17 \(and 1 more",
    ),
    "an MLP over other tokens": (
        lambda: vit(class_token=False, global_pool="avg"),
        "mlp_mixer",
        {"tokens": 17},
        UnsupportedError,
        "it has 16 tokens, and the mixer would be made for 17",
    ),
    "an encoder of torch of other tokens": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2), 1),
        "padre",
        {"output": "element_sum", "tokens": 12, "grid": (3, 4), "prefix": 2},
        UnsupportedError,
        "it has 14 tokens, 2 of them before the grid",
    ),
    "torchvision's ViT of other tokens": (
        lambda: VisionTransformer(32, 8, 1, 2, 16, 32),
        "mlp_mixer",
        {"tokens": 16},
        UnsupportedError,
        "it has 17 tokens",
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
    "T5": (t5, "sdpa", {}, UnsupportedError, "relative position bias|attention interface"),  # the second on 5.10
    "learned sinks": (gpt_oss, "softmax", {}, UnsupportedError, "learned attention sinks"),
    "sparse attention": (deepseek, "softmax", {}, UnsupportedError, "sparse attention"),
    "a subclass of timm's": (
        lambda: subclassed(),
        "sdpa",
        {},
        UnsupportedError,
        r"blocks.1.attn: Zed: attnzoo does not know",
    ),
    "parametrized weights": (lambda: parametrized(), "sdpa", {}, UnsupportedError, "parametrized"),
    "channel attention": (lambda: timm.create_model("skresnet18"), "sdpa", {}, SwapError, "found no attention"),
    "an unknown class and a grid": (
        lambda: nn.Sequential(torch_layer(), MyAttention()),
        "padre",
        {"grid": (4, 4)},
        UnsupportedError,
        "1: MyAttention: attnzoo does not know",
    ),
    "another class": (
        lambda: nn.Sequential(torch_layer(), MyAttention()),
        "sdpa",
        {},
        UnsupportedError,
        r"1: MyAttention: attnzoo does not know(?s:.*)where='0\.\*'",
    ),
}


@pytest.mark.parametrize(
    ("paths", "others", "pattern"),
    [
        (["a.0.attn", "a.1.attn"], ["b.0.attn"], "a.*"),
        (["a.0.self_attn", "b.0.self_attn"], ["b.0.cross", "b.0.cross.inner"], "*.self_attn"),
        (["a.x", "b.y"], ["c"], ["a.x", "b.y"]),
        (["a.x", "b.y"], ["a.z.x", "b.y.z"], ["a.x", "b.y"]),
        (["x"], ["y"], ["x"]),
    ],
)
def test_the_pattern_that_is_offered_fits_no_layer_that_was_refused(paths, others, pattern):
    assert _pattern(paths, others) == pattern


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


def test_a_soft_cap_is_honored_by_the_core_that_can():
    model = transformers.Gemma2ForCausalLM(SOFTCAPPED).eval()
    ids = torch.arange(3, 20)[None]
    before = model(ids).logits
    torch.testing.assert_close(attnzoo.replace_attention(model, "softmax")(ids).logits, before, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("core", ["sdpa", "flash"])
def test_a_refused_core_names_those_that_can(core):
    model = transformers.Gemma2ForCausalLM(SOFTCAPPED).eval()
    with pytest.raises(UnsupportedError, match=rf"scores are capped .*, which '{core}' cannot do; 'softmax' can\n"):
        attnzoo.replace_attention(model, core)
    training = attnzoo.replace_attention(vit(attn_drop_rate=0.25).train(), "flash")
    with pytest.raises(UnsupportedError, match=r"'flash' cannot do; 'softmax' or 'sdpa' or 'flash_scored' can$"):
        training(images())


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


# ---- attention that no host knows

UNKNOWN = {
    "convit_tiny": "GPSA: it computes attention, but attnzoo does not know this class",
    "shvit_s1": "SHSA: it computes attention, but attnzoo does not know this class",
}
WRAPPED = {
    "cait_xxs24_224": r"blocks\.0\.attn: TalkingHeadAttn: talking heads",
    "xcit_nano_12_p16_224": r"blocks\.0\.attn: XCA: cross-covariance attention",
    "botnet26t_256": r"stages\.2\.1\.self_attn: BottleneckAttn: relative position bias",
    "halonet26t": r"stages\.2\.1\.self_attn: HaloAttn: windows with relative position bias",
    "volo_d1_224": r"network\.0\.0\.attn: OutlookAttention: outlook attention",
}


@pytest.mark.parametrize("name", [*UNKNOWN, *WRAPPED])
def test_layers_that_attend_are_refused_with_the_reason_of_the_layer_itself(name):
    model = timm.create_model(name)
    with pytest.raises(UnsupportedError, match={**UNKNOWN, **WRAPPED}[name]) as caught:
        attnzoo.replace_attention(model, "sdpa")
    assert "Block" not in str(caught.value), "a block that holds the layer is not a layer"


@pytest.mark.parametrize("name", ["efficientnet_b0", "skresnet18", "resnest14d", "mixer_s32_224", "convnext_atto"])
def test_gates_and_classifiers_do_not_attend(name):
    model = timm.create_model(name)
    assert not any(attends(module) for module in model.modules())


class Unknown(nn.Module):
    """Attention by another name."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.normalize = nn.Softmax(-1)

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self.normalize(q @ k.mT) @ v


class Fused(Unknown):
    """The same, by torch's own function."""

    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, -1))


def attend(q, k, v):
    """Attention in a function of the module."""
    return nn.functional.scaled_dot_product_attention(q, k, v)


def scale_by_hand(q, k, v):
    return torch.softmax(q @ k.mT, -1) @ v


class Helped(Unknown):
    """The same, by a function."""

    def forward(self, x):
        return attend(*self.qkv(x).chunk(3, -1))


class ByHand(Unknown):
    """The same, by another function, in a method that forward calls."""

    normalize = None

    def __init__(self):
        nn.Module.__init__(self)
        self.qkv = nn.Linear(16, 48)

    def forward(self, x):
        return self.mix(self.qkv(x))

    def mix(self, qkv):
        return scale_by_hand(*qkv.chunk(3, -1))


class Packed(ByHand):
    """The same, by a kernel of another library."""

    def mix(self, qkv):
        return xformers.ops.memory_efficient_attention(*qkv.chunk(3, -1))


class Varlen(ByHand):
    """The same, by yet another."""

    def mix(self, qkv):
        return flash_attn.flash_attn_varlen_func(*qkv.chunk(3, -1))


xformers = flash_attn = SimpleNamespace(
    ops=SimpleNamespace(memory_efficient_attention=attend), flash_attn_varlen_func=attend
)


class Gate(nn.Module):
    """A softmax and no attention, in a method that wraps a function without Python code."""

    @functools.wraps(torch.softmax)
    def forward(self, x):
        return torch.softmax(x, -1)


def test_a_method_that_wraps_a_function_without_python_code_is_skipped():
    assert not attends(Gate())


@pytest.mark.parametrize("unknown", [Unknown, Fused, Helped, ByHand, Packed, Varlen])
def test_a_swap_says_what_attention_it_leaves_standing(unknown):
    model = nn.Sequential(torch_layer(), unknown(), unknown())
    with pytest.warns(
        UserWarning, match=rf"leaves some attention unchanged: 2 of {unknown.__name__} .*, the first at 1:"
    ):
        attnzoo.replace_attention(model, "sdpa")
    report = attnzoo.swap_report(model)
    assert [layer.path for layer in report.swapped] == ["0.self_attn"]
    assert [layer.path for layer in report.standing] == ["1", "2"]
    assert f"left alone: 2 of {unknown.__name__}" in str(report)
    attnzoo.restore_attention(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attnzoo.replace_attention(model, "sdpa", where="0")
        attnzoo.replace_attention(model, "sdpa", where="*")
    with pytest.raises(UnsupportedError, match=f"1: {unknown.__name__}: it computes attention, but"):
        attnzoo.replace_attention(model, "sdpa", where="1")


@pytest.mark.parametrize(("name", "options"), [("mlp_mixer", {}), ("padre", {"token_mixing": "dense"})])
def test_images_of_any_size_leave_the_number_of_tokens_open(name, options):
    """What a mixer is made for is then a matter of the call."""
    model = vit(dynamic_img_size=True)
    with pytest.raises(UnsupportedError, match="it has 17 tokens"):
        attnzoo.replace_attention(vit(), name, tokens=10, **options)
    attnzoo.replace_attention(model, name, tokens=10, **options)
    assert model(torch.randn(1, 3, 48, 48)).shape[0] == 1
    with pytest.raises(ShapeError):
        model(torch.randn(1, 3, 64, 64))
