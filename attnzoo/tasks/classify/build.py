"""Vision models: built, swapped, and made equal in parameters."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import attnzoo
from attnzoo.bench.attentions import AttentionConfig
from attnzoo.bench.cost import attention_paths
from attnzoo.errors import AttnZooError, ConfigError, UnsupportedError
from attnzoo.extras import require
from attnzoo.tasks.classify.cost_config import HostConfig

NEARLY_EQUAL = 0.03  # parameters of two models
Dense = Callable[[Mapping[str, Any]], nn.Module]  # builds a model with its own attention, with further options


def check_model_name(model: str) -> None:
    """Raise `ConfigError`, with the nearest names, unless timm has a model of this name."""
    require("timm")
    import timm

    if not timm.is_model(model):
        close = difflib.get_close_matches(model, timm.list_models(), n=3)
        raise ConfigError(f"timm has no model {model!r}" + (f"; did you mean {' or '.join(close)}?" if close else ""))


def build_model(
    model: str,
    *,
    image_size: int | tuple[int, int],
    channels: int,
    classes: int,
    options: Mapping[str, Any],
    seed: int,
    patch_size: int | None = None,
    pretrained: bool = False,
) -> nn.Module:
    """Build a timm model, initialized from `seed` or, if `pretrained`, with timm's weights.

    Raises `MissingExtraError` if timm is not installed; `ConfigError` if timm has no such model, or cannot build it.
    """
    check_model_name(model)
    import timm

    sizes = {"img_size": image_size, "in_chans": channels, "num_classes": classes}
    patch = {} if patch_size is None else {"patch_size": patch_size}
    torch.manual_seed(seed)
    try:
        return timm.create_model(model, pretrained=pretrained, **sizes, **patch, **options)
    except Exception as error:  # a factory may raise anything
        if isinstance(error, AttnZooError):
            raise
        raise ConfigError(f"timm cannot build {model!r}: {type(error).__name__}: {error}") from error


def with_baseline(model: nn.Module, fused: bool) -> nn.Module:
    """Choose between timm's own two ways of computing attention, in place."""
    for path in attention_paths(model):
        layer: Any = model.get_submodule(path)
        if not isinstance(getattr(layer, "fused_attn", None), bool):
            raise UnsupportedError(f"{path} ({type(layer).__name__}) has no switch between fused and unfused attention")
        layer.fused_attn = fused
    return model


def build_host(
    host: HostConfig, image_size: int | tuple[int, int], seed: int, fused: bool, more: Mapping[str, Any]
) -> nn.Module:
    """Build a benchmark's model with its own attention, fused or not, and `more` options than its own."""
    sizes = {"image_size": image_size, **host.model_dump(include={"patch_size", "channels", "classes"})}
    return with_baseline(build_model(host.name, **sizes, options={**host.options, **more}, seed=seed), fused)


def swapped(model: nn.Module, spec: AttentionConfig | None, seed: int) -> nn.Module:
    """Put the attention of `spec` into `model`, in place; what it adds is initialized from `seed`."""
    if spec is None:
        return model
    torch.manual_seed(seed)
    return attnzoo.replace_attention(model, spec.name, keep_original=False, **spec.swap)


def equal_parameters(dense: Dense, spec: AttentionConfig, seed: int) -> dict[str, Any]:
    """Find the width of the MLPs with which a swapped timm model has the parameters of the dense one, to 3%.

    It is given as the option ``mlp_ratio``, a multiple of the model's width. Raises `UnsupportedError` if the attention
    alone has too many parameters.
    """

    def count(ratio: float) -> int:
        return count_parameters(swapped(dense({"mlp_ratio": ratio}), spec, seed))

    model: Any = dense({})
    wanted, width = count_parameters(model), model.embed_dim
    one, two = count(1), count(2)
    if one == two:
        raise UnsupportedError(f"{type(model).__name__} has no MLPs whose width could make the parameters equal")
    hidden = round(width * (1 + (wanted - one) / (two - one)))
    ratio = (hidden + 0.5) / width  # timm cuts the product to a whole number
    found = count(ratio) if hidden > 0 else 0
    if abs(found / wanted - 1) > NEARLY_EQUAL:
        raise UnsupportedError(
            f"no width of the MLPs gives {spec.label} {wanted:,} parameters, those of the dense model: the attention "
            f"alone has too many (nearest: {found:,})"
        )
    return {"mlp_ratio": ratio}


def count_parameters(model: nn.Module) -> int:
    """Number of a model's parameters."""
    return sum(p.numel() for p in model.parameters())


def logits(model: nn.Module, images: Tensor) -> Tensor:
    """Class scores ``(B, classes)`` of images ``(B, C, H, W)``, from a model of either library."""
    out = model(images)
    return out if isinstance(out, Tensor) else out.logits
