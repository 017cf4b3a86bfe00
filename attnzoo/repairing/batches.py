"""Batches of what a model takes: a tensor, a tuple of arguments, or a mapping of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn


def call(model: nn.Module, batch: Any) -> Any:
    """Call a model with a tensor, a tuple of arguments or a mapping of them, moved to the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))

    def moved(value: Any) -> Any:
        return value.to(device, non_blocking=True) if isinstance(value, Tensor) else value

    if isinstance(batch, Mapping):
        return model(**{name: moved(value) for name, value in batch.items()})
    if isinstance(batch, (tuple, list)):
        return model(*map(moved, batch))
    return model(moved(batch))


def rows_of(batch: Any) -> int:
    """How many rows a batch has: the length of its first tensor."""
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else [batch]
    return next((len(value) for value in values if isinstance(value, Tensor) and value.dim()), 1)


def repeated(batches: Iterable[Any], steps: int) -> Iterator[Any]:
    """Yield so many batches, iterating again where they end before; fewer where they cannot be iterated again."""
    done = 0
    while done < steps:
        before = done
        for batch in batches:
            yield batch
            done += 1
            if done == steps:
                return
        if done == before:
            return
