"""The bytes of a key/value cache."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from attnzoo.errors import OptionError

HALVES = ("self_attention_cache", "cross_attention_cache")  # of the cache of an encoder-decoder


@dataclass(frozen=True)
class CacheBytes:
    """The size of a key/value cache, in bytes.

    Attributes
    ----------
    entries
        Keys and values held.
    held
        Keys and values, positions, and the state that a policy keeps from call to call.
    allocated
        Memory that the cache has allocated, empty slots included.
    """

    entries: int
    held: int
    allocated: int

    def __add__(self, other: CacheBytes) -> CacheBytes:
        return CacheBytes(self.entries + other.entries, self.held + other.held, self.allocated + other.allocated)


def kv_bytes(cache: Any) -> CacheBytes:
    """Count the bytes that a key/value cache holds and has allocated.

    Parameters
    ----------
    cache
        Any cache of transformers, bounded or not; None has no bytes.

    Raises
    ------
    OptionError
        If it is not a cache.
    """
    total = CacheBytes(0, 0, 0)
    if cache is None:
        return total
    halves = [getattr(cache, name, None) for name in HALVES]
    if None not in halves:
        return sum(map(kv_bytes, halves), total)
    if isinstance(cache, nn.Module) or not hasattr(cache, "layers"):
        from attnzoo.hosts.versions import CACHE_NAMES

        held = next((name for name in CACHE_NAMES if hasattr(cache, name)), None)
        hint = f"; give it the output's {held}" if held else ""
        raise OptionError(f"kv_bytes takes a cache of transformers, not {type(cache).__name__}{hint}")
    for layer in cache.layers:
        total += layer.bytes() if hasattr(layer, "bytes") else _plain(layer)
    return total


def _plain(layer: Any) -> CacheBytes:
    held = 0
    storages: dict[int, int] = {}
    for tensor in _tensors(layer):
        held += tensor.numel() * tensor.element_size()
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
    return CacheBytes(held, held, sum(storages.values()))


def _tensors(layer: Any) -> Iterator[Tensor]:
    """Keys, values, and the states of layers that have others."""
    for name, value in vars(layer).items():
        if not name.startswith("_"):
            yield from _inside(value)


def _inside(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _inside(one)
