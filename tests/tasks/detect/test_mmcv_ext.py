"""The stand-in for mmcv's compiled operators."""

import importlib.machinery
import importlib.util
import subprocess
import sys

import pytest
import torch
from torchvision import ops

from attnzoo.errors import UnsupportedError
from attnzoo.tasks.detect import mmcv_ext

compiled = importlib.machinery.PathFinder.find_spec(
    "mmcv._ext", importlib.util.find_spec("mmcv").submodule_search_locations
)


@pytest.fixture
def standing():
    return mmcv_ext.StandIn("mmcv._ext")


def test_nms_is_torchvisions(standing):
    torch.manual_seed(0)
    corner = torch.rand(40, 2) * 10
    boxes, scores = torch.cat([corner, corner + 3 + torch.rand(40, 2)], 1), torch.rand(40)
    assert torch.equal(standing.nms(boxes, scores, iou_threshold=0.4, offset=0), ops.nms(boxes, scores, 0.4))
    wider = boxes + torch.tensor([0.0, 0, 1, 1])
    assert torch.equal(standing.nms(boxes, scores, iou_threshold=0.4, offset=1), ops.nms(wider, scores, 0.4))


def test_mmcvs_own_functions_work_over_it():
    mmcv_ext.ensure()
    from mmcv.ops import nms, roi_align

    boxes = torch.tensor([[0.0, 0, 4, 4], [0, 0, 4, 5], [6, 6, 9, 9]])
    kept, order = nms(boxes, torch.tensor([0.5, 0.9, 0.7]), 0.5)
    assert order.tolist() == [1, 2]
    assert kept[:, -1].tolist() == pytest.approx([0.9, 0.7])
    x = torch.randn(2, 3, 8, 8, requires_grad=True)
    rois = torch.tensor([[0, 1.0, 1, 6, 6], [1, 0, 2, 5, 7]])
    ours = roi_align(x, rois, (2, 3), 1.0, 2, "avg", True)
    theirs = ops.roi_align(x, rois, (2, 3), 1.0, 2, True)
    torch.testing.assert_close(ours, theirs)
    weight = torch.randn_like(ours)
    mine, its = (torch.autograd.grad((out * weight).sum(), x, retain_graph=True)[0] for out in (ours, theirs))
    torch.testing.assert_close(mine, its)


def test_deformable_attention_works_on_the_cpu():
    mmcv_ext.ensure()
    from mmcv.ops import MultiScaleDeformableAttention

    layer = MultiScaleDeformableAttention(embed_dims=16, num_heads=2, num_levels=1, num_points=2, batch_first=True)
    x = torch.randn(1, 12, 16)
    out = layer(
        x,
        value=x,
        reference_points=torch.rand(1, 12, 1, 2),
        spatial_shapes=torch.tensor([[3, 4]]),
        level_start_index=torch.tensor([0]),
    )
    assert out.shape == x.shape
    assert torch.isfinite(out).all()


@pytest.mark.skipif(compiled is not None, reason="mmcv's operators are compiled here")
def test_any_other_operator_says_by_name_what_to_install():
    mmcv_ext.ensure()
    from mmcv.ops import RoIPool

    with pytest.raises(UnsupportedError, match=r"'roi_pool_forward' is not compiled here.*MMCV_WITH_OPS"):
        RoIPool((2, 2))(torch.randn(1, 1, 4, 4), torch.tensor([[0, 0.0, 0, 3, 3]]))


def test_the_maximum_of_a_region_is_refused(standing):
    with pytest.raises(UnsupportedError, match="roi_align"):
        standing.roi_align_forward(
            *[torch.zeros(1, 1, 2, 2), torch.zeros(1, 5), torch.zeros(1, 1, 1, 1), torch.zeros(0), torch.zeros(0)],
            aligned_height=1,
            aligned_width=1,
            spatial_scale=1.0,
            sampling_ratio=0,
            pool_mode=0,
            aligned=True,
        )


def test_a_compiled_one_is_left_alone():
    """A module of that name that is there already stays; importing attnzoo alone puts nothing in place."""
    code = (
        "import sys, types, importlib.machinery as m; import attnzoo, attnzoo.tasks.detect.mmcv_ext as e; "
        "assert 'mmcv._ext' not in sys.modules; "
        "own = types.ModuleType('mmcv._ext'); own.__spec__ = m.ModuleSpec('mmcv._ext', None); "
        "sys.modules['mmcv._ext'] = own; e.ensure(); assert sys.modules['mmcv._ext'] is own"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
