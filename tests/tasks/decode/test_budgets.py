"""Budgets in bytes, and budgets that differ by layer and head, in the task that measures decoding."""

import pytest
import torch

from attnzoo.bench.attentions import AttentionConfig
from attnzoo.hosts.versions import output_cache
from attnzoo.tasks.decode.cost import check
from attnzoo.tasks.decode.decoder import Decoder, policy_of, swapped_twin
from attnzoo.tasks.decode.score import unbounded
from tests.eviction.models import language_model, token_ids

SPECS = {
    "bytes": {"budget": "20 kB"},
    "pyramid": {"budget": 24, "budgets": "pyramid"},
    "adaptive": {"budget": 24, "budgets": "adaptive", "sink": 2},
    "share": {"budget": 0.4, "budgets": "pyramid"},
}


@pytest.fixture(scope="module")
def dense():
    return language_model(dtype=torch.float32)


@pytest.mark.parametrize("kind", SPECS)
def test_the_gate_compares_the_same_store_with_dense(dense, kind):
    """Nothing is evicted for it, whatever a layer has in the run."""
    spec = AttentionConfig(name="h2o", options={"block_size": 8, **SPECS[kind]})
    layers = [name for name, _ in dense.named_modules() if name.endswith("self_attn")]
    gate, baseline = check(dense, layers, spec, token_ids(1, 60))
    assert gate.passed
    assert baseline.passed
    assert "budget 52 of 52 tokens" in gate.oracle
    assert unbounded(spec, 96).options["budget"] == 96
    assert unbounded(spec, 96).options.get("budgets") in (None, "adaptive")


@pytest.mark.parametrize("kind", SPECS)
def test_each_layer_is_held_to_its_own_bound(dense, kind):
    spec = AttentionConfig(name="h2o", options={"block_size": 8, **SPECS[kind]})
    model = swapped_twin(dense, spec)
    run = Decoder(model, token_ids(2, 77), policy_of(spec))
    run.read()
    run.look()
    for _ in range(5):
        run.step()
        run.look()
    assert not run.broken
    assert 0 < run.most <= run.limit
    layer = output_cache(run._out).layers[0]
    if kind == "adaptive":  # what the spec says counts, not what a layer says of itself
        run.policy = run.policy.changed(budget=2)
    else:
        layer.policy = layer.policy.changed(budget=1)
    run.look()
    assert "a layer held" in run.broken
