"""The cache layers of swapped attention layers, as transformers' cache holds them.

Whatever transformers asks of a layer of its cache is answered here; what must stay as it was is refused by name.
"""

from __future__ import annotations

import weakref
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from attnzoo.errors import UnsupportedError, short
from attnzoo.eviction.policy import Policy
from attnzoo.eviction.ragged import store_for
from attnzoo.eviction.size import CacheBytes
from attnzoo.hosts import versions

if TYPE_CHECKING:
    from attnzoo.eviction.calls import Call


class SwappedCacheLayer(CacheLayerMixin):
    """Base of the cache layers that belong to swapped attention layers: `BoundedLayer`, and the `StateLayer` of mixers.

    Whatever would need tokens that are no longer kept, such as cropping, is refused.

    Attributes
    ----------
    maker
        What made it: a layer is for the modules that carry an equal one.
    columns
        Tokens seen, padding included.
    torn
        Whether tokens were being put in when the last call broke off.
    """

    is_sliding = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, maker: Maker) -> None:
        self.maker = maker
        self.columns = 0
        self.torn = False

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.maker}, seen={self.columns})"

    @abstractmethod
    def bytes(self) -> CacheBytes:
        """Bytes held and allocated; see `attnzoo.kv_bytes`."""

    @abstractmethod
    def copy(self) -> SwappedCacheLayer:
        """A layer of its own with the same content."""

    @abstractmethod
    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the rows of all that is kept: `change` maps ``(B, ...)`` to ``(B', ...)``."""

    def begin(self, call: Call) -> None:
        """A call begins."""

    def end(self) -> None:
        """The call is over, however it ended."""

    def flush(self) -> None:
        """Evict now, where anything is ever evicted."""

    def end_prompt(self) -> None:
        """Evict, where that is put off to the end of the prompt."""

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the first call makes the buffers."""

    def get_seq_length(self, *args: Any) -> int:
        """Logical length: tokens seen, padding included, however few are kept."""
        return self.columns

    def get_mask_sizes(self, query: Any, *args: Any) -> tuple[int, int]:
        """Length and offset of the mask, as if all entries were kept: layers that were not swapped need it."""
        return self.columns + versions.new_tokens(query), 0

    def get_max_length(self) -> int:
        """There is no end to the logical length."""
        return -1

    get_max_cache_shape = get_max_length

    def crop(self, tokens_to_remove: int = 0, *args: Any) -> None:
        """Refuse to take tokens back: nothing of the time before them was kept."""
        if tokens_to_remove != 0:
            raise UnsupportedError(
                f"a cache of {self.maker.name!r} cannot be cropped: what it held before the tokens to remove came is "
                "gone. Assisted and prompt-lookup decoding need cropping; decode without them, or keep a copy() of the "
                "cache to go back to"
            )

    def offload(self) -> None:
        """Refuse."""
        raise UnsupportedError(
            f"a cache of {self.maker.name!r} is not offloaded: it is small; leave cache_implementation unset"
        )

    prefetch = offload

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put rows in another order (beam search)."""
        self.map_rows(lambda x: x.index_select(0, beam_idx.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        self.map_rows(lambda x: x.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        self.map_rows(lambda x: x[indices.to(x.device)])


class Maker(Protocol):
    """Makes the cache layer of a swapped module, which carries it as ``attnzoo_cache``."""

    @property
    def name(self) -> str:
        """What messages call the method."""

    def __call__(self, index: int) -> SwappedCacheLayer:
        """Make an empty one."""

    def mismatch(self, other: Maker) -> str:
        """Say how a layer that `other` made differs from those of this one; empty if it can stand for them."""


@dataclass(frozen=True)
class MakesBounded:
    """Makes a `BoundedLayer`.

    Attributes
    ----------
    name, policy
        What decides what it keeps.
    """

    name: str
    policy: Policy

    def __call__(self, index: int) -> BoundedLayer:
        """Make an empty one."""
        return BoundedLayer(self, index)

    def mismatch(self, other: Maker) -> str:
        """Say which options differ; another core does not matter, which keeps the same entries up to rounding."""
        if not isinstance(other, MakesBounded) or type(other.policy) is not type(self.policy):
            return f"{other}, and the model has {self}"
        ours, theirs = vars(self.policy), vars(other.policy)
        differ = [one.name for one in fields(self.policy) if one.name != "core" and ours[one.name] != theirs[one.name]]
        return "; ".join(f"{self.name} with {n}={short(theirs[n])}, the model has {short(ours[n])}" for n in differ)

    def __str__(self) -> str:
        return f"{self.name} with budget {self.policy.budget}"


class BoundedLayer(SwappedCacheLayer):
    """One layer of a `BoundedCache`.

    Attributes
    ----------
    keys, values
        ``(B, Hkv, held, D)`` in time order; None before the first call. Where the heads share a budget, a copy, in
        which heads that hold fewer entries than another have empty slots, of zeros.
    positions
        ``(B, Hkv, held)``, int32: which real token of its row an entry is, -1 for an empty slot.
    name, policy
        What decides what it keeps.
    """

    def __init__(self, maker: MakesBounded, index: int) -> None:
        super().__init__(maker)
        self.name, self.policy = maker.name, maker.policy
        self.store = store_for(self.policy, index)
        self._call: weakref.ref[Call] | None = None
        self.pending: tuple[Tensor, Tensor] | None = None

    @property
    def keys(self) -> Tensor | None:
        """Keys held."""
        return self.store.keys

    @property
    def values(self) -> Tensor | None:
        """Values held."""
        return self.store.values

    @property
    def positions(self) -> Tensor | None:
        """Positions held."""
        return self.store.positions

    @property
    def is_initialized(self) -> bool:
        """Whether anything was put in."""
        return self.store.batch > 0

    @property
    def batch_size(self) -> int:
        """Number of rows, -1 before the first call."""
        return self.store.batch or -1

    @property
    def entries(self) -> list[int]:
        """Entries per key/value head that each row holds; the mean, where the heads share a budget."""
        return self.store.entries

    def bytes(self) -> CacheBytes:
        """Bytes held and allocated; see `attnzoo.kv_bytes`."""
        return self.store.bytes()

    @property
    def open(self) -> bool:
        """Whether a call is under way that has not put its keys and values in yet."""
        return self._call is not None and self._call() is not None

    def begin(self, call: Call) -> None:
        """Take in the keys and values of one `update`, as long as `call` lives: an interrupt closes no hook."""
        self._call, self.pending = weakref.ref(call), None

    def end(self) -> None:
        """Take in nothing more."""
        self._call = self.pending = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Give the new keys and values back: the attention itself takes them in.

        Raises
        ------
        UnsupportedError
            If the model that calls is not one whose attention was swapped for an eviction policy.
        """
        if not self.open:
            raise UnsupportedError(
                "this cache is bounded by attnzoo and can only be used by a model swapped in the same way; "
                "give this model its own cache"
            )
        self.pending, self.torn = (key_states, value_states), True
        return key_states, value_states

    def take(self, key: Tensor, value: Tensor) -> None:
        """Check that the attention is handed what was put in, once.

        Raises
        ------
        UnsupportedError
            If it is handed anything else.
        """
        if self.pending is None or self.pending[0] is not key or self.pending[1] is not value:
            raise UnsupportedError(
                "the model passes its attention other keys and values than it put into the cache, or the same ones "
                "more than once: such a model cannot be bounded"
            )
        self._call = self.pending = None

    def taken(self, tokens: int) -> None:
        """All tokens of the call are in."""
        self.columns += tokens
        self.torn = False

    def flush(self) -> None:
        """Evict now, though the block, or the prompt, is not at its end."""
        self.store.end_prompt()
        self.store.evict(range(self.store.batch))

    def end_prompt(self) -> None:
        """Evict, where that is put off to the end of the prompt."""
        self.store.end_prompt()

    def reset(self) -> None:
        """Forget everything."""
        self.store, self.columns, self.torn = store_for(self.policy, self.store.layer), 0, False

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """Change the rows."""
        self.store.map_rows(change)

    def copy(self) -> BoundedLayer:
        """A layer of its own with the same content."""
        other = BoundedLayer(MakesBounded(self.name, self.policy), self.store.layer)
        other.store, other.columns, other.torn = self.store.copy(), self.columns, self.torn
        return other
