"""A stand-in for ``mmcv._ext``, mmcv's compiled operators, where none was compiled.

MMDetection imports mmcv's operators, and their import fails where pip installed mmcv without a compiler. With the
stand-in the import works: NMS and RoI align are torchvision's, and multi-scale deformable attention has a form in
PyTorch that mmcv itself falls back on. Any other operator says, when it is called, what to install.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError
from attnzoo.extras import require

NAME = "mmcv._ext"
INSTALL = "pip install --no-binary onedl-mmcv --no-build-isolation onedl-mmcv, with MMCV_WITH_OPS=1 and a C++ compiler"


def ensure() -> None:
    """Put the stand-in in place, unless mmcv has its compiled operators or the stand-in is there already.

    Raises `MissingExtraError` if mmcv or mmdet is not installed at all.
    """
    require("mmcv", "mmdet", "mmengine", "pycocotools", extra="detection")
    if NAME not in sys.modules and importlib.util.find_spec(NAME) is None:
        standing = StandIn(NAME)
        standing.__spec__ = ModuleSpec(NAME, None)  # mmengine asks for it
        sys.modules[NAME] = standing


def load(module: str) -> Any:
    """Import a module of mmdet's, with the stand-in where it is needed."""
    ensure()
    return importlib.import_module(module)


class StandIn(ModuleType):
    """A module that has every operator by name; those that torchvision lacks raise when they are called."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in _OPERATORS:
            return _OPERATORS[name]

        def missing(*inputs: Any, **options: Any) -> Any:
            raise UnsupportedError(
                f"mmcv's operator {name!r} is not compiled here, and torchvision has none for it; compile mmcv's own: "
                f"{INSTALL}"
            )

        return missing


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes ``(N, 4)`` to keep, the best score first."""
    from torchvision.ops import nms as keep

    if offset:  # boxes whose last pixel counts
        boxes = boxes + boxes.new_tensor([0, 0, offset, offset])
    return keep(boxes, scores, iou_threshold)


def roi_align_forward(x: Tensor, rois: Tensor, output: Tensor, *argmax: Tensor, **how: Any) -> None:
    """Write the mean of each bin of regions `rois` ``(R, 5)`` of `x` into `output` ``(R, C, h, w)``.

    Raises `UnsupportedError` for the maximum of each bin (`pool_mode` 0), which torchvision does not have.
    """
    output.copy_(_roi_align(x, rois, **how))


def roi_align_backward(grad: Tensor, rois: Tensor, y: Tensor, x: Tensor, grad_input: Tensor, **how: Any) -> None:
    """Write the gradient of `roi_align_forward` with respect to its `x` into `grad_input`."""
    with torch.enable_grad():
        x = torch.zeros_like(grad_input, requires_grad=True)
        out = _roi_align(x, rois, **how)
    grad_input.copy_(torch.autograd.grad(out, x, grad)[0])


def _roi_align(x: Tensor, rois: Tensor, *, pool_mode: int, sampling_ratio: int, **how: Any) -> Tensor:
    from torchvision.ops import roi_align

    if pool_mode != 1:
        raise UnsupportedError(f"mmcv's operator 'roi_align' takes the mean only where it is not compiled: {INSTALL}")
    size = how["aligned_height"], how["aligned_width"]
    ratio = sampling_ratio if sampling_ratio > 0 else -1
    return roi_align(x, rois, size, how["spatial_scale"], ratio, how["aligned"])


_OPERATORS: dict[str, Callable[..., Any]] = {
    "nms": nms,
    "roi_align_forward": roi_align_forward,
    "roi_align_backward": roi_align_backward,
}
