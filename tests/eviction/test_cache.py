"""The promises of the bounded cache, on models of transformers."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import attnzoo
from attnzoo.eviction.cache import BoundedCache
from tests.eviction.models import (
    BY_COORDINATE,
    CACHE,
    CONFIGS,
    POLICIES,
    bounded,
    cache_of,
    feed,
    is_adaptive,
    language_model,
    needed,
    token_ids,
)

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
        text = dense.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None)
    for name, options in METHODS:
        model = bounded(name, host, dtype, budget=74, block_size=16, **options)
        with torch.no_grad():
            one = model(ids).logits
            first = model(ids[:, :33])
            second = model(ids[:, 33:], **{CACHE: cache_of(first)})
            assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, eos_token_id=None), text)
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
    st.sampled_from(["sdpa", "softmax", "flash", "flash_scored"]),
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
        core = chance.choice(["sdpa", "softmax", "flash_scored"])
        schedule = chance.choice(["block", "block", "prompt", "step"])
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
