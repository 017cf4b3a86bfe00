"""Calls that break off, and arguments that a swapped model reads as the dense one would, or refuses."""

import copy
import gc

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers import DynamicCache

import attnzoo
from attnzoo.errors import UnsupportedError
from attnzoo.eviction.cache import BoundedCache
from tests.eviction.models import CACHE, TEXT, bounded, cache_of, language_model, token_ids

pytestmark = pytest.mark.compat

CAUSAL = {"token_mixing": "causal_conv1d", "kernel_size": 4}
SWAPS = {
    "policy": lambda: bounded("keydiff", budget=16, block_size=8),
    "causal mixer": lambda: attnzoo.replace_attention(language_model(), "padre", **CAUSAL),
    "one layer": lambda: attnzoo.replace_attention(
        language_model(), "h2o", budget=16, block_size=8, where="model.layers.0"
    ),
}
BREAKS = {
    "before any layer": ("model.layers.0.input_layernorm", RuntimeError("out of memory")),
    "between layers": ("model.layers.1.input_layernorm", RuntimeError("out of memory")),
    "an interrupt between layers": ("model.layers.1.input_layernorm", KeyboardInterrupt()),
    "an interrupt before any": ("model.layers.0.input_layernorm", KeyboardInterrupt()),
}


def breaking(model, name, error):
    """Have the next call break off where the module `name` begins."""

    def raise_it(*args):
        handle.remove()
        raise error

    handle = model.get_submodule(name).register_forward_pre_hook(raise_it)


@pytest.mark.parametrize("swap", SWAPS)
@pytest.mark.parametrize("where", BREAKS)
def test_a_call_is_whole_or_refused_at_the_next(swap, where):
    model, ids = SWAPS[swap](), token_ids(2, 30)
    name, error = BREAKS[where]
    with torch.no_grad():
        expected = model(ids).logits
        cache = cache_of(model(ids[:, :20]))
        kept = cache.copy()
        breaking(model, name, error)
        with pytest.raises(type(error)):
            model(ids[:, 20:], **{CACHE: cache})
        if "between" in where:
            for broken in (cache, cache.copy(), copy.deepcopy(cache)):
                with pytest.raises(UnsupportedError, match=r"broke off .* have seen 20 and 30 tokens; .* copy\(\)"):
                    model(ids[:, 20:], **{CACHE: broken})
        else:
            torch.testing.assert_close(model(ids[:, 20:], **{CACHE: cache}).logits, expected[:, 20:])
        torch.testing.assert_close(model(ids[:, 20:], **{CACHE: kept}).logits, expected[:, 20:])


def test_a_call_that_breaks_off_within_a_layer_is_refused(monkeypatch):
    model, ids = bounded("keydiff", budget=16, block_size=8), token_ids(1, 30)
    with torch.no_grad():
        cache = cache_of(model(ids[:, :20]))
        breaking(model, "model.layers.1.self_attn.o_proj", RuntimeError("after the last layer took its tokens"))
        with pytest.raises(RuntimeError, match="after the last"):
            model(ids[:, 20:], **{CACHE: cache})
        assert cache.get_seq_length() == 30, "the call is whole as far as the cache goes"
        layer = cache.layers[1]
        monkeypatch.setattr(layer, "taken", lambda tokens: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(ids[:, :1], **{CACHE: cache})
        monkeypatch.undo()
        with pytest.raises(UnsupportedError, match="broke off"):
            model(ids[:, :1], **{CACHE: cache})


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=repr)
def test_after_a_call_that_broke_off_no_other_model_can_use_the_cache(error):
    model, ids = bounded("keydiff", budget=16, block_size=8), token_ids(1, 30)
    with torch.no_grad():
        cache = cache_of(model(ids[:, :20]))
        breaking(model, "model.layers.0.input_layernorm", error)
        with pytest.raises(type(error)):
            model(ids[:, 20:], **{CACHE: cache})
        error.__traceback__ = None
        gc.collect()
        with pytest.raises(UnsupportedError, match="bounded by attnzoo and can only be used by a model swapped"):
            language_model()(ids[:, 20:], **{CACHE: cache})


def test_beams_and_cut_prompts_go_on_from_whole_calls_alone(tmp_path):
    model, ids = bounded("snapkv", budget=16, block_size=8), token_ids(2, 24)
    with torch.no_grad():
        cache = cache_of(model(ids))
        breaking(model, "model.layers.1.mlp", RuntimeError("out of memory"))
        breaking(model, "model.layers.1.input_layernorm", RuntimeError("out of memory"))
        with pytest.raises(RuntimeError):
            model.generate(ids, max_new_tokens=3, num_beams=2, **{CACHE: DynamicCache()})
        model.model.layers[1].mlp._forward_pre_hooks.clear()
        breaking(model, "model.layers.1.input_layernorm", RuntimeError("out of memory"))
        with pytest.raises(RuntimeError):
            model(ids[:, :4], **{CACHE: cache})
        cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(UnsupportedError, match="broke off"):
            model(ids[:, :4], **{CACHE: cache})
        with pytest.raises(UnsupportedError, match="broke off"):
            cache.save(tmp_path / "cache.pt")
        assert not (tmp_path / "cache.pt").exists()


@pytest.mark.parametrize("swap", SWAPS)
def test_a_prompt_that_generate_cuts_is_whole_or_refused(swap):
    """With `prefill_chunk_size` generate itself calls the model once per chunk."""
    model, ids = SWAPS[swap](), token_ids(2, 24)
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=4, do_sample=False)
        found = model.generate(ids, max_new_tokens=4, do_sample=False, prefill_chunk_size=7)
        assert torch.equal(found, expected)
        mine, calls = DynamicCache(), []

        def break_the_second_chunk(*args):
            calls.append(1)
            if len(calls) == 2:
                raise RuntimeError("out of memory")

        handle = model.get_submodule("model.layers.1.input_layernorm").register_forward_pre_hook(break_the_second_chunk)
        with pytest.raises(RuntimeError, match="out of memory"):
            model.generate(ids, max_new_tokens=4, prefill_chunk_size=7, **{CACHE: mine})
        handle.remove()
        with pytest.raises(UnsupportedError, match=r"broke off .* have seen 7 and 14 tokens"):
            model(ids[:, 14:], **{CACHE: mine})
        assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, prefill_chunk_size=7), expected)


# ---- arguments


@pytest.mark.parametrize("swap", SWAPS)
def test_masks_of_other_numbers_than_0_and_1_are_refused(swap):
    model, ids = SWAPS[swap](), token_ids(2, 12)
    mask = torch.ones(2, 12, dtype=torch.long)
    mask[0, :4] = 0
    additive = torch.zeros(2, 12).masked_fill(mask == 0, float("-inf"))
    with torch.no_grad():
        expected = model(ids, attention_mask=mask).logits
        for same in (mask.float(), mask.bfloat16(), mask.bool(), mask.to(torch.uint8)):
            assert torch.equal(model(ids, attention_mask=same).logits, expected)
        wrong = [additive, additive.clamp(min=-1e9), additive.exp() * 0.5, mask * 2, -mask, mask / 0.0]
        for other in wrong:
            for given in ({}, {"use_cache": False}):
                with pytest.raises(UnsupportedError, match="1 where a token is real and 0 where it is padding"):
                    model(ids, attention_mask=other, **given)
        first = model(ids[:, :8], attention_mask=mask[:, :8])
        with pytest.raises(UnsupportedError, match="1 where a token is real"):
            model(ids[:, 8:], attention_mask=additive, **{CACHE: cache_of(first)})
        second = model(ids[:, 8:], attention_mask=mask.float(), **{CACHE: cache_of(first)})
        torch.testing.assert_close(second.logits[1], expected[1, 8:])


@pytest.mark.parametrize("swap", SWAPS)
def test_padding_is_told_when_its_tokens_come(swap, tmp_path):
    model, ids = SWAPS[swap](), token_ids(2, 30)
    late = torch.ones(2, 30, dtype=torch.long)
    late[1, :5] = 0
    with torch.no_grad():
        cache = cache_of(model(ids[:, :20]))
        with pytest.raises(UnsupportedError, match="other padding among the tokens seen before"):
            model(ids[:, 20:], attention_mask=late, **{CACHE: cache})
        told = cache_of(model(ids[:, :20], attention_mask=late[:, :20]))
        other = late.clone()
        other[1, 4], other[0, 0] = 1, 0
        with pytest.raises(UnsupportedError, match="other padding"):
            model(ids[:, 20:], attention_mask=other, **{CACHE: told})
        swapped = told.copy()
        swapped.reorder_cache(torch.tensor([1, 0]))
        expected = model(ids[:, 20:], attention_mask=late, **{CACHE: told}).logits
        found = model(ids[[1, 0], 20:], attention_mask=late[[1, 0]], **{CACHE: swapped}).logits
    torch.testing.assert_close(found[[1, 0]], expected)


@pytest.mark.parametrize("positions", [[[0, 0, 1, 2]], [[0, 1, 5, 6]], [[0, 1, 0, 1]]])
@pytest.mark.parametrize("swap", ["policy", "causal mixer"])
def test_sequences_packed_into_a_row_are_refused_by_the_hosts_own_rule(swap, positions):
    model, ids = SWAPS[swap](), token_ids(1, 4)
    with torch.no_grad(), pytest.raises(UnsupportedError, match="packed into one row"):
        model(ids, position_ids=torch.tensor(positions), use_cache=False)


@pytest.mark.parametrize("positions", [[[3, 4, 5, 6]], [[0, 0, 1, 2]], [[0, 1, 5, 6]]])
def test_positions_that_the_host_takes_for_one_sequence_are_taken(positions):
    """With a cache the host reads positions as they are."""
    dense, model, ids = language_model(), bounded("keydiff", budget=64), token_ids(1, 4)
    at = torch.tensor(positions)
    with torch.no_grad():
        torch.testing.assert_close(model(ids, position_ids=at).logits, dense(ids, position_ids=at).logits)
        if positions[0][0] == 3:
            found = model(ids, position_ids=at, use_cache=False).logits
            torch.testing.assert_close(found, dense(ids, position_ids=at, use_cache=False).logits)


def _mrope(kind: str) -> nn.Module:
    """A language model whose positions have several axes: of time, height and width."""
    config = getattr(transformers, f"{kind}TextConfig")(
        **TEXT, num_key_value_heads=2, head_dim=8, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]}
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}TextModel")(config).eval()


TWICE, ONCE, JUMP = [0, 1, 2, 3, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 3, 3, 3, 4]
ROWS, COLUMNS = [0, 1, 2, 2, 3, 3, 4, 5], [0, 1, 2, 3, 2, 3, 4, 5]  # of a text with an image of 2 x 2 in it


@pytest.mark.parametrize("kind", ["Qwen2VL", "Qwen3VL"])
@pytest.mark.parametrize("cached", [False, True])
def test_sequences_packed_into_a_row_are_refused_where_positions_have_axes(kind, cached):
    model = attnzoo.replace_attention(_mrope(kind), "keydiff", budget=32)
    ids = token_ids(1, 8)

    def call(*axes: list[int]) -> Tensor:
        positions = torch.tensor(axes)[:, None]
        with torch.no_grad():
            return model(ids, position_ids=positions, use_cache=cached).last_hidden_state

    for axes in ([TWICE] * 4, [TWICE] * 3, [TWICE, *[ONCE] * 3]):
        with pytest.raises(UnsupportedError, match="packed into one row"):
            call(*axes)
    if not cached:
        with pytest.raises(UnsupportedError, match="packed into one row"):
            call(JUMP, ONCE, ONCE, ONCE)
    dense = _mrope(kind)
    for axes in ([ONCE, JUMP, ROWS, COLUMNS], [JUMP, ROWS, COLUMNS], [ONCE] * 3):
        with torch.no_grad():
            expected = dense(ids, position_ids=torch.tensor(axes)[:, None], use_cache=cached).last_hidden_state
        torch.testing.assert_close(call(*axes), expected)


SLIDING = {
    **{**TEXT, "num_hidden_layers": 4, "hidden_size": 32},
    "num_key_value_heads": 2,
    "head_dim": 8,
    "sliding_window": 12,
    "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "sliding_attention"],
}


@pytest.mark.parametrize(
    "config",
    [transformers.Gemma3TextConfig, transformers.Cohere2Config, transformers.Exaone4Config],
    ids=lambda c: c.__name__,
)
def test_an_empty_cache_without_a_config_keeps_sliding_layers_bounded(config):
    model = transformers.AutoModelForCausalLM.from_config(config(**SLIDING), attn_implementation="sdpa").eval()
    attnzoo.replace_attention(model, "keydiff", budget=16, block_size=8)
    ids = token_ids(1, 100)
    with torch.no_grad():
        mine = DynamicCache()
        model(ids[:, :90], **{CACHE: mine})
        model(ids[:, 90:], **{CACHE: mine})
        own = model(ids[:, 90:], **{CACHE: cache_of(model(ids[:, :90]))})
    held = [layer.keys.shape[2] for layer in mine.layers]
    assert held == [layer.keys.shape[2] for layer in cache_of(own).layers] == [11, 11, 20, 11]


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"attention_mask": torch.ones(2, 1, 20, 20)}, "give a 2-D mask"),
        ({"position_ids": torch.arange(10).repeat(2)[None].expand(2, -1)}, "packed"),
        ({"is_causal": False}, "is_causal=False"),
    ],
    ids=["mask", "positions", "not causal"],
)
def test_a_refused_call_leaves_the_users_cache_as_it_was(arguments, error):
    model, ids, mine = bounded("keydiff", budget=16, block_size=8), token_ids(2, 20), DynamicCache()
    with torch.no_grad(), pytest.raises(UnsupportedError, match=error):
        model(ids, **{CACHE: mine}, **arguments)
    assert type(mine) is DynamicCache
    with torch.no_grad():
        dense = language_model()
        assert torch.equal(dense(ids, **{CACHE: mine}).logits, dense(ids).logits)


@pytest.mark.parametrize("swap", SWAPS)
def test_a_cache_in_use_says_so(swap):
    model, mine = SWAPS[swap](), DynamicCache()
    with torch.no_grad():
        model(token_ids(1, 5), **{CACHE: mine})
    assert isinstance(mine, BoundedCache)
    assert mine.is_initialized
    mine.reset()
    assert not mine.is_initialized


@pytest.mark.parametrize("config", [transformers.Gemma3TextConfig, transformers.Gemma2Config])
@pytest.mark.parametrize("name", ["keydiff", "padre"])
def test_models_made_to_look_both_ways_are_refused(name, config):
    options = {"budget": 16} if name == "keydiff" else CAUSAL
    sizes = {**TEXT, "num_key_value_heads": 2, "head_dim": 8, "layer_types": ["full_attention"] * 2}
    model = transformers.AutoModelForCausalLM.from_config(config(**sizes))
    model.config.use_bidirectional_attention = True
    with pytest.raises(UnsupportedError, match="use_bidirectional_attention"):
        attnzoo.replace_attention(model, name, **options)


@pytest.mark.parametrize("name", ["keydiff", "padre", "sdpa"])
def test_continuous_batching_is_refused_before_it_starts(name):
    options = {"keydiff": {"budget": 16}, "padre": CAUSAL, "sdpa": {}}[name]
    model = attnzoo.replace_attention(language_model(), name, **options)
    for one in (model, copy.deepcopy(model)):
        with pytest.raises(UnsupportedError, match=r"continuous batching .*; call generate"):
            one.generate_batch([[5, 6, 7], [8, 9]], max_new_tokens=3)
    attnzoo.restore_attention(model)
    assert "init_continuous_batching" not in vars(model)
