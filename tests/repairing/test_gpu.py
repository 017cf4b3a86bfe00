"""On a GPU a repair comes to what it comes to on a CPU; where there is none, two repairs on the CPU are compared."""

import pytest
import torch

import attnzoo
from tests.repairing.models import vit

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
STAGES = [{"objective": "layer"}, {"objective": "model", "train": "all", "lr": 1e-4}]


def repaired(name, device, **options):
    """Errors of the layers and loss of the model before and after two stages, and the first logits at the end."""
    model = vit()
    batches = [torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(at)).to(device) for at in range(3)]
    torch.manual_seed(1)
    attnzoo.replace_attention(model, name, **options)
    model.to(device)
    reports = [attnzoo.repair(model, batches, steps=3, **stage) for stage in STAGES]
    figures = [loss for report in reports for loss in (report.loss_before, report.loss_after)]
    with torch.no_grad():
        return figures, model(batches[0]).cpu()


@pytest.mark.parametrize("name", ["padre", "conv", "linear_angular"])
def test_a_repair_comes_to_the_same_on_every_device(name):
    expected, logits = repaired(name, "cpu")
    figures, other = repaired(name, DEVICE)
    assert figures == pytest.approx(expected, rel=1e-2)
    torch.testing.assert_close(other, logits, rtol=2e-2, atol=2e-2)
    assert figures[1] < figures[0]
    assert figures[3] < figures[2]


def test_layers_cost_the_same_on_every_device():
    data = [torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(at)) for at in range(4)]
    costs = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(1)
        report = attnzoo.sensitivity(vit().to(device), [x.to(device) for x in data], "pooling", steps=1)
        costs.append([layer.cost for layer in report.layers])
    assert costs[1] == pytest.approx(costs[0], rel=2e-2)
    assert min(costs[0]) > 0
