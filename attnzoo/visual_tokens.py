"""Fewer tokens for the images that a vision-language model sees, chosen by their diversity.

Paper: Alvar et al., DivPrune: Diversity-based Visual Token Pruning for Large Multimodal Models,
https://arxiv.org/abs/2503.02175; the rule is `attnzoo.eviction.divprune.chosen_order`, on the embeddings that the
language model is given.

Differs from the paper: nothing, for one image per text; the images of a text are pruned together.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import OptionError, short
from attnzoo.eviction.divprune import chosen_order
from attnzoo.eviction.policy import wide


def prune_visual_tokens(model: Any, inputs: Mapping[str, Any], *, keep: float = 0.25) -> dict[str, Tensor]:
    """Drop most tokens of the images in the inputs of a vision-language model, before its language model sees them.

    The model encodes the images once. What is returned takes the place of the inputs in one call, or in ``generate``:
    the language model then reads, and caches, fewer tokens. It may be bounded by an eviction policy besides.

    Parameters
    ----------
    model
        A vision-language model of transformers that hands its language model embeddings and a mask of the padding
        alone, as LLaVA does.
    inputs
        What its processor gave: ``input_ids`` ``(B, N)``, ``attention_mask``, ``pixel_values`` and so on.
    keep
        Share of the image tokens of each row that stay, above 0 and at most 1; at least one stays.

    Returns
    -------
    dict
        ``inputs_embeds`` ``(B, M, C)`` and ``attention_mask`` ``(B, M)``, padded on the left. Positions close up.

    Raises
    ------
    OptionError
        If `keep` is no such share, or the inputs have no ``input_ids`` or no image in them.
    UnsupportedError
        If the model is another, or tells its language model more about its tokens (positions on several axes, as
        Qwen2-VL does; masks by image, as Gemma 3 does).
    """
    from attnzoo.hosts.vision_language import embedded, image_token

    if isinstance(keep, bool) or not isinstance(keep, (int, float)) or not 0 < keep <= 1:
        raise OptionError(f"keep must be a share above 0 and at most 1, not {short(keep)}")
    token = image_token(model)
    ids = inputs.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        raise OptionError("the inputs must have input_ids (B, N), as the model's processor gives them")
    visual = ids == token
    if not bool(visual.any()):
        raise OptionError(f"there is no image in these inputs: none of input_ids is the image token, {token}")
    mask = inputs.get("attention_mask")
    real = torch.ones_like(visual) if mask is None else mask.bool()
    embeddings = embedded(model, inputs)
    rows = [
        row[_stays(row, seen & there, there, keep)] for row, seen, there in zip(embeddings, visual, real, strict=True)
    ]
    width = max(map(len, rows))
    cut = embeddings.new_zeros(len(rows), width, embeddings.shape[2])
    there = ids.new_zeros(len(rows), width)
    for index, row in enumerate(rows):
        cut[index, width - len(row) :] = row
        there[index, width - len(row) :] = 1
    return {"inputs_embeds": cut, "attention_mask": there}


@torch.no_grad()
def _stays(embeddings: Tensor, visual: Tensor, real: Tensor, keep: float) -> Tensor:
    """Which tokens of a row ``(N, C)`` stay, ``(N,)``: of those of images the most diverse, no padding."""
    count = int(visual.sum())
    if not count:
        return real
    features = wide(embeddings[visual])
    order = chosen_order(
        features, max(1, round(keep * count)), torch.zeros(count, dtype=torch.bool, device=real.device)
    )
    return real & (~visual).masked_scatter(visual, order > 0)
