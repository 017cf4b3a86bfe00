"""Each policy against a few lines that compute it from the dense model's own keys, values and attention."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import attnzoo
from attnzoo.errors import OptionError, ShapeError, UnknownNameError, UnsupportedError
from attnzoo.eviction.caote import output_error
from attnzoo.eviction.criticalkv import projected_norms
from attnzoo.eviction.divprune import nearest_distance
from attnzoo.eviction.keydiff import KeyDiff
from attnzoo.eviction.policy import AttentionPolicy, CacheView, Policy, highest
from attnzoo.eviction.random import Random
from attnzoo.eviction.weights import attention_weights
from attnzoo.registry import build_policy, describe
from tests.eviction import noise, oracles
from tests.eviction.models import POLICIES, bounded, cache_of, language_model, needed, token_ids
from tests.eviction.oracles import AGGREGATE, noisy_sums, pooled

BUDGET, BLOCK = 24, 64


def dense_layer(heads: int, kv_heads: int):
    """Keys, values, attention and queries of the first layer of a dense model over one block."""
    model = language_model(num_attention_heads=heads, num_key_value_heads=kv_heads, hidden_size=48)
    model.set_attn_implementation("eager")
    ids = token_ids(2, BLOCK)
    with torch.no_grad():
        out = model(ids, output_attentions=True)
        first = model.model.layers[0]
        hidden = first.input_layernorm(model.model.embed_tokens(ids))
        turned = model.model.rotary_emb(hidden, torch.arange(BLOCK)[None])
        queries = first.self_attn.q_proj(hidden).unflatten(-1, (heads, -1)).transpose(1, 2)
        queries, _ = apply_rotary_pos_emb(queries, queries, *turned)
    model.set_attn_implementation("sdpa")
    keys, values = cache_of(out).layers[0].keys, cache_of(out).layers[0].values
    return model, ids, keys, values, out.attentions[0], queries


def kept_by(score: list[float], sink: int, recent: int) -> list[int]:
    """Positions that stay: protected ones, then the highest scores, the later of equal ones first."""
    safe = [j for j in range(BLOCK) if j < sink or j >= BLOCK - recent]
    rest = sorted((j for j in range(BLOCK) if j not in safe), key=lambda j: (score[j], j), reverse=True)
    return sorted([*safe, *rest[: BUDGET - len(safe)]])


def group_mean(per_head, kv_head, groups):
    return per_head[kv_head * groups : (kv_head + 1) * groups].mean(0)


def removal_errors(attention, values):
    """How far each head's output moves when each token is taken away, by taking it away."""
    out = attention @ values
    errors = torch.zeros(attention.shape[0], values.shape[0], dtype=values.dtype)
    for head, j in itertools.product(range(len(attention)), range(len(values))):
        rest = [i for i in range(len(values)) if i != j]
        weights = attention[head, rest] / attention[head, rest].sum()
        errors[head, j] = (out[head] - weights @ values[rest]).norm()
    return errors


def oracle(name, options, keys, values, attention, kv_head, groups, queries, rotary, projection):
    """Score, sink and recent of one row and key/value head: keys ``(S, D)``, attention ``(H, N, S)``.

    `values` are ``(Hkv, S, D)``, for some methods choose for all heads of a layer together; `queries` ``(H, N, D)``,
    `projection` ``(H, D, C)``.
    """
    heads = slice(kv_head * groups, (kv_head + 1) * groups)
    if hasattr(oracles, name):
        parts = keys, values[kv_head], queries[heads], attention[heads], kv_head, range(BLOCK)[heads], BUDGET, rotary
        return getattr(oracles, name)(oracles.Row(*parts, projection[heads]), **options)
    base = options.get("base", "h2o")
    aggregate = AGGREGATE[options.get("aggregate", "mean")]
    seen = torch.arange(BLOCK, 0, -1)  # queries that have seen each entry
    accumulated = attention.sum(1) / (seen if options.get("normalize", True) else 1)
    if name in ("vatp", "caote", "auto"):
        if base == "keyformer":
            accumulated = noisy_sums(attention, range(len(attention))) / seen
        own = {"tova": attention[:, -1], "scissorhands": attention[:, -32:].mean(1)}.get(base, accumulated)
        recent = {"tova": 0, "scissorhands": 10}.get(base, BUDGET // 2)
        chosen = range(len(own)) if base == "tova" else range(*heads.indices(99))
        of_head = [values[head // groups] for head in range(len(own))]
    if name == "vatp":
        products = [own[head] * of_head[head].abs().sum(-1) for head in chosen]
        return aggregate(torch.stack(products)).tolist(), 1, recent
    if name in ("caote", "auto"):
        squares = []
        for head in chosen:
            share = own[head][None] / own[head].sum()
            if options.get("fast"):
                error = share / (1 - share) * (of_head[head].mean(0) - of_head[head]).norm(dim=-1)
            else:
                error = removal_errors(share, of_head[head])
            squares.append(error[0].square())
        return torch.stack(squares).sum(0).sqrt().tolist(), 0, recent
    if name == "dropkv":
        window = options.get("window", 32)
        errors = [removal_errors(attention[heads, i], values[kv_head]) for i in range(BLOCK - window, BLOCK)]
        return sum(error.square().sum(0) for error in errors).tolist(), 0, min(window, BUDGET)
    if name == "streaming":
        return list(range(BLOCK)), 4, BUDGET - 4
    if name == "h2o":
        return aggregate(accumulated[heads]).tolist(), 0, BUDGET // 2
    if name == "tova":
        return aggregate(attention[:, -1]).tolist(), 0, 0
    if name == "snapkv":
        window = options.get("window", 32)
        sums = attention[heads, -window:].sum(1)
        rows = [pooled(row[: BLOCK - window]) + row[BLOCK - window :] for row in sums.tolist()]
        return aggregate(torch.tensor(rows)).tolist(), 0, min(window, BUDGET)
    if name == "scissorhands":
        counts = torch.zeros(groups, BLOCK)
        for head, i, j in itertools.product(range(groups), range(BLOCK), range(BLOCK)):
            counts[head, j] += bool(attention[heads][head, i, j] > 1 / (i + 1))
        return aggregate(counts).tolist(), 0, 10
    if name == "knorm":
        return [-round(math.log2(n) * 1024) for n in keys.norm(dim=-1).tolist()], 0, 0
    if name == "keydiff":
        if options.get("anchor") == "raw":
            return (-torch.cosine_similarity(keys.mean(0, keepdim=True), keys)).tolist(), 0, BUDGET // 5
        unit = keys / keys.norm(dim=-1, keepdim=True)
        return (-(unit @ unit.T).sum(1)).tolist(), 0, options.get("recent", BUDGET // 5)  # the exact O(n^2) form
    assert name == "random"
    return [noise.uniform(options.get("seed", 0), 0, kv_head, j) for j in range(BLOCK)], 0, 0


CASES = [
    *((name, {}) for name in POLICIES),
    ("keydiff", {"anchor": "raw"}),
    ("keydiff", {"recent": 0}),
    ("h2o", {"normalize": False}),
    *((name, {"aggregate": how}) for name in ("h2o", "snapkv", "tova", "vatp") for how in ("max", "sum")),
    ("scissorhands", {"aggregate": "max"}),
    ("dropkv", {"window": 8}),
    ("defensive", {"window": 8, "kernel": 3}),
    ("defensive", {"window": 5, "kernel": 1, "aggregate": "mean"}),
    ("criticalkv", {"base": "zipcache", "base_options": {"window": 8}}),
    ("criticalkv", {"base": "zipcache", "first_stage": 0, "epsilon": 0.05}),
    ("criticalkv", {"base": "defensive", "base_options": {"window": 8}, "first_stage": 0.75}),
    ("divprune", {"recent": 0}),
    ("qfilters", {"recent": 0}),
    ("zipcache", {"window": 8}),
    ("lagkv", {"lag": 9}),
    ("rkv", {"window": 5, "kernel": 3, "weight": 0.9, "threshold": 0.2}),
    ("lsh", {"bits": 5, "seed": 3}),
    ("keyformer", {"normalize": False, "temperature": 1.5, "steps": 40, "seed": 2}),
    ("expected_attention", {"window": 20, "future": 7, "aggregate": "max", "epsilon": 0.01}),
    ("expected_attention", {"covariance": False}),
    ("expected_attention", {"count_sinks": False}),
    ("caote", {"base": "zipcache"}),
    ("vatp", {"base": "keyformer"}),
    ("zipcache", {"window": 20, "aggregate": "max"}),
    ("random", {"seed": 12345678901234567890}),
    ("snapkv", {"window": 8}),
    ("caote", {"fast": True}),
    ("caote", {"base": "tova"}),
    ("vatp", {"base": "tova"}),
    ("vatp", {"base": "scissorhands", "base_options": {"importance": "mean", "window": 32}}),
]


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 2)])
@pytest.mark.parametrize(("name", "options"), CASES, ids=lambda case: str(case))
def test_what_the_first_layer_keeps(name, options, heads, kv_heads):
    model, ids, keys, values, attention, queries = dense_layer(heads, kv_heads)
    rotary = model.model.rotary_emb
    projection = model.model.layers[0].self_attn.o_proj.weight.detach().T.unflatten(0, (heads, -1))
    shape = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "hidden_size": 48}
    options = {**needed(name, **shape), **options}
    attnzoo.replace_attention(model, name, budget=BUDGET, block_size=BLOCK, **options)
    with torch.no_grad():
        layer = cache_of(model(ids)).layers[0]
    for row, head in itertools.product(range(2), range(kv_heads)):
        parts = keys[row, head], values[row], attention[row]
        asked = head, heads // kv_heads, queries[row], rotary, projection
        score, sink, recent = oracle(name, options, *parts, *asked)
        expected = kept_by(score, sink, recent)
        assert layer.positions[row, head].tolist() == expected
        torch.testing.assert_close(layer.keys[row, head], keys[row, head, expected])
        torch.testing.assert_close(layer.values[row, head], values[row, head, expected])


def test_every_policy_has_an_oracle():
    assert {name for name, _ in CASES} == set(POLICIES)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 9), st.sampled_from([(1, 1), (3, 1), (4, 2)]), st.floats(0.1, 2))
def test_caotes_score_is_the_change_of_the_output(seed, tokens, heads, sharpness):
    """Over a group: the root of the sum of squares, which is the change of the concatenated output."""
    generator = torch.Generator().manual_seed(seed)
    queries, kv = heads
    scores = sharpness * torch.randn(1, queries, tokens, generator=generator, dtype=torch.float64)
    values = torch.randn(1, kv, tokens, 5, generator=generator, dtype=torch.float64)
    attention = scores.softmax(-1)
    got = output_error(attention, values)
    for head in range(kv):
        group = slice(head * queries // kv, (head + 1) * queries // kv)
        expected = removal_errors(attention[0, group], values[0, head]).square().sum(0).sqrt()
        torch.testing.assert_close(got[0, head], expected, rtol=1e-10, atol=1e-10)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 5), st.data())
def test_the_highest_of_equal_scores_are_the_later(seed, entries, values, data):
    count = data.draw(st.integers(1, entries))
    scores = torch.randint(values, (2, 3, entries), generator=torch.Generator().manual_seed(seed)).double()
    scores[0, 0, : entries // 2] = float("inf")
    scores[1, 1, entries // 2 :] = float("-inf")
    expected = scores.argsort(dim=-1, stable=True)[..., -count:].sort(dim=-1).values
    assert torch.equal(highest(scores, count), expected)


@pytest.mark.parametrize("base", ["tova", "snapkv"])
def test_caote_moves_the_output_less_than_its_base_where_few_entries_go(base):
    """Open loop: how far the output of the last query moves, over all heads, when 4 of 48 entries are evicted.

    Entries are scored one by one: where half of them go at once, what they do together is another matter.
    """
    moved = {"caote": 0.0, base: 0.0}
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        q, k, v = (torch.randn(1, h, 48, 8, generator=generator, dtype=torch.float64) for h in (4, 2, 2))
        v *= torch.rand(48, 1, generator=generator, dtype=torch.float64) * 3  # values of all sizes
        attention = attention_weights(q[:, :, -1:], k, None)  # (1, 4, 1, 48)
        for name in moved:
            options = {"budget": 44, "block_size": 48, "recent": 4}
            options |= {"base": base} if name == "caote" else {}
            policy = build_policy(describe(name), options)
            view = CacheView(
                keys=k,
                values=v,
                positions=torch.arange(48).expand(1, 2, 48),
                counts=torch.tensor([48]),
                queries=q[:, :, -policy.queries_kept :],
                query_positions=torch.arange(48 - policy.queries_kept, 48)[None],
            )
            stays = torch.zeros(1, 2, 48, dtype=torch.bool).scatter_(2, policy.keep(view), True)
            kept = attention * stays.repeat_interleave(2, 1)[:, :, None]
            grouped = v.repeat_interleave(2, 1)
            moved[name] += ((attention - kept / kept.sum(-1, keepdim=True)) @ grouped).norm().item()
    assert moved["caote"] < 0.8 * moved[base], moved


def test_an_entry_with_all_the_weight_is_never_evicted():
    attention = torch.tensor([[[0.0, 1.0, 0.0]]])
    error = output_error(attention, torch.randn(1, 1, 3, 4))
    assert error[0, 0, 1] == torch.inf
    assert error[0, 0, [0, 2]].tolist() == [0, 0]


def test_random_is_a_fair_sample():
    """Numbers are even, and heads, layers and seeds do not share them."""
    policy = Random(budget=1)

    def scores(policy, layer):
        positions = torch.arange(4000).expand(1, 2, -1)
        view = CacheView(torch.zeros(1, 2, 4000, 1), torch.zeros(1, 2, 4000, 1), positions, torch.tensor([4000]), layer)
        return policy.score(view)[0]

    one = scores(policy, 0)
    assert one.min() >= 0
    assert one.max() < 1
    histogram = torch.histc(one.float(), 10, 0, 1)
    assert (histogram - 800).abs().max() < 5 * 800**0.5
    others = [one[1], scores(policy, 1)[0], scores(Random(budget=1, seed=1), 0)[0]]
    assert all(abs(torch.corrcoef(torch.stack([one[0], other]))[0, 1]) < 0.06 for other in others)


def test_protection():
    """Defaults are cut to fit a small budget; what is given explicitly is kept or refused."""
    assert build_policy(describe("streaming"), {"budget": 100}).protected == (4, 96)
    assert build_policy(describe("streaming"), {"budget": 4}).protected == (2, 2)
    assert build_policy(describe("streaming"), {"budget": 1}).protected == (0, 1)
    assert build_policy(describe("h2o"), {"budget": 100}).protected == (0, 50)
    assert build_policy(describe("snapkv"), {"budget": 100}).protected == (0, 32)
    assert build_policy(describe("snapkv"), {"budget": 10}).protected == (0, 10)
    assert build_policy(describe("scissorhands"), {"budget": 100}).protected == (0, 10)
    assert build_policy(describe("vatp"), {"budget": 100}).protected == (1, 50)
    assert build_policy(describe("vatp"), {"budget": 2048}).protected == (20, 1024)
    assert build_policy(describe("keydiff"), {"budget": 100}).protected == (0, 20)
    assert build_policy(describe("keydiff"), {"budget": 4}).protected == (0, 0)
    assert build_policy(describe("vatp"), {"budget": 16}).protected == (1, 8)
    assert build_policy(describe("vatp"), {"budget": 1}).protected == (0, 0)
    assert build_policy(describe("caote"), {"budget": 100, "base": "snapkv"}).protected == (0, 32)
    assert build_policy(describe("keyformer"), {"budget": 100}).protected == (0, 50)
    assert build_policy(describe("lagkv"), {"budget": 100}).protected == (4, 33)
    assert build_policy(describe("lagkv"), {"budget": 2048}).protected == (4, 128)
    assert build_policy(describe("expected_attention"), {"budget": 100}).protected == (4, 50)
    assert build_policy(describe("lsh"), {"budget": 6}).protected == (3, 3)
    assert build_policy(describe("zipcache"), {"budget": 100}).protected == (0, 50)
    assert build_policy(describe("rkv"), {"budget": 100}).protected == (0, 50)
    assert build_policy(describe("rkv"), {"budget": 10}).protected == (0, 8)
    assert build_policy(describe("defensive"), {"budget": 100}).protected == (0, 32)
    assert build_policy(describe("criticalkv"), {"budget": 100, "base": "snapkv"}).protected == (0, 32)
    assert build_policy(describe("divprune"), {"budget": 100}).protected == (0, 50)
    assert build_policy(describe("qfilters"), {"budget": 100, **needed("qfilters")}).protected == (0, 50)
    for name in ("tova", "knorm", "random"):
        assert build_policy(describe(name), {"budget": 100}).protected == (0, 0)
    assert build_policy(describe("keydiff"), {"budget": 10, "sink": 4, "recent": 6}).protected == (4, 6)
    assert build_policy(describe("h2o"), {"budget": 10, "sink": 10}).protected == (10, 0)


@pytest.mark.parametrize("name", POLICIES)
def test_sink_and_recent_always_stay(name):
    model, ids = bounded(name, budget=12, block_size=16, sink=5, recent=7), token_ids(2, BLOCK)
    with torch.no_grad():
        cache = cache_of(model(ids))
    expected = [*range(5), *range(BLOCK - 7, BLOCK)]
    assert all((layer.positions == torch.tensor(expected)).all() for layer in cache.layers)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs budget="),
        ({"budget": 0}, "budget must be a whole number of at least 1, not 0"),
        ({"budget": -3}, "budget must be"),
        ({"budget": "1024"}, "budget must be"),
        ({"budget": 3.5}, "budget must be"),
        ({"budget": True}, "budget must be"),
        ({"budget": 8, "block_size": 0}, "block_size must be"),
        ({"budget": 0.0}, "budget must be a whole number, or a share"),
        ({"budget": 1.5}, "budget must be a whole number, or a share"),
        ({"budget": float("nan")}, "budget must be a whole number, or a share"),
        ({"budget": 8, "schedule": "never"}, "schedule"),
        ({"budget": 8, "sink": -1}, "sink must be"),
        ({"budget": 8, "sink": 5, "recent": 4}, "sink=5 .* recent=4 is over budget=8"),
        ({"budget": 8, "recent": 9}, "recent=9 is over budget=8"),
        ({"budget": 8, "budge": 8}, "no option 'budge'; did you mean 'budget'"),
        ({"budget": 8, "core": "padre"}, "core='padre' is not a core"),
    ],
)
def test_bad_options(name, options, message):
    model = language_model()
    with pytest.raises(OptionError, match=message):
        attnzoo.replace_attention(model, name, **needed(name), **options)
    assert not attnzoo.swap_report(model).swapped


@pytest.mark.parametrize("name", ["vatp", "caote", "criticalkv"])
def test_bad_bases(name):
    model = language_model()
    with pytest.raises(OptionError, match="base='keydiff' does not score by attention; those that do: h2o, tova"):
        attnzoo.replace_attention(model, name, budget=8, base="keydiff")
    with pytest.raises(OptionError, match="base='caote' does not score by attention"):
        attnzoo.replace_attention(model, name, budget=8, base="caote")
    for unknown in ("h20", None):
        with pytest.raises(
            UnknownNameError, match=r"base=.* there is no such policy; those that score by attention: h2o"
        ):
            attnzoo.replace_attention(model, name, budget=8, base=unknown)
    for wrong in ("x", [1]):
        with pytest.raises(OptionError, match="base_options is a mapping"):
            attnzoo.replace_attention(model, name, budget=8, base_options=wrong)
    with pytest.raises(OptionError, match="budget is an option of the wrapper"):
        attnzoo.replace_attention(model, name, budget=8, base_options={"budget": 9})
    with pytest.raises(OptionError, match="'h2o' has no option 'window'"):
        attnzoo.replace_attention(model, name, budget=8, base_options={"window": 9})
    with pytest.raises(UnknownNameError):
        attnzoo.replace_attention(model, name, budget=8, core="sdpaa")


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("snapkv", {"window": 0}),
        ("snapkv", {"kernel": 4}),
        ("snapkv", {"pooling": "median"}),
        ("scissorhands", {"importance": "sum"}),
        ("keydiff", {"anchor": "median"}),
        ("random", {"seed": -1}),
        ("zipcache", {"window": 0}),
        ("expected_attention", {"window": 0}),
        ("expected_attention", {"future": 0}),
        ("expected_attention", {"covariance": 1}),
        ("expected_attention", {"count_sinks": 1}),
        ("expected_attention", {"count_sinks": False, "sink": 0}),
        ("expected_attention", {"epsilon": -1}),
        ("lagkv", {"lag": 1}),
        ("rkv", {"kernel": 4}),
        ("rkv", {"weight": 1.5}),
        ("rkv", {"threshold": "high"}),
        ("lsh", {"bits": 0}),
        ("criticalkv", {"first_stage": 1.5}),
        ("criticalkv", {"first_stage": True}),
        ("criticalkv", {"epsilon": -1.0}),
        ("criticalkv", {"epsilon": float("nan")}),
        ("defensive", {"window": 0}),
        ("defensive", {"kernel": 4}),
        ("keyformer", {"temperature": 0.5}),
        ("keyformer", {"temperature": float("inf")}),
        ("keyformer", {"steps": 0}),
        ("caote", {"fast": "yes"}),
    ],
)
def test_bad_options_of_one_policy(name, options):
    with pytest.raises(OptionError, match=next(iter(options))):
        build_policy(describe(name), {"budget": 8, **options})


def test_a_policy_of_ones_own():
    class Oldest(Policy):
        def score(self, view):
            return -view.positions

    attnzoo.register_attention("oldest", "eviction", Oldest)
    try:
        model = attnzoo.replace_attention(language_model(), "oldest", budget=6, block_size=8)
        with torch.no_grad():
            cache = cache_of(model(token_ids(1, 40)))
        assert cache.layers[1].positions[0].tolist() == [list(range(6))] * 2
    finally:
        attnzoo.unregister_attention("oldest")


@pytest.mark.parametrize(
    "scores", [lambda view: view.counts.double(), lambda view: view.positions[:, :1].double(), lambda view: "none"]
)
def test_scores_of_another_shape_are_refused(scores):
    class Wrong(Policy):
        def score(self, view):
            return scores(view)

    class WrongAttention(AttentionPolicy):
        def attention_scores(self, view):
            return scores(view)

    view = CacheView(*torch.randn(2, 1, 2, 8, 4), torch.arange(8).expand(1, 2, 8), torch.tensor([8]))
    for cls, method in ((Wrong, "score"), (WrongAttention, "attention_scores")):
        with pytest.raises(ShapeError, match=rf"{cls.__name__}\.{method} gave .* a tensor of shape \(1, 2, 8\)"):
            cls(budget=4).keep(view)


def test_a_policy_that_reads_what_it_does_not_ask_for_is_told_so():
    """By a note on its own error, where that is about None; a mistake of another kind stays as it is."""
    read = None

    class Silent(Policy):
        def score(self, view):
            return read(view)

    class SilentAttention(AttentionPolicy):
        def attention_scores(self, view):
            return read(view)

    class Asking(Silent):
        accumulates, queries_kept, uses_rotary = True, 4, True

    def told(cls, error, reads):
        nonlocal read
        read = reads
        with pytest.raises(error) as raised:
            cls(budget=4).keep(view)
        return str(raised.value) + " ".join(getattr(raised.value, "__notes__", ()))

    view = CacheView(*torch.randn(2, 1, 2, 8, 4), torch.arange(8).expand(1, 2, 8), torch.tensor([8]))
    asks = "by the property in brackets: sums (accumulates), queries (queries_kept), data.rotary (uses_rotary)"
    for error, reads in (
        (AttributeError, lambda view: view.queries.sum(-1)),
        (TypeError, lambda view: view.positions * view.sums),
        (ShapeError, lambda view: view.sums),
    ):
        assert asks in told(Silent, error, reads)
        assert "does not ask" not in told(Asking, error, reads)
    assert "Attention.attention_scores gave None" in told(SilentAttention, ShapeError, lambda view: view.sums)
    assert asks not in told(Silent, AttributeError, lambda view: view.keys.nrom(-1)), "a mistake of its own"
    for name in ("window_attention", "attention_of_window", "visible"):
        assert "queries_kept must say how many" in told(Silent, UnsupportedError, lambda v, n=name: getattr(v, n)())


@pytest.mark.parametrize("name", ["vatp", "caote", "criticalkv"])
def test_a_wrapper_refuses_scores_of_another_shape(name):
    class Wrong(AttentionPolicy):
        def attention_scores(self, view):
            return view.positions[..., :5].double()

    attnzoo.register_attention("wrong", "eviction", Wrong)
    try:
        model = attnzoo.replace_attention(language_model(), name, base="wrong", budget=6, block_size=8)
        with torch.no_grad(), pytest.raises(ShapeError, match=r"Wrong\.attention_scores gave shape \(1, 2, 5\)"):
            model(token_ids(1, 40))
    finally:
        attnzoo.unregister_attention("wrong")


def test_nan_and_zero_keys_do_no_harm():
    view = CacheView(torch.zeros(1, 1, 4, 3), torch.zeros(1, 1, 4, 3), torch.arange(4).view(1, 1, 4), torch.tensor([4]))
    assert KeyDiff(budget=2).keep(view).tolist() == [[[2, 3]]]
    view.keys[0, 0, 3] = torch.nan
    assert KeyDiff(budget=2).keep(view).shape == (1, 1, 2)


def test_the_former_spelling_of_an_option_is_taken_with_a_warning():
    with pytest.warns(DeprecationWarning, match="anchor='normalised' is now spelled 'normalized'"):
        old = KeyDiff(budget=2, anchor="normalised")
    assert old == KeyDiff(budget=2)
    view = CacheView(*torch.randn(2, 1, 2, 8, 4), torch.arange(8).expand(1, 2, 8), torch.tensor([8]))
    assert torch.equal(old.keep(view), KeyDiff(budget=2, anchor="normalized").keep(view))


def test_the_former_spelling_swaps_and_loads_as_a_model_saved_with_it_does(tmp_path):
    with pytest.warns(DeprecationWarning, match="normalised"):
        old = attnzoo.replace_attention(language_model(), "keydiff", budget=6, block_size=2, anchor="normalised")
    attnzoo.save(old, tmp_path / "old")
    with pytest.warns(DeprecationWarning, match="normalised"):
        loaded = attnzoo.load(tmp_path / "old")
    ids = token_ids(1, 16)
    new = attnzoo.replace_attention(language_model(), "keydiff", budget=6, block_size=2, anchor="normalized")
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, new.eval()(ids).logits)


def test_criticalkv_keeps_the_same_for_all_heads_where_its_base_does():
    model, ids, *_ = dense_layer(6, 2)
    attnzoo.replace_attention(model, "criticalkv", base="tova", budget=BUDGET, block_size=BLOCK)
    with torch.no_grad():
        cache = cache_of(model(ids))
    for layer in cache.layers:
        assert torch.equal(layer.positions[:, :1].expand_as(layer.positions), layer.positions)


def test_criticalkv_takes_the_attention_of_a_base_without_the_values_that_it_makes_use_of():
    """Expected attention multiplies by the norm of the values, which criticalkv does itself."""
    model = language_model()
    attnzoo.replace_attention(model, "criticalkv", base="expected_attention", budget=16, block_size=8)
    with torch.no_grad():
        (layer, *_) = cache_of(model(token_ids(2, 30))).own
    view, inner = layer.store.view([0, 1]), layer.policy.inner
    attention = inner.aggregated(view)
    torch.testing.assert_close(attention.sum(-1), torch.ones_like(attention[..., 0]))
    torch.testing.assert_close(inner.score(view), attention * view.values.norm(dim=-1))
    whole = layer.policy.changed(first_stage=0.0, epsilon=0.0, sink=0, recent=0)
    norms = projected_norms(view).unflatten(1, (view.kv_heads, -1)).mean(2)
    torch.testing.assert_close(whole.score(view), attention / attention.sum(-1, keepdim=True) * norms)


def test_criticalkv_of_values_of_one_size_keeps_what_its_base_does():
    """With epsilon 0, a projection of equal columns and values of norm 1 leave the base's order as it is."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(1, 2, 40, generator=generator, dtype=torch.float64)
    values = torch.nn.functional.normalize(torch.randn(1, 2, 40, 1, generator=generator, dtype=torch.float64), dim=-1)

    class Known(AttentionPolicy):
        def attention_scores(self, view):
            return scores

    class Ones:
        def weight(self, heads, values):
            return torch.ones(2, 1, 5, dtype=torch.float64)

    view = CacheView(values, values, torch.arange(40).expand(1, 2, 40), torch.tensor([40]), projection=Ones())
    attnzoo.register_attention("known", "eviction", Known)
    try:
        options = {"budget": 10, "base": "known", "epsilon": 0.0}
        kept = [build_policy(describe("criticalkv"), {**options, "first_stage": share}).keep(view) for share in (0, 1)]
        assert torch.equal(kept[0], Known(budget=10).keep(view))
        assert torch.equal(kept[1], kept[0])
    finally:
        attnzoo.unregister_attention("known")


def test_divprune_keeps_one_key_of_each_direction():
    """Copies of few directions, however often and long: one of each is kept before any is kept twice, the latest."""
    directions = torch.eye(6, dtype=torch.float64)
    which = torch.tensor([0, 0, 1, 0, 2, 2, 3, 1, 4, 0, 5, 5, 0, 0])
    keys = (directions[which] * torch.arange(1, 15)[:, None])[None, None]
    view = CacheView(keys, keys, torch.arange(14).view(1, 1, 14), torch.tensor([14]))
    kept = build_policy(describe("divprune"), {"budget": 6, "recent": 0}).keep(view)[0, 0]
    assert sorted(which[kept].tolist()) == [0, 1, 2, 3, 4, 5]
    kept = build_policy(describe("divprune"), {"budget": 8, "recent": 2}).keep(view)[0, 0]
    assert set(which[kept].tolist()) == {0, 1, 2, 3, 4, 5}
    assert kept[-2:].tolist() == [12, 13]


def test_divprune_of_more_keys_than_are_compared_at_a_time():
    """Chunks make no difference to the nearest distance."""
    keys = torch.nn.functional.normalize(torch.randn(2, 300, 4, generator=torch.Generator().manual_seed(0)), dim=-1)
    among = torch.rand(2, 300, generator=torch.Generator().manual_seed(1)) < 0.3
    expected = (1 - keys @ keys.mT).masked_fill(torch.eye(300, dtype=torch.bool) | ~among[:, None], 9.0).amin(-1)
    torch.testing.assert_close(nearest_distance(keys, among), expected)
