"""How far a swapped model is from the original one: of a layer's output, and of the model's.

    layer:  |mixer(x) - original(x)|^2 / |original(x)|^2 over real tokens, the mean over images or sequences
    model:  T^2 KL(softmax(original(x) / T) || softmax(swapped(x) / T)), the mean over images or real tokens

The first is LoLCATs' attention transfer (https://arxiv.org/abs/2410.10254) divided by the target's own square, so that
layers of any size count alike; the second is Hinton's distillation (https://arxiv.org/abs/1503.02531).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attnzoo.errors import UnsupportedError

NOTHING = 1e-20  # mean square of a layer's output that counts as zero


def headless(model: nn.Module) -> bool:
    """Whether a model of timm was built without a classifier: its output are features, which look like logits."""
    return getattr(model, "num_classes", None) == 0


def normalized_error(out: Tensor, target: Tensor, mask: Tensor | None = None) -> Tensor:
    """Squared error of `out` relative to `target`, the mean over rows, in float32.

    It is 0 where both are equal, 1 where `out` is zero; of a row whose target is zero, the mean square of `out`.

    Parameters
    ----------
    out, target
        ``(B, N, C)``; ``(N, C)`` is one row.
    mask
        ``(B, N)``, True where a token counts.
    """
    out, target = out.float(), target.detach().float()
    off, whole = (out - target).square().sum(-1), target.square().sum(-1)  # (B, N)
    if mask is not None:
        off, whole = (torch.where(mask.reshape(x.shape), x, 0) for x in (off, whole))
    off, whole = (x.reshape(-1, x.shape[-1]).sum(-1) for x in (off, whole))  # (B,)
    count = out.shape[-1] * out.shape[-2]
    return (off / torch.where(whole > NOTHING * count, whole, count)).mean()


def divergence(swapped: Tensor, original: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """Mean of ``T^2 KL(original || swapped)`` of the softmaxes over the last dimension, in nats.

    Parameters
    ----------
    swapped, original
        Logits ``(..., classes)``.
    temperature
        T, by which both are divided first.
    mask
        ``(...)``, True where a row counts.
    """
    mine, theirs = ((x.float() / temperature).log_softmax(-1) for x in (swapped, original.detach()))
    rows = F.kl_div(mine, theirs, log_target=True, reduction="none").sum(-1)
    if mask is None:
        return rows.mean() * temperature**2
    return torch.where(mask, rows, 0).sum() / mask.sum().clamp_min(1) * temperature**2


def logits_of(output: Any) -> Tensor:
    """The logits of what a model gives: a tensor, an output of transformers, or the first of a tuple.

    Raises
    ------
    UnsupportedError
        If none of these is there.
    """
    found = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if found is None and isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        found = output[0]
    if found is None:
        raise UnsupportedError(
            f"the model gives {type(output).__name__}, which has no logits; give loss=, which compares two such outputs"
        )
    return found


def real_rows(batch: Any, logits: Tensor) -> Tensor | None:
    """Which rows of logits ``(B, N, classes)`` count, where a mapping tells it.

    By ``attention_mask`` ``(B, N)``, or by torch's ``src_key_padding_mask``, which is True where a token is hidden.
    """
    if not isinstance(batch, Mapping):
        return None
    mask, hidden = batch.get("attention_mask"), batch.get("src_key_padding_mask")
    real = ~hidden if isinstance(hidden, Tensor) and hidden.dtype == torch.bool else mask
    if not isinstance(real, Tensor) or real.shape != logits.shape[:-1]:
        return None
    return real.to(logits.device).bool()


def first_tensor(output: Any) -> Tensor:
    """The tensor that an attention gives, alone or before its weights."""
    return output if isinstance(output, Tensor) else next(x for x in output if isinstance(x, Tensor))
