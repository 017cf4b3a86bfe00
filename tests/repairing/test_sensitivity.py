"""Sensitivity: what the swap of each layer alone costs."""

import pytest
import torch
from torch import nn

import attnzoo
from attnzoo.errors import OptionError, SwapError
from tests.repairing.models import CAUSAL, KINDS, llama, swap_options, vit
from tests.repairing.test_repair import SHORT, Normed, batches, same, weights
from tests.zoo import tokens

pytestmark = pytest.mark.compat


@pytest.mark.parametrize("host", KINDS, ids=str)
def test_every_layer_has_a_cost_and_a_share_and_the_model_is_as_before(host, tmp_path):
    model = host.build()
    before, modes = weights(model), [module.training for module in model.modules()]
    data = [host.inputs()] * 3
    options = {**swap_options(host, "padre"), "init": "inherit"}
    report = attnzoo.sensitivity(model, data, "padre", steps=4, held_out=1, **options)
    assert same(weights(model), before)
    assert modes == [module.training for module in model.modules()]
    assert not attnzoo.swap_report(model).swapped
    assert len(report.layers) == 2
    assert all(layer.cost > 0 and layer.error > 0 and 0 < layer.share < 1 for layer in report.layers), report
    assert sum(layer.share for layer in report.layers) < 1
    assert [layer.cost for layer in report.ordered()] == sorted(layer.cost for layer in report.layers)
    report.plot(tmp_path / "costs.svg")
    drawn = (tmp_path / "costs.svg").read_text(encoding="utf-8")
    assert "<svg" in drawn
    assert all(layer.path in str(report) for layer in report.layers)


def test_the_layer_that_matters_costs_most_and_the_cheapest_are_swapped():
    """Of three layers one writes almost nothing: that is the one to swap."""
    model = vit(depth=3)
    with torch.no_grad():
        model.blocks[1].attn.proj.weight.mul_(1e-3)
        model.blocks[0].attn.proj.weight.mul_(4)
    report = attnzoo.sensitivity(model, batches(4), "padre", steps=4, init="inherit", **SHORT)
    assert report.ordered()[0].path == "blocks.1.attn"
    assert report.cheapest(1) == ["blocks.1.attn"]
    assert set(report.cheapest(2)) > {"blocks.1.attn"}
    assert report.cheapest(3) == [f"blocks.{i}.attn" for i in range(3)]
    for wrong in (0, 4):
        with pytest.raises(OptionError):
            report.cheapest(wrong)
    attnzoo.replace_attention(model, "padre", where=report.cheapest(1), **SHORT)
    assert [layer.path for layer in attnzoo.swap_report(model).swapped] == ["blocks.1.attn"]


def test_the_cost_is_that_of_a_swap_of_the_layer_alone():
    """By a metric of the user's own, set against the same swap done by hand."""
    model, data = vit(), batches(3)
    target = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))

    def metric(model):
        return -float((model(data[0]) - target).square().mean())

    torch.manual_seed(0)
    report = attnzoo.sensitivity(model, data, "padre", steps=3, held_out=1, metric=metric, **SHORT)
    with torch.no_grad():
        dense = metric(model)
        torch.manual_seed(0)
        attnzoo.replace_attention(model, "padre", **SHORT)
        attnzoo.repair(model, data[1:], steps=3)
        swapped = {path: model.get_submodule(path) for path in ("blocks.0.attn", "blocks.1.attn")}
        for layer in report.layers:
            attnzoo.restore_attention(model)
            model.set_submodule(layer.path, swapped[layer.path])
            model.patch_embed.register_forward_pre_hook(swapped[layer.path].grid)
            assert dense - metric(model) == pytest.approx(layer.cost, rel=1e-4, abs=1e-6)


def test_a_loss_of_ones_own_compares_the_outputs_in_place_of_the_divergence():
    model, data = vit(), batches(3)
    own = [model(batch) for batch in data[:2]]
    calls = []

    def loss(mine, theirs):
        calls.append(theirs)
        return (mine - theirs).square().mean()

    torch.manual_seed(0)
    report = attnzoo.sensitivity(model, data, "padre", steps=2, loss=loss, **SHORT)
    torch.testing.assert_close(calls[0], own[0])
    torch.testing.assert_close(calls[-1], own[1])
    assert len(calls) == 2 * len(report.layers)
    assert all(layer.cost > 0 for layer in report.layers)


def test_batches_that_come_once_are_not_held_out_twice():
    data, seen = batches(5), []

    def once():
        for number, batch in enumerate(data):
            seen.append(number)
            yield batch

    attnzoo.sensitivity(vit(), once(), "padre", steps=3, **SHORT)
    assert seen == [0, 1, 2, 3, 4]


def test_what_a_shuffling_loader_gave_first_is_held_out():
    """The fit goes on where the comparison's batches end, whatever order a new iteration would have."""
    data, given = batches(6), []

    class Shuffled:
        def __iter__(self):
            order = torch.randperm(6).tolist()
            for number in order:
                given.append(number)
                yield data[number]

    torch.manual_seed(0)
    attnzoo.sensitivity(vit(), Shuffled(), "padre", steps=4, **SHORT)
    assert sorted(given) == [0, 1, 2, 3, 4, 5], "no batch twice"


def test_bad_input_is_refused_and_the_model_left_alone():
    model = vit()
    with pytest.raises(OptionError, match="batches gave 1, of which 2 are held out"):
        attnzoo.sensitivity(model, batches(1), "padre", **SHORT)
    with pytest.raises(OptionError, match="give one of them"):
        attnzoo.sensitivity(model, batches(3), "padre", metric=len, loss=max, **SHORT)
    with pytest.raises(SwapError, match="is no mixer"):
        attnzoo.sensitivity(model, batches(3), "sdpa")
    assert not attnzoo.swap_report(model).swapped
    attnzoo.replace_attention(model, "padre", **SHORT)
    with pytest.raises(SwapError, match="call restore_attention first"):
        attnzoo.sensitivity(model, batches(3), "padre", **SHORT)


def test_an_interrupt_gives_no_report_and_the_model_back():
    model = vit()
    before = weights(model)

    def broken():
        yield from batches(3)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attnzoo.sensitivity(model, broken(), "padre", steps=5, **SHORT)
    assert same(weights(model), before)


def test_a_language_model_keeps_its_cache_setting():
    model = llama()
    attnzoo.sensitivity(model, [tokens()] * 3, "padre", steps=2, **CAUSAL["padre"])
    assert model.config.use_cache
    assert isinstance(model.model.layers[0].self_attn.q_proj, nn.Linear)


def test_a_mixer_without_weights_has_costs_too():
    report = attnzoo.sensitivity(vit(), batches(3), "pooling", steps=5)
    assert report.steps == 0
    assert all(layer.cost > 0 and layer.error > 0 for layer in report.layers)
    with pytest.raises(OptionError, match="options of sensitivity itself"):
        attnzoo.sensitivity(vit(), batches(3), "padre", repair={"steps": 3}, **SHORT)


def test_a_model_in_training_mode_is_as_before():
    model = Normed().train()
    before = weights(model)
    attnzoo.sensitivity(model, batches(3), "padre", steps=2, **SHORT)
    assert same(weights(model), before)
    assert model.training
    assert model.norm.training


def test_padding_does_not_count():
    batch, costs = {name: value.flip(1) for name, value in tokens().items()}, []  # padded on the right
    for filling in (0, 50):
        batch["input_ids"][batch["attention_mask"] == 0] = filling
        torch.manual_seed(0)
        report = attnzoo.sensitivity(llama(), [batch] * 2, "padre", steps=1, held_out=1, **CAUSAL["padre"])
        costs.append([layer.cost for layer in report.layers])
    assert costs[0] == pytest.approx(costs[1], rel=1e-4)


def test_a_mixer_without_weights_is_compared_in_half_precision():
    report = attnzoo.sensitivity(vit(), batches(3), "pooling", steps=1, repair={"autocast": torch.bfloat16})
    assert all(layer.cost > 0 for layer in report.layers)
