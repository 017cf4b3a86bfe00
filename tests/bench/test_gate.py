import math

import pytest
import torch
from torch import nn

from attnzoo.bench.gate import OUTPUT, TOLERANCE, compare, finite, mixer_gate, noted, refuse


class Doubler(nn.Module):
    """A mixer with a reference of its own; `wrong` puts a fault into the fast path."""

    def __init__(self, wrong=0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(2.0))
        self.wrong = wrong

    def forward(self, x, grid=None, prefix=0, mask=None):
        assert x.shape[1] == prefix + grid[0] * grid[1]
        return self.weight * x + self.wrong

    def reference(self, x, grid=None, prefix=0, mask=None):
        assert x.dtype == torch.float64
        return x + x


class NoReference(nn.Module):
    def forward(self, x, grid=None, prefix=0, mask=None):
        return x * 3


def gate_of(mixer, dtype=torch.float32):
    return mixer_gate({"blocks.0.attn": mixer.to(dtype)}, 8, 1, torch.zeros(1, dtype=dtype), 0)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_a_mixer_that_follows_its_paper_passes_in_every_dtype(dtype):
    gate = gate_of(Doubler(), dtype)
    assert gate.passed
    assert "reference in float64" in gate.oracle
    assert gate.at == "blocks.0.attn"


def test_a_mixer_that_does_not_is_caught_with_its_error():
    gate = gate_of(Doubler(wrong=0.25))
    assert not gate.passed
    assert gate.max_abs_error == pytest.approx(0.25, rel=1e-4)


def test_without_a_reference_the_gate_says_so():
    gate = gate_of(NoReference())
    assert gate.passed
    assert "itself in float64 (no reference)" in gate.oracle


def test_the_worst_tensor_speaks_for_all():
    oracle = {"a": torch.ones(3), "b": torch.full((3,), 100.0)}
    gate = compare({"a": torch.tensor([1.0, 1.0, 1.01]), "b": oracle["b"] + 0.1}, oracle, "o", 1e-3)
    assert (gate.at, gate.passed) == ("a", False)
    assert gate.max_abs_error == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_never_passes_and_has_no_figure(value):
    gate = compare({"a": torch.tensor([value])}, {"a": torch.ones(1)}, "o", 1e9)
    assert not gate.passed
    assert gate.max_abs_error is None
    assert not finite(compare({"a": torch.ones(1)}, {"a": torch.ones(1)}, "o", 1e-4), torch.tensor([value])).passed


def test_an_oracle_that_is_zero_proves_nothing():
    gate = compare({"a": torch.zeros(2)}, {"a": torch.zeros(2)}, "o", 1e-4)
    assert not gate.passed
    assert "proves nothing" in gate.detail


def test_a_refused_gate_keeps_its_figures():
    gate = compare({"a": torch.ones(1)}, {"a": torch.ones(1)}, "o", 1e-4)
    assert refuse(gate, None) == gate
    assert (refuse(gate, "no flash").passed, refuse(gate, "no flash").detail) == (False, "no flash")


def test_layers_are_noted_and_the_hooks_are_gone_afterwards():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    with noted(model, ["0"]) as found:
        y = model(torch.ones(1, 2))
    assert torch.equal(found[OUTPUT], y)
    assert set(found) == {"0", OUTPUT}
    assert not any(module._forward_hooks for module in model.modules())
