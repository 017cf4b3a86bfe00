"""Costs of the attention layer alone, with gradients, against another baseline; trainings at equal parameters."""

import pytest
import yaml

from attnzoo import list_attentions
from attnzoo.errors import UnsupportedError
from attnzoo.kernels import depthwise
from attnzoo.tasks.classify.build import build_model, count_parameters, equal_parameters, swapped
from attnzoo.tasks.suite import measure, plan, validate_config
from tests.bench.data import cost_in
from tests.bench.test_run import HOST, PADRE, tiny

LAYER = {"of": "layer", "tokens": [16], "repeats": 3, "min_seconds": 0}


def outcome(attention, **cost):
    config = validate_config(tiny("unused", attentions=[attention], cost={**LAYER, **cost}))
    return measure(config, plan(config)[1], {}, lambda stage: None)


@pytest.mark.parametrize("name", [*list_attentions("mixer"), *list_attentions("core")])
def test_every_layer_is_gated_and_timed_alone(name):
    own = {"options": {"tokens": 17}} if name == "mlp_mixer" else {}
    layer = outcome({"name": name, **own})
    assert (layer.status, layer.message) == ("ok", "")
    assert layer.gate.passed
    whole = outcome({"name": name, **own}, of="model")
    assert 0 < cost_in(layer).candidate.flops < cost_in(whole).candidate.flops or name == "pooling"
    assert cost_in(layer).baseline.flops < cost_in(whole).baseline.flops
    assert cost_in(layer).candidate.attention_parameters == cost_in(whole).candidate.attention_parameters


def test_forward_and_backward_are_timed_together():
    forward, both = outcome(PADRE), outcome(PADRE, gradient=True)
    assert cost_in(both).candidate.flops >= 2.4 * cost_in(forward).candidate.flops
    assert cost_in(both).baseline.flops >= 2.4 * cost_in(forward).baseline.flops


def test_wrong_gradients_are_not_timed(monkeypatch):
    right = depthwise._backward_by_torch
    monkeypatch.setattr(depthwise, "_depthwise2d_backward", lambda *a: [1.01 * t for t in right(*a)])
    assert outcome(PADRE).status == "ok"
    wrong = outcome(PADRE, gradient=True)
    assert (wrong.status, wrong.costs) == ("failed", {})
    assert "gradients" in wrong.gate.oracle


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_one_wrong_gradient_among_larger_ones_is_found(name, monkeypatch):
    right, wrong_one = depthwise._backward_by_torch, {"weight": 1, "bias": 2}[name]

    def backward(*args):
        return [t * (1.001 if i == wrong_one else 1) for i, t in enumerate(right(*args))]

    monkeypatch.setattr(depthwise, "_depthwise2d_backward", backward)
    found = outcome(PADRE, gradient=True)
    assert (found.status, found.costs) == ("failed", {})
    assert name in found.gate.at


def test_a_row_may_have_another_baseline():
    fused, written = outcome(PADRE), outcome({**PADRE, "fused": False})
    assert "aten._softmax" not in cost_in(fused).uncounted_ops  # torch's fused kernel
    assert "aten._softmax" in cost_in(written).uncounted_ops


def test_a_row_may_be_measured_at_some_token_counts_only():
    config = validate_config(
        tiny(
            "unused",
            attentions=[{"name": "flash", "tokens": [16]}, {**PADRE, "tokens": [64, 16]}],
            cost={"tokens": [16, 64, 256]},
        )
    )
    padre = config.attentions[1].label
    assert [(row.label, row.tokens) for row in plan(config)] == [
        ("dense", 16),
        ("flash", 16),
        (padre, 16),
        ("dense", 64),
        (padre, 64),
    ]


def test_several_workloads_stand_in_one_run():
    costs = [{"tokens": [16]}, {"image_sizes": [16, [16, 32]], "batch": 2}, {"tokens": [16], "dtype": "bfloat16"}]
    data = tiny("unused", attentions=[PADRE], costs=costs)
    del data["cost"]
    config = validate_config(data)
    dense = [cell for cell in plan(config) if cell.is_baseline]
    assert [(cell.tokens, cell.workload) for cell in dense] == [
        (16, "batch 1"),
        (16, "batch 2"),
        (32, "batch 2, 16 x 32 pixels"),
        (16, "batch 1, bfloat16"),
    ]
    again = validate_config(yaml.safe_load(config.to_yaml()))
    assert (again.hash, plan(again)) == (config.hash, plan(config))


def test_images_need_not_be_square():
    cost = {"image_sizes": [[8, 16]], "batch": 3, "repeats": 3, "min_seconds": 0}
    config = validate_config(tiny("unused", attentions=["flash", PADRE], cost=cost))
    for cell in plan(config)[1:]:
        found = measure(config, cell, {}, lambda stage: None)
        assert (found.status, found.shapes.tokens, found.shapes.batch) == ("ok", 8, 3), found.message
        assert found.gate.passed


def test_a_part_of_the_model_is_swapped():
    host = {**HOST, "options": {**HOST["options"], "depth": 3}}
    found = {}
    for where in (None, "blocks.[01]", ["blocks.1"]):
        config = validate_config(tiny("unused", model=host, attentions=[{**PADRE, "where": where}]))
        result = measure(config, plan(config)[1], {}, lambda stage: None)
        assert result.gate.passed
        cost = cost_in(result)
        found[str(where)] = cost.candidate.attention_parameters - cost.baseline.attention_parameters
        cell = plan(config)[1]
        assert cell.options.get("where") == (tuple(where) if isinstance(where, list) else where)
        alone = {**LAYER, "tokens": [16]}
        config = validate_config(tiny("unused", model=host, attentions=[{**PADRE, "where": where}], cost=alone))
        layer = cost_in(measure(config, plan(config)[1], {}, lambda stage: None))
        assert layer.candidate.flops != layer.baseline.flops, "the layer that is timed alone is a swapped one"
    assert found["None"] == pytest.approx(3 * found["['blocks.1']"])
    assert found["blocks.[01]"] == pytest.approx(2 * found["['blocks.1']"])
    labels = [
        a.label
        for a in validate_config(tiny("x", attentions=["flash", {"name": "flash", "where": "blocks.0"}])).attentions
    ]
    assert labels == ["flash", "flash in blocks.0"]
    plain, said = (validate_config(tiny("x", attentions=[a])) for a in ("flash", {"name": "flash", "where": None}))
    assert plain.hash == said.hash


@pytest.mark.parametrize("name", list_attentions("mixer"))
def test_equal_parameters(name):
    spec = {"name": name, **({"options": {"tokens": 17}} if name == "mlp_mixer" else {})}
    config = validate_config(tiny("unused", attentions=[spec]))

    def build(options):
        own = {**HOST["options"], "embed_dim": 96, "num_heads": 3, **options}
        return build_model(
            "vit_tiny_patch16_224", image_size=16, patch_size=4, channels=1, classes=10, options=own, seed=0
        )

    spec = config.attentions[0]
    model = swapped(build(equal_parameters(build, spec, 0)), spec, 0)
    assert abs(count_parameters(model) / count_parameters(build({})) - 1) < 0.03


def test_parameters_that_cannot_be_equal_are_refused():
    config = validate_config(tiny("unused", attentions=[{"name": "padre", "options": {"degree": 12}}]))

    def build(options):
        return build_model(
            "vit_tiny_patch16_224",
            image_size=16,
            patch_size=4,
            channels=1,
            classes=10,
            options={**HOST["options"], **options},
            seed=0,
        )

    with pytest.raises(UnsupportedError, match="the attention alone has too many"):
        equal_parameters(build, config.attentions[0], 0)
