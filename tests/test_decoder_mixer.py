"""Causal PADRe in the place of a decoder's attention."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnzoo
from attnzoo.errors import ShapeError, UnsupportedError
from attnzoo.eviction.cache import BoundedCache
from tests.eviction.models import CACHE, CONFIGS, TEXT, cache_of, feed, language_model, token_ids
from tests.eviction.test_cache import schedules
from tests.zoo import fingerprint

pytestmark = pytest.mark.compat

KERNEL = 5
OPTIONS = {"token_mixing": "causal_conv1d", "kernel_size": KERNEL}


def swapped(host="llama", dtype=torch.float64, **options):
    model = language_model(host, dtype)
    torch.manual_seed(3)
    attnzoo.replace_attention(model, "padre", **{**OPTIONS, **options})
    with torch.no_grad():
        for layer in attnzoo.swap.swapped_layers(model).values():
            for parameter in layer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("host", CONFIGS)
def test_decoding_equals_the_full_forward_in_every_family(host):
    model, ids = swapped(host), token_ids(2, 40)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        assert (full - language_model(host)(ids).logits).abs().max() > 1e-3
        torch.testing.assert_close(model(ids).logits, full, atol=1e-9, rtol=1e-9)
        cache, steps = None, []
        for token in ids.split(1, dim=1):
            out = model(token, **{CACHE: cache})
            cache = cache_of(out)
            steps.append(out.logits)
        torch.testing.assert_close(torch.cat(steps, dim=1), full, atol=1e-9, rtol=1e-9)
    assert isinstance(cache, BoundedCache)
    assert cache.get_seq_length() == 40


@settings(max_examples=60, deadline=None)
@given(
    schedules(),
    st.sampled_from([1, 2, 3]),
    st.sampled_from([1, 2, 5, 11]),
    st.sampled_from(["last", "sum"]),
    st.integers(0, 99),
)
def test_cuts_padding_and_batch_make_no_difference(schedule, degree, kernel, output, seed):
    rows, length, cuts, padding = schedule
    model = swapped(degree=degree, kernel_size=kernel, output=output)
    ids = token_ids(rows, length, seed)
    with torch.no_grad():
        logits, cache, _ = feed(model, ids, cuts, padding)
        for row in range(rows):
            alone = model(ids[row : row + 1])
            torch.testing.assert_close(logits[row], alone.logits[0], rtol=1e-6, atol=1e-9)
            for layer, single in zip(cache.layers, cache_of(alone).layers, strict=True):
                for state, other in zip(layer.states, single.states, strict=True):
                    torch.testing.assert_close(state[row], other[0], rtol=1e-6, atol=1e-9)


def test_no_token_sees_a_later_one():
    model, ids = swapped(), token_ids(1, 30)
    changed = ids.clone()
    changed[0, 20] = (ids[0, 20] - 2) % 50 + 3
    with torch.no_grad():
        a, b = model(ids).logits, model(changed).logits
    assert torch.equal(a[:, :20], b[:, :20])
    assert (a[:, 20:] - b[:, 20:]).abs().amax(-1).min() > 1e-9


def test_the_state_is_a_kernel_a_convolution_and_is_counted():
    model = swapped(degree=3)
    sizes = []
    for length in (3, 30, 300):
        with torch.no_grad():
            cache = cache_of(model(token_ids(2, length)))
        sizes.append(attnzoo.kv_bytes(cache))
    layers, channels = 2, (3 + 2) * TEXT["hidden_size"]
    expected = layers * 2 * (KERNEL - 1) * channels * 8
    assert [(size.entries, size.held, size.allocated) for size in sizes] == [(0, expected, expected)] * 3


def test_generate_sampling_beams_and_several_sequences():
    model, ids = swapped(), token_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        greedy = model.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None)
        text = ids
        for _ in range(9):
            text = torch.cat([text, model(text, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
        assert torch.equal(greedy, text)
        padded = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False, eos_token_id=None)
        alone = model.generate(ids[:1, 5:], max_new_tokens=6, do_sample=False, eos_token_id=None)
        assert torch.equal(padded[0, 12:], alone[0, 7:])
        beams = {"num_beams": 3, "max_new_tokens": 6, "eos_token_id": None, "do_sample": False}
        assert torch.equal(model.generate(ids, **beams), model.generate(ids, **beams, use_cache=False))
        torch.manual_seed(0)
        sampled = model.generate(ids, max_new_tokens=6, do_sample=True, num_return_sequences=3, eos_token_id=None)
    assert sampled.shape == (6, 18)


def test_a_copy_of_the_cache_goes_its_own_way():
    model, ids = swapped(), token_ids(1, 20)
    with torch.no_grad():
        cache = cache_of(model(ids[:, :10]))
        kept = cache.copy()
        model(ids[:, 10:], **{CACHE: cache})
        again = model(ids[:, 10:], **{CACHE: kept})
        torch.testing.assert_close(again.logits, model(ids, use_cache=False).logits[:, 10:])


def test_some_layers_alone_and_back():
    model, ids = language_model(), token_ids(2, 25)
    before, expected = fingerprint(model), model(ids).logits
    attnzoo.replace_attention(model, "padre", where="*.1.*", **OPTIONS)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        first = model(ids[:, :11])
        second = model(ids[:, 11:], **{CACHE: cache_of(first)})
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), full, atol=1e-9, rtol=1e-9)
    assert cache_of(first).layers[0].keys.shape[2] == 25
    attnzoo.restore_attention(model)
    assert fingerprint(model) == before
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(model(ids).logits, expected)


def test_it_trains_with_and_without_checkpoints():
    model, ids = swapped().train(), token_ids(2, 30)
    loss = model(ids, labels=ids).loss
    loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(gradient.any() for gradient in expected.values())
    model.zero_grad()
    model.gradient_checkpointing_enable()
    model(ids, labels=ids, use_cache=False).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name])


def test_sliding_windows_give_way():
    model, ids = language_model("mistral", sliding_window=8), token_ids(1, 30)
    attnzoo.replace_attention(model, "padre", **OPTIONS)
    with torch.no_grad():
        full = model(ids, use_cache=False).logits
        first = model(ids[:, :13])
        second = model(ids[:, 13:], **{CACHE: cache_of(first)})
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), full, atol=1e-9, rtol=1e-9)


def test_what_cannot_be_is_refused():
    with pytest.raises(UnsupportedError, match=r"causality: .*token_mixing='causal_conv1d'.*and 1 more") as caught:
        attnzoo.replace_attention(language_model(), "padre")
    assert str(caught.value).count("causality") == 1
    for name in set(attnzoo.list_attentions("mixer")) - {"mlp_mixer"}:
        with pytest.raises(UnsupportedError, match="causality"):
            attnzoo.replace_attention(language_model(), name)
    with pytest.raises(UnsupportedError, match="'padre' cannot decode token by token"):
        attnzoo.replace_attention(language_model(), "padre", **OPTIONS, output="element_sum", tokens=9)
    for name in ("hyena", "mamba"):
        with pytest.raises(UnsupportedError, match=f"'{name}' cannot decode token by token"):
            attnzoo.replace_attention(language_model(), name, bidirectional=False)

    model, other, ids = swapped(), swapped(degree=2), token_ids(2, 9)
    with torch.no_grad():
        cache = cache_of(model(ids))
        with pytest.raises(UnsupportedError, match=r"made by another swap.*Padre\(dim=32, degree=3"):
            other(ids, **{CACHE: cache})
        with pytest.raises(UnsupportedError, match="holds the state of a mixer"):
            language_model()(ids, **{CACHE: cache})
        with pytest.raises(ShapeError, match="holds 2 rows, the call has 1"):
            model(ids[:1], **{CACHE: cache})
        with pytest.raises(UnsupportedError, match="cannot be cropped"):
            cache.crop(4)
        with pytest.raises(UnsupportedError, match="cannot be saved"):
            cache.save("/nowhere/at/all")
        with pytest.raises(UnsupportedError, match="call the model that holds it"):
            model.model.layers[0].self_attn(torch.zeros(1, 3, 32))
        with pytest.raises(UnsupportedError, match="StaticCache"):
            model.generate(ids, max_new_tokens=3, cache_implementation="static")


def test_a_deep_copy_is_a_model_of_its_own():
    model, ids = swapped(), token_ids(1, 9)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        torch.testing.assert_close(twin(ids).logits, model(ids).logits)
        cache = cache_of(model(ids))
        twin(ids, **{CACHE: cache})  # equal swaps share caches
