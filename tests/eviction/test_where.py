"""Where a policy may stand in a model of transformers, beside what else, and what is refused."""

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache, StaticCache

import attnzoo
from attnzoo.errors import ShapeError, UnsupportedError
from attnzoo.eviction.cache import BoundedCache
from attnzoo.eviction.layers import BoundedLayer
from tests.eviction.models import (
    CACHE,
    TEXT,
    bounded,
    cache_of,
    language_model,
    token_ids,
)
from tests.zoo import fingerprint

pytestmark = pytest.mark.compat


def test_sliding_layers_keep_their_own_cache():
    """Only the full layers of a model that alternates are bounded, and the report says which are not."""
    kinds = ["sliding_attention", "full_attention"] * 2
    model = language_model("qwen2", num_hidden_layers=4, layer_types=kinds, use_sliding_window=True, sliding_window=12)
    ids = token_ids(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        attnzoo.replace_attention(model, "keydiff", budget=60, block_size=8)
        report = attnzoo.swap_report(model)
        assert [layer.attention for layer in report.layers] == [None, "keydiff", None, "keydiff"]
        assert "(its own; sliding window of 12: its cache is bounded already)" in str(report)
        torch.testing.assert_close(model(ids, attention_mask=mask).logits[:, 5:], expected[:, 5:], rtol=1e-9, atol=1e-9)
        attnzoo.replace_attention(model, "keydiff", budget=16, block_size=8)
        one = model(ids, attention_mask=mask)
        cache = cache_of(model(ids[:, :33], attention_mask=mask[:, :33]))
        two = model(ids[:, 33:], attention_mask=mask, **{CACHE: cache})
    torch.testing.assert_close(two.logits, one.logits[:, 33:], rtol=1e-9, atol=1e-9)
    kinds = [type(layer).__name__ for layer in cache.layers]
    assert kinds == ["DynamicSlidingWindowLayer", "BoundedLayer"] * 2
    assert [layer.keys.shape[2] for layer in cache.layers] == [11, 23, 11, 23]  # the padded row is at 55 tokens
    copied = cache.copy()
    assert torch.equal(copied.layers[0].keys, cache.layers[0].keys)


def alternating(host, **options):
    """A model whose layer 0 has a sliding window, by config, and layer 1 has none."""
    if host == "gemma3":
        config = transformers.Gemma3TextConfig(**TEXT, num_key_value_heads=2, head_dim=8, sliding_window=12, **options)
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).double().eval()
    return language_model(host, use_sliding_window=True, sliding_window=12, **options)


@pytest.mark.parametrize("host", ["gemma3", "qwen2"])
@pytest.mark.parametrize(
    ("first", "options"), [("padre", {"token_mixing": "causal_conv1d", "kernel_size": 4}), ("softmax", {})]
)
def test_a_policy_after_another_swap_leaves_sliding_layers_their_own_attention(host, first, options):
    kinds = {"layer_types": ["sliding_attention", "full_attention"]}
    model, ids = alternating(host, **kinds), token_ids(2, 40)
    fresh, before = copy.deepcopy(model), fingerprint(model)
    policy = {"budget": 16, "block_size": 8}
    attnzoo.replace_attention(fresh, "h2o", **policy)
    attnzoo.replace_attention(model, first, **options).train()
    with pytest.raises(UnsupportedError, match="nothing to evict"):
        attnzoo.replace_attention(model, "h2o", **policy, where="model.layers.0")
    assert [layer.attention for layer in attnzoo.swap_report(model).layers] == [first, first]
    attnzoo.replace_attention(model, "h2o", **policy)
    assert model.model.layers[0].self_attn.training
    assert str(attnzoo.swap_report(model)) == str(attnzoo.swap_report(fresh))
    with torch.no_grad():
        out, expected = model.eval()(ids), fresh(ids)
        assert torch.equal(out.logits, expected.logits)
        assert [type(layer) for layer in cache_of(out).layers] == [type(layer) for layer in cache_of(expected).layers]
    attnzoo.restore_attention(model)
    assert fingerprint(model) == before


def test_a_policy_in_chosen_layers_leaves_the_swaps_of_others():
    model = alternating("qwen2", layer_types=["sliding_attention", "full_attention"])
    attnzoo.replace_attention(model, "padre", token_mixing="causal_conv1d", kernel_size=4)
    attnzoo.replace_attention(model, "h2o", budget=16, where="model.layers.1")
    assert [layer.attention for layer in attnzoo.swap_report(model).layers] == ["padre", "h2o"]
    with torch.no_grad():
        assert model(token_ids(1, 40)).logits.isfinite().all()


def test_a_core_that_is_refused_leaves_the_mixers_of_an_earlier_swap():
    config = transformers.Gemma2Config(**TEXT, num_key_value_heads=2, head_dim=8, sliding_window=12)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    attnzoo.replace_attention(model, "padre", token_mixing="causal_conv1d", kernel_size=4)
    before = fingerprint(model)
    for name, options in {"sdpa": {}, "h2o": {"budget": 16}}.items():
        with pytest.raises(UnsupportedError, match="scores are capped"):
            attnzoo.replace_attention(model, name, **options)
        assert fingerprint(model) == before
        assert [layer.attention for layer in attnzoo.swap_report(model).layers] == ["padre", "padre"]


def test_the_core_must_be_able_to_stand_there():
    """Capped scores need a core that caps; the scores that policies see are capped too."""
    config = transformers.Gemma2Config(**TEXT, num_key_value_heads=2, head_dim=8, sliding_window=12)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = token_ids(2, 60)
    before = fingerprint(model)
    with pytest.raises(UnsupportedError, match=r"scores are capped .*'flash_scored' cannot do; core='softmax' can\n"):
        attnzoo.replace_attention(model, "h2o", budget=16)
    assert fingerprint(model) == before
    with torch.no_grad():
        expected = model(ids).logits
        attnzoo.replace_attention(model, "h2o", budget=60, block_size=8, core="softmax")
        torch.testing.assert_close(model(ids).logits, expected)
        assert cache_of(model(ids)).layers[1].store.softcap == model.config.attn_logit_softcapping


def test_a_cache_of_other_options_is_refused_by_their_names_but_for_the_core():
    ids = token_ids(2, 20)
    with torch.no_grad():
        cache = cache_of(bounded("snapkv", budget=8, block_size=4, window=4)(ids[:, :15]))
        with pytest.raises(
            UnsupportedError,
            match=r"layer 0 is of snapkv with recent=None, the model has 2; .*window=4, the model has 5; ",
        ):
            bounded("snapkv", budget=8, block_size=4, window=5, recent=2)(ids[:, 15:], **{CACHE: cache})
        same = bounded("snapkv", budget=8, block_size=4, window=4)(ids[:, 15:], **{CACHE: cache.copy()}).logits
        other = bounded("snapkv", budget=8, block_size=4, window=4, core="softmax")
        torch.testing.assert_close(other(ids[:, 15:], **{CACHE: cache}).logits, same)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_bounded_layer_gives_no_weights_and_the_others_do(implementation):
    """Layers without weights are left out of `attentions`, as by transformers' own sdpa."""
    ids, shown = token_ids(1, 9), 2 * (implementation == "eager")
    for where, left in {None: 0, "model.layers.0": shown // 2}.items():
        model = language_model()
        model.set_attn_implementation(implementation)
        assert len(model(ids, output_attentions=True).attentions) == shown
        attnzoo.replace_attention(model, "h2o", budget=16, where=where)
        assert len(model(ids, output_attentions=True).attentions) == left


def test_a_model_of_sliding_layers_alone_is_refused():
    model = language_model("mistral", sliding_window=16)
    with pytest.raises(UnsupportedError, match=r"sliding window of 16.* nothing to evict"):
        attnzoo.replace_attention(model, "keydiff", budget=16)


def test_part_of_a_model():
    """Dense and bounded layers side by side; the masks of the dense ones stay right."""
    ids = token_ids(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    model = language_model()
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
    for where in ("model.layers.0", "model.layers.1"):
        part = attnzoo.replace_attention(language_model(), "h2o", where=where, budget=60, block_size=8)
        with torch.no_grad():
            first = part(ids[:, :25], attention_mask=mask[:, :25])
            second = part(ids[:, 25:], attention_mask=mask, **{CACHE: cache_of(first)})
        logits = torch.cat([first.logits, second.logits], 1)
        torch.testing.assert_close(logits[:, 7:], expected[:, 7:], rtol=1e-6, atol=1e-6)
        assert [isinstance(layer, BoundedLayer) for layer in cache_of(second).layers].count(True) == 1
    both = language_model()
    attnzoo.replace_attention(both, "h2o", where="model.layers.0", budget=8, block_size=4)
    attnzoo.replace_attention(both, "keydiff", where="model.layers.1", budget=16, block_size=16)
    with torch.no_grad():
        cache = cache_of(both(ids))
    assert [(layer.name, layer.keys.shape[2]) for layer in cache.layers] == [("h2o", 8), ("keydiff", 28)]


def test_swap_and_restore():
    """No trace after a restore; a swap on top replaces the first; two models of one config do not share a swap."""
    ids = token_ids(1, 40)
    model = language_model()
    other = type(model)(model.config).eval().double()
    before = fingerprint(model)
    with torch.no_grad():
        expected, untouched = model(ids).logits, other(ids).logits
        attnzoo.replace_attention(model, "keydiff", budget=8, block_size=4)
        assert not torch.allclose(model(ids).logits, expected)
        assert torch.equal(other(ids).logits, untouched)
        assert type(cache_of(other(ids))) is DynamicCache
        attnzoo.replace_attention(model, "softmax")
        torch.testing.assert_close(model(ids).logits, expected)
        assert type(cache_of(model(ids))) is DynamicCache
        attnzoo.replace_attention(model, "h2o", budget=8, block_size=4)
        twin = copy.deepcopy(model)
        assert torch.equal(twin(ids).logits, model(ids).logits)
        attnzoo.restore_attention(model)
        assert fingerprint(model) == before
        assert torch.equal(model(ids).logits, expected)
        assert isinstance(cache_of(twin(ids)), BoundedCache)


def test_one_hook_however_many_swaps():
    model = bounded("keydiff", budget=8)
    attnzoo.replace_attention(model, "h2o", where="model.layers.0", budget=8)
    assert len(model.model._forward_pre_hooks) == 1
    attnzoo.replace_attention(model, "sdpa", where="model.layers.0")
    assert len(model.model._forward_pre_hooks) == 1
    attnzoo.replace_attention(model, "sdpa", where="model.layers.1")
    assert len(model.model._forward_pre_hooks) == 0


def test_encoders_and_others_are_refused():
    import timm

    small = {key: TEXT[key] for key in ("vocab_size", "num_hidden_layers", "num_attention_heads")}
    encoder = transformers.BertModel(transformers.BertConfig(**small, hidden_size=32, intermediate_size=48))
    layers = {f"{part}_{what}": 1 for part in ("encoder", "decoder") for what in ("layers", "ffn_dim")}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    bart = transformers.BartModel(transformers.BartConfig(vocab_size=53, d_model=32, **layers, **heads))
    vit = timm.create_model("vit_tiny_patch16_224", depth=2)
    layer = torch.nn.TransformerEncoderLayer(16, 2)
    for model, message in (
        (encoder, "not causal"),
        (bart, "decoder-only"),
        (vit, "causal models of transformers, not timm"),
        (layer, "causal models of transformers, not torch"),
    ):
        before = fingerprint(model)
        with pytest.raises(UnsupportedError, match=message):
            attnzoo.replace_attention(model, "keydiff", budget=16)
        assert fingerprint(model) == before


def test_what_a_call_cannot_have():
    """Each refused before anything is computed, and the model goes on as before."""
    model = bounded("keydiff", budget=16, block_size=8)
    ids = token_ids(2, 20)
    with torch.no_grad():
        expected = model(ids).logits
        with pytest.raises(UnsupportedError, match=r"mask of shape \(2, 1, 20, 20\) .* give a 2-D mask"):
            model(ids, attention_mask=torch.ones(2, 1, 20, 20, dtype=torch.bool))
        with pytest.raises(UnsupportedError, match=r"mask \(dict\)"):
            model(ids, attention_mask={"full_attention": None})
        with pytest.raises(ShapeError, match=r"attention_mask is \(2, 12\), .* it must be \(2, 20\)"):
            model(ids, attention_mask=torch.ones(2, 12))
        with pytest.raises(UnsupportedError, match="packed into one row"):
            model(ids, position_ids=torch.arange(10).repeat(2)[None].expand(2, -1))
        with pytest.raises(UnsupportedError, match="StaticCache cannot be bounded"):
            model(ids, **{CACHE: StaticCache(config=model.config, max_cache_len=64)})
        with pytest.raises(UnsupportedError, match="StaticCache cannot be bounded"):
            model.generate(ids, max_new_tokens=4, cache_implementation="static")
        with pytest.raises(UnsupportedError, match="offloaded"):
            model(ids, **{CACHE: _offloading(model)})
        filled = cache_of(language_model()(ids))
        with pytest.raises(UnsupportedError, match="filled by another model, or before the swap"):
            model(ids, **{CACHE: filled})
        mine = cache_of(model(ids))
        with pytest.raises(UnsupportedError, match="bounded by attnzoo and can only be used by a model swapped"):
            language_model()(ids, **{CACHE: mine})
        with pytest.raises(
            UnsupportedError,
            match=r"made by another swap.*keydiff with budget \d+, and the model has h2o with budget 16",
        ):
            bounded("h2o", budget=16, block_size=8)(ids, **{CACHE: cache_of(model(ids))})
        two = cache_of(model(ids[:, :9]))
        with pytest.raises(ShapeError, match="the cache holds 2 rows, the call has 1"):
            model(ids[:1, 9:], **{CACHE: two})
        torch.testing.assert_close(model(ids[:, 9:], **{CACHE: two}).logits, expected[:, 9:])
        with pytest.raises(UnsupportedError, match="is_causal=False"):
            model(ids, is_causal=False)
        hidden, angles = torch.randn(1, 3, 32, dtype=torch.float64), torch.zeros(1, 3, 8, dtype=torch.float64)
        with pytest.raises(UnsupportedError, match="was called without its model"):
            model.model.layers[0].self_attn(hidden, position_embeddings=(angles, angles))
        assert torch.equal(model(ids).logits, expected)


def _offloading(model):
    cache = DynamicCache(config=model.config)
    cache.offloading = True
    return cache


def test_checkpointing_wants_no_cache():
    model = bounded("keydiff", budget=16, block_size=8).train()
    model.gradient_checkpointing_enable()
    with pytest.raises(UnsupportedError, match="gradient checkpointing takes tokens in twice"):
        model(token_ids(1, 20), **{CACHE: DynamicCache()})


def test_models_that_cannot_be_bounded_are_refused():
    """At the swap where it shows there, at the first call else; never wrong in silence."""
    backwards = language_model("llama", is_causal=False)
    with pytest.raises(UnsupportedError, match="is_causal=False"):
        attnzoo.replace_attention(backwards, "keydiff", budget=16)
    small = {**TEXT, "num_key_value_heads": 2}
    for config, message in ((transformers.StableLmConfig(**small), "does not pass on further keyword arguments"),):
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
        before = fingerprint(model)
        with pytest.raises(UnsupportedError, match=message):
            attnzoo.replace_attention(model, "keydiff", budget=16)
        assert fingerprint(model) == before
    twice = transformers.AutoModelForCausalLM.from_config(transformers.DiffLlamaConfig(**small)).eval()

    def use():
        attnzoo.replace_attention(twice, "keydiff", budget=16)
        twice(token_ids(1, 20))

    # before it went through transformers' attention interface it was refused at the swap
    message = "other keys and values than it put into the cache|does not go through transformers' attention interface"
    with torch.no_grad(), pytest.raises(UnsupportedError, match=message):
        use()


def test_assisted_decoding_and_cropping_are_refused():
    model = bounded("keydiff", budget=16, block_size=8)
    ids = token_ids(1, 20).repeat(1, 2)
    with pytest.raises(ValueError, match=r"can(not)? be cropped"):  # from transformers 5.24 on, by its own check
        model.generate(ids, max_new_tokens=20, prompt_lookup_num_tokens=4, do_sample=False)
    with torch.no_grad():
        cache = cache_of(model(ids))
    with pytest.raises(UnsupportedError, match="cannot be cropped"):
        cache.crop(-3)
    assert not cache.layers[0].is_croppable


def test_a_refused_crop_leaves_the_layers_that_are_not_bounded_as_they_were():
    model = attnzoo.replace_attention(language_model(), "keydiff", budget=8, block_size=4, where="model.layers.1")
    ids = token_ids(1, 22)
    with torch.no_grad():
        expected = model(ids).logits[:, 20:]
        cache = cache_of(model(ids[:, :20]))
        with pytest.raises(UnsupportedError, match="cannot be cropped"):
            cache.crop(-2)
        torch.testing.assert_close(model(ids[:, 20:], **{CACHE: cache}).logits, expected)


@pytest.mark.parametrize("length", [1, 5])
def test_a_model_that_was_cast_is_not_taken_for_the_one_that_filled_the_cache(length):
    ids = token_ids(1, 20)
    model = bounded("h2o", dtype=torch.float32, budget=8, block_size=4)
    with torch.no_grad():
        cache = cache_of(model(ids[:, :15]))
        with pytest.raises(
            UnsupportedError, match=r"holds torch.float32 and the model gives torch.bfloat16: it was cast"
        ):
            model.bfloat16()(ids[:, 15 : 15 + length], **{CACHE: cache})
