"""The bounded buffer of a layer whose heads share its budget: each key/value head holds another number of entries.

Paper: Feng et al., Ada-KV: Optimizing KV Cache Eviction by Adaptive Budget Allocation, https://arxiv.org/abs/2407.11550

    of the H heads of a layer with a budget of b entries each, the H * b entries with the highest scores stay, whichever
    heads they are in; but each head keeps at least some of its own        (alpha = 0.2)

Every head has a `Store` of its own, as long as what it holds, so that memory that one head gives back another may take.
The protected entries of a policy stay in each head. Of equal scores the later entry stays.

Differs from the paper: a head keeps at least its floor(alpha * b) highest, as in kvpress, and else what it wins; the
authors' code draws all heads to b instead, with (1 - alpha) * (entries that it wins) + alpha * b each. Evicts after
each block, in decoding too. The paper's scores are SnapKV's; here those of any
policy whose heads can be compared (`Policy.comparable`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from attnzoo.eviction.policy import CacheView, Policy, highest
from attnzoo.eviction.size import CacheBytes
from attnzoo.eviction.store import Store, Timetable

ALPHA = 0.2  # the share of the budget that each head keeps at least


class RaggedStore(Timetable):
    """Entries of one layer, head by head: a `Store` for each key/value head and the query heads that share it.

    It is over its budget where its heads together hold more than they may together.
    """

    def __init__(self, policy: Policy, layer: int = 0) -> None:
        super().__init__(policy, layer)
        self.heads: list[Store] = []

    @property
    def counts(self) -> list[int]:  # type: ignore[override]  # the base has it as an attribute
        """Real tokens that each row has seen."""
        return self.heads[0].counts if self.heads else []

    @property
    def entries(self) -> list[int]:
        """Entries per key/value head that each row holds: the mean, which is whole, for each eviction keeps b each."""
        return [sum(held) // len(held) for held in zip(*(head.held for head in self.heads), strict=True)]

    @property
    def keys(self) -> Tensor | None:
        """``(B, Hkv, most, D)``, a copy: heads that hold fewer than the most have zeros behind; None before a call."""
        return self._padded("keys")

    @property
    def values(self) -> Tensor | None:
        """``(B, Hkv, most, Dv)``, as `keys`."""
        return self._padded("values")

    @property
    def positions(self) -> Tensor | None:
        """``(B, Hkv, most)``, as `keys`, with -1 behind."""
        return self._padded("positions")

    @property
    def scale(self) -> float | None:
        """That of the layer's attention."""
        return self.heads[0].scale if self.heads else None

    @property
    def softcap(self) -> float | None:
        """That of the layer's attention."""
        return self.heads[0].softcap if self.heads else None

    @property
    def requires_grad(self) -> bool:
        """Whether autograd follows keys or values back to what made them."""
        return any(head.requires_grad for head in self.heads)

    @property
    def recording(self) -> bool:
        """Whether autograd records the call under way."""
        return any(head.recording for head in self.heads)

    @recording.setter
    def recording(self, value: bool) -> None:
        for head in self.heads:
            head.recording = value

    def lanes(self, heads: int) -> list[tuple[Store, slice]]:
        """The parts whose heads hold equally many entries, and which of the `heads` query heads each serves."""
        group = heads // len(self.heads)
        for head in self.heads:
            head.data, head.projection = self.data, self.projection
        return [(head, slice(i * group, (i + 1) * group)) for i, head in enumerate(self.heads)]

    def start(self, q: Tensor, k: Tensor, v: Tensor, scale: float | None, softcap: float | None) -> None:
        """Make empty buffers for rows and heads like those of a first call's queries, keys and values."""
        self.heads = [Store(self.policy, self.layer, first_head=i) for i in range(k.shape[1])]
        for i, (head, mine) in enumerate(self.lanes(q.shape[1])):
            head.start(q[:, mine], k[:, i : i + 1], v[:, i : i + 1], scale, softcap)

    def append(self, k: Tensor, v: Tensor, taken: Sequence[int]) -> None:
        """Put the first ``taken[b]`` of the new entries ``(B, Hkv, t, D)`` behind those of row b, in each head."""
        for i, head in enumerate(self.heads):
            head.append(k[:, i : i + 1], v[:, i : i + 1], taken)

    def evict(self, rows: Sequence[int], *window_sums: Tensor | None) -> None:
        """Cut `rows` down to the budget; `window_sums` ``(B, G, held)``, one per head, are for `CacheView`."""
        over = [row for row in rows if self.is_over(row)]
        sums = window_sums or (None,) * len(self.heads)
        for row in over:
            views = [head.view([row], told) for head, told in zip(self.heads, sums, strict=True)]
            with torch.no_grad(), torch.autocast(views[0].keys.device.type, enabled=False):
                kept = choose(self.policy.at(self.counts[row]), views)
            for head, keep in zip(self.heads, kept, strict=True):
                head.cut([row], keep)
        if over:
            self.trim()

    def trim(self) -> None:
        """Let go of room that no entry stands in, but for a block's."""
        for head in self.heads:
            head.trim(max(head.held, default=0) + self.policy.every)

    def bytes(self) -> CacheBytes:
        """Bytes held and allocated."""
        return sum((head.bytes() for head in self.heads), CacheBytes(0, 0, 0))

    def map_rows(self, choose_rows: Callable[[Tensor], Tensor]) -> None:
        """Let `choose_rows` repeat, reorder or select the rows of every buffer; it is given tensors of B rows."""
        for head in self.heads:
            head.map_rows(choose_rows)

    def copy(self) -> RaggedStore:
        """A store of its own with the same content, cut off from autograd."""
        other = RaggedStore(self.policy, self.layer)
        other.data, other.projection = self.data, self.projection
        other.prompting, other.heads = self.prompting, [head.copy() for head in self.heads]
        return other

    def state(self) -> dict[str, Any]:
        """The content, as tensors, lists and numbers."""
        return {"heads": [head.state() for head in self.heads], "prompting": self.prompting}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take over what `state` gave."""
        self.heads, self.prompting = [], state["prompting"]
        for i, content in enumerate(state["heads"]):
            self.heads.append(Store(self.policy, self.layer, first_head=i))
            self.heads[-1].load_state(content)

    def _padded(self, name: str) -> Tensor | None:
        if not self.heads:
            return None
        most = max(max(head.held) for head in self.heads)
        parts = []
        for head in self.heads:
            part: Tensor = getattr(head, name)
            rest = part.new_full(
                (len(part), 1, most - part.shape[2], *part.shape[3:]), -1 if name == "positions" else 0
            )
            parts.append(torch.cat([part, rest], 2))
        return torch.cat(parts, 1)


def choose(policy: Policy, views: Sequence[CacheView]) -> list[Tensor]:
    """Choose what stays of one row of a layer: indices ``(1, 1, n)`` in time order for each key/value head.

    Parameters
    ----------
    policy
        With a budget that is a number of entries: the mean over the heads.
    views
        One per key/value head, of one row.
    """
    assert isinstance(policy.budget, int)
    scores = [policy.guarded_score(view)[0, 0] for view in views]
    for own in scores:
        least = min(int(ALPHA * policy.budget), len(own))
        if least:
            own[highest(own, least)] = float("inf")
    together, positions = torch.cat(scores), torch.cat([view.positions[0, 0] for view in views])
    by_time = positions.sort(stable=True).indices  # of equal scores the later stays, in whichever head
    stays = torch.zeros_like(together, dtype=torch.bool)
    stays[by_time[highest(together[by_time], policy.budget * len(views))]] = True
    return [own.nonzero()[:, 0][None, None] for own in stays.split([len(own) for own in scores])]


AnyStore = Store | RaggedStore


def store_for(policy: Policy, layer: int = 0) -> AnyStore:
    """Make the empty store that a policy of a layer needs."""
    return RaggedStore(policy, layer) if policy.budgets == "adaptive" else Store(policy, layer)
