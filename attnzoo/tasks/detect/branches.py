"""How large is what the attention of a detector's encoder adds, beside the residual stream that it is added to.

DETR's encoder normalizes after the sum, so that a branch many times as large as the stream leaves nothing of it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from attnzoo.hosts.site import MixerLayer
from attnzoo.repairing.losses import first_tensor
from attnzoo.tasks.detect import mmcv_ext
from attnzoo.tasks.detect.cost import encoder_paths
from attnzoo.tasks.detect.quality import Branch


@contextmanager
def summed(detector: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Sum up powers 0 to 4 of what each attention layer of the encoder adds and of its stream, ``(2, 5)`` by path.

    Of layers that add the stream themselves, as mmcv's deformable attention does, there is no sum.
    """
    sums: dict[str, Tensor] = {}
    with ExitStack() as hooks:
        for path in encoder_paths(detector):
            layer = detector.get_submodule(path)
            if isinstance(layer, (nn.MultiheadAttention, MixerLayer)):
                sums[path] = torch.zeros(2, 5, dtype=torch.float64)
                hooks.enter_context(layer.register_forward_hook(partial(_add, sums[path]), with_kwargs=True))
        yield sums


def _add(sums: Tensor, layer: Any, inputs: Any, named: Mapping[str, Any], output: Any) -> None:
    given = inspect.signature(layer.forward).bind(*inputs, **named).arguments
    pair = torch.stack([first_tensor(output), given["value"]]).cpu().double()  # (2, B, N, C), or (2, N, B, C)
    if (padded := given.get("key_padding_mask")) is not None:  # (B, N)
        real = padded.cpu().to(torch.bool).logical_not()
        pair = pair[:, real if layer.batch_first else real.T]
    sums += torch.stack([(pair**power).flatten(1).sum(1) for power in range(5)], 1)


def branches(sums: Mapping[str, Tensor]) -> tuple[Branch, ...]:
    """Put the sums of all processes together, layer by layer."""
    found = []
    for path, powers in sums.items():
        mmcv_ext.load("mmengine.dist").all_reduce(powers)
        (_, mean, square, cube, fourth), stream = (powers / powers[:, :1]).tolist()
        variance = square - mean**2
        fourth += -4 * mean * cube + 6 * mean**2 * square - 3 * mean**4  # about the mean
        ratio = math.sqrt(square / stream[2]) if stream[2] > 0 else math.nan
        kurtosis = fourth / variance**2 if variance > 1e-9 * square else math.nan
        told = [round(value, 4) if math.isfinite(value) else None for value in (ratio, kurtosis)]
        found.append(Branch(layer=path, ratio=told[0], kurtosis=told[1]))
    return tuple(found)
