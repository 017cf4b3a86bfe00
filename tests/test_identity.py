"""Contract 1: a core changes nothing, to rounding, in any host; and it really runs."""

import pytest
import torch

import attnzoo
from tests.zoo import GRADIENT_TOLERANCE, HOSTS, OUTPUT_TOLERANCE, RELATIVE, Host, cast, seeded

pytestmark = pytest.mark.compat

CORES = ("softmax", "sdpa", "flash")


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


def gradients(model, host: Host):
    model.zero_grad()
    out = host.call(model, host.inputs())
    (out * torch.linspace(0.5, 1.5, out.numel()).view_as(out)).mean().backward()
    return out.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


# flash takes no mask that requires a gradient
PAIRS = [(h, c) for h in HOSTS for c in CORES] + [(RELATIVE, "softmax"), (RELATIVE, "sdpa")]


@pytest.mark.parametrize(("host", "core"), PAIRS, ids=str)
def test_outputs_and_gradients_stay(host: Host, core: str):
    model = seeded(host.build)
    keys = list(model.state_dict())
    for train in (False, True):
        model.train(train)
        with torch.no_grad():
            plain = host.call(model, host.inputs())
        expected, expected_gradients = gradients(model, host)

        attnzoo.replace_attention(model, core)
        assert len(attnzoo.swap_report(model).swapped) == host.layers
        assert list(model.state_dict()) == keys
        assert all(m.training == train for m in model.modules())
        with torch.no_grad():
            assert difference(host.call(model, host.inputs()), plain) <= OUTPUT_TOLERANCE[torch.float32]
        out, found = gradients(model, host)
        assert difference(out, expected) <= OUTPUT_TOLERANCE[torch.float32]
        assert found.keys() == expected_gradients.keys()
        for name, gradient in expected_gradients.items():
            assert difference(found[name], gradient) <= GRADIENT_TOLERANCE[torch.float32], name
            largest = gradient.abs().max()
            assert largest == 0 or (found[name] - gradient).abs().max() <= 1e-3 * largest + 1e-7, name
        attnzoo.restore_attention(model)


# transformers' own eager attention gives NaN for left padding in float64: there is nothing to be equal to
OTHER_DTYPES = [(h, torch.bfloat16) for h in HOSTS] + [(h, torch.float64) for h in HOSTS if "eager" not in h.name]


@pytest.mark.parametrize(("host", "dtype"), OTHER_DTYPES, ids=str)
def test_outputs_stay_in_other_dtypes(host: Host, dtype: torch.dtype):
    model, inputs = seeded(host.build).to(dtype), cast(host.inputs(), dtype)
    with torch.no_grad():
        expected = host.call(model, inputs)
        for core in ("softmax", "flash"):
            out = host.call(attnzoo.replace_attention(model, core), inputs)
            assert difference(out, expected) <= OUTPUT_TOLERANCE[dtype], core


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("host", HOSTS, ids=str)
def test_a_core_of_zeros_changes_every_host(host: Host, train: bool, grad: bool, zeros: str):
    model = seeded(host.build).train(train)
    with torch.set_grad_enabled(grad):
        before = host.call(model, host.inputs())
        after = host.call(attnzoo.replace_attention(model, zeros), host.inputs())
    assert (after - before).abs().max() > 1e-3 * before.abs().max()


@pytest.mark.parametrize("host", HOSTS, ids=str)
def test_each_layer_alone_counts(host: Host, zeros: str):
    """Every single swapped layer is called, not only the first."""
    model = seeded(host.build)
    before = host.call(model, host.inputs()).detach()
    for layer in attnzoo.swap_report(model).layers:
        after = host.call(attnzoo.replace_attention(model, zeros, where=layer.path), host.inputs())
        assert (after - before).abs().max() > 1e-3 * before.abs().max(), layer.path
        attnzoo.restore_attention(model)
    assert torch.equal(host.call(model, host.inputs()), before)
