"""The bounded buffer of one layer: its entries, in time order, and what its policy keeps from call to call.

Rows of a batch may hold different numbers of entries. Entries stand at the front; behind them slots are empty: position
-1, keys and values 0. All heads of a row hold as many, though not the same, entries.

Buffers are written in place where nothing else may need what they held. They are copied first where autograd may have
saved them, in this call or an earlier one, and where one made under `torch.inference_mode` is written outside of it.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import UnsupportedError
from attnzoo.eviction.layer_data import LayerData, OutputProjection
from attnzoo.eviction.policy import CacheView, Policy
from attnzoo.eviction.size import CacheBytes
from attnzoo.eviction.weights import attention_sums, score_dtype

Rows = slice | Tensor
_GROWTH = 64  # entries by which a buffer grows at least
_QUERIES = 64  # whose own weights a policy makes at a time
_BY_ENTRY = ("_keys", "_values", "_positions", "_sums")
_BUFFERS = (*_BY_ENTRY, "_queries", "_query_positions")


class Timetable(ABC):
    """When rows are due for an eviction, and over their budget; base of `Store` and `RaggedStore`.

    Parameters
    ----------
    policy
        What decides at an eviction, and what must be kept for it.
    layer
        Index of the layer.

    Attributes
    ----------
    counts
        Real tokens that each row has seen.
    prompting
        Whether the prompt is still being read and the policy waits for its end.
    data, projection
        What the model that was called last tells of the layer; see `CacheView`.
    """

    counts: list[int]

    def __init__(self, policy: Policy, layer: int = 0) -> None:
        self.policy, self.layer = policy, layer
        self.prompting = policy.schedule == "prompt"
        self.data: LayerData | None = None
        self.projection = OutputProjection()

    @property
    @abstractmethod
    def entries(self) -> list[int]:
        """Entries per key/value head that each row holds."""

    @property
    def batch(self) -> int:
        """Number of rows; 0 before the first call."""
        return len(self.counts)

    @property
    def uniform(self) -> bool:
        """Whether all rows have seen, and hold, equally many, so that they take the same steps."""
        return len(set(self.counts)) == len(set(self.entries)) == 1

    def until_eviction(self, row: int) -> int:
        """Tokens that a row still takes before it comes to a block's end at which something goes."""
        if self.prompting:
            return sys.maxsize
        count, held, block = self.counts[row], self.entries[row], self.policy.every
        over = count + max(self.policy.entries_at(count) - held, 0) + 1  # the count at which it would hold too many
        return -(-over // block) * block - count

    def is_due(self, row: int) -> bool:
        """Whether a row has come to the end of a block."""
        return not self.prompting and self.counts[row] % self.policy.every == 0

    def is_over(self, row: int) -> bool:
        """Whether a row holds more than its budget."""
        return self.entries[row] > self.policy.entries_at(self.counts[row])

    def end_prompt(self) -> None:
        """Evict, where the end of the prompt was waited for, and let go of the room that it took."""
        if self.prompting:
            self.prompting = False
            self.evict(range(self.batch))
            self.trim()

    @abstractmethod
    def evict(self, rows: Sequence[int]) -> None:
        """Cut `rows` down to the budget."""

    @abstractmethod
    def trim(self) -> None:
        """Let go of room that no entry stands in."""


class Store(Timetable):
    """Entries of one layer, or of some of its heads.

    Parameters
    ----------
    policy, layer
        See `Timetable`.
    first_head
        Which of the layer's key/value heads the first one here is.

    Attributes
    ----------
    held
        Entries that each row holds.
    recording
        Whether autograd records the call under way: the attention then saves what it reads.
    """

    def __init__(self, policy: Policy, layer: int = 0, first_head: int = 0) -> None:
        super().__init__(policy, layer)
        self.first_head = first_head
        self.counts: list[int] = []
        self.held: list[int] = []
        self.scale: float | None = None
        self.softcap: float | None = None
        self.recording = False
        self._saved: set[str] = set()
        self._keys: Tensor | None = None
        self._values: Tensor | None = None
        self._positions: Tensor | None = None
        self._sums: Tensor | None = None
        self._queries: Tensor | None = None
        self._query_positions: Tensor | None = None

    @property
    def entries(self) -> list[int]:
        """Entries per key/value head that each row holds."""
        return self.held

    @property
    def requires_grad(self) -> bool:
        """Whether autograd follows keys or values back to what made them."""
        return any(x is not None and x.requires_grad for x in (self._keys, self._values))

    def lanes(self, heads: int) -> list[tuple[Store, slice]]:
        """The parts whose heads hold equally many entries, and which of the `heads` query heads each serves: one."""
        return [(self, slice(0, heads))]

    @property
    def keys(self) -> Tensor | None:
        """``(B, Hkv, held, D)``, or None before the first call."""
        return None if self._keys is None else self._keys[:, :, : max(self.held)]

    @property
    def values(self) -> Tensor | None:
        """``(B, Hkv, held, Dv)``, or None before the first call."""
        return None if self._values is None else self._values[:, :, : max(self.held)]

    @property
    def positions(self) -> Tensor | None:
        """``(B, Hkv, held)``, int32: which real token of its row each entry is; -1 for an empty slot."""
        return None if self._positions is None else self._positions[:, :, : max(self.held)]

    def attended(self) -> tuple[Tensor, Tensor]:
        """Keys and values of a store that has begun."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def lengths(self, taken: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Queries taken and entries held, ``(B,)`` each."""
        return torch.tensor(taken, device=device), torch.tensor(self.held, device=device)

    def start(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float | None) -> None:
        """Make empty buffers for rows and heads like those of a first call's queries, keys and values."""
        rows, heads, window = len(q), q.shape[1], self.policy.queries_kept
        self.counts, self.held = [0] * rows, [0] * rows
        self.scale, self.softcap = scale, softcap
        self._keys, self._values = k.new_zeros(*k.shape[:2], 0, k.shape[3]), v.new_zeros(*v.shape[:2], 0, v.shape[3])
        self._positions = k.new_zeros(*k.shape[:2], 0, dtype=torch.int32)
        if self.policy.accumulates:
            self._sums = q.new_zeros(rows, heads, 0, dtype=score_dtype(q.dtype))
        if window:
            self._queries = q.new_zeros(rows, heads, window, q.shape[3])
            self._query_positions = q.new_full((rows, window), -1, dtype=torch.int32)

    def trim(self, room: int | None = None) -> None:
        """Let go of room that no entry stands in; all but `room` entries per row of it, where that is given."""
        room = max(self.held, default=0) if room is None else room
        for name in _BY_ENTRY:
            buffer: Tensor | None = getattr(self, name)
            if buffer is not None and buffer.shape[2] > room:
                setattr(self, name, buffer[:, :, :room].clone())

    def append(self, k: Tensor, v: Tensor, taken: Sequence[int]) -> None:
        """Put the first ``taken[b]`` of the new entries ``(B, Hkv, t, D)`` behind those of row b."""
        self._check_dtype(k)
        self._reserve(max(h + n for h, n in zip(self.held, taken, strict=True)))
        keys, values, positions = (self._writable(name) for name in ("_keys", "_values", "_positions"))
        t = k.shape[2]
        if self.uniform and all(n == t for n in taken):
            here = slice(self.held[0], self.held[0] + t)
            keys[:, :, here], values[:, :, here] = k, v
            positions[:, :, here] = torch.arange(
                self.counts[0], self.counts[0] + t, device=k.device, dtype=positions.dtype
            )
        else:
            rows, new = pairs(taken, k.device)
            slots = torch.tensor(self.held, device=k.device)[rows] + new
            keys[rows, :, slots], values[rows, :, slots] = k[rows, :, new], v[rows, :, new]
            counts = torch.tensor(self.counts, device=k.device)[rows] + new
            positions[rows, :, slots] = counts.to(positions.dtype)[:, None].expand(-1, k.shape[1])
        self.held = [h + n for h, n in zip(self.held, taken, strict=True)]
        self.counts = [c + n for c, n in zip(self.counts, taken, strict=True)]

    def _check_dtype(self, k: Tensor) -> None:
        """Raise `UnsupportedError` if the model was cast to another dtype since; autocast may change it on the way."""
        assert self._keys is not None
        held = self._keys.dtype
        if k.dtype != held and not torch.is_autocast_enabled(k.device.type):
            raise UnsupportedError(
                f"this cache holds {held} and the model gives {k.dtype}: it was cast, or autocast was left, since the "
                "cache was begun; give the call a new cache"
            )

    @torch.no_grad()
    def observe(self, q: Tensor, taken: Sequence[int], sums: Tensor | None = None) -> None:
        """Let the policy's records see the queries ``(B, H, t, D)`` of the entries that were just put in.

        `sums` ``(B, H, held)`` is the attention that they gave to each entry, if the core has told it.
        """
        t, window = q.shape[2], self.policy.queries_kept
        whole = all(n == t for n in taken)
        if self.policy.accumulates:
            if self.policy.own_weights:
                sums = self._weighed(q, taken)
            elif sums is None:
                lengths = None if self.uniform and whole else self.lengths(taken, q.device)
                sums = attention_sums(q, self.attended()[0], lengths, self.scale, self.softcap)
            self._writable("_sums")[:, :, : max(self.held)] += sums
        if window:
            assert self._queries is not None
            assert self._query_positions is not None
            new = torch.arange(t, device=q.device)
            first = torch.tensor(self.counts, device=q.device) - torch.tensor(taken, device=q.device)
            asked = (first[:, None] + new).to(self._query_positions.dtype)
            queries = torch.cat([self._queries, q.to(self._queries)], 2)
            positions = torch.cat([self._query_positions, asked], 1)
            if whole:
                self._queries, self._query_positions = queries[:, :, t:].contiguous(), positions[:, t:].contiguous()
            else:
                last = torch.tensor(taken, device=q.device)[:, None] + torch.arange(window, device=q.device)
                self._queries = queries.gather(2, last[:, None, :, None].expand_as(self._queries))
                self._query_positions = positions.gather(1, last)

    def _weighed(self, q: Tensor, taken: Sequence[int]) -> Tensor:
        """What the policy's own weights give each entry from the new queries together, ``(B, H, held)``."""
        keys, values = self.attended()
        assert self.positions is not None
        counts, new = torch.tensor(self.counts, device=q.device), torch.tensor(taken, device=q.device)
        sums = q.new_zeros(len(q), q.shape[1], keys.shape[2], dtype=torch.promote_types(q.dtype, torch.float32))
        for part in torch.arange(q.shape[2], device=q.device).split(_QUERIES):
            asked = (counts - new)[:, None] + part  # (B, w)
            view = CacheView(
                keys=keys,
                values=values,
                positions=self.positions,
                counts=counts,
                layer=self.layer,
                first_head=self.first_head,
                queries=q[:, :, part],
                query_positions=asked.masked_fill(part >= new[:, None], -1),
                scale=self.scale,
                softcap=self.softcap,
                data=self.data,
                projection=self.projection,
            )
            sums += self.policy.weights(view).sum(2)
        return sums

    def evict(self, rows: Sequence[int], window_sums: Tensor | None = None) -> None:
        """Cut `rows` down to the budget; `window_sums` ``(B, H, held)`` is for `CacheView`."""
        over: dict[tuple[int, int], list[int]] = {}
        for row in filter(self.is_over, rows):
            over.setdefault((self.held[row], self.policy.entries_at(self.counts[row])), []).append(row)
        for held, budget in sorted(over):
            some = over[held, budget]
            view = self.view(some, window_sums)
            with torch.no_grad(), torch.autocast(view.keys.device.type, enabled=False):
                keep = self.policy.at(self.counts[some[0]]).keep(view)
            self.cut(some, keep)

    @torch.no_grad()
    def view(self, rows: list[int], window_sums: Tensor | None = None) -> CacheView:
        """What a policy sees of rows that all hold equally many entries."""
        assert self._keys is not None
        assert self._values is not None
        assert self._positions is not None
        held, device = self.held[rows[0]], self._keys.device
        index = self._index(rows, device)
        return CacheView(
            keys=self._keys[index, :, :held],
            values=self._values[index, :, :held],
            positions=self._positions[index, :, :held],
            counts=torch.tensor([self.counts[row] for row in rows], device=device),
            layer=self.layer,
            first_head=self.first_head,
            sums=None if self._sums is None else self._sums[index, :, :held],
            queries=None if self._queries is None else self._queries[index],
            query_positions=None if self._query_positions is None else self._query_positions[index],
            window_sums=None if window_sums is None else window_sums[index, :, :held],
            scale=self.scale,
            softcap=self.softcap,
            data=self.data,
            projection=self.projection,
        )

    def cut(self, rows: list[int], keep: Tensor) -> None:
        """Keep of rows that all hold equally many only the entries `keep` ``(b, Hkv, n)``, in time order."""
        held, left = self.held[rows[0]], keep.shape[2]
        index = self._index(rows, keep.device)
        heads = 1 if self._sums is None else self._sums.shape[1] // keep.shape[1]
        for name in _BY_ENTRY:
            old: Tensor | None = getattr(self, name)
            if old is None:
                continue
            kept = _pick(old, rows, keep.repeat_interleave(heads, 1) if name == "_sums" else keep)
            buffer = self._writable(name)
            buffer[index, :, :left] = kept
            buffer[index, :, left:held] = -1 if name == "_positions" else 0
        for row in rows:
            self.held[row] = left

    def _index(self, rows: list[int], device: torch.device) -> Rows:
        return slice(None) if len(rows) == self.batch else torch.tensor(rows, device=device)

    def bytes(self) -> CacheBytes:
        """Bytes held and allocated."""
        if self._keys is None:
            return CacheBytes(0, 0, 0)
        entries = held = allocated = 0
        for name in _BUFFERS:
            buffer: Tensor | None = getattr(self, name)
            if buffer is None:
                continue
            size = buffer.numel() * buffer.element_size()
            allocated += buffer.untyped_storage().nbytes()
            if name.startswith("_quer"):
                held += size
                continue
            slots = self.batch * buffer.shape[2]
            used = size // slots * sum(self.held) if slots else 0
            held += used
            entries += used if name in ("_keys", "_values") else 0
        return CacheBytes(entries, held, allocated)

    def map_rows(self, choose: Callable[[Tensor], Tensor]) -> None:
        """Let `choose` repeat, reorder or select the rows of every buffer; it is given tensors of B rows."""
        if self._keys is None:
            return
        both = choose(torch.tensor([self.counts, self.held]).T).T.tolist()
        self.counts, self.held = both
        for name in _BUFFERS:
            buffer = getattr(self, name)
            if buffer is not None:
                setattr(self, name, choose(buffer))

    def copy(self) -> Store:
        """A store of its own with the same content, cut off from autograd."""
        other = Store(self.policy, self.layer, self.first_head)
        other.load_state(self.state())
        other.data, other.projection = self.data, self.projection
        for name in _BUFFERS:
            buffer = getattr(other, name)
            if buffer is not None:
                setattr(other, name, buffer.clone())
        return other

    def state(self) -> dict[str, Any]:
        """The content, as tensors, lists and numbers."""
        state: dict[str, Any] = {name.strip("_"): None for name in _BUFFERS}
        for name in _BUFFERS:
            buffer = getattr(self, name)
            if buffer is not None:
                state[name.strip("_")] = buffer.detach()
        names = ("counts", "held", "scale", "softcap", "prompting")
        return {**state, **{name: getattr(self, name) for name in names}}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        for name in _BUFFERS:
            setattr(self, name, state[name.strip("_")])
        for name in ("counts", "held"):
            setattr(self, name, list(state[name]))
        self.scale, self.softcap = state["scale"], state["softcap"]
        self.prompting = state.get("prompting", False)  # files of earlier versions have none

    def _reserve(self, needed: int) -> None:
        """Have room for `needed` entries per row. A buffer grows by a quarter, never past budget and block together."""
        policy = self.policy
        assert self._keys is not None
        room = self._keys.shape[2]
        if needed <= room:
            return
        most = policy.entries_at(max(self.counts)) + policy.every
        new = max(needed, min(most, room + max(_GROWTH, room // 4)))
        for name in _BY_ENTRY:
            buffer: Tensor | None = getattr(self, name)
            if buffer is not None:
                fill = -1 if name == "_positions" else 0
                more = buffer.new_full((*buffer.shape[:2], new - room, *buffer.shape[3:]), fill)
                setattr(self, name, torch.cat([buffer, more], 2))

    def _writable(self, name: str) -> Tensor:
        """A buffer that may be written in place."""
        buffer: Tensor = getattr(self, name)
        frozen = buffer.is_inference() and not torch.is_inference_mode_enabled()
        if self.recording or name in self._saved or frozen:
            buffer = buffer.clone()
            setattr(self, name, buffer)
            self._saved.discard(name)
        if self.recording:
            self._saved.add(name)
        return buffer


def _pick(buffer: Tensor, rows: Sequence[int], keep: Tensor) -> Tensor:
    """Entries ``(b, H, n)`` of the rows of a buffer ``(B, H, C, ...)``; whole entries at a time, which is fast."""
    heads, room = buffer.shape[1:3]
    first = torch.tensor(rows)[:, None] * heads + torch.arange(heads)
    places = keep + (first * room).to(keep.device)[..., None]
    return buffer.flatten(0, 2).index_select(0, places.flatten()).unflatten(0, places.shape)


def pairs(taken: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Row and number of every new entry that is taken; made without asking the device anything."""
    rows = torch.arange(len(taken)).repeat_interleave(torch.tensor(taken))
    new = torch.cat([torch.arange(n) for n in taken])
    return rows.to(device, non_blocking=True), new.to(device, non_blocking=True)
