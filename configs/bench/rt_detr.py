"""RT-DETR's hybrid encoder with random weights and feature maps: what configs/bench/rt_detr.yaml swaps and measures.

Source: RT-DETR, https://arxiv.org/abs/2304.08069, as transformers has it: attention over the map of 32 pixels per token
alone, and convolutions that join it with those of 16 and 8.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, nn
from transformers import RTDetrConfig
from transformers.models.rt_detr.modeling_rt_detr import RTDetrHybridEncoder

STRIDES = (8, 16, 32)  # pixels per token


def example(side: int) -> tuple[nn.Module, dict[str, list[Tensor]]]:
    """Give the encoder, and the feature maps of an image of `side` by `side` pixels."""
    config = RTDetrConfig()
    maps = [torch.randn(1, config.encoder_hidden_dim, side // stride, side // stride) for stride in STRIDES]
    return RTDetrHybridEncoder(config), {"inputs_embeds": maps}


at_640, at_1280 = partial(example, 640), partial(example, 1280)
