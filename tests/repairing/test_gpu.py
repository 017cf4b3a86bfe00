"""On a GPU a repair comes to what it comes to on a CPU; on a CPU the same is tried there."""

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
def test_a_repair_on_a_gpu_comes_to_what_it_comes_to_on_a_cpu(name):
    expected, logits = repaired(name, "cpu")
    figures, other = repaired(name, DEVICE)
    assert figures == pytest.approx(expected, rel=1e-2)
    torch.testing.assert_close(other, logits, rtol=2e-2, atol=2e-2)
    assert figures[1] < figures[0]
    assert figures[3] < figures[2]


def test_layers_are_compared_on_a_gpu():
    model = vit().to(DEVICE)
    report = attnzoo.sensitivity(model, [torch.randn(4, 3, 64, 64).to(DEVICE) for _ in range(4)], "padre", steps=4)
    assert len(report.layers) == 2
    assert all(layer.cost >= 0 for layer in report.layers)
