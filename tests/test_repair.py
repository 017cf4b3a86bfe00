"""Repair: mixers fitted to the layers that they replaced, in every host."""

import copy
import math

import pytest
import torch

import attnzoo
from attnzoo.errors import OptionError, SwapError, TrainingError
from attnzoo.hosts.versions import cache_arguments  # noqa: F401
from attnzoo.teacher import as_teacher, normalized_error
from tests.zoo import HOSTS, cast, seeded

BY_NAME = {host.name: host for host in HOSTS}
CAUSAL = {"token_mixing": "causal_conv1d", "degree": 2}


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def able(host):
    """The host with padre in all its layers, or None where no mixer can stand."""
    model = seeded(host.build)
    try:
        return model, attnzoo.replace_attention(copy.deepcopy(model), "padre", **(CAUSAL if host.causal else {}))
    except attnzoo.AttnZooError:
        return None


@pytest.mark.parametrize("host", HOSTS, ids=str)
def test_the_teacher_is_the_original_and_errors_fall(host):
    found = able(host)
    if found is None:
        pytest.skip("no mixer can stand in this host; test_vision_mixer.py and test_decoder_mixer.py say why")
    original, model = found
    inputs = host.inputs()
    before = weights(original)
    layers = {path: layer for path, layer in attnzoo.swap.swapped_layers(model).items()}
    with torch.no_grad(), as_teacher(model, layers):
        torch.testing.assert_close(host.call(model, inputs), host.call(original, inputs))
    report = attnzoo.repair(
        model, [inputs], steps=16, lr=2e-3, forward=lambda model, batch: host.call(model, batch)
    )
    assert [layer.path for layer in report.layers] == list(layers)
    assert all(layer.after < layer.before for layer in report.layers), str(report)
    assert same(weights(attnzoo.restore_attention(model)), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
