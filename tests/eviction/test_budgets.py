"""Budgets in bytes, and budgets that differ by layer: what each layer gets, and that the total is held."""

import copy
import itertools
import json
from dataclasses import dataclass, replace

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import attnzoo
from attnzoo.errors import AssetError, OptionError, UnsupportedError
from attnzoo.eviction.budgets import LayerShape, share_out
from attnzoo.eviction.h2o import H2O
from attnzoo.eviction.layer_data import ModelIdentity
from attnzoo.eviction.layer_profile import LayerCurve, Profile
from attnzoo.eviction.policy import Policy
from attnzoo.eviction.profile import main, profile_layers
from attnzoo.eviction.streaming import Streaming
from attnzoo.recipe import recipe_of
from attnzoo.registry import build_policy, describe
from attnzoo.units import parse_bytes
from tests.eviction.models import ADAPTIVE, CACHE, POLICIES, cache_of, language_model, needed, token_ids
from tests.zoo import fingerprint

LAYERS, BLOCK = 4, 8


@pytest.fixture(scope="module")
def profile():
    return profile_layers(language_model(num_hidden_layers=LAYERS), token_ids(1, 100)[0], queries=16)


def swapped(name, dtype=torch.float32, host="llama", **options):
    model = language_model(host, dtype, num_hidden_layers=LAYERS)
    more = needed(name, host, num_hidden_layers=LAYERS) if name in POLICIES else {}
    return attnzoo.replace_attention(model, name, **{"block_size": BLOCK, **more, **options})


def at_block_ends(model, tokens=120, rows=1, blocks=1):
    """The cache at each block's end, or at the end of so many."""
    cache = None
    for part in token_ids(rows, tokens).split(blocks * BLOCK, 1):
        with torch.no_grad():
            cache = cache_of(model(part, **{CACHE: cache}))
        yield cache


def shapes(heads=(2, 2, 2), widths=(8, 8, 8), dtype=torch.float32):
    model = ModelIdentity("m", "hash")
    return [LayerShape(i, 4, h, w, w, dtype, model) for i, (h, w) in enumerate(zip(heads, widths, strict=True))]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("64MiB", 64 * 2**20),
        ("1.5GiB", 3 * 2**29),
        ("500MB", 500 * 10**6),
        ("300 KB", 300_000),
        (" 300 kB ", 300_000),
        ("7 B", 7),
        ("2KiB", 2048),
    ],
)
def test_bytes_with_their_unit(text, count):
    assert parse_bytes("budget", text) == count


@pytest.mark.parametrize("text", ["64", "MiB", "64mb", "64 Mbit", "-1MiB", "1e3MB", "64MiB per layer", ""])
def test_bytes_without_a_known_unit_are_refused(text):
    with pytest.raises(OptionError, match=r"budget must be .* such as '64MiB'.* units are B, kB, MB"):
        build_policy(describe("h2o"), {"budget": text})


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_bytes_bound_the_whole_cache(name, dtype):
    """Held bytes stay within the budget at each block's end, and an entry more in each layer would not."""
    limit = {torch.float32: 100_000, torch.float64: 180_000}[dtype]
    model = swapped(name, dtype, budget=f"{limit / 1000} kB")
    report = attnzoo.swap_report(model)
    assert sum(layer.held_bytes for layer in report.layers) <= limit
    for cache in at_block_ends(model, 240, blocks=3):
        assert attnzoo.kv_bytes(cache).held <= limit
    (budget,) = {layer.budget for layer in report.layers}
    assert {tuple(layer.entries) for layer in cache.layers} == {(budget,)}
    assert attnzoo.kv_bytes(cache).held == sum(layer.held_bytes for layer in report.layers)
    more = swapped(name, dtype, budget=budget + 1)
    assert sum(layer.held_bytes for layer in attnzoo.swap_report(more).layers) > limit


def test_bytes_are_per_row_and_between_blocks_a_block_more():
    model = swapped("snapkv", budget="64 KiB", window=8)
    (budget,) = {layer.budget for layer in attnzoo.swap_report(model).layers}
    with torch.no_grad():
        cache = cache_of(model(token_ids(3, 16 * BLOCK)))
        assert 3 * 60 * 1024 < attnzoo.kv_bytes(cache).held <= 3 * 64 * 1024
        cache = cache_of(model(token_ids(1, 16 * BLOCK + BLOCK - 1)))
    assert cache.layers[0].entries == [budget + BLOCK - 1]


@pytest.mark.parametrize("host", ["gpt-neox", "qwen3", "gemma", "phi3"])
def test_bytes_on_other_hosts(host):
    """Other numbers of heads and widths, which a trial call of the model shows."""
    model = attnzoo.replace_attention(language_model(host, torch.float32), "h2o", budget="60 kB", block_size=BLOCK)
    assert {layer.options["budget"] for layer in attnzoo.swap_report(model).layers} != {"60 kB"}
    for cache in at_block_ends(model, 240, blocks=3):
        held = attnzoo.kv_bytes(cache).held
        assert held <= 60_000
    assert held > 50_000


@pytest.mark.parametrize("budgets", ["uniform", "pyramid", "adaptive"])
def test_too_few_bytes_name_the_least_that_would_do(budgets):
    model = language_model(dtype=torch.float32)
    before = fingerprint(model)
    with pytest.raises(
        OptionError, match=r"budget='9 kB' is \d+ entries .* too few for a block of 32.* '\d+ kB'"
    ) as caught:
        attnzoo.replace_attention(model, "h2o", budget="9 kB", block_size=32, budgets=budgets)
    with pytest.raises(OptionError, match=r"too few for sink \+ recent = 40: give at least"):
        attnzoo.replace_attention(model, "h2o", budget="9 kB", block_size=8, sink=20, recent=20, budgets=budgets)
    assert fingerprint(model) == before
    least = str(caught.value).split("at least '")[1].split("'")[0]
    attnzoo.replace_attention(model, "h2o", budget=least, block_size=32, budgets=budgets)
    assert attnzoo.swap_report(model).swapped


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("budgets", ["uniform", "pyramid", "measured", "adaptive"])
def test_the_total_is_held_at_every_blocks_end(name, budgets, profile):
    """No choice holds more entries than ``uniform`` would, and once the text is long, no less."""
    options = {"budget": 20, "budgets": budgets, "profile": profile if budgets == "measured" else None}
    if budgets == "adaptive" and name not in ADAPTIVE:
        with pytest.raises(OptionError, match="budgets='adaptive' compares the scores of the heads"):
            swapped(name, **options)
        return
    model = swapped(name, **options)
    budget = [layer.budget for layer in attnzoo.swap_report(model).layers]
    assert sum(budget) == 20 * LAYERS
    assert (len(set(budget)) > 1) == (budgets in ("pyramid", "measured"))
    for cache in at_block_ends(model, 144, blocks=2):
        assert all(layer.entries[0] <= most for layer, most in zip(cache.layers, budget, strict=True))
        held = sum(int((layer.positions >= 0).sum()) for layer in cache.layers)
        assert held <= 20 * LAYERS * 2
    assert held == 20 * LAYERS * 2


@pytest.mark.parametrize("schedule", ["prompt", "step"])
@pytest.mark.parametrize("budgets", ["pyramid", "measured", "adaptive"])
def test_schedules_hold_the_total(schedule, budgets, profile):
    options = {"budget": "25 kB", "budgets": budgets, "profile": profile if budgets == "measured" else None}
    model = swapped("h2o", schedule=schedule, **options)
    with torch.no_grad():
        cache = cache_of(model(token_ids(1, 100)))
        if schedule == "prompt":
            assert {tuple(layer.entries) for layer in cache.layers} == {(100,)}
            cache.flush()
        assert 24_000 < attnzoo.kv_bytes(cache).held <= 25_000
        cache = cache_of(model(token_ids(1, 1), **{CACHE: cache}))
    report = attnzoo.swap_report(model)
    more = 0 if schedule == "step" else 1
    assert [layer.entries[0] for layer in cache.layers] == [layer.budget + more for layer in report.layers]


@pytest.mark.parametrize("budgets", ["pyramid", "measured"])
def test_shares_by_layer(budgets, profile):
    profile = profile if budgets == "measured" else None
    model = swapped("keydiff", budget=0.25, budgets=budgets, profile=profile)
    shares = [layer.budget for layer in attnzoo.swap_report(model).layers]
    assert len(set(shares)) > 1
    assert 0.999 < sum(shares) <= 1 + 1e-9
    for cache in at_block_ends(model, 160):
        seen = cache.get_seq_length()
        assert [layer.entries[0] for layer in cache.layers] == [max(1, int(share * seen)) for share in shares]
    assert "of the tokens" in str(attnzoo.swap_report(model))
    assert "depends on the text" in str(attnzoo.swap_report(model))


@given(
    layers=st.integers(1, 40),
    budget=st.one_of(st.integers(1, 5000), st.floats(1e-3, 1.0)),
    sink=st.integers(0, 8),
    heads=st.sampled_from([(2,), (1, 2), (4, 1, 2)]),
)
@settings(max_examples=60, deadline=None)
def test_a_pyramid_falls_in_equal_steps_and_costs_what_uniform_costs(layers, budget, sink, heads):
    sink = min(sink, budget) if isinstance(budget, int) else sink
    here = [LayerShape(i, 4, heads[i % len(heads)], 8, 8, torch.float32) for i in range(layers)]
    given = [one.budget for one in share_out(Streaming(budget=budget, budgets="pyramid", sink=sink), here)]
    costs = [shape.kv_heads for shape in here]
    spent, whole = (sum(n * c for n, c in zip(each, costs, strict=True)) for each in (given, [budget] * layers))
    one = 1e-4 if isinstance(budget, float) else 1
    assert spent <= whole + 1e-9 or (isinstance(budget, float) and spent <= whole + 2e-4 * sum(costs))
    assert spent > whole - (max(costs) if isinstance(budget, int) else 1e-4 * sum(costs) + 1e-9)
    assert all(a - b >= -one for a, b in itertools.pairwise(given))
    falls = [a - b for a, b in itertools.pairwise(given)]
    assert not falls or max(falls) - min(falls) <= 2 * one + 1e-9
    if isinstance(budget, int):
        assert min(given) >= min(budget, sink + 1)
    else:
        assert all(0 < share <= 1 for share in given)


def test_the_pyramid_is_the_papers():
    """b / 20 in the last layer, twice the mean less that in the first."""
    given = [one.budget for one in share_out(H2O(budget=200, budgets="pyramid"), shapes())]
    assert given == [390, 200, 10]


def test_the_report_says_what_each_layer_got():
    model = swapped("h2o", budget=20, budgets="pyramid")
    report = attnzoo.swap_report(model)
    assert [layer.budget for layer in report.layers] == [39, 26, 14, 1]
    entry = 2 * (2 * 8 * 4 + 4) + 4 * 4  # keys, values and position of two heads, the sums of four
    assert [layer.held_bytes for layer in report.layers] == [n * entry for n in (39, 26, 14, 1)]
    lines = str(report).splitlines()
    assert lines[0].split()[-2:] == ["budget", "cache"]
    assert lines[2].endswith("39 entries  0.01 MB")
    assert lines[5].endswith("1 entry     0.00 MB")
    assert lines[-1].endswith("the swapped layers hold, per row, 0.01 MB, and up to 0.02 MB within one")
    assert [layer.most_bytes for layer in report.layers] == [(n + 8) * entry for n in (39, 26, 14, 1)]
    prompt = str(attnzoo.swap_report(swapped("h2o", budget=20, schedule="prompt")))
    assert prompt.endswith("MB within one; the whole prompt until it ends")
    plain = attnzoo.swap_report(attnzoo.restore_attention(model))
    assert plain.layers[0].budget is None
    assert "budget" not in str(plain)


def test_a_saved_model_and_a_copy_have_the_same_budgets(tmp_path, profile):
    """A saved model needs no profile: it says what each layer got."""
    model = swapped("h2o", budget="50 kB", budgets="measured", profile=profile)
    ids = token_ids(1, 70)
    attnzoo.save(model, tmp_path / "model")
    loaded = attnzoo.load(tmp_path / "model")
    with torch.no_grad():
        expected = model(ids).logits
        for other in (loaded, copy.deepcopy(model)):
            assert torch.equal(other(ids).logits, expected)
            assert str(attnzoo.swap_report(other)) == str(attnzoo.swap_report(model))


def test_a_saved_model_swaps_layers_together_again(tmp_path):
    """One entry of the recipe lists the budgets of all layers that are alike but for them, whatever swaps made them."""
    model = swapped("h2o", budget=[1.0, 1, 30, 7])
    attnzoo.replace_attention(model, "h2o", budget=20, budgets="adaptive", block_size=BLOCK, where="model.layers.3")
    (first, second) = recipe_of(model)
    assert first["options"] == {"budget": [1.0, 1, 30], "block_size": BLOCK}
    assert second["options"] == {"budget": 20, "budgets": "adaptive", "block_size": BLOCK}
    attnzoo.save(model, tmp_path / "model")
    loaded = attnzoo.load(tmp_path / "model")
    assert str(attnzoo.swap_report(loaded)) == str(attnzoo.swap_report(model))
    assert str([layer.budget for layer in attnzoo.swap_report(loaded).layers]) == "[1.0, 1, 30, 20]"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": [8, 9]}, "budget lists 2 numbers, and the layers to swap are 4"),
        ({"budget": []}, "budget as a list is numbers, one per swapped layer"),
        ({"budget": [8, 9, 10, "1 MB"]}, "budget as a list is numbers"),
        ({"budget": [8, 9, 10, 0]}, "budget must be a whole number of at least 1, not 0"),
        ({"budget": [8, 9, 10, 11], "budgets": "pyramid"}, "which budgets='pyramid' would decide"),
    ],
)
def test_a_list_of_budgets_that_does_not_fit_is_refused(options, says):
    model = language_model(num_hidden_layers=LAYERS)
    before = fingerprint(model)
    with pytest.raises(OptionError, match=says):
        attnzoo.replace_attention(model, "h2o", **options)
    assert fingerprint(model) == before


def test_caches_of_layers_with_budgets_of_their_own(tmp_path, profile):
    """Copied, saved, loaded, repeated and reordered; another model's cache is refused."""
    model = swapped("h2o", torch.float64, budget=16, budgets="measured", profile=profile)
    ids = token_ids(2, 60)
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    with torch.no_grad():
        cache = cache_of(model(ids[:, :37], attention_mask=mask[:, :37]))
        cache.save(tmp_path / "cache")
        others = [cache.copy(), attnzoo.load_cache(tmp_path / "cache")]
        expected = model(ids[:, 37:], attention_mask=mask, **{CACHE: cache}).logits
        for other in others:
            assert torch.equal(model(ids[:, 37:], attention_mask=mask, **{CACHE: other}).logits, expected)
        plain = swapped("h2o", torch.float64, budget=16)
        with pytest.raises(UnsupportedError, match="made by another swap"):
            plain(ids[:, :1], **{CACHE: cache_of(model(ids))})
    beams = model.generate(ids, max_new_tokens=8, num_beams=3, eos_token_id=None)
    assert beams.shape == (2, 68)


class OnlyScore(Policy):
    """A user's own policy: one method."""

    def score(self, view):
        return view.values.norm(dim=-1)


class OwnConstructor(OnlyScore):
    """Takes less than the policies of the package, and keeps something of its own."""

    def __init__(self, *, budget):
        super().__init__(budget=budget, block_size=BLOCK)
        self.__dict__["power"] = 2.0

    def score(self, view):
        return super().score(view) ** self.power


@dataclass(frozen=True, kw_only=True)
class Comparable(OnlyScore):
    power: float = 1.0

    @property
    def comparable(self):
        return True


@pytest.mark.parametrize("budgets", ["uniform", "pyramid", "measured", "adaptive"])
@pytest.mark.parametrize("budget", [24, "40 kB"])
def test_a_policy_of_ones_own_has_budgets(budgets, budget, profile):
    attnzoo.register_attention("only_score", "eviction", OnlyScore)
    attnzoo.register_attention("comparable", "eviction", Comparable)
    options = {"budget": budget, "budgets": budgets, "profile": profile if budgets == "measured" else None}
    try:
        if budgets == "adaptive":
            with pytest.raises(OptionError, match=r"OnlyScore mean nothing from head to head.* property `comparable`"):
                swapped("only_score", **options)
        model = swapped("comparable" if budgets == "adaptive" else "only_score", **options)
        report = attnzoo.swap_report(model)
        for cache in at_block_ends(model, 360, blocks=3):
            assert attnzoo.kv_bytes(cache).held <= sum(layer.held_bytes for layer in report.layers)
        assert attnzoo.kv_bytes(cache).held == sum(layer.held_bytes for layer in report.layers)
    finally:
        attnzoo.unregister_attention("only_score")
        attnzoo.unregister_attention("comparable")


@pytest.mark.parametrize("budget", [24, 0.25, "40 kB", [24, 0.5, 9, 30]])
def test_a_policy_whose_constructor_takes_no_more_than_a_budget(budget):
    attnzoo.register_attention("own_constructor", "eviction", OwnConstructor)
    try:
        model = attnzoo.replace_attention(language_model(num_hidden_layers=LAYERS), "own_constructor", budget=budget)
        given = [layer.budget for layer in attnzoo.swap_report(model).layers]
        for cache in at_block_ends(model, 160):
            seen = cache.get_seq_length()
            most = [int(one * seen) if isinstance(one, float) else one for one in given]
            assert [layer.entries[0] for layer in cache.layers] == [min(seen, n) for n in most]
    finally:
        attnzoo.unregister_attention("own_constructor")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": 1.5}, "share above 0 and at most 1"),
        ({"budget": 0.0}, "share above 0 and at most 1"),
        ({"budget": "20 MBit"}, "units are"),
        ({"budgets": "cone"}, "budgets must be one of 'uniform', 'pyramid', 'measured', 'adaptive'"),
        ({"budgets": "measured"}, r"needs profile=.*python -m attnzoo.eviction.profile MODEL TEXT"),
        ({"budgets": "pyramid", "profile": "file"}, "profile= is for budgets='measured'"),
        ({"budgets": "measured", "profile": 3}, "profile must be a path or a Profile"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(options, says):
    model = language_model()
    before = fingerprint(model)
    with pytest.raises(OptionError, match=says):
        attnzoo.replace_attention(model, "h2o", **{"budget": 16, **options})
    assert fingerprint(model) == before


def test_options_of_the_wrapper_are_not_the_bases():
    for name in ("budgets", "profile"):
        with pytest.raises(OptionError, match=f"{name} is an option of the wrapper"):
            build_policy(describe("vatp"), {"budget": 8, "base_options": {name: "pyramid"}})


# measured budgets


def test_a_profile_says_how_much_the_output_loses():
    """By hand, for one layer: the relative error over the entries that got most attention."""
    model, ids, queries = language_model(num_hidden_layers=1), token_ids(1, 50), 5
    found = profile_layers(model, ids[0], queries=queries)
    assert not attnzoo.swap_report(model).swapped
    assert (found.tokens, found.layers[0].kv_heads) == (50, 2)
    attnzoo.replace_attention(model, "snapkv", budget=50, window=queries)
    with torch.no_grad():
        store = cache_of(model(ids)).layers[0].store
    q, k, v = store._queries[0], store.keys[0], store.values[0]  # of the last five, and all
    lost = whole = torch.zeros(len(found.shares), dtype=torch.float64)
    for group in range(2):
        rows = [
            [(q[head, i] @ k[group].T / 8**0.5).masked_fill(torch.arange(50) > 45 + i, float("-inf")).softmax(-1)
             for i in range(queries)]
            for head in (2 * group, 2 * group + 1)
        ]  # fmt: skip
        order = sum(row for each in rows for row in each).argsort(descending=True)
        for row in (row for each in rows for row in each):
            out = row @ v[group]
            for n, share in enumerate(found.shares):
                stays = order[: max(1, int(share * 50))]
                left = (row[stays] / row[stays].sum().clamp_min(1e-30)) @ v[group, stays]
                lost = lost + (torch.arange(len(lost)) == n) * (left - out).square().sum()
                whole = whole + (torch.arange(len(lost)) == n) * out.square().sum()
    expected = (lost / whole).clamp(max=1)
    torch.testing.assert_close(
        torch.tensor(found.layers[0].errors, dtype=torch.float64), expected, rtol=1e-6, atol=6e-7
    )


def test_a_profile_goes_through_its_file(tmp_path, profile):
    profile.save(tmp_path / "profile.json")
    assert Profile.of(tmp_path / "profile.json") == profile
    models = [
        swapped("h2o", budget=16, budgets="measured", profile=p) for p in (profile, str(tmp_path / "profile.json"))
    ]
    assert str(attnzoo.swap_report(models[0])) == str(attnzoo.swap_report(models[1]))


@pytest.mark.parametrize("damage", ["nothing", "cut", "other", "format", "error"])
def test_a_file_that_is_no_profile_is_refused(damage, tmp_path, profile):
    path = tmp_path / "profile.json"
    profile.save(path)
    content = json.loads(path.read_text())
    if damage == "nothing":
        path.unlink()
    elif damage == "cut":
        path.write_text(path.read_text()[:-40])
    else:
        content |= {"other": {"more": 1}, "format": {"format": 9}, "error": {"shares": [1.0]}}[damage]
        path.write_text(json.dumps(content))
    with pytest.raises(
        AssetError, match="cannot be read" if damage == "nothing" else "is not a profile, or is damaged"
    ):
        swapped("h2o", budget=16, budgets="measured", profile=path)


def test_a_profile_of_another_model_is_refused(profile):
    for options, says in (
        ({"num_hidden_layers": LAYERS + 1}, "has no layer 4"),
        ({"num_hidden_layers": LAYERS, "num_key_value_heads": 4}, r"layer 0 has 2 key/value heads, this one's 4"),
        ({"num_hidden_layers": LAYERS, "rope_theta": 500.0}, "the hash of its config is"),
    ):
        model = language_model(**options)
        before = fingerprint(model)
        with pytest.raises(OptionError, match=f"of another model .*{says}.*make one of this model"):
            attnzoo.replace_attention(model, "h2o", budget=16, budgets="measured", profile=profile)
        assert fingerprint(model) == before


def test_a_profile_serves_other_dtypes_and_a_part_of_the_model(profile):
    model = language_model(dtype=torch.bfloat16, num_hidden_layers=LAYERS)
    where = ["model.layers.1", "model.layers.3"]
    attnzoo.replace_attention(model, "h2o", budget=16, budgets="measured", profile=profile, where=where)
    assert sum(layer.budget for layer in attnzoo.swap_report(model).swapped) == 32


def test_a_profile_of_a_shorter_text_says_nothing(profile):
    with pytest.raises(OptionError, match="made on 100 tokens, all of which a mean budget of 100 entries keeps"):
        swapped("h2o", budget=100, budgets="measured", profile=profile)


def test_what_cannot_be_profiled_is_refused():
    model = language_model()
    with pytest.raises(OptionError, match="needs more than 64 tokens"):
        profile_layers(model, token_ids(1, 64)[0])
    attnzoo.replace_attention(model, "h2o", budget=16)
    with pytest.raises(UnsupportedError, match="call restore_attention first"):
        profile_layers(model, token_ids(1, 100)[0])
    assert attnzoo.swap_report(model).swapped


@given(
    errors=st.lists(st.lists(st.floats(0, 1), min_size=3, max_size=3), min_size=1, max_size=5),
    mean=st.floats(0.02, 0.98),
    seed=st.integers(0, 99),
)
@settings(max_examples=150, deadline=None)
def test_water_filling_keeps_the_total_and_cannot_be_bettered(errors, mean, seed):
    """Moving a little from any layer to any other lowers no sum of the curves' hulls."""
    shares = (0.1, 0.4, 1.0)
    curves = tuple(LayerCurve(i, 2, (*sorted(each, reverse=True)[:2], 0.0)) for i, each in enumerate(errors))
    profile = Profile("m", "hash", 1000, "", shares, curves)
    costs = [1 + (seed + i) % 3 for i in range(len(curves))]
    least = mean / 10
    found = profile.share_out(mean, costs, range(len(curves)), least)
    assert all(least - 1e-9 <= amount <= 1 + 1e-9 for amount in found)
    assert abs(sum(a * c for a, c in zip(found, costs, strict=True)) - mean * sum(costs)) < 1e-6

    def loss(amounts):
        return sum(hull(curve.errors, shares, a) for curve, a in zip(curves, amounts, strict=True))

    step = 1e-3
    for i in range(len(found)):
        for j in range(len(found)):
            other = list(found)
            other[i], other[j] = other[i] - step / costs[i], other[j] + step / costs[j]
            if i != j and other[i] >= least and other[j] <= 1:
                assert loss(other) >= loss(found) - 1e-9


def hull(errors, shares, at):
    """The lower convex hull of a curve from 1 at nothing: the least that any chord between two points gives."""
    points = list(zip((0.0, *shares), (1.0, *errors), strict=True))
    chords = [
        a[1] + (b[1] - a[1]) * (at - a[0]) / (b[0] - a[0])
        for a in points
        for b in points
        if a[0] <= at <= b[0] and a[0] < b[0]
    ]
    return min(chords)


def test_measured_gives_most_to_the_layer_that_loses_most():
    curves = (LayerCurve(0, 2, (0.9, 0.5, 0.0)), LayerCurve(1, 2, (0.1, 0.01, 0.0)), LayerCurve(2, 2, (0.5, 0.1, 0.0)))
    profile = Profile("m", "hash", 1000, "", (0.1, 0.4, 1.0), curves)
    policy = H2O(budget=300, budgets="measured", profile=profile)
    assert [one.budget for one in share_out(policy, shapes())] == [400, 100, 400]
    assert [one.budget for one in share_out(H2O(budget=1, budgets="measured", profile=profile), shapes())] == [1] * 3
    with pytest.raises(OptionError, match="this one's other"):
        share_out(policy, [replace(shape, model=ModelIdentity("m", "other")) for shape in shapes()])


def test_a_layer_whose_shape_is_not_known(profile):
    """Entries are shared out; bytes and profiles are refused."""
    assert [p.budget for p in share_out(H2O(budget=200, budgets="pyramid"), [None] * 3)] == [390, 200, 10]
    for options in ({"budget": "1 MB"}, {"budget": 9, "budgets": "measured", "profile": profile}):
        with pytest.raises(OptionError, match="could not be told before the swap"):
            share_out(H2O(**options), [None, *shapes()[:2]])


def test_the_command_line(tmp_path, capsys):
    folder = tmp_path / "model"
    words = {word: i for i, word in enumerate(["<unk>", "one", "two", "three", "four"])}
    (tmp_path / "vocabulary.json").write_text(json.dumps(words))
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(folder)
    model = language_model(dtype=torch.float32)
    model.save_pretrained(folder)
    text, out = tmp_path / "text.txt", tmp_path / "profile.json"
    text.write_text("one two three four " * 40)
    assert main([str(folder), str(text), "--out", str(out), "--tokens", "90"]) == 0
    assert "2 layers of" in capsys.readouterr().out
    assert Profile.of(out).tokens == 90
    attnzoo.replace_attention(model, "h2o", budget=16, budgets="measured", profile=out)
    for wrong, says in (
        ([str(tmp_path / "none"), str(text)], "transformers cannot load"),
        ([str(folder), str(tmp_path / "none")], "there is no text and no file"),
        ([str(folder), str(text), "--tokens", "60"], "needs more than 64 tokens"),
    ):
        assert main([*wrong, "--out", str(out)]) == 2
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("name", ["h2o", "keydiff"])
def test_the_report_counts_bytes_in_the_dtype_that_the_model_has_now(name):
    model = swapped(name, torch.float32, budget=16, block_size=4)
    before = attnzoo.swap_report(model).layers[0]
    model.to(torch.bfloat16)
    now = attnzoo.swap_report(model)
    with torch.no_grad():
        cache = cache_of(model(token_ids(1, 40)))
    assert attnzoo.kv_bytes(cache).held == sum(layer.held_bytes for layer in now.layers)
    assert now.layers[0].held_bytes < before.held_bytes
    with torch.no_grad():
        model(token_ids(1, 3), **{CACHE: cache})
    assert attnzoo.kv_bytes(cache).held < sum(layer.most_bytes for layer in now.layers)
