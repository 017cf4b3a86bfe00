"""What the encoder's attention adds, beside the residual stream that it is added to."""

import pytest
import torch
from scipy.stats import kurtosis
from torch import nn

import attnzoo
from attnzoo.tasks.detect import mmcv_ext
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
    found, other = branches(sums)
    assert (other.ratio, other.kurtosis) == (None, None), "it was not called"
    out, x = torch.cat(added).double(), torch.cat(stream).double()
    assert found.layer == path
    assert found.ratio == pytest.approx((out.square().mean() / x.square().mean()).sqrt().item(), abs=1e-3)
    assert found.kurtosis == pytest.approx(kurtosis(out.flatten().numpy(), fisher=False), abs=0.02)
    assert not layer._forward_hooks


@pytest.mark.parametrize("batch_first", [True, False])
def test_layers_first_or_images_first(batch_first):
    torch.manual_seed(0)
    detector = Detector(nn.MultiheadAttention(8, 2, batch_first=batch_first))
    x = torch.randn(2, 5, 8)
    hidden = torch.tensor([[False] * 5, [False, True, False, True, True]])
    with summed(detector) as sums, torch.no_grad():
        out = detector(x if batch_first else x.transpose(0, 1), hidden)
    out = out if batch_first else out.transpose(0, 1)
    (found,) = branches(sums)
    ratio = (out[~hidden].square().mean() / x[~hidden].square().mean()).sqrt().item()
    assert found.ratio == pytest.approx(ratio, abs=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0])
def test_what_has_no_figure_is_null(value):
    """As of an encoder that diverged: the detector is scored all the same."""
    detector = Detector(nn.MultiheadAttention(8, 2, batch_first=True))
    with summed(detector) as sums, torch.no_grad():
        detector(torch.full((1, 4, 8), value))
    (found,) = branches(sums)
    assert (found.ratio, found.kurtosis) == (None, None)
    with summed(detector) as sums:
        pass
    assert branches(sums)[0].ratio is None, "no image was seen"


def test_layers_that_add_the_stream_themselves_are_left_out():
    """What mmcv's deformable attention gives is the sum of both."""
    mmcv_ext.ensure()
    from mmcv.ops import MultiScaleDeformableAttention

    detector = Detector(MultiScaleDeformableAttention(embed_dims=16, num_heads=2, num_levels=1, num_points=2))
    assert encoder_paths(detector) == ["encoder.0"]
    with summed(detector) as sums:
        assert not any(module._forward_hooks for module in detector.modules())
    assert sums == {}


class Detector(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.encoder = nn.Sequential(attention)

    def forward(self, x, hidden=None):
        return self.encoder[0](x + 1, x + 1, x, key_padding_mask=hidden)[0]
