"""What the encoder's attention adds, beside the residual stream that it is added to."""

import pytest
import torch
from scipy.stats import kurtosis
from torch import nn

import attnzoo
from attnzoo.tasks.detect.branches import branches, summed
from attnzoo.tasks.detect.cost import encoder_paths
from tests.tasks.detect.models import mmdet_detector


@pytest.mark.parametrize("attention", [None, "padre"])
def test_figures_are_those_of_all_real_tokens(attention):
    """Two calls, the second of images that were padded; queries have positions, which the residual stream has not."""
    torch.manual_seed(0)
    detector = mmdet_detector("DABDETR").eval()
    if attention is not None:
        attnzoo.replace_attention(detector, attention, where="encoder.*", kernel_size=3)
    path = encoder_paths(detector)[0]
    layer = detector.get_submodule(path)
    wrapper = detector.get_submodule(path.rpartition(".")[0])
    added, stream = [], []
    masks = [None, torch.tensor([[False] * 6, [False] * 4 + [True] * 2])]
    with summed(detector) as sums, torch.no_grad():
        for mask in masks:
            x, position = torch.randn(2, 6, wrapper.embed_dims), torch.randn(2, 6, wrapper.embed_dims)
            given = {"query_pos": position, "key_padding_mask": mask}
            if attention is not None:
                layer.map.size = (3, 2)  # as the detector tells it
            out = wrapper(x, **given) - x
            real = torch.ones(2, 6, dtype=torch.bool) if mask is None else ~mask
            added.append(out[real])
            stream.append(x[real])
    (found,) = branches(sums)
    out, x = torch.cat(added).double(), torch.cat(stream).double()
    assert found.layer == path
    assert found.ratio == pytest.approx((out.square().mean() / x.square().mean()).sqrt().item(), abs=1e-3)
    assert found.kurtosis == pytest.approx(kurtosis(out.flatten().numpy(), fisher=False), abs=0.02)
    assert not layer._forward_hooks


def test_nothing_but_attention_is_looked_at():
    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = nn.Linear(2, 2)

    with summed(Encoder()) as sums:
        pass
    assert branches(sums) == ()
