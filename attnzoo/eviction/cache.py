"""The bounded cache as transformers sees it: a `DynamicCache` whose swapped layers are attnzoo's own, and its file.

How a call goes through it is told at the head of `attnzoo.eviction.calls`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from attnzoo import files
from attnzoo.errors import AssetError, AttnZooError, UnsupportedError, short
from attnzoo.eviction.layers import BoundedLayer, MakesBounded, SwappedCacheLayer
from attnzoo.hosts import versions
from attnzoo.registry import build_policy, describe

FILE_FORMAT = 1


class BoundedCache(DynamicCache):
    """A `DynamicCache` some or all of whose layers are attnzoo's own.

    It is never made by hand: a model whose attention was swapped turns any empty `DynamicCache` into one.

    Attributes
    ----------
    real
        ``(B, tokens seen)``, True where a token was real; None if all were.
    """

    real: Tensor | None = None

    def get_mask_sizes(self, query: Any, layer_idx: int) -> tuple[int, int]:
        """Length and offset of the mask.

        Where every layer that would read it is bounded, only the new tokens: nobody looks at the rest.
        """
        layer = self.layers[layer_idx]
        readers = [other for other in self.layers if not getattr(other, "is_sliding", False)]
        if isinstance(layer, SwappedCacheLayer) and all(isinstance(other, SwappedCacheLayer) for other in readers):
            return versions.new_tokens(query), layer.columns
        return super().get_mask_sizes(query, layer_idx)

    def flush(self) -> None:
        """Evict now, in every bounded layer, though blocks are not at their end."""
        for layer in self.own:
            layer.flush()

    def end_prompt(self) -> None:
        """Evict in layers whose policy waits for the end of the prompt; others go on as they are."""
        for layer in self.own:
            layer.end_prompt()

    def crop(self, *args: Any, **kwargs: Any) -> None:
        """Take tokens back, or leave all layers as they are where one cannot."""
        for layer in self.own:
            layer.crop(*args, **kwargs)
        super().crop(*args, **kwargs)

    @property
    def is_initialized(self) -> bool:
        """Whether every layer took tokens in."""
        return bool(self.layers) and all(layer.is_initialized for layer in self.layers)

    def check_whole(self) -> None:
        """Refuse to go on from a call that broke off between layers or within one.

        Raises
        ------
        UnsupportedError
            If layers have seen different numbers of tokens.
        """
        seen = {layer.get_seq_length() for layer in self.layers if _counts(layer)}
        if len(seen) > 1 or any(layer.torn for layer in self.own):
            numbers = " and ".join(map(str, sorted(seen)))
            raise UnsupportedError(
                f"an earlier call with this cache broke off on its way through the layers, which have seen {numbers} "
                "tokens; give the call a new cache, or a copy() that was made before"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put rows in another order (beam search)."""
        super().reorder_cache(beam_idx)
        self._map_real(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)
        self._map_real(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        super().batch_select_indices(indices)
        self._map_real(lambda x: x[indices.to(x.device)])

    def reset(self) -> None:
        """Forget everything."""
        super().reset()
        self.real = None

    def _map_real(self, change: Callable[[Tensor], Tensor]) -> None:
        self.real = None if self.real is None else change(self.real)

    @property
    def own(self) -> list[SwappedCacheLayer]:
        """The layers that are attnzoo's own."""
        return [layer for layer in self.layers if isinstance(layer, SwappedCacheLayer)]

    def copy(self) -> BoundedCache:
        """A cache of its own with the same content, cut off from autograd: to use a prompt more than once."""
        other = copy.copy(self)
        other.layers = [
            layer.copy() if isinstance(layer, SwappedCacheLayer) else _copy_plain(layer) for layer in self.layers
        ]
        return other

    def save(self, path: str | Path) -> None:
        """Write the cache to a file, whole or not at all; `attnzoo.load_cache` reads it back.

        Raises
        ------
        UnsupportedError
            If it holds layers that are neither bounded, nor plain, nor of a sliding window, or a call that broke off.
        AssetError
            If the file cannot be written.
        """
        self.check_whole()
        path = Path(path)
        layers = [_layer_state(layer) for layer in self.layers]
        content = {"format": FILE_FORMAT, "layers": layers, "real": None if self.real is None else self.real.clone()}
        if path.is_dir():
            raise AssetError(f"the cache cannot be written to {str(path)!r}, a folder: name a file in it")
        try:
            with files.atomic(path) as part, part.open("wb") as file:
                torch.save(content, file)
        except OSError as error:
            raise AssetError(f"the cache cannot be written to {str(path)!r}: {error.strerror or error}") from error


def load_cache(path: str | Path, device: str | torch.device | None = None) -> BoundedCache:
    """Read a cache that `BoundedCache.save` wrote.

    Parameters
    ----------
    path
        The file.
    device
        Where its tensors go; by default where they were.

    Raises
    ------
    AssetError
        If the file cannot be read or is not a saved cache.
    """
    try:
        with open(path, "rb"):
            pass
    except OSError as error:
        raise AssetError(f"the cache {str(path)!r} cannot be read: {error.strerror}") from error
    try:
        content = torch.load(path, map_location=device, weights_only=True)
        if content["format"] != FILE_FORMAT:
            raise ValueError(f"format {content['format']}, expected {FILE_FORMAT}")
        layers = [_layer_from(state, index) for index, state in enumerate(content["layers"])]
        real = content.get("real")
    except AttnZooError as error:  # of a policy, which may need a file of its own
        raise AssetError(f"the cache {str(path)!r} cannot be used here: {error}") from error
    except Exception as error:
        why = f"{type(error).__name__}: {error}"
        raise AssetError(f"{str(path)!r} is not a cache saved by attnzoo, or is damaged ({why})") from error
    cache = BoundedCache()
    cache.layers, cache.real = layers, real
    return cache


def _counts(layer: Any) -> bool:
    """Whether a layer counts the tokens that it has seen."""
    return isinstance(layer, (SwappedCacheLayer, DynamicLayer))


def _copy_plain(layer: Any) -> Any:
    other = copy.copy(layer)
    for name, value in vars(layer).items():
        setattr(other, name, _copy_tensors(value))
    return other


def _copy_tensors(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _copy_tensors(one) for key, one in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_copy_tensors, value))
    return value


def _layer_state(layer: Any) -> dict[str, Any]:
    """A layer as plain data that `torch.load(weights_only=True)` reads back."""
    if isinstance(layer, BoundedLayer):
        options = {field.name: getattr(layer.policy, field.name) for field in fields(layer.policy)}
        if options.get("base_options") is not None:
            options["base_options"] = dict(options["base_options"])
        for name, value in options.items():
            if not _is_plain(value):
                raise UnsupportedError(
                    f"a cache of {layer.name!r} with {name}={short(value)} cannot be saved: swap with the path of a "
                    "file, or with names and numbers"
                )
        state = _copy_tensors(layer.store.state())
        return {"kind": "bounded", "name": layer.name, "options": options, "columns": layer.columns, "store": state}
    if type(layer) is DynamicLayer:
        return {"kind": "plain", "keys": layer.keys, "values": layer.values}
    if type(layer) is DynamicSlidingWindowLayer:
        return {
            "kind": "sliding",
            "window": layer.sliding_window,
            "columns": layer.cumulative_length,
            "keys": None if layer.keys is None else layer.keys.clone(),
            "values": None if layer.values is None else layer.values.clone(),
        }
    what = f"state of {layer.maker.name!r}" if isinstance(layer, SwappedCacheLayer) else type(layer).__name__
    raise UnsupportedError(f"a cache with a {what} cannot be saved; copy() keeps one in memory")


def _is_plain(value: Any) -> bool:
    """Whether a file can hold an option: None, a name, a number, and lists and mappings of these."""
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def _layer_from(state: dict[str, Any], index: int) -> Any:
    if state["kind"] == "bounded":
        policy = build_policy(describe(state["name"]), state["options"])
        layer = BoundedLayer(MakesBounded(state["name"], policy), index)
        layer.store.load_state(state["store"])
        layer.columns = state["columns"]
        return layer
    plain = DynamicLayer() if state["kind"] == "plain" else DynamicSlidingWindowLayer(state["window"])
    if state["keys"] is not None:
        plain.lazy_initialization(state["keys"], state["values"])
        plain.keys, plain.values = state["keys"], state["values"]
    if state["kind"] == "sliding":
        plain.cumulative_length = state["columns"]
    return plain
