"""The promises of the bounded cache, on models of transformers."""

import copy
import random

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import DynamicCache, StaticCache

import attnzoo
from attnzoo.errors import AssetError, OptionError, ShapeError, UnsupportedError
from attnzoo.eviction.cache import BoundedCache
from attnzoo.eviction.layers import BoundedLayer
from tests.eviction.models import (
    BY_COORDINATE,
    CACHE,
    CONFIGS,
    POLICIES,
    TEXT,
    bounded,
    cache_of,
    feed,
    is_adaptive,
    language_model,
    needed,
    token_ids,
)
from tests.zoo import fingerprint

pytestmark = pytest.mark.compat

WRAPPED = [
    ("vatp", {"base": "tova"}),
    ("caote", {"base": "snapkv"}),
    ("caote", {"base": "scissorhands", "fast": True}),
    ("criticalkv", {"base": "defensive"}),
    ("criticalkv", {"base": "tova"}),
]
METHODS = [*((name, {}) for name in POLICIES), *WRAPPED]


@pytest.mark.parametrize("host", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_dense_limit(host, dtype):
    """A budget no shorter than the text gives the dense model's logits; so does the cache, and generation."""
    ids = token_ids(2, 70)
    dense = language_model(host, dtype)
    with torch.no_grad():
        expected = dense(ids).logits
        text = dense.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None)
    for name, options in METHODS:
        model = bounded(name, host, dtype, budget=78, block_size=16, **options)
        with torch.no_grad():
            one = model(ids).logits
            first = model(ids[:, :33])
            second = model(ids[:, 33:], **{CACHE: cache_of(first)})
            assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None), text)
        tolerance = 1e-9 if dtype == torch.float64 else 1e-4
        assert (one - expected).abs().max() <= tolerance * expected.abs().max()
        assert (torch.cat([first.logits, second.logits], 1) - expected).abs().max() <= tolerance * expected.abs().max()


@st.composite
def schedules(draw):
    """Rows of one length, cut into calls each in its own way, with padding in front of each part."""
    rows = draw(st.integers(1, 3))
    length = draw(st.one_of(st.integers(1, 120), st.integers(121, 600)))
    calls = draw(st.integers(1, 5))
    chance = random.Random(draw(st.integers(0, 2**32)))
    ends = [[*sorted(chance.choices(range(length + 1), k=calls - 1)), length] for _ in range(rows)]
    cuts = [[e[c] - (e[c - 1] if c else 0) for e in ends] for c in range(calls)]
    cuts = [cut for cut in cuts if any(cut)]
    padded = draw(st.booleans())
    padding = [[chance.choice((0, 0, 1, 7)) if padded else 0 for _ in range(rows)] for _ in cuts]
    return rows, length, cuts, padding


def entries_of(budget, length, block):
    """The most that a row of so many tokens may hold."""
    ended = length - length % block
    kept = budget if isinstance(budget, int) else max(1, int(budget * ended))
    return min(kept, ended) + length % block


@settings(max_examples=60, deadline=None)
@given(
    schedules(),
    st.sampled_from(METHODS),
    st.one_of(st.integers(4, 256), st.sampled_from([0.01, 0.25, 0.5, 1.0])),
    st.integers(1, 64),
    st.sampled_from(["sdpa", "softmax", "flash"]),
    st.integers(0, 99),
)
def test_cuts_padding_and_batch_make_no_difference(schedule, method, budget, block, core, seed):
    """The bound holds at every moment, and logits and survivors are those of each row alone, in one call, unpadded."""
    rows, length, cuts, padding = schedule
    name, options = method
    model = bounded(name, seed=1, budget=budget, block_size=block, core=core, **options)
    ids = token_ids(rows, length, seed)
    with torch.no_grad():
        logits, cache, most = feed(model, ids, cuts, padding)
        assert most <= max(entries_of(budget, n, block) for n in range(length + 1))
        for row in range(rows):
            alone = model(ids[row : row + 1])
            torch.testing.assert_close(logits[row], alone.logits[0], rtol=1e-9, atol=1e-9)
            for layer, single in zip(cache.layers, cache_of(alone).layers, strict=True):
                held = single.keys.shape[2]
                assert torch.equal(layer.positions[row, :, :held], single.positions[0])
                assert (layer.positions[row, :, held:] == -1).all()
                assert (layer.keys[row, :, held:] == 0).all()
                torch.testing.assert_close(layer.keys[row, :, :held], single.keys[0], rtol=1e-9, atol=1e-9)
                assert (single.positions.diff(dim=-1) > 0).all()
                assert single.positions.max() == length - 1 or length % block == 0
                assert held == entries_of(budget, length, block)


@pytest.mark.parametrize("part", range(10))
def test_fuzz(part):
    """500 random combinations of policy, shape, budget, block, cuts, padding, batch and dtype."""
    chance = random.Random(part)
    for _ in range(50):
        name, options = chance.choice(METHODS)
        dtype = chance.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16])
        kv_heads, groups = chance.choice([1, 2, 3]), chance.choice([1, 2, 4])
        block, budget = chance.choice([1, 2, 3, 8, 16]), chance.choice([chance.randint(1, 40), chance.uniform(0.01, 1)])
        rows, length = chance.randint(1, 4), 3 * block + chance.randint(0, 40)
        host = chance.choice(["llama", "qwen3"])
        shape = {
            "num_hidden_layers": chance.choice([2, 3]),
            "num_attention_heads": kv_heads * groups,
            "num_key_value_heads": kv_heads,
            "hidden_size": kv_heads * groups * 4,
            "head_dim": 4,
        }
        model = language_model(host, dtype, **shape)
        core, schedule = chance.choice(["sdpa", "softmax"]), chance.choice(["block", "block", "prompt", "step"])
        policy = {"budget": budget, "block_size": block, "schedule": schedule}
        budgets = ["uniform", "uniform", "pyramid", *["adaptive"] * is_adaptive(name, **options)]
        policy["budgets"] = chance.choice(budgets)
        attnzoo.replace_attention(model, name, core=core, **policy, **options, **needed(name, host, **shape))
        left, cuts, padding = [length] * rows, [], []
        while any(left):
            cut = [min(n, chance.choice([0, 1, 5, 30])) for n in left]
            if any(cut):
                cuts.append(cut)
                padding.append([chance.choice([0, 0, 3]) for _ in left])
                left = [n - c for n, c in zip(left, cut, strict=True)]
        with torch.no_grad():
            logits, cache, most = feed(model, token_ids(rows, length), cuts, padding)
        assert logits.isfinite().all()
        budgets = [layer.budget for layer in attnzoo.swap_report(model).layers]
        if schedule == "prompt":
            assert most <= length
            cache.flush()
            block = 1
        else:
            block = 1 if schedule == "step" else block
            heads = kv_heads if policy["budgets"] == "adaptive" else 1  # one may hold what is meant for all
            assert most <= max(heads * entries_of(max(budgets), n, block) for n in range(length + 1))
        for layer, mine in zip(cache.layers, budgets, strict=True):
            assert layer.keys.isfinite().all()
            assert layer.values.isfinite().all()
            held = (layer.positions >= 0).sum(-1)
            assert policy["budgets"] == "adaptive" or (held == held[:, :1]).all()
            assert (held.sum(-1) <= kv_heads * entries_of(mine, length, block)).all()
            assert held.sum(-1).tolist() == [kv_heads * n for n in layer.entries]


@pytest.mark.parametrize("name", POLICIES)
def test_nothing_is_read_that_was_not_written(name):
    """Empty memory is full of NaN here; a read of it would show."""
    model = bounded(name, budget=20, block_size=8)
    ids = token_ids(3, 90)
    with torch.no_grad():
        expected = model(ids).logits
        torch.use_deterministic_algorithms(True)  # torch then fills empty tensors with NaN
        try:
            assert torch.empty(1).isnan()
            logits, *_ = feed(model, ids, [[30, 40, 50], [60, 50, 40]], [[0, 3, 1], [2, 0, 0]])
        finally:
            torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", POLICIES)
def test_generate(name):
    """Greedy generation equals feeding what it generated in one call; the cache stays bounded; padding is left out."""
    model = bounded(name, budget=16, block_size=8)
    ids = token_ids(2, 40)
    ids[0, :6], mask = 0, torch.ones_like(ids)
    mask[0, :6] = 0
    out = model.generate(
        ids, attention_mask=mask, max_new_tokens=30, do_sample=False, eos_token_id=None, return_dict_in_generate=True
    )
    cache = cache_of(out)
    assert isinstance(cache, BoundedCache)
    assert cache.get_seq_length() == 69  # the last token was never fed
    assert all(layer.keys.shape[2] < 24 for layer in cache.layers)
    with torch.no_grad():
        for row, start in ((0, 6), (1, 0)):
            logits = model(out.sequences[row : row + 1, start:-1]).logits
            assert torch.equal(logits[0, 39 - start :].argmax(-1), out.sequences[row, 40:])


def test_ways_of_generating():
    """Sampling, several return sequences, beams: as with a dense cache where nothing is evicted."""
    ids = token_ids(2, 20)
    dense, model = language_model(), bounded("h2o", budget=64, block_size=8)
    for options in (
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    ):
        out = []
        for one in (dense, model):
            torch.manual_seed(0)
            out.append(one.generate(ids, max_new_tokens=12, eos_token_id=None, **options))
        assert torch.equal(*out)
    small = bounded("caote", budget=8, block_size=4)
    beams = small.generate(ids, max_new_tokens=12, num_beams=3, num_return_sequences=3, eos_token_id=None)
    assert beams.shape == (6, 32)


def test_turns():
    """New text after an evicted cache, by hand and through generate, equals one call; a user's own cache is used."""
    model = bounded("keydiff", budget=16, block_size=8)
    ids = token_ids(1, 100)
    with torch.no_grad():
        whole = model(ids)
        mine = DynamicCache()
        model(ids[:, :50], **{CACHE: mine})
        assert isinstance(mine, BoundedCache)
        rest = model(ids[:, 50:], **{CACHE: mine})
        torch.testing.assert_close(rest.logits, whole.logits[:, 50:])
        kept = DynamicCache(config=model.config)
        out = model.generate(ids[:, :50], **{CACHE: kept}, max_new_tokens=10, do_sample=False, eos_token_id=None)
        longer = torch.cat([out, ids[:, :20]], 1)
        again = model.generate(longer, **{CACHE: kept}, max_new_tokens=10, do_sample=False, eos_token_id=None)
        assert kept.get_seq_length() == 89
        fresh = model.generate(longer, max_new_tokens=10, do_sample=False, eos_token_id=None)
    assert torch.equal(again, fresh)


@pytest.mark.parametrize("name", POLICIES)
def test_without_a_cache_and_in_training(name):
    """`use_cache=False` and training run the same computation; gradients are those of the masked attention."""
    model = bounded(name, seed=3, budget=16, block_size=8)
    ids = token_ids(2, 50)
    with torch.no_grad():
        expected = model(ids)
        out = model(ids, use_cache=False)
    assert cache_of(out) is None
    assert torch.equal(out.logits, expected.logits)

    def objective():
        return model(ids).logits.square().mean()

    model.train()
    objective().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    model.gradient_checkpointing_enable()
    objective().backward()
    for key, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, found[key])

    weight = model.model.layers[1].self_attn.v_proj.weight  # norms are computed in float32: a step that is seen
    slopes = found["model.layers.1.self_attn.v_proj.weight"]
    at = divmod(int(slopes.abs().argmax()), slopes.shape[1])
    values = []
    with torch.no_grad():
        for step in (1e-3, -2e-3):
            weight[at] += step
            values.append(objective().item())
    assert abs((values[0] - values[1]) / 2e-3 - slopes[at]) < 1e-2 * abs(slopes[at])


def test_modes_of_autograd():
    """A cache made under inference mode goes on outside of it; one that autograd recorded is not written over."""
    model = bounded("caote", budget=16, block_size=8)
    ids = token_ids(1, 60)
    with torch.no_grad():
        expected = model(ids).logits
    with torch.inference_mode():
        cache = cache_of(model(ids[:, :27]))
    with torch.no_grad():
        torch.testing.assert_close(model(ids[:, 27:], **{CACHE: cache}).logits, expected[:, 27:])
    first = model(ids[:, :27])
    second = model(ids[:, 27:], **{CACHE: cache_of(first)})
    torch.testing.assert_close(second.logits, expected[:, 27:])
    (first.logits.sum() + second.logits.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("name", POLICIES)
def test_step_is_a_block_of_one(name):
    ids = token_ids(2, 40)
    with torch.no_grad():
        one = bounded(name, budget=16, block_size=1)(ids)
        step = bounded(name, budget=16, schedule="step")(ids)
    assert torch.equal(one.logits, step.logits)
    for a, b in zip(cache_of(one).layers, cache_of(step).layers, strict=True):
        assert torch.equal(a.positions, b.positions)


@pytest.mark.parametrize("name", POLICIES)
def test_the_prompt_is_read_densely_and_then_bounded(name, tmp_path):
    """Logits of the prompt are dense; rows of a padded batch, a copy and a saved cache go on alike after it."""
    dense, model = language_model(), bounded(name, budget=16, block_size=8, schedule="prompt")
    ids = token_ids(2, 40)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    counted = (mask.cumsum(1) - 1).clamp(min=0)  # as `generate` counts positions
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=counted)
        expected = dense(ids, attention_mask=mask, position_ids=counted).logits
        torch.testing.assert_close(out.logits[mask.bool()], expected[mask.bool()], rtol=1e-9, atol=1e-9)
        assert all(layer.keys.shape[2] == 40 for layer in cache_of(out).layers)
        cache_of(out).save(tmp_path / "cache.pt")
        caches = [cache_of(out).copy(), attnzoo.load_cache(tmp_path / "cache.pt"), cache_of(out)]
        caches[0].flush()
        assert all(layer.keys.shape[2] == 16 for layer in caches[0].layers)
        new, mask = token_ids(2, 1, 3), torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], 1)
        given = {"attention_mask": mask, "position_ids": counted[:, -1:] + 1}
        logits = [model(new, **given, **{CACHE: cache}).logits for cache in caches]
        assert torch.equal(logits[0], logits[1])
        assert torch.equal(logits[0], logits[2])
        for cache in caches:
            assert all(layer.keys.shape[2] == 17 for layer in cache.layers)
        single = cache_of(model(ids[:1, 6:]))
        alone = model(new[:1], **{CACHE: single}).logits
    torch.testing.assert_close(logits[0][:1], alone, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [name for name in POLICIES if name not in BY_COORDINATE])
def test_what_is_kept_does_not_depend_on_where_a_text_begins(name):
    """Padding without `position_ids` moves a text: other angles, which are float32, but the same between any two."""
    model = bounded(name, budget=16, block_size=8, schedule="prompt")
    ids = token_ids(2, 40)
    mask = torch.ones(2, 41, dtype=torch.long)
    mask[0, :6] = 0
    new = token_ids(2, 1, 3)
    with torch.no_grad():
        both = model(new, attention_mask=mask, **{CACHE: cache_of(model(ids, attention_mask=mask[:, :40]))}).logits
        alone = model(new[:1], **{CACHE: cache_of(model(ids[:1, 6:]))}).logits
    torch.testing.assert_close(both[:1], alone, rtol=1e-5, atol=1e-5)


def test_flush():
    """Evicts at once; the next block still ends where it would."""
    model = bounded("streaming", budget=8, block_size=16)
    ids = token_ids(1, 30)
    with torch.no_grad():
        cache = cache_of(model(ids[:, :28]))
        assert cache.layers[0].keys.shape[2] == 20
        cache.flush()
        assert cache.layers[0].positions[0, 0].tolist() == [0, 1, 2, 3, 24, 25, 26, 27]
        assert cache.get_seq_length() == 28
        cache.flush()
        model(ids[:, 28:], **{CACHE: cache})
    assert cache.layers[0].keys.shape[2] == 10


@pytest.mark.parametrize("name", POLICIES)
def test_copy_save_and_load(name, tmp_path):
    """A prompt's cache can be used again, from memory and from a file, and deep copies are whole."""
    model = bounded(name, budget=16, block_size=8)
    ids = token_ids(2, 60)
    mask = torch.ones(2, 60, dtype=torch.long)
    mask[0, :3] = 0
    with torch.no_grad():
        prompt = cache_of(model(ids[:, :37], attention_mask=mask[:, :37]))
        prompt.save(tmp_path / "prompt.pt")
        others = [prompt.copy(), copy.deepcopy(prompt), attnzoo.load_cache(tmp_path / "prompt.pt")]
        before = prompt.layers[0].keys.clone()
        expected = model(ids[:, 37:], attention_mask=mask, **{CACHE: prompt}).logits
        assert not torch.equal(before, prompt.layers[0].keys)
        for other in others:
            assert torch.equal(other.layers[0].keys, before)
            assert torch.equal(model(ids[:, 37:], attention_mask=mask, **{CACHE: other}).logits, expected)
    assert [p.name for p in tmp_path.iterdir()] == ["prompt.pt"]


def test_a_file_that_cannot_be_written_is_told(tmp_path):
    with torch.no_grad():
        cache = cache_of(bounded("keydiff", budget=8)(token_ids(1, 9)))
    (tmp_path / "file").write_text("text")
    for path, says in ((tmp_path, "a folder: name a file in it"), (tmp_path / "file" / "cache.pt", "exists|directory")):
        with pytest.raises(AssetError, match=f"cannot be written to '.*{says}") as caught:
            cache.save(path)
        assert str(path) in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_bad_file_is_refused(tmp_path):
    (tmp_path / "bad").write_bytes(b"no cache")
    with pytest.raises(AssetError, match="not a cache saved by attnzoo, or is damaged"):
        attnzoo.load_cache(tmp_path / "bad")
    with pytest.raises(AssetError, match="cannot be read"):
        attnzoo.load_cache(tmp_path / "none")
    with torch.no_grad():
        cache = cache_of(bounded("keydiff", budget=8)(token_ids(1, 20)))
    cache.save(tmp_path / "whole")
    (tmp_path / "cut").write_bytes((tmp_path / "whole").read_bytes()[:-900])
    with pytest.raises(AssetError, match="damaged"):
        attnzoo.load_cache(tmp_path / "cut")


ENCODER_DECODERS = {
    "T5": {"num_layers": 1, "num_heads": 2, "d_kv": 8, "d_ff": 16},
    "Bart": {
        f"{part}_{name}": size
        for part in ("encoder", "decoder")
        for name, size in (("layers", 1), ("attention_heads", 2), ("ffn_dim", 16))
    },
}


def test_bytes():
    """Keys and values, then positions and what policies keep; dense caches are counted as well."""
    ids = token_ids(2, 100)
    width = 2 * 2 * 8 * 8  # heads x keys and values x width x bytes of float64
    with torch.no_grad():
        dense = attnzoo.kv_bytes(cache_of(language_model()(ids)))
        assert dense == attnzoo.CacheBytes(2 * 2 * 100 * width, 2 * 2 * 100 * width, 2 * 2 * 100 * width)
        for name, extra, fixed in (
            ("keydiff", 2 * 4, 0),
            ("h2o", 2 * 4 + 4 * 8, 0),
            ("tova", 2 * 4, 4 * 8 * 8 + 4),
            ("snapkv", 2 * 4, 32 * (4 * 8 * 8 + 4)),
        ):
            cache = cache_of(bounded(name, budget=16, block_size=8)(ids))
            size = attnzoo.kv_bytes(cache)
            assert size.entries == 2 * 2 * 20 * width
            assert size.held == 2 * 2 * (20 * (width + extra) + fixed)
            assert size.allocated == 2 * 2 * (24 * (width + extra) + fixed)
    assert attnzoo.kv_bytes(DynamicCache()) == attnzoo.kv_bytes(None) == attnzoo.CacheBytes(0, 0, 0)
    with torch.no_grad(), pytest.raises(OptionError, match=f"give it the output's {CACHE}"):
        attnzoo.kv_bytes(language_model()(ids))
    with pytest.raises(OptionError, match="not str"):
        attnzoo.kv_bytes("cache")


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
def test_bytes_of_an_encoder_decoder(kind):
    config = getattr(transformers, f"{kind}Config")(d_model=16, vocab_size=20, **ENCODER_DECODERS[kind])
    model = getattr(transformers, f"{kind}Model")(config)
    with torch.no_grad():
        cache = cache_of(model.eval()(input_ids=token_ids(1, 7) % 20, decoder_input_ids=token_ids(1, 3) % 20))
    entry = 2 * 16 * 4  # keys and values x width x bytes of float32
    assert attnzoo.kv_bytes(cache) == attnzoo.CacheBytes(10 * entry, 10 * entry, 10 * entry)


@pytest.mark.parametrize("build", [language_model, lambda: language_model().model, lambda: nn.ModuleList([])])
def test_bytes_of_what_is_no_cache(build):
    with pytest.raises(OptionError, match="takes a cache of transformers, not"):
        attnzoo.kv_bytes(build())


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
    with pytest.raises(UnsupportedError, match=r"scores are capped .*'sdpa' cannot do; core='softmax' can\n"):
        attnzoo.replace_attention(model, "h2o", budget=16)
    assert fingerprint(model) == before
    with torch.no_grad():
        expected = model(ids).logits
        attnzoo.replace_attention(model, "h2o", budget=60, block_size=8, core="softmax")
        torch.testing.assert_close(model(ids).logits, expected)
        assert cache_of(model(ids)).layers[1].store.softcap == model.config.attn_logit_softcapping


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
        with pytest.raises(UnsupportedError, match=r"made by another swap.*keydiff.*h2o with budget 16"):
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


def test_batch_operations():
    """Repeat, select and reset, as transformers asks for them."""
    model = bounded("snapkv", budget=16, block_size=8)
    ids = token_ids(3, 40)
    with torch.no_grad():
        cache = cache_of(model(ids[:, :27]))
        expected = model(ids[:, 27:], **{CACHE: cache.copy()}).logits
        some = cache.copy()
        some.batch_select_indices(torch.tensor([2, 0]))
        torch.testing.assert_close(model(ids[[2, 0], 27:], **{CACHE: some}).logits, expected[[2, 0]])
        more = cache.copy()
        more.batch_repeat_interleave(2)
        assert [layer.batch_size for layer in more.layers] == [6, 6]
        wide = ids.repeat_interleave(2, 0)
        torch.testing.assert_close(model(wide[:, 27:], **{CACHE: more}).logits, expected.repeat_interleave(2, 0))
        cache.reset()
        assert cache.get_seq_length() == 0
        torch.testing.assert_close(model(ids, **{CACHE: cache}).logits[:, 27:], expected)


@pytest.mark.parametrize("anchor", ["normalized", "raw"])
@pytest.mark.parametrize("seed", range(4))
def test_two_entries_that_are_as_far_from_their_mean_are_not_told_apart_by_rounding(anchor, seed):
    def read(cuts):
        model = bounded("keydiff", seed=1, budget=0.01, block_size=1, recent=0, anchor=anchor)
        return feed(model, token_ids(1, 9, seed), cuts, [[0]] * len(cuts))[0]

    torch.testing.assert_close(read([[9]]), read([[2], *[[1]] * 7]), atol=1e-9, rtol=1e-9)
