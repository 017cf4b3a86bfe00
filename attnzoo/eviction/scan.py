"""Attention through a bounded store: block by block, evicting at the end of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnzoo.errors import ShapeError
from attnzoo.eviction.policy import Policy
from attnzoo.eviction.ragged import AnyStore
from attnzoo.eviction.store import Store, pairs


@dataclass(frozen=True)
class Padding:
    """Which of the new tokens are real, in the form that the scan needs: made once for all layers of a call.

    Attributes
    ----------
    lengths
        Real tokens of each row.
    order
        ``(B, N)``: the columns of each row, those of real tokens first, in order.
    """

    lengths: tuple[int, ...]
    order: Tensor

    @classmethod
    def of(cls, real: Tensor) -> Padding | None:
        """Out of ``(B, N)``, True where a token is real; None if all are."""
        if bool(real.all()):
            return None
        return cls(tuple(real.sum(1).tolist()), (~real).to(torch.uint8).argsort(dim=1, stable=True))


@dataclass(frozen=True)
class BoundedAttention:
    """What an eviction swap puts in place of an attention: a policy and the core that attends.

    Attributes
    ----------
    name
        The policy's registered name.
    """

    name: str
    policy: Policy
    core: Any

    def __call__(
        self,
        store: AnyStore,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        padding: Padding | None = None,
        *,
        scale: float | None = None,
        dropout: float = 0.0,
        softcap: float | None = None,
    ) -> Tensor:
        """Take in new tokens and attend over what is kept.

        A token sees what its layer held when its block began, and the tokens of its block up to itself.

        Parameters
        ----------
        store
            The layer's entries; new ones are put in, and evicted, here.
        q, k, v
            ``(B, H, N, D)``, ``(B, Hkv, N, D)``, ``(B, Hkv, N, Dv)`` of the new tokens.
        padding
            Which tokens are real; None if all are. Padding is not kept and gets zeros.
        scale, dropout, softcap
            As for a core.

        Returns
        -------
        Tensor
            ``(B, H, N, Dv)``.

        Raises
        ------
        ShapeError
            If the store holds another number of rows.
        """
        if not store.batch:
            store.start(q, k, v, scale, softcap)
        if q.shape[2] == 1:
            store.end_prompt()
        followed = store.requires_grad or any(x.requires_grad for x in (q, k, v))
        store.recording = torch.is_grad_enabled() and followed
        if store.batch != len(q):
            raise ShapeError(f"the cache holds {store.batch} rows, the call has {len(q)}")
        options: dict[str, Any] = {"scale": scale, "dropout": dropout}
        if softcap is not None:
            options["softcap"] = softcap
        if padding is None and store.uniform:
            return self._together(store, q, k, v, options)
        return self._apart(store, q, k, v, padding, options)

    def _together(self, store: AnyStore, q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
        """All rows take the same steps."""
        parts = []
        start = 0
        while start < q.shape[2]:
            t = min(store.until_eviction(0), q.shape[2] - start)
            part, taken = slice(start, start + t), [t] * store.batch
            store.append(k[:, :, part], v[:, :, part], taken)
            parts.append(self._step(store, q[:, :, part], taken, options))
            start += t
        return parts[0] if len(parts) == 1 else torch.cat(parts, 2)

    def _apart(
        self, store: AnyStore, q: Tensor, k: Tensor, v: Tensor, padding: Padding | None, options: dict[str, Any]
    ) -> Tensor:
        """Each row takes its own steps: padding is left out, and blocks end where the row's own tokens say."""
        rows, tokens, device = len(q), q.shape[2], q.device
        left = [tokens] * rows if padding is None else list(padding.lengths)
        order = torch.arange(tokens, device=device).expand(rows, -1) if padding is None else padding.order.to(device)
        out: Tensor | None = None
        done = [0] * rows
        while any(left):
            taken = [min(store.until_eviction(row), left[row]) for row in range(rows)]
            new = torch.arange(max(taken), device=device)
            columns = order.gather(1, (torch.tensor(done, device=device)[:, None] + new).clamp(max=tokens - 1))
            store.append(_take(k, columns), _take(v, columns), taken)
            part = self._step(store, _take(q, columns), taken, options)
            row, j = pairs(taken, device)
            if out is None:
                out = part.new_zeros(*q.shape[:3], v.shape[3])  # of the core's dtype, which autocast may choose
            out[row, :, columns[row, j]] = part[row, :, j]
            done = [d + n for d, n in zip(done, taken, strict=True)]
            left = [d - n for d, n in zip(left, taken, strict=True)]
        return q.new_zeros(*q.shape[:3], v.shape[3]) if out is None else out

    def _step(self, store: AnyStore, q: Tensor, taken: list[int], options: dict[str, Any]) -> Tensor:
        """Attend for entries just put in, let the policy see it, and evict the rows that came to a block's end."""
        due = [row for row, n in enumerate(taken) if n and store.is_due(row)]
        over = [row for row in due if store.is_over(row)]
        outs: list[Tensor] = []
        told: list[Tensor | None] = []
        for lane, heads in store.lanes(q.shape[1]):
            out, sums = self._look(lane, q[:, heads], taken, over, options)
            lane.observe(q[:, heads], taken, sums if self.policy.accumulates else None)
            outs.append(out)
            told.append(None if self.policy.accumulates else sums)
        store.evict(due, *told)
        return outs[0] if len(outs) == 1 else torch.cat(outs, 1)

    def _look(
        self, lane: Store, q: Tensor, taken: list[int], over: list[int], options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        """Attend, and give with the output the sums of attention that the core was asked for."""
        whole = lane.uniform and all(n == q.shape[2] for n in taken)
        asked = self._asked(q.device.type, taken, over, options)
        if asked is None:
            return self._attend(q, lane, None if whole else _visible(lane, taken, q.device), options), None
        keys, values = lane.attended()
        wanted = {key: value for key, value in options.items() if key != "dropout"}
        lengths = None if whole else lane.lengths(taken, q.device)
        out, sums, _ = self.core.scored(q, keys, values, window=asked, causal=True, lengths=lengths, **wanted)
        return out, sums

    def _asked(self, device: str, taken: list[int], over: list[int], options: dict[str, Any]) -> int | None:
        """Over how many of the last queries the core is to sum what each key got; None if that is not asked of it.

        Under autocast it would sum in the lower precision, and other entries would be kept. `over` are the rows that
        are evicted in this step.
        """
        if not hasattr(self.core, "scored") or options["dropout"] > 0 or torch.is_autocast_enabled(device):
            return None
        if self.policy.accumulates:
            return None if self.policy.own_weights else max(taken)
        window = self.policy.queries_kept
        return window if self.policy.sums_window and over and all(taken[row] >= window for row in over) else None

    def _attend(self, q: Tensor, store: Store, visible: Tensor | None, options: dict[str, Any]) -> Tensor:
        """Attend over what is held: what `visible` ``(B, 1, t, held)`` shows, or with the ends lined up."""
        keys, values = store.attended()
        if q.shape[2] > 1:
            return self.core(q, keys, values, mask=visible, causal=visible is None, **options)
        # one query a head: those that share keys become queries of one head, so that no core repeats the keys
        out = self.core(q.squeeze(2).unflatten(1, (keys.shape[1], -1)), keys, values, mask=visible, **options)
        return out.flatten(1, 2).unsqueeze(2)


def _visible(lane: Store, taken: list[int], device: torch.device) -> Tensor:
    """Which entries a new query sees, ``(B, 1, t, held)``; what stands at columns not taken means nothing."""
    new, slots = torch.arange(max(taken), device=device), torch.arange(max(lane.held), device=device)
    before = torch.tensor([held - n for held, n in zip(lane.held, taken, strict=True)], device=device)
    last = (before[:, None] + new).clamp(max=max(lane.held) - 1)
    return (slots <= last[..., None])[:, None]


def _take(x: Tensor, columns: Tensor) -> Tensor:
    """The tokens ``(B, t)`` of ``(B, H, N, D)``."""
    return x.gather(2, columns[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
