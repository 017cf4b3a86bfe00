"""What an eviction policy is: options, a score for each entry, and what it may look at to give one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import torch
from torch import Tensor

from attnzoo.checks import check_choice, check_int
from attnzoo.errors import OptionError, ShapeError, UnsupportedError, short
from attnzoo.eviction.layer_data import LayerData, OutputProjection
from attnzoo.eviction.layer_profile import Profile
from attnzoo.eviction.weights import attention_weights, score_dtype
from attnzoo.units import parse_bytes

Scope = Literal["head", "layer"]
SCHEDULES = ("block", "prompt", "step")
AGGREGATES = ("mean", "max", "sum")
BUDGETS = ("uniform", "pyramid", "measured", "adaptive")


@dataclass(frozen=True)
class CacheView:
    """What a policy sees of one layer at an eviction: its entries in time order, none of them empty.

    Attributes
    ----------
    keys, values
        ``(B, Hkv, S, D)`` and ``(B, Hkv, S, Dv)``; keys as they are cached, that is after rotary embedding.
    positions
        ``(B, Hkv, S)``: which real token of its row an entry is, from 0.
    counts
        ``(B,)``: real tokens that each row has seen.
    layer
        Index of the layer.
    first_head
        Which of the layer's key/value heads the first one here is: where heads share a budget, each comes alone.
    sums
        ``(B, H, S)``: attention, or `Policy.weights`, that each entry got from all queries since it came, for policies
        that accumulate.
    queries, query_positions
        ``(B, H, w, D)`` and ``(B, w)``: the last `w` queries and their positions (-1 where there was none yet), for
        policies with a window.
    window_sums
        ``(B, H, S)``: attention that each entry got from those `w` queries together, if the core has told it.
    scale, softcap
        Those of the layer's attention.
    data
        What the host tells of the layer; None in a cache that no model was called with yet.
    projection
        The layer's output projection, for policies that read it.
    """

    keys: Tensor
    values: Tensor
    positions: Tensor
    counts: Tensor
    layer: int = 0
    first_head: int = 0
    sums: Tensor | None = None
    queries: Tensor | None = None
    query_positions: Tensor | None = None
    window_sums: Tensor | None = None
    scale: float | None = None
    softcap: float | None = None
    data: LayerData | None = None
    projection: OutputProjection = field(default_factory=OutputProjection)

    @property
    def kv_heads(self) -> int:
        """Number of key/value heads."""
        return self.keys.shape[1]

    def output_weight(self) -> Tensor:
        """The output projection, ``(H, Dv, C)``: what each channel of each query head's output adds to a token.

        Of the view's heads alone.

        Raises
        ------
        UnsupportedError
            If the cache has no model to ask, having been read from a file: call the model first.
        """
        if self.data is None:
            return self.projection.weight(0, self.values)  # which refuses
        weight = self.projection.weight(self.data.query_heads, self.values)
        group = self.data.query_heads // self.data.kv_heads
        return weight[self.first_head * group : (self.first_head + self.kv_heads) * group]

    def visible(self) -> Tensor:
        """Whether a query sees an entry, one up to its own position: boolean, ``(B, H, w, S)``."""
        queries, query_positions = self._window()
        seen = self.positions[:, :, None, :] <= query_positions[:, None, :, None]
        held = self.positions[:, :, None, :] >= 0  # which all are at an eviction
        return (seen & held).repeat_interleave(queries.shape[1] // self.kv_heads, 1)

    def before(self, window: int) -> Tensor:
        """Whether an entry is older than the last `window` tokens: boolean, ``(B, Hkv, S)``."""
        return self.positions < (self.counts - window)[:, None, None]

    def window_attention(self) -> Tensor:
        """Attention of the last `w` queries over the entries, ``(B, H, w, S)``; zeros where there was no query yet."""
        queries, _ = self._window()
        return attention_weights(queries, self.keys, self.scale, self.softcap, self.visible())

    def attention_of_window(self) -> Tensor:
        """Attention that each entry got from the last `w` queries together, ``(B, H, S)``."""
        return self.window_attention().sum(2) if self.window_sums is None else self.window_sums

    def _window(self) -> tuple[Tensor, Tensor]:
        """The queries and their positions."""
        if self.queries is None or self.query_positions is None:
            raise UnsupportedError(
                "the last queries are not kept: the policy's property queries_kept must say how many"
            )
        return self.queries, self.query_positions


@dataclass(frozen=True, kw_only=True)
class Policy(ABC):
    """Base of the policies. A subclass gives `score`, and says by properties what it needs to be kept for it.

    Parameters
    ----------
    budget
        Entries kept per key/value head at the end of a block: a whole number, or as a share above 0 and at most 1 of
        the real tokens that a row has seen by then, so that the cache grows with the text. `sink` and `recent` stay
        whatever the share. Or bytes, such as ``"64MiB"``, that all swapped layers together hold per row at the end of a
        block: the swap turns them into entries.
    budgets
        How the budget is shared out; see `attnzoo.eviction.budgets`. ``uniform``: the same for each layer and head.
        ``pyramid`` and ``measured``: another for each layer. ``adaptive``: heads of a layer share its budget.
    profile
        For ``measured``: the file that ``python -m attnzoo.eviction.profile`` wrote, or a `Profile`.
    block_size
        Tokens between evictions.
    schedule
        When to evict. ``block``: at the end of each block of `block_size` tokens, while the prompt is read, too, so
        that the cache is bounded at every moment. ``step``: after every token, as with ``block_size=1``. ``prompt``:
        full attention over the prompt, one eviction at its end, then block by block, as most papers do; while the
        prompt is read the cache is not bounded. The prompt ends before the first call of one token per row, or at
        ``cache.flush()``.
    sink, recent
        First and last tokens that are never evicted, whatever their score. None is the policy's own default, cut to
        fit a small budget.
    core
        Name of the core that computes the attention. The default also returns how much attention each key got from
        the queries together, so that `h2o` and the like need not compute it a second time.

    Raises
    ------
    OptionError
        For a value that cannot be, or if `sink` and `recent`, given explicitly, do not fit in the budget.
    """

    budget: int | float | str
    budgets: str = "uniform"
    profile: str | Path | Profile | None = None
    block_size: int = 128
    schedule: str = "block"
    sink: int | None = None
    recent: int | None = None
    core: str = "flash_scored"

    def __post_init__(self) -> None:
        if isinstance(self.budget, float):
            if not 0 < self.budget <= 1:
                raise OptionError(f"budget must be a whole number, or a share above 0 and at most 1, not {self.budget}")
        elif isinstance(self.budget, str):
            parse_bytes("budget", self.budget)
        else:
            check_int("budget", self.budget, minimum=1)
        self._check_budgets()
        check_int("block_size", self.block_size, minimum=1)
        check_choice("schedule", self.schedule, SCHEDULES)
        for name in ("sink", "recent"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), minimum=0)
        if isinstance(self.budget, int) and (self.sink or 0) + (self.recent or 0) > self.budget:
            raise OptionError(
                f"sink={self.sink or 0} + recent={self.recent or 0} is over budget={self.budget}: protected entries "
                "must fit in it"
            )

    def _check_budgets(self) -> None:
        check_choice("budgets", self.budgets, BUDGETS)
        if self.budgets == "measured" and self.profile is None:
            raise OptionError(
                "budgets='measured' needs profile=, a file that is made once for a model: "
                "python -m attnzoo.eviction.profile MODEL TEXT --out FILE"
            )
        if self.budgets == "measured":
            Profile.of(self.profile)  # so that a bad file is refused at once
        elif self.profile is not None:
            raise OptionError(f"profile= is for budgets='measured', and budgets is {self.budgets!r}")
        if self.budgets == "adaptive":
            why = self.not_adaptive()
            if why:
                raise OptionError(f"budgets='adaptive' compares the scores of the heads of a layer, and {why}")

    def not_adaptive(self) -> str:
        """Say why the heads of a layer cannot share its budget by this policy's scores; empty if they can."""
        if self.scope == "layer":
            return "this policy keeps the same entries in all heads of a layer; use another, or budgets by layer"
        if type(self).keep is not Policy.keep:
            return "this policy does not choose by scores; use another, or budgets by layer"
        if not self.comparable:
            return (
                f"those of {type(self).__name__} mean nothing from head to head; use one that scores by attention per "
                "head, such as h2o, snapkv or caote, or keydiff (a policy of your own can say that its scores do, by a "
                "property `comparable` that is True)"
            )
        return ""

    def entries_at(self, count: int) -> int:
        """Entries kept per key/value head of a row that has seen `count` real tokens; a mean, if heads share them."""
        assert not isinstance(self.budget, str), "the swap turns bytes into entries"
        if isinstance(self.budget, int):
            return self.budget
        return max(1, self.pinned, int(self.budget * count))

    @property
    def by_layer(self) -> bool:
        """Whether only the swap can tell what a layer gets."""
        return isinstance(self.budget, str) or self.budgets in ("pyramid", "measured")

    @property
    def pinned(self) -> int:
        """Entries that `sink` and `recent`, where the user gives them, protect."""
        return (self.sink or 0) + (self.recent or 0)

    def most_at(self, count: int) -> int:
        """The most entries that a row of `count` real tokens may hold between calls, once the prompt is over."""
        return self.entries_at(count - count % self.every) + count % self.every

    def at(self, count: int) -> Self:
        """The policy with its budget as a number of entries, for a row that has seen `count` real tokens."""
        return self.changed(budget=self.entries_at(count)) if isinstance(self.budget, float) else self

    def changed(self, **values: Any) -> Self:
        """A policy with other values of its fields, checked anew, whatever its constructor takes."""
        other = object.__new__(type(self))
        kept = {k: v for k, v in vars(self).items() if not isinstance(getattr(type(self), k, None), cached_property)}
        other.__dict__.update(kept | values)
        other.__post_init__()
        return other

    @property
    def every(self) -> int:
        """Tokens between evictions, once the prompt is over where that is waited for."""
        return 1 if self.schedule == "step" else self.block_size

    @property
    def accumulates(self) -> bool:
        """Whether `CacheView.sums` is needed."""
        return False

    @property
    def own_weights(self) -> bool:
        """Whether what is accumulated is not the attention itself but what `weights` gives."""
        return False

    def weights(self, view: CacheView) -> Tensor:
        """What each entry gets from each new query, ``(B, H, w, S)``; asked where the policy has `own_weights`.

        `view` has the new queries, of which some may have position -1 and must give nothing, and `Store` may hold empty
        entries of position -1, which must get nothing: see `CacheView.visible`.
        """
        return view.window_attention()

    @property
    def queries_kept(self) -> int:
        """How many of the last queries `CacheView.queries` must hold."""
        return 0

    @property
    def sums_window(self) -> bool:
        """Whether of the window the sums of its attention are needed, not the attention of each query."""
        return self.queries_kept > 0

    @property
    def comparable(self) -> bool:
        """Whether scores of different heads of a layer mean the same, so that ``budgets="adaptive"`` is possible."""
        return False

    @property
    def uses_output_weight(self) -> bool:
        """Whether `CacheView.output_weight` is needed."""
        return False

    @property
    def uses_rotary(self) -> bool:
        """Whether the rotary embedding is needed, which then is in `CacheView.data`."""
        return False

    def check_layer(self, data: LayerData) -> None:  # noqa: B027 (most have nothing to say)
        """Raise `OptionError` or `UnsupportedError` if the policy cannot stand in a layer; called before a swap."""

    @property
    def scope(self) -> Scope:
        """Whether each key/value head keeps entries of its own (``head``) or all of a layer the same (``layer``)."""
        return "head"

    def default_sink(self) -> int:
        """First tokens protected where the user says nothing, before it is cut to fit."""
        return 0

    def default_recent(self, sink: int) -> int:
        """Last tokens protected where the user says nothing, before it is cut to fit."""
        return 0

    @property
    def protected(self) -> tuple[int, int]:
        """First and last tokens that are never evicted, defaults filled in, where the budget is a number of entries.

        A default for the first takes at most half of what is left of the budget, one for the last at most the rest.
        """
        assert isinstance(self.budget, int)
        left = self.budget - (self.recent or 0)
        sink = min(self.default_sink(), left // 2) if self.sink is None else self.sink
        recent = min(self.default_recent(sink), self.budget - sink) if self.recent is None else self.recent
        return sink, recent

    @abstractmethod
    def score(self, view: CacheView) -> Tensor:
        """Give every entry a score, ``(B, Hkv, S)``: the lowest go, NaN first. Of equal scores the older goes first."""

    def keep(self, view: CacheView) -> Tensor:
        """Indices of the entries that stay, ``(B, Hkv, budget)``, in time order; the budget is a number of entries."""
        assert isinstance(self.budget, int)
        return highest(self.guarded_score(view), self.budget)

    def guarded_score(self, view: CacheView) -> Tensor:
        """Give `score`, ``(B, Hkv, S)``, with infinity for the protected entries and for no others."""
        scores = _checked(self, "score", self._scored(view), view.positions.shape)
        scores = scores if scores.is_floating_point() else scores.double()
        most = torch.finfo(scores.dtype).max
        scores = scores.nan_to_num(nan=float("-inf"), posinf=most, neginf=float("-inf"))
        return scores.masked_fill(self.protects(view), float("inf"))

    def _scored(self, view: CacheView) -> Tensor:
        """Give `score`; a note on an error about None says which parts of the view the policy would have to ask for."""
        try:
            return self.score(view)
        except (AttributeError, TypeError) as error:
            if "None" in str(error) and (why := _not_asked(self)):
                error.add_note(why)
            raise

    def protects(self, view: CacheView) -> Tensor:
        """Which entries are never evicted, ``(B, Hkv, S)``."""
        sink, recent = self.protected
        return (view.positions < sink) | (view.positions >= (view.counts - recent)[:, None, None])


@dataclass(frozen=True, kw_only=True)
class AttentionPolicy(Policy):
    """Base of the policies that score by attention; the wrappers `vatp`, `caote` and `criticalkv` take any of them.

    Parameters
    ----------
    aggregate
        How the scores of query heads that share a key/value head, or a layer where the policy chooses for a whole
        layer, become one: ``mean``, ``max`` or ``sum``, which ranks as the mean does.
    """

    aggregate: str = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("aggregate", self.aggregate, AGGREGATES)

    @property
    def comparable(self) -> bool:
        """Attention sums to 1 in each head."""
        return True

    @abstractmethod
    def attention_scores(self, view: CacheView) -> Tensor:
        """Give every entry a score of at least 0 for each query head, ``(B, H, S)``."""

    def aggregated(self, view: CacheView) -> Tensor:
        """Give `attention_scores`, aggregated over the heads that choose together, ``(B, Hkv, S)``; of no values."""
        return combined(by_group(self.checked_attention_scores(view), view.kv_heads), self.aggregate, self.scope)

    def score(self, view: CacheView) -> Tensor:
        """`attention_scores`, aggregated over the query heads that share a key/value head or, in scope, a layer."""
        return self.aggregated(view)

    def checked_attention_scores(self, view: CacheView) -> Tensor:
        """Give `attention_scores`, ``(B, H, S)``.

        Raises
        ------
        ShapeError
            If they are of another shape.
        """
        batch, kv_heads, entries = view.positions.shape
        scores = self.attention_scores(view)
        heads = scores.shape[1] if isinstance(scores, Tensor) and scores.dim() == 3 else 0
        if heads == 0 or heads % kv_heads:
            heads = kv_heads  # the least number of query heads that there may be
        return _checked(self, "attention_scores", scores, (batch, heads, entries))


def _not_asked(policy: Policy) -> str:
    """Name the parts of a view that are None since the policy does not ask for them; empty where there is none."""
    asked = {
        "sums (accumulates)": policy.accumulates,
        "queries (queries_kept)": policy.queries_kept,
        "data.rotary (uses_rotary)": policy.uses_rotary,
    }
    missing = ", ".join(name for name, one in asked.items() if not one)
    said = f"{type(policy).__name__} does not ask for these parts of the view, by the property in brackets: {missing}"
    return said if missing else ""


def _checked(policy: Policy, method: str, scores: Any, shape: Sequence[int]) -> Tensor:
    """Give `scores`, which `method` of a policy gave, back if they are of `shape`, else raise `ShapeError`."""
    if not isinstance(scores, Tensor) or tuple(scores.shape) != tuple(shape):
        given = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else short(scores)
        why = _not_asked(policy) if scores is None else ""
        raise ShapeError(
            f"{type(policy).__name__}.{method} gave {given}, and there must be a score for each entry of each head: a "
            f"tensor of shape {tuple(shape)}{f'. {why}' if why else ''}"
        )
    return scores


def highest(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` highest scores of ``(..., S)`` in ascending order, the later of equal ones first.

    A third of the time of a stable sort of all, and without asking the device anything.
    """
    least = scores.topk(count, dim=-1, sorted=False).values.amin(-1, keepdim=True)
    above, equal = scores > least, scores == least
    from_here = equal.flip(-1).cumsum(-1).flip(-1)  # of the equal ones, how many there are from here on
    keep = above | (equal & (from_here <= count - above.sum(-1, keepdim=True)))
    place = (keep.cumsum(-1) - 1).masked_fill(~keep, count)  # what does not stay goes to a last place, cut off
    found = place.new_empty(*scores.shape[:-1], count + 1)
    entries = torch.arange(scores.shape[-1], device=scores.device).expand_as(place)
    return found.scatter_(-1, place, entries)[..., :count]


def combined(scores: Tensor, aggregate: str, scope: Scope) -> Tensor:
    """Scores of query heads ``(B, Hkv, G, S)`` as those of key/value heads ``(B, Hkv, S)``.

    Parameters
    ----------
    scores
        By group, as `by_group` gives them.
    aggregate
        ``mean``, ``max`` or ``sum``.
    scope
        ``head`` takes each group together, ``layer`` all query heads, with the same outcome for each key/value head.
    """
    if scope == "layer":
        together = scores.flatten(1, 2)[:, None]  # (B, 1, H, S)
        return combined(together, aggregate, "head").expand(-1, scores.shape[1], -1)
    if aggregate == "max":
        return scores.amax(2)
    return scores.mean(2) if aggregate == "mean" else scores.sum(2)


def by_group(scores: Tensor, kv_heads: int) -> Tensor:
    """``(B, H, S)`` as ``(B, Hkv, H / Hkv, S)``."""
    return scores.unflatten(1, (kv_heads, scores.shape[1] // kv_heads))


def wide(x: Tensor) -> Tensor:
    """Float64 stays, everything else becomes float32: scores are computed in it."""
    return x.to(score_dtype(x.dtype))
