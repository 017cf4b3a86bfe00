"""What `vatp`, `caote` and `criticalkv` share: they take the scores of an attention-based policy and add the values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

from attnzoo.errors import OptionError, UnknownNameError
from attnzoo.eviction.layer_data import LayerData
from attnzoo.eviction.policy import AttentionPolicy, CacheView, Policy, Scope
from attnzoo.registry import build_policy, describe, list_attentions

_OWN = ("budget", "budgets", "profile", "block_size", "schedule", "sink", "recent", "core")


@dataclass(frozen=True, kw_only=True)
class Wrapper(Policy):
    """A policy over another one.

    Parameters
    ----------
    base
        Name of an attention-based policy.
    base_options
        Options of the base; `budget`, `budgets`, `profile`, `block_size`, `schedule`, `sink`, `recent` and `core` are
        the wrapper's.

    Raises
    ------
    UnknownNameError, OptionError
        If there is no such policy, it does not score by attention, or an option is not its own.
    """

    base: str = "h2o"
    base_options: Mapping[str, Any] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.inner  # so that a bad base is refused at once

    @cached_property
    def inner(self) -> AttentionPolicy:
        """The policy underneath."""
        able = ", ".join(name for name in list_attentions("eviction") if _scores_by_attention(name))
        if self.base not in list_attentions():
            raise UnknownNameError(
                f"base={self.base!r}: there is no such policy; those that score by attention: {able}"
            )
        if not _scores_by_attention(self.base):
            raise OptionError(f"base={self.base!r} does not score by attention; those that do: {able}")
        if self.base_options is not None and not isinstance(self.base_options, Mapping):
            raise OptionError(f"base_options is a mapping of options of {self.base!r}, not {self.base_options!r}")
        options = dict(self.base_options or {})
        for name in _OWN:
            if name in options:
                raise OptionError(f"base_options: {name} is an option of the wrapper; give it there")
        policy = build_policy(describe(self.base), {**options, "budget": self.budget, "block_size": self.block_size})
        assert isinstance(policy, AttentionPolicy)
        return policy

    @property
    def scope(self) -> Scope:
        """The base's."""
        return self.inner.scope

    @property
    def comparable(self) -> bool:
        """If the base's are."""
        return self.inner.comparable

    @property
    def accumulates(self) -> bool:
        """What the base needs."""
        return self.inner.accumulates

    @property
    def own_weights(self) -> bool:
        """What the base needs."""
        return self.inner.own_weights

    def weights(self, view: CacheView) -> Tensor:
        """The base's."""
        return self.inner.weights(view)

    @property
    def queries_kept(self) -> int:
        """What the base needs."""
        return self.inner.queries_kept

    @property
    def sums_window(self) -> bool:
        """What the base needs."""
        return self.inner.sums_window

    @property
    def uses_output_weight(self) -> bool:
        """What the base needs."""
        return self.inner.uses_output_weight

    @property
    def uses_rotary(self) -> bool:
        """What the base needs."""
        return self.inner.uses_rotary

    def check_layer(self, data: LayerData) -> None:
        """What the base says."""
        self.inner.check_layer(data)

    def default_sink(self) -> int:
        """The base's."""
        return self.inner.default_sink()

    def default_recent(self, sink: int) -> int:
        """The base's."""
        return self.inner.default_recent(sink)


def _scores_by_attention(name: str) -> bool:
    target = describe(name).load()
    return isinstance(target, type) and issubclass(target, AttentionPolicy)
