"""What mmengine's Runner needs to build, train and load detectors of mmdet whose attention a config names.

In a config::

    custom_imports = dict(imports=["attnzoo.tasks.detect.model"])
    model = dict(type="SwappedDETR", attention=dict(name="padre", degree=2, where="encoder.*"))

`attention` holds what `attnzoo.replace_attention` takes; without it the detector keeps its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from attnzoo.hosts.site import MixerLayer
from attnzoo.swap import replace_attention
from attnzoo.tasks.detect import mmcv_ext

MODELS = mmcv_ext.load("mmdet.registry").MODELS
detectors: Any = mmcv_ext.load("mmdet.models.detectors")


class Swapped(nn.Module):
    """A base beside a detector's own, which swaps its attention as soon as it is built."""

    def __init__(self, *inputs: Any, attention: Mapping[str, Any] | None = None, **options: Any) -> None:
        super().__init__(*inputs, **options)
        self.attention = None if attention is None else dict(attention)
        if self.attention is not None:
            replace_attention(self, **{"keep_original": False, **self.attention})

    def init_weights(self) -> None:
        """Initialize as the detector does, but leave mixers as they were made: DETR's way is for attention alone."""
        mixers = [module.mixer for module in self.modules() if isinstance(module, MixerLayer)]
        kept = [{name: t.clone() for name, t in mixer.state_dict().items()} for mixer in mixers]
        detector: Any = super()
        detector.init_weights()
        with torch.no_grad():
            for mixer, state in zip(mixers, kept, strict=True):
                mixer.load_state_dict(state)


@MODELS.register_module()
class SwappedDETR(Swapped, detectors.DETR):
    """DETR."""


@MODELS.register_module()
class SwappedConditionalDETR(Swapped, detectors.ConditionalDETR):
    """Conditional DETR."""


@MODELS.register_module()
class SwappedDABDETR(Swapped, detectors.DABDETR):
    """DAB-DETR."""


@mmcv_ext.load("mmengine.registry").HOOKS.register_module()
class SeedEachEpoch(mmcv_ext.load("mmengine.hooks").Hook):  # type: ignore[misc]  # loaded at run time: Any to mypy
    """Seed Python, NumPy and PyTorch again at the beginning of every epoch.

    mmengine's checkpoints hold no random state. With this, and data read in the process itself (``num_workers=0``), a
    run that was interrupted and resumed ends with exactly the weights of one that was not.
    """

    def before_train_epoch(self, runner: Any) -> None:
        """Seed by the run's seed, the epoch and the process."""
        sequence = np.random.SeedSequence([runner.seed, runner.epoch, runner.rank])
        mmcv_ext.load("mmengine.runner").set_random_seed(int(sequence.generate_state(1)[0]))
