"""The scan of blocks by itself: scores over several evictions, gradients of some inputs only, autocast, the bound."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import attnzoo
from attnzoo.errors import UnsupportedError
from attnzoo.eviction.h2o import H2O
from attnzoo.eviction.scan import BoundedAttention, Padding
from attnzoo.eviction.store import Store
from attnzoo.registry import build_core, build_policy, describe, register_attention, unregister_attention
from tests.eviction import noise
from tests.eviction.models import bounded, cache_of, token_ids

HEADS, KV_HEADS, WIDTH = 4, 2, 8


def attention_of(name: str, **options) -> BoundedAttention:
    policy = build_policy(describe(name), options)
    return BoundedAttention(name, policy, build_core(describe(policy.core), {}))


def qkv(tokens: int, rows: int = 1, seed: int = 0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rows, heads, tokens, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS))
    return [2 * torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def slowly(name, q, k, v, budget, block, recent, prompt=0, normalize=True):
    """One row, token by token, in dictionaries: outputs of the queries and the positions kept a key/value head.

    Nothing goes before the end of the prompt, where one is given. For each query head the sums and the attention of
    each query over what its key/value head holds are kept by hand.
    """
    groups = HEADS // KV_HEADS
    tokens = q.shape[2]
    kept = [[] for _ in range(KV_HEADS)]
    sums = [{} for _ in range(HEADS)]
    out = torch.zeros_like(q)

    scores = [(q[0, head] @ k[0, head // groups].T * WIDTH**-0.5).tolist() for head in range(HEADS)]

    def weights(head, i, among):
        raised = [math.exp(scores[head][i][j]) for j in among]
        total = sum(raised)
        return {j: e / total for j, e in zip(among, raised, strict=True)}

    def noisy(head, i, among):
        t = 1 + min(i / 1024, 1)
        raised = [math.exp((scores[head][i][j] + noise.gumbel(0, 0, head, i, j)) / t) for j in among]
        return {j: e / sum(raised) for j, e in zip(among, raised, strict=True)}

    for i in range(tokens):
        for g in range(KV_HEADS):
            kept[g].append(i)
        for head in range(HEADS):
            row = weights(head, i, kept[head // groups])
            out[0, head, i] = torch.tensor(list(row.values()), dtype=v.dtype) @ v[0, head // groups, list(row)]
            given = noisy(head, i, kept[head // groups]) if name == "keyformer" else row
            for j, w in given.items():
                sums[head][j] = sums[head].get(j, 0.0) + w
        due = i + 1 == prompt if i < prompt else (i + 1) % block == 0
        if not due or len(kept[0]) <= budget:
            continue
        for g in range(KV_HEADS):
            live, heads = kept[g], range(g * groups, (g + 1) * groups)

            def asked(head, window, i=i, live=live):
                last = range(max(0, i + 1 - window), i + 1)
                return [weights(head, n, [j for j in live if j <= n]) for n in last if any(j <= n for j in live)]

            base = "h2o" if name in ("vatp", "caote", "keyformer") else name
            if base == "h2o":
                each = {h: {j: sums[h][j] / (i + 1 - j if normalize else 1) for j in live} for h in heads}
            elif base == "snapkv":
                each = {}
                for h in heads:
                    total = {j: sum(row.get(j, 0.0) for row in asked(h, 4)) for j in live}
                    before = [j for j in live if j < i + 1 - 4]
                    line = [total[j] for j in before]
                    pooled = [max(line[max(0, n - 1) : n + 2]) for n in range(len(line))]
                    each[h] = total | dict(zip(before, pooled, strict=True))
            else:
                each = {
                    h: {j: sum(row.get(j, 0.0) > 1 / len(row) for row in asked(h, 20)) for j in live} for h in heads
                }
            if name == "caote":
                score = dict.fromkeys(live, 0.0)
                for h in heads:
                    total = sum(each[h].values())
                    share = {j: w / total for j, w in each[h].items()}
                    mean = sum(w * v[0, g, j] for j, w in share.items())
                    for j in live:
                        score[j] += (share[j] / (1 - share[j]) * float((mean - v[0, g, j]).norm())) ** 2
            else:
                score = {j: sum(each[h][j] for h in heads) / groups for j in live}
            if name == "vatp":
                score = {j: s * float(v[0, g, j].abs().sum()) for j, s in score.items()}
            safe = {j for j in live if j > i - recent}
            best = sorted((j for j in live if j not in safe), key=lambda j: (score[j], j), reverse=True)
            kept[g] = sorted([*safe, *best[: budget - len(safe)]])
        for head in range(HEADS):
            sums[head] = {j: s for j, s in sums[head].items() if j in kept[head // groups]}
    return out, kept


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("h2o", {"recent": 6}),
        ("h2o", {"recent": 6, "normalize": False}),
        ("keyformer", {"recent": 6}),
        ("snapkv", {"window": 4, "kernel": 3, "recent": 4}),
        ("scissorhands", {"window": 20, "recent": 3}),
        ("vatp", {"recent": 3}),
        ("caote", {"recent": 5}),
    ],
)
@pytest.mark.parametrize("block", [1, 5, 16])
@pytest.mark.parametrize("core", ["sdpa", "flash_scored"])
def test_scores_over_many_evictions(name, options, block, core):
    """What was kept from eviction to eviction belongs to the entries that stayed, in calls of any length."""
    budget = 12
    q, k, v = qkv(70)
    attention = attention_of(name, budget=budget, block_size=block, core=core, **options)
    out, kept = slowly(name, q, k, v, budget, block, options["recent"], normalize=options.get("normalize", True))
    store, parts = Store(attention.policy), []
    for start, end in itertools.pairwise((0, 1, 23, 24, 61, 70)):
        parts.append(attention(store, *(x[:, :, start:end] for x in (q, k, v))))
    torch.testing.assert_close(torch.cat(parts, 2), out, rtol=1e-9, atol=1e-9)
    assert store.positions[0].tolist() == kept


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("h2o", {"recent": 6}),
        ("keyformer", {"recent": 6}),
        ("snapkv", {"window": 4, "kernel": 3, "recent": 4}),
        ("caote", {"recent": 5}),
    ],
)
@pytest.mark.parametrize("core", ["sdpa", "flash_scored"])
@pytest.mark.parametrize("cuts", [(0, 41), (0, 7, 30, 41)])
def test_one_eviction_at_the_end_of_the_prompt(name, options, core, cuts):
    """Full attention over the prompt, however it was cut; then block by block, as if it had always been so."""
    budget, prompt = 12, 41
    q, k, v = qkv(70)
    attention = attention_of(name, budget=budget, block_size=5, schedule="prompt", core=core, **options)
    out, kept = slowly(name, q, k, v, budget, 5, options["recent"], prompt)
    store, parts = Store(attention.policy), []
    for start, end in itertools.pairwise((*cuts, *range(prompt + 1, 71))):
        parts.append(attention(store, *(x[:, :, start:end] for x in (q, k, v))))
    torch.testing.assert_close(torch.cat(parts, 2), out, rtol=1e-9, atol=1e-9)
    assert store.positions[0].tolist() == kept


def test_the_room_of_the_prompt_is_let_go():
    attention = attention_of("keydiff", budget=12, block_size=4, schedule="prompt")
    store = Store(attention.policy)
    attention(store, *qkv(500))
    assert store.held == [500]
    before = store.bytes().allocated
    attention(store, *(x[:, :, :1] for x in qkv(1)))
    assert store.held == [13]
    assert store.bytes().allocated < before / 5


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
@pytest.mark.parametrize("core", ["sdpa", "flash_scored"])
def test_gradients_of_some_inputs_only(wanted, core):
    """Frozen weights (LoRA on queries, say): gradients are those of the same choice computed whole."""
    attention = attention_of("caote", budget=12, block_size=4, core=core)
    inputs = qkv(50)
    for which in wanted:
        inputs[which].requires_grad_()
    store = Store(attention.policy)
    first = attention(store, *(x[:, :, :30] for x in inputs))
    second = attention(store, *(x[:, :, 30:] for x in inputs))
    with torch.no_grad():  # what comes later must not write over what the graph holds
        attention(store, *(x[:, :, :9] for x in inputs))
    loss = first.square().sum() + second.square().sum()
    found = torch.autograd.grad(loss, [inputs[which] for which in wanted])
    for which, gradient in zip(wanted, found, strict=True):
        values = []
        for step in (1e-6, -1e-6):
            moved = [x.detach().clone() for x in inputs]
            moved[which].view(-1)[37] += step
            values.append(attention(Store(attention.policy), *moved).square().sum())
        assert abs((values[0] - values[1]) / 2e-6 - gradient.view(-1)[37]) < 1e-5


def test_the_bound_while_a_block_is_closed(monkeypatch):
    """At the moment of an eviction a layer holds budget and block together, never more."""
    most = []
    evict = Store.evict
    monkeypatch.setattr(Store, "evict", lambda self, *args: (most.append(max(self.held)), evict(self, *args))[1])
    attention = attention_of("keydiff", budget=20, block_size=8)
    store = Store(attention.policy)
    attention(store, *qkv(100, 2), Padding.of(torch.rand(2, 100) > 0.2))
    assert max(most) == 28
    assert store._keys.shape[2] == 28


def test_autocast_with_padding():
    """The core may answer in another dtype than its input's; scores are not computed in it."""
    attention = attention_of("caote", budget=12, block_size=4)
    real = torch.ones(2, 50, dtype=torch.bool)
    real[0, :7] = False
    q, k, v = qkv(50, 2, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = attention(Store(attention.policy), q, k, v, Padding.of(real))
    expected = attention(Store(attention.policy), q, k, v, Padding.of(real))
    assert (out - expected).abs().max() < 0.1 * expected.abs().max()


def test_infinite_scores_do_not_push_protected_entries_out():
    attention = attention_of("caote", base="tova", budget=4, block_size=8, sink=4)
    q, k, v = qkv(8)
    k[:, :, 5] = 100 * q[:, ::2, 7]
    k[:, :, 6] = k[:, :, 7] = 0
    store = Store(attention.policy)
    attention(store, q, k, v)
    assert store.positions[0].tolist() == [[0, 1, 2, 3]] * 2


@settings(max_examples=40, deadline=None)
@given(
    policy=st.sampled_from(
        [
            ("h2o", {}),
            ("tova", {}),
            ("snapkv", {"window": 5}),
            ("scissorhands", {"window": 7}),
            ("scissorhands", {"window": 4, "importance": "mean"}),
            ("vatp", {}),
            ("vatp", {"base": "tova"}),
            ("vatp", {"base": "keyformer"}),
            ("zipcache", {"window": 9}),
            ("caote", {}),
            ("caote", {"fast": True, "base": "snapkv", "base_options": {"window": 3}}),
        ]
    ),
    budget=st.integers(4, 24),
    block=st.integers(1, 12),
    cuts=st.lists(st.integers(1, 79), max_size=4, unique=True),
    rows=st.integers(1, 3),
    padded=st.booleans(),
    seed=st.integers(0, 99),
)
def test_a_core_that_sums_keeps_what_a_second_look_keeps(policy, budget, block, cuts, rows, padded, seed):
    name, options = policy
    q, k, v = qkv(80, rows, seed)
    real = torch.rand(rows, 80, generator=torch.Generator().manual_seed(seed)) > 0.3 if padded else None
    found = []
    for core in ("sdpa", "flash_scored"):
        attention = attention_of(name, budget=budget, block_size=block, core=core, **options)
        store, parts = Store(attention.policy), []
        for start, end in itertools.pairwise((0, *sorted(cuts), 80)):
            padding = None if real is None else Padding.of(real[:, start:end])
            parts.append(attention(store, *(x[:, :, start:end] for x in (q, k, v)), padding))
        found.append((store.positions.tolist(), torch.cat(parts, 2)))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("core", ["sdpa", "flash_scored"])
@pytest.mark.parametrize("padded", [False, True])
def test_weights_of_ones_own_are_accumulated(core, padded):
    """A policy that gives the attention itself keeps what one keeps that leaves it to the core, and so do wrappers."""

    class Own(H2O):
        @property
        def own_weights(self):
            return True

        def weights(self, view):
            return view.window_attention()

    attnzoo.register_attention("own", "eviction", Own)
    try:
        q, k, v = qkv(150, 3, 5)
        real = torch.rand(3, 150, generator=torch.Generator().manual_seed(0)) > 0.3 if padded else None
        for plain, own in (("h2o", {}), ("caote", {"base": "own"})):
            found = []
            for name, options in ((plain, {}), (plain if own else "own", own)):
                attention = attention_of(name, budget=12, block_size=90, core=core, **options)
                store = Store(attention.policy)
                for part in (slice(0, 40), slice(40, 150)):
                    padding = None if real is None else Padding.of(real[:, part])
                    attention(store, q[:, :, part], k[:, :, part], v[:, :, part], padding)
                found.append(store)
            assert found[0].positions.tolist() == found[1].positions.tolist()
            torch.testing.assert_close(found[0]._sums, found[1]._sums, rtol=1e-9, atol=1e-9)
    finally:
        attnzoo.unregister_attention("own")


@pytest.mark.parametrize("name", ["h2o", "tova", "snapkv"])
def test_autocast_changes_nothing_of_what_a_core_that_sums_keeps(name):
    for seed in range(5):
        q, k, v = qkv(60, 2, seed, torch.float32)
        kept = []
        for core in ("sdpa", "flash_scored"):
            attention = attention_of(name, budget=12, block_size=4, core=core)
            store = Store(attention.policy)
            with torch.autocast("cpu", torch.bfloat16):
                attention(store, q, k, v)
            kept.append(store.positions.tolist())
        whole = Store(attention.policy)
        attention(whole, q, k, v)
        assert kept[0] == kept[1] == whole.positions.tolist()


@pytest.mark.parametrize("name", ["h2o", "tova", "keydiff"])
def test_a_soft_cap_is_not_dropped_by_a_core_that_has_none(name):
    attention = attention_of(name, budget=12, block_size=4, core="flash_scored")
    with pytest.raises(UnsupportedError, match="softcap"):
        attention(Store(attention.policy), *qkv(20), softcap=1.0)


def test_the_core_is_asked_for_sums_where_the_policy_wants_them():
    """At every step for accumulated attention, at evictions only for a window, never where nothing goes."""
    from attnzoo.kernels.dispatch import record_paths

    cases = (
        ("h2o", 8, 9),
        ("tova", 8, 9),
        ("h2o", 100, 1),
        ("tova", 100, 0),
        ("keydiff", 8, 0),
        ("scissorhands", 8, 0),
        ("keyformer", 8, 0),
        ("zipcache", 8, 0),
    )
    for name, budget, steps in cases:
        attention = attention_of(name, budget=budget, block_size=4, core="flash_scored")
        with record_paths() as paths:
            attention(Store(attention.policy), *qkv(44))
        assert paths["scored_attention", "chunks"] == steps, name


def test_weights_are_the_attention_where_a_policy_says_nothing_else():
    class Asked(H2O):
        own_weights = True

    ids = token_ids(2, 40)
    register_attention("asked", "eviction", Asked)
    try:
        kept = [
            [layer.positions for layer in cache_of(bounded(name, budget=8, block_size=4)(ids)).layers]
            for name in ("asked", "h2o")
        ]
    finally:
        unregister_attention("asked")
    assert all(torch.equal(own, other) for own, other in zip(*kept, strict=True))
