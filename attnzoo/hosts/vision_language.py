"""What a vision-language model of transformers hands to its language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from attnzoo.errors import UnsupportedError

_IMAGE_TOKENS = ("image_token_id", "image_token_index")  # of configs: the number that stands for a piece of an image
_READ = ("inputs_embeds", "attention_mask", "position_ids")


class _Handed(Exception):  # noqa: N818 (no error: it ends a call that has told what was asked)
    def __init__(self, given: dict[str, Any]) -> None:
        super().__init__()
        self.given = given


def image_token(model: Any) -> int:
    """The token in whose places a model puts the pieces of an image.

    Raises
    ------
    UnsupportedError
        If its config names none.
    """
    config = getattr(model, "config", None)
    found = next((getattr(config, name) for name in _IMAGE_TOKENS if getattr(config, name, None) is not None), None)
    if found is None or not hasattr(model, "get_decoder"):
        raise UnsupportedError(
            f"{type(model).__name__} is no vision-language model of transformers: its config names no image token"
        )
    return int(found)


def embedded(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """What a model makes of its inputs before its language model: embeddings of text and image, ``(B, N, C)``.

    Raises
    ------
    UnsupportedError
        If the language model is told more about single tokens than their embeddings and the padding.
    """
    hook = model.get_decoder().register_forward_pre_hook(_stop, with_kwargs=True, prepend=True)
    name = type(model).__name__
    try:
        model(**inputs)
    except _Handed as handed:
        given = handed.given
    else:
        raise UnsupportedError(f"{name} does not call its language model as a module of its own")
    finally:
        hook.remove()
    embeddings, mask, positions = (given.get(key) for key in _READ)
    if not isinstance(embeddings, Tensor) or embeddings.shape[:2] != inputs["input_ids"].shape:
        raise UnsupportedError(f"{name} does not hand its language model one embedding per token")
    if isinstance(positions, Tensor) and positions.dim() == 3:
        raise UnsupportedError(f"{name} gives the pieces of an image positions on several axes, which must not be cut")
    if mask is not None and not (isinstance(mask, Tensor) and mask.dim() == 2):
        raise UnsupportedError(f"{name} makes the masks of its language model itself, by image")
    more = [key for key, value in given.items() if key not in _READ and _has_tensors(value)]
    if more:
        raise UnsupportedError(f"{name} hands its language model more about single tokens: {', '.join(sorted(more))}")
    return embeddings


def _stop(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    raise _Handed(kwargs)


def _has_tensors(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return any(map(_has_tensors, value))
    return isinstance(value, Tensor)
