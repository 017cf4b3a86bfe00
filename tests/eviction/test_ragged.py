"""Heads of a layer that share its budget, against a simulation with a dense mask per head; and their cache."""

import copy
import itertools
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnzoo
from attnzoo.cores.sdpa import Sdpa
from attnzoo.errors import OptionError, ShapeError
from attnzoo.eviction.policy import Policy
from attnzoo.eviction.ragged import RaggedStore, store_for
from attnzoo.eviction.scan import BoundedAttention, Padding
from attnzoo.registry import build_core, build_policy, describe
from tests.eviction.models import ADAPTIVE, CACHE, POLICIES, bounded, cache_of, feed, language_model, token_ids

HEADS, KV_HEADS, WIDTH = 6, 3, 8


def attention_of(name, **options):
    policy = build_policy(describe(name), {"budgets": "adaptive", **options})
    return BoundedAttention(name, policy, build_core(describe(policy.core), {}))


def qkv(tokens, rows=1, seed=0, dtype=torch.float64):
    """Heads of unlike temper: the attention of the first is sharp, that of the last flat."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, heads, tokens, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    q, k, v = (2 * torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes)
    return q * torch.linspace(1, 0.05, HEADS, dtype=dtype)[:, None, None], k, v


def simulate(name, q, k, v, budget, block, recent, prompt=0):
    """One row. The output under a dense mask per head and query, and the positions that each key/value head keeps."""
    tokens, group = q.shape[2], HEADS // KV_HEADS
    kept = [[] for _ in range(KV_HEADS)]
    sums = torch.zeros(HEADS, tokens, dtype=q.dtype)
    out = torch.zeros(HEADS, tokens, WIDTH, dtype=q.dtype)
    for i in range(tokens):
        for own in kept:
            own.append(i)
        seen = torch.zeros(HEADS, tokens, dtype=torch.bool)
        for head in range(HEADS):
            seen[head, kept[head // group]] = True
        logits = torch.einsum("hd,hnd->hn", q[0, :, i], k[0].repeat_interleave(group, 0)) * WIDTH**-0.5
        weights = logits.masked_fill(~seen, float("-inf")).softmax(-1)
        out[:, i] = torch.einsum("hn,hnd->hd", weights, v[0].repeat_interleave(group, 0))
        sums += weights
        due = i + 1 == prompt if i < prompt else (i + 1) % block == 0
        if not due or sum(map(len, kept)) <= KV_HEADS * budget:
            continue
        ranked = []
        for g, own in enumerate(kept):
            score = {j: float(sums[g * group : (g + 1) * group, j].mean()) / (i + 1 - j) for j in own}
            if name == "vatp":
                score = {j: s * float(v[0, g, j].abs().sum()) for j, s in score.items()}
            sink = min(1, (budget - recent) // 2) if name == "vatp" else 0
            score |= {j: float("inf") for j in own if j > i - recent or j < sink}
            best = sorted(own, key=lambda j, score=score: (score[j], j), reverse=True)
            score |= dict.fromkeys(best[: int(0.2 * budget)], float("inf"))
            ranked += [(score[j], j, g) for j in own]
        stays = sorted(ranked, reverse=True)[: KV_HEADS * budget]
        kept = [sorted(j for _, j, head in stays if head == g) for g in range(KV_HEADS)]
    return out[None], kept


def positions(store, row=0):
    return [[p for p in head if p >= 0] for head in store.positions[row].tolist()]


@settings(max_examples=20, deadline=None)
@given(
    name=st.sampled_from(["h2o", "vatp"]),
    budget=st.integers(1, 16),
    block=st.integers(1, 12),
    share=st.sampled_from([0.0, 0.3, 1.0]),
    rows=st.integers(1, 3),
    padded=st.booleans(),
    cuts=st.lists(st.integers(1, 39), max_size=4, unique=True),
    core=st.sampled_from(["sdpa", "softmax", "flash_scored"]),
    seed=st.integers(0, 99),
)
def test_as_under_a_dense_mask_per_head(name, budget, block, share, rows, padded, cuts, core, seed):
    """Outputs and survivors, for rows of unlike padding, in calls of any length."""
    recent = int(share * budget)
    q, k, v = qkv(40, rows, seed)
    attention = attention_of(name, budget=budget, block_size=block, recent=recent, core=core)
    real = torch.rand(rows, 40, generator=torch.Generator().manual_seed(seed)) > 0.2
    real = real if padded else torch.ones_like(real)
    store, parts = store_for(attention.policy), []
    for start, end in itertools.pairwise((0, *sorted(cuts), 40)):
        padding = Padding.of(real[:, start:end])
        parts.append(attention(store, *(x[:, :, start:end] for x in (q, k, v)), padding))
    out = torch.cat(parts, 2)
    for row in range(rows):
        mine = [x[row : row + 1, :, real[row]] for x in (q, k, v)]
        expected, kept = simulate(name, *mine, budget, block, recent)
        torch.testing.assert_close(out[row : row + 1, :, real[row]], expected, rtol=1e-9, atol=1e-9)
        assert positions(store, row) == kept
        assert store.entries[row] * KV_HEADS == sum(map(len, kept))


@pytest.mark.parametrize("name", ["h2o", "vatp"])
def test_one_eviction_at_the_end_of_the_prompt(name):
    q, k, v = qkv(70)
    attention = attention_of(name, budget=12, block_size=5, recent=2, schedule="prompt")
    store, parts = store_for(attention.policy), []
    for start, end in itertools.pairwise((0, 30, 41, *range(42, 71))):
        parts.append(attention(store, *(x[:, :, start:end] for x in (q, k, v))))
        if end == 41:
            before = store.bytes().allocated
    out, kept = simulate(name, q, k, v, 12, 5, 2, prompt=41)
    torch.testing.assert_close(torch.cat(parts, 2), out, rtol=1e-9, atol=1e-9)
    assert positions(store) == kept
    assert store.bytes().allocated < before / 2


def test_a_head_gives_memory_back_that_another_takes():
    """Allocated is what is held and a block of room for each head, not the longest head's times the heads."""
    attention = attention_of("vatp", budget=40, block_size=4, recent=2)
    store = store_for(attention.policy)
    q, k, v = qkv(400)
    attention(store, q, k, v * torch.tensor([3.0, 1.0, 0.3])[:, None, None])
    held = [head.held[0] for head in store.heads]
    assert sum(held) == 120
    assert max(held) > min(held) + 8
    entry = 2 * WIDTH * 8 + 4 + 2 * 8  # keys and values, position, sums of two query heads
    size = store.bytes()
    assert size.entries == 120 * 2 * WIDTH * 8
    assert size.held == 120 * entry
    assert size.allocated <= (120 + 3 * 4) * entry
    assert store.keys.shape == (1, 3, max(held), WIDTH)
    for head, n in enumerate(held):
        assert (store.positions[0, head, :n] >= 0).all()
        assert (store.positions[0, head, n:] == -1).all()
        assert (store.keys[0, head, n:] == 0).all()


def test_each_head_keeps_its_least():
    """A head whose scores are all the lowest keeps a fifth of the budget, and its protected entries."""

    class Second(Policy):
        @property
        def comparable(self):
            return True

        def score(self, view):
            return view.positions + 1000.0 * (view.first_head == 1)

    attnzoo.register_attention("second", "eviction", Second)
    try:
        for recent, least in ((0, 4), (2, 4), (7, 7)):
            attention = attention_of("second", budget=20, block_size=10, recent=recent)
            store = store_for(attention.policy)
            attention(store, *qkv(90))
            assert [len(own) for own in positions(store)] == [least, 60 - 2 * least, least]
            assert positions(store)[0] == list(range(90 - least, 90))
    finally:
        attnzoo.unregister_attention("second")


@pytest.mark.parametrize("name", ADAPTIVE)
def test_dense_limit(name):
    ids = token_ids(2, 60)
    model = bounded(name, budget=60, block_size=16, budgets="adaptive")
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, language_model()(ids).logits, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "core"), [*((name, "sdpa") for name in ADAPTIVE), ("h2o", "flash_scored"), ("snapkv", "flash_scored")]
)
def test_cuts_padding_and_batch_make_no_difference(name, core):
    model = bounded(name, seed=1, budget=14, block_size=8, budgets="adaptive", core=core)
    ids = token_ids(3, 90)
    with torch.no_grad():
        logits, cache, _ = feed(model, ids, [[30, 40, 50], [1, 1, 0], [59, 49, 40]], [[0, 3, 1], [0, 0, 2], [2, 0, 0]])
        for row in range(3):
            alone = model(ids[row : row + 1])
            torch.testing.assert_close(logits[row], alone.logits[0], rtol=1e-9, atol=1e-9)
            for layer, single in zip(cache.layers, cache_of(alone).layers, strict=True):
                assert positions(layer, row) == positions(single)
                assert layer.entries[row] == single.entries[0] == 16


@pytest.mark.parametrize("name", ADAPTIVE)
def test_copy_save_load_and_batches(name, tmp_path):
    model = bounded(name, budget=16, block_size=8, budgets="adaptive")
    ids = token_ids(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        prompt = cache_of(model(ids[:, :37], attention_mask=mask[:, :37]))
        prompt.save(tmp_path / "prompt.pt")
        before = prompt.layers[0].keys
        others = [prompt.copy(), copy.deepcopy(prompt), attnzoo.load_cache(tmp_path / "prompt.pt")]
        swapped, twice = prompt.copy(), prompt.copy()
        swapped.reorder_cache(torch.tensor([1, 0]))
        twice.batch_repeat_interleave(2)
        expected = model(ids[:, 37:], attention_mask=mask, **{CACHE: prompt}).logits
        for other in others:
            assert isinstance(other.layers[0].store, RaggedStore)
            assert torch.equal(other.layers[0].keys, before)
            assert torch.equal(model(ids[:, 37:], attention_mask=mask, **{CACHE: other}).logits, expected)
        order = [1, 0]
        found = model(ids[order, 37:], attention_mask=mask[order], **{CACHE: swapped}).logits
        torch.testing.assert_close(found, expected[order])
        wide = [x.repeat_interleave(2, 0) for x in (ids[:, 37:], mask)]
        found = model(wide[0], attention_mask=wide[1], **{CACHE: twice}).logits
        torch.testing.assert_close(found, expected.repeat_interleave(2, 0))
        prompt.reset()
        assert prompt.get_seq_length() == 0
        assert prompt.layers[0].keys is None
        torch.testing.assert_close(model(ids, attention_mask=mask, **{CACHE: prompt}).logits[1, 37:], expected[1])


def test_flush_and_generate():
    model = bounded("snapkv", budget=12, block_size=16, window=4, budgets="adaptive")
    ids = token_ids(2, 41)
    with torch.no_grad():
        cache = cache_of(model(ids))
        assert [layer.entries for layer in cache.layers] == [[21, 21]] * 2
        cache.flush()
        assert [layer.entries for layer in cache.layers] == [[12, 12]] * 2
    out = model.generate(
        ids, max_new_tokens=20, do_sample=False, eos_token_id=None, return_dict_in_generate=True, output_logits=True
    )
    with torch.no_grad():
        again = model(out.sequences[:, :-1]).logits[:, 40:]
    torch.testing.assert_close(torch.stack(out.logits, 1), again.float(), rtol=1e-5, atol=1e-5)
    assert model.generate(ids, max_new_tokens=8, num_beams=3, num_return_sequences=3, eos_token_id=None).shape[0] == 6


@pytest.mark.parametrize("core", ["sdpa", "flash_scored"])
def test_gradients_are_those_of_the_same_choice(core):
    attention = attention_of("caote", budget=10, block_size=4, core=core)
    inputs = [x.requires_grad_() for x in qkv(50)]
    store = store_for(attention.policy)
    parts = [attention(store, *(x[:, :, part] for x in inputs)) for part in (slice(30), slice(30, 50))]
    with torch.no_grad():  # what comes later must not write over what the graph holds
        attention(store, *(x[:, :, :9] for x in inputs))
    found = torch.autograd.grad(sum(part.square().sum() for part in parts), inputs)
    for which, gradient in enumerate(found):
        values = []
        for step in (1e-6, -1e-6):
            moved = [x.detach().clone() for x in inputs]
            moved[which].view(-1)[37] += step
            values.append(attention(store_for(attention.policy), *moved).square().sum())
        assert abs((values[0] - values[1]) / 2e-6 - gradient.view(-1)[37]) < 1e-4


def test_a_share_of_the_text():
    """The heads' mean follows the share; each row by its own count."""
    attention = attention_of("h2o", budget=0.25, block_size=4)
    store = store_for(attention.policy)
    chance = random.Random(0)
    real = torch.tensor([[chance.random() > 0.3 for _ in range(200)] for _ in range(2)])
    attention(store, *qkv(200, 2), Padding.of(real))
    for row, count in enumerate(real.sum(1).tolist()):
        assert store.entries[row] == int(0.25 * (count - count % 4)) + count % 4


def test_another_number_of_rows_is_refused():
    attention = attention_of("h2o", budget=8, block_size=4)
    store = store_for(attention.policy)
    attention(store, *qkv(20, 2))
    with pytest.raises(ShapeError, match="the cache holds 2 rows, the call has 1"):
        attention(store, *qkv(3))


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("tova", {}, "keeps the same entries in all heads"),
        ("vatp", {"base": "tova"}, "keeps the same entries in all heads"),
        ("random", {}, "those of Random mean nothing from head to head"),
        ("streaming", {}, "those of Streaming mean nothing"),
        ("knorm", {}, "those of Knorm mean nothing"),
        ("criticalkv", {}, "first stage of CriticalKV takes a share of each head's own"),
    ],
)
def test_policies_whose_heads_cannot_be_compared_are_refused(name, options, says):
    with pytest.raises(OptionError, match=f"budgets='adaptive' compares the scores .*{says}"):
        attnzoo.replace_attention(language_model(), name, budget=8, budgets="adaptive", **options)


def test_a_core_that_takes_no_mask_is_refused():
    attnzoo.register_attention("maskless", "core", Sdpa, capabilities={"causal": True, "gqa": True})
    try:
        model = language_model()
        with pytest.raises(OptionError, match=r"core='maskless' takes no mask.* cores that do: softmax, sdpa"):
            attnzoo.replace_attention(model, "h2o", budget=8, budgets="adaptive", core="maskless")
        assert not attnzoo.swap_report(model).swapped
        attnzoo.replace_attention(model, "h2o", budget=8, core="maskless")
    finally:
        attnzoo.unregister_attention("maskless")


def test_policies_that_score_by_attention_can_share():
    assert {"h2o", "snapkv", "scissorhands", "zipcache", "vatp", "caote", "dropkv"} <= set(ADAPTIVE)


def test_the_docs_name_those_that_cannot():
    page = (Path(__file__).parents[2] / "docs/eviction.md").read_text(encoding="utf-8")
    named = re.search(r"which they are not \((.*?)\) are refused", page, re.DOTALL)[1]
    assert set(re.findall(r"`(\w+)`", named)) == set(POLICIES) - set(ADAPTIVE)


def test_a_policy_that_chooses_by_itself_is_refused():
    class First(Policy):
        @property
        def comparable(self):
            return True

        def score(self, view):
            return -view.positions

        def keep(self, view):
            return super().keep(view)

    attnzoo.register_attention("first", "eviction", First)
    try:
        with pytest.raises(OptionError, match="does not choose by scores"):
            attnzoo.replace_attention(language_model(), "first", budget=8, budgets="adaptive")
    finally:
        attnzoo.unregister_attention("first")
