"""Q-Filters: queries of a head lie along one direction; keys that point along it get attention from all of them.

Paper: Godey et al., Q-Filters: Leveraging QK Geometry for Efficient KV Cache Compression,
https://arxiv.org/abs/2503.02812

    s_j = <k_j, f>,    f = mean over the group's heads of the top right singular vector of the head's queries, with the
                           sign that makes their mean projection positive        (post-rotary queries, of a text)

Only keys are looked at, so any fast attention will do. The directions are made once per model, see
`attnzoo.eviction.calibrate`.

The most recent entries take half the budget by default, for that loses less; ``recent=0`` leaves all to the score.

Differs from the paper: evicts after each block of `block_size` tokens, in the prompt too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from torch import Tensor

from attnzoo.errors import OptionError, short
from attnzoo.eviction.directions import MAKE, Directions
from attnzoo.eviction.layer_data import LayerData
from attnzoo.eviction.policy import CacheView, Policy, wide

AS_PUBLISHED = {"recent": 0, "schedule": "prompt"}


@dataclass(frozen=True, kw_only=True)
class QFilters(Policy):
    """Projection of the key on the direction of the queries.

    Parameters
    ----------
    filters
        The directions: a file that `attnzoo.eviction.calibrate` wrote, or what its `calibrate` gave. A model or a cache
        that is saved names the file, which must still be there when it is loaded.

    Raises
    ------
    AssetError
        If the file cannot be read.
    """

    filters: str | os.PathLike[str] | Directions

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.filters, Directions):
            directions = self.filters
        elif isinstance(self.filters, (str, os.PathLike)):
            path = str(Path(self.filters).resolve())  # what was swapped does not depend on the working directory
            object.__setattr__(self, "filters", path)
            directions = Directions.load(path)
        else:
            raise OptionError(f"filters must be a file or Directions, not {short(self.filters)}; {MAKE}")
        self.__dict__["directions"] = directions

    @property
    def directions(self) -> Directions:
        """What `filters` gives."""
        found: Directions = self.__dict__["directions"]
        return found

    def at(self, count: int) -> Self:
        """The policy with its budget as a number of entries; the file is not read again."""
        if not isinstance(self.budget, float):
            return self
        return replace(self, budget=self.entries_at(count), filters=self.directions)

    def check_layer(self, data: LayerData) -> None:
        """Refuse directions of another model."""
        self.directions.check_layer(data)

    def default_recent(self, sink: int) -> int:
        """Half the budget."""
        return int(self.budget) // 2

    def score(self, view: CacheView) -> Tensor:
        """Keys projected on the directions of their heads."""
        keys = wide(view.keys)
        return (keys @ self.directions.layers[view.layer].to(keys)[..., None]).squeeze(-1)
